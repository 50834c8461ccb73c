"""SWAG: its moments are the weights' own, its samples have their covariance, and each has its own statistics."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import cnn, generator, images, indices, mlp, normed, relative, remembered, residual, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

import effens
import effens_book.nets

SGD = partial(torch.optim.SGD, momentum=0.9)


def walk(n: int, *, seed: int = 0) -> list[nn.Module]:
    """Networks whose weights wander, as SGD's do."""
    torch.manual_seed(seed)
    networks = [mlp()]
    for _ in range(n - 1):
        networks.append(copy.deepcopy(networks[-1]))
        for parameter in networks[-1].parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return networks


def flat(networks: Sequence[nn.Module]) -> Tensor:
    """Return the networks' weights, ``(networks, parameters)``."""
    return torch.stack([parameters_to_vector(network.parameters()).detach() for network in networks])


def collected(networks: Sequence[nn.Module], **options: Any) -> effens.SWAG:
    swag = effens.SWAG(lambda: copy.deepcopy(networks[0]), **options)
    for network in networks:
        swag.collect_from(network)
    return swag


def constants(values: Sequence[float], size: int = 4) -> list[nn.Module]:
    """Networks in float32 with all their weights the same."""
    networks: list[nn.Module] = [nn.Linear(size, 3) for _ in values]
    for network, value in zip(networks, values, strict=True):
        for parameter in network.parameters():
            parameter.data.fill_(value)
    return networks


def draws(swag: effens.SWAG, n: int) -> np.ndarray[Any, Any]:
    source = generator(1)
    return torch.stack([swag.sample(generator=source) for _ in range(n)]).numpy()


class TestMoments:
    def test_the_mean_is_the_mean(self) -> None:
        swag = collected(constants([1, 2, 3, 4]))
        assert torch.equal(swag.mean, torch.full((15,), 2.5))
        assert torch.allclose(swag.variance, torch.full((15,), 1.25), rtol=1e-6)

    @pytest.mark.parametrize("n", [1, 3, 7, 50])
    def test_moments_are_numpy_s(self, n: int) -> None:
        networks = walk(n)
        swag, weights = collected(networks, rank=5), flat(networks).numpy()
        assert np.allclose(swag.mean, weights.mean(0), rtol=1e-12, atol=1e-14)
        assert np.allclose(swag.variance, weights.var(0), rtol=1e-10, atol=1e-14)
        means = weights.cumsum(0) / np.arange(1, n + 1)[:, None]
        rows = np.zeros((5, weights.shape[1]))
        for i in range(n):
            rows[i % 5] = weights[i] - means[i]
        assert np.allclose(swag.deviations, rows, rtol=1e-10, atol=1e-14)
        assert int(swag.count) == n

    def test_constant_weights_have_no_variance(self) -> None:
        for value in (0.1, 1.0, 1e8 / 3):
            swag = collected(constants([value] * 30))
            assert torch.equal(swag.mean, torch.full((15,), value))
            assert not swag.variance.any()
            assert not swag.deviations.any()

    def test_a_small_variance_in_single_precision(self) -> None:
        """The mean of squares less the square of the mean would be off by more than itself, and often negative."""
        torch.manual_seed(0)
        networks = constants([1.0] * 100, size=300)
        for network in networks:
            for parameter in network.parameters():
                parameter.data += 1e-4 * torch.randn_like(parameter)
        swag, expected = collected(networks), flat(networks).double().numpy().var(0)
        assert swag.variance.dtype == torch.float32
        assert np.allclose(swag.variance.double(), expected, rtol=5e-3, atol=0)

    def test_a_variance_is_never_negative(self) -> None:
        torch.manual_seed(0)
        for scale in (1e-7, 1e-3, 1e3):
            swag = collected(constants((1 + scale * torch.randn(200)).tolist()))
            assert (swag.variance >= 0).all()

    def test_the_first_deviation_is_zero(self) -> None:
        for n in range(1, 9):
            swag = collected(walk(n), rank=6)
            assert n > 6 or not swag.deviations[0].any()
            assert not swag.deviations[n:].any()
            assert np.linalg.matrix_rank(swag.deviations.numpy()) == min(n - 1, 6)

    def test_half_precision_is_summed_in_single(self) -> None:
        networks = [network.bfloat16() for network in constants([1 + i / 64 for i in range(64)])]
        swag = collected(networks, scale=0.0)
        assert swag.mean.dtype == torch.float32
        assert torch.allclose(swag.mean, torch.full((15,), 1 + 31.5 / 64), rtol=1e-6)
        assert swag.at(swag.mean).weight.dtype == torch.bfloat16

    def test_a_network_on_the_way_is_not_changed(self) -> None:
        networks = walk(4)
        before = flat(networks).clone()
        collected(networks)
        assert torch.equal(flat(networks), before)

    def test_one_parameter_alone(self) -> None:
        swag = effens.SWAG(lambda: nn.Linear(4, 3, bias=False), rank=2)
        weight = swag.network.get_parameter("weight")
        before = weight.detach().clone()
        for _ in range(3):
            swag.collect_from(swag.network)
        assert torch.equal(weight, before)
        assert torch.equal(swag.mean, before.flatten())


