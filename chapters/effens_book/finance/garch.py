r"""What a forecast of prices must beat, and needs no network: HAR, GJR-GARCH-t, and filtered historical simulation.

All walk forward as the benchmark's market tasks do: fitted on what was known before a year, then used for that year.

* **HAR** (Corsi, 2009, doi:10.1093/jjfinec/nbp001): log volatility is linear in the log volatilities of the last day,
  week and month. As a forecast of returns, *HAR-t*: Student's t with a constant mean whose log scale is linear in them.
* **GJR-GARCH-t** (Glosten, Jagannathan and Runkle, 1993, doi:10.1111/j.1540-6261.1993.tb05128.x), fitted by `arch`:

  .. math:: r_t = \mu + \sigma_t z_t, \quad z_t \sim t_\nu, \qquad
      \sigma_t^2 = \omega + (\alpha + \gamma [z_{t-1} < 0]) (r_{t-1} - \mu)^2 + \beta \sigma_{t-1}^2

* **Filtered historical simulation** (Barone-Adesi, Giannopoulos and Vosper, 1999): the same volatility, and instead of
  a t the model's own past residuals.

``python -m effens_book.finance.garch`` fits them all, in about half a minute, and keeps what
they said among the results.
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
from torch.distributions import Normal, StudentT

from effens.storage import write_whole
from effens_book import data
from effens_book.benchmark import RESULTS
from effens_book.benchmark.run import provenance
from effens_book.benchmark.tasks import FIRST_YEAR, LAST_YEAR
from effens_book.data import markets

Array = NDArray[np.float64]
KEPT = 500  # residuals of each year's model, equally spaced in rank
BASELINES = {"returns": ("HAR-t", "GARCH-t"), "volatility": ("HAR", "GARCH")}


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

    def crps(self, y: Tensor) -> Tensor:
        """Return the continuous ranked probability score of every day, (n,): E|X - y| - E|X - X'| / 2."""
        z = (y - self.loc) / self.scale
        k = self.residuals.shape[1]
        ranks = 2 * torch.arange(1, k + 1, dtype=z.dtype) - k - 1
        between = 2 * (self.residuals * ranks).sum(1) / k**2  # E|X - X'|
        near = torch.stack([(self.residuals[i] - zi).abs().mean() for i, zi in zip(self.year, z, strict=True)])
        return self.scale * (near - between[self.year] / 2)

    def pit(self, y: Tensor) -> Tensor:
        """Return the distribution function at what happened, (n,)."""
        z = ((y - self.loc) / self.scale)[:, None]
        return (self.residuals[self.year] <= z).double().mean(1)


# ---- Models of one year: fitted on rows of training, asked about rows of the test. ----


