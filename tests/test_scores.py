"""Scores agree with their definitions, with scikit-learn and SciPy, and with each other."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, stats
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT

import effens
from effens.scores import crps_of_normals

F64 = torch.float64
CASES = [(1, 50, 2), (5, 200, 10), (64, 30, 3), (3, 1, 4), (2, 20, 1)]  # members, n, classes


def draw(members: int, n: int, classes: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Probabilities of members that agree in part, in float64, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=F64) + torch.randn(
        members, n, classes, generator=generator, dtype=F64
    )
    return (spread * logits).softmax(2), torch.randint(classes, (n,), generator=generator)


def with_zeros_and_ones() -> tuple[Tensor, Tensor]:
    """Three members, sure of themselves: right, wrong, and of two minds."""
    first = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    second = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0], [0.5, 0.5, 0]])
    return torch.stack([first, second, first]), torch.tensor([0, 1, 0, 2])


def everything() -> list[tuple[Tensor, Tensor]]:
    cases = [draw(*case, seed=seed) for case in CASES for seed in range(3)]
    probs, y = draw(4, 40, 5)
    return [*cases, with_zeros_and_ones(), (probs.half(), y), (probs.bfloat16(), y), (probs[:1].expand(7, -1, -1), y)]


@pytest.mark.parametrize("case", CASES[:4])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_the_mean_agree_with_scikit_learn(case: tuple[int, int, int], seed: int) -> None:
    probs, y = draw(*case, seed=seed)
    mean, labels = probs.mean(0).numpy(), list(range(case[2]))
    assert effens.nll(probs, y).item() == pytest.approx(log_loss(y, mean, labels=labels), rel=1e-12)
    assert effens.brier(probs, y).item() == pytest.approx(
        brier_score_loss(y, mean, labels=labels, scale_by_half=False), rel=1e-12
    )
    assert effens.accuracy(probs, y).item() == pytest.approx(accuracy_score(y, mean.argmax(1)), abs=1e-15)


def test_closed_forms() -> None:
    for classes in (1, 2, 10):
        uniform, y = torch.full((3, 7, classes), 1 / classes, dtype=F64), torch.arange(7) % classes
        assert effens.nll(uniform, y).item() == pytest.approx(math.log(classes), abs=1e-14)
        assert effens.brier(uniform, y).item() == pytest.approx(1 - 1 / classes, abs=1e-14)
        assert effens.total_entropy(uniform) == pytest.approx([math.log(classes)] * 7, abs=1e-14)
        assert effens.mutual_information(uniform) == pytest.approx([0.0] * 7, abs=1e-14)
    probs = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert effens.nll(probs, torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert effens.mutual_information(probs).item() == pytest.approx(math.log(2))
    assert effens.expected_entropy(probs).item() == 0
    assert effens.disagreement(probs).item() == 1


def test_one_confident_mistake_is_finite() -> None:
    probs, y = torch.tensor([[[1.0, 0.0]]]), torch.tensor([1])
    assert effens.nll(probs, y).item() == pytest.approx(-math.log(1e-38))
    assert effens.brier(probs, y).item() == 2
    assert effens.accuracy(probs, y).item() == 0
    assert effens.ece(probs, y).item() == 1
    assert effens.nll(probs, 1 - y).item() == effens.brier(probs, 1 - y).item() == effens.ece(probs, 1 - y).item() == 0


def test_one_class_is_no_question() -> None:
    probs, y = torch.ones(3, 4, 1), torch.zeros(4, dtype=torch.long)
    for score in (effens.nll, effens.member_nll, effens.diversity_gain, effens.brier, effens.ece):
        assert score(probs, y).item() == 0
    assert effens.accuracy(probs, y).item() == 1
    assert effens.temperature(probs, y) == 1


@pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()])
def test_nll_of_numbers_is_that_of_the_mixture(likelihood: effens.Likelihood) -> None:
    prediction = likelihood.predict(torch.randn(4, 20, int(likelihood.outputs or 0), dtype=F64))
    assert isinstance(prediction, torch.distributions.Distribution)
    y = torch.randn(20, dtype=F64)
    nll, member_nll, gain = (f(prediction, y) for f in (effens.nll, effens.member_nll, effens.diversity_gain))
    assert nll.item() == pytest.approx(-effens.mixture(prediction).log_prob(y).mean().item())
    assert member_nll.item() == pytest.approx(-prediction.log_prob(y).mean().item())
    assert gain.item() == pytest.approx((member_nll - nll).item())
    there = y.clone()
    there[3:] = math.nan  # missing
    assert effens.nll(prediction, there).item() == pytest.approx(
        -effens.mixture(prediction).log_prob(y)[:3].mean().item()
    )


def test_nll_is_the_members_less_the_gain_and_the_gain_is_never_negative() -> None:
    for probs, y in everything():
        exact = probs.double()
        nll, member_nll, gain = (f(exact, y) for f in (effens.nll, effens.member_nll, effens.diversity_gain))
        assert gain >= 0
        assert nll.item() == pytest.approx((member_nll - gain).item(), abs=1e-12)
        assert member_nll.item() == pytest.approx(np.mean([effens.nll(member[None], y) for member in exact]), abs=1e-12)


def test_the_gain_of_one_member_and_of_identical_members_is_nothing() -> None:
    for probs, y in everything():
        assert effens.diversity_gain(probs[:1], y).item() == 0
        for members in (2, 3, 7, 64):
            assert effens.diversity_gain(probs[:1].expand(members, -1, -1), y).item() <= 1e-13


def test_total_uncertainty_is_expected_plus_mutual() -> None:
    for probs, _ in everything():
        exact = probs.double()
        total, expected, mutual = (
            f(exact) for f in (effens.total_entropy, effens.expected_entropy, effens.mutual_information)
        )
        assert torch.allclose(total, expected + mutual, rtol=0, atol=1e-14)
        assert (mutual >= 0).all()
        assert (mutual <= math.log(len(probs)) + 1e-2).all()  # a sum may be off by a rounding of half precision
        reference = stats.entropy(exact.mean(0).numpy(), axis=1)
        if probs.dtype == F64:
            assert torch.allclose(total, torch.from_numpy(np.asarray(reference)), rtol=0, atol=1e-13)


def test_disagreement_is_the_share_of_pairs_that_choose_differently() -> None:
    for probs, _ in everything():
        votes = probs.argmax(2).T.tolist()
        pairs = [list(itertools.combinations(example, 2)) for example in votes]
        expected = [np.mean([a != b for a, b in each]) if each else 0.0 for each in pairs]
        assert effens.disagreement(probs).double().numpy() == pytest.approx(np.array(expected), abs=1e-7)


def test_scores_keep_precision_and_are_never_below_float32() -> None:
    probs, y = draw(3, 20, 4)
    for given, returned in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        for score in (effens.nll, effens.brier, effens.ece, effens.accuracy, effens.diversity_gain):
            assert score(probs.to(given), y).dtype == returned
        for score_of in (effens.total_entropy, effens.mutual_information, effens.disagreement, unit_temper):
            assert score_of(probs.to(given)).dtype == returned
    assert effens.nll(probs, y).dtype == F64
    assert effens.nll(probs.half(), y).item() == pytest.approx(effens.nll(probs, y).item(), rel=2e-3)
    assert effens.nll(probs, y.int()).item() == effens.nll(probs, y).item()


def unit_temper(probs: Tensor) -> Tensor:
    return effens.temper(probs, 1.0)


def test_small_probabilities_are_not_lost_in_float32() -> None:
    small = torch.tensor([[[1.0, 1e-30]]])
    assert effens.nll(small, torch.tensor([1])).item() == pytest.approx(-math.log(1e-30), rel=1e-6)


# Calibration


def calibration_by_width(probs: Tensor, y: Tensor, bins: int) -> float:
    """Expected calibration error as Guo et al. (2017) write it: bins (low, high]."""
    mean = probs.double().mean(0)
    confidence, label = (part.numpy() for part in mean.max(1))
    total = 0.0
    for b in range(bins):
        inside = (b / bins < confidence) & (confidence <= (b + 1) / bins)
        if inside.any():
            right = (label[inside] == y.numpy()[inside]).mean()
            total += inside.mean() * abs(right - confidence[inside].mean())
    return total


def calibration_by_mass(probs: Tensor, y: Tensor, bins: int) -> float:
    """The same over as many examples in each bin, for confidences without ties."""
    mean = probs.double().mean(0)
    confidence, label = (part.numpy() for part in mean.max(1))
    order = np.argsort(confidence)
    bin_of = np.arange(len(y)) * bins // len(y)
    total = 0.0
    for b in range(bins):
        inside = order[bin_of == b]
        if len(inside):
            right = (label[inside] == y.numpy()[inside]).mean()
            total += len(inside) / len(y) * abs(right - confidence[inside].mean())
    return total


@pytest.mark.parametrize("bins", [1, 2, 15, 1000])
def test_calibration_error_agrees_with_the_loop_over_bins(bins: int) -> None:
    for seed, case in enumerate(CASES[:4]):
        probs, y = draw(*case, seed=seed)
        assert effens.ece(probs, y, bins, equal="width").item() == pytest.approx(
            calibration_by_width(probs, y, bins), abs=1e-13
        )
        assert effens.ece(probs, y, bins).item() == pytest.approx(calibration_by_mass(probs, y, bins), abs=1e-13)


def test_calibration_error_agrees_with_torchmetrics() -> None:
    """Its 1.9.0 gave these: MulticlassCalibrationError(classes, n_bins=15, norm="l1") of the mean, in float32."""
    cases = [(CASES[0], 0, 0.4748868942), (CASES[1], 1, 0.3155044317), (CASES[2], 2, 0.2271796912)]
    for case, seed, expected in cases:
        probs, y = draw(*case, seed=seed)
        assert effens.ece(probs, y, equal="width").item() == pytest.approx(expected, abs=1e-6)


def test_calibration_error_does_not_depend_on_the_order_of_examples() -> None:
    constant = torch.tensor([0.8, 0.2]).expand(1, 1000, 2)
    y = (torch.arange(1000) >= 800).long()  # 80% are right: perfectly calibrated, sorted or not
    assert effens.ece(constant, y).item() == pytest.approx(0, abs=1e-7)
    probs, y = draw(1, 300, 3)
    probs = ((10 * probs).round() / 10)[:, :, :2].clamp(0.1, 0.9)  # many ties
    probs, y = probs / probs.sum(2, keepdim=True), y.clamp_max(1)
    generator = torch.Generator().manual_seed(0)
    for equal in ("mass", "width"):
        scored = effens.ece(probs, y, equal=equal).item()
        for _ in range(5):
            order = torch.randperm(300, generator=generator)
            assert effens.ece(probs[:, order], y[order], equal=equal).item() == pytest.approx(scored, abs=1e-13)


@pytest.mark.parametrize(("n", "expected"), [(1000, 0.029), (10_000, 0.0094)])
def test_a_perfectly_calibrated_model_does_not_score_zero(n: int, expected: float) -> None:
    """Expected: each bin's gap is a half-normal, of mean sqrt(2 / pi) times its standard error."""
    generator = torch.Generator().manual_seed(0)
    found, theory, accuracy = [], [], []
    for _ in range(40):
        probs = (5.5 * torch.randn(n, 10, generator=generator)).softmax(1)[None]  # right 81% of the time
        y = probs[0].multinomial(1, generator=generator)[:, 0]
        found.append(effens.ece(probs, y).item())
        accuracy.append(effens.accuracy(probs, y).item())
        p = probs[0].amax(1).sort().values.tensor_split(15)
        theory.append(sum(math.sqrt(2 / math.pi * (part * (1 - part)).sum()) for part in p) / n)
    assert np.mean(accuracy) == pytest.approx(0.81, abs=0.01)
    assert np.mean(found) == pytest.approx(np.mean(theory), rel=0.06)
    assert np.mean(found) == pytest.approx(expected, rel=0.06)


