"""Trainings over executors: the same networks as one by one, kept and found again, and what dies loses nothing."""

import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import cnn, images, mlp, plain_loop, relative, residual, vectors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import effens
import effens_book.nets
from effens import scaling, tuning
from effens_book.makespan import makespan

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "device": "cpu", "progress": False}


def processes(workers: int = 2) -> ProcessPoolExecutor:
    """Workers that begin with nothing of this process."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def weights(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def same(a: list[nn.Module], b: list[nn.Module]) -> bool:
    """Whether all weights are equal to the last bit."""
    pairs = [(weights(left), weights(right)) for left, right in zip(a, b, strict=True)]
    return all(p.keys() == q.keys() and all(torch.equal(p[key], q[key]) for key in p) for p, q in pairs)


def files(folder: Path) -> dict[str, int]:
    """The files of a folder, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def many_vectors() -> tuple[Tensor, Tensor]:
    return vectors(60, seed=1)


def dropping(width: int = 8, dropout: float = 0.5) -> nn.Module:
    return effens_book.nets.mlp(4, 3, width=width, dropout=dropout).double()


def make_swag() -> effens.SWAG:
    return effens.SWAG(mlp, members=3, rank=2)


def exploding(**settings: float) -> nn.Module:
    raise FloatingPointError("losses must be finite")


# What is trained


@pytest.mark.parametrize(("make", "data"), [(mlp, vectors), (cnn, images), (residual, vectors)])
def test_each_is_the_obvious_loop(make: Any, data: Any, tmp_path: Path) -> None:
    x, y = data()
    networks = effens.fit_each(make, (x, y), [3, 5], folder=tmp_path, lr=1e-2, weight_decay=0.1, **QUICK)
    for seed, network in zip([3, 5], networks, strict=True):
        torch.manual_seed(seed)
        start = make()
        generator = torch.Generator().manual_seed(seed)
        batches = [part for _ in range(2) for part in torch.randperm(len(x), generator=generator).split(8)]
        expected = plain_loop(start, x, y, batches, lr=1e-2, weight_decay=0.1)
        assert relative(network(x), expected(x)) < 1e-9
        assert not network.training


def test_each_is_the_plain_call_of_fit(tmp_path: Path) -> None:
    (network,) = effens.fit_each(dropping, vectors(), [7], folder=tmp_path, **QUICK)
    torch.manual_seed(7)
    alone = dropping()
    effens.fit(effens.DeepEnsemble.of([alone]), vectors(), seed=7, **QUICK)
    assert same([network], [alone])


def test_candidates_are_those_of_stratify(tmp_path: Path) -> None:
    settings: list[tuning.Settings] = [
        {"lr": 1e-2, "weight_decay": 0.1, "width": 8, "dropout": 0.2},
        {"lr": 1e-3, "weight_decay": 1.0, "width": 4, "dropout": 0.0},
    ]
    expected = effens.stratify(dropping, vectors(), vectors(seed=1), settings, seeds=[4], **QUICK)
    networks = effens.fit_each(dropping, vectors(), [4, 4], settings=settings, folder=tmp_path, **QUICK)
    assert same(networks, expected.networks)
    ensemble = effens.HyperEnsemble(networks, [1, 0, 1])
    assert ensemble(vectors()[0]).shape == (3, 22, 3)


def test_ensembles_are_trained_as_such(tmp_path: Path) -> None:
    runs = effens.fit_each(make_swag, vectors(), [0, 1], folder=tmp_path, **QUICK)
    both = effens.DeepEnsemble.of(runs)
    assert both.members == 6
    for seed, run in enumerate(runs):
        torch.manual_seed(seed)
        alone = make_swag()
        effens.fit(alone, vectors(), seed=seed, **QUICK)
        assert isinstance(run, effens.SWAG)
        assert torch.equal(run(vectors()[0]), alone(vectors()[0]))


