"""Image file -> uint8 grey array: the one reader for decoded store, prediction and app.

What happens before the pixels reach a model is decided by this function's options alone, and these are kept in a run's
params.json, so that a prediction sees what training saw.
"""

import contextlib
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

from kerasmed import dicom
from kerasmed.dicom import MAX_PIXELS, Header, ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", *dicom.SUFFIXES)
FITS = ("stretch", "pad")
INTERPOLATIONS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}
THUMBNAIL_SIZE = (64, 64)
# By content, whatever the name says; JPEG includes MPO. Pillow knows more, but hands EPS and others to other programs.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow and OpenCV raise at damaged files.
_DAMAGES = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SyntaxError, SystemError),
    *(TypeError, ValueError, struct.error, zlib.error, cv2.error),
)
_MAX_SCANS = 64  # of a JPEG: some write 20, and each goes over all pixels though it may take a few bytes of the file
_MAX_SEGMENTS = 10_000  # of a JPEG: profiles and notes take some hundreds at most
# Of a JPEG: what neither stands for a byte nor restarts a scan, nor is a filling.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF and EXIF
# What is noted of a decoded picture, before any resizing; equal digests are equal sizes and pixels.
FACTS = np.dtype([("height", "i4"), ("width", "i4"), ("maximum", "u1"), ("std", "f4"), ("digest", "U16")])


def read(
    path,
    *,
    image_size: tuple[int, int] | None = None,
    fit: str = "stretch",
    interpolation: str = "area",
    equalize: bool = False,
) -> np.ndarray:
    """Read an image file as one channel of uint8.

    Colour becomes luma (ITU-R 601), transparency is composited on black, CMYK is converted, EXIF rotation is applied.
    8 bits are kept; deeper pixels are scaled by their own range, from their minimum to 0 and their maximum to 255, so
    that 12 bits in a 16-bit file come out neither black nor clipped; NaN counts as 0. A JPEG cut off at its end is
    refused; one that lost bytes in its middle decodes to a damaged picture and is not noticed. Of several pictures in a
    file (GIF, TIFF, MPO) the first is read.

    A DICOM file of one frame is read likewise, after its rescaling or modality table; MONOCHROME1 is inverted, so that
    bone is bright in all. What its PixelPaddingValue marks becomes black and does not count in the range. Its window is
    not applied, as it clips. Of its header only what describes the pixels is looked at, and no value but numbers
    reaches a message; identifiers burned into the pixels stay there.

    Args:
        path: file, or a binary file object. DICOM is known by "DICM" at byte 128; a file whose name ends in one of
            `dicom.SUFFIXES` may lack it.
        image_size: (height, width) to resize to; None keeps the size.
        fit: "stretch" ignores the aspect ratio; "pad" keeps it and fills with black.
        interpolation: "area" (default), "linear", "cubic" or "nearest".
        equalize: equalise the histogram after resizing.

    Returns:
        uint8 array, shape (height, width).

    Raises:
        ImageError: empty, truncated, no image, no regular file, more than `MAX_PIXELS` pixels, or numbers that are
            infinite or none; of DICOM also several frames, no pixel data, a size that disagrees with them, or a
            compression without a decoder.
        OSError: the system does not let it be read.
        ValueError: unknown option.

    Source: DICOM PS3.3, C.7.6.3 (image pixels) and C.11.1 (modality table); decoded by pydicom.
    """
    data = dicom.content(path)
    image, padding = dicom.decode(data, path) or (_decode(data), None)
    if not _has_range(image):
        raise ImageError(f"pixels in {image.dtype} that are nothing but NaN, or infinite or beyond float32")
    image = _to_grey(image, padding)
    return finish(image, image_size=image_size, fit=fit, interpolation=interpolation, equalize=equalize)