# Temperature


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5, 7.0])
def test_a_known_temperature_is_found(true: float) -> None:
    """Labels drawn from softmax(z) and a model that answers softmax(true * z) ask for the temperature ``true``."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40_000, 5, generator=generator, dtype=F64)
    y = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    probs = (true * logits).softmax(1)[None]
    found = effens.temperature(probs, y)
    assert found == pytest.approx(true, rel=0.03)
    tempered = effens.temper(probs, found)
    assert effens.temperature(tempered, y) == pytest.approx(1, abs=1e-9)
    nearby = [effens.nll(effens.temper(probs, found * factor), y) for factor in (0.99, 1.01)]
    assert effens.nll(tempered, y) < min(nearby)


def test_tempering_never_raises_the_loss_on_the_data_it_was_fitted_to() -> None:
    for probs, y in everything():
        found = effens.temperature(probs, y)
        assert 0.01 - 1e-9 <= found <= 100 + 1e-9
        mean = effens.temper(probs.double(), 1.0)
        assert effens.nll(effens.temper(probs.double(), found), y) <= effens.nll(mean, y) + 1e-12


def test_temperature_one_gives_the_mean() -> None:
    for probs, _ in everything():
        tempered, mean = effens.temper(probs.double(), 1.0), probs.double().mean(0, keepdim=True)
        assert tempered.shape == (1, *probs.shape[1:])
        assert torch.allclose(tempered, mean / mean.sum(2, keepdim=True), rtol=1e-13, atol=1e-37)


def test_tempering_sharpens_below_one_and_flattens_above() -> None:
    probs, _ = draw(3, 50, 4)
    entropies = [effens.total_entropy(effens.temper(probs, t)) for t in (0.1, 0.5, 1.0, 2.0, 10.0)]
    assert all((low <= high + 1e-12).all() for low, high in itertools.pairwise(entropies))
    assert torch.allclose(effens.temper(probs, 1e6), torch.full((1, 50, 4), 0.25, dtype=F64), atol=1e-4)
    assert torch.equal(effens.temper(probs, 2.0).argmax(2), probs.mean(0, keepdim=True).argmax(2))


def test_where_no_temperature_is_better_it_is_one() -> None:
    for classes in (1, 2, 3, 7, 10):
        probs = torch.ones(2, 5, classes).div(classes)
        assert effens.temperature(probs, torch.arange(5) % classes) == 1


def test_all_right_is_sharpened_and_all_wrong_is_flattened_to_the_limits() -> None:
    probs = torch.tensor([0.7, 0.3]).expand(1, 6, 2)
    assert effens.temperature(probs, torch.zeros(6, dtype=torch.long)) == pytest.approx(0.01)
    assert effens.temperature(probs, torch.ones(6, dtype=torch.long)) == pytest.approx(100)


# AUROC


def test_auroc_agrees_with_scikit_learn_with_and_without_ties() -> None:
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        inside = torch.randn(40 + seed, generator=generator, dtype=F64)
        outside = torch.randn(30, generator=generator, dtype=F64) + 0.5
        if seed % 2:
            inside, outside = inside.round(), outside.round()  # many ties
        labels = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
        expected = roc_auc_score(labels, torch.cat([inside, outside]))
        assert effens.auroc(inside, outside).item() == pytest.approx(expected, abs=1e-14)
        assert effens.auroc(outside, inside).item() == pytest.approx(1 - expected, abs=1e-14)


def test_auroc_of_equal_scores_and_of_constants() -> None:
    same = torch.tensor([0.3, 0.1, 0.2])
    assert effens.auroc(same, same).item() == 0.5
    assert effens.auroc(torch.ones(4), torch.ones(9)).item() == 0.5
    assert effens.auroc(torch.zeros(4), torch.ones(9)).item() == 1
    assert effens.auroc(torch.ones(4), torch.zeros(9)).item() == 0
    assert effens.auroc(torch.tensor([0, 1]), torch.tensor([1, 2])).item() == pytest.approx(7 / 8)
    assert effens.auroc(torch.tensor([-math.inf]), torch.tensor([math.inf])).item() == 1
    every_other = torch.arange(10.0)[::2]
    assert effens.auroc(every_other, every_other).item() == 0.5


# CRPS


def column(*values: float) -> Tensor:
    """Members of one example."""
    return torch.tensor(values, dtype=F64)[:, None]


def crps_by_quad(cdf: Callable[[float], float], sf: Callable[[float], float], y: float, cuts: list[float]) -> float:
    """The definition, integrated piece by piece."""
    edges = sorted({y, *cuts})
    pieces = [(lambda z: cdf(z) ** 2) if high <= y else (lambda z: sf(z) ** 2) for high in edges[1:]]
    inner = sum(
        integrate.quad(piece, low, high, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
        for piece, low, high in zip(pieces, edges[:-1], edges[1:], strict=True)
    )
    outer = (
        integrate.quad(lambda z: cdf(z) ** 2, -np.inf, edges[0], limit=200)[0]
        + integrate.quad(lambda z: sf(z) ** 2, edges[-1], np.inf, limit=200)[0]
    )
    return float(inner + outer)


def around(locations: list[float], scales: list[float]) -> list[float]:
    multiples = (-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100)
    return [location + k * scale for location, scale in zip(locations, scales, strict=True) for k in multiples]


@pytest.mark.parametrize("mean", [0.0, -3.0])
@pytest.mark.parametrize("std", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("y", [0.0, 0.4, -20.0])
def test_crps_of_one_normal_is_the_textbook_formula(mean: float, std: float, y: float) -> None:
    z = (y - mean) / std
    expected = std * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    found = effens.crps(Normal(column(mean), column(std)), torch.tensor([y], dtype=F64))
    assert found.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("means", "stds", "y"),
    [
        ([0.0, 1.0], [1.0, 1.0], 0.3),
        ([-2.0, 0.0, 5.0], [0.1, 1.0, 3.0], 4.0),
        ([0.0, 100.0], [1.0, 1.0], 100.0),
        ([1.0] * 5, [2.0] * 5, -50.0),
    ],
)
def test_crps_of_normals_is_the_integral(means: list[float], stds: list[float], y: float) -> None:
    expected = crps_by_quad(
        lambda z: float(np.mean(stats.norm.cdf(z, means, stds))),
        lambda z: float(np.mean(stats.norm.sf(z, means, stds))),
        y,
        around(means, stds),
    )
    found = effens.crps(Normal(column(*means), column(*stds)), torch.tensor([y], dtype=F64))
    assert found.item() == pytest.approx(expected, rel=1e-8)


def fair(samples: NDArray[np.float64], y: float) -> float:
    """The unbiased estimate from samples: E|X - y| - E|X - X'| / 2 over distinct pairs, from the sorted samples."""
    n = len(samples)
    ranked = np.sort(samples)
    pairs = 2 * np.sum((2 * np.arange(n) - n + 1) * ranked) / (n * (n - 1))
    return float(np.abs(samples - y).mean() - pairs / 2)


