"""Data as batches: who sees what in each step of an epoch."""

import warnings
from collections.abc import Iterator, Mapping, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from effens.ensembles.base import Ensemble
from effens.inputs import Inputs, count_rows, each, has_columns, join_inputs, rows_at, tensors_of

KEPT = 256  # rows of which a frozen trunk computes the features at once
Batch = tuple[bool, Inputs, Tensor, Tensor | None]
Data = tuple[Inputs, Tensor] | Mapping[str, Any] | list[Any] | Dataset[Any] | DataLoader[Any]


class Batches:
    """The batches of an epoch: ``(shared, xs, ys, unchecked)``.

    ``xs`` is ``(streams, batch, ...)``; or ``(batch, ...)`` where ``shared``: all streams see the same. ``unchecked``
    are targets nobody has looked at yet, or None.
    """

    def __init__(
        self, ensemble: Ensemble, data: Data, batch_size: int, device: torch.device, generator: torch.Generator
    ) -> None:
        self.ensemble, self.batch_size, self.device, self.generator = ensemble, batch_size, device, generator
        self.data = data
        self.skipped = 0
        self.tensors: tuple[Inputs, Tensor] | None = None
        rows = isinstance(data, list) and not (len(data) == 2 and isinstance(data[1], Tensor))  # a list of examples
        if isinstance(data, Mapping | tuple | list) and not rows:
            x, y = as_pair(data)
            if count_rows(x) != len(y):
                raise ValueError(f"x and y must have the same length, got {count_rows(x)} and {len(y)}")
            self.tensors = each(lambda part: part.to(device), x), y.to(device)
        elif isinstance(data, DataLoader):
            self.skipped = int(last_parts(data, ensemble) == [])  # a last batch too small to be split among members
        elif not isinstance(data, Sized) or isinstance(data, IterableDataset):
            rule = "data must be a map-style Dataset with a length; a stream goes into a DataLoader"
            raise ValueError(f"{rule}, got {type(data).__name__}")
        self.looked = False
        self.epoch: list[Tensor] | None = None  # the indices of the next epoch's batches, if they were drawn
        self.steps = loader_length(data) - self.skipped if isinstance(data, DataLoader) else len(self.indices())
        if self.steps == 0:
            raise ValueError("data must hold at least one example for each member, got none")

    def __len__(self) -> int:
        """Return how many steps an epoch has."""
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        if isinstance(self.data, DataLoader):
            yield from self.from_loader(self.data)
        else:
            for index in self.indices():
                unchecked = None if self.looked else self.tensors and self.tensors[1]
                self.looked = bool(self.tensors)
                shared, xs, ys = self.fetch(index)
                yield shared, xs, ys, unchecked if self.tensors else ys
            self.epoch = None

    def from_loader(self, loader: DataLoader[Any]) -> Iterator[Batch]:
        """Yield what a `DataLoader` gives."""
        for batch in loader:
            x, y = as_pair(batch)
            for index in parts_of(self.ensemble, len(y), self.generator):
                shared, xs, ys = self.pick(x, y, index)
                yield shared, xs, ys, y

    def pick(self, x: Inputs, y: Tensor, index: Tensor) -> tuple[bool, Inputs, Tensor]:
        """Return the rows of a loader's batch that each network gets."""
        index = to_device(index, self.device)
        xs = each(lambda part: take_rows(to_device(part, self.device), index), x)
        return index.dim() == 1, xs, to_device(y, self.device)[index]

    def indices(self) -> list[Tensor]:
        """Return the next epoch's indices into the data, a step each, as `Ensemble.batches` has them."""
        if self.epoch is None:
            n = len(self.tensors[1]) if self.tensors else len(cast(Sized, self.data))
            epoch = [index for index in self.ensemble.batches(n, self.batch_size, self.generator) if index.numel()]
            if self.tensors and epoch:  # to a GPU once an epoch, not at every step
                epoch = list(torch.cat(epoch, -1).to(self.device).split([index.shape[-1] for index in epoch], -1))
            self.epoch = epoch
        return self.epoch

    def fetch(self, index: Tensor) -> tuple[bool, Inputs, Tensor]:
        """Return inputs and targets at ``index``."""
        if self.tensors:
            xs = each(lambda part: take_rows(part, index), self.tensors[0])
            return index.dim() == 1, xs, self.tensors[1][index]
        dataset = cast(Dataset[Any], self.data)
        x, y = as_pair(default_collate([dataset[i] for i in index.flatten().tolist()]))
        xs, ys = (each(lambda part: to_device(part, self.device).unflatten(0, index.shape), both) for both in (x, y))
        return index.dim() == 1, xs, ys

    @torch.no_grad()
    def keep_features(self) -> bool:
        """Put the trunk's features in place of the inputs, where it is frozen and data are tensors; say whether."""
        trunk = self.ensemble.trunk
        if trunk is None or not trunk.frozen or self.tensors is None:
            return False
        x, y = self.tensors
        self.tensors = join_inputs([trunk(rows_at(x, slice(i, i + KEPT))) for i in range(0, len(y), KEPT)]), y
        return True

    def single(self) -> tuple[bool, Inputs] | None:
        """Return the inputs of the last step of an epoch, if each network gets a single example there, as far as seen.

        In their place may stand others like them.
        """
        if not isinstance(self.data, DataLoader):
            last = self.indices()[-1]
            return self.fetch(last)[:2] if last.shape[-1] == 1 else None
        loader, parts = self.data, last_parts(self.data, self.ensemble)
        if isinstance(loader.dataset, IterableDataset) or not parts or parts[-1].shape[-1] > 1:
            return None
        try:
            x, y = as_pair(loader.collate_fn([loader.dataset[getattr(loader.sampler, "indices", [0])[0]]]))
        except LookupError:  # its examples have other names
            return None
        return self.pick(x, y, torch.zeros_like(parts[-1]))[:2]

    def inputs(self) -> Iterator[Inputs]:
        """Yield copies of all inputs once, in shuffled batches, for `Ensemble.finish`, which may change them."""
        if isinstance(self.data, DataLoader):
            for batch in self.data:
                yield each(lambda part: to_device(part, self.device).clone(), as_pair(batch)[0])
        else:
            n = len(self.tensors[1]) if self.tensors else len(cast(Sized, self.data))
            for part in torch.randperm(n, generator=torch.Generator().manual_seed(0)).split(self.batch_size):
                yield self.fetch(part.to(self.device) if self.tensors else part)[1]


