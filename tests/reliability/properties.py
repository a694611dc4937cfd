"""What must hold of the readers for any bytes at all."""

import io

import numpy as np

from kerasmed import dicom, images


class Named(io.BytesIO):
    """Bytes with a name, as a browser's upload has."""

    def __init__(self, data: bytes, name: str):
        super().__init__(data)
        self.name = name


def check(data: bytes) -> str:
    """Read the bytes by every reader: "read" or "refused with a reason". Any error but `ImageError` comes out."""
    outcome = "refused with a reason"
    for name in ("a.png", "a.dcm"):
        header = _or_refused(images.read_header, Named(data, name))
        picture = _or_refused(images.read, Named(data, name))
        if picture is not None:
            # What is read has a header, of the same size, or turned
            assert picture.dtype == np.uint8 and sorted(picture.shape) == sorted(header[:2]), (picture.shape, header)
            outcome = "read"
    for each in _or_refused(dicom.read_slices, io.BytesIO(data)) or ():
        assert each.pixels.dtype == np.float32 and each.pixels.ndim == 2 and np.isfinite(each.pixels).all()
        assert each.padding is None or each.padding.shape == each.pixels.shape
        outcome = "read"
    assert tuple(dicom.read_acquisition(io.BytesIO(data))) == dicom.ACQUISITION
    return outcome


def _or_refused(read, file):
    try:
        return read(file)
    except images.ImageError as error:
        assert str(error)
        return None
