import os
import time

import numpy as np
import pandas as pd
import pytest

from kerasmed import datasets, manifest
from kerasmed.datasets import lumbar

NORMAL, MODERATE, SEVERE = lumbar.GRADES
# study -> series -> (modality, files); "7" has two axial series, "12" lacks T1, ids are not in the order of text.
SERIES = {
    "12": {"5": ("Sagittal T2/STIR", ["1.dcm", "2.dcm"]), "31": ("Axial T2", ["4.dcm"])},
    "7": {
        "20": ("Axial T2", ["1.dcm", "3.dcm", "2.DCM"]),
        "9": ("Axial T2", ["10.dcm", "9.dcm", "8.dcm", "100.dcm"]),
        "100": ("Sagittal T1", ["2.dcm"]),
        "3": ("Sagittal T2/STIR", ["1.dcm"]),
    },
}


@pytest.fixture
def root(tmp_path):
    """Two studies of six series; study 7 has a Moderate canal and a blank, study 12 Severe on the left alone."""
    root = tmp_path / "data"
    home = root / "lumbar"
    described = []
    for study, of_study in SERIES.items():
        for series, (modality, files) in of_study.items():
            described.append((study, series, modality))
            (home / "train_images" / study / series).mkdir(parents=True)
            for file in files:
                (home / "train_images" / study / series / file).write_bytes(b"")
    grades = pd.DataFrame(NORMAL, index=["12", "7"], columns=list(lumbar.TARGETS))
    grades.loc["7", "spinal_canal_stenosis_l4_l5"] = MODERATE
    grades.loc["7", "spinal_canal_stenosis_l5_s1"] = ""
    grades.loc["7", "left_subarticular_stenosis_l1_l2"] = ""
    grades.loc["12", "left_neural_foraminal_narrowing_l5_s1"] = SEVERE
    grades.rename_axis("study_id").to_csv(home / "train.csv")
    table = pd.DataFrame(described, columns=["study_id", "series_id", "series_description"])
    table.to_csv(home / "train_series_descriptions.csv", index=False)
    (home / "train_label_coordinates.csv").write_text(
        "study_id,series_id,instance_number,condition,level,x,y\n"
        "7,3,1,Spinal Canal Stenosis,L4/L5,32.5,40\n"
        "12,31,4,Right Subarticular Stenosis,L1/L2,1e1,2.25\n"
        "7,100,2,Left Neural Foraminal Narrowing,L5/S1,0,1\n"
    )
    return root


def _edit(root, name, function):
    path = root / "lumbar" / name
    path.write_text(function(path.read_text()))


# --- names -----------------------------------------------------------------------------------------------------------


def test_targets_are_the_25_columns_in_their_order():
    assert len(lumbar.TARGETS) == len(set(lumbar.TARGETS)) == 25
    assert lumbar.TARGETS[:2] == ("spinal_canal_stenosis_l1_l2", "spinal_canal_stenosis_l2_l3")
    assert lumbar.TARGETS[5] == "left_neural_foraminal_narrowing_l1_l2"
    assert lumbar.TARGETS[10] == "right_neural_foraminal_narrowing_l1_l2"
    assert lumbar.TARGETS[15] == "left_subarticular_stenosis_l1_l2"
    assert lumbar.TARGETS[-1] == "right_subarticular_stenosis_l5_s1"
    assert lumbar.PLACES["right_subarticular_stenosis_l5_s1"] == ("subarticular_stenosis", "right", "l5_s1")
    assert [len(lumbar.targets_of(name)) for name in lumbar.CONDITIONS] == [5, 10, 10]
    assert tuple(name for each in lumbar.CONDITIONS for name in lumbar.targets_of(each)) == lumbar.TARGETS


def test_pairing_is_the_clinical_one():
    assert lumbar.PAIRED == {
        "spinal_canal_stenosis": "Sagittal T2/STIR",
        "neural_foraminal_narrowing": "Sagittal T1",
        "subarticular_stenosis": "Axial T2",
    }


# --- read ------------------------------------------------------------------------------------------------------------


