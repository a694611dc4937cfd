import io
import logging
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import encaps, uid
from pydicom.dataset import Dataset, FileMetaDataset

from kerasmed import images

WHEEL = Path(pydicom.__path__[0]) / "data"  # test files that come with the library


@pytest.fixture
def ramp():
    """uint8 (40, 50), every value different from its neighbours, with both ends of the range."""
    return np.linspace(0, 255, 2000).reshape(40, 50).astype(np.uint8)


def _png(path, array):
    assert cv2.imwrite(str(path), array)
    return path


def test_read_grey_png_returns_its_pixels(tmp_path, ramp):
    np.testing.assert_array_equal(images.read(_png(tmp_path / "a b (1).png", ramp)), ramp)


def test_read_color_png_returns_luma_by_hand(tmp_path):
    # BGR for OpenCV: red 200, green 100, blue 50 -> 0.299·200 + 0.587·100 + 0.114·50 = 124.2
    assert images.read(_png(tmp_path / "c.png", np.full((4, 4, 3), (50, 100, 200), np.uint8)))[0, 0] == 124


def test_read_rgba_png_composites_on_black(tmp_path, ramp):
    alpha = np.full_like(ramp, 255)
    alpha[:, :10] = 0
    alpha[:, 10:20] = 51
    got = images.read(_png(tmp_path / "a.png", np.dstack([ramp, ramp, ramp, alpha])))
    assert (got[:, :10] == 0).all()
    # a fifth of the value, rounded, and a rounding of luma
    np.testing.assert_allclose(got[:, 10:20], ramp[:, 10:20] / 5, atol=1)
    np.testing.assert_array_equal(got[:, 20:], ramp[:, 20:])


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (0, 65535), (300, 1200)])
def test_read_16_bit_png_scales_by_its_range(tmp_path, ramp, low, high):
    deep = (low + ramp.astype(np.float64) / 255 * (high - low)).astype(np.uint16)
    got = images.read(_png(tmp_path / "d.png", deep))
    assert (got.min(), got.max()) == (0, 255)
    # truncation to uint16 moves a value by at most one step of the range
    np.testing.assert_allclose(got, ramp, atol=1 + 255 / (high - low))


