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
from scenarios import cnn, images, mlp, normed, relative, residual, vectors
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import effens
import effens_book.nets
from effens import joint, tuning

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
    assert candidates.settings.count(DEFAULT) == 1
    assert candidates.settings.index(DEFAULT) == (0 if number else 5)  # lost with its trial, it is tried at the end


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


def test_search_takes_a_study_that_was_made_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has queued the default settings, and nobody will: they are tried at the end."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="search")
    candidates = searched(storage=storage, folder=tmp_path)
    assert candidates.settings.index(DEFAULT) == 5
    assert 1 <= sum(slept) <= 5
    slept.clear()
    assert same(searched(storage=storage, folder=tmp_path), candidates)
    assert not slept


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
        ({"sampler": "tpe", "batched": True}, "sampler must be 'random' for a batched search, got 'tpe'"),
        ({"storage": "sqlite:///nowhere.db"}, "a storage needs a folder"),
        ({"default": {**DEFAULT, "lr": 1.0}}, "default must have lr in 0.001 ... 0.03, got 1.0"),
        ({"default": {**DEFAULT, "width": 8.5}}, "default must have an integer width in 4 ... 16, got 8.5"),
        ({"default": {"lr": 1e-2}}, "default must have weight_decay in .*, got None"),
        ({"space": {"lr": (1e-2, 1e-3)}}, "space must go from low to high, got lr"),
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


# ---- Candidates that are trained together. ----

TUNED: tuning.Space = {"lr": (1e-3, 3e-2), "weight_decay": (1e-4, 1.0)}
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


def tuned(make: Any = mlp, data: Any = vectors, **changes: Any) -> effens.Candidates:
    arguments = {"default": {"lr": 1e-2, "weight_decay": 1e-2}, "space": TUNED, "trials": 6, **OPTIONS, **changes}
    validation = arguments.pop("validation", data(40, seed=2))
    return effens.search(make, arguments.pop("train", data(60, seed=1)), validation, **arguments)


