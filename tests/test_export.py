"""`kerasmed export`: what leaves a run answers as what was measured, or nothing leaves."""

import contextlib
import io
import json
import re
import shutil
from importlib.util import find_spec

import keras
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from kerasmed import (
    backbones,
    datasets,
    environment,
    export,
    export_command,
    fusion,
    images,
    medicalnet,
    modalities,
    models,
    runs,
    saved_models,
    scan_networks,
)
from kerasmed.cli import main
from kerasmed.datasets import reader
from kerasmed.systems import chest, mura, tritask

READ = {"image_size": [32, 32], "fit": "pad", "interpolation": "area", "equalize": True}
FORMATS = [
    pytest.param(name, marks=[] if all(map(find_spec, needs)) else pytest.mark.skip(f"{needs} are not all installed"))
    for name, (_, needs, _) in export.FORMATS.items()
]
NOTEBOOKS = {"brain": "07_brain_mri", "chest": "05_chest_fusion_gradcam", "mura": "06_mura_densenet"}
NOTEBOOKS["tritask"] = tritask.NOTEBOOK
SMALL = {
    "brain": {"patients_per_class": 3, "slices_per_patient": 1},
    "chest": {"patients": 30, "image_side": 48},
    "mura": {"patients": 40},
    "tritask": {"train_images": 12, "valid_images": 12, "test_images": 10},
}
ROW = {
    "task": "scans",
    "variant": "compact",
    "split": "test",
    "metric": "auroc",
    "label": "all",
    "value": 0.8125,
    "ci95": [0.71875, 0.90625],
    "n": 40,
    "n_groups": 20,
    "baseline": {"variant": "svc", "value": 0.5, "difference": 0.3125, "difference_ci95": [0.125, 0.4375]},
    "reason": None,
}


def _call(*arguments):
    return CliRunner().invoke(main, ["export", *(str(argument) for argument in arguments)])


def _told(result):
    return " ".join(result.output.split())


def _compact(classes, head="softmax", seed=0):
    """A network of random weights whose answers differ between images, and are not sure of any."""
    keras.utils.set_random_seed(seed)
    model = models.compact_cnn((32, 32), max(classes, 2), filters=(8, 8))
    logits = model.get_layer("logits")
    told = keras.Model(model.inputs, logits.output).predict_on_batch(export.noise(model)["image"])
    logits.kernel.assign(logits.kernel / told.std(axis=0))
    logits.bias.assign(-told.mean(axis=0) / told.std(axis=0))
    if head == "softmax":
        return model
    return keras.Model(model.inputs, keras.ops.sigmoid(logits.output[:, :classes]))


def _chest_network(previous=0):
    moments = {"means": [40.0, 0.5, 0.5] + [0.0] * previous, "scales": [20.0, 0.5, 0.5] + [1.0] * previous}
    return fusion.fused_classifier(models.max_pooled(_compact(3)), 2, residual=True, units=8, **moments)


