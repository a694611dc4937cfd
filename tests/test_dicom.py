import io
import logging
import struct
import threading
import traceback
import types
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom import encaps, uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.decoders import rle

from kerasmed import dicom

WHEEL = Path(pydicom.__path__[0]) / "data" / "test_files"  # test files that come with the library
IDENTIFIERS = {"PatientName": "Planted^Patient", "PatientID": "PLANTED-77", "OtherPatientIDs": "PLANTED-78"}


@pytest.fixture
def ramp():
    """uint8 (40, 50), every value different from its neighbours, with both ends of the range."""
    return np.linspace(0, 255, 2000).reshape(40, 50).astype(np.uint8)


def _data_set(pixels, *, syntax=uid.ExplicitVRLittleEndian, **tags):
    """A data set of an array ([frames,] H, W), native or already encoded, with identifiers; None drops a tag."""
    data_set = Dataset()
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = syntax
    data_set.SOPClassUID, data_set.SOPInstanceUID = uid.MRImageStorage, uid.generate_uid()
    bits = 8 * pixels.itemsize
    told = {"Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "SamplesPerPixel": 1}
    told |= {"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": int(pixels.dtype.kind == "i")}
    told |= {"NumberOfFrames": pixels.shape[0] if pixels.ndim == 3 else None}
    told |= {"BitsAllocated": bits, "BitsStored": bits, "PixelData": pixels.tobytes(), **IDENTIFIERS, **tags}
    told.setdefault("HighBit", (told["BitsStored"] or 1) - 1)
    for name, value in told.items():
        if value is not None:
            setattr(data_set, name, value)
    data_set["PixelData"].VR = "OW" if bits > 8 else "OB"
    data_set["PixelData"].is_undefined_length = syntax not in uid.UncompressedTransferSyntaxes
    return data_set


def _dicom(path, pixels, **tags):
    _data_set(pixels, **tags).save_as(path, enforce_file_format=True)
    return path


def _item(**tags):
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return item


def _decode(path):
    return dicom.decode(path.read_bytes(), path)[0]


def _read_one(path):
    (only,) = dicom.read_slices(path)
    return only.pixels


READERS = {"picture": _decode, "slices": _read_one}


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_decode_keeps_8_bits_and_rescales_deeper_ones(tmp_path, ramp):
    pixels, padding = dicom.decode(_dicom(tmp_path / "a.dcm", ramp).read_bytes(), "a.dcm")
    np.testing.assert_array_equal(pixels, ramp)
    assert pixels.dtype == np.uint8 and padding is None
    path = _dicom(tmp_path / "b.dcm", ramp.astype(np.int16) * 9, RescaleSlope=0.5, RescaleIntercept=-3)
    np.testing.assert_array_equal(_decode(path), ramp * 4.5 - 3)
    assert dicom.decode(b"no such file", "a.png") is None


@pytest.mark.parametrize(
    ("dtype", "bits", "slope", "intercept"),
    [("u1", 8, None, None), ("<u2", 12, None, None), ("<u2", 16, 2.5, -1024), ("<i2", 16, 1, 0), ("<i2", 12, -0.5, 7)],
)
def test_read_slices_gives_values_after_the_rescaling(tmp_path, ramp, dtype, bits, slope, intercept):
    stored = (ramp.astype(int) * 2 ** (bits - 8) // (2 if "i" in dtype else 1)).astype(dtype)
    if "i" in dtype:
        stored = stored - 2 ** (bits - 2)
    path = _dicom(tmp_path / "a.dcm", stored, BitsStored=bits, RescaleSlope=slope, RescaleIntercept=intercept)
    got = _read_one(path)
    assert got.dtype == np.float32 and got.shape == (40, 50)
    # All of these values are sums of powers of two that 24 bits hold
    np.testing.assert_array_equal(got, stored.astype(float) * (slope or 1) + (intercept or 0))


def test_read_slices_looks_pixels_up_in_a_modality_table(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "US", [0, 100, 400, 1000]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = _dicom(tmp_path / "a.dcm", np.array([[0, 1], [2, 3]], np.uint8), ModalityLUTSequence=[table])
    np.testing.assert_array_equal(_read_one(path), [[0, 100], [400, 1000]])


def test_read_slices_of_monochrome1_negates_values_and_window(tmp_path):
    stored = np.array([[10, 30], [20, 4000]], np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -5, "WindowCenter": 100.5, "WindowWidth": 21}
    (dark,) = dicom.read_slices(_dicom(tmp_path / "a.dcm", stored, PhotometricInterpretation="MONOCHROME1", **tags))
    (light,) = dicom.read_slices(_dicom(tmp_path / "b.dcm", stored, **tags))
    np.testing.assert_array_equal(light.pixels, [[15, 55], [35, 7995]])
    np.testing.assert_array_equal(dark.pixels, -light.pixels)
    # LINEAR: black up to 100.5 - 0.5 - 20/2 = 90, white from 110
    assert light.window == (100, 20) and dark.window == (-100, 20)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}, (50, 100)),
        ({"WindowCenter": [50, 7], "WindowWidth": [101, 9]}, (49.5, 100)),
        ({"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"}, None),
        ({"WindowCenter": 50, "WindowWidth": 1}, None),  # of no width
        ({"WindowCenter": 50}, None),
    ],
)
def test_read_slices_window_is_the_first_linear_one(tmp_path, ramp, tags, expected):
    assert dicom.read_slices(_dicom(tmp_path / "a.dcm", ramp, **tags))[0].window == expected


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian])
@pytest.mark.parametrize(
    ("dtype", "padding", "limit", "expected"),
    [
        ("<u2", 7, None, [[1, 0], [0, 0]]),
        ("<u2", 59000, 60000, [[0, 0], [0, 1]]),
        ("<u2", 60000, 59000, [[0, 0], [0, 1]]),  # either may be the larger
        ("<i2", -2000, None, [[0, 1], [0, 0]]),
        ("<i2", -2000, -5536, [[0, 1], [0, 1]]),
        ("<u2", 5, None, None),
    ],
)
def test_read_slices_marks_padding_of_the_stored_values(tmp_path, syntax, dtype, padding, limit, expected):
    stored = np.array([[7, 63536], [300, 60000]]).astype("<u2").view(dtype)  # 63536 is -2000 of 16 bits, 60000 -5536
    data_set = _data_set(stored, syntax=syntax, RescaleSlope=3, RescaleIntercept=1)
    data_set.add_new("PixelPaddingValue", "SS" if padding < 0 else "US", padding)
    if limit is not None:
        data_set.add_new("PixelPaddingRangeLimit", "SS" if limit < 0 else "US", limit)
    data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    got = dicom.read_slices(tmp_path / "a.dcm")[0].padding
    assert got is None if expected is None else np.array_equal(got, np.array(expected, bool))


