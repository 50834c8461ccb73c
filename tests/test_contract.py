"""What every method must pass: one contract, one line for each method."""

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from scenarios import (
    attending,
    cnn,
    convnet1d,
    generator,
    images,
    indices,
    mlp,
    normed,
    plain_loop,
    relative,
    residual,
    series,
    tokens,
    vectors,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import effens

MEMBERS = 3
FIT: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 3e-3, "weight_decay": 0.1, "device": "cpu"}


@dataclass(frozen=True)
class Method:
    """A method under contract.

    Attributes:
        make: (make_net, members) -> Ensemble.
        net: () -> nn.Module.
        data: (n=22) -> (x, y).
        ends_low: whether its rate ends near 0.
        plain: whether one member trains to the plain network.
    """

    make: Callable[[Callable[[], nn.Module], int], effens.Ensemble]
    net: Callable[[], nn.Module] = mlp
    data: Callable[..., tuple[Tensor, Tensor]] = vectors
    ends_low: bool = True
    plain: bool = True


def frozen_ones(make_net: Callable[[], nn.Module], members: int) -> effens.Ensemble:
    """BatchEnsemble with r = s = 1 frozen, which at one member is the plain network."""
    ensemble = effens.BatchEnsemble(make_net, members, init="ones")
    for name, parameter in ensemble.named_parameters():
        if name.endswith((".r", ".s")):
            parameter.requires_grad_(False)
    return ensemble


def own_norms(make_net: Callable[[], nn.Module], members: int) -> effens.Ensemble:
    return effens.BatchEnsemble(make_net, members, norms="own", init=0.3)


def split(make_net: Callable[[], nn.Module], members: int) -> effens.Ensemble:
    return effens.BatchEnsemble(make_net, members, split=True)


def triangular(make_net: Callable[[], nn.Module], members: int) -> effens.Ensemble:
    return effens.SnapshotEnsemble(make_net, members, schedule="triangular", pretrain=0.18)


PAGE = Path(__file__).parents[1] / "chapters/adding_a_method.md"


def from_the_page(make_net: Callable[[], nn.Module], members: int) -> effens.Ensemble:
    """The method that the page on adding a method adds."""
    names: dict[str, Any] = {}
    exec(PAGE.read_text("utf-8").split("```python\n")[1].split("```")[0], names)
    made: effens.Ensemble = names["HalfBatches"](make_net, members)
    return made


METHODS = {
    "deep": Method(effens.DeepEnsemble),
    "deep, convolutions": Method(effens.DeepEnsemble, cnn, images),
    "deep, batch norm": Method(effens.DeepEnsemble, normed, images),
    "deep, own forward": Method(effens.DeepEnsemble, residual),
    "deep, of networks": Method(lambda net, members: effens.DeepEnsemble.of([net() for _ in range(members)])),
    "deep, series": Method(effens.DeepEnsemble, convnet1d, series),
    "deep, attention": Method(effens.DeepEnsemble, attending, tokens),
    "batch": Method(effens.BatchEnsemble, plain=False),
    "tabm": Method(effens.TabM, plain=False),
    "batch, series": Method(effens.BatchEnsemble, convnet1d, series, plain=False),
    "batch, attention": Method(effens.BatchEnsemble, attending, tokens, plain=False),
    "batch, own norms": Method(own_norms, normed, images, plain=False),
    "batch, convolutions": Method(effens.BatchEnsemble, cnn, images, plain=False),
    "batch, batch norm": Method(effens.BatchEnsemble, normed, images, plain=False),
    "batch, own forward": Method(effens.BatchEnsemble, residual, plain=False),
    "batch, split": Method(split, plain=False),
    "batch, ones": Method(frozen_ones),
    "snapshot": Method(effens.SnapshotEnsemble),
    "snapshot, batch norm": Method(effens.SnapshotEnsemble, normed, images),
    "snapshot, triangular": Method(triangular, ends_low=False, plain=False),
    "swag": Method(effens.SWAG, ends_low=False, plain=False),
    "swag, convolutions": Method(effens.SWAG, cnn, images, ends_low=False, plain=False),
    "swag, batch norm": Method(effens.SWAG, normed, images, ends_low=False, plain=False),
    "swag, own forward": Method(effens.SWAG, residual, ends_low=False, plain=False),
    "mimo": Method(effens.MIMO),
    "mimo, convolutions": Method(effens.MIMO, cnn, images),
    "mimo, batch norm": Method(effens.MIMO, normed, images),
    "mimo, own forward": Method(effens.MIMO, lambda: nn.Sequential(nn.Linear(4, 4), residual()).double()),
    "added by the page": Method(from_the_page, plain=False),
    "mimo, share": Method(lambda net, members: effens.MIMO(net, members, share=0.5)),
}