@pytest.mark.parametrize("channels", ["RGB", "RGBA", "LA"])
def test_read_12_bits_in_16_bit_color_and_alpha_scale_by_the_range_of_color(tmp_path, ramp, channels):
    deep, opaque = ramp.astype(np.uint16) * 16, np.full(ramp.shape, 65535, np.uint16)
    if channels == "LA":
        # 16-bit grey with alpha, which neither library writes: rows of filter 0 in one chunk.
        rows = np.dstack([deep, opaque]).astype(">u2")
        raw = b"".join(b"\x00" + row.tobytes() for row in rows)
        header = struct.pack(">IIBBBBB", ramp.shape[1], ramp.shape[0], 16, 4, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
        body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (tmp_path / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    else:
        _png(tmp_path / "d.png", np.dstack([deep] * 3 + ([opaque] if channels == "RGBA" else [])))
    got = images.read(tmp_path / "d.png")
    assert (got.min(), got.max()) == (0, 255)
    # 255 · 16 is stretched to 255 exactly, and luma rounds
    np.testing.assert_allclose(got, ramp, atol=1)


def test_read_bytes_after_a_whole_image_do_no_harm(tmp_path, ramp):
    path = _png(tmp_path / "a.png", ramp)
    path.write_bytes(path.read_bytes() + b"x" * 200)
    np.testing.assert_array_equal(images.read(path), ramp)


def test_read_constant_16_bit_png_is_black(tmp_path):
    assert not images.read(_png(tmp_path / "d.png", np.full((4, 4), 700, np.uint16))).any()


def _tiff(path, array, **tags):
    Image.fromarray(array).save(path, tiffinfo=tags or {})
    return path


def test_read_12_bits_in_16_bit_color_tiff_scales_by_the_range(tmp_path, ramp):
    path = _png(tmp_path / "d.tif", np.dstack([ramp.astype(np.uint16) * 16] * 3))
    # 255 · 16 is stretched to 255 exactly, and luma rounds
    np.testing.assert_allclose(images.read(path), ramp, atol=1)
    assert images.read_header(path) == (40, 50, "TIFF", "RGB", 16)


def test_read_deep_tiff_whose_zero_is_white_is_inverted(tmp_path, ramp):
    for name, array in (("a.tif", ramp.astype(np.uint16) * 257), ("b.tif", ramp.astype(np.float32))):
        path = _tiff(tmp_path / name, array)
        whole = path.read_bytes()
        one, zero = struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0)
        assert whole.count(one) == 1
        path.write_bytes(whole.replace(one, zero))
        np.testing.assert_array_equal(images.read(path), 255 - ramp)


def test_read_small_steps_of_large_32_bit_numbers_are_kept(tmp_path, ramp):
    path = _tiff(tmp_path / "i.tif", ramp.astype(np.int32) + 2_000_000_000)  # of which float32 tells every 128th
    np.testing.assert_array_equal(images.read(path), ramp)


@pytest.mark.parametrize("values", [[1, np.inf], [-np.inf, 0], [np.nan, np.nan]])
def test_read_tiff_of_floats_without_a_range_is_refused(tmp_path, values):
    path = _tiff(tmp_path / "f.tif", np.array([values], np.float32))
    with pytest.raises(images.ImageError, match="float32 that are nothing but NaN, or infinite"):
        images.read(path)


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_read_grey_png_with_a_clear_grey_shows_it_black(tmp_path, bits):
    levels = np.array([[0, 1, 2, 3]])
    stored = {2: b"\0\x1b", 8: b"\0" + bytes([0, 85, 170, 255]), 16: b"\0" + (levels * 21845).astype(">u2").tobytes()}
    clear = {2: 2, 8: 170, 16: 43690}[bits].to_bytes(2, "big")
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", clear), (b"IDAT", zlib.compress(stored[bits])), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    (tmp_path / "t.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert images.read(tmp_path / "t.png").tolist() == [[0, 85, 0, 255]]


def test_read_png_whose_exif_is_damaged_is_read(tmp_path, ramp):
    data = _png(tmp_path / "e.png", ramp).read_bytes()
    chunk = b"eXIfjunk"
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "e.png").write_bytes(data[:33] + chunk + data[33:])
    np.testing.assert_array_equal(images.read(tmp_path / "e.png"), ramp)


def test_read_program_named_as_a_picture_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    for read in (images.read, images.read_header):
        with pytest.raises(images.ImageError, match="not an image"):
            read(tmp_path / "a.png")


def test_read_folder_or_pipe_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (
        ("folder.png", "a folder, where a file"),
        ("pipe.png", "a pipe or device"),
        ("\0", "such a name"),
    ):
        for read in (images.read, images.read_header):
            with pytest.raises(images.ImageError, match=reason):
                read(tmp_path / name)


def test_read_cmyk_jpeg_equals_pillow(tmp_path, ramp):
    Image.fromarray(np.dstack([ramp] * 3)).convert("CMYK").save(tmp_path / "c.jpg", quality=95)
    got = images.read(tmp_path / "c.jpg")
    # JPEG at quality 95 and two conversions: a few grey levels
    assert np.abs(got.astype(int) - ramp).mean() < 3


def test_read_palette_and_one_bit_png(tmp_path, ramp):
    Image.fromarray(ramp).convert("P").save(tmp_path / "p.png")
    Image.fromarray(ramp > 127).save(tmp_path / "one.png")
    assert np.abs(images.read(tmp_path / "p.png").astype(int) - ramp).max() <= 1
    np.testing.assert_array_equal(images.read(tmp_path / "one.png"), np.where(ramp > 127, 255, 0))


