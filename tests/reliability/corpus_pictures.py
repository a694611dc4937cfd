"""Corpus of pictures from real ones: JPEGs of the brain, PNGs of the chest."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.reliability.corpus import (
    READ,
    REFUSED,
    UNSEEN,
    Case,
    by_range,
    cut,
    flip,
    lose,
    luma,
    png,
    png_chunk,
    tiff,
)

TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


class Source(NamedTuple):
    """A real picture: its own file, and a piece of its middle."""

    path: Path
    grey: np.ndarray  # uint8, at most 72 × 96, so that no size is twice the same


def sources(root: Path) -> list[Source]:
    """Three JPEGs of the brain and two PNGs of the chest, the first by name."""
    brain = sorted((root / "brain").rglob("*.jpg"))
    paths = [brain[0], brain[len(brain) // 2], brain[-1], *sorted((root / "chest/images").glob("*.png"))[:2]]
    found = []
    for path in paths:
        with Image.open(path) as image:
            image = image.convert("L")
            if max(image.size) > 600:
                image = image.resize((128, 128), Image.Resampling.BOX)
            top, left = (image.height - 72) // 2, (image.width - 96) // 2
            found.append(Source(path, np.asarray(image)[top : top + 72, left : left + 96].copy()))
    return found


def saved(picture, form: str, **options) -> bytes:
    """Encode an array or a Pillow image by Pillow."""
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, form, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """What Pillow makes of a file, as grey."""
    image = Image.open(io.BytesIO(data))
    return np.asarray(image) if image.mode == "L" else luma(np.asarray(image.convert("RGB")))


def colour(grey: np.ndarray) -> np.ndarray:
    """A colour picture whose channels differ."""
    return np.dstack([grey, 255 - grey, grey[::-1]])


# --- damaged ---------------------------------------------------------------------------------------------------------


def damaged(found: list[Source], rng) -> Iterator[Case]:
    """Cut, flipped and shortened files of all formats."""
    wholes = {
        "JPEG": [source.path.read_bytes() for source in found[:3]]
        + [saved(found[0].grey, "JPEG", progressive=True), saved(colour(found[1].grey), "JPEG")],
        "PNG": [saved(source.grey, "PNG") for source in found[2:]] + [saved(colour(found[0].grey), "PNG")],
        "BMP, GIF or TIFF": [saved(found[at].grey, form) for at, form in enumerate(("BMP", "GIF", "TIFF"))]
        + [saved(found[3].grey, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate")],
    }
    # Only PNG sums up its bytes, so of no other can a damage be told from a picture that looks so.
    plans = [
        ("cut at a random byte", cut, {"JPEG": 40, "PNG": 40, "BMP, GIF or TIFF": 30}, (READ, REFUSED)),
        ("with flipped bits in its first tenth", flip(0, 0.1, 3), {"JPEG": 25, "BMP, GIF or TIFF": 20}, None),
        ("with flipped bits in its last nine tenths", flip(0.1, 1, 3), {"JPEG": 25, "BMP, GIF or TIFF": 20}, None),
        ("with a flipped bit anywhere", flip(0, 1, 1), {"PNG": 40}, (READ, REFUSED)),
        ("that lost bytes in its middle", lose, {"JPEG": 10, "PNG": 10}, None),
    ]
    for damage, change, counts, may in plans:
        for form, count in counts.items():
            allowed = may or ((READ, REFUSED) if form == "PNG" else (READ, REFUSED, UNSEEN))
            for at in range(count):
                whole = wholes[form][at % len(wholes[form])]
                suffix = {"JPEG": "jpg", "PNG": "png"}.get(form, ("bmp", "gif.png", "tif")[min(at % 5, 2)])
                name = f"{form[:4]} {damage}/{at}.{suffix}"
                atol = 0 if Image.open(io.BytesIO(whole)).mode == "L" else 1
                yield Case(f"{form} {damage}", name, change(whole, rng), allowed, decoded(whole), atol)


def no_pictures(found: list[Source], rng) -> Iterator[Case]:
    """Empty files, random bytes, text, and wrong names."""
    for suffix in ("jpg", "jpeg", "png", "bmp", "tif", "dcm"):
        yield Case("empty file", f"empty.{suffix}", b"", (REFUSED,))
        yield Case("folder named as a picture", f"folder.{suffix}", None, (REFUSED,))
        for at in range(3):
            data = rng.bytes(int(rng.integers(1, 5000)))
            yield Case("random bytes", f"random {at}.{suffix}", data, (REFUSED,))
        text = b"Patient notes, not pixels.\n" * int(rng.integers(1, 50))
        yield Case("text named as a picture", f"text.{suffix}", text, (REFUSED,))
    for at, source in enumerate(found):
        for form, suffix in (("PNG", "jpg"), ("PNG", "dcm"), ("BMP", "png"), ("TIFF", "jpg"), ("GIF", "dicom")):
            name = f"{form} {at}.{suffix}"
            yield Case("picture under another's suffix", name, saved(source.grey, form), (READ,), source.grey)
        data = saved(source.grey, "JPEG")
        for suffix in ("dcm", "png"):
            yield Case("picture under another's suffix", f"JPEG {at}.{suffix}", data, (READ,), decoded(data))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    yield Case("program named as a picture", "eps.png", eps, (REFUSED,))
    yield Case("program named as a picture", "eps.jpg", eps, (REFUSED,))


# --- unusual ---------------------------------------------------------------------------------------------------------


def unusual(found: list[Source], rng) -> Iterator[Case]:
    """Whole files of pixels of every kind: all must be read right."""
    for at, source in enumerate(found):
        for name, data, expected, atol in [*_shallow(source.grey), *_deep(source.grey), *_layouts(source.grey)]:
            kind, suffix = name.split(".")
            yield Case(kind, f"{kind} {at}.{suffix}", data, (READ,), expected, atol)


def _packed(grey: np.ndarray, bits: int) -> bytes:
    levels = (grey >> (8 - bits)).astype(np.uint8)
    digits = np.unpackbits(levels[..., None], axis=2)[..., 8 - bits :]
    return b"".join(b"\0" + row.tobytes() for row in np.packbits(digits.reshape(len(grey), -1), axis=1))


def _shallow(grey):
    rgb, alpha = colour(grey), np.full_like(grey, 255)
    alpha[:, :20], alpha[:, 20:40] = 0, 51  # clear, and a fifth
    shares = alpha[..., None] / 255
    for bits in (1, 2, 4):
        expected = np.rint((grey >> (8 - bits)) * (255 / (2**bits - 1))).astype(np.uint8)
        yield f"{bits}-bit PNG.png", png(grey.shape, bits, 0, _packed(grey, bits)), expected, 0
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([each for level in range(256) for each in (level, 255 - level, level // 2)])
    table = luma(np.array([(level, 255 - level, level // 2) for level in range(256)])[None])[0]
    indices = np.asarray(palette)
    yield "PNG with a palette.png", saved(palette, "PNG"), table[indices], 1
    clear = int(indices[0, 0])
    masked = np.where(indices == clear, 0, table[indices])
    yield "PNG with a palette and a clear colour.png", saved(palette, "PNG", transparency=clear), masked, 1
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    marked = png(grey.shape, 8, 0, rows, png_chunk(b"tRNS", struct.pack(">H", clear_grey := int(grey[0, 0]))))
    yield "PNG with a clear grey.png", marked, np.where(grey == clear_grey, 0, grey), 1
    yield "PNG with transparency.png", saved(np.dstack([rgb, alpha]), "PNG"), luma(rgb * shares), 2
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    yield "PNG of grey with transparency.png", saved(both, "PNG"), luma(np.dstack([grey] * 3) * shares), 2
    cmyk = Image.fromarray(rgb).convert("CMYK")
    data = saved(cmyk, "JPEG", quality=100)  # which Pillow writes as Adobe does, inverted
    assert b"Adobe" in data
    # JPEG rounds four channels, and the conversion multiplies two of them
    yield "JPEG in CMYK.jpg", data, luma(np.asarray(cmyk.convert("RGB"))), 12
    yield "TIFF in CMYK.tif", saved(cmyk, "TIFF"), luma(np.asarray(cmyk.convert("RGB"))), 1


def _deep(grey):
    twelve = grey.astype(np.uint16) * 16 + 7
    sixteen = grey.astype(np.uint16) * 200 + 1000
    # Two formulas that round half-way values may differ by one
    yield "PNG of 12 bits in 16.png", saved(twelve, "PNG"), by_range(twelve), 1
    yield "PNG of 16 bits.png", saved(sixteen, "PNG"), by_range(sixteen), 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour(grey).astype(np.uint16) * 16)
    yield "PNG of 12 bits in 16 in colour.png", png(grey.shape, 16, 2, rows), luma(_by_one_range(grey)), 2
    for order in "<>":
        name = "little" if order == "<" else "big"
        yield f"TIFF of 16 bits, {name}-endian.tif", tiff(sixteen.astype(order + "u2")), by_range(sixteen), 1
        wide = colour(grey).astype(order + "u2") * np.array(16, order + "u2")
        data = tiff(wide.astype(order + "u2"), photometric=2)
        yield f"TIFF of 12 bits in 16 in colour, {name}-endian.tif", data, luma(_by_one_range(grey)), 2
    yield "TIFF of 16 bits, signed.tif", tiff((sixteen - 30_000.0).astype("<i2"), sample_format=2), by_range(sixteen), 1
    white = tiff(sixteen, photometric=0)
    yield "TIFF of 16 bits whose zero is white.tif", white, 255 - by_range(sixteen), 1
    yield "TIFF of 8 bits whose zero is white.tif", tiff(grey, photometric=0), 255 - grey, 0
    far = grey.astype(np.int32) + 2_000_000_000  # of which float32 tells every 128th
    yield "TIFF of 32 bits.tif", tiff(far, sample_format=2), by_range(far), 1
    large = grey.astype(np.uint32) * 8_000_000 + 2_000_000_000
    yield "TIFF of 32 bits without a sign.tif", tiff(large), by_range(large), 1
    floats = grey.astype(np.float32) / 7 - 3
    yield "TIFF of floats.tif", tiff(floats, sample_format=3), by_range(floats), 1
    wide = (grey.astype(np.float32) - 128) * np.float32(2.6e36)  # whose range no float32 holds
    yield "TIFF of floats of a huge range.tif", tiff(wide, sample_format=3), by_range(wide), 1
    narrow = grey * np.float32(1e-42)  # whose range has no reciprocal in float32
    yield "TIFF of floats of a tiny range.tif", tiff(narrow, sample_format=3), by_range(narrow), 1
    holes = floats.copy()
    holes[:5] = np.nan
    yield "TIFF of floats with NaN.tif", tiff(holes, sample_format=3), by_range(np.nan_to_num(holes)), 1


def _by_one_range(grey):
    rgb = colour(grey).astype(float)
    return (rgb - rgb.min()) / np.ptp(rgb) * 255


def _layouts(grey):
    frames = [Image.fromarray(each) for each in (grey, 255 - grey, grey[::-1].copy())]
    options = {"save_all": True, "append_images": frames[1:]}
    yield "animated GIF named as a PNG.png", saved(frames[0], "GIF", **options), grey, 0
    yield "TIFF of several pages.tif", saved(frames[0], "TIFF", **options), grey, 0
    data = saved(frames[0], "PNG", **options)
    assert b"acTL" in data
    yield "animated PNG.png", data, grey, 0
    yield "interlaced PNG.png", _interlaced(grey), grey, 0
    data = saved(grey, "JPEG", progressive=True)
    yield "progressive JPEG.jpg", data, decoded(data), 0
    data = saved(colour(grey), "JPEG", subsampling=2)
    yield "JPEG with coarse colour.jpg", data, decoded(data), 1
    for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif")):
        data = saved(grey, form)
        yield f"{form} with bytes behind its end.{suffix}", data + b"\0garbage\xff" * 40, decoded(data), 0
    yield "PNG whose EXIF is damaged.png", _with_chunk(saved(grey, "PNG"), png_chunk(b"eXIf", b"junk")), grey, 0
    data = saved(grey, "JPEG")
    junk = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"
    segment = b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk
    yield "JPEG whose EXIF is damaged.jpg", data[:2] + segment + data[2:], decoded(data), 0
    yield "WebP named as a PNG.png", saved(colour(grey), "WEBP", lossless=True), luma(colour(grey)), 1


def _with_chunk(data: bytes, chunk: bytes) -> bytes:
    return data[:33] + chunk + data[33:]  # behind the signature and the header


def _interlaced(grey: np.ndarray) -> bytes:
    """Adam7, which no library at hand writes."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in grey[y::dy, x::dx])
    return png(grey.shape, 8, 0, raw, interlaced=1)


