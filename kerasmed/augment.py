"""Augmentation recipes on batches of uint8 grey images.

A recipe is a tuple of names; `build` turns it into a function of a batch and a seed, so that the same (seed, epoch,
batch) always yields the same pixels, on whichever thread they are made. Flips, turns and noise, which nearly all
recipes have, are OpenCV's own operations with parameters drawn here; the rest are transforms of Albumentations, which
cost twice as much an image.
"""

import threading
from collections.abc import Callable, Sequence

import albumentations as A
import cv2
import numpy as np

# Grey levels: variance 10–50, what Albumentations 1 did by default; version 2's default is far stronger.
_NOISE = (0.0124 * 255, 0.0277 * 255)


def _flip(axis):
    return lambda image, generator: cv2.flip(image, axis)


def _rotate(limit):
    """Turn about the middle by up to `limit` degrees either way, black around."""

    def change(image, generator):
        height, width = image.shape
        centre = (width / 2 - 0.5, height / 2 - 0.5)
        matrix = cv2.getRotationMatrix2D(centre, generator.uniform(-limit, limit), 1)
        return cv2.warpAffine(image, matrix, (width, height))

    return change


def _noise(image, generator):
    """Add Gaussian noise, in whole grey levels cut towards 0, as Albumentations does."""
    noise = np.empty(image.shape, np.float32)
    cv2.randn(noise, 0, generator.uniform(*_NOISE))
    return cv2.add(image, noise.astype(np.int8), dtype=cv2.CV_8U)


# Name -> probability, and function (image, generator) -> image.
_CHANGES = {
    "flip": (0.5, _flip(1)),
    "flip_vertical": (0.5, _flip(0)),
    "noise": (0.5, _noise),
    "noise_rare": (0.25, _noise),
    "rotate": (0.5, _rotate(10)),
    "rotate_any": (0.5, _rotate(90)),
    "rotate_30": (1.0, _rotate(30)),
}


def _transforms(image_size):
    height, width = image_size
    return {
        "brightness_contrast": lambda: [A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5)],
        # RandomScale changes the array's size: padded or cropped back, it zooms; resized back, it would only blur.
        "scale": lambda: [
            A.RandomScale(scale_limit=0.1, p=0.5),
            A.PadIfNeeded(height, width, border_mode=cv2.BORDER_CONSTANT),
            A.CenterCrop(height, width),
        ],
        "shift": lambda: [A.Affine(translate_percent=(-0.06, 0.06), border_mode=cv2.BORDER_CONSTANT, p=0.5)],
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


NAMES = (*_CHANGES, *_transforms((1, 1)))


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
    steps = [_step(*_CHANGES[name]) if name in _CHANGES else _library_step(name, image_size) for name in names]

    def augment(images: np.ndarray, seed: int) -> np.ndarray:
        generator, images = np.random.default_rng(seed), images.copy()
        # OpenCV's noise comes from a generator that each thread has one of.
        cv2.setRNGSeed(int(generator.integers(2**31)))
        for step in steps:
            step(images, generator)
        return images

    return augment


def _step(probability, change):
    """Function of a batch, in place: change some of its images."""

    def step(images, generator):
        for row in np.flatnonzero(generator.random(len(images)) < probability):
            images[row] = change(images[row], generator)

    return step


def _library_step(name, image_size):
    """Function of a batch, in place: the transforms of Albumentations that have this name."""
    local = threading.local()

    def step(images, generator):
        # A pipeline holds its random generators, so each thread has its own and seeds it for every batch. A seed is
        # that of each transform in it: transforms of several names would be done together, or not at all.
        if not hasattr(local, "compose"):
            local.compose = A.Compose(_transforms(image_size)[name]())
        local.compose.set_random_seed(int(generator.integers(2**31)))
        for row, image in enumerate(images):
            images[row] = local.compose(image=image)["image"]

    return step