def test_crps_agrees_with_large_samples() -> None:
    rng = np.random.default_rng(0)
    locations, scales, df, y = np.array([0.0, 2.0, 2.5]), np.array([1.0, 0.5, 2.0]), np.array([3.0, 5.0, 30.0]), 1.2
    members = rng.integers(3, size=400_000)
    target = torch.tensor([y], dtype=F64)
    normal = fair(locations[members] + scales[members] * rng.standard_normal(len(members)), y)
    found = effens.crps(Normal(column(*locations), column(*scales)), target).item()
    assert found == pytest.approx(normal, rel=0.005)
    student = fair(locations[members] + scales[members] * rng.standard_t(df[members]), y)
    found = effens.crps(StudentT(column(*df), column(*locations), column(*scales)), target).item()
    assert found == pytest.approx(student, rel=0.005)


@pytest.mark.parametrize(
    ("df", "locations", "scales", "y"),
    [
        ([2.05], [0.0], [1.0], 0.0),
        ([2.05], [0.0], [1.0], 0.7),
        ([2.05], [0.0], [1.0], 100.0),
        ([3.0], [5.0], [0.01], 4.9),
        ([5.0], [0.0], [1.0], -1000.0),
        ([30.0], [0.0], [1.0], 8.0),
        ([500.0], [0.0], [2.0], 1.0),
        ([2.05, 3.0, 30.0], [-100.0, 100.0, 3.0], [1.0, 1.0, 1.0], 0.0),
        ([3.0, 3.0], [0.0, 1000.0], [1.0, 1.0], 1.0),
        ([3.0, 3.0], [0.0, 1.0], [0.001, 1.0], 1.0),
        ([4.0, 4.0, 4.0], [0.0, 0.0, 0.0], [0.01, 1.0, 100.0], 0.5),
    ],
)
def test_crps_of_students_is_the_integral(
    df: list[float], locations: list[float], scales: list[float], y: float
) -> None:
    expected = crps_by_quad(
        lambda z: float(np.mean(stats.t.cdf(z, df, locations, scales))),
        lambda z: float(np.mean(stats.t.sf(z, df, locations, scales))),
        y,
        around(locations, scales),
    )
    members = StudentT(column(*df), column(*locations), column(*scales))
    found = effens.crps(members, torch.tensor([y], dtype=F64))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_students_with_many_degrees_of_freedom_are_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    location, log_scale = torch.randn(2, 4, 50, generator=generator, dtype=F64)
    y = 3 * torch.randn(50, generator=generator, dtype=F64)
    normal = effens.crps(Normal(location, log_scale.exp()), y)
    student = effens.crps(StudentT(torch.full_like(location, 1e8), location, log_scale.exp()), y)
    assert student.item() == pytest.approx(normal.item(), rel=1e-7)


