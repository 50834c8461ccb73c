"""What holds for all inputs: shapes, kinds of numbers, members and layouts drawn by hypothesis, hard ones among them.

A function must be right or refuse, never be silently wrong: results are compared with closed forms in float64 or with
the obvious loop. The draws are the same in every run.
"""

import inspect
import math
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import generator
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import Normal, StudentT

import effens
import effens_book.nets
from effens_book.choose import choose
from effens_book.finance import risk

settings.register_profile("fixed", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("fixed")

ELSEWHERE = {
    # Records that other functions return, and modules.
    *("Candidates", "Choice", "Costs", "History", "data", "nets"),
    # Abstract, or of the machine.
    *("Ensemble", "Likelihood", "device"),
    # Minutes, compilers or processes: shapes, kinds of numbers and layouts are in the tests of their files.
    *("search", "stratify", "export", "fit_each"),
    *("LoRAEnsemble", "add_lora"),  # against explicit networks, in test_lora.py
    *("cascade", "cascade_threshold"),  # against the obvious loop, in test_cascade.py
    *("Comparison", "Conformal", "LikelihoodRatio"),
}


def test_every_public_function_has_a_property_here() -> None:
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    public = {*(f"effens.{name}" for name in effens.__all__), *(f"risk.{name}" for name in risk.__all__)}
    assert [name for name in sorted(public) if name.split(".")[1] not in ELSEWHERE and f"{name}" not in text] == []


DEFAULTS: dict[Any, dict[str, Any]] = {
    effens.DeepEnsemble: {"members": 5},
    effens.BatchEnsemble: {
        **{"members": 5, "skip": (), "split": False, "init": "signs", "norms": "shared", "fast_lr": 0.5},
        "trunk": None,
    },
    effens.TabM: {"members": 16, "skip": (), "fast_lr": 1.0, "trunk": None},
    effens.LoRAEnsemble: {"members": 4, "rank": 8, "layers": None, "heads": ("head",), "trunk": None},
    effens.BatchEnsembleLinear: {"members": 4, "bias": True, "init": "signs"},
    effens.BatchEnsembleConv2d: {"members": 4, "bias": True, "init": "signs"},
    effens.SnapshotEnsemble: {
        **{"members": 5, "last": None, "schedule": "cosine"},
        **{"pretrain": 0.8, "lrs": (0.5, 0.1)},
    },
    effens.SWAG: {
        **{"members": 30, "rank": 20, "scale": 0.5},
        **{"tail": 0.5, "tail_lr": 0.5, "every": None, "seed": 0},
    },
    effens.MIMO: {"members": 3, "share": 0.5, "repeats": 1, "first": None, "last": None},
    effens.fit: {
        **{"epochs": 20, "batch_size": 128, "lr": 1e-3, "weight_decay": 0.0, "optimizer": torch.optim.AdamW},
        **{"likelihood": None, "clip": None, "callback": None, "device": None, "seed": 0, "progress": True},
        **{"precision": "float32", "checkpoint": None},
    },
    effens.predict: {"likelihood": None, "chunk": 1024},
    effens.ece: {"bins": 15, "equal": "mass"},
    risk.value_at_risk: {"level": 0.99},
    risk.expected_shortfall: {"level": 0.975},
    risk.fz0: {"level": 0.975},
    risk.kupiec: {"level": 0.99},
    risk.conditional_coverage: {"level": 0.99},
    risk.kupiec_power: {"level": 0.99, "rate": 0.02, "size": 0.05},
    risk.draw_hits: {"again": None, "draws": 10_000, "seed": 0},
    risk.simulated_p: {"level": 0.99, "draws": 9999, "seed": 0},
    risk.diebold_mariano: {"horizon": 1, "lags": None},
    risk.stationary_bootstrap: {"seed": 0},
    risk.model_confidence_set: {"block": None, "draws": 2000, "seed": 0},
    risk.adaptive_conformal: {"coverage": 0.9, "rate": 0.005, "window": None},
}


@pytest.mark.parametrize("call", DEFAULTS, ids=lambda call: call.__name__)
def test_what_is_not_said_means_what_the_book_says(call: Any) -> None:
    empty = inspect.Parameter.empty
    given = {name: p.default for name, p in inspect.signature(call).parameters.items() if p.default is not empty}
    assert {name: given.get(name, empty) for name in DEFAULTS[call]} == DEFAULTS[call]


def test_layers_describe_themselves() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 1), groups=2), nn.Flatten(), nn.Linear(8, 3, bias=False))  # noqa: E731
    for ensemble in (effens.DeepEnsemble(make, 5), effens.BatchEnsemble(make, 5)):
        text = str(ensemble)
        assert "Conv2d(2, 4, kernel_size=(3, 1), members=5, bias=True)" in text
        assert "Linear(8, 3, members=5, bias=False)" in text
    assert "index=[1, 0, 1]" in str(effens.HyperEnsemble([make(), make()], [1, 0, 1]))


# ---- What is drawn. ----

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "a part": lambda t: torch.cat([t, t])[: len(t)],
    "needs gradients": lambda t: t.clone().requires_grad_(t.is_floating_point()),
}
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(list(LAYOUTS.values()))
members = st.sampled_from([1, 2, 5, 64])


