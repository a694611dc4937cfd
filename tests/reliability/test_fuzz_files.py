"""Files and arrays drawn at random, and led by coverage: a picture or a stated reason, whatever they hold."""

import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kerasmed import images
from tests.reliability import corpus, corpus_dicom, corpus_pictures, properties

SAME = settings(derandomize=True, database=None, deadline=None, max_examples=400)


def _seeds() -> list[bytes]:
    """Small files of every kind, without real data."""
    ramp = np.add.outer(np.arange(12), 3 * np.arange(16)).astype(np.uint8) * 4
    source = corpus_pictures.Source(None, np.tile(ramp, (2, 3)))
    pictures = [case.data for case in corpus_pictures.unusual([source], np.random.default_rng(0))]
    of_dicom = [case.data for case in corpus_dicom.all_cases()]
    return [data for data in pictures + of_dicom if len(data) < 12_000]


@pytest.fixture(scope="module")
def seeds():
    return _seeds()


@pytest.mark.slow
def test_read_files_led_by_coverage_ends_in_a_picture_or_a_reason(tmp_path, fuzz, record, seeds):
    begin = seeds[::6]  # all are read before the first is changed
    for at, data in enumerate(begin):
        path = tmp_path / "seeds" / str(at)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    command = [sys.executable, "-m", "tests.reliability.fuzz_files", str(tmp_path / "seeds")]
    told = fuzz(command, runs=3000, seconds=45, seed=11, timeout=30, max_len=12_000, rss_limit_mb=3000)
    (runs,) = re.findall(r"^Done (\d+) runs in", told, flags=re.MULTILINE)
    assert int(runs) > len(begin)
    record(
        "Fuzzing",
        "files led by coverage of the readers, pydicom's and Pillow's",
        {"picture or reason": runs},
        exact=False,
        timed=True,
    )


STARTS = (
    b"",
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff\xe0",
    b"BM",
    b"GIF89a",
    b"II*\0",
    b"MM\0*",
    bytes(128) + b"DICM",
)


def test_read_bytes_at_random_ends_in_a_picture_or_a_reason(record):
    seen = Counter()

    @SAME
    @given(st.sampled_from(STARTS), st.binary(max_size=400))
    def holds(start, rest):
        seen[properties.check(start + rest)] += 1

    holds()
    record("Fuzzing", "bytes at random behind the start of each format", seen, exact=False)


def test_read_files_changed_at_random_ends_in_a_picture_or_a_reason(record, seeds):
    seen = Counter()
    change = st.tuples(st.floats(0, 1), st.sampled_from(("put", "insert", "drop", "double")), st.binary(max_size=9))

    @SAME
    @given(st.sampled_from(seeds), st.lists(change, min_size=1, max_size=6))
    def holds(data, changes):
        for share, how, others in changes:
            at = int(share * len(data))
            kept = at + (0 if how == "insert" else len(others))
            middle = {"put": others, "insert": others, "drop": b"", "double": data[at:kept] * 2}[how]
            data = data[:at] + middle + data[kept:]
        seen[properties.check(data)] += 1

    holds()
    assert seen["read"] and seen[corpus.REFUSED]
    record("Fuzzing", "files changed at random", seen, exact=False)


NUMBERS = [
    *(np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.int64),
    *(np.float16, np.float32, np.float64),
]
SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 6)) | st.tuples(
    st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 3, 4])
)


def test_from_array_of_any_numbers_keeps_their_order_and_their_ends(record):
    seen = Counter()

    @SAME
    @given(st.sampled_from(NUMBERS).flatmap(lambda kind: arrays.arrays(kind, SHAPES)))
    @example(np.array([[0, 5e-324]]))
    @example(np.array([[-(2**63), 2**63 - 1, 0]]))
    def holds(array):
        try:
            picture = images.from_array(array)
        except ValueError as error:
            assert re.search("NaN|infinite|transparency", str(error)), error
            seen[corpus.REFUSED] += 1
            return
        assert picture.dtype == np.uint8 and picture.shape == array.shape[:2]
        seen["a picture"] += 1
        if array.ndim == 2 and array.dtype != np.uint8:
            values = np.nan_to_num(array.astype(np.float64))
            order = np.argsort(values, axis=None)
            assert (np.diff(picture.ravel()[order].astype(int)) >= 0).all()
            if np.ptp(values):
                assert (picture.min(), picture.max()) == (0, 255)
                seen["a picture whose order and ends were checked"] += 1
                seen["a picture"] -= 1

    holds()
    record("Fuzzing", "arrays of any numbers as pictures", seen, exact=False)
