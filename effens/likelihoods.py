"""What a network's outputs mean: a loss to train on, and a predictive distribution to read."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, MixtureSameFamily, Normal
from torch.distributions import StudentT as StudentTDistribution
from torch.nn import functional as F

MISSING = -100  # the class of a target that is not there, as of PyTorch's losses


class Likelihood:
    """Base class: a likelihood reads outputs ``(members, batch, outputs)`` for targets ``(batch,)``, one each.

    Where an example has several targets, such as the pixels of an image, the tokens of a text or several quantities,
    targets are ``(batch, *positions)`` and outputs ``(members, batch, *positions, outputs)``. Targets may also have the
    members in front.

    Example:
        >>> class Poisson(Likelihood):
        ...     outputs = 1
        ...     def nll(self, outputs, y):
        ...         return torch.nn.functional.poisson_nll_loss(outputs[..., 0], y, reduction="none")
        ...     def predict(self, outputs):
        ...         return outputs[..., 0].exp()
        >>> Poisson().nll(torch.zeros(2, 5, 1), torch.ones(2, 5)).shape
        torch.Size([2, 5])
    """

    outputs: int | None = None  # how many outputs the network must have; None: any

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the negative log likelihood of each target, ``(members, batch, *positions)``, in nats."""
        raise NotImplementedError(f"a likelihood must override nll, got none in {type(self).__name__}")

    def predict(self, outputs: Tensor) -> Tensor | Distribution:
        """Return what `effens.predict` answers: probabilities, or a distribution, ``(members, batch, ...)``."""
        raise NotImplementedError(f"a likelihood must override predict, got none in {type(self).__name__}")

    def check(self, outputs: Tensor, y: Tensor) -> None:
        """Raise `ValueError` unless these targets can be read with these outputs; looks at every target's value."""
        gaps = self.missing(y)
        wrong = ~y.isfinite() if gaps is None else ~y.isfinite() & ~gaps
        if bool(wrong.any()):
            rule = "targets must be finite" + ("" if gaps is None else ", or NaN where they are missing")
            raise ValueError(f"{rule}, got {int(wrong.sum())} that are not")

    def missing(self, y: Tensor) -> Tensor | None:
        """Return which targets are not there, bool of their shape; None, the default: this likelihood knows no gaps."""
        return None


def check_outputs(likelihood: Likelihood, outputs: Tensor) -> None:
    """Raise `ValueError` unless the network has as many outputs as the likelihood reads."""
    if outputs.shape[-1] != likelihood.outputs:
        raise ValueError(f"{type(likelihood).__name__} needs {likelihood.outputs} outputs, got {outputs.shape[-1]}")


def check_targets(outputs: Tensor, y: Tensor, hint: str = "") -> None:
    """Raise `ValueError` unless there is one target per example: a column of targets would broadcast to a square."""
    if y.shape not in (outputs.shape[1:-1], outputs.shape[:-1]):
        where = f", pixel or token{hint}" if outputs.dim() > 3 else ""
        rule = f"targets must have shape {tuple(outputs.shape[1:-1])}, one per example{where}"
        raise ValueError(f"{rule}, got {tuple(y.shape)}")


def check_integers(y: Tensor) -> None:
    """Raise `ValueError` unless labels are integers: anything else would be cut off."""
    if y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels must be integers, got {y.dtype}: numbers want another likelihood, such as Gaussian()")


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""Classes: outputs are logits ``(members, batch, classes)``, targets are integers ``0 ... classes - 1``.

    .. math:: -\log p(y) = -z_y + \log \sum_c e^{z_c}

    A target of -100 is missing: losses and scores are means over what is there.

    Args:
        axis: of the classes in what the network returns: -1, the last; or 1, as in images
            ``(batch, classes, height, width)`` with targets ``(batch, height, width)``. Predictions always have them
            last: ``(members, batch, height, width, classes)``.

    Example:
        >>> Categorical().nll(torch.zeros(4, 2), torch.tensor([0, 1, 1, 0]))
        tensor([0.6931, 0.6931, 0.6931, 0.6931])
    """

    axis: int = -1

    def __post_init__(self) -> None:
        if self.axis == 0:
            raise ValueError("axis must be one of the classes, got 0, which is the batch's")

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of each target, ``(members, batch, *positions)``, in nats."""
        logits = self.classes_last(outputs)
        check_targets(logits, y, " (Categorical(axis=1): classes in front of the pixels)")
        check_integers(y)
        labels = y.long().expand(logits.shape[:-1]).flatten()
        return F.cross_entropy(logits.flatten(0, -2), labels, reduction="none").view(logits.shape[:-1])

    def missing(self, y: Tensor) -> Tensor:
        """Return which labels are -100."""
        return y == MISSING

    def classes_last(self, outputs: Tensor) -> Tensor:
        """Return outputs ``(members, batch, ...)`` with the classes as their last axis."""
        return outputs if self.axis == -1 else outputs.movedim(self.axis + (self.axis > 0), -1)

    def check(self, outputs: Tensor, y: Tensor) -> None:
        """Raise `ValueError` unless all labels are integers that name a class, or -100."""
        check_integers(y)
        there, classes = y[~self.missing(y)], self.classes_last(outputs).shape[-1]
        low, high = (int(there.min()), int(there.max())) if there.numel() else (0, 0)
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in 0 ... {classes - 1}, got {low} ... {high}")

    def predict(self, outputs: Tensor) -> Tensor:
        """Return probabilities ``(members, batch, *positions, classes)``."""
        return self.classes_last(outputs).softmax(-1)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Real targets with noise that depends on x: outputs ``(members, batch, 2)`` are the mean and the raw variance.

    .. math:: \sigma^2 = \mathrm{softplus}(\cdot) + 10^{-6}, \qquad
        -\log p(y) = \tfrac12 \log 2 \pi \sigma^2 + \frac{(y - \mu)^2}{2 \sigma^2}

    Lakshminarayanan et al. (2017), section 2.4, with the constant kept, so that it is a density's. A target of NaN is
    missing.

    Example:
        >>> Gaussian().predict(torch.zeros(3, 10, 2))  # three members, ten examples
        Normal(loc: torch.Size([3, 10]), scale: torch.Size([3, 10]))
    """

    outputs = 2

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the negative log density of each example, ``(members, batch, *positions)``, in nats."""
        check_targets(outputs, y)
        log_density: Tensor = self.predict(outputs).log_prob(y)
        return -log_density

    def missing(self, y: Tensor) -> Tensor:
        """Return which targets are NaN."""
        return y.isnan()

    def predict(self, outputs: Tensor) -> Normal:
        """Return a `torch.distributions.Normal` of batch shape ``(members, batch, *positions)``."""
        check_outputs(self, outputs)
        return Normal(outputs[..., 0], (F.softplus(outputs[..., 1]) + 1e-6).sqrt(), validate_args=False)


