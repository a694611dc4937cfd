"""DICOM series to arrays, by two processes against one.

Ours is `series.convert(jobs=2)`, both normalisations; the other is the same with `jobs=1`. 123 made-up series of the
lumbar spine, 1,128 slices of 384 to 512 pixels a side and 12 or 16 bits: 4 to 5 s of work for one process, where a real
set takes minutes to hours. A first round, not counted, starts the two worker processes, which takes about a second and
is done once a session. Each round writes into a new folder; all files that both write must be equal.
"""

import itertools
import os
import tempfile
from pathlib import Path

import measure

from kerasmed import series
from kerasmed.datasets import lumbar
from kerasmed.datasets.synthetic import lumbar as synthetic

OPTIONS = {"image_size": (224, 224), "normalisations": series.NORMALISATIONS, "progress": False}


def arrays(volumes: series.Volumes) -> dict[str, bytes]:
    """Return the content of all files of a conversion, by their names."""
    files = sorted(path for path in volumes.folder.rglob("*") if path.is_file())
    return {path.relative_to(volumes.folder).as_posix(): path.read_bytes() for path in files}


def run():
    with tempfile.TemporaryDirectory() as folder:
        folder, numbers = Path(folder), itertools.count()
        os.environ["KERASMED_CACHE"] = str(folder / "cache")
        synthetic.write(folder, studies=40, image_side=(384, 512), missing_share=0.0)
        manifest = lumbar.read(folder)

        def convert(jobs):
            return series.convert(manifest, folder, jobs=jobs, folder=folder / f"{next(numbers)}", **OPTIONS)

        one, two = convert(1), convert(2)
        if arrays(one) != arrays(two):
            raise RuntimeError("Two processes write other files than one.")
        written = [name for name in arrays(two) if name.endswith(".npy")]
        if len(written) != 2 * len(manifest) or len(two.quarantine):
            raise RuntimeError(
                f"{len(written)} arrays of {len(manifest)} series, {len(two.quarantine)} files set aside."
            )
        seconds = measure.rounds({"two": lambda: convert(2), "one": lambda: convert(1)}, count=7)
        yield measure.faster(
            "DICOM series to .npy, 2 cores, against one process",
            seconds["two"],
            seconds["one"],
            amount=len(two.slices),
            unit="slices/s",
            at_least=1.8,
            checked=f"{len(written)} arrays of {len(manifest)} series and all tables are equal, byte by byte",
        )


if __name__ == "__main__":
    measure.main(run)
