"""Toy problems and the obvious loops that the tests hold every method against."""

import copy
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effens
import effens_book.nets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(n: int = 22, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three noisy classes of vectors, in float64."""
    x = torch.randn(n, 4, generator=generator(seed), dtype=torch.float64)
    return x, (x[:, :3] + 0.3 * x[:, 1:]).argmax(1)


def images(n: int = 22, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of 8 x 8 pixels in which the class is the brightest third, in float64."""
    x = torch.randn(n, 1, 8, 8, generator=generator(seed), dtype=torch.float64)
    return x, x[:, 0, :, :6].unflatten(2, (3, 2)).sum((1, 3)).argmax(1)


def tokens(n: int = 22, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sequences of 5 vectors, labelled by what their sum is, in float64."""
    x = torch.randn(n, 5, 4, generator=generator(seed), dtype=torch.float64)
    return x, x.sum(1)[:, :3].argmax(1)


def series(n: int = 22, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Series of two channels and 9 points in which the class is the brightest third, in float64."""
    x = torch.randn(n, 2, 9, generator=generator(seed), dtype=torch.float64)
    return x, x.sum(1).unflatten(1, (3, 3)).sum(2).argmax(1)


def mlp(**options: Any) -> nn.Module:
    return effens_book.nets.mlp(4, 3, width=8, **options).double()


def cnn(**options: Any) -> nn.Module:
    return effens_book.nets.cnn(3, channels=4, size=8, **options).double()


class Residual(nn.Module):
    """A network with a forward of its own, that nothing can be known about from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(x + self.inner(x).tanh())
        return head


def residual() -> nn.Module:
    return Residual().double()


def normed() -> nn.Module:
    """A convolutional network with batch normalization."""
    convolution = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double()


def convnet1d() -> nn.Module:
    """A convolutional network of series, with batch normalization."""
    convolution = nn.Conv1d(2, 6, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)).double()


class Attending(nn.Module):
    """A small transformer of vectors, with a class token and pre-norm layers."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.encoder(x).sum(1))
        return answer


def attending() -> nn.Module:
    return Attending().double()


def remembered(make_net: Any, members: int, seed: int = 0) -> tuple[Any, list[nn.Module]]:
    """Return a `make_net` that hands out fresh networks, and copies of the networks that it will hand out."""
    torch.manual_seed(seed)
    networks = [make_net() for _ in range(members)]
    copies = copy.deepcopy(networks)
    return partial(next, iter(networks)), copies


def indices(ensemble: effens.Ensemble, n: int, batch_size: int, epochs: int, seed: int = 0) -> list[Tensor]:
    """The indices ``(streams, batch)`` of every step, as the contract has them."""
    source, steps = generator(seed), []
    for _ in range(epochs):
        steps += [
            index if index.dim() > 1 else index.expand(ensemble.streams, -1)
            for index in ensemble.batches(n, batch_size, source)
        ]
    return steps


def plain_loop(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    batches: Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float,
    optimizer: Any = torch.optim.AdamW,
) -> nn.Module:
    """Train one network as everyone does: the obvious loop, with a cosine rate."""
    batches = list(batches)
    descent = optimizer(network.parameters(), lr=lr, weight_decay=weight_decay)
    network.train()
    for step, index in enumerate(batches):
        for group in descent.param_groups:
            group["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / len(batches)))
        loss = F.cross_entropy(network(x[index]), y[index])
        descent.zero_grad()
        loss.backward()
        descent.step()
    return network.eval()


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a fraction of the largest number."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))
