"""Chest radiographs: fourteen findings of NIH ChestX-ray14, from the image, and from what is known of the patient.

    kerasmed run 04_chest_backbones 05_chest_fusion_gradcam --profile demo                synthetic data
    kerasmed run 04_chest_backbones 05_chest_fusion_gradcam --data-root DIR               real images, for a GPU

`networks` is notebook 04_chest_backbones, `fused` 05_chest_fusion_gradcam, which goes on from a run of it; `shared` is
what both do, `prediction` what `kerasmed predict chest` does with a run of either. The official test list is the test,
and each of its images is scored once: validation is carved off the official training images by patient.
"""

from kerasmed.systems.chest.prediction import exported_networks, exported_samples, predict

__all__ = ["NOTEBOOK", "exported_networks", "exported_samples", "predict"]

NOTEBOOK = None  # whose runs `predict` uses: both notebooks leave a model
