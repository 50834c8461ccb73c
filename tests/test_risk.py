"""Risk measures, backtests and comparisons agree with closed forms, SciPy, plain loops and simulation."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from arch.univariate import SkewStudent
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor
from torch.distributions import Laplace, Normal, StudentT

import effens
from effens_book.finance import risk
from effens_book.finance.skewed import SkewedT, SkewT

F64 = torch.float64


def draw(
    members: int = 5, n: int = 40, df: float | None = None, spread: float = 1.0, seed: int = 0
) -> Normal | StudentT:
    """Members that agree in part: normal, or Student's t with degrees of freedom from `df` on."""
    generator = torch.Generator().manual_seed(seed)
    location = spread * torch.randn(members, n, generator=generator, dtype=F64)
    scale = 0.2 + torch.rand(members, n, generator=generator, dtype=F64)
    if df is None:
        return Normal(location, scale)
    return StudentT(df + 3 * torch.rand(members, n, generator=generator, dtype=F64), location, scale)


def skew_t(members: int, n: int) -> SkewT:
    """Members that lean to either side."""
    generator = torch.Generator().manual_seed(3)
    df, skew, location, scale = torch.rand(4, members, n, generator=generator, dtype=F64).unbind()
    return SkewT(2.5 + 6 * df, 1.6 * skew - 0.8, location, 0.2 + scale)


DISTRIBUTIONS = [
    *(draw(), draw(df=2.01), draw(df=30), draw(1), draw(1, df=2.01), draw(2, df=4, spread=1e3), draw(64)),
    *(skew_t(1, 40), skew_t(4, 40)),
]


class Frozen:
    """A member that leans, by another package."""

    def __init__(self, df: float, skew: float, loc: float, scale: float) -> None:
        self.shape, self.loc, self.scale, self.of = np.array([df, skew]), loc, scale, SkewStudent()

    def cdf(self, x: float) -> float:
        return float(self.of.cdf((np.array([x]) - self.loc) / self.scale, self.shape)[0])

    def ppf(self, p: float) -> float:
        return self.loc + self.scale * float(self.of.ppf(p, self.shape))

    def pdf(self, x: float) -> float:
        z = (np.array([x]) - self.loc) / self.scale
        return float(np.exp(self.of.loglikelihood(self.shape, z, np.ones(1), individual=True)[0]) / self.scale)


def frozen(distribution: Normal | StudentT | SkewT, i: int) -> list[Any]:
    """The members of example i, as SciPy has them."""
    if isinstance(distribution, SkewT):
        fields = (getattr(distribution, name)[:, i].tolist() for name in ("df", "skew", "loc", "scale"))
        return [Frozen(*part) for part in zip(*fields, strict=True)]
    location, scale = distribution.loc[:, i].numpy(), distribution.scale[:, i].numpy()
    if isinstance(distribution, StudentT):
        df = distribution.df[:, i].numpy()
        return [stats.t(*part) for part in zip(df, location, scale, strict=True)]
    return [stats.norm(*part) for part in zip(location, scale, strict=True)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("probability", [1e-4, 0.01, 0.025, 0.5, 0.99])
def test_the_distribution_function_at_the_quantile_is_the_probability(
    distribution: Normal | StudentT, probability: float
) -> None:
    q = risk.quantile(distribution, probability)
    assert q.dtype == F64
    for i in (0, 17, 39):
        members = frozen(distribution, i)
        assert np.mean([member.cdf(q[i].item()) for member in members]) == pytest.approx(probability, rel=1e-8)
        assert (
            min(m.ppf(probability) for m in members) - 1e-9 <= q[i] <= max(m.ppf(probability) for m in members) + 1e-9
        )
    torch.testing.assert_close(risk.pit(distribution, q), torch.full((40,), probability, dtype=F64), rtol=1e-8, atol=0)


def test_quantiles_of_one_member_are_its_own_and_each_example_may_have_its_probability() -> None:
    one = Normal(torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[2.0, 0.5]], dtype=F64))
    torch.testing.assert_close(
        risk.quantile(one, torch.tensor([0.975, 0.5], dtype=F64)), torch.tensor([4.919927969, -2], dtype=F64)
    )
    assert risk.value_at_risk(one, 0.99)[0].item() == pytest.approx(2 * 2.3263478740 - 1, abs=1e-9)


