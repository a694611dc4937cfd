"""The cascade of notebook 08_brain_cascade in a browser: images of one person in, the path and its probabilities out.

`kerasmed app` starts Streamlit on this file, on this machine alone. An upload stays in memory, of the server's process
and of the session that sent it; nothing of it is written or logged. File names come from outside and may be anything:
they are shown as plain text, never as Markdown or HTML, which could ask another host for a picture.

Settings come by the environment: KERASMED_MODELS, the folder of runs, and KERASMED_RUN, a run or "auto".
"""

import hashlib
import html
import os
import sys
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Streamlit puts the script's folder first in the path, where `datasets` and others of ours would hide packages.
    sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
import streamlit as st
from starlette.formparsers import MultiPartParser

from kerasmed import environment, images, localisation, runs
from kerasmed.presentation import (
    DEAD_WORDS,
    OUTCOME_WORDS,
    QUESTIONS,
    STYLE,
    enlarge,
    metric_rows,
    overlay,
    plain,
    share,
    slice_outcomes,
    spread,
    steps,
    threshold_words,
    why_other,
    worth,
)
from kerasmed.runs import read_json
from kerasmed.serving import MAX_MEGABYTES, MAX_MEGAPIXELS, NOTEBOOK

# The recipe, which loads TensorFlow, is imported where it is needed: title and notice appear at once.

MAX_SLICES = 40
EXPECTED = (
    f"Expected: PNG, JPEG, BMP, TIFF or DICOM of one frame, at most {MAX_MEGABYTES} MB and "
    f"{MAX_MEGAPIXELS} megapixels a file."
)
NOTICE = "**Research software, no diagnosis.** Its answers are often wrong and must not guide anybody's care."


# --- reading ---------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What is kept of the uploads: never the files themselves."""

    names: list[str]  # of the slices that were read
    pictures: list[np.ndarray]  # as they are shown
    overlays: list[np.ndarray]
    status: list[str]  # of each map: `localisation.STATUSES`
    problems: list[tuple[str, str]]  # name and reason of the others
    reading: object | None  # `Reading`; None where no slice was read


def look(cascade, files: Sequence) -> Look:
    """Read uploads as slices of one person, predict and explain; what cannot be read is left out and named.

    Args:
        cascade: `BrainCascade`.
        files: binary file objects with `name`; their content decides what they are.
    """
    names, pixels, pictures, sizes, problems = [], [], [], [], []
    for file in files:
        try:
            if file.seek(0, os.SEEK_END) > MAX_MEGABYTES * 2**20:
                raise images.ImageError(f"larger than {MAX_MEGABYTES} MB")
            if len(names) == MAX_SLICES:
                raise images.ImageError(f"one of too many: {MAX_SLICES} slices are read at once")
            file.seek(0)
            header = images.read_header(file)
            if header.height * header.width > MAX_MEGAPIXELS * 10**6:
                raise images.ImageError(f"{header.width}×{header.height} pixels, more than {MAX_MEGAPIXELS} megapixels")
            file.seek(0)
            picture = images.read(file)
        except (images.ImageError, ValueError, OSError) as error:
            problems.append((plain(file.name), plain(str(error), 300)))
            continue
        names.append(plain(file.name))
        pixels.append(cascade.read(picture))
        sizes.append(picture.shape)
        pictures.append(enlarge(picture))
    if not names:
        return Look([], [], [], [], problems, None)
    reading = cascade.answer(np.stack(pixels))
    maps = cascade.explain(reading)
    overlays = [
        overlay(picture, spread(heat, size, picture.shape, cascade.read_options))
        for picture, heat, size in zip(pictures, maps.heat, sizes)
    ]
    return Look(names, pictures, overlays, list(maps.status), problems, reading)


@st.cache_resource(max_entries=1, show_spinner="Loading the networks …")
def _load(folder: str, finished: str):
    """The cascade of a run that finished then, and a lock: sessions share the networks and take turns."""
    environment.setup(seed=0, devices=[])  # one: batches are small
    from kerasmed.systems.brain import BrainCascade

    cascade = BrainCascade.load(Path(folder) / "cascade")
    cascade.explain(cascade.predict(np.zeros(cascade.read_options["image_size"], np.uint8)))  # the first call is slow
    return cascade, threading.Lock()


