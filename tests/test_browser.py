"""The book in a real browser, every page of it, from disk and from a server; and its players, each part of them."""

import base64
import functools
import html
import io
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urldefrag

import numpy as np
import pytest
import yaml
from matplotlib.axes import Axes
from PIL import Image

from effens_book import choose, players
from effens_book.address import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH"),
]


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


# The book: what every page must hold


def pages_of(entry: Any) -> Iterator[str]:
    """The pages that a table of contents names, at any depth."""
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry):
        if key in ("root", "file"):
            yield value.removesuffix(".md").removesuffix(".ipynb")
        elif isinstance(value, dict | list):
            yield from pages_of(value)


TOC = list(pages_of(yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))))
THEME = ["search", "genindex"]  # its own pages


@dataclass
class Visit:
    """An open page: what it asked for and what went wrong since it was opened."""

    page: "Page"
    site: Path  # the folder that holds the site
    base: str  # the address of that folder, with a slash at its end
    name: str
    requests: list[str]
    faults: list[str]

    def file(self, url: str) -> Path:
        """The file of the site that stands at an address."""
        path = self.site / unquote(re.split("[?#]", url)[0].removeprefix(self.base))
        return path / "index.html" if path.is_dir() else path


# Asking for paper or the full screen leaves a note: both would take the page away from the test.
NOTES = """
window.notes = [];
window.print = () => notes.push("print");
Element.prototype.requestFullscreen = async () => { notes.push("full screen"); };
addEventListener("submit", event => { event.preventDefault(); notes.push("submit"); });
"""
UNFOLD = """() => {
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  document.querySelectorAll(".toggle-hidden").forEach(box => box.classList.remove("toggle-hidden"));
}"""


def settle(page: "Page") -> None:
    """Wait until nothing moves or fades."""
    page.evaluate("Promise.allSettled(document.getAnimations().map(animation => animation.finished))")


