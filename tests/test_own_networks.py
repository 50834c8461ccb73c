"""Networks that readers bring, with every method: right, or refused with the remedy before any training."""

import copy
from collections import UserDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import images, relative, series, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, default_collate

import effens
from effens.modes import eval_mode

FIT: dict[str, Any] = {"epochs": 4, "batch_size": 11, "lr": 1e-2, "device": "cpu"}


def stacked(*makers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*[make() for make in makers])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.b(self.a(x).tanh()))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.a(self.a(x).tanh()).tanh())


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()).requires_grad_(False).eval()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


class Cross(nn.Module):
    """Queries of its own attend to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.attention(self.query.expand(len(x), -1, -1), x, x)[0].flatten(1))


class Decoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.decoder, self.head = nn.TransformerDecoder(layer, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.decoder(x, x).mean(1))


class Forecast(nn.Module):
    """A recurrent network."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.cells(x)[0][:, -1])


def linear(inputs: int, outputs: int) -> Callable[[], nn.Module]:
    return partial(nn.Linear, inputs, outputs)


NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "cumulative statistics": (stacked(linear(4, 6), partial(nn.BatchNorm1d, 6, momentum=None), linear(6, 3)), vectors),
    "no affine": (stacked(linear(4, 6), partial(nn.BatchNorm1d, 6, affine=False), linear(6, 3)), vectors),
    "no statistics": (
        stacked(linear(4, 6), partial(nn.BatchNorm1d, 6, track_running_stats=False), linear(6, 3)),
        vectors,
    ),
    "series": (
        stacked(
            *(partial(nn.Conv1d, 2, 6, 3, padding="same", dilation=2), nn.ReLU),
            *(partial(nn.Conv1d, 6, 6, 3, groups=3, stride=2), nn.Flatten, linear(24, 3)),
        ),
        series,
    ),
    "images": (
        stacked(partial(nn.Conv2d, 1, 4, 3), partial(nn.BatchNorm2d, 4), nn.ReLU, nn.Flatten, linear(144, 3)),
        images,
    ),
    "other norms": (
        stacked(linear(4, 6), partial(nn.LayerNorm, 6), nn.GELU, partial(nn.GroupNorm, 2, 6), linear(6, 3)),
        vectors,
    ),
    "tied": (Tied, vectors),
    "a layer twice": (Twice, vectors),
    "half frozen": (HalfFrozen, vectors),
    "cross attention": (Cross, tokens),
    "decoder": (Decoding, tokens),
    "recurrent": (Forecast, tokens),
}
METHODS: dict[str, Any] = {
    "deep": effens.DeepEnsemble,
    "batch": effens.BatchEnsemble,
    "batch, own norms": partial(effens.BatchEnsemble, norms="own"),
    "snapshot": effens.SnapshotEnsemble,
    "swag": effens.SWAG,
    "mimo": effens.MIMO,
}
REFUSED = {
    ("no statistics", "batch"): "BatchEnsemble must answer as its members do alone",  # each batch is its own norm
    ("recurrent", "batch"): r"'cells', GRU.*skip=\('cells',\)",
    ("recurrent", "batch, own norms"): r"'cells', GRU.*skip=\('cells',\)",
    ("tied", "mimo"): "whose weights another layer has, too: name another with first=",
    ("a layer twice", "mimo"): "never called through their forward|outputs that differ|got: ",
    ("half frozen", "mimo"): "'body.0', Linear, which is frozen.*: name another with first=",
    ("cross attention", "mimo"): "MultiheadAttention, which reads its layers' weights.*: name another with first=",
    ("decoder", "mimo"): "TransformerDecoderLayer, which reads its layers' weights.*: name another with first=",
    ("recurrent", "mimo"): "first and last must be two layers",
}


@pytest.mark.filterwarnings("ignore:all members share .*'query'")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
def test_right_or_refused(net: str, method: str, tmp_path: Path) -> None:
    make, data = NETS[net]
    x, y = data()

    def build(seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return METHODS[method](lambda: make().double(), 3)

    if (net, method) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[net, method]):
            effens.fit(build(), (x, y), **FIT)
        return
    ensemble = build()
    start = copy.deepcopy(ensemble.member(0).state_dict()) if ensemble.streams == 3 else None
    effens.fit(ensemble, (x, y), **FIT)
    if net == "half frozen" and start is not None:
        for name, tensor in ensemble.member(0).state_dict().items():
            assert torch.equal(tensor, start[name]) == name.startswith("body"), name
    loaded = build(seed=1)
    effens.save(ensemble, tmp_path / "ensemble.safetensors")
    effens.load(loaded, tmp_path / "ensemble.safetensors")
    assert torch.equal(effens.predict(loaded, x), effens.predict(ensemble, x))
    short = copy.deepcopy(loaded).float()
    for each, inputs, near in ((loaded, x, 1e-9), (copy.deepcopy(ensemble), x, 1e-9), (short, x.float(), 1e-4)):
        answers = each.eval()(inputs)
        for m in range(3):
            assert relative(answers[m], each.member(m)(inputs)) < near


