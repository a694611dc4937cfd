import contextlib
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from kerasmed import collection, locks, report, runs

PARAMETERS = {"profile": "smoke", "seed": 0, "image_size": [64, 64], "rate": 0.001}


def _start(models_root=None, **changes):
    options = {"fingerprint": "f", "data_source": "synthetic", "environment": {}, "models_root": models_root} | changes
    return runs.start("brain", "07_brain_mri", PARAMETERS, **options)


def _row(**changes):
    return {
        "task": "t",
        "variant": "net",
        "split": "test",
        "metric": "accuracy",
        "label": "all",
        "value": 0.9,
        "ci95": [0.8, 1.0],
        "n": 10,
        "n_groups": 5,
        "baseline": {"variant": "majority", "value": 0.5, "difference": 0.4, "difference_ci95": [0.3, 0.5]},
    } | changes


@pytest.mark.parametrize("suffix", runs.WEIGHT_SUFFIXES)
def test_key_changes_with_the_content_of_a_file_of_weights(suffix, tmp_path):
    parameters = {"weights": str(tmp_path / f"model{suffix}")}
    absent = runs.key("07_brain_mri", parameters, "f")
    keys = []
    for content in (b"one", b"other", b"one"):
        (tmp_path / f"model{suffix}").write_bytes(content)
        keys.append(runs.key("07_brain_mri", parameters, "f"))
    assert keys[0] == keys[2] and len({absent, *keys}) == 3


def test_write_json_turns_numpy_and_nan_into_json(tmp_path):
    runs.write_json(
        tmp_path / "a.json", {"a": np.float32(0.5), "b": float("nan"), "c": (np.int64(1), np.arange(2)), "d": tmp_path}
    )
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 0.5, "b": None, "c": [1, [0, 1]], "d": str(tmp_path)}


def test_key_ignores_locations_and_order_and_sees_the_rest():
    key = runs.key("07_brain_mri", PARAMETERS, "f")
    assert len(key) == 10 and int(key, 16) >= 0
    reordered = dict(reversed(list(PARAMETERS.items())))
    assert runs.key("07_brain_mri", reordered | {"data_root": "/x", "models_root": "/y"}, "f") == key
    assert runs.key("07_brain_mri", PARAMETERS | {"image_size": (64, 64)}, "f") == key
    others = [
        runs.key("07_brain_mri", PARAMETERS | {"seed": 1}, "f"),
        runs.key("07_brain_mri", PARAMETERS, "g"),
        runs.key("06_x", PARAMETERS, "f"),
    ]
    assert key not in others and len(set(others)) == 3


def test_key_is_another_under_another_backend_and_does_not_name_tensorflow(monkeypatch):
    keys = {}
    for name in ("tensorflow", "jax", "torch"):
        monkeypatch.setattr(runs, "backend", lambda name=name: name)
        keys[name] = runs.key("07_brain_mri", PARAMETERS, "f")
    assert len(set(keys.values())) == 3
    # As runs from before there were others.
    identity = {"notebook": "07_brain_mri", "data": "f", "sources": runs.sources_hash("07_brain_mri")}
    content = json.dumps(identity | {"parameters": PARAMETERS}, sort_keys=True)
    assert keys["tensorflow"] == hashlib.sha256(content.encode()).hexdigest()[:10]


def test_key_sees_a_change_of_the_notebooks_code_not_of_its_text(tmp_path, monkeypatch):
    (tmp_path / "notebooks/params").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def write(text, code):
        cells = [
            {"cell_type": "markdown", "source": [text], "metadata": {}},
            {"cell_type": "code", "source": [code], "metadata": {}},
        ]
        (tmp_path / "notebooks/n.ipynb").write_text(json.dumps({"cells": cells}))
        return runs.key("n", PARAMETERS, "f")

    assert write("a", "1") == write("b", "1") != write("a", "2")


def test_start_and_finish_leave_a_complete_folder():
    run = _start()
    assert runs.status(run)["status"] == "running" and runs.status(run)["pid"] == os.getpid()
    runs.finish(run, headline=[_row()], rows=[_row(), _row(variant="majority", baseline=None)])
    assert runs.status(run)["status"] == "complete"
    assert runs.read_json(run / "metrics.json")["data_source"] == "synthetic"
    assert runs.read_json(run / "params.json") == PARAMETERS
    assert runs.find("brain", "07_brain_mri") == run


