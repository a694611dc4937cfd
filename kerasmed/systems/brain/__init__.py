"""Brain MRI: Alzheimer's severity and tumour type from single slices, and both in one cascade.

    kerasmed run 07_brain_mri 08_brain_cascade --profile demo                    synthetic data
    kerasmed run 07_brain_mri 08_brain_cascade --profile cpu --data-root DIR     real images, on two cores
    kerasmed predict brain IMAGES --out probabilities.csv                        a file or a folder
    kerasmed app                                                                 the cascade in a browser

`networks` is notebook 07_brain_mri, a four-class model a task; `staged` is 08_brain_cascade, which goes on from a run
of it; `cascade` is what that saves and the app loads; `shared` is what both notebooks do, `prediction` what
`kerasmed predict brain` does with a run of either. The published train and test folders are pooled and split anew by
group, because both tasks' published test sets hold slices of patients, or copies of images, that are in training.
"""

from kerasmed.systems.brain.cascade import BrainCascade
from kerasmed.systems.brain.prediction import exported_networks, predict

__all__ = ["ALSO", "NOTEBOOK", "BrainCascade", "exported_networks", "predict"]

NOTEBOOK = "07_brain_mri"  # whose runs `predict` uses
ALSO = ("08_brain_cascade",)  # and of these, where one is named
