"""Corpus of DICOM files, from those that come with pydicom or its own writer, each with a planted patient."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pydicom
from pydicom import encaps, uid
from pydicom.dataset import Dataset, FileMetaDataset

from tests.reliability.corpus import READ, REFUSED, UNSEEN, Case, by_range, cut, flip, luma

WHEEL = Path(pydicom.__path__[0]) / "data" / "test_files"
PLANTED = {
    "PatientName": "Plantedname^Zebra",
    "PatientID": "PLANTEDID-4711",
    "OtherPatientIDs": "PLANTEDID-4712",
    "PatientBirthDate": "19010203",
    "AccessionNumber": "PLANTEDACC-1",
    "InstitutionName": "Plantedhouse",
    "ReferringPhysicianName": "Planteddoctor^X",
}
IDENTIFIERS = ("planted", "19010203")  # as they would be seen in a message, in small letters
READABLE = (
    *("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_expb.dcm", "MR_small_RLE.dcm"),
    *("CT_small.dcm", "image_dfl.dcm", "examples_overlay.dcm", "examples_rgb_color.dcm"),
    *("examples_palette.dcm", "JPEG2000.dcm", "MR_small_jp2klossless.dcm", "693_J2KI.dcm", "liver_1frame.dcm"),
    *("SC_rgb_jpeg.dcm", "SC_rgb_rle.dcm", "SC_rgb_small_odd.dcm", "rtdose_1frame.dcm"),
    *("dicomdirtests/77654033/CR1/6154", "dicomdirtests/77654033/CR2/6247", "dicomdirtests/77654033/CT2/17106"),
    *("dicomdirtests/98892001/CT2N/6293", "dicomdirtests/98892003/MR1/15820", "dicomdirtests/98892003/MR2/4950"),
)
CUT = ("MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "image_dfl.dcm")
ABSENT = (
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "PixelData"),
)


def parsed(name: str) -> Dataset:
    """A file of the wheel, with the planted patient."""
    data_set = pydicom.dcmread(WHEEL / name, force=True)
    for tag, value in PLANTED.items():
        setattr(data_set, tag, value)
    return data_set


def made(pixels: np.ndarray, *, syntax=uid.ExplicitVRLittleEndian, **tags) -> Dataset:
    """A data set of an array ([frames,] H, W), with the planted patient; None drops a tag."""
    data_set = Dataset()
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = syntax
    data_set.SOPClassUID, data_set.SOPInstanceUID = uid.MRImageStorage, "1.2.3.4"
    bits = 8 * pixels.itemsize
    told = {"Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "SamplesPerPixel": 1}
    told |= {"PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": int(pixels.dtype.kind == "i")}
    told |= {"NumberOfFrames": pixels.shape[0] if pixels.ndim == 3 else None}
    told |= {"BitsAllocated": bits, "BitsStored": bits, "PixelData": pixels.tobytes(), **PLANTED, **tags}
    told.setdefault("HighBit", told["BitsStored"] - 1)
    for name, value in told.items():
        if value is not None:
            setattr(data_set, name, value)
    if "PixelData" in data_set:
        data_set["PixelData"].VR = "OW" if bits > 8 else "OB"
        data_set["PixelData"].is_undefined_length = syntax not in uid.UncompressedTransferSyntaxes
    return data_set


def saved(data_set: Dataset, **options) -> bytes:
    """Encode as pydicom does, however wrong it is."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data_set.save_as(file, **{"enforce_file_format": True, **options})
    return file.getvalue()


