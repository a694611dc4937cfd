"""Image file -> uint8 grey array: the one reader for decoded store, prediction and app.

What happens before the pixels reach a model is decided by this function's options alone, and these are kept in a run's
params.json, so that a prediction sees what training saw.
"""

import hashlib
import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageOps, UnidentifiedImageError

DICOM_SUFFIXES = (".dcm", ".dicom")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", *DICOM_SUFFIXES)
FITS = ("stretch", "pad")
INTERPOLATIONS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}
# A file that claims more is refused before its pixels are read: 100 megapixels decode to 100 MB of grey.
MAX_PIXELS = 100_000_000
THUMBNAIL_SIZE = (64, 64)
# What is noted of a decoded picture, before any resizing; equal digests are equal sizes and pixels.
FACTS = np.dtype([("height", "i4"), ("width", "i4"), ("maximum", "u1"), ("std", "f4"), ("digest", "U16")])
_PHOTOMETRICS = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1}  # -> samples a pixel
_PHOTOMETRICS |= dict.fromkeys(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"), 3)
_DICOM_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# All that is taken of a DICOM file: neither names nor ids nor dates.
_DICOM_TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue", "Alpha")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue", "Alpha")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue", "Alpha")),
    *("PixelPresentation", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", *_DICOM_PIXELS),
)
_DICOM_LOCK = threading.Lock()


class ImageError(ValueError):
    """A file that is no whole, readable image; the message is the reason."""


class Header(NamedTuple):
    """What a file says of its pixels, as stored: before any rotation, conversion or resizing."""

    height: int
    width: int
    format: str  # "JPEG", "PNG", ...
    mode: str  # Pillow's name of the channels: "L" is grey, "RGB" colour
    bits: int  # a channel


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
    that 12 bits in a 16-bit file come out neither black nor clipped. A JPEG cut off at its end is refused; one that
    lost bytes in its middle decodes to a damaged picture and is not noticed.

    A DICOM file of one frame is read likewise, after its rescaling or modality table; MONOCHROME1 is inverted, so that
    bone is bright in all. Its window is not applied, as it clips, and a padding value counts in the range. Of its
    header only what describes the pixels is looked at, and no value but numbers reaches a message; identifiers burned
    into the pixels stay there.

    Args:
        path: file, or a binary file object. DICOM is known by "DICM" at byte 128; a file whose name ends in one of
            `DICOM_SUFFIXES` may lack it.
        image_size: (height, width) to resize to; None keeps the size.
        fit: "stretch" ignores the aspect ratio; "pad" keeps it and fills with black.
        interpolation: "area" (default), "linear", "cubic" or "nearest".
        equalize: equalise the histogram after resizing.

    Returns:
        uint8 array, shape (height, width).

    Raises:
        ImageError: empty, truncated, no image, or more than `MAX_PIXELS` pixels; of DICOM also several frames, no
            pixel data, a size that disagrees with them, or a compression without a decoder.
        ValueError: unknown option.

    Source: DICOM PS3.3, C.7.6.3 (image pixels) and C.11.1 (modality table); decoded by pydicom.
    """
    data = path.read() if hasattr(path, "read") else Path(path).read_bytes()
    dicom = _dicom_header(io.BytesIO(data), path)
    image = _to_grey(_decode(data) if dicom is None else _decode_dicom(data, dicom))
    return finish(image, image_size=image_size, fit=fit, interpolation=interpolation, equalize=equalize)


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

    Raises:
        ImageError: empty, no image, or a header that cannot be read.
    """
    with open(path, "rb") as file:
        dicom = _dicom_header(file, path)
        if dicom is not None:
            return dicom
        file.seek(0)
        start = file.read(32)
        if not start:
            raise ImageError("empty file (0 bytes)")
        file.seek(0)
        header = _open(file, start)
        if header.format == "PNG":  # Pillow shows deep colour as 8 bits; the file's own number is its 25th byte
            bits = start[24]
        else:
            bits = 16 if header.mode.startswith("I;16") else {"1": 1, "I": 32, "F": 32}.get(header.mode, 8)
        return Header(header.height, header.width, header.format, header.mode, bits)


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
        except OSError as error:
            return None, *(None,) * len(Header._fields), error.strerror

    with ThreadPoolExecutor(threads) as pool:
        rows = list(pool.map(one, image_paths))
    table = pd.DataFrame(rows, columns=["bytes", *Header._fields, "reason"])
    table.insert(0, "image_path", list(image_paths))
    return table.astype(dict.fromkeys(("bytes", "height", "width", "bits"), "Int64"))


