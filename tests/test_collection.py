import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest

from kerasmed import collection, locks

ENDED = "2026-01-01T00:00:00+00:00"


def write_run(top, name="07_brain_mri-smoke-0000000000", *, status="complete", **changes):
    """Write a run folder by hand: keys of status.json, or the content of a file, None for no file."""
    run = top / changes.pop("system", "brain") / name
    run.mkdir(parents=True)
    files = {"params": {"profile": "smoke"}, "environment": {"fingerprint": "f", "data_source": "real"}}
    files |= {"metrics": {"data_source": "real", "chosen_by": None, "headline": [row()], "weights": {}}}
    draws = changes.pop("draws", {"0": [0.9, 0.8]})
    files |= {stem: changes.pop(stem) for stem in tuple(files) if stem in changes}
    state = {"status": status, "system": run.parent.name, "notebook": "07_brain_mri", "profile": "smoke"}
    files["status"] = state | {"data_source": "real", "started": ENDED, "finished": ENDED} | changes
    if draws is not None:
        np.savez(run / "draws.npz", **{key: np.float32(values) for key, values in draws.items()})
    for stem, content in files.items():
        if content is not None and not (stem == "metrics" and status != "complete"):
            text = content if isinstance(content, str) else json.dumps(content)
            (run / f"{stem}.json").write_text(text, encoding="utf-8")
    return run


def row(**changes):
    return {
        "task": "tumour",
        "variant": "net",
        "split": "test",
        "metric": "auroc",
        "label": "all",
        "value": 0.9,
        "ci95": [0.8, 1.0],
        "n": 10,
        "n_groups": 5,
        "paired_by": "p",
        "baseline": {"variant": "majority", "value": 0.5, "difference": 0.4, "difference_ci95": [0.3, 0.5]},
    } | changes


def flags(top):
    (told,) = collection.collect(top)["flags"]
    return told


def put_model(run, content=b"new", *, measured=None, later=True):
    """Write a model; list it in metrics.json with the hash of `measured`; date it before or after metrics.json."""
    if measured is not None:
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["weights"] = {"model.keras": hashlib.sha256(measured).hexdigest()}
        (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "model.keras").write_bytes(content)
    when = (run / "metrics.json").stat().st_mtime + (5 if later else -5)
    os.utime(run / "model.keras", (when, when))


def test_collect_lays_a_run_out_with_what_a_comparison_needs(tmp_path):
    chosen_by = {"metric": "f1", "split": "valid", "value": 0.7, "images": "i"}
    metrics = {"chosen_by": chosen_by, "headline": [row(), row(metric="accuracy", paired_by=None)], "weights": {}}
    run = write_run(tmp_path, metrics=metrics, params={"seed": 3})
    table = collection.collect(tmp_path)
    assert tuple(table) == collection.COLLECTED and set(collection.SHOWN) < set(collection.COLLECTED)
    first, second = table.to_dict("records")
    expected = {"system": "brain", "notebook": "07_brain_mri", "profile": "smoke", "split": "test", "finished": ENDED}
    expected |= {"n": 10, "n_groups": 5, "row": 0, "paired_by": "p", "fingerprint": "f", "parameters": {"seed": 3}}
    expected |= {
        "validation": 0.7,
        "chosen_metric": "f1",
        "chosen_split": "valid",
        "flags": "",
        "chosen_images": "i",
        "folder": str(run),
    }
    expected |= {"ci_low": 0.8, "baseline": "majority", "difference": 0.4, "difference_high": 0.5}
    assert {name: first[name] for name in expected} == expected
    assert (second["row"], second["flags"], second["metric"]) == (1, "no paired draws", "accuracy")


def test_collect_of_an_empty_folder_has_the_columns_and_no_row(tmp_path):
    assert collection.collect(tmp_path).shape == (0, len(collection.COLLECTED))