def test_the_quantile_of_members_far_apart_is_between_them() -> None:
    two = Normal(torch.tensor([[-1e6], [1e6]], dtype=F64), torch.ones(2, 1, dtype=F64))
    assert risk.quantile(two, 0.25).item() == pytest.approx(-1e6, abs=1e-6)  # the first member's median
    assert abs(risk.quantile(two, 0.5).item()) < 1e6  # nothing is between them: any answer there is right
    narrow = Normal(torch.tensor([[0.0], [0.0]], dtype=F64), torch.tensor([[1e-6], [1e6]], dtype=F64))
    assert risk.pit(narrow, risk.quantile(narrow, 0.3)).item() == pytest.approx(0.3, abs=1e-9)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("level", [0.5, 0.975, 0.999])
def test_expected_shortfall_is_the_integral_of_the_tail(distribution: Normal | StudentT, level: float) -> None:
    es, var = risk.expected_shortfall(distribution, level), risk.value_at_risk(distribution, level)
    assert (es > var).all()
    for i in (0, 39):
        total = 0.0
        for member in frozen(distribution, i):  # E[X; X <= q] = q F(q) - integral of F: no density in it
            q = -var[i].item()

            def beyond(s: float, member: stats.rv_continuous = member, q: float = q) -> float:
                return float(member.cdf(q - math.expm1(s)) * math.exp(s))

            total += q * member.cdf(q) - integrate.quad(beyond, 0, 60, limit=500)[0]
        expected = -total / len(frozen(distribution, i)) / (1 - level)
        assert es[i].item() == pytest.approx(expected, rel=1e-5)


def test_expected_shortfall_of_a_standard_normal() -> None:
    one = Normal(torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64))
    alpha = 0.025
    assert risk.expected_shortfall(one, 0.975).item() == pytest.approx(stats.norm.pdf(stats.norm.ppf(alpha)) / alpha)


def test_risk_measures_scale_and_shift_with_returns() -> None:
    for distribution in (draw(), draw(df=3)):
        parts = 0.5 + 3 * distribution.loc, 3 * distribution.scale
        other = StudentT(distribution.df, *parts) if isinstance(distribution, StudentT) else Normal(*parts)
        for measure in (risk.value_at_risk, risk.expected_shortfall):
            torch.testing.assert_close(measure(other), 3 * measure(distribution) - 0.5)


def test_predictions_keep_their_precision_and_train_nothing() -> None:
    outputs = torch.randn(3, 7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    distribution = effens.StudentT().predict(outputs)
    for value in (risk.value_at_risk(distribution), risk.expected_shortfall(distribution)):
        assert value.dtype == torch.float32
        assert not value.requires_grad
    assert risk.pit(distribution, torch.zeros(7)).shape == (7,)


def test_transforms_of_outcomes_of_the_mixture_are_uniform() -> None:
    distribution = draw(3, 20_000, df=2.5)
    generator = torch.Generator().manual_seed(1)
    member = torch.randint(3, (20_000,), generator=generator)
    torch.manual_seed(2)
    y = distribution.sample()[member, torch.arange(20_000)]
    assert stats.kstest(risk.pit(distribution, y).numpy(), "uniform").pvalue > 0.01
    hits = y < -risk.value_at_risk(distribution, 0.99)
    assert risk.kupiec(hits).p_value.item() > 0.005
    beyond = -y[hits].mean() / risk.expected_shortfall(distribution, 0.99)[hits].mean()
    assert beyond.item() == pytest.approx(1, abs=0.25)


def test_the_true_quantile_and_shortfall_have_the_lowest_scores() -> None:
    truth = StudentT(torch.full((1, 1), 4.0, dtype=F64), torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64))
    var, es = risk.value_at_risk(truth, 0.975), risk.expected_shortfall(truth, 0.975)
    p = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000  # every outcome, as often as it should be
    y = torch.from_numpy(stats.t.ppf(p.numpy(), 4))

    def joint(v: float, e: float) -> float:
        return risk.fz0((v * var).expand_as(y), (e * es).expand_as(y), y, 0.975).mean().item()

    def check(v: float) -> float:
        return risk.pinball((-v * var).expand_as(y), y, 0.025).mean().item()

    for off in (0.9, 0.97, 1.03, 1.1):
        assert check(off) > check(1)
        assert joint(1, off) > joint(1, 1)
        assert joint(off, 1) > joint(1, 1)


def test_scores_of_a_day_by_hand() -> None:
    y = torch.tensor([-3.0, 1.0], dtype=F64)
    assert risk.pinball(torch.tensor([-2.0, -2.0]).double(), y, 0.1).tolist() == pytest.approx([0.9, 0.3])
    var, es = torch.tensor([2.0, 2.0]).double(), torch.tensor([2.5, 2.5]).double()
    calm = 2 / 2.5 + math.log(2.5) - 1
    assert risk.fz0(var, es, y, 0.9).tolist() == pytest.approx([1 / (0.1 * 2.5) + calm, calm])
    change = risk.fz0(7 * var, 7 * es, 7 * y, 0.9) - risk.fz0(var, es, y, 0.9)
    assert change.tolist() == pytest.approx([math.log(7)] * 2)