def test_the_global_random_state_and_the_threads_stay_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state, before = torch.get_rng_state(), torch.get_num_threads()
    effens.fit_each(dropping, vectors(), [0], folder=tmp_path, threads=before + 1, **QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "data",
    [many_vectors, TensorDataset(*many_vectors()), DataLoader(TensorDataset(*many_vectors()), batch_size=8)],
    ids=["function", "dataset", "loader"],
)
def test_data_of_every_kind(data: Any, tmp_path: Path) -> None:
    networks = effens.fit_each(mlp, data, [0], folder=tmp_path, **QUICK)
    torch.manual_seed(0)
    alone = mlp()
    effens.fit(effens.DeepEnsemble.of([alone]), data() if callable(data) else data, seed=0, **QUICK)
    assert same(networks, [alone])
    again = type(data)(*data.tensors) if isinstance(data, TensorDataset) else data
    before = files(tmp_path)
    effens.fit_each(mlp, again, [0], folder=tmp_path, **QUICK)
    assert files(tmp_path) == before


# Over executors


@pytest.mark.slow
def test_over_processes_they_are_those_of_one_by_one(tmp_path: Path) -> None:
    make, seeds = partial(dropping, width=6), range(5)
    one_by_one = effens.fit_each(make, vectors(), seeds, folder=tmp_path / "here", **QUICK)
    with processes() as pool:
        apart = effens.fit_each(make, vectors(), seeds, folder=tmp_path / "there", executor=pool, **QUICK)
        from_function = effens.fit_each(mlp, many_vectors, [0], folder=tmp_path, executor=pool, **QUICK)
        swags = effens.fit_each(make_swag, vectors(), [0], folder=tmp_path, executor=pool, **QUICK)
        with pytest.raises(FloatingPointError, match="losses must be finite") as caught:
            effens.fit_each(exploding, vectors(), [0], folder=tmp_path, executor=pool, **QUICK)
    assert same(apart, one_by_one)
    assert files(tmp_path / "here").keys() == files(tmp_path / "there").keys()
    assert same(from_function, effens.fit_each(mlp, many_vectors(), [0], folder=tmp_path, **QUICK))
    assert same(swags, effens.fit_each(make_swag, vectors(), [0], folder=tmp_path / "here", **QUICK))
    assert any("in the training of seed 0" in note for note in caught.value.__notes__)


def test_threads_take_turns(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        apart = effens.fit_each(dropping, vectors(), range(8), folder=tmp_path / "there", executor=pool, **QUICK)
    assert same(apart, effens.fit_each(dropping, vectors(), range(8), folder=tmp_path / "here", **QUICK))


# Kept, and found again


def test_a_second_call_trains_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = effens.fit_each(mlp, vectors(), [0, 1], folder=tmp_path, **QUICK)
    before, seeds = files(tmp_path), []
    build = tuning.build

    def counted(make: Any, settings: Any, seed: int, options: Any) -> nn.Module:
        seeds.append(seed)
        return build(make, settings, seed, options)

    monkeypatch.setattr(scaling, "build", counted)
    more = effens.fit_each(mlp, vectors(), [2, 1, 0], folder=tmp_path, **QUICK)
    assert seeds == [2, *[2, 1, 0]]  # one is trained; all are made, to be loaded
    assert same(more[:0:-1], first)
    assert before.items() <= files(tmp_path).items()


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3},
        {"lr": 1e-2},
        {"likelihood": effens.Categorical(), "optimizer": torch.optim.SGD},
        {"optimizer": partial(torch.optim.SGD, momentum=0.9)},
        {"settings": [{"weight_decay": 0.5}]},
        {"data": vectors(seed=1)},
        {"data": vectors},
        {"make": partial(mlp, dropout=0.1)},
        {"seeds": [1]},
    ],
)
def test_other_trainings_have_other_files(changes: dict[str, Any], tmp_path: Path) -> None:
    plain: dict[str, Any] = {"make": mlp, "data": vectors(), "seeds": [0], **QUICK}
    for arguments in (plain, plain | changes, plain | changes):
        rest = dict(arguments)
        effens.fit_each(rest.pop("make"), rest.pop("data"), rest.pop("seeds"), folder=tmp_path, **rest)
    assert len(files(tmp_path)) == 2


def test_a_lambda_is_known_by_the_name_it_is_given(tmp_path: Path) -> None:
    def call(make: Any, **options: Any) -> nn.Module:
        (network,) = effens.fit_each(make, vectors(seed=1), [0], folder=tmp_path, **QUICK, **options)
        return network

    with pytest.raises(ValueError, match="by a function that stands in a module, or by name=, got <function"):
        call(lambda: mlp())
    first, wide = call(lambda: mlp(), name="plain"), call(lambda: dropping(7), name="of width 7")
    assert same([first], [call(mlp)])
    assert next(wide.parameters()).shape[0] == 7
    before = files(tmp_path)
    assert len(before) == 3
    assert same([first], [call(lambda: mlp(), name="plain")])  # found again
    assert files(tmp_path) == before