def test_read_exif_rotation_is_applied(tmp_path, ramp):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    Image.fromarray(ramp).save(tmp_path / "r.jpg", exif=exif, quality=95)
    got = images.read(tmp_path / "r.jpg")
    assert got.shape == (50, 40)
    assert np.abs(got.astype(int) - np.rot90(ramp, -1)).mean() < 3


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"patient notes, not pixels", "not an image"),
        (b"\xff\xd8\xff\xe0", "not an image|unreadable header"),
    ],
)
def test_read_of_no_image_says_why(tmp_path, content, reason):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(images.ImageError, match=reason):
        images.read(tmp_path / "x.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_read_truncated_file_is_refused(tmp_path, suffix, share, rng):
    path = _png(tmp_path / f"t{suffix}", rng.integers(0, 256, (60, 60), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(images.ImageError, match="truncated"):
        images.read(path)


def test_read_truncated_jpeg_with_whole_exif_thumbnail_is_refused(tmp_path, rng):
    picture = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    whole = cv2.imencode(".jpg", picture)[1].tobytes()
    small = cv2.imencode(".jpg", picture[:8, :8])[1].tobytes()
    # An application segment that holds a whole small JPEG, its end marker included, before the real picture.
    segment = b"\xff\xe1" + (len(small) + 2).to_bytes(2, "big") + small
    (tmp_path / "t.jpg").write_bytes((whole[:2] + segment + whole[2:])[:-200])
    with pytest.raises(images.ImageError, match="truncated JPEG"):
        images.read(tmp_path / "t.jpg")


def test_read_jpeg_of_far_more_scans_than_any_writes_is_refused_before_decoding(tmp_path, ramp, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    scans = whole.count(b"\xff\xda")
    assert 4 < scans < 20 and images.read(io.BytesIO(whole)).shape == ramp.shape
    last = whole[whole.rindex(b"\xff\xda") : -2]
    many = whole[:-2] + last * 100 + whole[-2:]
    monkeypatch.setattr(cv2, "imdecode", None)
    with pytest.raises(images.ImageError, match=f"JPEG of {scans + 100} scans, more than the 64 that are read"):
        images.read(io.BytesIO(many))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
@pytest.mark.parametrize("behind", [b"\xff\xda" * 100, b"\xff\xd9\xff\xda", b"\xff\xd8\xff\xe0\0", b"ftyp\xff\xda"])
def test_read_jpeg_with_markers_behind_its_end_is_its_picture(ramp, options, behind):
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", **options)
    expected = np.asarray(Image.open(file))
    np.testing.assert_array_equal(images.read(io.BytesIO(file.getvalue() + behind)), expected)
    # Fillings before a marker
    filled = file.getvalue().replace(b"\xff\xda", b"\xff\xff\xff\xda", 1)
    np.testing.assert_array_equal(images.read(io.BytesIO(filled + behind)), expected)


@pytest.mark.parametrize("behind", [b"\xff\xd8\xff\xd9", b"film"])
def test_read_truncated_jpeg_with_something_behind_is_refused(rng, behind):
    whole = cv2.imencode(".jpg", rng.integers(0, 256, (64, 64), dtype=np.uint8))[1].tobytes()
    with pytest.raises(images.ImageError, match="truncated JPEG"):
        images.read(io.BytesIO(whole[:-200].rstrip(b"\xff") + behind))


def test_read_jpeg_of_segments_without_end_is_refused_in_bounded_time(ramp):
    whole = cv2.imencode(".jpg", ramp)[1].tobytes()
    images.read(io.BytesIO(whole[:2] + b"\xff\xfe\0\2" * 9000 + whole[2:]))
    with pytest.raises(images.ImageError, match="JPEG of more than the 10000 segments"):
        images.read(io.BytesIO(whole[:2] + b"\xff\xfe\0\2" * 10_000 + whole[2:]))


def test_read_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(images.ImageError, match="20×20 pixels, more than the 100"):
        images.read(_png(tmp_path / "b.png", np.zeros((20, 20), np.uint8)))


def test_read_from_memory_equals_read_from_disk(tmp_path, ramp):
    path = _png(tmp_path / "a.png", ramp)
    np.testing.assert_array_equal(
        images.read(io.BytesIO(path.read_bytes()), image_size=(9, 9)), images.read(path, image_size=(9, 9))
    )


def _arrays(ramp):
    """Pictures of every kind that a PNG can hold, RGB order."""
    deep, colour = ramp.astype(np.uint16) * 16 + 3, np.dstack([ramp, 255 - ramp, ramp // 2])
    return {
        "grey": ramp,
        "colour": colour,
        "alpha": np.dstack([colour, ramp[::-1]]),
        "deep": deep,
        "deep colour": colour.astype(np.uint16) * 200 + 77,
        "deep alpha": np.dstack([colour, ramp[::-1]]).astype(np.uint16) * 257,
        "constant": np.full((3, 4), 700, np.uint16),
        "one pixel": np.full((1, 1), 77, np.uint8),
    }


@pytest.mark.parametrize(
    "name", ["grey", "colour", "alpha", "deep", "deep colour", "deep alpha", "constant", "one pixel"]
)
def test_from_array_equals_read_of_the_file_with_its_pixels(tmp_path, ramp, name):
    array = _arrays(ramp)[name]
    stored = array[..., [2, 1, 0, 3][: array.shape[2]]] if array.ndim == 3 else array
    got = images.from_array(array)
    assert got.dtype == np.uint8 and got.shape == array.shape[:2]
    np.testing.assert_array_equal(got, images.read(_png(tmp_path / "a.png", stored)))


def test_from_array_of_one_channel_is_that_channel(ramp):
    for array in (ramp, ramp.astype(np.uint16) * 3, ramp / 255):
        np.testing.assert_array_equal(images.from_array(array[..., None]), images.from_array(array))


def test_from_array_colour_is_luma_by_hand():
    # RGB: 0.299 · 200 + 0.587 · 100 + 0.114 · 50 = 124.2
    assert images.from_array(np.full((2, 2, 3), (200, 100, 50), np.uint8)).tolist() == [[124, 124], [124, 124]]


@pytest.mark.parametrize(
    "kind", ["int8", "int16", "uint16", "int32", "uint32", "int64", "float16", "float32", "float64"]
)
def test_from_array_scales_every_type_but_uint8_by_its_own_range(kind):
    array = np.array([[-50, 0, 50], [70, 100, 110]]) + (50 if kind[0] == "u" else 0)
    # -50 to 0 and 110 to 255: 255 / 160 = 1.59375 a step
    expected = [[0, 80, 159], [191, 239, 255]]
    assert images.from_array(array.astype(kind)).tolist() == expected
    assert images.from_array(array.astype(kind)[::-1, ::-1]).tolist() == np.array(expected)[::-1, ::-1].tolist()
    assert not images.from_array(np.full((2, 2), 9, kind)).any()


def test_from_array_keeps_uint8_and_does_not_write_to_what_it_is_given(ramp):
    dark = ramp // 4
    np.testing.assert_array_equal(images.from_array(dark), dark)
    values = np.array([[np.nan, 1.0, -1.0]])
    assert images.from_array(values).tolist() == [[128, 255, 0]] and np.isnan(values[0, 0])


@pytest.mark.parametrize(
    "array",
    [
        np.array([[0.0, 1.0, np.inf]]),
        np.array([[-np.inf, 0.0, np.nan]]),
        np.array([[0.0, 1e300]]),
        np.array([[0.0, -3.5e38]]),
        np.array([[0.0, np.inf]], np.float16),
        np.array([[0.0, np.inf]], np.float32),
        np.full((2, 3), np.nan),
        np.full((2, 3, 3), np.nan, np.float32),
    ],
)
def test_from_array_of_infinite_beyond_float32_or_no_values_is_refused(array):
    with pytest.raises(ValueError, match=f"of {array.dtype}, has nothing but NaN, or .*; clip it or mark such pixels"):
        images.from_array(array)


def test_from_array_of_the_largest_values_of_float32_is_no_error():
    most = float(np.finfo(np.float32).max)
    assert images.from_array(np.array([[0.0, most]])).tolist() == [[0, 255]]
    assert images.from_array(np.array([[0, most]], np.float32)).tolist() == [[0, 255]]
    assert images.from_array(np.array([[-1e38, 0.0, np.nan, 1e38]])).tolist() == [[0, 128, 128, 255]]
    # A range that no float32 holds, and one whose reciprocal none does
    assert images.from_array(np.array([[-most, 0, most]], np.float32)).tolist() == [[0, 128, 255]]
    assert images.from_array(np.array([[0, 1e-45, 2e-45, 5e-45]], np.float32)).tolist() == [[0, 64, 64, 255]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 40, 50)), r"float64 of shape \(5, 40, 50\).*Give several slices as a list"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\); expected numbers of shape \(height, width\)"),
        (np.zeros(7, np.uint8), "expected numbers of shape"),
        (np.zeros((0, 7), np.uint8), "expected numbers of shape"),
        (np.zeros((7, 7, 3, 1), np.uint8), "expected numbers of shape"),
        (np.zeros((7, 7), bool), "array of bool"),
        (np.zeros((7, 7), complex), "array of complex128"),
        (np.array([["a"]]), "expected numbers of shape"),
        (np.zeros((7, 7, 4), np.float32), "transparency in float32; expected uint8 or uint16"),
        (np.zeros((7, 7, 4), np.int16), "transparency in int16"),
    ],
)
def test_from_array_of_what_is_no_picture_is_refused(array, message):
    with pytest.raises(ValueError, match=message):
        images.from_array(array)


def test_from_array_of_more_pixels_than_are_read_is_refused(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert images.from_array(np.zeros((3, 4, 3), np.uint8)).shape == (3, 4)
    with pytest.raises(ValueError, match="5×3 pixels, more than the 12 that are read"):
        images.from_array(np.zeros((3, 5), np.uint8))


def test_resize_pad_keeps_the_aspect_ratio():
    got = images.resize(np.full((20, 10), 200, np.uint8), (16, 16), fit="pad")
    assert got.shape == (16, 16)
    assert (got[:, 4:12] == 200).all() and not got[:, :4].any() and not got[:, 12:].any()


def test_facts_by_hand():
    picture = np.array([[0, 10, 0], [10, 0, 10]], np.uint8)
    noted = images.facts(picture)
    assert noted[:3] == (2, 3, 10) and noted[3] == 5 and len(noted[4]) == 16
    row = np.array([noted], images.FACTS)[0]
    assert row.tolist() == noted and row.dtype.names == ("height", "width", "maximum", "std", "digest")


def test_facts_digest_is_of_shape_and_pixels_alone(ramp):
    digest = images.facts(ramp)[4]
    turned = np.asfortranarray(ramp)
    assert images.facts(turned)[4] == digest and images.facts(np.repeat(ramp, 2, axis=1)[:, ::2])[4] == digest
    changed = ramp.copy()
    changed[-1, -1] ^= 1
    others = [images.facts(each)[4] for each in (changed, ramp.T, ramp.reshape(50, 40), ramp[:-1])]
    assert len({digest, *others}) == 5


def test_facts_of_black_white_and_one_pixel():
    assert images.facts(np.zeros((4, 5), np.uint8))[:4] == (4, 5, 0, 0)
    assert images.facts(np.full((1, 1), 255, np.uint8))[:4] == (1, 1, 255, 0)


def test_finish_unknown_option_is_refused():
    with pytest.raises(ValueError, match="'squeeze'"):
        images.finish(np.zeros((4, 4), np.uint8), fit="squeeze")


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        ("a.png", np.zeros((4, 6), np.uint8), (4, 6, "PNG", "L", 8)),
        ("b.png", np.zeros((4, 6, 3), np.uint16), (4, 6, "PNG", "RGB", 16)),  # which Pillow shows as 8 bits
        ("c.jpg", np.zeros((7, 5, 3), np.uint8), (7, 5, "JPEG", "RGB", 8)),
        ("d.tif", np.zeros((3, 9), np.uint16), (3, 9, "TIFF", "I;16", 16)),
        ("e.tif", np.zeros((3, 9), np.float32), (3, 9, "TIFF", "F", 32)),
    ],
)
def test_read_header_says_size_format_and_depth(tmp_path, name, array, expected):
    assert images.read_header(_png(tmp_path / name, array)) == expected


def test_read_header_of_one_bit_png_is_one_bit(tmp_path):
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "one.png")
    assert images.read_header(tmp_path / "one.png").bits == 1