@st.composite
def predictions(draw: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities (members, n, classes) and labels (n,); some rows are exactly 0 and 1, or nearly."""
    shape = (draw(members), draw(st.integers(1, 9)), classes or draw(st.integers(1, 6)))
    source = generator(draw(seeds))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))  # 1e4: probabilities are 0 or 1
    probs = (scale * torch.randn(shape, generator=source, dtype=torch.float64)).softmax(2)
    probs = draw(layouts)(probs.to(draw(st.sampled_from(FLOATS))))
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8]))
    return probs, torch.randint(shape[2], shape[1:2], generator=source).to(kind)


@st.composite
def distributions(draw: Any, least: float = 1.0) -> Normal | StudentT:
    """Normals or Student's t (members, n), of scales that may be tiny or huge, expanded or not."""
    shape = (draw(st.sampled_from([1, 2, 5])), draw(st.integers(1, 4)))
    source, unit = generator(draw(seeds)), draw(st.sampled_from([1e-8, 1.0, 1e8]))
    spread = draw(st.sampled_from([0.1, 3.0]))
    location = unit * torch.randn(shape, generator=source, dtype=torch.float64)
    scale = unit * (spread * torch.randn(shape, generator=source, dtype=torch.float64)).exp()
    if draw(st.booleans()):
        location, scale = location[:1].expand(shape), scale[:1].expand(shape)
    if draw(st.booleans()):
        return Normal(draw(layouts)(location), scale)
    df = least + 0.5 + 10 ** (6 * torch.rand(shape, generator=source, dtype=torch.float64) - 1)
    return StudentT(df, location, scale)


def outcomes(distribution: Normal | StudentT, seed: int = 0) -> Tensor:
    n = distribution.batch_shape[1]
    noise = torch.randn(n, generator=generator(seed), dtype=torch.float64)
    return (distribution.loc + 2 * noise * distribution.scale)[0].detach()


def close(found: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-6) -> None:
    """Equal, finite, and not by NaN."""
    found, expected = (torch.as_tensor(value).detach().double() for value in (found, expected))
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


# ---- Scores of probabilities. ----

SCORES = (effens.nll, effens.member_nll, effens.diversity_gain, effens.brier, effens.accuracy, effens.ece)
PARTS = (effens.total_entropy, effens.expected_entropy, effens.mutual_information, effens.disagreement)


def loop(name: str, probs: list[list[list[float]]], labels: list[int]) -> float:
    """A score by its definition, in 50 digits."""
    with mpmath.workdps(50):
        m, n = len(probs), len(labels)
        mean = [[mpmath.fsum(p[i][c] for p in probs) / m for c in range(len(probs[0][0]))] for i in range(n)]
        log = lambda p: mpmath.log(max(p, mpmath.mpf("1e-38")))  # noqa: E731
        match name:
            case "nll":
                floor = [mpmath.fsum(max(p[i][y], 1e-38) for p in probs) / m for i, y in enumerate(labels)]
                total = [-log(p) for p in floor]
            case "member_nll":
                total = [mpmath.fsum(-log(p[i][y]) for p in probs) / m for i, y in enumerate(labels)]
            case "brier":
                total = [mpmath.fsum((p - (c == y)) ** 2 for c, p in enumerate(mean[i])) for i, y in enumerate(labels)]
            case "total_entropy":
                total = [-mpmath.fsum(p * mpmath.log(p) for p in row if p > 0) for row in mean]
            case _:
                total = [-mpmath.fsum(x * mpmath.log(x) for p in probs for x in p[i] if x > 0) / m for i in range(n)]
        return float(mpmath.fsum(total) / n)


@given(predictions())
def test_scores_are_their_definitions_to_the_last_digits_also_at_0_and_1(drawn: tuple[Tensor, Tensor]) -> None:
    probs, y = drawn
    exact = probs.detach().double().tolist()
    for score in (effens.nll, effens.member_nll, effens.brier):
        close(score(probs, y), loop(score.__name__, exact, y.tolist()))
    for part in (effens.total_entropy, effens.expected_entropy):
        close(part(probs).double().mean(), loop(part.__name__, exact, y.tolist()))


@given(predictions())
def test_decompositions_are_exact_and_scores_stay_in_their_ranges(drawn: tuple[Tensor, Tensor]) -> None:
    probs, y = drawn
    classes, m = probs.shape[2], probs.shape[0]
    gain = effens.diversity_gain(probs, y)
    close(effens.member_nll(probs, y) - gain, effens.nll(probs, y), atol=1e-5)
    information = effens.mutual_information(probs)
    close(effens.total_entropy(probs) - effens.expected_entropy(probs), information, atol=1e-5)
    assert gain >= 0
    assert bool((information >= 0).all())
    assert bool((information <= math.log(m) + 1e-5).all())
    assert bool((effens.total_entropy(probs) <= math.log(classes) + 0.03).all())  # half precision: sums are not 1
    assert -1e-6 <= effens.brier(probs, y) <= 2.05
    for score in (effens.accuracy, effens.ece):
        assert -1e-6 <= score(probs, y) <= 1.02
    shares = effens.disagreement(probs)
    assert bool(((shares >= 0) & (shares <= 1)).all())
    votes = probs.argmax(2)
    pairs = [(votes[a] != votes[b]).double() for a in range(m) for b in range(a)]
    close(shares, torch.stack(pairs).mean(0) if pairs else 0 * shares.double())


@given(predictions(), layouts, seeds)
def test_scores_see_values_and_nothing_else(drawn: tuple[Tensor, Tensor], layout: Any, seed: int) -> None:
    """Not the layout, the kind of labels, the order of members, of examples, or of classes."""
    probs, y = drawn
    m, n, c = (torch.randperm(size, generator=generator(seed)) for size in probs.shape)
    names = torch.empty_like(c).scatter_(0, c, torch.arange(len(c)))
    moved, moved_y = layout(probs.detach()[m][:, n][:, :, c]), names[y.long()][n]
    for score in (effens.nll, effens.member_nll, effens.brier):
        close(score(moved, moved_y), score(probs, y))
    kept = layout(probs.detach()[m][:, n])
    for score in SCORES:
        close(score(kept, y[n].long()), score(probs, y))
    for part in PARTS[:3]:
        close(part(moved), part(probs)[n], atol=1e-5)
    close(effens.disagreement(kept), effens.disagreement(probs)[n])


@given(predictions(), st.integers(1, 40), st.sampled_from(["mass", "width"]))
def test_ece_is_the_loop_over_bins(drawn: tuple[Tensor, Tensor], bins: int, equal: str) -> None:
    probs, y = drawn
    mean = probs.detach().double().mean(0)
    confidence, label = mean.max(1)
    right = (label == y).double().tolist()
    held: dict[int, list[int]] = {}
    for i, p in enumerate(confidence.tolist()):
        below = sum(other < p for other in confidence.tolist())
        b = below * bins // len(y) if equal == "mass" else min(max(math.ceil(p * bins) - 1, 0), bins - 1)
        held.setdefault(b, []).append(i)
    gaps = [abs(sum(right[i] - confidence[i].item() for i in rows)) for rows in held.values()]
    close(effens.ece(probs, y, bins, equal=equal), sum(gaps) / len(y))


@given(predictions(), st.sampled_from([0.01, 0.3, 1.0, 4.0, 100.0, 1e300, math.inf]))
def test_tempering_is_a_power(drawn: tuple[Tensor, Tensor], heat: float) -> None:
    probs, y = drawn
    mean = np.maximum(probs.detach().double().mean(0).numpy(), 1e-38)
    logs = np.log(mean) / heat
    expected = np.exp(logs - logs.max(1, keepdims=True))
    close(effens.temper(probs, heat)[0], expected / expected.sum(1, keepdims=True), atol=1e-5)
    best = effens.temperature(probs, y)
    assert 0.0099 < best < 101
    lowest = effens.nll(effens.temper(probs.double(), best), y)
    for other in (0.02, 0.5, 1.0, 2.0, 50.0):
        assert lowest <= effens.nll(effens.temper(probs.double(), other), y) + 1e-9


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "NaN": lambda p: p.index_fill(1, torch.tensor([0]), math.nan),
    "infinity": lambda p: p.index_fill(1, torch.tensor([0]), math.inf),
    "negative": lambda p: torch.cat([p[..., :1] - 2, p[..., 1:]], 2),
    "logits": lambda p: p + 3,
    "no rows": lambda p: p[:, :0],
    "no members": lambda p: p[:0],
    "no classes": lambda p: p[..., :0],
    "a mean": lambda p: p[0],
}


