"""Figures that move: a slider over stored frames that needs no kernel, and controls that recompute with one.

A player is plain HTML. It works on the published page, offline, in Colab and in JupyterLab, by mouse and by keyboard;
without script and on paper it is its first frame.
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from IPython.display import HTML, Markdown
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from effens.chooser import BUDGETS, GOALS, choose, score_of


def player(
    draw: Callable[[Any, Any], object],
    values: Iterable[Any],
    *,
    alt: str | Callable[[Any], str],
    label: str = "members",
    words: Callable[[Any], str] | None = None,
    axes: tuple[int, int] = (1, 1),
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    colors: int = 64,
    interval: int = 600,
    max_kb: float = 300,
) -> HTML:
    """A figure with a slider: one frame per value, drawn now, shown anywhere.

    Set the axes' limits in `draw`, so that frames compare. The axes stand at the same place in all frames.

    Args:
        draw: `draw(ax, value)` draws one frame on empty axes; an array of them where `axes` asks for more than one.
        values: one frame each, in the slider's order.
        alt: what the picture shows, for those who do not see it: `alt(value)`, or one text, to which the value's
            words are added.
        label: of the slider.
        words: the value in a few words, shown under the picture; f"{label} {value}" when None.
        axes: rows and columns of axes.
        figsize: inches; the style's when None. How large the picture is shown depends on it alone.
        dpi: pixels stored per inch; the style's when None. More are sharper and take more of the page.
        colors: shared by all frames. Fewer make a smaller page; maps of color need more.
        interval: milliseconds per frame while it plays.
        max_kb: the most the HTML may take, in thousands of bytes.

    Returns:
        The same HTML for the same pictures, so that stored notebooks differ only where a figure does.

    Raises:
        ValueError: no values, no alt text, or a player over `max_kb`.
    """
    values = list(values)
    if not values:
        raise ValueError("values must hold at least one value, got none")
    said = [words(value) if words else f"{label} {value}" for value in values]
    alts = [alt(value) if callable(alt) else f"{alt}: {text}" for value, text in zip(values, said, strict=True)]
    if not all(text.strip() for text in ([alt] if isinstance(alt, str) else alts)):
        raise ValueError(f"alt must say what the picture shows, got {alt if isinstance(alt, str) else alts!r}")

    pictures = _pictures(draw, values, axes, figsize, dpi, colors)
    width, height = (round(inches * mpl.rcParams["figure.dpi"]) for inches in figsize or mpl.rcParams["figure.figsize"])
    # One frame a line, "<" never: text in it cannot end the script.
    frames = json.dumps(list(zip(pictures, alts, said, strict=True)), indent=0).replace("<", "\\u003c")
    controls = _CONTROLS.format(label=html.escape(label), last=len(values) - 1, words=html.escape(said[0]))
    script = f'<script type="application/json">{frames}</script>\n{_SCRIPT.replace("INTERVAL", str(int(interval)))}'
    lines = math.ceil(max(map(len, said)) / 40)  # on a phone, so that longer words move nothing
    page = f"""<div class="effens-player" data-lm-suppress-shortcuts="true" style="max-width: {width}px">
{_STYLE}
<img src="{pictures[0]}" alt="{html.escape(alts[0])}" width="{width}" height="{height}">
{controls if len(values) > 1 else ""}
<output aria-live="polite" style="min-height: {1.5 * lines}em">{html.escape(said[0])}</output>
{script if len(values) > 1 else ""}
</div>"""
    if len(page) > 1000 * max_kb:
        raise ValueError(
            f"a player must take at most {max_kb:g} KB, got {len(page) / 1000:.0f} KB for {len(values)} frames: "
            "fewer values or colors, or a smaller figsize or dpi, make it smaller"
        )
    return HTML(page)


def bet(question: str, choices: Sequence[str], *, answer: str, because: str) -> HTML:
    """A question to the reader, who commits to a choice and then opens the answer. Plain HTML, no script.

    Args:
        question: one sentence.
        choices: at least two.
        answer: the right one of them.
        because: what decides it, shown with the answer.
    """
    if len(choices) < 2 or answer not in choices:
        raise ValueError(f"choices must be at least two and hold the answer {answer!r}, got {list(choices)}")
    radios = "\n".join(f'<label><input type="radio" name="bet"> {html.escape(choice)}</label>' for choice in choices)
    # A form keeps its radio buttons to itself, so that two bets on a page need no ids; method "dialog" sends nothing.
    return HTML(f"""<form class="effens-bet" method="dialog" data-lm-suppress-shortcuts="true">
{_BET_STYLE}
<fieldset><legend>{html.escape(question)}</legend>
{radios}
</fieldset>
<details><summary>I have chosen: show the answer</summary>
<p><strong>{html.escape(answer)}.</strong> {html.escape(because)}</p></details>
</form>""")


def chooser(task: str = "digits") -> HTML:
    """Return the same rule as a table with controls: plain HTML, which works with no kernel, by mouse and by keyboard.

    Without script it is the table of all methods, the best for the NLL first.
    """
    goals = {"nll": "NLL on test data", "accuracy": "accuracy", "shift": "NLL on rotated images"}
    goals["unknown"] = "telling letters from digits"
    rows = []
    for choice in choose(task=task):
        costs = [round(choice.costs[key], 2) for key in BUDGETS.values()]
        scores = [round(score_of(task, choice.method, goal), 4) for goal in goals]
        cells = "".join(f"<td>{cost:.1f}x</td>" for cost in costs)
        rows.append(
            f'<tr data-costs="{json.dumps(costs)}" data-scores="{json.dumps(scores)}">'
            f"<th scope='row'>{html.escape(choice.method)}</th>{cells}<td>{scores[0]:.3f}</td></tr>"
        )
    less = json.dumps([GOALS[goal][2] for goal in goals])
    options = "".join(f"<option value='{i}'>{html.escape(words)}</option>" for i, words in enumerate(goals.values()))
    limits = ("any", 1.5, 2, 3, 4, 5, 12)
    budgets = "".join(
        f"<label>{html.escape(words)} <select>"
        + "".join(f"<option value='{limit}'>{limit if limit == 'any' else f'{limit}x'}</option>" for limit in limits)
        + "</select></label>"
        for words in ("training at most", "one prediction", "256 predictions", "memory")
    )
    heads = "".join(f"<th scope='col'>{word}</th>" for word in ("", *BUDGETS.values()))
    return HTML(f"""<div class="effens-chooser">