def test_read_header_decodes_no_pixels(tmp_path, ramp):
    path = _png(tmp_path / "cut.jpg", ramp)
    path.write_bytes(path.read_bytes()[:-200])
    assert images.read_header(path)[:2] == ramp.shape
    with pytest.raises(images.ImageError, match="truncated"):
        images.read(path)


def test_headers_keep_the_order_and_give_reasons(tmp_path, ramp):
    _png(tmp_path / "a.png", ramp)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not pixels")
    assert images.headers(tmp_path, ["a\0.png", "."])["reason"].tolist() == [
        *("embedded null byte", "a folder, where a file is expected")
    ]
    table = images.headers(tmp_path, ["text.png", "a.png", "empty.png", "none.png"])
    assert table["image_path"].tolist() == ["text.png", "a.png", "empty.png", "none.png"]
    assert table.loc[1, ["height", "width", "bits", "reason"]].tolist() == [40, 50, 8, ""]
    assert table["bytes"].tolist()[:3] == [10, (tmp_path / "a.png").stat().st_size, 0]
    assert [bool(reason) for reason in table["reason"]] == [True, False, True, True]
    assert "not an image" in table["reason"][0] and "empty file" in table["reason"][2]
    assert table["height"].isna().tolist() == [True, False, True, True] and table["bytes"].isna()[3]


