"""The living figure: its networks in node, and the element itself in a browser."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from effens_book import players
from effens_book.address import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SCRIPT = ROOT / "chapters/effens_book/players/living.js"

in_browser = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH"),
]


@pytest.mark.slow
@pytest.mark.skipif(NODE is None, reason="needs node on PATH")
def test_its_networks_in_node() -> None:
    done = subprocess.run([str(NODE), "--test", str(ROOT / "tests/living.test.js")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_is_small_and_asks_for_nothing() -> None:
    script = SCRIPT.read_text("utf-8")
    assert len(script.encode()) < 30_000
    assert not re.search(r"https?://|fetch|XMLHttpRequest|import|</script|document\.addEventListener", script)


def test_living_is_the_same_each_time_and_says_what_it_shows() -> None:
    page = players.living(method="batch", members=4, width=16, seed=7).data
    assert page == players.living(method="batch", members=4, width=16, seed=7).data
    assert page.startswith('<effens-living method="batch" members="4" width="16" seed="7"')
    assert page.index("In the gap each of them goes its") < page.index("<script>")
    assert SCRIPT.read_text("utf-8") in page


@pytest.mark.parametrize(
    ("name", "value"),
    [("method", "swag"), ("members", 0), ("members", 21), ("width", 6), ("width", 68), ("seed", -1), ("seed", 0.5)],
)
def test_a_setting_that_the_figure_does_not_have_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}$"):
        players.living(**{name: value})


# In a browser, on a page that holds nothing else

SMALL: dict[str, Any] = {"members": 3, "width": 16}  # trains in a moment
DONE = "() => [...document.querySelectorAll('effens-living')].every(figure => figure.ensemble?.finished)"


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path, players.living(**SMALL).data)


def written(folder: Path, *parts: str) -> Path:
    page = folder / "index.html"
    page.write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Living</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width">
<style>:root {{ color-scheme: light dark; }}</style></head>
<body><main><h1>An ensemble</h1>{"".join(parts)}</main></body></html>""",
        "utf-8",
    )
    return page