def expected_of(data_set: Dataset) -> np.ndarray:
    """What a picture must become, from pydicom's decoder and the definitions in `images.read`'s docstring."""
    from pydicom.pixels import apply_color_lut, apply_rescale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = data_set.pixel_array
        if data_set.PhotometricInterpretation == "PALETTE COLOR":
            values = apply_color_lut(values, data_set)
        if values.ndim == 3:
            share = 1 if values.dtype == np.uint8 else 65535 / 255
            return luma(values / share) if share == 1 else luma(_scaled(values))
        if data_set.get("RescaleSlope") not in (None, 1) or data_set.get("RescaleIntercept") not in (None, 0):
            values = apply_rescale(values, data_set)
    if data_set.PhotometricInterpretation == "MONOCHROME1":
        values = -values.astype(float)
    if values.dtype == np.uint8 and data_set.BitsStored == 8:
        return values
    stored, padding = data_set.pixel_array.astype(int), data_set.get("PixelPaddingValue")
    if padding is None or not (mask := (stored - padding) % 2**16 == 0).any():
        return by_range(values)
    inner = values[~mask].astype(float)
    return np.where(mask, 0, by_range(values.astype(float).clip(inner.min(), inner.max())))


def _scaled(values):
    return (values - float(values.min())) / np.ptp(values.astype(float)) * 255


# --- classes ---------------------------------------------------------------------------------------------------------


def wheel(rng) -> Iterator[Case]:
    """Whole files of the library: all syntaxes that decode without further packages."""
    for name in READABLE:
        # Its pixels are shown as they were: only the patient is another.
        data_set = pydicom.dcmread(WHEEL / name, force=True)
        data, suffix = (WHEEL / name).read_bytes(), "" if name.endswith(".dcm") else ".dcm"
        yield Case("whole file", f"wheel/{name}{suffix}", data, (READ,), expected_of(data_set), 1)


def damaged(rng) -> Iterator[Case]:
    """Cut anywhere, and bits flipped in headers and pixels."""
    wholes = {}
    for name in CUT:
        data_set = parsed(name)
        wholes[name] = saved(data_set), expected_of(data_set)
    for name, (data, expected) in wholes.items():
        # In the picture's own numbers, or before them, anything may be; pixels sum up nowhere.
        for at in range(14):
            yield Case("cut at a random byte", f"cut {at} {name}", cut(data, rng), (READ, REFUSED), expected, 1)
        header = 1 - 8192 / len(data) if len(data) > 8192 else 0.3
        for at in range(12):
            flipped = flip(0, header, 3)(data, rng)
            may = (READ, REFUSED, UNSEEN)
            yield Case("flipped bits in the header", f"header {at} {name}", flipped, may, expected, 1)
        for at in range(6):
            flipped = flip(header, 1, 3)(data, rng)
            yield Case("flipped bits in the pixels", f"pixels {at} {name}", flipped, may, expected, 1)
    rle = wholes["MR_small_RLE.dcm"]
    for at in range(15):
        flipped = flip(1 - 6000 / len(rle[0]), 1, 1)(rle[0], rng)
        yield Case("run lengths with a flipped bit", f"rle {at}.dcm", flipped, (READ, REFUSED, UNSEEN), rle[1], 1)


def absent(rng) -> Iterator[Case]:
    """Each tag that describes pixels, absent, empty, or of another kind."""
    for name in ("MR_small.dcm", "CT_small.dcm", "MR_small_implicit.dcm"):
        expected = expected_of(parsed(name))
        for tag in ABSENT:
            data_set = parsed(name)
            delattr(data_set, tag)
            # BitsStored and HighBit follow from others; all else must be said.
            may = (READ, REFUSED) if tag in ("BitsStored", "HighBit") else (REFUSED,)
            yield Case("absent tag", f"absent {tag} {name}", saved(data_set), may, expected, 1)
        data_set = parsed(name)
        whole = saved(data_set)
        syntax = data_set.file_meta.TransferSyntaxUID
        data_set.file_meta, data_set.preamble = FileMetaDataset(), None
        encoding = {"implicit_vr": syntax == uid.ImplicitVRLittleEndian, "little_endian": True}
        bare = saved(data_set, enforce_file_format=False, **encoding)
        yield Case("absent file meta", f"bare {name}", bare, (READ,), expected, 1)
        yield Case("absent file meta", f"prefixed {name}", b"\0" * 128 + b"DICM" + bare, (READ,), expected, 1)
        yield Case("absent file meta", f"no suffix {name[:-4]}.png", bare, (REFUSED,))
        element = whole.index(struct.pack("<HH2s", 2, 0x10, b"UI"))
        (length,) = struct.unpack_from("<H", whole, element + 6)
        without = whole[:element] + whole[element + 8 + length :]
        yield Case("absent TransferSyntaxUID", f"no syntax {name}", without, (READ, REFUSED), expected, 1)
        for tag in ABSENT[:7] if syntax == uid.ExplicitVRLittleEndian else ():
            for vr in ("DS", "LO", "UN", "OB", "SQ", "ZZ"):
                data = whole.replace(_start(tag, "US"), _start(tag, vr))
                assert data != whole
                yield Case("tag of a wrong kind", f"{vr} {tag} {name}", data, (READ, REFUSED), expected, 1)