@dataclass(frozen=True)
class StudentT(Likelihood):
    r"""Real targets with fat tails: outputs ``(members, batch, 3)``, the location, raw scale and degrees of freedom.

    .. math:: \sigma = \mathrm{softplus}(\cdot) + 10^{-3}, \qquad \nu = 2 + 10^{-2} + \mathrm{softplus}(\cdot)

    Degrees of freedom above 2 keep the variance finite. A target of NaN is missing.

    Example:
        >>> StudentT().predict(torch.zeros(3, 10, 3)).batch_shape
        torch.Size([3, 10])
    """

    outputs = 3

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the negative log density of each example, ``(members, batch, *positions)``, in nats."""
        check_outputs(self, outputs)
        check_targets(outputs, y)
        return student_nll(*self.parameters(outputs), y)

    def missing(self, y: Tensor) -> Tensor:
        """Return which targets are NaN."""
        return y.isnan()

    def predict(self, outputs: Tensor) -> StudentTDistribution:
        """Return a `torch.distributions.StudentT` of batch shape ``(members, batch, *positions)``."""
        check_outputs(self, outputs)
        return student_t(*self.parameters(outputs))

    def parameters(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return degrees of freedom, location and scale, each ``(members, batch, *positions)``."""
        location, scale, df = outputs.unbind(-1)
        return 2.01 + F.softplus(df), location, F.softplus(scale) + 1e-3


def student_t(df: Tensor, location: Tensor, scale: Tensor) -> StudentTDistribution:
    """Return Student's t whose log densities keep their digits at many degrees of freedom, as PyTorch's do not."""
    distribution = StudentTDistribution(df, location, scale, validate_args=False)
    vars(distribution)["log_prob"] = partial(student_log_prob, df, location, scale)  # no subclass: type() tells kinds
    return distribution


def student_log_prob(df: Tensor, location: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """Return Student's log density."""
    return -student_nll(df, location, scale, value)


def student_nll(df: Tensor, location: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return Student's negative log density."""
    z = (y - location) / scale
    normalizer = log_gamma_ratio(df / 2) - 0.5 * (math.pi * df).log() - scale.log()
    return (df + 1) / 2 * torch.log1p(z.square() / df) - normalizer


def log_gamma_ratio(x: Tensor) -> Tensor:
    """Return log Γ(x + 1/2) - log Γ(x), by its series where x is large: a difference would lose its digits there."""
    large = x.clamp_min(30)
    series = 0.5 * large.log() - 1 / (8 * large) + 1 / (192 * large**3) - 1 / (640 * large**5)
    return torch.where(x < 30, torch.lgamma(x.clamp_max(30) + 0.5) - torch.lgamma(x.clamp_max(30)), series)


def mixture(distribution: Distribution) -> MixtureSameFamily:
    """Return the equal mixture of the members: batch shape ``(members, batch, ...)`` to ``(batch, ...)``.

    Args:
        distribution: what `effens.predict` returns with `Gaussian` or `StudentT`.

    Raises:
        TypeError: the distribution is neither normal nor Student's t.
        ValueError: its batch shape is not ``(members, batch, ...)``.

    Example:
        >>> said = torch.distributions.Normal(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))  # two members
        >>> mixture(said).mean, mixture(said).variance  # within 1, between 1
        (tensor([0.]), tensor([2.]))
    """
    if len(distribution.batch_shape) < 2:
        raise ValueError(f"batch shape must be (members, batch) or longer, got {tuple(distribution.batch_shape)}")

    def last(part: Tensor) -> Tensor:
        return part.movedim(0, -1)

    match distribution:
        case Normal():
            component: Distribution = Normal(last(distribution.loc), last(distribution.scale), validate_args=False)
        case StudentTDistribution():
            component = student_t(last(distribution.df), last(distribution.loc), last(distribution.scale))
        case _:
            raise TypeError(f"distribution must be Normal or StudentT, got {type(distribution).__name__}")
    weights = torch.zeros_like(last(distribution.loc))  # equal logits: equal weights
    return MixtureSameFamily(
        CategoricalDistribution(logits=weights, validate_args=False), component, validate_args=False
    )
