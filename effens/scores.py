r"""How good predictions are, and what their uncertainty is made of.

Most scores take ``probs`` (members, n, classes), as `effens.predict` returns them, and labels ``y`` (n,), and judge the
mean of the members. They are computed in float64 and returned in the precision of ``probs``, float32 at least. With
several targets an example, pixels or tokens, these are (members, n, ..., classes) and (n, ...), and a score of examples
is a score of targets. Targets that are missing, labels of -100 and numbers of NaN, do not count.

`nll`, `member_nll` and `diversity_gain` also take what is predicted for numbers: a distribution of batch shape
(members, n), with y (n,); probabilities are then densities.

For every example, exactly:

.. math:: \underbrace{-\log \bar p_y}_{\text{nll}} =
    \underbrace{\tfrac1M \sum_m -\log p_{m,y}}_{\text{member\_nll}} -
    \underbrace{\Big(\log \bar p_y - \tfrac1M \sum_m \log p_{m,y}\Big)}_{\text{diversity\_gain} \ge 0}
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT

from effens.likelihoods import MISSING, student_t

TINY = 1e-38  # the smallest probability that scores tell from 0
CLOSED = 128  # up to so many normal members CRPS is computed in closed form, whose work grows with their square
PIECES = 600  # of the integral that takes its place


def nll(prediction: Tensor | Distribution, y: Tensor) -> Tensor:
    r"""Return the negative log likelihood of the mean of the members, in nats.

    .. math:: -\frac1n \sum_i \log \bar p_{i, y_i}

    Probabilities below 1e-38 count as 1e-38, so that one confident mistake costs 87 nats, not infinity.

    Args:
        prediction: probabilities (members, n, classes), or a distribution of batch shape (members, n).
        y: (n,), integers for classes.

    Raises:
        TypeError: ``prediction`` is neither.
        ValueError: the shapes do not agree, labels are out of range, probabilities do not sum to 1, or a density is
            not finite.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])  # two members, one example
        >>> nll(probs, torch.tensor([0]))  # of the mean, 0.75
        tensor(0.2877)
    """
    return given(-log_mean(log_likelihoods(prediction, y)).mean(), prediction, y)


def member_nll(prediction: Tensor | Distribution, y: Tensor) -> Tensor:
    """Return the members' own negative log likelihood, averaged over members: `nll` plus `diversity_gain`.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
        >>> member_nll(probs, torch.tensor([0]))  # the mean of log 2 and 0
        tensor(0.3466)
    """
    return given(-log_likelihoods(prediction, y).mean(), prediction, y)


def diversity_gain(prediction: Tensor | Distribution, y: Tensor) -> Tensor:
    """Return what averaging gains over the average member, in nats, never negative: `member_nll` less `nll`.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
        >>> diversity_gain(probs, torch.tensor([0]))  # member_nll less nll
        tensor(0.0589)
    """
    logs = log_likelihoods(prediction, y)
    return given((log_mean(logs) - logs.mean(0)).mean().clamp_min(0), prediction, y)


def brier(probs: Tensor, y: Tensor) -> Tensor:
    r"""Return the Brier score of the mean of the members, from 0 to 2.

    .. math:: \frac1n \sum_i \sum_c (\bar p_{ic} - [y_i = c])^2

    Example:
        >>> brier(torch.tensor([[[0.8, 0.2]]]), torch.tensor([0]))
        tensor(0.0800)
    """
    p, labels = labeled(probs, y)
    mean = p.mean(0)
    hot = torch.nn.functional.one_hot(labels, mean.shape[1])
    return as_given((mean - hot).square().sum(1).mean(), probs)


def accuracy(probs: Tensor, y: Tensor) -> Tensor:
    """Return the share of examples whose label has the highest mean probability.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.4, 0.6]]])  # one member, two examples
        >>> accuracy(probs, torch.tensor([0, 0]))
        tensor(0.5000)
    """
    p, labels = labeled(probs, y)
    return as_given((p.mean(0).argmax(1) == labels).double().mean(), probs)


def ece(probs: Tensor, y: Tensor, bins: int = 15, *, equal: str = "mass") -> Tensor:
    r"""Return the expected calibration error of the mean of the members, over bins of their confidence.

    .. math:: \sum_b \frac{n_b}{n} |\text{accuracy}_b - \text{confidence}_b|

    It has a floor: a perfectly calibrated model does not score 0, for every bin's accuracy is noisy.

    Args:
        probs: (members, n, classes).
        y: (n,) integers.
        bins: how many bins of confidence.
        equal: ``"mass"``: every bin holds as many examples, but equal confidences share a bin, so that the order of
            the examples does not matter. ``"width"``: every bin is as wide (Guo et al., 2017).

    Raises:
        ValueError: ``bins`` is below 1, or ``equal`` is neither of the two.

    Example:
        >>> probs = torch.tensor([0.9, 0.1]).expand(1, 10, 2)  # sure to 90%, and right in half of the cases
        >>> ece(probs, torch.tensor([0, 1] * 5))
        tensor(0.4000)
    """
    p, labels = labeled(probs, y)
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    confidence, label = p.mean(0).max(1)
    surplus = (label == labels).double() - confidence
    n = len(labels)
    if equal == "mass":
        bin_of = torch.searchsorted(confidence.sort().values, confidence) * bins // n
    elif equal == "width":
        bin_of = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    else:
        raise ValueError(f"equal must be 'mass' or 'width', got {equal!r}")
    gaps = surplus.new_zeros(bins).index_add(0, bin_of, surplus)
    return as_given(gaps.abs().sum() / n, probs)


def total_entropy(probs: Tensor) -> Tensor:
    """Return the entropy of the mean of the members, ``(n,)``, in nats: all of the uncertainty.

    Example:
        >>> total_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))  # two sure members that disagree
        tensor([0.6931])
    """
    check(probs)
    return as_given(entropy(exact(probs).mean(0)), probs)


def expected_entropy(probs: Tensor) -> Tensor:
    """Return the mean of the members' entropies, ``(n,)``, in nats: the uncertainty within members.

    Example:
        >>> expected_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.])
    """
    check(probs)
    return as_given(entropy(exact(probs)).mean(0), probs)


def mutual_information(probs: Tensor) -> Tensor:
    """Return `total_entropy` less `expected_entropy`, ``(n,)``, in nats: the uncertainty between members.

    Compare it at equal numbers of members: with M of them it is at most log M, and is biased low.

    Example:
        >>> mutual_information(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931])
    """
    check(probs)
    p = exact(probs)
    return as_given((entropy(p.mean(0)) - entropy(p).mean(0)).clamp_min(0), probs)


def disagreement(probs: Tensor) -> Tensor:
    """Return the share of pairs of members that choose different classes, ``(n,)``; 0 where there is one member.

    Example:
        >>> disagreement(torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]]))  # one pair of members, and they differ
        tensor([1.])
    """
    check(probs)
    members = probs.shape[0]
    votes = exact(torch.nn.functional.one_hot(probs.argmax(-1), probs.shape[-1])).sum(0)  # (n, classes)
    agreeing = (votes * (votes - 1)).sum(-1)
    return as_given(1 - agreeing / (members * (members - 1)) if members > 1 else 0 * agreeing, probs)


def temperature(probs: Tensor, y: Tensor) -> float:
    r"""Return the temperature T at which `temper` gives the lowest `nll`: :math:`p_c \propto \bar p_c^{1/T}`.

    Fit it on held-out data, and after averaging the members. (Guo et al., 2017, arXiv:1706.04599)

    The loss is convex in 1/T: T is where its slope is 0, between T = 0.01 and T = 100. Where every temperature is as
    good, for all classes are equally probable, the answer is 1.

    Args:
        probs: (members, n, classes).
        y: (n,) integers.

    Example:
        >>> probs = torch.tensor([0.9, 0.1]).expand(1, 10, 2)
        >>> hot = temperature(probs, torch.tensor([0, 0, 0, 0, 1] * 2))  # sure to 90%, right in 80%
        >>> bool(hot > 1)
        True
    """
    p, labels = labeled(probs, y)
    logs = clip_probabilities(p.detach().mean(0)).log()
    if bool((logs == logs[:, :1]).all()):
        return 1.0
    from scipy.optimize import brentq  # here, so that `import effens` loads no scipy

    at_label = logs.gather(1, labels[:, None]).squeeze(1)

    def slope(log_inverse: float) -> float:
        """Of the loss, in the inverse temperature."""
        expected = ((math.exp(log_inverse) * logs).softmax(1) * logs).sum(1)
        return float((expected - at_label).mean())

    low, high = math.log(0.01), math.log(100)
    if slope(low) > 0 or slope(high) < 0:
        return math.exp(-low if slope(low) > 0 else -high)
    return math.exp(-brentq(slope, low, high, xtol=1e-14))


def temper(probs: Tensor, temperature: float) -> Tensor:
    """Return the mean of the members at a temperature, as one member: ``(1, n, classes)``.

    Args:
        probs: (members, n, classes).
        temperature: above 0; 1 changes nothing, more is less confident.

    Example:
        >>> temper(torch.tensor([[[0.9, 0.1]]]), 2.0)
        tensor([[[0.7500, 0.2500]]])
    """
    check(probs)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return as_given((clip_probabilities(exact(probs).mean(0, keepdim=True)).log() / temperature).softmax(-1), probs)


def auroc(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the probability that a score from outside is above one from inside; ties count half.

    Args:
        inside: (n,) scores of familiar examples, an entropy for instance.
        outside: (k,) scores of those to be recognized.

    Raises:
        ValueError: either is empty or holds NaN.

    Example:
        >>> auroc(torch.tensor([0.1, 0.2]), torch.tensor([0.15, 0.9]))
        tensor(0.7500)
    """
    check_tensors(inside=inside, outside=outside)
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.dim() != 1 or len(scores) == 0:
            raise ValueError(f"{name} must be (n,) numbers, n >= 1, got shape {tuple(scores.shape)}")
        if unknown := int(scores.isnan().sum()):
            raise ValueError(f"{name} must hold no NaN, got {unknown} among {len(scores)}")
    order = exact(inside).sort().values
    values = exact(outside).contiguous()
    below = torch.searchsorted(order, values).double() + torch.searchsorted(order, values, right=True).double()
    return as_given((below / 2).mean() / len(order), inside)