def body() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double().requires_grad_(False)


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


ON_TRUNK: dict[str, Any] = {
    "deep": lambda: effens.DeepEnsemble(head, 3, trunk=body()),
    "batch": lambda: effens.BatchEnsemble(head, 3, trunk=body()),
    "snapshot": lambda: effens.SnapshotEnsemble(head, 3, trunk=body()),
    "swag": lambda: effens.SWAG(head, 3, trunk=body()),
    "mimo": lambda: effens.MIMO(head, 3, trunk=body()),
    "lora": lambda: effens.LoRAEnsemble(head, 3, layers=("0",), heads=("2",), trunk=body()),
}


@pytest.mark.parametrize("kind", ["tensors", "loader"])
@pytest.mark.parametrize("method", ON_TRUNK)
def test_killed_on_a_trunk_and_continued_is_uninterrupted(method: str, kind: str, tmp_path: Path) -> None:
    x, y = vectors()
    options: dict[str, Any] = {"epochs": 5, "batch_size": 8, "lr": 1e-2, "clip": 1.0, "device": "cpu"}
    kept = {"checkpoint": tmp_path / "run.pt"}

    def run(**more: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        ensemble = ON_TRUNK[method]()
        data: Any = (x, y) if kind == "tensors" else DataLoader(TensorDataset(x, y), 8, shuffle=True)
        history = effens.fit(ensemble, data, **options, **more)
        return history.losses, effens.predict(ensemble, x)

    def kill(epoch: int, *_: Any) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(callback=kill, **kept)
    for once, again in zip(whole, run(**kept), strict=True):
        assert torch.equal(once, again)


def test_snapshots_stopped_early_beside_others() -> None:
    x, y = vectors()
    torch.manual_seed(0)
    ensemble = effens.SnapshotEnsemble(lambda: nn.Linear(4, 3).double(), 4)
    effens.fit(ensemble, (x, y), epochs=8, batch_size=11, device="cpu", callback=lambda epoch, *_: epoch == 4)
    assert ensemble.members == 2
    mixture = effens.DeepEnsemble.of([ensemble, copy.deepcopy(ensemble)])
    assert mixture.members == len(mixture(x)) == 4
    for m in range(4):
        assert relative(mixture(x)[m], mixture.member(m)(x)) < 1e-12
    answering, weights = ensemble.answering()
    assert weights == [1.0, 1.0, 0.0, 0.0]
    assert relative(answering(x)[:2], ensemble(x)) < 1e-12


def test_frozen_layers_may_be_shared_and_are_not_copied() -> None:
    frozen = nn.Linear(4, 4).double().requires_grad_(False)

    def make() -> nn.Module:
        return nn.Sequential(frozen, nn.Tanh(), nn.Linear(4, 3).double())

    (x, y), head = vectors(), 4 * 3 + 3
    deep, snapshots = effens.DeepEnsemble(make, 3), effens.SnapshotEnsemble(make, 3)
    swag = effens.SWAG(make, 3)
    for ensemble, heads in ((deep, 3), (snapshots, 4), (swag, 4)):
        assert sum(parameter.numel() for parameter in ensemble.parameters()) == 4 * 4 + 4 + heads * head
        effens.fit(ensemble, (x, y), epochs=6, device="cpu")
        for m in range(3):
            assert relative(ensemble(x)[m], ensemble.member(m)(x)) < 1e-12
            assert torch.equal(ensemble.member(m).get_parameter("0.weight"), frozen.weight)


class Leftover(nn.Module):
    """A pretrained network often has layers that its forward does not need: a pooler, an auxiliary head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pooler, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.a(x).tanh())


def test_layers_that_nobody_calls_are_named_and_can_be_left_out() -> None:
    x = torch.randn(5, 4)
    for make in (
        partial(effens.BatchEnsemble, Leftover, 3),
        partial(effens.LoRAEnsemble, Leftover, 3, layers=("a", "pooler")),
    ):
        with pytest.raises(ValueError, match=r"layers that are never called through their forward: \['pooler'\]"):
            make()(x)
    for ensemble in (effens.BatchEnsemble(Leftover, 3, skip="pooler"), effens.LoRAEnsemble(Leftover, 3, layers="a")):
        assert relative(ensemble(x)[1], ensemble.member(1)(x)) < 1e-6


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot", "swag"])
def test_a_loop_of_one_s_own_keeps_frozen_batch_norm(method: str) -> None:
    x, y = vectors()
    torch.manual_seed(0)
    ensemble = METHODS[method](lambda: HalfFrozen().double(), 2)
    for mode in (True, False, True):
        ensemble.train(mode)
        norms = [module for module in ensemble.modules() if isinstance(module, nn.BatchNorm1d)]
        assert not any(module.training for module in norms)
    assert ensemble.training
    effens.fit(ensemble, (x, y), **FIT)
    ensemble.train()
    norms = [module for module in ensemble.modules() if isinstance(module, nn.BatchNorm1d)]
    assert not any(module.training for module in norms)


def test_lora_keeps_the_statistics_of_what_is_frozen() -> None:
    x, y = vectors()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()

    ensemble = effens.LoRAEnsemble(make, 3, rank=2, layers=("0",), heads=("3",))
    before = ensemble.network.get_buffer("1.running_mean").clone()
    effens.fit(ensemble, (x + 3, y), **FIT)
    assert torch.equal(ensemble.network.get_buffer("1.running_mean"), before)


def test_mappings_that_are_no_dicts() -> None:
    class Encoding(UserDict[str, Tensor]):
        """As tokenizers return them."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Any:
            return Encoding(logits=self.head(x))

    x, y = vectors()
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    loader: Any = DataLoader(rows, 8, collate_fn=lambda part: Encoding(default_collate(part)))  # type: ignore[arg-type]
    ensemble = effens.DeepEnsemble(Net, 2)
    effens.fit(ensemble, loader, epochs=1, device="cpu")
    assert torch.equal(effens.predict(ensemble, Encoding(x=x)), effens.predict(ensemble, {"x": x}))


@pytest.mark.parametrize("method", ON_TRUNK)
def test_modes_on_a_trunk(method: str) -> None:
    (x, y), ensemble = vectors(), ON_TRUNK[method]()
    for _ in range(2):
        effens.fit(ensemble, (x, y), **FIT)
        copied = copy.deepcopy(ensemble).train()
        assert not any(module.training for module in copied.trunk.modules())
        assert not any(module.training for module in ensemble.member(1).modules())


def test_a_list_of_examples_is_a_dataset() -> None:
    x, y = vectors()
    answers = []
    for data in ([(a, b) for a, b in zip(x, y, strict=True)], TensorDataset(x, y), [x, y], (x, y)):
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(lambda: nn.Linear(4, 3).double(), 2)
        effens.fit(ensemble, data, **FIT)
        answers.append(ensemble(x))
    assert all(torch.equal(answers[0], answer) for answer in answers)


class OneLayer(nn.Module):
    """A transformer layer, whose attention may be frozen."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.layer.self_attn.requires_grad_(not frozen)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x).sum(1))


@pytest.mark.parametrize(
    "make",
    [
        partial(effens.LoRAEnsemble, OneLayer, 3, layers=("linear1", "linear2")),
        partial(effens.BatchEnsemble, partial(OneLayer, True), 3),
        partial(effens.BatchEnsemble, OneLayer, 3, skip="layer.self_attn"),
        partial(effens.BatchEnsemble, OneLayer, 3, skip=("layer.self_attn", "layer.linear1")),
        partial(effens.BatchEnsemble, partial(OneLayer, True), 3, norms="own"),
    ],
)
def test_no_way_past_the_layers_of_a_transformer(make: Any) -> None:
    torch.manual_seed(0)
    (x, y), ensemble = tokens(), make().double()
    effens.fit(ensemble, (x, y), epochs=5, lr=0.1, device="cpu")
    with torch.no_grad():
        answers = ensemble(x)
        assert relative(answers, ensemble.train()(x)) < 1e-9  # there is no dropout
        for m in range(3):
            assert relative(answers[m], ensemble.eval().member(m)(x)) < 1e-9


def after_frozen() -> nn.Module:
    """A network with batch norm behind a frozen one."""
    torch.manual_seed(3)
    layers = [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    network = nn.Sequential(*layers).double()
    frozen = network.get_submodule("1").eval().requires_grad_(False)
    frozen.get_buffer("running_mean").fill_(3)
    frozen.get_buffer("running_var").fill_(9)
    return network


def test_swag_refreshes_behind_frozen_statistics_and_after_a_kill(tmp_path: Path) -> None:
    x, y = vectors()
    options: dict[str, Any] = {"epochs": 4, "batch_size": 11, "lr": 0.1, "optimizer": torch.optim.SGD, "device": "cpu"}

    def kill(epoch: int, *_: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    whole, first, second = (effens.SWAG(after_frozen, 2) for _ in range(3))
    effens.fit(whole, (x, y), **options)
    with pytest.raises(KeyboardInterrupt):
        effens.fit(first, (x, y), checkpoint=tmp_path / "run.pt", callback=kill, **options)
    effens.fit(second, (x, y), checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(whole(x), second(x))
    member = whole.member(0)
    assert torch.equal(member.get_buffer("1.running_mean"), torch.full((8,), 3.0, dtype=torch.float64))
    again = copy.deepcopy(member)
    norm: Any = again.get_submodule("4")
    norm.train()
    norm.reset_running_stats()
    norm.momentum = None
    for part in x[torch.randperm(22, generator=torch.Generator().manual_seed(0))].split(11):
        again(part)
    assert relative(member.get_buffer("4.running_mean"), norm.running_mean) < 1e-9


def test_mixtures_of_ensembles_on_trunks_and_of_some_that_stop_early() -> None:
    (x, y), ensembles = vectors(), [ON_TRUNK["snapshot"]() for _ in range(2)]
    mixture = effens.DeepEnsemble.of(ensembles)
    for ensemble in ensembles:
        effens.fit(ensemble, (x, y), epochs=6, device="cpu", callback=lambda epoch, *_: epoch == 1)
    assert mixture.members == len(mixture(x)) == 2
    answering, weights = mixture.answering()
    assert relative(answering(x)[torch.tensor(weights) > 0], mixture(x)) < 1e-12
    with pytest.raises(IndexError, match="member must be in 0 ... 1, got 2"):
        mixture.member(2)


def test_a_trunk_that_also_returns_a_mask() -> None:
    class Masking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (found := self.inner(x)), found > 0

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 3).double()

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            return self.inner(x * mask)

    (x, y), ensemble = vectors(), effens.DeepEnsemble(Masked, 2, trunk=Masking())
    effens.fit(ensemble, (x, y), **FIT)
    assert relative(ensemble(x)[1], ensemble.member(1)(x)) < 1e-12


def test_batch_norm_without_a_shift_and_used_twice() -> None:
    def twice() -> nn.Module:
        norm = nn.BatchNorm1d(8, affine=False)
        return nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 8), norm, nn.Linear(8, 3)).double()

    x, _ = vectors()
    for make in (stacked(linear(4, 8), partial(nn.BatchNorm1d, 8, bias=False), linear(8, 3)), twice):
        networks = [make().double() for _ in range(2)]
        plain = copy.deepcopy(networks)
        ensemble = effens.DeepEnsemble(partial(next, iter(networks)), 2)
        ensemble.train()(x)
        for m, network in enumerate(plain):
            network.train()(x)
            assert relative(ensemble.eval()(x)[m], network.eval()(x)) < 1e-12
            assert relative(ensemble.member(m)(x), network(x)) < 1e-12


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot", "swag", "mimo"])
def test_one_tensor_in_a_tuple_or_a_dict(method: str) -> None:
    x, y = vectors()
    answers = []
    for wrapped in (x, (x,), {"input": x}):
        torch.manual_seed(0)
        ensemble = METHODS[method](lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 3)).double(), 2)
        optimizer = torch.optim.SGD if method == "swag" else torch.optim.AdamW
        effens.fit(ensemble, (wrapped, y), optimizer=optimizer, **FIT)
        answers.append(ensemble(wrapped))
    assert relative(answers[1], answers[0]) < 1e-9
    assert torch.equal(answers[1], answers[2])


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, shift: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.inner(x) * scale + shift
        return out


class Keywords(nn.Module):
    """A head that is called with a tensor by its place, and with others by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), Scaled()

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x), shift=x[:, :1], scale=3.0)