@contextmanager
def opened(browser: "Browser", path: Path, wait: bool = True, width: int = 800, **options: Any) -> Iterator["Page"]:
    """The page; leaving it, no error and no request to elsewhere may have happened."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, **{"reduced_motion": "reduce", **options})
    page = context.new_page()
    page.set_default_timeout(120_000)
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.add_init_script("""window.frames_ = 0; const frame = window.requestAnimationFrame;
        window.requestAnimationFrame = act => { frames_++; return frame.call(window, act); };""")
    page.goto(path.as_uri())
    if wait:
        page.wait_for_function(DONE)
    yield page
    context.close()
    assert not errors
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]


def ask(page: "Page", what: str) -> Any:
    """Something of the first figure."""
    return page.evaluate(f"(() => {{ const figure = document.querySelector('effens-living'); return {what}; }})()")


def said(page: "Page", which: int = 0) -> str:
    page.wait_for_function(DONE)
    return page.get_by_role("status").nth(which).inner_text()


def at(page: "Page", x: float, y: float) -> tuple[float, float]:
    """Where on the screen a point of the figure lies: x from -3 to 3, y from 3.4 down to -3 at 80% of the height."""
    box = page.locator("effens-living figure > svg").first.bounding_box()
    assert box
    return box["x"] + box["width"] * (x + 3) / 6, box["y"] + box["height"] * 0.8 * (3.4 - y) / 6.4


def spread(page: "Page") -> float:
    said(page)
    return float(ask(page, "figure.found.gap"))


class TestInABrowser:
    pytestmark = in_browser

    def test_it_trains_to_the_end_while_it_is_watched_and_says_so(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path, wait=False, reduced_motion="no-preference") as page:
            page.wait_for_function("document.querySelector('effens-living').ensemble.done > 5")
            assert page.get_by_role("status").inner_text() == "The networks are being trained."
            page.get_by_role("button", name="Pause").click()
            stopped = ask(page, "figure.ensemble.done")
            page.wait_for_timeout(300)
            assert ask(page, "figure.ensemble.done") == stopped
            assert page.get_by_role("status").inner_text() == "Training is paused."
            page.get_by_role("button", name="Continue").click()
            numbers = r"The members' spread is \d\.\d\d on the points and \d\.\d\d in the gap, [\d.]+ times as much\."
            assert re.fullmatch(numbers, said(page))
            assert page.get_by_role("button", name="Train again").is_visible()

    def test_out_of_sight_it_waits(self, browser: "Browser", tmp_path: Path) -> None:
        path = written(tmp_path, '<div style="height: 3000px"></div>', players.living(**SMALL).data)
        with opened(browser, path, wait=False) as page:
            page.wait_for_timeout(500)
            assert ask(page, "figure.ensemble.done") == 0
            ask(page, "figure.scrollIntoView()")
            page.wait_for_function(DONE)

    def test_a_click_adds_a_point_a_drag_moves_it_a_click_removes_it(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path) as page:
            first = spread(page)
            page.mouse.click(*at(page, 0, 1.3))
            assert ask(page, "figure.points.length") == 61
            assert ask(page, "figure.points.at(-1)") == {
                "x": pytest.approx(0, abs=0.02),
                "y": pytest.approx(1.3, abs=0.03),
                "own": True,
            }
            assert spread(page) < first
            assert f"went from {first:.2f} to {spread(page):.2f}." in said(page)
            page.mouse.move(*at(page, 0, 1.3))
            page.mouse.down()
            page.mouse.move(*at(page, 0.5, -1), steps=5)
            page.mouse.up()
            assert ask(page, "figure.points.length") == 61
            assert ask(page, "figure.points.at(-1).x") == pytest.approx(0.5, abs=0.02)
            said(page)
            page.mouse.click(*at(page, 0.5, -1))
            assert ask(page, "figure.points.length") == 60
            assert spread(page) == first  # the same points and starts give the same networks

    def test_a_point_of_the_data_can_be_dragged(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path) as page:
            x, y = ask(page, "[figure.points[0].x, figure.points[0].y]")
            page.mouse.move(*at(page, x, y))
            page.mouse.down()
            page.mouse.move(*at(page, 0, 0), steps=5)
            page.mouse.up()
            assert ask(page, "figure.points.length") == 60
            assert ask(page, "figure.points.some(p => Math.hypot(p.x, p.y) < 0.05)")

    def test_a_point_is_added_chosen_moved_and_removed_by_keyboard(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path) as page:
            page.evaluate("window.heard = []; document.addEventListener('keydown', event => heard.push(event.key))")
            first = spread(page)
            for _ in range(20):
                if ask(page, "figure.shadowRoot.activeElement?.className") == "another":
                    break
                page.keyboard.press("Tab")
            before = page.evaluate("heard.length")
            page.keyboard.press("Enter")
            assert ask(page, "figure.points.length") == 61
            point = page.get_by_role("slider", name="your point")
            assert point.evaluate("point => point.matches(':focus-visible')")
            x, y = ask(page, "[figure.points.at(-1).x, figure.points.at(-1).y]")
            for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "ArrowDown"):
                page.keyboard.press(key)
            moved = ask(page, "[figure.points.at(-1).x, figure.points.at(-1).y]")
            assert moved == pytest.approx([x + 0.1, y - 0.1])
            assert point.get_attribute("aria-valuetext") == f"x {x + 0.1:.1f}, y {y - 0.1:.1f}"
            assert spread(page) < first
            page.keyboard.press("Shift+Tab")  # away, and back to the point
            page.keyboard.press("Tab")
            page.keyboard.press("Delete")
            assert ask(page, "figure.points.length") == 60
            assert ask(page, "figure.shadowRoot.activeElement.className") == "another"
            assert spread(page) == first
            assert page.evaluate("heard.length") == before  # a page that turns by arrow key stays

    def test_a_finger_adds_a_point_moves_it_and_scrolls_elsewhere(self, browser: "Browser", tmp_path: Path) -> None:
        path = written(tmp_path, players.living(**SMALL).data, '<div style="height: 2000px"></div>')
        with opened(browser, path, width=390, has_touch=True, is_mobile=True) as page:
            page.touchscreen.tap(*at(page, 0, 1))
            assert ask(page, "figure.points.length") == 61
            touch = page.context.new_cdp_session(page)

            def drag(start: tuple[float, float], end: tuple[float, float]) -> None:
                touch.send(
                    "Input.dispatchTouchEvent",
                    {"type": "touchStart", "touchPoints": [dict(zip("xy", start, strict=True))]},
                )
                for k in range(1, 11):
                    spot = {axis: a + (b - a) * k / 10 for axis, a, b in zip("xy", start, end, strict=True)}
                    touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [spot]})
                touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
                page.wait_for_timeout(300)

            drag(at(page, 0, 1), at(page, 0.5, -1.5))
            assert ask(page, "figure.points.length") == 61
            assert ask(page, "figure.points.at(-1).x") == pytest.approx(0.5, abs=0.05)
            assert page.evaluate("scrollY") == 0
            drag(at(page, -0.2, -2), at(page, -0.2, 2))
            assert ask(page, "figure.points.length") == 61
            assert page.evaluate("scrollY") > 0

    def test_methods_members_width_and_the_other_settings_change_it(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path) as page:
            seen = {page.locator("figure .mean").first.get_attribute("d")}
            costs = set()

            def changed() -> str:
                words = said(page)
                seen.add(str(page.locator("figure > svg .mean").get_attribute("d")))
                costs.add(page.locator(".cost").inner_text())
                return words

            page.get_by_text("Snapshots").click()
            changed()
            page.get_by_text("One network", exact=True).click()
            assert changed().startswith("One network cannot disagree with itself")
            assert page.get_by_role("slider", name="members").is_disabled()
            page.get_by_text("BatchEnsemble", exact=True).click()
            changed()
            page.get_by_role("slider", name="members").press("ArrowRight")
            changed()
            assert ask(page, "figure.ensemble.members") == 4
            page.get_by_role("slider", name="width").press("ArrowRight")
            changed()
            assert "one network has 481." in page.locator(".cost").inner_text()
            page.locator("summary").click()
            page.get_by_label("vectors of BatchEnsemble start as").select_option("ones")
            assert changed().endswith("so their spread is 0.")
            page.get_by_label("hidden layers").select_option("1")
            changed()
            assert len(costs) == 6  # the vectors' start costs nothing
            assert "chosen because they show" in page.locator(".which").inner_text()
            page.get_by_role("button", name="Other random starts").click()
            changed()
            assert page.locator(".which").inner_text() == "These are the random starts of seed 2."
            assert len(seen) == 9

    def test_reduced_motion_shows_the_end_alone(self, browser: "Browser", path: Path) -> None:
        steps = """new Promise(done => { const seen = new Set(), note = () => seen.add(figure.shadowRoot
            .querySelector('.steps').textContent); new MutationObserver(note).observe(figure.shadowRoot,
            {subtree: true, childList: true, characterData: true}); figure.restart(); (function wait() {
            figure.ensemble.finished ? setTimeout(() => done([...seen]), 100) : setTimeout(wait, 20); })(); })"""
        for motion, most in (("reduce", 2), ("no-preference", 10**6)):
            with opened(browser, path, reduced_motion=motion) as page:
                shown = ask(page, steps)
                assert (len(shown) <= 2) == (motion == "reduce"), shown
                assert len(shown) <= most

    def test_dark_pages_get_light_lines_and_light_pages_dark_ones(self, browser: "Browser", path: Path) -> None:
        light = """part => { const pen = new OffscreenCanvas(1, 1).getContext("2d"), style = getComputedStyle(part);
            pen.fillStyle = style[part.matches("path") ? "stroke" : "fill"]; pen.fillRect(0, 0, 1, 1);
            return pen.getImageData(0, 0, 1, 1).data.slice(0, 3).reduce((sum, c, i) => sum + (c / 255) ** 2.2 *
            [0.2126, 0.7152, 0.0722][i], 0); }"""
        with opened(browser, path) as page:
            for method in ("One network", "Deep ensemble", "BatchEnsemble", "Snapshots"):
                page.get_by_text(method, exact=True).click()
                for scheme, ground in (("light", 1.0), ("dark", 0.01)):  # white, and nearly black
                    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
                    for part in (".mean", "text", "circle"):
                        seen = page.locator(f"figure > svg {part}").first.evaluate(light)
                        low, high = sorted((seen, ground))
                        assert (high + 0.05) / (low + 0.05) > 3, (method, scheme, part)

    def test_paper_shows_the_finished_picture_without_controls(self, browser: "Browser", tmp_path: Path) -> None:
        path = written(tmp_path, '<div style="height: 3000px"></div>', players.living(**SMALL).data)
        with opened(browser, path, wait=False, color_scheme="dark") as page:
            page.emulate_media(media="print")
            page.wait_for_function(DONE)
            assert page.locator("figure > svg .mean").is_visible()
            assert "in the gap" in page.get_by_role("status").inner_text()
            for part in ("button", "input", "select", "summary"):
                assert not any(found.is_visible() for found in page.locator(f"effens-living {part}").all())
            assert page.locator("figure").evaluate("part => getComputedStyle(part).color") == "rgb(0, 0, 0)"
        with opened(browser, path, wait=False) as page:
            assert page.pdf()[:4] == b"%PDF"
            assert ask(page, "figure.ensemble.finished")

    def test_a_screen_reader_hears_what_it_is_and_how_it_ends(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path) as page:
            words = said(page)
            label = page.get_by_role("img").first.get_attribute("aria-label")
            assert label
            assert label.startswith("60 points in two clusters with a gap between them")
            assert label.endswith(f"Deep ensemble: {words}")
            assert page.get_by_role("group", name="Method").is_visible()
            names = {"members", "width"}
            assert names == {part.get_attribute("name") for part in page.get_by_role("slider").all()}
            page.get_by_role("button", name="Add a point in the gap").click()
            assert page.get_by_role("slider", name="your point").get_attribute("aria-valuetext") == "x 0.0, y 1.4"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing(self, browser: "Browser", path: Path, scheme: str) -> None:
        axe = pytest.importorskip("axe_playwright_python.base", reason="needs the package axe-playwright-python")
        with opened(browser, path, color_scheme=scheme) as page:
            page.locator("summary").click()
            page.get_by_role("button", name="Add a point in the gap").click()
            said(page)
            page.evaluate(axe.AXE_SCRIPT)
            found = page.evaluate("axe.run().then(report => report.violations.map(v => [v.id, v.nodes[0].html]))")
            assert found == []

    @pytest.mark.parametrize("width", [320, 390])
    def test_nothing_scrolls_sideways(self, browser: "Browser", path: Path, width: int) -> None:
        with opened(browser, path, width=width) as page:
            page.locator("summary").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            for part in page.locator("effens-living :is(p, label, button, svg, select)").all():
                box = part.bounding_box()
                assert box is None or box["x"] + box["width"] <= width

    def test_removed_it_leaves_nothing_and_put_back_it_goes_on(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path, wait=False, reduced_motion="no-preference") as page:
            page.wait_for_function("document.querySelector('effens-living').ensemble.done > 0")
            page.evaluate("window.figure = document.querySelector('effens-living'); figure.remove()")
            before, frames = page.evaluate("[figure.ensemble.done, frames_]")
            page.wait_for_timeout(300)
            assert page.evaluate("[figure.ensemble.done, frames_]") == [before, frames]
            page.evaluate("dispatchEvent(new Event('beforeprint'))")
            assert page.evaluate("figure.ensemble.done") == before
            page.evaluate("document.querySelector('main').append(figure)")
            page.wait_for_function(f"figure.ensemble.done > {before}")
            page.evaluate("window.figure = (figure.remove(), new WeakRef(figure))")
            page.wait_for_timeout(100)
            page.context.new_cdp_session(page).send("HeapProfiler.collectGarbage")
            assert page.evaluate("figure.deref() === undefined")  # nothing in the page holds it

    def test_two_on_a_page_do_not_disturb_each_other(self, browser: "Browser", tmp_path: Path) -> None:
        parts = [players.living(**SMALL).data, players.living(method="batch", members=2, width=8).data]
        with opened(browser, written(tmp_path, *parts), wait=False) as page:
            page.set_viewport_size({"width": 800, "height": 2000})
            words = said(page, 1)
            page.get_by_text("One network", exact=True).first.click()
            page.mouse.click(*at(page, 0, 1))
            assert said(page, 0) != words
            assert said(page, 1) == words
            state = "[...document.querySelectorAll('effens-living')].map(f => [f.settings.method, f.points.length])"
            assert page.evaluate(state) == [["single", 61], ["batch", 60]]
            assert page.evaluate("document.querySelectorAll('[id]').length") == 0

    def test_without_script_its_words_show(self, browser: "Browser", path: Path) -> None:
        with opened(browser, path, wait=False, java_script_enabled=False) as page:
            assert page.get_by_text("two clusters of points with a gap").is_visible()
