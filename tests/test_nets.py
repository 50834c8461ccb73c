"""The small networks."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import effens_book.nets


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_mlp(depth: int) -> None:
    network = effens_book.nets.mlp(3, 2, width=16, depth=depth)
    assert network(torch.zeros(5, 3)).shape == (5, 2)
    sizes = [3, *[16] * depth, 2]
    assert count(network) == sum((a + 1) * b for a, b in pairwise(sizes))
    assert sum(type(layer) is nn.SiLU for layer in network) == depth


def test_mlp_options() -> None:
    network = effens_book.nets.mlp(3, 2, depth=2, activation=nn.Tanh, dropout=0.3)
    kinds = [type(layer) for layer in network]
    assert kinds == [nn.Linear, nn.Tanh, nn.Dropout] * 2 + [nn.Linear]
    assert len({id(layer) for layer in network}) == len(network)
    assert all(layer.p == 0.3 for layer in network if isinstance(layer, nn.Dropout))


@pytest.mark.parametrize("size", [4, 8, 14, 15, 28])
@pytest.mark.parametrize("inputs", [1, 3])
def test_cnn(size: int, inputs: int) -> None:
    network = effens_book.nets.cnn(7, channels=4, size=size, inputs=inputs)
    assert network(torch.zeros(5, inputs, size, size)).shape == (5, 7)
    assert count(network) == 4 * (9 * inputs + 1) + 8 * (9 * 4 + 1) + 7 * (8 * (size // 4) ** 2 + 1)


def test_cnn_dropout() -> None:
    assert [type(layer) for layer in effens_book.nets.cnn(dropout=0.1)][-2:] == [nn.Dropout, nn.Linear]


def test_convnet() -> None:
    network = effens_book.nets.convnet(7, channels=4, dropout=0.1)
    assert network(torch.zeros(5, 1, 14, 14)).shape == (5, 7)
    assert [type(layer) for layer in list(network)[:4]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    assert count(network) == 9 * (4 + 4 * 8 + 8 * 16) + 2 * (4 + 8 + 16) + 7 * (16 + 1)
    assert count(effens_book.nets.convnet()) == 24_058


@pytest.mark.parametrize(
    ("options", "message"), [({"depth": -1}, "depth must be >= 0, got -1"), ({"width": 0}, "width must be >= 1, got 0")]
)
def test_mlp_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effens_book.nets.mlp(3, 2, **options)


def test_cnn_refuses_images_that_pooling_leaves_nothing_of() -> None:
    with pytest.raises(ValueError, match="size must be >= 4, got 3"):
        effens_book.nets.cnn(size=3)
