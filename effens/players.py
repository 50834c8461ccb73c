"""Figures that move: a slider over stored frames that needs no kernel, and controls that recompute with one.

A player is plain HTML. It works on the published page, offline, in Colab and in JupyterLab, by mouse and by keyboard;
without script and on paper it is its first frame.
"""

import base64
import html
import inspect
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from effens.chooser import BUDGETS, GOALS, alike, choose, score_of
from effens.data import GapRegression
from effens.ensembles.base import Ensemble
from effens.likelihoods import Gaussian, mixture
from effens.training import predict


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
        ValueError: no values, no alt text, colors outside 2 ... 256, or a player over `max_kb`.
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
    frames = list(zip(pictures, alts, said, strict=True))
    page = _page(pictures[0], width, height, alts[0], label, frames, _STYLE, _SCRIPT, interval, max_kb)
    return HTML(page)


def reveal(
    draw: Callable[[Any], object],
    stops: Sequence[Any],
    *,
    words: Sequence[str],
    alt: str,
    label: str = "day",
    axes: tuple[int, int] = (1, 1),
    figsize: tuple[float, float] | None = None,
    dpi: float | None = None,
    colors: int = 64,
    interval: int = 150,
    max_kb: float = 300,
) -> HTML:
    """A figure that a slider uncovers from left to right, as time did: right of a stop it shows empty axes.

    It stores two pictures, the whole and its empty axes with their labels and legends, so hundreds of stops cost
    little. Without script and on paper all of it is seen.

    Args:
        draw: `draw(ax)` draws the whole on empty axes; an array of them where `axes` asks for more than one.
        stops: where the slider stops, on the first axes' x-axis, ascending.
        words: what to say at each stop.
        alt: what the whole picture shows; the words of a stop are added.
        label: of the slider.
        axes: rows and columns of axes, of which all that share a column should share x.
        figsize: inches; the style's when None.
        dpi: pixels stored per inch; the style's when None.
        colors: of the picture.
        interval: milliseconds per stop while it plays.
        max_kb: the most the HTML may take, in thousands of bytes.

    Raises:
        ValueError: fewer than two stops, not as many words, no alt text, colors outside 2 ... 256, or a picture over
            `max_kb`.
    """
    if len(stops) < 2 or len(words) != len(stops):
        raise ValueError(f"stops must be at least 2, with words for each, got {len(stops)} and {len(words)} words")
    if not alt.strip():
        raise ValueError(f"alt must say what the picture shows, got {alt!r}")
    figure = Figure(figsize=figsize, dpi=dpi, layout="constrained")
    drawn = figure.subplots(*axes)
    draw(drawn)
    figure.draw_without_rendering()
    first = np.ravel(drawn)[0]
    at = [first.transData.transform((first.convert_xunits(stop), 0))[0] / figure.bbox.width for stop in stops]
    covered = [f"{100 * (1 - share):.2f}" for share in at]
    whole = _rendered(figure)
    figure.set_layout_engine("none")  # or empty axes would move
    for ax in figure.axes:
        for artist in (*ax.lines, *ax.collections, *ax.patches, *ax.images, *ax.texts, *ax.tables, *ax.artists):
            artist.set_visible(False)
    picture, empty = _encoded([whole, _rendered(figure)], colors)
    width, height = (round(inches * mpl.rcParams["figure.dpi"]) for inches in figsize or mpl.rcParams["figure.figsize"])
    frames = [[share, f"{alt}: {text}", text] for share, text in zip(covered, words, strict=True)]
    script = _SCRIPT.replace("image.src = frames[i][0]", 'image.style.clipPath = "inset(0 " + frames[i][0] + "% 0 0)"')
    paper = "@media print { .effens-player img { clip-path: none !important; } }\n</style>"
    style = _STYLE.replace("</style>", paper)
    page = _page(picture, width, height, alt, label, frames, style, script, interval, max_kb, behind=empty)
    return HTML(page.replace("effens-player", "effens-reveal"))


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