class TestSamples:
    @pytest.mark.parametrize(("n", "rank", "scale"), [(12, 4, 0.5), (12, 4, 2.0), (3, 10, 0.5), (12, 0, 1.0)])
    def test_covariance(self, n: int, rank: int, scale: float) -> None:
        """Of 20,000 draws, across layers too. K is 4, then the 3 collected, then 0: the diagonal form."""
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
        networks = [first]
        for _ in range(n - 1):
            networks.append(copy.deepcopy(networks[-1]))
            shared = torch.randn(())  # what moves all layers together
            for parameter in networks[-1].parameters():
                parameter.data += shared + 0.3 * torch.randn_like(parameter)
        swag = collected(networks, rank=rank, scale=scale)
        weights = flat(networks).numpy()
        means = weights.cumsum(0) / np.arange(1, n + 1)[:, None]
        D = (weights - means)[max(n - rank, 0) :].T if rank else np.zeros((14, 0))
        expected = scale * np.diag(weights.var(0))
        if rank:
            expected += scale * D @ D.T / (min(n, rank) - 1)
        found = draws(swag, 20_000)
        deviation = np.sqrt(np.diag(expected))
        error = np.abs(np.cov(found.T) - expected) / np.outer(deviation, deviation)
        assert error.max() < 0.05  # 5 standard errors of a variance
        assert np.abs((found.mean(0) - weights.mean(0)) / deviation).max() < 5 / math.sqrt(20_000)
        if rank:
            across = expected[:8, 8:] / np.outer(deviation[:8], deviation[8:])
            assert np.abs(across).max() > 0.3  # there is a correlation across layers to be found

    def test_the_paper_s_scale_is_the_default(self) -> None:
        networks = walk(12)
        assert np.array_equal(draws(collected(networks), 3), draws(collected(networks, scale=0.5, rank=20), 3))

    def test_one_z2_for_all_layers(self) -> None:
        """Where the low rank is all there is, samples lie in its span: drawn per layer, they would not."""
        swag = collected(walk(3), rank=2)
        swag.variance.zero_()
        found = draws(swag, 6) - swag.mean.numpy()
        assert np.linalg.matrix_rank(found) == 2
        assert np.linalg.matrix_rank(np.vstack([found, swag.deviations.numpy()])) == 2

    def test_of_two_networks_the_low_rank_part_is_their_one_deviation(self) -> None:
        swag = collected(walk(2), rank=5, scale=1.0)
        swag.variance.zero_()
        source = generator(1)
        _, z2 = (torch.randn(size, generator=source, dtype=torch.float64) for size in (len(swag.mean), 5))
        expected = swag.mean + z2 @ swag.deviations  # over K - 1 = 1
        assert torch.allclose(swag.sample(generator=generator(1)), expected)

    def test_of_one_network_there_is_no_spread(self) -> None:
        swag = collected(walk(1), rank=3)
        assert torch.equal(swag.sample(generator=generator()), swag.mean)

    def test_the_generator_decides(self) -> None:
        swag = collected(walk(5), rank=3)
        first, again = (swag.sample(generator=generator(7)) for _ in range(2))
        assert first.shape == swag.mean.shape
        assert torch.equal(first, again)
        torch.manual_seed(7)
        assert torch.equal(swag.sample(), first)
        assert not torch.equal(swag.sample(generator=generator(8)), first)

    @pytest.mark.parametrize("make_net", [mlp, residual])
    def test_members_are_the_samples(self, make_net: Any) -> None:
        swag = effens.SWAG(make_net, members=4, rank=2, seed=5)
        for _ in range(3):
            swag.collect_from(make_net())
        before = swag.mean.clone()
        swag.finish([])
        (x, _), source = vectors(7), generator(5)
        answers = swag(x)
        for m in range(4):
            weights = swag.sample(generator=source)
            assert torch.equal(parameters_to_vector(swag.member(m).parameters()), weights)
            assert relative(answers[m], swag.at(weights)(x)) < 1e-12
        assert torch.equal(swag.mean, before)
        assert len({float(answer.sum()) for answer in answers}) == 4

    def test_another_seed_other_members(self) -> None:
        (x, _), networks, answers = vectors(7), walk(5), []
        for seed in (0, 0, 1):
            swag = collected(networks, members=2, rank=3, seed=seed)
            swag.finish([])
            answers.append(swag(x))
        assert torch.equal(answers[0], answers[1])
        assert not torch.equal(answers[0], answers[2])

    def test_another_scale_another_draw(self) -> None:
        swag, (x, _) = collected(walk(5), members=2, rank=3), vectors(7)
        swag.finish([])
        mean = swag.at(swag.mean)(x)
        assert not torch.equal(swag(x)[0], mean)
        swag.scale = 0.0
        swag.finish([])
        assert relative(swag(x), mean.expand(2, -1, -1)) < 1e-12


