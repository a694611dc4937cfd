"""DICOM file -> pixels, geometry and how it was acquired: the one place that looks into DICOM headers.

Nothing that names a patient, place, day or file leaves it: tags are parsed by name, only numbers and words of fixed
lists are handed on, and what pydicom raises, warns of and logs, which may quote the header, is not passed on.
"""

import io
import logging
import os
import re
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

SUFFIXES = (".dcm", ".dicom")
# A file that claims more is refused before its pixels are read: 100 megapixels decode to 100 MB of grey.
MAX_PIXELS = 100_000_000
MAX_FRAMES = 10_000  # each becomes a `Slice`, which takes more memory than a few pixels of a file do
ACQUISITION = ("field_strength", "slice_thickness", "pixel_spacing", "manufacturer", "sex", "age")
# Names are free text, so a maker is one of these or "other"; G.E. is written with and without its points.
MANUFACTURERS = {
    **{"ge": "GE", "g.e.": "GE", "general electric": "GE", "siemens": "Siemens", "philips": "Philips"},
    **{"marconi": "Philips", "picker": "Philips", "toshiba": "Canon", "canon": "Canon", "hitachi": "Fujifilm"},
    **{"fuji": "Fujifilm", "fujifilm": "Fujifilm", "esaote": "Esaote", "uih": "United Imaging"},
    **{"united imaging": "United Imaging", "neusoft": "Neusoft", "fonar": "Fonar", "paramed": "Paramed"},
    **{"agfa": "Agfa", "carestream": "Carestream", "kodak": "Carestream"},
}
_HUGE = 1e30  # beyond, differences of 32-bit floats overflow
OLDEST = 90  # years; higher ages identify
_UNITS = {"D": 365.25, "W": 365.25 / 7, "M": 12, "Y": 1}  # -> how many make a year
_PHOTOMETRICS = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1}  # -> samples a pixel
_PHOTOMETRICS |= dict.fromkeys(("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"), 3)
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PADDING = ("PixelPaddingValue", "PixelPaddingRangeLimit")
# All that is taken of a file for its picture: neither names nor ids nor dates.
_PICTURE_TAGS = (
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *_PADDING),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue", "Alpha")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue", "Alpha")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue", "Alpha")),
    *("PixelPresentation", "ExtendedOffsetTable", "ExtendedOffsetTableLengths", *_PIXELS),
)
_FRAMES, _SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
# Where a multi-frame file keeps what differs, or may differ, between its frames.
_GROUPS = {
    **{"ImagePositionPatient": "PlanePositionSequence", "ImageOrientationPatient": "PlaneOrientationSequence"},
    **dict.fromkeys(("WindowCenter", "WindowWidth"), "FrameVOILUTSequence"),
    **{"RescaleSlope": "PixelValueTransformationSequence"},
    **dict.fromkeys(("PixelSpacing", "SliceThickness"), "PixelMeasuresSequence"),
}
_PLANE = ("ImagePositionPatient", "ImageOrientationPatient")
_SLICE_TAGS = (*_PLANE, "InstanceNumber", "WindowCenter", "WindowWidth", "VOILUTFunction", _FRAMES, _SHARED)
_MEASURES = dict(zip(ACQUISITION, ("MagneticFieldStrength", "SliceThickness", "PixelSpacing")))
_ACQUISITION_TAGS = (*_MEASURES.values(), "Manufacturer", "PatientSex", "PatientAge", _FRAMES, _SHARED)
_LOCK, _QUIET_LOCK = threading.Lock(), threading.Lock()
_FILTERS, _READERS = ExitStack(), []  # filters of warnings, and a mark for each thread that wants them


class ImageError(ValueError):
    """A file that is no whole, readable image; the message is the reason."""


class Header(NamedTuple):
    """What a file says of its pixels, as stored: before any rotation, conversion or resizing."""

    height: int
    width: int
    format: str  # "JPEG", "PNG", ...
    mode: str  # Pillow's name of the channels: "L" is grey, "RGB" colour
    bits: int  # a channel


