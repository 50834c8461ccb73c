r"""What a forecast of returns must beat, and needs no network: a linear model, the GARCH family, and past shocks.

All walk forward as the benchmark's market tasks do: fitted on what was known before a year, then used for that year.

* **linear-t**: Student's t with a constant mean whose log scale is linear in all eight features of the networks.
* **EWMA-t**: the variance is a moving average, :math:`\sigma_t^2 = 0.94 \sigma_{t-1}^2 + 0.06 (r_{t-1} - \mu)^2`, as in
  RiskMetrics (1996), with Student's t around it.
* **GJR-t** (Glosten, Jagannathan and Runkle, 1993, doi:10.1111/j.1540-6261.1993.tb05128.x), where a loss raises the
  volatility more than a gain:

  .. math:: r_t = \mu + \sigma_t z_t, \quad z_t \sim t_\nu, \qquad
      \sigma_t^2 = \omega + (\alpha + \gamma [z_{t-1} < 0]) (r_{t-1} - \mu)^2 + \beta \sigma_{t-1}^2

  *GJR-skewt* has the skewed t of `skewed` in its place.
* **EGARCH-skewt** (Nelson, 1991, doi:10.2307/2938260): the logarithm of the variance moves, with the same skewed t.
* **FHS**, filtered historical simulation (Barone-Adesi, Giannopoulos and Vosper, 1999): the volatility of GJR-t, and
  instead of a t the model's own past residuals.

``python -m effens_book.finance.garch`` fits them all with the package `arch`, for each of the three series, in about a
minute, and keeps what they said among the results.
"""

import io
import json
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import StudentT

from effens.storage import write_whole
from effens_book import data
from effens_book.benchmark import RESULTS
from effens_book.benchmark.run import provenance
from effens_book.benchmark.tasks import MARKETS, days, market
from effens_book.finance.skewed import SkewT

Array = NDArray[np.float64]
KEPT = 500  # residuals of each year's model, equally spaced in rank
TASKS = ("returns", "nasdaq", "oil")
MODELS: dict[str, dict[str, Any]] = {  # what `arch` is asked for
    "EWMA-t": {"dist": "t"},
    "GJR-t": {"vol": "GARCH", "dist": "t"},
    "GJR-skewt": {"vol": "GARCH", "dist": "skewt"},
    "EGARCH-skewt": {"vol": "EGARCH", "dist": "skewt"},
}
BASELINES = ("linear-t", *MODELS)  # those that have a density


@dataclass(frozen=True, eq=False)
class FilteredHistory:
    """A forecast that is a mean, a volatility, and past residuals: every residual is as likely as any other.

    Attributes:
        loc: (n,) means.
        scale: (n,) volatilities.
        residuals: (years, k) in ascending order.
        year: (n,) which row of residuals.
    """

    loc: Tensor
    scale: Tensor
    residuals: Tensor
    year: Tensor

    def quantile(self, probability: float) -> Tensor:
        """Return the quantile of every day, (n,): the i-th of k residuals, from 0, is the one of (i + 1/2) / k.

        In between it is interpolated, and beyond the outermost residuals it is theirs.
        """
        k = self.residuals.shape[1]
        place = min(max(probability * k - 0.5, 0.0), k - 1.0)
        low, high = math.floor(place), math.ceil(place)
        at = torch.lerp(self.residuals[:, low], self.residuals[:, high], place - low)
        return self.loc + self.scale * at[self.year]

    def value_at_risk(self, level: float) -> Tensor:
        """Return the loss that is exceeded with probability 1 - level, (n,), as `risk.value_at_risk` does."""
        return -self.quantile(1 - level)

    def expected_shortfall(self, level: float) -> Tensor:
        """Return the mean loss of the worst 1 - level, (n,): of so many residuals, the last of them in part."""
        k = self.residuals.shape[1]
        tail = (1 - level) * k
        weights = (tail - torch.arange(k, dtype=self.residuals.dtype)).clamp(0, 1)
        mean = self.residuals @ weights / weights.sum()
        return -(self.loc + self.scale * mean[self.year])

    def tail_losses(self, days: Tensor, uniform: Tensor, level: float = 0.975) -> Tensor:
        """Return losses beyond the value at risk, as `risk.tail_losses` does: of the residuals of the tail."""
        k = self.residuals.shape[1]
        place = (uniform * (1 - level) * k).long()
        return -(self.loc[days] + self.scale[days] * self.residuals[self.year[days], place])

    def pit(self, y: Tensor) -> Tensor:
        """Return the distribution function at what happened, (n,)."""
        z = ((y - self.loc) / self.scale)[:, None]
        return (self.residuals[self.year] <= z).double().mean(1)


# ---- Models of one year: fitted on days of training, asked about days of the test. ----


