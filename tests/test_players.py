"""The HTML of players and bets, read by a parser; live controls with and without a kernel."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.display import HTML, Markdown
from matplotlib.axes import Axes
from PIL import Image

from effens import figures, players

X = np.linspace(0, 1, 50)
VOID = {"img", "input", "br"}
NASTY = "\"a\" & 'b' </script><script>alert(1)</script>"


class Page(HTMLParser):
    """All elements as (tag, attributes, text directly in them); fails on tags that do not match."""

    def __init__(self, page: HTML) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, Any], list[str]]] = []
        self._open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.feed(page.data)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self._open[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, Any], str]]:
        return [(attrs, "".join(text).strip()) for name, attrs, text in self.elements if name == tag]

    def frames(self) -> list[list[str]]:
        (frames,) = [text for attrs, text in self.all("script") if attrs.get("type") == "application/json"]
        return list(json.loads(frames))


def draw(ax: Axes, value: int) -> None:
    ax.plot(X, X**value)
    ax.set(xlim=(0, 1), ylim=(0, 1))


def image(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


@pytest.fixture(scope="module", autouse=True)
def _book_style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        figures.use_style()
        yield


@pytest.fixture(scope="module")
def made() -> HTML:
    return players.player(draw, range(1, 6), alt="A power of x")


def test_every_frame_has_picture_alt_and_words(made: HTML) -> None:
    frames = Page(made).frames()
    assert [alt for _, alt, _ in frames] == [f"A power of x: members {m}" for m in range(1, 6)]
    assert [said for *_, said in frames] == [f"members {m}" for m in range(1, 6)]
    assert len({url for url, *_ in frames}) == 5
    assert {image(url).size for url, *_ in frames} == {image(frames[0][0]).size}


def test_controls_are_real_labeled_and_hidden_until_a_script_runs(made: HTML) -> None:
    page = Page(made)
    ((slider, _),) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"], slider["value"]) == ("range", "0", "4", "0")
    assert slider["aria-valuetext"] == "members 1"
    assert page.all("label")[0][1] == "members"
    assert page.all("button") == [({"type": "button"}, "Play")]
    assert page.all("output")[0][0]["aria-live"] == "polite"
    assert page.all("output")[0][1] == "members 1"
    assert [attrs for attrs, _ in page.all("div") if attrs["class"] == "controls"] == [
        {"class": "controls", "hidden": "hidden"}
    ]


def test_first_frame_stands_in_the_page_with_its_size(made: HTML) -> None:
    page = Page(made)
    ((shown, _),) = page.all("img")
    assert [shown["src"], shown["alt"]] == page.frames()[0][:2]
    assert int(shown["width"]) / int(shown["height"]) == pytest.approx(
        image(shown["src"]).width / image(shown["src"]).height, rel=0.01
    )


def test_no_ids_and_nothing_from_outside(made: HTML) -> None:
    assert not any("id" in attrs for _, attrs, _ in Page(made).elements)
    for tag, attrs, text in Page(made).elements:
        assert "href" not in attrs, tag
        assert attrs.get("src", "data:image/png").startswith("data:image/png"), tag
        if attrs.get("type") != "application/json":
            assert not any(word in "".join(text) for word in ("http", "url(", "@import", "fetch")), tag


def test_same_input_gives_the_same_bytes_and_a_stable_repr(made: HTML) -> None:
    again = players.player(draw, range(1, 6), alt="A power of x")
    assert again.data == made.data
    assert repr(again) == repr(made)
    assert "0x" not in repr(made)


def test_same_bytes_in_another_process(made: HTML) -> None:
    code = """
import sys, numpy as np
from effens import figures, players
figures.use_style()
X = np.linspace(0, 1, 50)
def draw(ax, value):
    ax.plot(X, X**value)
    ax.set(xlim=(0, 1), ylim=(0, 1))
