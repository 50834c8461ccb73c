r"""Student's t that leans to one side, and the head of a network that says it.

.. math:: f(z) = b c \left(1 + \frac{w^2}{\nu - 2}\right)^{-(\nu + 1) / 2}, \qquad
    w = \frac{b z + a}{1 \mp \lambda} \text{ where } b z + a \lessgtr 0

with mean 0 and variance 1 for :math:`a = 4 \lambda c (\nu - 2) / (\nu - 1)`, :math:`b^2 = 1 + 3 \lambda^2 - a^2` and
:math:`c = \Gamma(\frac{\nu + 1}2) / (\sqrt{\pi (\nu - 2)} \, \Gamma(\frac\nu2))`. Losses are the longer tail where
:math:`\lambda < 0`. Hansen (1994), "Autoregressive conditional density estimation", doi:10.2307/2527081.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional as F

from effens.likelihoods import Likelihood, check_outputs, check_targets, log_gamma_ratio

Array = NDArray[np.float64]


class SkewT(Distribution):
    """A skewed Student's t.

    Args:
        df: degrees of freedom, above 2.
        skew: in (-1, 1); 0: symmetric.
        loc: the mean.
        scale: the standard deviation.
    """

    has_rsample = False
    df: Tensor
    skew: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, df: Tensor, skew: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.df, self.skew, self.loc, self.scale = torch.broadcast_tensors(df, skew, loc, scale)
        super().__init__(self.loc.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """The variance."""
        square: Tensor = self.scale.square()
        return square

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, differentiable."""
        log_c = log_gamma_ratio(self.df / 2) - 0.5 * (math.pi * (self.df - 2)).log()
        a = 4 * self.skew * log_c.exp() * (self.df - 2) / (self.df - 1)
        b = (1 + 3 * self.skew.square() - a.square()).sqrt()
        bend = b * (value - self.loc) / self.scale + a
        w = bend / (1 + self.skew * bend.detach().sign())
        fall: Tensor = (self.df + 1) / 2 * torch.log1p(w.square() / (self.df - 2))
        return b.log() + log_c - self.scale.log() - fall


def constants(df: Array, skew: Array) -> tuple[Array, Array]:
    """Return a and b."""
    c = np.exp(log_gamma_ratio(torch.from_numpy(df / 2)).numpy()) / np.sqrt(math.pi * (df - 2))
    a = 4 * skew * c * (df - 2) / (df - 1)
    return a, np.sqrt(1 + 3 * skew**2 - a**2)


def cdf(z: Array, df: Array, skew: Array) -> Array:
    """Return the distribution function at z, of mean 0 and variance 1."""
    a, b = constants(df, skew)
    bend = b * z + a
    side = 1 + skew * np.sign(bend)
    below = side * stdtr(df, bend / side * np.sqrt(df / (df - 2)))  # Student's t has the variance df / (df - 2)
    values: Array = np.where(bend < 0, below, below - skew)
    return values


def icdf(p: Array, df: Array, skew: Array) -> Array:
    """Return the quantile of mean 0 and variance 1."""
    a, b = constants(df, skew)
    left = p < (1 - skew) / 2
    side = np.where(left, 1 - skew, 1 + skew)
    w = stdtrit(df, np.where(left, p, p + skew) / side) * np.sqrt((df - 2) / df)
    values: Array = (side * w - a) / b
    return values


def below(z: Array, df: Array, skew: Array) -> Array:
    """Return the mean of what is below z, times its probability: E[Z; Z <= z]."""
    a, b = constants(df, skew)
    bend = b * z + a
    side = 1 + skew * np.sign(bend)
    x = bend / side * np.sqrt(df / (df - 2))  # Student's t with its own scale
    density = np.exp(log_gamma_ratio(torch.from_numpy(df / 2)).numpy()) / np.sqrt(df * math.pi)
    density = density * np.exp(-(df + 1) / 2 * np.log1p(x**2 / df))
    partial = -density * (df + x**2) / (df - 1) * np.sqrt((df - 2) / df)  # E[W; W <= w], W of variance 1
    beyond = np.where(bend < 0, stdtr(df, x), stdtr(df, -x))
    tail = side / b * (side * partial * np.where(bend < 0, 1, -1) - a * beyond)  # left of z, or right of it
    values: Array = np.where(bend < 0, tail, -tail)  # the whole mean is 0
    return values


@dataclass(frozen=True)
class SkewedT(Likelihood):
    r"""Real targets with fat tails of which one may be longer: outputs ``(members, batch, 4)``.

    .. math:: \sigma = \mathrm{softplus}(\cdot) + 10^{-3}, \qquad \nu = 2.01 + \mathrm{softplus}(\cdot), \qquad
        \lambda = \tfrac12 \tanh(\cdot)
    """

    outputs = 4

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the negative log density of each example, ``(members, batch)``, in nats."""
        check_targets(outputs, y)
        return -self.predict(outputs).log_prob(y)

    def predict(self, outputs: Tensor) -> SkewT:
        """Return a `SkewT` of batch shape ``(members, batch)``."""
        check_outputs(self, outputs)
        location, scale, df, skew = outputs.unbind(-1)
        return SkewT(2.01 + F.softplus(df), 0.5 * skew.tanh(), location, F.softplus(scale) + 1e-3)
