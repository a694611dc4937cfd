import time

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, images, pipelines
from kerasmed.audit import likeness
from kerasmed.datasets import brain


def test_similarity_groups_finds_each_patients_slices(rng, heads):
    slices = np.repeat(heads(8), 3, axis=0)
    noisy = np.clip(slices + rng.normal(0, 4, slices.shape), 0, 255).astype(np.uint8)
    order = rng.permutation(len(noisy))
    groups = audit.similarity_groups(noisy[order])
    truth = pd.Series(order // 3)
    assert pd.Series(groups).groupby(truth).nunique().eq(1).all()
    assert len(set(groups)) == 8


def test_similarity_groups_joins_through_a_chain(heads):
    one, other = heads(2).astype(float)
    # Neighbouring mixtures correlate above 0.98, the ends of the chain far below.
    chain = np.stack([one + share * (other - one) for share in np.linspace(0, 1, 40)]).astype(np.uint8)
    assert len(set(audit.similarity_groups(chain))) == 1
    assert len(set(audit.similarity_groups(chain[[0, -1]]))) == 2


def test_similarity_groups_is_blind_to_brightness_and_contrast(heads):
    head = heads(1)[0].astype(float)
    assert len(set(audit.similarity_groups(np.stack([head, head * 0.5 + 40]).astype(np.uint8)))) == 1


def test_similarity_groups_constant_images_join_their_equals(heads):
    black, grey = np.zeros((64, 64), np.uint8), np.full((64, 64), 90, np.uint8)
    assert audit.similarity_groups(np.stack([black, heads(1)[0], black, grey])).tolist() == [0, 1, 0, 2]


def test_similarity_groups_blocks_do_not_change_the_result(rng, heads, monkeypatch):
    slices = np.concatenate([np.repeat(heads(10), 2, axis=0), np.zeros((3, 64, 64), np.uint8)])[rng.permutation(23)]
    whole = audit.similarity_groups(slices)
    assert len(set(whole)) == 11
    monkeypatch.setattr(likeness, "_BLOCK", 3)
    np.testing.assert_array_equal(audit.similarity_groups(slices), whole)


def test_similarity_groups_of_nothing_and_of_one_image():
    assert audit.similarity_groups(np.zeros((0, 64, 64), np.uint8)).tolist() == []
    assert audit.similarity_groups(np.zeros((1, 64, 64), np.uint8)).tolist() == [0]


def test_similarity_groups_threshold_out_of_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        audit.similarity_groups(np.zeros((1, 64, 64), np.uint8), threshold=98)


def test_similarity_groups_on_the_real_alzheimer_set_are_200_patients(real_data):
    store = pipelines.decode(brain.read(real_data, "alzheimer"), real_data, image_size=(32, 32), progress=False)
    groups = audit.similarity_groups(store.thumbnails)
    labels = store.manifest[list(brain.CLASS_NAMES["alzheimer"])].to_numpy().argmax(axis=1)
    assert len(set(groups)) == 200 and pd.Series(labels).groupby(groups).nunique().eq(1).all()
    if not (real_data / "brain/alzheimer/test").exists():
        assert set(np.bincount(groups)) == {25, 26}


def test_join_by_hand_names_the_first_of_each_set():
    joined = likeness.join(np.array([5, 4]), np.array([1, 3]), np.array([0, 1, 2, 2, 4, 5]))
    assert joined.tolist() == [0, 1, 2, 2, 2, 1]
    assert likeness.join(np.zeros(0, int), np.zeros(0, int), np.arange(2)).tolist() == [0, 1]
    assert likeness.join(np.zeros(0, int), np.zeros(0, int), np.zeros(0, int)).tolist() == []


@pytest.fixture
def manifest():
    """Function of group ids: a table with paths."""
    return lambda groups: pd.DataFrame({"image_path": [f"{row}.png" for row in range(len(groups))], "group_id": groups})


def test_assign_groups_names_similarity_groups_by_first_appearance(heads, manifest):
    one, other = heads(2)
    filled = audit.assign_groups(manifest([pd.NA] * 3), np.stack([one, other, one]), prefix="t")
    assert filled["group_id"].tolist() == ["t-00000", "t-00001", "t-00000"]


def test_assign_groups_gives_each_constant_image_a_group_of_its_own(heads, manifest):
    black = np.zeros((64, 64), np.uint8)
    filled = audit.assign_groups(
        manifest([pd.NA] * 5), np.stack([black, *heads(1).repeat(2, axis=0), black, black]), prefix="t"
    )
    names = filled["group_id"]
    assert names[1] == names[2] and names.nunique() == 4


def test_assign_groups_with_facts_calls_constant_what_identify_does(heads, manifest, facts_of):
    dim = np.zeros((64, 64), np.uint8)
    dim[30, 20] = 1  # whose thumbnail is of no one grey level
    grey = np.full((64, 64), 90, np.uint8)
    grey[:2] += 1
    pictures = np.stack([dim, grey, *heads(1).repeat(2, axis=0), grey, dim])
    table, facts = manifest([pd.NA] * 6), facts_of(pictures)
    assert (audit.identify(pictures, facts)["constant"] != "").tolist() == [True, True, False, False, True, True]
    alone = audit.assign_groups(table, pictures, prefix="t", facts=facts.set_axis(list("uvwxyz")))["group_id"]
    assert alone[2] == alone[3] and alone.nunique() == 5
    joined = audit.assign_groups(table, pictures, prefix="t")["group_id"]
    assert joined[0] == joined[5] and joined[1] == joined[4] and joined.nunique() == 3
    split = table.assign(group_id=alone, split=["train", "test", "train", "train", "train", "test"])
    assert audit.find(split).empty
    with pytest.raises(ValueError, match="5 rows of facts for 6 of the manifest"):
        audit.assign_groups(table, pictures, prefix="t", facts=facts.head(5))


def test_assign_groups_leaves_known_groups_alone(heads, manifest):
    known = manifest(["p1", "p2"])
    same = audit.assign_groups(known, np.repeat(heads(1), 2, axis=0), prefix="t")
    pd.testing.assert_frame_equal(same, known)


def test_assign_groups_of_some_rows_only_is_refused(manifest):
    with pytest.raises(ValueError, match=r"missing in 1 of 2 rows; give it in all, or in none. First: \['1.png'\]"):
        audit.assign_groups(manifest(["p", pd.NA]), np.zeros((2, 64, 64), np.uint8), prefix="t")
    with pytest.raises(ValueError, match="1 thumbnails for 2 rows"):
        audit.assign_groups(manifest([pd.NA] * 2), np.zeros((1, 64, 64), np.uint8), prefix="t")


def test_nearest_finds_itself_with_correlation_1(heads):
    pictures = heads(5)
    positions, correlations = audit.nearest(pictures[[3, 1]], pictures)
    assert positions.tolist() == [3, 1]
    np.testing.assert_allclose(correlations, 1, atol=1e-5)  # float32 sums of 4,096 terms


def test_nearest_blocks_do_not_change_the_result_and_the_first_of_equals_is_taken(heads, monkeypatch):
    references = np.tile(heads(7), (2, 1, 1))
    queries = np.concatenate([references[::-1], np.zeros((1, 64, 64), np.uint8)])
    monkeypatch.setattr(likeness, "_BLOCK", 4)
    positions, correlations = audit.nearest(queries, references)
    assert positions.tolist() == [6, 5, 4, 3, 2, 1, 0] * 2 + [0]
    assert correlations[-1] == 0  # black correlates with nothing
    assert [len(each) for each in audit.nearest(queries[:0], references)] == [0, 0]


def test_nearest_without_references_is_refused():
    with pytest.raises(ValueError, match="at least one training image"):
        audit.nearest(np.zeros((1, 64, 64)), np.zeros((0, 64, 64)))


# --- perceptual hashes -----------------------------------------------------------------------------------------------

COSINES = np.cos(np.pi * (2 * np.arange(32) + 1) * np.arange(32)[:, None] / 64)  # DCT-II of 32 numbers


def _plain_hash(thumbnail):
    """Hash of one image by the words of `perceptual_hashes`, and how far the nearest frequency is from the median."""
    small = [[thumbnail[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean() for x in range(32)] for y in range(32)]
    low = (COSINES @ np.array(small) @ COSINES.T)[:8, :8].ravel()
    number = sum(1 << (63 - place) for place, value in enumerate(low) if value > np.median(low))
    return number, np.abs(low - np.median(low)).min()


def test_perceptual_hashes_equal_a_plain_computation_an_image(heads):
    pictures = heads(40)
    hashes = audit.perceptual_hashes(pictures)
    plain = [_plain_hash(picture) for picture in pictures]
    clear = [row for row, (_, margin) in enumerate(plain) if margin > 0.1]  # float32: sums of 1,024 terms up to 255
    assert len(clear) > 30
    assert [int(hashes[row]) for row in clear] == [plain[row][0] for row in clear]


def test_perceptual_hashes_by_hand_are_the_signs_of_an_images_frequencies(rng):
    signs = rng.permutation(np.repeat([-1, 1], 32))
    signs = np.concatenate([[1], signs[1:] if signs[0] == 1 else -signs[1:]])  # the first is the mean grey level
    spectrum = np.zeros((32, 32))
    spectrum[:8, :8] = signs.reshape(8, 8)
    waves = COSINES.T @ spectrum @ COSINES
    picture = np.rint(128 + 100 * waves / np.abs(waves).max()).astype(np.uint8)
    (number,) = audit.perceptual_hashes(picture.repeat(2, axis=0).repeat(2, axis=1)[None])
    assert f"{number:064b}" == "".join("1" if sign > 0 else "0" for sign in signs)


def test_perceptual_hashes_of_copies_are_near_and_of_others_far(rng, heads):
    pictures = heads(30).astype(float)
    changed = np.clip(pictures * 0.7 + 30 + rng.normal(0, 3, pictures.shape), 0, 255).astype(np.uint8)
    one, other = (audit.perceptual_hashes(each) for each in (pictures.astype(np.uint8), changed))
    distance = np.bitwise_count(one[:, None] ^ other)
    assert np.diag(distance).max() <= likeness.HASH_DISTANCE < distance[~np.eye(30, dtype=bool)].min()


def test_perceptual_hashes_blocks_do_not_change_the_result(heads, monkeypatch):
    pictures = heads(7)
    whole = audit.perceptual_hashes(pictures)
    monkeypatch.setattr(likeness, "_BLOCK", 2)
    np.testing.assert_array_equal(audit.perceptual_hashes(pictures), whole)
    assert audit.perceptual_hashes(pictures[:0]).shape == (0,)


def _hashes(kind, count, rng):
    """Hashes of some kind, a tenth of them repeated, and a tenth near another one."""
    if kind == "skewed":  # bits that are nearly always 0, or 1, as those of radiographs
        rates = rng.choice([0.005, 0.02, 0.4, 0.97], 64)
        hashes = np.packbits(rng.random((count, 64)) < rates, axis=1).view(">u8").ravel().astype(np.uint64)
    elif kind == "clustered":
        hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)[rng.integers(0, 40, count)]
        for _ in range(6):
            hashes ^= np.uint64(1) << rng.integers(0, 64, count, dtype=np.uint64)
    else:
        hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    tenth = count // 10
    hashes[:tenth] = hashes[-tenth:]
    hashes[tenth : 2 * tenth] = hashes[-tenth:]
    for _ in range(8):
        hashes[tenth : 2 * tenth] ^= np.uint64(1) << rng.integers(0, 64, tenth, dtype=np.uint64)
    return rng.permutation(hashes)


def _brute_force(hashes, max_distance):
    near = [
        row + 1 + np.flatnonzero(np.bitwise_count(hashes[row + 1 :] ^ hashes[row]) <= max_distance)
        for row in range(len(hashes))
    ]
    return np.repeat(np.arange(len(hashes)), [len(each) for each in near]), np.concatenate(near)


@pytest.mark.parametrize("max_distance", [0, 3, 4, 7])
@pytest.mark.parametrize("kind", ["uniform", "skewed", "clustered"])
def test_hash_pairs_equal_brute_force_on_5000(kind, max_distance, rng):
    hashes = _hashes(kind, 5000, rng)
    pairs, expected = audit.hash_pairs(hashes, max_distance=max_distance), _brute_force(hashes, max_distance)
    assert len(expected[0]) >= 500
    np.testing.assert_array_equal(pairs, expected)


def test_hash_pairs_few_at_once_equal_all_at_once(rng, monkeypatch):
    hashes = np.concatenate([_hashes("skewed", 300, rng), np.zeros(50, np.uint64)])
    whole = audit.hash_pairs(hashes)
    for at_once in (1, 7, len(whole[0])):
        monkeypatch.setattr(likeness, "_PAIRS_AT_ONCE", at_once)
        np.testing.assert_array_equal(audit.hash_pairs(hashes), whole)


@pytest.mark.parametrize("max_distance", [0, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("num_ones", ["any", "even"])
def test_hash_pairs_by_blocks_and_by_rows_equal_brute_force(num_ones, max_distance, rng, monkeypatch):
    hashes = _hashes("clustered", 1000, rng)
    if num_ones == "even":
        hashes ^= np.bitwise_count(hashes).astype(np.uint64) & np.uint64(1)
    expected = _brute_force(hashes, max_distance)
    for least in (1, 100, 10**9):
        monkeypatch.setattr(likeness, "_PAIRS_OF_A_BLOCK", least)
        np.testing.assert_array_equal(audit.hash_pairs(hashes, max_distance=max_distance), expected)


def test_hash_pairs_of_few_hashes_equal_brute_force(rng):
    for count in range(2, 40):
        spread, alike = rng.integers(0, 2**64, count, dtype=np.uint64), rng.integers(0, 2**12, count, dtype=np.uint64)
        for hashes in (spread, alike, spread[:1].repeat(count)):
            for max_distance in range(8):
                distance = np.bitwise_count(hashes[:, None] ^ hashes)
                expected = np.nonzero(np.triu(distance <= max_distance, 1))
                np.testing.assert_array_equal(likeness.hash_pairs(hashes, max_distance=max_distance), expected)


def test_hash_pairs_leave_the_size_of_numpys_buffer():
    before = np.getbufsize()
    audit.hash_pairs(np.arange(100, dtype=np.uint64))
    assert np.getbufsize() == before


def test_hash_pairs_by_hand():
    hashes = np.array([0, 0b1111111, 0b11111111, 2**64 - 1], np.uint64)  # 7 and 8 bits from the first, 1 apart
    assert [side.tolist() for side in audit.hash_pairs(hashes)] == [[0, 1], [1, 2]]
    assert [side.tolist() for side in audit.hash_pairs(hashes, max_distance=6)] == [[1], [2]]


@pytest.mark.parametrize("count", [0, 1])
def test_hash_pairs_of_fewer_than_two_are_none(count):
    assert [len(side) for side in audit.hash_pairs(np.zeros(count, np.uint64))] == [0, 0]


@pytest.mark.parametrize("max_distance", [-1, 8])
def test_hash_pairs_beyond_what_the_chunks_can_promise_are_refused(max_distance):
    with pytest.raises(ValueError, match="expected 0 to 7"):
        audit.hash_pairs(np.zeros(2, np.uint64), max_distance=max_distance)


# Share of ones of each bit in the hashes of the 90 real radiographs, in percent.
CHEST_RATES = """
    100 51  1 61 74 29  2 68   2 53 93 63 98 52 33 62  44 53  8 21  7 66 89 43  12 36  1 70 62 64 93 43
     16 38  4 66 71 60 51 48  10 64 19 46 88 70 66 62  13 50 36 74 93 58 50 59  23 60 36 64 87 53 42 66
"""


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["uniform", "as of radiographs"])
def test_hash_pairs_of_112120_take_less_than_6_seconds(kind, rng):
    count = 112_120
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    if kind != "uniform":
        rates = np.array(CHEST_RATES.split(), float) / 100
        hashes = np.packbits(rng.random((count, 64)) < rates, axis=1).view(">u8").ravel().astype(np.uint64)
    planted = count // 50
    hashes[-planted:] = hashes[:planted]
    for _ in range(7):
        hashes[-planted:] ^= np.uint64(1) << rng.integers(0, 64, planted, dtype=np.uint64)
    start = time.perf_counter()
    one, other = audit.hash_pairs(hashes)
    assert time.perf_counter() - start < 6
    found = set(zip(one.tolist(), other.tolist()))
    assert {(row, count - planted + row) for row in range(planted)} <= found
    assert (one < other).all() and len(found) == len(one)
    assert np.bitwise_count(hashes[one] ^ hashes[other]).max() <= 7
    start = int(rng.integers(0, count - 500))
    for rows in (range(500), range(start, start + 500)):  # the first have copies at the end
        near = {
            (min(row, partner), max(row, partner))
            for row in rows
            for partner in np.flatnonzero(np.bitwise_count(hashes ^ hashes[row]) <= 7).tolist()
            if partner != row
        }
        inside = np.isin(one, rows) | np.isin(other, rows)
        assert near == set(zip(one[inside].tolist(), other[inside].tolist()))
        assert len(near) >= 500 or rows.start
    if kind == "uniform":  # two unrelated hashes are this near once in 20 billion pairs
        assert len(found) < planted + 5


# --- copies ----------------------------------------------------------------------------------------------------------


def test_identify_by_hand(heads, facts_of):
    one, other = heads(2)
    nearly = np.clip(one.astype(int) + 1, 0, 255).astype(np.uint8)
    dim = np.full((64, 64), 3, np.uint8)
    grey = np.full((64, 64), 200, np.uint8)
    pictures = np.stack([grey, one, dim, other, nearly, grey, one, np.zeros_like(one), other])
    table = audit.identify(pictures, facts_of(pictures))
    assert table["constant"].tolist() == ["constant", "", "black", "", "", "constant", "", "black", ""]
    # Constant images are copies of nothing, not even of one another.
    assert table["exact"].tolist() == [0, 1, 2, 3, 4, 5, 1, 7, 3]
    assert table["near"].tolist() == [0, 1, 2, 3, 1, 5, 1, 7, 3]


def test_identify_black_and_constant_end_where_they_say(facts_of):
    pictures = np.full((4, 64, 64), 100, np.uint8)
    pictures[0] = 4  # one grey level above black
    pictures[1, :32] += 2  # standard deviation 1: something is there
    pictures[2, :31] += 2  # just below
    pictures[3] = 0
    pictures[3, 0, 0] = 4
    table = audit.identify(pictures, facts_of(pictures))
    assert table["constant"].tolist() == ["constant", "", "constant", "constant"]


def test_identify_looks_at_size_and_pixels_and_not_at_thumbnails_for_exact_copies(heads, facts_of):
    head = heads(1)[0]
    small, large = head, head.repeat(2, axis=0).repeat(2, axis=1)
    thumbnails = np.stack([images.thumbnail(each) for each in (small, large, small)])
    np.testing.assert_array_equal(thumbnails[0], thumbnails[1])
    table = audit.identify(thumbnails, facts_of([small, large, small]))
    assert table["exact"].tolist() == [0, 1, 0] and table["near"].tolist() == [0, 0, 0]


def test_identify_likeness_is_confirmed_on_pixels(heads, facts_of, monkeypatch):
    pictures = heads(6)
    monkeypatch.setattr(likeness, "perceptual_hashes", lambda thumbnails: np.zeros(len(thumbnails), np.uint64))
    assert audit.identify(pictures, facts_of(pictures))["near"].tolist() == list(range(6))


def test_identify_does_not_depend_on_order_or_blocks(rng, heads, facts_of, monkeypatch):
    pictures = np.repeat(heads(8), 3, axis=0)
    pictures[1::3] = np.clip(pictures[1::3].astype(int) + rng.integers(-2, 3, (8, 64, 64)), 0, 255)
    order = rng.permutation(24)
    monkeypatch.setattr(likeness, "_BLOCK", 5)
    table = audit.identify(pictures[order], facts_of(pictures[order]))
    for column, each in (("near", order // 3), ("exact", order // 3 * 2 + (order % 3 == 1))):
        first = pd.Series(range(24)).groupby(each).transform("min")
        assert table[column].tolist() == first.tolist()


def test_identify_of_nothing_one_image_and_a_tables_own_index(heads, facts_of):
    head = heads(1)
    none = audit.identify(head[:0], facts_of(head[:0]))
    assert none.empty and none.columns.tolist() == ["constant", "exact", "near"]
    one = audit.identify(head, facts_of(head).set_axis([17]))
    assert one.loc[17].tolist() == ["", 0, 0]


def test_identify_facts_of_other_images_are_refused(heads, facts_of):
    with pytest.raises(ValueError, match="2 thumbnails for 1 rows of facts"):
        audit.identify(heads(2), facts_of(heads(1)))


def test_identify_reads_deep_pixels_of_one_value_and_tiny_images(tmp_path, examined, heads):
    folder = tmp_path / "s"
    folder.mkdir()
    tiny = heads(1)[0, ::4, ::4]
    for name, picture in (
        ("deep.png", np.full((40, 40), 700, np.uint16)),
        ("dot.png", np.full((1, 1), 9, np.uint8)),
        ("tiny.png", tiny),
        ("tiny.bmp", tiny),
        ("tiny.jpg", tiny),
    ):
        cv2.imwrite(str(folder / name), picture)
    found = examined(folder).found.set_index("kind")["image_paths"]
    assert found["black"] == ["deep.png"] and found["constant"] == ["dot.png"]
    assert found["exact_duplicate"] == ["tiny.bmp", "tiny.png"]
    assert found["near_duplicate"] == ["tiny.bmp", "tiny.jpg", "tiny.png"]