sys.stdout.write(players.player(draw, range(1, 6), alt="A power of x").data)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == made.data


def test_pictures_carry_no_software_or_date(made: HTML) -> None:
    for url, *_ in Page(made).frames():
        assert image(url).info.keys() <= {"transparency"}


def test_frames_share_one_palette_and_white_stays_white() -> None:
    page = Page(players.player(draw, [1, 2, 3], alt="x", colors=16))
    pictures = [image(url) for url, *_ in page.frames()]
    assert {picture.mode for picture in pictures} == {"P"}
    assert len({tuple(picture.getpalette() or []) for picture in pictures}) == 1
    assert all(picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255) for picture in pictures)
    assert all(picture.convert("RGB").getcolors(maxcolors=16) for picture in pictures)  # None above that


def test_axes_stand_still_when_tick_labels_grow() -> None:
    seen: list[Any] = []

    def wider(ax: Axes, value: int) -> None:
        ax.set(ylim=(0, value), ylabel="y")
        seen.append(ax)

    players.player(wider, [1, 100000], alt="x")
    assert np.array_equal(seen[0].get_position().extents, seen[1].get_position().extents)
    box = seen[1].get_tightbbox()
    assert min(box.x0, box.y0) >= 0  # and the wider labels are not cut


def test_rows_of_axes_reach_draw_as_an_array() -> None:
    shapes = []
    players.player(lambda axes, value: shapes.append(axes.shape), [1, 2], alt="x", axes=(2, 3))
    assert shapes == [(2, 3), (2, 3)]


def test_draws_leave_pyplot_alone() -> None:
    players.player(draw, [1, 2], alt="x")
    assert not plt.get_fignums()


def test_twelve_frames_fit_the_budget() -> None:
    def busy(ax: Axes, members: int) -> None:
        rng = np.random.default_rng(0)
        curves = np.sin(6 * X + rng.normal(size=(members, 1)))
        ax.plot(X, curves.T, linewidth=0.8)
        ax.fill_between(X, curves.mean(0) - 1, curves.mean(0) + 1, alpha=0.2)
        ax.plot(rng.uniform(size=40), rng.normal(size=40), "o", color="black")
        ax.set(xlim=(0, 1), ylim=(-3, 3), title="x")

    assert len(players.player(busy, range(1, 13), alt="x").data) <= 300_000


def test_over_budget_says_the_rule_and_the_size() -> None:
    with pytest.raises(ValueError, match=r"at most 5 KB, got \d+ KB for 2 frames"):
        players.player(draw, [1, 2], alt="x", max_kb=5)


def test_nothing_escapes_from_labels_words_or_alt() -> None:
    page = Page(players.player(draw, [1, 2], alt=NASTY, label=NASTY, words=lambda value: f"{value} {NASTY}"))
    assert len(page.all("script")) == 2
    assert page.all("label")[0][1] == NASTY
    assert page.all("output")[0][1] == f"1 {NASTY}"
    assert page.all("img")[0][0]["alt"] == f"{NASTY}: 1 {NASTY}"
    assert page.frames()[1][1:] == [f"{NASTY}: 2 {NASTY}", f"2 {NASTY}"]


def test_alt_and_words_may_depend_on_the_value() -> None:
    page = Page(players.player(draw, [1, 2], alt=lambda v: f"power {v}", words=lambda v: f"x^{v}"))
    assert [frame[1:] for frame in page.frames()] == [["power 1", "x^1"], ["power 2", "x^2"]]


def test_one_value_is_a_picture_without_controls() -> None:
    page = Page(players.player(draw, [2], alt="x", label="power"))
    assert len(page.all("img")) == 1
    assert page.all("output")[0][1] == "power 2"
    assert not page.all("input")
    assert not page.all("button")
    assert not page.all("script")


def test_values_may_be_an_array() -> None:
    assert len(Page(players.player(draw, np.array([1, 2]), alt="x")).frames()) == 2


