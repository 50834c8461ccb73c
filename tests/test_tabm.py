"""TabM is BatchEnsemble with signs in the first layer only, and a head of its own for each member."""

import pytest
import torch
from scenarios import mlp, relative, vectors
from torch import nn
from torch.nn import functional as F

import effens
from effens.ensembles.batch import BatchEnsembleLinear
from effens.ensembles.deep import StackedLinear


def test_each_member_is_the_published_formula() -> None:
    """Gorishniy et al. (2025), figure 1: l(x) = s * (W (r * x)) + b, then k linear heads."""
    torch.manual_seed(0)
    ensemble, (x, y) = effens.TabM(mlp, 5), vectors()
    effens.fit(ensemble, (x, y), epochs=3, lr=1e-2, device="cpu")
    first, second, head = (m for m in ensemble.modules() if isinstance(m, BatchEnsembleLinear | StackedLinear))
    assert isinstance(first, BatchEnsembleLinear)
    assert isinstance(second, BatchEnsembleLinear)
    assert isinstance(head, StackedLinear)
    for m, answer in enumerate(ensemble(x)):
        z = x
        for layer in (first, second):
            assert layer.bias is not None
            z = F.silu((z * layer.r[m]) @ layer.weight.T * layer.s[m] + layer.bias[m])
        assert head.bias is not None
        assert relative(answer, z @ head.weight[m].T + head.bias[m]) < 1e-12
        assert relative(answer, ensemble.member(m)(x)) < 1e-12


def test_it_starts_as_published() -> None:
    ensemble = effens.TabM(mlp, 64)
    first, second, head = (m for m in ensemble.modules() if isinstance(m, BatchEnsembleLinear | StackedLinear))
    assert isinstance(first, BatchEnsembleLinear)
    assert isinstance(second, BatchEnsembleLinear)
    assert set(first.r.flatten().tolist()) == {-1.0, 1.0}
    assert all(bool((part == 1).all()) for part in (first.s, second.r, second.s))
    for layer in (first, second):
        assert layer.bias is not None
        assert bool((layer.bias == layer.bias[0]).all())
    assert len(head.weight.flatten(1).unique(dim=0)) == 64
    bound = 8**-0.5  # of nn.Linear's start
    assert 0.98 * bound < float(head.weight.detach().abs().max()) <= bound


def test_the_loss_is_the_mean_over_members_and_all_see_the_same_batch() -> None:
    ensemble = effens.TabM(mlp, 4)
    losses = torch.rand(4, 7)
    assert torch.equal(ensemble.reduce(losses), losses.mean())
    (batch,) = ensemble.batches(7, 8)
    assert batch.shape == (7,)


def test_a_network_of_one_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="TabM needs a first and a last layer to convert, got 1 in all"):
        effens.TabM(lambda: nn.Linear(4, 3), 2)


def test_what_is_frozen_inside_a_layer_stays() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        network = mlp()
        next(network.parameters()).requires_grad_(False)
        return network

    ensemble, (x, y) = effens.TabM(make, 3), vectors()
    effens.fit(ensemble, (x, y), epochs=2, device="cpu")
    weight = next(make().parameters())
    assert all(torch.equal(next(ensemble.member(m).parameters()), weight) for m in range(3))


def test_it_is_the_authors_package_with_the_same_weights() -> None:
    """tabm 0.0.3, in which rows are ``(batch, members, features)``."""
    tabm = pytest.importorskip("tabm", reason="needs the authors' package, as .ci/run has it")
    torch.manual_seed(0)
    theirs = tabm.TabM(
        n_num_features=5, d_out=3, n_blocks=2, d_block=8, dropout=0.0, k=6, start_scaling_init="random-signs"
    )
    ensemble = effens.TabM(lambda: nn.Sequential(*plain_layers()), 6)
    first, second, head = (m for m in ensemble.modules() if isinstance(m, BatchEnsembleLinear | StackedLinear))
    blocks = [block[0] for block in theirs.backbone.blocks]
    assert set(blocks[0].r.flatten().tolist()) == {-1.0, 1.0}
    assert all(bool((part == 1).all()) for part in (blocks[0].s, blocks[1].r, blocks[1].s))
    with torch.no_grad():
        for block in blocks:
            for part in (block.r, block.s, block.bias):
                part.add_(0.3 * torch.randn_like(part))
        for mine, block in zip((first, second), blocks, strict=True):
            for name in ("weight", "r", "s", "bias"):
                mine.get_parameter(name).copy_(block.get_parameter(name))
        head.get_parameter("weight").copy_(theirs.output.weight.mT)
        head.get_parameter("bias").copy_(theirs.output.bias)
        x = torch.randn(7, 5)
        assert relative(ensemble(x), theirs(x).transpose(0, 1)) < 1e-6


def plain_layers() -> list[nn.Module]:
    return [nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