def least_squares(x: Tensor, y: Tensor, x_new: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a linear model by least squares; returns its mean and residual deviation at new inputs, (n,) each."""
    known, new = (torch.cat([part, part.new_ones(len(part), 1)], 1).double() for part in (x, x_new))
    weights = torch.linalg.lstsq(known, y.double()[:, None]).solution[:, 0]
    deviation = (y.double() - known @ weights).std()
    return new @ weights, deviation.expand(len(new))


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


@dataclass(frozen=True)
class Garch:
    """A GJR-GARCH-t model's parameters."""

    mu: float
    omega: float
    alpha: float
    gamma: float
    beta: float
    nu: float

    @staticmethod
    def fit(returns: Array) -> "Garch":
        """Fit by maximum likelihood; returns are in percent, in the order of days."""
        from arch import arch_model

        model = arch_model(returns, mean="Constant", vol="GARCH", p=1, o=1, q=1, dist="t", rescale=False)
        found = model.fit(disp="off", show_warning=False).params
        return Garch(*(float(found[name]) for name in ("mu", "omega", "alpha[1]", "gamma[1]", "beta[1]", "nu")))

    def filter(self, returns: Array) -> Array:
        """Return the volatility of every day, (n,), given the returns of the days before it.

        It begins with the root mean square of the first 75 days, which are never judged.
        """
        variance = float(np.mean((returns[:75] - self.mu) ** 2))
        found = np.empty(len(returns))
        for t, shock in enumerate((returns - self.mu).tolist()):
            found[t] = variance
            variance = self.omega + (self.alpha + self.gamma * (shock < 0)) * shock**2 + self.beta * variance
        result: Array = np.sqrt(found)
        return result

    def ahead(self, volatility: Array, horizon: int) -> Array:
        """Return the root of the mean expected variance of ``horizon`` days, of which the first has this volatility."""
        persistence = self.alpha + self.gamma / 2 + self.beta
        rest = self.omega / (1 - persistence)
        decays = np.mean([persistence**h for h in range(horizon)])
        result: Array = np.sqrt(rest + decays * (volatility**2 - rest))
        return result


# ---- All years. ----


def run() -> None:
    """Fit every model in every year and keep what it said, unless that is kept already."""
    path = RESULTS / "garch.npz"
    if path.exists():
        return
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(provenance()))}
    found: dict[str, list[Tensor]] = {}
    closes = data.prices()
    returns = 100 * np.diff(np.log(closes.close.numpy()))  # of closes.dates[1:]
    day = {date: i for i, date in enumerate(closes.dates[1:])}
    for target, har in (("return", "HAR-t"), ("volatility", "HAR")):
        task = markets.task(closes, target)
        following = np.array([day[date] + 1 for date in task.dates])  # the day after each row's
        for year, split in enumerate(markets.walk_forward(task, years())):
            x = task.x[:, :3]
            known, asked = (x[split.train], task.y[split.train]), x[split.test]
            past = returns[: day[task.until[int(split.train[-1])]] + 1]  # known before the first day of the year
            garch = Garch.fit(past)
            seen = returns[: following[int(split.test[-1])]]
            volatility = garch.filter(np.append(seen, 0.0))  # of the day after the last one seen, too
            if target == "return":
                parts: tuple[Tensor, ...] = student(*known, asked)
                mine = volatility[following[split.test.numpy()]]
                unit = np.sqrt((garch.nu - 2) / garch.nu)  # its t has variance 1
                rows = [np.full(len(mine), garch.nu), np.full(len(mine), garch.mu), mine * unit]
                residuals = (past - garch.mu) / volatility[: len(past)]
                at = (np.arange(KEPT) + 0.5) / KEPT
                found.setdefault("residuals", []).append(torch.from_numpy(np.quantile(residuals, at))[None])
                found.setdefault("year", []).append(torch.full((len(mine),), year))
                found.setdefault("volatility", []).append(torch.from_numpy(mine))
            else:
                parts = tuple(least_squares(*known, asked))
                before, now = (
                    torch.from_numpy(np.log(garch.ahead(volatility[following[rows.numpy()]], 5)))[:, None]
                    for rows in (split.train, split.test)
                )
                rows = [part.numpy() for part in least_squares(before, known[1], now)]
            found.setdefault(har, []).append(torch.stack(list(parts)))
            found.setdefault(har.replace("HAR", "GARCH"), []).append(torch.from_numpy(np.stack(rows)))
    for key, chunks in found.items():
        joined = torch.cat(chunks, 0 if key == "residuals" else -1)
        arrays[key] = joined.numpy().astype(np.int8 if key == "year" else np.float32)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())
    read.cache_clear()


def years() -> list[str]:
    """Return the first days of the years that are judged."""
    return [f"{year}-01-01" for year in range(FIRST_YEAR, LAST_YEAR + 1)]


# ---- Reading. ----


@cache
def read() -> dict[str, Tensor]:
    """Return what is kept.

    Raises:
        FileNotFoundError: the models were not fitted.
    """
    path = RESULTS / "garch.npz"
    if not path.exists():
        raise FileNotFoundError("results must hold the baselines, got none: run python -m effens_book.finance.garch")
    with np.load(path, allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "facts"}


def forecast(name: str) -> Normal | StudentT:
    """Return a rival's forecast as a distribution of batch shape (1, n), as if it were an ensemble of one.

    Args:
        name: "HAR-t" or "GARCH-t", of returns; "HAR" or "GARCH", of volatility.

    Raises:
        ValueError: the name is another.
    """
    if name not in (known := [each for names in BASELINES.values() for each in names]):
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    parts = read()[name].float()[:, None]
    kind: Any = StudentT if name in BASELINES["returns"] else Normal
    result: Normal | StudentT = kind(*parts, validate_args=False)
    return result


def garch_volatility() -> Tensor:
    """Return GARCH's volatility of the day that is forecast, in percent, (n,)."""
    return read()["volatility"].double()


def filtered_history() -> FilteredHistory:
    """Return the forecast of filtered historical simulation, of returns."""
    kept = read()
    mean = kept["GARCH-t"][1].double()
    return FilteredHistory(mean, kept["volatility"].double(), kept["residuals"].double(), kept["year"].long())


if __name__ == "__main__":
    run()