def test_headers_of_no_files_are_an_empty_table(tmp_path):
    assert images.headers(tmp_path, []).columns.tolist() == [
        *("image_path", "bytes", "height", "width", "format", "mode", "bits", "reason")
    ]


def _data_set(pixels, *, syntax=uid.ExplicitVRLittleEndian, **tags):
    """A data set of an array (H, W) or (H, W, 3), native or already encoded; None drops a tag."""
    data_set = Dataset()
    data_set.file_meta = FileMetaDataset()
    data_set.file_meta.TransferSyntaxUID = syntax
    data_set.SOPClassUID, data_set.SOPInstanceUID = uid.ComputedRadiographyImageStorage, uid.generate_uid()
    bits, grey = 8 * pixels.itemsize, pixels.ndim == 2
    told = {"Rows": pixels.shape[0], "Columns": pixels.shape[1], "SamplesPerPixel": 1 if grey else 3}
    told |= {"PhotometricInterpretation": "MONOCHROME2" if grey else "RGB", "PixelRepresentation": 0}
    told |= {"BitsAllocated": bits, "PlanarConfiguration": None if grey else 0, "PixelData": pixels.tobytes()}
    told |= {"BitsStored": bits, **tags}
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


def test_read_8_bit_dicom_returns_its_pixels(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp, RescaleSlope=1, RescaleIntercept=0, WindowCenter=50, WindowWidth=20)
    np.testing.assert_array_equal(images.read(path), ramp)
    np.testing.assert_array_equal(images.read(_dicom(tmp_path / "no suffix", ramp)), ramp)
    in_16 = _dicom(tmp_path / "b.dcm", ramp.astype(np.uint16) // 2, BitsStored=8)
    np.testing.assert_array_equal(images.read(in_16), ramp // 2)


def test_read_monochrome1_dicom_is_inverted(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(images.read(path), 255 - ramp)
    deep = np.array([[100, 200], [300, 1100]], np.uint16)
    path = _dicom(tmp_path / "b.dcm", deep, PhotometricInterpretation="MONOCHROME1", BitsStored=12)
    # (1100 - x) · 255 / 1000, rounded
    np.testing.assert_array_equal(images.read(path), [[255, 230], [204, 0]])


def test_read_12_bit_dicom_equals_the_16_bit_png_of_its_pixels(tmp_path, ramp):
    deep = ramp.astype(np.uint16) * 9 + 700
    want = images.read(_png(tmp_path / "d.png", deep))
    np.testing.assert_array_equal(images.read(_dicom(tmp_path / "d.dcm", deep, BitsStored=12)), want)
    signed = _dicom(tmp_path / "s.dcm", deep.astype(np.int16) - 2000, PixelRepresentation=1)
    np.testing.assert_array_equal(images.read(signed), want)
    assert want.max() == 255 and not want.min()


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -1024), (-0.5, 40)])
def test_read_rescaled_dicom_scales_the_rescaled_range(tmp_path, ramp, slope, intercept):
    narrow = ramp // 2 + 60  # 60 to 187
    got = images.read(_dicom(tmp_path / "a.dcm", narrow, RescaleSlope=slope, RescaleIntercept=intercept))
    want = (narrow - 60) * (255 / 127)
    np.testing.assert_array_equal(got, np.rint(want if slope > 0 else 255 - want))