def _start(tag: str, vr: str) -> bytes:
    number = pydicom.datadict.tag_for_keyword(tag)
    return struct.pack("<HH2s", number >> 16, number & 0xFFFF, vr.encode())


def sizes(rng) -> Iterator[Case]:
    """Rows, columns and frames against the pixels that are there."""
    for name in ("MR_small.dcm", "CT_small.dcm", "MR_small_RLE.dcm", "JPEG2000.dcm"):
        for rows, columns in ((1, 0), (-1, 0), (0, 1), (0, -1), (7, 7), (-9, -9), (1000, 0), (0, 1000), (-30, 30)):
            data_set = parsed(name)
            data_set.Rows, data_set.Columns = data_set.Rows + rows, data_set.Columns + columns
            data = saved(data_set)
            yield Case("rows or columns that lie", f"size {rows} {columns} {name}", data, (REFUSED,))
        for frames in (2, 3, 10, 100, 2**31 - 1):
            data_set = parsed(name)
            data_set.NumberOfFrames = frames
            yield Case("frames that lie", f"frames {frames} {name}", saved(data_set), (REFUSED,))
        for rows, columns in ((65535, 65535), (65535, 64), (10001, 10000)):
            data_set = parsed(name)
            data_set.Rows, data_set.Columns = rows, columns
            yield Case("size that no picture has", f"huge {rows} {columns} {name}", saved(data_set), (REFUSED,))
    pixels = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    for at, size in enumerate([(50, 40), (41, 50), (20, 100), (8, 8), (400, 500)]):
        data = encaps.encapsulate([cv2.imencode(".jpg", cv2.resize(pixels, size[::-1]))[1].tobytes()])
        data_set = made(pixels, syntax=uid.JPEGBaseline8Bit, PixelData=data)
        yield Case("JPEG of another size within", f"inner {at}.dcm", saved(data_set), (REFUSED,))
    for at in range(1, 6):
        volume = rng.integers(0, 4000, (at + 1, 20, 30), dtype=np.uint16)
        yield Case("several frames", f"several {at}.dcm", saved(made(volume)), (REFUSED,))


SYNTAXES = (
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian, uid.DeflatedExplicitVRLittleEndian, uid.RLELossless),
    *(uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.MPEG2MPML, "1.2.840.10008.1.2.4.777"),
)


def syntaxes(rng) -> Iterator[Case]:
    """Files that say to be encoded as they are not."""
    for name in ("MR_small.dcm", "CT_small.dcm", "MR_small_RLE.dcm"):
        data_set = parsed(name)
        whole, expected = saved(data_set), expected_of(data_set)
        true = data_set.file_meta.TransferSyntaxUID
        element = whole.index(struct.pack("<HH2s", 2, 0x10, b"UI"))
        (length,) = struct.unpack_from("<H", whole, element + 6)
        for syntax in (*SYNTAXES, uid.ExplicitVRLittleEndian):
            if syntax == true:
                continue
            value = str(syntax).encode() + b"\0" * (len(syntax) % 2)
            data = whole[: element + 6] + struct.pack("<H", len(value)) + value + whole[element + 8 + length :]
            name_of = f"syntax {syntax} {name}"
            yield Case("wrong transfer syntax", name_of, data, (READ, REFUSED), expected, 1)