def _leave(system, home, *, networks=None):
    """Leave a complete run on a synthetic set under `home`, as the system's notebook does, of random weights."""
    root = home / "set"
    if not root.exists():
        datasets.write_synthetic(system, root, **SMALL[system])
    parameters = {"profile": "smoke", "seed": 3, "data_source": "auto", "loss": "binary", "accepted": ["black"], **READ}
    parameters |= {"tasks": ["alzheimer", "brain_tumor"]} if system == "brain" else {}
    told = datasets.fingerprint(system, datasets.Source(root, "synthetic"))
    machine = {"fingerprint": told, "data_source": "synthetic", "environment": {"commit": "abc", "versions": {}}}
    run = runs.start(system, NOTEBOOKS[system], parameters, **machine, models_root=home / "models")
    made = (
        networks
        or {
            "brain": lambda: {"model-alzheimer": _compact(4), "model-brain_tumor": _compact(4, seed=1)},
            "chest": lambda: {"model": _chest_network()},
            "mura": lambda: {"model": _compact(1, "sigmoid"), "model-2": _compact(1, "sigmoid", seed=1)},
            "tritask": lambda: {"model": _compact(3, "sigmoid")},
        }[system]()
    )
    for name, model in made.items():
        runs.write_model(run / f"{name}.keras", model)
    if system == "tritask":
        thresholds = {"label1": 0.25, "label2": 0.5, "label3": 0.75}
        runs.write_json(run / "thresholds.json", {"variant": "compact", "thresholds": thresholds})
    if system == "chest":
        thresholds = {"Effusion": 0.25, "Mass": 0.5}
        runs.write_json(run / "answers.json", {"variant": "compact", "thresholds": thresholds, "read": READ})
    if system == "mura":
        answers = {"models": ["model.keras", "model-2.keras"], "threshold": 0.375, "flips_at_test": True, "read": READ}
        runs.write_json(run / "answers.json", answers)
    parts = [reader(system).read(root, part) for part in reader(system).CLASS_NAMES]
    rows = pd.concat(parts).reset_index(drop=True)[["image_path"]].assign(patient_id="", study_id="")
    rows["group_id"], rows["split"] = rows.index.astype(str), np.resize(["train", "test"], len(rows))
    runs.write_table(run / "split.csv", rows)
    (run / "notebook.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "markdown", "source": ["## Limits\n", "\n", "- One set.\n"]}]})
    )
    runs.finish(run, headline=[ROW], rows=[ROW, ROW | {"label": "label1", "value": 0.6875}])
    return run, root


