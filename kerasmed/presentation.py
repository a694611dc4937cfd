"""What the app shows, made without Streamlit: a path in words, a map over its picture, numbers as people read them."""

from collections.abc import Iterator, Mapping, Sequence

import cv2
import numpy as np

from kerasmed import images, localisation

SHOWN_SIDE, MAX_ENLARGED = 480, 4  # pixels of the longer side, and how many times a small picture is enlarged at most
QUESTIONS = {
    "disease": "Is there a disease?",
    "kind": "Alzheimer's or tumour?",
    "severity": "How severe is it?",
    "type": "Which type of tumour?",
}
WORDS = {
    **{"none": "no disease", "disease": "disease", "alzheimer": "Alzheimer's", "tumour": "tumour"},
    **{"VeryMildDemented": "very mild", "MildDemented": "mild", "ModerateDemented": "moderate"},
    **{"glioma_tumor": "glioma", "meningioma_tumor": "meningioma", "pituitary_tumor": "pituitary tumour"},
}
OUTCOME_WORDS = {
    "none": "No disease",
    **{name: f"Alzheimer's, {WORDS[name]}" for name in ("VeryMildDemented", "MildDemented", "ModerateDemented")},
    **{name: f"Tumour: {WORDS[name].split()[0]}" for name in ("glioma_tumor", "meningioma_tumor", "pituitary_tumor")},
}
CAUTIONS = {
    "kind": "Caution: the two training sets come from different scanners, which alone tell them apart. This answer may "
    "know the scanner and not the disease."
}
DEAD_WORDS = {
    localisation.ZERO_GRADIENT: "no heat: the answer does not depend on what this layer sees",
    localisation.NEGATIVE: "no heat: all that this layer sees speaks against the answer",
}

STYLE = """<style>
.block-container {max-width: 50rem; padding-top: 4.8rem; padding-bottom: 4rem; overflow-wrap: anywhere}
[data-testid="stHeader"] {display: none}
.st-key-notice {position: fixed; inset: 0 0 auto 0; z-index: 999; background: #fff; padding: .5rem 1rem}
.st-key-notice > * {max-width: 48rem; margin: auto}
h1 {font-size: 2.2rem !important; padding-bottom: 0 !important}
[data-testid="stText"] {white-space: pre-wrap; overflow-wrap: anywhere}
[class*="st-key-slice"] [data-testid="stColumn"] {min-width: 8rem; flex: 1 1 8rem}
[class*="st-key-slice"] [data-testid="stHorizontalBlock"] {gap: .6rem}
.km table {border-collapse: collapse; width: 100%; font-size: .9rem; margin: .3rem 0}
.km td, .km th {padding: .15rem .6rem .15rem 0; text-align: left; border: 0; vertical-align: top; font-weight: 400}
.km th, .km small {color: #5d6673}
.km .big {font-size: 2rem; font-weight: 600; line-height: 1.25; margin: .1rem 0 .2rem}
.km .step {display: flex; flex-wrap: wrap; gap: 0 .8rem; padding: .45rem 0; border-top: 1px solid #e3e6ea}
.km .step b {flex: 1 1 8rem; text-align: right} .km .step span {flex: 1 1 10rem} .km .step small {flex: 1 1 100%}
.km .bar {display: grid; grid-template-columns: minmax(9.2rem, 13rem) 1fr 3.2rem; gap: .6rem; padding: .16rem 0}
.km .bar i {display: block; height: .8rem; margin-top: .35rem; border-radius: 2px; background: #b9c6d6}
.km .path i {background: #3b6ea5} .km .path {font-weight: 600} .km .bar span:last-child {text-align: right}
@media (max-width: 640px) {.block-container {padding-top: 7rem} h1 {font-size: 1.7rem !important}}
</style>"""


# --- words -----------------------------------------------------------------------------------------------------------


def share(probability: float) -> str:
    """Write a probability with two decimals, and never as a certainty that it is not.

    Example:
        >>> [share(value) for value in (0, 0.001, 0.456, 0.999, 1)]
        ['0.00', '<0.01', '0.46', '>0.99', '1.00']
    """
    if 0 < probability < 0.005:
        return "<0.01"
    return ">0.99" if 0.995 <= probability < 1 else f"{probability:.2f}"


def plain(name: str, most: int = 80) -> str:
    """Make a file name fit for a line: what cannot be printed becomes "?", and the middle of a long one "…"."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"


def steps(reading, threshold: float) -> list[dict]:
    """Put a path into words: of each stage question, answer, its own probability of the answer, and its own of all.

    Args:
        reading: of `BrainCascade.predict`.
        threshold: of the cascade.
    """
    told = []
    for step in reading.path:
        of_stage = reading.stages[step.stage]
        if step.stage == "disease":
            side = "reaches" if of_stage["disease"] >= threshold else "is below"
            own = f"disease: {share(of_stage['disease'])}, which {side} the threshold, {threshold:.3f}"
        else:
            own = f"{step.stage}: {', '.join(f'{name} {share(value)}' for name, value in of_stage.items())}"
        told.append(
            {
                "question": QUESTIONS[step.stage],
                "answer": WORDS[step.answer],
                "probability": share(step.probability),
                "own": own,
                "caution": CAUTIONS.get(step.stage, ""),
            }
        )
    return told


def why_other(reading, threshold: float) -> str:
    """Say why the likeliest outcome is another than the path's; "" where it is the same."""
    if reading.likeliest == reading.outcome:
        return ""
    found = reading.stages["disease"]["disease"]
    if reading.likeliest == "none" and found < 0.5:
        why = (
            f"The path goes on to a disease from a probability of {threshold:.3f}, not from 0.5: the threshold is set "
            "to miss few diseased, and so calls some people ill who are more likely not."
        )
    elif reading.outcome == "none":
        why = f"The path goes on to a disease only from a probability of {threshold:.3f}; here it is {share(found)}."
    else:
        why = (
            "The path takes the likelier answer at each question; the probability of that answer is then shared out "
            "among several outcomes, while another branch keeps most of its own for one."
        )
    return (
        f"The likeliest single outcome is another: {OUTCOME_WORDS[reading.likeliest]} "
        f"({share(reading.joint[reading.likeliest])}); the path's has {share(reading.joint[reading.outcome])}. {why}"
    )