def structures(rng) -> Iterator[Case]:
    """Sequences in sequences, lengths that end nowhere, and odd ones."""
    pixels = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    whole = saved(made(pixels))
    at = whole.index(struct.pack("<HH2s", 0x10, 0x10, b"PN"))
    opens = struct.pack("<HH2sHI", 0x08, 0x1140, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    closes = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    for depth in (1, 5, 50, 100):
        data = whole[:at] + opens * depth + closes * depth + whole[at:]
        yield Case("sequences within sequences", f"nested {depth}.dcm", data, (READ,), pixels)
    for depth in (1_000, 5_000, 100_000):
        data = whole[:at] + opens * depth + closes * depth + whole[at:]
        yield Case("sequences within sequences, too deep", f"nested {depth}.dcm", data, (REFUSED,))
    for depth in (1, 2, 5, 50, 100, 1_000, 100_000):
        yield Case(
            "sequence that is never closed", f"open {depth}.dcm", whole[:at] + opens * depth + whole[at:], (REFUSED,)
        )
    for tag in ("PatientName", "PatientID", "AccessionNumber", "InstitutionName"):
        start = whole.index(
            struct.pack("<I", pydicom.datadict.tag_for_keyword(tag))[2:]
            + struct.pack("<I", pydicom.datadict.tag_for_keyword(tag))[:2]
        )
        (length,) = struct.unpack_from("<H", whole, start + 6)
        for odd in (length - 1, length + 1, length + 2, 0, 65535):
            data = whole[: start + 6] + struct.pack("<H", odd) + whole[start + 8 :]
            yield Case("length that lies", f"length {tag} {odd}.dcm", data, (READ, REFUSED), pixels)
        value = whole[start + 8 : start + 8 + length].rstrip(b" \0")
        value += b"" if len(value) % 2 else b"x"
        data = whole[: start + 6] + struct.pack("<H", len(value)) + value + whole[start + 8 + length :]
        yield Case("odd length", f"odd {tag}.dcm", data, (READ,), pixels)
    tail = whole.index(struct.pack("<HH2s", 0x7FE0, 0x10, b"OB")) + 8
    for at, length in enumerate((0xFFFFFFFF, 0xFFFFFFFE, 2**31, 1, 1999)):
        data = whole[:tail] + struct.pack("<I", length) + whole[tail + 4 :]
        # pydicom takes what there is of a length beyond the end, here all of them
        may = (READ, REFUSED) if length >= 2**31 else (REFUSED,)
        yield Case("length of the pixels that lies", f"pixels {at}.dcm", data, may, pixels)
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = saved(made(pixels, syntax=uid.DeflatedExplicitVRLittleEndian, PixelData=None))
    (length,) = struct.unpack_from("<I", head, 140)
    # A flushed piece may be repeated: 30 times 16 MiB of zeros
    piece = bomb.compress(bytes(2**24)) + bomb.flush(zlib.Z_FULL_FLUSH)
    data = head[: 144 + length] + piece * 30 + bomb.flush()
    yield Case("deflated bomb", "bomb.dcm", data, (REFUSED,))
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2_000_000
    data_set = made(pixels, syntax=uid.RLELossless, PixelData=encaps.encapsulate([runs]))
    yield Case("run lengths of far more pixels", "runs.dcm", saved(data_set), (REFUSED,))
    yield Case("run lengths of far more pixels", "long runs.dcm", saved(long_runs()), (REFUSED,))


def long_runs() -> Dataset:
    """Run lengths that are no longer than the worst encoder makes them, and stand for 123 times as many pixels."""
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 500_000
    return made(np.zeros((720, 720), np.uint8), syntax=uid.RLELossless, PixelData=encaps.encapsulate([runs]))


def unusual(rng) -> Iterator[Case]:
    """Whole files of pixels of every kind."""
    for at in range(4):
        base = cv2.resize(rng.integers(0, 256, (6, 7), dtype=np.uint8), (50, 40), interpolation=cv2.INTER_CUBIC)
        twelve = base.astype(np.uint16) * 9 + 300
        signed = twelve.astype(np.int16) - 1500
        one = {"PhotometricInterpretation": "MONOCHROME1"}
        yield from (
            Case(kind, f"{kind} {at}.dcm", saved(data_set), (READ,), expected, 1)
            for kind, data_set, expected in (
                ("8 bits", made(base), base),
                ("8 bits, MONOCHROME1", made(base, **one), 255 - base),
                ("12 bits in 16", made(twelve, BitsStored=12), by_range(twelve)),
                ("12 bits in 16, MONOCHROME1", made(twelve, BitsStored=12, **one), 255 - by_range(twelve)),
                ("overlay in the upper bits", made(twelve | _overlay(base), BitsStored=12), by_range(twelve)),
                ("16 bits", made(twelve * 7), by_range(twelve)),
                ("signed, 16 bits", made(signed), by_range(signed)),
                ("signed, 12 bits", made(signed, BitsStored=12), by_range(signed)),
                ("rescaled", made(twelve, RescaleSlope=0.5, RescaleIntercept=-1024), by_range(twelve)),
                ("rescaled downwards", made(twelve, RescaleSlope=-2, RescaleIntercept=5), 255 - by_range(twelve)),
                ("32 bits", made(twelve.astype(np.uint32) + 3_000_000_000), by_range(twelve)),
                ("1 bit", _one_bit(base), np.where(base > 127, 255, 0).astype(np.uint8)),
                ("padding", *_padded(twelve)),
                ("floats that are infinite", _floats(twelve, np.inf), None),
                ("floats", _floats(twelve, 300), by_range(np.where(_corner(twelve), 300, twelve))),
            )
            if expected is not None
        )
        data = saved(_floats(twelve, np.inf if at % 2 else np.nan))
        expected = by_range(np.where(_corner(twelve), 0, twelve))
        may = (REFUSED,) if at % 2 else (READ,)
        yield Case("floats, infinite or NaN", f"infinite {at}.dcm", data, may, expected, 1)


def _corner(pixels):
    mask = np.zeros(pixels.shape, bool)
    mask[:5, :5] = True
    return mask


def _overlay(base):
    return np.where(base > 127, 0x8000, 0).astype(np.uint16)


def _one_bit(base):
    packed = np.packbits(base > 127, bitorder="little").tobytes()
    return made(base, BitsAllocated=1, BitsStored=1, PixelData=packed)


def _padded(pixels):
    stored = np.where(_corner(pixels), 4095, pixels).astype(np.uint16)
    inner = pixels[~_corner(pixels)].astype(float)
    expected = np.rint((pixels - inner.min()).clip(0) / np.ptp(inner) * 255).clip(0, 255).astype(np.uint8)
    return made(stored, BitsStored=12, PixelPaddingValue=4095), np.where(_corner(pixels), 0, expected)


def _floats(pixels, corner):
    data_set = made(pixels, BitsAllocated=32, BitsStored=32, PixelData=None)
    data_set.FloatPixelData = np.where(_corner(pixels), corner, pixels).astype(np.float32).tobytes()
    return data_set


def elsewhere(rng) -> Iterator[Case]:
    """DICOM of other names, and without its preamble's zeros."""
    pixels = rng.integers(0, 256, (40, 50), dtype=np.uint8)
    whole = saved(made(pixels))
    for suffix in ("png", "jpg", "tif", "dicom", "DCM", "img", "6154"):
        yield Case("DICOM under any name", f"other.{suffix}", whole, (READ,), pixels)
    noise = rng.bytes(128)
    yield Case("preamble that is not empty", "noise.dcm", noise + whole[128:], (READ,), pixels)
    tiff_like = b"II*\0" + noise[4:]
    yield Case("preamble that is not empty", "tiff.dcm", tiff_like + whole[128:], (READ,), pixels)
    yield Case("bytes behind the data set", "behind.dcm", whole + b"\0" * 7, (READ, REFUSED), pixels)
    yield Case("bytes behind the data set", "garbage.dcm", whole + noise, (READ, REFUSED), pixels)


def all_cases() -> list[Case]:
    """The whole corpus, the same each time."""
    rng = np.random.default_rng(21)
    makers = (wheel, damaged, absent, sizes, syntaxes, structures, unusual, elsewhere)
    return [case for make in makers for case in make(rng)]
