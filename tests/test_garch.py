"""Rivals without a network: fitted on the past only, and equal to their equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, StudentT

import effens
import effens_book.data
from effens_book.benchmark import predictions, shipped, tasks
from effens_book.data import markets
from effens_book.finance import garch

GARCH = garch.Garch(mu=0.05, omega=0.02, alpha=0.02, gamma=0.1, beta=0.9, nu=6.0)


def returns(n: int = 400) -> garch.Array:
    result: garch.Array = 100 * np.diff(np.log(effens_book.data.prices().close.numpy()[-n - 1 :]))
    return result


def test_least_squares_is_the_normal_equation() -> None:
    torch.manual_seed(0)
    x, x_new = torch.randn(50, 3), torch.randn(7, 3)
    y = x @ torch.tensor([1.0, -2, 0.5]) + 0.3 + 0.1 * torch.randn(50)
    mean, deviation = garch.least_squares(x, y, x_new)
    known = torch.cat([x, torch.ones(50, 1)], 1).double()
    weights = torch.linalg.solve(known.T @ known, known.T @ y.double())
    torch.testing.assert_close(mean, torch.cat([x_new, torch.ones(7, 1)], 1).double() @ weights)
    assert deviation.unique().item() == pytest.approx((y.double() - known @ weights).std().item())


def test_student_finds_what_made_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 1)
    y = 0.1 + (0.5 * x[:, 0] - 0.2).exp() * StudentT(5.0).sample(torch.Size([20_000]))
    df, mean, scale = garch.student(x, y, torch.tensor([[0.0], [1.0]]))
    assert df[0].item() == pytest.approx(5, rel=0.1)
    assert mean[0].item() == pytest.approx(0.1, abs=0.03)
    assert scale.log().tolist() == pytest.approx([-0.2, 0.3], abs=0.05)
    assert not any(part.requires_grad for part in (df, mean, scale))


def test_garch_is_its_equation() -> None:
    r = returns()
    volatility = GARCH.filter(r)
    for t in range(300, 400):
        shock = r[t - 1] - GARCH.mu
        variance = GARCH.omega + (GARCH.alpha + GARCH.gamma * (shock < 0)) * shock**2
        assert volatility[t] ** 2 == pytest.approx(variance + GARCH.beta * volatility[t - 1] ** 2, rel=1e-9)


def test_garch_does_not_look_ahead() -> None:
    r = returns()
    other = r.copy()
    other[300:] = -7
    assert np.array_equal(GARCH.filter(r)[:301], GARCH.filter(other)[:301])
    assert GARCH.filter(r)[301] != GARCH.filter(other)[301]


def test_the_mean_variance_of_days_ahead_is_that_of_simulated_ones() -> None:
    generator = np.random.default_rng(0)
    variance = np.full(200_000, 4.0)
    total = np.zeros(200_000)
    for _ in range(5):
        total += variance
        shock = np.sqrt(variance * (GARCH.nu - 2) / GARCH.nu) * generator.standard_t(GARCH.nu, 200_000)
        variance = GARCH.omega + (GARCH.alpha + GARCH.gamma * (shock < 0)) * shock**2 + GARCH.beta * variance
    assert GARCH.ahead(np.array([2.0]), 5)[0] == pytest.approx(math.sqrt(total.mean() / 5), rel=0.01)
    assert GARCH.ahead(np.array([2.0]), 1)[0] == pytest.approx(2)


def test_a_fit_finds_what_made_the_returns() -> None:
    pytest.importorskip("arch")
    generator = np.random.default_rng(1)
    r, variance = np.empty(8000), 1.0
    for t in range(len(r)):
        shock = math.sqrt(variance * (GARCH.nu - 2) / GARCH.nu) * generator.standard_t(GARCH.nu)
        r[t] = GARCH.mu + shock
        variance = GARCH.omega + (GARCH.alpha + GARCH.gamma * (shock < 0)) * shock**2 + GARCH.beta * variance
    found = garch.Garch.fit(r)
    assert found.beta == pytest.approx(GARCH.beta, abs=0.03)
    assert found.gamma == pytest.approx(GARCH.gamma, abs=0.04)
    assert found.nu == pytest.approx(GARCH.nu, rel=0.2)


# ---- Filtered historical simulation, against its own definition. ----


def history() -> garch.FilteredHistory:
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(2, 400, generator=generator, dtype=torch.float64).sort(1).values
    loc, scale = (torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.5).unbind()
    return garch.FilteredHistory(loc, scale, residuals, torch.tensor([0, 0, 0, 1, 1, 1]))


def outcomes(forecast: garch.FilteredHistory) -> Tensor:
    return forecast.loc[:, None] + forecast.scale[:, None] * forecast.residuals[forecast.year]


def test_filtered_history_is_a_sample_of_outcomes() -> None:
    forecast, y = history(), torch.linspace(-2, 3, 6).double()
    drawn = outcomes(forecast)
    between = drawn.sort(1).values[:, 19:21].mean(1)  # of 400 the 20th has the rank 19.5 / 400, the 21st 20.5 / 400
    torch.testing.assert_close(forecast.quantile(0.05), between)
    torch.testing.assert_close(forecast.value_at_risk(0.95), -between)
    worst = drawn.topk(20, largest=False).values.mean(1)
    torch.testing.assert_close(forecast.expected_shortfall(0.95), -worst)
    torch.testing.assert_close(forecast.pit(y), (drawn <= y[:, None]).double().mean(1))
    near = (drawn - y[:, None]).abs().mean(1)
    between = (drawn[:, :, None] - drawn[:, None]).abs().mean((1, 2))
    torch.testing.assert_close(forecast.crps(y), near - between / 2)


def test_many_normal_residuals_score_as_a_normal() -> None:
    at = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    residuals = torch.from_numpy(stats.norm.ppf(at.numpy()))[None]
    forecast = garch.FilteredHistory(torch.zeros(3).double(), torch.ones(3).double(), residuals, torch.zeros(3).long())
    for level in (0.9, 0.975, 0.99):
        assert forecast.value_at_risk(level)[0].item() == pytest.approx(stats.norm.ppf(level), abs=2e-3)
        shortfall = stats.norm.pdf(stats.norm.ppf(level)) / (1 - level)
        assert forecast.expected_shortfall(level)[0].item() == pytest.approx(shortfall, rel=0.01)
    assert forecast.quantile(0.0)[0] == residuals[0, 0]
    assert forecast.quantile(1.0)[0] == residuals[0, -1]
    y = torch.tensor([-1.0, 0.2, 2.5]).double()
    assert forecast.crps(y).mean().item() == pytest.approx(
        effens.crps(Normal(torch.zeros(1, 3), torch.ones(1, 3)), y).item(), abs=2e-3
    )


# ---- What the book ships. ----


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in garch.BASELINES.items() for name in names])
def test_there_is_a_forecast_of_every_day(task: str, name: str) -> None:
    found = garch.forecast(name)
    assert tuple(found.batch_shape) == (1, len(tasks.days(task)))
    assert torch.stack(predictions.parameters(found)).isfinite().all()
    scored = predictions.score(found, shipped().targets(task, 0, "test"))
    assert 90 < scored["coverage"] < 98


def test_the_kept_forecasts_are_those_of_a_fit_on_the_past() -> None:
    closes = effens_book.data.prices()
    task = markets.task(closes, "volatility")
    (split,) = markets.walk_forward(task, ["2008-01-01"], end="2009-01-01")
    mean, deviation = garch.least_squares(task.x[split.train, :3], task.y[split.train], task.x[split.test, :3])
    rows = np.flatnonzero(
        (tasks.days("volatility") >= np.datetime64("2008-01-01"))
        & (tasks.days("volatility") < np.datetime64("2009-01-01"))
    )
    kept = garch.forecast("HAR")
    assert isinstance(kept, Normal)
    torch.testing.assert_close(kept.loc[0, rows], mean.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(kept.scale[0, rows], deviation.float(), rtol=0, atol=1e-5)


def test_a_year_of_garch_can_be_had_again() -> None:
    pytest.importorskip("arch")
    closes = effens_book.data.prices()
    r = 100 * np.diff(np.log(closes.close.numpy()))  # of closes.dates[1:]
    first = int(np.flatnonzero(closes.dates[1:] >= np.datetime64("2008-01-01"))[0])
    fitted = garch.Garch.fit(r[:first])
    days = tasks.days("returns")
    rows = np.flatnonzero((days >= np.datetime64("2008-01-01")) & (days < np.datetime64("2009-01-01")))
    again = fitted.filter(r[: first + len(rows) + 1])[first + 1 :][: len(rows)]
    assert np.abs(garch.garch_volatility().numpy()[rows] / again - 1).max() < 0.02
    known = garch.forecast("GARCH-t")
    assert isinstance(known, StudentT)
    assert known.df[0, rows[0]].item() == pytest.approx(fitted.nu, rel=0.02)


def test_what_reading_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name must be one of HAR-t, GARCH-t, HAR, GARCH, got 'ARMA'"):
        garch.forecast("ARMA")
    garch.read.cache_clear()
    monkeypatch.setattr(garch, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m effens_book.finance.garch"):
        garch.read()


def test_a_year_that_is_run_again_is_the_year_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("arch")
    kept = {key: tensor.clone() for key, tensor in garch.read().items()}
    monkeypatch.setattr(garch, "RESULTS", tmp_path)
    walk = markets.walk_forward
    first = garch.years()[:2]
    monkeypatch.setattr(garch, "years", lambda: first[:1])
    monkeypatch.setattr(markets, "walk_forward", lambda task, starts: walk(task, starts, end=first[1]))
    garch.run()
    again = garch.read()
    garch.read.cache_clear()
    written = (tmp_path / "garch.npz").stat().st_mtime_ns
    garch.run()  # what is kept is not fitted again
    assert (tmp_path / "garch.npz").stat().st_mtime_ns == written
    assert again.keys() == kept.keys()
    for key, tensor in again.items():
        same = kept[key][..., : tensor.shape[-1]] if key != "residuals" else kept[key][:1]
        torch.testing.assert_close(tensor, same, rtol=0.02, atol=0.02)
