"""What the book's pages need beyond Jupyter Book: formulas without a network, light pages, a name for each control."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from PIL import Image
from sphinx.application import Sphinx
from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math

# The last lines keep a full stop with the letter before it, and let keys scroll a formula wider than a phone.
RENDER_MATH = r"""
addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".math").forEach(formula => renderMathInElement(formula, {delimiters: [
    {left: "\\(", right: "\\)", display: false}, {left: "\\[", right: "\\]", display: true},
    ...["align", "align*", "equation", "equation*", "gather", "gather*"].map(name =>
      ({left: `\\begin{${name}}`, right: `\\end{${name}}`, display: true}))]}));
  document.querySelectorAll("span.math").forEach(formula => {
    const text = formula.nextSibling;
    if (!/^[-.,;:!?)’”]/.test(text?.data) || formula.querySelectorAll(".base").length > 1) return;
    const whole = document.createElement("span");
    whole.style.whiteSpace = "nowrap";
    formula.before(whole);
    text.splitText(1);
    whole.append(formula, text);
  });
  document.querySelectorAll(".katex-display").forEach(f => { if (f.scrollWidth > f.clientWidth) f.tabIndex = 0; });
});
"""
# What a screen reader would read wrongly: roles that do not fit, names that hide the visible text, a part without one.
ACCESSIBLE = (
    ('role="doc-biblioentry"', 'role="listitem"'),
    ('<summary aria-label="Toggle hidden content">', "<summary>"),
    (r'(search-button-field [^>]*) aria-label="Search"', r"\1"),
    (r'(<i class="theme-switch [^>]*) title="[^"]*"', r"\1"),
    (r'(<div id="pst-primary-sidebar")', r'\1 role="complementary" aria-label="The book"'),
)
# Fetched by the theme on every page; only the page that searches needs them, and they grow with the book.
SEARCH = re.compile(r'\s*<script src="[^"]*(searchtools|language_data|searchindex)\.js"></script>')
# Excerpts are read from the pages found, which a browser refuses to a book opened from the disk.
NO_EXCERPTS = """<script>
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
</script>
</body>"""
ICON = re.compile(r'"?([\w-]+)"?:\[\d+,\d+,(\[[^\]]*\]),"[^"]*","[^"]*"\],?')
ICON_LETTER = re.compile(r'\.fa-[^{}]*:before\{content:"[^"]*"\}')


def add_math(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Load KaTeX, from the book's own copy, on the pages that hold a formula."""
    if app.env.domaindata["math"]["has_equations"].get(page):
        app.add_css_file("katex/katex.min.css")
        app.add_js_file("katex/katex.min.js", defer="")
        app.add_js_file("katex/auto-render.min.js", defer="")
        app.add_js_file(None, body=RENDER_MATH)


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out the theme's thebe scripts: declared twice, a syntax error on every page, and no page uses them."""
    scripts = context["script_files"]
    context["script_files"] = [s for s in scripts if "thebe" not in f"{s}{getattr(s, 'attributes', '')}".lower()]


def name_folds(app: Sphinx, doctree: nodes.document) -> None:
    """Call an exercise's folded cells its solution, and what other cells hide with their output what was found."""
    for cell in doctree.findall(nodes.container):
        source, mode = cell.next_node(nodes.literal_block), cell.get("hide_mode")
        if mode and (is_exercise(cell) or (source and source.astext().startswith("# Solution"))):
            cell["prompt_show"], cell["prompt_hide"] = "Show the solution", "Hide the solution"
        elif mode and source and (named := re.match(r"# (Answer|Code of the [^.\n]+)", source.astext())):
            what = named[1][0].lower() + named[1][1:]
            cell["prompt_show"], cell["prompt_hide"] = f"Show the {what}", f"Hide the {what}"
        elif mode in ("all", "output") and "cell_code_output" in [part.get("nb_element") for part in cell.children]:
            cell["prompt_show"], cell["prompt_hide"] = "Show what was found", "Hide what was found"


def is_exercise(cell: nodes.container) -> bool:
    """Whether a cell stands in the section "Exercises"."""
    return isinstance(cell.parent, nodes.section) and "exercises" in cell.parent["ids"]


# On a phone a figure wider than the text keeps a legible size in a box that scrolls; keys then reach the box.
FIGURE = re.compile(r'(?<!<div class="wide-figure">)<img [^>]*src="\.\./(_images/[^"]+\.png)"[^>]*>')
WIDE = 780  # pixels: two panels or more side by side


def box_wide_figures(text: str, site: Path) -> str:
    """Put a page's wide figures into boxes that can scroll."""

    def boxed(image: re.Match[str]) -> str:
        with Image.open(site / image[1]) as picture:
            return f'<div class="wide-figure">{image[0]}</div>' if picture.width > WIDE else image[0]

    return FIGURE.sub(boxed, text)


def mend_pages(app: Sphinx, error: Exception | None) -> None:
    """Mend, in the finished pages, what the theme gets wrong: for those who do not see the page, and in weight."""
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text("utf-8")
        for wrong, right in ACCESSIBLE:
            text = re.sub(wrong, right, text)
        text = text.replace("</body>", NO_EXCERPTS) if page.name == "search.html" else SEARCH.sub("", text)
        text = box_wide_figures(text, Path(app.outdir))
        page.write_text(text, "utf-8")


def keep_used_icons(app: Sphinx, error: Exception | None) -> None:
    """Cut the theme's icon script (1.5 MB, 2,000 icons) down to the icons that some page or script names.

    The script draws them all, so the style sheet's letters for them (90 KB) can go.
    """
    script = Path(app.outdir, "_static/scripts/fontawesome.js")
    if error or not script.exists():
        return
    pages = [*Path(app.outdir).rglob("*.html"), *(p for p in script.parent.glob("*.js") if p != script)]
    used = {name for page in pages for name in re.findall(r"\bfa-([a-z0-9-]+)", page.read_text("utf-8"))}

    def keep(icon: re.Match[str]) -> str:
        names = {icon[1], *re.findall(r'"([\w-]+)"', icon[2])}
        return icon[0] if names & used else ""

    script.write_text(ICON.sub(keep, script.read_text("utf-8")), "utf-8")
    style = Path(app.outdir, "_static/styles/pydata-sphinx-theme.css")
    style.write_text(ICON_LETTER.sub("", style.read_text("utf-8")), "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the above with Sphinx."""
    app.add_html_math_renderer("katex", (html_visit_math, None), (html_visit_displaymath, None))
    app.connect("doctree-read", name_folds)
    app.connect("html-page-context", add_math)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", mend_pages)
    app.connect("build-finished", keep_used_icons)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
