"""Fuzz the readers of pictures and DICOM, led by coverage: python -m tests.reliability.fuzz_files FOLDER [OPTION...].

FOLDER holds files to begin with; the options are libFuzzer's. Whatever the bytes: a picture, or `ImageError`. Where
anything else comes out, the process ends with another code than 0, and leaves the bytes in a file.
"""

import sys

import atheris

_LED_BY = [
    "kerasmed.images",
    "kerasmed.dicom",
    "pydicom.filereader",
    "pydicom.dataset",
    "pydicom.encaps",
    "pydicom.pixels",
]
_LED_BY += [f"PIL.{form}ImagePlugin" for form in ("Png", "Jpeg", "Tiff", "Bmp", "Gif")]

with atheris.instrument_imports(include=_LED_BY):
    # Of these the package imports some only where they are needed, which is too late
    import PIL.BmpImagePlugin
    import PIL.GifImagePlugin
    import PIL.JpegImagePlugin
    import PIL.PngImagePlugin
    import PIL.TiffImagePlugin  # noqa: F401
    import pydicom.pixels  # noqa: F401

    from tests.reliability import properties


if __name__ == "__main__":
    atheris.Setup(sys.argv, lambda data: properties.check(data) and None)
    atheris.Fuzz()
