"""What a network is called with and what it returns: a tensor, or several tensors together."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any  # a tensor, or a tuple, list or dict of tensors; the first axis of each is the batch


def each(function: Callable[[Tensor], Any], x: Inputs) -> Inputs:
    """Apply a function to a tensor, or to each tensor of a tuple, list or dict; anything else stays as it is."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {name: each(function, part) for name, part in x.items()}
    return tuple(each(function, part) for part in x) if isinstance(x, tuple | list) else x


def rows_at(x: Inputs, index: int | slice | list[int] | Tensor) -> Inputs:
    """Return the rows of all tensors at ``index``."""
    return each(lambda part: part[index], x)


def tensors_of(x: Inputs) -> list[Tensor]:
    """Return all tensors of inputs."""
    if isinstance(x, Tensor):
        return [x]
    found: list[Tensor] = []
    each(found.append, x)
    return found


def has_columns(x: Inputs) -> bool:
    """Say whether there is a list of anything but tensors: one of names, say, with one for each example."""
    parts = list(x.values()) if isinstance(x, Mapping) else x if isinstance(x, tuple | list) else []
    return any(map(has_columns, parts)) or (isinstance(x, list) and bool(x) and not tensors_of(x))


def count_rows(x: Inputs) -> int:
    """Return how many examples inputs hold.

    Raises:
        TypeError: they hold no tensor, but an array, say.
        ValueError: not all tensors hold as many.
    """
    if isinstance(x, Tensor) and x.dim():
        return len(x)
    found = tensors_of(x)
    if not found:
        rule = "x must be a tensor, which torch.as_tensor makes of an array, or a tuple, list or dict of tensors"
        raise TypeError(f"{rule}, got {type(x).__name__}")
    if len({tensor.shape[:1] for tensor in found}) > 1 or not found[0].dim():
        rule = "x must be (batch, ...), and all its tensors of the same batch"
        raise ValueError(f"{rule}, got shape {' and '.join(str(tuple(tensor.shape)) for tensor in found)}")
    return len(found[0])


def split_inputs(x: Inputs, parts: int) -> list[Inputs]:
    """Split inputs along the first axis into equal parts, of which each may be changed in place."""
    if not tensors_of(x):
        return [x] * parts
    if isinstance(x, Tensor):
        return list(torch.unsafe_split_with_sizes(x, [len(x) // parts] * parts))
    if isinstance(x, Mapping):
        columns = [split_inputs(part, parts) for part in x.values()]
        return [dict(zip(x, row, strict=True)) for row in zip(*columns, strict=True)]
    return list(zip(*(split_inputs(part, parts) for part in x), strict=True))


def join_inputs(parts: list[Inputs]) -> Inputs:
    """Join inputs along the first axis: the reverse of splitting them."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: join_inputs([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple | list):
        return tuple(join_inputs(list(column)) for column in zip(*parts, strict=True))
    return torch.cat(parts) if isinstance(first, Tensor) else first


def call(network: nn.Module, x: Inputs) -> Any:
    """Call a network with one tensor, with the tensors of a tuple or list one after the other, or of a dict by name."""
    if isinstance(x, Mapping):
        return network(**x)
    return network(*x) if isinstance(x, tuple | list) else network(x)


def logits_of(outputs: Any) -> Tensor:
    """Return what a network answers: the tensor that it returns, or the ``logits`` of an object or a dict."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        rule = "the network must return a tensor of outputs, or an object or dict with a tensor logits"
        raise ValueError(f"{rule}, got {type(outputs).__name__}")
    return found
