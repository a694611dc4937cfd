import re

import keras
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Annotation

from kerasmed import localisation, metrics, modalities, models, plots, splits


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
        | {"kept": [True, False]}
    )
    history["kept"] = [True, False]
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


def test_image_grid_outlines_boxes_with_their_labels_inside_the_picture():
    images = np.zeros((3, 20, 40), np.uint8)
    boxes = [(0, 2, 8, 10, 5, "left"), (0, 30, 0, 9, 20, "right"), (2, 0, 0, 40, 20, "all")]
    figure = plots.image_grid(images, list("abc"), title="T", columns=2, boxes=boxes)
    outlines = [[patch.get_bbox().bounds for patch in axis.patches] for axis in figure.axes]
    # A pixel's edge is half a pixel before its centre.
    assert outlines == [[(1.5, 7.5, 10, 5), (29.5, -0.5, 9, 20)], [], [(-0.5, -0.5, 40, 20)], []]
    texts = [(text.get_text(), text.get_ha(), text.get_va(), text.get_position()) for text in figure.axes[0].texts]
    assert texts == [("left", "left", "bottom", (1.5, 7.5)), ("right", "right", "top", (38.5, -0.5))]


@pytest.mark.parametrize("position", [-1, 2])
def test_image_grid_refuses_a_box_in_no_image(position):
    with pytest.raises(ValueError, match=rf"1 `boxes` lie in none of the 2 images. First: \[\({position}, 0"):
        plots.image_grid(np.zeros((2, 8, 8), np.uint8), "ab", title="T", boxes=[(position, 0, 0, 1, 1, "a")])


def test_learning_curves_draw_the_metrics_that_a_history_has():
    history = pd.DataFrame({"epoch": [1, 2], "loss": [2, 1], "val_loss": [2, 3], "kept": [False, True]})
    figure = plots.learning_curves({"t": history, "u": history}, title="T")
    assert [axis.get_title() for axis in figure.axes] == ["t: loss", "u: loss"]
    measured = history.assign(auroc=[0.5, 0.6], val_auroc=[0.5, 0.7])
    figure = plots.learning_curves({"t": measured, "u": history}, title="T", metrics=("auroc", "loss"))
    assert [axis.get_title() for axis in figure.axes] == ["t: auroc", "t: loss", "", "u: loss"]
    assert [line.get_ydata().tolist() for line in figure.axes[0].get_lines()[:2]] == [[0.5, 0.6], [0.5, 0.7]]
    with pytest.raises(ValueError, match=r"`metrics` are \['f1'\], of which no history has any"):
        plots.learning_curves({"t": history}, title="T", metrics=["f1"])


def test_learning_curves_mark_the_kept_epoch():
    history = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "loss": [1, 1, 1],
            "val_loss": [0.9, 0.3, 0.5],
            "accuracy": [0, 0, 0],
            "val_accuracy": [0, 0, 0],
            "kept": [False, True, False],
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


