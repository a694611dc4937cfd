"""MRI of the lumbar spine: how far have canal, foramina and recesses narrowed, level by level?

    kerasmed run 02_lumbar_embeddings 03_lumbar_fusion --profile demo      synthetic data
    kerasmed run 02_lumbar_embeddings 03_lumbar_fusion --data-root DIR     the RSNA 2024 set, for a GPU
    kerasmed predict lumbar STUDIES --out grades.csv                       DICOM series, and a table that describes them

Notebook 02_lumbar_embeddings: `shared` reads series and splits by study, `embedded` turns series into vectors, `grid`
fits classifiers over them, and `results` says where attention looks and which studies are alike. A study's grades are
of three conditions, each judged by the modality that shows it: canal by sagittal T2, foramina by sagittal T1, recesses
by axial T2. Notebook 03_lumbar_fusion goes on from a run of it: `fused` has networks of all modalities, of which a
study may lack some, and `card` the report card, which says how well they cope with what is missing. `prediction` is
`kerasmed predict lumbar`, `exported` what `kerasmed export` writes.
"""

from kerasmed.systems.lumbar.exported import exported_networks, exported_samples
from kerasmed.systems.lumbar.prediction import predict

__all__ = ["NOTEBOOK", "exported_networks", "exported_samples", "predict"]

NOTEBOOK = "03_lumbar_fusion"  # whose runs `predict` uses
