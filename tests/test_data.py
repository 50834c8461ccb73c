"""The stored arrays are what their page says, and the shifts do what they promise."""

import hashlib
import subprocess
import sys
import time
from importlib.resources import files

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF

from effens import data

FOLDER = files("effens.data")
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
    assert time.process_time() - start < 0.2


def test_importing_reads_no_array_and_draws_no_number() -> None:
    code = (
        "import torch; before = torch.get_rng_state(); import effens.data as data;"
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


def test_the_license_page_names_every_array_with_its_checksum() -> None:
    page = (FOLDER / "LICENSES.md").read_text(encoding="utf-8")
    stored = [file for file in FOLDER.iterdir() if file.name.endswith(".npz")]
    assert {file.name for file in stored} == {"diamonds.npz", "digits.npz", "letters.npz"}
    for file in stored:
        assert f"## {file.name}" in page
        assert hashlib.sha256(file.read_bytes()).hexdigest() in page
        with np.load(str(file), allow_pickle=False) as arrays:
            assert all(f"`{name}`" in page for name in arrays)


def test_the_folder_is_small() -> None:
    assert sum(len(file.read_bytes()) for file in FOLDER.iterdir() if file.is_file()) < 1_500_000
