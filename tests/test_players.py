"""The HTML of players, bets and their like, read by a parser."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.display import HTML
from matplotlib.axes import Axes
from PIL import Image

from effens_book import choose, figures, players

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


@pytest.mark.slow
def test_same_bytes_in_another_process(made: HTML) -> None:
    code = """
import sys, numpy as np
import effens
from effens_book import choose, figures, players
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


def test_every_methods_color_survives_as_a_small_dot_beside_large_areas() -> None:
    def dots(ax: Axes, value: int) -> None:
        rng = np.random.default_rng(value)
        ax.imshow(rng.uniform(size=(20, 20)), extent=(0, 1, 0, 0.5), aspect="auto")  # hundreds of colors
        for i, color in enumerate(figures.COLORS.values()):
            ax.plot([i / 14, i / 14], [0.6, 0.9], color=color, alpha=0.5)
            ax.plot(i / 14, 0.9, "o", color=color, markersize=5)
        ax.set(xlim=(0, 1), ylim=(0, 1))

    page = Page(players.player(dots, [1, 2], alt="x"))
    for url, *_ in page.frames():
        seen = np.unique(np.asarray(image(url).convert("RGB")).reshape(-1, 3), axis=0).astype(int)
        for name, color in figures.COLORS.items():
            drawn = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            assert np.abs(seen - drawn).max(1).min() <= 2, name


@pytest.mark.parametrize("colors", [1, 257])
def test_more_colors_than_a_palette_holds_are_refused(colors: int) -> None:
    with pytest.raises(ValueError, match=rf"colors must be in 2 \.\.\. 256, got {colors}"):
        players.player(draw, [1, 2], alt="x", colors=colors)


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
    before = plt.get_fignums()
    players.player(draw, [1, 2], alt="x")
    assert plt.get_fignums() == before


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


# ---- Figures that are uncovered. ----


def uncovered(stops: list[float] | None = None, **options: Any) -> HTML:
    stops = [0.25, 0.5, 1.0] if stops is None else stops
    given = {"words": [f"until {stop}" for stop in stops], "alt": "A line that rises", "label": "time"} | options
    return players.reveal(lambda ax: draw(ax, 2), stops, **given)


def test_one_picture_is_uncovered_up_to_each_stop() -> None:
    page = uncovered()
    frames = Page(page).frames()
    assert [alt for _, alt, _ in frames] == [f"A line that rises: until {stop}" for stop in (0.25, 0.5, 1.0)]
    covered = [float(share) for share, _, _ in frames]
    assert (covered[0] - covered[1]) / 0.25 == pytest.approx(
        (covered[1] - covered[2]) / 0.5, abs=0.05
    )  # as on the axis
    assert 0 <= covered[2] < covered[1] < covered[0] < 100
    assert page.data.count("data:image/png") == 2  # the whole, and its axes
    assert "clipPath" in page.data
    assert "clip-path: none !important" in page.data  # on paper all of it


def test_what_is_still_covered_shows_its_axes_and_legend_but_no_data() -> None:
    def drawn(axes: Any) -> None:
        for ax in axes:
            ax.plot(X, 0.9 * X**2, color="red", label="risk")
            ax.fill_between(X, X, color="red")
            ax.text(0.8, 0.1, "crash", color="red")
            ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="time")
            ax.legend(loc="upper left", labelcolor="green")

    shown = players.reveal(drawn, [0.1, 1.0], words=["a", "b"], alt="A crash", axes=(2, 1))
    (behind,) = re.findall(r"url\((data:.*?)\)", shown.data)
    empty, whole = (
        np.asarray(image(url).convert("RGB")).astype(int) for url in (behind, Page(shown).all("img")[0][0]["src"])
    )
    assert empty.shape == whole.shape

    def much(picture: Any, channel: int) -> int:
        return int((picture[..., channel] > np.delete(picture, channel, -1).max(-1) + 60).sum())

    assert much(whole, 0) > 10_000
    assert much(empty, 0) < 400  # the legends' own lines
    assert much(empty, 1) > 50  # and words
    dark = (whole < 60).all(-1)  # spines, ticks and labels
    assert ((empty < 60).all(-1) & dark).sum() >= 0.98 * dark.sum()


def test_stops_lie_where_the_axis_has_them() -> None:
    frames = Page(uncovered([0.0, 1.0])).frames()
    (left, right) = (1 - float(share) / 100 for share, _, _ in frames)
    pixels = np.asarray(image(Page(uncovered()).all("img")[0][0]["src"]).convert("L"))
    columns = np.flatnonzero((pixels < 100).mean(0) > 0.5)  # the y-axis, a dark line from top to bottom
    assert left * pixels.shape[1] == pytest.approx(columns[0], abs=2)
    assert 0.9 < right <= 1


def test_stops_may_be_dates() -> None:
    days = np.arange("2008-01-01", "2008-01-05", dtype="datetime64[D]")
    page = players.reveal(
        lambda ax: ax.plot(days, range(4)), list(days), words=[str(day) for day in days], alt="Four days"
    )
    assert len(Page(page).frames()) == 4


def test_an_uncovered_figure_is_no_player_and_controls_are_labeled() -> None:
    page = uncovered()
    assert "effens-player" not in page.data  # a player's script would show its frames as pictures
    (slider,) = [attrs for attrs, _ in Page(page).all("input")]
    assert (slider["type"], slider["max"], slider["aria-valuetext"]) == ("range", "2", "until 0.25")


