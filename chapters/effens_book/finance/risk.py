r"""What a forecast of returns says about losses, and whether it was right.

A distribution is what `effens.predict` returns: `torch.distributions.Normal` or `StudentT`, or the book's `SkewT`, of
batch shape (members, n).
It is read as the equal mixture of its members. Outcomes ``y`` (n,) are returns, gains positive. **Value at risk and
expected shortfall are losses, positive numbers in the unit of y**; ``level`` is the confidence, 0.99 for instance, and
:math:`\alpha = 1 - \text{level}` the share of days that are expected to be worse. A hit is such a day: ``y < -var``.

A forecast of day i must be made from what was known before it; nothing here can see whether it was.
"""

import inspect
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import elementwise
from scipy.special import ndtr, ndtri, poch, stdtr, stdtrit
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

from effens.scores import as_given, check_scales, exact
from effens_book.finance import skewed

__all__ = [
    "Comparison",
    "Conformal",
    "LikelihoodRatio",
    "acerbi_szekely",
    "adaptive_conformal",
    "conditional_coverage",
    "diebold_mariano",
    "draw_hits",
    "dynamic_quantile",
    "expected_shortfall",
    "fz0",
    "independence",
    "kupiec",
    "kupiec_power",
    "model_confidence_set",
    "pinball",
    "pit",
    "quantile",
    "shortfall_p",
    "simulated_p",
    "stationary_bootstrap",
    "tail_losses",
    "value_at_risk",
]

Array = NDArray[np.float64]


# What a mixture says


def pit(distribution: Distribution, y: Tensor) -> Tensor:
    r"""Return the probability integral transform, the mixture's distribution function at what happened.

    .. math:: u_i = \frac1M \sum_m F_{m,i}(y_i)

    The right forecasts give independent uniform numbers (Diebold, Gunther and Tay, 1998, doi:10.2307/2527342).

    Args:
        distribution: of batch shape (members, n).
        y: (n,) outcomes.

    Returns:
        ``(n,)`` in [0, 1].

    Raises:
        TypeError: the distribution is neither normal nor Student's t.
        ValueError: the shapes do not agree, a number is not finite, or a scale is not above 0.
    """
    kind, shape, location, scale = _members(distribution)
    return _like(kind.cdf((_outcomes(y, location.shape[1]) - location) / scale, *shape).mean(0), distribution)


def quantile(distribution: Distribution, probability: float | Tensor) -> Tensor:
    r"""Return the mixture's quantile, by Newton's method on its distribution function, and bisection where that strays.

    .. math:: q_i: \quad \frac1M \sum_m F_{m,i}(q_i) = p

    It lies between the members' smallest and largest quantiles, so that is where the search begins. The mean of the
    members' quantiles is another number, and not a quantile of the mixture.

    Args:
        distribution: of batch shape (members, n).
        probability: one for all, or (n,), between 0 and 1.

    Returns:
        ``(n,)`` in the unit of the outcomes.

    Raises:
        TypeError: the distribution is neither normal nor Student's t.
        ValueError: a probability is not between 0 and 1, a number is not finite, or a scale is not above 0.
    """
    members = _members(distribution)
    given = exact(probability).cpu().numpy() if isinstance(probability, Tensor) else probability
    p = np.broadcast_to(np.asarray(given, dtype=float), members[2].shape[1:])
    if not ((p > 0) & (p < 1)).all():
        raise ValueError(f"probability must be between 0 and 1, got {p[~((p > 0) & (p < 1))][0]}")
    return _like(_quantile(*members, p), distribution)


def value_at_risk(distribution: Distribution, level: float = 0.99) -> Tensor:
    r"""Return the loss that is exceeded with probability 1 - level: :math:`\text{VaR} = -q_{1 - \text{level}}`.

    Args:
        distribution: of batch shape (members, n).
        level: between 0 and 1.

    Returns:
        ``(n,)``, positive where a loss is expected on the worst days.
    """
    return -quantile(distribution, _tail(level))


