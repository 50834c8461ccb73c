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