@pytest.mark.parametrize(
    ("headline", "rows", "message"),
    [
        ([], [], "`headline` is empty"),
        ([_row(value=float("nan"))], [], "must be finite"),
        ([_row(baseline=None)], [], "no baseline beside it"),
        ([_row()], [_row(value=None)], "no `reason`"),
    ],
)
def test_finish_refuses_numbers_that_cannot_be_trusted(headline, rows, message):
    run = _start()
    with pytest.raises(ValueError, match=message):
        runs.finish(run, headline=headline, rows=rows)
    assert runs.status(run)["status"] == "running" and not (run / "metrics.json").exists()


@pytest.fixture
def elsewhere():
    """Function that holds a lock in another process; its end, however it comes, lets go."""
    with contextlib.ExitStack() as stack:

        def hold(path):
            code = "import sys, time; from pathlib import Path; from kerasmed import locks; "
            code += "held = locks.acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
            command = [sys.executable, "-c", code, str(path)]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout.readline() == b"held\n"
            return process

        yield hold


def test_start_refuses_a_run_that_another_process_writes(elsewhere, monkeypatch):
    monkeypatch.setattr(runs, "_PARTING_SECONDS", 0.1)
    run = _start()
    _start()  # this very process may
    runs.finish(run, headline=[_row()], rows=[_row()])
    kernel = elsewhere(runs._kernel(run))  # as in Jupyter, or by plain papermill
    state = runs.read_json(run / "status.json") | {"pid": 1, "started": "2100-01-01T00:00:00+00:00"}
    runs.write_json(run / "status.json", state)
    message = "written by process 1 of this machine since 2100.*wait for it, or stop it"
    with pytest.raises(locks.Busy, match=message):
        _start()
    with pytest.raises(locks.Busy, match=message), runs.reserved(run, wait=0):
        pass
    kernel.kill()
    kernel.wait()
    command = elsewhere(run)
    runs.write_json(run / "status.json", state | {"host": "elsewhere"})
    with pytest.raises(locks.Busy, match="a process of another machine"):
        _start()  # the kernel of no command, or of another one
    runs.write_json(run / "status.json", state | {"pid": os.getppid()})
    _start()  # the kernel of this one
    command.kill()


def test_status_of_a_run_that_nobody_holds_is_interrupted(elsewhere):
    run = _start()
    assert runs.status(run)["status"] == "running"
    runs._let_go()
    assert runs.status(run)["status"] == "interrupted"
    command = elsewhere(run)
    assert runs.status(run)["status"] == "running"
    command.kill()
    command.wait()
    assert runs.status(run)["status"] == "interrupted"


def test_start_of_another_run_lets_the_first_go():
    first = _start()
    second = _start(fingerprint="other")
    assert [runs.status(run)["status"] for run in (first, second)] == ["interrupted", "running"]


@pytest.mark.parametrize("content", ["{", "null", "[]", '{"statur": "complete"}'])
def test_status_of_a_damaged_file_is_unreadable(content):
    run = _start()
    (run / "status.json").write_text(content)
    assert runs.status(run)["status"] == "unreadable"
    assert collection.collect()["error"][0].startswith("status.json:")


@pytest.mark.parametrize("name", ["status", "notebook", "profile", "data_source", "finished"])
def test_find_passes_by_a_run_whose_status_has_lost_a_name(name):
    broken, whole = _finished(fingerprint="1"), _finished(fingerprint="2")
    state = runs.read_json(broken / "status.json") | {"finished": "2100-01-01"}
    runs.write_json(broken / "status.json", {key: value for key, value in state.items() if key != name})
    assert runs.find("brain") == whole
    with pytest.raises(FileNotFoundError, match=f"does not say {name}: it is damaged|is unreadable, not complete"):
        runs.find("brain", run=broken)


