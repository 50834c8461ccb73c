"""What pages say of package and benchmark: the API from docstrings, the living figure, a map of methods, a stamp."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import effens
from effens_book import figures, players
from effens_book.benchmark import RESULTS, interval, shipped

TASK = "fashion"
CHAPTERS = {  # the rows of the map, and where each is explained
    "single": None,
    "wide": "cost_comparison",
    "deep ensemble": "deep_ensembles",
    "BatchEnsemble": "batch_ensemble",
    "snapshot": "snapshot_ensembles",
    "SWAG": "swag",
    "MIMO": "mimo",
    "hyper": "hyper_ensembles",
}
PICTURES = {  # from a chapter's stored outputs, by the cell: the heading above it, and what to look for
    ("introduction", "six-player"): (
        "six-approximations-of-one-truth",
        "Six approximations of one truth: gray is what could be known.",
    ),
    ("when_ensembles_help", "opening-figure"): (
        "when-do-ensembles-help",
        "Good, or different? A method is not a point but a path.",
    ),
    ("cost_comparison", "38-players-player"): (
        "what-does-the-machine-wait-for",
        "When are members free? While the machine waits for weights.",
    ),
    ("finance", "reveal"): (
        "does-disagreement-warn",
        "2008, day by day: which warning came first? Bet before you look.",
    ),
}
TITLES = {"training": "What training costs, and brings", "batch 256": "What a prediction costs, and brings"}
AXES = {"training": "time of training", "batch 256": "time of a prediction at batch 256"}
NAME = re.compile(r"(?<![`:\w])`([\w.]+)`(\w*)(?!`)")  # and a plural's s


def link_names(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn a docstring's `name` into a link where it is a public one, and into code where it is not."""

    def link(match: re.Match[str]) -> str:
        found = match[1].removeprefix("effens.")
        known = found.split(".")[0] in effens.__all__
        return (f":py:obj:`~effens.{found}`" if known else f"``{match[1]}``") + (rf"\ {match[2]}" if match[2] else "")

    lines[:] = [NAME.sub(link, line) for line in lines]


def public_name(app: Sphinx, env: Any, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Find what a signature names by the module that defines it: it is documented as `effens.name`, or is Python's."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if module.split(".")[0] in sys.stdlib_module_names:
        address = f"https://docs.python.org/3/library/{module}.html#{module}.{name}"
        return nodes.reference("", "", content, internal=False, refuri=address)
    if node.get("refdomain") != "py" or not module.startswith("effens.") or name not in effens.__all__:
        return None
    domain = env.get_domain("py")
    found: nodes.Element | None = domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], f"effens.{name}", node, content
    )
    return found


def stamp() -> str:
    """Say with what, on what and when the benchmark's numbers were made, as its runs say it themselves."""
    facts: dict[str, set[str]] = {key: set() for key in ("torch", "python", "device", "date")}
    runs: list[dict[str, str]] = []
    for path in RESULTS.glob("*/*.npz"):
        with np.load(path, allow_pickle=False) as row:
            runs += json.loads(str(row["facts"]))["seeds"]
    for path in RESULTS.glob("*/costs.json"):
        runs += json.loads(path.read_text("utf-8")).values()
    for run in runs:
        for key, found in facts.items():
            found.add(run[key])
    said = {key: ", ".join(sorted(found)) for key, found in facts.items()}
    first, last = min(facts["date"]), max(facts["date"])
    when = first if first == last else f"{first} to {last}"
    device = said["device"].upper()
    return (
        f"The benchmark's numbers: PyTorch {said['torch']}, Python {said['python']}, {device}, one thread; {when}. "
        f"This page: effens {effens.__version__}."
    )


