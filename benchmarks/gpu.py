"""Training and inference on a GPU, against the plain networks of keras.applications.

    KERAS_BACKEND=jax python benchmarks/gpu.py          # all networks; writes benchmarks/results_gpu.md
    python benchmarks/gpu.py DenseNet169 --batch 64     # some; shown, not written

Without `$KERAS_BACKEND` the first of JAX, PyTorch and TensorFlow that sees a GPU is taken; without a GPU nothing is
measured or written. Ours takes grey uint8 pixels of 224×224 and prepares them itself; the plain network takes what a
user of keras.applications hands it, three float32 channels that are prepared already. Both start from arrays in the
machine's memory, have a head of 14 labels, and train all layers with Adam under one precision; calls go by turns.
MedicalNet-152 has no peer in Keras.

Before anything is timed both predict the same from the same weights. Arithmetic is counted from the layers (two
operations a multiply-add; a training step takes three forward passes) and set against what the maker states for dense
matrix products at this precision. The input pipeline's head-room is how many times as many augmented images as the
quickest network trains on it makes in a second.
"""

import argparse
import functools
import importlib
import importlib.util
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import measure
import numpy as np

# Those of 04's full profile, 06's network, and 02's volumes.
NETWORKS = ("DenseNet121", "VGG19", "ResNet50", "InceptionV3", "MobileNetV2", "EfficientNetB3", "DenseNet169")
VOLUMES = "MedicalNet-152"
SIZE, DEPTH, LABELS, STEPS = (224, 224), 24, 14, 10
BATCHES, VOLUME_BATCHES = (32, 128, 512), (1, 4)
# Dense 16-bit matrix products with 32-bit sums, 10¹² operations a second, as the makers' data sheets state.
# The first whose words are all in a device's name holds.
PEAKS = {"H200 NVL": 835, "H100 NVL": 835, "H100 PCIe": 756, "V100 PCIe": 112, "H200": 989, "H100": 989, "A100": 312}
PEAKS |= {"L40S": 362, "L4": 121, "A10": 125, "V100": 125, "T4": 65}
RESULTS = Path(__file__).parent / "results_gpu.md"
_BACKENDS = ("jax", "torch", "tensorflow")
_TOO_LARGE = ("out of memory", "resource_exhausted", "oom when")


class Row(NamedTuple):
    """A network at a batch size, in training or inference."""

    network: str
    mode: str
    batch: int
    ours: float | None  # images (volumes) a second, the median over rounds; None where the batch does not fit
    plain: float | None  # None where it does not fit, or there is none
    operations: float  # of one image in this mode


def multiply_adds(model) -> int:
    """Count the multiply-adds of an image's forward pass, in convolutions and dense layers."""
    total = 0
    for layer in model.layers:
        kernels = [getattr(layer, name, None) for name in ("kernel", "depthwise_kernel", "pointwise_kernel")]
        places = math.prod(side for side in layer.output.shape[1:-1]) if hasattr(layer.output, "shape") else 1
        total += sum(math.prod(kernel.shape) * places for kernel in kernels if kernel is not None)
    return total