def test_what_cannot_be_told_from_others_is_refused(tmp_path: Path) -> None:
    lock = threading.Lock()

    def guarded() -> Any:
        with lock:
            return vectors()

    with pytest.raises(ValueError, match="what a result depends on must be described"):
        effens.fit_each(mlp, guarded, [0], folder=tmp_path, **QUICK)
    assert files(tmp_path) == {}


class Dying(torch.optim.SGD):
    """Interrupts a run in its 14th step."""

    steps = 0

    def step(self, *of: Any, **options: Any) -> Any:
        Dying.steps += 1
        if Dying.steps == 14:
            raise KeyboardInterrupt
        return super().step(*of, **options)


def test_a_checkpoint_is_gone_on_from_and_then_removed(tmp_path: Path) -> None:
    options = {**QUICK, "epochs": 10, "optimizer": Dying, "checkpoints": True}
    with pytest.raises(KeyboardInterrupt):
        effens.fit_each(dropping, vectors(), [0, 1], folder=tmp_path, **options)
    assert [Path(name).suffix for name in files(tmp_path)] == [".checkpoint"]
    networks = effens.fit_each(dropping, vectors(), [0, 1], folder=tmp_path, **options)
    assert Dying.steps == 14 + (30 - 12) + 30
    assert [Path(name).suffix for name in files(tmp_path)] == 2 * [".safetensors"]
    plain = {key: value for key, value in options.items() if key != "checkpoints"}
    before = files(tmp_path)
    assert same(networks, effens.fit_each(dropping, vectors(), [0, 1], folder=tmp_path, **plain))
    assert files(tmp_path) == before
    assert same(networks, effens.fit_each(dropping, vectors(), [0, 1], folder=tmp_path / "plain", **plain))


def test_an_error_loses_nothing_but_its_own_training(tmp_path: Path) -> None:
    settings: list[tuning.Settings] = [{"lr": 1e-2}, {"lr": math.inf}, {"lr": 1e-3}]
    with pytest.raises((FloatingPointError, ValueError)) as caught:
        effens.fit_each(mlp, vectors(), [0, 1, 2], settings=settings, folder=tmp_path, **QUICK)
    notes = " ".join(caught.value.__notes__)
    assert "in the training of seed 1 with settings {'lr': inf}" in notes
    assert "1 of 3 trainings failed; what ended is kept" in notes
    assert len(files(tmp_path)) == 2


def test_a_cut_file_is_said_and_not_loaded(tmp_path: Path) -> None:
    effens.fit_each(mlp, vectors(), [0], folder=tmp_path, **QUICK)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        effens.fit_each(mlp, vectors(), [0], folder=tmp_path, **QUICK)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds must hold at least one, .*, got 0 and 0"),
        ({"seeds": [1, 2, 1]}, "trainings must differ in seed or settings, got 1 twice"),
        ({"settings": [{}]}, "settings one for each, got 2 and 1"),
        ({"threads": 0}, "threads must be >= 1, got 0"),
        ({"data": (vectors()[0],)}, "data must give pairs of tensors"),
    ],
)
def test_fit_each_refuses(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": vectors(), "seeds": [0, 1], "folder": tmp_path, **QUICK, **changes}
    with pytest.raises(ValueError, match=message):
        effens.fit_each(mlp, arguments.pop("data"), arguments.pop("seeds"), **arguments)
    assert files(tmp_path) == {}


def test_what_a_process_cannot_import_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = "must stand in a module that a process can import"
    with processes(1) as pool:
        for make, data in ((lambda: mlp(), vectors()), (mlp, lambda: vectors())):
            with pytest.raises(ValueError, match=rule):
                effens.fit_each(make, data, [0], folder=tmp_path, executor=pool, **QUICK)
        main = sys.modules["__main__"]
        monkeypatch.delattr(main, "__file__", raising=False)  # as a notebook has none
        monkeypatch.setattr(main, "make_here", eval("lambda: None", vars(main)), raising=False)
        monkeypatch.setattr(main.make_here, "__qualname__", "make_here")
        with pytest.raises(ValueError, match=rf"{rule}.*got make_here"):
            effens.fit_each(main.make_here, vectors(), [0], folder=tmp_path, executor=pool, **QUICK)
    assert files(tmp_path) == {}


def test_a_folder_that_the_workers_do_not_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "train_one", lambda *job: None)  # its file is on another machine
    with pytest.raises(FileNotFoundError, match="folder must be one that every worker sees"):
        effens.fit_each(mlp, vectors(), [0], folder=tmp_path, **QUICK)


