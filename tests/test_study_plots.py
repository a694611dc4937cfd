import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kerasmed import study_plots
from kerasmed.plots import COLOURS

STUDIES = [  # patient, type, split, label, images
    ("p1", "XR_WRIST", "train", 1.0, 3),
    ("p1", "XR_WRIST", "train", 0.0, 1),
    ("p1", "XR_ELBOW", "train", 0.0, 2),
    ("p2", "XR_ELBOW", "train", 0.0, 2),
    ("p3", "XR_ELBOW", "train", 1.0, 4),
    ("p4", "XR_WRIST", "test", 1.0, 10),
    ("p5", "XR_WRIST", "test", np.nan, 1),
]


def _table(studies):
    """A row an image, mixed, of studies of the form of `STUDIES`."""
    rows = [
        (patient, f"{kind}/{patient}/study{number}", split, kind, label)
        for number, (patient, kind, split, label, images) in enumerate(studies)
        for _ in range(images)
    ]
    table = pd.DataFrame(rows, columns=["patient_id", "study_id", "split", "body_part", "abnormal"])
    return table.sample(frac=1, random_state=0)


@pytest.fixture
def table():
    return _table(STUDIES)


def _widths(axis):
    return [[bar.get_width() for bar in bars] for bars in axis.containers]


def _heights(axis):
    return [[bar.get_height() for bar in bars] for bars in axis.containers]


def _texts(axis):
    return [text.get_text() for text in axis.texts]


def test_counts_by_hand(table):
    counted = study_plots.counts(table)
    assert counted.columns.tolist() == [
        *("patients", "studies", "abnormal_studies", "share_abnormal", "images", "images_per_study")
    ]
    assert counted.index.names == ["split", "body_part"]
    assert {place: row.tolist() for place, row in counted.iterrows()} == {
        ("train", "XR_ELBOW"): [3, 3, 1, 1 / 3, 8, 8 / 3],
        ("train", "XR_WRIST"): [1, 2, 1, 1 / 2, 4, 2],
        ("train", "all"): [3, 5, 2, 2 / 5, 12, 12 / 5],  # p1 has both types
        ("test", "XR_WRIST"): [2, 2, 1, 1, 11, 11 / 2],  # the share is of the one with a label
        ("test", "all"): [2, 2, 1, 1, 11, 11 / 2],
    }
    whole = counted[["patients", "studies", "abnormal_studies", "images"]]
    assert (whole.dtypes == "int64").all()


def test_counts_order_splits_and_types_whatever_the_rows_order():
    table = _table([("p", kind, split, 1, 1) for split in ("b", "test", "a", "train", "valid") for kind in ("z", "Y")])
    table["study_id"] += table["split"]
    index = study_plots.counts(table).index.tolist()
    assert index == [(split, kind) for split in ("train", "valid", "test", "a", "b") for kind in ("Y", "z", "all")]


def test_counts_of_types_sum_to_all_but_for_patients(rng):
    patients = rng.integers(0, 60, 300)
    kinds = rng.choice(["a", "b", "c"], 300)
    drawn = zip(
        patients, kinds, np.where(patients % 3, "train", "test"), rng.integers(0, 2, 300), rng.integers(1, 6, 300)
    )
    counted = study_plots.counts(_table([(f"p{patient}", *rest) for patient, *rest in drawn]))
    for split in ("train", "test"):
        types = counted.loc[split].drop(index="all").sum()
        total = counted.loc[split, "all"]
        for name in ("studies", "abnormal_studies", "images"):
            assert types[name] == total[name]
        of_split = {patient for patient in patients if (patient % 3 > 0) == (split == "train")}
        assert types["patients"] > total["patients"] == len(of_split)
    assert counted.xs("all", level="body_part")["studies"].sum() == 300


def test_counts_of_no_row_are_empty(table):
    counted = study_plots.counts(table.iloc[:0])
    assert counted.empty and "share_abnormal" in counted
    with pytest.raises(ValueError, match="no row"):
        study_plots.overview(table.iloc[:0], title="T")


@pytest.mark.parametrize("function", [study_plots.counts, lambda table: study_plots.overview(table, title="T")])
def test_tables_that_are_none_of_studies_are_refused(table, function):
    with pytest.raises(ValueError, match=r"lacks the columns \['study_id', 'abnormal'\]"):
        function(table.drop(columns=["study_id", "abnormal"]))
    holed = table.reset_index(drop=True)
    holed.loc[[2, 5], "body_part"] = None
    with pytest.raises(ValueError, match=r"\['body_part'\] are missing in 2 of 23 rows; drop them. First: \[2, 5\]"):
        function(holed)
    for name, value in (("abnormal", 0.5), ("split", "valid"), ("patient_id", "p9"), ("body_part", "XR_HAND")):
        torn = table.reset_index(drop=True)
        row = torn.index[torn["study_id"] == "XR_ELBOW/p3/study4"][0]
        torn.loc[row, name] = value
        with pytest.raises(ValueError, match=r"1 studies differ.*First: \['XR_ELBOW/p3/study4'\]"):
            function(torn)


