r"""How good predictions are, and what their uncertainty is made of.

Most scores take ``probs`` (members, n, classes), as `effens.predict` returns them, and labels ``y`` (n,), and judge the mean of
the members. They are computed in float64 and returned in the precision of ``probs``, float32 at least.

For every example, exactly:

.. math:: \underbrace{-\log \bar p_y}_{\text{nll}} =
    \underbrace{\tfrac1M \sum_m -\log p_{m,y}}_{\text{member\_nll}} -
    \underbrace{\Big(\log \bar p_y - \tfrac1M \sum_m \log p_{m,y}\Big)}_{\text{diversity\_gain} \ge 0}
"""

import numpy as np
import torch
from scipy.special import stdtr
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

TINY = 1e-38  # the smallest probability that scores tell from 0


def nll(probs: Tensor, y: Tensor) -> Tensor:
    r"""Return the negative log likelihood of the mean of the members, in nats: :math:`-\frac1n \sum_i \log \bar p_{i, y_i}`.

    Probabilities below 1e-38 count as 1e-38, so that one confident mistake costs 87 nats, not infinity.

    Args:
        probs: (members, n, classes).
        y: (n,) integers.

    Raises:
        ValueError: the shapes do not agree, labels are out of range, or probabilities do not sum to 1.
    """
    return as_given(-of_labels(probs, y).mean(0).log().mean(), probs)


def member_nll(probs: Tensor, y: Tensor) -> Tensor:
    """Return the members' own negative log likelihood, averaged over members: `nll` plus `diversity_gain`."""
    return as_given(-of_labels(probs, y).log().mean(), probs)


def diversity_gain(probs: Tensor, y: Tensor) -> Tensor:
    """Return what averaging gains over the average member, in nats, never negative: `member_nll` less `nll`."""
    p = of_labels(probs, y)
    return as_given((p.mean(0).log() - p.log().mean(0)).mean().clamp_min(0), probs)


def brier(probs: Tensor, y: Tensor) -> Tensor:
    r"""Return the Brier score of the mean of the members, from 0 to 2: :math:`\frac1n \sum_i \sum_c (\bar p_{ic} - [y_i = c])^2`."""
    check(probs, y)
    mean = probs.double().mean(0)
    hot = torch.nn.functional.one_hot(y.long(), mean.shape[1])
    return as_given((mean - hot).square().sum(1).mean(), probs)


def accuracy(probs: Tensor, y: Tensor) -> Tensor:
    """Return the share of examples whose label has the highest mean probability."""
    check(probs, y)
    return as_given((probs.double().mean(0).argmax(1) == y).double().mean(), probs)


def ece(probs: Tensor, y: Tensor, bins: int = 15, *, equal: str = "mass") -> Tensor:
    r"""Return the expected calibration error of the mean of the members: :math:`\sum_b \frac{n_b}{n} |\text{acc}_b - \text{conf}_b|`.

    It has a floor: a perfectly calibrated model does not score 0, for every bin's accuracy is noisy.

    Args:
        probs: (members, n, classes).
        y: (n,) integers.
        bins: how many bins of confidence.
        equal: ``"mass"``: every bin holds as many examples. ``"width"``: every bin is as wide (Guo et al., 2017).

    Raises:
        ValueError: ``bins`` is below 1, or ``equal`` is neither of the two.
    """
    check(probs, y)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    confidence, label = probs.double().mean(0).max(1)
    confidence, order = confidence.sort()
    surplus = (label[order] == y[order]).double() - confidence
    n = len(y)
    if equal == "mass":
        bin_of = torch.arange(n, device=y.device) * bins // n
    elif equal == "width":
        bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    else:
        raise ValueError(f"equal must be 'mass' or 'width', got {equal!r}")
    gaps = torch.zeros(bins, dtype=torch.float64, device=y.device).index_add(0, bin_of, surplus)
    return as_given(gaps.abs().sum() / n, probs)