def test_a_head_gets_its_keywords() -> None:
    ensemble = effens.LoRAEnsemble(Keywords, 3, layers="body", heads="head").double()
    x, y = vectors()
    effens.fit(ensemble, (x, y), **FIT)
    for m in range(3):
        assert relative(ensemble(x)[m], ensemble.member(m)(x)) < 1e-9


def half_frozen() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    network[0].requires_grad_(False)
    return network


@pytest.mark.parametrize("method", [effens.SnapshotEnsemble, effens.SWAG])
def test_what_members_share_cannot_be_trained_later(method: Any) -> None:
    ensemble, (x, y) = method(half_frozen, 2), vectors()
    options: dict[str, Any] = {**FIT, "optimizer": torch.optim.SGD}
    effens.fit(ensemble, (x, y), **options)
    before = ensemble(x)
    ensemble.network.requires_grad_(True)
    with pytest.raises(ValueError, match=r"weights that were frozen .* must stay so, .*got \['0.bias', '0.weight'\]"):
        effens.fit(ensemble, (x, y), **options)
    assert torch.equal(ensemble(x), before)


def test_putting_a_member_leaves_what_the_others_share() -> None:
    torch.manual_seed(0)
    body = nn.Linear(4, 6).double().requires_grad_(False)
    ensemble = effens.DeepEnsemble(lambda: nn.Sequential(body, nn.ReLU(), nn.Linear(6, 3).double()), 3)
    x, other = vectors()[0], half_frozen()
    before = ensemble(x)
    with pytest.raises(ValueError, match=r"what members share must be equal in the network, .*\['0.(bias|weight)'"):
        ensemble.put(1, other)
    assert torch.equal(ensemble(x), before)
    other[0].load_state_dict(body.state_dict())
    ensemble.put(1, other)
    assert relative(ensemble(x)[1], other(x)) < 1e-12
    assert torch.equal(ensemble(x)[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("method", ["batch", "deep"])
def test_attention_that_shares_weights_with_another(method: str) -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(4, 2, batch_first=True) for _ in range(2))
            self.b.in_proj_weight = self.a.in_proj_weight
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            x = self.a(x, x, x, need_weights=False)[0]
            return self.head(self.b(x, x, x, need_weights=False)[0].sum(1))

    def make() -> nn.Module:
        return Sharing().double()

    x, y = tokens()
    if method == "batch":
        with pytest.raises(ValueError, match="attention modules that share weights must be one module"):
            effens.BatchEnsemble(make, 2)
    else:
        ensemble = effens.DeepEnsemble(make, 2)
        effens.fit(ensemble, (x, y), **FIT)
        assert relative(ensemble(x)[1], ensemble.member(1)(x)) < 1e-9


def test_a_dict_of_tensors_with_labels_is_data_and_can_be_predicted() -> None:
    x, y = vectors()
    answers = []
    for data in (({"input": x}, y), {"input": x, "labels": y}):
        torch.manual_seed(0)
        ensemble = effens.DeepEnsemble(lambda: nn.Sequential(nn.Linear(4, 3)).double(), 2)
        effens.fit(ensemble, data, **FIT)
        answers.append(effens.predict(ensemble, {"input": x, "labels": y}))
    assert torch.equal(*answers)
    assert torch.equal(answers[0], effens.predict(ensemble, x))
    with pytest.raises(ValueError, match="data must give pairs of tensors .* or dicts with labels"):
        effens.fit(ensemble, {"input": x, "target": y}, **FIT)


@pytest.mark.filterwarnings("error")
def test_a_parameter_is_named_in_skip() -> None:
    effens.BatchEnsemble(Cross, 2, skip=("query",))


def test_a_trunk_belongs_to_each_ensemble() -> None:
    made = [effens.DeepEnsemble(lambda: nn.Linear(4, 3), 2) for _ in range(2)]
    with pytest.raises(ValueError, match="trunk must be given to each of the ensembles"):
        effens.DeepEnsemble.of(made, trunk=nn.Linear(4, 4))


def test_batch_norm_that_was_told_to_keep_no_statistics() -> None:
    def make() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
        vars(network[1])["track_running_stats"] = False
        return network

    ensemble, (x, _) = effens.DeepEnsemble(make, 2).train(), vectors()
    members = [ensemble.member(m) for m in range(2)]
    assert relative(ensemble(x), torch.stack([member(x) for member in members])) < 1e-9
    ensemble.eval()
    assert relative(ensemble(x), torch.stack([member.eval()(x) for member in members])) < 1e-9


def test_batch_norm_of_another_dimension_is_refused() -> None:
    ensemble = effens.DeepEnsemble(lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(50, 3)), 2)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        ensemble(torch.randn(6, 2, 5, 5))