@pytest.mark.parametrize("wrong", WRONG)
@given(predictions())
@settings(max_examples=3)
def test_what_is_no_probability_is_refused(wrong: str, drawn: tuple[Tensor, Tensor]) -> None:
    probs, y = drawn
    spoiled = WRONG[wrong](probs.detach())
    labels = y[: spoiled.shape[-2]]
    for score in (*SCORES, effens.temperature, lambda p, y: effens.greedy_select(p, y, 1)):
        with pytest.raises(ValueError, match="probs must"):
            score(spoiled, labels)
    for part in (*PARTS, lambda p: effens.temper(p, 2.0)):
        with pytest.raises(ValueError, match="probs must"):
            part(spoiled)


@given(predictions())
def test_labels_that_are_none_are_refused(drawn: tuple[Tensor, Tensor]) -> None:
    probs, y = drawn
    for wrong in (y.double(), y[:-1], y[:, None], y.long() + probs.shape[2], y.long() - probs.shape[2]):
        for score in (*SCORES, effens.temperature):
            with pytest.raises(ValueError, match="y must be|labels must be"):
                score(probs, wrong)


@given(predictions(classes=3), st.integers(1, 4))
def test_greedy_selection_is_the_obvious_loop(drawn: tuple[Tensor, Tensor], size: int) -> None:
    probs, y = drawn
    exact = probs.detach().double()
    index = effens.greedy_select(probs, y, size)
    assert 1 <= len(set(index)) <= min(size, len(probs))
    losses = [effens.nll(exact[index[: k + 1]].clamp_min(1e-38), y).item() for k in range(len(index))]
    for k, found in enumerate(losses):
        others = [effens.nll(exact[[*index[:k], i]].clamp_min(1e-38), y).item() for i in range(len(probs))]
        assert found <= min(others) + 1e-6
    assert all(late < early + 1e-6 for early, late in pairwise(losses))


@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 1e-30, 2.0, 1e30, math.inf]), min_size=1, max_size=8), seeds)
def test_auroc_counts_pairs_and_ties_half(inside: list[float], seed: int) -> None:
    outside = torch.tensor(inside)[torch.randint(len(inside), (5,), generator=generator(seed))].neg()
    pairs = [(b > a) + (b == a) / 2 for a in inside for b in outside.tolist()]
    close(effens.auroc(torch.tensor(inside), outside), sum(pairs) / len(pairs))
    close(effens.auroc(outside, torch.tensor(inside)), 1 - sum(pairs) / len(pairs))


# ---- Distributions: scores, mixtures, risk. ----


def as_scipy(distribution: Normal | StudentT) -> Any:
    parts = distribution.loc.detach().numpy(), distribution.scale.numpy()
    return stats.norm(*parts) if isinstance(distribution, Normal) else stats.t(distribution.df.numpy(), *parts)


@given(distributions())
@settings(max_examples=8)
def test_crps_is_the_integral_in_any_unit(distribution: Normal | StudentT) -> None:
    y = outcomes(distribution)
    found = effens.crps(distribution, y)
    one, unit = as_scipy(distribution), distribution.scale.max().item()
    total = 0.0
    for i, value in enumerate(y.tolist()):
        low, high = distribution.loc[:, i].min().item(), distribution.loc[:, i].max().item()
        ends = [end + side * k * unit for k in (30, 1e4) for end, side in ((low, -1), (high, 1))]
        cuts = sorted([value, low, high, *ends])
        for a, b in pairwise(cuts):
            square = lambda z: float((one.cdf(z)[:, i].mean() - (z >= value)) ** 2)  # noqa: B023, E731
            total += integrate.quad(square, a, b, limit=400)[0]
    close(found / unit, total / len(y) / unit, rtol=1e-3, atol=1e-3)


