import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pandas as pd
import pytest

from kerasmed import runs, tracking

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="MLflow is not installed")
STARTED, FINISHED = "2026-01-02T03:04:05+00:00", "2026-01-02T03:05:05+00:00"
STARTED_MS, FINISHED_MS = 1_767_323_045_000, 1_767_323_105_000


def _row(**changes):
    baseline = {"variant": "majority", "value": 0.25, "difference": 0.5, "difference_ci95": [0.4, 0.6]}
    row = {"task": "brain_tumor", "variant": "compact", "split": "test", "metric": "accuracy", "label": "all"}
    return {**row, "value": 0.75, "ci95": [0.5, 0.875], "n": 8, "n_groups": 4, "baseline": baseline, **changes}


def _write(models, name="07_brain_mri-demo-0123456789", **state):
    """A small run folder, complete unless `state` says otherwise."""
    run = models / "brain" / name
    runs.write_json(
        run / "status.json",
        {
            **{"status": "complete", "system": "brain", "notebook": "07_brain_mri", "profile": "demo"},
            **{"data_source": "synthetic", "started": STARTED, "pid": 1, "host": "0", "finished": FINISHED},
            **state,
        },
    )
    roots = {"data_root": str(models / "data"), "models_root": str(models)}
    texts = {"weights": str(models / "elsewhere" / "net.keras"), "notes": "x" * 7000, "from_run": ""}
    runs.write_json(run / "params.json", {**roots, **texts, "rate": 0.001, "sizes": [64, 64], "deep": True})
    versions = {"kerasmed": "0.1.0", "keras": "3.15.1"}
    runs.write_json(run / "environment.json", {"commit": None, "fingerprint": "c10a06e9", "versions": versions})
    if state.get("status") != "failed":
        chosen_by = {"metric": "auroc", "split": "valid", "value": 0.5}
        runs.write_json(run / "metrics.json", {"headline": [_row()], "chosen_by": chosen_by, "rows": []})
    history = {"epoch": [1, 2], "loss": [1.5, None], "val_loss": [2.0, 1.0], "kept": [False, True], "stage": ["a", "b"]}
    runs.write_table(run / "variants" / "compact" / "history.csv", pd.DataFrame(history))
    runs.write_table(run / "history.csv", pd.DataFrame(history))
    for hidden in (".metrics.0.1.tmp.json", "checkpoint.npz", "notes.txt", "figures/.hidden.png"):
        (run / hidden).parent.mkdir(exist_ok=True)
        (run / hidden).write_text("{}")
    for kept in ("figures/confusion.png", "model.keras", "notebook.ipynb"):
        (run / kept).write_bytes(b"content")
    return run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database for all tests: making its tables takes a second. A blank tests that its address is quoted."""
    return tmp_path_factory.mktemp("models root")


@pytest.fixture
def client(store):
    tracking.load()
    from mlflow import MlflowClient

    return lambda: MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def _default_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


# --- what is logged --------------------------------------------------------------------------------------------------


@needs_mlflow
def test_log_of_a_complete_run_copies_all_of_it(store, client):
    run = _write(store)
    logged = client().get_run(tracking.log(run, models_root=store))

    info, data = logged.info, logged.data
    assert (info.run_name, info.status) == (run.name, "FINISHED")
    assert (info.start_time, info.end_time) == (STARTED_MS, FINISHED_MS)
    assert client().get_experiment(info.experiment_id).name == "07_brain_mri"
    assert data.params == {
        **{"weights": "net.keras", "notes": "x" * 6000, "from_run": ""},
        **{"rate": "0.001", "sizes": "[64, 64]", "deep": "true"},
    }
    assert data.metrics == {
        **{"brain_tumor.accuracy.all": 0.75, "validation.auroc": 0.5, "compact.loss": 1.5, "compact.val_loss": 1.0},
        **{"brain_tumor.accuracy.all.ci_low": 0.5, "brain_tumor.accuracy.all.ci_high": 0.875},
        **{"brain_tumor.accuracy.all.baseline": 0.25, "brain_tumor.accuracy.all.difference": 0.5},
    }
    told = {"status": "complete", "system": "brain", "profile": "demo", "data_source": "synthetic"}
    found_by = {"kerasmed.key": run.name, "kerasmed.finished": FINISHED}
    rest = {"fingerprint": "c10a06e9", "kerasmed.version": "0.1.0", "kerasmed.cut": "notes"}
    own = {"mlflow.runName": run.name, "mlflow.source.name": "07_brain_mri", "mlflow.source.type": "NOTEBOOK"}
    assert data.tags == told | found_by | rest | own


@needs_mlflow
def test_log_of_a_history_keeps_its_epochs_and_leaves_nan_out(store, client):
    run_id = tracking.log(_write(store), models_root=store)
    stepped = {
        name: [(point.step, point.value) for point in client().get_metric_history(run_id, name)]
        for name in ("compact.val_loss", "compact.loss")
    }
    assert stepped == {"compact.val_loss": [(1, 2.0), (2, 1.0)], "compact.loss": [(1, 1.5)]}


@needs_mlflow
def test_log_copies_small_files_below_the_store_and_nothing_hidden(store):
    run_id = tracking.log(_write(store), models_root=store)
    folder = store / "mlflow" / "07_brain_mri" / run_id / "artifacts"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        *("environment.json", "figures/confusion.png", "history.csv", "metrics.json", "model.keras", "notebook.ipynb"),
        *("params.json", "status.json"),
    ]


@needs_mlflow
def test_log_of_files_that_are_too_large_names_them(store, client, monkeypatch):
    monkeypatch.setattr(tracking, "MAX_MODEL", 6)
    logged = client().get_run(tracking.log(_write(store, "large-demo-0000000000"), models_root=store))
    assert logged.data.tags["kerasmed.left_out"] == "model.keras"
    folder = store / "mlflow" / "07_brain_mri" / logged.info.run_id / "artifacts"
    assert not (folder / "model.keras").exists() and (folder / "notebook.ipynb").exists()


@needs_mlflow
def test_log_of_a_failed_run_tells_its_error_without_folders(store, client):
    name = "08_brain_cascade-demo-0123456789"
    error = f"cell 3 (In [2]): OSError: {store}/brain/{name}/x.csv and /home/alice/data/y.csv, see https://a.org/b/c"
    run = _write(store, name, status="failed", notebook="08_brain_cascade", error=error)
    logged = client().get_run(tracking.log(run, models_root=store))
    assert logged.info.status == "FAILED"
    assert logged.data.tags["error"] == f"cell 3 (In [2]): OSError: {name}/x.csv and y.csv, see https://a.org/b/c"
    assert "brain_tumor.accuracy.all" not in logged.data.metrics


@needs_mlflow
def test_log_of_a_run_that_was_only_reserved_has_no_parameters(store, client):
    run = store / "brain" / "07_brain_mri-demo-ffffffffff"
    state = {"status": "failed", "system": "brain", "notebook": "07_brain_mri", "started": STARTED}
    runs.write_json(run / "status.json", {**state, "finished": FINISHED})
    data = client().get_run(tracking.log(run, models_root=store)).data
    assert (data.params, data.metrics, data.tags["status"]) == ({}, {}, "failed")


@needs_mlflow
def test_log_of_more_numbers_than_a_request_takes_keeps_all(store, client):
    run = _write(store, "long-demo-0000000000")
    numbers = pd.DataFrame({"epoch": range(1, 1202), "loss": range(1201)})
    runs.write_table(run / "variants" / "compact" / "history.csv", numbers)
    run_id = tracking.log(run, models_root=store)
    assert len(client().get_metric_history(run_id, "compact.loss")) == 1201


def test_content_without_variants_takes_the_runs_own_history(tmp_path):
    run = _write(tmp_path)
    (run / "variants" / "compact" / "history.csv").unlink()
    runs.write_json(run / "metrics.json", {})
    assert tracking._content(run)["metrics"] == [("loss", 1.5, 1), ("val_loss", 2.0, 1), ("val_loss", 1.0, 2)]


def test_points_of_a_history_without_epochs_count_its_rows():
    history = pd.DataFrame({"loss": [2, 1], "stage": ["a", "b"], "kept": [True, False]})
    assert list(tracking._points("a b", history)) == [("a_b.loss", 2.0, 1), ("a_b.loss", 1.0, 2)]


# --- once ------------------------------------------------------------------------------------------------------------


@needs_mlflow
def test_log_again_finds_the_run_and_a_rerun_makes_another(store, client):
    run = _write(store, "again-demo-0000000000")
    first = tracking.log(run, models_root=store)
    assert tracking.log(run, models_root=store) == first
    rerun = tracking.log(_write(store, run.name, finished="2026-01-02T03:09:00+00:00"), models_root=store)
    assert rerun != first
    assert tracking.log(run, models_root=store) == rerun
    experiment = client().get_experiment_by_name("07_brain_mri").experiment_id
    found = client().search_runs([experiment], filter_string=f"tags.`kerasmed.key` = '{run.name}'")
    assert sorted(each.info.run_id for each in found) == sorted((first, rerun))


@needs_mlflow
def test_log_goes_on_where_a_failure_left_a_run_half_logged(store, client, monkeypatch):
    run = _write(store, "half-demo-0000000000")
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "_artefacts", lambda run: ([run / "gone.csv"], []))
        with pytest.raises(RuntimeError, match=r"half-demo-0000000000 was not logged to MLflow at sqlite:"):
            tracking.log(run, models_root=store)
    logged = client().get_run(tracking.log(run, models_root=store))
    experiment = logged.info.experiment_id
    found = client().search_runs([experiment], filter_string=f"tags.`kerasmed.key` = '{run.name}'")
    assert [each.info.run_id for each in found] == [logged.info.run_id]
    assert logged.info.status == "FINISHED"
    assert len(client().get_metric_history(logged.info.run_id, "compact.val_loss")) == 2


@needs_mlflow
def test_log_by_two_processes_to_a_new_store_loses_none(tmp_path):
    folders = [_write(tmp_path, f"07_brain_mri-demo-{number}") for number in range(2)]
    code = "import sys; from kerasmed import tracking; print(tracking.log(sys.argv[1], models_root=sys.argv[2]))"
    command = [sys.executable, "-c", code]
    working = [
        subprocess.Popen([*command, str(run), str(tmp_path)], stdout=subprocess.PIPE, text=True) for run in folders
    ]
    ids = [process.communicate(timeout=120)[0].strip() for process in working]
    assert [process.returncode for process in working] == [0, 0]
    assert {path.name for path in (tmp_path / "mlflow" / "07_brain_mri").iterdir()} == set(ids) and len(set(ids)) == 2


# --- nothing but the store -------------------------------------------------------------------------------------------

WATCHED = """
import getpass, socket, sys
asked = []
def refuse(*given):
    asked.append(given)
    raise OSError("no network here")
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse)
socket.socket.connect = refuse
getpass.getuser = lambda: "alice-the-user"
from kerasmed import tracking
tracking.log(sys.argv[1], models_root=sys.argv[2])
import time; time.sleep(0.5)  # what a thread would send
print(len(asked), asked[:3])
"""


@needs_mlflow
def test_log_to_a_file_asks_no_host_and_stores_neither_user_nor_folders(tmp_path):
    models, home = tmp_path / "models", tmp_path / "home-of-alice"
    home.mkdir()
    run = _write(models, status="failed", error=f"cell 1: OSError: {home}/secret.csv")
    # MLflow sends nothing where it takes itself to be tested.
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_CURRENT_TEST")}
    kept |= {"HOME": str(home), "USERPROFILE": str(home), "USER": "alice-the-user", "LOGNAME": "alice-the-user"}
    for name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "GITHUB_ACTIONS"):
        kept.pop(name, None)
    command = [sys.executable, "-c", WATCHED, str(run), str(models)]
    ended = subprocess.run(command, env=kept, cwd=home, capture_output=True, text=True, timeout=120)
    assert (ended.stdout.strip(), ended.stderr) == ("0 []", "")

    stored = (models / "mlflow.db").read_bytes()
    assert b"~/secret.csv" in stored
    for private in ("alice", socket.gethostname(), str(run), str(models / "brain")):
        assert private.encode() not in stored, private
    # The store's own artefacts are the one thing that it must find by a whole path.
    places = stored.count(str(models).encode())
    assert places == stored.count((models / "mlflow").as_uri().encode()) > 0


# --- errors ----------------------------------------------------------------------------------------------------------


def test_log_without_mlflow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install 'kerasmed\[track\]'"):
        tracking.log(_write(tmp_path), models_root=tmp_path)
    assert not (tmp_path / "mlflow.db").exists()


def test_log_of_no_run_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))} is no run folder: it has no status\.json"):
        tracking.log(tmp_path)


def test_log_of_a_run_that_is_not_over_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is (running|interrupted); only runs that are complete or failed are logged"):
        tracking.log(_write(tmp_path, status="running"))


def test_log_of_a_run_whose_metrics_are_broken_names_the_file(tmp_path):
    run = _write(tmp_path)
    (run / "metrics.json").write_text('{"headline": [')
    with pytest.raises(ValueError, match=r"metrics\.json cannot be read: Expecting value"):
        tracking.log(run)


@pytest.mark.parametrize("uri", ["sqlite:///", "sqlite:////a%20b/mlflow.db", "sqlite://mlflow.db"])
def test_log_to_an_sqlite_address_without_a_plain_file_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match=r"expected sqlite:///<file>"):
        tracking.log(_write(tmp_path), uri=uri)


@needs_mlflow
def test_log_to_what_is_no_database_ends_at_once(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"at sqlite:///.*mlflow\.db: file is not a database"):
        tracking.log(_write(tmp_path), models_root=tmp_path)
    assert time.monotonic() - began < 10


@needs_mlflow
def test_log_to_a_deleted_experiment_says_how_to_restore_it(store, client):
    run = _write(store, "gone-demo-0000000000", notebook="99_gone")
    client().delete_experiment(client().create_experiment("99_gone"))
    with pytest.raises(RuntimeError, match=r"99_gone is deleted; restore it: mlflow experiments restore -x \d+"):
        tracking.log(run, models_root=store)


@needs_mlflow
def test_log_to_a_server_that_says_nothing_ends_within_seconds_and_keeps_its_password(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tracking, "SECONDS_TO_ANSWER", 0.5)
    tracking.load()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@{address}")
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=rf"at http://{address}: no answer within 0\.5 seconds") as caught:
            tracking.log(_write(tmp_path))
    assert time.monotonic() - began < 5
    assert "secret" not in str(caught.value)


@needs_mlflow
def test_log_to_a_server_sends_the_run_in_few_requests(tmp_path, monkeypatch):
    """A server of MLflow's REST interface, as far as one run needs it."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked, place = [], (tmp_path / "kept").as_uri()

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            verb = self.path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
            asked.append((verb, body))
            info = {"run_id": "a1", "run_uuid": "a1", "experiment_id": "7", "status": "RUNNING", "artifact_uri": place}
            run = {"run": {"info": {**info, "lifecycle_stage": "active"}, "data": {}}}
            experiment = {"experiment_id": "7", "name": "07_brain_mri", "lifecycle_stage": "active"}
            answers = {"experiments/get-by-name": {"experiment": experiment}, "runs/create": run, "runs/get": run}
            text = json.dumps(answers.get(verb, {"run_info": info} if verb == "runs/update" else {})).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _answer

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert tracking.log(_write(tmp_path), uri=f"http://127.0.0.1:{server.server_port}/") == "a1"
        server.shutdown()
    verbs = [verb for verb, _ in asked]
    assert verbs[0] == "/health" and verbs.count("runs/log-batch") == 1 and verbs[-1] == "runs/update"
    sent = dict(asked)
    assert len(sent["runs/log-batch"]["metrics"]) == 9
    assert sent["runs/create"].get("user_id", "unknown") == "unknown"
    assert (tmp_path / "kept" / "figures" / "confusion.png").is_file()