def close(a: effens.Candidates, b: effens.Candidates) -> bool:
    """Say whether these are the same networks, to rounding."""
    same_weights = all(
        relative(p, q) < 1e-9
        for one, other in zip(a.networks, b.networks, strict=True)
        for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    return a.settings == b.settings and a.failed == b.failed and same_weights and relative(a.probs, b.probs) < 1e-9


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many networks each call of fit trained."""
    members: list[int] = []

    def counted(ensemble: effens.Ensemble, *args: Any, **options: Any) -> effens.History:
        members.append(ensemble.members)
        return effens.fit(ensemble, *args, **options)

    monkeypatch.setattr(tuning, "fit", counted)
    return members


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MOMENTUM])
@pytest.mark.parametrize(
    ("make", "data"),
    [(mlp, vectors), (cnn, images), (residual, vectors), (normed, images)],
    ids=["linear", "convolutions", "own forward", "batch norm"],
)
def test_batched_is_one_by_one(make: Any, data: Any, optimizer: Any, together: list[int]) -> None:
    alone = tuned(make, data, optimizer=optimizer)
    assert together == [1] * 6
    batched = tuned(make, data, optimizer=optimizer, batched=True)
    assert together == [1] * 6 + [6]
    assert close(batched, alone)
    assert not torch.equal(batched.probs[0], batched.probs[1])
    assert [type(network) for network in batched.networks] == [type(network) for network in alone.networks]
    assert not any(module.training for network in batched.networks for module in network.modules())
    assert relative(batched.losses, alone.losses) < 1e-9
    assert batched.seconds > 0


@pytest.mark.parametrize("kind", [TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y), batch_size=25)])
def test_batched_with_a_dataset_or_a_loader_is_one_by_one(kind: Any) -> None:
    train = kind(*vectors(60, seed=1))
    assert close(tuned(train=train, batched=True), tuned(train=train))


def test_batched_regression_is_one_by_one() -> None:
    def data(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
        x, _ = vectors(n, seed=seed)
        return x, x.sum(1)

    options: dict[str, Any] = {"data": data, "likelihood": effens.Gaussian()}
    alone, batched = (
        tuned(lambda: effens_book.nets.mlp(4, 2, width=8).double(), batched=b, **options) for b in (False, True)
    )
    assert alone.settings == batched.settings
    assert relative(batched.probs.mean, alone.probs.mean) < 1e-9
    assert relative(batched.probs.stddev, alone.probs.stddev) < 1e-9


def test_batched_groups_what_agrees(together: list[int]) -> None:
    space: tuning.Space = {**TUNED, "width": (7, 9), "dropout": (0.0, 0.0)}
    default = {"lr": 1e-2, "weight_decay": 1e-2, "width": 8, "dropout": 0.0}
    batched = searched(space=space, default=default, trials=10, batched=True)
    widths = [each["width"] for each in batched.settings]
    assert together == [widths.count(width) for width in dict.fromkeys(widths)]
    assert len(together) == 3
    assert close(batched, searched(space=space, default=default, trials=10))


def test_batched_trains_alone_what_agrees_with_nothing(together: list[int]) -> None:
    assert same(searched(batched=True), found())  # a dropout of its own for each: even what dropout drew is the same
    assert together == [1] * 6


def test_batched_with_dropout(together: list[int]) -> None:
    options: dict[str, Any] = {"space": TUNED, "default": {**DEFAULT, "dropout": 0.5}, "batched": True}
    batched = searched(**options)
    assert together == [6]
    assert same(batched, searched(**options))
    assert {layer.p for layer in batched.networks[3].modules() if isinstance(layer, nn.Dropout)} == {0.5}


def test_batched_takes_so_many_at_a_time(together: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TOGETHER", 4)
    batched = tuned(trials=11, batched=True)
    assert together == [4, 4, 3]
    assert close(batched, tuned(trials=11))


def test_batched_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    tuned(batched=True)
    assert torch.equal(state, torch.get_rng_state())


def big_images(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images so large that members run one after the other."""
    x, y = images(n, seed=seed)
    return nn.functional.interpolate(x, scale_factor=4.0), y


def striding(width: int) -> Any:
    """A network that convolves with strides, of any width: grouped convolutions take paths of their own."""
    first, second = nn.Conv2d(1, width, 3, stride=2), nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))


def strided(width: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    network = striding(width)
    network(torch.zeros(1, 1, 8, 8))
    made: nn.Module = network.to(dtype)
    return made


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MOMENTUM])
@pytest.mark.parametrize(
    ("make", "data"),
    [
        (mlp, vectors),
        (cnn, images),
        (residual, vectors),
        (normed, images),
        (partial(strided, 8), images),
        (partial(strided, 3), big_images),
    ],
    ids=["linear", "convolutions", "own forward", "batch norm", "depthwise", "apart"],
)
@pytest.mark.parametrize("bad", [1, 3])
def test_what_diverges_disturbs_no_other(make: Any, data: Any, optimizer: Any, bad: int) -> None:
    x, y = data(60, seed=1)
    pairs: list[Any] = [({"lr": lr, "weight_decay": 0.1}, seed) for seed, lr in enumerate((1e-2, 1e-3, 3e-2, 3e-3))]
    calls = iter(range(4))

    def broken() -> nn.Module:
        network: nn.Module = make()
        if next(calls) == bad:
            list(network.parameters())[-2].data.view(-1)[0] = math.nan
        return network

    def trained(make: Any, pairs: list[Any]) -> list[tuning.Training]:
        recipe = tuning.Recipe(make, (x, y), data(40, seed=2), {**OPTIONS, "optimizer": optimizer})
        ended = recipe.train_together(pairs)
        assert ended is not None
        return ended

    ended = trained(broken, pairs)
    assert ended.pop(bad).network is None
    del pairs[bad]
    for with_it, without in zip(ended, trained(make, pairs), strict=True):
        assert with_it.network is not None
        assert without.network is not None
        for p, q in zip(with_it.network.state_dict().values(), without.network.state_dict().values(), strict=True):
            assert bool(p.isfinite().all())
            assert relative(p, q) < 1e-10