class Slice(NamedTuple):
    """A grey picture and where it lies in the patient; None is what the file does not say, or not in numbers."""

    pixels: np.ndarray  # float32, (height, width); see `read_slices` for its units
    padding: np.ndarray | None  # bool, (height, width): pixels that hold no image; None where all do
    position: tuple[float, ...] | None  # mm, of the centre of the first pixel: to the left, to the back, to the head
    orientation: tuple[float, ...] | None  # direction of a row (3 numbers), then of a column (3)
    instance_number: int | None
    window: tuple[float, float] | None  # (centre, width) of `pixels`: centre ∓ width / 2 are shown black and white


# --- files -----------------------------------------------------------------------------------------------------------


def opened(path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        ImageError: no regular file (a folder, or a pipe, which would be waited for without end), or no possible name.
        OSError: absent, or the system does not let it be read.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:  # zero bytes and halves of UTF-16
        raise ImageError("no file can have such a name") from None
    if not stat.S_ISREG(mode):
        raise ImageError("a folder, where a file is expected" if stat.S_ISDIR(mode) else "a pipe or device, no file")
    return open(path, "rb")


def content(path) -> bytes:
    """Return the bytes of a file, raising as `opened`, or of a binary file object."""
    if hasattr(path, "read"):
        return path.read()
    with opened(path) as file:
        return file.read()


def is_dicom(path) -> bool:
    """Whether a file begins as a DICOM file does, whatever its name; one that cannot be opened is none."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def study_uid(path) -> str:
    """StudyInstanceUID of a DICOM file, "" where there is none: to tell studies apart, never to be shown or kept."""
    try:
        with _errors(), opened(path) as file:
            return str(_parse(file, ["StudyInstanceUID"], stop_before_pixels=True)["StudyInstanceUID"].value)
    except ImageError:
        return ""


def read_header(file, path) -> Header | None:
    """Read size and depth of a DICOM file without its pixels.

    Args:
        file: binary file object, at its start.
        path: its path or name: one that ends in one of `SUFFIXES` may lack "DICM" at byte 128.

    Returns:
        `Header` of format "DICOM" and mode "L" or "RGB"; None where the file is no DICOM.

    Raises:
        ImageError: DICOM without a picture, or damaged.
    """
    start = file.read(132)
    has_prefix = start[128:] == b"DICM"
    if not has_prefix and not str(getattr(path, "name", path)).lower().endswith(SUFFIXES):
        return None
    try:
        with _errors():
            data_set = _parse(file, _PICTURE_TAGS, stop_before_pixels=True)
            height, width = _number(data_set, "Rows"), _number(data_set, "Columns")
            bits = _number(data_set, "BitsStored", _number(data_set, "BitsAllocated"))
            grey = str(data_set.get("PhotometricInterpretation")).startswith("MONOCHROME")
            return Header(height, width, "DICOM", "L" if grey else "RGB", bits)
    except ImageError:
        if has_prefix:
            raise
        return None


def decode(data: bytes, path) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Decode a DICOM file of one frame, bright where the body is dense; `kerasmed.images.read` makes it 8 bits.

    Args:
        data: the file's content.
        path: as in `read_header`.

    Returns:
        Array (height, width[, 3 or 4]), rescaled, uint8 where 8 bits are stored; and a bool mask (height, width) of its
        padding or None. None where the file is no DICOM.

    Raises:
        ImageError: see `kerasmed.images.read`.
    """
    header = read_header(io.BytesIO(data), path)
    if header is None:
        return None
    with _errors():
        data_set, stored = _decode(data, header, _PICTURE_TAGS, max_frames=1)
        photometric = data_set.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            return apply_color_lut(stored, data_set), None
        image = _rescale(stored, data_set)
        if image is stored and image.dtype.kind == "u" and header.bits == 8 and image.max() < 256:
            image = image.astype(np.uint8)  # however many bits hold them
        if header.bits < 8:
            image = image.astype(np.int16)  # which is scaled: one bit becomes 0 and 255
        if photometric == "MONOCHROME1":
            image = ~image if np.issubdtype(image.dtype, np.integer) else -image
        return image, _padding(stored, data_set)


def read_slices(path) -> list[Slice]:
    """Read the slices of a DICOM file: one, or each frame of a multi-frame file.

    Pixels are what the scanner measured: stored values after their rescaling or modality table. MONOCHROME1, in which
    the smallest is white, is negated: unlike a subtraction from a slice's own largest value this is the same for all
    slices of a series, so that they stay comparable. The window is given for these values, so negated with them; of
    several windows it is the first, and None where its function is not linear.

    Position, orientation, rescaling and window of a frame are looked for in its functional group, then in the one that
    all share, then in the file itself; its instance number is the frame's, from 1. Padding is what PixelPaddingValue,
    up to PixelPaddingRangeLimit, marks among the stored values, and values that are not finite or huge, which become 0.

    Args:
        path: file, or a binary file object.

    Returns:
        list of `Slice`, in the file's order.

    Raises:
        ImageError: no DICOM, in colour, or one of the reasons of `kerasmed.images.read`, but for several frames.

    Source: DICOM PS3.3, C.7.6.2 (plane), C.7.5.1.1.2 (padding), C.7.6.16 (functional groups), C.11.2 (window).
    """
    data = content(path)
    header = read_header(io.BytesIO(data), path)
    if header is None:
        raise ImageError(f"not DICOM ({len(data)} bytes)" if data else "empty file (0 bytes)")
    if header.mode != "L":
        raise ImageError("DICOM in colour, or of an unknown PhotometricInterpretation, where slices are grey")
    with _errors():
        data_set, stored = _decode(data, header, (*_PICTURE_TAGS, *_SLICE_TAGS), max_frames=None)
        frames = stored if stored.ndim == 3 else stored[None]
        return [_slice(data_set, frame, number, len(frames)) for number, frame in enumerate(frames)]


def _slice(data_set, stored, number, num_frames) -> Slice:
    """One frame of a file as `Slice`."""
    image, padding = _rescale(stored, _holder(data_set, number, "RescaleSlope")), _padding(stored, data_set)
    with np.errstate(over="ignore"):
        pixels = image.astype(np.float32)
    if stored.dtype.kind == "f" and not (finite := abs(pixels) < _HUGE).all():
        padding = ~finite
        pixels[padding] = 0
    inverted = data_set.PhotometricInterpretation == "MONOCHROME1"
    position, orientation = (_numbers(_holder(data_set, number, tag), tag) for tag in _PLANE)
    instance = (number + 1,) if num_frames > 1 else _numbers(data_set, "InstanceNumber")
    return Slice(
        -pixels if inverted else pixels,
        padding,
        position if len(position) == 3 else None,
        orientation if len(orientation) == 6 else None,
        int(instance[0]) if instance and abs(instance[0]) < 2**31 else None,
        _window(_holder(data_set, number, "WindowCenter"), inverted),
    )


def _window(holder, inverted: bool) -> tuple[float, float] | None:
    """The first window; LINEAR, the default, reaches half a step less at either end than LINEAR_EXACT."""
    centres, widths = _numbers(holder, "WindowCenter"), _numbers(holder, "WindowWidth")
    function = holder.get("VOILUTFunction") or "LINEAR"
    if not centres or not widths or function not in ("LINEAR", "LINEAR_EXACT"):
        return None
    step = 1 if function == "LINEAR" else 0
    centre, width = centres[0] - step / 2, widths[0] - step
    return (-centre if inverted else centre, width) if width > 0 else None


def read_acquisition(path) -> dict:
    """Read how a DICOM file was acquired: what a study's table may hold, and no identifier.

    Args:
        path: file, or a binary file object.

    Returns:
        dict of `ACQUISITION`, None for what is absent, unreadable or not positive: field_strength (tesla; from 100 on
        taken for gauss), slice_thickness and pixel_spacing (mm, the latter between rows), manufacturer (a value of
        `MANUFACTURERS`, by how the name begins, else "other"), sex ("F" or "M"), age (years; `OLDEST` for more).
    """
    found = dict.fromkeys(ACQUISITION)
    try:
        file = io.BytesIO(content(path))
        with _errors():
            data_set = _parse(file, _ACQUISITION_TAGS, stop_before_pixels=True)
            for name, tag in _MEASURES.items():
                value = next(iter(_numbers(_holder(data_set, 0, tag), tag)), 0)
                found[name] = value if value > 0 else None
            words = [str(data_set.get(tag) or "").strip() for tag in ("Manufacturer", "PatientSex", "PatientAge")]
    except (ImageError, OSError):
        return dict.fromkeys(ACQUISITION)
    if (found["field_strength"] or 0) >= 100:
        found["field_strength"] /= 10_000
    return found | {
        "manufacturer": _maker(words[0]),
        "sex": words[1] if words[1] in ("F", "M") else None,
        "age": _age(words[2]),
    }


def _maker(name: str) -> str | None:
    known = (maker for start, maker in MANUFACTURERS.items() if re.match(re.escape(start) + "(?![a-z])", name.lower()))
    return next(known, "other") if name else None


def _age(words: str) -> float | None:
    """Years of a DICOM age, three digits and a unit, such as "045Y" or "018M"."""
    match = re.fullmatch(r"(\d{1,3})([DWMY])", words, flags=re.ASCII)
    return min(int(match[1]) / _UNITS[match[2]], OLDEST) if match else None


# --- parsing ---------------------------------------------------------------------------------------------------------


def _damages() -> tuple[type[Exception], ...]:
    from pydicom.errors import BytesLengthException, InvalidDicomError

    return (
        *(InvalidDicomError, BytesLengthException, AttributeError, LookupError, TypeError, ValueError),
        *(ArithmeticError, EOFError, OSError, RuntimeError, StopIteration, struct.error, zlib.error),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Pass on no warning of pydicom and Pillow, in whatever thread, while a file is read.

    Filters of warnings are the process's. The first of several threads sets them and the last puts the old ones back:
    if each did so, one would take another's away, or leave its own for good.
    """
    with _QUIET_LOCK:
        if not _READERS:
            _FILTERS.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module="pydicom|PIL")
            # Segments that hold more than Rows × Columns are cut with a warning.
            warnings.filterwarnings("error", "The decoded RLE segment contains", module="pydicom")
        _READERS.append(None)
    try:
        yield
    finally:
        with _QUIET_LOCK:
            _READERS.pop()
            if not _READERS:
                _FILTERS.close()


@contextmanager
def _errors() -> Iterator[None]:
    """Turn what pydicom raises into ImageError; one file at a time, as the level of a logger is no thread's own.

    pydicom's own words, in errors, warnings and logs, may quote the header: none is passed on.
    """
    logger = logging.getLogger("pydicom")
    with _LOCK, quiet():
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        except ImageError:
            raise
        except _damages() as error:
            raise ImageError(f"damaged DICOM ({type(error).__name__} in pydicom)") from None
        finally:
            logger.setLevel(level)


def _parse(file, tags, **options):
    """Parse what `tags` name of a DICOM file, with a transfer syntax even where the file states none."""
    import pydicom
    from pydicom import uid

    _check_inflated(file)
    file.seek(0)
    data_set = pydicom.dcmread(file, force=True, specific_tags=list(tags), **options)
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
    while packed and not inflater.eof:  # behind the end lies a byte of padding, which is never consumed
        size += len(inflater.decompress(packed, 2**20))
        packed = inflater.unconsumed_tail
        if size > 4 * MAX_PIXELS:
            raise ImageError(f"deflated DICOM of more than {4 * MAX_PIXELS} bytes")


def _number(data_set, tag: str, default: int | None = None) -> int:
    value = data_set.get(tag) or default
    if not isinstance(value, int) or value < 1:
        raise ImageError(f"no image in this DICOM file: {tag} is absent or no positive number")
    return int(value)


def _numbers(data_set, tag: str) -> tuple[float, ...]:
    """The numbers of a tag that can be done without: none where it is absent, unreadable or huge."""
    try:
        value = data_set.get(tag)
        several = value is not None and not isinstance(value, str | bytes | int | float)
        numbers = tuple(float(each) for each in (value if several else [value]))
    except _damages():
        return ()
    return numbers if all(abs(each) < _HUGE for each in numbers) else ()


def _holder(data_set, frame: int, tag: str):
    """The data set that holds `tag` for a frame: its functional group, the one that all share, or the file's own."""
    for sequence, number in ((_FRAMES, frame), (_SHARED, 0)):
        groups = data_set.get(sequence) or ()
        inner = groups[number].get(_GROUPS.get(tag, "")) if number < len(groups) else None
        if inner and tag in inner[0]:
            return inner[0]
    return data_set


# --- pixels ----------------------------------------------------------------------------------------------------------


def _decode(data: bytes, header: Header, tags, *, max_frames: int | None):
    """Parse and decode; returns the data set and its stored values, ([num_frames,] height, width[, 3])."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import RLELossless

    _check_size(1, header)
    data_set = _parse(io.BytesIO(data), tags)
    frames = _check(data_set, header, max_frames)
    syntax, photometric = data_set.file_meta.TransferSyntaxUID, data_set.PhotometricInterpretation
    # Of run lengths that do not fit Rows × Columns only pydicom's own decoder tells.
    plugin = "pydicom" if syntax == RLELossless else ""
    try:
        stored = pixel_array(data_set, decoding_plugin=plugin)
    except RuntimeError:
        raise ImageError(
            f"damaged DICOM pixels in {syntax.name}, or such as the decoders at hand do not know; "
            "the extra `dicom` installs further ones"
        ) from None
    shape = (frames,) * (frames > 1) + (header.height, header.width) + (3,) * (_PHOTOMETRICS[photometric] == 3)
    if stored.shape != shape:
        expected = "one frame" if frames == 1 else f"{frames} frames"
        raise ImageError(f"DICOM pixels of shape {stored.shape}, where {expected} of shape {shape[-2:]} is expected")
    return data_set, stored


def _rescale(stored: np.ndarray, data_set) -> np.ndarray:
    """Apply the modality table, or slope and intercept; grey pixels that have neither are returned as they are."""
    from pydicom.pixels import apply_modality_lut

    rescale = [data_set.get("RescaleSlope"), data_set.get("RescaleIntercept")]
    has_rescale = None not in rescale and rescale != [1, 0]
    if has_rescale and not (0 < abs(rescale[0]) < 1e15 and abs(rescale[1]) < 1e15):
        raise ImageError("DICOM whose RescaleSlope is 0, or whose rescaling is out of bounds")
    if stored.ndim == 2 and (has_rescale or data_set.get("ModalityLUTSequence")):
        return apply_modality_lut(stored, data_set)
    return stored


def _padding(stored: np.ndarray, data_set) -> np.ndarray | None:
    """Mask of the stored values that are padding; None where there are none."""
    ends = [value for tag in _PADDING if isinstance(value := data_set.get(tag), int)]
    if "PixelPaddingValue" not in data_set or not ends or stored.ndim != 2 or stored.dtype.kind not in "iu":
        return None
    # Files state these 16 bits as signed or not, whatever their pixels are.
    ends = [(end + 2**15) % 2**16 - 2**15 if stored.dtype.kind == "i" else end % 2**16 for end in ends]
    mask = (stored >= min(ends)) & (stored <= max(ends))
    return mask if mask.any() else None


def _check_size(frames: int, header: Header) -> None:
    if frames * header.width * header.height > MAX_PIXELS:
        told = f"{frames} frames of " if frames > 1 else ""
        raise ImageError(f"{told}{header.width}×{header.height} pixels, more than the {MAX_PIXELS} that are read")


def _check(data_set, header: Header, max_frames: int | None) -> int:
    """Refuse what pydicom would decode wrongly, or has no decoder for; returns the number of frames."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import RLELossless

    frames, samples = _number(data_set, "NumberOfFrames", 1), _number(data_set, "SamplesPerPixel")
    photometric = data_set.get("PhotometricInterpretation")
    if max_frames and frames > max_frames:
        raise ImageError(f"{frames} frames in a DICOM file, where one is expected")
    if frames > MAX_FRAMES:
        raise ImageError(f"{frames} frames in a DICOM file, more than the {MAX_FRAMES} that are read")
    _check_size(frames, header)
    if _PHOTOMETRICS.get(photometric) != samples:
        known = ", ".join(f"{name} ({count})" for name, count in _PHOTOMETRICS.items())
        raise ImageError(f"DICOM of {samples} SamplesPerPixel and a PhotometricInterpretation that is none of {known}")
    if data_set.get("HighBit", header.bits - 1) != header.bits - 1:
        raise ImageError(f"DICOM with BitsStored {header.bits}, but a HighBit that is not one less")
    pixels = [data_set[tag].value for tag in _PIXELS if tag in data_set]
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
    bits = frames * header.width * header.height * samples * _number(data_set, "BitsAllocated")
    if syntax.is_encapsulated:
        _check_codestreams(pixels[0], header, frames, bits // frames // 8 if syntax == RLELossless else None)
        return frames
    expected = -(-bits // 8) * 2 // 3 if photometric == "YBR_FULL_422" else -(-bits // 8)
    # Files may be padded, but a row, a column or a frame too many is a sign that one of these numbers is wrong.
    if not expected <= len(pixels[0]) < expected + max(expected // max(header.height, header.width, frames), 2):
        told = f"{frames} frames of " if frames > 1 else ""
        raise ImageError(
            f"DICOM cut off, or of other Rows or Columns: {len(pixels[0])} bytes of pixels, "
            f"where {told}{header.width}×{header.height} take {expected}"
        )
    return frames


def _check_codestreams(encapsulated: bytes, header: Header, frames: int, decoded: int | None) -> None:
    """Refuse a JPEG or JPEG 2000 whose own size is another; of equal areas pydicom would make a scrambled picture.

    `decoded` is the number of bytes that the run lengths of a frame stand for, None where they are no such.
    """
    from pydicom.encaps import generate_frames

    for data in generate_frames(encapsulated, number_of_frames=frames):
        if decoded is not None:
            _check_runs(data, decoded, header.height * header.width)
            continue
        try:
            inner = Image.open(io.BytesIO(data), formats=("JPEG", "JPEG2000"))
        except UnidentifiedImageError:
            return  # of another compression, or one that only its decoder understands
        except Image.DecompressionBombError:
            raise ImageError(f"damaged DICOM: its compressed pixels claim more than {Image.MAX_IMAGE_PIXELS}") from None
        if inner.size != (header.width, header.height):
            raise ImageError(
                f"{inner.width}×{inner.height} DICOM pixels, where Columns and Rows are {header.width}×{header.height}"
            )


def _check_runs(data: bytes, decoded: int, plane: int) -> None:
    """Refuse run lengths that stand for far more bytes than a frame has; pydicom unpacks them before it looks.

    Source: DICOM PS3.5, annex G: a header of 16 numbers, then a segment a plane of bytes.
    """
    # The worst encoder takes two bytes for one.
    if len(data) > 2 * decoded + 128:
        raise ImageError(f"damaged DICOM: {len(data)} bytes of run lengths, where a frame has {decoded} of pixels")
    if len(data) < 64:
        return
    count, *starts = struct.unpack("<16I", data[:64])
    for start, stop in zip(starts[:count], [*starts[1:count], len(data)]):
        segment = data[start:stop]
        # Two bytes stand for 128 at most. What is short is not worth a second walk: pydicom tells of its length.
        if 64 * len(segment) > plane + 2**24 and _run_lengths(segment, plane) > plane:
            raise ImageError(f"damaged DICOM: run lengths of more pixels than the {plane} of a frame")


def _run_lengths(segment: bytes, limit: int) -> int:
    """Count the bytes that run lengths stand for; stops where these are more than `limit`."""
    at = size = 0
    end = len(segment)
    while at < end and size <= limit:
        first = segment[at]
        if first > 128:  # the next byte, 257 - first times
            size += 257 - first if at + 1 < end else 0
            at += 2
        elif first < 128:  # the next first + 1 bytes
            size += min(first + 1, end - at - 1)
            at += first + 2
        else:
            at += 1
    return size
