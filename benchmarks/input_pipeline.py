"""Augmented training batches from the decoded store, against PyTorch's DataLoader with Albumentations.

Images of 224×224 are flipped, given noise and turned, each with probability 0.5, in batches of 32. Ours is
`pipelines.training_dataset` over a memory-mapped store, read as a training reads it, after `environment.setup` as in
every notebook. The peer has its images in memory and transforms them one at a time: in the process itself, or in two
workers that stay alive and leave the cores to one another; the quicker counts. (a) Both have one channel. (b) The peer
has three equal ones, with the same noise in each, as networks that take colour are usually fed; ours makes three of one
inside the model. Before, draws of one picture are compared: means, spread, and how much images are changed.
"""

import os
import tempfile
from pathlib import Path

import albumentations as A
import cv2
import measure
import numpy as np
import torch
from scipy.stats import ks_2samp

from kerasmed import augment, environment, pipelines

NUM_IMAGES, SIZE, BATCH_SIZE = 3200, (224, 224), 32
RECIPE = ("flip", "noise", "rotate")
PEERS = {channels: [f"{channels} channels, {workers} workers" for workers in (0, 2)] for channels in (1, 3)}


def transform(seed=None) -> A.Compose:
    """Albumentations' transforms with the strengths of our recipe."""
    noise = A.GaussNoise(std_range=(0.0124, 0.0277), per_channel=False, p=0.5)
    return A.Compose([A.HorizontalFlip(p=0.5), noise, A.Rotate(10, border_mode=cv2.BORDER_CONSTANT, p=0.5)], seed=seed)


class InMemory(torch.utils.data.Dataset):
    def __init__(self, images, targets):
        self.images, self.targets, self.transform = images, targets, transform()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.transform(image=self.images[row])["image"], self.targets[row]


def peer(images, targets, workers: int):
    """Function that goes through an epoch of a DataLoader."""
    loader = torch.utils.data.DataLoader(
        InMemory(images, targets),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        # A worker a core: OpenCV's own threads would only get into one another's way.
        worker_init_fn=lambda _: cv2.setNumThreads(0),
    )

    def epoch():
        for batch, _ in loader:
            assert batch.dtype == torch.uint8

    return epoch


def check(picture: np.ndarray, count: int = 2000) -> None:
    """Refuse recipes whose draws of one picture differ by more than chance."""
    ours = augment.build(RECIPE, SIZE)(np.repeat(picture[None], count, axis=0), seed=0)
    library = transform(seed=0)
    draws = ours, np.stack([library(image=picture)["image"] for _ in range(count)])
    means, deviations = ([one.reshape(count, -1).astype(np.float32) for one in draws] for _ in range(2))
    means, deviations = [one.mean(axis=0) for one in means], [one.std(axis=0) for one in deviations]
    # In standard errors, over 50,176 pixels that go together: chance gives 4 to 5.
    furthest = (np.abs(means[0] - means[1]) / np.maximum(deviations[1], 1) / np.sqrt(2 / count)).max()
    changes = [np.abs(one.astype(np.int16) - picture).mean(axis=(1, 2)) for one in draws]
    chance = ks_2samp(*changes).pvalue
    if furthest > 6 or chance < 1e-3 or np.abs(deviations[0] - deviations[1]).max() > 5:
        raise AssertionError(
            f"the recipes differ: means by {furthest:.1f} standard errors, changes with p {chance:.1e}."
        )


def run():
    environment.setup(seed=0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    picture = (127 + 60 * np.sin(x / 20) + 60 * np.cos(y / 30)).astype(np.uint8)
    check(picture)
    targets = np.zeros(NUM_IMAGES, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, *SIZE), np.uint8))
        store = np.load(Path(folder) / "images.npy", mmap_mode="r")
        dataset = pipelines.training_dataset(
            store,
            np.arange(NUM_IMAGES),
            targets,
            batch_size=BATCH_SIZE,
            seed=0,
            augment=augment.build(RECIPE, SIZE),
        )
        batches = iter(dataset)

        def ours():
            for _ in range(NUM_IMAGES // BATCH_SIZE):
                assert next(batches)[0].shape == (BATCH_SIZE, *SIZE, 1)

        grey = np.array(store)
        images = {1: grey, 3: np.repeat(grey[..., None], 3, axis=-1)}
        calls = {"ours": ours}
        for channels, names in PEERS.items():
            calls |= {name: peer(images[channels], targets, workers) for name, workers in zip(names, (0, 2))}
        seconds = measure.rounds(calls)
    for channels, name, target in ((1, "one channel", 1.5), (3, "RGB", 3)):
        quicker = measure.best(seconds, PEERS[channels])
        yield measure.faster(
            f"steady input pipeline, 224², peer {name}, DataLoader + Albumentations ({quicker})",
            seconds["ours"],
            seconds[quicker],
            amount=NUM_IMAGES,
            unit="images/s",
            at_least=target,
            checked="draws of one picture: means, spread and changes differ by no more than chance",
        )


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    measure.main(run)
