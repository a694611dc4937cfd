"""Draw slices of a made lumbar spine: sagittal and axial pictures with signs of degeneration at their places.

Lengths are in halves of the side of a square of the picture's area, measured from its centre: x to the right and y
downwards. In sagittal pictures x goes from the front of the body to its back; in axial ones from the patient's right to
the left, and y from the front to the back.
"""

from typing import NamedTuple

import cv2
import numpy as np

from kerasmed.datasets.synthetic.drawing import rotated

NUM_LEVELS = 5
CANAL, FORAMINAL, SUBARTICULAR = "spinal_canal_stenosis", "neural_foraminal_narrowing", "subarticular_stenosis"
# A sign's place in sagittal slices: how far to its side (1: the last slice there), and x and y from the disc's back.
_LATERAL = {CANAL: 0.0, FORAMINAL: 0.6, SUBARTICULAR: 0.34}
_FROM_DISC = {CANAL: (0.15, 0.0), FORAMINAL: (0.14, -0.07), SUBARTICULAR: (0.12, 0.06)}
# In axial slices: x (to the sign's side) and y.
_AXIAL = {CANAL: (0.0, 0.2), FORAMINAL: (0.62, -0.02), SUBARTICULAR: (0.3, 0.12)}
# Of a sign of strength 1: half its width and height, the period of its texture (4 pixels where the side has 64), and
# the texture's grey levels either way.
_HALF_SIDES = {"sagittal": (0.23, 0.18), "axial": (0.2, 0.2)}
_PERIOD = 0.125
_CONTRAST = 115.0
# Grey levels: fat, muscle, bone, its rim, disc, fluid. They lie close together, and noise is low: what a network of
# random weights makes of a slice goes by the energy of its contrasts, so a sign must have more of it than anatomy.
_TISSUES = {
    "Sagittal T1": (136, 106, 123, 100, 111, 96),
    "Sagittal T2/STIR": (130, 105, 113, 99, 118, 141),
    "Axial T2": (130, 105, 113, 99, 118, 141),
}
_MIDDLE = 115.0
# Bands at the front (saturated: black) and the back (skin's fat: white) of the frame: alike in all slices, and more
# than the percentiles that grey levels are normalised by, which so do not go by the signs.
_BAND, _WHITE = 0.025, 230.0
_FRACTION = 4  # bits of the coordinates that OpenCV draws


class Sign(NamedTuple):
    """A sign to draw: of what, its side (-1 right, 1 left, 0 none), level (0 to 4), and strength in [0, 1]."""

    condition: str
    side: int
    level: int
    strength: float


class Anatomy(NamedTuple):
    """What a study's slices share."""

    shift: np.ndarray  # (2,)
    turn: float  # radians
    scale: float
    curve: float  # of the column
    width: float  # of the vertebrae
    canal: float
    heights: np.ndarray  # (5,): of the levels
    tissue: np.ndarray  # (6,): factors of the grey levels


class Exposure(NamedTuple):
    """What a series' slices share."""

    shift: np.ndarray  # (2,)
    field: np.ndarray  # (3, 3): uneven brightness
    noise: float  # standard deviation, grey levels


def anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a study's anatomy."""
    return Anatomy(
        shift=rng.uniform(-0.056, 0.056, 2),
        turn=rng.uniform(-0.07, 0.07),
        scale=rng.uniform(0.945, 1.04),
        curve=rng.uniform(0.44, 1.06),
        width=rng.uniform(0.9, 1.1),
        canal=rng.uniform(0.9, 1.1),
        heights=rng.uniform(0.94, 1.06, NUM_LEVELS),
        tissue=rng.uniform(0.97, 1.03, 6),
    )


def exposure(rng: np.random.Generator) -> Exposure:
    """Draw a series' own shift, brightness and noise."""
    return Exposure(rng.uniform(-0.03, 0.03, 2), rng.normal(0, 0.025, (3, 3)), rng.uniform(1.0, 2.2))