def test_a_dataset_whose_examples_have_names() -> None:
    x, y = vectors()
    rows = {f"row {i}": (x[i], y[i]) for i in range(len(y))}
    loader: Any = DataLoader(rows, batch_size=7, sampler=list(rows))  # type: ignore[arg-type]
    make = stacked(lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), lambda: nn.Linear(6, 3))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):  # PyTorch's own, at the last step
        effens.fit(effens.DeepEnsemble(lambda: make().double(), 2), loader, epochs=1, device="cpu")


def test_a_part_that_another_thread_asks_leaves_the_whole_in_eval_mode() -> None:
    part = effens.DeepEnsemble(lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout()), 2)
    whole = effens.DeepEnsemble.of([part]).train()
    with eval_mode(whole):
        with eval_mode(part):
            pass
        assert not any(module.training for module in whole.modules())
    assert all(module.training for module in whole.modules())
    outer, inner = eval_mode(part), eval_mode(whole)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert not any(module.training for module in whole.modules())
    inner.__exit__(None, None, None)
    assert all(module.training for module in whole.modules())


def batch_normed() -> nn.Sequential:
    layers = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double()


def pretrained_in_eval_mode() -> nn.Sequential:
    """As networks come from a hub: in eval mode, here with all but the head frozen."""
    network = batch_normed().requires_grad_(False).eval()
    network[4].requires_grad_(True)
    return network


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot", "swag", "lora"])
def test_frozen_statistics_stay_where_all_is_in_eval_mode(method: str) -> None:
    (x, y), lora = vectors(), partial(effens.LoRAEnsemble, layers="0", heads="4")
    ensemble = {**METHODS, "lora": lora}[method](pretrained_in_eval_mode, 2)
    optimizer = torch.optim.SGD if method == "swag" else torch.optim.AdamW
    for _ in range(2):
        effens.fit(ensemble, (x + 3, y), optimizer=optimizer, **FIT)
        assert not bool(ensemble.member(1).get_buffer("1.running_mean").any())


