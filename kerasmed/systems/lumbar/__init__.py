"""MRI of the lumbar spine: how far have canal, foramina and recesses narrowed, level by level?

    kerasmed run 02_lumbar_embeddings --profile demo           synthetic data
    kerasmed run 02_lumbar_embeddings --data-root DIR          the RSNA 2024 set with pretrained weights, for a GPU

`shared` reads series and splits by study, `embedded` turns series into vectors, `grid` fits classifiers over them, and
`results` says where attention looks and which studies are alike. A study's grades are of three conditions, each
judged by the modality that shows it: canal by sagittal T2, foramina by sagittal T1, recesses by axial T2.
"""

NOTEBOOK = "02_lumbar_embeddings"