def expected_shortfall(distribution: Distribution, level: float = 0.975) -> Tensor:
    r"""Return the mean loss of the worst days, a share 1 - level of them: at least the value at risk.

    .. math:: \text{ES} = -\frac1\alpha \frac1M \sum_m E[X_m; X_m \le q], \qquad E[X; X \le q] =
        \mu F(z) - \sigma f(z) \frac{\nu + z^2}{\nu - 1}, \quad z = \frac{q - \mu}{\sigma}

    with the mixture's quantile q at :math:`\alpha`: the second equation is of Student's t, and its last factor is 1 for
    a normal member. In closed form but for q.

    Args:
        distribution: of batch shape (members, n).
        level: between 0 and 1.

    Returns:
        ``(n,)``.

    Raises:
        ValueError: a member has at most 1 degree of freedom, so that its mean does not exist.
    """
    kind, shape, location, scale = _members(distribution)
    if kind is KINDS[StudentT] and not (shape[0] > 1).all():
        raise ValueError(f"degrees of freedom must be > 1 for a mean to exist, got {shape[0].min():.3g}")
    alpha = _tail(level)
    z = (_quantile(kind, shape, location, scale, np.full(location.shape[1], alpha)) - location) / scale
    return _like(-(location * kind.cdf(z, *shape) + scale * kind.below(z, *shape)).mean(0) / alpha, distribution)


# Scores of a day's forecast: lower is better


def pinball(quantile: Tensor, y: Tensor, probability: float) -> Tensor:
    r"""Return the quantile score of each day; the true quantile has the lowest mean.

    .. math:: ([y < q] - p) (q - y)

    (Koenker and Bassett, 1978, doi:10.2307/1913643)

    Args:
        quantile: (n,) forecasts; of a value at risk, its negative.
        y: (n,) outcomes.
        probability: that the outcome is below the quantile.

    Returns:
        ``(n,)`` in the unit of y.
    """
    _check_probability("probability", probability)
    _check_shapes(quantile=quantile, y=y)
    return ((y < quantile).to(quantile.dtype) - probability) * (quantile - y)


def fz0(var: Tensor, es: Tensor, y: Tensor, level: float = 0.975) -> Tensor:
    r"""Return the joint score of value at risk and expected shortfall of each day; the true pair has the lowest mean.

    .. math:: \frac{[y < -\text{VaR}] \, (-\text{VaR} - y)}{\alpha \, \text{ES}} + \frac{\text{VaR}}{\text{ES}}
        + \log \text{ES} - 1

    Expected shortfall alone has no such score, the pair has (Fissler and Ziegel, 2016, arXiv:1503.08123). This one is
    FZ0 of Patton, Ziegel and Chen (2019, arXiv:1707.05108), with losses positive: differences of it do not change with
    the unit of y.

    Args:
        var: (n,) values at risk.
        es: (n,) expected shortfalls, positive and at least as large.
        y: (n,) outcomes.
        level: of both.

    Raises:
        ValueError: an expected shortfall is not positive, or below the value at risk.
    """
    alpha = _tail(level)
    _check_shapes(var=var, es=es, y=y)
    if not bool((es > 0).all()):
        raise ValueError(f"expected shortfall must be > 0, got {es.min().item():.4g}")
    if not bool((es >= var).all()):
        raise ValueError(f"expected shortfall must be >= the value at risk, got {(es - var).min().item():.4g} more")
    return (-var - y).clamp_min(0) / (alpha * es) + var / es + es.log() - 1


# Backtests of value at risk, and what they can see


class LikelihoodRatio(NamedTuple):
    """A likelihood ratio and its asymptotic p-value, float64, of the batch shape of the hits."""

    statistic: Tensor
    p_value: Tensor


