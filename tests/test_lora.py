"""LoRA ensembles against explicit networks, and trunks that members share."""

import copy
from typing import Any

import pytest
import torch
from scenarios import generator, relative, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import effens
from effens.ensembles.lora import LoRALinear

FIT: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "device": "cpu"}


class Reader(nn.Module):
    """Embeds ids, attends, and answers from the mean of what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        there = (~mask)[..., None]
        found = self.encoder(self.embed(ids), src_key_padding_mask=mask)
        answer: Tensor = self.head((found * there).sum(1) / there.sum(1))
        return answer


def reader() -> nn.Module:
    return Reader().double()


def texts(n: int = 22) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(9, (n, 5), generator=generator())
    lengths = torch.randint(2, 6, (n,), generator=generator(1))
    mask = torch.arange(5) >= lengths[:, None]
    return {"ids": ids, "mask": mask}, ids[:, 0] % 3


def parted(ensemble: Any) -> Any:
    """Move the changes away from 0, so that members differ."""
    torch.manual_seed(1)
    for layer in ensemble.modules():
        if isinstance(layer, LoRALinear):
            layer.b.data.normal_(0, 0.3)
    return ensemble


class TestLoRA:
    def test_it_starts_as_the_pretrained_network(self) -> None:
        torch.manual_seed(0)
        network, (x, _) = reader().eval(), texts()
        ensemble = effens.LoRAEnsemble(lambda: copy.deepcopy(network), members=3, rank=2).eval()
        for answer in ensemble(x):
            assert relative(answer, network(**x)) < 1e-9

    def test_it_equals_explicit_networks_gradients_too(self) -> None:
        torch.manual_seed(0)
        network, (x, y) = reader().eval(), texts()
        ensemble = parted(effens.LoRAEnsemble(lambda: copy.deepcopy(network), members=3, rank=2)).eval()
        members = [ensemble.member(m) for m in range(3)]
        for m, member in enumerate(members):
            assert relative(ensemble(x)[m], member(**x)) < 1e-9
            F.cross_entropy(member(**x), y).backward()
        losses = F.cross_entropy(ensemble(x).flatten(0, 1), y.repeat(3), reduction="none").view(3, -1)
        ensemble.reduce(losses).backward()
        linear, plain = ensemble.network.encoder.layers[1].self_attn, [m.encoder.layers[1].self_attn for m in members]
        for m in range(3):  # dL/dA = B^T dL/dW and dL/dB = dL/dW A^T, for the query's third of the weight
            gradient = plain[m].in_proj_weight.grad
            if gradient is None:
                plain[m].in_proj_weight.requires_grad_()
                F.cross_entropy(members[m](**x), y).backward()
                gradient = plain[m].in_proj_weight.grad
            gradient = gradient[:8]
            assert relative(linear.q.a.grad[m], linear.q.b[m].T @ gradient) < 1e-8
            assert relative(linear.q.b.grad[m], gradient @ linear.q.a[m].T) < 1e-8
            assert relative(ensemble.network.head.weight.grad[m], members[m].head.weight.grad) < 1e-8

    def test_what_is_frozen_stays_and_is_saved_once(self, tmp_path: Any) -> None:
        torch.manual_seed(0)
        network, (x, y) = reader(), texts()
        ensemble = effens.LoRAEnsemble(lambda: copy.deepcopy(network), members=3, rank=2)
        effens.fit(ensemble, (x, y), **FIT)
        state = ensemble.state_dict()
        assert torch.equal(state["network.embed.weight"], network.get_parameter("embed.weight"))
        base = sum(p.numel() for p in network.parameters())
        attention, heads = 2 * 4 * 2 * (8 + 8), 8 * 3 + 3
        assert sum(t.numel() for t in state.values()) == base + 3 * attention + 2 * heads
        assert sum(p.numel() for p in ensemble.parameters() if p.requires_grad) == 3 * (attention + heads)
        assert float(ensemble(x).detach().std(0).max()) > 0  # members part
        effens.save(ensemble, tmp_path / "lora.safetensors")
        again = effens.LoRAEnsemble(lambda: copy.deepcopy(network), members=3, rank=2)
        effens.load(again, tmp_path / "lora.safetensors")
        assert torch.equal(again(x), ensemble(x))

    def test_named_layers(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
        ensemble = parted(effens.LoRAEnsemble(lambda: network, 3, rank=2, layers=("0",), heads=("2",)))
        x, _ = vectors()
        for m in range(3):
            assert relative(ensemble(x)[m], ensemble.member(m)(x)) < 1e-12
            w = ensemble.network[0].weight + ensemble.network[0].b[m] @ ensemble.network[0].a[m]
            assert relative(ensemble.member(m)[0].weight, w) < 1e-12

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": ("query",)}, r"must name modules of the network, got \['query'\]"),
            ({"heads": ("top",)}, r"must name modules of the network, got \['top'\]"),
            ({"layers": ("embed",)}, "layers must be nn.Linear or attention, got 'embed'"),
            ({"rank": 0}, "rank must be >= 1, got 0"),
        ],
    )
    def test_mistakes(self, options: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            effens.LoRAEnsemble(reader, 2, **options)

    def test_no_attention(self) -> None:
        with pytest.raises(ValueError, match=r"must have nn.MultiheadAttention, or layers= name linear layers"):
            effens.LoRAEnsemble(lambda: nn.Sequential(nn.Linear(4, 3)), 2, heads=())


def trunk(frozen: bool = True) -> nn.Module:
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5)).double()
    return network.requires_grad_(not frozen)


def head() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


METHODS: dict[str, Any] = {
    "deep": lambda trunk: effens.DeepEnsemble(head, 3, trunk=trunk),
    "batch": lambda trunk: effens.BatchEnsemble(head, 3, trunk=trunk),
    "snapshot": lambda trunk: effens.SnapshotEnsemble(head, 3, trunk=trunk),
    "swag": lambda trunk: effens.SWAG(head, 3, trunk=trunk),
    "mimo": lambda trunk: effens.MIMO(head, 3, trunk=trunk),
    "lora": lambda trunk: effens.LoRAEnsemble(head, 3, layers=("0",), heads=("2",), trunk=trunk),
}


@pytest.mark.parametrize("method", METHODS)
class TestTrunk:
    def test_member_is_the_head_on_the_trunk(self, method: str) -> None:
        torch.manual_seed(0)
        ensemble, (x, y) = METHODS[method](trunk()), vectors()
        before = copy.deepcopy(trunk().state_dict())
        effens.fit(ensemble, (x, y), **FIT)
        for name, tensor in ensemble.trunk.network.state_dict().items():
            assert torch.equal(tensor, before[name])  # statistics, too
        for m in range(3):
            assert relative(ensemble(x)[m], ensemble.member(m)(x)) < 1e-12
            assert relative(ensemble(x)[m], ensemble.member(m).head(trunk().eval()(x))) < 1e-12

    def test_it_is_saved_once_and_exported_with_it(self, method: str) -> None:
        torch.manual_seed(0)
        ensemble, (x, y) = METHODS[method](trunk()), vectors()
        effens.fit(ensemble, (x, y), **FIT)
        assert sum("running_mean" in name for name in ensemble.state_dict()) == 1
        answering, weights = ensemble.answering()
        assert weights == [1.0] * 3
        assert relative(answering(x), ensemble(x)) < 1e-12

    def test_tensors_pass_it_once(self, method: str) -> None:
        """Kept features, a dataset's rows and the plain loop end alike, to rounding; tensors pass the trunk once."""
        answers, rows = [], []
        x, y = vectors()
        for data in ((x, y), TensorDataset(x, y)):
            torch.manual_seed(0)
            ensemble = METHODS[method](trunk())
            ensemble(x[:2]) if ensemble.streams > 1 else None  # the first call looks the network over
            seen: list[int] = []
            ensemble.trunk.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(len(output)))
            effens.fit(ensemble, data, **FIT)
            rows.append(sum(seen))
            answers.append(ensemble(x))
        assert relative(*answers) < 1e-9
        assert rows[0] == len(x) < rows[1]


