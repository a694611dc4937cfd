"""Imports point down, and the low layers stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kerasmed
from kerasmed import datasets

PACKAGE = Path(kerasmed.__file__).parent
LAYERS = {
    "paths": 0,
    "atomic": 0,
    "locks": 0,
    "fanout": 0,
    "collection": 0,
    "environment": 0,
    "runs": 0,
    "seals": 0,
    "manifest": 0,
    "tables": 0,
    "parameters": 0,
    "progress": 0,
    "dicom": 1,
    "images": 1,
    "series": 1,
    "augment": 1,
    "datasets": 1,
    "splits": 1,
    "audit": 1,
    "metrics": 1,
    "predictions": 1,
    "multilabel": 1,
    "calibration": 1,
    "label_plots": 1,
    "localisation": 1,
    "studies": 1,
    "study_plots": 1,
    "plots": 1,
    "report": 1,
    "model_card": 1,
    "cascade_plots": 1,
    "classifiers": 1,
    "imputation": 1,
    "grades": 1,
    "grade_plots": 1,
    "modality_plots": 1,
    "losses": 2,
    "layers": 2,
    "fusion": 2,
    "modalities": 2,
    "backbones": 2,
    "models": 2,
    "saved_models": 2,
    "scan_networks": 2,
    "medicalnet": 2,
    "batches": 3,
    "pipelines": 3,
    "training": 3,
    "embeddings": 3,
    "gradcam": 3,
    "export": 3,
    "systems": 4,
    "notebook_page": 5,
    "notebooks": 5,
    "sweeps": 5,
    "live": 5,
    "tracking": 5,
    "presentation": 5,
    "serving": 5,
    "app": 5,
    "data_commands": 5,
    "export_command": 5,
    "cli": 5,
    "__main__": 5,
}


def _systems_imported(path):
    """Names of the systems whose recipes a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kerasmed.systems"):
            parts = node.module.split(".")
            yield from [parts[2]] if len(parts) > 2 else [alias.name for alias in node.names]


def _imported(path):
    """Modules of the package that a file imports, by the first name below `kerasmed`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kerasmed":
            parts = node.module.split(".")
            yield from (
                [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if alias.name != "__version__"]
            )
        elif isinstance(node, ast.Import):
            yield from [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kerasmed.")]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_of_each_module_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        assert not list(_imported(path))
        return
    assert own in LAYERS, f"{own} has no layer; add it to LAYERS"
    upward = [name for name in _imported(path) if LAYERS[name] > LAYERS[own]]
    assert not upward
    if own == "systems":
        system = path.relative_to(PACKAGE).parts[1].removesuffix(".py")
        assert set(_systems_imported(path)) <= {system}, "one system imports another"


def _loaded_after(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_imports_of_layers_0_and_1_leave_tensorflow_out():
    modules = ", ".join(f"kerasmed.{name}" for name, layer in LAYERS.items() if layer <= 1)
    systems = "kerasmed.datasets.{0}, kerasmed.datasets.synthetic.{0}"
    modules = ", ".join([modules, *(systems.format(name) for name in datasets.SYSTEMS)])
    loaded = _loaded_after(f"import {modules}")
    assert not loaded & {"tensorflow", "keras"}


def test_imports_of_the_command_are_light_enough_for_a_quick_help():
    assert not _loaded_after("import kerasmed.cli") & {"tensorflow", "keras", "pandas", "numpy", "papermill", "cv2"}


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer == 2])
def test_imports_of_layer_2_leave_tensorflow_to_keras(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "tensorflow" not in {name.split(".")[0] for name in imported if name}
