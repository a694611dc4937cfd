"""Write made series of the lumbar spine as DICOM: geometry, headers as scanners vary them, and stored values."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from kerasmed.datasets.synthetic.drawing import _EPOCH

_MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
_WRITER = "2.25.173205080756887729352744634151"
# Maker, field strength in tesla, and slice thickness in mm go together, as they do in practice.
_SCANNERS = (
    ("SIEMENS", (1.5, 3.0), 4.0),
    ("GE MEDICAL SYSTEMS", (1.5, 3.0), 4.5),
    ("Philips Medical Systems", (1.5, 3.0), 4.0),
    ("TOSHIBA", (1.5,), 5.0),
)
_ABSENT_SHARE = 0.08  # of series that lack any one of these
_ABSENT = ("PixelSpacing", "SliceThickness", "MagneticFieldStrength", "Manufacturer")
_FIELD_OF_VIEW = {"Sagittal T1": 280.0, "Sagittal T2/STIR": 280.0, "Axial T2": 180.0}  # mm
_LEVEL_HEIGHTS = np.array([70.0, 36.0, 0.0, -35.0, -68.0])  # mm, of the discs
_LEVEL_TILTS = np.array([-6.0, -3.0, 0.0, 3.0, 6.0])  # degrees, of their planes


def patient(rng: np.random.Generator, study: int) -> dict:
    """Draw a study's patient and scanner; no name, id or date is of anyone."""
    maker, fields, thickness = _SCANNERS[rng.choice(len(_SCANNERS), p=(0.4, 0.3, 0.2, 0.1))]
    made = {
        "PatientName": f"SYNTHETIC^PATIENT{study:05d}",
        "PatientID": f"SYNTHETIC-{study:05d}",
        "PatientBirthDate": "19000101",
        "InstitutionName": "SYNTHETIC HOSPITAL",
        "Manufacturer": maker,
        "MagneticFieldStrength": float(rng.choice(fields)),
        "SliceThickness": thickness + float(rng.choice([-0.5, 0.0, 0.0, 0.5])),
    }
    sex, age = rng.choice(["F", "M"]), int(np.clip(rng.normal(57, 15), 18, 89))
    if rng.uniform() < 0.7:
        made |= {"PatientSex": str(sex), "PatientAge": f"{age:03d}Y"}
    return made


def write_series(folder: Path, series, of_patient: dict, of_stack, rng, places, numbers, pictures) -> None:
    """Write a series' slices as `<study>/<series>/<number>.dcm`.

    Args:
        folder: train_images.
        series: row with study_id, series_id, modality, deep (16 bits stored, else 12) and inverted (MONOCHROME1).
        of_patient: of `patient`.
        of_stack: generator of what the series of one stack share: how it lies in the body.
        rng: the series' own generator.
        places: lateral place (-1 right to 1 left), or level and height above its disc, of each slice in order.
        numbers: their instance numbers.
        pictures: float arrays of 0 to about 255.
    """
    home = folder / str(series.study_id) / str(series.series_id)
    home.mkdir(parents=True)
    height, width = pictures[0].shape
    spacing = _FIELD_OF_VIEW[series.modality] / np.sqrt(height * width)
    geometry = (_axial if series.modality == "Axial T2" else _sagittal)(of_stack, places)
    largest = 65535 if series.deep else 4095
    scale = rng.uniform(0.45, 0.9) * largest / 255
    slope, intercept = (
        (float(rng.choice([0.5, 2.0])), float(rng.choice([-1000, 0, 50]))) if rng.uniform() < 0.2 else (1, 0)
    )
    header = _header(series, of_patient, height, width, spacing, rng)
    if (slope, intercept) != (1, 0):
        header.RescaleSlope, header.RescaleIntercept = slope, intercept
    if rng.uniform() < 0.5:
        centre = largest - 115 * scale if series.inverted else 115 * scale
        header.WindowCenter, header.WindowWidth = round(centre * slope + intercept, 1), round(230 * scale * slope, 1)
    for (middle, orientation), number, picture in zip(geometry, numbers, pictures):
        right, down = orientation[:3], orientation[3:]
        corner = middle - spacing * ((width - 1) / 2 * right + (height - 1) / 2 * down)
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = f"{header.SeriesInstanceUID}.{number}"
        header.InstanceNumber = int(number)
        header.ImagePositionPatient = [f"{value:.4f}" for value in corner]
        header.ImageOrientationPatient = [f"{value:.8f}" for value in orientation]
        stored = np.clip(np.rint(picture * scale), 0, largest).astype("<u2")
        header.PixelData = (largest - stored if series.inverted else stored).tobytes()
        path = home / f"{number}.dcm"
        with io.BytesIO() as written:
            pydicom.dcmwrite(written, header, enforce_file_format=True)
            content = written.getvalue()
        path.write_bytes(content)
        # Sizes go by rows and columns alone, so a time that goes by the content is what tells files apart for caches.
        os.utime(path, (_EPOCH, _EPOCH + zlib.crc32(content) % 2**24))


