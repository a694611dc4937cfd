"""Where heat maps lie against the boxes of what they should show.

A map without any heat is dead: it misses its box, and is counted as dead, by the reason. Either no gradient reached it,
or all that it shows speaks against the label.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import pandas as pd

from kerasmed import metrics

OK = "ok"
# No feature's weight is above `kerasmed.gradcam.WEIGHT_TOLERANCE`: to first order, the class does not depend on the
# layer.
ZERO_GRADIENT = "zero_gradient"
# There are weights, but the weighted sum is nowhere above 0: what the layer shows speaks against the class, or nothing
# in it is active.
NEGATIVE = "negative"
STATUSES = (OK, ZERO_GRADIENT, NEGATIVE)
_OF_BOXES = {"pointing_hit": "hit", "chance": "chance", "energy_inside": "energy", "iou": "iou"}  # metric -> column
METRICS = ("dead_zero_gradient", "dead_negative", *_OF_BOXES)  # of `summary`
BOX_AREA = "box area"  # what pointing is compared with: a peak at random
_CHUNK = 2**22  # pixels of enlarged maps looked at together, 32 MB an array


# --- sizes -----------------------------------------------------------------------------------------------------------


def upsample(heat: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Enlarge maps (num_images, h, w) to `image_size` = (height, width), bilinearly; units are kept.

    Returns:
        float32 array, shape (num_images, height, width).
    """
    height, width = image_size
    enlarged = np.empty((len(heat), height, width), np.float32)
    for target, map_ in zip(enlarged, heat):
        target[:] = cv2.resize(np.asarray(map_, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return enlarged


def scale_boxes(boxes: np.ndarray, file_sizes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Turn boxes in pixels of files into boxes in pixels of images read with fit "stretch".

    x and width are multiplied by image width / file width, y and height by image height / file height.

    Args:
        boxes: float, shape (num_boxes, 4): x, y, width, height; NaN stays NaN.
        file_sizes: shape (num_boxes, 2): height and width in pixels of each box's file.
        image_size: (height, width).

    Returns:
        float64 array, shape (num_boxes, 4).

    Raises:
        ValueError: shapes do not fit, or a file's size is unknown or not above 0.

    Example:
        >>> scale_boxes(np.array([[512, 256, 100, 200]]), np.array([[1024, 1024]]), (256, 512)).tolist()
        [[256.0, 64.0, 50.0, 50.0]]
    """
    boxes, file_sizes = np.asarray(boxes, float), np.asarray(file_sizes, float)
    if boxes.shape != (len(boxes), 4) or file_sizes.shape != (len(boxes), 2):
        raise ValueError(
            f"`boxes` have shape {boxes.shape} and `file_sizes` {file_sizes.shape}; expected (num_boxes, 4), x, y, "
            "width, height, and (num_boxes, 2), the height and width of each box's file."
        )
    unknown = np.flatnonzero(~(file_sizes > 0).all(axis=1))
    if len(unknown):
        raise ValueError(
            f"the files of {len(unknown)} of {len(boxes)} boxes have no size above 0; leave out files that cannot be "
            f"read. First rows: {unknown[:5].tolist()}."
        )
    return boxes * np.tile((image_size / file_sizes)[:, ::-1], 2)


# --- one figure a map ------------------------------------------------------------------------------------------------


def peaks(heat: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Find where each map is highest, in pixels of an image of `image_size`.

    A bilinear map is highest at the centre of its highest cell:

        y = (i + 1/2) · height / h − 1/2,   x = (j + 1/2) · width / w − 1/2

    so the enlarged map is not searched, whose outer rows repeat a maximum at the border out to the border itself.

    Args:
        heat: float, shape (num_images, h, w).
        image_size: (height, width).

    Returns:
        float array (num_images, 2) of (y, x), 0 at the centre of the first pixel; NaN where a map is nowhere above 0.
        Of equal maxima the first counts, row by row.

    Example:
        >>> peaks(np.array([[[0, 1], [0, 0]]]), (4, 4)).tolist()
        [[0.5, 2.5]]
    """
    num_images, *cells = heat.shape
    flat = heat.reshape(num_images, int(np.prod(cells)))
    indices = np.stack(np.unravel_index(flat.argmax(axis=1), cells), axis=1)
    found = (indices + 0.5) * np.divide(image_size, cells) - 0.5
    found[flat.max(axis=1) <= 0] = np.nan
    return found


def pointing_game(heat: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Say of each map whether its peak falls in the box of the sign, and how often a blind guess would.

    Args:
        heat: float, shape (num_images, h, w), of the class that the box belongs to.
        boxes: float, shape (num_images, 4): x, y, width, height in pixels of an image of `image_size`; a box covers the
            pixels from x up to, not including, x + width, and counts as far as it lies inside the image. Boxes in
            pixels of another size are to be scaled first, by `scale_boxes`.
        image_size: (height, width).

    Returns:
        hits: bool, shape (num_images,); a map nowhere above 0 misses. No margin is granted around the box.
        chance: float, shape (num_images,): box area / image area, the share that a peak at random would hit.

    Raises:
        ValueError: shapes do not fit, a box is missing, empty, or more than a pixel outside the image, or a map is
            negative or not finite.

    Example:
        >>> heat = np.array([[[0, 1], [0, 0]]] * 2)
        >>> hits, chance = pointing_game(heat, np.array([[2, 0, 2, 2], [0, 0, 2, 4]]), (4, 4))
        >>> hits.tolist(), chance.tolist()
        ([True, False], [0.25, 0.5])

    Source: Zhang et al. 2016, arXiv:1608.00507.
    """
    start, end = _corners(heat, boxes, image_size)
    # In lengths, the centre of pixel 0 is at one half.
    points = peaks(heat, image_size) + 0.5
    hits = ((points >= start) & (points < end)).all(axis=1)
    return hits, (end - start).prod(axis=1) / np.prod(image_size)


def energy_inside(heat: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Share of each map's sum that lies in the box.

        energy = Σ_ij A_ij · s_ij / Σ_ij A_ij,   s_ij: share of the area of cell (i, j) that lies in the box

    A cell stands for the h-th and w-th part of the image that it covers, its heat spread evenly over it. A map that is
    the same everywhere has the box's area share, the chance level of `pointing_game`.

    Args:
        heat, boxes, image_size: as of `pointing_game`.

    Returns:
        float64 array, shape (num_images,), in [0, 1]; NaN for a map of zeros.

    Raises:
        ValueError: as of `pointing_game`.

    Example:
        >>> heat = np.array([[[1, 3], [0, 0]]])
        >>> energy_inside(heat, np.array([[1, 0, 3, 4]]), (4, 4)).tolist()  # half of the 1, all of the 3
        [0.875]

    Source: Wang et al. 2020, arXiv:1910.01279, section 4.3 (the energy-based pointing game), who enlarge the map first.
    """
    start, end = _corners(heat, boxes, image_size)
    heat = np.asarray(heat, float)
    inside = np.einsum("nhw,nh,nw->n", heat, *_shares(start, end, heat.shape[1:], image_size))
    total = heat.sum(axis=(1, 2))
    return np.divide(inside, total, out=np.full(len(heat), np.nan), where=total > 0)


def iou(heat: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int], *, threshold: float = 0.5) -> np.ndarray:
    """Intersection over union of the box and of the pixels where the map is hot.

    The map is enlarged bilinearly to `image_size`; hot is where it reaches `threshold` times its own maximum. A pixel
    that the box cuts counts by the share that lies inside.

    Args:
        heat, boxes, image_size: as of `pointing_game`.
        threshold: share of the enlarged map's maximum, above 0, at most 1.

    Returns:
        float64 array, shape (num_images,), in [0, 1]; 0 for a map of zeros.

    Raises:
        ValueError: the threshold is outside (0, 1], or as of `pointing_game`.

    Example:
        >>> heat = np.array([[[1, 0], [0, 0]]])  # at 2 × 2 pixels, hot is the first
        >>> iou(heat, np.array([[0, 0, 1, 2]]), (2, 2)).tolist()
        [0.5]
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` is {threshold}; expected a share of the map's maximum, above 0, at most 1.")
    start, end = _corners(heat, boxes, image_size)
    result = np.zeros(len(heat))
    step = max(1, _CHUNK // int(np.prod(image_size)))
    for first in range(0, len(heat), step):
        part = slice(first, first + step)
        enlarged = upsample(heat[part], image_size)
        highest = enlarged.max(axis=(1, 2), keepdims=True)
        hot = ((enlarged >= threshold * highest) & (highest > 0)).astype(float)
        common = np.einsum("nhw,nh,nw->n", hot, *_shares(start[part], end[part], image_size, image_size))
        result[part] = common / (hot.sum(axis=(1, 2)) + (end - start)[part].prod(axis=1) - common)
    return result


def _shares(start, end, cells, image_size):
    """Share of each row, and of each column, of a grid of `cells` that lies between two corners (y, x) in pixels."""
    shares = []
    for axis, (count, length) in enumerate(zip(cells, image_size)):
        edges = np.arange(count + 1) * (length / count)
        covered = np.minimum(edges[1:], end[:, axis, None]) - np.maximum(edges[:-1], start[:, axis, None])
        shares.append(np.maximum(covered, 0) * (count / length))
    return shares


def _corners(heat, boxes, image_size):
    """First and last corner (y, x) of each box, cut at the image's border; refuse what no map can be held against."""
    if np.ndim(heat) != 3:
        raise ValueError(f"`heat` has shape {np.shape(heat)}; expected maps (num_images, h, w).")
    boxes = np.asarray(boxes, float)
    if boxes.shape != (len(heat), 4):
        raise ValueError(
            f"`boxes` have shape {boxes.shape}; expected ({len(heat)}, 4): x, y, width, height for each map."
        )
    heat = np.asarray(heat)
    unfit = np.flatnonzero(~((heat >= 0) & np.isfinite(heat)).all(axis=(1, 2)))
    if len(unfit):
        raise ValueError(
            f"{len(unfit)} of {len(heat)} maps are negative somewhere, or not finite; expected Grad-CAM's, cut at 0. "
            f"First rows: {unfit[:5].tolist()}."
        )
    limits = np.array(image_size[::-1], float)
    outside = ((boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > limits + 1)).any(axis=1)
    start, end = np.maximum(boxes[:, :2], 0), np.minimum(boxes[:, :2] + boxes[:, 2:], limits)
    unfit = np.flatnonzero(outside | ~(end > start).all(axis=1))
    if len(unfit):
        raise ValueError(
            f"{len(unfit)} of {len(boxes)} boxes are missing, empty, or outside an image of {tuple(image_size)}; "
            "leave out images without a box, and scale boxes by `image_size` over the file's own size. "
            f"First rows: {unfit[:5].tolist()}, first box: {boxes[unfit[0]].tolist()}."
        )
    return start[:, ::-1], end[:, ::-1]


# --- many maps -------------------------------------------------------------------------------------------------------


def health(status: Sequence[str], labels: Sequence[str]) -> pd.DataFrame:
    """Count how many maps are alive, dead for want of a gradient, and dead because all speaks against the label.

    Args:
        status: shape (num_maps,), of `kerasmed.gradcam.Maps`.
        labels: shape (num_maps,): the label that each map explains.

    Returns:
        DataFrame indexed by label, first "all", then the labels as they first occur: n, and the shares ok,
        zero_gradient and negative, which sum to 1.

    Raises:
        ValueError: there is no map, a status is none of `STATUSES`, or the lengths differ.

    Example:
        >>> health(["ok", "negative", "ok", "zero_gradient"], ["a", "a", "b", "b"])
             n   ok  zero_gradient  negative
        all  4  0.5           0.25      0.25
        a    2  0.5           0.00      0.50
        b    2  0.5           0.50      0.00
    """
    status, labels = np.asarray(status), np.asarray(labels)
    if not len(status) or status.shape != labels.shape:
        raise ValueError(
            f"`status` has shape {status.shape} and `labels` {labels.shape}; expected one each for at least one map."
        )
    strange = sorted(set(status.tolist()) - set(STATUSES))
    if strange:
        raise ValueError(f"`status` holds {strange}; expected {', '.join(STATUSES)}.")
    masks = _masks(labels)
    counts = pd.Series({label: int(mask.sum()) for label, mask in masks.items()}, name="n").to_frame()
    for one in STATUSES:
        counts[one] = [(status[mask] == one).mean() for mask in masks.values()]
    return counts


def table(
    heat: np.ndarray,
    status: Sequence[str],
    labels: Sequence[str],
    boxes: np.ndarray | None,
    image_size: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> pd.DataFrame:
    """Lay out how each map lies against its box; an image with several boxes has a row for each.

    Args:
        heat: float, shape (num_boxes, h, w): the map of the box's image for the box's label.
        status: shape (num_boxes,), of `kerasmed.gradcam.Maps`.
        labels: shape (num_boxes,): what the box holds.
        boxes: float, shape (num_boxes, 4): x, y, width, height in pixels of an image of `image_size`. None where no
            boxes are known: then the table has label and status alone.
        image_size: (height, width).
        threshold: of `iou`.

    Returns:
        DataFrame, a row a box: label, status, hit (bool) and chance of `pointing_game`, energy of `energy_inside` (NaN
        for a dead map) and iou.

    Raises:
        ValueError: lengths differ, a map has heat where its status is not `OK` or none where it is, or as of
            `pointing_game`.
    """
    status, labels = np.asarray(status), np.asarray(labels)
    if not status.shape == labels.shape == (len(heat),):
        raise ValueError(
            f"`heat` has {len(heat)} maps, `status` the shape {status.shape} and `labels` {labels.shape}; expected one "
            "each for every map."
        )
    unlike = np.flatnonzero((status == OK) != (np.asarray(heat) > 0).any(axis=(1, 2)))
    if len(unlike):
        raise ValueError(
            f"{len(unlike)} of {len(heat)} maps have heat and a status other than {OK!r}, or this status and no heat; "
            f"are maps and statuses in the same order? First rows: {unlike[:5].tolist()}."
        )
    columns = {"label": labels, "status": status}
    if boxes is None:
        return pd.DataFrame(columns)
    columns["hit"], columns["chance"] = pointing_game(heat, boxes, image_size)
    columns["energy"] = energy_inside(heat, boxes, image_size)
    columns["iou"] = iou(heat, boxes, image_size, threshold=threshold)
    return pd.DataFrame(columns)


def summary(
    table: pd.DataFrame,
    groups: Sequence,
    *,
    task: str,
    variant: str,
    split: str = "test",
    num_draws: int = metrics.BOOTSTRAPS,
    seed: int = 0,
) -> list[dict]:
    """Average a table of maps against boxes over all boxes and by label, with 95 % bootstrap intervals over groups.

    - dead_zero_gradient, dead_negative: shares of dead maps by reason; the rest is alive.
    - pointing_hit: share of peaks in their box, where a dead map misses; its baseline is the mean share of the image
      that a box covers, which is `chance` as well.
    - energy_inside: mean share of the heat in the box, over the maps that are alive. A dead map has no heat to share
      out, so this figure alone can rise as maps die.
    - iou: mean over all maps, 0 for a dead one.

    Args:
        table: of `table`, a row a box; or of label and status alone, a row a map: then only the shares of dead maps.
        groups: shape (num_rows,), for the bootstrap: whose image it is.
        task: what is classified, for the rows.
        variant: which model, for the rows.
        split: what the images are, for the rows.
        num_draws: bootstrap draws.
        seed: of the draws.

    Returns:
        List of dicts as of `kerasmed.metrics.multiclass_rows`: task, split, n (rows of the label, dead or alive),
        n_groups, variant, metric, label ("all": the mean over rows, not over labels), value, ci95, baseline; where
        value is None, reason.

    Raises:
        ValueError: the table is empty, or the groups do not fit.
    """
    groups = np.asarray(groups).astype(str)
    if table.empty or groups.shape != (len(table),):
        raise ValueError(
            f"`table` has {len(table)} rows and `groups` the shape {groups.shape}; expected one group for each of at "
            "least one map."
        )
    draws = metrics.bootstrap_weights(groups, num_draws=num_draws, seed=seed)
    weights = np.vstack([np.ones(len(table)), draws]).astype(float)
    columns = {"dead_zero_gradient": table["status"] == ZERO_GRADIENT, "dead_negative": table["status"] == NEGATIVE}
    if "hit" in table:
        columns |= {metric: table[column] for metric, column in _OF_BOXES.items()}
    rows = []
    for label, mask in _masks(table["label"].to_numpy()).items():
        common = {"task": task, "split": split, "n": int(mask.sum()), "n_groups": len(np.unique(groups[mask]))}
        means = {name: _means(column.to_numpy(float)[mask], weights[:, mask]) for name, column in columns.items()}
        for name, (value, *spread) in means.items():
            row = {**common, "variant": variant, "metric": name, "label": label, "value": None, "ci95": None}
            row["baseline"] = None
            if np.isnan(value):
                row["reason"] = f"every map of {label} is dead" if label != "all" else "every map is dead"
            else:
                row |= {"value": float(value), "ci95": metrics.interval(np.array(spread))}
            if name == "pointing_hit":
                above = means[name] - means["chance"]
                row["baseline"] = {
                    "variant": BOX_AREA,
                    "value": float(means["chance"][0]),
                    "difference": float(above[0]),
                    "difference_ci95": metrics.interval(above[1:]),
                }
            rows.append(row)
    return rows


def _masks(labels):
    """For "all" and for each label, as it first occurs: which maps, bool, shape (num_maps,)."""
    return {"all": np.ones(len(labels), bool)} | {name: labels == name for name in dict.fromkeys(labels.tolist())}


def _means(values, weights):
    """Mean of what is known under each row of weights; NaN where a row has nothing."""
    known = ~np.isnan(values)
    total = weights[:, known].sum(axis=1)
    return np.divide(weights[:, known] @ values[known], total, out=np.full(len(weights), np.nan), where=total > 0)
