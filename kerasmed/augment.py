"""Augmentation recipes: named Albumentations transforms on batches of uint8 grey images.

A recipe is a tuple of names; `build` turns it into a function of a batch and a seed, so that the same (seed, epoch,
batch) always yields the same pixels, on whichever thread they are made.
"""

import threading
from collections.abc import Callable, Sequence

import albumentations as A
import cv2
import numpy as np


def _transforms(image_size):
    height, width = image_size
    return {
        "flip": lambda: [A.HorizontalFlip(p=0.5)],
        # Variance 10–50 on a scale of 0–255: what Albumentations 1 did by default; version 2's default is far stronger.
        "noise": lambda: [A.GaussNoise(std_range=(0.0124, 0.0277), p=0.5)],
        "noise_rare": lambda: [A.GaussNoise(std_range=(0.0124, 0.0277), p=0.25)],
        "rotate": lambda: [A.Rotate(limit=10, border_mode=cv2.BORDER_CONSTANT, p=0.5)],
        "brightness_contrast": lambda: [A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5)],
        # RandomScale changes the array's size: padded or cropped back, it zooms; resized back, it would only blur.
        "scale": lambda: [
            A.RandomScale(scale_limit=0.1, p=0.5),
            A.PadIfNeeded(height, width, border_mode=cv2.BORDER_CONSTANT),
            A.CenterCrop(height, width),
        ],
        "shift": lambda: [A.Affine(translate_percent=(-0.06, 0.06), border_mode=cv2.BORDER_CONSTANT, p=0.5)],
        "flip_vertical": lambda: [A.VerticalFlip(p=0.5)],
        "rotate_any": lambda: [A.Rotate(limit=90, border_mode=cv2.BORDER_CONSTANT, p=0.5)],
        "rotate_30": lambda: [A.Rotate(limit=30, border_mode=cv2.BORDER_CONSTANT, p=1.0)],
        # In degrees, drawn for each axis; a number alone would be a fixed angle, not a range.
        "shear": lambda: [A.Affine(shear=(-15, 15), border_mode=cv2.BORDER_CONSTANT, p=0.5)],
        "scale_wide": lambda: [
            A.RandomScale(scale_limit=(-0.2, 0.3), p=0.5),
            A.PadIfNeeded(height, width, border_mode=cv2.BORDER_CONSTANT),
            A.CenterCrop(height, width),
        ],
        # Each side by its own share of the picture, then resized back: off centre, and stretched a little.
        "pad": lambda: [A.CropAndPad(percent=(0.0, 0.2), border_mode=cv2.BORDER_CONSTANT, p=0.5)],
        "crop": lambda: [A.CropAndPad(percent=(-0.2, 0.0), p=0.5)],
        "blur": lambda: [A.GaussianBlur(sigma_limit=(0.5, 1.5), p=0.5)],
        # One black rectangle, each side 0.2 to 0.4 of the picture's.
        "cutout": lambda: [
            A.CoarseDropout(
                num_holes_range=(1, 1), hole_height_range=(0.2, 0.4), hole_width_range=(0.2, 0.4), fill=0, p=0.5
            )
        ],
    }


NAMES = tuple(_transforms((1, 1)))


def build(names: Sequence[str], image_size: tuple[int, int]) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Build a recipe.

    Args:
        names: any of `NAMES`, applied in the order given; empty for no augmentation.
        image_size: (height, width) of the images.

    Returns:
        Function (uint8 array (batch, height, width), seed) -> array of the same shape and type; None for no names.

    Raises:
        ValueError: unknown name.

    Example:
        >>> flip = build(("flip",), (2, 2))
        >>> flip(np.array([[[0, 255], [0, 255]]], np.uint8), seed=1).shape
        (1, 2, 2)
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"augmentation {unknown} is unknown; known are {', '.join(NAMES)}.")
    if not names:
        return None
    available = _transforms(image_size)
    local = threading.local()

    def augment(images: np.ndarray, seed: int) -> np.ndarray:
        # A pipeline holds its random generator, so each thread has its own and seeds it for every batch.
        if not hasattr(local, "compose"):
            local.compose = A.Compose([transform for name in names for transform in available[name]()])
        local.compose.set_random_seed(seed)
        return np.stack([local.compose(image=image)["image"] for image in images])

    return augment