def sagittal_slices(condition: str, side: int, lateral: np.ndarray) -> np.ndarray:
    """Say which sagittal slices a sign lies in, the nearest to its place first.

    Args:
        condition: of the sign.
        side: -1, 1 or 0.
        lateral: of the slices, ascending from -1 (right) to 1 (left).

    Returns:
        Positions: the middle 2 or 3 slices for the canal, 1 or 2 for a foramen, 1 for a recess.
    """
    distance = np.abs(lateral - side * _LATERAL[condition])
    reach = {CANAL: 1.1 * (lateral[1] - lateral[0]), FORAMINAL: 0.15, SUBARTICULAR: 0}[condition]
    order = np.argsort(distance, kind="stable")
    return order[(distance[order] < reach) | (np.arange(len(order)) == 0)]


def sagittal(rng, body: Anatomy, series: Exposure, modality: str, size, lateral: float, signs) -> tuple:
    """Draw a sagittal slice.

    Args:
        rng: the slice's own.
        body: the study's.
        series: the series'.
        modality: "Sagittal T1" or "Sagittal T2/STIR".
        size: (height, width) in pixels.
        lateral: -1 (right) to 1 (left).
        signs: of `Sign`.

    Returns:
        float32 picture (height, width) of 0 to about 255, and for each sign x and y of its middle, then x, y, width and
        height of its box, pixels.
    """
    fat, muscle, bone, rim, disc, fluid = np.array(_TISSUES[modality]) * body.tissue
    to_pixels, unit = _placed(body, series, size)
    canvas = np.full(size, round(fat * 0.94), np.uint8)
    shrink = np.sqrt(1 - 0.75 * lateral**2)
    width = 0.27 * body.width * shrink
    centres, backs, tilts = _column(body)
    xs = np.interp(np.linspace(-1.4, 1.4, 12), centres[:, 1], centres[:, 0])
    line = np.stack([xs, np.linspace(-1.4, 1.4, 12)], axis=1)
    _fill(canvas, to_pixels(_band(line, -1.6, -0.55)), muscle)  # the belly
    _fill(canvas, to_pixels(_band(line, 0.34, 0.75)), muscle if abs(lateral) > 0.2 else fat)
    _fill(canvas, to_pixels(_band(line, 0.8, 2.0)), fat)
    in_canal = max(0.0, 1 - (abs(lateral) / 0.42) ** 4)
    lateral_tissue = muscle * (1 - shrink) + bone * shrink
    half = body.canal * 0.13
    middle = 0.27 * body.width + half + 0.03
    if in_canal > 0:
        level = fluid * in_canal + muscle * (1 - in_canal)
        _fill(canvas, to_pixels(_band(line, middle - half, middle + half)), level)
    for index in range(NUM_LEVELS + 1):
        body_centre, tilt = backs[index], tilts[index]
        box = _rounded(width, 0.118)
        _fill(canvas, to_pixels(_turned(box * 1.12, tilt) + body_centre), rim)
        _fill(canvas, to_pixels(_turned(box, tilt) + body_centre), lateral_tissue)
        if in_canal == 0 and abs(lateral) < 0.8:  # pedicles; between them the foramina
            place = body_centre + _turned(np.array([[middle - 0.06, -0.03]]), tilt)[0]
            _fill(canvas, to_pixels(_turned(_rounded(0.15, 0.085), tilt) + place), bone)
        elif in_canal > 0:  # spinous processes
            place = body_centre + _turned(np.array([[middle + half + 0.2, 0.1]]), tilt)[0]
            _fill(canvas, to_pixels(_turned(_rounded(0.13, 0.06), tilt + 0.35) + place), bone)
    disc_level = disc * shrink + muscle * (1 - shrink)
    for index in range(NUM_LEVELS):
        tilt = (tilts[index] + tilts[index + 1]) / 2
        box = _rounded(width * 1.04, 0.036 * body.heights[index])
        _fill(canvas, to_pixels(_turned(box, tilt) + centres[index]), disc_level)
        if in_canal == 0 and abs(lateral) < 0.8:
            place = centres[index] + _turned(np.array([[0.41 * body.width, -0.07]]), tilt)[0]
            _fill(canvas, to_pixels(_turned(_rounded(0.1, 0.08), tilt) + place), fat)
    picture = cv2.GaussianBlur(canvas, (0, 0), 0.012 * unit * 2).astype(np.float32)
    boxes = []
    for sign in signs:
        x, y = _FROM_DISC[sign.condition]
        tilt = (tilts[sign.level] + tilts[sign.level + 1]) / 2
        place = centres[sign.level] + _turned(np.array([[0.27 * body.width + x, y]]), tilt)[0]
        boxes.append(_paint(rng, picture, to_pixels(place[None])[0], unit * body.scale, "sagittal", sign))
    return _exposed(rng, picture, series, 1), boxes


