"""Small networks, as `nn.Sequential`s, so that every method can see which layer follows which."""

from collections.abc import Callable

from torch import nn


def mlp(
    inputs: int,
    outputs: int,
    *,
    width: int = 64,
    depth: int = 2,
    activation: Callable[[], nn.Module] = nn.SiLU,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return a multilayer perceptron: ``(batch, inputs)`` to ``(batch, outputs)``.

    Args:
        inputs: features of an example.
        outputs: classes, or what a likelihood reads.
        width: units of each hidden layer.
        depth: hidden layers.
        activation: () -> nn.Module, after each hidden layer.
        dropout: probability of dropping a hidden unit; 0 adds no layer.

    Raises:
        ValueError: ``depth`` is below 0, or ``width`` below 1.
    """
    if depth < 0:
        raise ValueError(f"depth must be >= 0, got {depth}")
    if width < 1:
        raise ValueError(f"width must be >= 1, got {width}")
    layers: list[nn.Module] = []
    for size in [inputs] + [width] * (depth - 1) if depth else []:
        layers += [nn.Linear(size, width), activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width if depth else inputs, outputs))


def cnn(
    classes: int = 10, *, channels: int = 16, size: int = 14, inputs: int = 1, dropout: float = 0.0
) -> nn.Sequential:
    """Return a small convolutional network: ``(batch, inputs, size, size)`` to ``(batch, classes)``.

    Two 3 x 3 convolutions, of ``channels`` and ``2 * channels``, each followed by ReLU and 2 x 2 pooling; one linear
    layer.

    Raises:
        ValueError: ``size`` is below 4, so that pooling leaves nothing.
    """
    if size < 4:
        raise ValueError(f"size must be >= 4, got {size}")
    side = size // 4
    return nn.Sequential(
        *(nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *([nn.Dropout(dropout)] if dropout else []),
        nn.Linear(2 * channels * side * side, classes),
    )


def convnet(classes: int = 10, *, channels: int = 16, dropout: float = 0.0) -> nn.Sequential:
    """Return a convolutional network with batch norm: ``(batch, 1, height, width)`` to ``(batch, classes)``.

    Three 3 x 3 convolutions, of ``channels``, twice and four times as many, each followed by batch norm and ReLU, the
    first two by 2 x 2 pooling; the mean over the image; one linear layer.
    """
    layers: list[nn.Module] = []
    before = 1
    for after in (channels, 2 * channels, 4 * channels):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if after < 4 * channels else []
        before = after
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(before, classes))