@pytest.mark.parametrize("students", [False, True])
def test_crps_is_the_mean_over_examples_and_moves_and_scales_with_y(students: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    location, log_scale = torch.randn(2, 3, 1203, generator=generator, dtype=F64)  # more than one chunk
    y = torch.randn(1203, generator=generator, dtype=F64)
    df = torch.full_like(location, 3.0)

    def score(shift: float = 0.0, factor: float = 1.0, part: slice = slice(None)) -> float:
        place, scale = location[:, part] * factor + shift, log_scale[:, part].exp() * factor
        members = StudentT(df[:, part], place, scale) if students else Normal(place, scale)
        return effens.crps(members, y[part] * factor + shift).item()

    assert score(shift=7.0) == pytest.approx(score(), rel=1e-9)
    assert score(factor=0.01) == pytest.approx(0.01 * score(), rel=1e-9)
    ones = [score(part=slice(i, i + 1)) for i in range(20)]
    assert score(part=slice(0, 20)) == pytest.approx(np.mean(ones), rel=1e-12)
    halves = score(part=slice(0, 600)) * 600 + score(part=slice(600, 1203)) * 603
    assert score() == pytest.approx(halves / 1203, rel=1e-12)


def test_crps_of_what_a_network_with_gradients_answers() -> None:
    outputs = torch.randn(3, 8, 3, requires_grad=True)
    y = torch.randn(8)
    for likelihood in (effens.Gaussian(), effens.StudentT()):
        members = likelihood.predict(outputs[..., : likelihood.outputs])
        found = effens.crps(members, y)
        assert found.dtype == torch.float32
        assert found > 0


# Errors


GOOD = torch.full((2, 3, 4), 0.25)
LABELS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        (GOOD[0], r"probs must be \(members, n, classes\), none of them 0, got shape \(3, 4\)"),
        (GOOD[:0], r"none of them 0, got shape \(0, 3, 4\)"),
        (GOOD[:, :0], r"none of them 0, got shape \(2, 0, 4\)"),
        (2 * GOOD, r"probs must sum to 1 over classes, got a sum that is off by 1"),
        (GOOD * math.nan, r"probs must be >= 0, got nan"),
        (torch.tensor([[[1.5, -0.5]] * 3]), r"probs must be >= 0, got -0\.5"),
        (torch.tensor([[[math.inf, 0.0]] * 3]), r"probs must sum to 1 over classes, got a sum that is off by inf"),
        (torch.randn(2, 3, 4).sub(5), r"probs must be >= 0, got -"),
    ],
)
def test_what_is_no_probability_is_refused(probs: Tensor, message: str) -> None:
    labeled = (
        effens.nll,
        effens.member_nll,
        effens.diversity_gain,
        effens.brier,
        effens.accuracy,
        effens.ece,
        effens.temperature,
    )
    unlabeled = (
        effens.total_entropy,
        effens.expected_entropy,
        effens.mutual_information,
        effens.disagreement,
        unit_temper,
    )
    for score in labeled:
        with pytest.raises(ValueError, match=message):
            score(probs, LABELS)
    for score_of in unlabeled:
        with pytest.raises(ValueError, match=message):
            score_of(probs)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (LABELS.float(), r"y must be \(3,\) integers, got torch\.float32 of shape \(3,\)"),
        (LABELS[:2], r"y must be \(3,\) integers, got torch\.int64 of shape \(2,\)"),
        (LABELS[:, None], r"y must be \(3,\) integers, got torch\.int64 of shape \(3, 1\)"),
        (LABELS + 1, r"labels must be in 0 \.\.\. 3, got 1 \.\.\. 4"),
        (LABELS - 1, r"labels must be in 0 \.\.\. 3, got -1 \.\.\. 2"),
        (3 * LABELS - 1, r"labels must be in 0 \.\.\. 3, got -1 \.\.\. 8"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y: Tensor, message: str) -> None:
    for score in (effens.nll, effens.brier, effens.accuracy, effens.ece, effens.temperature):
        with pytest.raises(ValueError, match=message):
            score(GOOD, y)