def axial(rng, body: Anatomy, series: Exposure, size, level: int, above: float, signs) -> tuple:
    """Draw an axial slice at a disc.

    Args:
        rng: the slice's own.
        body: the study's.
        series: the series'.
        size: (height, width) in pixels.
        level: of the disc, 0 to 4.
        above: how far above the disc's middle, -1 to 1: there is more of the vertebra, and less of the disc.
        signs: of `Sign`.

    Returns:
        As `sagittal`.
    """
    fat, muscle, bone, rim, disc, fluid = np.array(_TISSUES["Axial T2"]) * body.tissue
    to_pixels, unit = _placed(body, series, size)
    canvas = np.full(size, round(muscle * 0.88), np.uint8)
    grown = body.width * (0.9 + 0.04 * level)
    _ellipse(canvas, to_pixels, (0, 0.02), (1.12, 0.98), fat)
    _ellipse(canvas, to_pixels, (0, -0.25), (1.0, 0.62), muscle * 0.9)
    for side in (-1, 1):
        _ellipse(canvas, to_pixels, (side * 0.42, 0.62), (0.36, 0.26), muscle)
        _ellipse(canvas, to_pixels, (side * 0.68, -0.12), (0.2, 0.24), muscle * 1.15)
        if level == NUM_LEVELS - 1:
            _ellipse(canvas, to_pixels, (side * 0.85, 0.3), (0.14, 0.3), bone)
    _ellipse(canvas, to_pixels, (0, -0.24), (0.47 * grown, 0.34 * grown), rim)
    _ellipse(canvas, to_pixels, (0, -0.24), (0.43 * grown, 0.30 * grown), disc + (bone - disc) * 0.5 * abs(above))
    _ellipse(canvas, to_pixels, (0, 0.42), (0.09, 0.3), bone)
    for side in (-1, 1):
        _ellipse(canvas, to_pixels, (side * 0.4, 0.3), (0.13, 0.11), rim)
        _ellipse(canvas, to_pixels, (side * 0.4, 0.3), (0.1, 0.08), bone)
    _ellipse(canvas, to_pixels, (0, 0.2), (0.22 * body.canal, 0.14 * body.canal), fluid)
    picture = cv2.GaussianBlur(canvas, (0, 0), 0.012 * unit * 2).astype(np.float32)
    boxes = []
    for sign in signs:
        x, y = _AXIAL[sign.condition]
        place = np.array([[sign.side * x if sign.side else x, y]])
        boxes.append(_paint(rng, picture, to_pixels(place)[0], unit * body.scale, "axial", sign))
    return _exposed(rng, picture, series, 0), boxes


def _placed(body: Anatomy, series: Exposure, size) -> tuple:
    """Return the function from points (num, 2) to pixels, and half the side in pixels."""
    height, width = size
    unit = np.sqrt(height * width) / 2
    origin = np.array([width, height]) / 2 - 0.5 + unit * (body.shift + series.shift)
    matrix = unit * body.scale * np.stack(rotated(*np.eye(2), body.turn))

    def to_pixels(points):
        return points @ matrix.T + origin

    return to_pixels, unit


