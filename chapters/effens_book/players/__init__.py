"""Figures that move and questions that answer, with no kernel.

A player is plain HTML. It works on the published page, offline, in Colab and in JupyterLab, by mouse and by keyboard;
without script and on paper it is its first frame.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
from IPython.display import HTML
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from PIL import Image

from effens_book.choose import BUDGETS, GOALS, agreement, alike, choose, score_of


def _read(name: str) -> str:
    """A script or a style that stands beside this file."""
    return (Path(__file__).parent / name).read_text("utf-8")


def _filled(name: str, **values: Any) -> str:
    """The same, with values in the places of ``$name``."""
    return Template(_read(name)).substitute(values)


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
    first: int = 0,
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
        first: the frame that is shown before the slider moves, from 0: the one that makes readers want to move it.

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
    page = _page(pictures[first], width, height, alts[first], label, frames, interval, max_kb, first=first)
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
    return HTML(_page(picture, width, height, alt, label, frames, interval, max_kb, behind=empty))


def bet(question: str, replies: Mapping[str, str], *, answer: str) -> HTML:
    """A question to the reader, who commits to a choice and is answered at once.

    A choice says whether it is right, marks the right one, and opens what is folded below, up to the next heading. For
    those who would rather not bet, and without script, the answer opens like any other fold.

    Args:
        question: one sentence.
        replies: at least two choices, and the sentence with which each is answered.
        answer: the right one of them.

    Raises:
        ValueError: fewer than two choices, or an answer that is none of them.
    """
    if len(replies) < 2 or answer not in replies:
        raise ValueError(f"replies must be at least two and hold the answer {answer!r}, got {list(replies)}")
    right = list(replies).index(answer)
    said = [f"{'Right' if choice == answer else 'No'}. {reply}" for choice, reply in replies.items()]
    buttons = "\n".join(
        f'<button type="button" aria-pressed="false">{html.escape(choice)}</button>' for choice in replies
    )
    content = json.dumps({"right": right, "said": said}).replace("<", "\\u003c")
    return HTML(f"""<div class="effens-bet" data-lm-suppress-shortcuts="true">
<style>
{_read("dark.css")}{_read("bet.css")}</style>
<p class="question">{html.escape(question)}</p>
<div role="group" aria-label="Your choice">
{buttons}
</div>
<p class="reply" role="status"></p>
<details><summary>Show the answer without a bet</summary>
<p><strong>{html.escape(answer)}.</strong> {html.escape(replies[answer])}</p></details>
<script type="application/json">{content}</script>
<script>
{_read("bet.js")}</script>
</div>""")


GOAL_WORDS = {
    "fashion": {
        "nll": "NLL on test photos, in nats (lower is better)",
        "accuracy": "accuracy on test photos, in percent (higher is better)",
        "shift": "NLL on strongly shifted photos, in nats (lower is better)",
        "unknown": "separating letters from clothes, AUROC in percent (higher is better)",
    },
    "airtime": {"nll": "NLL on the flights of later months, in nats (lower is better)"},
    "definitions": {
        "nll": "NLL on test definitions, in nats (lower is better)",
        "accuracy": "accuracy on test definitions, in percent (higher is better)",
        "shift": "NLL on definitions from other branches, in nats (lower is better)",
        "unknown": "separating a novel from definitions, AUROC in percent (higher is better)",
    },
    "digits": {
        "nll": "NLL on test digits, in nats (lower is better)",
        "accuracy": "accuracy on test digits, in percent (higher is better)",
        "shift": "NLL on rotated digits, in nats (lower is better)",
        "unknown": "separating letters from digits, AUROC in percent (higher is better)",
    },
    "diamonds": {
        "nll": "NLL on test diamonds, in nats (lower is better)",
        "shift": "NLL on heavy diamonds, in nats (lower is better)",
    },
    "gap": {
        "nll": "NLL on test points, in nats (lower is better)",
        "shift": "NLL in the gap, in nats (lower is better)",
    },
}
TASK_WORDS = {
    "fashion": "photos of clothes",
    "airtime": "flights (a table)",
    "definitions": "texts (a pretrained network)",
    "digits": "digits (small images)",
    "diamonds": "diamonds (a small table)",
    "gap": "a curve with a gap",
}


def chooser() -> HTML:
    """Return `choose.choose` as tables with controls: plain HTML, which works with no kernel, by mouse and keyboard.

    There is a table for each task, of which one is seen. Without script they are all there, the best for the NLL first.
    """
    limits = ("any", 1.5, 2, 3, 4, 5, 12)
    controls = _select("task", TASK_WORDS.values())
    for words in ("training at most", "one prediction", "256 predictions", "memory"):
        controls += _select(words, [each if each == "any" else f"{each}x" for each in limits], limits)
    tables = ""
    for task, words in TASK_WORDS.items():
        controls += _select("what matters", GOAL_WORDS[task].values(), task=task)
        others = [other for other in TASK_WORDS if other != task]
        alike_words = "; ".join(f"{agreement(task, other):+.2f} with {TASK_WORDS[other]}" for other in others)
        note = f"How far the order of the methods agrees with that on other tasks (rank correlation): {alike_words}."
        tables += f'<section data-task="{task}">{_choices(task, words)}<p>{html.escape(note)}</p></section>'
    return HTML(f"""<div class="effens-chooser">
