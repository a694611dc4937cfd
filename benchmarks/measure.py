"""What the benchmarks share: interleaved rounds, and rows that are printed and kept."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

# Names a file that `main` adds its rows to, one JSON object a line.
ROWS_FILE = "KERASMED_BENCH_ROWS"


class Row(NamedTuple):
    """One claim, measured."""

    name: str  # what is measured, against what
    ours: float  # median over rounds
    peer: float | None  # the same of the peer; None where there is none
    unit: str  # of both
    result: float  # that the target is of: ours / peer, or what `result_unit` says
    result_unit: str  # "" for a ratio
    lowest: float  # of the result, over rounds
    highest: float
    relation: str  # "at least" or "at most"
    target: float
    checked: str  # how it was made sure, before, that both compute the same
    limit: str  # what stands in the way where the target is missed; "" where nothing is known to

    @property
    def is_met(self) -> bool:
        """Whether the target is reached, as printed: with three digits."""
        result = float(f"{self.result:.3g}")
        return result >= self.target if self.relation == "at least" else result <= self.target


def rounds(calls: Mapping[str, Callable[[], object]], *, count: int = 5, warm: int = 1) -> dict[str, list[float]]:
    """Time several calls by turns, each round in the other direction: what else the machine does hits all alike.

    Args:
        calls: name -> function without arguments.
        count: rounds that count, at least 5.
        warm: rounds before them that do not.

    Returns:
        Name -> seconds of each round.
    """
    if count < 5:
        raise ValueError(f"`count` is {count}; a median of fewer than 5 rounds is not reported.")
    seconds = {name: [] for name in calls}
    for number in range(-warm, count):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            calls[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def best(seconds: Mapping[str, Sequence[float]], names: Iterable[str]) -> str:
    """Return the quickest of several peers, by its median."""
    return min(names, key=lambda name: statistics.median(seconds[name]))


def faster(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    amount: float,
    unit: str,
    at_least: float,
    checked: str,
    limit: str = "",
) -> Row:
    """Make the row of a claim on speed: how many times as much ours does in a second.

    Args:
        name: what is measured, against what.
        ours, peer: seconds of each round.
        amount: done in a round.
        unit: of `amount` per second, such as "images/s".
        at_least: target.
        checked, limit: as of `Row`.
    """
    ratios = [other / own for own, other in zip(ours, peer, strict=True)]
    own, other = (amount / statistics.median(seconds) for seconds in (ours, peer))
    return Row(name, own, other, unit, own / other, "", min(ratios), max(ratios), "at least", at_least, checked, limit)


def higher(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    unit: str,
    at_least: float,
    checked: str,
    limit: str = "",
) -> Row:
    """Make the row of a claim on quality: how many times as high a score ours has; one of each in a round."""
    ratios = [own / other for own, other in zip(ours, peer, strict=True)]
    own, other = statistics.median(ours), statistics.median(peer)
    return Row(name, own, other, unit, own / other, "", min(ratios), max(ratios), "at least", at_least, checked, limit)


def shorter(
    name: str, ours: Sequence[float], peer: Sequence[float], *, at_most: float, checked: str, limit: str = ""
) -> Row:
    """Make the row of a claim on time: what share of the peer's seconds ours takes; arguments as of `faster`."""
    ratios = [own / other for own, other in zip(ours, peer, strict=True)]
    own, other = statistics.median(ours), statistics.median(peer)
    return Row(name, own, other, "s", own / other, "", min(ratios), max(ratios), "at most", at_most, checked, limit)


def value(name: str, values: Sequence[float], *, unit: str, at_most: float, checked: str, limit: str = "") -> Row:
    """Make the row of a claim without a peer: the median of what was measured."""
    own = statistics.median(values)
    return Row(name, own, None, unit, own, unit, min(values), max(values), "at most", at_most, checked, limit)


def more(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    unit: str,
    at_most: float,
    checked: str,
    limit: str = "",
) -> Row:
    """Make the row of a claim on a difference: how much more `ours` is than `peer`, by their medians."""
    differences = [own - other for own, other in zip(ours, peer, strict=True)]
    own, other = statistics.median(ours), statistics.median(peer)
    spread = min(differences), max(differences)
    return Row(name, own, other, unit, own - other, f"{unit} more", *spread, "at most", at_most, checked, limit)


def line(row: Row) -> str:
    """Write a row as a line of text.

    Example:
        >>> print(line(faster("x", [1] * 5, [2, 3, 3, 3, 3], amount=6, unit="images/s", at_least=2, checked="")))
        x: 6 / 2 images/s = 3 (target at least 2; rounds 2 to 3)
    """
    if row.peer is None:
        measured = f"{number(row.result)} {row.result_unit}"
    elif row.result_unit:
        measured = f"{number(row.ours)} - {number(row.peer)} = {number(row.result)} {row.result_unit}"
    else:
        measured = f"{number(row.ours)} / {number(row.peer)} {row.unit} = {number(row.result)}"
    spread = f"rounds {number(row.lowest)} to {number(row.highest)}"
    missed = "" if row.is_met else "  MISSED"
    return f"{row.name}: {measured} (target {row.relation} {row.target:g}; {spread}){missed}"


def number(value: float) -> str:
    """Write a number with three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(measure: Callable[[], Iterable[Row]]) -> None:
    """Print each row that a benchmark yields, and add it to the file that `$KERASMED_BENCH_ROWS` names."""
    for row in measure():
        print(line(row), flush=True)
        if os.environ.get(ROWS_FILE):
            with open(os.environ[ROWS_FILE], "a", encoding="utf-8") as file:
                file.write(json.dumps(row._asdict()) + "\n")