def test_settings_that_mean_nothing_are_refused() -> None:
    for bins in (0, -3):
        with pytest.raises(ValueError, match=f"bins must be >= 1, got {bins}"):
            effens.ece(GOOD, LABELS, bins)
    with pytest.raises(ValueError, match="equal must be 'mass' or 'width', got 'size'"):
        effens.ece(GOOD, LABELS, equal="size")
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
            effens.temper(GOOD, temperature)


def test_scores_that_cannot_be_ranked_are_refused() -> None:
    good = torch.randn(5)
    for bad, message in (
        (torch.empty(0), r"must be \(n,\) numbers, n >= 1, got shape \(0,\)"),
        (torch.randn(5, 1), r"must be \(n,\) numbers, n >= 1, got shape \(5, 1\)"),
        (torch.tensor([1.0, math.nan]), r"must hold no NaN, got 1 among 2"),
    ):
        with pytest.raises(ValueError, match=f"^inside {message}"):
            effens.auroc(bad, good)
        with pytest.raises(ValueError, match=f"^outside {message}"):
            effens.auroc(good, bad)


def test_crps_of_many_members_is_the_closed_form_s() -> None:
    generator = torch.Generator().manual_seed(0)
    location, scale, y = (torch.randn(size, generator=generator).double() for size in ((200, 20), (200, 20), (20,)))
    for widths in (scale.abs() + 0.01, torch.full_like(scale, 1e-3), scale.abs() * torch.logspace(-3, 1, 200)[:, None]):
        expected = crps_of_normals(location, widths, y).mean()
        assert effens.crps(Normal(location, widths), y).sub(expected).abs() < 1e-5 * expected