def test_read_slices_reads_padding_stated_with_the_other_sign(tmp_path):
    stored = np.array([[7, -2000]], "<i2")
    data_set = _data_set(stored)
    data_set.add_new("PixelPaddingValue", "US", 63536)
    data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(dicom.read_slices(tmp_path / "a.dcm")[0].padding, [[False, True]])


def test_read_slices_sets_values_that_are_no_numbers_aside(tmp_path):
    values = np.array([[1.5, np.nan], [np.inf, -2]], np.float32)
    data_set = _data_set(np.zeros((2, 2), np.uint16), BitsAllocated=32, BitsStored=32, HighBit=31)
    del data_set.PixelData
    data_set.FloatPixelData = values.tobytes()
    data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    (got,) = dicom.read_slices(tmp_path / "a.dcm")
    np.testing.assert_array_equal(got.pixels, [[1.5, 0], [0, -2]])
    np.testing.assert_array_equal(got.padding, [[False, True], [True, False]])


def test_read_slices_from_memory_equals_read_from_disk(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp, InstanceNumber=4)
    (one,), (two,) = dicom.read_slices(path), dicom.read_slices(io.BytesIO(path.read_bytes()))
    np.testing.assert_array_equal(one.pixels, two.pixels)
    assert one[1:] == two[1:] == (None, None, None, 4, None)


@pytest.mark.parametrize(("name", "reason"), [("examples_rgb_color.dcm", "in colour"), ("README.txt", "not DICOM")])
def test_read_slices_of_no_grey_picture_says_why(name, reason):
    with pytest.raises(dicom.ImageError, match=reason):
        dicom.read_slices(WHEEL / name)


def test_read_slices_of_an_empty_file_says_so():
    with pytest.raises(dicom.ImageError, match=r"empty file \(0 bytes\)"):
        dicom.read_slices(io.BytesIO())