@pytest.mark.parametrize("values", [[], range(0)])
def test_no_values_are_refused(values: list[int] | range) -> None:
    with pytest.raises(ValueError, match="values must hold at least one value"):
        players.player(draw, values, alt="x")


@pytest.mark.parametrize("alt", ["", " ", lambda value: ""])
def test_a_picture_without_alt_text_is_refused(alt: str | Callable[[int], str]) -> None:
    with pytest.raises(ValueError, match="alt must say what the picture shows"):
        players.player(draw, [1, 2], alt=alt)


BET = {"answer": "five", "because": "They disagree."}


def test_bet_is_plain_html() -> None:
    page = Page(players.bet("Which is wider?", ["one", "five"], **BET))
    assert page.all("legend")[0][1] == "Which is wider?"
    assert [attrs["type"] for attrs, _ in page.all("input")] == ["radio", "radio"]
    assert [text for _, text in page.all("label")] == ["one", "five"]
    assert page.all("strong")[0][1] == "five."
    assert "open" not in page.all("details")[0][0]
    assert not page.all("script")
    assert not any("id" in attrs for _, attrs, _ in page.elements)


def test_bet_escapes_everything() -> None:
    page = Page(players.bet(NASTY, [NASTY, "b"], answer=NASTY, because=NASTY))
    assert not page.all("script")
    assert page.all("legend")[0][1] == page.all("label")[0][1] == NASTY


@pytest.mark.parametrize("choices", [[], ["five"], ["one", "two"]])
def test_bet_needs_two_choices_and_its_answer_among_them(choices: list[str]) -> None:
    with pytest.raises(ValueError, match="at least two and hold the answer 'five'"):
        players.bet("Which?", choices, **BET)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFENS_STATIC", raising=False)


def test_live_calls_update_at_once_and_after_each_change(kernel: None) -> None:
    calls = []

    def update(members: int, rate: float) -> float:
        calls.append((members, rate))
        return members * rate

    box = players.live(update, members=(1, 9), rate=[0.1, 0.5])
    assert calls == [(5, 0.1)]
    assert box.result == 0.5
    members, rate = box.kwargs_widgets
    members.value = 2
    rate.value = 0.5
    assert calls[1:] == [(2, 0.1), (2, 0.5)]
    assert box.result == 1.0


def test_live_takes_widgets_and_waits_until_a_slider_rests(kernel: None) -> None:
    from ipywidgets import IntSlider

    box = players.live(lambda members, loud: members, members=IntSlider(3, min=1, max=5), loud=True)
    assert box.kwargs_widgets[0].continuous_update is False
    assert box.result == 3


def test_live_refuses_a_control_that_update_does_not_know(kernel: None) -> None:
    with pytest.raises((TypeError, ValueError), match="members"):
        players.live(lambda members: members, width=(1, 5))


@pytest.mark.parametrize(
    ("names", "said"),
    [(["width"], "width"), (["members", "width"], "members and width"), (["a", "b", "c"], "a, b and c")],
)
def test_live_is_one_sentence_on_a_static_page(monkeypatch: pytest.MonkeyPatch, names: list[str], said: str) -> None:
    monkeypatch.setenv("EFFENS_STATIC", "1")
    calls = []
    shown = players.live(lambda **values: calls.append(values), **dict.fromkeys(names, (1, 5)))
    assert isinstance(shown, Markdown)
    assert not calls
    assert shown.data == f"*Run this cell in Colab or Jupyter to change {said}.*"


def test_static_zero_means_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFENS_STATIC", "0")
    assert players.live(lambda members: members, members=(1, 5)).result == 3


def test_live_without_controls_is_refused() -> None:
    with pytest.raises(ValueError, match="controls must hold at least one control"):
        players.live(lambda: None)


def test_a_static_page_needs_no_widgets() -> None:
    code = (
        "import sys, effens.players; assert 'ipywidgets' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