def test_what_is_frozen_between_two_trainings_stays() -> None:
    ensemble, (x, y) = effens.DeepEnsemble(batch_normed, 2), vectors()
    effens.fit(ensemble, (x, y), **FIT)
    norm = ensemble.network[1].requires_grad_(False)  # type: ignore[index]
    before = ensemble.member(0).get_buffer("1.running_mean").clone()
    assert not norm.training
    effens.fit(ensemble, (x + 3, y), **FIT)
    assert torch.equal(ensemble.member(0).get_buffer("1.running_mean"), before)


def test_weights_that_are_trained_in_eval_mode_are_named() -> None:
    def make() -> nn.Module:
        network = batch_normed().eval()
        network[4] = nn.Linear(6, 3).double()
        return network

    ensemble, (x, y) = effens.DeepEnsemble(make, 2), vectors()
    with pytest.warns(UserWarning, match=r"modules in eval mode stay in it, .*\['network.0'\].*call .train\(\)"):
        effens.fit(ensemble, (x, y), **FIT)


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot"])
def test_a_trunk_that_is_partly_frozen_keeps_its_modes(method: str) -> None:
    trunk = batch_normed()
    trunk[:2].requires_grad_(False).eval()
    ensemble, (x, y) = METHODS[method](lambda: nn.Linear(3, 3).double(), 2, trunk=trunk), vectors()
    effens.fit(ensemble, (x + 3, y), **FIT)
    assert not bool(trunk.get_buffer("1.running_mean").any())
    assert trunk[3].training is False
    ensemble.train()
    assert trunk[3].training
    assert not trunk[1].training


