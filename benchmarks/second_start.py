"""The second start of a notebook, whose decoded store is found, against decoding again.

Ours is `pipelines.decode` where an earlier call has left a store; the other is the same call with an empty cache. Both
then read every pixel of the store, so that nothing is left to a lazy memory map. 320 PNG of 1024² (those of
`first_pass`), to a store of 224²; files and store lie in the page cache. Both stores must hold the same pixels.
"""

import itertools
import os
import tempfile
from pathlib import Path

import first_pass
import measure
import numpy as np

from kerasmed import pipelines

NUM_IMAGES = 320


def run():
    with tempfile.TemporaryDirectory() as folder:
        folder, numbers = Path(folder), itertools.count()
        manifest = first_pass.write_all(folder / "data", NUM_IMAGES)

        def start(cache):
            os.environ["KERASMED_CACHE"] = str(folder / cache)
            store = pipelines.decode(manifest, folder / "data", image_size=(224, 224), progress=False)
            return store, int(store.images.sum())

        (decoded, total), (found, total_again) = start("kept"), start("kept")
        (again, _) = start("other")
        if total != total_again or found.folder != decoded.folder or again.folder == decoded.folder:
            raise RuntimeError("The second start did not open the store of the first.")
        if not np.array_equal(found.images, again.images):
            raise RuntimeError("The store that was found holds other pixels than one that is decoded again.")
        calls = {"found": lambda: start("kept"), "decoded": lambda: start(f"cache{next(numbers)}")}
        seconds = measure.rounds(calls, count=7)
        yield measure.faster(
            "second start of a notebook, decoded store found, against decoding again",
            seconds["found"],
            seconds["decoded"],
            amount=NUM_IMAGES,
            unit="images/s",
            at_least=20,
            checked=f"{len(found.images)} pictures equal, of {total / found.images.size:.0f} grey levels on average",
        )


if __name__ == "__main__":
    measure.main(run)
