"""The benchmarks' own arithmetic; what they measure takes minutes and stands in benchmarks/results.md."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from kerasmed import environment

FOLDER = Path(__file__).parents[1] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


measure = _load("measure")
run = _load("run")
gpu = _load("gpu")


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
    assert {path.stem for path in FOLDER.glob("*.py")} == {*run.NAMES, "measure", "run", "gpu"}
    assert run.main(["nonsense"]) == 2 and "unknown: nonsense" in capsys.readouterr().err


def test_multiply_adds_are_those_of_convolutions_and_dense_layers():
    inputs = keras.Input((8, 6, 2))
    x = keras.layers.Conv2D(5, 3, padding="same")(inputs)  # 48 places of 3·3·2·5
    x = keras.layers.DepthwiseConv2D(3)(x)  # 24 places of 3·3·5
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dense(7)(keras.layers.GlobalAveragePooling2D()(x))
    assert gpu.multiply_adds(keras.Model(inputs, x)) == 48 * 90 + 24 * 45 + 35


def test_multiply_adds_of_vgg19_are_those_published():
    model = keras.applications.VGG19(weights=None)
    assert gpu.multiply_adds(model) == pytest.approx(19.6e9, rel=0.01)  # Simonyan & Zisserman's E, 224×224


@pytest.mark.slow
def test_measured_network_predicts_as_the_plain_one_and_has_rates():
    rows = list(gpu.measured("VGG19", 2, precision="float32", size=(32, 32), steps=1))
    assert [(row.mode, row.batch) for row in rows] == [("inference", 2), ("training", 2)]
    assert all(row.ours > 0 and row.plain > 0 for row in rows)
    assert rows[1].operations == 3 * rows[0].operations


def _tiny(name, size):
    """Two networks alike, in place of those of `gpu.networks`."""

    def one():
        inputs = keras.Input((*size, 1), dtype="uint8")
        x = keras.layers.Rescaling(1 / 255, name="preprocess")(inputs)
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(x))
        return keras.Model(inputs, keras.layers.Dense(gpu.LABELS, activation="sigmoid", dtype="float32")(x))

    ours, plain = one(), one()
    plain = keras.Model(plain.get_layer("preprocess").output, plain.output)
    plain.set_weights(ours.get_weights())
    return ours, plain


def test_measured_networks_compute_in_the_precision_that_the_page_names(monkeypatch):
    monkeypatch.setattr(gpu, "networks", _tiny)
    told = []
    monkeypatch.setattr(
        gpu, "check", lambda ours, plain, *_: told.append((gpu.computed_in(ours), gpu.computed_in(plain)))
    )
    try:
        environment.setup(seed=0, precision="mixed_bfloat16", devices=[])
        options = {"size": (8, 8), "steps": 1}
        assert len(list(gpu.measured("tiny", 2, precision="mixed_bfloat16", **options))) == 2
        assert told == [({"bfloat16"}, {"bfloat16"})]
        with pytest.raises(AssertionError, match="tiny computes in .'bfloat16'.; expected .'float32'., of float32"):
            next(gpu.measured("tiny", 2, precision="float32", **options))
    finally:
        environment.setup(seed=0, devices=[])


def test_choose_backend_has_jax_leave_memory_before_it_is_asked(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu.os, "environ", {})
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "_sees_gpu", lambda name: seen.append(gpu.os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]))
    gpu.choose_backend()
    assert seen == ["false"] * 3


def test_check_refuses_a_plain_network_of_other_weights():
    ours, plain = gpu.networks("MobileNetV2", (32, 32))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8)
    inputs = gpu.prepared(ours, pixels)
    assert inputs.shape == (2, 32, 32, 3) and gpu.check(ours, plain, pixels, inputs) < 1e-4
    plain.layers[-1].set_weights([plain.layers[-1].get_weights()[0][:, ::-1], np.zeros(gpu.LABELS)])
    with pytest.raises(AssertionError, match="predicts otherwise"):
        gpu.check(ours, plain, pixels, inputs)


def test_gpu_rate_says_what_does_not_fit_and_lets_other_errors_out():
    def full():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    def broken():
        raise RuntimeError("no such layer")

    assert gpu.rate({"ours": full}, 1, count=5) == {"ours": None}
    found = gpu.rate({"ours": lambda: time.sleep(0.001), "plain": full}, 1, count=5)
    assert found["plain"] is None and 0 < found["ours"] < 1000
    with pytest.raises(RuntimeError, match="no such layer"):
        gpu.rate({"ours": broken}, 1, count=5)


def test_gpu_table_states_device_rates_and_share_of_peak():
    machine = {
        "devices": ["NVIDIA H200, compute capability 9.0"],
        "backend": "jax",
        "precision": "mixed_bfloat16",
        "commit": "abc",
        "cpu_count": 16,
        "versions": {"keras": "3.15.1", "jax": "0.10.2", "torch": None, "numpy": "2.4"},
    }
    rows = [
        gpu.Row("VGG19", "training", 32, 1000.0, 800.0, 98.9e9),
        gpu.Row("VGG19", "training", 512, None, None, 98.9e9),
        gpu.Row("VGG19", "inference", 512, None, 700.0, 98.9e9),
        gpu.Row(gpu.VOLUMES, "inference", 1, 10.0, None, 1e12),
    ]
    text = gpu.table(rows, machine, (12000.0, 12.0))
    assert "NVIDIA H200, compute capability 9.0; backend jax, mixed_bfloat16, keras 3.15.1, jax 0.10.2;" in text
    assert "| VGG19 | training | 32 | 1000 | 800 | 1.25 | 98.9 | 10.0% |" in text
    assert "| VGG19 | training | 512 | does not fit | – |" in text
    assert "| VGG19 | inference | 512 | does not fit | 700 |" in text
    assert (
        "| MedicalNet-152 | inference | 1 | 10 | – | – | 10 | 1.0% |" in text and "12 times what the quickest" in text
    )
    unknown = gpu.table(rows, machine | {"devices": ["Some GPU"]}, None)
    assert "not known" in unknown and "12 times" not in unknown


def test_peak_is_that_of_the_form_a_gpu_has():
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "Tesla V100-PCIE-16GB", "NVIDIA A10G")
    assert [gpu.peak_of(name) for name in names] == [989, 756, 835, 112, None]


def test_gpu_page_is_written_of_all_networks_and_some_are_shown(capsys, monkeypatch, tmp_path):
    machine = {"devices": ["NVIDIA L4"], "backend": "jax", "precision": "float32", "commit": "abc", "cpu_count": 4}
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results_gpu.md")
    monkeypatch.setattr(environment, "setup", lambda **_: {**machine, "versions": {}})
    monkeypatch.setattr(gpu, "measured", lambda name, batch, **_: [gpu.Row(name, "inference", batch, 5.0, 4.0, 1e9)])
    assert gpu.main(["VGG19", "--batch", "64"]) == 0
    assert "| VGG19 | inference | 64 | 5 | 4 | 1.25 |" in capsys.readouterr().out and not gpu.RESULTS.exists()
    assert gpu.main([]) == 0 and "| MedicalNet-152 | inference | 4 |" in gpu.RESULTS.read_text()


def test_gpu_without_one_measures_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results_gpu.md")
    monkeypatch.setattr(environment, "setup", lambda **_: {"devices": ["CPU"], "backend": "tensorflow"})
    assert gpu.main([]) == 1 and "nothing is measured" in capsys.readouterr().err
    assert not gpu.RESULTS.exists()


def test_results_of_a_gpu_name_one_or_say_that_none_was_measured():
    text = (FOLDER / "results_gpu.md").read_text(encoding="utf-8")
    assert "\nNot measured: no GPU" in text or "; backend " in text and "| share of peak |" in text
