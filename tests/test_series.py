import logging
import math
import os
import time
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import get_decoder

from kerasmed import dicom, paths, series

WHEEL = Path(pydicom.__path__[0]) / "data" / "test_files"  # test files that come with the library
AXIAL, SAGITTAL, CORONAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1)
SIZE = (16, 20)


def _write(path, pixels, **tags):
    """A DICOM file of an array (H, W) of integers; None drops a tag."""
    data_set = Dataset()
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data_set.SOPClassUID, data_set.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    bits = 8 * pixels.itemsize
    told = {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1, "BitsAllocated": bits}
    told |= {"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": int(pixels.dtype.kind == "i")}
    told |= {"BitsStored": bits, "PixelData": pixels.tobytes(), **tags}
    told["HighBit"] = told["BitsStored"] - 1
    for name, value in told.items():
        if value is not None:
            setattr(data_set, name, value)
    data_set["PixelData"].VR = "OW" if bits > 8 else "OB"
    path.parent.mkdir(parents=True, exist_ok=True)
    data_set.save_as(path, enforce_file_format=True)
    return path


def _write_series(folder, volume, *, numbers=None, names=None, step=(0.0, 0.0, 4.0), orientation=AXIAL, **tags):
    """A file a slice, "1.dcm" first; slice i lies at i · step; `orientation` None writes no geometry."""
    for at, pixels in enumerate(volume):
        geometry = {"InstanceNumber": numbers[at] if numbers else at + 1}
        if orientation:
            geometry |= {"ImagePositionPatient": [float(at * each) for each in step]}
            geometry |= {"ImageOrientationPatient": list(orientation)}
        _write(folder / (names[at] if names else f"{at + 1}.dcm"), pixels, **{**geometry, **tags})
    return folder


def _volume(rng, depth=5, size=(12, 10), top=4000):
    return rng.integers(0, top, (depth, *size)).astype(np.uint16)


def _names(folder):
    return sorted((path.name for path in folder.iterdir()), key=series.natural)


def _read(folder):
    return series.read(folder, _names(folder))


def _slice(position=None, orientation=None, number=None, pixels=None, padding=None, window=None):
    pixels = np.zeros((2, 2), np.float32) if pixels is None else np.asarray(pixels, np.float32)
    return dicom.Slice(pixels, padding, position, orientation, number, window)


@pytest.fixture
def spine(tmp_path, rng):
    """Root and manifest of two studies: series of 5, 3 and 4 slices of 12 × 10 pixels of 12 bits."""
    rows = []
    for study, name, modality, depth in (
        ("7", "71", "Sagittal T1", 5),
        ("7", "72", "Axial T2", 3),
        ("8", "81", "x", 4),
    ):
        path = f"lumbar/train_images/{study}/{name}"
        _write_series(tmp_path / "data" / path, _volume(rng, depth), BitsStored=12, Manufacturer="SIEMENS")
        rows.append({"study_id": study, "series_id": name, "modality": modality, "series_path": path, "extra": 1})
    return tmp_path / "data", pd.DataFrame(rows)