def test_a_list_of_anything_but_tensors_is_refused() -> None:
    x, y = vectors()
    loader = DataLoader([{"x": a, "name": "a", "labels": b} for a, b in zip(x, y, strict=True)], 8)  # type: ignore
    with pytest.raises(ValueError, match="inputs must be tensors, .* got a list without a tensor"):
        effens.fit(effens.DeepEnsemble(lambda: nn.Linear(4, 3), 2), loader, device="cpu")


def test_what_is_frozen_inside_a_layer_stays() -> None:
    def only_biases() -> nn.Module:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return network

    def but_for_the_head() -> nn.Module:
        network = only_biases()
        network.get_parameter("2.weight").requires_grad_(True)
        return network

    (x, y), ensemble = vectors(), effens.BatchEnsemble(but_for_the_head, 3)
    effens.fit(ensemble, (x, y), **FIT)
    plain = only_biases()
    with pytest.raises(ValueError, match="the network must have a trained nn.Linear"):
        effens.BatchEnsemble(only_biases, 2)
    for m in range(3):
        assert torch.equal(ensemble.member(m).get_parameter("0.weight"), plain.get_parameter("0.weight"))
        assert relative(ensemble(x)[m], ensemble.member(m)(x)) < 1e-9
    assert not torch.equal(ensemble.member(0).get_parameter("0.bias"), ensemble.member(1).get_parameter("0.bias"))
    with pytest.raises(
        ValueError, match=r"skip must name all of an attention module, got parts \['layer.self_attn.out"
    ):
        effens.BatchEnsemble(OneLayer, 2, skip="layer.self_attn.out_proj")
    with pytest.raises(ValueError, match="skip must name modules, or the network's own parameters"):
        effens.BatchEnsemble(OneLayer, 2, skip="head.weight")
    with pytest.raises(ValueError, match="frozen, where its weights are drawn anew"):
        effens.MIMO(but_for_the_head, 2)