# --- names -----------------------------------------------------------------------------------------------------------


def test_headline_of_two_variants_keeps_both():
    rows = [_row(), _row(variant="flat", value=0.5), _row(label="3 classes: all", value=1.0, baseline=None, ci95=None)]
    assert tracking._headline({"headline": rows}) == {
        **{"brain_tumor.accuracy.all.compact.test": 0.75, "brain_tumor.accuracy.all.flat.test": 0.5},
        **{f"brain_tumor.accuracy.all.{variant}.test.ci_low": 0.5 for variant in ("compact", "flat")},
        **{f"brain_tumor.accuracy.all.{variant}.test.ci_high": 0.875 for variant in ("compact", "flat")},
        **{f"brain_tumor.accuracy.all.{variant}.test.baseline": 0.25 for variant in ("compact", "flat")},
        **{f"brain_tumor.accuracy.all.{variant}.test.difference": 0.5 for variant in ("compact", "flat")},
        "brain_tumor.accuracy.3_classes_all": 1.0,
    }


def test_headline_leaves_null_and_infinity_out():
    row = _row(value=None, ci95=[None, float("inf")], baseline={"value": 0.5, "difference": None})
    assert tracking._headline({"headline": [row]}) == {"brain_tumor.accuracy.all.baseline": 0.5}
    assert tracking._headline({}) == {}


@needs_mlflow
@pytest.mark.parametrize("parts", [("a/../b", "../c"), ("ä: %", "€"), ("", "loss"), ("x" * 400,)])
def test_name_of_anything_is_one_that_mlflow_takes(parts):
    from mlflow.utils.validation import _validate_metric

    _validate_metric(f"{tracking._name(*parts)}.difference", 0.0, 0, 0)


@pytest.mark.parametrize(
    "text, told",
    [
        ("cannot read '/data/alice/x.png'", "cannot read 'x.png'"),
        (r"cannot read C:\Users\alice\x.png", "cannot read x.png"),
        ("at /srv/alice", "at alice"),
        ("3 / 4 of a/b, https://a.org/b/c", "3 / 4 of a/b, https://a.org/b/c"),
    ],
)
def test_without_folders_leaves_last_parts(tmp_path, text, told):
    assert tracking._without_folders(text, tmp_path / "models" / "brain" / "run") == told