def total_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of the mean of the members, ``(n,)``, in nats: all of the uncertainty."""
    check(probs)
    return as_given(entropy(probs.double().mean(0)), probs)


def expected_entropy(probs: Tensor) -> Tensor:
    """Return the mean of the members' entropies, ``(n,)``, in nats: the uncertainty within members."""
    check(probs)
    return as_given(entropy(probs.double()).mean(0), probs)


def mutual_information(probs: Tensor) -> Tensor:
    """Return `total_entropy` less `expected_entropy`, ``(n,)``, in nats: the uncertainty between members.

    Compare it at equal numbers of members: with M of them it is at most log M, and is biased low.
    """
    check(probs)
    p = probs.double()
    return as_given((entropy(p.mean(0)) - entropy(p).mean(0)).clamp_min(0), probs)


def disagreement(probs: Tensor) -> Tensor:
    """Return the share of pairs of members that choose different classes, ``(n,)``; 0 where there is one member."""
    check(probs)
    members = probs.shape[0]
    votes = torch.nn.functional.one_hot(probs.argmax(2), probs.shape[2]).double().sum(0)  # (n, classes)
    agreeing = (votes * (votes - 1)).sum(1)
    return as_given(1 - agreeing / (members * (members - 1)) if members > 1 else 0 * agreeing, probs)


def temperature(probs: Tensor, y: Tensor) -> float:
    r"""Return the temperature T at which `temper` gives the lowest `nll`: :math:`p_c \propto \bar p_c^{1/T}`.

    Fit it on held-out data, and after averaging the members. (Guo et al., 2017, arXiv:1706.04599)

    The loss is convex in 1/T, so its slope is bisected, between T = 0.01 and T = 100.

    Args:
        probs: (members, n, classes).
        y: (n,) integers.
    """
    check(probs, y)
    logs = floored(probs.double().mean(0)).log()
    at_label = logs.gather(1, y.long()[:, None]).squeeze(1)
    low, high = 0.01, 100.0  # of the inverse temperature
    for _ in range(60):
        middle = (low * high) ** 0.5
        expected = ((middle * logs).softmax(1) * logs).sum(1)
        if (expected - at_label).mean() > 0:  # the slope of the loss
            high = middle
        else:
            low = middle
    return 1 / (low * high) ** 0.5


def temper(probs: Tensor, temperature: float) -> Tensor:
    """Return the mean of the members at a temperature, as one member: ``(1, n, classes)``.

    Args:
        probs: (members, n, classes).
        temperature: above 0; 1 changes nothing, more is less confident.
    """
    check(probs)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return as_given((floored(probs.double().mean(0, keepdim=True)).log() / temperature).softmax(2), probs)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the probability that a score from outside is above one from inside; ties count half.

    Args:
        inside: (n,) scores of familiar examples, an entropy for instance.
        outside: (k,) scores of those to be recognized.

    Raises:
        ValueError: either is empty or holds NaN.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or len(scores) == 0 or bool(scores.isnan().any()):
            raise ValueError(f"{name} must be (n,) numbers, n >= 1, without NaN, got shape {tuple(scores.shape)}")
    order = inside.double().sort().values
    values = outside.double().contiguous()
    below = torch.searchsorted(order, values).double() + torch.searchsorted(order, values, right=True).double()
    return as_given((below / 2).mean() / len(order), inside)


def crps(distribution: Distribution, y: Tensor) -> Tensor:
    r"""Return the continuous ranked probability score of the mixture of the members, in units of y.

    .. math:: \int (F(z) - [z \ge y])^2 dz = E|X - y| - \tfrac12 E|X - X'|

    In closed form for normal members (Grimit et al., 2006); for Student's t the integral, by the trapezoidal rule.

    Args:
        distribution: of batch shape (members, n), as `effens.predict` returns it.
        y: (n,) real targets.

    Raises:
        ValueError: the shapes do not agree.
        TypeError: the distribution is neither normal nor Student's t.
    """
    shape = tuple(distribution.batch_shape)
    if len(shape) != 2 or shape[1:] != tuple(y.shape):
        raise ValueError(
            f"y must be (n,) for a distribution of batch shape (members, n), got {tuple(y.shape)} for {shape}"
        )
    match distribution:
        case Normal():
            score = crps_of_normals(distribution.loc.double(), distribution.scale.double(), y.double())
        case StudentT():
            score = crps_of_students(distribution, y)
        case _:
            raise TypeError(f"distribution must be Normal or StudentT, got {type(distribution).__name__}")
    return as_given(score.mean(), y)