def _header(series, of_patient, height, width, spacing, rng) -> Dataset:
    """Make what the files of a series share."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = _MR_IMAGE
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.ImplementationClassUID = _WRITER
    header.file_meta.ImplementationVersionName = "SYNTHETIC"
    header.Modality = "MR"
    header.StudyInstanceUID = f"2.25.{series.study_id}"
    header.SeriesInstanceUID = f"2.25.{series.study_id}.{series.series_id}"
    header.SeriesDescription = series.modality
    header.PatientPosition = "HFS"
    for name, value in of_patient.items():
        setattr(header, name, value)
    header.PixelSpacing = [round(spacing, 5)] * 2
    for name in _ABSENT:
        if rng.uniform() < _ABSENT_SHARE:
            delattr(header, name)
    bits = 16 if series.deep else 12
    header.Rows, header.Columns, header.SamplesPerPixel, header.PixelRepresentation = height, width, 1, 0
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, bits, bits - 1
    header.PhotometricInterpretation = "MONOCHROME1" if series.inverted else "MONOCHROME2"
    return header


# x grows to the patient's left, y to the back, z to the head, in mm. A slice's orientation is the direction along its
# rows (to the right in the picture), then that along its columns (downwards).


def _sagittal(rng, places) -> list[tuple[np.ndarray, np.ndarray]]:
    """Middle and orientation of sagittal slices, turned together by up to 6° about two axes."""
    about_z, about_y = np.deg2rad(rng.uniform(-6, 6, 2))
    right = np.array([np.sin(about_z), np.cos(about_z), 0])
    down = np.array([np.sin(about_y) * np.cos(about_z), -np.sin(about_y) * np.sin(about_z), -np.cos(about_y)])
    normal = np.cross(right, down)
    middle, half = rng.uniform(-15, 15, 3), rng.uniform(20, 24)
    return [(middle - half * place * normal, np.concatenate([right, down])) for place in places]


def _axial(rng, places) -> list[tuple[np.ndarray, np.ndarray]]:
    """Middle and orientation of axial slices: those of a disc lie in its plane, and discs tilt differently."""
    about_z = np.deg2rad(rng.uniform(-3, 3))
    tilts = np.deg2rad(_LEVEL_TILTS + rng.uniform(-1, 1, 5))
    middle, thickness, found = rng.uniform(-10, 10, 3), rng.uniform(4, 5), []
    for level, above in places:
        right = np.array([np.cos(about_z), np.sin(about_z), 0])
        back = np.array([-np.sin(about_z), np.cos(about_z), 0])
        down = back * np.cos(tilts[level]) + np.array([0, 0, np.sin(tilts[level])])
        centre = middle + [0, 0, _LEVEL_HEIGHTS[level]] + thickness * above * np.cross(right, down)
        found.append((centre, np.concatenate([right, down])))
    return found
