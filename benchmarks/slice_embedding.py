"""ResNet50 features of MRI slices by `embeddings.encode_slices`, against slice by slice, eager, and ready arrays.

Sixteen made-up series of 8 to 30 grey slices of 224×224, each a `.npy` file that is opened as a memory map, as the
lumbar system reads them. Slice by slice, eager, is `model(slice[None], training=False)` in a loop over the series, on
the first 24 slices, as seconds a slice: the loop that notebooks on volumes usually have. `encoder.predict` is given all
slices in one array, gathered before, in batches of 64: the quickest that Keras does, with nothing read and nothing
written (now and then it stands still for seconds, where its dataset ends). Ours reads the series and writes the
features into an empty folder in every round.
"""

import itertools
import tempfile
from pathlib import Path

import keras
import measure
import numpy as np

from kerasmed import backbones, embeddings

SIDE, SERIES, BATCH, ALONE = 224, 16, 64, 24
# float32: a convolution sums a batch of another size in another order, fifty layers deep. Features are about 1, and
# vary by 0.2 from slice to slice.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def write_series(folder):
    """Write series of different depth: coarse patterns, so that slices differ, under noise."""
    rng = np.random.default_rng(0)
    depths = rng.integers(8, 31, SERIES)
    for row, depth in enumerate(depths):
        coarse = rng.integers(0, 192, (depth, 7, 7)).repeat(SIDE // 7, axis=1).repeat(SIDE // 7, axis=2)
        noise = rng.integers(0, 64, (depth, SIDE, SIDE))
        np.save(folder / f"{row}.npy", (coarse + noise).astype(np.uint8))
    return depths


def run():
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        depths = write_series(folder)

        def load(row):
            return np.load(folder / f"{row}.npy", mmap_mode="r")

        ready = np.concatenate([load(row) for row in range(SERIES)])[..., None]
        keras.utils.set_random_seed(0)
        encoder, _ = backbones.build("ResNet50", (SIDE, SIDE), weights="none")
        embeddings.calibrate(encoder, ready[:: len(ready) // 32])
        numbers = itertools.count()

        def ours():
            target = folder / f"features{next(numbers)}"
            return embeddings.encode_slices(encoder, depths, load, target, batch_size=BATCH, progress=False)

        def at_once():
            return encoder.predict(ready, batch_size=BATCH, verbose=0)

        def alone():
            slices = (each for row in range(SERIES) for each in load(row)[..., None])
            return [encoder(each[None], training=False).numpy()[0] for each in itertools.islice(slices, ALONE)]

        # This also compiles what is compiled.
        features = ours()
        for name, others in {"slice by slice": alone(), "encoder.predict": at_once()}.items():
            if not np.allclose(features[: len(others)], others, **TOLERANCE):
                raise AssertionError(f"features differ from those of {name}.")
        seconds = measure.rounds({"ours": ours, "alone": alone, "at once": at_once}, warm=0)

    a_slice = [each / len(ready) for each in seconds["ours"]]
    yield measure.faster(
        "ResNet50 slice embedding / slice by slice, eager",
        a_slice,
        [each / ALONE for each in seconds["alone"]],
        amount=1,
        unit="slices/s",
        at_least=4,
        checked=f"features of the first {ALONE} slices equal to 0.0001",
    )
    yield measure.faster(
        "ResNet50 slice embedding / encoder.predict on a ready array",
        a_slice,
        [each / len(ready) for each in seconds["at once"]],
        amount=1,
        unit="slices/s",
        at_least=0.95,
        checked="features of all slices equal to 0.0001",
    )


if __name__ == "__main__":
    measure.main(run)