def test_read_gives_a_row_a_series_in_the_order_of_numbers_and_modalities(root, caplog):
    frame = lumbar.read(root)
    columns = ["modality", "series_id", "series_path", "slices", *lumbar.CONDITIONS]
    assert list(frame.columns) == [*manifest.COLUMNS, *columns] and not caplog.text
    assert frame["study_id"].tolist() == ["7"] * 4 + ["12"] * 2
    assert frame["series_id"].tolist() == ["100", "3", "9", "20", "5", "31"]
    assert frame["modality"].tolist() == [SERIES[s][i][0] for s, i in zip(frame["study_id"], frame["series_id"])]
    assert frame["slices"].tolist() == [1, 1, 4, 3, 2, 1]
    assert frame["series_path"].tolist() == [
        f"lumbar/train_images/{s}/{i}" for s, i in zip(frame["study_id"], frame["series_id"])
    ]
    # The middle by number: of 8, 9, 10, 100 the third, of 1, 2, 3 the second.
    names = [path.rpartition("/")[2] for path in frame["image_path"]]
    assert names == ["2.dcm", "1.dcm", "10.dcm", "2.DCM", "2.dcm", "4.dcm"]
    assert all((root / path).is_file() for path in frame["image_path"])
    assert (frame["patient_id"] == frame["study_id"]).all() and (frame["group_id"] == frame["study_id"]).all()
    assert set(frame["split"]) == {"train"} and frame["slices"].dtype == int


def test_read_labels_are_of_the_worst_known_grade(root):
    labels = lumbar.read(root).groupby("study_id")[list(lumbar.CONDITIONS)].agg(lambda v: v.iloc[0])
    # 7: a Moderate beside a blank is 1; nothing but Normal/Mild and a blank is unknown. 12: one Severe of ten.
    np.testing.assert_array_equal(labels.loc["7"], [1, 0, np.nan])
    np.testing.assert_array_equal(labels.loc["12"], [0, 1, 0])


def test_read_bom_crlf_other_order_and_other_columns_change_nothing(root):
    expected, studies = lumbar.read(root), lumbar.read_studies(root)
    for name in ("train.csv", "train_series_descriptions.csv"):
        path = root / "lumbar" / name
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = table[table.columns[::-1]].assign(remark="x")
        path.write_bytes(b"\xef\xbb\xbf" + table.to_csv(index=False, lineterminator="\r\n").encode())
    pd.testing.assert_frame_equal(lumbar.read(root), expected)
    pd.testing.assert_frame_equal(lumbar.read_studies(root), studies)


def test_read_hidden_and_other_files_and_test_images_count_nowhere(root, caplog):
    expected = lumbar.read(root)
    images = root / "lumbar/train_images"
    for place in (images, images / "7", images / "7/9"):
        for name in (".DS_Store", "._9.dcm", "notes.txt"):
            (place / name).write_bytes(b"")
        (place / ".cache").mkdir()
    (root / "lumbar/test_images/1/2").mkdir(parents=True)
    (root / "lumbar/test_images/1/2/1.dcm").write_bytes(b"")
    pd.testing.assert_frame_equal(lumbar.read(root), expected)
    assert not caplog.text


def test_read_what_has_no_row_is_counted_in_one_warning_a_reason(root, caplog):
    home = root / "lumbar"
    _edit(root, "train.csv", lambda text: text + text.splitlines()[1].replace("12,", "13,", 1) + "\n")
    _edit(
        root,
        "train_series_descriptions.csv",
        lambda text: text + "7,40,Axial T2\n7,41,Axial T2\n7,42,Axial T2\n99,1,Sagittal T1\n",
    )
    for place in ("7/42", "99/1", "7/50", "8/60"):
        (home / "train_images" / place).mkdir(parents=True)
    for place in ("99/1", "7/50", "8/60"):
        (home / "train_images" / place / "1.dcm").write_bytes(b"")
    assert len(lumbar.read(root)) == 6
    assert [each.getMessage() for each in caplog.records] == [
        "1 studies of train.csv have no row in train_series_descriptions.csv, so no series: 13",
        "3 described series are not there, or hold no .dcm file, and were left out: 7/40, 7/41, 7/42",
        "2 series are there, but not in train_series_descriptions.csv, and were left out: 7/50, 8/60",
        "1 series are of studies that train.csv does not have, and were left out: 99/1",
    ]