HISTORIES = [
    [0, 0, 1, 1, 0, 0, 0, 1, 0, 0],
    [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1],
    [0] * 30,
    [1] * 5,
    [0, 1] * 6,
    [0] * 20 + [1],
]


def likelihood(count: int, n: int, rate: float) -> float:
    """The logarithm of a binomial likelihood without its coefficient, 0 log 0 being 0."""
    hit = count * math.log(rate) if count else 0.0
    return hit + ((n - count) * math.log(1 - rate) if n - count else 0.0)


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("level", [0.9, 0.99])
def test_backtests_agree_with_their_definitions(history: list[int], level: float) -> None:
    hits, alpha = torch.tensor(history), 1 - level
    k, n = sum(history), len(history)
    expected = 2 * (likelihood(k, n, k / n) - likelihood(k, n, alpha))
    rate = risk.kupiec(hits, level)
    assert rate.statistic.item() == pytest.approx(expected, abs=1e-9)
    assert rate.p_value.item() == pytest.approx(stats.chi2.sf(expected, 1), abs=1e-9)
    pairs = list(itertools.pairwise(history))
    moves = {(i, j): pairs.count((i, j)) for i in (0, 1) for j in (0, 1)}
    chain = 0.0
    for i in (0, 1):
        days = moves[i, 0] + moves[i, 1]
        chain += likelihood(moves[i, 1], days, moves[i, 1] / days) if days else 0
    later, days = moves[0, 1] + moves[1, 1], len(pairs)
    alone = risk.independence(hits)
    assert alone.statistic.item() == pytest.approx(2 * (chain - likelihood(later, days, later / days)), abs=1e-9)
    both = risk.conditional_coverage(hits, level)
    assert both.statistic.item() == pytest.approx(2 * (chain - likelihood(later, days, alpha)), abs=1e-9)
    assert both.p_value.item() == pytest.approx(stats.chi2.sf(both.statistic.item(), 2), abs=1e-9)
    total = alone.statistic + risk.kupiec(hits[1:], level).statistic
    assert both.statistic.item() == pytest.approx(total.item(), abs=1e-9)


def test_backtests_take_many_histories_at_once() -> None:
    hits = risk.draw_hits(60, 0.1, draws=12)
    for test in (risk.kupiec, risk.independence, risk.conditional_coverage):
        together = test(hits.view(3, 4, 60))
        assert together.statistic.shape == together.p_value.shape == (3, 4)
        alone = torch.stack([test(row).p_value for row in hits])
        assert torch.equal(together.p_value.flatten(), alone)


def test_two_years_show_a_doubled_rate_less_than_half_the_time() -> None:
    assert risk.kupiec_power(504, 0.99, 0.02) == pytest.approx(0.4275, abs=1e-4)
    assert risk.kupiec_power(504, 0.99, 0.01) == pytest.approx(0.0524, abs=1e-4)  # the true size
    kept = range(2, 11)  # 2 ... 10 hits are not rejected
    assert risk.kupiec_power(504, 0.99, 0.02) == pytest.approx(1 - stats.binom.pmf(kept, 504, 0.02).sum(), abs=1e-12)
    powers = [risk.kupiec_power(n, 0.99, 0.02) for n in (250, 504, 1008, 2520)]
    assert powers == sorted(powers)
    assert powers[-1] > 0.98


@pytest.mark.parametrize(("rate", "again"), [(0.01, None), (0.02, None), (0.05, 0.3)])
def test_drawn_hits_have_their_rate_and_their_memory(rate: float, again: float | None) -> None:
    hits = risk.draw_hits(500, rate, again=again, draws=4000, seed=3)
    assert hits.shape == (4000, 500)
    per_history = hits.double().mean(1)
    assert per_history.mean().item() == pytest.approx(rate, abs=4 * per_history.std().item() / 4000**0.5)
    after = hits[:, 1:][hits[:, :-1]].double()
    assert after.mean().item() == pytest.approx(again or rate, abs=4 * after.std().item() / len(after) ** 0.5)
    assert torch.equal(hits, risk.draw_hits(500, rate, again=again, draws=4000, seed=3))
    assert not torch.equal(hits, risk.draw_hits(500, rate, again=again, draws=4000, seed=4))
    if again is None:
        rejected = (risk.kupiec(hits).p_value < 0.05).double().mean().item()
        assert rejected == pytest.approx(risk.kupiec_power(500, 0.99, rate), abs=4 * 0.5 / 4000**0.5)