@contextmanager
def visit(browser: "Browser", site: Path, base: str, name: str) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.add_init_script(NOTES)
    page = context.new_page()
    here = Visit(page, site, base, name, [], [])
    page.on("console", lambda message: here.faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: here.faults.append(str(error)))
    page.on("requestfailed", lambda request: here.faults.append(f"failed: {request.url}"))
    page.on("response", lambda r: here.faults.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    page.on("request", lambda request: here.requests.append(request.url))
    page.clock.install()
    page.goto(f"{base}{name}.html")
    page.wait_for_load_state("networkidle")
    page.evaluate(UNFOLD)
    settle(page)
    yield here
    context.close()


def nothing_is_too_heavy(here: Visit) -> list[str]:
    files = {here.file(url) for url in here.requests if url.startswith(here.base)}
    sizes = {file: file.stat().st_size for file in files if file.exists()}
    own = sum(size for file, size in sizes.items() if file.suffix == ".html" or "_images" in file.parts)
    shared = sum(sizes.values()) - own
    most = 600_000 if here.name == TOC[0] else 1_500_000
    return [f"own files of {own} bytes"] * (own > most) + [f"shared files of {shared} bytes"] * (shared > 1_200_000)


TYPESET = r"""() => {
  const faults = [...document.querySelectorAll(".math:not(:has(.katex))")].map(f => "not typeset: " + f.textContent);
  document.querySelectorAll(".katex-error, .katex [style*='#cc0000']").forEach(f =>
    faults.push("an error in " + f.textContent));
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const raw = texts.currentNode.data.match(/\$[^\s$]([^$]*[^\s$])?\$(?!\d)|\\[([]|\\begin\{/);
    if (raw && !texts.currentNode.parentElement.closest("pre, code, script, style, .katex")) faults.push(raw[0]);
  }
  return faults;
}"""


def every_formula_is_typeset(here: Visit) -> list[str]:
    return list(here.page.evaluate(TYPESET))


# Of a slider: every picture in the smallest part of the page that holds a picture too.
PICTURES = """slider => {
  let part = slider;
  while (!part.querySelector("img, svg, canvas") && part.parentElement) part = part.parentElement;
  return [...part.querySelectorAll("img, svg, canvas")].map(picture => getComputedStyle(picture).clipPath +
    (picture.src || (picture.toDataURL ? picture.toDataURL() : picture.outerHTML)));
}"""


def every_slider_moves_its_picture(here: Visit) -> list[str]:
    faults = []
    for number, slider in enumerate(here.page.locator("input[type=range], [role=slider]").all()):
        looks = []
        for key in ("Home", "ArrowRight", "End"):
            slider.press(key)
            looks.append(slider.evaluate(PICTURES))
        faults += [
            f"slider {number}: {key}" for key, look in (("ArrowRight", looks[1]), ("End", looks[2])) if look == looks[0]
        ]
    return faults


# Where from, what it is said to show, whether it is there and whether it is a figure: of pictures and players' frames.
ALTS = """() => [
  ...[...document.images].filter(picture => picture.checkVisibility()).map(picture =>
    [picture.getAttribute("src").slice(-60), picture.alt.trim() || picture.closest("a")?.innerText.trim(),
     picture.naturalWidth > 0, picture.height > 60]),
  ...[...document.querySelectorAll("main svg:not([aria-hidden=true], button *, .katex *)")].map(drawing =>
    [drawing.outerHTML.slice(0, 60), drawing.getAttribute("aria-label") ?? "", true, drawing.clientHeight > 60]),
  ...[...document.querySelectorAll("[class^=effens] > script[type='application/json']")].flatMap(frames =>
    [JSON.parse(frames.text)].filter(Array.isArray).flat().map(([source, alt]) =>
      [source.slice(-60), alt.trim(), true, true]))]"""


def every_picture_is_there_and_says_what_it_shows(here: Visit) -> list[str]:
    """A picture beside the words of its link, as the logo is, needs no words of its own."""
    faults = []
    for source, alt, loaded, figure in here.page.evaluate(ALTS):
        if not loaded:
            faults.append(f"not loaded: {source}")
        if not alt or re.search(
            r"\.(png|svg|jpe?g|gif|webp)$|^(image|picture|figure)\b|^[\w/.-]*\d[\w/.-]*$", alt, re.I
        ):
            faults.append(f"{source}: {alt!r}")
        elif figure and (len(alt) < 30 or len(alt.split()) < 5):
            faults.append(f"too short: {alt!r}")
    return faults


# Past the edge: what is neither on the screen nor inside a part that scrolls by itself.
PAST_THE_EDGE = """() => {
  const wide = document.documentElement.scrollWidth;
  const faults = wide > innerWidth ? ["the page is " + wide + " wide"] : [];
  const scrolls = part => part && (["auto", "scroll"].includes(getComputedStyle(part).overflowX) ||
    scrolls(part.parentElement));
  document.querySelectorAll(`main :is(p, li, h1, h2, h3, table, pre, img, svg, .katex, button, input, select, label,
    output, figcaption, summary)`).forEach(part => {
    const box = part.getBoundingClientRect();
    const past = box.width > 1 && (box.right > innerWidth + 1 || box.left < -1);
    if (past && part.checkVisibility({visibilityProperty: true}) && !scrolls(part))
      faults.push(part.outerHTML.slice(0, 120));
  });
  return faults;
}"""


def nothing_is_wider_than_the_screen(here: Visit) -> list[str]:
    faults = []
    for width in (390, 1280):
        here.page.set_viewport_size({"width": width, "height": 900})
        settle(here.page)
        faults += [f"at {width}: {fault}" for fault in here.page.evaluate(PAST_THE_EDGE)]
    return faults


# Contrast as WCAG 2 defines it, of every text with the colors behind it.
FAINT = """() => {
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const cache = {}, rgba = color => cache[color] ??= (() => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; })();
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = part =>
    part ? over(rgba(getComputedStyle(part).backgroundColor), behind(part.parentElement)) : [255, 255, 255];
  const light = color => color.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const opacity = part => part ? getComputedStyle(part).opacity * opacity(part.parentElement) : 1;
  const faults = new Set(), texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), part = texts.currentNode.parentElement, style = getComputedStyle(part);
    if (!text || part.closest("script, style, .katex-mathml, .visually-hidden")) continue;
    if (!part.checkVisibility({visibilityProperty: true})) continue;
    const [r, g, b, a] = rgba(style.color), below = behind(part), seen = over([r, g, b, a * opacity(part)], below);
    const [low, high] = [light(seen), light(below)].sort((a, b) => a - b), ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) faults.add(ratio.toFixed(2) + " " + text.slice(0, 60));
  }
  return [...faults];
}"""


UNCOVERED = "img { clip-path: none !important; }"  # what a slider has yet to show


def shown_in(here: Visit, scheme: Literal["light", "dark"]) -> bool:
    """Show the page light or dark, and say whether it is: a busy machine may tell it late."""
    here.page.emulate_media(color_scheme=scheme)
    for _ in range(50):
        if taken := here.page.evaluate("document.documentElement.dataset.theme") == scheme:
            break
        here.page.wait_for_timeout(100)
    settle(here.page)
    return bool(taken)


def light_and_dark_are_legible(here: Visit) -> list[str]:
    faults = [f"light: {fault}" for fault in here.page.evaluate(FAINT)]
    dark = shown_in(here, "dark")
    faults += [f"dark: {fault}" for fault in here.page.evaluate(FAINT)]
    if not dark:
        faults.append("the page stays light")
    for picture in here.page.locator("main img").all():
        if (picture.bounding_box() or {"height": 0})["height"] > 60:
            seen = np.asarray(
                Image.open(io.BytesIO(picture.screenshot(animations="disabled", style=UNCOVERED))).convert("L")
            )
            if np.bincount(seen.ravel()).argmax() > 75:  # its ground, white on paper, is turned with its ink
                faults.append(f"a light ground: {picture.get_attribute('alt')}")
    here.page.emulate_media(color_scheme="light")
    return faults


PANELS = """() => [...document.querySelectorAll(".text_html:has([class^=effens-])")].filter(part =>
  getComputedStyle(part).backgroundColor !== "rgba(0, 0, 0, 0)").map(part => part.innerHTML.slice(0, 60))"""


def the_dark_page_shows_through_what_moves(here: Visit) -> list[str]:
    shown_in(here, "dark")
    faults = list(here.page.evaluate(PANELS))
    shown_in(here, "light")
    return faults


CHANGES = """() => [...document.querySelectorAll("pre :is(.gi, .gd)")].filter(line =>
  getComputedStyle(line).color === getComputedStyle(line.closest("pre")).color).map(line => line.textContent)"""


def added_and_removed_lines_are_colored(here: Visit) -> list[str]:
    faults = list(here.page.evaluate(CHANGES))
    shown_in(here, "dark")
    faults += here.page.evaluate(CHANGES)
    shown_in(here, "light")
    return faults


CUT_OUTPUTS = """() => [...document.querySelectorAll(".cell_output pre")].filter(text =>
  text.scrollWidth > text.clientWidth).map(text => text.textContent.split("\\n").reduce((a, b) =>
  a.length > b.length ? a : b))"""


def printed_text_fits_its_box(here: Visit) -> list[str]:
    return [f"{len(line)} columns: {line}" for line in here.page.evaluate(CUT_OUTPUTS)]


# On a phone: figures of several panels stay legible and can be scrolled by key, names stay whole, the next page's title
# has the whole width.
ON_A_PHONE = """() => [
  ...[...document.querySelectorAll("main .cell_output img")].filter(picture => picture.naturalWidth > 780 &&
    !picture.closest("[class^=effens-]") && !(picture.width >= 600 && picture.closest("[tabindex='0']")))
    .map(picture => "small, or out of reach: " + picture.alt),
  ...[...document.querySelectorAll("td code .pre")].filter(name => name.getClientRects().length > 1)
    .map(name => "broken: " + name.textContent),
  ...[...document.querySelectorAll(".prev-next-area a")].filter(link => link.clientWidth < 0.8 * innerWidth)
    .map(link => "narrow: " + link.textContent.trim())]"""


def a_phone_shows_large_figures_and_whole_names(here: Visit) -> list[str]:
    here.page.set_viewport_size({"width": 390, "height": 900})
    here.page.wait_for_timeout(100)
    settle(here.page)
    faults = list(here.page.evaluate(ON_A_PHONE))
    here.page.set_viewport_size({"width": 1280, "height": 900})
    settle(here.page)
    return faults


# axe takes minutes for the contrast of thousands of letters of code and formulas: FAINT measures those as well.
AXE = """async scheme => {
  const quick = {preload: false, resultTypes: ["violations"]};
  const rules = {"color-contrast": {enabled: false}}, runOnly = ["color-contrast"];
  const reports = [await axe.run({exclude: [".highlight", ".katex", ".sig"]}, {...quick, runOnly})];
  if (scheme === "light") reports.push(await axe.run({...quick, rules}));
  return reports.flatMap(report => report.violations);
}"""


def axe_finds_nothing_serious(here: Visit) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.base", reason="needs the package axe-playwright-python")
    here.page.evaluate(axe.AXE_SCRIPT)
    faults = []
    schemes: tuple[Literal["light", "dark"], ...] = ("dark", "light")
    for scheme in schemes:
        shown_in(here, scheme)
        for found in here.page.evaluate(AXE, scheme):
            if found["impact"] in ("serious", "critical"):
                faults += [f"{scheme}: {found['id']}: {node['target']}" for node in found["nodes"]]
    return faults


def every_link_leads_somewhere(here: Visit) -> list[str]:
    faults = []
    for link in here.page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
        file, anchor = here.file(link), unquote(urldefrag(link)[1])
        if link.startswith(("http:", "https:", "mailto:")) and not link.startswith(here.base):
            continue  # outside: for the publishing workflow to check
        if not link.startswith(here.base) or not file.exists() or (anchor and anchor not in ids(file)):
            faults.append(link)
    return faults + [f"twice: {name}" for name, times in Counter(ids(here.file(here.page.url))).items() if times > 1]


@functools.cache
def ids(page: Path) -> list[str]:
    return [html.unescape(name) for name in re.findall(r"\sid=[\"']([^\"']*)", page.read_text("utf-8"))]


# The longest plain word of the page's title and of its text; outputs and formulas are not in the index.
LONGEST = r"""() => ["main h1", "main article p:not(.cell_output *)"].map(parts =>
  [...document.querySelectorAll(parts)].flatMap(part => {
    const text = part.cloneNode(true);
    text.querySelectorAll(".math").forEach(formula => formula.remove());
    return text.textContent.match(/(?<![\w-])[A-Za-z]{3,}(?![\w-])/g) || [];
  }).reduce((longest, word) => word.length > longest.length ? word : longest, ""))"""
FOUND = "[...document.querySelectorAll('ul.search a')].map(a => a.href)"


def search_finds_its_words(here: Visit) -> list[str]:
    if here.name in THEME:
        return []  # nothing of theirs is in the index
    faults = []
    for word in here.page.evaluate(LONGEST):
        other = here.page.context.new_page()
        other.goto(f"{here.base}search.html?q={word}")
        try:
            other.wait_for_function(f"{FOUND}.some(link => link.split(/[?#]/)[0] === {here.page.url!r})", timeout=5000)
        except playwright.TimeoutError:
            faults.append(f"not found: {word!r}")
        other.close()
    return faults


ON_PAPER = """() => {
  const seen = part => part.checkVisibility({visibilityProperty: true});
  const faults = [...document.querySelectorAll("nav, button, select, input[type=range], input[type=search], .copybtn")]
    .filter(seen).map(part => "printed: " + part.outerHTML.slice(0, 120));
  document.querySelectorAll("details:not(.hide)").forEach(details => {
    details.open = false;  // as a reader would leave it, who cannot open it on paper
    if (!seen(details.lastElementChild)) faults.push("stays folded: " + details.innerText);
    details.open = true;
  });
  document.querySelectorAll("main img:not(a img)").forEach(picture => {
    if (!seen(picture)) faults.push("not printed: " + picture.alt);
  });
  if (!document.querySelector("main article, main section, main form")) faults.push("nothing to print");
  return faults;
}"""


def paper_shows_the_text_alone(here: Visit) -> list[str]:
    here.page.emulate_media(media="print")
    faults = list(here.page.evaluate(ON_PAPER))
    here.page.emulate_media(media="screen")
    return faults


# Hands out the page's controls one by one, each when it can be seen and reached, and tells what changed meanwhile.
CONTROLS = """() => {
  const kinds = "button, input:not([type=hidden]), select, textarea, summary, [role=button], [role=slider]";
  const done = new WeakSet(), watch = new MutationObserver(changes => seen.push(...changes)), seen = [], observed =
    {subtree: true, childList: true, attributes: true, characterData: true};
  window.nextControl = () => {
    const above = document.activeElement.closest("dialog:modal, .dropdown-menu.show") ??
      document.querySelector("dialog:modal, .dropdown-menu.show") ?? document;
    for (const part of above.matches?.("dialog") ? [above] : [above, document])
      for (const control of part.querySelectorAll(kinds))
        if (!done.has(control) && control.checkVisibility({visibilityProperty: true})) {
          done.add(control);
          control.focus();
          changes(control);
          const reached = document.activeElement === control && control.tabIndex >= 0;
          return [control.type, control.outerHTML.slice(0, 150), reached];
        }
    return above.matches?.("dialog") ? "Escape" : null;
  };
  watch.observe(document, observed);
  addEventListener("change", event => { if (event.target.type === "radio") notes.push("chosen"); });
  const tooltip = node => node.classList?.contains("tooltip") || node.closest?.(".tooltip");
  let control;
  window.changes = next => {
    control = next ?? control;
    const page = [...seen.splice(0), ...watch.takeRecords()].filter(change =>
      !(change.target === control && control.matches("input, select, textarea")) &&
      change.attributeName !== "aria-describedby" &&  // a tooltip, which says nothing of what a control does
      ![change.target, ...change.addedNodes, ...change.removedNodes].some(tooltip));
    const moved = ![control, document.body].includes(document.activeElement);
    return page.length + notes.splice(0).length + moved;
  };
}"""
KEYS = {"radio": ["ArrowDown"], "checkbox": ["Space"], "range": ["Home", "End"], "select-one": ["ArrowDown"]}
KEYS |= {"number": ["1"], "text": ["x", "Enter"], "search": ["x", "Enter"], "textarea": ["x", "Enter"]}


def changed(page: "Page") -> bool:
    """Whether something changes within a second: what scrolls smoothly does so late."""
    for _ in range(50):
        page.wait_for_timeout(20)
        if page.evaluate("changes()"):
            return True
    return False


def every_control_does_something(here: Visit) -> list[str]:
    """A control lives if a key pressed on it changes the page: around it, or, for a button, its own label."""
    page, faults = here.page, []
    page.evaluate(CONTROLS)
    page.clock.pause_at(page.evaluate("Date.now()") + 60_000)  # what an earlier control set off later does not count
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("scrollTo(0, 1e6), scrollBy(0, -300)")  # a way back to the top appears
        while control := page.evaluate("nextControl()"):
            if control == "Escape":  # nothing is left in this dialog
                page.keyboard.press("Escape")
                continue
            kind, looks, reached = control
            for key in KEYS.get(kind, ["Enter"]):
                page.keyboard.press(key)
            if not reached or not changed(page):
                faults.append(f"{'dead' if reached else 'not reached by keyboard'}: {looks}")
    return faults


def no_request_fails_or_leaves_the_book(here: Visit) -> list[str]:
    return here.faults + [url for url in here.requests if not url.startswith((here.base, "data:", "blob:"))]


Check = Callable[[Visit], list[str]]
ANYWHERE: list[Check] = [every_formula_is_typeset, every_link_leads_somewhere, search_finds_its_words]
USE: list[Check] = [every_slider_moves_its_picture, every_control_does_something]
LOOKS: list[Check] = [  # the same wherever the page lies
    nothing_is_too_heavy,
    every_picture_is_there_and_says_what_it_shows,
    nothing_is_wider_than_the_screen,
    light_and_dark_are_legible,
    the_dark_page_shows_through_what_moves,
    added_and_removed_lines_are_colored,
    printed_text_fits_its_box,
    a_phone_shows_large_figures_and_whole_names,
    axe_finds_nothing_serious,
    paper_shows_the_text_alone,
]
PLACES: dict[str, list[Check]] = {
    "disk": LOOKS + ANYWHERE + USE,
    "server": ANYWHERE + USE,
    "path of a server": ANYWHERE,
}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which a local server shows a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(ROOT), "--path-output", str(folder)]
    subprocess.run([*command, "-W", "-n", "--keep-going"], check=True)
    return folder / "_build/html"