# --- geometry --------------------------------------------------------------------------------------------------------


def test_read_slices_of_a_real_file_equals_its_header():
    data_set = pydicom.dcmread(WHEEL / "MR_small.dcm")
    (got,) = dicom.read_slices(WHEEL / "MR_small.dcm")
    np.testing.assert_array_equal(got.pixels, data_set.pixel_array)
    assert got.position == tuple(data_set.ImagePositionPatient)
    assert got.orientation == tuple(data_set.ImageOrientationPatient)
    assert got.instance_number == data_set.InstanceNumber and got.window == (599.5, 1599)


@pytest.mark.parametrize(
    ("tags", "field"),
    [
        ({"ImagePositionPatient": [1, 2]}, "position"),
        ({"ImageOrientationPatient": [1, 0, 0]}, "orientation"),
        ({"ImagePositionPatient": [1, 2, 1e300]}, "position"),
        ({"InstanceNumber": None}, "instance_number"),
    ],
)
def test_read_slices_takes_broken_geometry_for_none(tmp_path, ramp, tags, field):
    whole = {"ImagePositionPatient": [1, 2, 3], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "InstanceNumber": 2}
    (good,) = dicom.read_slices(_dicom(tmp_path / "a.dcm", ramp, **whole))
    assert good[2:5] == ((1, 2, 3), (1, 0, 0, 0, 1, 0), 2)
    (bad,) = dicom.read_slices(_dicom(tmp_path / "b.dcm", ramp, **{**whole, **tags}))
    assert getattr(bad, field) is None and bad._replace(**{field: None})[2:] == good._replace(**{field: None})[2:]


def test_read_slices_takes_unreadable_numbers_for_none(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp, ImagePositionPatient=[1, 2, 33.25], WindowCenter=12.375, WindowWidth=7.625)
    path.write_bytes(path.read_bytes().replace(b"33.25", b"Plant").replace(b"12.375", b"Plant."))
    assert dicom.read_slices(path)[0][2:] == (None,) * 4