def chooser() -> HTML:
    """Return `effens.choose` as a table with controls: plain HTML, which works with no kernel, by mouse and keyboard.

    Without script it is the table of all methods, the best for the NLL first.
    """
    goals = {"nll": "NLL on test data", "accuracy": "accuracy", "shift": "NLL on rotated images"}
    goals["unknown"] = "telling letters from digits"
    choices = choose()
    names = [choice.method for choice in choices]
    rows = []
    for choice in choices:
        costs = [round(choice.costs[key], 2) for key in BUDGETS.values()]
        scores = [round(score_of(choice.method, goal), 4) for goal in goals]
        same = [[i for i, name in enumerate(names) if alike(choice.method, name, goal)] for goal in goals]
        cells = "".join(f"<td>{choice.costs[key]:.1f}x</td>" for key in BUDGETS.values())
        facts = {"costs": costs, "scores": scores, "same": same}
        data = " ".join(f'data-{key}="{json.dumps(value)}"' for key, value in facts.items())
        rows.append(f"<tr {data}><th scope='row'>{html.escape(choice.method)}</th>{cells}<td>{scores[0]:.3f}</td></tr>")
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
  const rows = [...body.rows].map((row, i) => ({{row, i, name: row.cells[0].textContent,
    ...Object.fromEntries(["costs", "scores", "same"].map(key => [key, JSON.parse(row.dataset[key])]))}}));
  function show() {{
    const limits = selects.slice(0, 4).map(s => s.value === "any" ? Infinity : +s.value), goal = +selects[4].value;
    for (const r of rows) r.out = r.costs.some((cost, i) => cost > limits[i]);
    rows.sort((a, b) => a.out - b.out || (less[goal] ? 1 : -1) * (a.scores[goal] - b.scores[goal]));
    for (const r of rows) {{
      r.row.classList.toggle("out", r.out);
      r.row.lastElementChild.textContent = r.scores[goal].toFixed(3);
      body.append(r.row);
    }}
    const fit = rows.filter(r => !r.out), best = fit[0];
    const same = fit.slice(1).filter(r => best.same[goal].includes(r.i)).map(r => r.name);
    box.querySelector("p").textContent = fit.length ?
      fit.length + " of " + rows.length + " qualify; the best mean: " + best.name + (same.length ?
      "; cannot be told from it: " + same.join("; ") : "; all others can be told from it") :
      "None qualifies: a single network is the cheapest there is.";
  }}
  selects.forEach(s => s.addEventListener("change", show));
  show();
}})();
</script></div>""")


def planner(trainings: int, seconds: float, start: float) -> HTML:
    """Return a table of what 1 ... 1000 machines bring, whose inputs can be changed with no kernel.

    The price appears once one is given; what cannot be computed with is said, and the table is empty meanwhile.

    Args:
        trainings: how many, all alike.
        seconds: of each.
        start: seconds until a machine begins, and whatever else no machine can share.
    """
    machines = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    rows = ""
    for count in machines:
        took = start + seconds * math.ceil(trainings / count)
        speed, busy = (start + seconds * trainings) / took, 100 * trainings * seconds / (count * took)
        cells = _duration(took), f"{speed:.1f}x", f"{busy:.0f}%", f"{count * took / 3600:.2f}"
        shown = "".join(f"<td>{cell}</td>" for cell in cells) + "<td hidden='hidden'></td>"
        rows += f"<tr><th scope='row'>{count}</th>{shown}</tr>"
    asked = {
        "trainings": (f"{trainings:g}", "give a whole number above 0"),
        "seconds of each": (f"{seconds:g}", "give a number above 0"),
        "seconds to start": (f"{start:g}", "give 0 or a number above 0"),
        "price of an hour": ("", "give 0 or a number above 0, or none"),
    }
    fields = "".join(
        f"<label>{words} <input type='number' min='0' step='any' value='{value}' data-rule='{words}: {rule}'></label>"
        for words, (value, rule) in asked.items()
    )
    heads = "".join(f"<th scope='col'>{head}</th>" for head in ("machines", "time", "faster", "busy", "machine-hours"))
    heads += "<th scope='col' hidden='hidden'>price</th>"
    return HTML(f"""<div class="effens-planner" data-lm-suppress-shortcuts="true">