def test_crps_refuses_other_shapes_other_distributions_and_nan() -> None:
    location, y = torch.zeros(2, 3), torch.zeros(3)
    members = Normal(location, 1.0)
    for wrong in (y[:2], y[:, None], y.expand(2, 3)):
        with pytest.raises(
            ValueError, match=r"y must be \(n,\) for a distribution of batch shape \(members, n\), .* got"
        ):
            effens.crps(members, wrong)
    with pytest.raises(ValueError, match=r"got \(3,\) for \(3,\)"):
        effens.crps(Normal(y, 1.0), y)
    with pytest.raises(ValueError, match=r"got \(0,\) for \(2, 0\)"):
        effens.crps(Normal(location[:, :0], 1.0), y[:0])
    for other in (Laplace(location, 1.0), effens.mixture(members)):
        with pytest.raises(TypeError, match=f"distribution must be Normal or StudentT, got {type(other).__name__}"):
            effens.crps(other, y)
    broken = torch.tensor([0.0, math.nan, math.inf])
    with pytest.raises(ValueError, match="the distribution and y must be finite, got 1 numbers that are not"):
        effens.crps(members, broken)  # NaN is missing
    message = "the distribution and y must be finite, got 2 numbers that are not"
    spoiled = torch.stack([y, broken])
    without_df = StudentT(3.0, location, 1.0)
    without_df.df = spoiled
    for each in (
        Normal(spoiled, 1.0, validate_args=False),
        StudentT(3.0, spoiled, 1.0, validate_args=False),
        without_df,
    ):
        with pytest.raises(ValueError, match=message):
            effens.crps(each, y)


