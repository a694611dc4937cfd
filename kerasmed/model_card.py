"""What is known of a run's networks, as text to go with them: whence, how good, for what, and how to use them.

Nothing is measured here: all is read from the run's own files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from kerasmed import datasets, runs

MAX_ROWS = 60  # of figures beside the headline
# Parameters that say how a network was trained, where a notebook has them.
TRAINING = (
    *("profile", "seed", "network", "networks", "architectures", "strategies", "weights", "heads", "loss", "focusing"),
    *("class_weights", "optimizer", "learning_rate", "schedule", "batch_size", "epochs", "stop_patience", "dropout"),
    *("augmentation", "policy", "folds", "precision"),
)
_OPEN = {
    "onnx": (
        "import onnxruntime\n",
        'session = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])\n'
        'told = session.run(["{output}"], inputs)[0]\n',
    ),
    "saved_model": (
        "import tensorflow as tf\n",
        'network = tf.saved_model.load("{file}")\n'
        'answer = network.signatures["serving_default"]\n'
        'told = answer(**{{name: tf.constant(values) for name, values in inputs.items()}})["{output}"].numpy()\n',
    ),
    "litert": (
        "from ai_edge_litert.interpreter import Interpreter\n",
        'runner = Interpreter(model_path="{file}").get_signature_runner("serving_default")\n'
        'told = runner(**inputs)["{output}"]\n',
    ),
}


def text(run: Path, about: Mapping, parity: Sequence[Mapping], *, checked: bool, truth: Mapping) -> str:
    """Write the card of an export.

    Args:
        run: a complete run folder.
        about: of preprocessing.json: run, data_source, format, networks.
        parity: records of parity.json.
        checked: whether the export was compared on images of the run.
        truth: of `kerasmed.datasets.truth`; {} where it is not known.

    Returns:
        Markdown.
    """
    parameters, environment, state, metrics = (
        runs.read_json(run / f"{name}.json") for name in ("params", "environment", "status", "metrics")
    )
    synthetic = environment["data_source"] == "synthetic"
    parts = [
        f"# {run.name}, as {about['format']}",
        "**SYNTHETIC DATA: trained on drawings. Its answers say nothing of patients.**" if synthetic else "",
        "" if checked else "**NOT COMPARED ON IMAGES: whether it answers as the measured network does is not known.**",
        _networks(about),
        _parity(parity),
        _data(run, state["system"], environment, truth),
        _training(parameters, environment, metrics),
        _figures(metrics),
        _use(run, parameters),
        "\n\n".join(["## How to use it", *(_how(about["format"], each) for each in about["networks"].values())]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def snippet(format: str, network: Mapping) -> str:
    """Write Python that asks one exported network, from the export's folder: one image, or zeros where it takes none.

    Args:
        format: "onnx", "saved_model" or "litert".
        network: its entry in preprocessing.json.
    """
    read, inputs = network["read"], []
    lines = ["import numpy as np", _OPEN[format][0].strip()]
    if "fit" in read:  # images, which the package's one reader reads
        lines += ["", "from kerasmed import images"]
        options = f"image_size={tuple(read['image_size'])}, " + ", ".join(
            f"{name}={read[name]!r}" for name in ("fit", "interpolation", "equalize")
        )
        lines += ["", f'pixels = images.read("image.png", {options})']
    else:
        lines.append("")
    for each in network["inputs"]:
        shape = (1, *(side or 16 for side in each["shape"][1:]))
        if each["name"] == "image" and "fit" in read:
            value = "pixels[None, :, :, None]"
        elif each["holds"] and "NaN" in each["holds"]:
            value = f"np.full({shape}, np.nan, np.{each['dtype']})"
        else:
            value = f"np.{'ones' if each['dtype'] == 'bool' else 'zeros'}({shape}, np.{each['dtype']})"
        inputs.append(f'    "{each["name"]}": {value},')
    lines += ["inputs = {", *inputs, "}"]
    opened = _OPEN[format][1].format(file=network["file"], output=network["output"]["name"])
    names = network["class_names"]
    if not names:
        shown = "print(told.shape)"
    elif len(network["output"]["shape"]) == 2:
        shown = f"print(dict(zip({names}, told[0].round(3).tolist())))"
    else:
        shown = f"print({names}, told[0].round(3))"
    return "\n".join([*lines, opened + shown])


def _how(format, network):
    return f"`{network['file']}`, in this folder:\n\n```python\n{snippet(format, network)}\n```"


def _networks(about):
    lines = ["## What it takes and gives", ""]
    for name, each in about["networks"].items():
        shape = " × ".join("any" if side is None else str(side) for side in each["output"]["shape"])
        lines.append(f"- **{name}**, `{each['file']}`, {each['parameters']:,} parameters")
        for taken in each["inputs"]:
            sides = " × ".join("any" if side is None else str(side) for side in taken["shape"])
            holds = f": {taken['holds']}" if taken["holds"] else ""
            lines.append(f"  - takes `{taken['name']}`, {taken['dtype']}, {sides}{holds}")
        classes = f": {', '.join(each['class_names'])}" if each["class_names"] else ""
        lines.append(f"  - gives `{each['output']['name']}`, float32, {shape}{classes}")
        lines.append(f"  - {each['answer']}")
        if each["thresholds"]:
            told = ", ".join(f"{label} {value:.4f}" for label, value in each["thresholds"].items())
            lines.append(f"  - thresholds, tuned on the validation split: {told}")
        read = ", ".join(f"{key} {value}" for key, value in each["read"].items())
        lines.append(f"  - read with: {read}")
        lines += [f"  - made of `{file}`, SHA-256 `{digest}`" for file, digest in each["made_of"].items()]
    if all("fit" in each["read"] for each in about["networks"].values()):
        lines += [
            "",
            "Images are read by `kerasmed.images.read`: one channel of 8 bits (colour as ITU-R 601 luma, deeper pixels "
            "scaled by their own range), resized by OpenCV. Whatever reads them otherwise asks another question.",
        ]
    return "\n".join(lines)


def _parity(records):
    lines = [
        "## Compared with the Keras model",
        "",
        "| network | largest difference | allowed | rows | batches | of | runtime |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in records:
        batches = ", ".join(map(str, each["batches"]))
        lines.append(
            f"| {each['network']} | {each['max_difference']:.2g} | {each['tolerance']:.2g} | {each['rows']} | "
            f"{batches} | {each['pixels']} | {each['runtime']} |"
        )
    lines += ["", "Both computed in float32 on a CPU."]
    for each in records:
        if each.get("measured_in", "float32") != "float32":
            apart = each["float32_difference"]
            told = "an unknown amount" if apart is None else f"{apart:.2g} at most"
            lines += [
                "",
                f"**{each['network']} was measured in {each['measured_in']}**; it is written, and was compared, in "
                "float32 with the same weights, where nothing is rounded to 16 bits. From the measured network's, its "
                f"answers to the first of these rows differ by {told}.",
            ]
    return "\n".join(lines)


def _data(run, system, environment, truth):
    lines = ["## Data", "", f"{environment['data_source'].capitalize()}, system {system}, fingerprint "]
    lines[-1] += f"`{environment['fingerprint']}`."
    sources = datasets.reader(system).SOURCES
    if environment["data_source"] == "synthetic":
        lines.append(f"Drawn by the package in the layout of the real set{'s' if len(sources) > 1 else ''}:")
    lines += ["", *(f"- {part}: {link} ({licence})" for part, (link, licence) in sources.items())]
    lines += [] if sources else ["- no public link is known"]
    if (run / "split.csv").exists():
        lines += ["", *_split(pd.read_csv(run / "split.csv", dtype=str, keep_default_na=False))]
    if truth.get("ceiling"):
        lines += [
            "",
            "Best attainable on each part of the synthetic set, as it was drawn (`test` above may be its `valid`):",
            "",
        ]
        lines += [f"- {name}: {value}" for name, value in _flat({k: v for k, v in truth.items() if "ceiling" in k})]
    return "\n".join(lines)


def _split(rows):
    """Count a split's rows, groups and patients; of several folds those of the first, whose networks are exported."""
    lines = []
    if "fold" in rows and rows["fold"].nunique() > 1:
        lines += [f"First of {rows['fold'].nunique()} folds, whose networks these are:", ""]
        rows = rows[rows["fold"] == min(rows["fold"], key=int)]
    lines += ["| split | rows | groups | patients |", "|---|---|---|---|"]
    for name, part in rows.groupby("split", sort=False):
        known = part.loc[part["patient_id"] != "", "patient_id"].nunique()
        lines.append(f"| {name} | {len(part)} | {part['group_id'].nunique()} | {known or 'unknown'} |")
    return lines