def _frames(stored, *, groups=True, **tags):
    """An enhanced file: frames at 5, 4, 3, ... mm, each with its own rescaling."""
    per_frame = [
        _item(
            PlanePositionSequence=[_item(ImagePositionPatient=[0, 0, 5 - number])],
            PixelValueTransformationSequence=[_item(RescaleSlope=number + 1, RescaleIntercept=number)],
            FrameVOILUTSequence=[_item(WindowCenter=10 + number, WindowWidth=5, VOILUTFunction="LINEAR_EXACT")],
        )
        for number in range(len(stored))
    ]
    shared = _item(
        PlaneOrientationSequence=[_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[_item(PixelSpacing=[0.5, 0.25], SliceThickness=4)],
    )
    of_groups = {"PerFrameFunctionalGroupsSequence": per_frame, "SharedFunctionalGroupsSequence": [shared]}
    return _data_set(stored, InstanceNumber=9, **(of_groups if groups else {}), **tags)


@pytest.mark.parametrize("encoded", [False, True])
def test_read_slices_of_several_frames_gives_each_with_its_geometry(tmp_path, rng, encoded):
    stored = rng.integers(0, 4000, (3, 6, 7), dtype=np.uint16)
    data_set = _frames(stored)
    if encoded:
        data_set.compress(uid.RLELossless)
    data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    got = dicom.read_slices(tmp_path / "a.dcm")
    assert [each.position for each in got] == [(0, 0, 5), (0, 0, 4), (0, 0, 3)]
    assert {each.orientation for each in got} == {(1, 0, 0, 0, 1, 0)}
    assert [each.instance_number for each in got] == [1, 2, 3]
    assert [each.window for each in got] == [(10, 5), (11, 5), (12, 5)]
    for number, each in enumerate(got):
        np.testing.assert_array_equal(each.pixels, stored[number] * (number + 1.0) + number)
    acquisition = dicom.read_acquisition(tmp_path / "a.dcm")
    assert acquisition["pixel_spacing"] == 0.5 and acquisition["slice_thickness"] == 4


def test_read_slices_of_frames_without_groups_takes_the_files_own(tmp_path, rng):
    stored = rng.integers(0, 4000, (3, 6, 7), dtype=np.uint16)
    own = {"ImagePositionPatient": [1, 2, 3], "RescaleSlope": 2, "RescaleIntercept": 0}
    _frames(stored, groups=False, **own).save_as(tmp_path / "a.dcm", enforce_file_format=True)
    got = dicom.read_slices(tmp_path / "a.dcm")
    assert [each.position for each in got] == [(1, 2, 3)] * 3 and got[0].orientation is None
    np.testing.assert_array_equal([each.pixels for each in got], stored * 2.0)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_read_slices_of_frames_whose_number_lies_is_refused(tmp_path, rng, frames):
    stored = rng.integers(0, 4000, (3, 6, 7), dtype=np.uint16)
    path = _dicom(tmp_path / "a.dcm", stored, NumberOfFrames=frames)
    with pytest.raises(dicom.ImageError, match="cut off, or of other Rows or Columns: 252 bytes of pixels"):
        dicom.read_slices(path)


def test_read_slices_of_one_frame_too_many_is_refused_where_frames_are_smaller_than_rows(tmp_path, rng):
    path = _dicom(tmp_path / "a.dcm", rng.integers(0, 4000, (40, 4, 4), dtype=np.uint16), NumberOfFrames=39)
    with pytest.raises(dicom.ImageError, match="1280 bytes of pixels, where 39 frames of 4×4 take 1248"):
        dicom.read_slices(path)


def test_decode_of_several_frames_is_refused(tmp_path):
    path = _dicom(tmp_path / "a.dcm", np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(dicom.ImageError, match="3 frames in a DICOM file, where one is expected"):
        _decode(path)


# --- acquisition -----------------------------------------------------------------------------------------------------


def test_read_acquisition_by_hand(tmp_path, ramp):
    tags = {"MagneticFieldStrength": 1.5, "SliceThickness": 4, "PixelSpacing": [0.625, 0.5], "Manufacturer": "SIEMENS"}
    path = _dicom(tmp_path / "a.dcm", ramp, **tags, PatientSex="F", PatientAge="045Y")
    want = {"field_strength": 1.5, "slice_thickness": 4, "pixel_spacing": 0.625}
    want |= {"manufacturer": "Siemens", "sex": "F", "age": 45}
    assert dicom.read_acquisition(path) == want == dicom.read_acquisition(io.BytesIO(path.read_bytes()))
    assert tuple(want) == dicom.ACQUISITION


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"MagneticFieldStrength": 15000}, {"field_strength": 1.5}),
        ({"MagneticFieldStrength": 0, "SliceThickness": -1}, {}),
        ({"PatientSex": "O", "PatientAge": "045"}, {}),
        ({"PatientAge": "018M"}, {"age": 1.5}),
        ({"PatientAge": "089Y"}, {"age": 89}),
        ({"PatientAge": "090Y"}, {"age": 90}),
        ({"PatientAge": "104Y"}, {"age": 90}),
        ({"Manufacturer": "GE MEDICAL SYSTEMS"}, {"manufacturer": "GE"}),
        ({"Manufacturer": "G.E. Medical Systems"}, {"manufacturer": "GE"}),
        ({"Manufacturer": "TOSHIBA_MEC"}, {"manufacturer": "Canon"}),
        ({"Manufacturer": "Philips Medical Systems, Inc."}, {"manufacturer": "Philips"}),
        ({"Manufacturer": "FUJIFILM Corporation"}, {"manufacturer": "Fujifilm"}),
        ({"Manufacturer": "Gerda Planted, Siemens Street"}, {"manufacturer": "other"}),
        ({"Manufacturer": " "}, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR AS")
def test_read_acquisition_takes_numbers_and_known_words_alone(tmp_path, ramp, tags, expected):
    got = dicom.read_acquisition(_dicom(tmp_path / "a.dcm", ramp, **tags))
    assert got == {**dict.fromkeys(dicom.ACQUISITION), **expected}


def test_read_acquisition_of_what_cannot_be_read_is_none(tmp_path):
    (tmp_path / "text.dcm").write_text("Planted^Patient")
    for path in (tmp_path / "text.dcm", tmp_path / "absent.dcm", io.BytesIO(b"\0" * 128 + b"DICM")):
        assert dicom.read_acquisition(path) == dict.fromkeys(dicom.ACQUISITION)


# --- damage ----------------------------------------------------------------------------------------------------------


DAMAGES = {
    "frames": (
        {"NumberOfFrames": 3},
        "3 frames in a DICOM file, where one is|2000 bytes .*3 frames of 50×40 take 6000",
    ),
    "frame that is not told": ({"Rows": 20}, "2000 bytes of pixels, where 50×20 take 1000"),
    "a row less": ({"Rows": 39}, "2000 bytes of pixels, where 50×39 take 1950"),
    "a column less": ({"Columns": 49}, "2000 bytes of pixels, where 49×40 take 1960"),
    "a column more": ({"Columns": 51}, "2000 bytes of pixels, where 51×40 take 2040"),
    "no rows": ({"Rows": None}, "Rows is absent or no positive number"),
    "zero columns": ({"Columns": 0}, "Columns is absent or no positive number"),
    "two numbers": ({"Columns": [50, 50]}, "Columns is absent or no positive number"),
    "empty pixels": ({"PixelData": b""}, "no pixel data"),
    "samples": ({"SamplesPerPixel": 3}, "DICOM of 3 SamplesPerPixel and a PhotometricInterpretation that is none of"),
    "photometric": (
        {"PhotometricInterpretation": "PLANTED"},
        r"none of MONOCHROME1 \(1\), .*YBR_RCT \(3\)|in colour, or of an",
    ),
    "bits": ({"BitsAllocated": 12, "PixelData": bytes(3000)}, "damaged DICOM"),
    "high bit": ({"HighBit": 15}, "BitsStored 8, but a HighBit that is not one less"),
    "slope": ({"RescaleSlope": 0, "RescaleIntercept": 1}, "RescaleSlope is 0"),
    "slopes": ({"RescaleSlope": [1, 2], "RescaleIntercept": 1}, r"damaged DICOM \(TypeError in pydicom\)"),
    "no palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, "ValueError in pydicom|DICOM in colour"),
    "video": ({"syntax": uid.MPEG2MPML}, "no decoder for DICOM pixels in MPEG2 Main Profile / Main Level"),
    "no JPEG": ({"syntax": uid.JPEGBaseline8Bit}, r"damaged DICOM pixels in JPEG Baseline"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", DAMAGES)
def test_read_damaged_dicom_says_why_and_names_no_patient(tmp_path, ramp, name, reader, caplog, recwarn):
    tags, reason = DAMAGES[name]
    if "syntax" in tags:
        tags = {"PixelData": encaps.encapsulate([bytes(100)])} | tags
    path = _dicom(tmp_path / "a.dcm", ramp, **tags)
    caplog.clear(), recwarn.clear()
    with caplog.at_level(logging.DEBUG), pytest.raises(dicom.ImageError, match=reason) as caught:
        READERS[reader](path)
    assert not len(recwarn) and not caplog.records
    assert "planted" not in "".join(traceback.format_exception(caught.value)).lower()


def test_read_dicom_in_an_unknown_transfer_syntax_does_not_quote_it(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp, syntax=uid.JPEGBaseline8Bit, PixelData=encaps.encapsulate([bytes(100)]))
    path.write_bytes(path.read_bytes().replace(uid.JPEGBaseline8Bit.encode(), b"1.2.840.10008.1.2.4.77"))
    with pytest.raises(dicom.ImageError, match="no decoder for DICOM pixels in an unknown transfer syntax;"):
        _read_one(path)


def test_parse_takes_no_identifier_of_the_header(tmp_path, ramp, monkeypatch):
    parsed = []
    parse = dicom._parse
    monkeypatch.setattr(dicom, "_parse", lambda *args, **options: parsed.append(parse(*args, **options)) or parsed[-1])
    path = _dicom(tmp_path / "a.dcm", ramp, Manufacturer="GE", PatientBirthDate="19010203")
    _decode(path), _read_one(path), dicom.read_acquisition(path)
    assert len(parsed) == 5 and "Rows" in parsed[0] and "Manufacturer" in parsed[-1]
    assert not any(name in each for each in parsed for name in (*IDENTIFIERS, "PatientBirthDate", "SOPInstanceUID"))
    # A bare data set whose first element is the name, and which is no image
    bare = Dataset()
    bare.PatientName = IDENTIFIERS["PatientName"]
    bare.save_as(tmp_path / "b.dcm", implicit_vr=True, little_endian=True)
    with pytest.raises(dicom.ImageError) as caught:
        dicom.read_slices(tmp_path / "b.dcm")
    assert "Plan" not in str(caught.value) and b"Planted" in (tmp_path / "b.dcm").read_bytes()


@pytest.mark.parametrize("encoded", [False, True])
def test_read_truncated_dicom_is_refused_wherever_it_is_cut(tmp_path, ramp, encoded):
    data_set = _data_set(ramp)
    if encoded:
        data_set.compress(uid.RLELossless)
    data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    whole = (tmp_path / "a.dcm").read_bytes()
    for length in range(132, len(whole) - 8, 37):
        for read in (dicom.read_slices, lambda file: dicom.decode(file.read(), "")):
            with pytest.raises(dicom.ImageError, match="cut off|absent|damaged DICOM"):
                read(io.BytesIO(whole[:length]))


def test_read_dicom_whose_compressed_pixels_have_another_size_is_refused(tmp_path, ramp):
    data = encaps.encapsulate([cv2.imencode(".jpg", ramp)[1].tobytes()])
    turned = _dicom(tmp_path / "a.dcm", ramp, syntax=uid.JPEGBaseline8Bit, PixelData=data, Rows=50, Columns=40)
    with pytest.raises(dicom.ImageError, match="50×40 DICOM pixels, where Columns and Rows are 40×50"):
        _read_one(turned)
    data_set = _data_set(ramp)
    data_set.compress(uid.RLELossless)
    for rows in (39, 41):
        data_set.Rows = rows
        data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
        with pytest.raises(dicom.ImageError, match="damaged DICOM pixels in RLE Lossless"):
            _read_one(tmp_path / "a.dcm")


def test_read_dicom_without_an_installed_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setattr(pydicom.pixels, "get_decoder", lambda syntax: types.SimpleNamespace(is_available=False))
    with pytest.raises(dicom.ImageError, match="JPEG-LS Lossless Image Compression; the extra `dicom` installs"):
        _read_one(WHEEL / "MR_small_jpeg_ls_lossless.dcm")


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian])
def test_read_dicom_bomb_is_refused_before_decoding(tmp_path, monkeypatch, syntax):
    path = _dicom(tmp_path / "a.dcm", np.zeros((30, 30), np.uint8), syntax=syntax)
    monkeypatch.setattr(dicom, "MAX_PIXELS", 200)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)
    with pytest.raises(dicom.ImageError, match="30×30 pixels, more than the 200|deflated DICOM of more than 800"):
        _read_one(path)


