"""The command on damaged tables, folders and manifests: the exit codes of the README, and never a traceback."""

import os
import re
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from kerasmed import datasets
from kerasmed.cli import main
from tests.reliability import corpus_tables as corpus

HARMFUL = (
    "UTF-16",
    "Latin-1 with umlauts",
    "a NUL byte",
    "the header twice",
    "an empty file",
    "a needed column missing",
    "a needed column twice",
    "semicolons for commas",
    "a quote that is never closed",
    "a cell of 200,000 characters",
    "a row cut off",
    "an id twice",
    "a pipe in place of a table",
    "a link to nothing in place of a table",
)
HARMLESS = ("byte order mark", "CRLF", "CR alone", "blank lines in the middle")


def _call(*arguments):
    """Exit code and output of the command; what is no exit is a traceback."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert "Traceback" not in done.output
    return done.exit_code, done.output


@pytest.fixture
def tritask_root(tmp_path):
    root = datasets.write_synthetic("tritask", tmp_path / "sound", train_images=12, valid_images=10, test_images=10)
    for name in datasets.SYNTHETIC_FILES:
        (root / "tritask" / name).unlink()
    return root


@pytest.fixture
def manifest_root(tmp_path, rng):
    """Six unlike pictures and a manifest of them."""
    (tmp_path / "sound/set").mkdir(parents=True)
    for number in range(6):
        picture = cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (80, 70), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(tmp_path / f"sound/set/{number}.png"), picture)
    lines = ["image_path,patient_id,split,label,age", *(f"{number}.png,p{number},train,ill,6" for number in range(6))]
    (tmp_path / "sound/set/m.csv").write_text("\n".join([*lines, ""]))
    return tmp_path / "sound"


def _damaged(table, kinds, root, folder):
    """Copies of a tree with a damage each: the case, and the copy."""
    found = [case for make in (corpus.harmless, corpus.harmful) for case in make(table) if case.kind in kinds]
    assert {case.kind for case in found} == set(kinds)
    for number, case in enumerate(found):
        copy = corpus.copy(root, folder / f"{number}")
        case.damage(copy)
        yield case, copy


def test_check_and_data_table_of_damaged_tables(tritask_root, tmp_path, record):
    table, seen = corpus.TABLES[0], Counter()
    sound = tmp_path / "sound.csv"
    assert _call("check", "tritask", tritask_root)[0] == 0
    assert _call("data", "table", "tritask", "--data-root", tritask_root, "--out", sound)[0] == 0
    for case, root in _damaged(table, HARMFUL, tritask_root, tmp_path / "harmful"):
        code, output = _call("check", "tritask", root)
        assert code == 1 and "1 problems" in output and re.search(case.says, output, re.DOTALL), (case.kind, output)
        seen["check: exit 1, the problem named"] += 1
        out = tmp_path / "refused.csv"
        code, output = _call("data", "table", "tritask", "--data-root", root, "--out", out)
        assert code == 2 and case.name in output and not out.exists(), (case.kind, output)
        seen["data table: exit 2, nothing written"] += 1
    for case, root in _damaged(table, HARMLESS, tritask_root, tmp_path / "harmless"):
        out = tmp_path / "same.csv"
        assert _call("check", "tritask", root)[0] == 0, case.kind
        assert _call("data", "table", "tritask", "--data-root", root, "--out", out)[0] == 0, case.kind
        assert out.read_bytes() == sound.read_bytes()
        seen["both: exit 0, the sound table written"] += 1
    record("Tables", "the commands check and data table on a damaged table", seen)


def test_audit_of_damaged_manifests(manifest_root, tmp_path, record):
    table, seen, out = corpus.TABLES[-1], Counter(), tmp_path / "out"
    assert _call("audit", manifest_root / "set/m.csv", "--out", out)[0] == 0
    # A row that lacks its end may lack no more than what need not be there, but is refused all the same.
    for case, root in _damaged(table, HARMFUL, manifest_root, tmp_path / "harmful"):
        refused = tmp_path / "refused"
        code, output = _call("audit", root / "set/m.csv", "--out", refused)
        assert code == 2 and not refused.exists(), (case.kind, output)
        assert re.search(case.says.split(".*")[0], " ".join(output.split())), (case.kind, output)
        seen["exit 2, nothing written"] += 1
    for case, root in _damaged(table, HARMLESS, manifest_root, tmp_path / "harmless"):
        code, output = _call("audit", root / "set/m.csv", "--out", out)
        assert code == 0 and "6 of 6 files read" in output, (case.kind, output)
        seen["exit 0, all files read"] += 1
    for text in ("../sound/set/0.png", "/etc/passwd", "C:\\\\0.png", "https://x.org/0.png", " "):
        (manifest_root / "set/other.csv").write_text(f"image_path,age\n{text},3\n")
        code, output = _call("audit", manifest_root / "set/other.csv", "--out", tmp_path / "refused")
        assert code == 2 and "image_path" in output and not (tmp_path / "refused").exists(), (text, output)
        seen["exit 2, nothing written"] += 1
    (manifest_root / "set/other.csv").write_text("image_path\ngone.png\n=cmd|' /C calc'!A0\n")
    code, output = _call("audit", manifest_root / "set/other.csv", "--out", out)
    assert code == 3 and "0 of 2 files read" in output and "closed by unreadable" in output
    seen["exit 3, the files named as unreadable"] += 1
    (manifest_root / "set/other.csv").write_text('image_path,label\n0.png,<script>x</script>\n1.png,"a ""b"""\n')
    assert _call("audit", manifest_root / "set/other.csv", "--out", out)[0] == 0
    assert "<script>x" not in (out / "audit.html").read_text()
    seen["exit 0, all files read"] += 1
    record("Tables", "the command audit on a damaged manifest", seen)