def rotated(found: list[Source], rng) -> Iterator[Case]:
    """All eight orientations, in JPEG, PNG and TIFF."""
    for at, source in enumerate(found[:3]):
        for orientation, turn in TURNS.items():
            exif = Image.Exif()
            exif[0x0112] = orientation
            jpeg = saved(source.grey, "JPEG", exif=exif)
            expected = turn(decoded(saved(source.grey, "JPEG")))
            yield Case("JPEG turned by EXIF", f"turned {at} {orientation}.jpg", jpeg, (READ,), expected)
            files = {"png": saved(source.grey, "PNG", exif=exif), "tif": tiff(source.grey, orientation=orientation)}
            for suffix, data in files.items():
                name = f"turned {at} {orientation}.{suffix}"
                yield Case("PNG or TIFF turned by EXIF", name, data, (READ,), turn(source.grey))


def trailed(found: list[Source], rng) -> Iterator[Case]:
    """Whole pictures with something behind their end, as phones put a film there, which holds any bytes."""
    for at, source in enumerate(found):
        for form, suffix in (("JPEG", "jpg"), ("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif")):
            data = saved(source.grey, form, **({"progressive": True} if form == "JPEG" and at % 2 else {}))
            kind = f"{form if form == 'JPEG' else 'PNG, BMP or TIFF'} with random bytes behind its end"
            # Of the most, the marks that begin a scan are more than any JPEG has scans.
            for size in (1, 100, 10_000, 300_000, *([6_000_000] if form == "JPEG" and at < 2 else [])):
                yield Case(kind, f"behind {at} {size}.{suffix}", data + rng.bytes(size), (READ,), decoded(data))
        other = saved(255 - source.grey, "JPEG", progressive=True)
        data = saved(source.grey, "JPEG")
        for name, behind in (("whole", other), ("cut", other[:-300])):
            yield Case("JPEG with another behind it", f"two {at} {name}.jpg", data + behind, (READ,), decoded(data))