def svg_map(key: str, title: str) -> str:
    """Draw what methods cost against what they bring, as an SVG in the page's own colors: light, dark, or on paper."""
    width, height, left, right, top, bottom = 420, 300, 48, 8, 26, 44
    points = {
        name: (shipped().relative_costs(TASK, name)[key], interval(shipped().values(TASK, name))) for name in CHAPTERS
    }
    low = min(nll.mean - nll.half for _, nll in points.values())
    high = max(nll.mean + nll.half for _, nll in points.values())
    dearest = max(cost for cost, _ in points.values())

    def across(cost: float) -> float:
        return left + (width - left - right) * (math.log2(cost) + 1) / (math.log2(dearest) + 2)

    def down(nll: float) -> float:
        return top + (height - top - bottom) * (high - nll) / (high - low)

    parts = [f'<text x="{left}" y="14" class="title">{title}</text>']
    for cost in (2**k for k in range(int(math.log2(dearest)) + 1)):
        parts.append(f'<text x="{across(cost):.0f}" y="{height - 26}" text-anchor="middle">{cost}x</text>')
        parts.append(f'<path d="M{across(cost):.0f} {height - bottom}v4"/>')
    for level in (n / 100 for n in range(math.ceil(100 * low), math.floor(100 * high) + 1) if n % 2 == 0):
        parts.append(f'<text x="{left - 7}" y="{down(level) + 4:.0f}" text-anchor="end">{level:.2f}</text>')
        parts.append(f'<path d="M{left - 4} {down(level):.0f}h4"/>')
    parts.append(f'<path d="M{left} {top}V{height - bottom}H{width - right}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{AXES[key]}, against one network</text>')
    dots = [(across(cost), down(nll.mean)) for cost, nll in points.values()]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for (name, (_, nll)), (x, y) in zip(points.items(), dots, strict=True):
        color = figures.COLORS[name] if name != "single" else "currentColor"
        bar = f"M{x:.1f} {down(nll.mean + nll.half):.1f}V{down(nll.mean - nll.half):.1f}"
        parts.append(f'<path d="{bar}" style="stroke: {color}; opacity: 0.5"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" style="fill: {color}"/>')
        long = 8 * len(name)
        for shift, sign in itertools.product((0, -9, 9, -18, 18, -27, 27), (1, -1)):
            start = x + 8 if sign > 0 else x - 8 - long
            box = (start, y + shift - 6, start + long, y + shift + 6)
            free = all(box[2] < a or c < box[0] or box[3] < b or d < box[1] for a, b, c, d in taken)
            if free and left < box[0] and box[2] < width and box[3] < height - bottom:
                break
        taken.append(box)
        anchor = "start" if sign > 0 else "end"
        parts.append(f'<text x="{x + 8 * sign:.1f}" y="{y + shift + 4:.1f}" text-anchor="{anchor}">{name}</text>')
    alt = "; ".join(f"{name} {cost:.1f} times, {nll}" for name, (cost, nll) in points.items())
    label = f"{title}: NLL on test photos against {AXES[key]}, as a multiple of one network. {alt}"
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


class MethodMap(SphinxDirective):
    """The map of methods, and its numbers as a table whose names lead to the chapters."""

    def run(self) -> list[nodes.Node]:
        """Return two pictures and a table."""
        pictures = "".join(svg_map(key, title) for key, title in TITLES.items())
        rows = ["| | NLL on clothes | training | prediction | memory |", "|---|---:|---:|---:|---:|"]
        for name, chapter in CHAPTERS.items():
            cost = shipped().relative_costs(TASK, name)
            shown = f"[{name}]({chapter}.ipynb)" if chapter else name
            numbers = [f"{cost[key]:.1f}x" for key in ("training", "batch 256", "memory")]
            rows.append(f"| {' | '.join([shown, str(interval(shipped().values(TASK, name))), *numbers])} |")
        raw = nodes.raw("", f'<div class="effens-map">{pictures}</div>', format="html")
        return [raw, *self.parse_text_to_nodes("\n".join(rows))]


def picture(chapter: str, cell: str) -> str:
    """Return the last frame of a player, as an image: in small, with its own text for those who do not see it."""
    notebook = json.loads((Path(__file__).parents[1] / f"{chapter}.ipynb").read_text("utf-8"))
    (outputs,) = (found["outputs"] for found in notebook["cells"] if found["id"] == cell and "outputs" in found)
    page = "".join("".join(output["data"]["text/html"]) for output in outputs if "text/html" in output.get("data", {}))
    (*_, frame) = re.findall(r"data:image/[\w+]+;base64,[A-Za-z0-9+/=]+", page)
    (alt, *_) = re.findall(r'alt="([^"]+)"', page)
    shown = f'<img src="{frame}" alt="{alt.rpartition(":")[0] or alt}">'
    # What a slider uncovers is shown half uncovered, before its empty axes: who bets must not see the end.
    behind = re.search(r"background: (url\([^)]+\))", page)
    return f'<span class="half" style="background-image: {behind[1]}">{shown}</span>' if behind else shown


class Pictures(SphinxDirective):
    """Pictures of the chapters in small, each a link to where it moves."""

    def run(self) -> list[nodes.Node]:
        """Return them in a row, or under one another where there is no room."""
        parts = []
        for (chapter, cell), (heading, caption) in PICTURES.items():
            self.env.note_dependency(f"{chapter}.ipynb")
            link = f'<a href="{chapter}.html#{heading}">{picture(chapter, cell)}<span>{caption}</span></a>'
            parts.append(f"<li>{link}</li>")
        return [nodes.raw("", f'<ul class="effens-pictures">{"".join(parts)}</ul>', format="html")]


class Living(SphinxDirective):
    """The figure in which an ensemble is trained in the page."""

    def run(self) -> list[nodes.Node]:
        """Return the same HTML that a notebook shows."""
        self.env.note_dependency(str(Path(players.__file__).with_name("living.js")))
        return [nodes.raw("", players.living().data, format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the above with Sphinx."""
    app.add_directive("effens-living", Living)
    app.add_directive("effens-map", MethodMap)
    app.add_directive("effens-pictures", Pictures)
    app.config.html_theme_options["extra_footer"] = f"<p>{stamp()}</p>"
    app.connect("autodoc-process-docstring", link_names)
    app.connect("missing-reference", public_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