def test_sizes_and_powers_of_the_tests_of_independence() -> None:
    null, clustered = risk.draw_hits(2520, 0.05, draws=4000), risk.draw_hits(2520, 0.05, again=0.1, draws=4000)
    for test in (risk.independence, lambda hits: risk.conditional_coverage(hits, 0.95)):
        assert (test(null).p_value < 0.05).double().mean().item() == pytest.approx(0.05, abs=0.02)
        assert (test(clustered).p_value < 0.05).double().mean() > 0.45
    few = risk.draw_hits(504, 0.01, draws=4000)
    assert (risk.independence(few).p_value < 0.05).double().mean() < 0.03  # asymptotics need more hits than five


def test_simulated_p_values_are_valid_and_less_blind() -> None:
    test = risk.independence
    null = test(risk.draw_hits(504, 0.01, draws=999, seed=0)).statistic
    hits = risk.draw_hits(504, 0.01, again=0.2, draws=300, seed=1)
    hits = torch.cat([hits, risk.draw_hits(504, 0.01, draws=700, seed=2)])
    slow = torch.tensor([risk.simulated_p(test, row, draws=999) for row in hits[:5]])
    fast = (1 + (null >= test(hits).statistic[:, None] - 1e-9).sum(1)) / 1000
    torch.testing.assert_close(slow, fast[:5])
    assert (fast[300:] < 0.05).double().mean() < 0.05 + 4 * (0.05 * 0.95 / 700) ** 0.5
    assert (fast[:300] < 0.05).sum() > (test(hits[:300]).p_value < 0.05).sum()


@pytest.mark.parametrize("test", [risk.kupiec, risk.conditional_coverage])
def test_simulated_p_values_are_of_the_level_asked_for(test: Callable[..., risk.LikelihoodRatio]) -> None:
    none = torch.zeros(500)
    found = risk.simulated_p(test, none, 0.95, draws=999)
    assert found == risk.simulated_p(lambda hits: test(hits, 0.95), none, 0.95, draws=999) < 0.01
    assert risk.simulated_p(partial(test, level=0.95), none, 0.95, draws=999) == found


def noise(*shape: int, memory: float = 0.0, seed: int = 0) -> Tensor:
    """Standard normal numbers, each depending on the one before."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    for t in range(1, shape[-1]):
        x[..., t] = memory * x[..., t - 1] + (1 - memory**2) ** 0.5 * x[..., t]
    return x


def test_without_lags_it_is_the_paired_t_test() -> None:
    a, b = noise(2, 50)
    result, expected = risk.diebold_mariano(a, b, lags=0), stats.ttest_rel(a, b)
    assert result.statistic == pytest.approx(expected.statistic, rel=1e-12)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert result.difference == pytest.approx((a - b).mean().item())
    assert result.difference / result.error == pytest.approx(result.statistic)
    back = risk.diebold_mariano(b, a, lags=0)
    assert (back.statistic, back.p_value) == pytest.approx((-result.statistic, result.p_value))


@pytest.mark.parametrize(("horizon", "lags", "used"), [(1, 3, 3), (5, None, 4), (10, None, 9), (1, None, 4), (5, 0, 0)])
def test_it_agrees_with_a_plain_loop(horizon: int, lags: int | None, used: int) -> None:
    a, b = noise(2, 120, memory=0.5)
    d = (a - b).numpy()
    n, c = len(d), d - d.mean()
    variance = 0.0
    for s in range(n):
        for t in range(n):
            variance += max(0.0, 1 - abs(s - t) / (used + 1)) * c[s] * c[t] / n**2
    correction = (n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n
    expected = d.mean() / variance**0.5 * correction**0.5
    result = risk.diebold_mariano(a, b, horizon=horizon, lags=lags)
    assert result.statistic == pytest.approx(expected, rel=1e-10)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(expected), n - 1), rel=1e-10)


def test_lags_keep_the_size_where_losses_come_in_clusters() -> None:
    histories = noise(800, 500, memory=0.5, seed=1)
    zero = torch.zeros(500, dtype=F64)
    naive = sum(risk.diebold_mariano(a, zero, lags=0).p_value < 0.05 for a in histories) / 800
    default = sum(risk.diebold_mariano(a, zero).p_value < 0.05 for a in histories) / 800
    assert naive > 0.2
    assert default < 0.13
    assert sum(risk.diebold_mariano(a, zero, lags=20).p_value < 0.05 for a in histories) / 800 < 0.1


def test_bootstrapped_days_come_in_blocks_of_the_length_asked_for() -> None:
    rows = risk.stationary_bootstrap(200, block=10, draws=3000)
    assert rows.shape == (3000, 200)
    together = ((rows[:, 1:] - rows[:, :-1]) % 200 == 1).double().mean().item()
    assert together == pytest.approx(1 - 1 / 10 + 1 / 10 / 200, abs=0.003)
    shares = rows.flatten().bincount(minlength=200) / rows.numel()
    assert shares.min() > 0.8 / 200
    assert shares.max() < 1.2 / 200
    assert torch.equal(rows, risk.stationary_bootstrap(200, block=10, draws=3000))
    assert not torch.equal(rows, risk.stationary_bootstrap(200, block=10, draws=3000, seed=1))
    single = risk.stationary_bootstrap(200, block=1, draws=3000)
    assert ((single[:, 1:] - single[:, :-1]) % 200 == 1).double().mean() < 0.01


def test_the_bootstrap_knows_the_error_of_a_mean_of_days_that_depend_on_each_other() -> None:
    histories = noise(40, 2000, memory=0.7, seed=2)
    rows = risk.stationary_bootstrap(2000, block=50, draws=300)
    variances = torch.stack([history[rows].mean(1).var() for history in histories])
    assert variances.mean().item() == pytest.approx(1.7 / 0.3 / 2000, rel=0.15)  # without blocks it would be 1 / 2000


def slow_confidence_set(losses: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same procedure by loops over models and draws."""
    left, p_value, largest = list(range(len(losses))), np.ones(len(losses)), 0.0
    while len(left) > 1:
        t, boot = {}, {}
        average = losses[left].mean(0)
        for i in left:
            d = losses[i] - average
            shifts = np.array([d[row].mean() - d.mean() for row in rows])
            error = (shifts**2).mean() ** 0.5
            t[i], boot[i] = d.mean() / error, shifts / error
        worst = max(left, key=lambda i: t[i])
        largest = max(largest, np.mean([max(boot[i][b] for i in left) >= t[worst] for b in range(len(rows))]))
        p_value[worst] = largest
        left.remove(worst)
    return p_value


