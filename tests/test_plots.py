import numpy as np
import pandas as pd
import pytest

from kerasmed import metrics, models, plots, splits


@pytest.fixture
def rows(rng):
    ids = np.repeat([0, 1], 10)
    probabilities = {"t-net": np.eye(2)[ids] * 0.8 + 0.1, "majority": metrics.majority_probabilities(ids, 20, 2)}
    return metrics.multiclass_rows(ids, probabilities, np.arange(20), ("a", "b"), task="t", num_draws=50)


def test_figures_have_titles_and_labelled_axes(rows, rng):
    manifest = pd.DataFrame(
        {"group_id": ["g", "h", "i"], "split": ["train", "valid", "test"], "a": [1, 0, 1], "b": [0, 1, 0]}
    )
    history = pd.DataFrame(
        {"epoch": [1, 2], "loss": [1, 0.5], "val_loss": [0.9, 1], "accuracy": [0.5, 0.6], "val_accuracy": [0.5, 0.4]}
    )
    figures = [
        plots.class_counts({"t": splits.groups_per_split(manifest, ("a", "b"))}, title="T"),
        plots.group_sizes({"t": np.array([1, 2, 2])}, title="T"),
        plots.learning_curves({"t": history}, title="T"),
        plots.confusion({"t": np.array([[3, 1], [0, 0]])}, {"t": ("a", "b")}, title="T"),
        plots.metric_intervals(rows, metrics=["accuracy", "macro_auroc"], title="T", ceilings={"t": 0.9}),
    ]
    for figure in figures:
        assert figure.get_suptitle() == "T"
        drawn = [axis for axis in figure.axes if axis.get_title()]
        assert drawn and all(axis.get_xlabel() for axis in drawn)


def test_image_grid_shows_every_image_at_full_range(rng):
    figure = plots.image_grid(rng.integers(0, 256, (5, 8, 8), dtype=np.uint8), list("abcde"), title="T", columns=3)
    shown = [axis.images[0] for axis in figure.axes if axis.images]
    assert len(shown) == 5 and all(image.get_clim() == (0, 255) for image in shown)
    assert [axis.get_title() for axis in figure.axes] == [*"abcde", ""]


def test_learning_curves_mark_the_kept_epoch():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "loss": [1, 1, 1],
            "val_loss": [0.9, 0.3, 0.5],
            "accuracy": [0, 0, 0],
            "val_accuracy": [0, 0, 0],
        }
    )
    figure = plots.learning_curves({"t": history}, title="T")
    assert "kept: epoch 2" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_model_diagram_counts_all_weights_once():
    model = models.compact_cnn((32, 32), 3, filters=(8, 16))
    figure = plots.model_diagram(model, title="net")
    counted = sum(
        int(text.get_text().split("\n")[1].split()[0].replace(",", ""))
        for text in figure.axes[0].texts
        if text.get_text().endswith("weights")
    )
    assert counted == model.count_params()
    assert f"{model.count_params():,}" in figure.get_suptitle()
