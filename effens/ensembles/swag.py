r"""SWAG: one network at a learning rate that stays up, and members from a Gaussian fitted to its weights' path.

.. math::
    \theta = \bar\theta + \sqrt{s} \, \Bigl( \Sigma_\text{diag}^{1/2} z_1 + \tfrac{1}{\sqrt{K - 1}} D^\top z_2 \Bigr),
    \quad z_1 \sim \mathcal{N}(0, I_P), \ z_2 \sim \mathcal{N}(0, I_K)

Maddox, Garipov, Izmailov, Vetrov and Wilson (2019), "A simple baseline for Bayesian uncertainty in deep learning",
arXiv:1902.02476. With s = 0 it is SWA: Izmailov et al. (2018), "Averaging weights leads to wider optima and better
generalization", arXiv:1803.05407.
"""

import math
from collections.abc import Collection, Iterable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from effens.ensembles.base import Ensemble, MakeNet, check_positive
from effens.ensembles.deep import member_tensors, named_tensors
from effens.ensembles.one import OneNetwork
from effens.inputs import Inputs
from effens.modes import still_modules


class SWAG(OneNetwork):
    """A Gaussian over the weights that SGD visits late in training, and samples of it as members.

    The rate falls by half a cosine to ``tail_lr`` of the highest and stays there; in that tail weights are collected.
    At the end the members are drawn, and for each its batch-norm statistics are computed anew on the training inputs
    (with dropout off, as in prediction; otherwise as `torch.optim.swa_utils.update_bn`). Train it with SGD: the
    Gaussian is that of SGD's noise at the tail's rate, and that rate is to be tuned. Adam's noise has another shape.

    The moments are those of the weights that require gradients when the ensemble is made. Frozen weights, and buffers
    other than batch norm's, are in every member what they are in the network when members are drawn. Members are never
    trained and stay in eval mode. Fitting again starts anew. What is stored is K + 2 vectors of weights, the network
    and the members; to answer, ``samples`` suffice.

    Args:
        make_net: () -> nn.Module, a fresh network; it is called once.
        members: how many samples.
        rank: the last K deviations are kept, K = ``rank``; 0 is the diagonal form.
        scale: s, of the covariance. One half is the paper's for the diagonal and the low rank together; the paper's for
            the diagonal form is 1, to be set along with ``rank=0``; 0 makes every member SWA.
        tail: which part of the steps has a constant rate, in (0, 1].
        tail_lr: that rate, as a fraction of the highest, in (0, 1].
        every: steps from one collection to the next; the last is after the last step. By default such that the tail
            has at least 2 K, and 40, if it is as long: the mean has settled before the deviations that are kept.
        seed: of the members' draws. In a MultiSWAG, each gets its own.

    Attributes:
        mean: (parameters,), of the weights collected, in the order of ``network.parameters()``.
        variance: (parameters,), their mean squared distance from the mean.
        deviations: (rank, parameters), the last K weights less the mean right after they entered it; the i-th weights
            (from 0) are in row i mod K. Rows not filled yet are 0.
        count: how many weights were collected.

    Raises:
        ValueError: an argument is out of range; the network has no weights that require gradients, or complex ones.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(members, batch, outputs)``
        - ``ensemble.forward_members(xs)``: ``(1, batch, ...)`` to ``(1, batch, outputs)``, of the network in training

    Example:
        >>> ensemble = SWAG(lambda: nn.Linear(3, 2), members=4, rank=2)
        >>> for _ in range(5):
        ...     ensemble.collect_from(nn.Linear(3, 2))
        >>> ensemble.finish([])
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([4, 10, 2])
    """

    noisy = True
    mean: Tensor
    variance: Tensor
    deviations: Tensor
    count: Tensor

    def __init__(
        self,
        make_net: MakeNet,
        members: int = 30,
        rank: int = 20,
        scale: float = 0.5,
        *,
        tail: float = 0.5,
        tail_lr: float = 0.5,
        every: int | None = None,
        seed: int = 0,
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__(make_net, members, trunk)
        if rank < 0 or rank == 1:
            raise ValueError(f"rank must be 0 or >= 2, for a single deviation has no spread, got {rank}")
        if not 0 <= scale < math.inf:
            raise ValueError(f"scale must be >= 0 and finite, got {scale}")
        for name, fraction in {"tail": tail, "tail_lr": tail_lr}.items():
            if not 0 < fraction <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {fraction}")
        check_positive(every=1 if every is None else every)
        self.rank, self.scale = rank, scale
        self.tail, self.tail_lr, self.every, self.seed = tail, tail_lr, every, seed
        weights = [p.detach().flatten() for p in self.network.parameters() if p.requires_grad]
        if not weights:
            raise ValueError("the network must have weights to train, got none that require gradients")
        flat = torch.cat(weights)
        if flat.is_complex():
            raise ValueError(f"the network's weights must be real, got {flat.dtype}")
        self.started = False  # whether there is a training to collect from
        self.samples = self.copies()
        zeros = torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))  # half would lose sums
        self.register_buffer("mean", zeros)
        self.register_buffer("variance", zeros.clone())
        self.register_buffer("deviations", zeros.repeat(rank, 1))
        self.register_buffer("count", zeros.new_zeros((), dtype=torch.int64))

    def derived(self) -> Ensemble:
        """Return the samples."""
        return self.samples

    def schedule(self, step: int, steps: int) -> float:
        """Return the multiplier of the learning rate: half a cosine from 1 to ``tail_lr``, then constant."""
        start = steps - self.tail_steps(steps)
        fallen = 0.5 * (1 - math.cos(math.pi * step / start)) if step < start else 1.0
        return 1 - (1 - self.tail_lr) * fallen

    def collect(self, step: int, steps: int) -> None:
        """Collect the network's weights in the tail, the last step's too; at step 0, forget an earlier training."""
        if step == 0:
            for moment in (self.mean, self.variance, self.deviations, self.count):
                moment.zero_()
            self.ready = 0
        self.started = True
        length, left = self.tail_steps(steps), steps - 1 - step
        every = self.every or max(1, length // max(2 * self.rank, 40))
        if left < length and left % every == 0:
            self.collect_from(self.network)

    @torch.no_grad()
    def collect_from(self, network: nn.Module) -> None:
        """Take a network's weights into the moments: Welford's update, for which constant weights have no variance.

        Args:
            network: one of ``make_net``'s architecture.

        Raises:
            ValueError: its trainable weights have other names or shapes.
        """
        named = {name: p for name, p in network.named_parameters() if p.requires_grad or name in self.trained}
        if (found := {name: tuple(p.shape) for name, p in named.items()}) != self.trained:
            raise ValueError(f"the network must have the trainable weights {self.trained}, got {found}")
        weights = torch.cat([named[name].flatten() for name in self.trained]).to(self.mean)
        i = int(self.count)
        before = weights - self.mean
        self.mean.lerp_(weights, 1 / (i + 1))
        after = weights.sub_(self.mean)
        self.variance.lerp_(before.mul_(after), 1 / (i + 1))
        if self.rank:
            self.deviations[i % self.rank] = after
        self.count += 1

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw weights from the Gaussian: ``(parameters,)``.

        One ``z2`` for all parameters: drawn for each layer, it would lose the covariance across layers. K is the number
        of deviations really kept.

        Args:
            generator: on any device, which decides the numbers drawn; by default PyTorch's own, on that of the mean.

        Raises:
            RuntimeError: no weights were collected.
        """
        if not self.count:
            raise RuntimeError("no weights were collected yet: call effens.fit")
        device = self.mean.device if generator is None else generator.device
        z1, z2 = (
            torch.randn(size, generator=generator, dtype=self.mean.dtype, device=device).to(self.mean.device)
            for size in (len(self.mean), self.rank)
        )
        kept = min(int(self.count), self.rank)
        noise = self.variance.sqrt().mul_(z1)  # in place: fresh vectors of this length cost more than what fills them
        noise += (z2 @ self.deviations).div_(math.sqrt(max(kept - 1, 1)))
        return noise.mul_(math.sqrt(self.scale)).add_(self.mean)

    @torch.no_grad()
    def at(self, weights: Tensor) -> nn.Module:
        """Return a copy of the network with these weights ``(parameters,)``: the mean, say, or a sample.

        Its batch-norm statistics are those of the network in training, not of the new weights.

        Raises:
            ValueError: ``weights`` has another shape.
        """
        if weights.shape != self.mean.shape:
            raise ValueError(f"weights must be {tuple(self.mean.shape)}, got shape {tuple(weights.shape)}")
        network = self.samples.member(0)  # no copy of the network in training, which may hold on to its activations
        held = named_tensors(self.network)
        for name, tensor in named_tensors(network).items():
            tensor.copy_(held[name])
        parameters = dict(network.named_parameters())
        for mine, trained in zip(network.parameters(), self.network.parameters(), strict=True):
            mine.requires_grad_(trained.requires_grad)
        parts = weights.split([math.prod(shape) for shape in self.trained.values()])
        for (name, shape), part in zip(self.trained.items(), parts, strict=True):
            parameters[name].copy_(part.view(shape))
        return network

    @torch.no_grad()
    def finish(self, batches: Iterable[Inputs]) -> None:
        """Draw the members, the same for the same seed, and compute their batch-norm statistics on ``batches``.

        Where training was stopped before the tail, all members are the network as it is.

        Args:
            batches: training inputs ``(batch, ...)``; they are not looked at where there is no batch norm.

        Raises:
            RuntimeError: no weights were collected.
            ValueError: there is batch norm, and there are no batches.
        """
        self.ready = 0
        if self.started and not self.count:  # stopped before the tail
            self.collect_from(self.network)
        generator = torch.Generator().manual_seed(self.seed)
        for m in range(self.members):
            self.samples.put(m, self.at(self.sample(generator=generator)))
        still = still_modules(self) if self.training else self.still
        frozen = [f"{name}.running_mean".lstrip(".") for name, m in self.network.named_modules() if m in still]
        slots = [member_tensors(self.samples.network, m) for m in range(self.members)]
        kept = {each[name].untyped_storage().data_ptr() for each in slots for name in frozen if name in each}
        update_batch_norm(self.samples, map(self.features, batches), kept)
        self.ready = self.planned

    def extra_repr(self) -> str:
        """Show the settings."""
        names = ("members", "rank", "scale", "tail", "tail_lr", "every", "seed")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def tail_steps(self, steps: int) -> int:
        """Return how many of ``steps`` are in the tail, at least 1."""
        return max(1, round(self.tail * steps))


def is_norm(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    """Say whether a layer is batch norm with statistics."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def update_batch_norm(network: nn.Module, batches: Iterable[Inputs], kept: Collection[int] = ()) -> None:
    """Set batch-norm statistics of a network in eval mode to their averages over batches, but at kept addresses."""
    norms = [layer for layer in network.modules() if is_norm(layer)]
    layers = [layer for layer in norms if named_tensors(layer)["running_mean"].untyped_storage().data_ptr() not in kept]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the average of all batches, not the last ones'
        layer.train()
    seen = [network(x) is not None for x in batches]
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    if not seen:
        raise ValueError("batches must hold training inputs for the batch-norm statistics, got none")