def test_find_takes_the_newest_complete_and_says_what_to_do_without():
    with pytest.raises(FileNotFoundError, match="make one with `kerasmed run 07_brain_mri`"):
        runs.find("brain", "07_brain_mri")
    old, new = _start(fingerprint="1", data_source="real"), _start(fingerprint="2", data_source="real")
    for run, when in ((old, "2026-01-01"), (new, "2026-01-02")):
        runs.finish(run, headline=[_row()], rows=[_row()])
        runs.write_json(run / "status.json", runs.read_json(run / "status.json") | {"finished": when})
    drawn = _start(fingerprint="4", data_source="synthetic")
    runs.finish(drawn, headline=[_row()], rows=[_row()])
    unfinished = _start(fingerprint="3")
    assert runs.find("brain") == new  # real data before newer synthetic
    assert runs.find("brain", run=old.name) == old
    assert runs.find("brain", run=old) == old
    with pytest.raises(FileNotFoundError, match="is running, not complete"):
        runs.find("brain", run=unfinished)


def test_find_on_other_data_is_refused_with_both_fingerprints():
    old, new = _start(fingerprint="1"), _start(fingerprint="2")
    for run in (old, new):
        runs.finish(run, headline=[_row()], rows=[_row()])
    assert runs.find("brain", fingerprint="1") == old and runs.find("brain", run=new.name, fingerprint="2") == new
    with pytest.raises(FileNotFoundError, match="made with other data .fingerprint 2, here it is 1"):
        runs.find("brain", run=new.name, fingerprint="1")
    with pytest.raises(FileNotFoundError, match="no complete run of 07_brain_mri on these data"):
        runs.find("brain", "07_brain_mri", fingerprint="3")


def _done(when, **changes):
    profile = changes.pop("profile", "smoke")
    options = {"fingerprint": "f", "data_source": "synthetic", "environment": {}} | changes
    run = runs.start("brain", "07_brain_mri", PARAMETERS | {"profile": profile}, **options)
    runs.finish(run, headline=[_row()], rows=[_row()])
    runs.write_json(run / "status.json", runs.read_json(run / "status.json") | {"finished": when})
    return run


def test_find_prefers_real_data_then_the_profile_then_the_newest():
    old, new = _done("2026-01-01", fingerprint="1"), _done("2026-01-02", fingerprint="2")
    other = _done("2026-01-03", profile="cpu")
    assert runs.find("brain") == other
    assert runs.find("brain", profile="smoke") == new and runs.find("brain", profile="smoke", fingerprint="1") == old
    assert runs.find("brain", profile="full") == other  # without one of the profile, the newest of any
    real = _done("2026-01-01", profile="cpu", data_source="real", fingerprint="3")
    assert runs.find("brain", profile="smoke") == real


def test_find_refuses_a_named_run_of_another_notebook_and_names_both():
    run = _done("2026-01-01")
    message = "is of 07_brain_mri, expected one of 02_other; .* make one with `kerasmed run 02_other --profile cpu`"
    for named in (run, run.name):
        with pytest.raises(FileNotFoundError, match=message):
            runs.find("brain", "02_other", run=named, profile="cpu")
    assert runs.find("brain", "07_brain_mri", run=run) == runs.find("brain", run=run) == run


def test_find_without_a_run_gives_the_command_with_the_profile_and_what_makes_synthetic_data_the_same():
    with pytest.raises(FileNotFoundError, match="`kerasmed run 07_brain_mri --profile cpu`") as caught:
        runs.find("brain", "07_brain_mri", profile="cpu")
    assert "synthetic" not in str(caught.value)  # any data would do
    run = _done("2026-01-01")
    hint = r"`kerasmed run 07_brain_mri --profile cpu`.*synthetic data are the same only with the size and the seed of"
    for named in ("auto", run.name):
        with pytest.raises(FileNotFoundError, match=hint):
            runs.find("brain", "07_brain_mri", run=named, profile="cpu", fingerprint="of others")


def test_key_knows_an_earlier_run_by_its_name_wherever_it_lies():
    given = [{"profile": "smoke", "from_run": place} for place in ("a-1", "/models/brain/a-1", "a-2")]
    keys = [runs.key("07_brain_mri", parameters, "f") for parameters in given]
    assert keys[0] == keys[1] != keys[2]


