"""Networks with a skewed head: what is kept is what a training gives."""

from pathlib import Path

import pytest
import torch

from effens.ensembles.deep import DeepEnsemble
from effens.training import predict
from effens_book.benchmark import TASKS, shipped, tasks
from effens_book.benchmark.predictions import log_mean
from effens_book.finance import heads


@pytest.mark.parametrize("name", heads.MODELS)
def test_what_is_kept_of_the_first_seed_has_the_losses_that_are_kept(name: str) -> None:
    said, losses = heads.forecast(name), heads.read()[f"{name} nll"]
    y = shipped().targets("returns", 0, "test")
    assert tuple(said.batch_shape) == (heads.MODELS[name], len(y))
    assert tuple(losses.shape) == (TASKS["returns"].seeds, len(y))
    torch.testing.assert_close(-log_mean(said.log_prob(y)), losses[0], rtol=0.01, atol=0.01)
    assert said.skew.mean() < -0.02  # losses are the longer tail


def test_a_year_can_be_made_again() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    task, settings = heads.head(TASKS["returns"]), shipped().settings("returns", "deep ensemble")
    sets = tasks.market("returns")[1][2008 - tasks.MARKETS["returns"].first]
    x, y = sets["train"]
    assert y is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ensemble = task.fit(DeepEnsemble(task.make_net, 1), (x, y), settings, 0)
    torch.set_num_threads(threads)
    said = predict(ensemble, sets["test"][0], likelihood=task.likelihood)
    rows = torch.from_numpy(tasks.days("returns").astype("datetime64[Y]").astype(int) + 1970 == 2008)
    answers = shipped().targets("returns", 0, "test")[rows]
    again, kept = -said.log_prob(answers).mean(), heads.read()["single nll"][0, rows].mean()
    assert again.item() == pytest.approx(kept.item(), abs=0.01)


def test_what_reading_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads.read.cache_clear()
    monkeypatch.setattr(heads, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m effens_book.finance.heads"):
        heads.read()