def slice_outcomes(reading, threshold: float) -> list[str]:
    """Follow the path of each slice alone: its outcome."""
    from kerasmed.systems.brain import cascade

    ends = cascade.answers(reading.by_slice, np.full(len(reading.pixels), threshold))
    return [cascade.OUTCOMES[end] for end in ends]


def metric_rows(headline: Sequence[Mapping]) -> Iterator[tuple[str, str, str]]:
    """Put each headline number over all outcomes into words: what, value with interval, and the baseline beside it."""
    for row in headline:
        if row["label"] != "all":
            continue
        low, high = row.get("ci95") or (None, None)
        interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
        baseline = row["baseline"]
        yield (
            f"{row['metric']}, {row['task']}".replace("_", " "),
            f"{row['value']:.3f}{interval}",
            f"{baseline['value']:.3f} ({baseline['variant'].replace('_', ' ')})",
        )


def worth(headline: Sequence[Mapping]) -> str:
    """Say which of the numbers over all outcomes the strongest baseline does better or as well; "" where none."""
    rows = [row for row in headline if row["label"] == "all"]
    below = [row for row in rows if row["value"] <= row["baseline"]["value"]]
    if not below:
        return ""
    names = ", ".join(f"{row['metric']}, {row['task']}".replace("_", " ") for row in below)
    which = "Every number here is" if len(below) == len(rows) else f"These are ({names})"
    rivals = {row["baseline"]["variant"].replace("_", " ") for row in below}
    return (
        f"{which} no better than a baseline that knows nothing of disease: {', '.join(sorted(rivals))}"
        f"{', the most similar training picture' if 'nearest neighbour' in rivals else ''}."
    )


def threshold_words(threshold: float, parameters: Mapping, rows: Sequence[Mapping], *, folds: int = 1) -> str:
    """Say what the threshold of disease was set for, and what it did on test slices.

    Args:
        threshold: of the cascade.
        parameters: of its run; `sensitivity` is what was wanted.
        rows: of its metrics.json.
        folds: of the run, of which the cascade is the first one's.
    """
    wanted = parameters.get("sensitivity")
    aim = f", set on validation slices to find {wanted:.0%} of the diseased" if wanted else ""
    met = ""
    found = {
        name: [
            row["value"]
            for row in rows
            if {"task": "disease", "variant": "cascade", "metric": name, "label": "disease"}.items() <= row.items()
            and row["value"] is not None
        ]
        for name in ("sensitivity", "specificity")
    }
    if found["sensitivity"]:
        met = f"; on test slices it found {found['sensitivity'][0]:.0%}"
    if met and found["specificity"]:
        met += f", and called {1 - found['specificity'][0]:.0%} of the healthy diseased"
    several = f" Test figures are over {folds} folds; this is the first fold's model." if folds > 1 else ""
    return f"Threshold of disease: {threshold:.3f}{aim}{met}.{several}"


# --- pictures --------------------------------------------------------------------------------------------------------


def enlarge(picture: np.ndarray) -> np.ndarray:
    """Bring a picture to a size to be looked at, uint8 (height, width), keeping its aspect ratio."""
    scale = min(SHOWN_SIDE / max(picture.shape), MAX_ENLARGED)
    size = [max(1, round(side * scale)) for side in picture.shape]
    return images.resize(picture, size, interpolation="cubic" if scale > 1 else "area")


def spread(heat: np.ndarray, original: tuple[int, int], shown: tuple[int, int], read_options: Mapping) -> np.ndarray:
    """Lay a map over the picture as it is shown, undoing how it was fitted into the network's input.

    Args:
        heat: float, shape (h, w): over the whole input.
        original: (height, width) of the picture as it was read.
        shown: (height, width) wanted.
        read_options: `image_size` and `fit` of the cascade; of a padded picture, the padding is cut off.

    Returns:
        float32 array of shape `shown`.
    """
    if read_options["fit"] == "pad":
        inside = images.resize(np.full(original, 255, np.uint8), read_options["image_size"], fit="pad") > 0
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        heat = localisation.upsample(heat[None], read_options["image_size"])[0]
        heat = heat[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return localisation.upsample(heat[None], shown)[0]


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Colour a picture by its map, as `plots.heat_maps` does: the hotter the more opaque, at most two thirds.

    Args:
        picture: uint8, shape (height, width).
        heat: float of the same shape, at least 0; zeros leave the picture bare.

    Returns:
        uint8 array (height, width, 3), RGB.
    """
    part = heat / (heat.max() or 1)
    colours = cv2.applyColorMap(np.rint(part * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = part[..., None] * (2 / 3)
    return np.rint(picture[..., None] * (1 - opacity) + colours * opacity).astype(np.uint8)
