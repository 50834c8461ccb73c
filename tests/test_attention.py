"""Attention with projections for each member, against PyTorch's, one network at a time."""

from typing import Any

import pytest
import torch
from scenarios import Attending, generator, relative
from torch import Tensor, nn

import effens
from effens.ensembles.attention import MemberAttention
from effens.ensembles.batch import BatchEnsembleLinear

ROWS, LENGTH, WIDTH, HEADS, MEMBERS = 4, 5, 8, 2, 3


def member_attention(bias: bool = True) -> MemberAttention:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True).double()
    return MemberAttention(plain, MEMBERS, lambda layer: BatchEnsembleLinear.of(layer, MEMBERS, init="normal"))


def padding() -> Tensor:
    return torch.arange(LENGTH) >= torch.tensor([5, 3, 4, 2])[:, None]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": padding()},
    "padding, added": {"key_padding_mask": torch.zeros(ROWS, LENGTH).double().masked_fill(padding(), -torch.inf)},
    "causal": {"attn_mask": torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1), "is_causal": True},
    "each head's": {"attn_mask": torch.rand(ROWS * HEADS, LENGTH, LENGTH, generator=generator()) < 0.3},
    "both": {"attn_mask": torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1), "key_padding_mask": padding()},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_pytorch_s_attention_for_each_member(mask: str, need_weights: bool, bias: bool) -> None:
    layer, options = member_attention(bias), MASKS[mask]
    query, key, value = torch.randn(3, MEMBERS * ROWS, LENGTH, WIDTH, generator=generator(1)).double()
    if mask == "each head's":
        options["attn_mask"][:, :, 0] = False  # a row that sees nothing has no answer
    repeated = {
        name: each.repeat(MEMBERS, *[1] * (each.dim() - 1)) if name == "key_padding_mask" or each.dim() == 3 else each
        for name, each in options.items()
        if isinstance(each, Tensor)
    }
    rest = {name: each for name, each in options.items() if not isinstance(each, Tensor)}
    found, weights = layer(query, key, value, need_weights=need_weights, **repeated, **rest)
    for m in range(MEMBERS):
        rows = slice(m * ROWS, (m + 1) * ROWS)
        parts = (query[rows], key[rows], value[rows])
        expected, wanted = layer.member(m)(*parts, need_weights=need_weights, **options)
        assert relative(found[rows], expected) < 1e-12
        assert (weights is None) == (wanted is None)
        if weights is not None:
            assert relative(weights[rows], wanted) < 1e-12


class Padded(nn.Module):
    """A transformer that is told by a mask what is padding, and answers for every token."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        answer: Tensor = self.head(self.encoder(x, src_key_padding_mask=mask))
        return answer.masked_fill(mask[..., None], 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("make", [effens.BatchEnsemble, effens.DeepEnsemble])
@pytest.mark.parametrize("training", [True, False])
def test_transformers_with_masks_equal_separate_networks(make: Any, nested: bool, training: bool) -> None:
    torch.manual_seed(0)
    ensemble = make(lambda: Padded(nested).double(), MEMBERS).train(training)
    x = torch.randn(ROWS, LENGTH, WIDTH, generator=generator(1)).double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = ensemble((x, padding()))
            for m in range(MEMBERS):
                assert relative(found[m], ensemble.member(m)(x, padding())) < 1e-9


def test_the_whole_transformer() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            answer: Tensor = self.head(self.inner(source, target))
            return answer

    torch.manual_seed(0)
    ensemble = effens.BatchEnsemble(lambda: Translator().double(), MEMBERS).eval()
    x = (torch.randn(ROWS, 6, WIDTH).double(), torch.randn(ROWS, LENGTH, WIDTH).double())
    for m in range(MEMBERS):
        assert relative(ensemble(x)[m], ensemble.member(m)(*x)) < 1e-9


@pytest.mark.parametrize("norm_first", [True, False])
def test_gradients_reach_every_projection(norm_first: bool) -> None:
    ensemble = effens.BatchEnsemble(lambda: Attending(norm_first), MEMBERS)
    ensemble(torch.randn(ROWS, LENGTH, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in ensemble.parameters())