def _flat(value, where=""):
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{where}, {name}" if where else str(name))
    else:
        yield where, f"{value:.3f}" if isinstance(value, float) else value


def _training(parameters, environment, metrics):
    lines = ["## Training", "", "| | |", "|---|---|"]
    for name in TRAINING:
        if name in parameters:
            value = parameters[name]
            lines.append(f"| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |")
    versions = environment.get("versions", {})
    known = [f"{name} {version}" for name, version in versions.items() if version]
    lines.append(f"| commit | {environment.get('commit') or 'unknown'} |")
    lines.append(f"| versions | {', '.join(known) or 'unknown'} |")
    chosen = metrics.get("chosen_by")
    if chosen:
        lines.append(f"| chosen by | {chosen['metric']} {chosen['value']:.4f} on {chosen['split']} |")
    return "\n".join(lines)


def _figures(metrics):
    """Headline rows, and the other rows of their variants and metrics, such as of classes and subgroups."""
    headline = metrics["headline"]
    lines = [
        "## Figures",
        "",
        "Value with 95 % interval, and the difference to the strongest baseline. From the run's metrics.json.",
        "",
        *_table(headline),
    ]
    asked = {(row["variant"], row["metric"]) for row in headline}
    names = {_name(row) for row in headline}
    others = [row for row in metrics["rows"] if (row["variant"], row["metric"]) in asked and row["value"] is not None]
    others = [row for row in others if _name(row) not in names]
    if others:
        lines += ["", "By class, part of the test and subgroup:", "", *_table(others[:MAX_ROWS])]
    if len(others) > MAX_ROWS:
        lines += ["", f"And {len(others) - MAX_ROWS} more in metrics.json."]
    return "\n".join(lines)