def crps(distribution: Distribution, y: Tensor) -> Tensor:
    r"""Return the continuous ranked probability score of the mixture of the members, in units of y.

    .. math:: \int (F(z) - [z \ge y])^2 dz = E|X - y| - \tfrac12 E|X - X'|

    In closed form for normal members (Grimit et al., 2006); for Student's t the integral, by Gauss-Legendre quadrature.

    Args:
        distribution: of batch shape (members, n), as `effens.predict` returns it.
        y: (n,) real targets.

    Raises:
        TypeError: the distribution is neither normal nor Student's t.
        ValueError: the shapes do not agree, a number is not finite (targets of NaN are missing, and left out), a scale
            is not above 0, or a member has at most 1 degree of freedom, so that :math:`E|X - y|` does not exist.

    Example:
        >>> said = torch.distributions.Normal(torch.zeros(1, 1), torch.ones(1, 1))
        >>> crps(said, torch.zeros(1))
        tensor(0.2337)
    """
    if not isinstance(distribution, Normal | StudentT):
        raise TypeError(f"distribution must be Normal or StudentT, got {type(distribution).__name__}")
    check_tensors(y=y)
    shape, there = tuple(distribution.batch_shape), ~y.isnan()
    if len(shape) < 2 or 0 in shape or shape[1:] != tuple(y.shape) or not bool(there.any()):
        rule = "y must be (n,) for a distribution of batch shape (members, n), and not all NaN"
        raise ValueError(f"{rule}, got {tuple(y.shape)} for {shape}")
    df = exact(distribution.df[..., there]) if isinstance(distribution, StudentT) else None
    parts = [exact(part[..., there]) for part in (distribution.loc, distribution.scale, y)]
    if unknown := sum(int((~part.isfinite()).sum()) for part in (*parts, *([] if df is None else [df]))):
        raise ValueError(f"the distribution and y must be finite, got {unknown} numbers that are not")
    check_scales(distribution, least=1)
    closed = df is None and shape[0] <= CLOSED
    score = crps_of_normals(*parts) if closed else crps_by_quadrature(df, *parts)
    return as_given(score.mean(), y)


