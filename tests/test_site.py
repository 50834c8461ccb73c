"""The built book in a real browser, from disk: no network, no error, nothing wider than a phone, no page too heavy."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from rerun import ROOT, chapters
from test_browser import CHROMIUM, FLAGS, playwright

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome on PATH"),
]
PAGES = [
    "index",
    *(f"chapters/{chapter.stem}" for chapter in chapters()),
    "chapters/bibliography",
    "search",
    "genindex",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(ROOT), "--path-output", str(folder)]
    subprocess.run([*command, "-W", "-n", "--keep-going"], check=True)
    return folder / "_build/html"


@pytest.fixture(scope="module")
def chromium() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole(
    site: Path, chromium: "playwright.Browser", name: str, scheme: "playwright.ColorScheme", width: int
) -> None:
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("requestfailed", lambda request: errors.append(request.url))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_load_state("networkidle")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    formulas = page.locator(".math")
    assert page.locator(".math .katex").count() >= formulas.count()
    for src, alt, loaded in page.evaluate(
        "[...document.images].map(i => [i.getAttribute('src').slice(-60), i.alt, !i.complete || i.naturalWidth > 0])"
    ):
        assert loaded, src
        assert alt.strip(), src
        assert not alt.endswith((".png", ".svg", ".jpg")), "alt text must say what a picture shows, not its file"
    assert page.locator("i[class*='fa-']").count() == 0, "an icon that the theme's script did not draw"
    context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []

    files = {Path(unquote(urlparse(url).path)) for url in requests if url.startswith("file:")}
    own = sum(file.stat().st_size for file in files if file.suffix == ".html" or "_images" in file.parts)
    shared = sum(file.stat().st_size for file in files) - own
    assert own <= (600_000 if name == "index" else 1_500_000)
    assert shared <= 1_250_000


def test_links_inside_the_book_lead_somewhere(site: Path, chromium: "playwright.Browser") -> None:
    page = chromium.new_page()
    broken = []
    for name in PAGES[1:]:  # index only leads on to the introduction
        page.goto((site / f"{name}.html").as_uri())
        for link in page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)"):
            if link.startswith("file:"):
                target = Path(unquote(urlparse(link).path))
                anchor = unquote(urlparse(link).fragment)
                text = target.read_text("utf-8") if target.suffix == ".html" and target.exists() else ""
                if not target.exists() or (anchor and text and f'id="{anchor}"' not in text):
                    broken.append((name, link))
    page.close()
    assert broken == []