# How long it takes


@pytest.mark.parametrize("workers", [1, 2, 3, 12, 20])
def test_equal_trainings_take_rounds(workers: int) -> None:
    assert makespan([2.0] * 12, workers) == 2.0 * math.ceil(12 / workers)


def test_longest_first_is_within_its_bound_of_the_best() -> None:
    source = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(30):
        hours = torch.randint(1, 9, (6,), generator=source).tolist()
        ends = [
            [sum(h for h, at in zip(hours, where, strict=True) if at == w) for w in range(2)]
            for where in product(range(2), repeat=6)
        ]
        ratios.append(makespan(hours, 2) / min(map(max, ends)))
    assert min(ratios) >= 1
    assert max(ratios) <= 4 / 3 - 1 / 6
    assert makespan([3, 3, 2, 2, 2], 2) == 7  # the worst: 6 is possible


def test_no_trainings_take_no_time_and_no_workers_are_refused() -> None:
    assert makespan([], 3) == 0
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        makespan([1.0], 0)


# What dies


class killed_after:  # noqa: N801, it reads as a sentence
    """Kill a process once there are so many files in a folder; wait for that at the end."""

    def __init__(self, folder: Path, count: int, pid: Callable[[], int]) -> None:
        self.folder, self.count, self.pid = folder, count, pid
        self.thread = threading.Thread(target=self.kill)

    def kill(self) -> None:
        while len(list(self.folder.glob("*.safetensors"))) < self.count:
            time.sleep(0.01)
        os.kill(self.pid(), signal.SIGKILL)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive()


LONG: dict[str, Any] = {**QUICK, "epochs": 40}
SEEDS = range(8)


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> list[nn.Module]:
    return effens.fit_each(dropping, many_vectors(), SEEDS, folder=tmp_path_factory.mktemp("one-by-one"), **LONG)


def train(folder: Path, executor: Executor | None = None) -> list[nn.Module]:
    options = {**LONG, "checkpoints": True}
    return effens.fit_each(dropping, many_vectors(), SEEDS, folder=folder, executor=executor, **options)


def ended(folder: Path) -> dict[str, int]:
    """The files of trainings that ended, and when each was written."""
    return {name: at for name, at in files(folder).items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_after_a_process_of_a_pool_was_killed_a_second_call_goes_on(tmp_path: Path, one_by_one: Any) -> None:
    with processes() as pool, killed_after(tmp_path, 2, lambda: next(iter(pool._processes))):  # noqa: SIM117
        with pytest.raises(BrokenExecutor) as caught:
            train(tmp_path, pool)
    assert "what ended is kept" in caught.value.__notes__[-1]
    before = ended(tmp_path)
    assert 2 <= len(before) < len(SEEDS)
    with processes() as pool:
        assert same(train(tmp_path, pool), one_by_one)
    assert before.items() <= files(tmp_path).items()
    assert len(files(tmp_path)) == len(SEEDS)


@pytest.mark.slow
def test_after_the_whole_run_was_killed_a_second_call_goes_on(tmp_path: Path, one_by_one: Any) -> None:
    command = f"import test_scaling, pathlib; test_scaling.train(pathlib.Path({str(tmp_path)!r}))"
    folders = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    run = subprocess.Popen([sys.executable, "-c", command], env={**os.environ, "PYTHONPATH": folders})
    with killed_after(tmp_path, 3, lambda: run.pid):
        assert run.wait(120) == -signal.SIGKILL
    before = ended(tmp_path)
    assert 3 <= len(before) < len(SEEDS)
    assert same(train(tmp_path), one_by_one)
    assert before.items() <= files(tmp_path).items()


@pytest.mark.slow
def test_a_killed_worker_of_a_dask_cluster_loses_nothing(tmp_path: Path, one_by_one: Any) -> None:
    """Two worker processes; one is killed in the middle of a training, which another then does."""
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0", "host": "127.0.0.1"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        pids = client.run(os.getpid)

        def busy() -> int:
            """The process of a worker that is training now."""
            while not (at := [worker for worker, keys in client.processing().items() if keys and worker in pids]):
                time.sleep(0.01)
            killed.append(pids[at[0]])
            return killed[0]

        killed: list[int] = []
        with killed_after(tmp_path, 2, busy):
            networks = train(tmp_path, client.get_executor())
        assert killed
        assert killed[0] not in client.run(os.getpid).values()
    assert same(networks, one_by_one)
    assert ended(tmp_path) == files(tmp_path)  # and no checkpoint is left
    assert len(ended(tmp_path)) == len(SEEDS)


# A search that processes share


DEFAULT = {"lr": 1e-2, "weight_decay": 1e-2, "dropout": 0.0, "width": 8}
SPACE: tuning.Space = {"lr": (1e-3, 3e-2), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.5), "width": (4, 16)}


