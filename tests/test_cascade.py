"""A cascade asks one member first; its threshold is the lowest that keeps the gain it is to keep."""

import pytest
import torch
from scenarios import mlp, relative, vectors
from torch import Tensor

import effens


def trained() -> effens.Ensemble:
    torch.manual_seed(0)
    ensemble, (x, y) = effens.DeepEnsemble(mlp, 4), vectors(40)
    effens.fit(ensemble, (x, y), epochs=10, lr=1e-2, device="cpu")
    return ensemble


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9, 1.1])
def test_it_equals_the_obvious_loop(threshold: float) -> None:
    ensemble, (x, _) = trained(), vectors(30, seed=1)
    probs, members = effens.cascade(ensemble, x, threshold, chunk=7)
    everyone = effens.predict(ensemble, x)
    for i in range(30):
        alone = bool(everyone[0, i].max() >= threshold)
        assert members[i] == (1 if alone else 4)
        assert relative(probs[i], everyone[0, i] if alone else everyone[:, i].mean(0)) < 1e-12
    if threshold in (0.0, 1.1):
        assert members.unique().tolist() == [1 if threshold == 0 else 4]


def test_inputs_of_several_tensors() -> None:
    ensemble, (x, _) = trained(), vectors(30, seed=1)
    given = effens.cascade(ensemble, (x,), 0.8)
    assert all(torch.equal(*pair) for pair in zip(given, effens.cascade(ensemble, x, 0.8), strict=True))


def gain_at(probs: Tensor, y: Tensor, threshold: float) -> float:
    """What the cascade gains in NLL over the first member."""
    sure = probs[0].max(1).values >= threshold
    chosen = torch.where(sure[:, None], probs[0], probs.mean(0))
    return (effens.nll(probs[:1], y) - effens.nll(chosen[None], y)).item()


@pytest.mark.parametrize("keep", [0.5, 0.8, 0.9, 0.95, 1.0])
def test_the_threshold_is_the_lowest_that_keeps_so_much(keep: float) -> None:
    generator = torch.Generator().manual_seed(1)
    probs = (2 * torch.randn(4, 300, 5, generator=generator, dtype=torch.float64)).softmax(-1)
    y = torch.randint(5, (300,), generator=generator)
    threshold = effens.cascade_threshold(probs, y, keep)
    wanted = keep * gain_at(probs, y, 1.1)
    assert gain_at(probs, y, threshold) >= wanted - 1e-9
    lower = [c for c in probs[0].max(1).values.sort().values.tolist() if c < threshold]
    assert all(gain_at(probs, y, below) < wanted for below in lower)
    more = torch.cat([probs, probs.new_full((4, 9, 5), 0.2)], 1)
    assert effens.cascade_threshold(more, torch.cat([y, torch.full((9,), -100)]), keep) == threshold


def test_where_averaging_gains_nothing_nobody_else_is_asked() -> None:
    right = torch.tensor([[[0.9, 0.1]], [[0.1, 0.9]]])
    assert effens.cascade_threshold(right, torch.tensor([0])) == 0
    assert effens.cascade_threshold(right, torch.tensor([1]), keep=0.0) == 0
    assert effens.cascade_threshold(right, torch.tensor([1])) > 1
    with pytest.raises(ValueError, match="keep must be in 0 ... 1, got 2"):
        effens.cascade_threshold(right, torch.tensor([0]), 2)
