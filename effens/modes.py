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
            done = {}
            for module in modules:
                count, mode = MODES.pop(module)
                if count > 1:
                    MODES[module] = count - 1, mode
                else:
                    done[module] = mode
            if len(done) == len(modules) and done[network]:
                network.train()  # by its own method, which may do more than this
            for module, mode in done.items():
                module.training = mode


def still_modules(network: nn.Module) -> list[nn.Module]:
    """Return the modules that their owner has put into eval mode, batch norm say; where all are, what is frozen."""
    still = [module for module in network.modules() if not module.training]
    if still and not any(module.training for module in network.modules() if not any(module.children())):
        frozen = {part for module in still if is_frozen(module) for part in module.modules()}
        still = [module for module in still if module in frozen]
    return still


def is_frozen(module: nn.Module) -> bool:
    """Say whether a module has weights, none of which is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)