def test_collect_puts_the_newest_last_and_one_that_does_not_say_first(tmp_path):
    for name, started in (("a-x-1", "2026-02"), ("b-x-2", "2026-01"), ("c-x-3", None)):
        write_run(tmp_path, name, **({} if started is None else {"started": started}))
    (tmp_path / "brain/c-x-3/status.json").write_text("{}")
    assert collection.collect(tmp_path)["run"].tolist() == ["c-x-3", "b-x-2", "a-x-1"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ""),
        ({"data_source": "synthetic"}, "synthetic data"),
        ({"params": {"accepted": ["black", "leak_patient"]}}, "findings let through the gate: black, leak_patient"),
        ({"params": {"accepted": []}}, ""),
        ({"status": "failed", "error": "cell 3 (In [2]): GateError: 2 black"}, "failed at the audit's gate"),
        ({"status": "failed", "error": "cell 3: LeakError: 2 patients"}, "failed at the audit's gate"),
        ({"status": "failed", "error": "cell 3: ValueError: a NoGateError was no GateError"}, "failed"),
        ({"status": "failed"}, "failed"),
        ({"status": "running"}, "interrupted"),
        ({"status": "paused"}, "status unknown: paused"),
        ({"status": 3}, "status unknown: status.json: its `status` is a number, no text"),
        ({"draws": None}, "no paired draws"),
        ({"draws": {"1": [0.5]}}, "no paired draws"),
        ({"metrics": {"headline": [row(paired_by=None)]}}, "no paired draws"),
        ({"metrics": None}, "file is missing: metrics.json"),
        ({"params": None, "environment": None}, "file is missing: params.json; file is missing: environment.json"),
        ({"params": None, "environment": None, "status": "failed"}, "failed"),
        ({"environment": "[1]"}, "file cannot be read: environment.json (it holds a list, no mapping)"),
        (
            {"metrics": '{"headline": ['},
            "file cannot be read: metrics.json (it is no JSON: Expecting value: line 1 column 15 (char 14))",
        ),
        ({"metrics": {"headline": []}}, "file cannot be read: metrics.json (`headline` is no list of rows)"),
        (
            {"metrics": {"headline": [row(value="1; 2")]}},
            "file cannot be read: metrics.json (`value` is 1, 2, no number)",
        ),
        ({"metrics": {"headline": [row(ci95=[1])]}}, "file cannot be read: metrics.json (`ci95` is [1], no interval)"),
        ({"metrics": {"headline": [row(n=0.5)]}}, "file cannot be read: metrics.json (`n` is 0.5, no count)"),
        (
            {"metrics": {"headline": [row(baseline=[1])]}},
            "file cannot be read: metrics.json (`baseline` is no mapping)",
        ),
        ({"metrics": {"headline": [row(task=1)]}}, "file cannot be read: metrics.json (`task` is 1, no text)"),
        (
            {"metrics": {"headline": [row()], "weights": [1]}},
            "file cannot be read: metrics.json (`weights` is a list, no mapping)",
        ),
        (
            {"metrics": {"headline": [row()], "chosen_by": {"images": 3}}},
            "file cannot be read: metrics.json (`images` is 3, no text)",
        ),
        (
            {"metrics": {"headline": [row()], "chosen_by": {"value": True}}},
            "file cannot be read: metrics.json (`value` is True, no number)",
        ),
    ],
)
def test_collect_flags_what_is_wrong_with_a_run_and_nothing_else(tmp_path, changes, expected):
    write_run(tmp_path, **changes)
    assert flags(tmp_path) == expected
    assert all(flag.split(": ")[0] in collection.FLAGS for flag in expected.split("; ") if flag)


def test_collect_flags_a_running_run_while_its_process_lives(tmp_path):
    run = write_run(tmp_path, status="running")
    with locks.held(run):
        assert flags(tmp_path) == "running"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '"complete"', "{}", '{"status": null}', "\x00", "[" * 100_000]
)
@pytest.mark.parametrize("file", ["status", "params", "environment", "metrics"])
def test_collect_goes_on_past_a_file_of_any_content(tmp_path, file, damage):
    write_run(tmp_path, "a-smoke-1", **({} if file == "status" else {file: damage}))
    if file == "status":
        (tmp_path / "brain/a-smoke-1/status.json").write_text(damage)
    write_run(tmp_path, "b-smoke-2", started="2030")
    table = collection.collect(tmp_path).set_index("run")
    assert table.loc["b-smoke-2", ["status", "value", "flags"]].tolist() == ["complete", 0.9, ""]
    may_hold = file in ("params", "environment") and damage in ("{}", '{"status": null}')
    assert (table.loc["a-smoke-1", "flags"] == "") == may_hold
    if file == "status":
        assert table.loc["a-smoke-1", ["status", "system", "notebook"]].tolist() == ["unreadable", "brain", "a"]
    if file == "metrics":
        assert np.isnan(table.loc["a-smoke-1", "value"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "it is empty"),
        ("{", "it is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "it holds a list, no mapping"),
        ("null", "it holds null, no mapping"),
        ("1.5", "it holds a number, no mapping"),
        ('"complete"', "it holds a text, no mapping"),
        ("{}", "it has no `status`"),
        ('{"status": true}', "its `status` is true or false, no text"),
        ('{"status": {}}', "its `status` is a mapping, no text"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_collect_says_in_words_what_a_broken_status_holds(tmp_path, content, expected):
    run = write_run(tmp_path)
    (run / "status.json").write_text(content)
    (error,) = collection.collect(tmp_path)["error"]
    assert error == f"status.json: {expected}"


def test_collect_of_a_status_that_is_a_folder_says_so(tmp_path):
    run = write_run(tmp_path)
    (run / "status.json").unlink()
    (run / "status.json").mkdir()
    (error,) = collection.collect(tmp_path)["error"]
    assert error in ("status.json: Is a directory", "status.json: Permission denied")  # Windows: the latter


def test_collect_of_a_run_with_a_summary_asks_for_no_metrics(tmp_path):
    run = write_run(tmp_path, metrics=None)
    (run / "summary.json").write_text("{}")
    assert flags(tmp_path) == ""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"measured": b"new", "later": True}, ""),  # a copy
        ({"measured": b"old", "later": False}, ""),  # no younger than the metrics: not read
        ({"measured": b"old", "later": True}, "weights are not those that were measured: model.keras"),
        ({"later": False}, "weights are not those that were measured: model.keras"),  # nobody listed it
    ],
)
def test_collect_flags_weights_that_are_not_those_measured(tmp_path, model, expected):
    put_model(write_run(tmp_path), **model)
    assert flags(tmp_path) == expected
    assert collection.is_trusted(flags(tmp_path)) == (expected == "")


