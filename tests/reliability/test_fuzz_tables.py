"""Tables, manifests and splits drawn at random, and tables led by coverage: only answers that hold, or clear errors."""

import csv
import importlib.util
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kerasmed import manifest, splits
from tests.reliability import fuzzed_tables as fuzzed

CLASSES = ("a", "b")
# Seeds are fixed, so that a run is like the last.
FIXED = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}
PIECES = st.one_of(
    st.sampled_from(
        [b"", b",", b"\n", b"\r", b'"', b'""', b"\0", b";", b"\xef\xbb\xbf", b"\xff\xfe", b"1", b"1,5", b"-1"]
    ),
    st.sampled_from([b"inf", b"1e400", b"nan", b"NA", b"../", b"/", b"C:\\", b"~/", b"=1+1", b"x" * 1500, b"9" * 400]),
    st.binary(max_size=8),
    st.text(max_size=8).map(lambda text: text.encode(errors="ignore")),
)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), PIECES), min_size=1, max_size=4)
CELLS = st.one_of(
    st.sampled_from(["", "0", "1", "a.png", "b.png", "Mass", "train", "7", "1.0", " 1 "]), st.text(max_size=6)
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The tiny trees' root, and of each table its path, reader and sound bytes."""
    root = tmp_path_factory.mktemp("tiny")
    return root, [(path, reader, (root / path).read_bytes()) for path, reader in fuzzed.plant(root)]


def _try(tree, number, content):
    """What came of a table's bytes; the table is put right again."""
    root, tables = tree
    path, reader, sound = tables[number]
    try:
        return fuzzed.outcome(root, path, reader, content)
    finally:
        (root / path).write_bytes(sound)


def test_the_sound_tables_are_read(tree):
    assert [_try(tree, number, sound) for number, (_, _, sound) in enumerate(tree[1])] == ["read right"] * 9


def test_bytes_changed_at_random(tree, record):
    seen = Counter()

    @settings(max_examples=300, **FIXED)
    @given(st.integers(0, 8), EDITS)
    def look(number, edits):
        content = tree[1][number][2]
        for place, length, piece in edits:
            start = int(place * len(content))
            content = content[:start] + piece + content[start + length :]
        seen[_try(tree, number, content)] += 1

    look()
    assert len(seen) == 2
    record("Fuzzing", "tables with bytes changed at random", seen, exact=False)


def test_cells_drawn_at_random(tree, record):
    seen = Counter()

    @settings(max_examples=200, **FIXED)
    @given(st.integers(0, 8), st.lists(st.lists(CELLS, min_size=1, max_size=8), max_size=5), st.data())
    def look(number, rows, data):
        header, *sound = tree[1][number][2].decode().splitlines()
        width = header.count(",") + 1
        rows = [(row * width)[:width] if data.draw(st.booleans()) else row for row in rows]
        kept = sound if data.draw(st.booleans()) else []
        text = io.StringIO("\n".join([header, *kept, ""]), newline="")
        text.seek(0, io.SEEK_END)
        csv.writer(text).writerows(rows)
        seen[_try(tree, number, text.getvalue().encode(errors="ignore"))] += 1

    look()
    assert len(seen) == 2
    record("Fuzzing", "tables of cells drawn at random", seen, exact=False)


PATHS = st.one_of(
    st.sampled_from(
        ["a.png", "x/b.png", "x/y/c.png", "ä.png", "d e.png", "..", "../a.png", "x/../a.png", "/a.png", "~/a.png"]
    ),
    st.sampled_from(
        ["C:\\a.png", "x\\a.png", "C:/a.png", "file:///a.png", "", " ", "./a.png", "x//a.png", "x/", "\0", "\udce4"]
    ),
    st.lists(st.sampled_from(["a", "..", ".", "", "~", "C:", "b.png", "\\", "\n", "..."]), max_size=4).map("/".join),
    st.text(max_size=5),
)
LABELS = st.sampled_from([0, 1, 0.0, 1.0, True, np.nan, None, 2, -1, 0.5, "1", "yes"])
FINE = st.sampled_from([0, 1, np.nan])


@st.composite
def _manifests(draw):
    """Manifests that are mostly right in most columns."""
    count = draw(st.integers(0, 5))

    def column(wild, tame):
        return draw(st.lists(wild if draw(st.integers(0, 7)) == 7 else tame, min_size=count, max_size=count))

    names = st.sampled_from([f"x/{number}.png" for number in range(9)])
    paths = draw(st.lists(names, min_size=count, max_size=count, unique=True))
    frame = pd.DataFrame(
        {
            "image_path": pd.Series(paths, dtype=object),
            "patient_id": pd.Series([None] * count, dtype=object),
            "study_id": pd.Series([None] * count, dtype=object),
            "group_id": pd.Series([f"g{number}" for number in range(count)], dtype=object),
            "split": pd.Series(
                column(st.sampled_from(["Train", "training", "", None, 1]), st.sampled_from(manifest.SPLITS)),
                dtype=object,
            ),
            **{name: pd.Series(column(LABELS, FINE), dtype=object) for name in CLASSES},
        }
    )
    if count and draw(st.integers(0, 3)) == 3:
        frame.loc[draw(st.integers(0, count - 1)), "image_path"] = draw(st.one_of(PATHS, st.none(), st.integers()))
    change = draw(st.integers(0, 9))
    if change == 8:
        frame = frame.drop(columns=draw(st.sampled_from(list(frame))))
    if change == 9:
        frame = pd.concat([frame, frame[[draw(st.sampled_from(list(frame)))]]], axis=1)
    return frame


def test_manifests_drawn_at_random(record):
    seen = Counter()

    @settings(max_examples=400, **FIXED)
    @given(_manifests(), st.booleans())
    def look(frame, exclusive):
        try:
            found = manifest.validate(frame, CLASSES, exclusive=exclusive)
        except ValueError as error:
            assert type(error) is ValueError, error
            assert any(name in str(error) for name in frame.columns) or "no rows" in str(error), error
            seen["refused with a reason"] += 1
            return
        assert found is frame
        fuzzed.check_contract(frame, CLASSES)
        assert not exclusive or (frame[list(CLASSES)].astype(float).sum(axis=1) == 1).all()
        seen["read right"] += 1

    look()
    assert min(seen["read right"], seen["refused with a reason"]) > 50
    record("Fuzzing", "manifests drawn at random, through `manifest.validate`", seen, exact=False)


@st.composite
def _grouped(draw):
    count = draw(st.sampled_from([0, 3, 7, 20, 40]))
    num_groups, num_classes = draw(st.sampled_from([1, 3, 5, 12])), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    labels = (rng.random((count, num_classes)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))).astype(float)
    if num_classes and draw(st.booleans()):
        labels = np.eye(num_classes)[rng.integers(0, num_classes, count)]
    groups = rng.integers(0, num_groups, count).astype(object)
    if draw(st.integers(0, 9)) == 9 and count and num_classes:
        labels[rng.integers(count), 0] = np.nan
    if draw(st.integers(0, 9)) == 9 and count:
        groups[rng.integers(count)] = None
    names = [f"c{number}" for number in range(num_classes)]
    frame = pd.DataFrame(labels, columns=names, index=rng.permutation(count)).assign(group_id=groups)
    return frame, names