@pytest.mark.slow  # loads TensorFlow and a run
def test_predict_of_folders_that_hold_something_else(manifest_root, tmp_path, write_cascade_run, record):
    run, out, seen = write_cascade_run(tmp_path / "models"), tmp_path / "answers.csv", Counter()
    home = manifest_root / "set"
    (home / "up").symlink_to("..")
    (home / "gone.png").symlink_to("nowhere")
    (home / "text.png").write_text("image_path\n0.png\n")
    predict = ("predict", "brain", "--run", run, "--out", out)
    code, output = _call(*predict, home)
    answers = pd.read_csv(out)
    assert code == 0 and "6 of 8 images predicted" in output and "not read: gone.png" in output
    assert answers["image_path"].tolist() == [*(f"{number}.png" for number in range(6)), "gone.png", "text.png"]
    assert answers["error"].notna().tolist() == [False] * 6 + [True] * 2
    seen["exit 0, what cannot be read named"] += 1
    for path in (home / "m.csv", home / "text.png"):
        out.unlink(missing_ok=True)
        code, output = _call(*predict, path)
        assert code == 1 and path.name in output and "0 of 1 images" in output, output
        assert pd.read_csv(out)["error"].notna().all()
        seen["exit 1, none could be read, each with its reason"] += 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / os.fsdecode(b"sch\xe4del.png")).write_bytes((home / "0.png").read_bytes())
    out.unlink()
    for path in (tmp_path / "empty", tmp_path / "typo", home / "gone.png", tmp_path / "odd"):
        code, output = _call(*predict, path)
        assert code == 2 and not out.exists(), output
        seen["exit 2, nothing written"] += 1
    record("Tables", "the command predict on folders that hold something else", seen)


@pytest.mark.slow  # loads TensorFlow
def test_tables_of_studies_to_predict_are_read_or_refused(tmp_path, record):
    from kerasmed.systems.lumbar import prediction

    root = datasets.write_synthetic("lumbar", tmp_path / "sound", studies=10, image_side=(48, 50))
    (table,) = [table for table in corpus.TABLES if table.path.endswith("series_descriptions.csv")]
    sound, _ = prediction.read_tables([root / "lumbar"])
    seen = Counter()
    for case, copy in _damaged(table, HARMFUL[:-1], root, tmp_path / "harmful"):
        with pytest.raises(ValueError, match=rf"(?s)train_series_descriptions.csv.*({case.says})|{case.says}"):
            prediction.read_tables([copy / "lumbar"])
        seen[corpus.REFUSED] += 1
    for _, copy in _damaged(table, HARMLESS, root, tmp_path / "harmless"):
        assert prediction.read_tables([copy / "lumbar"])[0] == sound
        seen[corpus.RIGHT] += 1
    record("Tables", "tables that say what the series of studies to predict are", seen)