def kupiec(hits: Tensor, level: float = 0.99) -> LikelihoodRatio:
    r"""Test whether the rate of hits is right: unconditional coverage.

    .. math:: 2 \log \frac{\hat\pi^k (1 - \hat\pi)^{n - k}}{\alpha^k (1 - \alpha)^{n - k}} \sim \chi^2_1, \qquad
        \hat\pi = k / n

    (Kupiec, 1995, doi:10.3905/jod.1995.407942) See `kupiec_power` for how little it sees.

    Args:
        hits: (..., n) booleans, or 0 and 1, in the order of days.
        level: of the value at risk.

    Raises:
        ValueError: hits are neither 0 nor 1, or there are none to look at.
    """
    h, alpha = _hits(hits), _tail(level)
    k, n = h.sum(-1), h.shape[-1]
    return _ratio(_log_likelihood(k, n, k / n) - _log_likelihood(k, n, alpha), freedom=1)


def independence(hits: Tensor) -> LikelihoodRatio:
    r"""Test whether a hit makes a hit on the next day more, or less, likely.

    .. math:: 2 \log \frac{\hat\pi_{01}^{n_{01}} (1 - \hat\pi_{01})^{n_{00}}
        \hat\pi_{11}^{n_{11}} (1 - \hat\pi_{11})^{n_{10}}}{\hat\pi^{n_{01} + n_{11}} (1 - \hat\pi)^{n_{00} + n_{10}}}
        \sim \chi^2_1

    :math:`n_{ij}` counts the days in state j after a day in state i, :math:`\hat\pi_{ij}` is their share.
    (Christoffersen, 1998, doi:10.2307/2527341) With few hits the asymptotic p-value is too large: see `simulated_p`.

    Args:
        hits: (..., n) booleans, or 0 and 1, in the order of days; n > 1.
    """
    chain, k, n = _chain(hits)
    return _ratio(chain - _log_likelihood(k, n, k / n), freedom=1)


def conditional_coverage(hits: Tensor, level: float = 0.99) -> LikelihoodRatio:
    r"""Test both at once: hits at the right rate, whatever the day before was.

    The ratio of `independence` plus that of `kupiec`, both over the days that have a day before: :math:`\chi^2_2`.
    (Christoffersen, 1998, doi:10.2307/2527341)

    Args:
        hits: (..., n) booleans, or 0 and 1, in the order of days; n > 1.
        level: of the value at risk.
    """
    chain, k, n = _chain(hits)
    return _ratio(chain - _log_likelihood(k, n, _tail(level)), freedom=2)


def dynamic_quantile(hits: Tensor, var: Tensor, level: float = 0.99, *, lags: int = 4) -> LikelihoodRatio:
    r"""Test whether hits can be foretold: by the last hits, or by the value at risk itself.

    .. math:: h_t = [\text{hit}_t] - \alpha, \qquad
        \frac{h^\top X (X^\top X)^{-1} X^\top h}{\alpha (1 - \alpha)} \sim \chi^2_{L + 2}

    whose X holds a one, the last L of h, and the value at risk of the day (Engle and Manganelli, 2004,
    doi:10.1198/073500104000000370). With few hits the asymptotic p-value is wrong: see `simulated_p`.

    Args:
        hits: (..., n) booleans, or 0 and 1, in the order of days.
        var: (n,) values at risk.
        level: of the value at risk.
        lags: L.
    """
    alpha, h = _tail(level), _hits(hits) - _tail(level)
    n = h.shape[-1]
    if len(var) != n or n <= lags + 2:
        raise ValueError(f"var must be (n,) with n > {lags + 2}, as hits are, got {tuple(var.shape)} and n = {n}")
    standard = exact(var[lags:])
    columns = [torch.ones_like(h[..., lags:]), ((standard - standard.mean()) / standard.std()).expand_as(h[..., lags:])]
    columns += [h[..., lags - k : n - k] for k in range(1, lags + 1)]
    x = torch.stack(columns, -1)
    moment = torch.einsum("...nk,...n->...k", x, h[..., lags:])
    inverse = torch.linalg.pinv(x.mT @ x, hermitian=True)
    half = torch.einsum("...k,...kl,...l->...", moment, inverse, moment) / (2 * alpha * (1 - alpha))
    return _ratio(half, freedom=lags + 2)