def test_scores_do_not_change_what_they_are_given() -> None:
    probs, y = draw(3, 20, 4)
    kept = probs.clone(), y.clone()
    for score in (effens.nll, effens.brier, effens.ece, effens.temperature):
        score(probs, y)
    for score_of in (effens.total_entropy, effens.mutual_information, effens.disagreement, unit_temper):
        score_of(probs)
    assert torch.equal(probs, kept[0])
    assert torch.equal(y, kept[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scores_the_same() -> None:
    probs, y = draw(5, 200, 10)
    for score in (effens.nll, effens.brier, effens.ece, effens.accuracy):
        there = score(probs.cuda(), y.cuda())
        assert there.is_cuda
        assert there.item() == pytest.approx(score(probs, y).item(), abs=1e-12)
    assert effens.temperature(probs.cuda(), y.cuda()) == pytest.approx(effens.temperature(probs, y), rel=1e-9)
    members = StudentT(torch.full((3, 50), 3.0), torch.randn(3, 50), torch.rand(3, 50) + 0.1)
    moved = StudentT(members.df.cuda(), members.loc.cuda(), members.scale.cuda())
    target = torch.randn(50)
    assert effens.crps(moved, target.cuda()).item() == pytest.approx(effens.crps(members, target).item(), rel=1e-6)


def test_arrays_and_lists_are_refused_by_name() -> None:
    probs, y = torch.rand(2, 20, 3).softmax(-1), torch.randint(3, (20,))
    said = Normal(torch.zeros(2, 20), torch.ones(2, 20))
    for name, ask in {
        "y": lambda: effens.nll(probs, y.numpy()),  # type: ignore[arg-type]
        "probs": lambda: effens.mutual_information(probs.numpy()),  # type: ignore[arg-type]
        "inside": lambda: effens.auroc([0.1], torch.ones(1)),  # type: ignore[arg-type]
    }.items():
        with pytest.raises(TypeError, match=f"{name} must be a tensor, which torch.as_tensor makes of an array"):
            ask()
    with pytest.raises(TypeError, match="y must be a tensor"):
        effens.crps(said, torch.zeros(20).numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="predictions must be a tensor or a distribution, got ndarray"):
        effens.greedy_select(probs.numpy(), y, 2)  # type: ignore[arg-type]