def test_one_stop_words_that_do_not_fit_and_no_alt_are_refused() -> None:
    with pytest.raises(ValueError, match="stops must be at least 2, with words for each, got 1 and 1 words"):
        uncovered([0.5])
    with pytest.raises(ValueError, match="stops must be at least 2, with words for each, got 3 and 1 words"):
        uncovered(words=["all"])
    with pytest.raises(ValueError, match="alt must say what the picture shows, got ' '"):
        uncovered(alt=" ")
    with pytest.raises(ValueError, match="a player must take at most 1 KB"):
        uncovered(max_kb=1)


REPLIES = {"one": "It is narrow.", "five": "They disagree."}


def test_bet_asks_answers_each_choice_and_opens_without_script() -> None:
    page = Page(players.bet("Which is wider?", REPLIES, answer="five"))
    assert page.all("p")[0][1] == "Which is wider?"
    assert [text for _, text in page.all("button")] == ["one", "five"]
    assert {attrs["type"] for attrs, _ in page.all("button")} == {"button"}
    assert json.loads(page.all("script")[0][1]) == {"right": 1, "said": ["No. It is narrow.", "Right. They disagree."]}
    assert page.all("strong")[0][1] == "five."
    assert "open" not in page.all("details")[0][0]
    assert not any("id" in attrs for _, attrs, _ in page.elements)


def test_bet_escapes_everything() -> None:
    page = Page(players.bet(NASTY, {NASTY: NASTY, "b": "c"}, answer=NASTY))
    assert page.all("p")[0][1] == page.all("button")[0][1] == NASTY
    assert len(page.all("script")) == 2  # the replies, and what shows them


@pytest.mark.parametrize("replies", [{}, {"five": "yes"}, {"one": "no", "two": "no"}])
def test_bet_needs_two_choices_and_its_answer_among_them(replies: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="at least two and hold the answer 'five'"):
        players.bet("Which?", replies, answer="five")


def test_planner_without_script_says_so() -> None:
    page = players.planner(trainings=12, seconds=3600, start=1800).data
    assert "<noscript><p>A script computes this table.</p></noscript>" in page
    assert re.findall(r"<th scope='row'>(\d+)</th>", page)[::9] == ["1", "1000"]
    assert page.count("<label>") == page.count("<input") == 4
    assert page.count("hidden='hidden'") == 1 + 10  # the price of nothing


def power(members: int = 2, height: float = 0.5) -> None:
    plt.plot([0, 1], [0, members * height])
    plt.ylim(0, 10)
    plt.show()


def test_stills_are_a_player_of_what_a_function_draws() -> None:
    plt.figure()  # a caller's own stays open
    before = plt.get_fignums()
    page = Page(players.stills(power, alt="A line", members=range(1, 4)))
    frames = page.frames()
    assert [words for _, _, words in frames] == ["members 1", "members 2", "members 3"]
    assert [alt for _, alt, _ in frames] == ["A line: members 1", "A line: members 2", "A line: members 3"]
    assert len({url for url, *_ in frames}) == 3
    assert image(frames[0][0]).size == tuple(round(120 * inches) for inches in mpl.rcParams["figure.figsize"])
    assert plt.get_fignums() == before


def test_stills_spell_names_and_are_the_same_each_time() -> None:
    first, second = (players.stills(power, alt="A line", height=[0.5, 1]) for _ in "12")
    assert first.data == second.data
    assert Page(players.stills(lambda fast_lr: plt.plot([fast_lr]), alt="A dot", fast_lr=[1])).all("output")[0][1] == (
        "fast lr 1"
    )


@pytest.mark.parametrize("argument", [{}, {"members": [1], "height": [1]}])
def test_stills_need_values_of_one_argument(argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stills must have values of one argument"):
        players.stills(power, alt="A line", **argument)


@pytest.mark.parametrize(("alt", "values"), [(" ", [1]), ("A line", [])])
def test_stills_need_values_and_an_alt_text(alt: str, values: list[int]) -> None:
    with pytest.raises(ValueError, match="stills must have values and an alt text"):
        players.stills(power, alt=alt, members=values)


def test_a_static_page_needs_no_widgets() -> None:
    loaded = "'ipywidgets' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    code = f"import sys, effens_book.players; assert {loaded}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tables_of_choices_hold_every_method_in_order_with_its_costs() -> None:
    page = players.chooser().data
    sections = dict(re.findall(r'<section data-task="(.*?)">(.*?)</section>', page, re.S))
    assert sections.keys() == choose.GOALS.keys() == players.TASK_WORDS.keys() == players.GOAL_WORDS.keys()
    facts = " ".join(rf"data-{name}=\"(.*?)\"" for name in ("costs", "scores", "places", "same"))
    for task, section in sections.items():
        goals = choose.GOALS[task]
        assert goals.keys() == players.GOAL_WORDS[task].keys()
        rows = re.findall(rf"<tr {facts}><th scope='row'>(.*?)</th>", section)
        choices = choose.choose(task)
        assert [name for *_, name in rows] == [choice.method for choice in choices]
        for (costs, scores, places, same, name), choice in zip(rows, choices, strict=True):
            assert json.loads(costs) == [round(choice.costs[key], 2) for key in choose.BUDGETS.values()]
            assert json.loads(scores)[0] == round(choice.score, 4)
            assert json.loads(places)[0] == choices.index(choice)
            for goal, found in zip(goals, json.loads(same), strict=True):
                expected = [i for i, other in enumerate(choices) if choose.alike(task, name, other.method, goal)]
                assert found == expected
