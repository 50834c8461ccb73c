"""What tells a call from others: its arguments, by what they hold, the same in every process."""

import json
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from types import FunctionType, ModuleType
from typing import Any, NoReturn

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
    return sha256(json.dumps(described(value), sort_keys=True).encode()).hexdigest()[:12]


def described(value: Any, inside: tuple[int, ...] = ()) -> Any:
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
    if isinstance(value, bytes):
        return sha256(value).hexdigest()
    if isinstance(value, Tensor):
        return described(to_bytes({"": value.detach().cpu().contiguous()}))
    if id(value) in inside:
        return f"what holds this, {len(inside) - inside.index(id(value))} further out"
    inner = partial(described, inside=(*inside, id(value)))
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(inner(key)): inner(value[key]) for key in value}
    if isinstance(value, tuple | list):
        return [inner(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(inner(part), sort_keys=True) for part in value)
    found = parts(value)
    return found if isinstance(found, str) else inner(found)


def parts(value: Any) -> Any:
    """Return the name that tells a value from others, or what it is made of."""
    name, owner = getattr(value, "__qualname__", None), getattr(value, "__self__", None)
    if isinstance(value, ModuleType):
        return value.__name__
    if name is not None and "<" not in name and (owner is None or isinstance(owner, ModuleType)):
        return f"{value.__module__}.{name}"
    match value:
        case partial():
            return [value.func, value.args, value.keywords]
        case torch.Generator():
            return ["generator", value.initial_seed()]  # its state moves on
        case DataLoader():
            return [type(value), {key: part for key, part in vars(value).items() if key != "_iterator"}]  # its workers
        case FunctionType() | type():
            refuse(value)
    return reduced(value)


def reduced(value: Any) -> Any:
    """Return what pickling would keep of an object; raise `ValueError` if nothing."""
    try:
        found = value.__reduce_ex__(4)
    except Exception as error:
        refuse(value, error)
    if isinstance(found, str):
        return f"{type(value).__qualname__}.{found}"
    return [list(part) if isinstance(part, Iterator) else part for part in found]


def refuse(value: Any, error: Exception | None = None) -> NoReturn:
    """Raise `ValueError`: the value cannot be described."""
    rule = "what a result depends on must be described: by a function that stands in a module, or by name="
    raise ValueError(f"{rule}, got {value!r}") from error
