"""Who resembles whom: correlation of thumbnails, perceptual hashes, and an exact search among millions of pairs."""

import itertools

import numpy as np
import pandas as pd
from scipy.fft import dctn
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Correlation above which two thumbnails show the same patient's anatomy. On the public Alzheimer set it finds exactly
# its 200 patients of 32 slices each.
SAME_ANATOMY = 0.98
# Correlation, at half the thumbnails' side, above which two files show the same picture. On the 8,081 real brain and
# chest images, copies saved as JPEG of quality 80 stay above 0.9999, copies resized by 5 % above 0.9998, and above
# 0.9981 where resizing shifts them by half a pixel; the nearest slices of one head in the Alzheimer set reach 0.9974.
# Copies resized without interpolation fall to 0.985: they are found by `SAME_ANATOMY` alone.
SAME_PICTURE = 0.998
# Bits in which the 64-bit hashes of one picture's copies may differ; copies as above differed in at most 6.
HASH_DISTANCE = 7
# Grey level, of 255, that no pixel of a black image exceeds: JPEG leaves a little around black.
BLACK = 3
CONSTANT_STD = 1.0  # grey levels
_CHUNKS = 4  # of 16 bits: hashes that differ in at most 7 bits agree in one of them but for at most one bit
_ONE_BIT = tuple(1 << bit for bit in range(16))
_BLOCK = 2048
_PAIRS_AT_ONCE = 2**16  # as fit into a processor's cache
_PAIRS_OF_A_BLOCK = 2**12  # compared in one go; fewer are not worth the calls


def standardize(thumbnails: np.ndarray) -> np.ndarray:
    """Flatten thumbnails to mean 0 and length 1, so that a dot product is their correlation.

    Args:
        thumbnails: array, shape (num_images, height, width).

    Returns:
        float32 array, shape (num_images, height * width); constant images become zeros and correlate with nothing.
    """
    flat = thumbnails.reshape(len(thumbnails), np.prod(thumbnails.shape[1:])).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return np.divide(flat, length, out=np.zeros_like(flat), where=length > 0)


def similarity_groups(thumbnails: np.ndarray, *, threshold: float = SAME_ANATOMY) -> np.ndarray:
    """Group images whose thumbnails correlate above a threshold, directly or through others.

    Where patients are unknown this recovers them: slices of one head correlate, heads do not. Constant images have no
    correlation; those of one value form one group, as they are the same image.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64).
        threshold: correlation in (0, 1); see `SAME_ANATOMY`.

    Returns:
        int array, shape (num_images,): group of each image, numbered by first appearance.

    Raises:
        ValueError: threshold out of range.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"`threshold` is {threshold}; a correlation between 0 and 1 is expected.")
    first = _first_of_value(thumbnails)
    for start in range(0, len(thumbnails), _BLOCK):
        vectors = standardize(thumbnails[start : start + _BLOCK])
        for other in range(start, len(thumbnails), _BLOCK):
            rows, columns = np.nonzero(vectors @ standardize(thumbnails[other : other + _BLOCK]).T > threshold)
            rows, columns = rows + start, columns + other
            if (rows < columns).any():
                # Joined at once: where most images are alike, all pairs would not fit into memory.
                first = join(rows, columns, first)
    return pd.factorize(first)[0]


def _first_of_value(thumbnails: np.ndarray) -> np.ndarray:
    """Return of each constant image the position of the first of its value, of each other one its own."""
    lowest, place = thumbnails.min(axis=(1, 2)).astype(int), np.arange(len(thumbnails))
    value = np.where(lowest == thumbnails.max(axis=(1, 2)), lowest, -1)
    first = pd.Series(place).groupby(value).transform("min").to_numpy(int)
    return np.where(value < 0, place, first)


def join(rows: np.ndarray, columns: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Join items into sets, directly or through others.

    Args:
        rows, columns: int arrays, shape (num_pairs,): positions of the items to join.
        first: int array, shape (num_items,): of each item the position of one that it is joined with already, its own
            if there is none.

    Returns:
        int array, shape (num_items,): of each item the position of the first in its set.
    """
    count = len(first)
    ends = np.concatenate([rows, np.arange(count)]), np.concatenate([columns, first])
    graph = coo_array((np.ones(len(ends[0]), bool), ends), shape=(count, count))
    number = connected_components(graph, directed=False)[1]
    return np.unique(number, return_index=True)[1][number]