def test_read_partial_download_keeps_what_is_there(root, caplog):
    for path in (root / "lumbar/train_images/12").rglob("*.dcm"):
        path.unlink()
    assert lumbar.read(root)["study_id"].tolist() == ["7"] * 4
    assert "2 described series are not there" in caplog.text and len(caplog.records) == 1
    studies = lumbar.read_studies(root)
    assert studies["study_id"].tolist() == ["12", "7"]
    assert studies[list(lumbar.MODALITIES)].to_numpy().tolist() == [[0, 0, 0], [1, 1, 2]]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("train.csv", NORMAL, "Mild", r"column spinal_canal_stenosis_l1_l2: 1 of 2 .*First: \[\"row 2: 'Mild'\"\]"),
        ("train.csv", "7,", "12,", r"study_id twice 1 times.*row 3: 12"),
        ("train.csv", "7,", "7.0,", r"column study_id: 1 of 2 values are not a whole number.*row 3: '7.0'"),
        ("train.csv", "study_id", "id", r"train.csv lacks the columns \['study_id'\]"),
        ("train_series_descriptions.csv", "Sagittal T1", "T1", r"column series_description: 1 of 6 .*row 6: 'T1'"),
        ("train_series_descriptions.csv", "12,31", "12,5", r"study_id and series_id twice 1 times.*row 3: 12/5"),
        ("train.csv", "study_id", "\0", "train.csv has 1 NUL bytes, the first in line 1"),
        ("train_series_descriptions.csv", "12,31,", "12,31;", "train_series_descriptions.csv .*1 of 6 rows have fewer"),
    ],
)
def test_read_wrong_tables_are_refused_by_row(root, name, old, new, message):
    _edit(root, name, lambda text: text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        lumbar.read(root)


def test_read_absent_files_and_unknown_part_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="part 'slices' is unknown; known is series"):
        lumbar.read(root, "slices")
    assert lumbar.folder(root) == lumbar.part_folder(root, lumbar.PART) == root / "lumbar"
    assert lumbar.folder(tmp_path / "nothing") is None
    with pytest.raises(FileNotFoundError, match="train.csv is absent; expected lumbar/{train.csv"):
        lumbar.read(tmp_path / "nothing")
    for path in root.rglob("*.[dD]*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no series of lumbar under .*train_images that"):
        lumbar.read(root)


def test_list_series_gives_files_by_number_of_all_studies_or_some(root):
    images = root / "lumbar/train_images"
    found = lumbar.list_series(images)
    assert found == {
        (study, series): sorted(files, key=lambda name: int(name[:-4]))
        for study, of_study in SERIES.items()
        for series, (_, files) in of_study.items()
    }
    assert found["7", "9"] == ["8.dcm", "9.dcm", "10.dcm", "100.dcm"]
    assert lumbar.list_series(images, ["12"]) == {key: files for key, files in found.items() if key[0] == "12"}
    assert lumbar.list_series(images, []) == lumbar.list_series(images / "none") == {}


def test_read_descriptions_takes_any_modality_but_no_wrong_id(root, tmp_path):
    path = tmp_path / "test_series_descriptions.csv"
    text = (root / "lumbar/train_series_descriptions.csv").read_text()
    path.write_text(text.replace("Sagittal T1", "Sagittal PD"))
    table = lumbar.read_descriptions(path)
    assert table.columns.tolist() == ["study_id", "series_id", "modality"] and len(table) == 6
    assert table.loc[table["series_id"] == "100", "modality"].tolist() == ["Sagittal PD"]
    path.write_text(text.replace("12,31", "12,x1"))
    with pytest.raises(ValueError, match="test_series_descriptions.csv, column series_id: 1 of 6 .*row 3: 'x1'"):
        lumbar.read_descriptions(path)
    with pytest.raises(FileNotFoundError, match="none.csv is absent"):
        lumbar.read_descriptions(tmp_path / "none.csv")


# --- studies, grades, coordinates ------------------------------------------------------------------------------------


def test_read_studies_gives_grades_and_counts_of_series(root):
    studies = lumbar.read_studies(root)
    assert list(studies.columns) == ["study_id", *lumbar.TARGETS, *lumbar.MODALITIES]
    assert studies["study_id"].tolist() == ["12", "7"]  # the table's order
    assert studies[list(lumbar.MODALITIES)].to_numpy().tolist() == [[0, 1, 1], [1, 1, 2]]
    grades = studies.set_index("study_id")[list(lumbar.TARGETS)]
    assert grades.loc["7", "spinal_canal_stenosis_l4_l5"] == 1
    assert grades.loc["12", "left_neural_foraminal_narrowing_l5_s1"] == 2
    assert grades.isna().sum().sum() == 2 and (grades == 0).sum().sum() == 46
    assert {str(dtype) for dtype in grades.dtypes} == {"float64"}