def test_the_confidence_set_agrees_with_a_plain_loop() -> None:
    losses = noise(5, 90, memory=0.3) + noise(90) + torch.tensor([0, 0.1, 0.2, 0.4, 0.8]).double()[:, None]
    rows = risk.stationary_bootstrap(90, block=6, draws=2000, seed=5)
    expected = slow_confidence_set(losses.numpy(), rows.numpy())
    found = risk.model_confidence_set(losses, block=6, draws=2000, seed=5)
    np.testing.assert_allclose(found.numpy(), expected, atol=0.06)  # draws are others
    assert len(set(expected)) > 2


def test_the_confidence_set_keeps_the_best_and_drops_the_bad() -> None:
    kept, size = 0, 0.0
    for seed in range(150):
        losses = noise(4, 250, memory=0.3, seed=seed) + noise(250, seed=1000 + seed)
        losses += torch.tensor([0, 0, 0.1, 1.0]).double()[:, None]
        chosen = risk.model_confidence_set(losses, draws=300) > 0.1
        kept += bool(chosen[:2].all())
        size += chosen.sum().item() / 150
        assert not chosen[3]
    assert kept / 150 > 0.9 - 4 * (0.09 / 150) ** 0.5
    assert 2 < size < 3


def test_the_confidence_set_of_equal_and_of_ordered_models() -> None:
    same = noise(200).expand(3, -1)
    assert risk.model_confidence_set(same).tolist() == [1, 1, 1]
    twice = risk.model_confidence_set(noise(3, 200, seed=2)[[0, 1, 2, 1]])
    assert twice[1] == twice[3]
    losses = noise(200) + 0.01 * noise(3, 200, seed=1) + torch.tensor([2.0, 0, 1]).double()[:, None]
    assert risk.model_confidence_set(losses).tolist() == [0, 1, 0]
    order = torch.tensor([2, 0, 1])
    p_value = risk.model_confidence_set(noise(3, 200, seed=2))
    assert torch.equal(risk.model_confidence_set(noise(3, 200, seed=2)[order]), p_value[order])


def test_a_model_that_diverged_does_not_hide_the_others() -> None:
    losses = noise(500) + 0.1 * noise(2, 500, seed=1) + torch.tensor([0, 0.5]).double()[:, None]
    diverged = torch.full((1, 500), 1e14, dtype=F64)
    assert risk.model_confidence_set(losses).tolist() == [1, 0]
    assert risk.model_confidence_set(torch.cat([losses, diverged])).tolist() == [1, 0, 0]


def misses(scores: Tensor, thresholds: Tensor) -> Tensor:
    return (scores > thresholds).double()