@pytest.mark.parametrize("likelihood", [effens.Categorical(), effens.Gaussian()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_high_rates_fail_and_the_others_do_not(likelihood: Any, dtype: torch.dtype, together: list[int]) -> None:
    """Real divergence: losses grow step by step until one is not finite."""

    def data(n: int, *, seed: int) -> tuple[Tensor, Tensor]:
        x, y = vectors(n, seed=seed)
        return x.to(dtype), y if likelihood.outputs is None else x.sum(1).to(dtype)

    def make() -> nn.Module:
        return effens_book.nets.mlp(4, 3 if likelihood.outputs is None else likelihood.outputs, width=8).to(dtype)

    space: tuning.Space = {"lr": (1e-3, 1e30), "weight_decay": (1e-4, 1e-3)}
    options: dict[str, Any] = {
        "default": {"lr": 1e-3, "weight_decay": 1e-3},
        "space": space,
        "trials": 10,
        "optimizer": torch.optim.SGD,
        "likelihood": likelihood,
    }
    alone, batched = (tuned(make, data, batched=b, **options) for b in (False, True))
    assert together == [1] * 10 + [10]
    assert batched.settings == alone.settings
    assert batched.failed == alone.failed
    assert 0 < len(alone.failed) < 10
    for one, other in zip(batched.networks, alone.networks, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            assert relative(p, q) < (1e-9 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("bad", [math.nan, 3e38])
@pytest.mark.parametrize("likelihood", [effens.Categorical(), effens.Gaussian(), effens.StudentT()])
def test_what_diverged_once_has_failed(likelihood: effens.Likelihood, bad: float) -> None:
    """As alone: a loss that was not finite for a step counts, though the next one is."""
    inner = likelihood
    lenient = joint.Lenient(inner)
    outputs, y = torch.randn(3, 5, 3)[..., : inner.outputs].requires_grad_(), torch.zeros(3, 5, dtype=torch.int64)
    assert torch.equal(lenient.nll(outputs, y), inner.nll(outputs, y))
    with torch.no_grad():
        outputs[1, 2] = torch.tensor([-bad, -bad, bad])[: inner.outputs]
    losses = lenient.nll(outputs, y)
    assert torch.equal(losses[[0, 2]], inner.nll(outputs[[0, 2]], y[[0, 2]]))
    assert losses[1].tolist() == [0] * 5
    losses.mean(1).sum().backward()
    assert outputs.grad is not None
    assert bool(outputs.grad[[0, 2]].isfinite().all())
    with torch.no_grad():
        outputs[1, 2] = 0.0
    assert lenient.nll(outputs, y)[1].tolist() == [0] * 5
    assert lenient.diverged.tolist() == [False, True, False]


def test_batched_marks_trials_that_diverge(tmp_path: Path) -> None:
    calls = iter(range(6))

    def sometimes() -> nn.Module:
        network = mlp()
        if next(calls) in (1, 4):
            next(network.parameters()).data.fill_(math.nan)
        return network

    storage = optuna.storages.InMemoryStorage()
    batched = tuned(sometimes, storage=storage, folder=tmp_path, batched=True)
    assert (len(batched.networks), batched.trainings) == (4, 6)
    trials = optuna.load_study(study_name="search", storage=storage).trials
    assert [trial.number for trial in trials if trial.state == optuna.trial.TrialState.FAIL] == [1, 4]
    assert "losses must be finite" in trials[1].user_attrs["error"]
    assert batched.seconds == sum(trial.user_attrs["seconds"] for trial in trials)
    alone = tuned()
    assert batched.settings == [alone.settings[i] for i in (0, 2, 3, 5)]
    assert relative(batched.probs, alone.probs[[0, 2, 3, 5]]) < 1e-9
    again = tuned(storage=storage, folder=tmp_path)  # what is stored can be read, and gone on with, either way
    assert again.settings == batched.settings
    assert torch.equal(again.probs, batched.probs)
    assert tuned(storage=storage, folder=tmp_path, trials=9, batched=True).trainings == 9
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"search-{number}.safetensors" for number in (0, 2, 3, 5, 6, 7, 8)}


def test_batched_where_all_diverge() -> None:
    with pytest.raises(FloatingPointError, match="one training at least must end well, got 4 that failed"):
        tuned(default={"lr": 1e300}, space={"lr": (1e299, 1e301)}, trials=4, optimizer=MOMENTUM, batched=True)


def test_batched_does_one_by_one_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    members: list[int] = []

    def small(ensemble: effens.Ensemble, *args: Any, **options: Any) -> effens.History:
        members.append(ensemble.members)
        if ensemble.members > 1:
            raise torch.OutOfMemoryError
        return effens.fit(ensemble, *args, **options)

    expected = tuned()
    monkeypatch.setattr(tuning, "fit", small)
    assert same(tuned(batched=True), expected)
    assert members == [6] + [1] * 6


def test_batched_goes_on_after_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TOGETHER", 3)
    kept: dict[str, Any] = {"storage": f"sqlite:///{tmp_path}/study.db", "folder": tmp_path, "batched": True}
    countdown = iter(range(5))

    def killed() -> nn.Module:
        if next(countdown, None) is None:
            raise KeyboardInterrupt
        return mlp()

    with pytest.raises(KeyboardInterrupt):
        tuned(killed, trials=9, **kept)
    expected = tuned(trials=12)
    assert {path.name for path in tmp_path.iterdir()} >= {f"search-{number}.safetensors" for number in range(3)}
    candidates = tuned(trials=9, **kept)
    assert candidates.trainings == 9
    survivors = [0, 1, 2, 6, 7, 8, 9, 10, 11]  # the second three were cut off
    assert candidates.settings == [expected.settings[i] for i in survivors]
    assert relative(candidates.probs, expected.probs[survivors]) < 1e-9


def test_batched_search_is_shared(tmp_path: Path) -> None:
    kept: dict[str, Any] = {"storage": optuna.storages.InMemoryStorage(), "folder": tmp_path, "batched": True}
    joined: list[int] = []

    def joining() -> nn.Module:
        if not joined:
            joined.append(0)
            joined[0] = tuned(trials=3, **kept).trainings
        return mlp()

    assert tuned(joining, **kept).trainings == 3 + 6
    assert joined == [3]


def test_batched_needs_an_optimizer_that_can() -> None:
    with pytest.raises(ValueError, match="optimizer must be AdamW or SGD .*, got Adam$"):
        tuned(batched=True, optimizer=torch.optim.Adam)


def test_batched_needs_networks_that_share_nothing() -> None:
    first = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match="make_net must return a fresh network at each call"):
        tuned(lambda: nn.Sequential(first, nn.Linear(4, 3).double()), batched=True)


def test_batched_stratify_is_one_by_one(together: list[int]) -> None:
    settings = [
        {"width": width, "dropout": 0.0, "lr": 1e-2, "weight_decay": d} for width, d in ((8, 1), (6, 2), (8, 3))
    ]
    options: dict[str, Any] = {"settings": settings, "seeds": [7, 8, 9], **OPTIONS}
    alone, batched = (effens.stratify(make_net, train_set(), val_set(), batched=b, **options) for b in (False, True))
    assert together == [1] * 9 + [6, 3]
    assert batched.settings == [each for each in settings for _ in range(3)]
    assert close(batched, alone)
