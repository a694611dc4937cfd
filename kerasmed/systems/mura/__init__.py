"""Musculoskeletal radiographs of the upper limb: is a study abnormal?

    kerasmed run 06_mura_densenet --profile demo                synthetic data
    kerasmed run 06_mura_densenet --data-root DIR               real images with ImageNet weights, for a GPU
    kerasmed predict mura STUDIES --out studies.csv             a folder of studies, or one PNG or DICOM

Networks see images, and labels are of studies: a study's probability is the mean of its images', and that is what a
result is of. `networks` and `results` are notebook 06_mura_densenet, `prediction` is `kerasmed predict mura`. The
published `valid` is the test; validation is carved off the published training studies by patient.
"""

from kerasmed.systems.mura.prediction import exported_networks, predict

__all__ = ["NOTEBOOK", "exported_networks", "predict"]

NOTEBOOK = "06_mura_densenet"  # whose runs `predict` uses