def _name(row):
    return tuple(row.get(name) for name in ("task", "variant", "split", "metric", "label"))


def _table(rows):
    lines = [
        "| task | variant | split | metric | label | value | 95 % | n | groups | baseline | difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        baseline = row.get("baseline") or {}
        difference, against = "", ""
        if baseline:
            against = f"{baseline.get('variant', '')} {_number(baseline.get('value'))}"
            difference = f"{_number(baseline.get('difference'))} {_interval(baseline.get('difference_ci95'))}".strip()
        lines.append(
            f"| {' | '.join(str(row.get(name, '')) for name in ('task', 'variant', 'split', 'metric', 'label'))} | "
            f"{_number(row['value'])} | {_interval(row.get('ci95'))} | {row.get('n', '')} | "
            f"{row.get('n_groups', '')} | {against} | {difference} |"
        )
    return lines


def _number(value):
    return "" if value is None else f"{value:.3f}"


def _interval(ends):
    return f"[{_number(ends[0])}, {_number(ends[1])}]" if ends else ""


def _use(run, parameters):
    lines = [
        "## Use and limits",
        "",
        "For research. Not a medical device, not for diagnosis, and not tested on data from anywhere else than above.",
    ]
    accepted = parameters.get("accepted")
    if accepted:
        lines += [
            "",
            f"Findings let through the audit's gate: {', '.join(accepted)}. The figures may be too good.",
        ]
    stated = _limits(run / "notebook.ipynb")
    return "\n".join([*lines, *(["", "What the notebook says of them:", "", stated] if stated else [])])


def _limits(notebook: Path) -> str:
    """Take the text under the heading Limits out of the executed notebook; "" where there is none."""
    if not notebook.exists():
        return ""
    for cell in runs.read_json(notebook)["cells"]:
        content = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and content.startswith("## Limits"):
            return content.partition("\n")[2].strip()
    return ""