@given(distributions(), st.sampled_from([1e-6, 1.0, 1e6]), layouts)
def test_crps_moves_with_the_unit_and_not_with_the_layout(one: Normal | StudentT, unit: float, layout: Any) -> None:
    y = outcomes(one)
    kind: Any = type(one)
    df = [one.df] if isinstance(one, StudentT) else []
    scaled = kind(*df, layout(one.loc.detach() * unit), layout(one.scale * unit))
    close(effens.crps(scaled, layout(y * unit)) / one.scale.max() / unit, effens.crps(one, y) / one.scale.max())


@given(distributions())
def test_a_mixture_is_the_mean_of_its_members_densities(distribution: Normal | StudentT) -> None:
    y, mixed = outcomes(distribution), effens.mixture(distribution)
    log_probs = as_scipy(distribution).logpdf(y.numpy())
    close(mixed.log_prob(y), torch.logsumexp(torch.tensor(log_probs), 0) - math.log(len(log_probs)), atol=1e-5)
    close(mixed.mean / distribution.scale.max(), distribution.loc.mean(0) / distribution.scale.max())


@given(distributions(), st.sampled_from([1e-9, 0.01, 0.5, 0.975, 1 - 1e-9]))
def test_quantiles_invert_the_distribution(distribution: Normal | StudentT, p: float) -> None:
    q = risk.quantile(distribution, p)
    close(risk.pit(distribution, q), torch.full_like(q, p), rtol=1e-4, atol=1e-12)
    each = as_scipy(distribution).ppf(p)
    slack = 1e-6 * np.abs(each).max(0)
    assert bool((torch.tensor(each.min(0) - slack) <= q).all())
    assert bool((q <= torch.tensor(each.max(0) + slack)).all())


@given(distributions(), st.sampled_from([0.5, 0.975, 0.99, 0.9999]))
def test_expected_shortfall_is_beyond_the_value_at_risk(distribution: Normal | StudentT, level: float) -> None:
    var, es = risk.value_at_risk(distribution, level), risk.expected_shortfall(distribution, level)
    assert bool((es >= var).all())
    assert bool(es.isfinite().all())
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(40))
    shares = (nodes + 1) / 2  # of the tail, in u^4, which takes the slope out of its end
    tail = torch.stack([risk.quantile(distribution, (1 - level) * u.item() ** 4) for u in shares])
    mean = -(tail * (weights / 2 * 4 * shares**3)[:, None]).sum(0)
    unit = distribution.scale.max()
    close(es / unit, mean / unit, rtol=0.02, atol=1e-3)


@given(distributions())
@settings(max_examples=5)
def test_scales_that_are_none_are_refused(one: Normal | StudentT) -> None:
    kind: Any = type(one)
    y, df = outcomes(one), [one.df] if isinstance(one, StudentT) else []
    for scale in (0 * one.scale, -one.scale):
        wrong = kind(*df, one.loc, scale, validate_args=False)
        for ask in (effens.crps, risk.pit):
            with pytest.raises(ValueError, match="^scale must be > 0"):
                ask(wrong, y)
        with pytest.raises(ValueError, match="^scale must be > 0"):
            risk.quantile(wrong, 0.5)


def test_quantiles_too_far_to_be_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"probability must give finite quantiles, got 1e-300 ... 1e-300"):
        risk.quantile(StudentT(torch.full((1, 2), 2.5), torch.zeros(1, 2), torch.ones(1, 2)), 1e-300)


def test_students_t_of_many_degrees_of_freedom_is_normal() -> None:
    location, scale, y = torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([-1.0, 0.0, 3.0])
    normal = Normal(location.double(), scale.double())
    for df in (1e6, 1e9, 1e12, 1e15):
        student = StudentT(df * scale.double(), location.double(), scale.double())
        close(risk.expected_shortfall(student), risk.expected_shortfall(normal), atol=1e-5)
        close(effens.crps(student, y.double()), effens.crps(normal, y.double()), atol=1e-5)
        raw = torch.tensor([0.0, math.log(math.expm1(0.999)), df]).expand(3, 3)
        close(effens.StudentT().nll(raw, y), -Normal(0.0, 1.0).log_prob(y), rtol=1e-4, atol=1e-4)
    one = torch.ones(1, 1, dtype=torch.float64)
    for df, lost in ((1.05, 4e-4), (2.0, 1e-7)):  # of a scale: what lies beyond 300, and the error of quadratures
        square = lambda z, df=df: stats.t.cdf(-z, df) ** 2  # noqa: E731
        exact = 2 * sum(
            integrate.quad(square, *ends, limit=500)[0] for ends in ((0, 10), (10, 1e3), (1e3, 1e5), (1e5, 1e9))
        )
        assert -1e-7 < exact - effens.crps(StudentT(df * one, 0 * one, one), 0 * one[0]).item() < lost
    for least in (1.0, 0.3):
        with pytest.raises(ValueError, match="^degrees of freedom must be > 1, got"):
            effens.crps(StudentT(least * scale, location, scale), y)


@given(st.integers(1, 9), seeds, st.floats(0.001, 0.999))
def test_the_scores_of_risk_are_their_definitions(n: int, seed: int, p: float) -> None:
    q, y, more = torch.randn(3, n, generator=generator(seed), dtype=torch.float64)
    var = q.abs() + 0.1
    es = var + more.abs()
    pin = [(p - (b < a)) * (b - a) for a, b in zip(q.tolist(), y.tolist(), strict=True)]
    close(risk.pinball(q, y, p), torch.tensor(pin, dtype=torch.float64))
    rows = zip(var.tolist(), es.tolist(), y.tolist(), strict=True)
    joint = [(-v - b) * (b <= -v) / ((1 - p) * e) + v / e + math.log(e) - 1 for v, e, b in rows]
    close(risk.fz0(var, es, y, p), torch.tensor(joint, dtype=torch.float64), rtol=1e-9)