def test_splits_of_groups_drawn_at_random(record):
    seen = Counter()
    shares = st.sampled_from([0.15, 0.05, 0.3, 0, 0.4, 0.9, -0.1])

    @settings(max_examples=80, **FIXED)
    @given(_grouped(), shares, shares, st.integers(0, 3))
    def look(drawn, test_share, valid_share, seed):
        frame, names = drawn
        try:
            found = splits.assign(frame, names, test_share=test_share, valid_share=valid_share, seed=seed)
        except ValueError as error:
            known = ("shares", "group", "label", "rows")
            assert type(error) is ValueError and any(word in str(error) for word in known), error
            assert "n_splits" not in str(error), error
            seen["refused with a reason"] += 1
            return
        assert found.drop(columns="split").equals(frame) and found["split"].isin(manifest.SPLITS).all()
        assert (found.groupby("group_id")["split"].nunique() == 1).all()
        assert (found["split"] == "train").any(), "nothing to train on"
        seen["no group in two splits"] += 1

    look()
    assert min(seen["no group in two splits"], seen["refused with a reason"]) > 10
    record("Fuzzing", "groups and labels drawn at random, through `splits.assign`", seen, exact=False)


@pytest.mark.slow
def test_tables_led_by_coverage(tmp_path, fuzz, record, monkeypatch):
    counts = tmp_path / "counts.json"
    program = importlib.util.find_spec("tests.reliability.fuzzed_tables").origin
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(manifest.__file__).parents[1]), *sys.path]))
    command = [sys.executable, program, str(tmp_path), str(counts)]
    fuzz(command, runs=4000, seconds=30, seed=1, timeout=20, max_len=2000, rss_limit_mb=4000)
    seen = json.loads(counts.read_text())
    assert sum(seen.values()) >= 20
    record("Fuzzing", "bytes of tables, led by coverage (atheris)", seen, exact=False, timed=True)
