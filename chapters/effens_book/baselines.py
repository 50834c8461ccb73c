"""Baselines that an ensemble must beat: they cost one training, and answer as ensembles do, with all their members."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from effens.ensembles.base import Ensemble, MakeNet
from effens.ensembles.one import OneNetwork
from effens.inputs import Inputs, call, count_rows, each, logits_of
from effens.likelihoods import Categorical, Gaussian, Likelihood, StudentT

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class MCDropout(OneNetwork):
    """One network whose dropout stays on when it is asked: each member is the network under masks of its own.

    Gal and Ghahramani (2016), "Dropout as a Bayesian approximation", arXiv:1506.02142. Masks are drawn anew at each
    call and for each row, from PyTorch's own generator, so that no member can be taken out as a plain network.

    Args:
        make_net: () -> nn.Module, a fresh network with dropout.
        members: how many times it is asked.

    Raises:
        ValueError: ``members`` is below 1, or the network has no dropout.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
    """

    def __init__(self, make_net: MakeNet, members: int = 30) -> None:
        super().__init__(make_net, members)
        if not any(isinstance(layer, DROPOUTS) and layer.p > 0 for layer in self.network.modules()):
            raise ValueError(f"the network must have dropout, got {self.network}")

    def extra_repr(self) -> str:
        """Show how many members there are."""
        return f"members={self.members}"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network, but for dropout, which stays on."""
        super().train(mode)
        for layer in self.network.modules():
            if isinstance(layer, DROPOUTS):
                layer.train()
        return self

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every member: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        rows = logits_of(call(self.network, each(lambda part: torch.cat([part] * self.members), x)))
        return torch.unflatten(rows, 0, (self.members, count_rows(x)))

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Raise: there is nothing that answers alike twice."""
        raise ValueError("members must be the same at each call, got those of MCDropout, which are drawn anew")

    def member(self, m: int) -> nn.Module:
        """Raise `NotImplementedError`: there is no member ``m`` that would answer the same again."""
        raise NotImplementedError("a member must answer the same at each call, got masks that are drawn anew")


class LastLayerLaplace(OneNetwork):
    r"""One network, and samples of a Gaussian around the weights of its last layer, fitted after training.

    .. math:: \Sigma^{-1} = \sum_i (\phi_i \phi_i^\top) \otimes F_i + \tau I

    over all training inputs, with the features \phi in front of the last layer (and 1 for its bias), and F the Fisher
    information of the likelihood in the outputs, for which no labels are needed. Daxberger et al. (2021), "Laplace
    redux: effortless Bayesian deep learning", arXiv:2106.14806.

    Args:
        make_net: () -> nn.Module, whose last layer is an `nn.Linear` that gives the outputs.
        members: how many samples.
        precision: tau, of the prior on each weight.
        likelihood: what the outputs mean: `Categorical` (by default), `Gaussian` or `StudentT`.
        seed: of the samples.

    Raises:
        ValueError: ``members`` is below 1, ``precision`` is not positive, or the network does not end in a linear layer
            with a bias: what that gives are not the outputs.
        TypeError: the Fisher information of this likelihood is not known.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
    """

    samples: Tensor

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 30,
        precision: float = 1.0,
        *,
        likelihood: Likelihood | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(make_net, members)
        if not 0 < precision < math.inf:
            raise ValueError(f"precision must be > 0 and finite, got {precision}")
        self.precision, self.seed = precision, seed
        self.fisher = fisher_of(Categorical() if likelihood is None else likelihood)
        last = self.last(self.network)
        self.register_buffer("samples", last.weight.new_zeros(members, last.out_features, last.in_features + 1))

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every sample: ``(batch, ...)`` to ``(members, batch, outputs)``."""
        self.check_ready()
        return torch.einsum("bf,mof->mbo", self.phi(self.features(x)), self.samples)

    def member(self, m: int) -> nn.Module:
        """Return a copy of the network with sample ``m`` as its last layer, equal to ``ensemble(x)[m]``."""
        self.check_ready()
        weights = self.samples[self.check_member(m)].detach()
        network = copy.deepcopy(self.network)
        last = self.last(network)
        last.weight.data.copy_(weights[:, :-1])
        last.bias.data.copy_(weights[:, -1])
        return network

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return the network with all samples of its last layer."""
        self.check_ready()
        return self, [1.0] * self.members

    @staticmethod
    def last(network: nn.Module) -> nn.Linear:
        """Return a network's last layer."""
        layer = [module for module in network.modules() if not list(module.children())][-1]
        if not isinstance(layer, nn.Linear) or layer.bias is None:
            raise ValueError(f"the network must end in nn.Linear with a bias, got {layer}")
        return layer

    def phi(self, x: Inputs) -> Tensor:
        """Return what the last layer reads, and 1: ``(batch, features + 1)``."""
        read: list[Tensor] = []
        last = self.last(self.network)
        with last.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])):
            outputs = logits_of(call(self.network, each(Tensor.clone, x)))  # which may change it in place
        if len(read) != 1 or not torch.equal(last(read[0]), outputs):
            raise ValueError(f"the outputs must be what the last layer gives, got others of {last}")
        return torch.cat([read[0], read[0].new_ones(len(read[0]), 1)], 1)

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"precision={self.precision}, seed={self.seed}, fisher={self.fisher.__name__}"

    @torch.no_grad()
    def finish(self, batches: Iterable[Inputs]) -> None:
        """Fit the Gaussian and draw the members, the same for the same seed.

        Args:
            batches: training inputs ``(batch, ...)``.
        """
        last = self.last(self.network)
        mean = torch.cat([last.weight, last.bias[:, None]], 1).double()  # (outputs, features + 1)
        information = self.precision * torch.eye(mean.numel(), dtype=mean.dtype, device=mean.device)
        information = information.view(*mean.shape, *mean.shape)
        for x in batches:
            phi = self.phi(self.features(x)).double()
            fisher = self.fisher(phi @ mean.T)  # (batch, outputs, outputs)
            for i in range(len(mean)):  # an output at a time: all at once would take outputs times the memory
                information[i] += torch.einsum("bj,bf,bg->fjg", fisher[:, i], phi, phi)
        factor = torch.linalg.cholesky(information.view(mean.numel(), mean.numel()))
        noise = torch.randn(mean.numel(), self.members, generator=torch.Generator().manual_seed(self.seed))
        shift = torch.linalg.solve_triangular(factor.mT, noise.to(mean), upper=True)  # of covariance information^-1
        self.samples.copy_(mean + shift.mT.reshape(self.members, *mean.shape))
        self.ready = self.planned