<style>
{_read("chooser.css")}</style>
<form onsubmit="return false">{controls}</form>
<p aria-live="polite"></p>
{tables}
<script>
{_read("chooser.js")}</script></div>""")


def _select(label: str, words: Iterable[Any], values: Iterable[Any] | None = None, task: str = "") -> str:
    """Return a labelled control; one of a task is only seen with it."""
    words = list(words)
    options = "".join(
        f"<option value='{value}'>{html.escape(str(word))}</option>"
        for word, value in zip(words, range(len(words)) if values is None else values, strict=True)
    )
    of = f' data-task="{task}"' if task else ""
    return f"<label{of}>{html.escape(label)} <select>{options}</select></label>"


def _choices(task: str, words: str) -> str:
    """Return the table of a task."""
    choices, goals = choose(task), list(GOALS[task])
    names = [choice.method for choice in choices]
    orders = [[choice.method for choice in choose(task, goal=goal)] for goal in goals]
    rows = []
    for choice in choices:
        facts: dict[str, Any] = {
            "costs": [round(choice.costs[key], 2) for key in BUDGETS.values()],
            "scores": [round(score_of(task, choice.method, goal), 4) for goal in goals],
            "places": [order.index(choice.method) for order in orders],
            "same": [[i for i, name in enumerate(names) if alike(task, choice.method, name, goal)] for goal in goals],
        }
        cells = "".join(f"<td>{choice.costs[key]:.1f}x</td>" for key in BUDGETS.values())
        data = " ".join(f'data-{key}="{json.dumps(value)}"' for key, value in facts.items())
        score = f"<td>{facts['scores'][0]:.3f}</td>"
        rows.append(f"<tr {data}><th scope='row'>{html.escape(choice.method)}</th>{cells}{score}</tr>")
    titles = ("", "training", "one prediction", "256 predictions", "memory", "score")
    heads = "".join(f"<th scope='col'>{word}</th>" for word in titles)
    head = f"<caption>{html.escape(words)}</caption><thead><tr>{heads}</tr></thead>"
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def planner(trainings: int, seconds: float, start: float) -> HTML:
    """Return a table of what 1 ... 1000 machines bring, computed in the page, whose inputs can be changed.

    The price appears once one is given; what cannot be computed with is said, and the table is empty meanwhile.

    Args:
        trainings: how many, all alike.
        seconds: of each.
        start: seconds until a machine begins, and whatever else no machine can share.
    """
    machines = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    cells = 4 * "<td></td>" + "<td hidden='hidden'></td>"
    rows = "".join(f"<tr><th scope='row'>{count}</th>{cells}</tr>" for count in machines)
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
{_read("dark.css").replace("div.effens-player", "div.effens-planner")}{_read("planner.css")}</style>
<form onsubmit="return false">{fields}</form>
<p aria-live="polite"></p>
<noscript><p>A script computes this table.</p></noscript>
<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>
<script>
{_read("planner.js")}</script></div>""")


def living(method: str = "deep", members: int = 8, width: int = 32, seed: int = 1) -> HTML:
    """Return a figure in which an ensemble is trained in the page itself, with no kernel and no network connection.

    The reader can add, move and remove points, and change the method, the number of members and the width.
    Browsers without script show a description instead.

    Args:
        method: "single", "deep", "batch" or "snapshot", chosen when the page opens.
        members: networks in the ensemble, 1 ... 20.
        width: hidden units in each of the two layers: a multiple of 4, at most 64.
        seed: of the random starts.

    Raises:
        ValueError: a setting that the figure does not have.

    Example:
        >>> page = living(method="batch", members=4).data
        >>> '<effens-living method="batch" members="4" width="32" seed="1"' in page
        True
    """
    methods = ("single", "deep", "batch", "snapshot")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, got {method!r}")
    if members not in range(1, 21):
        raise ValueError(f"members must be in 1 ... 20, got {members!r}")
    if width not in range(4, 65, 4):
        raise ValueError(f"width must be a multiple of 4 in 4 ... 64, got {width!r}")
    if seed not in range(10**6):
        raise ValueError(f"seed must be a whole number in 0 ... 999999, got {seed!r}")
    script = Path(__file__).with_name("living.js").read_text("utf-8")
    settings = f'method="{method}" members="{members}" width="{width}" seed="{seed}"'
    return HTML(f"""<effens-living {settings} data-lm-suppress-shortcuts="true">
<p>This figure needs JavaScript. It shows two clusters of points with a gap between them, and neural networks that are
trained on these points from different random starts. On the points the networks agree. In the gap each of them goes its
own way, so that the 95% band of their average is narrow on the points and wide in the gap. When a point is added in the
gap, the band becomes narrow there too.</p>
</effens-living>
<script>
{script}</script>""")