@pytest.fixture(scope="session")
def bases(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The site's address in each place."""
    below = tmp_path_factory.mktemp("server")
    (below / "some").mkdir()
    (below / "some/path").symlink_to(site)
    with served(site) as root, served(below) as other:
        yield dict(zip(PLACES, (f"{site.as_uri()}/", root, f"{other}some/path/"), strict=True))


@pytest.fixture(scope="module")
def here(request: pytest.FixtureRequest, browser: "Browser", site: Path, bases: dict[str, str]) -> Iterator[Visit]:
    place, name = request.param
    with visit(browser, site, bases[place], name) as opened:
        yield opened


@pytest.mark.parametrize(
    ("here", "check"),
    [
        ((place, name), check)
        for place, checks in PLACES.items()
        for name in ([*TOC, *THEME] if place == "disk" else [TOC[0], TOC[2], "search"])
        for check in (*checks, no_request_fails_or_leaves_the_book)
    ],
    indirect=["here"],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value.__name__,
)
def test_a_page_passes(here: Visit, check: Check) -> None:
    assert check(here) == []


def test_no_page_is_left_unchecked(site: Path) -> None:
    built = {
        str(page.relative_to(site).with_suffix("")) for page in site.rglob("*.html") if "_static" not in page.parts
    }
    assert built - {"index"} == {*TOC, *THEME} - {"index"}


@pytest.mark.parametrize("place", PLACES)
def test_the_front_door_opens_the_first_page(browser: "Browser", bases: dict[str, str], place: str) -> None:
    page = browser.new_page()
    page.goto(bases[place] + "index.html")
    page.wait_for_url(f"{bases[place]}{TOC[0]}.html")
    page.close()


@pytest.mark.parametrize("place", PLACES)
def test_search_by_keyboard_leads_to_a_page(browser: "Browser", bases: dict[str, str], place: str) -> None:
    page = browser.new_page()
    page.goto(f"{bases[place]}{TOC[0]}.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("Bayes")
    page.keyboard.press("Enter")
    page.locator("ul.search a").first.click()
    page.wait_for_url(re.compile(r"/chapters/\w+\.html"))
    page.close()


# Each check must be able to fail: on a page that is right but for one thing


def test_a_link_to_a_paper_shows_what_it_found(browser: "Browser", bases: dict[str, str]) -> None:
    page = browser.new_page()
    page.goto(f"{bases['server']}chapters/deep_ensembles.html")
    link, card = page.locator("a[data-card][href*='1612.01474']").first, page.locator(".effens-card")
    link.hover()
    card.wait_for()
    assert card.inner_text().startswith("Lakshminarayanan et al. (2017)")
    page.keyboard.press("Escape")
    assert card.count() == 0
    link.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert card.count() == 1  # by keyboard, too
    page.close()


def test_search_shows_where_its_words_stand(browser: "Browser", bases: dict[str, str]) -> None:
    page = browser.new_page()
    page.goto(f"{bases['server']}search.html?q=temperature")
    found = page.locator("ul.search p.context").first
    found.wait_for()
    assert "temperature" in found.inner_text().lower()
    page.close()


def png(gray: int, width: int = 200) -> str:
    file = io.BytesIO()
    Image.new("L", (width, 100), gray).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PICTURE = (
    f'<img src="{png(255)}" width="200" height="100" alt="Four networks agree on the data and disagree beside them">'
)
GOOD = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Right</title>
<link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">
<style>
:root {{ color-scheme: light dark; background: Canvas; }}
[data-theme="dark"] img {{ filter: invert(1); }}
@media print {{ :is(button, input, select) {{ display: none; }} ::details-content {{ content-visibility: visible; }} }}
</style>
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.onchange = () => {{ document.documentElement.dataset.theme = dark.matches ? "dark" : "light"; }};
dark.onchange();
</script></head>
<body><main><h1 id="top">Ensembles</h1><article>
<p>They know <a href="#top">more</a>, and of <span class="math"><span class="katex">x</span></span>.</p>
<div>{PICTURE}<label>members <input type="range" max="2" value="0"></label></div>
<script>
const frames = ["{png(255)}", "{png(254)}", "{png(253)}"];
document.querySelector("input").oninput = event => {{ document.images[0].src = frames[event.target.value]; }};
</script>
<label>goal <select onchange="this.closest('label').append('!')"><option>a</option><option>b</option></select></label>
<button onclick="this.after('!')">Copy</button><details><summary>Why</summary><p>Because.</p></details>
<form><label><input type="radio" name="bet"> yes</label><label><input type="radio" name="bet"> no</label></form>
<pre tabindex="0" style="overflow: auto">{"wide " * 100}</pre>
WRONG</article></main></body></html>"""
FRAMES = '<p class="effens-player"><script type="application/json">[["data:,", "1 network"]]</script></p>'
SEARCH = """<!doctype html><title>Search</title><link rel="icon" href="data:,"><ul class="search"></ul><script>
if (/Ensembles|Because/.test(location.search))
  document.querySelector("ul").innerHTML = "<li><a href='page.html'>Right</a>";
</script>"""


@pytest.fixture
def page_with(browser: "Browser", tmp_path: Path) -> Callable[[str], Any]:
    def made_up(wrong: str) -> Any:
        (tmp_path / "page.html").write_text(GOOD.replace("WRONG", wrong), "utf-8")
        (tmp_path / "search.html").write_text(SEARCH, "utf-8")
        (tmp_path / "heavy.js").write_text(" " * 1_200_001, "utf-8")
        return visit(browser, tmp_path, f"{tmp_path.as_uri()}/", "page")

    return made_up


def test_every_check_passes_a_good_page(page_with: Callable[[str], Any]) -> None:
    with page_with("") as here:
        assert {
            check.__name__: faults
            for check in [*PLACES["disk"], no_request_fails_or_leaves_the_book]
            if (faults := check(here))
        } == {}


@pytest.mark.parametrize(
    ("check", "wrong"),
    [
        (nothing_is_too_heavy, f"<!--{'x' * 1_500_000}-->"),
        (nothing_is_too_heavy, "<script src='heavy.js'></script>"),
        (every_formula_is_typeset, "<p>so $x^2$ it is</p>"),
        (every_formula_is_typeset, r"<p>so \(x^2\) it is</p>"),
        (every_formula_is_typeset, r"<p>\begin{align}x\end{align}</p>"),
        (every_formula_is_typeset, "<p class='math'>x</p>"),
        (every_formula_is_typeset, "<p class='katex'><span style='color:#cc0000'>\\foo</span></p>"),
        (every_slider_moves_its_picture, f"<div>{PICTURE}<input type='range' aria-label='members'></div>"),
        (every_picture_is_there_and_says_what_it_shows, f"<img src='{png(255)}' width='200' height='100'>"),
        (every_picture_is_there_and_says_what_it_shows, f"<img src='{png(255)}' alt='../_images/0a1b2c.png'>"),
        (every_picture_is_there_and_says_what_it_shows, f"<img src='{png(255)}' alt='../_images/0a1b2c'>"),
        (every_picture_is_there_and_says_what_it_shows, f"<img src='{png(255)}' alt='Two lines'>"),
        (every_picture_is_there_and_says_what_it_shows, PICTURE.replace("data:", "gone/")),
        (every_picture_is_there_and_says_what_it_shows, FRAMES),
        (every_picture_is_there_and_says_what_it_shows, "<svg width='90' height='90'><path d='M0 0h90' /></svg>"),
        (nothing_is_wider_than_the_screen, "<p style='width: 500px'>wide</p>"),
        (nothing_is_wider_than_the_screen, "<div style='overflow: hidden'><table width='500'><td>cut</table></div>"),
        (light_and_dark_are_legible, "<p style='color: #888'>faint in light</p>"),
        (light_and_dark_are_legible, "<p style='color: #333'>faint in dark</p>"),
        (light_and_dark_are_legible, "<p style='opacity: 0.5'>faint in both</p>"),
        (light_and_dark_are_legible, PICTURE.replace(png(255), png(40))),
        (light_and_dark_are_legible, "<style>img { filter: none !important; }</style>"),
        (light_and_dark_are_legible, "<script>dark.onchange = null</script>"),
        (
            the_dark_page_shows_through_what_moves,
            "<style>[data-theme=dark] .text_html { background: #ced6dd }</style>"
            "<div class='text_html'><p class='effens-live'>pale</p></div>",
        ),
        (added_and_removed_lines_are_colored, "<pre><span class='gi'>+ plain</span></pre>"),
        (
            added_and_removed_lines_are_colored,
            "<style>[data-theme=light] .gd { color: #800 }</style><pre><span class='gd'>- plain in dark</span></pre>",
        ),
        (
            printed_text_fits_its_box,
            f"<div class='cell_output'><pre tabindex='0' style='overflow: auto'>{'x' * 300}</pre></div>",
        ),
        (
            a_phone_shows_large_figures_and_whole_names,
            f"<div class='cell_output'>{PICTURE.replace(png(255), png(255, 900)).replace('200', '300')}</div>",
        ),
        (
            a_phone_shows_large_figures_and_whole_names,
            "<table style='width: 60px'><td><code><span class='pre' style='overflow-wrap: anywhere'>diversity_gain()"
            "</span></code></td></table>",
        ),
        (a_phone_shows_large_figures_and_whole_names, "<p class='prev-next-area'><a href='#top'>Hyper</a></p>"),
        (axe_finds_nothing_serious, "<select><option>nobody says what for</option></select>"),
        (axe_finds_nothing_serious, "<pre style='overflow: auto; width: 9em'>no key scrolls this line of text</pre>"),
        (axe_finds_nothing_serious, "<p style='color: #888'>faint in light</p>"),
        (axe_finds_nothing_serious, "<p style='color: #333'>faint in dark</p>"),
        (every_link_leads_somewhere, "<a href='gone.html'>gone</a>"),
        (every_link_leads_somewhere, "<a href='#gone'>gone</a>"),
        (every_link_leads_somewhere, "<a href='search.html#gone'>gone</a>"),
        (every_link_leads_somewhere, "<a href='/elsewhere.html'>elsewhere</a>"),
        (every_link_leads_somewhere, "<p id='top'>twice</p>"),
        (search_finds_its_words, "<p>unindexed</p>"),
        (paper_shows_the_text_alone, "<nav><a href='page.html'>Next</a></nav>"),
        (paper_shows_the_text_alone, "<style>@media print { img { display: none } }</style>"),
        (paper_shows_the_text_alone, "<style>@media print { ::details-content { display: none } }</style>"),
        (every_control_does_something, "<button>Dead</button>"),
        (every_control_does_something, "<button onclick='this.after(1)' tabindex='-1'>By mouse alone</button>"),
        (every_control_does_something, "<select><option>dead</option><option>too</option></select>"),
        (every_control_does_something, "<input type='text'>"),
        (every_control_does_something, "<input type='number'>"),
        (every_control_does_something, "<input type='range'>"),
        (every_control_does_something, "<input type='radio' name='alone'>"),
        (every_control_does_something, "<input type='checkbox'>"),
        (no_request_fails_or_leaves_the_book, "<script>console.error('no')</script>"),
        (no_request_fails_or_leaves_the_book, "<script>throw Error('no')</script>"),
        (no_request_fails_or_leaves_the_book, "<script src='gone.js'></script>"),
        (no_request_fails_or_leaves_the_book, "<script src='/dev/null'></script>"),
        (no_request_fails_or_leaves_the_book, "<link rel='stylesheet' href='http://127.0.0.1:9/a.css'>"),
    ],
)  # fmt: skip
def test_a_check_catches(page_with: Callable[[str], Any], check: Check, wrong: str) -> None:
    with page_with(wrong) as here:
        assert check(here) != []


# Players and bets, on a page that holds nothing else


@contextmanager
def opened(browser: "Browser", path: Path, width: int = 800, **options: Any) -> Iterator["Page"]:
    """The page at `path`, opened from disk; leaving it, no error and no request to elsewhere may have happened."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert not errors
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]


INTERVAL = 400
WORDS = [f"{m} networks: the band opens where no point holds it" for m in range(1, 6)]


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = np.linspace(0, 1, 50)

    def draw(ax: Axes, value: int) -> None:
        ax.plot(x, x**value)

    player = players.player(
        draw, range(1, 6), alt="Powers of x", words=lambda value: WORDS[value - 1], figsize=(6, 3), interval=INTERVAL
    ).data
    bet = players.bet("Which is wider?", {"one": "It is narrow.", "five": "They disagree."}, answer="five").data
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Players</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"></head>
<body>{player}{player}{bet}{bet}</body></html>""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module", params=[0, 1], ids=["first", "second"])
def which(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def state(page: "Page", which: int = 0) -> list[Any]:
    """What stands on the page: the picture, its alt text, the words, the slider's value and its words."""
    script = """root => [root.querySelector("img").src, root.querySelector("img").alt,
        root.querySelector("output").textContent, +root.querySelector("input").value,
        root.querySelector("input").getAttribute("aria-valuetext")]"""
    return list(page.locator(".effens-player").nth(which).evaluate(script))


def test_each_key_moves_picture_alt_and_words_of_its_own_player(
    browser: "Browser", page_path: Path, which: int
) -> None:
    with opened(browser, page_path) as page:
        other = state(page, 1 - which)
        slider = page.get_by_role("slider", name="members").nth(which)
        slider.focus()
        pictures = set()
        for key, at in [("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("End", 4), ("Home", 0)]:
            slider.press(key)
            picture, alt, words, value, said = state(page, which)
            pictures.add(picture)
            assert (words, said, value, alt) == (WORDS[at], WORDS[at], at, f"Powers of x: {WORDS[at]}")
        assert len(pictures) == 4
        assert state(page, 1 - which) == other


def test_a_click_on_the_slider_moves_the_picture(browser: "Browser", page_path: Path, which: int) -> None:
    with opened(browser, page_path) as page:
        before = state(page, which)
        page.get_by_role("slider").nth(which).click()  # in its middle
        assert state(page, which)[3] == 2
        assert state(page, which)[0] != before[0]


def test_play_runs_to_the_end_and_starts_again(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        button = page.get_by_role("button").first
        for _ in range(2):
            assert button.inner_text() == "Play"
            button.press("Enter")
            page.wait_for_function("document.querySelector('.effens-player input').value === '4'")
            assert state(page)[2] == WORDS[4]
        page.wait_for_timeout(2 * INTERVAL)
        assert state(page)[3] == 4
        assert state(page, 1)[3] == 0


def test_pause_and_touching_the_slider_stop_it(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        button, slider = page.get_by_role("button").first, page.get_by_role("slider").first
        for stopper, key in ((button, "Enter"), (slider, "Home")):
            slider.press("Home")
            button.click()
            assert page.locator("output").first.get_attribute("aria-live") == "off"  # no announcement per frame
            page.wait_for_function("+document.querySelector('.effens-player input').value > 0")
            stopper.press(key)
            stopped = state(page)
            page.wait_for_timeout(2 * INTERVAL)
            assert state(page) == stopped
            assert button.inner_text() == "Play"
            assert page.locator("output").first.get_attribute("aria-live") == "polite"


def test_nothing_moves_by_itself(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        before = state(page)
        page.wait_for_timeout(2 * INTERVAL)
        assert state(page) == before


def test_reduced_motion_steps_instead_of_playing(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path, reduced_motion="reduce") as page:
        button = page.get_by_role("button", name="Next").first
        for at in (1, 2, 3, 4, 0):
            button.click()
            assert state(page)[3] == at
        page.wait_for_timeout(2 * INTERVAL)
        assert state(page)[3] == 0
        page.emulate_media(reduced_motion="no-preference")
        playwright.expect(page.get_by_role("button").first).to_have_text("Play")


def test_paper_shows_the_frame_and_its_words_without_controls(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        page.get_by_role("slider").first.press("End")
        page.emulate_media(media="print")
        assert page.locator("img").first.is_visible()
        assert page.locator("output").first.is_visible()
        assert not any(control.is_visible() for control in page.locator(".controls").all())
        assert state(page)[2] == WORDS[4]


def test_without_script_one_frame_shows_and_no_dead_control(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path, java_script_enabled=False) as page:
        assert [image.is_visible() for image in page.locator(".effens-player img").all()] == [True, True]
        assert not any(page.locator(f".effens-player {tag}").first.is_visible() for tag in ("button", "input", "label"))
        assert page.locator("output").first.inner_text() == WORDS[0]
        page.locator("summary").first.click()
        assert page.get_by_text("They disagree.").first.is_visible()


def test_a_bet_answers_the_choice_that_was_made(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        first, second = page.locator(".effens-bet").all()
        assert not first.get_by_text("They disagree.").first.is_visible()
        first.get_by_role("button", name="one").click()
        assert first.get_by_role("status").inner_text() == "No. It is narrow."
        assert first.get_by_role("button", name="five").inner_text() == "✓ five"
        first.get_by_role("button", name="five").press("Enter")
        assert first.get_by_role("status").inner_text() == "Right. They disagree."
        assert first.locator("[aria-pressed=true]").all_inner_texts() == ["✓ five"]
        assert second.get_by_role("status").inner_text() == ""  # each has its own
        second.locator("summary").press("Enter")
        assert second.get_by_text("They disagree.").is_visible()


def test_a_bet_opens_what_is_folded_below_it_up_to_the_next_heading(browser: "Browser", site: Path) -> None:
    page = browser.new_page()
    page.goto((site / "chapters/deep_ensembles.html").as_uri())
    count = "parts => parts.flatMap(p => [p, ...p.querySelectorAll('details')])"
    count += ".filter(p => p.matches('details.answer, details.below-input'))"
    bet = page.locator(".effens-bet").first
    cell = "ancestor::div[contains(concat(' ', @class, ' '), ' cell ')][1]"
    folded = bet.locator(f"xpath={cell}/following-sibling::*")
    closed = folded.evaluate_all(f"parts => ({count})(parts).map(fold => fold.open)")
    assert closed
    assert not any(closed)
    bet.get_by_role("button").first.click()
    assert all(folded.evaluate_all(f"parts => ({count})(parts).map(fold => fold.open)"))
    assert not page.locator("#exercises details.answer[open]").count()
    page.close()


def test_ids_are_unique(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [390, 800])
def test_nothing_jumps_and_nothing_scrolls_sideways(browser: "Browser", page_path: Path, width: Any) -> None:
    layout = """[document.documentElement.scrollWidth <= innerWidth, document.documentElement.scrollHeight,
        ...Array.from(document.querySelectorAll("img, button, input, output"),
        element => JSON.stringify(element.getBoundingClientRect()))]"""
    with opened(browser, page_path, width=width) as page:
        before = page.evaluate(layout)
        assert before[0]
        for _ in WORDS[1:]:
            page.get_by_role("slider").first.press("ArrowRight")
            page.locator("img").first.evaluate("image => image.decode()")
            assert page.evaluate(layout) == before


def test_keys_do_not_reach_the_page_around(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        page.evaluate("window.heard = []; document.addEventListener('keydown', event => heard.push(event.key))")
        page.get_by_role("slider").first.press("ArrowRight")
        assert page.evaluate("heard") == []


def test_a_player_added_later_starts_once_and_leaves_the_others(browser: "Browser", page_path: Path) -> None:
    """As notebooks do: HTML is set first, then each script is put in anew, not always inside the player."""
    with opened(browser, page_path) as page:
        page.get_by_role("slider").first.press("End")
        page.evaluate(
            """() => {
            const host = document.createElement("div");
            host.innerHTML = document.querySelector(".effens-player").outerHTML;
            host.querySelector(".controls").hidden = true;
            document.body.append(host);
            const script = document.createElement("script");
            script.text = host.querySelectorAll("script")[1].text;
            document.head.append(script);
            document.head.append(script.cloneNode(true));
            const again = document.createElement("script");
            again.text = script.text;
            document.head.append(again);
        }"""
        )
        assert state(page, 0)[3] == 4
        slider = page.get_by_role("slider").nth(2)
        slider.press("ArrowRight")
        assert state(page, 2)[3] == 1
        assert state(page, 2)[2] == WORDS[1]


@pytest.mark.parametrize(("task", "goal"), [(task, goal) for task, goals in choose.GOALS.items() for goal in goals])
def test_the_chooser_says_what_choose_says(browser: "Browser", tmp_path: Path, task: str, goal: str) -> None:
    (tmp_path / "chooser.html").write_text(players.chooser().data, "utf-8")
    budgets = [{}, {"train": 1.5}, {"latency": 3.0}, {"memory": 5.0}, {"train": 4.0, "throughput": 2.0, "memory": 1.5}]
    with opened(browser, tmp_path / "chooser.html") as page:
        of, *selects = page.locator("label:not([data-task]) select").all()
        of.select_option(str(list(choose.GOALS).index(task)))
        if len(choose.GOALS[task]) > 1:  # else there is nothing to choose, and it is hidden
            page.locator(f'label[data-task="{task}"] select').select_option(str(list(choose.GOALS[task]).index(goal)))
        assert page.locator("section:visible").count() == 1
        for budget in budgets:
            for select, key in zip(selects, choose.BUDGETS, strict=True):
                select.select_option(f"{budget[key]:g}" if key in budget else "any")
            expected = choose.choose(task, **budget, goal=goal)
            rows = page.locator("section:visible tbody tr")
            said = [(row.locator("th").inner_text(), row.get_attribute("class") != "out") for row in rows.all()]
            fit = [choice.method for choice in expected if choice.qualifies]
            # What does not qualify is in any order.
            assert said[: len(fit)] == [(name, True) for name in fit]
            assert sorted(said[len(fit) :]) == sorted((c.method, False) for c in expected if not c.qualifies)
            same = [name for name in fit[1:] if choose.alike(task, name, fit[0], goal)]
            words = page.locator("p[aria-live]").inner_text()
            within = f"{len(fit)} of {len(expected)} methods are within your limits."
            assert words.startswith(f"{within} On {players.TASK_WORDS[task]}, {fit[0]} has the best mean.")
            told = (
                f"Not distinguishable from it: {'; '.join(same)}."
                if same
                else "All others are distinguishable from it."
            )
            assert words.endswith(told)


def test_answers_to_exercises_wait_folded_open_by_key_and_print(browser: "Browser", site: Path) -> None:
    page = browser.new_page()
    page.goto(f"{site.as_uri()}/chapters/snapshot_ensembles.html")
    exercises = page.locator("#exercises")
    for number in (1, 2, 3):
        assert exercises.get_by_text(f"{number}.", exact=True).is_visible()
    said = [part.inner_text().strip() for part in exercises.locator("summary").all()]
    assert said == ["Show the solution", "Show the answer"] * 3
    answer = exercises.get_by_text("Both. Without the first snapshot")
    assert not answer.is_visible()
    page.emulate_media(media="print")
    assert answer.is_visible()
    page.emulate_media(media="screen")
    exercises.locator("summary").nth(3).press("Enter")
    assert answer.is_visible()
    page.close()


def rows_of(page: Any) -> list[str]:
    """What the rows of a page's table say, their cells apart by tabs."""
    return [str(row.inner_text()).strip() for row in page.locator("tbody tr").all()]


def test_a_planner_shows_prices_once_one_is_given_and_says_what_it_cannot_use(
    browser: "Browser", tmp_path: Path
) -> None:
    path = tmp_path / "index.html"
    page_of = '<!doctype html><html lang="en"><link rel="icon" href="data:,"><title>Plan</title>'
    path.write_text(page_of + players.planner(trainings=12, seconds=3600, start=1800).data, "utf-8")
    with opened(browser, path) as page:
        row, said = page.locator("tbody tr").first, page.locator("p")
        table = {int(count): cells for count, *cells in (line.split("\t") for line in rows_of(page))}
        assert table[1] == ["12.5 h", "1.0x", "96%", "12.50"]
        assert table[5] == ["3.5 h", "3.6x", "69%", "17.50"]  # three rounds
        assert table[20][:2] == table[1000][:2] == ["1.5 h", "8.3x"]
        page.get_by_label("seconds of each").fill("10")
        page.get_by_label("seconds to start").fill("0")
        assert [line.split("\t")[1] for line in rows_of(page)[:3]] == ["2.0 min", "1.0 min", "30 s"]
        page.get_by_label("seconds of each").fill("3600")
        page.get_by_label("seconds to start").fill("1800")
        before = row.inner_text()
        assert "price" not in page.locator("thead").inner_text()
        page.get_by_label("price").fill("2")
        assert "price" in page.locator("thead").inner_text()
        assert row.inner_text().split() == [*before.split(), "25.00"]
        page.get_by_label("price").fill("")
        assert row.inner_text() == before
        for name, wrong in (
            ("trainings", ""),
            ("trainings", "-5"),
            ("trainings", "2.5"),
            ("seconds of each", "0"),
            ("seconds to start", "-1"),
            ("price of an hour", "-1"),
        ):
            field = page.get_by_label(name)
            was = field.input_value()
            field.fill(wrong)
            assert said.inner_text().startswith(f"{name}: give "), wrong
            assert field.get_attribute("aria-invalid") == "true"
            assert row.inner_text().split() == ["1"]
            field.fill(was)
            assert not said.is_visible()
            assert row.inner_text() == before
