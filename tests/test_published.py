"""The built book as others get it: under any address, from one archive, with what a reader looks for on each page."""

import functools
import http.server
import itertools
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.parse import unquote, urldefrag, urljoin, urlparse
from urllib.request import urlopen

import pytest

from effens_book.address import ROOT, colab, settings, url
from effens_book.rerun import chapters

pytestmark = pytest.mark.slow
SUBPATH = "/some/where/else/"


class Page(HTMLParser):
    """What a page links to, loads and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors.add(found.get("id", ""))
        self.classes |= set(found.get("class", "").split())
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(found.get("href", ""))
        elif "src" in found:
            self.loads.append(found["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", str(ROOT), "--path-output", str(folder)]
    started = time.perf_counter()
    subprocess.run([*command, "-W", "-n", "--keep-going"], check=True)
    print(f"the book was built in {time.perf_counter() - started:.0f} s")
    return folder / "_build/html"


def read(folder: Path) -> dict[str, Page]:
    """All pages by their path; what else ends so are the theme's templates."""
    files = [file for file in folder.rglob("*.html") if "_static" not in file.parts]
    return {str(file.relative_to(folder)): Page(file.read_text("utf-8")) for file in files}


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return read(site)


def inside(link: str) -> bool:
    return not urlparse(link).scheme and not link.startswith("//")


# Under another address


@pytest.fixture(scope="module")
def address(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has the book under a path, and nothing at its root."""
    root = tmp_path_factory.mktemp("root")
    (root / SUBPATH.strip("/")).parent.mkdir(parents=True)
    (root / SUBPATH.strip("/")).symlink_to(site)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}{SUBPATH}"
        server.shutdown()


def test_under_a_path_every_page_is_reached_and_everything_loads(address: str, pages: dict[str, Page]) -> None:
    """Followed from the front page, link by link, as a reader would, with all that each page loads."""
    waiting, seen, wrong = [address], {address}, []
    reached: dict[str, Page | None] = {}
    while waiting:
        at = waiting.pop()
        try:
            with urlopen(at) as answer:
                content = answer.read()
        except HTTPError as error:
            wrong.append((at, error.code))
            continue
        reached[at] = page = Page(content.decode()) if answer.headers.get_content_type() == "text/html" else None
        if page is None:
            styles = re.findall(r"url\(['\"]?([^'\")]+)", content.decode()) if at.split("?")[0].endswith(".css") else []
            found = [link for link in styles if not link.startswith(("data:", "#"))]
        else:
            refresh = re.findall(r'http-equiv="Refresh" content="0; url=([^"]+)"', content.decode())
            found = [link for link in [*page.links, *page.loads, *refresh] if inside(link)]
        for link in found:
            target = urldefrag(urljoin(at, link))[0]
            assert target.startswith(address), f"{link} on {at} leads out of the book"
            if target not in seen:
                seen.add(target)
                waiting.append(target)
    assert wrong == []
    assert {urljoin(address, name) for name in pages} - set(reached) <= {address + "index.html"}  # it is the folder's


# From one archive


def test_unpacked_from_one_archive_all_links_and_anchors_hold(site: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "book"), "zip", site)
    shutil.unpack_archive(archive, tmp_path / "offline")
    root = (tmp_path / "offline").resolve()
    pages, broken = read(root), []
    for name, page in pages.items():
        for link in filter(inside, [*page.links, *page.loads]):
            path, anchor = urldefrag(link)
            target = (root / name).parent / unquote(urlparse(path).path) if path else root / name
            target = target.resolve()
            assert target.is_relative_to(root), f"{link} on {name} leads out of the book"
            there = pages.get(str(target.relative_to(root)))
            if not target.is_file() or (anchor and there and unquote(anchor) not in there.anchors):
                broken.append((name, link))
    assert broken == []


def test_the_archive_can_be_unpacked_on_any_system(site: Path) -> None:
    names = [PurePosixPath(file.relative_to(site)) for file in site.rglob("*")]
    assert len({str(name).lower() for name in names}) == len(names), "two names that differ only in case"
    assert [name for name in names if re.search(r'[<>:"\\|?*]|[. ]$', str(name))] == []
    assert max(len(str(name)) for name in names) < 160


def test_nothing_is_loaded_from_elsewhere(pages: dict[str, Page]) -> None:
    loads = {(name, link) for name, page in pages.items() for link in page.loads if not inside(link)}
    assert {(name, link) for name, link in loads if not link.startswith("data:")} == set()


# What a reader looks for


@pytest.fixture(params=chapters(), ids=lambda chapter: chapter.stem)
def chapter(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_a_chapter_opens_in_colab_and_is_edited_and_kept_as_a_notebook(
    chapter: Path, site: Path, pages: dict[str, Page]
) -> None:
    page = pages[f"chapters/{chapter.stem}.html"]
    assert page.links.count(colab(chapter)) == 2  # the launch button, and the badge
    assert f"{url()}/edit/{settings()['repository']['branch']}/chapters/{chapter.name}" in page.links
    assert f"../_sources/chapters/{chapter.name}" in page.links
    assert (site / f"_sources/chapters/{chapter.name}").read_bytes() == chapter.read_bytes()


def test_a_chapter_has_its_contents_copy_buttons_and_folded_solutions(chapter: Path, pages: dict[str, Page]) -> None:
    page = pages[f"chapters/{chapter.stem}.html"]
    assert "page-toc" in page.classes
    assert any("copybutton.js" in link for link in page.loads)
    assert "tag_hide-cell" in page.classes


def test_the_install_cell_is_not_on_the_page(chapter: Path, site: Path) -> None:
    assert "find_spec" not in (site / f"chapters/{chapter.stem}.html").read_text("utf-8")


def test_one_leads_through_the_book_page_by_page(pages: dict[str, Page], site: Path) -> None:
    toc = (ROOT / "_toc.yml").read_text("utf-8")
    order = re.findall(r"(?:root|file): (\S+)", toc)
    for before, after in itertools.pairwise(order):
        text = (site / f"{before}.html").read_text("utf-8")
        (following,) = re.findall(r'<a class="right-next"\s+href="([^"]+)"', text)
        (previous,) = re.findall(r'<a class="left-prev"\s+href="([^"]+)"', (site / f"{after}.html").read_text("utf-8"))
        assert (following, previous) == (f"{Path(after).name}.html", f"{Path(before).name}.html")


def test_every_page_says_what_its_numbers_were_made_with(site: Path) -> None:
    for name in re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text("utf-8")):
        assert "The benchmark's numbers: PyTorch" in (site / f"{name}.html").read_text("utf-8"), name
