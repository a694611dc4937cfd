import numpy as np
import pandas as pd
import pytest

from kerasmed import calibration, label_plots, multilabel

NAMES = ("a_b", "c")


@pytest.fixture
def rows(rng):
    """Two networks and a baseline; nobody has the label c."""
    y_true = np.column_stack([np.arange(40) % 2, np.zeros(40)])
    half = np.full(2, 0.5)
    answers = {name: multilabel.Answer(rng.random((40, 2)), half) for name in ("net", "other", "majority")}
    return multilabel.rows(y_true, answers, np.arange(40), NAMES, task="t", num_draws=20)


def test_intervals_draw_value_and_interval_of_each_variant(rows):
    figure = label_plots.intervals(rows, metric="auroc", title="T", labels=("all", *NAMES))
    (axis,) = figure.axes
    assert figure.get_suptitle() == "T" and axis.get_xlabel() == "AUROC, 95 % interval over groups"
    assert [text.get_text() for text in axis.get_yticklabels()] == ["all", "a b", "c"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["net", "other", "majority"]
    lines = {line.get_label(): line for line in axis.get_lines()}
    for bars, name in zip(axis.collections, ("net", "other", "majority"), strict=True):
        wanted = [row for row in rows if row["variant"] == name and row["metric"] == "auroc" and row["label"] != "c"]
        assert lines[name].get_xdata().tolist() == [row["value"] for row in wanted]  # c is undefined
        assert lines[name].get_ydata().round().tolist() == [0, 1]
        assert [segment[:, 0].tolist() for segment in bars.get_segments()] == [row["ci95"] for row in wanted]
    assert lines["majority"].get_color() == label_plots.GREY
    assert len({line.get_color() for line in lines.values()} - {label_plots.GREY}) >= 2
    heights = np.concatenate([lines[name].get_ydata() for name in ("net", "other", "majority")])
    assert len(set(heights)) == 6 and axis.get_ylim() == (2.5, -0.5)  # "all" is on top, none covers another


def test_intervals_of_several_splits_or_of_no_row_are_refused(rows):
    again = [row | {"split": "test, first"} for row in rows]
    with pytest.raises(ValueError, match=r"6 rows of f1 for 3 places, splits \['test', 'test, first'\]"):
        label_plots.intervals(rows + again, metric="f1", title="T", labels=["all"])
    with pytest.raises(ValueError, match="0 rows of dice for 0 places"):
        label_plots.intervals(rows, metric="dice", title="T", labels=["all"])


@pytest.fixture
def split_rows(rng):
    """One label of two networks and a baseline, of all images and of two parts."""
    y_true = (np.arange(60) % 3 == 0).astype(float)[:, None]
    answers = {name: rng.random((60, 1)) for name in ("net", "other", "majority")}
    rows = []
    for split, part in {"test": slice(60), "test, XR_ELBOW": slice(30), "test, XR_WRIST": slice(30, 60)}.items():
        told = {name: multilabel.Answer(values[part], np.full(1, 0.5)) for name, values in answers.items()}
        options = {"task": "t", "split": split, "at_half": ("kappa", "f1"), "num_draws": 20}
        rows += multilabel.rows(y_true[part], told, np.arange(60)[part], ["abnormal"], **options)
    return rows


def test_intervals_by_split_draw_a_line_each_and_published_values_over_the_first(split_rows):
    splits = ["test", "test, XR_WRIST", "test, XR_ELBOW"]
    figure = label_plots.intervals(
        split_rows,
        metric="kappa_at_half",
        title="T",
        labels=splits,
        by="split",
        names={"test": "all", "test, XR_WRIST": "wrist"},
        published={"paper": 0.705, "radiologist": 0.7784},
    )
    (axis,) = figure.axes
    assert axis.get_xlabel() == "Cohen's kappa at 0.5, 95 % interval over groups"
    assert [text.get_text() for text in axis.get_yticklabels()] == ["all", "wrist", "test, XR ELBOW"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["net", "other", "majority", "paper: 0.705", "radiologist: 0.778"]
    lines = {line.get_label(): line for line in axis.get_lines()}
    value = {(row["variant"], row["split"]): row["value"] for row in split_rows if row["metric"] == "kappa_at_half"}
    for name in ("net", "other", "majority"):
        assert lines[name].get_xdata().tolist() == [value[name, split] for split in splits]
        assert lines[name].get_ydata().round().tolist() == [0, 1, 2]
    ticks = axis.collections[3:]
    assert [tick.get_segments()[0].tolist() for tick in ticks] == [
        [[0.705, -0.5], [0.705, 0.5]],
        [[0.7784, -0.5], [0.7784, 0.5]],
    ]
    first, second = (tick.get_linestyle() for tick in ticks)
    assert first != second and axis.get_xlim()[1] > 0.7784


@pytest.mark.parametrize(
    ("metric", "written"),
    [("kappa", "Cohen's kappa"), ("f1_at_half", "F1 at 0.5"), ("average_precision", "average precision")],
)
def test_intervals_name_the_metric(split_rows, metric, written):
    figure = label_plots.intervals(split_rows, metric=metric, title="T", labels=["test"], by="split")
    assert figure.axes[0].get_xlabel() == f"{written}, 95 % interval over groups"
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["test"]


def test_intervals_by_split_of_two_labels_or_by_another_field_are_refused(split_rows):
    again = [row | {"label": "fracture"} for row in split_rows]
    options = {"metric": "auroc", "title": "T", "labels": ["test"]}
    with pytest.raises(
        ValueError, match=r"6 rows of auroc for 3 places, labels \['abnormal', 'fracture'\].*task and label"
    ):
        label_plots.intervals(split_rows + again, by="split", **options)
    with pytest.raises(ValueError, match="`by` is 'variant'; expected 'label' or 'split'"):
        label_plots.intervals(split_rows, by="variant", **options)


def test_calibration_draws_every_bin_and_names_the_counts(rng):
    told = rng.random((1000, 1)) * 0.4
    y_true = (rng.random((1000, 1)) < told).astype(float)
    y_true[np.argsort(told[:, 0])[:100]] = 0  # nothing is observed in the first bin
    curves = {"raw": calibration.reliability(y_true, told), "two": calibration.reliability(y_true, told, bins=3)}
    figure = label_plots.calibration(curves, title="T")
    linear, log = figure.axes
    for axis, lost in ((linear, 0), (log, 1)):
        assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted probability", "observed share")
        assert axis.get_xlim() == axis.get_ylim() and axis.get_xlim()[1] < 0.6
        diagonal, raw, two = axis.get_lines()
        np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
        np.testing.assert_array_equal(raw.get_xdata(), curves["raw"]["mean_probability"][lost:])
        np.testing.assert_array_equal(raw.get_ydata(), curves["raw"]["observed"][lost:])
        assert len(two.get_xdata()) == 3
        assert axis.collections[0].get_sizes()[0] == pytest.approx(36 * 100 / 334)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["as observed", "raw: 10 bins of 100", "two: 3 bins of 333 to 334"]


def test_cooccurrence_writes_per_cent_and_keeps_the_diagonal_apart():
    nan = np.nan
    y_true = np.array([[1, 1, nan]] * 3 + [[1, 0, nan]] * 5 + [[0, 0, nan]] * 92)
    table = multilabel.cooccurrence(y_true, ("a", "b_c", "d"))
    figure = label_plots.cooccurrence(table, title="T")
    axis, bar = figure.axes
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    # column, row: 3 of the 8 with a have b, all 3 with b have a; nothing is known of d
    assert shown == {(0, 0): "8.0", (1, 0): "38", (0, 1): "100", (1, 1): "3.0"}
    shares, diagonal = (image.get_array() for image in axis.images)
    assert np.ma.getmaskarray(shares).diagonal().all() and diagonal.count() == 3
    assert axis.images[0].get_clim() == (0, 100) and bar.get_ylabel() == "% of the row's images"
    assert [text.get_text() for text in axis.get_yticklabels()] == ["a", "b c", "d"]


@pytest.fixture
def table():
    """Ten images of four patients, who have 1, 1, 2 and 6."""
    return pd.DataFrame(
        {
            "patient_id": [*"ab", *"cc", *"dddddd"],
            "age": [3.0, 7, 52, 53, 60, 60, 61, 61, np.nan, np.nan],
            "sex": ["F", "M", "F", "F", "M", "M", "M", "M", pd.NA, pd.NA],
            "view": ["PA", "AP", "PA", "PA", "PA", "PA", "AP", pd.NA, "PA", "PA"],
        }
    )


def test_patients_are_counted_by_age_view_and_images(table):
    figure = label_plots.patients(table, title="T")
    age, view, patient = figure.axes
    assert figure.get_suptitle() == "T" and all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)
    legend = [text.get_text() for text in age.get_legend().get_texts()]
    assert legend == ["F: 3", "M: 5", "sex not known: 0"] and age.get_title() == "10 images, 2 without age"
    assert [text.get_text() for text in view.get_xticklabels()] == ["AP", "PA", "view not known"]
    assert [bar.get_height() for bar in view.patches] == [2, 7, 1]
    assert view.get_title() == "10 images, 1 without view"
    assert [text.get_text() for text in patient.get_xticklabels()] == ["1", "2", "3–4", "5–8"]
    assert [bar.get_height() for bar in patient.patches] == [2, 1, 0, 1]
    assert patient.get_title() == "4 patients, 50% with several images"


@pytest.mark.parametrize("absent", [True, False])
@pytest.mark.parametrize("name", ["age", "sex", "view"])
def test_patients_of_whom_a_column_is_unknown_say_so(table, name, absent):
    table = table.drop(columns=name) if absent else table.assign(**{name: pd.NA})
    age, view, _ = label_plots.patients(table, title="T").axes
    if name == "sex":
        assert [text.get_text() for text in age.get_legend().get_texts()] == ["sex not known: 8"]
        return
    empty, other = (age, view) if name == "age" else (view, age)
    assert [text.get_text() for text in empty.texts] == [f"{name} not known"] and other.patches
    assert empty.get_title() == f"10 images, 10 without {name}"


def test_patients_of_one_image_each_or_of_no_known_id_are_drawn(table):
    single = label_plots.patients(table.iloc[:2], title="T").axes[2]
    assert [bar.get_height() for bar in single.patches] == [2]
    unknown = label_plots.patients(table.assign(patient_id=pd.NA), title="T").axes[2]
    assert [text.get_text() for text in unknown.texts] == ["patient not known"]
