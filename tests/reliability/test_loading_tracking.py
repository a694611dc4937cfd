"""Texts of a run that MLflow is told: they arrive as they are, and select no other run."""

from collections import Counter

import pytest

from kerasmed import runs, tracking

pytest.importorskip("mlflow", reason="MLflow is not installed")

NAMES = [
    "09_tritask_dedup-smoke-0123456789",
    "tom's run",
    "' OR tags.`kerasmed.key` LIKE '%",
    'a "quoted" run',
    "%",
    "tags.`x` = 1",
    "$(touch canary) <script>",
]
VALUES = [
    "'; DROP TABLE params; --",
    '"',
    "a\nb",
    "`x`",
    "<script>x</script>",
    "{{ x }}",
    "%s%n",
    "é\u2028\U0001f9e0",
    "\\",
    "",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_log_of_odd_names_and_texts_hands_them_on_and_finds_each_run_again(tmp_path, record):
    tracking.load()
    from mlflow import MlflowClient

    seen, logged = Counter(), {}
    for number, name in enumerate(NAMES):
        run = tmp_path / "models/tritask" / name
        when = {"started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T03:05:05+00:00"}
        state = {"status": "failed", "system": "tritask", "notebook": "09_tritask_dedup", "profile": "smoke", **when}
        error = VALUES[number % len(VALUES)]
        runs.write_json(run / "status.json", {**state, "data_source": "synthetic", "error": error or "none"})
        runs.write_json(run / "params.json", {f"p{place}": value for place, value in enumerate(VALUES)})
        runs.write_json(run / "environment.json", {"commit": None, "fingerprint": "f", "versions": {}})
        logged[name] = tracking.log(run, models_root=tmp_path / "models")
        assert tracking.log(run, models_root=tmp_path / "models") == logged[name]  # found, not logged twice
        found = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'models/mlflow.db'}").get_run(logged[name])
        assert found.info.run_name == name and found.data.tags["error"] == (error or "none")
        assert found.data.params == {f"p{place}": value for place, value in enumerate(VALUES)}
        seen["arrived as that very text"] += 2 + len(VALUES)
    assert len(set(logged.values())) == len(NAMES), "one run was taken for another"
    record("Loading", "names, errors and values with quotes and commands that MLflow is told", seen)
