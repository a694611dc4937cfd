import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from kerasmed import images


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


def test_read_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(images.ImageError, match="20×20 pixels, more than the 100"):
        images.read(_png(tmp_path / "b.png", np.zeros((20, 20), np.uint8)))


def test_read_from_memory_equals_read_from_disk(tmp_path, ramp):
    path = _png(tmp_path / "a.png", ramp)
    np.testing.assert_array_equal(
        images.read(io.BytesIO(path.read_bytes()), image_size=(9, 9)), images.read(path, image_size=(9, 9))
    )


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
