"""docs/reliability.md: its rows add up, and each has a test that still records it."""

import ast
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.reliability import corpus_dicom, corpus_pictures, table
from tests.reliability.test_tables import CASES

# That page is what such a run writes anew when it has ended.
is_written = pytest.mark.skipif("KERASMED_RELIABILITY" in os.environ, reason="docs/reliability.md is being written")


def _rows(part):
    return {kind: (cases, outcomes) for kind, cases, outcomes in map(table.parse, table.stated(part))}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("outcomes", [{"read, not kept": 1200}, {"exit 2, nothing written": 1900, "exit 0, read": 5}])
def test_parse_is_the_inverse_of_row(outcomes, exact):
    record = table.Record("Faults", "a kind, of 3", outcomes, exact)
    assert table.parse(record.row()) == ("a kind, of 3", record.cases, outcomes)


@pytest.mark.parametrize(
    ("seen", "exact", "timed", "told"),
    [
        ({"read": 3, "refused": 2}, True, False, ""),
        ({"read": 2, "refused": 3}, True, False, "not"),
        ({"read": 2, "refused": 3}, False, False, ""),
        ({"read": 2, "refused": 4}, False, False, "5 cases, not 6"),
        ({"read": 5}, False, False, r"where \[\] was seen and \['refused'\] was not"),
        ({"read": 5}, False, True, ""),
        # "ref" is a part of the row, but no outcome of it
        ({"read": 3, "ref": 2}, False, True, r"where \['ref'\] was seen and \['refused'\] was not"),
    ],
)
def test_differences_of_what_was_seen_from_a_row(seen, exact, timed, told):
    row = table.Record("Faults", "kind", {"read": 3, "refused": 2}, exact).row()
    found = table.differences(table.Record("Faults", "kind", seen, exact), row, timed=timed)
    assert re.search(told, found) and bool(told) == bool(found)


@is_written
def test_document_adds_up():
    rows = [row for part in table.PARTS for row in map(table.parse, table.stated(part))]
    assert all(cases == sum(outcomes.values()) for _, cases, outcomes in rows)
    text = table.DOCUMENT.read_text(encoding="utf-8")
    assert f"\n{len(rows)} classes, {sum(cases for _, cases, _ in rows):,} cases.\n" in text
    assert text.startswith(table._HEAD)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Pictures in the place of the real ones: kinds and numbers of cases do not depend on what they show."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("brain/0.jpg", "brain/1.jpg", "brain/2.jpg", "chest/images/0.png", "chest/images/1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (128, 128), dtype=np.uint8)).save(root / name)
    return root


@is_written
def test_each_row_is_of_a_kind_that_a_test_records(planted):
    pictures, dicom = corpus_pictures.all_cases(planted), corpus_dicom.all_cases()
    literals = _literals()
    for part, cases in (("Pictures", pictures), ("DICOM", dicom), ("Tables", CASES)):
        rows, counts = _rows(part), Counter(case.kind for case in cases)
        assert {kind: rows[kind][0] for kind in counts if kind in rows} == dict(counts)
        _each_is_recorded(set(rows) - set(counts), literals)
    for part in set(table.PARTS) - {"Pictures", "DICOM", "Tables"}:
        _each_is_recorded(_rows(part), literals)
    with pytest.raises(AssertionError, match="records .'a fault that no test makes'"):
        _each_is_recorded(["a fault that no test makes"], literals)


def _each_is_recorded(kinds, literals):
    lost = [kind for kind in kinds if not any(literal.fullmatch(kind) for literal in literals)]
    assert not lost, f"no test of tests/reliability records {lost}; take these rows out of docs/reliability.md"


def _literals():
    """The texts of the tests as patterns, of which those with blanks to fill in have some words of their own."""
    found = set()
    for path in set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.escape(node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [re.escape(each.value) if isinstance(each, ast.Constant) else None for each in node.values]
                if len("".join(filter(None, parts))) >= len("series: "):
                    found.add("".join(".+" if part is None else part for part in parts))
    return [re.compile(pattern) for pattern in found]