def student(x: Tensor, y: Tensor, x_new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fit Student's t whose log scale is linear in x, by maximum likelihood; df, mean and scale at new inputs, (n,)."""
    known, new = (torch.cat([part, part.new_ones(len(part), 1)], 1).double() for part in (x, x_new))
    theta = torch.zeros(known.shape[1] + 2, dtype=torch.float64, requires_grad=True)  # slopes, mean, raw df
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def parts(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        df = 2.01 + torch.nn.functional.softplus(theta[-1])
        return df.expand(len(inputs)), theta[-2].expand(len(inputs)), (inputs @ theta[:-2]).exp()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = -StudentT(*parts(known), validate_args=False).log_prob(y.double()).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    df, mean, scale = parts(new)
    return df.detach(), mean.detach(), scale.detach()


def arch_model(name: str, returns: Array) -> Any:
    """Make a model of `MODELS` for returns in percent, in the order of days."""
    from arch.univariate import ConstantMean, EWMAVariance, StudentsT
    from arch.univariate import arch_model as make

    if name == "EWMA-t":
        return ConstantMean(returns, volatility=EWMAVariance(0.94), distribution=StudentsT(), rescale=False)
    return make(returns, mean="Constant", p=1, o=1, q=1, rescale=False, **MODELS[name])


def one_year(name: str, returns: Array, known: int) -> tuple[Array, Array]:
    """Fit a model by maximum likelihood to the days that are known, and filter all.

    Args:
        name: of the model.
        returns: (n,) in percent.
        known: how many of them the model is fitted to.

    Returns:
        Degrees of freedom, skew, mean and standard deviation of each day's return, as seen the day before,
        ``(4, n)``; and the residuals of the days that are known, ``(known,)``.
    """
    fitted = arch_model(name, returns[:known]).fit(disp="off", show_warning=False)
    found = fitted.params
    volatility = arch_model(name, returns).fix(found).conditional_volatility  # of the first days it is a guess
    df, skew = (found["eta"], found["lambda"]) if MODELS[name]["dist"] == "skewt" else (found["nu"], 0.0)
    constant = [np.full(len(returns), value) for value in (df, skew, found["mu"])]
    return np.stack([*constant, volatility]), np.asarray(fitted.std_resid)


# ---- All years. ----


def run() -> None:
    """Fit every model in every year and keep what it said, unless that is kept already."""
    path = RESULTS / "garch.npz"
    if path.exists():
        return
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(provenance()))}
    for task in TASKS:
        for key, array in walk(task).items():
            arrays[f"{task} | {key}"] = array
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())
    read.cache_clear()


def walk(task: str, years: int | None = None) -> dict[str, NDArray[Any]]:
    """Return what every model said of every day of a task, or of its first years, by name, (4, days).

    "residuals" are those of GJR-t, (years, `KEPT`), and "year" says which of them are a day's, (days,).
    """
    closes, asked = data.prices(MARKETS[task].series), days(task)
    returns = 100 * np.diff(np.log(closes.close.numpy()))  # of closes.dates[1:]
    found: dict[str, list[Array]] = {name: [] for name in (*BASELINES, "residuals", "year")}
    starts = np.array(MARKETS[task].years, dtype="datetime64[D]")
    year = np.searchsorted(starts, asked, side="right") - 1
    for i, sets in list(enumerate(market(task)[1]))[:years]:
        following = np.searchsorted(closes.dates[1:], asked[year == i]) + 1  # the day that each forecast is of
        known = int(np.searchsorted(closes.dates[1:], starts[i]))
        x, y = sets["train"]
        assert y is not None
        df, mean, scale = student(x, y, sets["test"][0])
        found["linear-t"].append(torch.stack([df, torch.zeros_like(df), mean, scale * (df / (df - 2)).sqrt()]).numpy())
        for name in MODELS:
            said, residuals = one_year(name, returns[: following[-1] + 1], known)
            found[name].append(said[:, following])
            if name == "GJR-t":
                found["residuals"].append(np.quantile(residuals, (np.arange(KEPT) + 0.5) / KEPT)[None])
        found["year"].append(year[year == i].astype(float))
    joined = {key: np.concatenate(rows, 0 if key == "residuals" else -1) for key, rows in found.items()}
    return {key: array.astype(np.int8 if key == "year" else np.float32) for key, array in joined.items()}


# ---- Reading. ----


@cache
def read() -> dict[str, Tensor]:
    """Return what is kept, by ``"returns | GJR-t"`` and so on.

    Raises:
        FileNotFoundError: the models were not fitted.
    """
    path = RESULTS / "garch.npz"
    if not path.exists():
        raise FileNotFoundError("results must hold the baselines, got none: run python -m effens_book.finance.garch")
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "facts"}


def forecast(name: str, task: str = "returns") -> StudentT | SkewT:
    """Return a baseline's forecast as a distribution of batch shape (1, n), as if it were an ensemble of one.

    Args:
        name: one of `BASELINES`.
        task: one of `TASKS`.

    Raises:
        ValueError: the name is another.
    """
    if name not in BASELINES:
        raise ValueError(f"name must be one of {', '.join(BASELINES)}, got {name!r}")
    df, skew, mean, deviation = read()[f"{task} | {name}"].float()[:, None]
    if name.endswith("skewt"):
        return SkewT(df, skew, mean, deviation)
    return StudentT(df, mean, deviation * ((df - 2) / df).sqrt(), validate_args=False)


def filtered_history(task: str = "returns") -> FilteredHistory:
    """Return the forecast of filtered historical simulation, of returns."""
    kept = {key: read()[f"{task} | {key}"] for key in ("GJR-t", "residuals", "year")}
    _, _, mean, volatility = kept["GJR-t"].double()
    return FilteredHistory(mean, volatility, kept["residuals"].double(), kept["year"].long())


if __name__ == "__main__":
    run()