@pytest.mark.parametrize("method", ["deep", "batch", "lora"])
def test_a_trunk_that_is_trained_gets_the_mean_gradient(method: str) -> None:
    torch.manual_seed(0)
    shared = nn.Linear(4, 6).double()
    ensemble, (x, y) = METHODS[method](shared), vectors()
    losses = F.cross_entropy(ensemble(x).flatten(0, 1), y.repeat(3), reduction="none").view(3, -1)
    ensemble.reduce(losses).backward()
    assert shared.weight.grad is not None
    found, members = shared.weight.grad.clone(), [ensemble.member(m) for m in range(3)]
    gradients = []
    for member in members:
        F.cross_entropy(member(x), y).backward()
        gradients.append(member.trunk.network.weight.grad)
    assert relative(found, torch.stack(gradients).mean(0)) < 1e-9


def test_a_trunk_must_be_a_network() -> None:
    with pytest.raises(TypeError, match="trunk must be an nn.Module, got function"):
        effens.DeepEnsemble(head, 2, trunk=trunk)  # type: ignore[arg-type]


def test_a_network_with_one_change_is_a_lora_ensemble_of_one() -> None:
    torch.manual_seed(0)
    network = reader()
    changed = effens.add_lora(network, rank=2, layers=("linear1",), heads=("head",))
    x, y = texts()
    assert relative(changed(**x), network(**x)) < 1e-12  # B starts at 0
    trained = {name for name, p in changed.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias"} | {
        f"encoder.layers.{i}.linear1.parametrizations.weight.0.{part}" for i in (0, 1) for part in "ab"
    }
    ensemble = effens.LoRAEnsemble(lambda: copy.deepcopy(network), 1, rank=2, layers=("linear1",))
    named = dict(changed.named_parameters())
    with torch.no_grad():
        for i in (0, 1):
            layer = ensemble.network.get_submodule(f"encoder.layers.{i}.linear1")
            assert isinstance(layer, LoRALinear)
            named[f"encoder.layers.{i}.linear1.parametrizations.weight.0.a"].copy_(layer.a)
    single = effens.DeepEnsemble.of([changed])
    for each in (ensemble, single):
        effens.fit(each, (x, y), **FIT)
    assert not torch.equal(changed(**x), network(**x))
    assert relative(changed(**x), ensemble(x)[0]) < 1e-10


