"""Numbers about cells of attack.py as text: means over seeds, in percent. On report seeds they have an interval; tuning
seeds, or one seed, have none.
"""

import math
from functools import cache
from statistics import fmean as mean, stdev

from lab.choices import most_harm
from lab.protocol import LEAST_SD, LEVEL, REPORT_SEEDS
from lab.verdicts import bounds, t_quantile

quantile = cache(t_quantile)  # found by bisection: too slow for every number of a table


def seeds_of(cells: list[dict]) -> list[int]:
    return sorted({cell["seed"] for cell in cells})


def has_interval(values, seeds) -> bool:
    return len(values) > 1 and set(seeds) <= set(REPORT_SEEDS)


def rate(values: dict, otherwise="not run", unit=100, digits=0, floor=LEAST_SD) -> str:
    """The mean of {seed: value, None where there is none}, in percent or by another unit: "71 ± 9".

    On report seeds, ± the half-width of the two-sided 95% t interval, its sd no smaller than `floor`. Says so when
    some seeds have no value; when none has, gives `otherwise`.
    """
    found = [value for value in values.values() if value is not None]
    if not found:
        return otherwise
    text = f"{unit * mean(found):.{digits}f}"
    if has_interval(found, values):
        half = quantile(1 - LEVEL / 2, len(found) - 1) * max(stdev(found), floor) / math.sqrt(len(found))
        text += f" ± {unit * half:.{digits}f}"
    return text + (f" ({len(found)} of {len(values)} seeds)" if len(found) < len(values) else "")


def effect(effects: list[float], seeds) -> str:
    """A mean effect in points; on report seeds with its one-sided 95% t bounds, those that decide a PASS."""
    text = f"{100 * mean(effects):+.1f}"
    if has_interval(effects, seeds):
        text += " [{:+.1f}, {:+.1f}]".format(*(100 * bound for bound in bounds(effects)))
    return text


def select(cells: list[dict], **where) -> list[dict]:
    return [cell for cell in cells if all(cell[key] == where[key] for key in where)]


def chosen(cells, arm: str, attack: str, shots: int, key: str) -> str:
    """The rate of a score at the attacker's choice; "diverged" where an attack was run and left nothing to choose."""
    group = select(cells, arm=arm, attack=attack, shots=shots)
    found = {cell["seed"]: cell[key] for cell in group if not cell["diverged"] and cell["chosen"]}
    return rate({seed: found.get(seed) for seed in seeds_of(cells)}, "diverged" if group else "not run")


def worst(cells, arm: str, lr: float | None = None, kept: bool = False, attacks=("mft",)) -> str:
    """The rate of the most harm that any cell of a seed tells: of these attacks, at one lr, or with capability kept."""
    before = {cell["seed"]: cell["capability"] for cell in select(cells, arm=arm, attack="none")}
    group = [cell for cell in select(cells, arm=arm) if cell["attack"] in attacks and lr in (None, cell["lr"])]
    tops = most_harm(group, before if kept else None)
    otherwise = "not run" if not group else "none kept" if most_harm(group) else "diverged"
    return rate({seed: tops[seed]["harm"] if seed in tops else None for seed in seeds_of(cells)}, otherwise)


def diverged(cells) -> str:
    return f"{sum(cell['diverged'] for cell in cells)} of {len(cells)}"
