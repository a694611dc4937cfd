import importlib.util
import shutil
import socket

import cv2
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from kerasmed import audit, datasets, environment, paths, pipelines, runs, serving
from kerasmed.cli import main


def _call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_list_shows_notebooks_and_on_request_their_parameters():
    result = _call("list")
    assert result.exit_code == 0 and "07_brain_mri  Brain MRI" in result.output and "smoke 0.5 min" in result.output
    assert "epochs = " not in result.output
    assert "epochs = " in _call("list", "07_brain_mri").output
    assert "system any, by the parameter `system`" in _call("list", "01_eda").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument"),
        (["run", "7_brain"], "notebook '7_brain' is unknown"),
        (["run", "07_brain_mri", "-p", "epoch=3"], "did you mean epochs?"),
        (["run", "07_brain_mri", "-p", "epochs"], "write -p name=value"),
        (["run", "07_brain_mri", "--profile", "fast"], "profile 'fast' is unknown"),
        (["run", "01_eda", "-p", "system=heart"], "system 'heart' is unknown; known are"),
        (["predict", "brian", "x", "--out", "y.csv"], "system 'brian' is unknown"),
        (["predict", "brain", "x", "--out", "y.csv"], "no complete run of 07_brain_mri"),
        (["data", "synth", "heart", "x"], "system 'heart' is unknown"),
        (["check", "heart"], "system 'heart' is unknown"),
        (["collect"], "no runs under"),
    ],
)
def test_usage_errors_exit_with_2_and_say_what_is_known(arguments, message):
    result = _call(*arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_run_without_the_data_it_needs_exits_with_1_and_says_how_to_get_them(tmp_path):
    result = _call("run", "07_brain_mri", "--data-root", tmp_path / "typo")
    assert result.exit_code == 1 and "kerasmed data fetch brain" in result.output


def test_run_takes_a_profile_of_ones_own_without_a_budget(tmp_path, monkeypatch):
    shutil.copytree(paths.notebooks_root(), tmp_path / "project/notebooks")
    (tmp_path / "project/notebooks/params/mine").mkdir()
    (tmp_path / "project/notebooks/params/mine/07_brain_mri.yaml").write_text("profile: mine\n")
    monkeypatch.chdir(tmp_path / "project")
    result = _call("run", "07_brain_mri", "--profile", "mine", "--data-root", tmp_path / "typo")
    assert result.exit_code == 1 and "[1/1] 07_brain_mri (mine)" in result.output and "no brain data" in result.output


def test_check_exits_with_1_where_something_is_wrong(brain_root):
    good = _call("check", "brain", brain_root)
    assert good.exit_code == 0 and "no problems" in good.output and "glioma_tumor" in good.output
    (brain_root / "brain/alzheimer/train/MildDemented/cut.jpg").write_bytes(b"")
    bad = _call("check", "brain", brain_root)
    assert bad.exit_code == 1 and "cut.jpg: empty file (0 bytes)" in bad.output and "1 problems" in bad.output


def test_data_table_writes_images_and_studies_with_a_header(tmp_path):
    root = datasets.write_synthetic("mura", tmp_path / "s", patients=40)
    images, by_study = tmp_path / "images.csv", tmp_path / "studies.csv"
    done = _call("data", "table", "mura", "--out", images, "--data-root", root)
    assert done.exit_code == 0 and f"{len(pd.read_csv(images))} images of mura" in done.output
    done = _call("data", "table", "mura", "--studies", "--out", by_study, "--data-root", root)
    table = pd.read_csv(by_study)
    assert {"study_path", "images", "abnormal"} <= set(table) and f"{len(table)} studies of mura" in done.output
    found = {path.parent.relative_to(root).as_posix() for path in root.rglob("*/image*.png")}
    assert set(table["study_path"]) == found and table["images"].sum() == len(pd.read_csv(images))


def test_data_table_of_graded_studies_has_their_grades_and_predict_wants_a_run(tmp_path):
    root = datasets.write_synthetic("lumbar", tmp_path / "s", studies=10, image_side=(48, 50))
    done = _call("data", "table", "lumbar", "--studies", "--out", tmp_path / "t.csv", "--data-root", root)
    table = pd.read_csv(tmp_path / "t.csv")
    assert done.exit_code == 0 and len(table) == 10
    assert {"study_id", "Axial T2", "spinal_canal_stenosis_l1_l2"} <= set(table)
    done = _call("predict", "lumbar", root, "--out", tmp_path / "p.csv", "--models-root", tmp_path / "m")
    assert done.exit_code == 2 and "no complete run of 03_lumbar_fusion" in done.output


def test_data_table_wants_a_part_where_there_are_several(brain_root, tmp_path):
    given = ("data", "table", "brain", "--out", tmp_path / "t.csv", "--data-root", brain_root)
    done = _call(*given)
    assert done.exit_code == 2 and "--part is None; expected one of alzheimer, brain_tumor" in done.output
    assert _call(*given, "--part", "brain_tumor").exit_code == 0 and len(pd.read_csv(tmp_path / "t.csv")) == 48
    done = _call(*given, "--part", "brain_tumor", "--studies")
    assert done.exit_code == 2 and "study_id" in done.output
    done = _call("data", "table", "mura", "--out", tmp_path / "m.csv", "--data-root", brain_root)
    assert done.exit_code == 2 and "no mura data under" in done.output and not (tmp_path / "m.csv").exists()


def test_data_list_and_synth(brain_root, tmp_path):
    assert "real data, 96 files" in _call("data", "list", "--data-root", brain_root).output
    assert "expected brain/" in _call("data", "list", "--data-root", tmp_path / "none").output
    refused = _call("data", "synth", "brain", brain_root)
    assert refused.exit_code == 2 and len(list((brain_root / "brain").rglob("*.jpg"))) == 96


@pytest.fixture
def audited(tmp_path, rng):
    """A folder of ten unlike pictures in two splits and two labels."""
    for number in range(10):
        folder = tmp_path / "set" / ("train", "test")[number % 2] / ("ill", "well")[number // 5]
        folder.mkdir(parents=True, exist_ok=True)
        picture = cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (80, 70), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return tmp_path / "set"


def test_audit_writes_a_report_and_exits_with_0_where_the_gate_is_open(audited, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = _call("audit", "set")
    assert result.exit_code == 0 and "10 of 10 files read" in result.output and "closed" not in result.output
    content = runs.read_json(tmp_path / "audit-set/audit.json")
    assert content["gate"]["open"] and content["images"] == 10 and content["findings"] == []
    assert (tmp_path / "audit-set/audit.html").read_text().startswith("<!doctype html>")


def test_audit_exits_with_3_where_the_gate_is_closed_and_names_all_of_it(audited, tmp_path):
    shutil.copy(audited / "train/ill/0.png", audited / "test/well/copy.png")
    cv2.imwrite(str(audited / "train/ill/black.png"), np.zeros((70, 80), np.uint8))
    (audited / "train/ill/empty.png").touch()
    result = _call("audit", audited, "--out", tmp_path / "out")
    names = ["black", "label_conflict", "leak_duplicate", "leak_group"]
    assert result.exit_code == 3 and f"the gate is closed by {', '.join(names)}" in result.output
    assert "12 of 13 files read" in result.output and "unreadable" in result.output
    assert runs.read_json(tmp_path / "out/audit.json")["gate"]["closed_by"] == names
    accepted = [part for name in names for part in ("--accept", name)]
    assert _call("audit", audited, "--out", tmp_path / "out", *accepted[2:]).exit_code == 3
    result = _call("audit", audited, "--out", tmp_path / "out", *accepted)
    assert result.exit_code == 0
    assert runs.read_json(tmp_path / "out/audit.json")["gate"] == {"open": True, "closed_by": [], "accepted": names}
    ungrouped = _call("audit", audited, "--out", tmp_path / "out", *accepted[:-2], "--similarity", 0)
    assert ungrouped.exit_code == 0 and "leak_group" not in ungrouped.output


def test_audit_of_a_manifest_finds_a_patient_in_two_splits(audited, tmp_path):
    lines = ["image_path,patient_id,split", "train/ill/0.png,p1,train", "test/ill/1.png,p1,test", "gone.png,p2,test"]
    (audited / "my.set.csv").write_text("\n".join(lines))
    result = _call("audit", audited / "my.set.csv", "--out", tmp_path / "out")
    assert result.exit_code == 3 and "the gate is closed by leak_patient" in result.output
    content = runs.read_json(tmp_path / "out/audit.json")
    assert content["name"] == "my.set" and [each["name"] for each in content["findings"]] == ["gone.png", "p1"]
    assert content["findings"][0]["note"] == "absent"


def test_audit_of_unreadable_files_alone_exits_with_3_and_of_one_image_with_0(tmp_path, audited):
    for name in ("none", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "none/a.png").touch()
    shutil.copy(audited / "train/ill/0.png", tmp_path / "one")
    result = _call("audit", tmp_path / "none", "--out", tmp_path / "out")
    assert result.exit_code == 3 and "0 of 1 files read" in result.output and "closed by unreadable" in result.output
    assert _call("audit", tmp_path / "one", "--out", tmp_path / "out").exit_code == 0


def test_audit_of_a_manifest_elsewhere_than_its_images(audited, tmp_path):
    (tmp_path / "tables").mkdir()
    csv = tmp_path / "tables/m.csv"
    csv.write_text(f"image_path,label,note\ntrain/ill/0.png,None,n\n{audited}/test/ill/1.png,ill,n\n")
    refused = _call("audit", csv, "--out", tmp_path / "out")
    assert refused.exit_code == 2 and "--data-root" in refused.output and not (tmp_path / "out").exists()
    result = _call("audit", csv, "--data-root", audited, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "2 of 2 files read" in result.output
    assert "labels: None, ill; no splits; left alone: note\n" in result.output


def test_audit_says_what_it_took_for_what_and_which_groups_it_found(audited, tmp_path):
    result = _call("audit", audited, "--out", tmp_path / "out")
    assert "no groups of several images\nlabels: ill, well; splits: test, train\n" in result.output
    for name in ("a", "b"):
        shutil.copy(audited / "train/ill/0.png", audited / f"train/ill/{name}.png")
    result = _call("audit", audited, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "1 similarity group of 3 images, 3 images in all\n" in result.output


def test_audit_similarity_is_that_of_the_package_by_default():
    (option,) = [option for option in main.commands["audit"].params if option.name == "similarity"]
    assert option.default == audit.SAME_ANATOMY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["set", "--accept", "blak"], "names ['blak']; expected some of leak_duplicate"),
        (["set", "--similarity", "98"], "98.0 is not in the range"),
        (["typo"], "typo does not exist; name a folder of images"),
        (["set/empty"], "no image under set/empty"),
        (["set/no.csv"], "lacks the columns ['image_path']"),
        (["set/out.csv"], "leaves the data root"),
        (["set/train/ill/0.png"], "neither a folder nor a CSV"),
        (["set/blank.csv"], "set/blank.csv is empty; write a line of column names"),
        (["set/latin.csv"], "set/latin.csv is not in UTF-8"),
        (["set/semicolons.csv"], "separate columns by commas, not by ';'"),
        (["set", "--data-root", "set"], "set is a folder, whose images need no other root"),
        (["set/out.csv", "--data-root", "typo"], "typo is no folder; name the one that the paths of out.csv"),
    ],
)
def test_audit_usage_errors_exit_with_2_before_anything_is_read(audited, monkeypatch, arguments, message):
    (audited / "empty").mkdir()
    (audited / "no.csv").write_text("path\na.png\n")
    (audited / "out.csv").write_text("image_path\n../a.png\n")
    (audited / "blank.csv").touch()
    (audited / "latin.csv").write_text("image_path,label\na.png,Schädel\n", encoding="latin-1")
    (audited / "semicolons.csv").write_text("image_path;label\na.png;ill\n")
    monkeypatch.chdir(audited.parent)
    monkeypatch.setattr(pipelines, "decode", lambda *_, **__: pytest.fail("decoded"))
    result = _call("audit", *arguments)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not list(audited.parent.glob("audit-*"))


def test_collect_prints_runs_and_errors_and_writes_a_page(tmp_path):
    run = runs.start(
        "brain", "07_brain_mri", {"profile": "smoke"}, fingerprint="f", data_source="synthetic", environment={}
    )
    runs.set_status(run, "failed", error="cell 3: ValueError: no")
    result = _call("collect", "--html", tmp_path / "all.html")
    assert result.exit_code == 0 and "failed" in result.output and "cell 3: ValueError: no" in result.output
    assert (tmp_path / "all.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_run_looks_at_a_system_and_prints_what_it_found():
    result = _call("run", "01_eda", "--profile", "smoke")
    assert result.exit_code == 0, result.output
    (run,) = (paths.models_root() / "brain").glob("01_eda-smoke-*")
    summary = runs.read_json(run / "summary.json")
    assert summary["data_source"] == "synthetic" and all(f"  {line}\n" in result.output for line in summary["headline"])
    for part in ("alzheimer", "brain_tumor"):
        found = summary["parts"][part]
        # 60 patients of 4 slices in each of 4 classes; each patient is on both sides of the published split
        assert (found["groups"]["count"], found["groups"]["sizes"]) == (240, [4] * 240)
        assert found["leak"]["test"]["images_in_train"] == found["leak"]["test"]["images"] == 192
        accuracy = {
            row["split"]: row
            for row in found["neighbour"]
            if (row["metric"], row["variant"]) == ("accuracy", "nearest_neighbour")
        }
        assert accuracy["published test"]["value"] == 1
        assert accuracy["unseen groups"]["ci95"][0] < 0.25 < accuracy["unseen groups"]["ci95"][1]
    assert not (run / "metrics.json").exists() and len(list((run / "figures").iterdir())) == 10
    collected = _call("collect")
    assert collected.exit_code == 0 and run.name in collected.output


@pytest.mark.slow
def test_run_looks_at_labels_that_do_not_exclude_each_other_with_patients_and_boxes():
    result = _call("run", "01_eda", "--profile", "smoke", "-p", "system=chest")
    assert result.exit_code == 0, result.output
    (run,) = (paths.models_root() / "chest").glob("01_eda-smoke-*")
    found = runs.read_json(run / "summary.json")["parts"]["frontal"]
    assert found["leak"]["test"]["images_in_train"] == 0 and found["groups"]["count"] > 900
    names = {path.stem for path in (run / "figures").iterdir()}
    assert names >= {"patients-frontal", "boxes-frontal", "cooccurrence-frontal", "samples-frontal"}
    f1 = {
        row["variant"]: row["value"]
        for row in found["neighbour"]
        if (row["metric"], row["split"]) == ("f1", "unseen groups")
    }
    assert f1["majority"] < f1["all_positive"]


def _pretend(monkeypatch, *, installed):
    """Have Streamlit found, or not; all else is looked up as ever."""
    found, find = (object() if installed else None), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found if name == "streamlit" else find(name, *rest)
    )


@pytest.fixture
def served(monkeypatch):
    """What `kerasmed app` would start: a list of (command, environment), to which nothing is added where it refuses."""
    started = []
    _pretend(monkeypatch, installed=True)
    monkeypatch.setattr(serving, "run", lambda command, environment: started.append((command, environment)) or 0)
    return started


def _free_port():
    with socket.create_server((serving.ADDRESS, 0)) as server:
        return server.getsockname()[1]


def test_app_starts_the_server_with_roots_and_run(served, tmp_path, write_cascade_run):
    run, port = write_cascade_run(tmp_path / "m"), _free_port()
    done = _call("app", "--run", run.name, "--models-root", tmp_path / "m", "--port", port, "--no-browser")
    ((command, environment),) = served
    assert done.exit_code == 0 and f"the app is at http://127.0.0.1:{port}" in done.output
    assert environment == {"KERASMED_RUN": str(run), "KERASMED_MODELS": str(tmp_path / "m")}
    assert f"--server.port={port}" in command and "--server.headless=true" in command


def test_app_without_any_run_starts_all_the_same(served, tmp_path):
    assert _call("app", "--models-root", tmp_path / "m", "--port", _free_port()).exit_code == 0
    assert served[0][1]["KERASMED_RUN"] == "auto" and "--server.headless=true" not in served[0][0]


def test_app_refuses_a_run_that_it_cannot_show_before_it_starts(served, tmp_path, write_cascade_run):
    run, port = write_cascade_run(tmp_path / "m"), _free_port()
    given = ("app", "--models-root", tmp_path / "m", "--port", port, "--run")
    gone = _call(*given, "gone")
    assert gone.exit_code == 2 and "no run folder at gone" in " ".join(gone.output.split())
    runs.set_status(run, "failed")
    failed = _call(*given, run.name)
    assert failed.exit_code == 2 and "is failed, not complete" in " ".join(failed.output.split())
    runs.set_status(run, "complete", notebook="07_brain_mri")
    other = _call(*given, run)
    assert other.exit_code == 2 and "is of 07_brain_mri, expected one of 08" in " ".join(other.output.split())
    assert not served


def test_app_without_streamlit_or_port_says_how_to_mend_it(served, tmp_path, monkeypatch):
    with socket.create_server((serving.ADDRESS, 0)) as server:
        taken = _call("app", "--models-root", tmp_path, "--port", server.getsockname()[1])
    assert taken.exit_code == 2 and "name another with --port" in " ".join(taken.output.split())
    _pretend(monkeypatch, installed=False)
    missing = _call("app", "--models-root", tmp_path, "--port", _free_port())
    assert missing.exit_code == 1 and "pip install 'kerasmed[app]'" in missing.output
    assert not served


def test_predict_brain_takes_a_named_run_of_the_cascade_and_by_itself_one_of_07(
    tmp_path, write_cascade_run, monkeypatch
):
    run = write_cascade_run(tmp_path / "m")
    picture = tmp_path / "slice.png"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8))
    out, roots = tmp_path / "told.csv", ("--models-root", tmp_path / "m")
    setup, asked = environment.setup, []
    monkeypatch.setattr(environment, "setup", lambda **how: (asked.append(how["devices"]), setup(**how))[1])
    done = _call("predict", "brain", picture, "--run", run.name, "--out", out, *roots)
    assert done.exit_code == 0 and asked == [[]], done.output
    (told,) = pd.read_csv(out).to_dict("records")
    joint = [value for name, value in told.items() if name.startswith("p_")]
    assert len(joint) == 7 and sum(joint) == pytest.approx(1, abs=1e-6)
    done = _call("predict", "brain", picture, "--out", out, *roots)
    assert done.exit_code == 2 and "no complete run of 07_brain_mri" in " ".join(done.output.split())