def is_dicom(path) -> bool:
    """Whether a file begins as a DICOM file does, whatever its name; one that cannot be opened is none."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def study_uid(path) -> str:
    """StudyInstanceUID of a DICOM file, "" where there is none: to tell studies apart, never to be shown or kept."""
    import pydicom

    try:
        with _dicom_errors():
            return str(
                pydicom.dcmread(path, specific_tags=["StudyInstanceUID"], stop_before_pixels=True)[0x20000D].value
            )
    except ImageError:
        return ""


def _open(file, start: bytes) -> Image.Image:
    """Open a file object with Pillow, which reads the header only; `start` is shown where it is no image."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of decompression bombs; the size is checked against a stated limit before decoding.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(file)
    except UnidentifiedImageError:
        # Not more than 8 bytes: in a bare DICOM data set the first value, which may be a name, starts at the ninth.
        raise ImageError(f"not an image (starts with {start[:8]!r})") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"unreadable header: {error}") from None


@contextmanager
def _dicom_errors() -> Iterator[None]:
    """Turn what pydicom raises into ImageError; one file at a time, as filters of warnings are no thread's own.

    pydicom's own words, in errors, warnings and logs, may quote the header: none is passed on.
    """
    from pydicom.errors import BytesLengthException, InvalidDicomError

    logger = logging.getLogger("pydicom")
    with _DICOM_LOCK, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pydicom|PIL")
        # Segments that hold more than Rows × Columns are cut with a warning.
        warnings.filterwarnings("error", "The decoded RLE segment contains", module="pydicom")
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        except ImageError:
            raise
        except (
            *(InvalidDicomError, BytesLengthException, AttributeError, LookupError, TypeError, ValueError),
            *(ArithmeticError, EOFError, OSError, RuntimeError, StopIteration, struct.error, zlib.error),
        ) as error:
            raise ImageError(f"damaged DICOM ({type(error).__name__} in pydicom)") from None
        finally:
            logger.setLevel(level)


def _dicom_header(file, path) -> Header | None:
    """Read the header of a DICOM file, given open and by its path or file object; None where it is no DICOM."""
    start = file.read(132)
    has_prefix = start[128:] == b"DICM"
    if not has_prefix and not str(getattr(path, "name", path)).lower().endswith(DICOM_SUFFIXES):
        return None
    try:
        with _dicom_errors():
            data_set = _parse_dicom(file, stop_before_pixels=True)
            height, width = _number(data_set, "Rows"), _number(data_set, "Columns")
            bits = _number(data_set, "BitsStored", _number(data_set, "BitsAllocated"))
            grey = str(data_set.get("PhotometricInterpretation")).startswith("MONOCHROME")
            return Header(height, width, "DICOM", "L" if grey else "RGB", bits)
    except ImageError:
        if has_prefix:
            raise
        return None


def _parse_dicom(file, **options):
    """Parse what `_DICOM_TAGS` name of a DICOM file, with a transfer syntax even where the file states none."""
    import pydicom
    from pydicom import uid

    _check_inflated(file)
    file.seek(0)
    data_set = pydicom.dcmread(file, force=True, specific_tags=list(_DICOM_TAGS), **options)
    if "TransferSyntaxUID" not in data_set.file_meta:
        implicit, little = data_set.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        data_set.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return data_set


def _check_inflated(file) -> None:
    """Refuse a deflated data set that inflates to more than its pixels may take: pydicom would inflate it whole."""
    from pydicom.filereader import read_dataset
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    file.seek(128)
    if file.read(4) != b"DICM":
        file.seek(0)
    meta = read_dataset(file, False, True, stop_when=lambda tag, *_: tag >> 16 != 2)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    inflater, packed, size = zlib.decompressobj(-zlib.MAX_WBITS), file.read(), 0
    while packed:
        size += len(inflater.decompress(packed, 2**20))
        packed = inflater.unconsumed_tail
        if size > 4 * MAX_PIXELS:
            raise ImageError(f"deflated DICOM of more than {4 * MAX_PIXELS} bytes")


