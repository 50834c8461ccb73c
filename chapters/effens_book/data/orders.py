r"""A simulated order flow, whose signal is known.

At every event a network sees 20 features, and the price then moves by

.. math:: y = s(x) + \varepsilon, \qquad \varepsilon \sim N(0, \sigma^2), \qquad s(x) = a \tanh(W_2 \tanh(W_1 x))

ticks, in which the signal s is small against the noise. Events arrive in calm and in busy spells.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FEATURES", "NOISE", "SIGNAL", "OrderFlow", "arrivals", "order_flow", "shifted", "signal"]

FEATURES, HIDDEN = 20, 16
SIGNAL, NOISE = 1.0, 3.0  # ticks: deviation of the signal, and of the noise
SIZES = {"train": 8000, "val": 2000, "test": 3000}


@dataclass(frozen=True, eq=False)
class OrderFlow:
    """Events: what is seen, how the price moved, and how it was expected to move, by one who knows."""

    x: Tensor  # (n, 20)
    y: Tensor  # (n,) ticks
    signal: Tensor  # (n,) ticks


def signal(x: Tensor) -> Tensor:
    """Return the expected move at x (n, 20), in ticks, (n,); its deviation over the usual events is about `SIGNAL`."""
    generator = torch.Generator().manual_seed(11)
    first = 1.5 * torch.randn(FEATURES, HIDDEN, generator=generator) / math.sqrt(FEATURES)
    second = torch.randn(HIDDEN, generator=generator) / math.sqrt(HIDDEN)
    return SIGNAL * 2 * torch.tanh((x @ first).tanh() @ second)


def order_flow() -> dict[str, OrderFlow]:
    """Return the flows to train on, to tune on and to judge with; the same at each call."""
    generator = torch.Generator().manual_seed(12)
    torch.randn(FEATURES, generator=generator)  # the direction of `shifted`
    flows = {}
    for name, n in SIZES.items():
        x = torch.randn(n, FEATURES, generator=generator)
        noise = NOISE * torch.randn(n, generator=generator)
        expected = signal(x)
        flows[name] = OrderFlow(x, expected + noise, expected)
    return flows


def shifted(shift: float) -> OrderFlow:
    """Return the test events with all features moved in one direction, by so many of their standard deviations."""
    direction = torch.randn(FEATURES, generator=torch.Generator().manual_seed(12))
    usual = order_flow()["test"]
    x = usual.x + shift * torch.nn.functional.normalize(direction, dim=0)
    expected = signal(x)
    return OrderFlow(x, expected + usual.y - usual.signal, expected)


def arrivals(n: int, *, rate: float, busy: float = 5.0, spell: int = 200, seed: int = 0) -> Tensor:
    """Return the times at which n events arrive, whatever happens to the ones before: an open loop.

    Poisson in spells of about `spell` events; in every other spell events arrive ``busy`` times as fast.

    Args:
        n: events.
        rate: of calm spells, in events a second.
        busy: how much faster in busy spells.
        spell: mean number of events in a spell.
        seed: of the times.

    Returns:
        ``(n,)`` seconds, ascending, float64.

    Raises:
        ValueError: n, rate, busy or spell is not positive.
    """
    if min(n, rate, busy, spell) <= 0:
        raise ValueError(f"n, rate, busy and spell must be > 0, got {n}, {rate}, {busy} and {spell}")
    generator = torch.Generator().manual_seed(seed)
    switches = (torch.rand(n, generator=generator) < 1 / spell).cumsum(0) % 2
    gaps = -torch.rand(n, generator=generator, dtype=torch.float64).clamp_min(1e-12).log() / rate
    return torch.where(switches == 1, gaps / busy, gaps).cumsum(0)
