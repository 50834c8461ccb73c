"""Studies: one question each; they resume where they were killed, and read back what was answered."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from test_benchmark import LINE, SPOTS, Guarded
from torch import Tensor

import effens
from effens_book import studies
from effens_book.benchmark import TASKS, run, tasks
from effens_book.benchmark import methods as trained_methods
from effens_book.benchmark.tasks import TUNING_SEEDS
from effens_book.studies import claims, panel, running, table_rows
from effens_book.studies import methods as one_setting
from effens_book.studies.running import Row

SHIPPED = {
    name: json.loads(running.path_of(name).read_text()) for name in running.STUDIES if running.path_of(name).exists()
}
SETTINGS = {"lr": 0.01, "weight_decay": 0.01, "tail_lr": 0.5}


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another folder, and tiny tasks in place of the book's; settings are given, not tuned."""
    monkeypatch.setattr(running, "RESULTS", tmp_path)
    tiny = {"gap": replace(LINE, name="gap", members=3), "digits": replace(SPOTS, name="digits", members=3)}
    monkeypatch.setattr(running, "tuned_settings", lambda name, task="digits": SETTINGS)
    monkeypatch.setattr(running, "STUDIES", dict(running.STUDIES))
    cached = (
        running.read,
        claims.split_settings,
        claims.longer_settings,
        trained_methods.width_of_flops,
        trained_methods.equal_flops_width,
        trained_methods.width_of_weights,
    )
    for name in list(TASKS):
        monkeypatch.delitem(TASKS, name)
    for name, task in tiny.items():
        monkeypatch.setitem(TASKS, name, task)
    for function in cached:
        function.cache_clear()
    yield tmp_path
    for function in cached:
        function.cache_clear()


@pytest.fixture
def asked(bank: Path) -> list[tuple[int, int]]:
    """A study that writes down what it was asked."""
    calls: list[tuple[int, int]] = []

    @running.study(2, {"a": [1, 2], "b": [0]})
    def counting(a: int, b: int, seed: int) -> list[Row]:
        calls.append((a, seed))
        return [{"form": form, "nll": a + seed / 3 + form} for form in range(2)]

    return calls


# ---- Running and reading. ----


def test_every_point_is_asked_once_with_every_seed(asked: list[tuple[int, int]]) -> None:
    running.run("counting")
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 1)]
    running.run("counting")
    assert len(asked) == 4
    assert len(running.read("counting")) == 8
    torch.testing.assert_close(running.values("counting", "nll", a=2, form=1), torch.tensor([3, 3 + 1 / 3]))


def test_a_killed_study_goes_on_where_it_was(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    write = run.write_json

    def killed(path: Path, content: dict[str, Any]) -> None:
        if len(asked) == 3:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as context:
        context.setattr(running, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            running.run("counting")
    assert len(json.loads(running.path_of("counting").read_text())["rows"]) == 4  # two answers, whole
    running.run("counting")
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 0), (2, 1)]
    assert [row["seed"] for row in running.read("counting")] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_packed_rows_come_back_as_they_were() -> None:
    rows: list[Row] = [{"seed": 0, "nll": 0.5}, {"seed": 1, "diverged": 1}]
    packed = json.loads(json.dumps(running.pack(rows)))
    assert packed["columns"] == ["seed", "nll", "diverged"]
    assert running.unpack(packed) == rows


def test_scores_are_rounded_and_settings_are_not() -> None:
    assert running.round_row({"nll": 0.12345678, "seed": 3, "kind": "x"}) == {"nll": 0.123457, "seed": 3, "kind": "x"}


def test_values_are_in_the_order_of_the_seeds(bank: Path) -> None:
    rows = [{"seed": seed, "nll": float(seed)} for seed in (2, 0, 1)]
    run.write_json(running.path_of("mine"), running.pack(rows))
    assert running.values("mine", "nll").tolist() == [0, 1, 2]


def test_what_reading_refuses(asked: list[tuple[int, int]]) -> None:
    with pytest.raises(FileNotFoundError, match="results must hold the study counting, got none: run python -m"):
        running.read("counting")
    running.run("counting")
    with pytest.raises(KeyError, match=r"the study counting must hold nll at \{'a': 7\}, got none"):
        running.values("counting", "nll", a=7)
    with pytest.raises(KeyError, match="must hold accuracy at"):
        running.values("counting", "accuracy", a=1, form=0)
    with pytest.raises(ValueError, match=r"settings must name one point of the study counting, got 4 rows"):
        running.values("counting", "nll", a=1)