<style>
.effens-chooser {{ overflow-x: auto; color: inherit; }}
.effens-chooser form {{ display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; margin-bottom: 0.75rem; }}
.effens-chooser select {{ font: inherit; min-height: 2.2em; color: inherit; background: Canvas; color: CanvasText; }}
.effens-chooser table {{ border-collapse: collapse; }}
.effens-chooser td, .effens-chooser th {{ padding: 0.2rem 0.7rem; text-align: right; font-weight: normal; }}
.effens-chooser th[scope=row] {{ text-align: left; }}
.effens-chooser tr.out {{ opacity: 0.45; text-decoration: line-through; }}
</style>
<form onsubmit="return false">{budgets}<label>what matters <select>{options}</select></label></form>
<p aria-live="polite"></p>
<table><thead><tr>{heads}<th scope="col">score</th></tr></thead><tbody>{"".join(rows)}</tbody></table>
<script>
(function () {{
  const box = document.currentScript.closest(".effens-chooser"), less = {less};
  const selects = [...box.querySelectorAll("select")], body = box.querySelector("tbody");
  const rows = [...body.rows].map(row => ({{row, costs: JSON.parse(row.dataset.costs),
    scores: JSON.parse(row.dataset.scores)}}));
  function show() {{
    const limits = selects.slice(0, 4).map(s => s.value === "any" ? Infinity : +s.value), goal = +selects[4].value;
    for (const r of rows) r.out = r.costs.some((cost, i) => cost > limits[i]);
    rows.sort((a, b) => a.out - b.out || (less[goal] ? 1 : -1) * (a.scores[goal] - b.scores[goal]));
    for (const r of rows) {{
      r.row.classList.toggle("out", r.out);
      r.row.lastElementChild.textContent = r.scores[goal].toFixed(3);
      body.append(r.row);
    }}
    const fit = rows.filter(r => !r.out);
    box.querySelector("p").textContent = fit.length ?
      fit.length + " of " + rows.length + " qualify; the best mean: " + fit[0].row.cells[0].textContent :
      "None qualifies: a single network is the cheapest there is.";
  }}
  selects.forEach(s => s.addEventListener("change", show));
  show();
}})();
</script></div>""")


def live(update: Callable[..., Any], **controls: Any) -> Any:
    """Controls that recompute: with a kernel, moving one calls `update` and shows what it draws or prints.

    A page has no kernel: where `EFFENS_STATIC` is set, as when the book's outputs are stored, a sentence says how to
    get the controls, and nothing is computed.

    Args:
        update: called with one keyword argument per control, at once and after each change; an error is shown in
            place of its output.
        controls: ipywidgets, or what `ipywidgets.interact` takes for them: `members=(1, 10)`, `rate=[1e-3, 1e-2]`.

    Returns:
        An `ipywidgets.interactive`: what `update` gave last is its `result`; or the sentence, as Markdown.
    """
    if not controls:
        raise ValueError("controls must hold at least one control, got none")
    if os.environ.get("EFFENS_STATIC", "0") not in ("", "0"):
        *others, last = controls
        names = f"{', '.join(others)} and {last}" if others else last
        return Markdown(f"*Run this cell in Colab or Jupyter to change {names}.*")
    from ipywidgets import interactive  # only a live cell needs it

    box = interactive(update, **controls)
    for control in box.kwargs_widgets:
        if control.has_trait("continuous_update"):
            control.continuous_update = False  # recompute when the slider rests
    return box


def _pictures(
    draw: Callable[[Any, Any], object],
    values: list[Any],
    axes: tuple[int, int],
    figsize: tuple[float, float] | None,
    dpi: float | None,
    colors: int,
) -> list[str]:
    """Each value's frame as the data URL of a PNG."""
    figures = []
    for value in values:
        figure = Figure(figsize=figsize, dpi=dpi, layout="constrained")  # no pyplot: nothing else is shown or left open
        draw(figure.subplots(*axes), value)
        figure.draw_without_rendering()
        figures.append(figure)
    _align(figures)

    rows = [_rendered(figure) for figure in figures]
    height, width, _ = rows[0].shape
    # One palette for all frames, or colors would flicker.
    sheet = Image.fromarray(np.concatenate(rows)).quantize(colors, dither=Image.Dither.NONE)
    urls = []
    for i in range(len(values)):
        file = io.BytesIO()
        sheet.crop((0, i * height, width, (i + 1) * height)).save(file, "png", optimize=True)
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def _align(figures: list[Figure]) -> None:
    """Give every axes the room that it has in all figures, or the picture would jump from frame to frame."""
    for same in zip(*(figure.axes for figure in figures), strict=False):
        boxes = np.array([ax.get_position(original=True).extents for ax in same])
        room = Bbox.from_extents(*boxes[:, :2].max(0), *boxes[:, 2:].min(0))
        for ax in same:
            ax.get_figure().set_layout_engine("none")
            ax.set_position(room)


