"""Training and eval mode: who sets them, and how they are put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

MODES: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = WeakKeyDictionary()
LOCK = Lock()  # networks in `eval_mode`: how many threads ask for it, and the modes of before


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into eval mode; when the last thread that asked for it is done, put all modules back as before."""
    with LOCK:
        if network not in MODES:
            MODES[network] = 0, [(module, module.training) for module in network.modules()]
            network.eval()
        count, modes = MODES[network]
        MODES[network] = count + 1, modes
    try:
        yield
    finally:
        with LOCK:
            count, modes = MODES.pop(network)
            if count > 1:
                MODES[network] = count - 1, modes
            else:
                for module, mode in modes:
                    module.training = mode


def still_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that their owner has put into eval mode, frozen batch norm say; none where all are."""
    leaves = [module for module in network.modules() if not any(module.children())]
    return [module for module in network.modules() if not module.training and any(leaf.training for leaf in leaves)]