def from_array(image: np.ndarray) -> np.ndarray:
    """Turn a picture that is an array already into what `read` makes of a file, before resizing.

    Args:
        image: shape (height, width), or (height, width, channels) of 1, 3 (RGB) or 4 (RGBA). uint8 is kept; any other
            integer or float is scaled by its own range, NaN counting as 0.

    Returns:
        uint8 array, shape (height, width).

    Raises:
        ValueError: another shape or type, no pixel, more than `MAX_PIXELS`, nothing but NaN, or a value that is
            infinite or beyond float32.

    Example:
        >>> from_array(np.array([[0, 2047, 4094]], np.uint16)).tolist()
        [[0, 128, 255]]
    """
    shape, kind = image.shape, image.dtype.kind
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))) or kind not in "uif" or not image.size:
        raise ValueError(
            f"the picture is an array of {image.dtype} of shape {shape}; expected numbers of shape (height, width) or "
            "(height, width, 1, 3 or 4). Give several slices as a list of such arrays."
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ValueError(f"the picture has {shape[1]}×{shape[0]} pixels, more than the {MAX_PIXELS} that are read.")
    if not _has_range(image):
        raise ValueError(
            f"the picture, of {image.dtype}, has nothing but NaN, or values that are infinite or beyond float32, which "
            "would leave all others black; clip it or mark such pixels as NaN."
        )
    if len(shape) == 3 and shape[2] == 4 and image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"the picture has transparency in {image.dtype}; expected uint8 or uint16.")
    return _to_grey(image)


def finish(
    image: np.ndarray,
    *,
    image_size: tuple[int, int] | None = None,
    fit: str = "stretch",
    interpolation: str = "area",
    equalize: bool = False,
) -> np.ndarray:
    """Do what `read` does after decoding, with its options, to a uint8 array (height, width)."""
    check_options(fit=fit, interpolation=interpolation)
    if image_size is not None:
        image = resize(image, image_size, fit=fit, interpolation=interpolation)
    return cv2.equalizeHist(image) if equalize else image


def check_options(*, fit: str, interpolation: str) -> None:
    """Raise ValueError for an option that `read` does not know."""
    if fit not in FITS or interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"`fit` is {fit!r} and `interpolation` {interpolation!r}; "
            f"expected one of {FITS} and {tuple(INTERPOLATIONS)}."
        )


def resize(
    image: np.ndarray, image_size: tuple[int, int], *, fit: str = "stretch", interpolation: str = "area"
) -> np.ndarray:
    """Resize a uint8 array (height, width) to `image_size` = (height, width); see `read` for the options."""
    height, width = image_size
    if fit == "stretch":
        return cv2.resize(image, (width, height), interpolation=INTERPOLATIONS[interpolation])
    scale = min(height / image.shape[0], width / image.shape[1])
    inner = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    padded = np.zeros((height, width), np.uint8)
    padded[top : top + inner[0], left : left + inner[1]] = cv2.resize(
        image, inner[::-1], interpolation=INTERPOLATIONS[interpolation]
    )
    return padded


def thumbnail(image: np.ndarray) -> np.ndarray:
    """Shrink a uint8 array to 64×64 by area: what duplicates, groups and the nearest neighbour are judged on."""
    return resize(image, THUMBNAIL_SIZE)


def facts(image: np.ndarray) -> tuple:
    """Note size, largest grey level, standard deviation and digest of a uint8 array, in the order of `FACTS`."""
    digest = hashlib.sha256(f"{image.shape} ".encode())
    digest.update(np.ascontiguousarray(image).data)
    return *image.shape, int(image.max()), float(cv2.meanStdDev(image)[1][0, 0]), digest.hexdigest()[:16]


def read_header(path) -> Header:
    """Read what an image file says of its size and pixels, without decoding them.

    A file that passes may still be damaged further on: only `read` finds out. The format of DICOM is "DICOM", its mode
    "L" or "RGB", its bits those stored.

    Args:
        path: file, or a binary file object at its start.

    Raises:
        ImageError: empty, no image, no regular file, or a header that cannot be read.
        OSError: the system does not let it be read.
    """
    with contextlib.nullcontext(path) if hasattr(path, "read") else dicom.opened(path) as file:
        of_dicom = dicom.read_header(file, path)
        if of_dicom is not None:
            return of_dicom
        file.seek(0)
        start = file.read(32)
        if not start:
            raise ImageError("empty file (0 bytes)")
        file.seek(0)
        header = _open(file, start)
        return Header(header.height, header.width, header.format, header.mode, _bits(header, start))


