"""The stored arrays are what their page says, the shifts do what they promise, and no feature looks ahead."""

import hashlib
import itertools
import math
import subprocess
import sys
import time
from importlib.resources import files

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from effens_book import data
from effens_book.data import Prices, markets

FOLDER = files("effens_book.data")
SPLITS = {"train": 1000, "val": 1000, "test": 2000}


@pytest.mark.parametrize(("split", "size"), SPLITS.items())
def test_digits_shapes_ranges_and_balance(split: str, size: int) -> None:
    x, y = getattr(data.digits(), f"x_{split}"), getattr(data.digits(), f"y_{split}")
    assert x.shape == (size, 1, 14, 14)
    assert x.dtype == torch.float32
    assert y.shape == (size,)
    assert y.dtype == torch.int64
    assert x.min() == 0
    assert 0.95 < x.max() <= 1
    assert y.bincount(minlength=10).tolist() == [size // 10] * 10


def test_digits_are_shuffled_so_that_the_first_few_show_every_class() -> None:
    assert data.digits().y_train[:100].bincount(minlength=10).min() > 0


def test_no_image_is_in_two_splits_or_twice_in_one() -> None:
    digits = data.digits()
    images = torch.cat([digits.x_train, digits.x_val, digits.x_test, data.letters()]).flatten(1)
    assert len(np.unique(images.numpy(), axis=0)) == len(images)


def test_stored_rows_say_which_images_were_taken() -> None:
    with np.load(str(FOLDER / "digits.npz"), allow_pickle=False) as stored:
        rows = np.concatenate([stored[f"row_{split}"] for split in SPLITS])
    assert len(np.unique(rows)) == 4000
    assert rows.max() < 5000


def test_diamonds() -> None:
    task = data.diamonds()
    sizes = {"train": 2000, "val": 1000, "test": 2000, "heavy": 1000}
    rows = []
    for split, size in sizes.items():
        x, y = getattr(task, f"x_{split}"), getattr(task, f"y_{split}")
        assert (x.shape, y.shape) == ((size, 9), (size,))
        assert x.dtype == y.dtype == torch.float32
        assert x.isfinite().all()
        rows += [(*row, price) for row, price in zip(x.tolist(), y.tolist(), strict=True)]
    assert len(set(rows)) == sum(sizes.values())  # no stone is in two splits, or twice in one
    torch.testing.assert_close(task.x_train.mean(0), torch.zeros(9), rtol=0, atol=1e-4)
    torch.testing.assert_close(task.x_train.std(0), torch.ones(9), rtol=0, atol=1e-3)
    assert task.x_heavy[:, 0].min() > task.x_train[:, 0].max()  # carats
    assert torch.corrcoef(torch.stack([task.x_train[:, 0], task.y_train]))[0, 1] > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_the_exact_predictive_is_that_of_scikit_learn(seed: int) -> None:
    task = data.gap_regression(seed)
    noise = task.noise(task.x_train).double().square().numpy()
    process = GaussianProcessRegressor(RBF(0.5, "fixed"), alpha=noise, optimizer=None)
    process.fit(task.x_train.double(), task.y_train.double())
    mean, std = process.predict(task.x_grid.double(), return_std=True)
    found = task.predictive(task.x_grid)
    torch.testing.assert_close(found.loc, torch.from_numpy(mean), rtol=1e-6, atol=1e-6)
    total = (torch.from_numpy(std).square() + task.noise(task.x_grid).double().square()).sqrt()
    torch.testing.assert_close(found.scale, total, rtol=1e-4, atol=1e-6)


def test_letters() -> None:
    x = data.letters()
    assert x.shape == (828, 1, 14, 14)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert 0.95 < x.max() <= 1
    with np.load(str(FOLDER / "letters.npz"), allow_pickle=False) as stored:
        assert not set(stored["letter"]) & set("DOQoIJijlZzYySsGbTBagq0123456789")


def test_letters_are_as_bright_large_and_centered_as_digits() -> None:
    digits, letters = data.digits().x_val, data.letters()
    assert abs(digits.mean() - letters.mean()) < 0.03
    assert abs(digits.mean((1, 2, 3)).std() - letters.mean((1, 2, 3)).std()) < 0.02
    for axis in (2, 3):
        centers = [
            (images.sum((0, 1, 5 - axis)) * torch.arange(14)).sum() / images.sum() for images in (digits, letters)
        ]
        assert abs(centers[0] - centers[1]) < 0.1
        extents = [(images > 0.1).any(5 - axis).sum(-1).float().mean() for images in (digits, letters)]
        assert abs(extents[0] - extents[1]) < 1.5


def test_changing_what_was_loaded_changes_nothing_for_the_next_caller() -> None:
    before = data.digits().x_train.clone(), data.digits().y_train.clone(), data.letters()
    data.digits().x_train.zero_()
    data.digits().y_train.zero_()
    data.letters().zero_()
    assert torch.equal(data.digits().x_train, before[0])
    assert torch.equal(data.digits().y_train, before[1])
    assert torch.equal(data.letters(), before[2])


def test_loading_is_quick() -> None:
    data._arrays.cache_clear()
    start = time.process_time()
    data.digits()
    data.letters()
    data.prices()
    data.stock_prices()
    assert time.process_time() - start < 0.2


def test_importing_reads_no_array_and_draws_no_number() -> None:
    code = (
        "import torch; before = torch.get_rng_state(); import effens_book.data as data;"
        "assert data._arrays.cache_info().currsize == 0 and torch.equal(before, torch.get_rng_state())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("shape", [(3, 1, 14, 14), (2, 3, 9, 13), (0, 1, 14, 14)])
def test_rotation_by_nothing_or_a_full_turn_is_the_identity(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for degrees in (0, 360, -720):
        torch.testing.assert_close(data.rotate(x, degrees), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_rotation_by_right_angles_is_counterclockwise_like_rot90(turns: int) -> None:
    x = data.digits().x_train[:20]
    torch.testing.assert_close(data.rotate(x, 90 * turns), torch.rot90(x, turns, (2, 3)), atol=1e-4, rtol=0)


def test_rotation_keeps_distances_in_images_that_are_not_square() -> None:
    x = torch.zeros(1, 1, 9, 13, dtype=torch.float64)
    x[0, 0, 4, 9] = 1  # three pixels right of the center, and so, a quarter turn later, three pixels above
    turned = data.rotate(x, 90)
    assert turned.dtype == torch.float64
    assert turned[0, 0, 1, 6].item() == pytest.approx(1)
    assert turned.sum().item() == pytest.approx(1)


def test_rotation_fills_corners_with_zeros_and_invents_no_brightness() -> None:
    turned = data.rotate(torch.ones(1, 1, 14, 14), 45)
    assert turned[0, 0, 0, 0] == 0
    assert turned[0, 0, 7, 7] == pytest.approx(1)
    assert turned.max() <= 1 + 1e-5


@pytest.mark.parametrize("x", [torch.zeros(1, 14, 14), torch.zeros(1, 1, 14, 14, dtype=torch.uint8)])
def test_rotation_refuses_what_is_not_a_batch_of_images(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"x must be floating point \(batch, channels, height, width\), got torch"):
        data.rotate(x, 30)


def test_noise_is_reproducible_and_leaves_the_global_generator_alone() -> None:
    x, state = data.digits().x_val[:50], torch.get_rng_state()
    assert torch.equal(data.add_noise(x, 0.4), data.add_noise(x, 0.4))
    assert not torch.equal(data.add_noise(x, 0.4), data.add_noise(x, 0.4, seed=1))
    data.gap_regression(), data.letters()
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_has_the_standard_deviation_asked_for_and_is_clipped() -> None:
    x = torch.full((100_000,), 0.5, dtype=torch.float64)
    assert (data.add_noise(x, 0.05) - x).std().item() == pytest.approx(0.05, rel=0.02)
    noisy = data.add_noise(x, 1.0)
    assert noisy.dtype == x.dtype
    assert noisy.min() == 0
    assert noisy.max() == 1
    assert torch.equal(data.add_noise(x, 0.0), x)


def test_noise_refuses_a_negative_scale_and_integers() -> None:
    with pytest.raises(ValueError, match=r"sigma must be >= 0, got -0\.1"):
        data.add_noise(torch.zeros(3), -0.1)
    with pytest.raises(ValueError, match=r"x must be floating point, got torch\.uint8"):
        data.add_noise(torch.zeros(3, dtype=torch.uint8), 0.1)


def test_a_blurred_point_is_a_gaussian() -> None:
    x = torch.zeros(1, 1, 15, 15)
    x[0, 0, 7, 7] = 1
    blurred = data.blur(x, 1.0)[0, 0]
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    ratio = math.exp(-0.5)
    assert blurred[7, 8] / blurred[7, 7] == pytest.approx(ratio, rel=1e-4)
    assert blurred[8, 8] / blurred[7, 7] == pytest.approx(ratio**2, rel=1e-4)


def test_a_moved_image_is_as_far_away_as_it_says() -> None:
    x = torch.zeros(200, 1, 15, 15)
    x[:, 0, 7, 7] = 1
    moved = data.move(x, 2.5, seed=3)
    assert torch.equal(moved, data.move(x, 2.5, seed=3))
    places = torch.arange(15.0) - 7
    down, right = ((moved[:, 0].sum(axis) * places).sum(1) for axis in (2, 1))
    torch.testing.assert_close(down.square() + right.square(), torch.full((200,), 6.25), rtol=0.01, atol=0.01)
    assert down.min() < -2
    assert down.max() > 2


def test_fashion_is_balanced_and_no_image_is_in_two_splits() -> None:
    task = data.fashion()
    sizes = {"train": 1000, "val": 500, "test": 1000}
    for split, size in sizes.items():
        assert getattr(task, f"y_{split}").bincount().tolist() == [size] * 10
    images = torch.cat([task.x_train, task.x_val, task.x_test]).flatten(1)
    copies = len(images) - len(images.unique(dim=0))
    assert copies <= 10  # some of the 70,000 images are equal


def test_flights_are_standardized_and_split_by_time() -> None:
    task, late = data.airtime(), data.airtime("delay")
    for split, size in {"train": 40_000, "same": 5_000, "val": 5_000, "test": 12_000}.items():
        x, y = getattr(task, f"x_{split}"), getattr(task, f"y_{split}")
        assert x.shape == (size, len(task.names))
        assert y.shape == (size,)
        assert bool(x.isfinite().all())
        assert torch.equal(x, getattr(late, f"x_{split}"))
    assert task.y_train.mean().abs() < 1e-4
    assert task.y_train.std() == pytest.approx(1, abs=1e-4)
    assert not torch.equal(task.y_train, late.y_train)
    groups = [name.partition(" ")[0] for name in task.names]
    origins = task.x_test[:, [group == "origin" for group in groups]]
    assert bool((origins.sum(1) == 1).all())
    stored = np.load(str(FOLDER / "airtime.npz"))
    months = {split: set((stored[f"day_{split}"] // 100).tolist()) for split in ("train", "same", "val", "test")}
    assert months == {"train": set(range(1, 8)), "same": set(range(1, 8)), "val": {8}, "test": {9, 10, 11, 12}}
    assert not set(stored["day_train"].tolist()) & set(stored["day_same"].tolist())
    with pytest.raises(ValueError, match="target must be 'airtime' or 'delay', got 'price'"):
        data.airtime("price")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_shifts_are_the_same_on_a_gpu() -> None:
    x = data.digits().x_val[:50]
    torch.testing.assert_close(data.rotate(x.cuda(), 30).cpu(), data.rotate(x, 30), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.add_noise(x.cuda(), 0.4).cpu(), data.add_noise(x, 0.4), atol=1e-6, rtol=0)
    task = data.gap_regression()
    on_gpu = task.function(task.x_grid.cuda()).cpu()
    torch.testing.assert_close(on_gpu, task.function(task.x_grid), atol=1e-4, rtol=0)


def test_gap_regression_shapes() -> None:
    task = data.gap_regression(n=101)
    for name, size in {"train": 101, "val": 50, "test": 500, "gap": 500}.items():
        x, y = getattr(task, f"x_{name}"), getattr(task, f"y_{name}")
        assert x.shape == (size, 1)
        assert y.shape == (size,)
        assert x.dtype == y.dtype == torch.float32
    assert task.x_grid.min() < task.x_train.min()
    assert task.x_grid.max() > task.x_train.max()
    assert task.function(task.x_grid).shape == task.noise(task.x_grid).shape == task.in_gap(task.x_grid).shape == (301,)


@pytest.mark.parametrize("seed", range(5))
def test_no_data_in_the_gap_but_the_test_set_meant_for_it(seed: int) -> None:
    task = data.gap_regression(seed)
    assert not any(task.in_gap(x).any() for x in (task.x_train, task.x_val, task.x_test))
    assert task.in_gap(task.x_gap).all()
    assert (task.x_train < 0).sum() == (task.x_train > 0).sum() == 80


def test_gap_regression_differs_by_seed_and_repeats_for_one() -> None:
    first, again, other = data.gap_regression(0), data.gap_regression(0), data.gap_regression(1)
    for name in ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test", "x_gap", "y_gap"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    grid = first.x_grid
    assert (first.function(grid) - other.function(grid)).abs().max() > 0.5


def test_targets_are_gaussian_around_the_truth() -> None:
    tasks = [data.gap_regression(seed) for seed in range(10)]
    for split in ("train", "test", "gap"):
        residuals = []
        for task in tasks:
            x, y = getattr(task, f"x_{split}"), getattr(task, f"y_{split}")
            residuals.append((y - task.function(x)) / task.noise(x))
        standard = torch.cat(residuals)
        error = len(standard) ** -0.5
        assert abs(standard.mean()) < 4 * error
        assert abs(standard.std() - 1) < 4 * error / 2**0.5
        assert (standard.abs() < 1.645).float().mean().item() == pytest.approx(0.9, abs=4 * 0.3 * error)


def test_functions_are_drawn_from_the_gaussian_process_named() -> None:
    functions = [data.gap_regression(seed, n=4).function for seed in range(40)]
    distance = torch.linspace(0, 2, 9)[:, None]
    features = (distance * torch.cat([function.frequencies for function in functions])).cos().mean(1)
    torch.testing.assert_close(features, (-(distance[:, 0] ** 2) / (2 * 0.5**2)).exp(), atol=0.03, rtol=0)
    first, x = functions[0], torch.tensor([[-1.0], [0.3], [2.0]])
    waves = [
        (frequency * x[:, 0] + phase).cos() for frequency, phase in zip(first.frequencies, first.phases, strict=True)
    ]
    torch.testing.assert_close(first(x), (2 / 256) ** 0.5 * torch.stack(waves).sum(0), atol=1e-4, rtol=0)


def test_gap_regression_refuses_too_few_points() -> None:
    with pytest.raises(ValueError, match="n must be >= 4, got 3"):
        data.gap_regression(n=3)


def test_prices_are_complete_and_in_order() -> None:
    index, ranged, stocks = data.prices(), data.prices(ranges=True), data.stock_prices()
    assert index.close.shape == (8313,)
    assert ranged.close.shape == (5031,)
    assert stocks.close.shape == (8313, 20)
    assert len(set(stocks.names)) == 20
    for prices in (index, ranged, stocks):
        assert len(prices.dates) == len(prices.close)
        assert (np.diff(prices.dates) > np.timedelta64(0, "D")).all()
        assert np.is_busday(prices.dates).all()
        assert prices.close.dtype == torch.float64
        assert prices.close.isfinite().all()
        assert prices.close.min() > 0
    assert [str(day) for day in (index.dates[0], index.dates[-1])] == ["1990-01-02", "2022-12-28"]
    assert [str(day) for day in (ranged.dates[0], ranged.dates[-1])] == ["1999-01-04", "2018-12-31"]
    assert np.array_equal(index.dates, stocks.dates)


def test_markets_were_closed_for_nearly_a_week_only_in_september_2001() -> None:
    dates = data.prices().dates
    longest = np.diff(dates).argmax()
    assert [str(day) for day in dates[longest : longest + 2]] == ["2001-09-10", "2001-09-17"]


def test_high_and_low_hold_the_close_of_the_same_days() -> None:
    index, ranged = data.prices(), data.prices(ranges=True)
    assert ranged.high is not None
    assert ranged.low is not None
    assert (ranged.low <= ranged.close).all()
    assert (ranged.close <= ranged.high).all()
    assert (ranged.low < ranged.high).all()
    same = np.isin(index.dates, ranged.dates)
    assert torch.equal(index.close[torch.from_numpy(same)], ranged.close)


KNOWN = {  # percent, not log percent, as the newspapers had it the day after
    "1997-10-27": -6.87,
    "2008-09-29": -8.81,
    "2008-10-13": 11.58,
    "2008-10-15": -9.03,
    "2011-08-08": -6.66,
    "2018-02-05": -4.10,
    "2020-03-16": -11.98,
}


@pytest.mark.parametrize(("day", "change"), KNOWN.items())
def test_days_that_are_remembered(day: str, change: float) -> None:
    prices = data.prices()
    row = int(np.flatnonzero(prices.dates == np.datetime64(day))[0])
    assert 100 * (prices.close[row] / prices.close[row - 1] - 1).item() == pytest.approx(change, abs=0.005)


def test_prices_are_exact_to_the_tick_and_their_own() -> None:
    close, stocks = data.prices().close, data.stock_prices().close
    assert (close[0].item(), close[-1].item()) == (359.69, 3783.22)
    assert (stocks[0, 0].item(), stocks[-1, 0].item()) == (0.264, 125.674)
    for ticks in (close * 100, stocks * 1000):
        assert (ticks - ticks.round()).abs().max() < 1e-6
    data.prices().close.zero_()
    data.prices(ranges=True).close.zero_()
    data.stock_prices().close.zero_()
    assert torch.equal(data.prices().close, close)
    assert torch.equal(data.stock_prices().close, stocks)


def walk(n: int = 300, assets: int = 0, ranges: bool = False, seed: int = 0) -> Prices:
    """Prices of a random walk on the first n days that the index has."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, assets) if assets else (n,)
    steps = 0.01 * torch.randn(shape, generator=generator, dtype=torch.float64)
    close = 100 * steps.cumsum(0).exp()
    spread = 1 + 0.01 * torch.rand(shape, generator=generator, dtype=torch.float64)
    high, low = (close * spread, close / spread) if ranges else (None, None)
    return Prices(data.prices().dates[:n], close, high, low, names=("a",) * max(assets, 1))


def change_after(prices: Prices, row: int) -> Prices:
    """The same days up to a row, another history with wider days after it."""
    other = torch.ones_like(prices.close)
    other[row + 1 :] = torch.linspace(0.3, 3, len(other) - row - 1).double().view(-1, *[1] * (other.dim() - 1))
    high = None if prices.high is None else prices.high * other.clamp_min(1) * other.ne(1).double().add(1)
    low = None if prices.low is None else prices.low * other.clamp_max(1)
    return Prices(prices.dates, prices.close * other, high, low, prices.names)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("assets", [0, 3])
def test_features_are_what_they_are_called(ranges: bool, assets: int) -> None:
    prices = walk(100, assets, ranges)
    x = markets.features(prices)
    assert x.shape == ((34, 3, 8) if assets else (34, 8))
    assert x.shape[-1] == len(markets.FEATURES)
    day, returns = 80, 100 * prices.close.log().diff(dim=0)  # returns[i] is of day i + 1
    daily = returns.square()
    if prices.high is not None and prices.low is not None:
        daily = (100 * (prices.high / prices.low).log()).square()[1:] / (4 * math.log(2))
    expected = [daily[day - days : day].mean(0).sqrt().log() for days in (1, 5, 22, 66)]
    expected += [100 * (prices.close[day] / prices.close[day - days]).log() for days in (1, 5, 22)]
    expected += [returns[day - 5 : day].clamp(max=0).sum(0)]
    torch.testing.assert_close(x[day - 66], torch.stack(expected, -1).float())


@pytest.mark.parametrize("ranges", [False, True])
def test_targets_lie_just_after_the_features(ranges: bool) -> None:
    prices = walk(100, 2, ranges)
    one, five = markets.task(prices), markets.task(prices, "volatility")
    assert one.x.shape == (33, 2, 8)
    assert five.x.shape == (29, 2, 8)
    x = markets.features(prices)
    for task, horizon in ((one, 1), (five, 5)):
        assert torch.equal(task.x, x[: len(task.x)])
        assert np.array_equal(task.dates, prices.dates[66 : 100 - horizon])
        assert np.array_equal(task.until, prices.dates[66 + horizon :])
    torch.testing.assert_close(one.y, x[1:, :, 4])  # the next day's own one-day return
    torch.testing.assert_close(five.y, x[5:, :, 1])  # the volatility that is known five days later


@pytest.mark.parametrize("target", ["return", "volatility"])
@pytest.mark.parametrize(("ranges", "assets"), [(False, 0), (True, 0), (False, 2)])
def test_no_feature_looks_ahead(target: str, ranges: bool, assets: int) -> None:
    prices = walk(300, assets, ranges)
    before = markets.task(prices, target)
    for row in (66, 150, 290):
        after = markets.task(change_after(prices, row), target)
        today, known = before.dates <= prices.dates[row], before.until <= prices.dates[row]
        assert torch.equal(before.x[torch.from_numpy(today)], after.x[torch.from_numpy(today)])
        assert torch.equal(before.y[torch.from_numpy(known)], after.y[torch.from_numpy(known)])
        moved = (before.y != after.y).flatten(1).any(1) if assets else before.y != after.y
        assert moved[torch.from_numpy(~known)].all()  # and the change is one that targets would feel
        assert np.array_equal(before.dates, after.dates)


@pytest.mark.parametrize(("target", "horizon"), [("return", 1), ("volatility", 5)])
@pytest.mark.parametrize("validation", [0, 30])
def test_walking_forward_purges_the_horizon_at_each_boundary(target: str, horizon: int, validation: int) -> None:
    task = markets.task(walk(400), target)
    starts = [str(task.dates[row]) for row in (150, 200, 270)]
    splits = markets.walk_forward(task, starts, validation=validation)
    assert torch.cat([split.test for split in splits]).tolist() == list(range(150, len(task.x)))
    for split, start in zip(splits, (150, 200, 270), strict=True):
        assert split.test[0] == start
        parts = [split.train, split.val, split.test] if validation else [split.train, split.test]
        assert len(split.val) == validation
        for earlier, later in itertools.pairwise(parts):
            assert task.until[earlier].max() < task.dates[later].min()
            assert later[0] - earlier[-1] == horizon + 1  # and no row more than the horizon is lost
        assert split.train.tolist() == list(range(int(split.train[-1]) + 1))


def test_walking_forward_and_standardizing_do_not_move_with_the_future() -> None:
    prices = walk(400)
    task, row = markets.task(prices), 250
    starts = [str(prices.dates[row - 20]), str(prices.dates[row + 20])]
    later = markets.task(change_after(prices, row))
    first, again = (markets.walk_forward(part, starts, validation=20)[0] for part in (task, later))
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    seen = torch.cat([first.train, first.val])
    assert torch.equal(markets.standardize(task.x, first.train)[seen], markets.standardize(later.x, first.train)[seen])
    ragged = markets.task(Prices(prices.dates[:330], prices.close[:330]))  # nor with how much future there is
    assert torch.equal(markets.walk_forward(ragged, starts[:1], end=starts[1], validation=20)[0].test, first.test)
    assert torch.equal(ragged.x, task.x[: len(ragged.x)])


def test_an_end_stops_the_last_test_part_and_days_need_not_be_trading_days() -> None:
    task = markets.task(data.prices())
    calm, crisis = markets.walk_forward(task, ["2005-01-01", "2007-07-01"], end="2009-07-01", validation=500)
    assert (len(calm.test), len(crisis.test)) == (627, 504)
    assert str(task.dates[crisis.test[-1]]) == "2009-06-30"
    assert len(crisis.train) - len(calm.train) == len(calm.test)


def test_standardizing_by_training_rows() -> None:
    x = markets.features(walk(200, assets=2))
    rows = torch.arange(50)
    seen = markets.standardize(x, rows)[rows].flatten(0, 1)
    torch.testing.assert_close(seen.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(8))


def test_a_day_without_change_has_a_floor_for_its_logarithm() -> None:
    flat = Prices(data.prices().dates[:80], torch.full((80,), 5.0).double())
    assert (markets.features(flat)[:, :4] == math.log(0.05)).all()


def test_tasks_refuse_what_they_cannot_do() -> None:
    task = markets.task(walk(200))
    with pytest.raises(ValueError, match="prices must hold more than 66 days, got 66"):
        markets.features(walk(66))
    with pytest.raises(ValueError, match="a target 5 days after the features, got 71 days"):
        markets.task(walk(71), "volatility")
    with pytest.raises(ValueError, match="target must be 'return' or 'volatility', got 'price'"):
        markets.task(walk(80), "price")
    with pytest.raises(ValueError, match="starts and end must be in order, got 2001-01-01, 2000-01-01, 20"):
        markets.walk_forward(markets.task(data.prices()), ["2001-01-01", "2000-01-01"])
    with pytest.raises(ValueError, match="starts and end must be in order, got 1990-10-13"):
        markets.walk_forward(task, [])
    with pytest.raises(ValueError, match="every part must hold rows, got 0 to train, 0 of 0 to validate, 133 to test"):
        markets.walk_forward(task, ["1990-01-01"])
    with pytest.raises(ValueError, match=r"got 0 to train, 49 of 90 to validate, 83 to test from 1990-06-18"):
        markets.walk_forward(task, ["1990-06-18"], validation=90)
    with pytest.raises(ValueError, match="validation must be >= 0, got -1"):
        markets.walk_forward(task, [str(task.dates[-1])], validation=-1)
    with pytest.raises(ValueError, match="columns must vary over the rows, got a deviation of 0"):
        markets.standardize(torch.ones(5, 2), torch.arange(3))


def test_definitions_are_balanced_and_no_text_is_in_two_sets() -> None:
    found = data.definitions()
    sizes = {"train": 1200, "val": 480, "test": 960, "branches": 480, "typos": 600}
    sizes |= {"adjectives": 300, "animals": 300, "austen": 300}
    assert {name: len(ids) for name, ids in found.ids.items()} == sizes
    assert {name: len(texts) for name, texts in found.texts.items()} == sizes
    assert len(found.kinds) == 8
    for name in ("train", "val", "test", "branches"):
        assert found.y[name].bincount().tolist() == [sizes[name] // 8] * 8
    texts = [text for name, each in found.texts.items() if name != "typos" for text in each]
    assert len(set(texts)) == len(texts)
    changed = [a != b for a, b in zip(found.texts["typos"], found.texts["test"], strict=False)]
    assert 0.6 < sum(changed) / 600 < 0.9
    assert found.y["typos"].tolist() == found.y["test"][:600].tolist()
    assert not set(found.y) & {"adjectives", "animals", "austen"}


def test_the_license_page_names_every_array_with_its_checksum() -> None:
    page = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    stored = [file for file in FOLDER.iterdir() if file.name.endswith(".npz")]
    assert {file.name for file in stored} == {
        f"{name}.npz"
        for name in ("airtime", "definitions", "diamonds", "digits", "fashion", "letters", "prices", "stocks")
    }
    for file in stored:
        assert f"## {file.name}" in page
        assert hashlib.sha256(file.read_bytes()).hexdigest() in page
        with np.load(str(file), allow_pickle=False) as arrays:
            assert all(f"`{name}`" in page for name in arrays)


def test_the_folder_is_small() -> None:
    sizes = {file.name: len(file.read_bytes()) for file in FOLDER.iterdir() if file.is_file()}
    assert sizes["fashion.npz"] + sizes["airtime.npz"] < 5_000_000
    assert sum(sizes.values()) < 5_500_000