class TestSchedule:
    def test_falls_then_stays(self) -> None:
        swag, steps = effens.SWAG(mlp, tail=0.25, tail_lr=0.3), 200
        lrs = [swag.schedule(step, steps) for step in range(steps)]
        assert lrs[0] == 1
        assert all(later < earlier for earlier, later in pairwise(lrs[:151]))
        assert lrs[75] == pytest.approx(0.65)
        assert lrs[150:] == pytest.approx([0.3] * 50)

    @pytest.mark.parametrize(("tail", "steps", "every"), [(0.25, 200, 7), (1.0, 13, 1), (0.5, 1, 3), (0.01, 5, 2)])
    def test_weights_are_collected_in_the_tail_alone(self, tail: float, steps: int, every: int) -> None:
        swag, seen = effens.SWAG(mlp, rank=3, tail=tail, tail_lr=0.3, every=every), []
        for step in range(steps):
            before = int(swag.count)
            swag.collect(step, steps)
            seen += [step] * (int(swag.count) - before)
        assert seen[-1] == steps - 1
        assert all(swag.schedule(step, steps) == pytest.approx(0.3) for step in seen)
        assert all(later - earlier == every for earlier, later in pairwise(seen))
        assert len(seen) == math.ceil(max(1, round(tail * steps)) / every)

    @pytest.mark.parametrize(("steps", "rank", "count"), [(4000, 20, 40), (6000, 30, 60), (4078, 0, 41), (60, 20, 30)])
    def test_how_many_are_collected_if_nobody_says(self, steps: int, rank: int, count: int) -> None:
        swag = effens.SWAG(lambda: nn.Linear(2, 2), 1, rank)
        for step in range(steps):
            swag.collect(step, steps)
        assert swag.count == count

    def test_trained_as_the_obvious_loop_does(self) -> None:
        """The network, its average, and the moments of what the loop has seen."""
        make_net, (network,) = remembered(mlp, 1)
        swag, (x, y) = effens.SWAG(make_net, 2, 3, every=2, tail_lr=0.4), vectors()
        options: dict[str, Any] = dict(lr=0.1, weight_decay=0.01, optimizer=SGD, seed=4)
        effens.fit(swag, (x, y), epochs=4, batch_size=5, device="cpu", **options)
        descent = SGD(network.parameters(), lr=0.1, weight_decay=0.01)
        average, seen = AveragedModel(network), []
        for step, index in enumerate(indices(swag, 22, 5, 4, seed=4)):  # 20 steps, of which 10 are the tail
            descent.param_groups[0]["lr"] = 0.1 * (0.4 + 0.3 * (1 + math.cos(math.pi * min(step, 10) / 10)))
            descent.zero_grad()
            F.cross_entropy(network(x[index[0]]), y[index[0]]).backward()
            descent.step()
            if step in (11, 13, 15, 17, 19):
                average.update_parameters(network)
                seen.append(copy.deepcopy(network))
        assert torch.allclose(swag.mean, flat([average.module])[0], rtol=1e-10, atol=1e-12)
        assert np.allclose(swag.variance, flat(seen).numpy().var(0), rtol=1e-8, atol=1e-14)
        assert relative(swag.at(swag.mean)(x), average(x)) < 1e-10

    def test_a_second_training_forgets_the_first(self) -> None:
        swag, (x, y) = effens.SWAG(mlp, 2, 3, every=1), vectors()
        effens.fit(swag, (x, y), epochs=8, batch_size=8, device="cpu")
        assert swag.count == 12
        first = swag.mean.clone()
        effens.fit(swag, (x, y), epochs=1, batch_size=11, device="cpu")
        assert swag.count == 1
        assert torch.equal(swag.mean, flat([swag.network])[0])
        assert not torch.equal(swag.mean, first)
        assert not swag.deviations.any()