def test_save_figure_marks_synthetic_data_and_only_these():
    for source, marks in (("synthetic", 1), ("real", 0)):
        run, figure = _start(data_source=source), Figure()
        picture = runs.save_figure(run, figure, "a")
        assert picture._repr_png_() == (run / "figures/a.png").read_bytes() != b"" and "/" not in repr(picture)
        assert sum(text.get_text() == "synthetic data" for text in figure.texts) == marks


def test_collect_tabulates_complete_and_failed_runs(tmp_path):
    done, failed = _start(fingerprint="1"), _start(fingerprint="2")
    runs.finish(done, headline=[_row(), _row(metric="balanced_accuracy")], rows=[_row()])
    runs.set_status(failed, "failed", error="cell 3: <ValueError>")
    table = collection.collect()
    assert table["status"].value_counts().to_dict() == {"complete": 2, "failed": 1}
    assert table.loc[
        table["metric"] == "accuracy", ["value", "ci_low", "ci_high", "baseline", "baseline_value"]
    ].values.tolist() == [[0.9, 0.8, 1.0, "majority", 0.5]]
    assert len(collection.collect(done)) == 2 and len(collection.collect(done.parent)) == 3
    report.write_html(tmp_path / "t.html", table)
    page = (tmp_path / "t.html").read_text()
    assert "&lt;ValueError&gt;" in page and "0.900" in page and "<script" not in page


def test_write_table_round_trips(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": ["x, y", None]})
    runs.write_table(tmp_path / "t.csv", frame)
    assert pd.read_csv(tmp_path / "t.csv")["b"].tolist()[0] == "x, y"


def test_summarize_writes_the_facts_and_completes_the_run():
    run = _start()
    written = runs.summarize(run, {"headline": ["4 images"], "sizes": np.array([1, 3]), "share": None})
    assert written["data_source"] == "synthetic" and runs.status(run)["status"] == "complete"
    assert runs.read_json(run / "summary.json") == {
        "data_source": "synthetic",
        "headline": ["4 images"],
        "sizes": [1, 3],
        "share": None,
    }
    runs.write_json(run / "metrics.json", {})
    _start()  # anew: results of the earlier execution are gone
    assert not (run / "summary.json").exists() and not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ({}, "no `headline`"),
        ({"headline": "4 images"}, "list of sentences"),
        ({"headline": ["a"], "x": {"y": [1.0, float("nan")]}}, r"1 numbers .* not finite.*\['x.y.1'\]"),
        ({"headline": ["a"], "x": np.array([np.inf])}, r"\['x.0'\]"),
    ],
)
def test_summarize_refuses_what_says_nothing(summary, message):
    run = _start()
    with pytest.raises(ValueError, match=message):
        runs.summarize(run, summary)
    assert runs.status(run)["status"] == "running" and not (run / "summary.json").exists()


def test_find_takes_a_mere_look_at_data_only_where_it_is_asked_for():
    options = {"fingerprint": "1", "data_source": "real", "environment": {}}
    look = runs.start("brain", "01_eda", PARAMETERS, **options)
    runs.summarize(look, {"headline": ["4 images"]})
    with pytest.raises(FileNotFoundError, match="no complete run of brain"):
        runs.find("brain")
    for notebook in (None, "07_brain_mri"):
        with pytest.raises(FileNotFoundError, match="only looks at data and has no model"):
            runs.find("brain", notebook, run=look.name)
    assert runs.find("brain", "01_eda") == runs.find("brain", "01_eda", run=look) == look
    trained = _start()
    runs.finish(trained, headline=[_row()], rows=[_row()])
    assert runs.find("brain") == trained