class TimeFirst(nn.Module):
    """The branch that mixes rows starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.head = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        z = self.first(x[..., None]).transpose(0, 1)
        return self.head((z + self.alpha * self.f(z).relu()).mean(0))


class Nearest(nn.Module):
    """It fails on fewer than four rows, and mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        z = self.a(x)
        return self.head(z[torch.cdist(z, z).topk(4, largest=False).indices].mean(1))


class OfOwnKind(Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "change"),
    [(TimeFirst, lambda x: x), (Nearest, lambda x: x), (TimeFirst, lambda x: x.as_subclass(OfOwnKind))],
)
def test_networks_that_mix_rows_are_refused(make: Any, change: Any) -> None:
    x, y = vectors()
    ensemble = effens.BatchEnsemble(lambda: make().double(), 2, skip="alpha" if make is TimeFirst else ())
    with pytest.raises(ValueError, match="BatchEnsemble must answer as its members do alone"):
        effens.fit(ensemble, (change(x), y), **FIT)


def test_rows_of_nan_leave_the_check_for_later() -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            z = self.a(x)
            return z - z.mean(0)

    ensemble, x = effens.BatchEnsemble(Centred, 2), torch.randn(6, 4)
    broken = x.clone()
    broken[0] = torch.nan
    ensemble(broken)
    with pytest.raises(ValueError, match="must answer as its members do alone"):
        ensemble(x)


def test_numbers_of_numpy_are_kept_in_checkpoints(tmp_path: Path) -> None:
    ensemble = effens.DeepEnsemble(lambda: nn.Linear(4, 3).double(), 2)
    options: dict[str, Any] = {**FIT, "lr": np.float32(0.01), "weight_decay": np.float64(0.1)}
    optimizer = partial(torch.optim.AdamW, eps=np.float64(1e-8))
    for _ in range(2):
        effens.fit(ensemble, vectors(), optimizer=optimizer, checkpoint=tmp_path / "run.pt", **options)


@pytest.mark.parametrize("method", ["deep", "snapshot", "swag", "batch"])
def test_a_sequential_with_a_parameter_of_its_own(method: str) -> None:
    def make() -> nn.Module:
        network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
        network.log_temperature = nn.Parameter(torch.zeros((), dtype=torch.float64))
        return network

    options = {"skip": "log_temperature"} if method == "batch" else {}
    ensemble, (x, y) = METHODS[method](make, 2, **options), vectors()
    effens.fit(ensemble, (x, y), optimizer=torch.optim.SGD, **FIT)
    assert "log_temperature" in dict(ensemble.member(1).named_parameters())
    assert relative(ensemble(x)[1], ensemble.member(1)(x)) < 1e-9


class Encoding(nn.Module):
    def __init__(self, heads: int = 2, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, heads, 8, 0.0, batch_first=True, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.layer(x).mean(1))


class Rows(Dataset[Any]):
    """A dict and a list in attributes, as in Hugging Face's tutorials."""

    def __init__(self, columns: dict[str, Tensor], labels: list[int]) -> None:
        self.columns, self.labels = columns, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return {**{name: part[i] for name, part in self.columns.items()}, "labels": torch.tensor(self.labels[i])}