<style>
{_DARK.replace("div.effens-player", "div.effens-planner")}
.effens-planner {{ overflow-x: auto; color: inherit; }}
.effens-planner form {{ display: flex; flex-wrap: wrap; gap: 0.5rem 1rem; margin-bottom: 0.75rem; }}
.effens-planner input {{ font: inherit; width: 6em; min-height: 2.2em; color: CanvasText; background: Canvas; }}
.effens-planner table {{ border-collapse: collapse; }}
.effens-planner [hidden] {{ display: none !important; }}
.effens-planner p:empty {{ display: none; }}
.effens-planner td, .effens-planner th {{ padding: 0.2rem min(0.7rem, 1vw); text-align: right; font-weight: normal; }}
.effens-planner td {{ white-space: nowrap; }}
</style>
<form onsubmit="return false">{fields}</form>
<p aria-live="polite"></p>
<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
<script>
document.querySelectorAll(".effens-planner").forEach(box => {{
  const fields = [...box.querySelectorAll("input")], rows = [...box.querySelector("tbody").rows];
  const words = s => s < 60 ? s.toFixed(0) + " s" :
    s < 3600 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";
  function show() {{
    const [n, t, start, price] = fields.map(field => field.valueAsNumber), free = fields[3].value === "";
    const fine = [n > 0 && Number.isInteger(n), t > 0, start >= 0, price >= 0 || free && !fields[3].validity.badInput];
    fields.forEach((field, i) => field.setAttribute("aria-invalid", !fine[i]));
    box.querySelector("p").textContent = fields.filter((_, i) => !fine[i]).map(field => field.dataset.rule).join("; ");
    for (const part of box.querySelectorAll("tr > :nth-child(6)")) part.hidden = !(price > 0);
    for (const row of rows) {{
      const count = +row.cells[0].textContent, took = start + t * Math.ceil(n / count), hours = count * took / 3600;
      const busy = 100 * n * t / (count * took), faster = (start + t * n) / took;
      [words(took), faster.toFixed(1) + "x", busy.toFixed(0) + "%", hours.toFixed(2), (hours * price).toFixed(2)]
        .forEach((text, i) => {{ row.cells[i + 1].textContent = fine.includes(false) ? "" : text; }});
    }}
  }}
  fields.forEach(field => {{ field.oninput = show; }});
}});
</script></div>""")


def _duration(seconds: float) -> str:
    """A time in the unit that suits them."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def live(draw: Callable[..., str], *, alt: str, **controls: Sequence[Any]) -> Any:
    """A figure with sliders that computes: with a kernel, moving one calls `draw` again with the values of all.

    A page has no kernel: where `EFFENS_STATIC` is set, as when the book's outputs are stored, this is the first picture
    and a sentence that says how to wake the sliders.

    Args:
        draw: `draw(ax, **values)` computes, draws on empty axes and returns a line of text, shown under them. Each
            argument has a default, from which its slider starts.
        alt: what the picture shows, for those who do not see it; the sliders' values are added.
        controls: for each argument of `draw` the values that its slider goes through.

    Returns:
        An `ipywidgets.VBox` of the sliders, the picture and the line; or HTML. An error after the first picture takes
        the place of the line.

    Raises:
        ValueError: the controls are not the arguments of `draw`, a default is not among the values, or no alt text.

    Example:
        >>> box = live(lambda ax, power=2: f"2 to the {power} is {2**power}", alt="Empty axes", power=range(5))
        >>> box.children[0].value = 4  # a reader moves the slider
        >>> box.children[-1].value
        '2 to the 4 is 16'
    """
    start = {name: p.default for name, p in list(inspect.signature(draw).parameters.items())[1:]}
    if not start or start.keys() != controls.keys():
        raise ValueError(f"controls must be the arguments of draw after ax, {list(start)}, got {list(controls)}")
    for name, values in controls.items():
        if start[name] not in values:
            raise ValueError(f"values of {name} must hold its default, {start[name]!r}, got {list(values)}")
    if not alt.strip():
        raise ValueError(f"alt must say what the picture shows, got {alt!r}")

    def spoken(values: dict[str, Any]) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())

    def answer(values: dict[str, Any]) -> tuple[str, str]:
        """The picture as HTML, and the line under it."""
        lines: list[str] = []
        (picture,) = _pictures(lambda ax, _: lines.append(draw(ax, **values)), [values], (1, 1), None, None, 64)
        width, height = (round(inches * mpl.rcParams["figure.dpi"]) for inches in mpl.rcParams["figure.figsize"])
        size = f'width="{width}" height="{height}" style="max-width: 100%; height: auto"'
        said = html.escape(f"{alt}; {spoken(values)}")
        return f'<img src="{picture}" alt="{said}" {size}>', html.escape(lines[0], quote=False)

    first = answer(start)
    if os.environ.get("EFFENS_STATIC", "0") not in ("", "0"):
        return HTML(f"""<div class="effens-live">
{first[0]}
<p>Here: {html.escape(spoken(start))}. <em>Run the imports and this cell in Colab (the badge under the title) or in
Jupyter, and sliders change them.</em></p>
</div>""")
    import ipywidgets as widgets  # only a live cell needs them

    looks = {"continuous_update": False, "style": {"description_width": "6em"}, "layout": {"width": "min(100%, 40em)"}}
    sliders = [
        widgets.SelectionSlider(options=list(values), value=start[name], description=name.replace("_", " "), **looks)
        for name, values in controls.items()
    ]
    picture, line = (widgets.HTML(value=part) for part in first)

    def update(_: object) -> None:
        line.value = "Computing ..."
        try:
            picture.value, line.value = answer({s: slider.value for s, slider in zip(controls, sliders, strict=True)})
        except Exception as error:  # nobody else would see it
            line.value = html.escape(f"{type(error).__name__}: {error}")

    for slider in sliders:
        slider.observe(update, names="value")
    return widgets.VBox([*sliders, picture, line])


