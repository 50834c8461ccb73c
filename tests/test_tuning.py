"""The search for candidates: what it trains, that it resumes and is shared, and what it refuses."""

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from scenarios import mlp, relative, vectors
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import effens
import effens_book.nets
from effens import tuning

DEFAULT = {"lr": 1e-2, "weight_decay": 1e-2, "dropout": 0.0, "width": 8}
SMALL: tuning.Space = {"lr": (1e-3, 3e-2), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5), "width": (4, 16)}
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 32, "device": "cpu"}


def make_net(width: int, dropout: float) -> nn.Module:
    return effens_book.nets.mlp(4, 3, width=width, dropout=dropout).double()


def train_set() -> tuple[Tensor, Tensor]:
    return vectors(60, seed=1)


def val_set() -> tuple[Tensor, Tensor]:
    return vectors(40, seed=2)


def searched(**changes: Any) -> effens.Candidates:
    arguments = {"default": DEFAULT, "space": SMALL, "trials": 6, **OPTIONS, **changes}
    make = arguments.pop("make_net", make_net)
    return effens.search(make, arguments.pop("data", train_set()), arguments.pop("validation", val_set()), **arguments)


@cache
def found() -> effens.Candidates:
    return searched()


def same(a: effens.Candidates, b: effens.Candidates) -> bool:
    return a.settings == b.settings and torch.equal(a.probs, b.probs) and torch.equal(a.losses, b.losses)


def test_search_tries_the_default_first() -> None:
    assert found().settings[0] == DEFAULT
    assert len({each["lr"] for each in found().settings}) == 6


def test_search_stays_in_the_space() -> None:
    for each in found().settings:
        assert all(low <= each[name] <= high for name, (low, high) in SMALL.items())
        assert isinstance(each["width"], int)


def test_search_trains_with_the_settings() -> None:
    x, _ = val_set()
    candidates = found()
    assert not any(module.training for network in candidates.networks for module in network.modules())
    for network, settings in zip(candidates.networks, candidates.settings, strict=True):
        first = next(network.parameters())
        assert first.shape[0] == settings["width"]
        assert {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)} == {settings["dropout"]} - {0}
    logits = [network(x) for network in candidates.networks]
    assert relative(candidates.probs, torch.stack(logits).softmax(-1)) < 1e-12


def test_search_is_the_plain_call_of_fit() -> None:
    candidates = found()
    for number in (0, 3):
        settings = candidates.settings[number]
        seed = tuning.seeds_of(0, number)[1]
        torch.manual_seed(seed)
        one = effens.DeepEnsemble.of([make_net(int(settings["width"]), settings["dropout"])])
        lrs: dict[str, Any] = {name: settings[name] for name in ("lr", "weight_decay")}
        effens.fit(one, train_set(), seed=seed, **lrs, **OPTIONS)
        assert torch.equal(effens.predict(one, val_set()[0])[0], candidates.probs[number])


def test_search_judges_by_validation_nll() -> None:
    _, y = val_set()
    candidates = found()
    for probs, loss in zip(candidates.probs, candidates.losses, strict=True):
        assert float(loss) == pytest.approx(float(effens.nll(probs[None], y)), rel=1e-12)
    assert candidates.losses.min() <= candidates.losses[0]  # the best is never worse than the default
    path = effens.greedy_select(candidates.probs, y, 3)
    assert path[0] == int(candidates.losses.argmin())
    assert effens.nll(candidates.probs[path], y) <= candidates.losses.min()


