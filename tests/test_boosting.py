"""Gradient boosting: what it answers is what its trees say, as a network would say it."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Normal, StudentT

import effens
from effens_book.benchmark import TASKS
from effens_book.boosting import GradientBoosting, fit_t, raw

OPTIONS = {"lr": 0.1, "trees": 80, "leaves": 8}


def rows(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and a category of three, whose noise depends on the first number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 2, generator=generator)
    code = torch.randint(3, (n,), generator=generator)
    noise = (0.1 + 0.4 * x[:, 0]) * torch.randn(n, generator=generator)
    one_hot = torch.nn.functional.one_hot(code, 3).float()
    return torch.cat([x, one_hot], 1), 2 * x[:, 1] + code + noise


@pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()])
def test_it_finds_the_mean_and_the_spread(likelihood: effens.Likelihood) -> None:
    boosting = GradientBoosting(likelihood, one_hot=(3,), **OPTIONS).fit(*rows(3000))  # type: ignore[arg-type]
    x, y = rows(1000, seed=1)
    said = effens.predict(boosting, x, likelihood=likelihood)
    assert isinstance(said, Normal | StudentT)
    assert said.batch_shape == (1, 1000)
    truth = 2 * x[:, 1] + x[:, 2:].argmax(1)
    sigma = 0.1 + 0.4 * x[:, 0]
    assert (said.mean[0] - truth).square().mean().sqrt() < 0.15
    assert np.corrcoef(said.stddev[0], sigma)[0, 1] > 0.9
    best = -Normal(truth, sigma).log_prob(y).mean()
    assert -effens.mixture(said).log_prob(y).mean() < best + 0.1
    shown = torch.from_numpy(boosting.mean.predict(boosting.columns(x))).float()
    assert (said.mean[0] - shown).abs().max() < 1e-5


def test_a_category_is_one_column_of_codes_and_an_unknown_one_is_missing() -> None:
    boosting = GradientBoosting(effens.Gaussian(), one_hot=(3, 2), **OPTIONS)  # type: ignore[arg-type]
    x = torch.tensor([[0.5, 0, 1, 0, 1, 0], [0.1, 0, 0, 0, 0, 1]])
    found = boosting.columns(x)
    assert found[0].tolist() == [0.5, 1.0, 0.0]
    assert math.isnan(found[1][1])
    assert found[1][2] == 1


def test_the_scale_and_the_degrees_of_freedom_are_those_that_fit_best() -> None:
    residuals = stats.t.rvs(5, scale=0.3, size=20_000, random_state=0)
    scale, df = fit_t(residuals)
    expected_df, _, expected_scale = stats.t.fit(residuals, floc=0)
    assert scale == pytest.approx(expected_scale, rel=1e-2)
    assert df == pytest.approx(expected_df, rel=5e-2)


def test_raw_is_the_inverse_of_softplus() -> None:
    numbers = torch.tensor([1e-4, 0.1, 1.0, 30.0])
    assert torch.allclose(torch.nn.functional.softplus(raw(numbers)), numbers, rtol=1e-3)


def test_classes_are_refused() -> None:
    with pytest.raises(TypeError, match="likelihood must be Gaussian or StudentT, got Categorical"):
        GradientBoosting(effens.Categorical(), **OPTIONS)  # type: ignore[arg-type]


def test_the_last_columns_of_flights_are_categories() -> None:
    task = TASKS["airtime"]
    x, _ = task.load(0)["train"]
    for group in x[:, -sum(task.one_hot) :].split(list(task.one_hot), 1):
        assert torch.equal(group.sum(1), torch.ones(len(x)))
