"""Baselines without a network: fitted on the past only, and equal to their equations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import StudentT

import effens_book.data
from effens_book.benchmark import shipped, tasks
from effens_book.finance import garch, risk


def test_student_finds_what_made_the_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(20_000, 1)
    y = 0.1 + (0.5 * x[:, 0] - 0.2).exp() * StudentT(5.0).sample(torch.Size([20_000]))
    df, mean, scale = garch.student(x, y, torch.tensor([[0.0], [1.0]]))
    assert df[0].item() == pytest.approx(5, rel=0.1)
    assert mean[0].item() == pytest.approx(0.1, abs=0.03)
    assert scale.log().tolist() == pytest.approx([-0.2, 0.3], abs=0.05)
    assert not any(part.requires_grad for part in (df, mean, scale))


NAMES = list(garch.MODELS)


def returns(n: int = 1500) -> garch.Array:
    result: garch.Array = 100 * np.diff(np.log(effens_book.data.prices().close.numpy()[-n - 1 :]))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_a_model_does_not_look_ahead(name: str) -> None:
    r = returns()
    other = r.copy()
    other[1200:] = -3
    (said, residuals), (changed, _) = garch.one_year(name, r, 1000), garch.one_year(name, other, 1000)
    np.testing.assert_allclose(said[:, 1000:1201], changed[:, 1000:1201], rtol=1e-6)  # those that are asked for
    assert changed[3, 1201] > said[3, 1201]
    assert residuals.shape == (1000,)
    np.testing.assert_allclose(residuals[500:], ((r - said[2, 0]) / said[3])[500:1000], rtol=1e-3)
    np.testing.assert_array_equal(residuals, garch.one_year(name, other, 1000)[1])


def test_gjr_and_the_moving_average_are_their_equations() -> None:
    r = returns()
    (_, skew, mean, volatility), _ = garch.one_year("EWMA-t", r, 1000)
    shocks = r - mean
    for t in range(1300, 1400):
        assert volatility[t] ** 2 == pytest.approx(0.94 * volatility[t - 1] ** 2 + 0.06 * shocks[t - 1] ** 2, rel=1e-9)
    assert (skew == 0).all()
    found = garch.arch_model("GJR-t", r[:1000]).fit(disp="off", show_warning=False).params
    (_, _, mean, volatility), _ = garch.one_year("GJR-t", r, 1000)
    for t in range(1300, 1400):
        shock = r[t - 1] - mean[0]
        weight = found["alpha[1]"] + found["gamma[1]"] * (shock < 0)
        variance = found["omega"] + weight * shock**2 + found["beta[1]"] * volatility[t - 1] ** 2
        assert volatility[t] ** 2 == pytest.approx(variance, rel=1e-9)


def test_a_fit_finds_what_made_the_returns() -> None:
    generator = np.random.default_rng(1)
    r, variance = np.empty(6000), 1.0
    for t in range(len(r)):
        shock = math.sqrt(variance * 4 / 6) * generator.standard_t(6)
        r[t] = 0.05 + shock
        variance = 0.02 + (0.02 + 0.1 * (shock < 0)) * shock**2 + 0.9 * variance
    (df, skew, mean, volatility), _ = garch.one_year("GJR-skewt", r, len(r))
    assert df[0] == pytest.approx(6, rel=0.2)
    assert skew[0] == pytest.approx(0, abs=0.05)
    assert mean[0] == pytest.approx(0.05, abs=0.03)
    assert np.corrcoef(np.log(volatility[:-1] ** 2), np.log(np.abs(r[:-1]) + 1e-3))[0, 1] > 0.1


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
    uniform = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    losses = forecast.tail_losses(torch.full((20,), 4), uniform, 0.95)
    torch.testing.assert_close(losses, -drawn[4].topk(20, largest=False).values)


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


# ---- What the book ships. ----


@pytest.mark.parametrize("task", garch.TASKS)
@pytest.mark.parametrize("name", garch.BASELINES)
def test_there_is_a_forecast_of_every_day(task: str, name: str) -> None:
    found = garch.forecast(name, task)
    y = shipped().targets(task, 0, "test")
    assert tuple(found.batch_shape) == (1, len(tasks.days(task))) == (1, len(y))
    low, high = (risk.quantile(found, p) for p in (0.025, 0.975))
    assert 0.93 < float(((low <= y) & (y <= high)).double().mean()) < 0.97


def test_what_reading_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="name must be one of linear-t, EWMA-t, GJR-t, GJR-skewt, EGARCH-skewt, got 'A'"
    ):
        garch.forecast("A")
    garch.read.cache_clear()
    monkeypatch.setattr(garch, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="run python -m effens_book.finance.garch"):
        garch.read()


def test_two_years_that_are_fitted_again_are_those_that_are_kept() -> None:
    for key, array in garch.walk("nasdaq", years=2).items():
        kept = garch.read()[f"nasdaq | {key}"]
        found = torch.from_numpy(array)
        same = kept[: len(found)] if key == "residuals" else kept[..., : found.shape[-1]]
        if key in garch.MODELS:  # 30 degrees of freedom and 70 are nearly the same t, and either may be found
            found, same = (torch.cat([1 / part[:1], part[1:]]) for part in (found, same))
        torch.testing.assert_close(found, same, rtol=0.02, atol=0.02)
