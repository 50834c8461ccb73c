"""What tells a call from others: its arguments, by what they hold, the same in every process."""

import json
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from types import FunctionType, ModuleType
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.utils.data import DataLoader

PLAIN = (bool, int, float, complex, str, type(None))


def digest(value: Any) -> str:
    """Return 12 characters for what a value holds.

    Raises:
        ValueError: it holds something that cannot be described: a lambda, an open file, a lock, a running generator.

    Example:
        >>> digest([1, torch.ones(2)]) == digest([1, torch.ones(2)]), digest([1]) == digest([2])
        (True, False)
    """
    return sha256(json.dumps(describe(value), sort_keys=True).encode()).hexdigest()[:12]


def describe(value: Any, inside: tuple[int, ...] = ()) -> Any:
    """Return what tells a value from others, the same in every process, as something JSON can hold.

    Functions and classes are their names in a module. Those that have none, lambdas and what was made inside a
    function, are refused: what they do depends on more than can be seen.

    Args:
        value: anything.
        inside: addresses of the values that this one is a part of, for those that hold themselves.

    Raises:
        ValueError: there is something that cannot be described.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        value = to_bytes({"": value.detach().cpu().contiguous()})
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if id(value) in inside:
        return f"what holds this, {len(inside) - inside.index(id(value))} further out"
    inner = partial(describe, inside=(*inside, id(value)))
    match value:
        case dict():
            return {key if isinstance(key, str) else json.dumps(inner(key)): inner(value[key]) for key in value}
        case tuple() | list():
            return [inner(part) for part in value]
        case set() | frozenset():
            return sorted(json.dumps(inner(part), sort_keys=True) for part in value)
        case partial():
            return inner([value.func, value.args, value.keywords])
        case torch.Generator():
            return f"generator {value.initial_seed()}"  # its state moves on
        case DataLoader():
            return inner([type(value), {key: part for key, part in vars(value).items() if key != "_iterator"}])
    name, owner = getattr(value, "__qualname__", "<"), getattr(value, "__self__", None)
    if "<" not in name and (owner is None or isinstance(owner, ModuleType)):
        return f"{value.__module__}.{name}"
    try:
        if isinstance(value, FunctionType | type):
            raise TypeError("it stands in no module")
        found = value.__reduce_ex__(4)  # what pickling would keep
    except Exception as error:
        rule = "what a result depends on must be described: by a function that stands in a module, or by name="
        raise ValueError(f"{rule}, got {value!r}") from error
    if isinstance(found, str):
        return f"{type(value).__qualname__}.{found}"
    return inner([list(part) if isinstance(part, Iterator) else part for part in found])