def acerbi_szekely(y: Tensor, var: Tensor, es: Tensor, level: float = 0.975) -> Tensor:
    r"""Return a statistic that is below 0 where losses beyond the value at risk are larger, or more, than was said.

    .. math:: Z_2 = 1 - \frac1{T \alpha} \sum_{t: \text{hit}} \frac{-y_t}{\text{ES}_t}

    Its mean is 0 if the forecasts are right (Acerbi and Szekely, 2014, "Back-testing expected shortfall", Risk). Its
    p-value is the share of outcomes, drawn from the forecasts, for which it is as low: see `shortfall_p`.

    Args:
        y: (n,) outcomes.
        var: (n,) values at risk.
        es: (n,) expected shortfalls, positive.
        level: of both.
    """
    _check_shapes(y=y, var=var, es=es)
    loss, days = -exact(y), len(y)
    return 1 - (loss / exact(es) * (loss > exact(var))).sum() / (days * _tail(level))


def shortfall_p(
    losses_beyond: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    var: Tensor,
    es: Tensor,
    level: float = 0.975,
    *,
    draws: int = 999,
    seed: int = 0,
) -> float:
    """Return the p-value of `acerbi_szekely`: how often forecasts that are right give one as low.

    Args:
        losses_beyond: (days, uniform) to the loss, on each of these days, that is exceeded by so much of what lies
            beyond the value at risk: of a mixture ``partial(tail_losses, distribution, level=level)``.
        y: (n,) outcomes.
        var: (n,) values at risk.
        es: (n,) expected shortfalls.
        level: of both.
        draws: how many histories.
        seed: of the draws.
    """
    hits = draw_hits(len(y), _tail(level), draws=draws, seed=seed)
    history, days = hits.nonzero().unbind(1)
    uniform = torch.rand(len(days), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = exact(losses_beyond(days, uniform)) / exact(es)[days]
    drawn = 1 - torch.zeros(draws, dtype=torch.float64).index_add(0, history, shares) / (len(y) * _tail(level))
    return (1 + int((drawn <= acerbi_szekely(y, var, es, level)).sum())) / (draws + 1)


def tail_losses(distribution: Distribution, days: Tensor, uniform: Tensor, level: float = 0.975) -> Tensor:
    """Return losses beyond the value at risk of a mixture, each at a place in the tail that a number in (0, 1) gives.

    Args:
        distribution: of batch shape (members, n).
        days: (k,) integers.
        uniform: (k,) numbers in (0, 1); small ones are the largest losses.
        level: of the value at risk.
    """
    kind, shape, location, scale = _members(distribution)
    at = days.numpy()  # a tensor of one number would be taken for a number
    parts = [part[:, at] for part in shape]
    lowest = _quantile(kind, parts, location[:, at], scale[:, at], _tail(level) * exact(uniform).numpy())
    return -_like(lowest, distribution)


def kupiec_power(n: int, level: float = 0.99, rate: float = 0.02, *, size: float = 0.05) -> float:
    """Return the probability that `kupiec` rejects when hits have another rate, exactly, from the binomial.

    At ``rate = 1 - level`` it is the true probability of a false alarm, which is not ``size``: hits are whole numbers.

    Args:
        n: days.
        level: of the value at risk.
        rate: the true probability of a hit.
        size: the test rejects where its p-value is below.
    """
    _check_probability("rate", rate)
    _check_probability("size", size)
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    k, alpha = torch.arange(n + 1).double(), _tail(level)
    p_value = _ratio(_log_likelihood(k, n, k / n) - _log_likelihood(k, n, alpha), freedom=1).p_value
    return min(1.0, float(binom.pmf(k.numpy(), n, rate)[(p_value < size).numpy()].sum()))


def draw_hits(n: int, rate: float, *, again: float | None = None, draws: int = 10_000, seed: int = 0) -> Tensor:
    """Draw hits from a Markov chain, to see what a backtest sees: its power is the share of draws that it rejects.

    Args:
        n: days.
        rate: the probability of a hit on any day.
        again: the probability of a hit on the day after one; otherwise `rate`, so that hits are independent.
        draws: how many histories.
        seed: of the draws.

    Returns:
        ``(draws, n)`` booleans.
    """
    _check_probability("rate", rate)
    after_hit = rate if again is None else again
    after_none = rate * (1 - after_hit) / (1 - rate)
    if not (0 <= after_hit < 1 and after_none <= 1):
        raise ValueError(f"again must be in [0, 1) and allow the rate, got {after_hit} for a rate of {rate}")
    uniform = torch.rand(n, draws, generator=torch.Generator().manual_seed(seed))
    if again is None:
        return (uniform < rate).T.contiguous()
    hits = torch.empty(n, draws, dtype=torch.bool)
    for day, chance in enumerate(uniform):
        hits[day] = chance < (torch.where(hits[day - 1], after_hit, after_none) if day else rate)
    return hits.T.contiguous()


def simulated_p(
    test: Callable[..., LikelihoodRatio], hits: Tensor, level: float = 0.99, *, draws: int = 9999, seed: int = 0
) -> float:
    r"""Return a p-value that is valid with few hits: the rank of the statistic among histories that the model implies.

    .. math:: p = \frac{1 + \#\{b: T_b \ge T\}}{B + 1}

    (Dufour, 2006, doi:10.1016/j.jeconom.2005.06.007; for these tests Christoffersen and Pelletier, 2004,
    doi:10.1093/jjfinec/nbh004) Ties count against rejecting, so it is never too small.

    Args:
        test: of hits, `independence` for instance; one that takes a ``level`` gets this one.
        hits: (n,) booleans, or 0 and 1, in the order of days.
        level: of the value at risk.
        draws: how many histories of independent hits.
        seed: of the draws.
    """
    if "level" in inspect.signature(test).parameters:
        test = partial(test, level=level)
    null = test(draw_hits(hits.shape[-1], _tail(level), draws=draws, seed=seed)).statistic
    return (1 + int((null >= test(hits).statistic - 1e-9).sum())) / (draws + 1)


# Which forecast is better


class Comparison(NamedTuple):
    """The mean difference of two losses, its standard error, their ratio, and the two-sided p-value."""

    difference: float
    error: float
    statistic: float
    p_value: float


def diebold_mariano(a: Tensor, b: Tensor, *, horizon: int = 1, lags: int | None = None) -> Comparison:
    r"""Test whether two forecasts are equally good on average, when their losses depend on those of the days before.

    .. math:: \bar d = \frac1n \sum_t (a_t - b_t), \qquad
        \hat\sigma^2 = \frac1n \Big( \gamma_0 + 2 \sum_{k=1}^{L} \big(1 - \tfrac{k}{L+1}\big) \gamma_k \Big), \qquad
        \frac{\bar d}{\hat\sigma} \sqrt{\frac{n + 1 - 2h + h(h-1)/n}{n}} \sim t_{n-1}

    with autocovariances :math:`\gamma_k` of the differences (Diebold and Mariano, 1995,
    doi:10.1080/07350015.1995.10524599; the weights: Newey and West, 1987, doi:10.2307/1913610; the square root and t:
    Harvey, Leybourne and Newbold, 1997, doi:10.1016/S0169-2070(96)00719-4, who derive it for equal weights).

    Args:
        a: (n,) losses of one forecast, day by day.
        b: (n,) losses of another on the same days; the difference is negative where `a` is better.
        horizon: h, how many days ahead the forecasts are.
        lags: L; otherwise h - 1 or 4 (n / 100)^(2/9), whichever is more: also losses one day ahead come in clusters.

    Raises:
        ValueError: the shapes do not agree, a number is not finite, or the difference is constant.
    """
    from statsmodels.regression.linear_model import OLS  # here: it takes a second to load

    _check_shapes(a=a, b=b)
    d = exact(a) - exact(b)
    n = len(d)
    lags = max(horizon - 1, int(4 * (n / 100) ** (2 / 9))) if lags is None else lags
    if not 1 <= horizon < n or not 0 <= lags < n:
        raise ValueError(f"horizon must be in 1 ... n - 1 and lags in 0 ... n - 1, got {horizon} and {lags}, n = {n}")
    mean = d.mean()
    centered = d - mean
    if not bool(centered.abs().max() > 1e-12 * torch.stack([a, b]).abs().max()):
        raise ValueError(f"losses must be finite and their difference vary, got {mean.item():.4g} on all {n} days")
    plain = OLS(d.numpy(), np.ones(n)).fit(cov_type="HAC", cov_kwds={"maxlags": lags, "use_correction": False})
    correction = (n + 1 - 2 * horizon + horizon * (horizon - 1) / n) / n
    error = float(plain.bse[0]) / math.sqrt(correction)
    statistic = float(mean) / error
    return Comparison(float(mean), error, statistic, float(2 * student.sf(abs(statistic), n - 1)))


def stationary_bootstrap(n: int, *, block: float, draws: int, seed: int = 0) -> Tensor:
    """Draw days in blocks of random length, wrapping around, so that what depends on the day before still does.

    (Politis and Romano, 1994, doi:10.1080/01621459.1994.10476870)

    Args:
        n: days.
        block: the mean length, at least 1; lengths are geometric.
        draws: how many histories.
        seed: of the draws.

    Returns:
        ``(draws, n)`` integers in 0 ... n - 1.
    """
    if n < 1 or not 1 <= block <= n:
        raise ValueError(f"block must be in 1 ... n, got {block} for n = {n}")
    generator = torch.Generator().manual_seed(seed)
    day = torch.arange(n)
    fresh = torch.rand(draws, n, generator=generator) < 1 / block
    began = torch.where(fresh, day, 0).cummax(1).values  # the day on which this day's block began; the first, on day 0
    return (torch.randint(n, (draws, n), generator=generator).gather(1, began) + day - began) % n


def model_confidence_set(losses: Tensor, *, block: float | None = None, draws: int = 2000, seed: int = 0) -> Tensor:
    r"""Return each model's p-value: those above, say, 0.1 form a set that holds the best model with 90% confidence.

    The worst of the models that are left goes while they differ significantly, by the statistic

    .. math:: T_{\max} = \max_i \frac{\bar d_i}{\hat\sigma_i}, \qquad
        d_{i,t} = \text{loss}_{i,t} - \frac1m \sum_j \text{loss}_{j,t}

    whose standard errors and distribution come from one stationary bootstrap of the days. A model's p-value is the
    largest of the tests up to its going; the last one has 1. (Hansen, Lunde and Nason, 2011, doi:10.3982/ECTA5771)
    A large set says that the days cannot tell the models apart, not that they are equally good.

    Args:
        losses: (models, n), models > 1, day by day.
        block: mean length of the blocks, in days; otherwise the square root of n.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        ``(models,)`` float64.

    Raises:
        ValueError: the shape is another, or a loss is not finite.
    """
    from arch.bootstrap import MCS  # here: it takes a second to load

    if losses.dim() != 2 or losses.shape[0] < 2 or losses.shape[1] < 2:
        raise ValueError(f"losses must be (models, n), both > 1, got shape {tuple(losses.shape)}")
    x = exact(losses)
    if not bool(x.isfinite().all()):
        raise ValueError(f"losses must be finite, got {int((~x.isfinite()).sum())} that are not")
    models, of = np.unique(x.numpy(), axis=0, return_inverse=True)  # equal models are one
    p_value = np.ones(len(models))
    if len(models) > 1:
        size = round(math.sqrt(x.shape[1]) if block is None else block)
        test = MCS(models.T, 0.1, reps=draws, block_size=size, method="max", bootstrap="stationary", seed=seed)
        test.compute()
        p_value = test.pvalues["Pvalue"].sort_index().to_numpy(np.float64)
    return torch.from_numpy(p_value[of])


# A safety net


class Conformal(NamedTuple):
    """For each day the threshold that its score should not pass, and the share of misses that was aimed at."""

    threshold: Tensor
    alpha: Tensor


def adaptive_conformal(
    scores: Tensor, coverage: float = 0.9, *, rate: float = 0.005, window: int | None = None
) -> Conformal:
    r"""Return thresholds that keep their coverage in the long run, whatever the scores do.

    .. math:: \alpha_{t+1} = \alpha_t + \gamma (\alpha - [s_t > \hat q_t]), \qquad
        \hat q_t = \text{the } \lceil (m + 1)(1 - \alpha_t) \rceil \text{-th smallest of } m \text{ earlier scores}

    infinite where there are too few, minus infinity where :math:`\alpha_t \ge 1`. After T days the share of misses is
    within :math:`(\max(\alpha, 1 - \alpha) + \gamma) / (T \gamma)` of :math:`\alpha`, for any scores at all (Gibbs and
    Candès, 2021, arXiv:2106.00170, proposition 4.1). That is an average over days: it says nothing of any one of them.

    Args:
        scores: (n,) in the order of days, larger where the forecast was worse: |y - mean| / spread for an interval,
            (mean - y) / spread for a value at risk. The threshold times the spread is then the half width.
        coverage: 1 - alpha, the share of days whose score should stay within.
        rate: gamma, how fast to adapt; 0 does not.
        window: how many of the last scores to look at; otherwise all.

    Returns:
        `Conformal`: ``(n,)`` thresholds, each from earlier scores only, and alphas.

    Raises:
        ValueError: the scores are not finite, or a setting is out of range.
    """
    _check_probability("coverage", coverage)
    if not 0 <= rate < math.inf or (window is not None and window < 1):
        raise ValueError(f"rate must be >= 0 and finite, and window >= 1, got {rate} and {window}")
    _check_shapes(scores=scores)
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, got {int((~scores.isfinite()).sum())} that are not")
    alpha = 1 - coverage
    ranked: list[float] = []
    recent: deque[float] = deque()
    thresholds, alphas = [], []
    for score in scores.tolist():
        rank = math.ceil((len(ranked) + 1) * (1 - alpha) - 1e-9)
        threshold = -math.inf if rank < 1 else math.inf if rank > len(ranked) else ranked[rank - 1]
        thresholds.append(threshold)
        alphas.append(alpha)
        alpha += rate * (1 - coverage - (score > threshold))
        insort(ranked, score)
        recent.append(score)
        if window is not None and len(recent) > window:
            del ranked[bisect_left(ranked, recent.popleft())]
    like = torch.float32 if scores.dtype == torch.float32 else torch.float64
    return Conformal(torch.tensor(thresholds, dtype=like), torch.tensor(alphas, dtype=torch.float64))


# Plumbing


class Kind(NamedTuple):
    """A kind of member, of location 0 and scale 1: its distribution function, quantiles and E[Z; Z <= z]."""

    shape: tuple[str, ...]  # names of its parameters beside location and scale
    cdf: Callable[..., Array]
    icdf: Callable[..., Array]
    below: Callable[..., Array]


def _normal_below(z: Array) -> Array:
    values: Array = -np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return values


def _student_below(z: Array, df: Array) -> Array:
    normalizer = poch(df / 2, 0.5) / np.sqrt(df * math.pi)  # a difference of log gammas would lose its digits
    values: Array = -normalizer * np.exp(-(df + 1) / 2 * np.log1p(z**2 / df)) * (df + z**2) / (df - 1)
    return values


KINDS: dict[type[Distribution], Kind] = {
    Normal: Kind((), ndtr, ndtri, _normal_below),
    StudentT: Kind(("df",), lambda z, df: stdtr(df, z), lambda p, df: stdtrit(df, p), _student_below),
    skewed.SkewT: Kind(("df", "skew"), skewed.cdf, skewed.icdf, skewed.below),
}


def _members(distribution: Any) -> tuple[Kind, list[Array], Array, Array]:
    """Return the members' kind, the parameters of its shape, location and scale, each (members, n) float64."""
    if type(distribution) not in KINDS:
        known = " or ".join(kind.__name__ for kind in KINDS)
        raise TypeError(f"distribution must be {known}, got {type(distribution).__name__}")
    shape = tuple(distribution.batch_shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"batch shape must be (members, n), none of them 0, got {shape}")
    kind = KINDS[type(distribution)]
    parts = [exact(getattr(distribution, key)).detach().cpu().numpy() for key in (*kind.shape, "loc", "scale")]
    if unknown := sum(int((~np.isfinite(part)).sum()) for part in parts):
        raise ValueError(f"the distribution must be finite, got {unknown} numbers that are not")
    check_scales(distribution)
    return kind, parts[:-2], parts[-2], parts[-1]


def _quantile(kind: Kind, shape: Sequence[Array], location: Array, scale: Array, p: Array) -> Array:
    """Return what `quantile` does: it lies between the smallest and the largest of the members' quantiles."""
    of_members = location + scale * kind.icdf(p, *shape)
    if not np.isfinite(of_members).all():
        raise ValueError(f"probability must give finite quantiles, got {p.min():.3g} ... {p.max():.3g}")
    low, high = of_members.min(0), of_members.max(0)

    def excess(x: Array, day: Array) -> Array:
        own = [part[:, day] for part in shape]
        values: Array = kind.cdf((x - location[:, day]) / scale[:, day], *own).mean(0) - p[day]
        return values

    room = 1e-6 * scale.max(0)  # so that rounding leaves the quantile between the two
    tolerances = {"xatol": 1e-12, "xrtol": 1e-15, "fatol": 0, "frtol": 0}
    found = elementwise.find_root(
        excess, (low - room, high + room), args=(np.arange(len(p)),), tolerances=tolerances, maxiter=200
    )
    result: Array = found.x
    return result


def _like(values: Any, distribution: Any) -> Tensor:
    """Return an array in the precision, and on the device, of a distribution."""
    return as_given(torch.from_numpy(values), distribution.loc)


def _outcomes(y: Tensor, n: int) -> Array:
    if tuple(y.shape) != (n,) or not bool(y.isfinite().all()):
        raise ValueError(f"y must be ({n},) finite numbers, got shape {tuple(y.shape)}")
    values: Array = exact(y).cpu().numpy()
    return values


def _tail(level: float) -> float:
    """Return 1 - level, without its rounding error: 1 - 0.99 is not 0.01."""
    _check_probability("level", level)
    return round(1 - level, 15)


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _check_shapes(**tensors: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(shapes[0]) != 1 or shapes[0][0] == 0 or len(set(shapes)) > 1:
        raise ValueError(f"{', '.join(tensors)} must be (n,) with n >= 1, got {', '.join(map(str, shapes))}")


def _hits(hits: Tensor) -> Tensor:
    if hits.dim() == 0 or hits.shape[-1] == 0 or not bool(((hits == 0) | (hits == 1)).all()):
        raise ValueError(f"hits must be (..., n) of 0 and 1, n >= 1, got {hits.dtype} of shape {tuple(hits.shape)}")
    return exact(hits)


def _chain(hits: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the log likelihood of the best Markov chain, and the number of hits and of days, after the first day."""
    h = _hits(hits)
    if h.shape[-1] < 2:
        raise ValueError(f"hits must be of 2 days or more, got {h.shape[-1]}")
    before, now = h[..., :-1], h[..., 1:]
    likelihood = torch.zeros(h.shape[:-1], dtype=h.dtype, device=h.device)
    for state in (before, 1 - before):
        k, n = (state * now).sum(-1), state.sum(-1)
        likelihood = likelihood + _log_likelihood(k, n, k / n.clamp_min(1))
    return likelihood, now.sum(-1), now.shape[-1]


def _log_likelihood(k: Tensor, n: Tensor | int, rate: Tensor | float) -> Tensor:
    """Return the log likelihood of k hits in n days; 0 log 0 is 0."""
    rate = torch.as_tensor(rate, dtype=k.dtype, device=k.device)
    return torch.xlogy(k, rate) + torch.xlogy(n - k, 1 - rate)


def _ratio(log_ratio: Tensor, freedom: int) -> LikelihoodRatio:
    """Return twice the logarithm of a likelihood ratio, and the probability that chi-squared is above it."""
    half = log_ratio.clamp_min(0)  # rounding
    return LikelihoodRatio(2 * half, torch.special.gammaincc(torch.full_like(half, freedom / 2), half))
