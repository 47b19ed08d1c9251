"""Marks that a benchmark is held to: a figure of some rows, and the limit it must keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass

BEST = ("sdpa", "fa2", "cudnn", "flex", "fa3", "fa4")  # whoever of them is best in a row is "the best peer"


class Unmeasured(Exception):
    """A figure that a mark needs is not there: why."""


def figures_of(row):
    """{system: figure} of all systems in a row that have one."""
    found = {"strobe": row["strobe"], **row.get("engines", {}), **row["peers"]}
    return {name: value for name, value in found.items() if value is not None}


def figure_of(row, system):
    found = figures_of(row)
    if system not in found:
        why = row.get("failed", {}).get(system)
        raise Unmeasured(f"{system} failed in {row['case']}" if why else f"no {system} in {row['case']}")
    return found[system]


def more_is_better(row):
    return row["unit"].endswith("/s")


def best_of(row, systems):
    """(system, figure) of the best of these that has a figure in the row, or None."""
    found = [(name, value) for name, value in figures_of(row).items() if name in systems]
    return (max if more_is_better(row) else min)(found, key=lambda pair: pair[1], default=None)


def best_figure(row, systems):
    found = best_of(row, systems)
    if found is None:
        raise Unmeasured(f"none of {', '.join(systems)} in {row['case']}")
    return found[1]


def speedup(row, peer=None, system="strobe"):
    """How many times better than the peer, the best one if none is named, whatever the unit."""
    ours = figure_of(row, system)
    theirs = figure_of(row, peer) if peer else best_figure(row, BEST)
    return ours / theirs if more_is_better(row) else theirs / ours


def geomean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def geomean_speedup(peer=None, system="strobe"):
    return lambda rows: geomean(speedup(row, peer, system) for row in rows)


def geomean_time(peer):
    """Strobe's time as a share of the peer's."""
    return lambda rows: 1 / geomean_speedup(peer)(rows)


def worst_speedup(peer=None, system="strobe"):
    return lambda rows: min(speedup(row, peer, system) for row in rows)


def worst_group(key, figure):
    """The smallest figure of the groups that `key(row)` makes."""

    def worst(rows):
        groups = {}
        for row in rows:
            groups.setdefault(key(row), []).append(row)
        return min(figure(group) for group in groups.values())

    return worst


def largest_excess(over, system):
    """By how much a system's figure exceeds another's."""
    return lambda rows: max(figure_of(row, system) - figure_of(row, over) for row in rows)


def largest(system="strobe"):
    return lambda rows: max(figure_of(row, system) for row in rows)


def smallest(system="strobe"):
    return lambda rows: min(figure_of(row, system) for row in rows)


def rate_share(is_numerator, system="strobe"):
    """One row's figure over another's."""

    def figure(rows):
        sides = {side: [row for row in rows if is_numerator(row) == side] for side in (True, False)}
        if [len(rows) for rows in sides.values()] != [1, 1]:
            raise Unmeasured("one of the two rows was not run")
        return figure_of(sides[True][0], system) / figure_of(sides[False][0], system)

    return figure


@dataclass(frozen=True)
class Limit:
    value: float
    below: bool

    def __str__(self):
        return f"{'at most' if self.below else 'at least'} {self.value:g}"

    def keeps(self, figure):
        return figure <= self.value if self.below else figure >= self.value


def at_least(value):
    return Limit(value, below=False)


def at_most(value):
    return Limit(value, below=True)


@dataclass(frozen=True)
class Mark:
    text: str
    select: Callable  # task -> bool
    figure: Callable  # rows -> float
    limit: Limit


def judge(marks, measured, complete):
    """[(text, limit, figure or None, verdict)]. `measured`: {task: row}; `complete`: every task of a full run."""
    verdicts = []
    for mark in marks:
        needed = [task for task in complete if mark.select(task)]
        rows = [row for task, row in measured.items() if mark.select(task)]
        if not rows:
            verdicts.append((mark.text, str(mark.limit), None, "not measured"))
            continue
        try:
            figure = mark.figure(rows)
        except Unmeasured as why:
            verdicts.append((mark.text, str(mark.limit), None, f"NOT measured: {why}"))
            continue
        verdict = "reached" if mark.limit.keeps(figure) else "NOT reached"
        if not all(task in measured for task in needed):
            verdict += ", on other or fewer cases than the mark's"
        verdicts.append((mark.text, str(mark.limit), figure, verdict))
    return verdicts
