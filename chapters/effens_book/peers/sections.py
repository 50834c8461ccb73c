"""What is timed, section by section. Each yields rows: a case, what was done, seconds, and ratios of them.

Where a peer is not installed, or there is no compiler, its numbers are left out.
"""

import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import effens
from effens.batches import take_rows
from effens.costs import kept_bytes, training_step
from effens.ensembles.base import MakeNet
from effens.serving import BACKENDS
from effens_book import nets, roofline
from effens_book.peers.contestants import LoopConv2d, LoopLinear, found, tabular, uncertainty
from effens_book.peers.timing import brief, compare, rounds

Row = dict[str, Any]
Call = Callable[[], object]

# in, out, members, batch of each
LINEAR = (
    (64, 64, 4, 1),
    (64, 64, 4, 32),
    (64, 64, 4, 256),
    (64, 64, 32, 256),
    (64, 64, 4, 4096),
    (256, 256, 4, 1),
    (256, 256, 4, 32),
    (256, 256, 8, 1024),
    (512, 512, 32, 64),
    (1024, 1024, 4, 1),
    (1024, 1024, 4, 256),
)
SHARED = ((64, 256, 4, 1), (64, 256, 4, 4096))  # one input for all members: the first layer
CONV = ((16, 32, 4, 1, 8), (16, 32, 4, 128, 8), (64, 64, 4, 128, 8), (32, 64, 4, 8, 28))  # the last: side of an image
NETWORKS: dict[str, tuple[MakeNet, tuple[int, ...], int]] = {  # how to make one, shape of an example, classes
    "MLP 20-64x2-2": (partial(nets.mlp, 20, 2), (20,), 2),
    "MLP 20-128x3-2": (partial(nets.mlp, 20, 2, width=128, depth=3), (20,), 2),
    "CNN 16-32 of 8 x 8": (partial(nets.cnn, 10, size=8), (1, 8, 8), 10),
}
BATCH = 128


def linear(seconds: float) -> Iterator[Row]:
    """BatchEnsemble's linear layer, each member its own rows."""
    for size in LINEAR:
        yield from time_layers(name_sizes("in out members batch", size), linear_layers(*size), seconds)


def shared(seconds: float) -> Iterator[Row]:
    """BatchEnsemble's linear layer, one input for all members."""
    for size in SHARED:
        yield from time_layers(name_sizes("in out members batch", size), shared_layers(*size), seconds)


def conv(seconds: float) -> Iterator[Row]:
    """BatchEnsemble's convolution of 3 x 3, each member its own rows."""
    for size in CONV:
        yield from time_layers(name_sizes("in out members batch side", size), conv_layers(*size), seconds)


Layer = tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]  # its weights, what it does, its input


def linear_layers(inputs: int, outputs: int, members: int, batch: int) -> dict[str, Layer]:
    """Return the contestants, each with the same rows in its own layout."""
    xs = torch.randn(members, batch, inputs)
    rows = xs.flatten(0, 1)
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "effens": (effens.BatchEnsembleLinear(inputs, outputs, members), rows),
        "loop": (LoopLinear(inputs, outputs, members), xs),
        "plain product": (nn.Linear(inputs, outputs), rows),
    }
    if found("torch_uncertainty"):
        layer = uncertainty("layers.batch_ensemble").BatchLinear(inputs, outputs, members)
        layers["torch-uncertainty"] = (layer, rows)
    if found("tabm"):
        layer = tabular("LinearBatchEnsemble", inputs, outputs, members=members)
        layers["tabm"] = (layer, xs.transpose(0, 1).contiguous())  # (batch, members, in)
    return {name: (layer, layer, x) for name, (layer, x) in layers.items()}


def shared_layers(inputs: int, outputs: int, members: int, batch: int) -> dict[str, Layer]:
    """Return the contestants for one input: those that cannot share it are given a copy for each member."""
    layers, x = linear_layers(inputs, outputs, members, batch), torch.randn(batch, inputs)
    ours = layers["effens"][0]
    assert isinstance(ours, effens.BatchEnsembleLinear)
    spread: dict[str, Callable[[Tensor], Tensor]] = {
        "effens": ours.forward_shared,
        "loop": lambda x: layers["loop"][0](x.expand(members, *x.shape)),
        "plain product": lambda x: layers["plain product"][0](x),
        "torch-uncertainty": lambda x: layers["torch-uncertainty"][0](x.repeat(members, 1)),
        "tabm": lambda x: layers["tabm"][0](x[:, None].expand(-1, members, -1)),
    }
    layers["plain product"] = (plain := nn.Linear(inputs, members * outputs), plain, x)
    return {name: (layers[name][0], spread[name], x) for name in layers}


