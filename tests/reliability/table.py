"""What the tests of reliability tried and saw, as docs/reliability.md.

`make reliability` runs the tests with `$KERASMED_RELIABILITY` naming a folder, where each leaves a record, and then
this file, which joins them. Without that variable the tests hold what they see against the document instead.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
PARTS = {
    "Pictures": "Files of pictures, made from real ones by one stated damage each, through `images.read`, "
    "`images.headers` and `pipelines.decode`.",
    "DICOM": "Likewise of DICOM files, whose headers lie.",
    "Tables": "Tables and folders of the five systems, and manifests that a user names, through the readers, `check` "
    "and `audit`.",
    "Fuzzing": "Inputs drawn at random, or led by coverage, for a bounded time.",
    "Faults": "What befalls a run from outside, and what the same command then makes of it. Equal means metrics.json "
    "and predictions.csv, value by value.",
    "Loading": "What is opened, and must not be run.",
    "Reproducibility": "The same seed twice.",
}
_HEAD = """# Reliability

What was tried against kerasmed, how often, and what happened, as its own tests saw it: `make reliability` runs them and
writes this page, and every other run of the tests is held to it. Nothing here ended in a crash, a hang, or a file that
was left out without a word; a test fails on one.

Numbers are held exactly. Those after "about" may differ with the versions of libraries, and are not held one by one:
the outcomes are, all of them, and the number of cases. Where a clock decides (kills, and inputs led by coverage), and
where sources are counted, no other outcome may be seen. A test that is skipped, or an extra that is not installed,
holds nothing.
"""


class Record(NamedTuple):
    """One class of inputs or faults: how often each outcome was seen."""

    part: str
    kind: str
    outcomes: Mapping[str, int]
    exact: bool = True  # whether another run must see the same numbers, or only the same outcomes

    @property
    def cases(self) -> int:
        return sum(self.outcomes.values())

    def row(self) -> str:
        """Write the record as a row of a table."""
        seen = sorted((name for name, count in self.outcomes.items() if count), key=lambda name: -self.outcomes[name])
        about = "" if self.exact else "about "
        told = [f"{about}{self.outcomes[name]:,} {name}" if len(seen) > 1 else name for name in seen]
        return f"| {self.kind} | {self.cases:,} | {', '.join(told)} |"


def parse(row: str) -> tuple[str, int, dict[str, int]]:
    """Read what `Record.row` wrote: the kind, the number of cases, and how often each outcome was seen."""
    kind, cases, told = row.removeprefix("| ").removesuffix(" |").split(" | ")
    count = int(cases.replace(",", ""))
    parts = [re.fullmatch(r"(?:about )?([\d,]+) (.+)", part) for part in re.split(r", (?=(?:about )?[\d,]+ )", told)]
    if None in parts:
        return kind, count, {told: count}
    return kind, count, {part[2]: int(part[1].replace(",", "")) for part in parts}


def differences(seen: Record, row: str, *, timed: bool = False) -> str:
    """Say how what was seen differs from a row of the document, "" where it does not; see the fixture `record`."""
    if seen.exact:
        return "" if row == seen.row() else f"{row!r}, not {seen.row()!r}"
    _, cases, told = parse(row)
    new, gone = sorted(set(seen.outcomes) - set(told)), sorted(set(told) - set(seen.outcomes))
    if new or (gone and not timed):
        return f"{row!r} where {new} was seen and {gone} was not"
    return f"{cases} cases, not {seen.cases}" if cases != seen.cases and not timed else ""


def write(folder: Path, document: Path = DOCUMENT) -> None:
    """Join the records of a folder into the document, in the order of `PARTS` and of the alphabet."""
    records = [Record(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("*.json")]
    lines = [_HEAD]
    total = sum(record.cases for record in records)
    lines.append(f"{len(records)} classes, {total:,} cases.\n")
    for part, about in PARTS.items():
        rows = sorted(record.row() for record in records if record.part == part)
        if rows:
            lines += [f"## {part}\n", f"{about}\n", "| what | cases | what happened |", "|---|---|---|", *rows, ""]
    document.parent.mkdir(exist_ok=True)
    document.write_text("\n".join(lines), encoding="utf-8")


def stated(part: str, document: Path = DOCUMENT) -> list[str]:
    """Return the rows that the document has of a part; none where it has no such part."""
    lines = document.read_text(encoding="utf-8").splitlines()
    if f"## {part}" not in lines:
        return []
    rest = lines[lines.index(f"## {part}") + 1 :]
    end = next((number for number, line in enumerate(rest) if line.startswith("## ")), len(rest))
    return [line for line in rest[:end] if line.startswith("| ") and not line.startswith("| what ")]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