def assign_groups(
    manifest: pd.DataFrame,
    thumbnails: np.ndarray,
    *,
    prefix: str,
    threshold: float = SAME_ANATOMY,
    facts: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Fill `group_id` from `similarity_groups` where a manifest has none, and leave one that has it as it is.

    A constant image is a picture that was lost: nobody knows whose it was, so each is a group of its own.

    Args:
        manifest: rows with `group_id`, known in every row or in none.
        thumbnails: uint8 array, shape (num_rows, 64, 64), beside the manifest.
        prefix: of the names, which are `<prefix>-<five digits>`.
        threshold: of `similarity_groups`.
        facts: beside the manifest, with the fields of `kerasmed.images.FACTS`: they tell which images are constant, as
            in `identify`; without them a thumbnail of one grey level does.

    Returns:
        A copy with `group_id`.

    Raises:
        ValueError: groups known in some rows only, or not one thumbnail, or row of facts, a row.
    """
    missing = manifest["group_id"].isna()
    if not missing.any():
        return manifest.copy()
    if not missing.all():
        raise ValueError(
            f"`group_id` is missing in {int(missing.sum())} of {len(manifest)} rows; give it in all, or in none. "
            f"First: {manifest.loc[missing, 'image_path'].head(3).tolist()}."
        )
    if len(thumbnails) != len(manifest):
        raise ValueError(f"{len(thumbnails)} thumbnails for {len(manifest)} rows; one a row is expected.")
    if facts is not None and len(facts) != len(manifest):
        raise ValueError(f"{len(facts)} rows of facts for {len(manifest)} of the manifest; one a row is expected.")
    found = similarity_groups(thumbnails, threshold=threshold)
    if facts is None:
        lost = np.flatnonzero(thumbnails.min(axis=(1, 2)) == thumbnails.max(axis=(1, 2)))
    else:
        lost = np.flatnonzero(_constant(facts) != "")
    found[lost] = len(found) + np.arange(len(lost))
    return manifest.assign(group_id=[f"{prefix}-{number:05d}" for number in found])


def nearest(queries: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the most correlated reference thumbnail of each query.

    Args:
        queries: array, shape (num_queries, height, width).
        references: array, shape (num_references, height, width), at least one.

    Returns:
        int array of positions in `references` and float array of correlations, each of shape (num_queries,).
    """
    if not len(references):
        raise ValueError("`references` is empty; a nearest neighbour needs at least one training image.")
    positions, correlations = np.zeros(len(queries), int), np.full(len(queries), -np.inf, np.float32)
    for start in range(0, len(queries), _BLOCK):
        part = slice(start, start + _BLOCK)
        vectors = standardize(queries[part])
        for other in range(0, len(references), _BLOCK):
            similarity = vectors @ standardize(references[other : other + _BLOCK]).T
            nearer = similarity.max(axis=1) > correlations[part]
            positions[part][nearer] = similarity.argmax(axis=1)[nearer] + other
            correlations[part][nearer] = similarity.max(axis=1)[nearer]
    return positions, correlations


# --- perceptual hashes -----------------------------------------------------------------------------------------------


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """Hash thumbnails so that pictures that look alike have hashes of few different bits.

    The bits say which of the 8×8 lowest frequencies of the discrete cosine transform of the picture, at 32×32, are
    above their median, lowest first; blind to contrast, and to brightness but for the first bit.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64).

    Returns:
        uint64 array, shape (num_images,). Constant images have no frequencies: their hashes are nearly all equal.

    Source: Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1 (DCT hash),
    with the mean grey level among the frequencies, as the library imagehash has it.
    """
    hashes = np.zeros(len(thumbnails), np.uint64)
    for start in range(0, len(thumbnails), _BLOCK):
        low = dctn(halve(thumbnails[start : start + _BLOCK]), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
        bits = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
        hashes[start : start + _BLOCK] = bits.view(">u8").ravel()
    return hashes


def halve(thumbnails: np.ndarray) -> np.ndarray:
    """Average 2×2 pixels: uint8 (num_images, height, width) -> float32 (num_images, height / 2, width / 2)."""
    pairs = np.add(thumbnails[:, ::2], thumbnails[:, 1::2], dtype=np.uint16)
    return np.add(pairs[..., ::2], pairs[..., 1::2], dtype=np.float32) / 4


def hash_pairs(hashes: np.ndarray, *, max_distance: int = HASH_DISTANCE) -> tuple[np.ndarray, np.ndarray]:
    """Find every pair of hashes that differ in at most some bits, without comparing all pairs.

    A hash is cut into four chunks of 16 bits. If two differ in at most 7 bits, one of the chunks differs in at most
    one (in at most 3: in none): so only hashes with an equal or a one-bit-off chunk are compared. In at most 6, one of
    three chunks differs in at most one bit, or the fourth is equal; and hashes with both an even or both an odd number
    of ones, as nearly all perceptual hashes, differ in an even number of bits. No pair is missed.

    Args:
        hashes: uint64 array, shape (num_images,).
        max_distance: bits, 0 to 7.

    Returns:
        Two int arrays (num_pairs,): positions of the first and the second hash of each pair, first < second, sorted.

    Raises:
        ValueError: `max_distance` out of range.

    Source: Norouzi, Punjani, Fleet 2012, "Fast search in Hamming space with multi-index hashing", for 4 chunks.
    """
    if not 0 <= max_distance < 2 * _CHUNKS:
        raise ValueError(f"`max_distance` is {max_distance}; expected 0 to {2 * _CHUNKS - 1}.")
    hashes = np.asarray(hashes, np.uint64)
    if len(hashes) < 2:
        return np.zeros(0, int), np.zeros(0, int)
    codes = []
    with np.errstate():  # whose end resets the size of numpy's buffer
        np.setbufsize(256)  # else it copies each row of a block that is shorter, at three times the cost
        for place, chunk in enumerate(_chunks(hashes)):
            # Of d bits, one of the first d - 3 chunks differs in at most one, or one of the others in none.
            even, odd = (place < max_distance - (max_distance + end) % 2 - 3 for end in (0, 1))
            keys, flips = chunk.astype(np.uint32), [0, *(_ONE_BIT if even else ())]
            if even != odd:  # told apart by a 17th bit
                keys |= (np.bitwise_count(hashes) & np.uint8(1)).astype(np.uint32) << np.uint32(16)
                flips += [flip | 1 << 16 for flip in (0, *(_ONE_BIT if odd else ()))]
            codes.append(_chunk_pairs(hashes, keys, np.array(flips), max_distance))
    codes = np.concatenate(codes)
    codes.sort()  # `np.unique` is many times slower where there are a million
    codes = codes[np.diff(codes, prepend=-1) > 0]
    return codes >> 32, codes & 0xFFFFFFFF


def _chunks(hashes: np.ndarray) -> np.ndarray:
    """Cut hashes into chunks that tell them apart equally well: uint16 (4, num_images).

    Bits that are nearly always 0, or 1, tell little, and so do bits that go together: in a chunk that has many of them,
    most pairs would agree.
    """
    sample = hashes[:: -(-len(hashes) // 8192)]
    bits = np.packbits(sample >> np.arange(64, dtype=np.uint64)[:, None] & np.uint64(1), axis=1)
    both = np.array([np.bitwise_count(bit & bits).sum(axis=1) for bit in bits]) / len(sample)
    rates = both.diagonal()
    spread = np.outer(rates * (1 - rates), rates * (1 - rates))
    alike = np.divide((both - np.outer(rates, rates)) ** 2, spread, out=np.zeros((64, 64)), where=spread > 0)
    dealt = np.zeros((16, _CHUNKS), int)
    for row, four in enumerate(np.argsort(np.abs(rates - 0.5), kind="stable").reshape(dealt.shape)):
        # One to each chunk, so that each finds as little of its like as may be.
        dealt[row] = four[linear_sum_assignment(alike[four][:, dealt[:row]].sum(axis=1).T)[1]]
    chunks = np.zeros((_CHUNKS, len(hashes)), np.uint16)
    for place, row in enumerate(dealt):
        for chunk, bit in zip(chunks, row.astype(np.uint64)):
            chunk |= (hashes >> bit & np.uint64(1)).astype(np.uint16) << np.uint16(place)
    return chunks


def _chunk_pairs(hashes: np.ndarray, keys: np.ndarray, flips: np.ndarray, max_distance: int) -> np.ndarray:
    """Return the near pairs of hashes whose keys, of 17 bits, differ by one of the flips, as first << 32 | second."""
    order = np.argsort(keys.astype(np.uint16), kind="stable")  # numpy is quick to sort numbers of 16 bits
    order = order[np.argsort((keys[order] >> 16).astype(np.uint16), kind="stable")]
    count = np.bincount(keys, minlength=1 << 17)
    start = np.cumsum(count) - count
    keys = np.flatnonzero(count)
    others = keys[:, None] ^ flips
    # Each unordered pair of buckets once: a bucket is compared with itself and with higher ones.
    partners = np.where(others >= keys[:, None], count[others], 0)
    is_block = partners.sum(axis=1) * count[keys] >= _PAIRS_OF_A_BLOCK
    codes = [np.zeros(0, int)]  # where no two hashes are to be compared
    for find, chosen in ((_near_of_blocks, is_block), (_near_of_rows, ~is_block)):
        if chosen.any():
            buckets = start[keys[chosen]], count[keys[chosen]], start[others[chosen]], partners[chosen]
            for places in find(hashes[order], *buckets, max_distance):
                one, other = (order[place] for place in places)
                codes.append(np.minimum(one, other) << 32 | np.maximum(one, other))
    return np.concatenate(codes)


def _near_of_blocks(hashes, start, count, first, partners, max_distance):
    """Compare each bucket with itself and its others at once: for few buckets of many hashes.

    Args:
        hashes: in the order of buckets.
        start, count: of each bucket, shape (num_buckets,).
        first, partners: start and count of what it is compared with, itself first, shape (num_buckets, num_flips).
        max_distance: bits.

    Yields:
        Two int arrays (num_near,): places of near pairs; first < second.
    """
    places = _ranges(first.ravel(), partners.ravel())
    there = hashes[places]
    width = partners.sum(axis=1)
    blocks, near = [], []
    for low, high, end, size in zip(*(a.tolist() for a in (start, start + count, np.cumsum(width), width))):
        step = max(1, _PAIRS_AT_ONCE // size)
        for row in range(low, high, step):
            begin = end - size + row - low  # its own earlier hashes were compared with this one
            different = hashes[row : min(row + step, high), None] ^ there[begin:end]
            near.append(np.flatnonzero(np.bitwise_count(different) <= max_distance))
            blocks.append((row, begin, end - begin))
    row, begin, size = np.repeat(np.array(blocks).T, [len(each) for each in near], axis=1)
    left, right = np.divmod(np.concatenate(near).astype(np.uint32), size.astype(np.uint32))
    one, other = row + left, places[begin + right]
    once = one < other  # partners lie after a hash in its own bucket, or in a higher bucket
    yield one[once], other[once]


def _near_of_rows(hashes, start, count, first, partners, max_distance):
    """Compare each hash with those of its bucket and of the others: for many buckets of few; as `_near_of_blocks`."""
    bucket, flip = np.nonzero(partners)
    repeats = count[bucket]
    rows = _ranges(start[bucket], repeats)
    first, partners = np.repeat(first[bucket, flip], repeats), np.repeat(partners[bucket, flip], repeats)
    own = np.repeat(flip == 0, repeats)
    partners -= np.where(own, rows + 1 - first, 0)  # of its own bucket those after it
    first = np.where(own, rows + 1, first)
    ends = np.cumsum(partners)
    shift = first - ends + partners
    full = np.searchsorted(ends, np.arange(_PAIRS_AT_ONCE, ends[-1] + _PAIRS_AT_ONCE, _PAIRS_AT_ONCE)) + 1
    for low, high in itertools.pairwise([0, *np.minimum(full, len(rows)).tolist()]):
        begin = ends[low] - partners[low]
        places = np.repeat(shift[low:high], partners[low:high])
        places += np.arange(begin, begin + len(places))
        different = np.repeat(hashes[rows[low:high]], partners[low:high])
        different ^= hashes[places]
        near = np.flatnonzero(np.bitwise_count(different) <= max_distance)
        yield rows[low + np.searchsorted(ends[low:high] - begin, near, side="right")], places[near]


def _ranges(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Count upwards from each of some numbers, `count` times: (3, 7), (2, 1) -> 3, 4, 7."""
    numbers = np.repeat(first - np.cumsum(count) + count, count)
    numbers += np.arange(len(numbers))
    return numbers


# --- copies ----------------------------------------------------------------------------------------------------------


def _constant(facts: pd.DataFrame) -> np.ndarray:
    """Say of each image "black", "constant" or "": see `identify`."""
    black, flat = facts["maximum"] <= BLACK, facts["std"] < CONSTANT_STD
    return np.select([black.to_numpy(), flat.to_numpy()], ["black", "constant"], "")


def identify(thumbnails: np.ndarray, facts: pd.DataFrame) -> pd.DataFrame:
    """Say of each image whether it shows anything, and which others show the same picture.

    Constant images come first and are copies of nothing: they have no content to compare, and their perceptual hashes
    are all equal. The others are exact duplicates where the decoded pixels are equal, whatever the file's name and
    format; and near duplicates where the hashes differ in at most `HASH_DISTANCE` bits and the thumbnails, at half
    size, correlate above `SAME_PICTURE`.

    Args:
        thumbnails: uint8 array, shape (num_images, 64, 64).
        facts: beside them, with the fields of `kerasmed.images.FACTS`.

    Returns:
        DataFrame, a row an image: constant ("black": no grey level above `BLACK`, as also deep pixels of one value are
        read; "constant": a standard deviation below `CONSTANT_STD` otherwise; else ""); exact and near (int: position
        of the first image that is an exact, or an exact or near, duplicate of it, directly or through others; its own
        where there is none).

    Raises:
        ValueError: not one row of facts a thumbnail.
    """
    if len(thumbnails) != len(facts):
        raise ValueError(f"{len(thumbnails)} thumbnails for {len(facts)} rows of facts; one a row is expected.")
    constant = _constant(facts)
    place = np.arange(len(facts))
    first = pd.Series(place).groupby(facts["digest"].to_numpy()).transform("min").to_numpy(int)
    exact = np.where(constant == "", first, place)

    looked_at = np.flatnonzero((constant == "") & (exact == place))  # one of each picture is enough
    one, other = hash_pairs(perceptual_hashes(thumbnails)[looked_at])
    one, other = looked_at[one], looked_at[other]
    same = _correlate(thumbnails, one, other) > SAME_PICTURE
    near = join(one[same], other[same], exact)
    return pd.DataFrame({"constant": constant, "exact": exact, "near": near}, index=facts.index)


def _correlate(thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlate pairs of thumbnails, given by their positions, at half size: float32 (num_pairs,)."""
    members, places = np.unique(np.concatenate([one, other]), return_inverse=True)
    vectors = np.zeros((len(members), thumbnails.shape[1] * thumbnails.shape[2] // 4), np.float32)
    for start in range(0, len(members), _BLOCK):
        vectors[start : start + _BLOCK] = standardize(halve(thumbnails[members[start : start + _BLOCK]]))
    pairs = places.reshape(2, -1)
    correlations = np.zeros(len(one), np.float32)
    for start in range(0, len(one), _BLOCK):
        left, right = vectors[pairs[:, start : start + _BLOCK]]
        correlations[start : start + _BLOCK] = np.einsum("ij,ij->i", left, right)
    return correlations