def meet(place: Path, processes: int = 2) -> None:
    """Wait until so many processes are here."""
    place.mkdir(exist_ok=True)
    (place / str(os.getpid())).touch()
    patience = time.monotonic() + 60
    while len(list(place.iterdir())) < processes:
        assert time.monotonic() < patience, "the other process did not come"
        time.sleep(0.01)


def searched(
    storage: str | None, folder: Path | None, trials: int = 12, place: Path | None = None
) -> tuple[int, list[dict[str, float]], list[float]]:
    """Search; return how many trials were trained here, the settings of all, and what became of them.

    With a place, the first training waits until another process is in its first, too.
    """
    trained: list[int] = []
    train = tuning.Recipe.train

    def counted(recipe: tuning.Recipe, settings: tuning.Settings, seed: int) -> tuning.Training:
        if place is not None and not trained:
            meet(place)
        trained.append(seed)
        return train(recipe, settings, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning.Recipe, "train", counted)
        found = effens.search(
            *(dropping, vectors(60, seed=1), vectors(40, seed=2)),
            default=DEFAULT,
            space=SPACE,
            trials=trials,
            storage=storage,
            folder=folder,
            **{**QUICK, "epochs": 20},
        )
    return len(trained), found.settings, found.losses.tolist()


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server of the test's own, at a socket in a folder of its own."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = shutil.which("initdb") or next(map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
    if found is None:
        pytest.skip("PostgreSQL's server is not installed: on Debian, apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the path of a socket must be short
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to be root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")

    def call(program: str, *arguments: str) -> None:
        command = [*as_user, str(Path(found).with_name(program)), "-D", str(folder / "data"), *arguments]
        ended = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == 0, ended.stderr

    try:
        call("initdb", "-U", "effens", "--auth=trust", "--no-sync")
        call("pg_ctl", "-w", "-o", f"-c listen_addresses='' -k {folder}", "-l", str(folder / "log"), "start")
        try:
            yield f"postgresql+psycopg://effens@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_search_is_shared_by_two_processes(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    sqlite = f"sqlite:///{tmp_path}/search.db"
    storage = sqlite if kind == "sqlite" else request.getfixturevalue("postgresql")
    with processes() as pool:
        futures = [pool.submit(searched, storage, tmp_path / "weights", place=tmp_path / "meet") for _ in range(2)]
        shares, settings, losses = zip(*(future.result() for future in futures), strict=True)
    assert min(shares) >= 2  # both did their part
    assert 12 <= sum(shares) <= 13  # who is done first draws one more, in case the other's last is never finished
    _, alone, expected = searched(None, None, sum(shares))
    for found, nlls in zip(settings, losses, strict=True):
        numbers = [alone.index(each) for each in found]
        assert numbers == sorted(set(numbers))
        assert len(numbers) >= 12  # all, but for one that the other was still training
        assert nlls == [expected[number] for number in numbers]


class Joined(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3).double()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        answer: Tensor = self.head(torch.cat([left, right], 1))
        return answer


def test_several_tensors_travel(tmp_path: Path) -> None:
    x, y = vectors()
    parts = x.split(2, 1)
    networks = effens.fit_each(Joined, (parts, y), [0, 1], folder=tmp_path, epochs=2, device="cpu", progress=False)
    again = effens.fit_each(Joined, (parts, y), [0, 1], folder=tmp_path, epochs=2, device="cpu", progress=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    for network, other in zip(networks, again, strict=True):
        assert torch.equal(network(*parts), other(*parts))
