"""Gradient boosting, the rival of every network on a table: trees for the mean, and trees for the spread around it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import optimize, stats
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import cross_val_predict
from torch import Tensor

from effens.ensembles.base import Ensemble
from effens.likelihoods import Gaussian, Likelihood, StudentT

FOLDS = 4
Numbers = NDArray[np.floating[Any]]


class GradientBoosting(Ensemble):
    r"""Trees, boosted twice: for the mean of y, and for the logarithm of the absolute residual.

    .. math:: y = \mu(x) + c \, e^{g(x)} \varepsilon

    where :math:`\varepsilon` is normal or Student's t. The residuals that g learns from are of trees that did not see
    them, in four folds; c and the degrees of freedom fit them best. It answers with one member, and with what a network
    of the same likelihood would return, so that predictions are made and scored alike.

    Args:
        likelihood: `Gaussian` or `StudentT`.
        lr: what each tree adds is multiplied by.
        trees: how many.
        leaves: of a tree, at most.
        l2: the penalty on the leaves' values.
        one_hot: how many columns each of the last categories has; trees get one column of codes in their place.
        seed: of the columns that each split may look at, half of them.

    Raises:
        TypeError: the likelihood is another.

    Shape:
        - ``ensemble(x)``: ``(batch, features)`` to ``(1, batch, outputs)``
    """

    def __init__(
        self,
        likelihood: Likelihood,
        *,
        lr: float,
        trees: int,
        leaves: int,
        l2: float = 0.0,
        one_hot: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(1)
        if not isinstance(likelihood, Gaussian | StudentT):
            raise TypeError(f"likelihood must be Gaussian or StudentT, got {type(likelihood).__name__}")
        self.likelihood, self.one_hot = likelihood, one_hot
        options = {"learning_rate": lr, "max_iter": trees, "max_leaf_nodes": leaves, "l2_regularization": l2}
        self.mean, self.spread = (
            HistGradientBoostingRegressor(**options, max_features=0.5, early_stopping=False, random_state=seed)
            for _ in range(2)
        )
        self.factor, self.df = 1.0, math.inf

    def fit(self, x: Tensor, y: Tensor) -> "GradientBoosting":
        """Train on rows ``(n, features)`` and targets ``(n,)``, and return itself."""
        inputs, targets = self.columns(x), y.numpy()
        last = [inputs.shape[1] - 1 - i for i in range(len(self.one_hot))]
        for trees in (self.mean, self.spread):
            trees.set_params(categorical_features=last or None)
        residuals = targets - cross_val_predict(self.mean, inputs, targets, cv=FOLDS)
        logs = np.log(np.abs(residuals) + 1e-6)
        relative = residuals / np.exp(cross_val_predict(self.spread, inputs, logs, cv=FOLDS))
        self.mean.fit(inputs, targets)
        self.spread.fit(inputs, logs)
        if isinstance(self.likelihood, Gaussian):
            self.factor = float(np.sqrt(np.mean(relative**2)))
        else:
            self.factor, self.df = fit_t(relative)
        return self

    def columns(self, x: Tensor) -> Numbers:
        """Return the rows as trees get them; a category that is none of the known ones is missing."""
        numbers, *groups = x.cpu().double().split([x.shape[1] - sum(self.one_hot), *self.one_hot], dim=1)
        codes = [torch.where(group.any(1), group.argmax(1).double(), math.nan) for group in groups]
        found: Numbers = torch.cat([numbers, *(code[:, None] for code in codes)], 1).numpy()
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return what a network would return for these predictions."""
        inputs = self.columns(x)
        loc = torch.from_numpy(self.mean.predict(inputs))
        scale = torch.from_numpy(self.factor * np.exp(self.spread.predict(inputs)))
        if isinstance(self.likelihood, Gaussian):
            outputs = [loc, raw(scale.square() - 1e-6)]
        else:
            outputs = [loc, raw(scale - 1e-3), raw(torch.full_like(loc, self.df - 2.01))]
        return torch.stack(outputs, -1)[None].float().to(x.device)


def raw(positive: Tensor) -> Tensor:
    """Return what softplus makes these numbers of."""
    positive = positive.clamp_min(1e-6)
    return positive + torch.log(-torch.expm1(-positive))


def fit_t(residuals: Numbers) -> tuple[float, float]:
    """Return the scale and the degrees of freedom, 2.1 or more, of Student's t that fit residuals best."""

    def loss(logs: Numbers) -> float:
        return -float(stats.t.logpdf(residuals, 2.1 + math.exp(logs[1]), scale=math.exp(logs[0])).mean())

    found = optimize.minimize(loss, [math.log(residuals.std()), math.log(5.0)], method="Nelder-Mead")
    return math.exp(found.x[0]), 2.1 + math.exp(found.x[1])