def _look_once(cascade, lock, key: tuple, files) -> Look:
    """`look`, or what this session found for the same model and files; of earlier uploads nothing is kept."""
    key = (*key, *((file.name, hashlib.sha256(file.getbuffer()).hexdigest()) for file in files))
    if st.session_state.get("key") != key:
        st.session_state.pop("key", None)
        with st.spinner(f"Looking at {len(files)} file{'s' * (len(files) > 1)} …"), lock:
            st.session_state["look"] = look(cascade, files)
        st.session_state["key"] = key
    return st.session_state["look"]


# --- page ------------------------------------------------------------------------------------------------------------


def _html(body: str):
    st.html(f'<div class="km">{body}</div>')


def _number(probability):
    return html.escape(share(probability))


def _card(run: Path, cascade):
    """The model: its name, on what it was trained, what it is worth, and its threshold."""
    metrics, parameters = read_json(run / "metrics.json"), read_json(run / "params.json")
    words = (
        "Slices: each by itself; people: all slices of a person together.",
        worth(metrics["headline"]),
        threshold_words(cascade.threshold, parameters, metrics["rows"], folds=cascade.about.get("folds", 1)),
    )
    if metrics["data_source"] == "synthetic":
        st.error(
            "**Trained on SYNTHETIC data: its answers mean nothing on real images.** This model shows how the page "
            "works, and no more."
        )
    cells = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
        for row in metric_rows(metrics["headline"])
    )
    with st.container(border=True):
        _html(
            f"<b>{html.escape(run.name)}</b>, trained on {html.escape(metrics['data_source'])} images"
            f"<table><tr><th>on test images</th><th>value [95 % interval]</th><th>baseline</th></tr>{cells}</table>"
            f"<small>{html.escape(' '.join(filter(None, words)))}</small>"
        )


def _answer(found: Look, cascade):
    """Outcome, path and probabilities."""
    reading = found.reading
    slices = f"{len(found.names)} slice{'s' * (len(found.names) > 1)}"
    _html(
        f"<small>From {slices}, the path ends at</small><div class='big'>{OUTCOME_WORDS[reading.outcome]}</div>"
        f"<small><code>{reading.outcome}</code>, joint probability {_number(reading.joint[reading.outcome])}</small>"
    )
    other = why_other(reading, cascade.threshold)
    if other:
        st.warning(other)
    st.subheader("The path", anchor=False)
    st.caption("Each question has a network of its own; the number is that network's probability of its answer.")
    _html(
        "".join(
            f"<div class='step'><span>{step['question']}</span>"
            f"<b>{step['answer']} {html.escape(step['probability'])}</b>"
            f"<small>{html.escape(step['own'])}</small>"
            f"<small>{html.escape(step['caution'])}</small></div>"
            for step in steps(reading, cascade.threshold)
        )
    )
    st.subheader("All seven outcomes", anchor=False)
    st.caption("Joint probabilities, the products along each path; they sum to 1. The path's outcome is dark.")
    _html(
        "".join(
            f"<div class='bar{' path' * (name == reading.outcome)}'><span>{OUTCOME_WORDS[name]}</span>"
            f"<span><i style='width:{100 * value:.2f}%'></i></span><span>{_number(value)}</span></div>"
            for name, value in reading.joint.items()
        )
    )