@pytest.fixture(params=METHODS.values(), ids=list(METHODS))
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def build(method: Method, members: int = MEMBERS, seed: int = 0) -> effens.Ensemble:
    torch.manual_seed(seed)
    return method.make(method.net, members)


@cache
def trained_once(method: Method) -> effens.Ensemble:
    ensemble = build(method)
    effens.fit(ensemble, method.data(), **FIT)
    return ensemble


def trained(method: Method) -> effens.Ensemble:
    return copy.deepcopy(trained_once(method))


def test_answers_with_all_members(method: Method) -> None:
    x, _ = method.data()
    assert trained(method)(x).shape == (MEMBERS, len(x), 3)


def test_one_batch_each_equals_the_shared_batch(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    if ensemble.streams < ensemble.members:
        pytest.skip("trains one network")
    assert relative(ensemble.forward_members(torch.stack([x] * MEMBERS)), ensemble(x)) < 1e-12


def test_streams_must_be_there(method: Method) -> None:
    ensemble, (x, _) = build(method), method.data()
    with pytest.raises(ValueError, match=r"xs must be \(streams, batch, ...\)"):
        ensemble.forward_members(torch.stack([x] * (ensemble.streams + 1)))


def test_members_must_be_positive(method: Method) -> None:
    with pytest.raises(ValueError, match=r"must .* got (0|none)"):
        build(method, members=0)


def test_many_members(method: Method) -> None:
    x, y = (torch.cat([tensor] * 6) for tensor in method.data())
    ensemble = build(method, members=64)
    epochs = 1 if ensemble.streams == 64 else 100  # a single network needs steps for all its members
    effens.fit(ensemble, (x, y), epochs=epochs, batch_size=66, device="cpu")
    assert ensemble(x).shape == (64, len(x), 3)


def test_member_is_a_plain_copy(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    before = ensemble(x)
    for m in range(MEMBERS):
        network = ensemble.member(m)
        assert isinstance(network, nn.Module)
        assert not any(type(module).__module__.startswith("effens") for module in network.modules())
        assert not network.training
        assert relative(network(x), before[m]) < 1e-12
        for tensor in network.state_dict().values():
            tensor.zero_()
    assert torch.equal(ensemble(x), before)


def test_member_has_the_names_of_the_network(method: Method) -> None:
    expected = {name: tensor.shape for name, tensor in method.net().state_dict().items()}
    assert {name: tensor.shape for name, tensor in trained(method).member(1).state_dict().items()} == expected


def test_member_can_be_trained_further(method: Method) -> None:
    ensemble = trained(method)
    with torch.no_grad():
        network = ensemble.member(0)
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("m", [-1, MEMBERS])
def test_member_must_be_there(method: Method, m: int) -> None:
    with pytest.raises(IndexError, match=f"member must be in 0 ... 2, got {m}"):
        trained(method).member(m)


def test_batches(method: Method) -> None:
    ensemble = build(method)
    steps = list(ensemble.batches(22, 8, generator(1)))
    for index in steps:
        assert index.dtype == torch.int64
        assert index.dim() == 1 or index.shape[0] == ensemble.streams
    streams = torch.cat(steps, -1).view(-1, sum(index.shape[-1] for index in steps))
    for row in streams:
        assert 0 <= row.min() <= row.max() < 22
        assert len(row.bincount().unique()) <= 2  # all as often, or left out
    again, other = (list(ensemble.batches(22, 8, generator(seed))) for seed in (1, 2))
    assert all(map(torch.equal, steps, again))
    assert not all(map(torch.equal, steps, other))


def test_schedule(method: Method) -> None:
    ensemble, steps = build(method), 1000
    lrs = [ensemble.schedule(step, steps) for step in range(steps)]
    assert lrs[0] == 1
    assert 0 <= min(lrs) <= max(lrs) <= 1
    assert lrs[-1] < 1e-3 or not method.ends_low


def test_parameter_groups_hold_every_trainable_weight_once(method: Method) -> None:
    ensemble = build(method)
    next(ensemble.parameters()).requires_grad_(False)
    held = [id(parameter) for group in ensemble.parameter_groups(0.1, 0.2) for parameter in group["params"]]
    trainable = [id(parameter) for parameter in ensemble.parameters() if parameter.requires_grad]
    assert sorted(held) == sorted(trainable)
    assert all({"lr", "weight_decay"} <= group.keys() for group in ensemble.parameter_groups(0.1, 0.2))


def test_fit_is_reproducible_and_leaves_eval_mode(method: Method) -> None:
    first, second, other = trained(method), build(method), build(method)
    x, y = method.data()
    effens.fit(second, (x, y), **FIT)
    effens.fit(other, (x, y), seed=1, **FIT)
    assert not any(module.training for module in first.modules())
    assert torch.equal(first(x), second(x))
    assert not torch.equal(first(x), other(x))


def test_fit_leaves_the_global_random_state(method: Method) -> None:
    ensemble = build(method)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    effens.fit(ensemble, method.data(), **FIT)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_does_not_depend_on_the_global_random_state(method: Method) -> None:
    histories = []
    for seed in (5, 6):
        ensemble = build(method)
        torch.manual_seed(seed)
        histories.append(effens.fit(ensemble, method.data(), **FIT))
    assert torch.equal(histories[0].losses, histories[1].losses)


def test_fit_writes_nothing_when_it_is_quick(method: Method, capfd: pytest.CaptureFixture[str]) -> None:
    effens.fit(build(method), method.data(), progress=True, **FIT)
    assert capfd.readouterr() == ("", "")


def test_fit_learns(method: Method) -> None:
    ensemble, (x, y) = build(method), method.data()
    effens.fit(ensemble, (x, y), epochs=150, batch_size=22, lr=2e-2, device="cpu")
    assert float((effens.predict(ensemble, x).mean(0).argmax(1) == y).double().mean()) > 0.9


def test_predict_is_the_softmax_in_chunks_or_not(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    expected = ensemble(x).softmax(-1)
    for chunk in (1, 7, len(x), 1000):
        probs = effens.predict(ensemble, x, chunk=chunk)
        assert relative(probs, expected) < 1e-12
        assert not probs.requires_grad


def test_predict_of_no_rows_is_empty(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    assert effens.predict(ensemble, x[:0]).shape == (MEMBERS, 0, 3)


def test_predict_restores_every_module_s_mode(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    ensemble.train()
    list(ensemble.modules())[-1].eval()
    modes = [module.training for module in ensemble.modules()]
    effens.predict(ensemble, x)
    assert [module.training for module in ensemble.modules()] == modes
    with pytest.raises(RuntimeError):
        effens.predict(ensemble, x[..., :2])
    assert [module.training for module in ensemble.modules()] == modes


def test_predict_takes_evaluation_mode_and_changes_nothing(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    ensemble.train()
    state = copy.deepcopy(ensemble.state_dict())
    assert torch.equal(effens.predict(ensemble, x), effens.predict(ensemble.eval(), x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())


def test_state_dict_holds_everything(method: Method, tmp_path: Path) -> None:
    ensemble, (x, _) = trained(method), method.data()
    fresh = build(method, seed=1)
    assert not torch.equal(next(fresh.parameters()), next(ensemble.parameters()))
    fresh.load_state_dict(ensemble.state_dict())
    assert torch.equal(fresh.eval()(x), ensemble(x))
    again = build(method, seed=2)
    effens.save(ensemble, tmp_path / "ensemble.safetensors")
    effens.load(again, tmp_path / "ensemble.safetensors")
    assert torch.equal(again.eval()(x), ensemble(x))


def test_to_reaches_everything(method: Method) -> None:
    ensemble, (x, _) = trained(method), method.data()
    expected = ensemble(x)
    single = ensemble.float()
    assert all(t.dtype == torch.float32 for t in single.state_dict().values() if t.is_floating_point())
    assert single(x.float()).dtype == torch.float32
    assert relative(single(x.float()).double(), expected) < 1e-4
    assert single.member(0)(x.float()).dtype == torch.float32


@pytest.mark.parametrize("n", [22, 128])  # 128 images of 8 x 8 are so many that members run one after the other
def test_trains_under_autocast(method: Method, n: int) -> None:
    ensemble, (x, _) = build(method).float().train(), method.data(n)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ensemble.forward_members(torch.stack([x.float()] * ensemble.streams))
    assert outputs.dtype == torch.bfloat16
    outputs.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ensemble.parameters() if p.requires_grad)


def test_one_member_trains_to_the_plain_network(method: Method) -> None:
    if not method.plain:
        pytest.skip("one member is not the plain network")
    x, y = method.data()
    torch.manual_seed(3)
    network = method.net()
    ensemble = method.make(lambda: copy.deepcopy(network), 1)
    effens.fit(ensemble, (x, y), seed=4, **FIT)
    batches = [index[0] for index in indices(ensemble, len(x), FIT["batch_size"], FIT["epochs"], seed=4)]
    plain_loop(network, x, y, batches, lr=FIT["lr"], weight_decay=FIT["weight_decay"])
    assert relative(ensemble(x)[0], network(x)) < 1e-10
    for name, tensor in ensemble.member(0).state_dict().items():
        assert torch.allclose(tensor, network.state_dict()[name], rtol=1e-10, atol=1e-12), name


def test_a_dataset_is_as_good_as_its_tensors(method: Method) -> None:
    x, _ = method.data()
    as_tensors, as_dataset = trained(method), build(method)
    effens.fit(as_dataset, TensorDataset(*method.data()), **FIT)
    assert torch.equal(as_tensors(x), as_dataset(x))


def test_a_loader_is_used_as_it_is_given(method: Method) -> None:
    x, y = method.data()
    seen: list[Tensor] = []

    class Spy(TensorDataset):
        def __getitem__(self, i: Any) -> Any:
            seen.append(torch.tensor(i))
            return x[i], y[i]

    ensemble = build(method)
    history = effens.fit(ensemble, DataLoader(Spy(x, y), batch_size=5), epochs=1, batch_size=999, device="cpu")
    assert history.steps == len(history.losses) <= 5  # 22 rows in batches of 5; a method may leave out the last 2
    assert [int(i) for i in seen[:22]] == list(range(22))


def test_data_left_over_from_inference_mode(method: Method) -> None:
    with torch.inference_mode():
        x, y = (tensor.clone() for tensor in method.data())
    ensemble, expected = build(method), trained(method)
    effens.fit(ensemble, (x, y), **FIT)
    with torch.inference_mode():
        assert torch.equal(effens.predict(ensemble, x), effens.predict(expected, x))
    effens.fit(ensemble, (x, y), **FIT)


def test_importing_does_nothing() -> None:
    code = """if True:
        import random, sys, numpy, torch
        states = random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state()
        import effens
        assert states[0] == random.getstate() and states[1] == repr(numpy.random.get_state())
        assert torch.equal(states[2], torch.get_rng_state())
        assert not torch.cuda.is_initialized()
        heavy = {"matplotlib", "IPython", "optuna", "scipy", "pandas", "effens_book"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=Path(effens.__file__).parents[1])


@pytest.mark.parametrize("state", ["just made", "just trained", "loaded", "in training mode"])
def test_eight_threads_get_what_one_gets(method: Method, state: str, tmp_path: Path) -> None:
    ensemble, (x, _) = trained(method), method.data()
    if state == "just made":
        ensemble = build(method)
        if ensemble.streams < ensemble.members:
            pytest.skip("has no members yet")
    if state == "loaded":
        effens.save(ensemble, tmp_path / "ensemble.safetensors")
        ensemble = build(method)
        effens.load(ensemble, tmp_path / "ensemble.safetensors")
    if state == "in training mode":
        ensemble.train()
    modes = [module.training for module in ensemble.modules()]
    expected = effens.predict(copy.deepcopy(ensemble), x)
    barrier = Barrier(8)

    def ask(i: int) -> Tensor:
        barrier.wait()
        return effens.predict(ensemble, x, chunk=5) if i % 2 else effens.summarize(ensemble, x, chunk=7)[0]

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(ask, range(8))):
            assert relative(found, expected if i % 2 else expected.mean(0)) < 1e-12
    assert [module.training for module in ensemble.modules()] == modes