def test_attention_is_changed_whole() -> None:
    torch.manual_seed(0)
    network = reader()
    changed = effens.add_lora(network, rank=2)
    x, y = texts()
    assert relative(changed(**x), network(**x)) < 1e-12
    effens.fit(effens.DeepEnsemble.of([changed]), (x, y), **FIT)
    weight, before = (net.get_submodule("encoder.layers.0.self_attn").in_proj_weight for net in (changed, network))
    assert isinstance(weight, Tensor)
    assert isinstance(before, Tensor)
    ranks = [int(torch.linalg.matrix_rank(part, rtol=1e-8)) for part in (weight - before).detach().chunk(3)]
    assert ranks == [2, 2, 2]


@pytest.mark.parametrize("kind", [effens.SWAG, effens.SnapshotEnsemble, effens.DeepEnsemble])
@pytest.mark.filterwarnings("ignore:SWAG reads the noise")
def test_methods_of_one_network_take_it_and_keep_what_is_frozen_once(kind: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    network = reader()
    ensemble = kind(lambda: effens.add_lora(network, rank=2), 3)
    x, y = texts()
    effens.fit(ensemble, (x, y), **{**FIT, "epochs": 6})
    said = effens.predict(ensemble, x)
    assert float(effens.disagreement(said).mean() + said.std(0).mean()) > 0
    for m in range(3):
        assert relative(ensemble(x)[m], ensemble.member(m)(**x)) < 1e-10
    effens.save(ensemble, tmp_path / "kept.safetensors")
    again = kind(lambda: effens.add_lora(network, rank=2), 3)
    effens.load(again, tmp_path / "kept.safetensors")
    assert torch.equal(effens.predict(again, x), said)
    weights = list(effens.add_lora(network, rank=2).parameters())
    trained, frozen = (sum(p.numel() for p in weights if p.requires_grad == each) for each in (True, False))
    if kind is not effens.DeepEnsemble:  # which holds whole networks
        assert sum(p.numel() for p in ensemble.parameters()) == frozen + 4 * trained


def test_a_changed_network_can_be_made_plain_again() -> None:
    from torch.nn.utils import parametrize

    torch.manual_seed(0)
    changed = effens.add_lora(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), 2, layers="0", heads="2")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.1)
    before = changed(torch.ones(5, 3))
    assert isinstance(changed, nn.Sequential)
    for layer in changed:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    assert type(changed[0]) is nn.Linear
    assert relative(changed(torch.ones(5, 3)), before) < 1e-6


def test_frozen_batch_norm_keeps_its_statistics_and_a_head_s_does_not() -> None:
    def norms() -> nn.Sequential:
        head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), head)

    torch.manual_seed(0)
    changed = effens.add_lora(norms().double(), rank=2, layers="0", heads="3")
    assert isinstance(changed, nn.Sequential)
    x, y = vectors()
    effens.fit(effens.DeepEnsemble.of([changed]), (x, y), **FIT)
    inner = changed[3]
    assert isinstance(inner, nn.Sequential)
    assert bool((changed[1].get_buffer("running_mean") == 0).all())
    assert bool((inner[0].get_buffer("running_mean") != 0).any())


def test_a_network_that_an_ensemble_has_taken_over_is_refused() -> None:
    network = reader()
    effens.LoRAEnsemble(lambda: network, 2)
    with pytest.raises(ValueError, match="make_net must return a fresh network"):
        effens.add_lora(network)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        effens.add_lora(reader(), 0)