def killed(ensemble: effens.Ensemble, data: Any, path: Path, **options: Any) -> None:
    def kill(epoch: int, *_: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        effens.fit(ensemble, data, checkpoint=path, callback=kill, **{**FIT, **options})


@pytest.mark.parametrize("other", [{"heads": 4}, {"norm_first": True}, {"activation": "gelu"}])
def test_a_checkpoint_of_another_transformer_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    x, y = tokens()
    killed(effens.DeepEnsemble(lambda: Encoding().double(), 2), (x, y), tmp_path / "run.pt")
    ensemble = effens.DeepEnsemble(lambda: Encoding(**other).double(), 2)
    with pytest.raises(ValueError, match="must be a checkpoint of the same call, got .*"):
        effens.fit(ensemble, (x, y), checkpoint=tmp_path / "run.pt", **FIT)


class Weighted(effens.Categorical):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "weights", weights)


def test_a_checkpoint_of_other_data_or_another_likelihood_is_refused(tmp_path: Path) -> None:
    (x, y), x2 = vectors(), vectors()[0] * 5
    many = torch.ones(2000)
    other = torch.cat([many[:999], many[:1] * 7, many[:1000]])
    pairs: list[tuple[Any, Any]] = [
        (Rows({"input": x}, y.tolist()), Rows({"input": x2}, y.tolist())),
        (Rows({"input": x}, y.tolist()), Rows({"input": x}, (2 - y).tolist())),
        (ConcatDataset([TensorDataset(x, y)]), ConcatDataset([TensorDataset(x2, y)])),
    ]
    make = lambda: effens.DeepEnsemble(lambda: nn.Sequential(nn.Linear(4, 3)).double(), 2)  # noqa: E731
    for i, (first, second) in enumerate(pairs):
        killed(make(), first, tmp_path / str(i))
        with pytest.raises(ValueError, match="must be a checkpoint of the same call"):
            effens.fit(make(), second, checkpoint=tmp_path / str(i), **FIT)
    killed(make(), (x, y), tmp_path / "run", likelihood=Weighted(many))
    with pytest.raises(ValueError, match="must be a checkpoint of the same call, got likelihood"):
        effens.fit(make(), (x, y), checkpoint=tmp_path / "run", likelihood=Weighted(other), **FIT)


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot", "swag"])
@pytest.mark.parametrize("wrapped", [lambda x: (x,), lambda x: {"input": x}])
def test_a_bare_layer_gets_a_tuple_or_a_dict(method: str, wrapped: Any) -> None:
    (x, y), ensemble = vectors(), METHODS[method](lambda: nn.Linear(4, 3).double(), 2)
    effens.fit(ensemble, (wrapped(x), y), optimizer=torch.optim.SGD, **FIT)
    assert relative(ensemble(wrapped(x))[1], ensemble.member(1)(x)) < 1e-9


class Merging(nn.Linear):
    """Low-rank weights that eval mode merges, as in loralib."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.low, self.merged = nn.Parameter(torch.randn(3, 4)), False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.low
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.low, self.bias)


def test_predicting_puts_modes_back_by_the_network_s_own_method() -> None:
    ensemble, x = effens.DeepEnsemble(Merging, 2).train(), torch.randn(5, 4)
    effens.predict(ensemble, x)
    assert not any(module.merged for module in ensemble.modules() if isinstance(module, Merging))


def test_weights_are_not_unfrozen_in_a_callback() -> None:
    ensemble = effens.DeepEnsemble(half_frozen, 2)
    with pytest.raises(ValueError, match="a callback must not unfreeze weights"):
        effens.fit(ensemble, vectors(), callback=lambda *_: ensemble.requires_grad_() and None, **FIT)


def test_a_run_that_was_stopped_and_killed_at_its_end_stays_stopped(tmp_path: Path) -> None:
    counts = []
    for broken in (True, False):
        ensemble = effens.SWAG(lambda: nn.Sequential(nn.Linear(4, 3)).double(), 2)
        if broken:
            ensemble.finish = None  # type: ignore[method-assign, assignment]
        options: dict[str, Any] = {**FIT, "optimizer": torch.optim.SGD, "checkpoint": tmp_path / "run.pt"}
        with pytest.raises(TypeError) if broken else nullcontext():
            effens.fit(ensemble, vectors(), callback=lambda epoch, *_: epoch == 2, **options)
        counts.append(int(ensemble.count))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["deep", "batch", "snapshot", "swag"])
def test_a_network_that_keeps_an_activation_can_be_copied(method: str) -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            self.kept = self.a(x).relu()
            return self.head(self.kept)

    (x, y), ensemble = vectors(), METHODS[method](lambda: Keeping().double(), 2)
    effens.fit(ensemble, (x, y), optimizer=torch.optim.SGD, **FIT)
    member = ensemble.member(1)
    with torch.no_grad():
        assert relative(ensemble(x)[1], member(x)) < 1e-9