def headers(root, image_paths: Sequence[str], *, threads: int = 8) -> pd.DataFrame:
    """Read the headers of many files, in threads.

    Args:
        root: folder that the paths are relative to.
        image_paths: which files.
        threads: how many read at once.

    Returns:
        DataFrame, a row a path in order: image_path, bytes (size of the file), the fields of `Header`, and reason: "",
        or why the header cannot be read, and then the fields are empty.
    """

    def one(path):
        try:
            size = (Path(root) / path).stat().st_size
            return size, *read_header(Path(root) / path), ""
        except ImageError as error:
            return size, *(None,) * len(Header._fields), str(error)
        except (OSError, ValueError, MemoryError) as error:  # ValueError: a name that no file can have
            return None, *(None,) * len(Header._fields), getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(threads) as pool:
        rows = list(pool.map(one, image_paths))
    table = pd.DataFrame(rows, columns=["bytes", *Header._fields, "reason"])
    table.insert(0, "image_path", list(image_paths))
    return table.astype(dict.fromkeys(("bytes", "height", "width", "bits"), "Int64"))


def _open(file, start: bytes) -> Image.Image:
    """Open a file object with Pillow, which reads the header only; `start` is shown where it is no image."""
    try:
        # Pillow warns of decompression bombs; the size is checked against a stated limit before decoding.
        with dicom.quiet():
            return Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        # Not more than 8 bytes: in a bare DICOM data set the first value, which may be a name, starts at the ninth.
        raise ImageError(f"not an image (starts with {start[:8]!r})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from None
    except _DAMAGES as error:
        raise ImageError(f"unreadable header: {_told(error)}") from None


def _told(error: Exception) -> str:
    """What a decoder said; of OpenCV's words, which quote its sources, none."""
    if isinstance(error, cv2.error):
        return "decoder gave up"
    return str(error) if isinstance(error, OSError | SyntaxError | ValueError) else f"{type(error).__name__}: {error}"


def _bits(header: Image.Image, start: bytes) -> int:
    """Bits of a channel as stored: Pillow shows deep colour as 8, but PNG and TIFF state their own number."""
    if header.format == "PNG":
        return start[24]
    if header.format == "TIFF":
        return max(header.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    return 16 if header.mode.startswith("I;16") else {"1": 1, "I": 32, "F": 32}.get(header.mode, 8)


def _decode(data: bytes) -> np.ndarray:
    """Decode bytes to an array (H, W[, C])."""
    if not data:
        raise ImageError("empty file (0 bytes)")
    header = _open(io.BytesIO(data), data[:12])
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{header.width}×{header.height} pixels, more than the {MAX_PIXELS} that are read")
    # OpenCV returns a truncated JPEG or PNG as if it were whole (it only prints), so the end is looked for here.
    if header.format in ("JPEG", "MPO"):
        _check_jpeg(data)
    # A search through the whole file would hold the interpreter's lock; the end chunk is almost always the last.
    if header.format == "PNG" and b"IEND" not in data[-12:] and b"IEND" not in data:
        raise ImageError("truncated PNG (no end chunk)")
    try:
        with dicom.quiet():
            return _pixels(header, data)
    except ImageError:
        raise
    except _DAMAGES as error:
        raise ImageError(f"damaged {header.format}: {_told(error)}") from None


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG without an end, or of too many scans; what lies behind its end, as a phone's film does, is free."""
    at, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        kind = marker[0][1] if marker else 0xD8
        if kind == 0xD9:
            break
        if kind == 0xD8:  # the end of the file, or another picture before the end of this one
            raise ImageError("truncated JPEG (no end marker after the last scan)")
        scans += kind == 0xDA
        at = marker.end() + max(int.from_bytes(data[marker.end() : marker.end() + 2]), 2)
    else:
        raise ImageError(f"JPEG of more than the {_MAX_SEGMENTS} segments that are read")
    if scans > _MAX_SCANS:
        raise ImageError(f"JPEG of {scans} scans, more than the {_MAX_SCANS} that are read")


def _pixels(header: Image.Image, data: bytes) -> np.ndarray:
    """Decode what was opened: 8-bit JPEG and PNG by OpenCV, which is faster, all else by Pillow but for deep colour."""
    deep = _bits(header, data) > 8
    rotated = _is_rotated(header)
    by_opencv = ("L", "LA", "RGB", "RGBA", "I;16") if header.format in ("JPEG", "PNG") and not rotated else ()
    # Pillow keeps the upper 8 bits of deep colour, of which 12-bit pixels fill 4. OpenCV turns a TIFF as that says.
    if header.mode in by_opencv or (header.format == "TIFF" and header.mode in ("RGB", "RGBA") and deep):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ImageError(f"damaged {header.format} (decoder gave up)")
        clear = header.info.get("transparency")
        if image.ndim == 2 and isinstance(clear, int):  # which OpenCV heeds in colour alone
            steps = 255 // (2 ** _bits(header, data) - 1)
            opaque = np.where(image == clear * max(steps, 1), 0, np.iinfo(image.dtype).max)
            return np.dstack([image, image, image, opaque.astype(image.dtype)])
        return image[..., [2, 1, 0, 3][: image.shape[2]]] if image.ndim == 3 else image
    image = ImageOps.exif_transpose(header) if rotated else header
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        mode = "RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB"
        return np.asarray(image if image.mode == "L" and mode == "RGB" else image.convert(mode))
    image = np.asarray(image)
    if header.format == "TIFF":
        if image.dtype == np.int32 and deep and header.tag_v2.get(_SAMPLE_FORMAT, (1,))[0] == 1:
            image = image.view(np.uint32)
        if header.tag_v2.get(_PHOTOMETRIC) == 0:  # white is zero, which Pillow heeds in 8 bits alone
            image = -image if image.dtype.kind == "f" else ~image
    return image


def _is_rotated(header: Image.Image) -> bool:
    """Whether a file says that it lies on its side; one whose EXIF is damaged does not."""
    if header.format in ("JPEG", "PNG") and "exif" not in header.info:
        return False
    try:
        return header.getexif().get(_ORIENTATION, 1) != 1
    except _DAMAGES:
        return False


def _has_range(image: np.ndarray) -> bool:
    """Whether floats have a least and a largest value that float32 holds, NaN aside; integers always do."""
    ends = (np.fmin.reduce(image, axis=None), np.fmax.reduce(image, axis=None)) if image.dtype.kind == "f" else ()
    return all(abs(end) <= np.finfo(np.float32).max for end in ends)


def _to_grey(image: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """Scale to 8 bits, composite on black, and take the luma of an array (H, W[, 1, 3 or 4]), RGB order."""
    alpha = None
    if image.ndim == 3 and image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / np.iinfo(image.dtype).max
        image = image[..., :3]
    if image.dtype != np.uint8:
        image = _scale_by_range(image, padding)
    if alpha is not None:
        image = np.rint(image * alpha).astype(np.uint8)
    if image.ndim == 2:
        return image if padding is None else np.where(padding, np.uint8(0), image)
    return image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


def _scale_by_range(image: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """Map an array's own minimum to 0 and maximum to 255; a constant array becomes 0, and so does padding."""
    # 24 bits hold all values of 16, but neither small steps of large numbers nor the widest range of float32.
    image = image.astype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    np.nan_to_num(image, copy=False)
    counted = image if padding is None else image[~padding]
    low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 0.0)
    if high <= low:
        return np.zeros(image.shape, np.uint8)
    if padding is not None:
        np.clip(image, low, high, out=image)
    # In place: of the largest pictures each copy takes a gigabyte.
    image -= low
    if image.dtype == np.float32:
        image *= 255 / (high - low)
    else:  # a range near nothing has no reciprocal
        image /= high - low
        image *= 255
    return np.rint(image, out=image).astype(np.uint8)