def test_finish_keeps_what_a_run_may_be_chosen_by_and_refuses_the_test_split():
    run, chosen_by = _start(), {"metric": "f1", "split": "valid", "value": 0.7}
    runs.finish(run, headline=[_row()], rows=[_row()], chosen_by=chosen_by)
    assert runs.read_json(run / "metrics.json")["chosen_by"] == chosen_by | {"images": None}  # there is no split.csv
    assert collection.collect(run)["validation"].tolist() == [0.7]
    rows = {"image_path": ["a", "b", "c"], "split": ["train", "valid", "test"]}
    found = {}
    for name, split in (
        ("same", rows["split"]),
        ("other", ["valid", "train", "test"]),
        ("test", ["train", "valid", "left out"]),
    ):
        runs.write_table(run / "split.csv", pd.DataFrame(rows | {"split": split}))
        for told in ("valid", "folds"):
            written = runs.finish(run, headline=[_row()], rows=[], chosen_by=chosen_by | {"split": told})
            found[name, told] = written["chosen_by"]["images"]
    assert found["same", "valid"] == found["test", "valid"] != found["other", "valid"]
    assert len({found["same", "folds"], found["test", "folds"], found["same", "valid"]}) == 3
    for wrong in ({**chosen_by, "split": "test, black"}, {**chosen_by, "value": float("nan")}):
        with pytest.raises(ValueError, match="expected a finite value of a split that is not the test"):
            runs.finish(run, headline=[_row()], rows=[_row()], chosen_by=wrong)


def test_collect_lists_a_run_with_a_summary_in_one_row_without_numbers(tmp_path):
    runs.summarize(_start(fingerprint="1"), {"headline": ["4 images"]})
    runs.finish(_start(fingerprint="2"), headline=[_row()], rows=[_row()])
    table = collection.collect()
    assert table["status"].tolist() == ["complete", "complete"]
    assert sorted(table["value"].isna()) == [False, True]
    assert collection.as_text(table).loc[table["value"].isna(), "metric"].tolist() == [""]
    report.write_html(tmp_path / "t.html", table)


def test_variant_folder_is_named_after_the_variant_in_what_suits_a_file_name(tmp_path):
    names = {"cnn2, no augmentation": "cnn2-no-augmentation", "+ patient": "patient", "image-whole": "image-whole"}
    for variant, folder in names.items():
        assert runs.variant_folder(tmp_path, variant) == tmp_path / "variants" / folder
        assert runs.variant_folder(tmp_path, folder).is_dir()  # a folder's name leads to itself


# --- damage ----------------------------------------------------------------------------------------------------------


def _finished(**changes):
    run = _start(**changes)
    runs.write_table(run / "predictions.csv", pd.DataFrame({"p": [0.5]}))
    (run / "model.keras").write_bytes(b"weights")
    runs.finish(run, headline=[_row()], rows=[_row()])
    return run


def test_damaged_lists_what_is_not_as_the_run_left_it():
    run = _finished()
    assert runs.damaged(run, models=True) == [] and runs.find("brain") == run
    (run / "notes.csv").touch()  # is nobody's business
    (run / "model.keras").write_bytes(b"weighty")
    assert runs.damaged(run) == [] and runs.damaged(run, models=True) == ["model.keras"]
    (run / "predictions.csv").write_text("p\n0.7\n")
    (run / "params.json").unlink()
    assert runs.damaged(run) == ["params.json", "predictions.csv"]
    assert runs.damaged(run, only=["metrics.json", "params.json"]) == ["params.json"]
    with pytest.raises(runs.Damaged, match="params.json, predictions.csv of run .* makes anew what is damaged"):
        runs.find("brain")


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_find_of_one_run_is_not_hindered_by_a_damaged_other(content):
    run, other = _finished(), _start(fingerprint="other")
    runs.finish(other, headline=[_row()], rows=[_row()])
    path = other / "environment.json"
    path.unlink() if content is None else path.write_text(content)
    assert runs.find("brain", fingerprint="f") == run
    for named in (other, "auto"):  # the newest, or of one second either
        with pytest.raises(FileNotFoundError, match="environment.json of run|no complete run"):
            runs.find("brain", run=named, fingerprint="other")
    with pytest.raises(runs.Damaged, match=f"environment.json of run {other} is damaged"):
        runs.find("brain", run=other)


def test_damaged_of_a_run_of_an_earlier_version_knows_nothing():
    run = _finished()
    state = runs.read_json(run / "status.json")
    for files in (None, [], "x"):
        runs.write_json(run / "status.json", state | {"files": files})
        (run / "predictions.csv").write_text("")
        assert runs.damaged(run) == [] and runs.find("brain") == run


def test_collect_flags_a_run_whose_metrics_were_changed_and_shows_no_number():
    run = _finished()
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(metrics.replace("0.9", "0.8"))
    table = collection.collect()
    assert table["value"].isna().all() and "metrics.json (not as the run left it" in table["flags"][0]