def stills(function: Callable[..., object], *, alt: str, max_kb: float = 300, **argument: Iterable[Any]) -> HTML:
    """A player of what a function draws with pyplot, a frame for each value of one of its arguments.

    On a page that has no kernel it stands in the place of the function's sliders.

    Args:
        function: draws one figure, by `matplotlib.pyplot`.
        alt: what the picture shows; the argument's value is added.
        max_kb: the most the HTML may take, in thousands of bytes.
        argument: the name of one argument, and its values.

    Raises:
        ValueError: not one argument, no values, no alt text, or a player over `max_kb`.
    """
    import matplotlib.pyplot as plt  # players do not need it

    if len(argument) != 1:
        raise ValueError(f"stills must have values of one argument, got {list(argument)}")
    ((name, values),) = argument.items()
    values = list(values)
    if not values or not alt.strip():
        raise ValueError(f"stills must have values and an alt text, got {values} and {alt!r}")
    figures, open_before = [], set(plt.get_fignums())
    with patch.object(plt, "show"):
        for value in values:
            plt.figure()
            function(**{name: value})
            figure = plt.gcf()
            figure.draw_without_rendering()
            figures.append(figure)
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)
    _align(figures)
    width, height = (round(pixels) for pixels in figures[0].get_size_inches() * figures[0].dpi)
    label = name.replace("_", " ")
    said = [f"{label} {value}" for value in values]
    pictures = _encoded([_rendered(figure) for figure in figures], 64)
    frames = [(picture, f"{alt}: {words}", words) for picture, words in zip(pictures, said, strict=True)]
    return HTML(_page(pictures[0], width, height, frames[0][1], label, frames, 600, max_kb))


def _page(
    picture: str,
    width: int,
    height: int,
    alt: str,
    label: str,
    frames: Sequence[Sequence[str]],
    interval: int,
    max_kb: float,
    behind: str = "",
    first: int = 0,
) -> str:
    """A picture, perhaps before another that it covers, and controls for its frames, if it has more than one.

    Raises:
        ValueError: it is too large.
    """
    kind = "effens-reveal" if behind else "effens-player"
    cover = 'image.style.clipPath = "inset(0 " + frames[i][0] + "% 0 0)"'
    show = cover if behind else "image.src = frames[i][0]"
    paper = f"@media print {{ .{kind} img {{ clip-path: none !important; }} }}\n" if behind else ""
    style = _read("dark.css").replace("effens-player", kind) + _filled("player.css", kind=kind) + paper
    script = _filled("player.js", kind=kind, show=show, first=first, interval=int(interval))
    said, last = frames[first][2], len(frames) - 1
    # One frame a line, "<" never: text in it cannot end the script.
    content = json.dumps(frames, indent=0).replace("<", "\\u003c")
    controls = _CONTROLS.format(label=html.escape(label), first=first, last=last, words=html.escape(said))
    content = f'<script type="application/json">{content}</script>\n<script>\n{script}</script>'
    longest = max(len(words) for _, _, words in frames)
    beside = longest <= 26  # else below the slider, in as many lines as on a phone, so that longer words move nothing
    room = f"min-width: {longest}ch" if beside else f"flex-basis: 100%; min-height: {1.5 * math.ceil(longest / 40)}em"
    shown = f'<img src="{picture}" alt="{html.escape(alt)}" width="{width}" height="{height}">'
    if behind:
        shown = f'<div style="background: url({behind}) 0 0 / 100% 100% no-repeat">{shown}</div>'
    elif width > WIDE:
        shown = f'<div class="picture">{shown}</div>'
    page = f"""<div class="{kind}" data-lm-suppress-shortcuts="true" style="max-width: {width}px">
<style>
{style}</style>
{shown}
<div class="slide">
{controls if last else ""}
<output aria-live="polite" style="{room}">{html.escape(said)}</output>
</div>
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
    from effens_book.figures import COLORS  # and with it pyplot, which the import of players does not need

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


WIDE = 750  # pixels: on a phone a wider picture, of several panels, keeps a legible size, and scrolls
# hidden="hidden": JupyterLab drops attributes without a value from notebooks that it does not trust.
_CONTROLS = """<div class="controls" hidden="hidden">
<button type="button">Play</button>
<label>{label}
<span class="ticks" style="--steps: {last}">
<input type="range" min="0" max="{last}" step="1" value="{first}" aria-valuetext="{words}" autocomplete="off">
</span></label>
</div>"""