@pytest.mark.parametrize(("make_net", "data"), [(mlp, vectors), (cnn, images), (residual, vectors)])
def test_scale_zero_is_stochastic_weight_averaging(make_net: Any, data: Any) -> None:
    swag, (x, _) = effens.SWAG(make_net, members=3, scale=0.0), data()
    average = AveragedModel(swag.network)
    for _ in range(5):
        network = make_net()
        swag.collect_from(network)
        average.update_parameters(network)
    swag.finish([])
    assert relative(swag.eval()(x), average.module(x).expand(3, -1, -1)) < 1e-12
    for m in range(3):
        assert torch.equal(parameters_to_vector(swag.member(m).parameters()), swag.mean)


class Branches(nn.Module):
    """Batch norm inside, where only the network's own forward knows; dropout, too."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(dropout), nn.ReLU())
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.inner(self.plain(x) + x))
        return head


def branches(dropout: float = 0.0) -> nn.Module:
    return Branches(dropout).double()


class TestBatchNorm:
    @pytest.mark.parametrize(("make_net", "data"), [(normed, images), (branches, vectors)])
    @pytest.mark.parametrize("kind", ["tensors", "dataset", "loader"])
    def test_statistics_are_those_of_each_sample(self, make_net: Any, data: Any, kind: str) -> None:
        x, y = data()
        dataset = TensorDataset(x, y)
        given: Any = {"tensors": (x, y), "dataset": dataset, "loader": DataLoader(dataset, 8)}[kind]
        swag = effens.SWAG(make_net, 3, 4, every=1)
        effens.fit(swag, given, epochs=3, batch_size=8, lr=0.05, optimizer=SGD, device="cpu")
        source, statistics = generator(0), []
        for m in range(3):
            network = swag.at(swag.sample(generator=source))
            order = torch.arange(22) if kind == "loader" else torch.randperm(22, generator=generator(0))
            update_bn(x[order].split(8), network)
            member = swag.member(m)
            for (name, mine), its in zip(member.state_dict().items(), network.state_dict().values(), strict=True):
                assert torch.allclose(mine, its, rtol=1e-12, atol=1e-14), name
            assert relative(swag(x)[m], network.eval()(x)) < 1e-12
            momenta = [getattr(layer, "momentum", None) for layer in member.modules()]
            assert momenta == [getattr(layer, "momentum", None) for layer in make_net().modules()]
            statistics.append(next(t for name, t in member.state_dict().items() if name.endswith("running_mean")))
        assert not torch.equal(statistics[0], statistics[1])
        assert not any(module.training for module in swag.modules())

    def test_the_last_batches_do_not_count_more(self) -> None:
        """With a momentum, 30 batches would leave the statistics to the last few."""
        swag = effens.SWAG(branches, 2, 2)
        swag.collect_from(swag.network)
        x, _ = vectors(120)
        x[60:] += 100
        swag.finish(x.split(4))
        member = swag.member(0)
        with torch.no_grad():
            shifted = torch.cat([member.get_submodule("plain")(part) + part for part in x.split(4)])
            inputs = member.get_submodule("inner.0")(shifted)
        assert torch.allclose(member.get_buffer("inner.1.running_mean"), inputs.mean(0))

    def test_dropout_is_off(self) -> None:
        found = []
        for dropout in (0.0, 0.9):
            torch.manual_seed(0)
            swag = effens.SWAG(partial(nn.Sequential, nn.Dropout(dropout), branches(dropout)), 2, 2)
            swag.collect_from(swag.network)
            swag.train().finish([vectors()[0]])
            found.append(swag.eval()(vectors()[0]))
        assert torch.equal(*found)

    def test_the_global_random_state_is_left(self) -> None:
        x, y = images()
        answers = []
        for seed in (5, 6):
            torch.manual_seed(0)
            swag = effens.SWAG(normed, 2, 2)
            loader = DataLoader(TensorDataset(x, y), 8, shuffle=True)
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            effens.fit(swag, loader, epochs=2, device="cpu")
            assert torch.equal(torch.get_rng_state(), before)
            answers.append(swag(x))
        assert torch.equal(*answers)

    def test_there_must_be_inputs(self) -> None:
        swag = effens.SWAG(normed, 2, 2)
        swag.collect_from(swag.network)
        swag.finish([images()[0]])
        with pytest.raises(ValueError, match="batches must hold training inputs for the batch-norm statistics, got no"):
            swag.finish([])
        with pytest.raises(RuntimeError, match="no members yet"):
            swag(images()[0])

    def test_without_it_inputs_are_not_looked_at(self) -> None:
        swag = effens.SWAG(lambda: nn.Sequential(mlp(), nn.BatchNorm1d(3, track_running_stats=False)).double(), 2, 2)
        swag.collect_from(swag.network)
        batches = iter([vectors()[0]])
        swag.finish(batches)
        assert len(list(batches)) == 1


class TestRegistered:
    def trained(self) -> effens.SWAG:
        torch.manual_seed(0)
        swag = effens.SWAG(normed, 3, 4, every=1)
        effens.fit(swag, images(), epochs=2, batch_size=8, device="cpu")
        return swag

    def test_samples_are_in_eval_mode_always(self) -> None:
        """Asked in training mode, they would forget the statistics that were computed for them."""
        swag, (x, _) = self.trained(), images()
        before = swag(x)
        assert not any(module.training for module in swag.modules())
        assert all(module.training for module in swag.train().network.modules())
        assert not any(module.training for module in swag.samples.modules())
        assert torch.equal(swag(x[:5]), before[:, :5])
        assert torch.equal(swag.eval()(x), before)

    def test_to_reaches_every_sample_and_moment(self) -> None:
        swag = self.trained().to(torch.float32)
        assert swag(images()[0].float()).dtype == torch.float32
        assert {t.dtype for t in swag.state_dict().values() if t.is_floating_point()} == {torch.float32}
        swag.collect_from(swag.network)
        swag.finish([images()[0].float()])
        meta = swag.to("meta")
        assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))

    def test_counts_reach_every_sample(self) -> None:
        swag = self.trained()
        one = sum(p.numel() for p in swag.network.parameters())
        assert sum(p.numel() for p in swag.parameters()) == 4 * one
        assert sum(p.numel() for p in swag.parameters() if p.requires_grad) == one
        assert {name for name, _ in swag.named_buffers(recurse=False)} == {"mean", "variance", "deviations", "count"}
        assert swag.mean.shape == swag.variance.shape == (one,)
        assert swag.deviations.shape == (4, one)

    @pytest.mark.parametrize("way", ["state_dict", "file"])
    def test_loads_into_one_never_trained(self, way: str, tmp_path: Path) -> None:
        swag, fresh, (x, _) = self.trained(), effens.SWAG(normed, 3, 4), images()
        if way == "file":
            effens.save(swag, tmp_path / "swag.safetensors")
            effens.load(fresh, tmp_path / "swag.safetensors")
        else:
            fresh.load_state_dict(swag.state_dict(), strict=True)
        assert fresh.count == swag.count == 3
        assert torch.equal(fresh.eval()(x), swag(x))
        assert torch.equal(fresh.sample(generator=generator(3)), swag.sample(generator=generator(3)))
        for each in (fresh, swag):  # and goes on collecting
            each.collect_from(each.network)
        assert torch.equal(fresh.deviations, swag.deviations)

    def test_one_never_trained_loads_too(self) -> None:
        swag = self.trained()
        swag.load_state_dict(effens.SWAG(normed, 3, 4).state_dict())
        with pytest.raises(RuntimeError, match="no members yet"):
            swag(images()[0])

    def test_the_diagonal_form_is_saved(self, tmp_path: Path) -> None:
        swag, fresh, (x, y) = effens.SWAG(mlp, 3, 0, 1.0), effens.SWAG(mlp, 3, 0, 1.0), vectors()
        effens.fit(swag, (x, y), epochs=4, batch_size=8, device="cpu")
        effens.save(swag, tmp_path / "swag.safetensors")
        effens.load(fresh, tmp_path / "swag.safetensors")
        assert fresh.deviations.shape == (0, 139)
        assert torch.equal(fresh.eval()(x), swag(x))

    def test_another_rank_does_not_load(self, tmp_path: Path) -> None:
        effens.save(self.trained(), tmp_path / "swag.safetensors")
        with pytest.raises(ValueError, match=r"deviations must have shape \(5, "):
            effens.load(effens.SWAG(normed, 3, 5), tmp_path / "swag.safetensors")

    def test_a_copy_is_apart(self) -> None:
        swag = self.trained()
        before, twin = swag(images()[0]), copy.deepcopy(swag)
        twin.scale = 0.0
        twin.finish([images()[0]])
        assert torch.equal(swag(images()[0]), before)
        assert not torch.equal(twin(images()[0]), before)


def test_side_by_side() -> None:
    """MultiSWAG: an equal mixture of independent runs."""
    (x, y), swags = vectors(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        swags.append(effens.SWAG(mlp, 3, 2, seed=seed))
        effens.fit(swags[-1], (x, y), epochs=2, batch_size=8, seed=seed, device="cpu")
    both = effens.DeepEnsemble.of(swags)
    assert both.members == 6
    assert torch.equal(both(x), torch.cat([swag(x) for swag in swags]))
    assert relative(both.member(4)(x), both(x)[4]) < 1e-12


def test_frozen_weights_and_other_buffers_are_the_network_s() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4).requires_grad_(False)
            self.head = nn.Linear(4, 3)
            self.steps = nn.Parameter(torch.tensor([2, 3]), requires_grad=False)
            self.register_buffer("shift", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            head: Tensor = self.head(self.body(x) * self.steps[0] + self.get_buffer("shift"))
            return head

    swag = effens.SWAG(Partly, 2, 2, every=1)
    x, y = vectors()
    effens.fit(swag, (x.float(), y), epochs=2, batch_size=8, device="cpu")
    assert swag.mean.shape == (15,)
    for m in range(2):
        member = swag.member(m)
        assert {name for name, p in member.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
        for name, tensor in member.state_dict().items():
            assert torch.equal(tensor, swag.network.state_dict()[name]) is not name.startswith("head"), name


def test_tied_weights_stay_tied() -> None:
    def tied() -> nn.Module:
        layer = nn.Linear(4, 4)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 3)).double()

    swag = effens.SWAG(tied, 2, 2)
    for _ in range(3):
        swag.collect_from(tied())
    swag.finish([])
    assert swag.mean.shape == (35,)
    member = swag.member(1)
    assert member.get_parameter("0.weight") is member.get_parameter("2.weight")
    assert relative(swag(vectors()[0])[1], member(vectors()[0])) < 1e-12


class TestMistakes:
    def test_asked_too_early(self) -> None:
        swag, (x, _) = effens.SWAG(mlp, 2, 2), vectors()
        for ask in (
            lambda: swag(x),
            lambda: effens.predict(swag, x),
            lambda: swag.member(0),
            lambda: swag.sample(),
            lambda: swag.finish([]),
        ):
            with pytest.raises(RuntimeError, match="^no (members|weights were collected) yet: call effens.fit"):
                ask()
        swag.collect_from(swag.network)
        with pytest.raises(RuntimeError, match="^no members yet: call effens.fit"):
            swag(x)  # nothing was drawn

    def test_a_training_cut_off_leaves_no_members(self) -> None:
        swag, (x, y) = effens.SWAG(mlp, 2, 2), vectors()
        effens.fit(swag, (x, y), epochs=1, device="cpu")
        with pytest.raises(FloatingPointError):
            effens.fit(swag, (x * math.nan, y), epochs=1, device="cpu")
        with pytest.raises(RuntimeError, match="no members yet"):
            swag(x)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"members": 0}, "members must be >= 1, got 0"),
            ({"rank": -1}, "rank must be 0 or >= 2, .* got -1"),
            ({"rank": 1}, "rank must be 0 or >= 2, .* got 1"),
            ({"scale": -0.5}, "scale must be >= 0 and finite, got -0.5"),
            ({"scale": math.nan}, "scale must be >= 0 and finite, got nan"),
            ({"tail": 0}, r"tail must be in \(0, 1\], got 0"),
            ({"tail": 1.1}, r"tail must be in \(0, 1\], got 1.1"),
            ({"tail_lr": 0.0}, r"tail_lr must be in \(0, 1\], got 0.0"),
            ({"every": 0}, "every must be >= 1, got 0"),
        ],
    )
    def test_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            effens.SWAG(mlp, **options)

    def test_networks(self) -> None:
        with pytest.raises(TypeError, match="make_net must be a function"):
            effens.SWAG(mlp())
        for make_net, message in (
            (lambda: mlp().requires_grad_(False), "must have weights to train, got none"),
            (nn.Flatten, "must have weights to train, got none"),
            (lambda: nn.Linear(4, 3, dtype=torch.complex64), "weights must be real, got torch.complex64"),
            (lambda: nn.LazyLinear(3), "the network's weights must exist"),
        ):
            with pytest.raises(ValueError, match=message):
                effens.SWAG(make_net)

    def test_other_networks_are_not_collected(self) -> None:
        swag = effens.SWAG(mlp, 2, 2)
        swag.collect_from(mlp())
        before = swag.mean.clone()
        for network in (nn.Linear(4, 3), mlp(depth=3), effens_book.nets.mlp(4, 3, width=9), residual()):
            with pytest.raises(ValueError, match="must have the trainable weights {'0.weight': "):
                swag.collect_from(network)
        assert torch.equal(swag.mean, before)
        assert swag.count == 1

    def test_weights_thawed_later(self) -> None:
        swag = effens.SWAG(lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 3)), 2, 2)
        swag.network.requires_grad_(True)
        with pytest.raises(ValueError, match="must have the trainable weights {'1.weight': "):
            swag.collect_from(swag.network)

    @pytest.mark.parametrize("shape", [(3,), (1, 99), ()])
    def test_weights_of_another_shape(self, shape: tuple[int, ...]) -> None:
        swag = effens.SWAG(mlp, 2, 2)
        with pytest.raises(ValueError, match=r"weights must be \(139,\), got shape"):
            swag.at(torch.zeros(shape))


@pytest.mark.parametrize(
    "options", [{"tail": 1.0}, {"tail_lr": 1.0}, {"scale": 0.0}, {"rank": 0}, {"rank": 2}, {"every": 1}]
)
def test_limits_are_allowed(options: dict[str, Any]) -> None:
    ensemble = effens.SWAG(mlp, 2, **options)
    assert {name: getattr(ensemble, name) for name in options} == options


def test_it_says_its_settings() -> None:
    said = effens.SWAG(mlp, members=2, rank=3, scale=0.25, tail=0.4, tail_lr=0.2, every=5, seed=7).extra_repr()
    assert said == "members=2, rank=3, scale=0.25, tail=0.4, tail_lr=0.2, every=5, seed=7"


def test_a_network_may_keep_its_activations() -> None:
    class Keeps(nn.Linear):
        kept: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    swag, (x, y) = effens.SWAG(lambda: Keeps(4, 3, dtype=torch.float64), 2, 2), vectors()
    effens.fit(swag, (x, y), epochs=2, device="cpu")
    assert swag(x).shape == (2, 22, 3)
