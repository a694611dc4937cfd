"""Every file of the corpora through the readers: read right, refused, or set aside, and none left out."""

import io
import logging
import shutil
import traceback
from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pydicom
import pytest

from kerasmed import datasets, dicom, images, pipelines, series
from tests.reliability import corpus, corpus_dicom, corpus_pictures

SIZE = (24, 20)


@pytest.fixture(scope="module")
def dicom_cases():
    return corpus_dicom.all_cases()


def _read_all(cases, folder):
    """What `images.read` makes of each file within the time limit: a picture or the error."""
    results = {}
    for case in cases:
        with corpus.time_limit(corpus.LIMIT_S, case.name):
            try:
                results[case.name] = images.read(folder / case.name)
            except Exception as error:  # which kinds are right, `judge` knows
                results[case.name] = error
    return results


def _check_headers(cases, folder, results):
    """A header that cannot be read is of a file that cannot; one that can says the size of the picture."""
    with corpus.time_limit(6 * corpus.LIMIT_S, "headers"):
        table = images.headers(folder, [case.name for case in cases])
    assert table["image_path"].tolist() == [case.name for case in cases]
    for case, row in zip(cases, table.itertuples()):
        result = results[case.name]
        if row.reason:
            assert isinstance(result, images.ImageError), (case.name, row.reason)
        elif isinstance(result, np.ndarray):
            assert sorted((row.height, row.width)) == sorted(result.shape), case.name  # some are turned
    return table


def _check_store(cases, folder, results):
    """Each file is in the store, with the pixels of `images.read`, or in its quarantine, with its reason."""
    names = [case.name for case in cases]
    with corpus.time_limit(12 * corpus.LIMIT_S, "decode"):
        store = pipelines.decode(
            pd.DataFrame({"image_path": names}), folder, image_size=SIZE, max_quarantined_share=1, progress=False
        )
    reasons = {name: str(result) for name, result in results.items() if isinstance(result, Exception)}
    assert dict(store.quarantine[["image_path", "reason"]].itertuples(index=False)) == reasons
    read = [name for name in names if name not in reasons]
    assert store.manifest["image_path"].tolist() == read and len(store.images) == len(read)
    for name, pixels in zip(read, store.images):
        np.testing.assert_array_equal(pixels, images.finish(results[name], image_size=SIZE), err_msg=name)
    return store


def _record(record, part, cases, results):
    outcomes = defaultdict(Counter)
    for case in cases:
        outcomes[case.kind][corpus.judge(case, results[case.name], (images.ImageError,))] += 1
    for kind, seen in outcomes.items():
        # Where decoders are free to show a damaged picture or give up, another version may do otherwise.
        record(part, kind, seen, exact=corpus.UNSEEN not in seen)


@pytest.mark.slow
def test_read_every_picture_of_the_corpus_comes_to_its_right_end(tmp_path, real_data, record):
    cases = corpus_pictures.all_cases(real_data)
    assert len(cases) > 500
    corpus.write(cases, tmp_path / "in")
    results = _read_all(cases, tmp_path / "in")
    _record(record, "Pictures", cases, results)
    _check_headers(cases, tmp_path / "in", results)
    _check_store(cases, tmp_path / "in", results)
    _, listed = datasets.image_files(tmp_path / "in")
    assert listed == sorted(case.name for case in cases if case.data is not None)


