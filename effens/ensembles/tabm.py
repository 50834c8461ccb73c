r"""TabM: a BatchEnsemble for tables, whose members differ by signs in the first layer, and have heads of their own.

.. math:: y_m = ((x \odot r_m) W^\top) \odot s_m + b_m

in every layer but the last, as in BatchEnsemble. In the first layer r is drawn from +1 and -1; all other factors start
at 1. The last layer is one of its own for each member, drawn anew. Gorishniy, Kotelnikov and Babenko (2025),
"TabM: advancing tabular deep learning with parameter-efficient ensembling", arXiv:2410.24210.

Two things differ from the authors' package: r and s have no weight decay, and the signs are drawn for each column and
not once for all columns of a category.
"""

from collections.abc import Sequence

from torch import nn

from effens.ensembles.base import MakeNet
from effens.ensembles.batch import BatchEnsemble, RankOneLayer, init_factors
from effens.ensembles.deep import DeepEnsemble
from effens.ensembles.layers import replace_layers


class TabM(BatchEnsemble):
    """Many members for little: a `BatchEnsemble` that starts close together, with a head for each member.

    Args:
        make_net: () -> nn.Module, a fresh network whose last linear layer is the head.
        members: how many members.
        skip: names of modules that stay shared: see `BatchEnsemble`.
        fast_lr: the learning rate of r and s, as a multiple of the learning rate; they have no weight decay.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: as of `BatchEnsemble`; or there are fewer than two trained layers to convert.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(members, batch, ...)`` to ``(members, batch, outputs)``

    Example:
        >>> ensemble = TabM(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), members=16)
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([16, 10, 2])
    """

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 16,
        *,
        skip: str | Sequence[str] = (),
        fast_lr: float = 1.0,
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__(make_net, members, skip=skip, init="ones", fast_lr=fast_lr, trunk=trunk)
        layers = [
            layer for layer in self.network.modules() if isinstance(layer, RankOneLayer) and layer.r.requires_grad
        ]
        if len(layers) < 2:
            raise ValueError(f"TabM needs a first and a last layer to convert, got {len(layers)} in all")
        first, last = layers[0], layers[-1]
        first.r.data = init_factors("signs", members, first.r.shape[1]).to(first.r)
        heads = DeepEnsemble(lambda: fresh(last.member(0)), members).network
        self.network = replace_layers(self.network, lambda _, layer: heads if layer is last else None)


def fresh(layer: nn.Module) -> nn.Module:
    """Return a layer with weights drawn anew."""
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    layer.reset_parameters()
    return layer