def test_collect_flags_weights_that_are_gone_and_names_the_first(tmp_path):
    run = write_run(tmp_path)
    put_model(run, b"a", measured=b"a")
    content = json.loads((run / "metrics.json").read_text())
    content["weights"] |= {"variants/a;b/model.keras": "0", "z.keras": "0"}
    (run / "metrics.json").write_text(json.dumps(content))
    put_model(run, b"a", later=False)
    assert flags(tmp_path) == "weights are not those that were measured: variants/a,b/model.keras"


@pytest.mark.parametrize(("later", "expected"), [(True, "metrics are older than weights: model.keras"), (False, "")])
def test_collect_without_hashes_goes_by_the_time(tmp_path, later, expected):
    put_model(write_run(tmp_path, metrics={"headline": [row()]}), later=later)
    assert flags(tmp_path) == expected and collection.is_trusted(expected) != later


def test_collect_leaves_a_model_that_is_being_written_alone(tmp_path):
    (write_run(tmp_path) / ".model.0.1.tmp.keras").write_bytes(b"half")
    assert flags(tmp_path) == ""


def test_read_draws_round_trips_and_is_empty_without_a_file(tmp_path):
    run = write_run(tmp_path, draws={"0": [0.5, np.nan], "11": [0.25]})
    draws = collection.read_draws(run)
    assert sorted(draws) == [0, 11] and draws[11].tolist() == [0.25] and draws[0].dtype == np.float64
    np.testing.assert_array_equal(draws[0], [0.5, np.nan])
    (run / "draws.npz").unlink()
    assert collection.read_draws(run) == {}


@pytest.mark.parametrize("name", ["empty", "text", "npy", "text in it", "two axes", "counts", "objects", "named"])
def test_read_draws_of_something_else_is_refused_and_flagged(tmp_path, name):
    run, buffer = write_run(tmp_path), io.BytesIO()
    if name == "npy":
        np.save(buffer, np.zeros(3))
    elif name == "text in it":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("0.npy", "x")
    elif name not in ("empty", "text"):
        values = {"two axes": np.zeros((2, 2)), "counts": np.arange(3), "objects": np.array([None])}
        np.savez(buffer, **{"a" if name == "named" else "0": values.get(name, np.zeros(3))})
    (run / "draws.npz").write_bytes(b"x" if name == "text" else buffer.getvalue())
    with pytest.raises(ValueError, match=r"^draws.npz \(.+\)$"):
        collection.read_draws(run)
    assert flags(tmp_path).startswith("file cannot be read: draws.npz (") and "no paired draws" in flags(tmp_path)


def test_collect_goes_on_past_draws_with_any_broken_byte(tmp_path):
    run = write_run(tmp_path)
    whole = (run / "draws.npz").read_bytes()
    for position in range(0, len(whole), 3):
        (run / "draws.npz").write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        (value,) = collection.collect(tmp_path)["value"]
        assert value == 0.9
        (run / "draws.npz").write_bytes(whole[:position])
        assert "no paired draws" in flags(tmp_path)