def _slices(found: Look, cascade):
    """Each slice beside its map, and how the slices disagree."""
    stage, answer, _ = found.reading.path[-1]
    own = slice_outcomes(found.reading, cascade.threshold)
    st.subheader("Where the network looked", anchor=False)
    st.caption(
        f"Grad-CAM of the deciding stage, {stage}, for {answer}: the hotter, the more the place speaks for it, as a "
        "share of the map's own maximum. It shows where the network looked, not where a disease is."
    )
    if len(own) > 1:
        counts = [f"{OUTCOME_WORDS[name]} ({own.count(name)})" for name in OUTCOME_WORDS if name in own]
        alike = "The slices agree" if len(counts) == 1 else "The slices disagree"
        st.markdown(f"{alike}. Each alone ends at: {', '.join(counts)}.")
    shown = zip(found.names, found.pictures, found.overlays, found.status, own)
    for number, (name, picture, explained, status, outcome) in enumerate(shown):
        with st.container(border=True, key=f"slice-{number}"):
            st.text(name)
            if len(own) > 1:
                st.caption(f"This slice alone ends at: {OUTCOME_WORDS[outcome]}")
            heat = f"Grad-CAM, {stage}: {answer}" if status == localisation.OK else f"Grad-CAM: {DEAD_WORDS[status]}"
            for column, pixels, caption in zip(st.columns(2), (picture, explained), ("image", heat)):
                column.image(pixels, caption, width="stretch", output_format="PNG")


def _numbers(reading):
    with st.expander("All stages' numbers"):
        st.caption(
            "On the path or not; of several slices, means. A stage off the path was asked about nothing it knows."
        )
        for stage, told in reading.stages.items():
            cells = "".join(f"<tr><td>{name}</td><td>{value:.4f}</td></tr>" for name, value in told.items())
            _html(f"<b>{stage}</b> {QUESTIONS[stage]}<table>{cells}</table>")


def _problems(found: Look):
    total = len(found.names) + len(found.problems)
    st.error(f"{len(found.names)} of {total} slices read. What could not be read is left out. {EXPECTED}")
    with st.container(border=True):
        for name, reason in found.problems:
            st.text(f"{name}: {reason}")


def _no_run(error: Exception):
    st.error("No model to show.")
    st.text(str(error))
    st.markdown("On synthetic data, to try the page, this makes one in a few minutes:")
    st.code("kerasmed run 07_brain_mri 08_brain_cascade --profile demo", language=None)
    st.markdown("On real images, which lie in `DIR/brain` (`kerasmed data fetch brain` gets them):")
    st.code("kerasmed run 07_brain_mri 08_brain_cascade --profile cpu --data-root DIR", language=None)
    st.markdown("Then reload this page.")


def _damaged_run(told: object):
    st.error("The model cannot be loaded: its run is damaged. Make it anew with `kerasmed run --force`.")
    st.text(plain(str(told), 600))


def page():
    """Draw the page; Streamlit calls it anew at every change."""
    # Streamlit hands uploads on in memory, but the server below it writes those above 1 MB to a temporary file first.
    MultiPartParser.spool_max_size = (MAX_MEGABYTES + 1) * 2**20
    st.set_page_config(page_title="kerasmed: brain MRI", page_icon="🧠")
    st.html(STYLE)
    with st.container(key="notice"):
        st.warning(NOTICE)
    st.title("Brain MRI: Alzheimer's or tumour?", anchor=False)
    st.markdown(
        "One slice, or several of one person: four networks say whether there is a disease, and which. They answer "
        "whatever they are shown, also what is no head."
    )
    try:
        run = runs.find("brain", NOTEBOOK, run=os.environ.get("KERASMED_RUN") or "auto")
    except runs.Damaged as error:
        return _damaged_run(error)
    except (OSError, ValueError) as error:
        return _no_run(error)
    finished = runs.status(run)["finished"]
    try:
        cascade, lock = _load(str(run), finished)
        _card(run, cascade)
    except (OSError, ValueError, TypeError, KeyError, zipfile.BadZipFile) as error:  # what broken files raise
        return _damaged_run(f"{run}: {error}")
    files = st.file_uploader(
        "Slices of **one** person: PNG, JPEG or DICOM",
        accept_multiple_files=True,
        max_upload_size=MAX_MEGABYTES,
        help=f"{EXPECTED} The content decides, not the name. Nothing leaves this machine or is kept on its disk.",
    )
    if not files:
        for name in ("key", "look"):
            st.session_state.pop(name, None)
        return None
    found = _look_once(cascade, lock, (str(run), finished), files)
    if found.problems:
        _problems(found)
    if found.reading is None:
        return None
    _answer(found, cascade)
    _slices(found, cascade)
    return _numbers(found.reading)


if __name__ == "__main__":
    page()
