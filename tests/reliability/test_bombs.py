"""Small files that stand for large ones: how much memory reading takes, measured from outside."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pydicom import encaps, uid

from tests.reliability import corpus, corpus_dicom

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and /proc are Linux's"),
    pytest.mark.slow,
]

BOMB_MB = 48  # what reading or refusing a bomb may take
BYTES_A_PIXEL = 48  # what reading may take at its peak, of all kinds; the most pixels are 100 million
GUARD_MB = 2500  # the address space beyond which a reader ends by MemoryError, so that no test harms the machine
SIZE = (3000, 4000)


def _zeros(num_bytes: int, level: int = 9) -> bytes:
    """Deflated zeros, made from one flushed piece."""
    packer = zlib.compressobj(level)
    piece = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    first, rest = piece[:2], piece[2:]
    return first + rest * (num_bytes // 2**20) + packer.flush()


def _png(size, bits, colour, idat=b"", extra=b""):
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, 0)
    chunks = corpus.png_chunk(b"IHDR", header) + extra + corpus.png_chunk(b"IDAT", idat)
    return b"\x89PNG\r\n\x1a\n" + chunks + corpus.png_chunk(b"IEND", b"")


def _jpeg(size, scans=1):
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "JPEG", progressive=True)
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc2") + 5
    data[frame : frame + 4] = struct.pack(">HH", *size)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return bytes(data[:-2] + scan * (scans - 1) + data[-2:])


def bombs() -> dict[str, bytes]:
    """Files of less than a megabyte that claim or unpack to gigabytes."""
    half_gigabyte = _zeros(2**29)
    small = _png((8, 8), 8, 0, zlib.compress(b"\0" + bytes(8) * 9))
    with_chunk = {
        "profile": b"iCCP" + b"icc\0\0" + half_gigabyte,
        "text": b"zTXt" + b"Comment\0\0" + half_gigabyte,
        "international text": b"iTXt" + b"Comment\0\1\0\0\0" + half_gigabyte,
    }
    found = {
        "claims 60000x60000.png": _png((60_000, 60_000), 8, 0, zlib.compress(b"")),
        "unpacks to 20000x20000.png": _png((20_000, 20_000), 8, 2, half_gigabyte),
        "pixels behind the end.png": _png((8, 8), 8, 0, half_gigabyte),
        "claims 65500x65500.jpg": _jpeg((65_500, 65_500)),
        "thousand scans.jpg": _jpeg((9_000, 9_000), 1000),
        "claims 65535x65535.gif.png": b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\0\0\0,\0\0\0\0"
        + struct.pack("<HH", 65535, 65535)
        + b"\0\x08\x01\0\0\0;",
        "claims 60000x60000.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
        "claims 60000x60000.tif": _claiming_tiff(60_000),
        "unpacks to half a gigabyte.tif": _deflated_tiff(half_gigabyte),
    }
    for name, chunk in with_chunk.items():
        found[f"half a gigabyte of {name}.png"] = small[:33] + corpus.png_chunk(chunk[:4], chunk[4:]) + small[33:]
    pixels = np.zeros((40, 50), np.uint8)
    huge = corpus_dicom.made(pixels)
    huge.Rows = huge.Columns = 65535
    found["claims 65535x65535.dcm"] = corpus_dicom.saved(huge)
    frames = corpus_dicom.made(pixels)
    frames.NumberOfFrames = 2**31 - 1
    found["claims 2147483647 frames.dcm"] = corpus_dicom.saved(frames)
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 400_000
    data_set = corpus_dicom.made(pixels, syntax=uid.RLELossless, PixelData=encaps.encapsulate([runs]))
    found["runs of 51 million pixels.dcm"] = corpus_dicom.saved(data_set)
    found["runs of 64 million pixels.dcm"] = corpus_dicom.saved(corpus_dicom.long_runs())
    bomb = next(case.data for case in corpus_dicom.structures(np.random.default_rng(0)) if case.kind == "deflated bomb")
    found["deflated.dcm"] = bomb
    return found


def _claiming_tiff(side):
    data = bytearray(corpus.tiff(np.zeros((8, 8), np.uint8)))
    for tag in (256, 257):
        at = data.index(struct.pack("<HHI", tag, 4, 1)) + 8
        data[at : at + 4] = struct.pack("<I", side)
    return bytes(data)


def _deflated_tiff(packed):
    """A TIFF of 8 × 8 pixels whose one strip is deflated, and inflates to more."""
    data = bytearray(corpus.tiff(np.zeros((8, 8), np.uint8)))
    at = data.index(struct.pack("<HHI", 259, 3, 1)) + 8
    data[at : at + 2] = struct.pack("<H", 8)
    at = data.index(struct.pack("<HHI", 279, 4, 1)) + 8
    data[at : at + 4] = struct.pack("<I", len(packed))
    return bytes(data[:-64]) + packed


def _measured(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [
        sys.executable,
        "-m",
        "tests.reliability.peak_memory",
        str(GUARD_MB),
        *map(str, map(folder.joinpath, files)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == list(files)
    return {row["name"]: row for row in rows}


def test_read_bombs_are_refused_or_read_small_in_bounded_memory(tmp_path, record):
    files = bombs()
    seen = Counter()
    for name, row in _measured(tmp_path, files).items():
        assert len(files[name]) < 2**20 and row["mb"] < BOMB_MB, row
        if row["outcome"] == "read: (8, 8)":
            seen["read, of its own size"] += 1
        else:
            assert row["outcome"].startswith("refused: "), row
            seen[corpus.REFUSED] += 1
    assert seen[corpus.REFUSED] > 10
    record("Pictures", f"bombs of less than a megabyte, in less than {BOMB_MB} MB", seen)


def _large():
    """Whole pictures of 12 million pixels, of the kinds that take the most memory."""
    grey = np.zeros(SIZE, np.uint8)
    grey[0, 0] = 255
    raw = {
        bytes_a_pixel: zlib.compress((b"\0" + bytes(SIZE[1] * bytes_a_pixel)) * SIZE[0], 1)
        for bytes_a_pixel in (1, 2, 8)
    }
    files = {
        "8.png": _png(SIZE, 8, 0, raw[1]),
        "16.png": _png(SIZE, 16, 0, raw[2]),
        "rgba 16.png": _png(SIZE, 16, 6, raw[8]),
    }
    image = Image.fromarray(grey)
    for name, picture, options in (
        ("cmyk.jpg", Image.new("CMYK", SIZE[::-1]), {}),
        ("progressive.jpg", Image.new("RGB", SIZE[::-1]), {"progressive": True}),
        ("palette.png", image.convert("P"), {"transparency": 0}),
        ("float.tif", image.convert("F"), {"compression": "tiff_adobe_deflate"}),
        ("gif.png", image, {}),
    ):
        file = io.BytesIO()
        picture.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], "GIF" if "gif" in name else "PNG"), **options)
        files[name] = file.getvalue()
    deep = grey.astype(np.uint16) * 9
    files["16.dcm"] = corpus_dicom.saved(corpus_dicom.made(deep, PixelPaddingValue=0))
    files["rescaled.dcm"] = corpus_dicom.saved(corpus_dicom.made(deep, RescaleSlope=0.5, RescaleIntercept=3))
    deflated = corpus_dicom.made(deep, syntax=uid.DeflatedExplicitVRLittleEndian)
    files["deflated.dcm"] = corpus_dicom.saved(deflated)
    return files


def test_read_large_pictures_take_memory_by_their_pixels(tmp_path, record):
    files = _large()
    for row in _measured(tmp_path, files).values():
        assert row["outcome"] == f"read: {SIZE}" and row["mb"] * 2**20 / (SIZE[0] * SIZE[1]) < BYTES_A_PIXEL, row
    told = f"pictures of 12 million pixels, in less than {BYTES_A_PIXEL} bytes of memory a pixel"
    record("Pictures", told, {"read": len(files)})
