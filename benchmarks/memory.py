"""Memory of the input pipeline, over a store of 100,000 pictures against one of 1,000.

Each round is a fresh process that draws 200 augmented training batches of 32 from `pipelines.training_dataset` over a
store of 224² and notes its largest memory: what is its own (RssAnon and RssShmem of Linux, looked at after each
batch). Pages of the memory-mapped store are not counted: they are the system's cache of the file, dropped when memory
is short; with them the larger store shows more, as more of it was read, which is told beside. The stores are sparse
files, zeros but for some rows, of 50 MB and 5 GB in name. Both must give batches of the same shapes and types, and the
smaller one each row once an epoch.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import numpy as np

SIZES, SIDE, BATCH, STEPS, ROUNDS = (1_000, 100_000), 224, 32, 200, 5


def write(path: Path, num_rows: int) -> None:
    """Write a sparse store, in which every 50th row is noise."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(num_rows, SIDE, SIDE))
    rng = np.random.default_rng(0)
    for row in range(0, min(num_rows, 5_000), 50):
        array[row] = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def status() -> dict[str, float]:
    """Return this process's memory, MB: its own, and with the pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (
        sum(int(lines[name].split()[0]) for name in names) * 1024 / 1e6
        for names in (("RssAnon", "RssShmem"), ("RssFile",))
    )
    return {"own": own, "all": own + files}


def draw(path: str) -> dict:
    """Draw batches; return the largest memory and what they were."""
    from kerasmed import augment, environment, pipelines

    environment.setup(seed=0)
    images = np.load(path, mmap_mode="r")
    rows = np.arange(len(images))
    targets = rows.astype(np.float32)[:, None]  # which row it is
    recipe = augment.build(("flip", "noise", "rotate"), (SIDE, SIDE))
    dataset = pipelines.training_dataset(images, rows, targets, batch_size=BATCH, seed=0, augment=recipe)
    highest, drawn = {"own": 0.0, "all": 0.0}, []
    for pixels, target in dataset.take(STEPS).as_numpy_iterator():
        highest = {name: max(highest[name], value) for name, value in status().items()}
        drawn.append(target[:, 0].astype(int))
        batch = [pixels.shape, str(pixels.dtype), target.shape, str(target.dtype)]
        if len(drawn) == 1:
            first = batch
    steps = pipelines.steps_per_epoch(len(rows), BATCH)
    epochs = [
        np.sort(np.concatenate(drawn[start : start + steps])).tolist() for start in range(0, STEPS - steps, steps)
    ]
    return highest | {"batch": first, "epochs": len(epochs), "whole": all(epoch == rows.tolist() for epoch in epochs)}


def run():
    with tempfile.TemporaryDirectory() as folder:
        stores = {size: Path(folder) / f"{size}.npy" for size in SIZES}
        for size, path in stores.items():
            write(path, size)
        told = {size: [] for size in SIZES}
        for number in range(ROUNDS):
            for size in SIZES[:: -1 if number % 2 else 1]:
                command = [sys.executable, __file__, str(stores[size])]
                answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                told[size].append(json.loads(answer.splitlines()[-1]))
    small, large = (told[size] for size in SIZES)
    if any(each["batch"] != small[0]["batch"] for each in (*small, *large)):
        raise RuntimeError(
            f"Batches differ: {small[0]['batch']} of the smaller store, {large[0]['batch']} of the larger."
        )
    if not all(each["epochs"] >= 2 and each["whole"] for each in small):
        raise RuntimeError("An epoch of the smaller store has not each row once.")
    own, all_ = ([[each[name] for each in part] for part in (large, small)] for name in ("own", "all"))
    medians = [statistics.median(values) for values in all_]
    yield measure.more(
        "memory of the input pipeline, 100,000 rows against 1,000",
        *own,
        unit="MB",
        at_most=300,
        checked=(
            f"batches are {small[0]['batch']} in both, {small[0]['epochs']} epochs of the smaller store hold each row "
            f"once; with pages of files {measure.number(medians[0])} and {measure.number(medians[1])} MB"
        ),
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(draw(sys.argv[1])))
    else:
        measure.main(run)