def crps_of_normals(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """Return the score ``(n,)`` of equal mixtures of normals ``(members, n)``, from the means of folded normals."""
    between = torch.stack([distance(mean - m, (std.square() + s.square()).sqrt()).mean(0) for m, s in zip(mean, std)])
    return distance(mean - y, std).mean(0) - between.mean(0) / 2


def distance(mean: Tensor, std: Tensor) -> Tensor:
    """Return E|X| of normals."""
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    z = mean / std
    return std * (2 * standard.log_prob(z).exp() + z * (2 * standard.cdf(z) - 1))


def crps_of_students(distribution: StudentT, y: Tensor) -> Tensor:
    """Return the score ``(n,)`` of equal mixtures of Student's t, integrated on both sides of y.

    Points are dense around y and reach 10,000 scales beyond it and beyond the farthest member.
    """
    df, location, scale = (
        part.double().cpu().numpy()[..., None] for part in (distribution.df, distribution.loc, distribution.scale)
    )
    target = y.double().cpu().numpy()[:, None]
    reach = 1e4 * scale.max(0) + 2 * np.abs(location - target).max(0)  # (n, 1)
    steps = np.sinh(np.linspace(0, 20, 2001)) / np.sinh(20) * reach  # (n, points)
    below = stdtr(df, (target - steps - location) / scale).mean(0)  # F
    above = stdtr(df, (location - target - steps) / scale).mean(0)  # 1 - F
    score = np.trapezoid(below**2, steps) + np.trapezoid(above**2, steps)
    return torch.from_numpy(score).to(y.device)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of probabilities ``(..., classes)``, in nats; 0 log 0 is 0."""
    return -torch.xlogy(p, p).sum(-1)


def floored(p: Tensor) -> Tensor:
    """Keep probabilities away from 0, so that their logarithms are finite."""
    return p.clamp_min(TINY)


def of_labels(probs: Tensor, y: Tensor) -> Tensor:
    """Return each member's probability of each label, ``(members, n)``."""
    check(probs, y)
    labels = y.long().expand(probs.shape[:2])[..., None]
    return floored(probs.double().gather(2, labels).squeeze(2))


def as_given(score: Tensor, like: Tensor) -> Tensor:
    """Return a score in the precision of its input, float32 at least."""
    return score.to(torch.promote_types(like.dtype, torch.float32))


def check(probs: Tensor, y: Tensor | None = None) -> None:
    """Raise `ValueError` unless these are probabilities, and labels of theirs."""
    if probs.dim() != 3 or 0 in probs.shape:
        raise ValueError(f"probs must be (members, n, classes), none of them 0, got shape {tuple(probs.shape)}")
    off = (probs.double().sum(2) - 1).abs().max()
    if not off < 0.02 or bool((probs < 0).any()):  # half precision and NaN included
        raise ValueError(f"probs must be >= 0 and sum to 1 over classes, got a sum that is off by {off.item():.3g}")
    if y is None:
        return
    if y.is_floating_point() or tuple(y.shape) != tuple(probs.shape[1:2]):
        raise ValueError(f"y must be ({probs.shape[1]},) integers, got {y.dtype} of shape {tuple(y.shape)}")
    if not 0 <= (low := int(y.min())) <= (high := int(y.max())) < probs.shape[2]:
        raise ValueError(f"labels must be in 0 ... {probs.shape[2] - 1}, got {low} ... {high}")