@given(st.lists(st.booleans(), min_size=2, max_size=40), st.sampled_from([0.5, 0.975, 0.99]))
def test_backtests_are_ratios_of_likelihoods_also_with_no_hits_or_only_hits(days: list[bool], level: float) -> None:
    hits = torch.tensor(days)

    def log_likelihood(pairs: list[tuple[bool, float]]) -> float:
        return float(stats.bernoulli.logpmf([hit for hit, _ in pairs], [rate for _, rate in pairs]).sum())

    rate = sum(days) / len(days)
    expected = log_likelihood([(hit, rate) for hit in days]) - log_likelihood([(hit, 1 - level) for hit in days])
    kupiec = risk.kupiec(hits, level)
    close(kupiec.statistic, 2 * expected, atol=1e-9)
    close(kupiec.p_value, stats.chi2.sf(2 * max(expected, 0), 1), atol=1e-6)
    now, before = days[1:], days[:-1]
    share = {
        state: sum(hit for hit, b in zip(now, before, strict=True) if b == state) / max(1, before.count(state))
        for state in (False, True)
    }
    chain = log_likelihood([(hit, share[b]) for hit, b in zip(now, before, strict=True)])
    again = log_likelihood([(hit, sum(now) / len(now)) for hit in now])
    close(risk.independence(hits).statistic, 2 * max(chain - again, 0), atol=1e-9)
    both = risk.conditional_coverage(hits, level)
    close(both.statistic, 2 * (chain - log_likelihood([(hit, 1 - level) for hit in now])), atol=1e-9)
    close(both.p_value, math.exp(-both.statistic.item() / 2), atol=1e-9)  # chi-squared of 2 in closed form
    stacked = risk.kupiec(torch.stack([hits, ~hits]).float(), level)
    close(stacked.statistic[0], kupiec.statistic)
    p = risk.simulated_p(risk.independence, hits, level, draws=19)
    assert 1 / 20 <= p <= 1


@given(st.lists(st.booleans(), min_size=8, max_size=60), st.sampled_from([0.5, 0.975, 0.99]), st.floats(0.1, 10))
def test_what_can_be_foretold_is_nothing_where_nothing_happens(days: list[bool], level: float, unit: float) -> None:
    hits, var = torch.tensor(days), unit * torch.linspace(1, 2, len(days), dtype=torch.float64)
    found = risk.dynamic_quantile(hits, var, level)
    assert found.statistic >= 0
    assert 0 <= found.p_value <= 1
    same = risk.dynamic_quantile(hits, 3 * var + unit, level)  # in another unit
    close(same.statistic, found.statistic, rtol=1e-5, atol=1e-7)
    stacked = risk.dynamic_quantile(torch.stack([hits, ~hits]), var, level)
    close(stacked.statistic[0], found.statistic, rtol=1e-7, atol=1e-9)


@given(distributions(), st.sampled_from([0.5, 0.975, 0.99]))
@settings(max_examples=20)
def test_losses_of_the_tail_begin_at_the_value_at_risk_and_shortfall_is_its_equation(
    distribution: Normal | StudentT, level: float
) -> None:
    var, es = risk.value_at_risk(distribution, level), risk.expected_shortfall(distribution, level)
    n = distribution.batch_shape[1]
    days, unit = torch.arange(n), distribution.scale.max()
    whole, half = (risk.tail_losses(distribution, days, torch.full((n,), u).double(), level) for u in (1.0, 0.5))
    close(whole / unit, var / unit, rtol=1e-4, atol=1e-5)
    assert bool((half >= whole - 1e-6 * unit).all())
    safe = es.abs() + unit  # a shortfall that is positive, as the test asks
    y = torch.where(days % 2 == 0, -(safe.abs() + var.abs()), var.abs())
    z = risk.acerbi_szekely(y, var.abs(), safe, level)
    worst = [-float(y[i]) / float(safe[i]) for i in range(n) if y[i] < -var.abs()[i]]
    close(z, 1 - sum(worst) / (n * round(1 - level, 15)), rtol=1e-5, atol=1e-6)
    p = risk.shortfall_p(lambda days, u: safe[days].double(), y, var.abs(), safe, level, draws=19)
    assert 1 / 20 <= p <= 1


@given(st.integers(1, 30), st.sampled_from([0.9, 0.99]), st.floats(0.001, 0.9), st.floats(0.01, 0.5))
def test_the_power_of_a_backtest_is_the_sum_over_counts(n: int, level: float, rate: float, size: float) -> None:
    rejects = [
        bool(risk.kupiec(torch.arange(n) < k, level).p_value < size) * stats.binom.pmf(k, n, rate) for k in range(n + 1)
    ]
    close(risk.kupiec_power(n, level, rate, size=size), sum(rejects))


def test_limits_of_risk_are_where_the_rules_say() -> None:
    one, none = torch.ones(3), torch.zeros(3)
    close(risk.fz0(one, one, none), one - 1 + one.log() + 0)  # a shortfall equal to the value at risk is allowed
    with pytest.raises(ValueError, match="expected shortfall must be > 0, got 0"):
        risk.fz0(none, none, none)
    with pytest.raises(ValueError, match=r"losses must be finite and their difference vary, got 0 on all 3 days"):
        risk.diebold_mariano(none, none)
    for size in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="^size must be between 0 and 1, got"):
            risk.kupiec_power(10, size=size)
    for p in (0.0, 1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="^probability must be between 0 and 1, got"):
            risk.pinball(one, none, p)
    with pytest.raises(ValueError, match=r"^again must be in \[0, 1\) and allow the rate, got 1.0 for a rate of 0.1"):
        risk.draw_hits(5, 0.1, again=1.0)
    assert not risk.draw_hits(50, 0.5, again=0.0, draws=9).all()
    fat = StudentT(torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.ones(1, 2))
    close(risk.pit(fat, torch.tensor([0.0, 3.0])), stats.t.cdf([0.0, 3.0], 0.5))
    with pytest.raises(ValueError, match="degrees of freedom must be > 1 for a mean to exist, got 0.5"):
        risk.expected_shortfall(fat)
    one_of_one = Normal(torch.zeros(1, 1), torch.ones(1, 1))
    assert effens.greedy_select(one_of_one, torch.zeros(1), 1) == [0]
    for empty in (Normal(torch.zeros(0, 1), torch.ones(0, 1)), Normal(torch.zeros(1, 0), torch.ones(1, 0))):
        with pytest.raises(ValueError, match=r"predictions must be \(members, n\) and y \(n,\), none 0"):
            effens.greedy_select(empty, torch.zeros(empty.batch_shape[1]), 1)