def test_long_lays_each_grade_out_and_gives_it_back(root):
    studies = lumbar.read_studies(root)
    table = lumbar.long(studies)
    assert list(table.columns) == ["study_id", "target", "condition", "side", "level", "grade"] and len(table) == 50
    assert table["target"].tolist() == list(lumbar.TARGETS) * 2
    row = table[table["grade"] == 2].iloc[0].tolist()
    name = "neural_foraminal_narrowing"
    assert row == ["12", f"left_{name}_l5_s1", name, "left", "l5_s1", 2.0]
    assert set(table.loc[table["condition"] == "spinal_canal_stenosis", "side"]) == {""}
    back = table.pivot(index="study_id", columns="target", values="grade")
    back = back.loc[studies["study_id"], list(lumbar.TARGETS)]
    np.testing.assert_array_equal(back, studies[list(lumbar.TARGETS)])
    assert lumbar.long(studies.iloc[:0]).empty


def test_read_coordinates_spells_places_as_the_targets_do(root):
    found = lumbar.read_coordinates(root)
    assert found.to_numpy().tolist() == [
        ["7", "3", 1, "spinal_canal_stenosis", "", "l4_l5", 32.5, 40.0],
        ["12", "31", 4, "subarticular_stenosis", "right", "l1_l2", 10.0, 2.25],
        ["7", "100", 2, "neural_foraminal_narrowing", "left", "l5_s1", 0.0, 1.0],
    ]
    assert found["instance_number"].dtype == int


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Spinal Canal", "Canal", "column condition: 1 of 3 .*row 2: 'Canal Stenosis'"),
        ("L1/L2", "L0/L1", "column level: 1 of 3 .*row 3: 'L0/L1'"),
        ("32.5", "", "column x: 1 of 3 values are not a number.*row 2: ''"),
        ("12,31,4", "12,31,4.5", "column instance_number: 1 of 3 values are not a whole number"),
        (
            "12,31,4",
            f"12,31,4{'0' * 18}",
            "column instance_number: 1 of 3 values are not a number of at most 18 digits",
        ),
        ("12,31,4", "12,31", "train_label_coordinates.csv .*1 of 3 rows have fewer than 7 cells"),
    ],
)
def test_read_coordinates_wrong_rows_are_refused(root, old, new, message):
    _edit(root, "train_label_coordinates.csv", lambda text: text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        lumbar.read_coordinates(root)


# --- submissions -----------------------------------------------------------------------------------------------------

TOLD = [f"p_{grade}" for grade in lumbar.GRADES]
PLACE = ["study_id", "condition", "side", "level"]


def _answers(*studies):
    """Random answers to all targets of some studies, each other than the rest, in their order."""
    table = lumbar.long(pd.DataFrame({"study_id": studies} | dict.fromkeys(lumbar.TARGETS, 0.0)))
    table[TOLD] = np.random.default_rng(0).dirichlet([1, 1, 1], len(table))
    return table


def test_submission_one_study_has_the_rows_of_the_competition():
    table = _answers(44036939)
    table.loc[5, TOLD] = [0.5, 0.375, 0.125]
    found = lumbar.submission(table)
    assert list(found.columns) == ["row_id", "normal_mild", "moderate", "severe"] and len(found) == 25
    assert found.loc[[0, 5, 24], "row_id"].tolist() == [
        "44036939_spinal_canal_stenosis_l1_l2",
        "44036939_left_neural_foraminal_narrowing_l1_l2",
        "44036939_right_subarticular_stenosis_l5_s1",
    ]
    assert found.loc[5].tolist()[1:] == [0.5, 0.375, 0.125]
    assert lumbar.submission(table.iloc[:0]).empty


def test_submission_any_order_of_rows_keeps_studies_by_first_appearance():
    table = _answers("12", "7")
    expected = lumbar.submission(table)
    assert expected["row_id"].tolist() == [f"{study}_{target}" for study in ("12", "7") for target in lumbar.TARGETS]
    np.testing.assert_array_equal(expected.iloc[:, 1:], table[TOLD])
    mixed = table.iloc[[0, *np.random.default_rng(1).permutation(np.arange(1, 50))]]  # "12" still comes first
    pd.testing.assert_frame_equal(lumbar.submission(mixed), expected)
    assert lumbar.submission(table[::-1])["row_id"].iloc[0] == "7_spinal_canal_stenosis_l1_l2"


def test_submission_missing_side_and_number_as_id_change_nothing():
    table = _answers(12, 7)
    changed = table.assign(side=table["side"].replace("", np.nan), study_id=table["study_id"].astype("category"))
    pd.testing.assert_frame_equal(lumbar.submission(changed), lumbar.submission(_answers("12", "7")))


def test_read_submission_gives_the_answers_back(tmp_path):
    table = _answers("12", "7")
    lumbar.submission(table).to_csv(tmp_path / "submission.csv", index=False)
    lines = (tmp_path / "submission.csv").read_text().splitlines()
    assert lines[0] == "row_id,normal_mild,moderate,severe"
    assert lines[25].startswith("12_right_subarticular_stenosis_l5_s1,")
    found = lumbar.read_submission(tmp_path / "submission.csv")
    assert list(found.columns) == [*PLACE, *TOLD]
    assert found[PLACE].to_numpy().tolist() == table[PLACE].to_numpy().tolist()
    np.testing.assert_array_equal(found[TOLD], table[TOLD])  # to the bit: written as repr


def test_read_submission_other_order_bom_and_columns_change_nothing(tmp_path):
    path = tmp_path / "submission.csv"
    path.write_bytes(
        b"\xef\xbb\xbfsevere,remark,row_id,normal_mild,moderate\r\n"
        b"0.25,x,007_right_subarticular_stenosis_l5_s1,0.5,2.5e-1\r\n1,,007_spinal_canal_stenosis_l1_l2,0,0\r\n"
    )
    assert lumbar.read_submission(path).to_numpy().tolist() == [
        ["007", "subarticular_stenosis", "right", "l5_s1", 0.5, 0.25, 0.25],
        ["007", "spinal_canal_stenosis", "", "l1_l2", 0.0, 0.0, 1.0],
    ]
    path.write_text("row_id,normal_mild,moderate,severe\n")
    assert lumbar.read_submission(path).empty


@pytest.mark.parametrize("told", [[0.33, 0.33, 0.33], [0.34, 0.34, 0.33], [1, 0, 0]])
def test_submission_sums_of_rounded_values_are_taken(told):
    table = _answers(1)
    table[TOLD] = told
    np.testing.assert_array_equal(lumbar.submission(table).iloc[:, 1:], [told] * 25)


@pytest.mark.parametrize(
    "told", [[0.33, 0.33, 0.329], [0.5, np.nan, 0.5], [1.25, -0.25, 0], [np.inf, 0, 0], [1, 0, "none"], [1, 0, None]]
)
def test_submission_values_that_are_no_probabilities_are_refused_by_row_id(told):
    table = _answers(1).astype(dict.fromkeys(TOLD, object))
    table.loc[3, TOLD] = told
    with pytest.raises(
        ValueError, match=r"answers: 1 of 25 rows are no probab.*First: .*1_spinal_canal_stenosis_l4_l5: "
    ):
        lumbar.submission(table)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.drop(columns="p_Severe"), r"lacks the columns \['p_Severe'\]"),
        (lambda table: table.replace({"study_id": {"7": "7.0"}}), r"25 of 50 rows have a study_id .*First: \['7.0'"),
        (lambda table: table.assign(side="left"), r"10 of 50 rows are of no target.*'12', 'spinal_canal_s.*', 'left'"),
        (lambda table: table.replace("l4_l5", "l5_l6"), r"10 of 50 rows are of no target.*First: .*'', 'l5_l6'"),
        (
            lambda table: table.drop(index=[3, 40]),
            r"2 of 50 rows are absent.*\['12_spinal_canal_stenosis_l4_l5', '7_left",
        ),
        (lambda table: pd.concat([table, table[7:8]]), r"1 of 51 rows repeat .*\['12_left_neural.*_l3_l4'\]"),
    ],
)
def test_submission_wrong_tables_are_refused_by_row(edit, message):
    with pytest.raises(ValueError, match=message):
        lumbar.submission(edit(_answers("12", "7")))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("moderate", "Moderate", r"lacks the columns \['moderate'\]"),
        ("7_spinal", "x_spinal", r"column row_id: 1 of 25 values are not a study_id and a target.*row 2: 'x_spinal"),
        ("canal_stenosis_l2_l3", "canal_stenosis", r"column row_id: 1 of 25 .*row 3: '7_spinal_canal_stenosis'"),
        ("l1_l2,", "l1_l2_,", r"column row_id: 1 of 25 .*row 2: '7_spinal_canal_stenosis_l1_l2_'"),
        (
            "7_left_neural",
            "7_right_neural",
            r"has row_id twice 1 times.*row 12: 7_right_neural_foraminal_narrowing_l1_l2",
        ),
        (
            "0.5,0.25,0.25",
            "0.5,,0.25",
            r"1 of 25 rows are no probabilities.*7_spinal_canal_stenosis_l1_l2: \['0.5', '', ",
        ),
        ("0.5,0.25,0.25", "0.5,0.25,0.5", r"1 of 25 rows are no probabilities"),
        ("0.5,0.25,0.25", "0.75,0.5,-0.25", r"1 of 25 rows are no probabilities"),
    ],
)
def test_read_submission_wrong_files_are_refused_by_row(tmp_path, old, new, message):
    table = _answers("7")
    table[TOLD] = [0.5, 0.25, 0.25]
    path = tmp_path / "submission.csv"
    path.write_text(lumbar.submission(table).to_csv(index=False).replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        lumbar.read_submission(path)


def test_read_submission_absent_file_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="none.csv is absent; expected a CSV with the columns row_id, normal_mild"
    ):
        lumbar.read_submission(tmp_path / "none.csv")