@pytest.mark.slow
def test_read_every_dicom_file_of_the_corpus_comes_to_its_right_end_and_names_nobody(
    tmp_path, record, dicom_cases, caplog, recwarn, capfd
):
    assert len(dicom_cases) > 500
    # The planted patient is in the files, but for those of the library, and such as were cut or compressed.
    assert sum(b"Planted" in case.data or b"PLANTED" in case.data for case in dicom_cases) > 400
    corpus.write(dicom_cases, tmp_path / "in")
    recwarn.clear(), caplog.clear(), capfd.readouterr()
    with caplog.at_level(logging.DEBUG):
        results = _read_all(dicom_cases, tmp_path / "in")
        table = _check_headers(dicom_cases, tmp_path / "in", results)
        store = _check_store(dicom_cases, tmp_path / "in", results)
    told = [str(warning.message) for warning in recwarn] + [entry.getMessage() for entry in caplog.records]
    told += ["".join(traceback.format_exception(each)) for each in results.values() if isinstance(each, Exception)]
    told += [*table["reason"], (store.folder / "quarantine.csv").read_text(encoding="utf-8"), *capfd.readouterr()]
    _names_nobody(told)
    _record(record, "DICOM", dicom_cases, results)


@pytest.mark.slow
def test_read_slices_and_acquisition_of_every_dicom_file_come_back_and_name_nobody(
    record, dicom_cases, caplog, recwarn
):
    seen, told = Counter(), []
    recwarn.clear(), caplog.clear()
    for case in dicom_cases:
        with caplog.at_level(logging.DEBUG), corpus.time_limit(corpus.LIMIT_S, case.name):
            told.append(str(dicom.read_acquisition(io.BytesIO(case.data))))
            try:
                slices = dicom.read_slices(io.BytesIO(case.data))
            except dicom.ImageError as error:
                told.append("".join(traceback.format_exception(error)))
                seen["refused with a reason"] += 1
                continue
        assert slices and all(np.isfinite(each.pixels).all() and each.pixels.ndim == 2 for each in slices)
        told += [str(each[2:]) for each in slices]
        seen["read, all values finite"] += 1
    told += [str(warning.message) for warning in recwarn] + [entry.getMessage() for entry in caplog.records]
    _names_nobody(told)
    record("DICOM", "all of these as slices of series", seen, exact=False)


def _names_nobody(told):
    for text in told:
        assert not any(word in text.lower() for word in corpus_dicom.IDENTIFIERS), text


# --- series ----------------------------------------------------------------------------------------------------------


def _slice(pixels, position, number=None):
    tags = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "InstanceNumber": number}
    tags |= {"ImagePositionPatient": None if position is None else [0, 0, position]}
    return corpus_dicom.saved(corpus_dicom.made(pixels, BitsStored=12, **tags))


def _flat(at, shape=(18, 22)):
    """A slice that is told from all others by its level, with both ends of the range in a corner."""
    pixels = np.full(shape, 100 + 10 * at, np.uint16)
    pixels[0, :2] = 0, 1000
    return pixels