def test_read_dicom_with_modality_table_looks_pixels_up(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4, 0, 16], "US", [0, 100, 400, 1000]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = _dicom(tmp_path / "a.dcm", np.array([[0, 1], [2, 3]], np.uint8), ModalityLUTSequence=[table])
    np.testing.assert_array_equal(images.read(path), [[0, 26], [102, 255]])  # 255 · 0, 0.1, 0.4 and 1, rounded


def test_read_one_bit_dicom_is_black_and_white(tmp_path):
    square = np.eye(8, dtype=np.uint8)
    packed = np.packbits(square, bitorder="little").tobytes()
    path = _dicom(tmp_path / "a.dcm", square, BitsAllocated=1, BitsStored=1, PixelData=packed)
    np.testing.assert_array_equal(images.read(path), 255 * square)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_read_dicom_with_padding_shows_it_black_and_leaves_it_out_of_the_range(tmp_path, photometric):
    deep = np.array([[100, 200], [300, 1100], [4095, 4000]], np.uint16)
    tags = {"PhotometricInterpretation": photometric, "PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000}
    got = images.read(_dicom(tmp_path / "a.dcm", deep, **tags))
    # (x - 100) · 255 / 1000 of the first four, or what is left of 255; rounded
    np.testing.assert_array_equal(
        got, [[255, 230], [204, 0], [0, 0]] if photometric[-1] == "1" else [[0, 26], [51, 255], [0, 0]]
    )
    eight = np.array([[0, 255], [10, 20]], np.uint8)
    got = images.read(_dicom(tmp_path / "b.dcm", eight, PhotometricInterpretation=photometric, PixelPaddingValue=0))
    np.testing.assert_array_equal(got, [[0, 0], [245, 235]] if photometric[-1] == "1" else eight)
    assert not images.read(_dicom(tmp_path / "c.dcm", np.full((3, 3), 900, np.uint16), PixelPaddingValue=900)).any()


def test_read_constant_deep_dicom_is_black(tmp_path):
    for name in ("MONOCHROME1", "MONOCHROME2"):
        path = _dicom(tmp_path / "a.dcm", np.full((4, 4), 700, np.uint16), PhotometricInterpretation=name)
        assert not images.read(path).any()


def test_read_color_dicom_returns_luma_by_hand(tmp_path):
    rgb = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    assert (images.read(_dicom(tmp_path / "a.dcm", rgb)) == 124).all()  # 0.299·200 + 0.587·100 + 0.114·50 = 124.2
    planes = {"PlanarConfiguration": 1, "PixelData": rgb.transpose(2, 0, 1).tobytes()}
    assert (images.read(_dicom(tmp_path / "b.dcm", rgb, **planes)) == 124).all()
    ybr = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    got = images.read(_dicom(tmp_path / "c.dcm", ybr, PhotometricInterpretation="YBR_FULL"))
    np.testing.assert_allclose(got, 124, atol=1)  # chroma is rounded on the way
    tables = {"PhotometricInterpretation": "PALETTE COLOR", "SamplesPerPixel": 1}
    for colour, value in (("Red", 200), ("Green", 100), ("Blue", 50)):
        tables[f"{colour}PaletteColorLookupTableDescriptor"] = [2, 0, 8]
        tables[f"{colour}PaletteColorLookupTableData"] = bytes([0, value])
    got = images.read(_dicom(tmp_path / "d.dcm", np.eye(4, dtype=np.uint8), **tables))
    np.testing.assert_array_equal(got, 124 * np.eye(4))


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
def test_read_bare_dicom_is_known_by_its_suffix(tmp_path, ramp, syntax):
    data_set = _data_set(ramp)
    del data_set.file_meta
    explicit, little = syntax != uid.ImplicitVRLittleEndian, syntax != uid.ExplicitVRBigEndian
    for name in ("a.DCM", "a.dicom", "a"):
        data_set.save_as(tmp_path / name, implicit_vr=not explicit, little_endian=little)
    assert images.read_header(tmp_path / "a.DCM") == (40, 50, "DICOM", "L", 8)
    for name in ("a.DCM", "a.dicom"):
        np.testing.assert_array_equal(images.read(tmp_path / name), ramp)
        with open(tmp_path / name, "rb") as file:
            np.testing.assert_array_equal(images.read(file), ramp)
    with pytest.raises(images.ImageError, match="not an image"):
        images.read(tmp_path / "a")


def test_read_other_files_with_dicom_suffix(tmp_path, ramp):
    path = _png(tmp_path / "a.png", ramp).rename(tmp_path / "a.dcm")
    np.testing.assert_array_equal(images.read(path), ramp)
    assert images.read_header(path).format == "PNG"
    for content, reason in ((b"", "empty file"), (b"text", "not an image"), (b"\0" * 128 + b"DICM", "Rows is absent")):
        path.write_bytes(content)
        with pytest.raises(images.ImageError, match=reason):
            images.read(path)
        with pytest.raises(images.ImageError, match=reason):
            images.read_header(path)


def test_read_dicom_from_memory_equals_read_from_disk(tmp_path, ramp):
    path = _dicom(tmp_path / "a.dcm", ramp)
    options = {"image_size": (9, 9), "fit": "pad"}
    got = images.read(io.BytesIO(path.read_bytes()), **options)
    np.testing.assert_array_equal(got, images.read(path, **options))
    np.testing.assert_array_equal(got, images.finish(ramp, **options))


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.RLELossless, uid.DeflatedExplicitVRLittleEndian])
def test_read_compressed_dicom(tmp_path, ramp, syntax):
    if syntax == uid.JPEGBaseline8Bit:
        data = encaps.encapsulate([cv2.imencode(".jpg", ramp, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()])
        _dicom(tmp_path / "a.dcm", ramp, syntax=syntax, PixelData=data)
    elif syntax == uid.RLELossless:
        data_set = _data_set(ramp)
        data_set.compress(syntax)
        data_set.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    else:
        _dicom(tmp_path / "a.dcm", ramp, syntax=syntax)
    # JPEG at quality 100 rounds
    atol = 2 if syntax == uid.JPEGBaseline8Bit else 0
    np.testing.assert_allclose(images.read(tmp_path / "a.dcm").astype(int), ramp, atol=atol)


@pytest.mark.parametrize(
    "name",
    [
        *("dicomdirtests/77654033/CR1/6154", "dicomdirtests/77654033/CR2/6247", "dicomdirtests/77654033/CR3/6278"),
        *("MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm", "CT_small.dcm"),
    ],
)
def test_read_real_dicom_equals_its_definition(name):
    data_set = pydicom.dcmread(WHEEL / "test_files" / name)
    values = data_set.pixel_array.astype(float)
    share = (values - values.min()) / np.ptp(values)
    # The radiographs are MONOCHROME1; slopes are positive in all of these.
    assert (data_set.PhotometricInterpretation == "MONOCHROME1") == ("CR" in name)
    got = images.read(WHEEL / "test_files" / name)
    np.testing.assert_array_equal(got, np.rint(255 * (1 - share if "CR" in name else share)))


def test_read_every_file_of_the_wheel_is_read_or_refused(caplog):
    paths = sorted(path for path in WHEEL.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
    read = []
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG, "pydicom"):
        warnings.simplefilter("error")
        for path in paths:
            try:
                picture = images.read(path)
            except images.ImageError as error:
                assert str(error), path
                continue
            assert picture.dtype == np.uint8 and picture.shape == images.read_header(path)[:2], path
            read.append(path.name)
    assert len(read) > 70 and len(paths) > 150
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CT_small.dcm", (128, 128, "DICOM", "L", 16)),
        ("dicomdirtests/77654033/CR1/6154", (16, 16, "DICOM", "L", 12)),
        ("examples_rgb_color.dcm", (240, 320, "DICOM", "RGB", 8)),
        ("MR_truncated.dcm", (64, 64, "DICOM", "L", 16)),  # of which only `read` finds out
    ],
)
def test_read_header_of_dicom_says_size_and_depth(name, expected):
    assert images.read_header(WHEEL / "test_files" / name) == expected


def test_headers_of_dicom_give_reasons():
    table = images.headers(WHEEL / "test_files", ["MR_small.dcm", "rtplan.dcm"])
    assert table["format"][0] == "DICOM" and table["reason"][0] == ""
    assert table["reason"][1] == "no image in this DICOM file: Rows is absent or no positive number"


def test_images_import_leaves_pydicom_out():
    code = "import sys, kerasmed.images; sys.exit('pydicom' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