def conv_layers(inputs: int, outputs: int, members: int, batch: int, side: int) -> dict[str, Layer]:
    """Return the contestants, each with the same images."""
    xs = torch.randn(members, batch, inputs, side, side)
    rows = xs.flatten(0, 1)
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "effens": (effens.BatchEnsembleConv2d(inputs, outputs, 3, members, padding=1), rows),
        "loop": (LoopConv2d(inputs, outputs, members), xs),
        "plain product": (nn.Conv2d(inputs, outputs, 3, padding=1), rows),
    }
    if found("torch_uncertainty"):
        layer = uncertainty("layers.batch_ensemble").BatchConv2d(inputs, outputs, 3, members, padding=1)
        layers["torch-uncertainty"] = (layer, rows)
    return {name: (layer, layer, x) for name, (layer, x) in layers.items()}


def time_layers(case: Row, layers: dict[str, Layer], seconds: float) -> Iterator[Row]:
    """Time layers forward; forward and backward, gradients of input and weights; and count what they keep for it."""
    with torch.no_grad():
        calls: dict[str, Call] = {name: partial(run, x) for name, (_, run, x) in layers.items()}
        yield {"case": case, "what": "forward", **compare(calls, seconds)}
    trained = {name: (layer, run, x.clone().requires_grad_()) for name, (layer, run, x) in layers.items()}
    calls = {name: backward(*parts) for name, parts in trained.items()}
    kept = {name: kept_bytes(partial(run, x), layer) for name, (layer, run, x) in trained.items()}
    yield {"case": case, "what": "forward and backward", **compare(calls, seconds), "saved bytes": kept}


def backward(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Call:
    """Return a call that computes the gradients of everything, for a given gradient of the result."""
    wanted, upstream = [x, *layer.parameters()], torch.randn_like(run(x))
    return lambda: torch.autograd.grad(run(x), wanted, upstream)


def deep(seconds: float) -> Iterator[Row]:
    """One training step of a deep ensemble at batch 128, AdamW included."""
    for network in NETWORKS:
        for members in (5, 16):
            calls = steps(network, members)
            yield {"case": {"network": network, "members": members, "batch": BATCH}, **compare(calls, 3 * seconds)}


def steps(network: str, members: int) -> dict[str, Call]:
    """Return a training step of each contestant, with a rate of 0; every member has a shuffle of its own."""
    make_net, shape, classes = NETWORKS[network]
    x, y = torch.randn(BATCH, *shape), torch.randint(classes, (BATCH,))
    ensemble = effens.DeepEnsemble(make_net, members)
    (order,) = ensemble.batches(BATCH, BATCH)
    xs, ys = x[order], y[order]
    calls: dict[str, Call] = {
        "effens": training_step(ensemble, x, y, effens.Categorical()),
        "loop": loop([ensemble.member(m) for m in range(members)], xs, ys),
        "loop, fused AdamW": loop([ensemble.member(m) for m in range(members)], xs, ys, fused=True),
        "torch.func, fused AdamW": vmap_step([ensemble.member(m) for m in range(members)], xs, ys),
    }
    if found("tabm") and network.startswith("MLP"):
        theirs = convert_network(ensemble.member(0), partial(tabular, "LinearEnsemble", members=members))
        calls["tabm"] = joint(theirs, xs.transpose(0, 1).contiguous(), ys.T.contiguous())
    return calls


def loop(networks: Sequence[nn.Module], xs: Tensor, ys: Tensor, fused: bool | None = None) -> Call:
    """Return a step of networks one by one, each with an optimizer of its own."""
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.0, fused=fused) for network in networks]

    def step() -> None:
        for network, optimizer, x, y in zip(networks, optimizers, xs, ys, strict=True):
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def vmap_step(networks: list[nn.Module], xs: Tensor, ys: Tensor) -> Call:
    """Return a step of ``vmap(grad)`` over stacked weights."""
    weights, buffers = stack_module_state(networks)
    base = copy.deepcopy(networks[0]).to("meta")
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, fused=True)

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(base, (weights, buffers), (x,)), y)

    gradients = vmap(grad(loss))

    def step() -> None:
        for name, gradient in gradients(weights, buffers, xs, ys).items():
            weights[name].grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return step


def convert_network(network: nn.Module, layer: Callable[[int, int], nn.Module]) -> nn.Sequential:
    """Return a copy of an MLP with other linear layers: ``layer(in, out)``."""
    return nn.Sequential(
        *(
            layer(part.in_features, part.out_features) if isinstance(part, nn.Linear) else part
            for part in copy.deepcopy(network).children()
        )
    )