def test_read_slices_of_more_frames_than_fit_is_refused_before_decoding(tmp_path, monkeypatch):
    path = _dicom(tmp_path / "a.dcm", np.zeros((3, 10, 10), np.uint8))
    monkeypatch.setattr(dicom, "MAX_PIXELS", 299)
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)
    with pytest.raises(dicom.ImageError, match="3 frames of 10×10 pixels, more than the 299"):
        dicom.read_slices(path)


def test_read_slices_of_more_frames_than_are_read_is_refused(tmp_path, monkeypatch):
    path = _dicom(tmp_path / "a.dcm", np.zeros((3, 2, 2), np.uint8))
    monkeypatch.setattr(dicom, "MAX_FRAMES", 2)
    with pytest.raises(dicom.ImageError, match="3 frames in a DICOM file, more than the 2 that are read"):
        dicom.read_slices(path)


def test_read_run_lengths_of_far_more_pixels_are_refused_before_decoding(tmp_path, ramp, monkeypatch):
    runs = bytes([1, 0, 0, 0, 64]) + bytes(59) + b"\x81\0" * 4000  # of 512,000 zeros
    path = _dicom(tmp_path / "a.dcm", ramp, syntax=uid.RLELossless, PixelData=encaps.encapsulate([runs]))
    monkeypatch.setattr(pydicom.pixels, "pixel_array", None)
    with pytest.raises(dicom.ImageError, match="8064 bytes of run lengths, where a frame has 2000 of pixels"):
        _read_one(path)


