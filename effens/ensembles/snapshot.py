r"""Snapshot ensembles: one network whose learning rate falls and is raised again, copied at the end of each cycle.

.. math:: \alpha_t = \frac{\alpha_0}{2} \left(\cos\left(\pi \frac{t - a}{b - a}\right) + 1\right), \quad a \le t < b

in a cycle of the steps from a to b. Huang, Li, Pleiss, Liu, Hopcroft and Weinberger (2017), "Snapshot ensembles: train
1, get M for free", arXiv:1704.00109. The rate moves at every step; the optimizer's moments live on through a restart.

Fast Geometric Ensembling is its sibling: a pretrained network walks between a high and a low rate in short, triangular
cycles. Garipov, Izmailov, Podoprikhin, Vetrov and Wilson (2018), "Loss surfaces, mode connectivity, and fast ensembling
of DNNs", arXiv:1802.10026.
"""

import math
from collections.abc import Iterable

from torch import nn

from effens.ensembles.base import Ensemble, MakeNet, check_positive
from effens.ensembles.one import OneNetwork
from effens.inputs import Inputs


class SnapshotEnsemble(OneNetwork):
    """Copies of one network, batch norm's statistics included, made where its cyclic rate is lowest.

    One network is trained, ``network``. Its copies, ``snapshots``, are a `DeepEnsemble`, so that all are asked as one
    batched computation; they are never trained and stay in eval mode. Fitting again starts collecting anew. What is
    stored is ``members + 1`` networks; to answer, ``snapshots`` suffice. Of a training that was stopped early there are
    the snapshots that were made by then; if there were none, the network as it was.

    Args:
        make_net: () -> nn.Module, a fresh network; it is called once.
        members: how many cycles the learning rate goes through, a snapshot at the end of each.
        last: keep only the snapshots of this many cycles, the last ones; by default all of them. The first snapshots
            are of a young network, and they often cost the average more than they add.
        schedule: ``"cosine"``: `cyclic_cosine`. ``"triangular"``: Fast Geometric Ensembling, see `triangular`.
        pretrain: of the triangular schedule, the part of all steps after which the cycles begin.
        lrs: of the triangular schedule, the high and the low, as multiples of the learning rate. The defaults
            of these two are the authors' for a wide residual network: from epoch 160 of 200, 0.05 and 0.01 after 0.1.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: ``members`` is below 1, ``last`` is not in 1 ... ``members``, ``schedule`` is unknown, ``pretrain``
            is not in [0, 1), or ``lrs`` are not two multiples in [0, 1], the higher first.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(1, batch, ...)`` to ``(1, batch, outputs)``, of the network in training

    Example:
        >>> x, y = torch.randn(100, 3), torch.randint(0, 2, (100,))
        >>> ensemble = SnapshotEnsemble(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), members=4)
        >>> history = effens.fit(ensemble, (x, y), epochs=20)
        >>> ensemble(x[:10]).shape
        torch.Size([4, 10, 2])
    """

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 5,
        last: int | None = None,
        *,
        schedule: str = "cosine",
        pretrain: float = 0.8,
        lrs: tuple[float, float] = (0.5, 0.1),
        trunk: nn.Module | None = None,
    ) -> None:
        check_positive(members=members)
        if last is not None and not 1 <= last <= members:
            raise ValueError(f"last must be in 1 ... members, got {last} of {members} members")
        super().__init__(make_net, members if last is None else last, trunk)
        self.cycles = members
        if schedule not in ("cosine", "triangular"):
            raise ValueError(f"schedule must be 'cosine' or 'triangular', got {schedule!r}")
        if not 0 <= pretrain < 1:
            raise ValueError(f"pretrain must be in [0, 1), got {pretrain}")
        if len(lrs) != 2 or not 1 >= lrs[0] >= lrs[1] >= 0:
            raise ValueError(f"lrs must be high and low with 1 >= high >= low >= 0, got {lrs}")
        self.triangular, self.pretrain, self.lrs = schedule == "triangular", pretrain, lrs
        self.snapshots = self.copies()

    def derived(self) -> Ensemble:
        """Return the snapshots."""
        return self.snapshots

    def schedule(self, step: int, steps: int) -> float:
        """Return the multiplier of the learning rate at ``step`` (from 0) of ``steps``."""
        if self.triangular:
            return triangular(step, steps, self.cycles, self.pretrain, self.lrs)
        return cyclic_cosine(step, steps, self.cycles)

    def collected_after(self, steps: int) -> list[int]:
        """Return the steps (from 0) of ``steps`` after which the members are copied, where the rate is lowest."""
        if self.triangular:
            first = int(self.pretrain * steps)
            ends = [first + (2 * c + 1) * (steps - first) // (2 * self.cycles - 1) for c in range(self.cycles)]
        else:
            ends = [(c + 1) * steps // self.cycles for c in range(self.cycles)]
        return [end - 1 for end in ends[-self.planned :]]

    def collect(self, step: int, steps: int) -> None:
        """Copy the network where a cycle's rate is lowest, into the next member; at the first step, begin anew."""
        if step == 0:
            self.ready = 0
        if step in self.collected_after(steps):
            self.take()

    def finish(self, batches: Iterable[Inputs]) -> None:
        """Where training was stopped before the first snapshot, take the network as it is."""
        if not self.ready:
            self.take()

    def take(self) -> None:
        """Copy the network into the next member; into the last one, if there are all."""
        self.ready = min(self.ready + 1, self.planned)
        self.snapshots.put(self.ready - 1, self.network)

    def extra_repr(self) -> str:
        """Show the settings."""
        how = f"'triangular', pretrain={self.pretrain}, lrs={self.lrs}" if self.triangular else "'cosine'"
        return f"members={self.cycles}, last={self.planned}, schedule={how}"


def cyclic_cosine(step: int, steps: int, cycles: int) -> float:
    """Return the multiplier of the learning rate: in each cycle half a cosine, from 1 to near 0.

    Cycle c covers the steps from ``c * steps // cycles`` to before ``(c + 1) * steps // cycles``, so that the last ends
    low also where ``cycles`` does not divide ``steps``. One cycle is the plain half cosine.

    Args:
        step: from 0 to ``steps - 1``.
        steps: of the whole training.
        cycles: how many.

    Returns:
        A multiplier in [0, 1], 1 at each cycle's first step.

    Raises:
        ValueError: ``cycles`` is below 1, there are fewer steps than cycles, or there is no such step.

    Example:
        >>> [round(cyclic_cosine(step, 8, 2), 3) for step in range(8)]
        [1.0, 0.854, 0.5, 0.146, 1.0, 0.854, 0.5, 0.146]
    """
    check_step(step, steps, cycles, cycles)
    _, first, end = part_of(step, steps, cycles)
    return 0.5 * (1 + math.cos(math.pi * (step - first) / (end - first)))


def triangular(step: int, steps: int, cycles: int, pretrain: float, lrs: tuple[float, float]) -> float:
    """Return the learning rate's multiplier in Fast Geometric Ensembling: pretraining, then down, up, down, ..., down.

    Each way from one rate to the other is straight and as long as the others (to a step); networks are collected at the
    end of each way down. Two things differ from the paper. Pretraining is half a cosine from 1 to 0 within the same
    budget, where the paper breaks off a longer schedule; and the number of cycles is given, not their length, so that
    the last step is a minimum.

    Args:
        step: from 0 to ``steps - 1``.
        steps: of the whole training, pretraining included.
        cycles: how many minima.
        pretrain: the part of the steps that come before the cycles.
        lrs: the high and the low multiplier.

    Returns:
        A multiplier in [0, 1].

    Raises:
        ValueError: ``cycles`` is below 1, the cycles have fewer steps than ways, or there is no such step.
    """
    before, ways = int(pretrain * steps), 2 * cycles - 1
    check_step(step, steps, cycles, before + ways)
    if step < before:
        return cyclic_cosine(step, before, 1)
    way, first, end = part_of(step - before, steps - before, ways)
    passed = (step - before + 1 - first) / (end - first)  # in (0, 1]
    high, low = lrs
    return (1 - passed) * high + passed * low if way % 2 == 0 else (1 - passed) * low + passed * high


def part_of(step: int, steps: int, parts: int) -> tuple[int, int, int]:
    """Return which of ``parts`` equal parts of ``steps`` holds ``step``, its first step and the step after its end."""
    part = ((step + 1) * parts - 1) // steps
    return part, part * steps // parts, (part + 1) * steps // parts


def check_step(step: int, steps: int, cycles: int, least: int) -> None:
    """Raise `ValueError` unless there is such a step, and at least ``least`` steps for the cycles."""
    if cycles < 1:
        raise ValueError(f"cycles must be >= 1, got {cycles}")
    if steps < least:
        raise ValueError(f"steps must be >= {least} for {cycles} cycles, got {steps}: train for longer")
    if not 0 <= step < steps:
        raise ValueError(f"step must be in 0 ... {steps - 1}, got {step}")