def fisher_of(likelihood: Likelihood) -> Callable[[Tensor], Tensor]:
    """Return the Fisher information of a likelihood: outputs ``(batch, outputs)`` to ``(batch, outputs, outputs)``."""
    if isinstance(likelihood, Categorical):
        return categorical_fisher
    if isinstance(likelihood, Gaussian):
        return gaussian_fisher
    if isinstance(likelihood, StudentT):
        return student_fisher
    raise TypeError(f"likelihood must be Categorical, Gaussian or StudentT, got {type(likelihood).__name__}")


def categorical_fisher(logits: Tensor) -> Tensor:
    """Return diag(p) - p p^T."""
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def gaussian_fisher(outputs: Tensor) -> Tensor:
    """Return the information in the mean, 1 / v, and in the raw variance, (dv / draw)^2 / (2 v^2)."""
    predicted = Gaussian().predict(outputs)
    variance, slope = predicted.variance, outputs[:, 1].sigmoid()  # v = softplus(raw) and a small constant
    return torch.diag_embed(torch.stack([1 / variance, slope.square() / (2 * variance.square())], 1))


def student_fisher(outputs: Tensor) -> Tensor:
    r"""Return the information in the location, the raw scale and the raw degrees of freedom.

    .. math::
        F_{\mu\mu} = \frac{\nu + 1}{(\nu + 3) \sigma^2}, \quad
        F_{\sigma\sigma} = \frac{2 \nu}{(\nu + 3) \sigma^2}, \quad
        F_{\sigma\nu} = \frac{-2}{(\nu + 1)(\nu + 3) \sigma}, \quad
        F_{\nu\nu} = \frac{\psi'(\nu / 2) - \psi'((\nu + 1) / 2)}{4} - \frac{\nu + 5}{2 \nu (\nu + 1)(\nu + 3)}

    and 0 between the location and the others (Lange, Little and Taylor, 1989, doi:10.1080/01621459.1989.10478852).
    """
    predicted = StudentT().predict(outputs)
    df, scale = predicted.df, predicted.scale
    scale_slope, df_slope = outputs[:, 1].sigmoid(), outputs[:, 2].sigmoid()
    result = outputs.new_zeros(len(outputs), 3, 3)
    result[:, 0, 0] = (df + 1) / ((df + 3) * scale.square())
    result[:, 1, 1] = 2 * df / ((df + 3) * scale.square()) * scale_slope.square()
    result[:, 1, 2] = result[:, 2, 1] = -2 / ((df + 1) * (df + 3) * scale) * scale_slope * df_slope
    curvature = (torch.polygamma(1, df / 2) - torch.polygamma(1, (df + 1) / 2)) / 4
    result[:, 2, 2] = (curvature - (df + 5) / (2 * df * (df + 1) * (df + 3))) * df_slope.square()
    return result
