"""Near-duplicates among 112,120 perceptual hashes, as many as ChestX-ray14 has images, against looking at all pairs.

The hashes are those of pictures drawn like chest radiographs, a body, two lungs and a heart of varied place and size
below smooth noise, whose hashes are as near to one another as those of 90 real ones: half of the pairs differ in at
most 24 bits, a hundredth in at most 12. One hash in fifty is a copy with up to 7 flipped bits. All work on one core and
find the pairs of at most 7 different bits: the brute force in numpy compares the pairs above the diagonal, in blocks
that stay in the processor's cache; the BK-tree of pybktree is asked for each image, as imagededup does with a tree of
its own in Python. Its queries do not depend on one another: it is built whole and asked for 50 images, whose time is
multiplied. Before, all pairs are compared with the brute force's, those of the 50 images with the tree's, and 300
hashes with imagehash's.
"""

import imagehash
import measure
import numpy as np
import pybktree
from PIL import Image

from kerasmed.audit import likeness

COUNT, QUARTER, DISTANCE = 112_120, 28_030, likeness.HASH_DISTANCE
QUERIES, BATCHES = 50, 40
ROWS, COLUMNS = 16, 4096  # of a block of the brute force: 512 kB of differences


def pictures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw thumbnails: uint8 (count, 64, 64)."""
    place = np.linspace(0, 1, 64, dtype=np.float32)

    def blob(*box):
        """Draw ellipses of soft edges, whose centre, height and width vary by 0.04 about those given."""
        y, x, height, width = rng.normal(box, 0.04, (count, 4)).astype(np.float32).T[..., None]
        tall, wide = np.exp(-(((place - y) / height) ** 4)), np.exp(-(((place - x) / width) ** 4))
        return tall[:, :, None] * wide[:, None, :]

    body, heart = blob(0.55, 0.5, 0.6, 0.45), blob(0.62, 0.56, 0.16, 0.12)
    lungs = blob(0.45, 0.3, 0.3, 0.14) + blob(0.45, 0.7, 0.3, 0.14)
    frequency = np.arange(16, dtype=np.float32)
    waves = np.cos(np.pi * frequency[:, None] * (np.arange(64, dtype=np.float32) + 0.5) / 64)
    strength = 10 / (1 + frequency[:, None] + frequency) ** 1.6
    noise = waves.T @ (strength * rng.standard_normal((count, 16, 16), dtype=np.float32)) @ waves
    return np.clip(40 + 140 * body - 90 * lungs + 60 * heart + noise, 0, 255).astype(np.uint8)


def make_hashes(rng: np.random.Generator) -> np.ndarray:
    """Hash pictures, and put near copies in place of some: uint64 (COUNT,), in random order."""
    hashes = np.concatenate([likeness.perceptual_hashes(pictures(COUNT // BATCHES, rng)) for _ in range(BATCHES)])
    copies = hashes[: COUNT // 50].copy()
    for copy, flips in enumerate(rng.integers(0, DISTANCE + 1, len(copies))):
        for bit in rng.choice(64, flips, replace=False):
            copies[copy] ^= np.uint64(1 << int(bit))
    hashes[-len(copies) :] = copies
    return rng.permutation(hashes)


def brute_force(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compare all pairs: positions, first < second, sorted."""
    codes = []
    for row in range(0, len(hashes), ROWS):
        part = hashes[row : row + ROWS, None]
        for column in range(row, len(hashes), COLUMNS):
            other = hashes[column : column + COLUMNS]
            near = np.flatnonzero(np.bitwise_count(part ^ other) <= DISTANCE)
            one, two = np.divmod(near, len(other))
            codes.append(one + row << 32 | two + column)
    codes = np.sort(np.concatenate(codes))
    first, second = codes >> 32, codes & 0xFFFFFFFF
    above = first < second
    return first[above], second[above]


def distance(one: int, other: int) -> int:
    """Count different bits."""
    return (one ^ other).bit_count()


def check_hashes(rng: np.random.Generator) -> None:
    """Raise where hashes are not imagehash's, given pictures that it need not resize."""
    small = likeness.halve(pictures(300, rng)).astype(np.uint8)
    ours = likeness.perceptual_hashes(small.repeat(2, axis=1).repeat(2, axis=2))
    bits = np.array([imagehash.phash(Image.fromarray(picture)).hash.ravel() for picture in small])
    different = np.bitwise_count(ours ^ np.packbits(bits, axis=1).view(">u8").ravel().astype(np.uint64))
    if different.any():
        raise ValueError(f"{np.count_nonzero(different)} of 300 hashes are not those of imagehash.")


def check_pairs(hashes: np.ndarray, tree: pybktree.BKTree, asked: np.ndarray) -> None:
    """Raise where pairs are not the brute force's, or partners of those asked for not the tree's."""
    one, other = likeness.hash_pairs(hashes)
    if not all(np.array_equal(*sides) for sides in zip((one, other), brute_force(hashes), strict=True)):
        raise ValueError("pairs differ from those of the brute force.")
    for row in asked.tolist():
        partners = np.concatenate([[row], other[one == row], one[other == row]])
        if sorted(hashes[partners].tolist()) != sorted(item for _, item in tree.find(int(hashes[row]), DISTANCE)):
            raise ValueError(f"partners of hash {row} differ from those of the BK-tree.")


def run():
    rng = np.random.default_rng(0)
    check_hashes(rng)
    hashes = make_hashes(rng)
    quarter, numbers, asked = hashes[:QUARTER], hashes.tolist(), rng.choice(COUNT, QUERIES, replace=False)
    tree = pybktree.BKTree(distance, numbers)
    check_pairs(hashes, tree, asked)
    seconds = measure.rounds(
        {
            "ours": lambda: likeness.hash_pairs(hashes),
            "quarter": lambda: likeness.hash_pairs(quarter),
            "brute force": lambda: brute_force(hashes),
            "build": lambda: pybktree.BKTree(distance, numbers),
            "query": lambda: [tree.find(numbers[row], DISTANCE) for row in asked.tolist()],
        }
    )
    bk_tree = [build + query * COUNT / QUERIES for build, query in zip(seconds["build"], seconds["query"])]
    for name, peer, checked in (
        ("brute force in numpy", seconds["brute force"], "all pairs equal"),
        ("a BK-tree", bk_tree, f"all partners of {QUERIES} images equal"),
    ):
        yield measure.faster(
            f"near-duplicate search, 112,120 hashes, against {name}",
            seconds["ours"],
            peer,
            amount=COUNT,
            unit="images/s",
            at_least=10,
            checked=checked,
        )
    yield measure.shorter(
        "near-duplicate search, 112,120 hashes, against 28,030",
        seconds["ours"],
        seconds["quarter"],
        at_most=6,
        checked="all pairs of the larger equal to the brute force's",
        limit="Hashes of radiographs crowd: in one pair of images of fifty a chunk is equal or one bit off, so that "
        "they are compared; four times the images have sixteen times as many such pairs, fifteen times the results.",
    )


if __name__ == "__main__":
    measure.main(run)