def networks(name: str, size=SIZE):
    """Build ours and the plain network with the same weights; the plain one is None for MedicalNet."""
    import keras

    from kerasmed import backbones, embeddings, medicalnet, models

    if name == VOLUMES:
        return models.classifier(
            medicalnet.build(152, (DEPTH, *size, 1), pool="all"), LABELS, activation="sigmoid"
        ), None
    features, _ = backbones.build(name, size, weights="none")
    ours = models.classifier(features, LABELS, dropout=0.0, activation="sigmoid")
    graph = getattr(keras.applications, name)(weights=None, include_top=False, input_shape=(*size, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(graph.output)
    plain = keras.Model(graph.input, keras.layers.Dense(LABELS, activation="sigmoid", dtype="float32")(pooled))
    # At random weights and untouched statistics what a deep network puts out does not depend on the image.
    embeddings.calibrate(ours, np.random.default_rng(0).integers(0, 256, (8, *size, 1), dtype=np.uint8))
    plain.set_weights(ours.get_weights())
    return ours, plain


def prepared(ours, pixels: np.ndarray) -> np.ndarray:
    """What ours makes of pixels before its first layer of the plain network: what the plain one is handed."""
    import keras

    first = keras.Model(ours.inputs, ours.get_layer("preprocess").output)
    return np.asarray(first.predict(pixels, batch_size=32, verbose=0), np.float32)


def check(ours, plain, pixels: np.ndarray, inputs: np.ndarray) -> float:
    """Return the largest difference of the two's probabilities, over their spread; refuse more than 16 bits explain."""
    told = [model.predict(given, verbose=0) for model, given in ((ours, pixels), (plain, inputs))]
    difference = float(np.abs(told[0] - told[1]).max() / np.ptp(told[1]))
    if not difference < 0.05:
        raise AssertionError(f"{ours.name}: the plain network predicts otherwise, by {difference:.2g} of the spread.")
    return difference


def rate(calls, amount: int, *, count: int) -> dict[str, float | None]:
    """Images a second of each of several calls, by turns; None for one whose batch does not fit into the GPU's memory.

    Where one does not fit, the other is measured alone.
    """
    try:
        seconds = measure.rounds(calls, count=count)
    except Exception as error:  # each backend has a type of its own for a full memory
        if not any(text in f"{type(error).__name__} {error}".lower() for text in _TOO_LARGE):
            raise
        if len(calls) == 1:
            return dict.fromkeys(calls)
        alone = [rate({name: call}, amount, count=count) for name, call in calls.items()]
        return {name: value for each in alone for name, value in each.items()}
    return {name: amount / statistics.median(seconds[name]) for name in calls}


def computed_in(model) -> set[str]:
    """Types in which a network's convolutions compute; the head's dense layers are of float32 in any precision."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "kernel")]
    return {layer.compute_dtype for layer in layers if "Dense" not in type(layer).__name__}


def measured(name: str, batch: int, *, precision: str, size=SIZE, steps: int = STEPS, count: int = 5):
    """Measure a network at a batch size, in the precision set up; yields a `Row` for inference and one for training."""
    import keras

    from kerasmed import environment

    environment.fresh(0)
    rng = np.random.default_rng(0)
    ours, plain = networks(name, size)
    found = set().union(*(computed_in(model) for model in (ours, plain) if model is not None))
    expected = {keras.dtype_policies.get(precision).compute_dtype}
    if found != expected:
        raise AssertionError(f"{name} computes in {sorted(found)}; expected {sorted(expected)}, of {precision}.")
    volumes = name == VOLUMES
    pixels = rng.integers(0, 256, (batch, *((DEPTH,) if volumes else ()), *size, 1), dtype=np.uint8)
    targets = rng.integers(0, 2, (batch, LABELS)).astype(np.float32)
    operations = 2 * multiply_adds(ours)
    given = {"ours": (ours, pixels)}
    if plain is not None:
        inputs = prepared(ours, pixels)
        check(ours, plain, pixels, inputs)
        given["plain"] = (plain, inputs)
    for model, _ in given.values():
        model.compile(keras.optimizers.Adam(1e-5), keras.losses.BinaryCrossentropy())

    def repeated(step, model, values):
        for _ in range(steps):
            step(model, values)

    modes = {
        "inference": lambda model, values: model.predict_on_batch(values),
        "training": lambda model, values: model.train_on_batch(values, targets),
    }
    for mode, step in modes.items():
        calls = {which: functools.partial(repeated, step, *each) for which, each in given.items()}
        found = rate(calls, batch * steps, count=count)
        yield Row(name, mode, batch, found["ours"], found.get("plain"), operations * (3 if mode == "training" else 1))


def head_room(fastest: float, num_images: int = 4096) -> tuple[float, float]:
    """Images a second that the input pipeline makes, augmented, and how many times as many as are trained on."""
    from kerasmed import augment, pipelines

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", np.random.default_rng(0).integers(0, 256, (num_images, *SIZE), np.uint8))
        store = np.load(Path(folder) / "images.npy", mmap_mode="r", allow_pickle=False)
        recipe = augment.build(("flip", "noise", "rotate"), SIZE)
        targets = np.zeros((num_images, LABELS), np.float32)
        options = {"batch_size": 64, "seed": 0, "augment": recipe}
        batches = iter(pipelines.training_dataset(store, np.arange(num_images), targets, **options))
        epoch = {"ours": lambda: [next(batches) for _ in range(num_images // 64)]}
        made = num_images / statistics.median(measure.rounds(epoch)["ours"])
    return made, made / fastest


def peak_of(device: str) -> float | None:
    """The stated peak of a GPU by its name, 10¹² operations a second at 16 bits; None for one that is not known."""
    words = device.replace("-", " ").lower().split()
    return next((value for name, value in PEAKS.items() if set(name.lower().split()) <= set(words)), None)


def table(rows: list[Row], machine: dict, pipeline: tuple[float, float] | None) -> str:
    """Write the page: the machine, a row a measurement, and the pipeline's head-room."""
    device = machine["devices"][0]
    peak = peak_of(device.split(",")[0]) if machine["precision"] != "float32" else None
    versions = ", ".join(
        f"{name} {found}" for name, found in machine["versions"].items() if name in (*_BACKENDS, "keras") and found
    )
    lines = [
        "# On a GPU\n",
        f"{device}; backend {machine['backend']}, {machine['precision']}, {versions}; commit {machine['commit']}. "
        "Medians of five rounds, by turns; see benchmarks/gpu.py for what is held against what.\n",
        "| network | mode | batch | ours, images/s | plain, images/s | ratio | 10¹² operations/s | share of peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.network} | {row.mode} | {row.batch} |"
        plain = "–" if row.plain is None else measure.number(row.plain)
        if row.ours is None:
            lines.append(f"{start} does not fit | {plain} | | | |")
            continue
        done = row.ours * row.operations / 1e12
        ratio = "–" if row.plain is None else measure.number(row.ours / row.plain)
        share = "not known" if peak is None else f"{done / peak:.1%}"
        lines.append(f"{start} {measure.number(row.ours)} | {plain} | {ratio} | {measure.number(done)} | {share} |")
    if pipeline:
        lines.append(
            f"\nThe input pipeline makes {measure.number(pipeline[0])} augmented images of 224² a second on "
            f"{machine['cpu_count']} cores: {measure.number(pipeline[1])} times what the quickest of these trains on."
        )
    return "\n".join(lines) + "\n"


def choose_backend() -> None:
    """Name a Keras backend in the environment, before Keras is imported: the first that sees a GPU."""
    if os.environ.get("KERAS_BACKEND"):
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX reads it when it is first asked
    for backend in _BACKENDS:
        if importlib.util.find_spec(backend) and _sees_gpu(backend):
            os.environ["KERAS_BACKEND"] = backend
            return


def _sees_gpu(backend: str) -> bool:
    module = importlib.import_module(backend)
    if backend == "jax":
        return any(device.platform != "cpu" for device in module.devices())
    return module.cuda.is_available() if backend == "torch" else bool(module.config.list_physical_devices("GPU"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=[*NETWORKS, VOLUMES], help="all, if none is named")
    parser.add_argument("--batch", type=int, action="append", help="batch size, may be repeated")
    parser.add_argument("--precision", default="mixed_bfloat16")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.networks if name not in (*NETWORKS, VOLUMES)]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; expected of {', '.join((*NETWORKS, VOLUMES))}")
    choose_backend()
    from kerasmed import environment

    machine = environment.setup(seed=0, precision=asked.precision, devices=[])
    if machine["devices"] == ["CPU"]:
        print(f"no GPU that the backend {machine['backend']} sees: nothing is measured", file=sys.stderr)
        return 1
    # The page is of all networks; of fewer, the table is shown alone.
    whole = set(asked.networks) == {*NETWORKS, VOLUMES} and not asked.batch
    rows, pipeline = [], None
    for name in asked.networks:
        for batch in asked.batch or (VOLUME_BATCHES if name == VOLUMES else BATCHES):
            for row in measured(name, batch, precision=asked.precision):
                rows.append(row)
                print(row, flush=True)
                if whole:
                    RESULTS.write_text(table(rows, machine, None), encoding="utf-8")
    trained = [row.ours for row in rows if row.mode == "training" and row.network != VOLUMES and row.ours]
    if trained:
        pipeline = head_room(max(trained))
    if whole:
        RESULTS.write_text(table(rows, machine, pipeline), encoding="utf-8")
    else:
        print(table(rows, machine, pipeline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