@pytest.mark.parametrize("tail", [b"", b"\0"])
def test_read_deflated_dicom_of_megabytes_with_padding_behind_it_comes_back(tmp_path, tail):
    pixels = np.zeros((1200, 1000), np.uint16)
    pixels[0, 0] = 7
    path = _dicom(tmp_path / "a.dcm", pixels, syntax=uid.DeflatedExplicitVRLittleEndian)
    path.write_bytes(path.read_bytes() + tail)
    np.testing.assert_array_equal(_read_one(path), pixels)


def test_quiet_in_threads_that_overlap_keeps_the_filters_and_puts_them_back():
    entered, leave = threading.Event(), threading.Event()

    def reader():
        with dicom.quiet():
            entered.set()
            leave.wait(10)

    before = list(warnings.filters)
    thread = threading.Thread(target=reader)
    thread.start()
    assert entered.wait(10)
    with dicom.quiet():
        inside = list(warnings.filters)
        leave.set()
        thread.join()
        # The first has left, but what it had set is still wanted
        assert warnings.filters == inside != before
    assert warnings.filters == before


def test_read_randomly_damaged_dicom_is_read_or_refused(tmp_path, ramp, rng):
    whole = np.frombuffer(_dicom(tmp_path / "a.dcm", ramp, RescaleSlope=2, RescaleIntercept=1).read_bytes(), np.uint8)
    outcomes = set()
    for _ in range(200):
        damaged = whole.copy()
        # The header alone: bytes of the pixels may be any
        damaged[rng.integers(128, len(whole) - 2000, 3)] = rng.integers(0, 256, 3)
        found = dicom.read_acquisition(io.BytesIO(damaged.tobytes()))
        assert "planted" not in str(found).lower()
        try:
            (got,) = dicom.read_slices(io.BytesIO(damaged.tobytes()))
            assert np.isfinite(got.pixels).all()
            outcomes.add("read")
        except dicom.ImageError as error:
            assert "planted" not in str(error).lower()
            outcomes.add(str(error).split()[0])
    assert len(outcomes) > 4