def test_search_looks_at_no_training_data_to_judge_and_at_no_validation_data_to_train() -> None:
    other = searched(validation=vectors(30, seed=5))
    assert other.settings == found().settings
    for a, b in zip(other.networks, found().networks, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_search_is_reproducible(sampler: str) -> None:
    trials = 13  # tpe's first 10 are random
    options = {"sampler": sampler, "trials": trials, "epochs": 1, "batch_size": 60}
    first = searched(**options)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(first, searched(**options))
    assert torch.equal(state, torch.get_rng_state())
    other = searched(seed=1, **options)
    lrs = [{each["lr"] for each in candidates.settings[1:]} for candidates in (first, other)]
    assert not lrs[0] & lrs[1]


def test_samplers_differ_once_there_is_something_to_learn() -> None:
    lrs = [searched(sampler=sampler, trials=13, epochs=1).settings for sampler in ("random", "tpe")]
    assert lrs[0][:10] == lrs[1][:10]
    assert lrs[0][10:] != lrs[1][10:]


def test_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    kept = {"storage": f"sqlite:///{tmp_path}/study.db", "folder": tmp_path / "weights"}
    calls: list[int] = []

    def counted(width: int, dropout: float) -> nn.Module:
        calls.append(width)
        return make_net(width, dropout)

    assert searched(trials=3, make_net=counted, **kept).trainings == 3
    resumed = searched(trials=6, make_net=counted, **kept)
    assert same(resumed, found())
    assert len(calls) == 6 + 3  # six trained, three made again for the weights that were kept
    assert same(searched(trials=6, **kept), found())
    assert resumed.seconds == searched(trials=6, **kept).seconds > 0
    assert searched(seed=1, name="another", trials=2, **kept).trainings == 2
    (tmp_path / "weights/search-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        searched(**kept)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"default": {**DEFAULT, "lr": 2e-2}},
        {"space": {**SMALL, "dropout": (0.0, 0.4)}},
        {"sampler": "tpe"},
        {"epochs": 4},
        {"batch_size": 16},
        {"optimizer": torch.optim.SGD},
        {"optimizer": partial(torch.optim.SGD, momentum=0.9)},
        {"likelihood": effens.Gaussian()},
        {"precision": "bfloat16"},
        {"compile": True},
        {"data": (train_set()[0], 2 - train_set()[1])},
        {"data": vectors(60, seed=3)},
        {"validation": (val_set()[0], 2 - val_set()[1])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_stored_search_goes_on_with_no_other(changes: dict[str, Any], tmp_path: Path) -> None:
    storage = optuna.storages.InMemoryStorage()
    kept: dict[str, Any] = {"storage": storage, "folder": tmp_path, "trials": 1}
    searched(**kept)
    with pytest.raises(ValueError, match="the study 'search' must be of this search"):
        searched(**kept, **changes)
    same_again: dict[str, Any] = {"data": tuple(part.clone() for part in train_set()), "device": torch.device("cpu")}
    assert searched(**kept, **same_again).trainings == 1


@pytest.mark.parametrize("number", [0, 2])
def test_search_goes_on_after_it_was_killed_in_a_trial(number: int, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"storage": optuna.storages.InMemoryStorage(), "folder": tmp_path}
    countdown = iter(range(number))

    def killed(width: int, dropout: float) -> nn.Module:
        if next(countdown, None) is None:
            raise KeyboardInterrupt
        return make_net(width, dropout)

    with pytest.raises(KeyboardInterrupt):
        searched(make_net=killed, **kept)
    candidates = searched(**kept)
    assert candidates.trainings == len(candidates.networks) == 6
    assert candidates.settings[:number] == found().settings[:number]
    assert candidates.settings.count(DEFAULT) == (1 if number else 0)  # else they were lost with their trial


def test_search_shares_its_trials(tmp_path: Path) -> None:
    """A second process that joins in the middle of a trial does its part, and both see all."""
    kept: dict[str, Any] = {"storage": optuna.storages.InMemoryStorage(), "folder": tmp_path}
    joined: list[effens.Candidates] = []

    def joining(width: int, dropout: float) -> nn.Module:
        if not joined:
            joined.append(found())  # not again from within
            joined[0] = searched(trials=3, **kept)
        return make_net(width, dropout)

    everyone = searched(trials=6, make_net=joining, **kept)
    assert joined[0].trainings == 3
    assert 6 <= everyone.trainings <= 7
    assert everyone.settings[0] == DEFAULT
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"search-{number}.safetensors" for number in range(everyone.trainings)}


def test_a_storage_whose_tables_another_process_makes_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, opens = optuna.storages.InMemoryStorage(), [SQLAlchemyError(), SQLAlchemyError()]
    slept: list[float] = []

    def busy(address: str) -> Any:
        if opens:
            raise opens.pop()
        return kept

    monkeypatch.setattr(optuna.storages, "get_storage", busy)
    monkeypatch.setattr("time.sleep", slept.append)
    assert tuning.open_storage("sqlite:///a.db") is kept
    assert len(slept) == 2
    opens.extend(SQLAlchemyError("no server") for _ in range(9))
    with pytest.raises(SQLAlchemyError, match="no server"):
        tuning.open_storage("sqlite:///a.db")


def test_search_marks_trials_that_diverge(tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes(width: int, dropout: float) -> nn.Module:
        calls.append(width)
        network = make_net(width, dropout)
        if len(calls) in (2, 4):
            next(network.parameters()).data.fill_(math.nan)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        return network

    storage = optuna.storages.InMemoryStorage()
    candidates = searched(make_net=sometimes, storage=storage, folder=tmp_path)
    assert (len(candidates.networks), candidates.trainings) == (3, 6)
    assert [calls[i] for i in (0, 2, 5)] == [each["width"] for each in candidates.settings]
    assert [calls[i] for i in (1, 3, 4)] == [each["width"] for each in candidates.failed]
    assert candidates.probs.shape == (3, 40, 3)
    assert "3 of 6 trainings" in repr(candidates)
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert [trial.number for trial in trials if trial.state == optuna.trial.TrialState.FAIL] == [1, 3, 4]
    assert "losses must be finite" in trials[1].user_attrs["error"]
    assert candidates.seconds == sum(trial.user_attrs["seconds"] for trial in trials)
    assert len(searched(storage=storage, folder=tmp_path).failed) == 3  # a trial that failed is not tried again


def test_a_network_that_explodes_in_its_last_step_has_diverged() -> None:
    options = {"epochs": 1, "batch_size": 60, "optimizer": torch.optim.SGD}
    with pytest.raises(FloatingPointError, match="one training at least must end well, got 2 that failed"):
        searched(
            default={**DEFAULT, "lr": 1e300}, space={"lr": (1e299, 1e301)}, trials=2, **options
        )  # the only loss is finite


def test_search_lets_other_errors_through() -> None:
    with pytest.raises(TypeError, match="dropout"):
        searched(make_net=lambda width: make_net(width, 0.0))
    with pytest.raises(TypeError, match="epoch"):
        searched(epoch=3)
    with pytest.raises(ValueError, match="labels must be in"):
        searched(data=(train_set()[0], train_set()[1] + 1))


def test_search_of_nothing_but_starts_is_a_deep_ensemble() -> None:
    candidates = searched(space={}, trials=3)
    assert candidates.settings == [DEFAULT] * 3
    assert len({float(loss) for loss in candidates.losses}) == 3


def test_search_with_a_dataset_and_a_likelihood() -> None:
    x, y = (tensor.double() for tensor in vectors(60))
    candidates = effens.search(
        lambda width: effens_book.nets.mlp(4, 2, width=width).double(),
        TensorDataset(x, y),
        (x[:20], y[:20]),
        default={"lr": 1e-2, "width": 8},
        space={"width": (4, 16)},
        trials=3,
        likelihood=effens.Gaussian(),
        **OPTIONS,
    )
    assert candidates.probs.batch_shape == (3, 20)
    index = effens.greedy_select(candidates.probs, y[:20], 2)
    mixed = effens.predict(effens.HyperEnsemble(candidates.networks, index), x[:20], likelihood=effens.Gaussian())
    loss = -effens.mixture(mixed).log_prob(y[:20]).mean()
    assert loss <= candidates.losses.min() + 1e-12


def test_stratify_trains_all_settings_from_all_seeds() -> None:
    _, y = val_set()
    settings = [found().settings[i] for i in (0, 4)]
    again = effens.stratify(make_net, train_set(), val_set(), settings, seeds=[7, 8, 9], **OPTIONS)
    assert again.settings == [settings[0]] * 3 + [settings[1]] * 3
    assert (again.trainings, again.probs.shape) == (6, (6, 40, 3))
    assert len({float(loss) for loss in again.losses}) == 6
    repeated = effens.stratify(make_net, train_set(), val_set(), settings, seeds=[7, 8, 9], **OPTIONS)
    assert same(again, repeated)
    index = effens.greedy_select(again.probs, y, 4)
    ensemble = effens.HyperEnsemble(again.networks, index)
    assert torch.equal(effens.predict(ensemble, val_set()[0]), again.probs[index])
    assert effens.nll(again.probs[index], y) <= again.losses.min()


def test_stratify_marks_what_diverges() -> None:
    settings = [DEFAULT, {**DEFAULT, "lr": 1e300}]
    options = {**OPTIONS, "optimizer": torch.optim.SGD}
    again = effens.stratify(make_net, train_set(), val_set(), settings, seeds=[1], **options)
    assert (again.settings, again.failed) == ([DEFAULT], [settings[1]])
    with pytest.raises(ValueError, match="there must be settings and seeds"):
        effens.stratify(make_net, train_set(), val_set(), settings, seeds=[], **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials must be >= 1, got 0"),
        ({"sampler": "grid"}, "sampler must be 'random' or 'tpe', got 'grid'"),
        ({"storage": "sqlite:///nowhere.db"}, "a storage needs a folder"),
        ({"default": {**DEFAULT, "lr": 1.0}}, "default must have lr in 0.001 ... 0.03, got 1.0"),
        ({"default": {**DEFAULT, "width": 8.5}}, "default must have an integer width in 4 ... 16, got 8.5"),
        ({"default": {"lr": 1e-2}}, "default must have weight_decay in .*, got None"),
        ({"space": {"lr": (1e-2, 1e-3)}}, "space must go from low to high, got lr"),
        ({"space": {"act": ["relu", "gelu", "tanh"]}}, "space must have two numbers for each setting, .*got act"),
    ],
)
def test_search_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searched(**changes)


def test_search_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "optuna"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="effens.search needs Optuna: python -m pip install optuna"):
        searched()


def test_search_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    level = optuna.logging.get_verbosity()
    searched(trials=2)
    assert capfd.readouterr() == ("", "")
    assert optuna.logging.get_verbosity() == level


def test_search_takes_no_rate_beside_its_settings() -> None:
    make: Callable[..., Any] = searched
    with pytest.raises(TypeError, match="lr"):
        make(lr=0.1)


class Several(effens.Likelihood):
    """Several labels at once, which are no classes that exclude each other."""

    def nll(self, outputs: Tensor, y: Tensor) -> Tensor:
        losses = nn.functional.binary_cross_entropy_with_logits(outputs, y.expand_as(outputs), reduction="none")
        return losses.sum(-1)

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()


def test_candidates_are_judged_by_the_likelihood_they_are_trained_with() -> None:
    x, _ = vectors(60, seed=1)
    y = (x[:, :3] > 0).double()
    options: dict[str, Any] = {"default": {"lr": 1e-2}, "space": {"lr": (1e-3, 1e-1)}, "trials": 3, **OPTIONS}
    found = effens.search(mlp, (x, y), (x, y), likelihood=Several(), **options)
    for network, loss, probs in zip(found.networks, found.losses, found.probs, strict=True):
        assert relative(loss, Several().nll(network(x), y).mean()) < 1e-6
        assert relative(probs, network(x).sigmoid()) < 1e-12


def test_missing_targets_are_not_judged() -> None:
    x, y = vectors(60, seed=1)
    holes = y.clone()
    holes[::3] = -100
    options: dict[str, Any] = {"default": {"lr": 1e-2}, "space": {"lr": (1e-3, 1e-1)}, "trials": 2, **OPTIONS}
    found = effens.search(mlp, (x, holes), (x, holes), **options)
    for network, loss in zip(found.networks, found.losses, strict=True):
        assert relative(loss, nn.functional.cross_entropy(network(x), holes)) < 1e-6


def test_rates_that_diverge_fail_and_the_others_do_not() -> None:
    """Real divergence: losses grow step by step until one is not finite."""
    space: tuning.Space = {"lr": (1e-3, 1e30), "weight_decay": (1e-4, 1e-3)}
    default = {"lr": 1e-3, "weight_decay": 1e-3}
    data, val = vectors(60, seed=1), vectors(40, seed=2)
    options: dict[str, Any] = {"trials": 10, **OPTIONS, "optimizer": torch.optim.SGD}
    found = effens.search(mlp, data, val, default=default, space=space, **options)
    assert 0 < len(found.failed) < 10
    assert min(each["lr"] for each in found.failed) > 1
    assert bool(found.losses.isfinite().all())