def _convert(spine, **options):
    return series.convert(spine[1], spine[0], **{"image_size": SIZE, "jobs": 1, "progress": False, **options})


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded."""
    names, read = [], dicom.read_slices
    monkeypatch.setattr(dicom, "read_slices", lambda path: names.append(Path(path).name) or read(path))
    return names


# --- order -----------------------------------------------------------------------------------------------------------


def test_natural_sorts_numbers_as_numbers():
    names = ["a", "a10", "a9", "a1b", "10", "9", "09", "b", "a1"]
    assert sorted(names, key=series.natural) == ["09", "9", "10", "a", "a1", "a1b", "a9", "a10", "b"]


@pytest.mark.parametrize(
    ("orientation", "step"),
    [
        (AXIAL, (0, 0, 4)),  # begins at the feet
        ((-1, 0, 0, 0, 1, 0), (0, 0, 4)),  # whose normal points to the feet
        (SAGITTAL, (3, 0, 0)),  # at the right
        ((0, -1, 0, 0, 0, -1), (3, 0, 0)),
        (CORONAL, (0, 5, 0)),  # at the front
        ((0.8, 0, 0.6, 0, 1, 0), (-2.4, 0, 3.2)),  # oblique: normal (-0.6, 0, 0.8)
    ],
)
def test_order_of_shuffled_slices_goes_along_the_normal(rng, orientation, step):
    slices = [_slice(tuple(at * np.array(step) + (9, -70, 3.5)), orientation, 99 - at) for at in range(12)]
    for _ in range(5):
        shuffled = rng.permutation(12)
        rows, how = series.order([slices[row] for row in shuffled])
        assert how == "position" and shuffled[rows].tolist() == list(range(12))


def test_order_of_tilted_stacks_goes_along_their_mean_normal(rng):
    # Discs at heights 0, 30 and 60, in stacks tilted by -20°, 0° and 25° about the patient's left-right axis
    slices = []
    for height, angle in zip((0, 30, 60), np.deg2rad([-20, 0, 25])):
        down, normal = (0, math.cos(angle), math.sin(angle)), np.array([0, -math.sin(angle), math.cos(angle)])
        slices += [_slice(tuple(normal * at + (0, 0, height)), (1, 0, 0, *down)) for at in range(-8, 9, 4)]
    shuffled = rng.permutation(15)
    rows, how = series.order([slices[row] for row in shuffled])
    assert how == "position" and shuffled[rows].tolist() == list(range(15))


def test_order_of_equal_positions_is_by_instance_number():
    slices = [_slice((0, 0, z + 1e-5 * number), AXIAL, number) for z, number in ((4, 1), (0, 4), (4, 2), (0, 3))]
    assert series.order(slices) == ([3, 1, 0, 2], "position")


@pytest.mark.parametrize(
    "slices",
    [
        [_slice((0, 0, 3), AXIAL, 2), _slice(None, AXIAL, 1)],
        [_slice((0, 0, 3), AXIAL, 2), _slice((0, 0, 4), None, 1)],
        [_slice((0, 0, 3), AXIAL, 2), _slice((0, 0, 3), AXIAL, 1)],
        [_slice((0, 0, 3), (1, 0, 0, 1, 0, 0), 2), _slice((0, 0, 4), (1, 0, 0, 1, 0, 0), 1)],  # no directions
        [_slice((0, 0, 3), AXIAL, 3), _slice((0, 9, 0), SAGITTAL, 1), _slice((4, 0, 0), CORONAL, 2)],  # a scout
    ],
)
def test_order_without_positions_that_tell_is_by_instance_number(slices):
    numbers = [each.instance_number for each in slices]
    rows, how = series.order(slices)
    assert how == "instance" and [numbers[row] for row in rows] == sorted(numbers)


@pytest.mark.parametrize("numbers", [(2, None, 1), (5, 5, 5), (None, None, None)])
def test_order_without_numbers_keeps_the_order_given(numbers):
    assert series.order([_slice(number=number) for number in numbers]) == ([0, 1, 2], "name")
    assert series.order([]) == ([], "name")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_read_puts_files_in_order_and_says_so(tmp_path, rng):
    volume = _volume(rng)
    tags = {"MagneticFieldStrength": 3, "SliceThickness": 4, "PixelSpacing": [0.5, 0.5], "Manufacturer": "Philips"}
    names = ["4.dcm", "2.dcm", "11.dcm", "1.dcm", "3.dcm"]
    got = _read(_write_series(tmp_path / "s", volume, names=names, numbers=[8, 6, 4, 2, 1], **tags))
    np.testing.assert_array_equal([each.pixels for each in got.slices], volume)
    assert got.ordered_by == "position" and got.quarantine.empty
    assert got.table.to_dict("list") == {
        "position": [0, 1, 2, 3, 4],
        "file": names,
        "instance_number": [8, 6, 4, 2, 1],
    }
    assert got.acquisition == {
        **{"field_strength": 3, "slice_thickness": 4, "pixel_spacing": 0.5, "manufacturer": "Philips"},
        **{"sex": None, "age": None},
    }


def test_read_without_geometry_goes_by_number_then_by_name(tmp_path, rng):
    volume = _volume(rng)
    got = _read(_write_series(tmp_path / "a", volume, orientation=None, numbers=[5, 4, 3, 2, 1]))
    np.testing.assert_array_equal([each.pixels for each in got.slices], volume[::-1])
    assert got.ordered_by == "instance" and got.table["file"].iloc[0] == "5.dcm"
    names = [f"{number}.dcm" for number in (8, 9, 10, 11, 100)]
    got = _read(_write_series(tmp_path / "b", volume, orientation=None, names=names, InstanceNumber=None))
    np.testing.assert_array_equal([each.pixels for each in got.slices], volume)
    assert got.ordered_by == "name" and got.table["instance_number"].isna().all()


def test_read_sets_bad_files_aside_and_goes_on(tmp_path, rng):
    volume = _volume(rng)
    folder = _write_series(tmp_path / "s", volume)
    (folder / "2.dcm").write_bytes((folder / "2.dcm").read_bytes()[:-50])
    (folder / "notes.txt").write_text("no picture")
    got = series.read(folder, [*_names(folder), "none.dcm"])
    np.testing.assert_array_equal([each.pixels for each in got.slices], volume[[0, 2, 3, 4]])
    assert got.table["position"].tolist() == [0, 1, 2, 3]
    assert got.quarantine["file"].tolist() == ["2.dcm", "notes.txt", "none.dcm"]
    for reason, start in zip(got.quarantine["reason"], ("DICOM cut off", "not DICOM (10 bytes)", "absent")):
        assert reason.startswith(start)


def test_read_of_no_readable_file_has_no_slices(tmp_path):
    got = series.read(tmp_path, ["none.dcm"])
    assert got.slices == [] and got.table.empty and len(got.quarantine) == 1
    assert set(got.acquisition.values()) == {None}


def test_read_every_magnetic_resonance_and_radiography_file_of_the_wheel(caplog):
    found, quarantine = [], {}
    for path in sorted(path for path in WHEEL.rglob("*") if path.is_file()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data_set = pydicom.dcmread(path)
            if data_set.get("Modality") not in ("MR", "CR") or "PixelData" not in data_set:
                continue
        except (pydicom.errors.InvalidDicomError, AttributeError):
            continue
        found.append(path.relative_to(WHEEL).as_posix())
        with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
            warnings.simplefilter("error")
            got = series.read(WHEEL, found[-1:])
        assert len(got.slices) + len(got.quarantine) == 1
        for each in got.slices:
            assert each.pixels.shape == (data_set.Rows, data_set.Columns) and np.ptp(each.pixels) > 0
            assert (each.position is None) == (data_set.Modality == "CR") and each.instance_number is not None
            assert got.acquisition["manufacturer"] in ("Agfa", "Canon", "Philips", "Siemens")
            assert all(np.ptp(series.normalise(got.slices, kind)[0]) == 255 for kind in series.NORMALISATIONS)
        quarantine |= dict(got.quarantine.itertuples(index=False))
    size = "DICOM cut off, or of other Rows or Columns: "
    expected = {"MR_truncated.dcm": size + "8130 bytes of pixels, where 64×64 take 8192"}
    expected |= {"MR_small_padded.dcm": size + "8320 bytes of pixels, where 64×64 take 8192"}  # just as one row more
    # Whether these can be read is up to the decoders installed.
    if not get_decoder(uid.JPEGLSLossless).is_available:
        expected["MR_small_jpeg_ls_lossless.dcm"] = "no decoder for DICOM pixels in JPEG-LS Lossless Image Compression"
    assert quarantine.keys() == expected.keys() and len(found) == 30
    assert all(quarantine[name].startswith(start) for name, start in expected.items())


def test_read_a_real_series_in_the_order_of_its_slice_locations():
    names = [f"dicomdirtests/98892003/MR700/{number}" for number in (4618, 4467, 4678, 4528, 4648, 4558, 4588)]
    got = series.read(WHEEL, names)
    located = [pydicom.dcmread(WHEEL / name).ImagePositionPatient for name in got.table["file"]]
    assert got.ordered_by == "position" and len(located) == 7
    axis = np.abs(np.ptp(located, axis=0)).argmax()
    assert (np.diff(np.array(located, float)[:, axis]) > 0).all()


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_normalise_gsl_by_hand():
    # 200 values: the first of 200 is the 0.5th percentile, the 199th the 99.5th
    values = np.concatenate([[-9999], np.linspace(0, 1970, 198), [50000]]).astype(np.float32)
    slices = [_slice(pixels=values[:80].reshape(8, 10)), _slice(pixels=values[80:].reshape(12, 10))]
    got = series.normalise(slices, "gsl")
    assert [each.shape for each in got] == [(8, 10), (12, 10)] and got[0].dtype == np.uint8
    low, high = np.percentile(values, [0.5, 99.5], method="inverted_cdf")
    assert (low, high) == (-9999, 1970)
    want = np.rint((np.clip(values, low, high) - low) * (255 / (high - low)))
    # 32 bits round the last place
    np.testing.assert_allclose(np.concatenate([each.ravel() for each in got]), want, atol=1e-9)


def test_normalise_hist_by_hand():
    slices = [_slice(pixels=[[7, 7, 9]]), _slice(pixels=[[1000, 9, 30000]])]
    got = series.normalise(slices, "hist")
    # C is 2, 4, 5, 6 at 7, 9, 1000, 30000: 255 · (C - 2) / 4
    np.testing.assert_array_equal(np.concatenate(got, axis=1), [[0, 0, 128, 191, 128, 255]])


def test_normalise_hist_of_8_bits_equals_opencv(rng):
    picture = cv2.GaussianBlur(rng.integers(0, 256, (40, 50), dtype=np.uint8), (9, 9), 0)
    got = series.normalise([_slice(pixels=picture)], "hist")[0]
    np.testing.assert_array_equal(got, cv2.equalizeHist(picture))


def test_normalise_hist_of_values_16_bits_cannot_tell_apart_is_exact(rng):
    values = rng.normal(size=(30, 30)).astype(np.float32)
    values[0, 0] = 1e6  # beside which all others are one of 65,536 levels
    got = series.normalise([_slice(pixels=values)], "hist")[0]
    ranks = values.ravel().argsort().argsort().reshape(values.shape)
    np.testing.assert_array_equal(got, np.rint(255 * ranks / 899))


@pytest.mark.parametrize("normalisation", series.NORMALISATIONS)
def test_normalise_is_one_mapping_for_all_slices(rng, normalisation):
    values = np.sort(rng.normal(0, 100, 400)).astype(np.float32)
    slices = [_slice(pixels=values[start::4].reshape(10, 10)) for start in range(4)]
    got = np.stack([each.ravel() for each in series.normalise(slices, normalisation)], axis=1).ravel()
    assert (np.diff(got.astype(int)) >= 0).all() and got[0] == 0 and got[-1] == 255


@pytest.mark.parametrize("fill", [-2000, 700, 3000])
@pytest.mark.parametrize("normalisation", series.NORMALISATIONS)
def test_normalise_padding_is_black_and_does_not_count(rng, normalisation, fill):
    values = rng.integers(500, 900, (2, 9, 9)).astype(np.float32)
    padding = rng.random((9, 9)) < 0.4
    padded = np.where(padding, fill, values[0])
    got = series.normalise([_slice(pixels=padded, padding=padding), _slice(pixels=values[1])], normalisation)
    assert not got[0][padding].any()
    kept = [_slice(pixels=values[0][~padding][None]), _slice(pixels=values[1])]
    want = series.normalise(kept, normalisation)
    np.testing.assert_array_equal(got[0][~padding], want[0][0])
    np.testing.assert_array_equal(got[1], want[1])
    (black,) = series.normalise([_slice(pixels=padded, padding=np.ones((9, 9), bool))], normalisation)
    assert black.shape == (9, 9) and not black.any()


@pytest.mark.parametrize("normalisation", series.NORMALISATIONS)
def test_normalise_of_few_values(normalisation):
    assert not series.normalise([_slice(pixels=np.full((3, 3), 7))], normalisation)[0].any()
    sparse = np.full((20, 20), -3)
    sparse[4, 4] = 40  # so few that both percentiles are -3
    got = series.normalise([_slice(pixels=sparse)], normalisation)[0]
    assert got[4, 4] == 255 and np.delete(got.ravel(), 84).max() == 0
    assert series.normalise([], normalisation) == []


def test_normalise_window_is_that_of_the_file_where_all_slices_share_it():
    ramp = np.arange(-50, 450, dtype=np.float32).reshape(20, 25)
    shared = [_slice(pixels=ramp, window=(200, 100))] * 2
    got = series.normalise(shared, window=True)
    np.testing.assert_array_equal(got[0], np.rint(np.clip((ramp - 150) * 2.55, 0, 255)))
    plain = series.normalise(shared)
    assert (got[0] != plain[0]).mean() > 0.5
    for other in (None, (200, 101)):
        mixed = [shared[0], _slice(pixels=ramp, window=other)]
        np.testing.assert_array_equal(series.normalise(mixed, window=True), plain)


@pytest.mark.parametrize("options", [{"window": False}, {"window": True}, {"normalisation": "hist"}])
@pytest.mark.parametrize(("dtype", "bits"), [("<u2", 12), ("<u2", 16), ("<i2", 16), ("u1", 8)])
def test_normalise_monochrome1_equals_its_monochrome2_twin(tmp_path, rng, dtype, bits, options):
    base = -(2 ** (bits - 1)) if "i" in dtype else 0
    volume = (rng.gamma(2, 2 ** (bits - 5), (3, 12, 10)).clip(0, 2**bits - 1) + base).astype(dtype)
    centre, width = base + 2 ** (bits - 4), 2 ** (bits - 4)
    tags = {"BitsStored": bits, "RescaleSlope": 2, "RescaleIntercept": -9, "VOILUTFunction": "LINEAR_EXACT"}
    tags |= {"WindowCenter": 2 * centre - 9, "WindowWidth": 2 * width}
    light = _read(_write_series(tmp_path / "light", volume, **tags))
    # The same picture with black and white exchanged: x becomes top - x, and so does the window, on all slices.
    top = 2 ** (bits - 1) - 1 if "i" in dtype else 2**bits - 1
    flipped = (top + base - volume.astype(int)).astype(dtype)
    tags |= {"WindowCenter": 2 * (top + base - centre) - 9, "PhotometricInterpretation": "MONOCHROME1"}
    dark = _read(_write_series(tmp_path / "dark", flipped, **tags))
    one, two = (series.normalise(each.slices, **options) for each in (light, dark))
    np.testing.assert_array_equal(one, two)
    assert np.array(one).std() > 20


def test_normalise_unknown_is_refused():
    with pytest.raises(ValueError, match=r"unknown normalisations \['zscore'\].*'gsl', 'hist'"):
        series.normalise([_slice()], "zscore")


# --- conversion ------------------------------------------------------------------------------------------------------


def test_convert_writes_what_read_and_normalise_give(spine):
    volumes = _convert(spine, normalisations=("gsl", "hist"))
    assert volumes.table["study_id"].tolist() == ["7", "7", "8"]
    assert volumes.table["series_id"].tolist() == ["71", "72", "81"]
    assert volumes.table["modality"].tolist() == ["Sagittal T1", "Axial T2", "x"]
    assert volumes.table["slices"].tolist() == [5, 3, 4] and set(volumes.table["ordered_by"]) == {"position"}
    assert volumes.table.columns.tolist()[5:] == list(dicom.ACQUISITION)
    assert set(volumes.table["manufacturer"]) == {"Siemens"} and volumes.table["sex"].isna().all()
    assert volumes.quarantine.empty and volumes.quarantine.columns.tolist() == ["path", "reason"]
    assert volumes.slices["file"].tolist() == [f"{n}.dcm" for depth in (5, 3, 4) for n in range(1, depth + 1)]
    assert volumes.slices["position"].tolist() == [*range(5), *range(3), *range(4)]
    assert volumes.slices.columns.tolist() == ["study_id", "series_id", "position", "file", "instance_number"]
    for row, path in enumerate(spine[1]["series_path"]):
        slices = _read(spine[0] / path).slices
        for normalisation in ("gsl", "hist"):
            got = series.load(volumes, normalisation, row)
            want = [
                cv2.resize(each, SIZE[::-1], interpolation=cv2.INTER_AREA)
                for each in series.normalise(slices, normalisation)
            ]
            assert isinstance(got, np.memmap) and got.dtype == np.uint8
            np.testing.assert_array_equal(got, want)


def test_convert_by_processes_equals_one(spine, monkeypatch, tmp_path):
    one = _convert(spine, normalisations=("gsl", "hist"))
    monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / "other"))
    two = _convert(spine, normalisations=("gsl", "hist"), jobs=2)
    assert one.folder.name == two.folder.name and one.folder != two.folder
    names = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*") if path.is_file())
    assert len(names) == 3 * 3 + 4 and names == sorted(
        path.relative_to(two.folder) for path in two.folder.rglob("*") if path.is_file()
    )
    for name in names:
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_convert_again_decodes_nothing_and_gives_the_same(spine, decoded):
    one = _convert(spine)
    assert len(decoded) == 12
    two = _convert(spine)
    assert len(decoded) == 12 and one.folder == two.folder
    for name in ("table", "slices", "quarantine"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(two, name))


def test_convert_into_a_folder_leaves_the_cache_alone(spine, tmp_path):
    volumes = _convert(spine, folder=tmp_path / "own")
    assert volumes.folder.parent == tmp_path / "own" and not paths.cache_root().exists()
    again = _convert(spine)
    assert again.folder == paths.cache_root() / volumes.folder.name
    for row in range(len(again.table)):
        np.testing.assert_array_equal(series.load(volumes, "gsl", row), series.load(again, "gsl", row))


def test_convert_two_normalisations_decode_once(spine, decoded):
    _convert(spine, normalisations=("hist", "gsl", "hist"))
    assert len(decoded) == 12


def test_convert_goes_on_where_it_was_killed(spine, decoded, monkeypatch):
    read = series.read

    def fail(folder, names):
        if folder.name == "81":
            raise KeyboardInterrupt
        return read(folder, names)

    monkeypatch.setattr(series, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        _convert(spine)
    monkeypatch.setattr(series, "read", read)
    assert len(decoded) == 8
    assert len(_convert(spine).table) == 3
    assert len(decoded) == 12 and not list((spine[0].parent / "cache").rglob("*.tmp*"))


def test_convert_killed_between_array_and_rows_redoes_the_series(spine, decoded, monkeypatch):
    write = series.runs.write_json

    def fail(path, content):
        if path.stem == "72":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(series.runs, "write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        _convert(spine)
    monkeypatch.setattr(series.runs, "write_json", write)
    got = _convert(spine)
    assert len(decoded) == 8 + 3 + 4 and got.table["slices"].tolist() == [5, 3, 4]


@pytest.mark.parametrize("change", ["size", "window", "normalisations", "content", "file", "modality"])
def test_convert_of_anything_else_goes_elsewhere(spine, rng, change):
    before = _convert(spine).folder
    options = {
        "size": {"image_size": (16, 21)},
        "window": {"window": True},
        "normalisations": {"normalisations": ("hist",)},
    }
    if change == "content":
        _write(spine[0] / spine[1]["series_path"][0] / "1.dcm", _volume(rng)[0])
    elif change == "file":
        (spine[0] / spine[1]["series_path"][0] / "5.dcm").unlink()
    elif change == "modality":
        spine[1].loc[0, "modality"] = "y"
    assert _convert(spine, **options.get(change, {})).folder != before


def test_convert_sets_files_and_series_aside_with_reasons(spine):
    root, manifest = spine
    folder = root / manifest["series_path"][0]
    (folder / "2.dcm").write_bytes(b"")
    (folder / ".hidden").write_bytes(b"")
    (folder / "sub").mkdir()
    bad = root / manifest["series_path"][1]
    for path in bad.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    gone = {"study_id": "9", "series_id": "91", "modality": "x", "series_path": "lumbar/train_images/9/91"}
    manifest = pd.concat([manifest, pd.DataFrame([gone])], ignore_index=True)
    volumes = _convert((root, manifest), max_quarantined_share=0.5)
    assert volumes.table["series_id"].tolist() == ["71", "81"] and volumes.table["slices"].tolist() == [4, 4]
    assert volumes.slices["file"].tolist()[:4] == ["1.dcm", "3.dcm", "4.dcm", "5.dcm"]
    assert volumes.quarantine["path"].tolist() == [
        "lumbar/train_images/7/71/2.dcm",
        *(f"lumbar/train_images/7/72/{number}.dcm" for number in (1, 2, 3)),
        "lumbar/train_images/7/72",
        "lumbar/train_images/9/91",
    ]
    reasons = volumes.quarantine["reason"].tolist()
    assert reasons[0] == "empty file (0 bytes)" and reasons[1].startswith("DICOM cut off")
    assert reasons[4:] == ["none of its 3 files is readable", "no files"]
    assert series.load(volumes, "gsl", 1).shape == (4, *SIZE)
    with pytest.raises(ValueError, match=r"4 of 12 files and 2 of 4 series .* share of 0.4 .*7/71/2.dcm: empty file"):
        _convert((root, manifest), max_quarantined_share=0.4)


def test_convert_stops_at_one_file_too_many(spine):
    (spine[0] / spine[1]["series_path"][0] / "2.dcm").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 12 files and 0 of 3 series cannot be read, more than the share of 0.05"):
        _convert(spine)
    assert len(_convert(spine, max_quarantined_share=1 / 12).table) == 3


def test_convert_tries_again_what_the_system_refused(spine, decoded, monkeypatch):
    read = dicom.read_slices

    def refuse(path):
        if Path(path).parent.name == "72":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(dicom, "read_slices", refuse)
    volumes = _convert(spine, max_quarantined_share=1)
    assert volumes.quarantine["reason"][0] == "system refused: PermissionError: Permission denied"
    assert len(volumes.table) == 2 and len(decoded) == 9
    monkeypatch.setattr(dicom, "read_slices", read)
    assert len(_convert(spine).table) == 3 and len(decoded) == 12


@pytest.mark.parametrize("words", ["no decoder for DICOM pixels in", "or such as the decoders at hand do not know"])
def test_convert_tries_again_what_no_decoder_could_read(spine, decoded, monkeypatch, words):
    # One file of series 72 is of a compression for which there is no decoder at first, or none that knows its kind.
    path = spine[0] / spine[1]["series_path"][1] / "2.dcm"
    data_set = pydicom.dcmread(path)
    data_set.compress(uid.RLELossless)
    data_set.save_as(path)
    pixel_array = pydicom.pixels.pixel_array

    def decode(data_set, **options):
        if data_set.file_meta.TransferSyntaxUID == uid.RLELossless:
            raise RuntimeError
        return pixel_array(data_set, **options)

    with monkeypatch.context() as lacking:
        if words.startswith("no decoder"):
            decoder = get_decoder(uid.RLELossless)
            lacking.setattr(type(decoder), "is_available", property(lambda other: other is not decoder))
        else:
            lacking.setattr(pydicom.pixels, "pixel_array", decode)
        before = _convert(spine, max_quarantined_share=1)
    (reason,) = before.quarantine["reason"]
    assert words in reason and before.table["slices"].tolist() == [5, 2, 4] and len(decoded) == 12
    after = _convert(spine)
    assert decoded[12:] == ["1.dcm", "2.dcm", "3.dcm"]  # of series 72 alone
    assert after.folder == before.folder and after.quarantine.empty and after.table["slices"].tolist() == [5, 3, 4]
    assert len(series.load(after, "gsl", 1)) == 3
    _convert(spine)
    assert len(decoded) == 15


def test_convert_takes_files_by_suffix(spine, decoded):
    root, manifest = spine
    folder = root / manifest["series_path"][0]
    (folder / "2.dcm").rename(folder / "2.DCM")
    (folder / "3.dcm").rename(folder / "3.Dicom")
    before = _convert(spine)
    (folder / "1.dcm.bak").write_bytes((folder / "1.dcm").read_bytes())
    for name in ("Thumbs.db", "notes.txt", "dcm"):
        (folder / name).write_text("no picture")
    after = _convert(spine, max_quarantined_share=0)
    assert after.slices["file"].tolist()[:5] == ["1.dcm", "2.DCM", "3.Dicom", "4.dcm", "5.dcm"]
    assert after.quarantine.empty and after.folder == before.folder and len(decoded) == 12


def test_convert_takes_all_visible_files_where_none_has_the_suffix(spine):
    root, manifest = spine
    folder = root / manifest["series_path"][0]
    for number in range(1, 6):
        (folder / f"{number}.dcm").rename(folder / (f"IM{number}" if number < 5 else "1.2.840.5"))
    (folder / ".1.dcm").write_bytes((folder / "IM1").read_bytes())
    (folder / "notes.txt").write_text("no picture")
    volumes = _convert(spine, max_quarantined_share=0.1)
    assert volumes.slices["file"].tolist()[:5] == ["IM1", "IM2", "IM3", "IM4", "1.2.840.5"]
    assert volumes.quarantine["path"].tolist() == [f"{manifest['series_path'][0]}/notes.txt"]


def test_convert_of_slices_of_different_sizes_brings_them_to_one(tmp_path, rng):
    for at, size in enumerate([(12, 10), (30, 31), (5, 9)]):
        _write_series(tmp_path / "a", [np.full(size, 100 * at, np.uint16)], names=[f"{at}.dcm"], numbers=[at],
                      orientation=None)  # fmt: skip
    manifest = pd.DataFrame([{"study_id": 1, "series_id": 2, "modality": "x", "series_path": "a"}])
    volumes = _convert((tmp_path, manifest))
    got = series.load(volumes, "gsl", 0)
    assert got.shape == (3, *SIZE) and volumes.table["ordered_by"].item() == "instance"
    # Constant slices of 0, 100 and 200: the lowest and the highest percentile, and their middle
    assert [np.unique(each).tolist() for each in got] == [[0], [128], [255]]


def test_convert_of_an_empty_manifest_is_empty(spine):
    volumes = _convert((spine[0], spine[1].iloc[:0]))
    assert volumes.table.empty and volumes.slices.empty and series.middle(volumes, "gsl").shape == (0, 64, 64)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.drop(columns="modality"), r"has no columns \['modality'\]"),
        (lambda table: pd.concat([table, table.iloc[:1]]), r"1 series are named twice; .* First: \['7/71'\]"),
        (lambda table: table.assign(series_id=["71", "../72", "81"]), r"1 rows have .* First rows: \[1\]"),
        (
            lambda table: table.assign(series_path=["a", "b", "../data/c"]),
            r"column series_path leaves the data root in 1 of 3 rows: .* First rows: \['../data/c'\]",
        ),
    ],
)
def test_convert_of_a_manifest_that_cannot_be_is_refused(spine, change, reason):
    with pytest.raises(ValueError, match=reason):
        _convert((spine[0], change(spine[1])))
    with pytest.raises(ValueError, match=r"unknown normalisations \[\] of \[\]"):
        _convert(spine, normalisations=())


def test_load_of_a_normalisation_not_asked_for_is_refused(spine):
    with pytest.raises(ValueError, match=r"'hist' was not written; `convert` was asked for \['gsl'\]"):
        series.load(_convert(spine), "hist", 0)


def test_middle_is_the_middle_slice(spine):
    volumes = _convert(spine)
    got = series.middle(volumes, "gsl", (8, 6))
    assert got.shape == (3, 8, 6) and got.dtype == np.uint8
    for row, at in enumerate((2, 1, 2)):
        want = cv2.resize(np.array(series.load(volumes, "gsl", row)[at]), (6, 8), interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(got[row], want)


def test_middle_holds_few_files_open(tmp_path):
    resource = pytest.importorskip("resource")
    with open(os.devnull) as lowest:
        limit = lowest.fileno() + 24  # a new descriptor is the lowest that is free, and less than the limit
    names = [str(number) for number in range(2 * limit)]
    volumes = series.Volumes(tmp_path, pd.DataFrame({"study_id": "7", "series_id": names}), None, None)
    (tmp_path / "gsl/7").mkdir(parents=True)
    for number, name in enumerate(names):
        np.save(tmp_path / f"gsl/7/{name}.npy", np.full((3, 2, 2), number % 256, np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"), ExitStack() as stack:
            for name in names:
                stack.enter_context(open(tmp_path / f"gsl/7/{name}.npy", "rb"))
        got = series.middle(volumes, "gsl", (2, 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_array_equal(got[:, 1, 1], np.arange(2 * limit) % 256)


def test_convert_lets_no_identifier_out(tmp_path, rng, monkeypatch, caplog, capfd, recwarn):
    texts = ("PatientName", "PatientID", "AccessionNumber", "StudyDescription", "InstitutionName", "Manufacturer")
    texts += ("SeriesDescription", "ImageComments", "OtherPatientIDs", "StationName", "PatientComments")
    planted = {**dict.fromkeys(texts, "PLANTED9"), "PatientBirthDate": "19010203", "StudyDate": "19010204"}
    planted |= {"StudyInstanceUID": "1.2.9.190190190", "SeriesInstanceUID": "1.2.9.190190191"}
    folder = tmp_path / "data/a"
    for at, pixels in enumerate(_volume(rng, 4)):
        path = _write(folder / f"{at}.dcm", pixels, InstanceNumber=at, PatientAge="099Y", PatientSex="F", **planted)
        data_set = pydicom.dcmread(path)
        data_set.private_block(0x0009, "PLANTED9", create=True).add_new(1, "LO", "PLANTED9")
        data_set.save_as(path)
    whole = path.read_bytes()
    secrets = (b"PLANTED9", b"19010203", b"19010204", b"190190190", b"190190191")
    assert all(secret in whole for secret in secrets)
    (folder / "4.dcm").write_bytes(whole[:-30])  # cut off
    (folder / "5.dcm").write_bytes(whole.replace(b"1.2.840.10008.1.2.1", b"PLANTED9.PLANTED9.1"))  # of no known syntax
    (folder / "6.dcm").write_bytes(whole[:400])
    (folder / "7.dcm").write_bytes(b"PLANTED9" * 40)
    (folder / "8.dcm").write_bytes(whole.replace(b"MONOCHROME2 ", b"PLANTED9    "))
    (folder / "9.dcm").write_bytes(whole.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00LO"))
    damaged = np.frombuffer(whole, np.uint8).copy()
    for number in range(10, 40):
        some = damaged.copy()
        some[rng.integers(132, len(whole) - 300, 4)] = rng.integers(0, 256, 4)
        (folder / f"{number}.dcm").write_bytes(some.tobytes())
    manifest = pd.DataFrame([{"study_id": 1, "series_id": 2, "modality": "x", "series_path": "a"}])
    said = []
    with caplog.at_level(logging.DEBUG):
        for jobs in (1, 2):
            monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / f"cache{jobs}"))
            options = {"jobs": jobs, "normalisations": series.NORMALISATIONS, "progress": True}
            volumes = _convert((tmp_path / "data", manifest), max_quarantined_share=1, **options)
            with pytest.raises(ValueError, match="cannot be read") as caught:
                _convert((tmp_path / "data", manifest), max_quarantined_share=0, **options)
            said += [*traceback.format_exception(caught.value), repr(caught.value)]
            said += [table.to_csv() for table in (volumes.table, volumes.slices, volumes.quarantine)]
    out, err = capfd.readouterr()
    said += [out, err, caplog.text, *(str(each.message) for each in recwarn)]
    assert volumes.table["slices"].item() >= 4 and len(volumes.quarantine) >= 6
    assert volumes.table["manufacturer"].item() == "other" and volumes.table["age"].item() == 90
    files = [path for jobs in (1, 2) for path in (tmp_path / f"cache{jobs}").rglob("*") if path.is_file()]
    assert len(files) == 2 * (7 + 1)  # and a lock
    for content in (*(path.read_bytes() for path in files), *(text.encode() for text in said)):
        assert not any(secret in content for secret in secrets)
        assert b"planted" not in content.lower()


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.skipif(os.cpu_count() < 2, reason="one core")
def test_convert_by_two_processes_takes_little_more_than_half_the_time(tmp_path, rng, monkeypatch):
    volume = rng.gamma(2, 200, (20, 512, 512)).astype(np.uint16)
    rows = []
    for number in range(24):
        _write_series(tmp_path / f"data/{number}", np.roll(volume, number, axis=1))
        rows.append({"study_id": number, "series_id": 0, "modality": "x", "series_path": str(number)})
    manifest, seconds = pd.DataFrame(rows), {1: [], 2: []}
    options = {"normalisations": series.NORMALISATIONS, "image_size": (256, 256)}
    # The best of each: what else runs on the machine takes from two processes more than from one.
    for attempt in range(6):
        for jobs in (2, 1):  # the first call also starts the processes
            monkeypatch.setenv("KERASMED_CACHE", str(tmp_path / f"cache{jobs}{attempt}"))
            start = time.perf_counter()
            _convert((tmp_path / "data", manifest), jobs=jobs, **options)
            seconds[jobs].append(time.perf_counter() - start)
        if attempt > 1 and min(seconds[2]) <= min(seconds[1]) / 1.6:
            return
    pytest.fail(f"seconds by number of processes: {seconds}")


def test_convert_keeps_files_and_series_that_are_called_na(tmp_path, rng):
    _write_series(tmp_path / "data/NA", _volume(rng, 2), names=["NA", "null"])
    (tmp_path / "data/NA/nan").write_bytes(b"text")
    row = {"study_id": "NA", "series_id": "NA", "modality": "NA", "series_path": "NA"}
    converted = _convert((tmp_path / "data", pd.DataFrame([row])), max_quarantined_share=0.5)
    assert converted.slices["file"].tolist() == ["NA", "null"]
    assert converted.quarantine["path"].tolist() == ["NA/nan"]
    assert converted.table["modality"].tolist() == ["NA"] and converted.table["sex"].isna().all()
    assert series.load(converted, "gsl", 0).shape == (2, *SIZE)


def test_read_file_that_did_not_fit_into_memory_is_worth_another_try(tmp_path, rng, monkeypatch):
    folder = _write_series(tmp_path / "a", _volume(rng, 2))
    read = dicom.read_slices

    def starves(path):
        if path.name == "1.dcm":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(dicom, "read_slices", starves)
    found = _read(folder)
    assert found.quarantine.values.tolist() == [["1.dcm", "system refused: out of memory"]]
    assert found.table["file"].tolist() == ["2.dcm"]


def test_convert_of_a_series_that_changes_meanwhile_is_refused_by_name(spine, monkeypatch):
    read = series.read

    def changes(folder, names):
        found = read(folder, names)
        if folder.name == "81":
            (folder / "99.dcm").write_bytes(b"more")
        return found

    monkeypatch.setattr(series, "read", changes)
    with pytest.raises(RuntimeError, match=r"81 was changed while it was read"):
        _convert(spine)
    assert not list((spine[0].parent / "cache").rglob("81.json"))


def test_load_of_an_array_that_is_cut_says_what_to_delete(spine):
    volumes = _convert(spine)
    path = next((volumes.folder / "gsl").rglob("*.npy"))
    for each in (volumes.folder / "gsl").rglob("*.npy"):
        each.write_bytes(each.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"npy is damaged: .*delete {volumes.folder} and give the command again"):
        series.load(volumes, "gsl", 0)
    assert path.exists()


def test_load_of_an_array_that_is_gone_says_what_to_delete(spine):
    volumes = _convert(spine)
    next((volumes.folder / "gsl").rglob("71.npy")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"71.npy is gone; delete {volumes.folder} and give the command again"):
        series.load(volumes, "gsl", 0)


@pytest.mark.parametrize("damage", ["empty", "cut", "gone", "flipped"])
def test_convert_makes_damaged_tables_again_without_decoding(spine, decoded, caplog, damage):
    (spine[0] / spine[1]["series_path"][0] / "2.dcm").write_bytes(b"")
    before = _convert(spine, max_quarantined_share=1)
    files = len(decoded)
    for name in ("index.csv", "slices.csv", "quarantine.csv", "hashes.json"):
        path = before.folder / name
        content = path.read_bytes()
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "flipped": flipped}.get(damage, b""))
        if damage == "gone":
            path.unlink()
        caplog.clear()
        after = _convert(spine, max_quarantined_share=1)
        for table in ("table", "slices", "quarantine"):
            pd.testing.assert_frame_equal(getattr(after, table), getattr(before, table))
        assert path.read_bytes() == content and len(decoded) == files
        # Without hashes.json a conversion is one that was never finished
        told = any(f"tables of the series in {before.folder} are damaged" in message for message in caplog.messages)
        assert told == ((name, damage) != ("hashes.json", "gone"))