def test_lags_are_chosen_by_the_number_of_days() -> None:
    """4 (n / 100)^(2/9), and one less than the horizon at least."""
    a, b = torch.rand(2, 300, generator=generator(), dtype=torch.float64)
    for n, lags in ((12, 2), (99, 3), (100, 4), (272, 4), (273, 5)):
        assert risk.diebold_mariano(a[:n], b[:n]) == risk.diebold_mariano(a[:n], b[:n], lags=lags)
    assert risk.diebold_mariano(a, b, horizon=9) == risk.diebold_mariano(a, b, horizon=9, lags=8)
    assert risk.diebold_mariano(a, b, horizon=9) != risk.diebold_mariano(a, b, horizon=9, lags=7)


@given(st.integers(1, 50), st.floats(0.01, 0.4), st.floats(0.0, 0.9), seeds)
def test_drawn_hits_are_booleans_of_their_rate(n: int, rate: float, again: float, seed: int) -> None:
    hits = risk.draw_hits(n, rate, again=again, draws=400, seed=seed)
    assert hits.shape == (400, n)
    assert hits.dtype == torch.bool
    share = hits[:, 0].double().mean().item()
    assert abs(share - rate) < 6 * math.sqrt(rate * (1 - rate) / 400)
    assert torch.equal(hits, risk.draw_hits(n, rate, again=again, draws=400, seed=seed))


@given(st.integers(5, 60), seeds, st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_comparisons_of_losses_do_not_change_with_the_unit(n: int, seed: int, unit: float) -> None:
    losses = torch.rand(3, n, generator=generator(seed), dtype=torch.float64)
    one, other = (risk.diebold_mariano(a * unit, b * unit) for a, b in (losses[:2], losses[:2].flip(0)))
    close(one.difference, -other.difference, atol=0)
    close(one.p_value, other.p_value)
    close(one.statistic, risk.diebold_mariano(*losses[:2]).statistic)
    assert 0 <= one.p_value <= 1
    found = risk.model_confidence_set(losses * unit, draws=60, seed=seed)
    assert torch.equal(found, risk.model_confidence_set(losses, draws=60, seed=seed))
    assert found.max() == 1
    assert bool(((found >= 0) & (found <= 1)).all())
    same = risk.model_confidence_set(losses[:1].expand(3, n) * unit, draws=60)
    assert bool((same == 1).all())
    with pytest.raises(ValueError, match="difference vary"):
        risk.diebold_mariano(losses[0] * unit, losses[0] * unit)


@given(st.integers(1, 30), st.floats(1, 30), seeds)
def test_the_bootstrap_draws_days_in_blocks(n: int, block: float, seed: int) -> None:
    rows = risk.stationary_bootstrap(n, block=min(block, n), draws=20, seed=seed)
    assert rows.shape == (20, n)
    assert bool(((rows >= 0) & (rows < n)).all())
    if n > 1 and block >= n:
        follows = (rows[:, 1:] - rows[:, :-1]) % n == 1
        assert follows.double().mean() > 0.5


@given(st.lists(st.sampled_from([-1e30, -1.0, 0.0, 1.0, 1e30]), min_size=1, max_size=60), st.sampled_from([0.05, 1.0]))
def test_adaptive_intervals_keep_their_coverage_whatever_comes(values: list[float], rate: float) -> None:
    found = risk.adaptive_conformal(torch.tensor(values, dtype=torch.float64), 0.8, rate=rate)
    misses = torch.tensor(values, dtype=torch.float64) > found.threshold
    assert abs(misses.double().mean().item() - 0.2) <= (0.8 + rate) / (len(values) * rate) + 1e-9
    for i, threshold in enumerate(found.threshold.tolist()):
        assert threshold in (math.inf, -math.inf, *values[:i])


# ---- Likelihoods. ----


@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]), seeds, layouts)
def test_cross_entropy_is_exact_for_huge_and_tiny_logits(
    n: int, classes: int, scale: float, seed: int, layout: Any
) -> None:
    source = generator(seed)
    logits = layout(scale * torch.randn(2, n, classes, generator=source))
    y = torch.randint(classes, (n,), generator=source)
    found = effens.Categorical().nll(logits, y)
    for m, row in enumerate(logits.detach().double().tolist()):
        for i, z in enumerate(row):
            with mpmath.workdps(60):
                top = max(z)
                exact = top - z[y[i]] + mpmath.log(mpmath.fsum(mpmath.exp(v - top) for v in z))
            close(found[m, i] / max(scale, 1), float(exact) / max(scale, 1), rtol=1e-5)
    close(effens.Categorical().predict(logits).sum(-1), torch.ones(2, n))


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_no_label_is_ignored(label: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        effens.Categorical().nll(torch.zeros(2, 3), torch.tensor([0, label]))
    with pytest.raises(ValueError, match=r"labels must be in 0 ... 2, got"):
        effens.Categorical().check(torch.zeros(2, 3), torch.tensor([0, label]))
    with pytest.raises(ValueError, match=r"labels must be integers, got torch.float32"):
        effens.Categorical().nll(torch.zeros(1, 3), torch.tensor([0.7]))


@given(st.integers(1, 6), st.sampled_from([1.0, 30.0, 1e3]), seeds, layouts)
def test_densities_are_those_of_their_distributions(n: int, scale: float, seed: int, layout: Any) -> None:
    source = generator(seed)
    raw = (scale * torch.randn(2, n, 3, generator=source, dtype=torch.float64)).detach()
    y = torch.randn(n, generator=source, dtype=torch.float64)
    soft = np.logaddexp(0, raw.numpy())
    gauss = stats.norm(raw[..., 0].numpy(), np.sqrt(soft[..., 1] + 1e-6)).logpdf(y.numpy())
    close(effens.Gaussian().nll(layout(raw[..., :2]), y), -gauss, rtol=1e-9)
    student = stats.t(2.01 + soft[..., 2], raw[..., 0].numpy(), soft[..., 1] + 1e-3).logpdf(y.numpy())
    close(effens.StudentT().nll(layout(raw), y), -student, rtol=1e-7, atol=1e-7)
    said = effens.StudentT().predict(raw)
    close(said.df, 2.01 + soft[..., 2])


# ---- Schedules and networks. ----


@given(st.integers(1, 200), st.integers(1, 20))
def test_a_cyclic_cosine_falls_from_1_in_every_cycle(steps: int, cycles: int) -> None:
    if steps < cycles:
        with pytest.raises(ValueError, match=f"steps must be >= {cycles} for {cycles} cycles, got {steps}"):
            effens.cyclic_cosine(0, steps, cycles)
        return
    lrs = [effens.cyclic_cosine(step, steps, cycles) for step in range(steps)]
    starts = [cycle * steps // cycles for cycle in range(cycles)]
    for first, end in zip(starts, [*starts[1:], steps], strict=True):
        assert lrs[first] == 1
        assert all(early > late for early, late in pairwise(lrs[first:end]))
        assert 0 <= lrs[end - 1] <= 1


METHODS: dict[str, Callable[[Callable[[], nn.Module], int], effens.Ensemble]] = {
    "deep": lambda make, m: effens.DeepEnsemble(make, m),
    "batch": lambda make, m: effens.BatchEnsemble(make, m),
    "snapshot": lambda make, m: filled(effens.SnapshotEnsemble(make, m)),
    "swag": lambda make, m: filled(effens.SWAG(make, m, rank=2)),
    "mimo": lambda make, m: effens.MIMO(make, m),
    "hyper": lambda make, m: effens.HyperEnsemble([make(), make()], [i % 2 for i in range(m)]),
}


def filled(ensemble: Any) -> effens.Ensemble:
    """Give a method that collects its members something to collect."""
    if isinstance(ensemble, effens.SnapshotEnsemble):
        for m in range(ensemble.members):
            ensemble.snapshots.put(m, noisy(ensemble.network, m))
        ensemble.ready = ensemble.planned
    else:
        for m in range(3):
            ensemble.collect_from(noisy(ensemble.network, m))
        ensemble.finish([])
    result: effens.Ensemble = ensemble.eval()
    return result


@torch.no_grad()
def noisy(network: nn.Module, seed: int) -> nn.Module:
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed), dtype=parameter.dtype)
        parameter.add_(0.1 * noise)
    return network


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: effens_book.nets.mlp(3, 2, width=5), (3,)),
    "images": (lambda: effens_book.nets.cnn(2, channels=2, size=8, inputs=3), (3, 8, 8)),
}