def gap_band(ensemble: Ensemble, task: GapRegression, *, color: str, ax: Axes) -> str:
    """Draw what an ensemble with a `Gaussian` likelihood says along the curve with the gap, its members and its band.

    Returns:
        How its loss is made up on test data and in the gap, in words.
    """
    from effens.figures import regression_band  # and with it pyplot, which players do not need

    said = predict(ensemble, task.x_grid, likelihood=Gaussian())
    mixed, data = mixture(said), (task.x_train[:, 0], task.y_train)
    lines = said.mean if len(said.mean) > 1 else None
    regression_band(task.x_grid[:, 0], mixed.mean, mixed.stddev, members=lines, data=data, color=color, ax=ax)
    ax.set(xlim=(-3, 3), ylim=(-4, 4), xlabel="x", ylabel="y")

    def parts(x: Tensor, y: Tensor) -> str:
        said = predict(ensemble, x, likelihood=Gaussian())
        loss, nll = -said.log_prob(y).mean(), -mixture(said).log_prob(y).mean()
        return f"{loss:.3f} − {(loss - nll).clamp_min(0):.3f} = {nll:.3f}"

    on, off = parts(task.x_test, task.y_test), parts(task.x_gap, task.y_gap)
    return f"Members' loss − diversity gain = NLL. On the data: {on}; in the gap: {off}."