@pytest.fixture(scope="module")
def brain(tmp_path_factory):
    return _leave("brain", tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return _leave("tritask", tmp_path_factory.mktemp("scans"))


def _copied(made, home):
    """A run that a test may spoil, and its data."""
    run, root = made
    shutil.copytree(run, home / run.name, ignore=shutil.ignore_patterns("export"))
    return home / run.name, root


def _code(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_export_of_a_run_answers_an_image_as_its_networks_do(brain, format, tmp_path, monkeypatch):
    run, root = brain
    out = tmp_path / "out"
    setup, asked = environment.setup, []
    monkeypatch.setattr(environment, "setup", lambda **how: (asked.append(how["devices"]), setup(**how))[1])
    result = _call(run, "--format", format, "--data-root", root, "--out", out)
    assert result.exit_code == 0, result.output
    assert asked == [["CPU:0"]]
    parity = runs.read_json(out / "parity.json")
    assert parity["checked"] and [each["network"] for each in parity["networks"]] == [
        "model-alzheimer",
        "model-brain_tumor",
    ]
    for each in parity["networks"]:
        assert each["max_difference"] <= 1e-4 == each["tolerance"]
        assert each["batches"] == [1, 7, 12] and each["rows"] == 12 and each["pixels"] == "12 images of the test split"
    # The card's own code, in the export's folder, on a picture that no run has seen.
    picture = np.random.default_rng(1).integers(0, 256, (50, 40), dtype=np.uint8)
    images.cv2.imwrite(str(out / "image.png"), picture)
    monkeypatch.chdir(out)
    codes = _code((out / "model_card.md").read_text())
    assert len(codes) == 2
    pixels = images.read(out / "image.png", **{**READ, "image_size": (32, 32)})[None, ..., None]
    for code, task in zip(codes, ("alzheimer", "brain_tumor")):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(code, "card", "exec"), {})
        expected = saved_models.read(run / f"model-{task}.keras").predict_on_batch(pixels)[0]
        told = json.loads(said.getvalue().replace("'", '"'))
        assert list(told) == list(reader("brain").CLASS_NAMES[task])
        np.testing.assert_allclose(list(told.values()), expected, atol=6e-4)  # three decimals are printed


def test_export_writes_how_images_are_read_and_what_the_networks_take_and_give(scans, tmp_path):
    run, root = scans
    assert _call(run, "--format", "saved_model", "--data-root", root, "--out", tmp_path / "out").exit_code == 0
    about = runs.read_json(tmp_path / "out/preprocessing.json")
    assert (about["run"], about["format"], about["data_source"]) == (run.name, "saved_model", "synthetic")
    network = about["networks"]["model"]
    assert network["read"] == READ and network["class_names"] == ["label1", "label2", "label3"]
    assert network["inputs"] == [{"name": "image", "dtype": "uint8", "shape": [None, 32, 32, 1], "holds": None}]
    assert network["output"] == {"name": "probabilities", "dtype": "float32", "shape": [None, 3]}
    assert network["thresholds"] == {"label1": 0.25, "label2": 0.5, "label3": 0.75}
    assert network["made_of"] == {"model.keras": runs.file_hash(run / "model.keras")}


def test_export_card_states_the_figures_of_the_metrics_and_where_they_are_from(scans, tmp_path):
    run, root = scans
    assert (
        _call(run.name, "--format", "saved_model", "--data-root", root, "--models-root", run.parents[1]).exit_code == 0
    )
    card = (run / "export/saved_model/model_card.md").read_text()
    assert (
        "| scans | compact | test | auroc | all | 0.812 | [0.719, 0.906] | 40 | 20 | svc 0.500 | 0.312 [0.125, 0.438] |"
        in card
    )
    assert "| auroc | label1 | 0.688 |" in card and "label1 0.2500, label2 0.5000, label3 0.7500" in card
    assert card.count("SYNTHETIC DATA") == 1 and "NOT COMPARED" not in card
    count = (pd.read_csv(run / "split.csv")["split"] == "test").sum()
    assert f"| test | {count} | {count} | unknown |" in card and re.search("`[0-9a-f]{16}`", card)
    assert "- One set." in card and "let through the audit's gate: black" in card and "not for diagnosis" in card
    assert "ceiling" in card and runs.file_hash(run / "model.keras") in card


@pytest.mark.parametrize(
    ("system", "format"),
    [("chest", "onnx"), ("chest", "litert"), ("mura", "onnx"), ("tritask", "saved_model"), ("tritask", "litert")],
)
@pytest.mark.slow
def test_export_of_each_system_answers_as_its_networks_do(system, format, tmp_path):
    run, root = _leave(system, tmp_path)
    recipe = {"chest": chest, "mura": mura, "tritask": tritask}[system]
    assert hasattr(recipe, "exported_samples") == (system == "chest")
    result = _call(run, "--format", format, "--data-root", root)
    assert result.exit_code == 0, result.output
    (network,) = recipe.exported_networks(run)
    samples, _ = export_command._samples(recipe, run, root, [network])
    ending = export.FORMATS[format][0]
    exported = export.open_exported(format, run / "export" / format / f"model{ending}", "probabilities")
    inputs = samples["model"]
    assert len(inputs["image"]) >= 4 and inputs["image"].std() > 0
    if system == "chest":  # what the table says of these patients, by another way
        table = reader("chest").read_table(root).set_index("study_id")
        paths = export.sample_images(run, root, READ)[1]
        ages = table.loc[[path.rsplit("/", 1)[1].removesuffix(".png") for path in paths], "age"]
        np.testing.assert_allclose(inputs["patient"][:, 0], ages)
    told = np.concatenate([exported({name: row[[at]] for name, row in inputs.items()}) for at in range(4)])
    every = {name: row[:4] for name, row in inputs.items()}
    model = network.load()
    expected = model.predict_on_batch(
        [every[tensor.name] for tensor in model.inputs] if len(every) > 1 else every["image"]
    )
    assert expected.std() > 1e-4
    np.testing.assert_allclose(told, expected, atol=1e-5)


def test_export_of_mura_is_the_mean_of_its_members_and_their_mirror_images(tmp_path):
    run, root = _leave("mura", tmp_path)
    members = [saved_models.read(run / name) for name in ("model.keras", "model-2.keras")]
    (network,) = mura.exported_networks(run)
    pixels = export.samples_of_images(run, root, [network])[0]["model"]["image"][:5]
    views = [member.predict_on_batch(view) for member in members for view in (pixels, pixels[:, :, ::-1])]
    np.testing.assert_allclose(network.load().predict_on_batch(pixels), np.mean(views, axis=0), atol=1e-6)
    assert network.files == ("model.keras", "model-2.keras") and network.thresholds == {"abnormal": 0.375}


def test_exported_networks_of_chest_name_each_value_of_a_patient_that_they_take(tmp_path):
    runs.write_json(tmp_path / "answers.json", {"thresholds": {"Effusion": 0.25, "Mass": 0.5}, "read": READ})
    previous = reader("chest").PREVIOUS
    told = []
    for more in (0, 1 + len(previous)):
        runs.write_model(tmp_path / "model.keras", _chest_network(more))
        told.append(chest.exported_networks(tmp_path)[0].extra["patient"])
    assert told[0].startswith("age, sex, view") and told[1].startswith(told[0]) and "previous" not in told[0]
    assert told[1].endswith(f"has_previous, {', '.join(previous)}")


@pytest.mark.slow
def test_export_of_a_cascade_writes_its_four_stages_and_the_threshold(write_cascade_run, tmp_path):
    pytest.importorskip("tf2onnx")
    run = write_cascade_run(tmp_path / "models", threshold=0.625)
    result = _call(run, "--format", "onnx", "--unchecked")
    assert result.exit_code == 0, result.output
    about = runs.read_json(run / "export/onnx/preprocessing.json")["networks"]
    assert list(about) == ["disease", "kind", "severity", "type"]
    assert about["disease"]["thresholds"] == {"disease": 0.625} and not about["kind"]["thresholds"]
    assert {path.name for path in (run / "export/onnx").glob("*.onnx")} == {f"{stage}.onnx" for stage in about}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_export_that_answers_otherwise_fails_with_the_number_and_leaves_nothing(scans, tmp_path, monkeypatch):
    run, root = _copied(scans, tmp_path)
    convert = export.convert

    def convert_another(model, *arguments, **options):
        convert(_compact(3, "sigmoid", seed=9), *arguments, **options)

    monkeypatch.setattr(export, "convert", convert_another)
    result = _call(run, "--format", "saved_model", "--data-root", root)
    assert result.exit_code == 1
    assert re.search(r"differ from those of model.keras by up to [0-9.]+, more than 0.0001. Nothing", _told(result))
    assert not (run / "export").exists()


def test_export_of_a_network_that_was_not_measured_is_refused(scans, tmp_path):
    run, root = _copied(scans, tmp_path)
    runs.write_model(run / "model.keras", _compact(3, "sigmoid", seed=9))
    result = _call(run, "--format", "saved_model", "--data-root", root)
    assert result.exit_code == 1 and "model.keras of" in _told(result)
    assert "changed or added after the metrics" in _told(result) and not (run / "export").exists()


def _forget_hashes(run):
    """Make a run one that noted no hashes of its files, as earlier versions did not."""
    state = runs.read_json(run / "status.json")
    del state["files"]
    runs.write_json(run / "status.json", state)


def test_export_of_metrics_without_hashes_is_refused(scans, tmp_path):
    run, root = _copied(scans, tmp_path)
    metrics = runs.read_json(run / "metrics.json")
    del metrics["weights"]
    runs.write_json(run / "metrics.json", metrics)
    _forget_hashes(run)
    result = _call(run, "--format", "saved_model", "--data-root", root)
    assert result.exit_code == 1 and "its metrics.json names no hash" in _told(result)


def test_export_of_an_incomplete_run_is_refused(scans, tmp_path):
    run, root = _copied(scans, tmp_path)
    runs.set_status(run, "failed")
    result = _call(run, "--format", "saved_model", "--data-root", root)
    assert result.exit_code == 2 and "is failed, not complete" in _told(result)


def test_export_of_a_run_that_is_not_there_or_leaves_no_network_is_refused(tmp_path):
    result = _call("nothing", "--format", "saved_model")
    assert result.exit_code == 2 and "no run folder at nothing" in _told(result)
    machine = {"fingerprint": "f", "data_source": "real", "environment": {}}
    run = runs.start("lumbar", "02_lumbar_embeddings", {"profile": "smoke"}, **machine)
    runs.finish(run, headline=[ROW], rows=[ROW])
    result = _call(run.name, "--format", "saved_model")
    assert result.exit_code == 2 and "holds no network that answers for new data (answers.json)" in _told(result)


def test_export_without_the_images_of_the_run_is_refused_unless_it_says_so(scans, tmp_path):
    run, _ = _copied(scans, tmp_path)
    result = _call(run, "--format", "saved_model", "--data-root", tmp_path / "empty")
    assert result.exit_code == 2 and "are not at hand" in _told(result) and "--unchecked" in _told(result)
    assert not (run / "export").exists()
    result = _call(run, "--format", "saved_model", "--unchecked")
    assert result.exit_code == 0, result.output
    out = run / "export/saved_model"
    parity = runs.read_json(out / "parity.json")
    assert not parity["checked"] and parity["networks"][0]["pixels"] == "noise, no image of the run"
    assert "**NOT COMPARED ON IMAGES" in (out / "model_card.md").read_text()


def test_export_of_other_data_than_the_split_names_is_refused(scans, tmp_path):
    run, root = _copied(scans, tmp_path)
    rows = pd.read_csv(run / "split.csv")
    runs.write_table(run / "split.csv", rows.assign(image_path="tritask/train_images/other.png"))
    _forget_hashes(run)
    result = _call(run, "--format", "saved_model", "--data-root", root)
    assert result.exit_code == 2 and "no image of the test split" in _told(result)


def test_export_compared_on_files_of_other_times_says_so_and_states_no_ceiling(scans, tmp_path):
    run, root = _copied(scans, tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # without their times
    result = _call(run, "--format", "saved_model", "--data-root", copy)
    assert result.exit_code == 0, result.output
    found = datasets.fingerprint("tritask", datasets.Source(copy, "synthetic"))
    noted = f"files that differ from the run's in name, size or time (fingerprint {found})"
    (network,) = runs.read_json(run / "export/saved_model/parity.json")["networks"]
    card = (run / "export/saved_model/model_card.md").read_text()
    assert network["pixels"].endswith(noted) and noted in card and noted in _told(result) and "ceiling" not in card


def test_export_finds_the_data_that_the_run_was_given_by_kerasmed_data(scans, tmp_path, monkeypatch):
    run, root = _copied(scans, tmp_path)
    monkeypatch.setenv("KERASMED_DATA", str(root))
    source, truth, note = export_command._locate("tritask", run, None)
    assert source == datasets.Source(root.resolve(), "synthetic") and truth and not note
    _forget_hashes(run)
    parameters = runs.read_json(run / "params.json")
    runs.write_json(run / "params.json", parameters | {"data_source": "synthetic", "synthetic_train_images": 12})
    drawn = []
    monkeypatch.setattr(datasets, "write_synthetic", lambda *_, **options: drawn.append(options))
    monkeypatch.setattr(datasets, "fingerprint", lambda *_: "another")
    source, _, _ = export_command._locate("tritask", run, None)  # as the notebook, which passes $KERASMED_DATA over
    assert drawn == [{"train_images": 12}] and root.resolve() not in source.root.parents


def test_export_of_mixed_precision_says_how_far_it_is_from_what_was_measured(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = _compact(3, "sigmoid")
    finally:
        keras.config.set_dtype_policy("float32")
    run, root = _leave("tritask", tmp_path, networks={"model": model})
    assert _call(run, "--format", "saved_model", "--data-root", root).exit_code == 0
    (record,) = runs.read_json(run / "export/saved_model/parity.json")["networks"]
    apart = record["float32_difference"]
    assert record["measured_in"] == "mixed_float16" and 1e-6 < apart < 0.05
    card = (run / "export/saved_model/model_card.md").read_text()
    assert (
        "**model was measured in mixed_float16**; it is written" in card and f"differ by {apart:.2g} at most." in card
    )


def test_export_replaces_an_earlier_one_and_nothing_else(scans, tmp_path):
    run, root = scans
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    result = _call(run, "--format", "saved_model", "--unchecked", "--out", out)
    assert result.exit_code == 1 and "holds no export" in _told(result) and (out / "mine").exists()
    (out / "parity.json").write_text("{}")
    result = _call(run, "--format", "saved_model", "--unchecked", "--out", out)
    assert result.exit_code == 1 and "holds mine beside" in _told(result) and (out / "mine").exists()
    (out / "mine").rmdir()
    assert _call(run, "--format", "saved_model", "--unchecked", "--out", out).exit_code == 0
    assert runs.read_json(out / "parity.json")["networks"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "link").symlink_to(out)
    assert _call(run, "--format", "saved_model", "--unchecked", "--out", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and before.keys() == {*out.iterdir()}
    assert all(path.stat().st_mtime_ns > at for path, at in before.items())
    (out / "mine.png").touch()
    result = _call(run, "--format", "saved_model", "--unchecked", "--out", out)
    assert result.exit_code == 1 and "holds mine.png beside" in _told(result) and (out / "mine.png").exists()


def test_check_format_unknown_or_without_its_packages_says_what_to_do(monkeypatch):
    assert _call("run", "--format", "torch").exit_code == 2
    with pytest.raises(ValueError, match="format 'torch' is unknown; known are onnx, saved_model, litert"):
        export.check_format("torch")
    with monkeypatch.context() as patch:
        patch.setattr(environment, "backend", lambda: "jax")
        with pytest.raises(ValueError, match="backend is jax, .* KERAS_BACKEND=tensorflow, under which"):
            export.check_format("saved_model")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs onnx, tf2onnx, onnxruntime.*pip install 'kerasmed\\[export\\]'"):
        export.check_format("onnx")
    result = _call("run", "--format", "litert")
    assert result.exit_code == 1 and "needs ai_edge_litert" in _told(result)


# --- networks --------------------------------------------------------------------------------------------------------


def _fusion(architecture, strategy):
    moments = {name: (np.full(12, 0.5), np.full(12, 2.0)) for name in ("t1", "t2")}
    options = {"architecture": architecture, "strategy": strategy, "width": 8, "units": 8, "attention_units": 4}
    return modalities.graded_fusion({"canal": 5, "left": 10}, ["t1", "t2"], None, 12, moments=moments, **options)


def _efficient():
    """An EfficientNet whose normalisation is that of its published weights."""
    features, _ = backbones.build("EfficientNetB0", (32, 32), weights="none")
    for layer in features._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.set_weights([np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]) ** 2, np.int32(0)])
            layer.finalize_state()
    return models.classifier(features, 3)


KINDS = {
    "backbone": _efficient,
    "scans": lambda: scan_networks.build("cnn2", (64, 64), 3),
    "rows": lambda: scan_networks.build("lstm", (32, 32), 3),
    "patients": _chest_network,
    "mean": lambda: models.averaged([_compact(2), _compact(2, seed=1)], mirrored=True),
    "attention": lambda: models.attention_classifier({"canal": 2, "left": 3}, 6, 12, width=8, units=4),
    "joint": lambda: _fusion("joint", "pseudo"),
    "volume": lambda: medicalnet.build(10, (8, 32, 32, 1), pool="plane"),
}
# What LiteRT has no operation for: operations, and a layer of those that use them.
BEYOND_LITERT = {"rows": ("TensorListReserve", "lstm1"), "volume": ("MaxPool3D", "maxpool")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "format"),
    # A SavedModel is what TensorFlow computes anyhow, so that two will do.
    [
        pytest.param(kind, *format.values, marks=format.marks)
        for kind in KINDS
        for format in FORMATS
        if format.values != ("saved_model",) or kind in ("scans", "rows")
    ],
)
def test_convert_of_each_kind_of_network_answers_batches_of_any_size(kind, format, tmp_path):
    model = KINDS[kind]()
    path = tmp_path / f"network{export.FORMATS[format][0]}"
    if format == "litert" and kind in BEYOND_LITERT:
        operation, layer = BEYOND_LITERT[kind]
        with pytest.raises(ValueError, match=f"litert has no .*{operation}.* uses in .*{layer}.* onnx or saved_model"):
            export.convert(model, format, path)
        return
    export.convert(model, format, path)
    exported = export.open_exported(format, path, "probabilities")
    found = export.compare(model, exported, export.noise(model, 9))
    assert found["max_difference"] <= 1e-5 and found["batches"] == [1, 7, 9]


def test_as_float32_computes_what_mixed_precision_rounds():
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = models.compact_cnn((32, 32), 3, filters=(8, 8))
    finally:
        keras.config.set_dtype_policy("float32")
    plain = export.as_float32(mixed)
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    told = export.rounding(mixed, plain, export.noise(mixed))
    assert told["measured_in"] == "mixed_bfloat16" and 1e-5 < told["float32_difference"] < 0.1
    assert export.rounding(plain, plain, {}) == {"measured_in": "float32", "float32_difference": 0.0}
    same = models.compact_cnn((32, 32), 3, filters=(8, 8))
    same.set_weights(mixed.get_weights())
    pixels = export.noise(mixed)["image"]
    np.testing.assert_array_equal(plain.predict_on_batch(pixels), same.predict_on_batch(pixels))
    assert export.as_float32(same) is same


def test_as_float32_of_an_efficientnet_keeps_what_its_normalization_computes_with():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = _efficient()
    finally:
        keras.config.set_dtype_policy("float32")
    same = _efficient()  # its constants are those of the other
    same.set_weights(mixed.get_weights())
    pixels = export.noise(mixed)["image"]
    plain = export.as_float32(mixed)
    np.testing.assert_array_equal(plain.predict_on_batch(pixels), same.predict_on_batch(pixels))
    (layer,) = [each for each in plain._flatten_layers() if isinstance(each, keras.layers.Normalization)]
    np.testing.assert_allclose(np.ravel(layer.mean), [0.485, 0.456, 0.406], rtol=1e-6)


def test_compare_finds_the_largest_difference_and_refuses_other_shapes_and_nan():
    model = _compact(2)
    inputs = export.noise(model, 9)

    def off(given):
        told = model.predict_on_batch(given["image"])
        told[-1, 0] += 0.25
        return told

    assert export.compare(model, off, inputs)["max_difference"] == pytest.approx(0.25)
    assert export.compare(model, lambda given: model.predict_on_batch(given["image"]), inputs)["max_difference"] == 0
    with pytest.raises(ValueError, match=r"answers a batch of 1 by shape \(1, 1\)"):
        export.compare(model, lambda given: off(given)[:, :1], inputs)
    with pytest.raises(ValueError, match=r"by shape \(1, 2\) with 2 NaN; expected \(1, 2\) with 0"):
        export.compare(model, lambda given: off(given) * np.nan, inputs)

    empty = keras.Model(model.inputs, model.output * np.nan)
    with pytest.raises(ValueError, match="answers a batch of 1 by no finite number"):
        export.compare(empty, lambda given: empty.predict_on_batch(given["image"]), inputs)
    logs = keras.ops.log(keras.ops.stack([model.output[:, 0], 0 * model.output[:, 1]], 1))
    endless = keras.Model(model.inputs, logs)

    def same(given):
        return endless.predict_on_batch(given["image"])

    assert export.compare(endless, same, inputs)["max_difference"] == 0
    told = export.compare(endless, lambda given: np.where(np.isinf(same(given)), np.inf, same(given)), inputs)
    assert told["max_difference"] == np.inf > told["tolerance"]

    def only_one(given):
        if len(given["image"]) > 1:
            raise RuntimeError("batch is fixed")
        return model.predict_on_batch(given["image"])

    with pytest.raises(ValueError, match="takes no batch of 7: RuntimeError: batch is fixed"):
        export.compare(model, only_one, inputs)