def joint(network: nn.Module, x: Tensor, y: Tensor) -> Call:
    """Return a step of one network that answers ``(batch, members, classes)``, the loss summed over members."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    members = y.shape[1]

    def step() -> None:
        (members * F.cross_entropy(network(x).flatten(0, 1), y.flatten())).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def swag(seconds: float) -> Iterator[Row]:
    """SWAG of a million weights: taking weights in, beside a training step at batch 128; and drawing a network."""
    ensemble = effens.SWAG(partial(nets.mlp, 512, 10, width=768, depth=2), members=1)
    case = {"weights": len(ensemble.mean), "rank": ensemble.rank, "batch": BATCH}
    x, y = torch.randn(BATCH, 512), torch.randint(10, (BATCH,))
    network = ensemble.network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)  # weights that stay are no path to take in

    def step() -> None:
        F.cross_entropy(network(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    averaged = torch.optim.swa_utils.AveragedModel(network)
    takes: dict[str, Call] = {
        "effens": partial(ensemble.collect_from, network),
        "a training step": step,
        "swa_utils (mean only)": partial(averaged.update_parameters, network),
    }
    draws: dict[str, Call] = {"effens": lambda: ensemble.at(ensemble.sample())}
    if found("torch_uncertainty"):
        theirs = uncertainty("methods.swag").SWAG(copy.deepcopy(network), 0, 1, scale=0.5, num_estimators=0)
        takes["torch-uncertainty"] = partial(theirs.update_wrapper, 1)
        draws["torch-uncertainty"] = partial(theirs.sample, 0.5)
    yield {"case": case, "what": "collect", **compare(takes, 3 * seconds)}
    yield {"case": case, "what": "sample", **compare(draws, 2 * seconds)}


def mimo(seconds: float) -> Iterator[Row]:
    """MIMO of three: making a batch for its slots, and one prediction."""
    members = 3
    ensemble = effens.MIMO(partial(nets.mlp, 20, 2, width=128, depth=3), members).eval()
    for name, shape in (("rows of 20", (20,)), ("images of 28 x 28", (1, 28, 28))):
        x, y = torch.randn(BATCH, *shape), torch.randint(2, (BATCH,))

        def ours(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
            (order,) = ensemble.batches(BATCH, BATCH)
            return take_rows(x, order), y[order]  # as `fit` does

        shuffles: dict[str, Call] = {"effens": ours}
        if found("torch_uncertainty"):
            shuffles["torch-uncertainty"] = partial(uncertainty("transforms.batch").MIMOBatchFormat(members), (x, y))
        case = {"data": name, "members": members, "batch": BATCH}
        if len(shuffles) > 1:
            yield {"case": case, "what": "shuffle", **compare(shuffles, seconds)}
    network = nets.mlp(20, 2, width=128, depth=3).eval()
    for batch in (1, 256):
        x = torch.randn(batch, 20)
        same = x.expand(members, *x.shape)
        predictions: dict[str, Call] = {
            "effens": partial(ensemble, x),
            "one network": partial(network, x),
            "every slot read": partial(ensemble.forward_members, same),
        }
        with torch.inference_mode():
            case = {"network": "MLP 20-128x3-2", "members": members, "batch": batch}
            yield {"case": case, "what": "predict", **compare(predictions, seconds)}


def serving(seconds: float) -> Iterator[Row]:
    """One prediction at batch 1 by each way of serving: every ensemble as a multiple of one network served so."""
    make_net, members, x = partial(nets.mlp, 20, 1, width=128, depth=3), 4, torch.randn(1, 20)
    ensembles: dict[str, effens.Ensemble] = {
        "one network": effens.DeepEnsemble(make_net, 1),
        "deep ensemble": effens.DeepEnsemble(make_net, members),
        "BatchEnsemble": effens.BatchEnsemble(make_net, members),
        "MIMO": effens.MIMO(make_net, members),
    }
    case = {"network": "MLP 20-128x3-1", "members": members, "batch": 1}
    with torch.inference_mode():
        calls = eager(ensembles, members, x)
        yield {"case": case, "what": "eager", **compare(calls, 3 * seconds, to="one network")}
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    calls = {name: export_call(ensemble, x, folder, backend) for name, ensemble in ensembles.items()}
                except (ImportError, RuntimeError) as error:
                    print(f"  {backend} is left out: {error}")
                    continue
                yield {"case": case, "what": backend, **compare(calls, 3 * seconds, to="one network")}


def eager(ensembles: dict[str, effens.Ensemble], members: int, x: Tensor) -> dict[str, Call]:
    """Return predictions by Python: ours, and those of others."""
    networks = [ensembles["deep ensemble"].member(m).eval() for m in range(members)]
    calls: dict[str, Call] = {name: partial(ensemble.eval(), x) for name, ensemble in ensembles.items()}
    calls["one network"] = partial(networks[0], x)
    calls["loop of networks"] = lambda: torch.stack([network(x) for network in networks])
    if found("torch_uncertainty"):
        theirs = uncertainty("layers.batch_ensemble").BatchLinear
        repeated = convert_network(networks[0], lambda inputs, outputs: theirs(inputs, outputs, members))
        calls["BatchEnsemble of torch-uncertainty"] = lambda: repeated(x.repeat(members, 1))
    if found("tabm"):
        spread = convert_network(networks[0], partial(tabular, "LinearBatchEnsemble", members=members))
        calls["BatchEnsemble of tabm"] = lambda: spread(x[:, None].expand(-1, members, -1))
    return calls


def export_call(ensemble: effens.Ensemble, x: Tensor, folder: str, backend: str) -> Call:
    """Return a prediction by an exported file: the members' mean and spread."""
    return partial(effens.export(ensemble, x, Path(folder) / "file", backend, likelihood=Outputs()).run, x)