def impossible(found: list[Source], rng) -> Iterator[Case]:
    """Sizes that no picture has, and numbers that no grey can show."""
    grey = found[0].grey
    for at, (height, width) in enumerate([(60_000, 60_000), (10_001, 10_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 9)]):
        data = png((height, width), 8, 0, b"\0" * 100)
        yield Case("picture that claims a huge size", f"huge {at}.png", data, (REFUSED,))
    for at, size in enumerate([(65_500, 65_500), (65_535, 2_000)]):
        data = bytearray(saved(grey, "JPEG"))
        frame = data.index(b"\xff\xc0") + 5
        data[frame : frame + 4] = struct.pack(">HH", *size)
        yield Case("picture that claims a huge size", f"huge {at}.jpg", bytes(data), (REFUSED,))
        bmp = bytearray(saved(grey, "BMP"))
        bmp[18:26] = struct.pack("<ii", *size)
        yield Case("picture that claims a huge size", f"huge {at}.bmp", bytes(bmp), (REFUSED,))
        gif = bytearray(saved(grey, "GIF"))
        gif[6:10] = struct.pack("<HH", *size)
        yield Case("picture that claims a huge size", f"huge {at}.gif.png", bytes(gif), (REFUSED,))
        tif = bytearray(tiff(grey))
        for tag, number in ((256, size[0]), (257, size[1])):
            entry = tif.index(struct.pack("<HHI", tag, 4, 1))
            tif[entry + 8 : entry + 12] = struct.pack("<I", number)
        yield Case("picture that claims a huge size", f"huge {at}.tif", bytes(tif), (REFUSED,))
    for at, (first, others) in enumerate([(np.inf, 0), (-np.inf, 1), (np.nan, np.nan)]):
        floats = np.full((9, 11), others, np.float32)
        floats[0, 0] = first
        data = tiff(floats, sample_format=3)
        yield Case("TIFF of floats that are infinite or none", f"floats {at}.tif", data, (REFUSED,))


def all_cases(root: Path) -> list[Case]:
    """The whole corpus, the same each time."""
    found, rng = sources(root), np.random.default_rng(20)
    makers = (damaged, no_pictures, unusual, rotated, impossible, trailed)
    return [case for make in makers for case in make(found, rng)]