def _number(data_set, tag: str, default: int | None = None) -> int:
    value = data_set.get(tag) or default
    if not isinstance(value, int) or value < 1:
        raise ImageError(f"no image in this DICOM file: {tag} is absent or no positive number")
    return int(value)


def _decode_dicom(data: bytes, header: Header) -> np.ndarray:
    """Decode a DICOM file of one frame to an array (H, W[, 3 or 4]), bright where the body is dense."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    from pydicom.uid import RLELossless

    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{header.width}×{header.height} pixels, more than the {MAX_PIXELS} that are read")
    with _dicom_errors():
        data_set = _parse_dicom(io.BytesIO(data))
        _check_dicom(data_set, header)
        syntax, photometric = data_set.file_meta.TransferSyntaxUID, data_set.PhotometricInterpretation
        # Of run lengths that do not fit Rows × Columns only pydicom's own decoder tells.
        plugin = "pydicom" if syntax == RLELossless else ""
        try:
            image = pixel_array(data_set, decoding_plugin=plugin)
        except RuntimeError:
            raise ImageError(
                f"damaged DICOM pixels in {syntax.name}, or such as the decoders at hand do not know; "
                "the extra `dicom` installs further ones"
            ) from None
        shape = (header.height, header.width) + (3,) * (_PHOTOMETRICS[photometric] == 3)
        if image.shape != shape:
            raise ImageError(f"DICOM pixels of shape {image.shape}, where one frame of shape {shape} is expected")
        if photometric == "PALETTE COLOR":
            return apply_color_lut(image, data_set)
        rescale = [data_set.get("RescaleSlope"), data_set.get("RescaleIntercept")]
        has_rescale = None not in rescale and rescale != [1, 0]
        if has_rescale and not (0 < abs(rescale[0]) < 1e15 and abs(rescale[1]) < 1e15):
            raise ImageError("DICOM whose RescaleSlope is 0, or whose rescaling is out of bounds")
        if image.ndim == 2 and (has_rescale or data_set.get("ModalityLUTSequence")):
            image = apply_modality_lut(image, data_set)
        elif image.dtype.kind == "u" and header.bits == 8 and image.max() < 256:
            image = image.astype(np.uint8)  # however many bits hold them
    if header.bits < 8:
        image = image.astype(np.int16)  # which is scaled: one bit becomes 0 and 255
    if photometric == "MONOCHROME1":
        image = ~image if np.issubdtype(image.dtype, np.integer) else -image
    return image


def _check_dicom(data_set, header: Header) -> None:
    """Refuse what pydicom would decode to several pictures or a wrong one, or has no decoder for."""
    from pydicom.pixels import get_decoder

    frames, samples = _number(data_set, "NumberOfFrames", 1), _number(data_set, "SamplesPerPixel")
    photometric = data_set.get("PhotometricInterpretation")
    if frames > 1:
        raise ImageError(f"{frames} frames in a DICOM file, where one is expected")
    if _PHOTOMETRICS.get(photometric) != samples:
        known = ", ".join(f"{name} ({count})" for name, count in _PHOTOMETRICS.items())
        raise ImageError(f"DICOM of {samples} SamplesPerPixel and a PhotometricInterpretation that is none of {known}")
    if data_set.get("HighBit", header.bits - 1) != header.bits - 1:
        raise ImageError(f"DICOM with BitsStored {header.bits}, but a HighBit that is not one less")
    pixels = [data_set[tag].value for tag in _DICOM_PIXELS if tag in data_set]
    if len(pixels) != 1 or not pixels[0]:
        raise ImageError("no pixel data in this DICOM file, or cut off")
    syntax = data_set.file_meta.TransferSyntaxUID
    try:
        has_decoder = get_decoder(syntax).is_available
    except NotImplementedError:
        has_decoder = False
    if not has_decoder:
        name = syntax.name if syntax.name != syntax else "an unknown transfer syntax"
        raise ImageError(f"no decoder for DICOM pixels in {name}; the extra `dicom` installs further ones")
    if syntax.is_encapsulated:
        _check_codestream(pixels[0], header)
        return
    bits = header.width * header.height * samples * _number(data_set, "BitsAllocated")
    expected = -(-bits // 8) * 2 // 3 if photometric == "YBR_FULL_422" else -(-bits // 8)
    # Files may be padded, but a row or a column too many is a sign that Rows or Columns is wrong.
    if not expected <= len(pixels[0]) < expected + max(expected // max(header.height, header.width), 2):
        raise ImageError(
            f"DICOM cut off, or of other Rows or Columns: {len(pixels[0])} bytes of pixels, "
            f"where {header.width}×{header.height} take {expected}"
        )


def _check_codestream(encapsulated: bytes, header: Header) -> None:
    """Refuse a JPEG or JPEG 2000 whose own size is another; of equal areas pydicom would make a scrambled picture."""
    from pydicom.encaps import get_frame

    try:
        inner = Image.open(io.BytesIO(get_frame(encapsulated, 0, number_of_frames=1)), formats=("JPEG", "JPEG2000"))
    except UnidentifiedImageError:
        return  # of another compression, or one that only its decoder understands
    except Image.DecompressionBombError:
        raise ImageError(f"damaged DICOM: its compressed pixels claim more than {Image.MAX_IMAGE_PIXELS}") from None
    if inner.size != (header.width, header.height):
        raise ImageError(
            f"{inner.width}×{inner.height} DICOM pixels, where Columns and Rows are {header.width}×{header.height}"
        )


def _decode(data: bytes) -> np.ndarray:
    """Decode bytes to an array (H, W[, C]); 8-bit JPEG and PNG by OpenCV, which is faster, all else by Pillow."""
    if not data:
        raise ImageError("empty file (0 bytes)")
    header = _open(io.BytesIO(data), data[:12])
    if header.width * header.height > MAX_PIXELS:
        raise ImageError(f"{header.width}×{header.height} pixels, more than the {MAX_PIXELS} that are read")
    # OpenCV returns a truncated JPEG or PNG as if it were whole (it only prints), so the end is looked for here.
    if header.format == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise ImageError("truncated JPEG (no end marker after the last scan)")
    if header.format == "PNG" and b"IEND" not in data:
        raise ImageError("truncated PNG (no end chunk)")
    rotated = "exif" in header.info and header.getexif().get(0x0112, 1) != 1
    if header.format in ("JPEG", "PNG") and header.mode in ("L", "LA", "RGB", "RGBA", "I;16") and not rotated:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None:
            raise ImageError(f"damaged {header.format} (decoder gave up)")
        return image[..., [2, 1, 0, 3][: image.shape[2]]] if image.ndim == 3 else image
    try:
        image = ImageOps.exif_transpose(header)
        deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
        return np.asarray(
            image
            if deep or image.mode == "L"
            else image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
        )
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"damaged {header.format}: {error}") from None


def _to_grey(image: np.ndarray) -> np.ndarray:
    """Scale to 8 bits, composite on black, and take the luma of an array (H, W[, 1, 3 or 4]), RGB order."""
    alpha = None
    if image.ndim == 3 and image.shape[2] == 4:
        alpha = image[..., 3:].astype(np.float32) / np.iinfo(image.dtype).max
        image = image[..., :3]
    if image.dtype != np.uint8:
        image = _scale_by_range(image)
    if alpha is not None:
        image = np.rint(image * alpha).astype(np.uint8)
    if image.ndim == 2:
        return image
    return image[..., 0] if image.shape[2] == 1 else cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)


def _scale_by_range(image: np.ndarray) -> np.ndarray:
    """Map an array's own minimum to 0 and maximum to 255; a constant array becomes 0."""
    image = np.nan_to_num(image.astype(np.float32))
    low, high = float(image.min()), float(image.max())
    return (
        np.rint((image - low) * (255 / (high - low))).astype(np.uint8)
        if high > low
        else np.zeros(image.shape, np.uint8)
    )