def _page(
    picture: str,
    width: int,
    height: int,
    alt: str,
    label: str,
    frames: Sequence[Sequence[str]],
    style: str,
    script: str,
    interval: int,
    max_kb: float,
    behind: str = "",
) -> str:
    """A picture, perhaps before another, and controls for its frames if it has more than one; raise if too large."""
    first, last = frames[0][2], len(frames) - 1
    # One frame a line, "<" never: text in it cannot end the script.
    content = json.dumps(frames, indent=0).replace("<", "\\u003c")
    controls = _CONTROLS.format(label=html.escape(label), last=last, words=html.escape(first))
    content = f'<script type="application/json">{content}</script>\n{script.replace("INTERVAL", str(int(interval)))}'
    lines = math.ceil(max(len(said) for _, _, said in frames) / 40)  # on a phone, so that longer words move nothing
    shown = f'<img src="{picture}" alt="{html.escape(alt)}" width="{width}" height="{height}">'
    if behind:
        shown = f'<div style="background: url({behind}) 0 0 / 100% 100% no-repeat">{shown}</div>'
    page = f"""<div class="effens-player" data-lm-suppress-shortcuts="true" style="max-width: {width}px">
{style}
{shown}
{controls if last else ""}
<output aria-live="polite" style="min-height: {1.5 * lines}em">{html.escape(first)}</output>
{content if last else ""}
</div>"""
    if len(page) > 1000 * max_kb:
        raise ValueError(
            f"a player must take at most {max_kb:g} KB, got {len(page) / 1000:.0f} KB for {len(frames)} frames: "
            "fewer values or colors, or a smaller figsize or dpi, make it smaller"
        )
    return page


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

    return _encoded([_rendered(figure) for figure in figures], colors)


def _encoded(rows: list[np.ndarray], colors: int) -> list[str]:
    """Pictures of one size as the data URLs of PNGs, with one palette for all, or colors would flicker."""
    if not 2 <= colors <= 256:
        raise ValueError(f"colors must be in 2 ... 256, got {colors}")
    height, width, _ = rows[0].shape
    packed = np.concatenate(rows).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, which, count = np.unique(packed, return_inverse=True, return_counts=True)
    seen = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
    palette = _palette(seen, count, colors)
    apart = seen[:, None].astype(np.int32) - palette  # (seen, palette, 3)
    nearest = (apart**2).sum(-1).argmin(1).astype(np.uint8)[which].reshape(len(rows), height, width)
    urls = []
    for indices in nearest:
        frame = Image.fromarray(indices, "P")
        frame.putpalette(palette.tobytes())
        file = io.BytesIO()
        frame.save(file, "png", optimize=True)
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def _palette(seen: np.ndarray, count: np.ndarray, colors: int) -> np.ndarray:
    """At most so many colors for pictures with these, (colors, 3): those drawn are kept as they are, however small.

    A line or a dot of one color is many pixels of exactly it, and the blends along edges are few of each: half of the
    palette goes to the former, the methods' own and then the most frequent, and a median cut of the blends fills the
    rest.
    """
    from effens.figures import COLORS  # and with it pyplot, which the import of players does not need

    own = np.array([list(bytes.fromhex(color[1:])) for color in COLORS.values()])
    is_own = (seen[:, None] == own).all(-1).any(1)
    order = np.lexsort((-count, ~is_own))
    kept, blends = np.split(seen[order], [colors // 2])
    if not len(blends):
        return kept
    # Each counts as the root of its frequency, or large areas would take all colors.
    weights = np.sqrt(count[order[len(kept) :]]).astype(int)
    sheet = Image.fromarray(np.repeat(blends, weights, axis=0)[None])
    left = colors - len(kept)
    cut = np.array(sheet.quantize(left, dither=Image.Dither.NONE).getpalette(), np.uint8).reshape(-1, 3)[:left]
    return np.concatenate([kept, cut])


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