def test_study_uid_is_the_files_own_and_empty_where_there_is_none(tmp_path, ramp):
    path = WHEEL / "CT_small.dcm"
    assert dicom.is_dicom(path) and dicom.study_uid(path) == pydicom.dcmread(path).StudyInstanceUID
    picture = tmp_path / "a.png"
    assert cv2.imwrite(str(picture), ramp)
    assert not dicom.is_dicom(picture) and dicom.study_uid(picture) == ""
    (tmp_path / "cut").write_bytes(path.read_bytes()[:140])
    assert dicom.is_dicom(tmp_path / "cut") and dicom.study_uid(tmp_path / "cut") == ""
    assert not dicom.is_dicom(tmp_path / "absent")


def test_study_uid_of_a_deflated_bomb_is_not_looked_for(tmp_path, ramp, monkeypatch):
    syntax = uid.DeflatedExplicitVRLittleEndian
    path = _dicom(tmp_path / "a.dcm", ramp, syntax=syntax, StudyInstanceUID="1.2.3", ImageComments="x" * 5000)
    assert dicom.study_uid(path) == "1.2.3"
    monkeypatch.setattr(dicom, "MAX_PIXELS", 1000)  # of which a data set may inflate to four times as many bytes
    assert dicom.study_uid(path) == "" and dicom.study_uid(tmp_path / "absent") == "" == dicom.study_uid(tmp_path)


def test_run_lengths_by_hand():
    # 3 times "a", no operation, "bc", then a header whose bytes are cut off
    assert dicom._run_lengths(b"\xfea" + b"\x80" + b"\x01bc" + b"\x05d", 100) == 3 + 2 + 1
    assert dicom._run_lengths(b"\x81\x00" * 100, 500) == 4 * 128  # no further than it needs to


def test_decode_of_run_lengths_that_unpack_to_far_more_is_refused_before_that(tmp_path, ramp, monkeypatch):
    pixels = np.resize(ramp, (720, 720))

    def frame(segment):
        data = encaps.encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + segment])
        return _dicom(tmp_path / "a.dcm", pixels, syntax=uid.RLELossless, PixelData=data)

    # The worst encoder: a header before each byte
    path = frame(b"".join(b"\0" + bytes([value]) for value in pixels.ravel()))
    np.testing.assert_array_equal(dicom.decode(path.read_bytes(), path)[0], pixels)
    # No longer than that, and 123 times as many bytes as a frame has
    path = frame(b"\x81\0" * 500_000)
    monkeypatch.setattr(rle, "_rle_decode_segment", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(dicom.ImageError, match="run lengths of more pixels than the 518400 of a frame"):
        dicom.decode(path.read_bytes(), path)