def _column(body: Anatomy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres of the discs (5, 2) and of the vertebrae about them (6, 2), and the turns of the latter (6,)."""
    gaps = 0.335 * body.heights
    y = np.cumsum(gaps) - gaps.sum() / 2 - gaps[0] / 2

    def lean(at):
        return -0.16 + 0.09 * body.curve * np.cos(1.7 * at - 0.5)

    discs = np.stack([lean(y), y], axis=1)
    ends = np.concatenate([[y[0] - gaps[0] / 2], (y[1:] + y[:-1]) / 2, [y[-1] + gaps[-1] / 2]])
    turns = np.arctan(0.09 * body.curve * 1.7 * np.sin(1.7 * ends - 0.5))
    return discs, np.stack([lean(ends), ends], axis=1), turns


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    return np.stack(rotated(points[:, 0], points[:, 1], -angle), axis=1)


def _band(line: np.ndarray, left: float, right: float) -> np.ndarray:
    """Outline of what lies between two distances to the right of a line downwards."""
    return np.concatenate([line + [left, 0], (line + [right, 0])[::-1]])


_ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_SQUARE = np.stack([np.sign(f) * np.abs(f) ** 0.5 for f in (np.cos(_ANGLES), np.sin(_ANGLES))], axis=1)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _rounded(half_width: float, half_height: float) -> np.ndarray:
    return _SQUARE * [half_width, half_height]


def _ellipse(canvas, to_pixels, centre, radii, level) -> None:
    _fill(canvas, to_pixels(_CIRCLE * radii + centre), level)


def _fill(canvas: np.ndarray, outline, level: float) -> None:
    """Paint inside an outline in pixels, with a smooth edge."""
    points = np.rint(outline * 2**_FRACTION).astype(np.int32)
    cv2.fillPoly(canvas, [points], min(255, round(float(level))), cv2.LINE_AA, _FRACTION)


def _paint(rng, picture, centre, unit, plane, sign: Sign) -> tuple[float, float, int, int, int, int]:
    """Paint a sign's texture about a point in pixels; return the point and its box."""
    half = unit * np.array(_HALF_SIDES[plane]) * (0.75 + 0.25 * sign.strength)
    first = np.maximum(np.floor(centre - half), 0).astype(int)
    end = np.minimum(np.ceil(centre + half) + 1, picture.shape[::-1]).astype(int)
    x = (np.arange(first[0], end[0], dtype=np.float32) - np.float32(centre[0]))[None]
    y = (np.arange(first[1], end[1], dtype=np.float32) - np.float32(centre[1]))[:, None]
    u, v = (np.float32(2 * np.pi / (_PERIOD * unit)) * axis for axis in (x, y))
    one, other = rng.uniform(0, 2 * np.pi, 2).astype(np.float32)
    if sign.condition == CANAL:  # stripes across the canal
        texture = np.sin(v + one)
    elif sign.condition == FORAMINAL:  # squares
        texture = np.sqrt(np.float32(2)) * np.sin(u + one) * np.sin(v + other)
    else:  # oblique stripes
        texture = np.sin((u + v) * np.sqrt(np.float32(0.5)) + one)
    inside = np.minimum(half[0] - np.abs(x), half[1] - np.abs(y)) / (0.15 * half.min())
    part = picture[first[1] : end[1], first[0] : end[0]]
    part += np.clip(inside, 0, 1) * sign.strength * (_CONTRAST * texture + 0.7 * (_MIDDLE - part))
    return (*centre.tolist(), *first.tolist(), *(end - first).tolist())


def _exposed(rng, picture, series: Exposure, axis: int) -> np.ndarray:
    """Uneven brightness, bands at both ends of an axis, and noise."""
    field = cv2.resize(series.field.astype(np.float32), picture.shape[::-1], interpolation=cv2.INTER_CUBIC)
    picture = picture * (1 + field)
    side = picture.shape[axis]
    front = np.clip(_BAND * side - np.arange(side, dtype=np.float32), 0, 1)  # the share of a pixel in the band
    front, back = (np.expand_dims(share, 1 - axis) for share in (front, front[::-1]))
    picture += back * (_WHITE - picture) - front * picture
    picture += np.float32(series.noise) * rng.standard_normal(picture.shape, np.float32)
    return np.maximum(picture, 0)