# --- check and fetch -------------------------------------------------------------------------------------------------


def test_check_reads_every_file_of_a_series_and_names_what_is_not_described(root):
    (root / "lumbar/train_images/7/50").mkdir()
    (root / "lumbar/train_images/7/50/1.dcm").write_bytes(b"")
    (root / "lumbar/sample_submission.csv").write_text("row_id\n")
    counts, problems = datasets.check("lumbar", root)
    empty = problems[problems["problem"] == "empty file (0 bytes)"]
    assert len(empty) == 12  # all files of the six series
    assert problems.drop(empty.index)["file"].tolist() == ["lumbar/train_images/7/50/1.dcm"]
    by_class = counts.set_index("class")["images"]
    assert by_class["spinal_canal_stenosis"] == 4 and by_class["(all images)"] == 6


def test_fetch_is_refused_with_the_page(tmp_path):
    with pytest.raises(
        ValueError, match="only the page https://www.kaggle.com/competitions/rsna-2024.*; lay .* as lumb"
    ):
        datasets.fetch("lumbar", tmp_path, download=lambda _: pytest.fail("nothing to download"))


# --- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.timed
@pytest.mark.slow
def test_read_whole_set_takes_seconds(tmp_path):
    """1,975 studies of 6,294 series of 23 slices, empty: 4.5 s leaves room for a slow disk, headers read would not."""
    images, described = tmp_path / "lumbar/train_images", []
    for number in range(6_294):
        study, series = 1_000_000 + number % 1_975, 5_000_000 + number
        described.append((study, series, lumbar.MODALITIES[number % 3]))
        place = f"{images}/{study}/{series}"
        os.makedirs(place)
        for instance in range(1, 24):
            open(f"{place}/{instance}.dcm", "wb").close()
    table = pd.DataFrame(described, columns=["study_id", "series_id", "series_description"])
    table.to_csv(tmp_path / "lumbar/train_series_descriptions.csv", index=False)
    grades = pd.DataFrame(NORMAL, index=sorted(set(table["study_id"])), columns=list(lumbar.TARGETS))
    grades.rename_axis("study_id").to_csv(tmp_path / "lumbar/train.csv")
    start = time.perf_counter()
    frame = lumbar.read(tmp_path)
    seconds = time.perf_counter() - start
    assert len(frame) == 6_294 and frame["slices"].sum() == 6_294 * 23 and frame["study_id"].nunique() == 1_975
    assert seconds < 4.5


# --- real images -----------------------------------------------------------------------------------------------------


def test_read_real_counts_are_the_published_ones(real_data):
    if lumbar.folder(real_data) is None:
        pytest.skip("no lumbar images in KERASMED_REAL_DATA")
    studies = lumbar.read_studies(real_data)
    assert len(studies) == 1_975
    table = lumbar.long(studies)
    counts = [table.loc[table["condition"] == name, "grade"].value_counts().tolist() for name in lumbar.CONDITIONS]
    assert counts == [[8_664, 736, 470], [15_357, 3_564, 779], [13_733, 3_660, 1_840]]
    blanks = [int(table.loc[table["condition"] == name, "grade"].isna().sum()) for name in lumbar.CONDITIONS]
    assert blanks == [5, 50, 517]
