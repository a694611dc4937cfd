"""A run's networks in forms that need no Keras: ONNX, TensorFlow's SavedModel, LiteRT; each compared with its origin.

All three are made from one trace of the network by TensorFlow, so that names and shapes of inputs and outputs are the
same in each. Keras's backend has to be TensorFlow for it; networks that were trained under another open under it.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import (
    atomic,
    backbones,  # noqa: F401  registers the layers that saved models may be made of
    environment,
    fusion,  # noqa: F401
    medicalnet,  # noqa: F401
    modalities,  # noqa: F401
    model_card,
    pipelines,
    runs,
)

TOLERANCE = 1e-4  # of a probability; of features, of the largest one
OPSET = 18  # of ONNX; runtimes since 2023 know it
IMAGES = 32  # of the test split, at most: of equal pixels come equal sums, whichever they are
ODD_BATCH = 7
ABOUT = "preprocessing.json"
PARITY = "parity.json"
CARD = "model_card.md"
# Format -> ending of the file, modules that it needs besides TensorFlow, the distribution that runs it.
FORMATS = {
    "onnx": (".onnx", ("onnx", "tf2onnx", "onnxruntime"), "onnxruntime"),
    "saved_model": ("", (), "tensorflow"),
    "litert": (".tflite", ("ai_edge_litert",), "ai-edge-litert"),
}
OUTPUTS = ("probabilities", "features")


class Network(NamedTuple):
    """One network of a run, as it is exported."""

    name: str  # of its file
    files: tuple[str, ...]  # in the run folder, that it is made of
    load: Callable[[], keras.Model]
    class_names: tuple[str, ...]  # of the last axis of its probabilities; empty for a network that gives features
    answer: str  # how an answer comes of what it gives, in words
    thresholds: Mapping[str, float]  # class -> threshold, tuned on validation; empty where there is none
    read: Mapping  # how its images or series are read
    extra: Mapping[str, str] = {}  # further input -> what it holds, in words

    @property
    def output(self) -> str:
        """Name of what it gives."""
        return OUTPUTS[not self.class_names]


def check_format(format: str) -> None:
    """Refuse an unknown format, one whose packages are not installed, or a backend that cannot write it.

    Raises:
        ValueError: unknown format, or Keras's backend is not TensorFlow.
        ImportError: a package is not installed; says how to install it.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; known are {', '.join(FORMATS)}.")
    if environment.backend() != "tensorflow":
        raise ValueError(
            f"Keras's backend is {environment.backend()}, and an export is traced by TensorFlow; give the command with "
            "KERAS_BACKEND=tensorflow, under which networks that another backend trained open as well."
        )
    absent = [name for name in FORMATS[format][1] if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(
            f"the format {format} needs {', '.join(absent)}, not installed here: pip install 'kerasmed[export]' (in a "
            "clone: -e '.[export]')."
        )


def check_weights(run: Path, networks: Sequence[Network]) -> dict[str, str]:
    """Refuse networks other than those that the run's metrics were measured with.

    Returns:
        File -> SHA-256, hexadecimal.

    Raises:
        ValueError: a file was changed, or was not there, when the metrics were written, or these do not say.
    """
    measured = runs.read_json(run / "metrics.json").get("weights")
    found = {name: runs.file_hash(run / name) for network in networks for name in network.files}
    for name, digest in found.items():
        if (measured or {}).get(name) != digest:
            why = "its metrics.json names no hash" if measured is None else "it was changed or added after the metrics"
            raise ValueError(
                f"{name} of {run.name} is not known to be the network that was measured: {why}. A card beside it would "
                "state another network's figures; run the notebook again with --force."
            )
    return found


# --- pixels ----------------------------------------------------------------------------------------------------------


def sample_images(run: Path, root: Path, read: Mapping, count: int = IMAGES) -> tuple[np.ndarray, list[str]]:
    """Read images of a run's test split, evenly spread over it, as its training read them.

    Returns:
        uint8 (num_images, height, width, 1), at most `count`, and their paths relative to the data root.

    Raises:
        FileNotFoundError: none of them can be read under the data root.
    """
    rows = pd.read_csv(run / "split.csv", dtype=str, keep_default_na=False)
    if "fold" in rows:  # the networks of a run are those of its first
        rows = rows[rows["fold"] == min(rows["fold"], key=int)]
    paths = rows.loc[rows["split"].str.startswith("test"), "image_path"].drop_duplicates()
    paths = spread(paths[[(Path(root) / path).is_file() for path in paths]].tolist(), count)
    options = pipelines.decode_options(read)
    pixels, _, _, reasons = pipelines.decode_files(Path(root), paths, options["image_size"], options["read_options"])
    readable = reasons == ""
    if not readable.any():
        raise FileNotFoundError(f"no image of the test split of {run.name} can be read under {root}.")
    return pixels[readable][..., None], [path for path, kept in zip(paths, readable) if kept]


def samples_of_images(
    run: Path, root: Path, networks: Sequence[Network], *, beside: Callable | None = None
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """Read what networks of one image are compared on; they read images alike.

    Args:
        run: a complete run folder with split.csv.
        root: data root.
        networks: of the run.
        beside: function of image paths -> further inputs, name -> array.

    Returns:
        Network -> its inputs, and what they are, in words.

    Raises:
        FileNotFoundError: as of `sample_images`.
    """
    pixels, paths = sample_images(run, root, networks[0].read)
    inputs = {"image": pixels, **(beside(paths) if beside else {})}
    return {network.name: inputs for network in networks}, f"{len(pixels)} images of the test split"


def read_options(parameters: Mapping) -> dict:
    """Pick what `kerasmed.images.read` is given out of a run's parameters."""
    return {name: parameters[name] for name in ("image_size", "fit", "interpolation", "equalize")}


def spread(values: list, count: int) -> list:
    """Pick at most `count` values, evenly spread and the first among them.

    Example:
        >>> spread(["a", "b", "c", "d"], 2)
        ['a', 'c']
    """
    return values[:: max(1, -(-len(values) // count))]


def noise(model: keras.Model, count: int = IMAGES, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw what a network takes: numbers without meaning, of the right shapes and types; a free length is 16.

    Returns:
        Input -> array (count, ...).
    """
    rng, drawn = np.random.default_rng(seed), {}
    for tensor in model.inputs:
        shape = (count, *(side or 16 for side in tensor.shape[1:]))
        if tensor.dtype == "uint8":
            drawn[tensor.name] = rng.integers(0, 256, shape, dtype=np.uint8)
        elif tensor.dtype == "bool":  # what is there of a study: at least the first of each
            drawn[tensor.name] = rng.random(shape) < 0.7
            drawn[tensor.name][..., 0] = True
        else:
            drawn[tensor.name] = rng.normal(size=shape).astype(tensor.dtype)
    return drawn


# --- conversion ------------------------------------------------------------------------------------------------------


def as_float32(model: keras.Model) -> keras.Model:
    """Return a network that computes in float32 with the weights of one that was trained in mixed precision.

    The weights are the same float32 numbers in both. What the mixed network rounds to 16 bits from layer to layer this
    one does not: it answers a little otherwise than the one that was measured; see `rounding`.
    """
    text = json.dumps(keras.saving.serialize_keras_object(model))
    plain = re.sub(r'"(mixed_)?b?float16"', '"float32"', text)
    if plain == text:
        return model
    made = keras.saving.deserialize_keras_object(json.loads(plain))
    made.set_weights(model.get_weights())
    for layer in made._flatten_layers():
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it computes with constants made of its weights
    return made


def convert(model: keras.Model, format: str, path: Path, *, output: str = "probabilities") -> None:
    """Write a network in a format, for batches of any size.

    Args:
        model: of float32; see `as_float32`.
        format: of `FORMATS`.
        path: file, or folder of a SavedModel, that does not exist.
        output: name of what it gives; inputs keep their names.

    Raises:
        ImportError: as of `check_format`.
        ValueError: the format cannot express an operation; names it, the layers that use it, and what to use instead.
    """
    import tensorflow as tf

    check_format(format)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization) and layer.mean is not None:
            # Tensors from outside the trace would become further inputs in ONNX; arrays are constants.
            layer.mean, layer.variance = (np.asarray(each) for each in (layer.mean, layer.variance))
    signature = [tf.TensorSpec(tensor.shape, tensor.dtype, name=tensor.name) for tensor in model.inputs]

    @tf.function(input_signature=signature)
    def answer(*arrays):
        return {output: model(keras.tree.pack_sequence_as(model.input, list(arrays)), training=False)}

    concrete = answer.get_concrete_function()
    try:
        {"onnx": _write_onnx, "saved_model": _write_saved_model, "litert": _write_litert}[format](
            model, answer, concrete, path
        )
    except Exception as error:  # converters raise classes of their own, and plain ones
        operations = _operations(str(error))
        layers = _layers(model, concrete, operations)
        if not layers:
            raise ValueError(f"{model.name} cannot be written as {format}: {_first_line(error)}.") from error
        others = " or ".join(name for name in FORMATS if name not in (format, "litert"))
        raise ValueError(
            f"{format} has no {', '.join(sorted(operations))}, which {model.name} uses in {_some(layers)}; export this "
            f"run as {others}, or train a network without such layers."
        ) from error


def _write_onnx(model, answer, concrete, path):
    import onnx
    import tf2onnx

    proto, _ = tf2onnx.convert.from_function(answer, input_signature=answer.input_signature, opset=OPSET)
    taken = {value.name for value in proto.graph.input}
    if taken != {tensor.name for tensor in model.inputs}:
        raise ValueError(f"it takes {sorted(taken)} in ONNX, and {[tensor.name for tensor in model.inputs]} in Keras")
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, side in enumerate(value.type.tensor_type.shape.dim):
            if not side.HasField("dim_value"):
                side.dim_param = f"{value.name}_{axis}" if axis else "batch"
    del proto.graph.value_info[:]  # which knows the free sides by the converter's own names
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


def _write_saved_model(model, answer, concrete, path):
    import tensorflow as tf

    tf.saved_model.save(_module(model, answer), str(path), signatures={"serving_default": concrete})


def _write_litert(model, answer, concrete, path):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], _module(model, answer))
    with _silent():
        content = converter.convert()
    path.write_bytes(content)


def _module(model, answer):
    """What holds a trace's variables."""
    import tensorflow as tf

    module = tf.Module()
    module.variables_, module.answer = [variable.value for variable in model.variables], answer
    return module


@contextlib.contextmanager
def _silent():
    """Keep what the converter's compiler writes past Python, pages about one operation, off the terminal."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _operations(message: str) -> set[str]:
    """Names of the operations that a converter's error speaks of."""
    listed = re.findall(r"TF Select ops: ([\w, ]+)", message)
    single = re.findall(r"'tf\.(\w+)' op|Tensorflow op \[[^:\]]*: (\w+)\]", message)
    counted = re.findall(r"Unsupported ops: Counter\(\{(.*?)\}\)", message)
    found = {name for text in listed for name in text.split(", ")} | {name for pair in single for name in pair if name}
    return found | {name for text in counted for name in re.findall(r"'(\w+)'", text)}


def _layers(model, concrete, operations: set[str]) -> list[str]:
    """Names of the layers in which a trace uses operations."""
    graph = concrete.graph.as_graph_def()
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    used = [node.name.split("/") for node in nodes if node.op in operations]
    # A layer that is traced again gets a number after its name.
    parts = {name for path in used for part in path for name in (part, re.sub(r"_\d+$", "", part))}
    layers = [layer.name for layer in model._flatten_layers() if not isinstance(layer, keras.Model)]
    return [name for name in layers if name in parts]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more layers" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300].rstrip('.')}"


# --- comparison ------------------------------------------------------------------------------------------------------


def open_exported(format: str, path: Path, output: str) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
    """Open an exported network in its own runtime, on the CPU: a function of inputs by name."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda inputs: session.run([output], dict(inputs))[0]
    if format == "saved_model":
        import tensorflow as tf

        loaded = tf.saved_model.load(str(path))
        answer = loaded.signatures["serving_default"]

        def run(inputs, _keep=loaded):  # the signature alone does not keep the variables alive
            return answer(**{name: tf.constant(values) for name, values in inputs.items()})[output].numpy()

        return run
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(path)).get_signature_runner("serving_default")
    return lambda inputs: runner(**inputs)[output]


def compare(model: keras.Model, exported: Callable, inputs: Mapping[str, np.ndarray]) -> dict:
    """Ask a Keras model and its export the same: in one batch, in a batch of one row, and in one of an odd size.

    Returns:
        {"max_difference": the largest absolute difference, "tolerance": what it may be, "batches": sizes}. The
        tolerance is `TOLERANCE`, times the largest value where that is above 1, as it is of features.

    Raises:
        ValueError: shapes differ, or one has NaN where the other has a number, or the Keras model answers no number,
            or the runtime takes no such batch.
    """
    count = len(next(iter(inputs.values())))
    worst, largest, sizes = 0.0, 1.0, sorted({1, min(ODD_BATCH, count), count})
    for size in sizes:
        given = {name: values[:size] for name, values in inputs.items()}
        expected = np.asarray(model.predict_on_batch(keras.tree.pack_sequence_as(model.input, _ordered(model, given))))
        try:
            told = np.asarray(exported(given))
        except Exception as error:  # runtimes raise classes of their own
            raise ValueError(f"{model.name}, exported, takes no batch of {size}: {_first_line(error)}.") from error
        if told.shape != expected.shape or (np.isnan(told) != np.isnan(expected)).any():
            raise ValueError(
                f"{model.name}, exported, answers a batch of {size} by shape {told.shape} with {np.isnan(told).sum()} "
                f"NaN; expected {expected.shape} with {np.isnan(expected).sum()}."
            )
        numbers = np.isfinite(expected)
        if not numbers.any():
            raise ValueError(f"{model.name} answers a batch of {size} by no finite number: nothing can be compared.")
        largest = max(largest, float(np.abs(expected[numbers]).max()))
        apart = np.subtract(
            told, expected, where=told != expected, out=np.zeros(expected.shape)
        )  # 0 of equal infinities
        worst = max(worst, float(np.nanmax(np.abs(apart))))
    return {"max_difference": worst, "tolerance": TOLERANCE * largest, "batches": sizes}


def rounding(model: keras.Model, plain: keras.Model, inputs: Mapping[str, np.ndarray]) -> dict:
    """Say in which precision a network was measured, and how far it is from its float32 form.

    Returns:
        {"measured_in": names of dtype policies, "float32_difference": the largest absolute difference of their answers
        to `ODD_BATCH` rows at most; 0 where the two are one; None where this processor has no such operation in 16
        bits}.
    """
    import tensorflow as tf

    if model is plain:
        return {"measured_in": "float32", "float32_difference": 0.0}
    policies = {layer.dtype_policy.name for layer in model._flatten_layers()} - {"float32"}
    found = {"measured_in": ", ".join(sorted(policies)), "float32_difference": None}
    given = {name: values[:ODD_BATCH] for name, values in inputs.items()}
    with contextlib.suppress(tf.errors.OpError):
        one, other = (
            np.asarray(each.predict_on_batch(keras.tree.pack_sequence_as(each.input, _ordered(each, given))), float)
            for each in (model, plain)
        )
        found["float32_difference"] = float(np.nanmax(np.abs(one - other), initial=0))
    return found


def _ordered(model, inputs):
    return [inputs[tensor.name] for tensor in model.inputs]


# --- a run -----------------------------------------------------------------------------------------------------------


def write(
    run: Path,
    format: str,
    networks: Sequence[Network],
    samples: Mapping[str, Mapping[str, np.ndarray]] | None,
    out: Path,
    *,
    sampled: str = "",
    truth: Mapping | None = None,
) -> list[dict]:
    """Export a run's networks into one folder, which gets its name when all of it is written and compared.

    In the folder: a file (or, of a SavedModel, a folder) for each network, preprocessing.json, parity.json and
    model_card.md. An earlier export there is replaced once the new one is whole.

    Args:
        run: a complete run folder.
        format: of `FORMATS`.
        networks: what to export.
        samples: network -> its inputs, of real pixels; None to compare on noise, which the card says aloud.
        out: the folder.
        sampled: what the samples are, in words.
        truth: of `kerasmed.datasets.truth`.

    Returns:
        Records of parity.json: network, max_difference, tolerance, batches, rows, pixels, runtime, and of `rounding`.

    Raises:
        FileExistsError: `out` holds something that no earlier export has written; names it.
        ValueError: as of `check_weights` and `convert`; or an export answers otherwise than its origin, by how much.
    """
    check_format(format)
    ending, _, distribution = FORMATS[format]
    hashes = check_weights(run, networks)
    out = out.resolve()  # a link to a folder stays
    if out.exists():
        _refuse_others(out)
    parents = [folder for folder in (out.parent,) if not folder.exists()]
    records, described = [], {}
    try:
        with atomic.whole_folder(out) as folder:
            for network in networks:
                loaded = network.load()
                model = as_float32(loaded)
                path = folder / f"{network.name}{ending}"
                convert(model, format, path, output=network.output)
                inputs = noise(model) if samples is None else samples[network.name]
                found = compare(model, open_exported(format, path, network.output), inputs)
                if found["max_difference"] > found["tolerance"]:
                    raise ValueError(
                        f"{network.name} as {format} is not the network that was measured: its answers differ from "
                        f"those of {', '.join(network.files)} by up to {found['max_difference']:.2g}, more than "
                        f"{found['tolerance']:.2g}. Nothing was written; use another format."
                    )
                records.append(
                    {
                        "network": network.name,
                        **found,
                        "rows": len(next(iter(inputs.values()))),
                        "pixels": sampled if samples is not None else "noise, no image of the run",
                        "runtime": f"{distribution} {importlib.metadata.version(distribution)}",
                        **rounding(loaded, model, inputs),
                    }
                )
                described[network.name] = _describe(network, model, path.name, hashes)
            about = {
                "run": run.name,
                "data_source": runs.read_json(run / "environment.json")["data_source"],
                "format": format,
                "networks": described,
            }
            runs.write_json(folder / ABOUT, about)
            runs.write_json(folder / PARITY, {"checked": samples is not None, "networks": records})
            card = model_card.text(run, about, records, checked=samples is not None, truth=truth or {})
            with atomic.whole(folder / CARD) as temporary:
                temporary.write_text(card, encoding="utf-8")
            if out.exists():
                shutil.rmtree(out)
    except BaseException:
        for parent in parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    return records


def _refuse_others(out: Path) -> None:
    """Raise where a folder is no earlier export, or holds more than that has written."""
    if not out.is_dir() or not (out / PARITY).exists():
        raise FileExistsError(f"{out} is there and holds no export; name another folder with --out.")
    written = {ABOUT, PARITY, CARD}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # of a damaged one: none
        written |= {each["file"] for each in runs.read_json(out / ABOUT)["networks"].values()}
    others = sorted(path.name for path in out.iterdir() if path.name not in written)
    if others:
        raise FileExistsError(
            f"{out} holds {', '.join(others[:3])} beside an earlier export, which is replaced as a whole; move that "
            "away, or name another folder with --out."
        )


def _describe(network: Network, model: keras.Model, file: str, hashes: Mapping) -> dict:
    """Say what a network takes and gives, for programs."""
    inputs = [
        {"name": each.name, "dtype": each.dtype, "shape": list(each.shape), "holds": network.extra.get(each.name)}
        for each in model.inputs
    ]
    return {
        "file": file,
        "made_of": {name: hashes[name] for name in network.files},
        "parameters": model.count_params(),
        "inputs": inputs,
        "output": {"name": network.output, "dtype": "float32", "shape": list(model.outputs[0].shape)},
        "class_names": list(network.class_names),
        "answer": network.answer,
        "thresholds": dict(network.thresholds),
        "read": dict(network.read),
    }