def _rendered(figure: Figure) -> np.ndarray:
    """The figure's pixels, (height, width, red green blue)."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


# Colors are the page's own, so that light and dark pages both stay legible. The book's theme would put a light panel
# behind any HTML output of a dark page.
_DARK = """html[data-theme="dark"] .bd-content div.cell_output .text_html:has(div.effens-player, form.effens-bet) {
  padding: 0; color: inherit; background: none; }
html[data-theme="dark"] .bd-content div.cell_output .effens-player img { padding: 0; }"""

_STYLE = f"""<style>
{_DARK}
.effens-player {{ margin: 0 0 1rem; color: inherit; }}
.effens-player img {{ display: block; width: 100%; height: auto; }}
.effens-player [hidden] {{ display: none !important; }}
.effens-player .controls {{ display: flex; align-items: center; gap: 0.75rem; margin-top: 0.5rem; }}
.effens-player button {{ min-width: 5em; min-height: 2.4em; padding: 0 0.75em; font: inherit; color: inherit;
  background: transparent; border: 1px solid currentColor; border-radius: 0.3em; cursor: pointer; }}
.effens-player label {{ display: flex; flex: 1; align-items: center; gap: 0.5rem; min-width: 0; margin: 0; }}
.effens-player input {{ flex: 1; min-width: 0; height: 2.4em; margin: 0; accent-color: #0072b2; cursor: pointer; }}
.effens-player :is(button, input):focus-visible {{ outline: 2px solid currentColor; outline-offset: 2px; }}
.effens-player output {{ display: block; line-height: 1.5; }}
@media print {{ .effens-player .controls {{ display: none; }} }}
</style>"""

# hidden="hidden": JupyterLab drops attributes without a value from notebooks that it does not trust.
_CONTROLS = """<div class="controls" hidden="hidden">
<button type="button">Play</button>
<label>{label}
<input type="range" min="0" max="{last}" step="1" value="0" aria-valuetext="{words}" autocomplete="off"></label>
</div>"""

# No ids: a script starts every player that has not been started, wherever a notebook's front end puts the script.
_SCRIPT = """<script>
document.querySelectorAll(".effens-player").forEach(function (root) {
  var controls = root.querySelector(".controls");
  if (!controls || root.effensStarted) return;
  root.effensStarted = true;
  var image = root.querySelector("img"), slider = root.querySelector("input"), button = root.querySelector("button");
  var output = root.querySelector("output"), frames = JSON.parse(root.querySelector("script").textContent);
  var calm = matchMedia("(prefers-reduced-motion: reduce)"), timer = 0, last = frames.length - 1;
  function show(i) {
    slider.value = i;
    image.src = frames[i][0];
    image.alt = frames[i][1];
    output.textContent = frames[i][2];
    slider.setAttribute("aria-valuetext", frames[i][2]);
  }
  function pause() {
    clearInterval(timer);
    timer = 0;
    button.textContent = calm.matches ? "Next" : "Play";
    output.setAttribute("aria-live", "polite");
  }
  function step() {
    show(Math.min(+slider.value + 1, last));
    if (+slider.value === last || !root.isConnected) pause();
  }
  button.addEventListener("click", function () {
    if (timer) return pause();
    var again = +slider.value === last;
    if (calm.matches) return show(again ? 0 : +slider.value + 1);
    if (again) show(0);
    output.setAttribute("aria-live", "off");
    button.textContent = "Pause";
    timer = setInterval(step, INTERVAL);
  });
  slider.addEventListener("input", function () { pause(); show(+slider.value); });
  calm.addEventListener("change", pause);
  // Notebooks bind the arrow keys to their own commands.
  root.addEventListener("keydown", function (event) { event.stopPropagation(); });
  show(0);
  pause();
  controls.hidden = false;
});
</script>"""

_BET_STYLE = f"""<style>
{_DARK}
.effens-bet {{ margin: 0 0 1rem; color: inherit; }}
.effens-bet fieldset {{ margin: 0; padding: 0.5rem 1rem; border: 1px solid currentColor; border-radius: 0.3em; }}
.effens-bet legend {{ float: none; width: auto; margin: 0; padding: 0 0.3em; font: inherit; font-weight: bold; }}
.effens-bet label {{ display: block; padding: 0.25em 0; cursor: pointer; }}
.effens-bet input {{ accent-color: #0072b2; }}
.effens-bet details {{ margin-top: 0.5rem; }}
.effens-bet summary {{ cursor: pointer; }}
</style>"""
