"""Predictions of members: what is kept of them, and how good they are.

A prediction is a tensor of probabilities ``(members, n, classes)``, or a normal or Student's t distribution of batch
shape ``(members, n)``.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor
from torch.distributions import Normal
from torch.distributions import StudentT as StudentTDistribution

from effens import scores
from effens.likelihoods import Categorical, Likelihood, StudentT
from effens.scores import log_likelihoods as log_likelihoods
from effens.scores import log_mean as log_mean
from effens_book.finance import risk

PARAMETERS = {Normal: ("loc", "scale"), StudentTDistribution: ("df", "loc", "scale")}
Prediction = Tensor | Normal | StudentTDistribution


def to_half(prediction: Prediction) -> NDArray[np.float16]:
    """Return half precision: log probabilities (members, n, classes), or parameters (members, n, 2 or 3).

    Degrees of freedom above 1000 are kept as 1000: that is a normal distribution.

    Raises:
        FloatingPointError: the weights overflowed, so that a prediction is not finite.
    """
    if isinstance(prediction, Tensor):
        numbers = prediction.clamp_min(1e-30).log().half()  # the log keeps what is near 0 and near 1
    else:
        fields = {name: getattr(prediction, name) for name in PARAMETERS[type(prediction)]}
        if "df" in fields:
            fields["df"] = fields["df"].clamp_max(1000)
        numbers = torch.stack(list(fields.values()), -1).half()
    if lost := int((~numbers.isfinite()).sum()):
        raise FloatingPointError(f"predictions must be finite in half precision, got {lost} numbers that are not")
    return numbers.numpy()


def from_half(numbers: Tensor, likelihood: Likelihood) -> Any:
    """Return the prediction that `to_half` made numbers of."""
    if isinstance(likelihood, Categorical):
        return numbers.softmax(-1)
    return distribution(StudentTDistribution if isinstance(likelihood, StudentT) else Normal, numbers.unbind(-1))


def distribution(kind: Any, parts: Iterable[Tensor]) -> Any:
    """Return a distribution of these parameters, whose values were looked at when they were packed."""
    return kind(*parts, validate_args=False)


def parameters(prediction: Normal | StudentTDistribution) -> list[Tensor]:
    """Return a distribution's parameters, in the order in which its class takes them."""
    return [getattr(prediction, name) for name in PARAMETERS[type(prediction)]]


def to_double(prediction: Normal | StudentTDistribution) -> list[Tensor]:
    """Return them in float64."""
    return [part.double() for part in parameters(prediction)]


def count_members(prediction: Any) -> int:
    """Return how many members a prediction has."""
    return len(prediction if isinstance(prediction, Tensor) else prediction.loc)


def take_members(prediction: Any, index: Tensor) -> Any:
    """Return the prediction of some of the members."""
    if isinstance(prediction, Tensor):
        return prediction[index]
    return distribution(type(prediction), (part[index] for part in parameters(prediction)))


def groups(prediction: Any, members: int) -> list[Any]:
    """Divide a pool into disjoint groups of ``members``, and drop a remainder; a pool that is smaller is one group."""
    size = count_members(prediction)
    parts = torch.arange(size).split(members)[: max(1, size // members)]
    return [take_members(prediction, part) for part in parts]


def score(prediction: Prediction, y: Tensor) -> dict[str, float]:
    """Return the scores of a prediction of the members.

    In nats: nll, member_nll, diversity_gain. In percent: accuracy, ece, disagreement, coverage of the 95% band. In
    units of y: crps (of normal members), width of that band, spread of the members' means.
    """
    logs = log_likelihoods(prediction, y)
    result = {"nll": -log_mean(logs).mean(), "member_nll": -logs.mean()}
    result["diversity_gain"] = result["member_nll"] - result["nll"]
    if not isinstance(prediction, Tensor):
        if isinstance(prediction, Normal):
            total = (prediction.variance.mean(0) + prediction.loc.var(0, correction=0)).sqrt()
            low, high = (prediction.loc.mean(0) + side * 1.96 * total for side in (-1, 1))
            result["crps"] = scores.crps(prediction, y)
        else:
            low, high = (risk.quantile(prediction, p) for p in (0.025, 0.975))
        result["coverage"] = 100 * ((low <= y) & (y <= high)).float().mean()
        result["width"] = (high - low).mean()
        result["spread"] = prediction.loc.std(0, correction=0).mean()
    else:
        result["accuracy"] = 100 * scores.accuracy(prediction, y)
        result["brier"] = scores.brier(prediction, y)
        result["ece"] = 100 * scores.ece(prediction, y)
        result["disagreement"] = 100 * scores.disagreement(prediction).mean()
    return {key: float(value) for key, value in result.items()}


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


def divergence(truth: Normal, prediction: Normal) -> float:
    r"""Return the Kullback-Leibler divergence of the members' mixture q from the truth p, in nats, over the inputs.

    .. math:: \frac1n \sum_i \int p(y \mid x_i) \log \frac{p(y \mid x_i)}{q(y \mid x_i)} dy

    by Gauss-Hermite quadrature with 64 nodes.
    """
    nodes = torch.from_numpy(NODES)[:, None] * truth.scale.double() + truth.loc.double()  # (64, n)
    weights = torch.from_numpy(WEIGHTS / WEIGHTS.sum())
    members = Normal(prediction.loc.double()[:, None], prediction.scale.double()[:, None])  # (members, 1, n)
    gap = truth.log_prob(nodes) - log_mean(members.log_prob(nodes))
    return float((weights @ gap).mean())


def with_scale(prediction: StudentTDistribution, factor: float) -> StudentTDistribution:
    """Return the same with every scale multiplied."""
    return StudentTDistribution(prediction.df, prediction.loc, prediction.scale * factor, validate_args=False)


def fit_scale(prediction: StudentTDistribution, y: Tensor) -> float:
    """Return the factor of the scales that fits best."""

    def loss(log_factor: float) -> float:
        return -float(log_mean(log_likelihoods(with_scale(prediction, math.exp(log_factor)), y)).mean())

    return math.exp(optimize.minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)


def tempered(prediction: Any, val: Any, y: Tensor) -> Any:
    """Return a prediction whose confidence one number sets, the one that fits best the validation data."""
    if isinstance(prediction, Normal):  # the scale of the standard deviation that fits best, in closed form
        factor = ((y - val.loc) / val.scale).square().mean().sqrt()
        return Normal(prediction.loc, prediction.scale * factor, validate_args=False)
    if isinstance(prediction, StudentTDistribution):
        return with_scale(prediction, fit_scale(val, y))
    return scores.temper(prediction, scores.temperature(val, y))