# ---- What each study does, on tiny tasks. ----


def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[effens.Ensemble, int]]:
    """The ensembles that are trained from here on, with their epochs."""
    found: list[tuple[effens.Ensemble, int]] = []
    fit = effens.fit

    def spy(ensemble: effens.Ensemble, data: Any, **options: Any) -> None:
        found.append((ensemble, options["epochs"]))
        fit(ensemble, data, **options)

    monkeypatch.setattr(tasks, "fit", spy)
    return found


@pytest.mark.parametrize(
    ("kind", "parts", "kept", "epochs"),
    [
        ("snapshot", 3, 3, 3),
        ("triangular", 2, 2, 3),
        ("independent", 2, 2, 2),
        ("single", 3, 1, 1),
        ("single", 0.5, 1, 6),
    ],
)
def test_cycles_divide_one_budget(
    kind: str, parts: float, kept: int, epochs: int, bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(monkeypatch)
    (row,) = one_setting.cycles(kind=kind, parts=parts, seed=0)
    ((ensemble, budget),) = found
    assert (ensemble.members, budget) == (kept, epochs)
    assert isinstance(ensemble, effens.SnapshotEnsemble) == (kind in ("snapshot", "triangular"))
    x, y = SPOTS.load(0)["train"]
    assert y is not None
    probs = effens.predict(ensemble, x)
    assert row["fit"] == pytest.approx(effens.member_nll(probs, y).item(), rel=1e-5)
    assert row["fit_of_mean"] == pytest.approx(effens.nll(probs, y).item(), rel=1e-5)


def test_all_forms_of_a_tail_come_from_one_training(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    monkeypatch.setitem(TASKS, "gap", replace(TASKS["gap"], epochs=2))
    rows = one_setting.tails(lr=0.001, tail_lr=0.5, seed=0)
    ((ensemble, _),) = found
    assert isinstance(ensemble, effens.SWAG)
    assert [(row["rank"], row["scale"]) for row in rows] == [(-1, 0.0), *one_setting.FORMS]
    last, swa = rows[0], rows[1]
    task = TASKS["gap"]
    for network, row in ((ensemble.network, last), (ensemble.at(ensemble.mean), swa)):
        expected = running.score_ensemble(task, effens.DeepEnsemble.of([network]), 0)
        assert row["nll"] == pytest.approx(expected["nll"], rel=1e-4)
    assert rows[2]["spread"] < rows[3]["spread"] < rows[4]["spread"]  # with the scale


def test_a_tail_that_diverges_says_so(bank: Path) -> None:
    rows = one_setting.tails(lr=1e12, tail_lr=1.0, seed=0)
    assert [row["diverged"] for row in rows] == [1] * len(one_setting.FORMS)


def test_one_head_is_the_plain_network(bank: Path) -> None:
    (one,) = one_setting.capacity(width=4, members=1, share=0.0, seed=0)
    task = replace(TASKS["digits"], width=4)
    plain = running.train(task, lambda: effens.MIMO(task.make_net, 1, 0.0), SETTINGS, 0)
    assert one["nll"] == pytest.approx(running.score_ensemble(task, plain, 0)["nll"])
    assert one["diversity_gain"] == pytest.approx(0, abs=1e-9)


def test_samples_are_as_many_as_asked(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    for number in (1, 3):
        one_setting.samples(samples=number, seed=0)
    assert [ensemble.members for ensemble, _ in found] == [1, 3]


def test_the_tail_on_digits_has_the_rate_that_is_asked_for(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    (row,) = one_setting.tail_on_digits(tail_lr=0.7, seed=0)
    ((ensemble, _),) = found
    assert isinstance(ensemble, effens.SWAG)
    assert (ensemble.tail_lr, ensemble.members) == (0.7, TASKS["digits"].members)
    train = running.score_ensemble(TASKS["digits"], ensemble, 0, "train")
    assert row["fit"] == pytest.approx(train["member_nll"])


@pytest.mark.parametrize("task", ["digits", "gap"])
def test_every_way_to_search_keeps_to_its_budget(task: str, bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    monkeypatch.setattr(one_setting, "BUDGET", 8)
    rows = {row["way"]: row for row in one_setting.search(task=task, seed=0)}
    members = TASKS[task].members
    assert len(found) == 8 + members + 4  # candidates; the best again; those that are chosen of the first half, again
    assert rows.keys() == {"greedy", "top", "best, retrained", "stratified", "best, alone"}
    assert rows["top"]["unique"] == rows["best, retrained"]["unique"] == members
    assert rows["best, alone"]["unique"] == 1
    assert all(1 <= row["unique"] <= members for row in rows.values())
    assert rows["greedy"]["val"] <= rows["best, alone"]["val"] + 1e-9  # it begins with the best


def test_a_search_selects_without_looking_at_test_data(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_setting, "BUDGET", 8)
    task = TASKS["digits"]
    monkeypatch.setitem(TASKS, "digits", replace(task, load=lambda seed: Guarded(task.load(seed))))
    asked_for: list[str] = []
    score_ensemble = running.score_ensemble

    def spy(of: Any, ensemble: effens.Ensemble, seed: int, split: str = "test") -> Row:
        asked_for.append(split)
        return score_ensemble(task, ensemble, seed, split)

    monkeypatch.setattr(running, "score_ensemble", spy)
    one_setting.search(task="digits", seed=0)  # the guard would raise
    assert asked_for == ["val", "test"] * 5  # after all was chosen


# ---- Claims. ----


@pytest.fixture
def more_tasks(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tasks of all names, the digits with something unknown beside them."""
    (x, y), (x_test, _) = SPOTS.load(0)["train"], SPOTS.load(0)["test"]
    sets = {**SPOTS.load(0), "letters": (x_test + 3, None), "val": (x, y)}
    for name in ("digits", "fashion", "airtime", "diamonds"):
        monkeypatch.setitem(TASKS, name, replace(SPOTS, name=name, load=lambda seed: dict(sets)))
    settings = {**SETTINGS, "fast_lr": 0.5, "slots": 2, "own": 0.5}
    monkeypatch.setattr(running, "tuned_settings", lambda name, task="digits": settings)


@pytest.mark.parametrize("start", ["independent", "signs", "normal", 0.1])
def test_a_start_is_scored_and_raises_an_alarm(start: str | float, more_tasks: None) -> None:
    (row,) = claims.starts(task="digits", start=start, members=2, seed=0)
    assert row["nll"] == pytest.approx(row["member_nll"] - row["diversity_gain"], rel=1e-5)
    assert 0 <= row["auroc"] <= 100
    assert row["mi"] > 0


def test_the_last_snapshots_come_from_one_training(more_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "airtime", replace(TASKS["airtime"], epochs=4))
    found = trained(monkeypatch)
    rows = claims.newest(task="airtime", members=4, budget=2, seed=0)
    ((ensemble, epochs),) = found
    assert (epochs, [row["last"] for row in rows]) == (8, [1, 2, 4])
    assert rows[0]["diversity_gain"] == pytest.approx(0, abs=1e-9)
    last = effens.DeepEnsemble.of([ensemble.member(3)])
    assert rows[0]["nll"] == pytest.approx(running.score_ensemble(TASKS["airtime"], last, 0)["nll"], rel=1e-4)


def test_a_repeated_batch_has_as_many_rows_and_more_steps(more_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    (row,) = claims.repetition(times=0.5, repeats=4, seed=0)
    assert math.isfinite(row["val"])
    ((ensemble, _),) = found
    size = SPOTS.batch_size // 4
    assert {index.shape for index in ensemble.batches(size, size)} == {(2, SPOTS.batch_size)}
    monkeypatch.setattr(running, "tuned_settings", lambda name, task: {**SETTINGS, "lr": 1e30, "slots": 2, "own": 0.5})
    assert claims.repetition(times=0.5, repeats=4, seed=0) == [{"diverged": 1}]


@pytest.mark.parametrize("joint", [0.0, 0.3, 1.0])
def test_the_joint_loss_is_the_one_that_is_written(joint: float) -> None:
    """With the gradient of a deep ensemble at 0, and of the mean prediction's loss at 1."""
    ensemble = claims.Colluding(SPOTS.make_net, 3, joint)
    x, y = SPOTS.load(0)["train"]
    probs = ensemble(x).softmax(-1)
    assert y is not None
    own, of_mean = effens.member_nll(probs, y), effens.nll(probs, y)
    losses = effens.Categorical().nll(ensemble(x), y)
    expected = 3 * ((1 - joint) * own + joint * of_mean)
    assert ensemble.reduce(losses).item() == pytest.approx(expected.item(), rel=1e-6)
    if joint == 0:
        assert ensemble.reduce(losses).item() == pytest.approx(effens.DeepEnsemble.reduce(ensemble, losses).item())


def test_collusion_shows_on_what_was_trained_on(more_tasks: None) -> None:
    (row,) = claims.collusion(task="digits", joint=1.0, seed=0)
    assert row["fit"] == pytest.approx(row["fit_of_members"] - row["fit_gain"], rel=1e-4)


def test_a_budget_is_split_among_networks_of_equal_flops(more_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(monkeypatch)
    n = len(SPOTS.load(0)["train"][0])
    (many,) = claims.split(task="digits", equal="FLOPs", networks=4, examples=n // 4, seed=0)
    (one,) = claims.split(task="digits", equal="FLOPs", networks=1, examples=n, seed=0)
    assert many["units"] < TASKS["digits"].width <= one["units"]
    assert many["weight_decay"] in claims.SPLIT_DECAYS
    assert many["lr"] / SETTINGS["lr"] in claims.SPLIT_TIMES
    trainings = len(claims.SPLIT_TIMES) + len(claims.SPLIT_DECAYS)  # one for each choice but the first, one to keep
    assert [epochs for _, epochs in found] == [2 * SPOTS.epochs] * trainings + [SPOTS.epochs] * trainings
    assert [ensemble.members for ensemble, _ in found] == [4] * trainings + [1] * trainings


def test_a_longer_training_has_the_weight_decay_of_its_budget(
    more_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(monkeypatch)
    (row,) = claims.longer(budget=2, task="digits", members=3, seed=0)
    assert [epochs for _, epochs in found] == [2 * SPOTS.epochs] * 5  # one for each decay, and one to keep
    assert all(isinstance(ensemble, effens.SnapshotEnsemble) and ensemble.members == 3 for ensemble, _ in found)
    losses = [running.score_ensemble(TASKS["digits"], each, TUNING_SEEDS[0], "val")["nll"] for each, _ in found]
    tuned = SETTINGS["weight_decay"]
    assert row["weight_decay"] == pytest.approx([tuned, tuned, tuned, 3 * tuned][losses.index(min(losses[:4]))])


def test_weights_start_larger(more_tasks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "fit", lambda *given, **options: None)  # as they start
    rows = [claims.widths(task="digits", units=4, gain=gain, seed=0)[0] for gain in (0.5, 2.0)]
    assert rows[0]["mi"] < rows[1]["mi"]
    (row,) = claims.widths(task="gap", units=4, gain=1.0, seed=0)
    assert {"spread", "spread@gap", "coverage@gap"} <= row.keys()


# ---- The studies that the book ships. ----


@pytest.fixture
def tiny_panel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A panel of 4 assets, one trial, and pools of 32 networks."""
    for name, value in {"PANEL_DAYS": 30, "PANEL_ASSETS": 4, "POOL": 32, "PANEL_GRID": [(0.01, 0.1)]}.items():
        monkeypatch.setattr(panel, name, value)
    panel.panel_settings.cache_clear()
    yield
    panel.panel_settings.cache_clear()


@pytest.mark.parametrize(
    ("kind", "sizes"), [("linear", [1]), ("single", [1]), ("deep", [1, 2, 4, 8, 16]), ("BatchEnsemble", [2, 4, 8, 16])]
)
def test_a_panel_has_a_row_for_each_number_of_members(kind: str, sizes: list[int], tiny_panel: None) -> None:
    rows = panel.panel(source="R2 0.05", kind=kind, seed=0)
    assert [row["members"] for row in rows] == sizes
    for row in rows:
        assert -1 <= row["ranks"] <= 1
        assert -1 <= row["skill"] <= 1
        assert 0 <= row["turnover"] <= 100
        assert (row.get("lr"), row.get("weight_decay")) == ((None, None) if kind == "linear" else (0.01, 0.1))


def test_the_settings_of_a_panel_are_those_of_the_lowest_loss(
    tiny_panel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panel, "PANEL_GRID", [(1e-5, 0.0), (0.02, 0.0), (1.0, 0.0)])

    def forecasts(sets: Any, kind: str, members: int, lr: float, decay: float, seed: int, split: str) -> Tensor:
        target: Tensor = sets[split][1]
        return target + abs(lr - 0.02) * torch.ones(members, 1)

    monkeypatch.setattr(panel, "panel_forecasts", forecasts)
    assert panel.panel_settings("R2 0.05", "deep") == (0.02, 0.0)


def test_a_decay_that_diverges_says_so(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = one_setting.decay(task="digits", method="single", weight_decay=0.1, seed=0)
    assert math.isfinite(row["nll"])
    monkeypatch.setattr(running, "tuned_settings", lambda name, task: {**SETTINGS, "lr": 1e30})
    assert one_setting.decay(task="digits", method="single", weight_decay=0.1, seed=0) == [{"diverged": 1}]


def test_scores_that_are_not_finite_are_refused(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "score", lambda said, y: {"nll": math.nan, "accuracy": 0.5})
    task = TASKS["digits"]
    with pytest.raises(FloatingPointError, match=r"scores must be finite, got \['nll'\] that are not"):
        running.score_ensemble(task, effens.DeepEnsemble(task.make_net, 1), 0)


def test_the_command_runs_what_is_named(asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    studies.main(["--studies", "counting"])
    assert asked == [(1, 0), (1, 1), (2, 0), (2, 1)]
    studies.main(["--studies", "counting"])
    assert len(asked) == 4
    with pytest.raises(SystemExit):
        studies.main(["--studies", "no such study"])


def test_ranks_and_turnover_are_what_they_say() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 30), torch.randn(5, 30)
    expected = np.mean([stats.spearmanr(first, second).statistic for first, second in zip(a, b, strict=True)])
    assert panel.rank_correlation(a, b) == pytest.approx(expected)
    assert panel.rank_correlation(a, a) == pytest.approx(1)
    assert panel.rank_correlation(a, -a) == pytest.approx(-1)
    ties = torch.tensor([[1.0, 1, 2, 3, 3, 3]]).double(), torch.tensor([[2.0, 1, 2, 1, 5, 5]]).double()
    assert panel.rank_correlation(*ties) == pytest.approx(stats.spearmanr(ties[0][0], ties[1][0]).statistic)
    assert panel.rank_correlation(torch.zeros(2, 5), torch.arange(10.0).view(2, 5)) == 0
    assert panel.turnover(torch.zeros(2, 5), torch.zeros(2, 5)) == 0
    assert panel.turnover(a, a) == 0
    assert panel.turnover(a, a.exp()) == 0  # the same ranks
    assert panel.turnover(a, -a) == pytest.approx(100)  # all of it: what was long is short


@pytest.mark.parametrize("r2", [0.002, 0.05])
def test_the_signal_of_a_panel_explains_what_it_says(r2: float) -> None:
    sets, signal = panel.panel_sets(f"R2 {r2}", 0)
    x, y = sets["test"]
    assert x.shape == (100 * panel.PANEL_ASSETS, panel.PANEL_FEATURES)
    assert signal.shape == (100, panel.PANEL_ASSETS)
    assert signal.var().item() == pytest.approx(1, rel=0.15)
    noise = (y - math.sqrt(r2) * signal.flatten()) / math.sqrt(1 - r2)
    assert noise.std().item() == pytest.approx(1, rel=0.05)
    assert y.var().item() == pytest.approx(1, rel=0.05)
    again, _ = panel.panel_sets(f"R2 {r2}", 1)
    assert not torch.equal(again["test"][0], x)


def test_stocks_are_judged_after_they_were_trained_on() -> None:
    sets, target = panel.panel_sets("stocks", 0)
    assert target.shape[1] == 20
    torch.testing.assert_close(sets["test"][1].view(target.shape), target)
    torch.testing.assert_close(target.mean(1), torch.zeros(len(target)), rtol=0, atol=1e-5)
    assert len(sets["train"][0]) > len(sets["test"][0]) > 700 * 20
    assert len(sets["val"][0]) == 500 * 20


def test_a_threshold_keeps_the_promise_for_as_many_texts_as_it_can() -> None:
    torch.manual_seed(0)
    probs, y = torch.randn(3, 200, 4).mul(2).softmax(2), torch.randint(4, (200,))
    probs[:, :120] = probs[:, :120] / 9 + 8 / 9 * torch.nn.functional.one_hot(y[:120], 4)  # most are right
    sure, label = probs.mean(0).max(1)
    kept = [float(t) for t in sure if (label == y)[sure >= t].double().mean() >= claims.PROMISE]
    assert claims.threshold(probs, y) == pytest.approx(min(kept))


def test_changed_tables_differ_in_what_they_are_named_after() -> None:
    flights, few, numbers = (
        table_rows.SHARED[f"airtime{end}"] for end in ("", ", 2,000 rows", ", 2,000 rows, no categories")
    )
    columns = flights.load(0)["train"][0].shape[1]
    assert columns - sum(flights.one_hot) == table_rows.NUMBERS
    x = few.load(1)["train"][0]
    assert len(x) == table_rows.FEW
    torch.testing.assert_close(numbers.load(1)["train"][0], x[:, : table_rows.NUMBERS])
    assert numbers.make_net()(numbers.load(1)["train"][0][:5]).shape == (5, 3)
    plain, noisy, wide = (
        table_rows.SHARED[f"diamonds{end}"] for end in ("", ", noisy prices", ", 150 useless columns")
    )
    (x, y), (same, changed) = plain.load(1)["train"], noisy.load(1)["train"]
    torch.testing.assert_close(same, x)
    assert y is not None
    assert changed is not None
    assert (changed - y).std().item() == pytest.approx(table_rows.NOISE, rel=0.05)
    torch.testing.assert_close(wide.load(1)["train"][0][:, :9], x)
    torch.testing.assert_close(wide.load(1)["train"][1], y)
    assert wide.make_net()(wide.load(1)["train"][0][:5]).shape == (5, 2)


@pytest.mark.parametrize("name", running.STUDIES)
def test_a_shipped_study_is_complete(name: str) -> None:
    rows, study = running.unpack(SHIPPED[name]), running.STUDIES[name]
    for point in study.grid:
        for seed in range(study.seeds):
            assert running.matching(rows, {**point, "seed": seed}), (point, seed)
    assert {row["seed"] for row in rows} == set(range(study.seeds))
    keys = study.grid[0].keys()
    points = [tuple(point.values()) for point in study.grid]
    assert all(tuple(row[key] for key in keys) in points for row in rows)


@pytest.mark.parametrize("name", running.STUDIES)
def test_the_numbers_of_a_shipped_study_are_sound(name: str) -> None:
    whole = [row for row in running.unpack(SHIPPED[name]) if "diverged" not in row]
    assert whole
    for row in whole:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
        if "nll" not in row:
            assert name == "panel"
            continue
        assert row["nll"] == pytest.approx(
            row["member_nll"] - row["diversity_gain"], abs=2e-5 * (1 + abs(row["member_nll"]))
        )
        assert row["diversity_gain"] >= -1e-6
    assert running.path_of(name).stat().st_size < 600_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("cycles", {"kind": "snapshot", "parts": 4}),
        ("capacity", {"width": 8, "members": 3, "share": 0.5}),
        ("samples", {"samples": 4}),
    ],
)
def test_an_answer_can_be_had_again(name: str, point: dict[str, Any]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (row,) = running.STUDIES[name].answer(**point, seed=0)
    finally:
        torch.set_num_threads(threads)
    kept: Tensor = running.values(name, "nll", **point)[0]
    assert row["nll"] == pytest.approx(kept.item(), abs=0.03)  # another processor rounds otherwise


def test_a_point_of_the_panel_can_be_had_again() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    where = {"source": "R2 0.01", "kind": "BatchEnsemble", "members": 4}
    kept = {key: running.values("panel", key, **where)[0].item() for key in ("lr", "weight_decay", "ranks", "skill")}
    sets, target = panel.panel_sets("R2 0.01", 0)
    books = [
        panel.panel_forecasts(sets, "BatchEnsemble", 4, kept["lr"], kept["weight_decay"], 1000 * (1 + again))
        for again in range(2)
    ]
    torch.set_num_threads(threads)
    first, second = (book.mean(0).view(target.shape) for book in books)
    assert panel.rank_correlation(first, second) == pytest.approx(kept["ranks"], abs=0.02)
    assert (panel.rank_correlation(first, target) + panel.rank_correlation(second, target)) / 2 == pytest.approx(
        kept["skill"], abs=0.02
    )