def test_overview_bars_equal_the_counts(table):
    figure = study_plots.overview(table, title="T")
    of_type, of_label, of_patient, of_study = figure.axes
    assert figure.get_suptitle() == "T" and all(axis.get_xlabel() and axis.get_title() for axis in figure.axes)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "test"]
    for axis in (of_type, of_label):
        assert [text.get_text() for text in axis.get_yticklabels()] == ["ELBOW", "WRIST"]
        assert [bars[0].get_facecolor() for bars in axis.containers] == [
            bars[0].get_facecolor() for bars in of_patient.containers
        ]
    # train, then test; elbow, then wrist
    assert _widths(of_type) == [[3, 1], [0, 2]] and _texts(of_type) == ["3", "1", "0", "2"]
    assert of_type.get_title() == "Patients: 3 in train, 2 in test"
    assert _widths(of_label) == [[pytest.approx(100 / 3), 50], [0, 100]]
    assert _texts(of_label) == ["33% (1 of 3)", "50% (1 of 2)", "none", "100% (1 of 1)"]
    assert of_label.get_title() == "Abnormal studies: 40% in train, 100% in test"
    # 1, 2 and 3 studies: p2 and p3 have one, p1 has three
    assert _heights(of_patient) == [[2, 0, 1], [2, 0, 0]] and of_patient.get_yscale() == "log"
    assert of_patient.get_title() == "Patients with several studies: 33% in train, 0% in test"
    # 1 to 8 images: ten are the last bar's
    assert [text.get_text() for text in of_study.get_xticklabels()] == [*"1234567", "8+"]
    assert [text.get_text() for text in of_study.get_legend().get_texts()] == ["normal", "abnormal", "no label"]
    assert _heights(of_study) == [[1, 2, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert [text for text in _texts(of_study) if text] == ["1", "2", "1", "1", "1", "1"]
    assert of_study.get_title() == "Images per study: 1.67 if normal, 5.67 if abnormal, 1.00 if no label"


def test_overview_bars_do_not_cover_one_another_and_splits_keep_their_colours(table):
    three = table.assign(split=table["split"].where(table["patient_id"] != "p3", "valid"))
    for each, colours in ((table, [0, 2]), (three, [0, 1, 2])):
        of_type, _, of_patient, _ = study_plots.overview(each, title="T").axes
        used = [to_hex(bars[0].get_facecolor()) for bars in of_type.containers]
        assert used == [COLOURS[place] for place in colours]
        ends = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bars in of_type.containers for bar in bars)
        assert all(later[0] >= earlier[1] - 1e-9 for earlier, later in zip(ends, ends[1:]))
        ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bars in of_patient.containers for bar in bars)
        assert all(later[0] >= earlier[1] - 1e-9 for earlier, later in zip(ends, ends[1:]))


def test_overview_of_one_study_and_of_no_label(table):
    of_type, of_label, _, of_study = study_plots.overview(_table([("p", "a", "train", np.nan, 1)]), title="T").axes
    assert _widths(of_type) == [[1]] and _texts(of_label) == ["none"] and _heights(of_study) == [[1]]
    assert study_plots.counts(_table([("p", "a", "train", np.nan, 1)]))["share_abnormal"].isna().all()


def test_overview_does_not_change_its_table(table):
    before = table.copy()
    study_plots.overview(table, title="T")
    pd.testing.assert_frame_equal(table, before)


def test_samples_show_normal_left_of_abnormal_and_leave_places_black():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    kinds = {"body_part": ["XR_HAND", "XR_HAND", "XR_HAND", "XR_WRIST", "XR_WRIST"], "abnormal": [0, 1, 0, 1, 1]}
    figure = study_plots.samples(images, pd.DataFrame(kinds), title="t", count=2, captions=list("abcde"))
    shown = [(axis.images[0].get_array().max(), axis.get_title()) for axis in figure.axes]
    hand = [(1, "normal\na"), (3, "normal\nc"), (2, "abnormal\nb"), (0, "")]
    assert shown == hand + [(0, ""), (0, ""), (4, "abnormal\nd"), (5, "abnormal\ne")]
    assert {text.get_text() for axis in figure.axes for text in axis.texts} == {"hand", "wrist"}
