"""Players in a real browser, from file://: mouse, keyboard, play, paper, no script, a phone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from effens import players

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


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


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
    bet = players.bet("Which is wider?", ["one", "five"], answer="five", because="They disagree.").data
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


def test_two_bets_do_not_share_their_choices_and_send_nothing(browser: "Browser", page_path: Path) -> None:
    with opened(browser, page_path) as page:
        radios = page.get_by_role("radio", name="five")
        radios.nth(0).check()
        radios.nth(1).check()
        assert radios.nth(0).is_checked()
        assert radios.nth(1).is_checked()
        page.evaluate("document.forms[0].requestSubmit()")  # as Enter does in some browsers
        page.wait_for_timeout(200)
        assert page.url == page_path.as_uri()
        page.locator("summary").first.press("Enter")
        assert page.get_by_text("They disagree.").first.is_visible()


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