ORDERS = {
    # positions by file, numbers by file, shapes by file -> the order that is right, and by what
    "slices in one place twice": ([0, 4, 4, 8], [4, 3, 2, 1], None, [0, 2, 1, 3], "position"),
    "slices all in one place": ([5, 5, 5, 5], [3, 1, 4, 2], None, [1, 3, 0, 2], "instance"),
    "slice without a place": ([0, None, 4, 8], [4, 3, 2, 1], None, [3, 2, 1, 0], "instance"),
    "slices without place or number": ([None] * 4, [None] * 4, None, [0, 1, 2, 3], "name"),
    "slices of the same number without a place": ([None] * 4, [7] * 4, None, [0, 1, 2, 3], "name"),
    "slices of several sizes": (
        [12, 8, 4, 0],
        [1, 2, 3, 4],
        [(18, 22), (30, 9), (1, 2), (64, 64)],
        [3, 2, 1, 0],
        "position",
    ),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_convert_series_of_odd_geometry_keeps_every_slice_in_a_stated_order(tmp_path, record, kind):
    positions, numbers, shapes, right, by = ORDERS[kind]
    folder = tmp_path / "data/s"
    folder.mkdir(parents=True)
    for at, (position, number) in enumerate(zip(positions, numbers)):
        pixels = _flat(at, shapes[at] if shapes else (18, 22))
        (folder / f"{at}.dcm").write_bytes(_slice(pixels, position, number))
    converted = _convert(tmp_path)
    assert converted.table["ordered_by"].tolist() == [by] and not len(converted.quarantine)
    assert converted.slices["file"].tolist() == [f"{at}.dcm" for at in right]
    volume = series.load(converted, "gsl", 0)
    assert volume.shape == (4, *SIZE)
    if not shapes:  # the level of its body tells which slice it is
        assert [int(level) for level in volume[:, -1, -1]] == sorted_levels(volume, right)
    record("DICOM", f"series: {kind}", {corpus.READ: 1})


def sorted_levels(volume, right):
    """The levels of the slices, ascending, put in the order in which they should lie."""
    levels = sorted(int(level) for level in volume[:, -1, -1])
    return [levels[at] for at in right]


@pytest.mark.slow
def test_convert_series_with_damaged_files_sets_each_aside_with_its_reason(tmp_path, record, dicom_cases):
    damaged = [case for case in dicom_cases if case.may == (corpus.REFUSED,) and case.kind != "several frames"]
    rng = np.random.default_rng(0)
    chosen = [damaged[at] for at in sorted(rng.choice(len(damaged), 60, replace=False))]
    folder = tmp_path / "data/s"
    folder.mkdir(parents=True)
    for at in range(4):
        (folder / f"good {at}.dcm").write_bytes(_slice(_flat(at), 4.0 * at, at + 1))
    expected = {}
    for at, case in enumerate(chosen):
        name = f"bad {at}.dcm"
        (folder / name).write_bytes(case.data)
        try:
            dicom.read_slices(folder / name)
        except dicom.ImageError as error:
            expected[f"s/{name}"] = str(error)
    converted = _convert(tmp_path)
    assert dict(converted.quarantine[["path", "reason"]].itertuples(index=False)) == expected
    assert len(converted.slices) + len(expected) == 64 and len(expected) > 40
    _names_nobody([(path).read_text() for path in converted.folder.rglob("*.csv")])
    record("DICOM", "series: damaged files among good ones", {"set aside with a reason": len(expected)})
    shutil.rmtree(folder)


def test_convert_series_of_the_library_equals_its_definition(tmp_path, record):
    """Real series, in an order found here without the package's help."""
    seen = Counter()
    for name in ("77654033/CT2", "98892001/CT2N", "98892001/CT5N", "98892003/MR1", "98892003/MR2", "98892003/MR700"):
        paths = sorted(path for path in (corpus_dicom.WHEEL / "dicomdirtests" / name).iterdir())
        headers = {path.name: pydicom.dcmread(path) for path in paths}
        found = series.read(paths[0].parent, [path.name for path in paths])
        assert sorted(found.table["file"]) == sorted(headers) and not len(found.quarantine)
        for file, one in zip(found.table["file"], found.slices):
            header = headers[file]
            values = header.pixel_array * float(header.get("RescaleSlope", 1)) + float(
                header.get("RescaleIntercept", 0)
            )
            np.testing.assert_array_equal(one.pixels[~_padded(one)], values[~_padded(one)].astype(np.float32))
        if found.ordered_by == "position":
            normal = np.cross(*np.reshape(headers[paths[0].name].ImageOrientationPatient, (2, 3)).astype(float))
            normal *= np.sign(normal[np.abs(normal).argmax()])
            along = [
                float(normal @ np.array(headers[file].ImagePositionPatient, float)) for file in found.table["file"]
            ]
            assert along == sorted(along)
        seen[corpus.READ] += 1
    record("DICOM", "series: those of the library", seen)


def _padded(one):
    return np.zeros(one.pixels.shape, bool) if one.padding is None else one.padding


def _convert(tmp_path):
    manifest = pd.DataFrame([{"study_id": "1", "series_id": "2", "modality": "x", "series_path": "s"}])
    with corpus.time_limit(6 * corpus.LIMIT_S, "convert"):
        return series.convert(
            manifest, tmp_path / "data", image_size=SIZE, jobs=1, max_quarantined_share=1, progress=False
        )