def crps_of_normals(mean: Tensor, std: Tensor, y: Tensor) -> Tensor:
    """Return the score ``(n,)`` of equal mixtures of normals ``(members, n)``, from the means of folded normals."""
    between = [distance(mean - m, (std.square() + s.square()).sqrt()).mean(0) for m, s in zip(mean, std, strict=True)]
    return distance(mean - y, std).mean(0) - torch.stack(between).mean(0) / 2


def distance(mean: Tensor, std: Tensor) -> Tensor:
    """Return E|X| of normals."""
    z = mean / std
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return std * (2 * density + z * torch.erf(z / math.sqrt(2)))


def crps_by_quadrature(df: Tensor | None, location: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return the score ``(n,)`` of equal mixtures of Student's t, or of normals (no df), ``(members, n)``.

    The integral is cut at y and around every member at multiples of its own scale, so that each member is resolved
    wherever it is; with many members at every so many of these places, so that the work grows with their number and
    not with its square. What lies beyond 300 scales counts 6e-9 of a scale at 2 degrees of freedom, 7e-4 at 1.
    """
    parts = [part.detach().split(1000, dim=-1) for part in (location, scale, y)]
    dfs = [None] * len(parts[0]) if df is None else df.detach().split(1000, dim=-1)
    return torch.cat([integral(*part) for part in zip(dfs, *parts, strict=True)])


def integral(df: Tensor | None, location: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return what `crps_by_quadrature` does, of a number of examples that fits in memory."""
    from scipy.special import stdtr  # here, so that `import effens` loads no scipy

    reach = [1.2, 2.5, 4, 8] if df is None else [2.5, 8, 30, 300]
    multiples = torch.tensor([-r for r in reversed(reach)] + [0, *reach]).to(y)
    around = (location[..., None] + scale[..., None] * multiples).movedim(0, 1).flatten(1).sort(dim=1).values
    if around.shape[1] > PIECES:
        around = around[:, torch.linspace(0, around.shape[1] - 1, PIECES).round().long()]
    cuts = torch.cat([around, y[:, None]], dim=1).sort(dim=1).values[..., None]  # (n, pieces + 1, 1)
    nodes, weights = (torch.from_numpy(part).to(y) for part in np.polynomial.legendre.leggauss(8))
    half = cuts.diff(dim=1) / 2
    z = cuts[:, :-1] + half * (1 + nodes)  # (n, pieces, nodes)
    side = torch.where(z < y[:, None, None], 1.0, -1.0).to(y)
    tail = torch.zeros_like(z)  # F below y, 1 - F above
    for m, (mean, width) in enumerate(zip(location[..., None, None], scale[..., None, None], strict=True)):
        scaled = side * (z - mean) / width
        if df is None:
            tail += torch.special.ndtr(scaled) / len(location)
        else:
            values = stdtr(df[m, :, None, None].cpu().numpy(), scaled.cpu().numpy())
            tail += torch.from_numpy(values).to(y) / len(location)
    return (tail.square() @ weights * half[..., 0]).sum(1)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of probabilities ``(..., classes)``, in nats; 0 log 0 is 0."""
    return -torch.xlogy(p, p).sum(-1)


def clip_probabilities(p: Tensor) -> Tensor:
    """Keep probabilities away from 0, so that their logarithms are finite."""
    return p.clamp_min(TINY)


def log_likelihoods(prediction: Tensor | Distribution, y: Tensor) -> Tensor:
    """Return each member's log likelihood of each target that is there, ``(members, n)``, in float64."""
    if isinstance(prediction, Tensor):
        return of_labels(prediction, y).log()
    if not isinstance(prediction, Distribution):
        raise TypeError(f"predictions must be a tensor or a distribution, got {type(prediction).__name__}")
    shape = tuple(prediction.batch_shape)
    if len(shape) < 2 or 0 in shape or tuple(y.shape) != shape[1:] or bool(y.isnan().all()):
        raise ValueError(f"predictions must be (members, n) and y (n,), none 0, got {shape}, {tuple(y.shape)}")
    match prediction:
        case Normal():
            y, prediction = exact(y), Normal(exact(prediction.loc), exact(prediction.scale), validate_args=False)
        case StudentT():
            parts = (prediction.df, prediction.loc, prediction.scale)
            y, prediction = exact(y), student_t(*map(exact, parts))
    logs = exact(prediction.log_prob(y))[..., ~y.isnan()]
    if not bool(logs.isfinite().all()):
        raise ValueError(f"log likelihoods must be finite, got {int((~logs.isfinite()).sum())} that are not")
    return logs


def log_mean(logs: Tensor) -> Tensor:
    """Return the logarithm of the mean over members, ``(n,)``, of likelihoods given as logarithms."""
    return logs.logsumexp(0) - math.log(len(logs))


def given(score: Tensor, prediction: Tensor | Distribution, y: Tensor) -> Tensor:
    """Return a score in the precision of the prediction, or of the targets of a distribution."""
    return as_given(score, prediction if isinstance(prediction, Tensor) else y)


def of_labels(probs: Tensor, y: Tensor) -> Tensor:
    """Return each member's probability of each label, ``(members, n)``."""
    p, labels = labeled(probs, y)
    return clip_probabilities(p.gather(2, labels.expand(p.shape[:2])[..., None]).squeeze(2))


def labeled(probs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return what has a label: probabilities ``(members, n, classes)`` in float64, and labels ``(n,)``.

    Raises:
        ValueError: the shapes do not agree, labels are out of range or all missing, or these are no probabilities.
    """
    check(probs)
    check_tensors(y=y)
    if y.is_floating_point() or y.shape != probs.shape[1:-1]:
        raise ValueError(f"y must be {tuple(probs.shape[1:-1])} integers, got {y.dtype} of shape {tuple(y.shape)}")
    p = exact(probs).flatten(1, -2)
    labels = y.flatten().long().to(p.device)
    there = labels != MISSING
    if not bool(there.all()):
        p, labels = p[:, there], labels[there]
    if not len(labels):
        raise ValueError("y must hold at least one label, got none that is not missing")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= p.shape[2]:
        raise ValueError(f"labels must be in 0 ... {p.shape[2] - 1}, got {low} ... {high}")
    return p, labels


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device knows no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def as_given(score: Tensor, like: Tensor) -> Tensor:
    """Return a score in the precision of its input, float32 at least, on its device."""
    return score.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)


def check_tensors(**values: Tensor) -> None:
    """Raise `TypeError` unless all values are tensors."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            rule = f"{name} must be a tensor, which torch.as_tensor makes of an array or a list"
            raise TypeError(f"{rule}, got {type(value).__name__}")


def check_scales(distribution: Normal | StudentT, least: float = 0) -> None:
    """Raise `ValueError` unless scales are above 0, and degrees of freedom above ``least``."""
    named = {"scale": (distribution.scale, 0.0)}
    if isinstance(distribution, StudentT):
        named["degrees of freedom"] = (distribution.df, least)
    for name, (part, low) in named.items():
        if not bool((part > low).all()):
            raise ValueError(f"{name} must be > {low:g}, got {part.min().item():.3g}")


def check(probs: Tensor) -> None:
    """Raise `ValueError` unless these are probabilities."""
    check_tensors(probs=probs)
    if probs.dim() < 3 or 0 in probs.shape:
        raise ValueError(f"probs must be (members, n, classes), none of them 0, got shape {tuple(probs.shape)}")
    if not (least := probs.min().item()) >= 0:  # NaN included
        raise ValueError(f"probs must be >= 0, got {least:.3g}")
    off = (exact(probs).sum(-1) - 1).abs().max().item()
    if not off < 0.02:  # half precision passes
        raise ValueError(f"probs must sum to 1 over classes, got a sum that is off by {off:.3g}")