def test_model_diagram_puts_layers_named_by_keras_into_the_next_named_block():
    x = inputs = keras.Input((8, 8, 1), name="image")
    for number in range(2):
        x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
        x = keras.layers.ReLU(name=f"mixed{number}")(x)
    figure = plots.model_diagram(keras.Model(inputs, keras.layers.Flatten()(x)), title="net")
    names = [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert names[:3] == ["image", "mixed0", "mixed1"] and len(names) == 4  # a last layer without a name stays its own


def test_model_diagram_of_several_inputs_says_where_a_block_takes_what_from():
    image, patient = keras.Input((8, 8, 1), name="image"), keras.Input((3,), name="patient")
    pooled = keras.layers.GlobalMaxPooling2D(name="pool")(image)
    both = [keras.layers.Dense(4, name="image_dense")(pooled), keras.layers.Dense(4, name="patient_dense")(patient)]
    outputs = keras.layers.Add(name="fused")(both)
    texts = plots.model_diagram(keras.Model([image, patient], outputs), title="net").axes[0].texts
    names = [text.get_text() for text in texts if text.get_weight() == "bold"]
    assert set(names) == {"image", "patient", "pool", "image dense", "patient dense", "fused"}
    said = {text.get_text().replace("\n", " ") for text in texts if text.get_text().startswith("from")}
    assert "from image dense and patient dense" in said
    # The pool stands behind the other input or before it; then either it or "patient dense" says what it takes.
    assert said & {"from image", "from patient"}


def _boxes(figure):
    """Name of each box -> what it says that it takes, in one line, and whether an arrow comes from the box before."""
    texts = figure.axes[0].texts
    tips = {tuple(np.round(text.xy, 2)) for text in texts if isinstance(text, Annotation)}
    found = {}
    for name in (text for text in texts if text.get_weight() == "bold"):
        x, y = name.get_position()
        places = [text.get_position()[0] == x and 0 < y - text.get_position()[1] < 0.3 for text in texts]
        said = [text.get_text() for text, here in zip(texts, places) if here and text.get_style() == "italic"]
        found[name.get_text()] = ("".join(said).replace("\n", " "), (round(x - 0.52, 2), round(y - 0.38, 2)) in tips)
    return found


def test_model_diagram_follows_plain_operations_to_the_layers_and_inputs_that_feed_them():
    bags, shown = keras.Input((2, 5), name="bags"), keras.Input((2,), dtype="bool", name="bag_mask")
    known = keras.ops.where(shown[..., None], bags, keras.ops.zeros_like(bags))
    branches = [keras.layers.Dense(4, name=f"branch{place}_dense")(known[:, place]) for place in range(2)]
    mixed = keras.layers.Dense(3, name="mixed")(keras.ops.stack(branches, axis=1))
    last = keras.layers.Dense(1, name="last")(keras.ops.mean(mixed, axis=1) + 1.0)
    boxes = _boxes(plots.model_diagram(keras.Model([bags, shown], last), title="net"))
    assert set(boxes) == {"bags", "bag_mask", "branch0", "branch1", "mixed", "last"}
    assert boxes["bags"] == boxes["bag_mask"] == ("", False)
    assert boxes["branch0"] == ("from bag_mask and bags", True) and boxes["branch1"] == (
        "from bag_mask and bags",
        False,
    )
    assert boxes["mixed"] == ("from branch0 and branch1", True)
    assert boxes["last"] == ("", True)


def test_model_diagram_of_a_fusion_leads_from_slices_to_logits():
    options = {"architecture": "late", "strategy": "pseudo", "width": 4, "attention_units": 4, "units": 4}
    model = modalities.graded_fusion({"canal": 2}, ("t1", "t2", "axial"), 3, 8, **options)
    boxes = _boxes(plots.model_diagram(model, title="net"))
    assert {"slices", "slice_mask", "available"} < set(boxes)
    for name in ("t1", "t2", "axial"):
        assert set(re.findall(r"\w+", boxes[name][0])) == {"from", "slice_mask", "available", "and", "slices"}
        assert boxes[f"{name}network"] in (("from strategy", False), ("", True))
    assert boxes["strategy"][0].startswith("from t1, t2, axial, hidden, ")
    assert boxes["logits"][0].startswith("from t1network, t2network, axialnetwork, ")


def test_model_diagram_of_a_sequential_links_its_layers():
    dense = [keras.layers.Dense(2, name=name) for name in ("first", "second")]
    boxes = _boxes(plots.model_diagram(keras.Sequential([keras.Input((3,)), *dense]), title="net"))
    assert boxes["second"] == ("", True)


def test_model_diagram_keeps_all_text_within_the_boxes():
    inputs = keras.Input((4,), name="image")
    wide = [keras.layers.Dense(2, name=f"{'long' * 4}network{number}")(inputs) for number in range(6)]
    figure = plots.model_diagram(keras.Model(inputs, keras.layers.Add(name="sum")(wide)), title="net")
    said = next(text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("from long"))
    assert said.startswith(f"from {'long' * 4}network0") and said.endswith("more") and said.count("\n") == 2
    figure.draw_without_rendering()
    axis = figure.axes[0]
    extents = [box.get_window_extent() for box in axis.patches]
    for text in axis.texts:
        if text.get_text():
            extent = text.get_window_extent()
            assert any(box.x0 <= extent.x0 and extent.x1 <= box.x1 for box in extents), text.get_text()


def test_heat_maps_overlay_shares_of_each_maximum_and_outline_boxes(rng):
    images = rng.integers(0, 256, (3, 8, 8), dtype=np.uint8)
    heat = rng.random((3, 8, 8)) * np.array([2, 1e-6, 0])[:, None, None]
    boxes = np.array([[2, 1, 3, 4], [np.nan] * 4, [0, 0, 8, 8]])
    figure = plots.heat_maps(images, heat, list("abc"), title="T", columns=2, boxes=boxes)
    *shown, empty, bar = figure.axes
    assert figure.get_suptitle() == "T" and bar.get_ylabel() == "share of the map's maximum"
    assert [axis.get_title() for axis in shown] == list("abc") and not empty.images
    for axis, image, largest in zip(shown, images, (1, 1, 0)):
        np.testing.assert_array_equal(axis.images[0].get_array(), image)
        assert axis.images[0].get_clim() == (0, 255) and axis.images[1].get_clim() == (0, 1)
        assert axis.images[1].get_array().max() == largest
        # The image shines through the hottest place, and is bare where there is no heat.
        assert axis.images[1].get_alpha().max() == pytest.approx(largest * 2 / 3)
    outlines = [[patch.get_bbox().bounds for patch in axis.patches] for axis in shown]
    assert outlines == [[(1.5, 0.5, 3, 4)], [], [(-0.5, -0.5, 8, 8)]]


def test_heat_maps_of_no_images_are_an_empty_figure():
    figure = plots.heat_maps(np.zeros((0, 8, 8), np.uint8), np.zeros((0, 8, 8)), [], title="none wrong")
    assert figure.get_suptitle() == "none wrong" and not any(axis.images for axis in figure.axes[:-1])


def test_heat_maps_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and `images` \(1, 8, 8\).*upsample"):
        plots.heat_maps(np.zeros((1, 8, 8), np.uint8), np.zeros((1, 2, 2)), ["a"], title="T")


def test_class_counts_of_images_alone_name_no_groups_and_only_their_splits():
    counts = pd.DataFrame({"test": [1, 2], "train": [3, 4]}, index=["a", "b"])
    figure = plots.class_counts({"t": counts}, title="T")
    assert [text.get_text() for text in figure.axes[0].texts] == [" 4", " 6"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "test"]


def test_image_sizes_draw_each_size_once_and_name_the_most_frequent():
    files = pd.DataFrame({"height": [8, 8, 5, None], "width": [6, 6, 5, None]}, dtype="Int64")
    figure = plots.image_sizes({"t": files, "u": files.head(2)}, title="T")
    assert figure.get_suptitle() == "T" and figure.axes[0].get_title().startswith("t: 2 sizes")
    assert figure.axes[1].get_title().startswith("u: 1 size,")
    assert figure.axes[0].collections[0].get_offsets().tolist() == [[6, 8], [5, 5]]
    assert figure.axes[0].texts[0].get_text() == "most: 8×6,\n2 of 3 files"


def test_grey_levels_draw_a_line_a_class_in_percent():
    shares = {name: np.full(256, 1 / 256) for name in "abcdefgh"}  # more classes than colours
    figure = plots.grey_levels({"t": shares}, title="T")
    lines = figure.axes[0].get_lines()
    assert [line.get_label() for line in lines] == list("abcdefgh")
    np.testing.assert_allclose(lines[0].get_ydata().sum(), 100)  # 256 equal terms
    assert figure.axes[0].get_xlabel() == "grey level"


@pytest.fixture
def cam_rows():
    """Four maps of each of two variants: of "a" one is dead of each kind and both others hit, all of "b" are dead."""

    def rows(variant, status, split="test"):
        heat = np.array([[[3, 0], [0, 0]] if one == "ok" else np.zeros((2, 2)) for one in status])
        table = localisation.table(heat, status, list("xxyy"), np.array([[0, 0, 2, 2]] * 4), (4, 4))
        return localisation.summary(table, list("pqrs"), task="t", variant=variant, split=split, num_draws=20)

    return [*rows("b", ["zero_gradient"] * 4), *rows("a", ["ok", "zero_gradient", "negative", "ok"])], rows


def test_cam_health_stacks_shares_to_a_hundred_and_marks_chance(cam_rows):
    rows, _ = cam_rows
    figure = plots.cam_health(rows, title="T")
    maps, pointing = figure.axes
    assert figure.get_suptitle() == "T" and maps.get_xlabel() == "% of maps" and "hit rate" in pointing.get_xlabel()
    assert [tick.get_text() for tick in maps.get_yticklabels()] == ["b (4 maps)", "a (4 maps)"]
    assert [[bar.get_width() for bar in bars] for bars in maps.containers] == [[0, 50], [100, 25], [0, 25]]
    assert [[bar.get_x() for bar in bars] for bars in maps.containers] == [[0, 0], [0, 50], [100, 75]]
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "alive"
    assert [text.get_text() for text in pointing.texts] == ["0.000", "0.500"]
    # Of each variant the interval, the value, and the chance: a quarter of the image.
    lines = [np.asarray(line.get_xdata()).tolist() for line in pointing.get_lines()]
    assert lines[:3] == [[0, 0], [0], [0.25, 0.25]] and lines[4:] == [[0.5], [0.25, 0.25]]
    assert lines[3] == next(row["ci95"] for row in rows if row["variant"] == "a" and row["metric"] == "pointing_hit")


def test_cam_health_without_boxes_is_one_panel(cam_rows):
    rows, _ = cam_rows
    figure = plots.cam_health([row for row in rows if row["metric"].startswith("dead")], title="T")
    assert [axis.get_title() for axis in figure.axes] == ["Maps"]


def test_cam_health_of_several_splits_or_no_rows_is_refused(cam_rows):
    rows, make = cam_rows
    with pytest.raises(ValueError, match=r"18 rows labelled 'all' for 12 places, of the splits \['other', 'test'\]"):
        plots.cam_health([*rows, *make("a", ["ok"] * 4, split="other")], title="T")
    with pytest.raises(ValueError, match="0 rows labelled 'all'"):
        plots.cam_health([], title="T")


def test_model_diagram_says_of_a_length_that_is_not_fixed_that_it_may_be_any():
    inputs = keras.Input((None, 4), name="slices")
    figure = plots.model_diagram(keras.Model(inputs, keras.layers.Dense(2, name="embed")(inputs)), title="net")
    said = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert "any×4" in said and "any×2" in said and "None" not in said
