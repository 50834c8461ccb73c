"""Training and eval mode: who sets them, and how they are put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

MODES: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
LOCK = Lock()  # modules in `eval_mode`: how many threads ask for it, and the mode of before


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode; when the last thread that asked for a module is done, put it back as before."""
    modules = list(network.modules())
    with LOCK:
        first = network not in MODES
        for module in modules:
            count, mode = MODES.get(module, (0, module.training))
            MODES[module] = count + 1, mode
        if first:
            network.eval()
    try:
        yield
    finally:
        with LOCK:
            for module in modules:
                count, mode = MODES.pop(module)
                if count > 1:
                    MODES[module] = count - 1, mode
                else:
                    module.training = mode


def still_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that their owner has put into eval mode, frozen batch norm say; none where all are."""
    leaves = [module for module in network.modules() if not any(module.children())]
    return [module for module in network.modules() if not module.training and any(leaf.training for leaf in leaves)]