class Outputs(effens.Likelihood):
    """Outputs as they are."""

    def predict(self, outputs: Tensor) -> Tensor:
        """Return ``outputs``."""
        return outputs


GROWTH = {"members": (1, 2, 4, 8, 16, 32, 64), "width": (32, 64, 128, 256, 512), "batch": (1, 4, 16, 64, 256, 1024)}
MIDDLE = {"members": 8, "width": 128, "batch": 32}


def growth(seconds: float) -> Iterator[Row]:
    """A prediction and a training step of MLPs as members, width or batch grow, beside what the roofline says."""
    machine = roofline.measure_machine(lambda call, seconds: statistics.median(rounds({"it": call}, seconds)["it"]))
    for axis, values in GROWTH.items():
        for value in values:
            point = {**MIDDLE, axis: value}
            for what, calls in (("predict", predictions(**point)), ("train", training(**point))):
                with torch.set_grad_enabled(what == "train"):
                    for call in calls.values():
                        call()  # a first call may look the network over, and makes the optimizer's state
                    said = {
                        name: brief(sum(roofline.count_operations(call).predict(machine)))
                        for name, call in calls.items()
                    }
                    row = compare(calls, seconds / 2, to="one network")
                yield {"case": {**point, "axis": axis}, "what": what, **row, "predicted": said}


def predictions(members: int, width: int, batch: int) -> dict[str, Call]:
    """Return a prediction by each kind of ensemble."""
    x, make_net = torch.randn(batch, 20), partial(nets.mlp, 20, 2, width=width, depth=3)
    networks = [make_net().eval() for _ in range(members)]
    return {
        "one network": partial(networks[0], x),
        "loop of networks": lambda: torch.stack([network(x) for network in networks]),
        "deep ensemble": partial(effens.DeepEnsemble(make_net, members).eval(), x),
        "BatchEnsemble": partial(effens.BatchEnsemble(make_net, members).eval(), x),
    }


def training(members: int, width: int, batch: int) -> dict[str, Call]:
    """Return a training step of each kind of ensemble, with fused AdamW."""
    x, y = torch.randn(batch, 20), torch.randint(2, (batch,))
    make_net = partial(nets.mlp, 20, 2, width=width, depth=3)
    networks = [make_net() for _ in range(members)]
    ensembles = [effens.DeepEnsemble(make_net, members), effens.BatchEnsemble(make_net, members)]
    ours = [training_step(ensemble, x, y, effens.Categorical(), batch) for ensemble in ensembles]
    return {
        "one network": loop([make_net()], x[None], y[None], fused=True),
        "loop of networks": loop(networks, x.expand(members, *x.shape), y.expand(members, -1), fused=True),
        "deep ensemble": ours[0],
        "BatchEnsemble": ours[1],
    }


def name_sizes(names: str, sizes: Sequence[int]) -> Row:
    """Return sizes by their names."""
    return dict(zip(names.split(), sizes, strict=True))


SECTIONS: dict[str, Callable[[float], Iterator[Row]]] = {
    section.__name__: section for section in (linear, shared, conv, deep, swag, mimo, serving, growth)
}