def loader_length(loader: DataLoader[Any]) -> int:
    """Return how many batches a loader gives in an epoch; one that has no length is read through once."""
    try:
        return len(loader)
    except TypeError:
        warnings.warn("data has no length: its batches are counted first, in a pass of their own", stacklevel=4)
        return sum(1 for _ in loader)


def last_parts(loader: DataLoader[Any], ensemble: Ensemble) -> list[Tensor] | None:
    """Return who sees what of a loader's last batch; None where its size cannot be seen."""
    if not loader.batch_size or loader.drop_last or not isinstance(loader.sampler, Sized) or not len(loader.sampler):
        return None
    return parts_of(ensemble, (len(loader.sampler) - 1) % loader.batch_size + 1, torch.Generator())


def parts_of(ensemble: Ensemble, n: int, generator: torch.Generator) -> list[Tensor]:
    """Return who sees what of a loader's batch of ``n`` examples; nothing where it is too small to be split."""
    return [index for index in ensemble.batches(n, n, generator) if index.numel()]


def as_pair(batch: Any) -> tuple[Inputs, Tensor]:
    """Return a batch as ``(x, y)``; raise `ValueError` if it is anything else."""
    if isinstance(batch, Mapping) and "labels" in batch:
        batch = {name: part for name, part in batch.items() if name != "labels"}, batch["labels"]
    parts = batch if isinstance(batch, tuple | list) else [batch]
    if len(parts) != 2 or not tensors_of(parts[0]) or not isinstance(parts[1], Tensor):
        rule = "data must give pairs of tensors (x, y), which torch.as_tensor makes of arrays, or dicts with labels"
        remedy = "several inputs are packed together, ((x1, x2), y)"
        got = [type(part).__name__ for part in parts[:4]]
        raise ValueError(f"{rule}; {remedy}, got {got}{' ...' if len(parts) > 4 else ''}")
    if has_columns(parts[0]):
        raise ValueError("inputs must be tensors, which torch.as_tensor makes of lists, got a list without a tensor")
    return parts[0], parts[1]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on this device; on its way to a GPU from memory that stays put, so that nobody waits for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def take_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return ``tensor[index]``, whole rows copied at a time: of images five times sooner than number by number."""
    rows = tensor.index_select(0, index.flatten())
    return rows.view(*index.shape, *rows.shape[1:])
