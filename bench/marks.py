"""Marks that a benchmark is held to: a figure of some rows, and the limit it must keep."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def speedup(row, peer):
    """How many times better than the peer, whatever the unit."""
    ours, theirs = row["strobe"], row["peers"][peer]
    return ours / theirs if row["unit"].endswith("/s") else theirs / ours


def geomean_speedup(peer):
    def figure(rows):
        return math.exp(sum(math.log(speedup(row, peer)) for row in rows) / len(rows))

    return figure


def geomean_time(peer):
    """Strobe's time as a share of the peer's."""
    return lambda rows: 1 / geomean_speedup(peer)(rows)


def worst_speedup(peer):
    return lambda rows: min(speedup(row, peer) for row in rows)


def largest(rows):
    return max(row["strobe"] for row in rows)


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
        figure = mark.figure(rows)
        verdict = "reached" if mark.limit.keeps(figure) else "NOT reached"
        if not all(task in measured for task in needed):
            verdict += ", on other or fewer cases than the mark's"
        verdicts.append((mark.text, str(mark.limit), figure, verdict))
    return verdicts