ADVERSARIES: dict[str, Callable[[int], Tensor]] = {
    "calm, then a crisis": lambda n: noise(n).abs() * torch.where(torch.arange(n) < n // 2, 1, 10),
    "ever larger": lambda n: torch.arange(n).double(),
    "ever smaller": lambda n: -torch.arange(n).double(),
    "all the same": torch.ones,
    "two values": lambda n: (torch.arange(n) % 3 == 0).double(),
}


@pytest.mark.parametrize("name", ADVERSARIES)
@pytest.mark.parametrize("rate", [0.005, 0.05])
@pytest.mark.parametrize("window", [None, 50])
def test_coverage_is_kept_whatever_the_scores_do(name: str, rate: float, window: int | None) -> None:
    for n in (300, 2000):
        scores = ADVERSARIES[name](n)
        result = risk.adaptive_conformal(scores, 0.9, rate=rate, window=window)
        missed = misses(scores, result.threshold).mean().item()
        assert abs(missed - 0.1) <= (0.9 + rate) / (n * rate) + 1e-6
        assert result.alpha.min() >= -rate - 1e-9
        assert result.alpha.max() <= 1 + rate + 1e-9


def test_it_adapts_where_split_conformal_does_not() -> None:
    scores = ADVERSARIES["calm, then a crisis"](2000)
    fixed, adaptive = (risk.adaptive_conformal(scores, rate=rate) for rate in (0, 0.02))
    assert misses(scores, fixed.threshold)[1000:1250].mean() > 0.5
    assert misses(scores, adaptive.threshold)[1000:1250].mean() < 0.4
    assert misses(scores, adaptive.threshold).mean().item() == pytest.approx(0.1, abs=0.02)


def test_without_adapting_it_is_split_conformal() -> None:
    scores = noise(60).abs()
    result = risk.adaptive_conformal(scores, 0.8, rate=0)
    assert (result.alpha - 0.2).abs().max() < 1e-12
    for t in range(60):
        rank = math.ceil((t + 1) * 0.8 - 1e-9)
        expected = sorted(scores[:t].tolist())[rank - 1] if rank <= t else math.inf
        assert result.threshold[t].item() == expected
    last = risk.adaptive_conformal(scores, 0.8, rate=0, window=9).threshold[-1].item()
    assert last == sorted(scores[50:59].tolist())[7]


def test_thresholds_do_not_look_ahead() -> None:
    scores = noise(200).abs()
    other = scores.clone()
    other[100:] = 50
    first, second = risk.adaptive_conformal(scores), risk.adaptive_conformal(other)
    assert torch.equal(first.threshold[:101], second.threshold[:101])
    assert torch.equal(first.alpha[:101], second.alpha[:101])
    assert risk.adaptive_conformal(scores.float()).threshold.dtype == torch.float32


ONE = Normal(torch.zeros(1, 3), torch.ones(1, 3))
BAD: dict[str, tuple[type[Exception], Callable[[], object]]] = {
    r"distribution must be Normal or StudentT or SkewT, got Laplace": (
        TypeError,
        lambda: risk.quantile(Laplace(torch.zeros(1, 3), torch.ones(1, 3)), 0.5),
    ),
    r"batch shape must be \(members, n\), none of them 0, got \(3,\)": (
        ValueError,
        lambda: risk.value_at_risk(Normal(torch.zeros(3), torch.ones(3))),
    ),
    r"the distribution must be finite, got 1 numbers that are not": (
        ValueError,
        lambda: risk.pit(Normal(torch.tensor([[0, math.nan]]), torch.ones(1, 2), validate_args=False), torch.zeros(2)),
    ),
    r"y must be \(3,\) finite numbers, got shape \(2,\)": (ValueError, lambda: risk.pit(ONE, torch.zeros(2))),
    r"y must be \(3,\) finite numbers, got shape \(3,\)": (
        ValueError,
        lambda: risk.pit(ONE, torch.tensor([0, math.inf, 1])),
    ),
    r"probability must be between 0 and 1, got 1.0": (
        ValueError,
        lambda: risk.quantile(ONE, torch.tensor([0.5, 1, 0.1])),
    ),
    r"level must be between 0 and 1, got 99": (ValueError, lambda: risk.value_at_risk(ONE, 99)),
    r"degrees of freedom must be > 1 for a mean to exist, got 1": (
        ValueError,
        lambda: risk.expected_shortfall(StudentT(torch.ones(1, 3), torch.zeros(1, 3), torch.ones(1, 3))),
    ),
    r"probability must be between 0 and 1, got 0": (
        ValueError,
        lambda: risk.pinball(torch.zeros(2), torch.zeros(2), 0),
    ),
    r"quantile, y must be \(n,\) with n >= 1, got \(2,\), \(3,\)": (
        ValueError,
        lambda: risk.pinball(torch.zeros(2), torch.zeros(3), 0.1),
    ),
    r"var, es, y must be \(n,\) with n >= 1, got \(0,\), \(0,\), \(0,\)": (
        ValueError,
        lambda: risk.fz0(torch.zeros(0), torch.zeros(0), torch.zeros(0)),
    ),
    r"expected shortfall must be > 0, got -1": (
        ValueError,
        lambda: risk.fz0(torch.ones(2), torch.tensor([2.0, -1]), torch.zeros(2)),
    ),
    r"expected shortfall must be >= the value at risk, got -0.5 more": (
        ValueError,
        lambda: risk.fz0(torch.ones(2), torch.tensor([2.0, 0.5]), torch.zeros(2)),
    ),
    r"hits must be \(..., n\) of 0 and 1, n >= 1, got torch.float32 of shape \(2,\)": (
        ValueError,
        lambda: risk.kupiec(torch.tensor([0.0, 0.5])),
    ),
    r"hits must be \(..., n\) of 0 and 1, n >= 1, got torch.bool of shape \(4, 0\)": (
        ValueError,
        lambda: risk.kupiec(torch.zeros(4, 0, dtype=torch.bool)),
    ),
    r"hits must be of 2 days or more, got 1": (ValueError, lambda: risk.independence(torch.tensor([True]))),
    r"rate must be between 0 and 1, got 2": (ValueError, lambda: risk.kupiec_power(10, 0.99, 2)),
    r"n must be >= 1, got 0": (ValueError, lambda: risk.kupiec_power(0)),
    r"again must be in \[0, 1\) and allow the rate, got 0 for a rate of 0.9": (
        ValueError,
        lambda: risk.draw_hits(5, 0.9, again=0),
    ),
    r"a, b must be \(n,\) with n >= 1, got \(3,\), \(3, 1\)": (
        ValueError,
        lambda: risk.diebold_mariano(torch.zeros(3), torch.zeros(3, 1)),
    ),
    r"losses must be finite and their difference vary, got 1 on all 9 days": (
        ValueError,
        lambda: risk.diebold_mariano(torch.ones(9), torch.zeros(9)),
    ),
    r"losses must be finite and their difference vary, got nan": (
        ValueError,
        lambda: risk.diebold_mariano(torch.full((9,), math.nan), torch.zeros(9)),
    ),
    r"horizon must be in 1 ... n - 1 and lags in 0 ... n - 1, got 0 and 2, n = 9": (
        ValueError,
        lambda: risk.diebold_mariano(torch.arange(9), torch.zeros(9), horizon=0),
    ),
    r"block must be in 1 ... n, got 0.5 for n = 9": (
        ValueError,
        lambda: risk.stationary_bootstrap(9, block=0.5, draws=2),
    ),
    r"losses must be \(models, n\), both > 1, got shape \(1, 9\)": (
        ValueError,
        lambda: risk.model_confidence_set(torch.zeros(1, 9)),
    ),
    r"losses must be finite, got 2 that are not": (
        ValueError,
        lambda: risk.model_confidence_set(torch.tensor([[0, math.nan], [math.inf, 1]])),
    ),
    r"coverage must be between 0 and 1, got 90": (ValueError, lambda: risk.adaptive_conformal(torch.ones(3), 90)),
    r"rate must be >= 0 and finite, and window >= 1, got -1 and None": (
        ValueError,
        lambda: risk.adaptive_conformal(torch.ones(3), rate=-1),
    ),
    r"rate must be >= 0 and finite, and window >= 1, got 0.005 and 0": (
        ValueError,
        lambda: risk.adaptive_conformal(torch.ones(3), window=0),
    ),
    r"scores must be finite, got 1 that are not": (
        ValueError,
        lambda: risk.adaptive_conformal(torch.tensor([1, math.nan])),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_say_the_rule_then_the_value(message: str) -> None:
    error, call = BAD[message]
    with pytest.raises(error, match=message):
        call()


def test_nothing_touches_the_global_generators() -> None:
    before = torch.get_rng_state()
    risk.draw_hits(10, 0.1, draws=3)
    risk.model_confidence_set(noise(3, 20))
    risk.simulated_p(risk.independence, torch.tensor([0, 1, 0]), draws=9)
    assert torch.equal(before, torch.get_rng_state())


# ---- Backtests of what lies beyond. ----


def test_the_dynamic_quantile_test_is_its_equation() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = torch.rand(400, generator=generator) < 0.06
    var = 1 + torch.rand(400, generator=generator, dtype=F64)
    h = hits.double().numpy() - 0.05
    x = np.column_stack([np.ones(396), var[4:], *(h[4 - k : 400 - k] for k in range(1, 5))])
    expected = h[4:] @ x @ np.linalg.solve(x.T @ x, x.T @ h[4:]) / (0.05 * 0.95)
    found = risk.dynamic_quantile(hits, var, 0.95)
    assert found.statistic.item() == pytest.approx(expected, rel=1e-9)
    assert found.p_value.item() == pytest.approx(stats.chi2.sf(expected, 6), rel=1e-9)
    many = risk.dynamic_quantile(torch.stack([hits, ~hits, torch.zeros(400) > 0]), var, 0.95)
    assert many.statistic[0].item() == pytest.approx(expected, rel=1e-9)
    assert bool(many.statistic.isfinite().all())
    with pytest.raises(ValueError, match=r"var must be \(n,\) with n > 6, as hits are, got \(3,\) and n = 400"):
        risk.dynamic_quantile(hits, var[:3])


def test_the_dynamic_quantile_test_keeps_its_size_and_sees_what_could_be_foretold() -> None:
    var = 1 + torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=F64)
    right = risk.dynamic_quantile(risk.draw_hits(2000, 0.05, draws=500), var, 0.95).p_value < 0.05
    assert right.double().mean().item() == pytest.approx(0.05, abs=0.03)
    foretold = torch.rand(500, 2000, generator=torch.Generator().manual_seed(2)) < 0.05 * (var < 1.5) * 2
    assert (risk.dynamic_quantile(foretold, var, 0.95).p_value < 0.05).double().mean() > 0.9
    p = risk.simulated_p(partial(risk.dynamic_quantile, var=var), foretold[0], 0.95, draws=199)
    assert p < 0.05


@pytest.mark.parametrize("distribution", [draw(1, 1500, df=3.0), draw(3, 1500, df=3.0), skew_t(2, 1500)])
def test_shortfalls_that_are_right_pass_and_those_that_are_too_small_do_not(distribution: Any) -> None:
    var, es = risk.value_at_risk(distribution, 0.975), risk.expected_shortfall(distribution, 0.975)
    beyond = partial(risk.tail_losses, distribution)
    found = []
    for seed in range(20):
        uniform = torch.rand(1500, generator=torch.Generator().manual_seed(seed), dtype=F64)
        y = risk.quantile(distribution, uniform)
        found.append([risk.acerbi_szekely(y, var, es).item(), risk.shortfall_p(beyond, y, var, es, draws=199)])
    z, p = np.array(found).T
    assert abs(z.mean()) < 4 * z.std() / math.sqrt(20)
    assert stats.kstest(p, "uniform").pvalue > 0.001
    too_small = risk.acerbi_szekely(1.3 * y, var, es)
    assert too_small < 0
    assert risk.shortfall_p(beyond, 1.3 * y, var, es, draws=199) < 0.05


def test_losses_of_the_tail_have_the_shortfall_as_their_mean() -> None:
    distribution = draw(3, 5, df=4.0)
    uniform = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    for day in range(5):
        losses = risk.tail_losses(distribution, torch.full((20_000,), day), uniform, 0.95)
        assert losses.min().item() >= risk.value_at_risk(distribution, 0.95)[day].item() - 1e-9
        assert losses.mean().item() == pytest.approx(risk.expected_shortfall(distribution, 0.95)[day].item(), rel=0.01)


def test_a_density_that_leans_is_that_of_another_package_and_can_be_learned() -> None:
    distribution = skew_t(3, 40)
    y = distribution.loc + distribution.scale * torch.linspace(-6, 6, 40, dtype=F64)
    logs = distribution.log_prob(y)
    for i in range(40):
        for m, member in enumerate(frozen(distribution, i)):
            assert logs[m, i].exp().item() == pytest.approx(member.pdf(y[m, i].item()), rel=1e-6)
    torch.testing.assert_close(distribution.mean, distribution.loc)
    one = SkewT(*(torch.tensor([[value]], dtype=F64) for value in (5.0, -0.3, 0.2, 1.5)))
    many = SkewT(*(getattr(one, name).expand(1, 20_000) for name in ("df", "skew", "loc", "scale")))
    drawn = risk.quantile(many, torch.rand(20_000, generator=torch.Generator().manual_seed(0)).double())
    assert drawn.mean().item() == pytest.approx(0.2, abs=0.05)
    assert drawn.std().item() == pytest.approx(1.5, rel=0.05)
    outputs = torch.zeros(1, 1, 4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([outputs], max_iter=300, line_search_fn="strong_wolfe")
    head = SkewedT()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head.nll(outputs.expand(1, 20_000, 4), drawn).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = head.predict(outputs)
    for name, value, error in (("df", 5, 0.6), ("skew", -0.3, 0.04), ("loc", 0.2, 0.05), ("scale", 1.5, 0.05)):
        assert getattr(found, name).item() == pytest.approx(value, abs=error)
