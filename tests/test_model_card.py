"""Cards of exported networks: what they state is what the run's files say."""

import json

import pytest

from kerasmed import model_card, runs

ROW = {"task": "scans", "variant": "cnn1", "split": "test", "metric": "f1", "label": "all", "value": 0.5}
ROW |= {
    "ci95": [0.25, 0.75],
    "n": 8,
    "n_groups": 4,
    "baseline": {"variant": "svc", "value": 0.375, "difference": 0.125},
}
NETWORK = {
    "file": "model.onnx",
    "made_of": {"model.keras": "ab" * 32},
    "parameters": 1234567,
    "inputs": [{"name": "image", "dtype": "uint8", "shape": [None, 8, 8, 1], "holds": None}],
    "output": {"name": "probabilities", "dtype": "float32", "shape": [None, 2]},
    "class_names": ["a", "b"],
    "answer": "each by itself",
    "thresholds": {"a": 0.25, "b": 0.5},
    "read": {"image_size": [8, 8], "fit": "pad", "interpolation": "area", "equalize": False},
}
PARITY = {"network": "model", "max_difference": 2e-7, "tolerance": 1e-4, "rows": 9, "batches": [1, 7, 9]}
PARITY |= {"pixels": "9 images of the test split", "runtime": "onnxruntime 1.2"}


@pytest.fixture
def leave():
    """Function that leaves a complete run and returns its card."""

    def make(data_source="real", rows=(ROW,), truth=None, checked=True, split=None, **parameters):
        machine = {"commit": "abc123", "versions": {"keras": "3.9"}}
        given = {"profile": "demo", "seed": 5, "loss": "binary", "networks": ["cnn1", "cnn2"], **parameters}
        options = {"fingerprint": "f00d", "data_source": data_source, "environment": machine}
        run = runs.start("brain", "07_brain_mri", given, **options)
        if split:
            (run / "split.csv").write_text("\n".join(["image_path,patient_id,group_id,split,fold", *split]) + "\n")
        runs.finish(run, headline=[ROW], rows=list(rows))
        about = {"run": run.name, "format": "onnx", "data_source": data_source, "networks": {"model": NETWORK}}
        return model_card.text(run, about, [PARITY], checked=checked, truth=truth or {}), run

    return make


def test_text_of_real_data_names_source_licence_training_and_figures(leave):
    card, run = leave()
    assert card.startswith(f"# {run.name}, as onnx\n") and "SYNTHETIC" not in card and "NOT COMPARED" not in card
    assert "brain-tumor-classification-mri (MIT)" in card and "alzheimers-dataset" in card
    for line in ("| networks | cnn1, cnn2 |", "| seed | 5 |", "| commit | abc123 |", "| versions | keras 3.9 |"):
        assert line in card
    assert "| scans | cnn1 | test | f1 | all | 0.500 | [0.250, 0.750] | 8 | 4 | svc 0.375 | 0.125 |" in card
    assert "| model | 2e-07 | 0.0001 | 9 | 1, 7, 9 | 9 images of the test split | onnxruntime 1.2 |" in card
    assert "1,234,567 parameters" in card and "a 0.2500, b 0.5000" in card and "ab" * 32 in card
    assert "By class, part" not in card and "gate" not in card


def test_text_of_mixed_precision_says_how_far_its_float32_form_is(leave):
    _, run = leave()
    about = {"run": run.name, "format": "onnx", "data_source": "real", "networks": {"model": NETWORK}}
    record = PARITY | {"measured_in": "mixed_float16", "float32_difference": 0.00123}
    card = model_card.text(run, about, [record], checked=True, truth={})
    assert "**model was measured in mixed_float16**" in card and "rows differ by 0.0012 at most." in card
    card = model_card.text(run, about, [record | {"float32_difference": None}], checked=True, truth={})
    assert "rows differ by an unknown amount." in card
    card = model_card.text(run, about, [record | {"measured_in": "float32"}], checked=True, truth={})
    assert "was measured in" not in card


def test_text_leaves_out_versions_and_a_commit_that_are_not_known(leave):
    _, run = leave()
    state = runs.read_json(run / "environment.json")
    runs.write_json(run / "environment.json", state | {"commit": None, "versions": {"keras": "3.9", "papermill": None}})
    about = {"run": run.name, "format": "onnx", "data_source": "real", "networks": {"model": NETWORK}}
    card = model_card.text(run, about, [PARITY], checked=True, truth={})
    assert "| commit | unknown |" in card and "| versions | keras 3.9 |" in card


def test_text_says_aloud_what_is_synthetic_unchecked_and_accepted(leave):
    truth = {"seed": 1, "ceiling": {"alzheimer": 0.91234}}
    card, _ = leave("synthetic", truth=truth, checked=False, accepted=["black", "leak_group"])
    assert "**SYNTHETIC DATA: trained on drawings." in card and "**NOT COMPARED ON IMAGES" in card
    assert "- ceiling, alzheimer: 0.912" in card and "seed: 1" not in card
    assert "let through the audit's gate: black, leak_group." in card


def test_text_counts_the_split_of_the_first_fold(leave):
    lines = ["1.png,p1,g1,train,1", "2.png,p1,g1,train,1", "3.png,,g2,test,1", "1.png,p1,g1,test,2"]
    card, _ = leave(split=lines)
    assert "First of 2 folds" in card
    assert "| train | 2 | 1 | 1 |" in card and "| test | 1 | 1 | unknown |" in card


def test_text_states_further_rows_of_the_headline_up_to_a_limit(leave):
    many = [ROW, *(ROW | {"label": f"label{number}"} for number in range(model_card.MAX_ROWS + 2))]
    others = [
        ROW | {"variant": "svc", "label": "of another"},
        ROW | {"label": "none", "value": None, "reason": "empty"},
    ]
    card, _ = leave(rows=[*many, *others])
    assert card.count("| scans | cnn1 | test | f1 | label") == model_card.MAX_ROWS and "And 2 more in" in card
    assert "of another" not in card and "| f1 | none |" not in card


def test_text_takes_the_limits_of_the_notebook(leave):
    _, run = leave()
    cells = [{"cell_type": "code", "source": ["## Limits of code\n"]}]
    cells += [{"cell_type": "markdown", "source": ["## Limits\n", "\n", "- One set only.\n"]}]
    (run / "notebook.ipynb").write_text(json.dumps({"cells": cells}))
    card, _ = leave()
    assert "What the notebook says of them:\n\n- One set only." in card and "of code" not in card


@pytest.mark.parametrize("format", ["onnx", "saved_model", "litert"])
def test_snippet_is_code_that_gives_each_input_what_it_takes(format):
    more = [
        {"name": "patient", "dtype": "float32", "shape": [None, 3], "holds": "age, NaN where unknown"},
        {"name": "mask", "dtype": "bool", "shape": [None, 2, None], "holds": None},
    ]
    code = model_card.snippet(format, NETWORK | {"inputs": [*NETWORK["inputs"], *more]})
    compile(code, "snippet", "exec")
    assert "images.read(\"image.png\", image_size=(8, 8), fit='pad'" in code
    assert '"patient": np.full((1, 3), np.nan, np.float32)' in code and '"mask": np.ones((1, 2, 16), np.bool)' in code
    features = model_card.snippet(format, NETWORK | {"read": {}, "class_names": []})
    assert '"image": np.zeros((1, 8, 8, 1), np.uint8)' in features and "print(told.shape)" in features
