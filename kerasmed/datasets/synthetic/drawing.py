"""What the writers of synthetic sets share: files of fixed bytes and times, and shapes with soft edges."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

_EPOCH = 1_577_836_800  # 2020-01-01 00:00 UTC


def refuse_other(folder: Path, description: dict) -> None:
    """Raise FileExistsError unless this very set is there."""
    record = folder / "synthetic.json"
    if not record.exists():
        raise FileExistsError(
            f"{folder} exists and holds no {record.name}, so it may be real data. Nothing was written. "
            "Pass another folder, or move that one away."
        )
    found = json.loads(record.read_text(encoding="utf-8"))
    if found != description:
        raise FileExistsError(
            f"{record} describes another set: {found}; asked for: {description}. Nothing was "
            "written. Pass another folder, or delete that set first."
        )


def write_text(path: Path, text: str) -> None:
    """Write a text file of a fixed time."""
    path.write_text(text, encoding="utf-8", newline="\n")
    os.utime(path, (_EPOCH, _EPOCH))


def write_image(path: Path, image: np.ndarray, options: Sequence[int] = ()) -> None:
    """Write a uint8 image of a fixed time, in the format of its suffix; `options` of `cv2.imwrite`."""
    if not cv2.imwrite(str(path), image, list(options)):
        raise OSError(f"cv2 could not write {path}; is the disk full or the folder read-only?")
    os.utime(path, (_EPOCH, _EPOCH))


def rotated(x, y, angle):
    """Turn coordinates by an angle in radians."""
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def inside(radius, softness) -> np.ndarray:
    """1 where the radius is below 1, 0 above, with a smooth edge."""
    return 0.5 * (1 - np.tanh((radius - 1) / (2 * softness)))
