"""The benchmarks' own arithmetic; what they measure takes minutes and stands in benchmarks/results.md."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


measure = _load("measure")
run = _load("run")


def test_rounds_go_by_turns_in_both_directions_after_the_warm_ones():
    order = []
    seconds = measure.rounds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, count=5, warm=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab" + "ba" + "ab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 5, "b": 5}
    with pytest.raises(ValueError, match="fewer than 5 rounds"):
        measure.rounds({}, count=4)


def test_faster_is_the_ratio_of_amounts_per_second():
    row = measure.faster("x", [2, 1, 1, 1, 4], [3, 3, 9, 3, 2], amount=6, unit="images/s", at_least=3, checked="")
    assert (row.ours, row.peer, row.result, row.lowest, row.highest) == (6, 2, 3, 0.5, 9)
    assert row.is_met and measure.line(row) == "x: 6 / 2 images/s = 3 (target at least 3; rounds 0.5 to 9)"
    assert not row._replace(target=3.1).is_met and measure.line(row._replace(target=3.1)).endswith("MISSED")


def test_shorter_value_and_more_are_met_at_or_below_their_target():
    row = measure.shorter("x", [1, 2, 3, 4, 5], [6] * 5, at_most=0.5, checked="")
    assert (row.result, row.lowest, row.unit, row.is_met) == (0.5, 1 / 6, "s", True)
    assert not measure.shorter("x", [1, 2, 3.1, 4, 5], [6] * 5, at_most=0.5, checked="").is_met
    row = measure.value("x", [0.3, 0.1, 0.2], unit="s", at_most=0.15, checked="")
    assert measure.line(row) == "x: 0.2 s (target at most 0.15; rounds 0.1 to 0.3)  MISSED"
    row = measure.more("x", [512] * 5, [500, 500, 490, 510, 500], unit="MB", at_most=12, checked="")
    assert measure.line(row) == "x: 512 - 500 = 12 MB more (target at most 12; rounds 2 to 22)"


def test_best_is_the_quicker_peer_by_median():
    assert measure.best({"a": [1, 1, 9], "b": [2, 2, 2], "ours": [0, 0, 0]}, ["a", "b"]) == "a"


SCRIPT = """
import measure
def rows():
    yield measure.value("small", [1, 2, 3], unit="s", at_most=1, checked="by hand", limit="It is small.")
    {more}
if __name__ == "__main__":
    measure.main(rows)
"""


@pytest.fixture
def scripts(tmp_path):
    for name, more in {"good": "", "bad": "raise OSError('no such peer')"}.items():
        (tmp_path / f"{name}.py").write_text(SCRIPT.format(more=more))
    (tmp_path / "measure.py").write_text((FOLDER / "measure.py").read_text())
    return tmp_path


def test_run_script_gives_rows_and_of_one_that_fails_its_error(scripts):
    good, bad = run.run_script("good", scripts), run.run_script("bad", scripts)
    assert [row["name"] for row in good["rows"]] == ["small"] and "error" not in good
    assert "no such peer" in bad["error"] and "rows" not in bad


def test_table_says_what_falls_short_and_why_and_what_was_not_measured(scripts):
    results = json.loads(json.dumps({"good": run.run_script("good", scripts)}))
    text = run.table(results, ["good", "other"])
    assert "| small | 2 s | – | 2 s | 1 to 3 | at most 1 | **no** | `good.py`: by hand |" in text
    assert "- **small**: 2 s, target at most 1. It is small." in text and "| not measured |" in text
    met = {"good": results["good"] | {"rows": [results["good"]["rows"][0] | {"target": 2}]}}
    assert "every target that was measured is met" in run.table(met, ["good"])


def test_run_knows_all_scripts_and_refuses_others(capsys):
    assert {path.stem for path in FOLDER.glob("*.py")} == {*run.NAMES, "measure", "run"}
    assert run.main(["nonsense"]) == 2 and "unknown: nonsense" in capsys.readouterr().err