@given(members, st.integers(1, 7), st.integers(1, 9), layouts, seeds)
def test_a_summary_is_the_mean_and_the_spread_of_all_answers(
    size: int, rows: int, chunk: int, layout: Callable[[Tensor], Tensor], seed: int
) -> None:
    torch.manual_seed(seed)
    ensemble = effens.DeepEnsemble(lambda: nn.Linear(4, 3), size)
    x = layout(torch.randn(rows, 4))
    probs = effens.predict(ensemble, x)
    mean, spread = effens.summarize(ensemble, x, chunk=chunk)
    close(mean, probs.mean(0))
    close(spread, probs.std(0, correction=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@given(members, st.sampled_from([0, 1, 7]), st.sampled_from([torch.float64, torch.float32]), seeds)
@settings(max_examples=6)
def test_members_are_networks_and_layouts_do_not_matter(
    method: str, kind: str, m: int, n: int, dtype: torch.dtype, seed: int
) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(seed)
    ensemble = METHODS[method](lambda: make().to(dtype), m).eval()
    x = torch.randn(n, *shape, generator=generator(seed), dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    with torch.no_grad():
        outputs = ensemble(x)
        assert outputs.shape == (m, n, 2)
        close(outputs[m - 1], ensemble.member(m - 1)(x), tolerance, tolerance)
        for layout in LAYOUTS.values():
            close(ensemble(layout(x)), outputs, tolerance, tolerance)
        if kind == "images":
            close(ensemble(x.to(memory_format=torch.channels_last)), outputs, tolerance, tolerance)
        row = x[:1].expand(n, *shape) if n else x
        close(ensemble(row), outputs[:, :1].expand(m, n, 2), tolerance, tolerance)
        whole = effens.predict(ensemble, x)
        close(whole, outputs.softmax(-1), tolerance, tolerance)
        close(effens.predict(ensemble, x, chunk=2), whole, tolerance, tolerance)


@given(members, st.integers(1, 4), st.booleans(), seeds, layouts)
def test_batch_ensemble_layers_are_the_loop_over_members(m: int, n: int, bias: bool, seed: int, layout: Any) -> None:
    torch.manual_seed(seed)
    linear = effens.BatchEnsembleLinear(3, 2, m, bias, init="normal").double()
    convolution = effens.BatchEnsembleConv2d(2, 4, 3, m, bias, init="normal", padding=1, groups=2).double()
    cases: list[tuple[Any, tuple[int, ...]]] = [(linear, (3,)), (linear, (2, 3)), (convolution, (2, 5, 5))]
    for layer, shape in cases:
        x = torch.randn(m * n, *shape, dtype=torch.float64)
        expected = torch.cat([layer.member(i)(rows) for i, rows in enumerate(x.split(n))])
        close(layer(layout(x)), expected, 1e-10, 1e-10)
        close(layer.forward_shared(layout(x[:n])), torch.cat([layer.member(i)(x[:n]) for i in range(m)]), 1e-10, 1e-10)
        assert len(layer(x[:0])) == 0
        if len(shape) == 3:
            close(layer(x.to(memory_format=torch.channels_last)), expected, 1e-10, 1e-10)
        if m > 1:
            with pytest.raises(ValueError, match="rows must be divisible by members"):
                layer(torch.cat([x, x[:1]]))


# ---- Training on hard data. ----

HARD: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "one example": lambda x, y: (x[:1], y[:1]),
    "one class": lambda x, y: (x, 0 * y),
    "constant features": lambda x, y: (0 * x + 3, y),
    "huge features": lambda x, y: (1e15 * x, y),
    "tiny features": lambda x, y: (1e-30 * x, y),
    "small labels": lambda x, y: (x, y.to(torch.uint8)),
    "strided": lambda x, y: (LAYOUTS["strided"](x), LAYOUTS["strided"](y)),
    "expanded": lambda x, y: (x[:1].expand(len(x), 3), y),
}
TRAINED = {name: make for name, make in METHODS.items() if name != "hyper"} | {
    "snapshot": lambda make, m: effens.SnapshotEnsemble(make, m),
    "swag": lambda make, m: effens.SWAG(make, m, rank=2),
}


def drawn_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    source = generator(seed)
    return torch.randn(12, 3, generator=source), torch.randint(2, (12,), generator=source)


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("method", TRAINED)
def test_hard_data_train_to_finite_probabilities(method: str, hard: str) -> None:
    x, y = HARD[hard](*drawn_data())
    ensemble = TRAINED[method](lambda: effens_book.nets.mlp(3, 2, width=5), 2)
    history = effens.fit(ensemble, (x, y), epochs=3, batch_size=4, lr=1e-3, progress=False)
    assert bool(history.losses.isfinite().all())
    probs = effens.predict(ensemble, x)
    close(probs.sum(2), torch.ones(2, len(x)), atol=1e-5)
    assert bool(effens.nll(probs, y).isfinite())


@pytest.mark.parametrize("method", TRAINED)
def test_64_members_train(method: str) -> None:
    x, y = drawn_data()
    ensemble = TRAINED[method](lambda: effens_book.nets.mlp(3, 2, width=3), 64)
    effens.fit(ensemble, (x, y), epochs=64 if method == "snapshot" else 2, batch_size=12, progress=False)
    assert effens.predict(ensemble, x).shape == (64, 12, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", TRAINED)
def test_features_that_are_not_finite_are_refused_in_training_and_seen_in_prediction(method: str, value: float) -> None:
    x, y = drawn_data()
    ensemble = TRAINED[method](lambda: effens_book.nets.mlp(3, 2, width=5), 2)
    effens.fit(ensemble, (x, y), epochs=2, batch_size=12, progress=False)
    x[3] = value
    probs = effens.predict(ensemble, x)
    assert bool(probs[:, 3].isnan().all())
    assert bool(torch.cat([probs[:, :3], probs[:, 4:]], 1).isfinite().all())  # the other rows are as they were
    with pytest.raises(ValueError, match="probs must be >= 0, got nan"):
        effens.nll(probs, y)
    with pytest.raises(FloatingPointError, match="losses must be finite, got"):
        effens.fit(ensemble, (x, y), epochs=2, batch_size=12, progress=False)


@pytest.mark.parametrize("method", METHODS)
@given(st.sampled_from([1, 2, 64]), st.sampled_from(FLOATS), seeds)
@settings(max_examples=4)
def test_what_is_saved_is_loaded_bit_by_bit(method: str, m: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    made = [METHODS[method](lambda: effens_book.nets.mlp(3, 2, width=4), m).to(dtype) for _ in range(2)]
    if method == "hyper":  # whose index is no tensor of its own
        made = [ensemble.chosen for ensemble in made if isinstance(ensemble, effens.HyperEnsemble)]
    with tempfile.TemporaryDirectory() as folder:
        effens.save(made[0], Path(folder) / "a.safetensors")
        effens.load(made[1], Path(folder) / "a.safetensors")
    for (name, one), other in zip(made[0].state_dict().items(), made[1].state_dict().values(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@given(st.sampled_from([1, 3]), st.sampled_from([1, 5, 300]))
@settings(max_examples=3)
def test_costs_are_counts_and_times(m: int, n: int) -> None:
    x, y = torch.randn(n, 3), torch.randint(2, (n,))
    found = effens.measure(effens.DeepEnsemble(lambda: nn.Linear(3, 2), m), x, y, seconds=0.001)
    assert found.parameters == m * 8
    assert found.stored_bytes == 4 * m * 8
    assert found.train_seconds > 0
    assert all(found.latency_p50[size] <= found.latency_p99[size] for size in found.latency_p50)


budget = st.one_of(st.none(), st.floats(0.01, 20))


@given(budget, budget, budget, budget, st.sampled_from(["nll", "accuracy", "shift", "unknown"]))
@settings(max_examples=5)
def test_choices_keep_the_budget(
    train: float | None, latency: float | None, throughput: float | None, memory: float | None, goal: str
) -> None:
    choices = choose(train=train, latency=latency, throughput=throughput, memory=memory, goal=goal)
    limits = {"training": train, "batch 1": latency, "batch 256": throughput, "memory": memory}
    for choice in choices:
        within = all(limit is None or choice.costs[key] <= limit for key, limit in limits.items())
        assert choice.qualifies == within
    assert [choice.qualifies for choice in choices] == sorted((c.qualifies for c in choices), reverse=True)
    assert len({choice.method for choice in choices}) == len(choices)
