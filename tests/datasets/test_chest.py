import csv
import os
import time

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import datasets, manifest
from kerasmed.datasets import chest

START = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age"
SIZES = "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
# Header and what follows the cells that are read, in each row.
HEADERS = {
    "2020": (f"{START},Patient Gender,View Position,{SIZES}", ",2500,2048,0.168,0.168"),
    "trailing comma": (f"{START},Patient Gender,View Position,{SIZES},", ",2500,2048,0.168,0.168,"),
    "trailing comma of rows": (f"{START},Patient Gender,View Position,{SIZES}", ",2500,2048,0.168,0.168,,"),
    "one name quoted": (f'{START},Patient Sex,View Position,"OriginalImage[Width,Height]"', ",2500,2048"),
    "one cell quoted": (f'{START},Patient Sex,View Position,"OriginalImage[Width,Height]"', ',"2500,2048"'),
    "two names": (f"{START},Patient Sex,View Position,OriginalImageWidth,OriginalImageHeight", ",2500,2048"),
    "nothing": (f"{START},Patient Sex,View Position", ""),
}
# Patient 7 out of order and with a gap from 1 to 4, patient 12 with one visit, patient 30 with two in the test list.
ROWS = (
    "00000007_002.png,Mass|Nodule,4,7,60,M,AP",
    "00000007_000.png,No Finding,0,7,58,M,PA",
    "00000007_001.png,Effusion|Mass,1,7,58,M,PA",
    "00000012_000.png,Edema|Pleural_Thickening,3,12,33,F,AP",
    "00000030_001.png,No Finding,1,30,81,F,PA",
    "00000030_000.png,Hernia,0,30,80,F,PA",
)
NAMES = [row.split(",")[0] for row in ROWS]
STUDIES = [name.removesuffix(".png") for name in NAMES]
FINDINGS = list(chest.FINDINGS)
CLASSES = list(chest.CLASS_NAMES["frontal"])
PREVIOUS = list(chest.PREVIOUS)
BOXES = (
    "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    "00000030_000.png,Infiltrate,225.5,547,86.75,79\n"
    "00000030_001.png,Pneumonia,0,1.5,20,1020\n"
)


def _write_tables(root, rows=ROWS, *, header="2020", name="Data_Entry_2017_v2020.csv", test="00000030"):
    home = root / "chest"
    home.mkdir(parents=True, exist_ok=True)
    start, end = HEADERS[header]
    (home / name).write_text("\n".join([start, *(f"{row}{end}" for row in rows), ""]))
    names = [row.split(",")[0] for row in rows]
    for file, listed in {
        "train_val_list.txt": [name for name in names if not name.startswith(test)],
        "test_list.txt": [name for name in names if name.startswith(test)],
    }.items():
        (home / file).write_text("\n".join(listed))  # the last line has no end, as in the real lists


def _write_images(root, places):
    for name, place in places.items():
        (root / "chest" / place).mkdir(parents=True, exist_ok=True)
        (root / "chest" / place / name).write_bytes(b"x")


@pytest.fixture
def root(tmp_path):
    """Six images of three patients, all in images/, with both lists and two boxes."""
    root = tmp_path / "data"
    _write_tables(root)
    _write_images(root, dict.fromkeys(NAMES, "images"))
    (root / "chest/BBox_List_2017.csv").write_text(BOXES)
    return root


def _replaced(*changes):
    """The rows with the cells at (row, column) replaced."""
    cells = [row.split(",") for row in ROWS]
    for row, column, value in changes:
        cells[row][column] = value
    return [",".join(row) for row in cells]


def _positive(row, columns):
    return {name.removeprefix("previous_") for name in columns if row[name] == 1}


# --- read_table ------------------------------------------------------------------------------------------------------


def test_read_table_gives_a_manifest_in_the_table_s_order(root, caplog):
    table = chest.read_table(root)
    assert list(table.columns) == [
        *manifest.COLUMNS,
        *("view", "age", "sex", "follow_up"),
        *CLASSES,
        "has_previous",
        *PREVIOUS,
        "present",
    ]
    assert list(table.index) == list(range(6)) and not caplog.text
    assert table["study_id"].tolist() == STUDIES
    assert table["image_path"].tolist() == [f"chest/images/{name}" for name in NAMES]
    assert table["patient_id"].tolist() == ["00000007"] * 3 + ["00000012"] + ["00000030"] * 2
    assert table["group_id"].tolist() == table["patient_id"].tolist()
    assert table["split"].tolist() == ["train"] * 4 + ["test"] * 2
    assert table["view"].tolist() == ["AP", "PA", "PA", "AP", "PA", "PA"]
    assert table["sex"].tolist() == ["M"] * 3 + ["F"] * 3
    assert table["age"].tolist() == [60, 58, 58, 33, 81, 80]
    assert table["follow_up"].tolist() == [4, 0, 1, 3, 1, 0]
    assert [_positive(row, CLASSES) for _, row in table.iterrows()] == [
        {"Mass", "Nodule"},
        {"No Finding"},
        {"Effusion", "Mass"},
        {"Edema", "Pleural_Thickening"},
        {"No Finding"},
        {"Hernia"},
    ]
    assert table[[*CLASSES, "has_previous", *PREVIOUS]].isin((0, 1)).all(axis=None)
    assert table["present"].dtype == bool and table["present"].all()
    assert set(table[["age", *CLASSES, "has_previous", *PREVIOUS]].dtypes.astype(str)) == {"float64"}
    assert table["follow_up"].dtype == np.int64


def test_read_table_previous_visit_is_that_of_the_next_lower_number(root):
    table = chest.read_table(root).set_index("study_id")
    assert table["has_previous"].to_dict() == dict(zip(STUDIES, [1, 0, 1, 0, 1, 0]))
    assert {study: _positive(row, PREVIOUS) for study, row in table.iterrows()} == {
        "00000007_002": {"Effusion", "Mass"},  # number 4 after 1
        "00000007_000": set(),
        "00000007_001": set(),  # after an image without a finding
        "00000012_000": set(),  # number 3, but the first
        "00000030_001": {"Hernia"},
        "00000030_000": set(),
    }


def test_read_table_previous_visits_do_not_depend_on_the_order_of_rows(tmp_path, rng):
    """30 patients of 1 to 9 visits: each row's previous labels are those of the row before it, found one by one."""
    visits = [(patient, number) for patient in range(1, 31) for number in rng.choice(50, rng.integers(1, 10), False)]
    found = {visit: rng.choice(FINDINGS, rng.integers(1, 4), replace=False).tolist() for visit in visits}
    rows = [
        f"{patient:08d}_{number:03d}.png,{'|'.join(found[patient, number])},{number},{patient},50,M,PA"
        for patient, number in rng.permutation(visits)
    ]
    _write_tables(tmp_path, rows)
    for row in chest.read_table(tmp_path).to_dict("records"):
        patient = int(row["patient_id"])
        earlier = [number for other, number in visits if other == patient and number < row["follow_up"]]
        assert row["has_previous"] == bool(earlier)
        assert _positive(row, PREVIOUS) == (set(found[patient, max(earlier)]) if earlier else set())


def test_read_table_previous_visit_counts_where_its_image_is_absent(root):
    (root / "chest/images/00000007_001.png").unlink()
    (root / "chest/images/00000007_000.png").unlink()
    table = chest.read_table(root)
    assert table["present"].tolist() == [True, False, False, True, True, True]
    assert table["image_path"].tolist() == [f"chest/images/{name}" for name in NAMES]
    assert _positive(table.iloc[0], PREVIOUS) == {"Effusion", "Mass"}
    read = chest.read(root)
    assert _positive(read.iloc[0], PREVIOUS) == {"Effusion", "Mass"} and read["has_previous"].iloc[0] == 1


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"])
def test_read_table_gives_the_same_for_every_spelling_of_the_header(root, tmp_path, header, name):
    other = tmp_path / "other"
    _write_tables(other, header=header, name=name)
    _write_images(other, dict.fromkeys(NAMES, "images"))
    pd.testing.assert_frame_equal(chest.read_table(other), chest.read_table(root))
    assert chest.folder(other) == other / "chest"


def test_read_table_gives_the_same_whatever_wrote_the_csv(root):
    expected = chest.read_table(root)
    path = root / "chest/Data_Entry_2017_v2020.csv"
    lines = path.read_text().splitlines()
    lines[0] = "\ufeff" + lines[0].replace(",", " , ")
    lines[1] = '" 00000007_002.png", Mass | Nodule ,4.0,00000007,60.0, M , AP'
    lines[4:4] = ["", " ", ",,,,,,,,,,", " , ,"]
    path.write_bytes("\r\n".join(lines).encode())
    for name in chest.LISTS.values():
        text = (root / "chest" / name).read_text()
        (root / "chest" / name).write_bytes(("\ufeff" + text.replace("\n", " \r\n\r\n") + "\r\n").encode())
    pd.testing.assert_frame_equal(chest.read_table(root), expected)


def test_read_table_ages_are_years_and_unknown_above_100(tmp_path, caplog):
    written = ["058Y", "013M", "011D", "026W", "100", "101", "414Y", "1300M", "", "old", "0", "NA", "001Y", "-3"]
    _write_tables(tmp_path, [f"{i:08d}_000.png,Mass,0,{i},{age},M,PA" for i, age in enumerate(written, 1)])
    nan = np.nan
    expected = [58, 13 / 12, 11 / 365.25, 26 * 7 / 365.25, 100, nan, nan, nan, nan, nan, 0, nan, 1, nan]
    # Exact but for the rounding of one division and multiplication.
    np.testing.assert_allclose(chest.read_table(tmp_path)["age"], expected, rtol=1e-15)
    assert [record.getMessage() for record in caplog.records] == [
        "5 of 14 ages are over 100 years or no age, and count as unknown: ['101', '414Y', '1300M', 'old', '-3']"
    ]


def test_read_table_unknown_spellings_of_view_and_sex_are_missing_and_counted(tmp_path, caplog):
    _write_tables(tmp_path, _replaced((0, 6, "LL"), (1, 6, ""), (4, 6, "LL"), (3, 5, "female"), (5, 5, "NA")))
    table = chest.read_table(tmp_path)
    assert table["view"].isna().tolist() == [True, True, False, False, True, False]
    assert table["sex"].isna().tolist() == [False, False, False, True, False, True]
    assert table["view"].dropna().tolist() == ["PA", "AP", "PA"] and table["sex"].dropna().tolist() == [*"MMMF"]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 6 cells of view are none of PA, AP and count as unknown: ['LL']",
        "1 of 6 cells of sex are none of F, M and count as unknown: ['female']",
    ]


def test_read_table_finds_images_in_either_layout(tmp_path):
    _write_tables(tmp_path)
    places = dict(zip(NAMES, ["images_001/images", "images_001/images", "images_012/images", "images"]))
    _write_images(tmp_path, places)
    (tmp_path / "chest/images" / NAMES[4]).mkdir()  # a folder is no image
    (tmp_path / "chest/images" / NAMES[5]).symlink_to("nowhere")  # a link is: decoding says what is wrong with it
    table = chest.read_table(tmp_path)
    assert table["image_path"].tolist() == [
        *(f"chest/{places[name]}/{name}" for name in NAMES[:4]),
        *(f"chest/images/{name}" for name in NAMES[4:]),
    ]
    assert table["present"].tolist() == [True, True, True, True, False, True]


def test_read_table_counts_images_that_are_in_no_table_or_twice(root, caplog):
    _write_images(root, {"00000099_000.png": "images", "b.PNG": "images", NAMES[0]: "images_002/images"})
    for junk in (".DS_Store", "._0.png", "Thumbs.db"):
        (root / "chest/images" / junk).write_bytes(b"x")
    assert chest.read_table(root)["image_path"][0] == f"chest/images/{NAMES[0]}"
    assert [record.getMessage() for record in caplog.records] == [
        "2 image files are not in the table and were left out: ['00000099_000.png', 'b.PNG']",
        "1 image files lie in an earlier folder too and were left out: ['images_002/images/00000007_002.png']",
    ]


def test_read_table_counts_names_of_the_lists_without_a_row(root, caplog):
    path = root / "chest/test_list.txt"
    path.write_text(path.read_text() + "\n00000098_000.png\n00000098_000.png\n")
    assert len(chest.read_table(root)) == 6
    assert "1 images of the official lists are not in Data_Entry_2017_v2020.csv: ['00000098_000.png']" in caplog.text


def test_read_table_a_patient_in_both_lists_is_left_to_the_audit(tmp_path):
    _write_tables(tmp_path, test="00000030_000")
    assert chest.read_table(tmp_path)["split"].tolist()[-2:] == ["train", "test"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_replaced((0, 1, "Mass|Nodul"), (2, 1, "mass")), "has unknown labels in 2 of 6 rows .'Mass.Nodul', 'mass'.; "),
        (_replaced((0, 1, "Mass|"), (2, 1, "Mass")), r"unknown labels in 1 of 6 .*First: \['00000007_002.png'\]"),
        (_replaced((3, 1, ""), (4, 1, "NA")), "Finding Labels is blank in 2 of 6 rows .*write 'No Finding' where .*"),
        (_replaced((3, 1, " "), (4, 1, "nan")), r"First: \['00000012_000.png', '00000030_001.png'\]"),
        (_replaced((1, 1, "No Finding|Mass")), r"findings beside 'No Finding' in 1 of 6 .*First: \['00000007_000.png"),
        (_replaced((1, 3, "")), "Patient ID is no whole number in 1 of 6 rows"),
        (
            _replaced((1, 3, "seven"), (5, 3, "7.5")),
            r"Patient ID is no whole .*'seven', '7.5'.*\['00000007_000.png', '",
        ),
        (_replaced((1, 2, "-1")), "Follow-up # is no whole number in 1 of 6 rows .'-1'.; write digits"),
        (_replaced((1, 2, "1")), r"1 images a patient and follow-up number .*First: \['00000007_001.png'\]"),
        ((*ROWS, ROWS[1]), r"1 images that it has listed before; keep one .*First: \['00000007_000.png'\]"),
        (_replaced((2, 0, "")), r"1 rows without an image; write the file's name. First rows: \[3\]"),
        ((*ROWS, "../up.png,Mass,0,99,1,M,PA"), "image_path leaves the data root"),
        ((), "lists no images"),
    ],
)
def test_read_table_cells_that_do_not_fit_are_refused(tmp_path, rows, message):
    _write_tables(tmp_path, rows)
    with pytest.raises(ValueError, match=message):
        chest.read_table(tmp_path)


def test_read_table_columns_that_do_not_fit_are_refused(root):
    path = root / "chest/Data_Entry_2017_v2020.csv"
    text = path.read_text()
    path.write_text(text.replace("Patient Gender", "Gender").replace("Finding Labels", "Labels"))
    with pytest.raises(
        ValueError, match=r"lacks the columns \['Finding Labels', 'Patient Gender or Patient Sex'\]; it has \['Image In"
    ):
        chest.read_table(root)
    for content, message in ((b"", "is empty; write the columns Image Index, "), (b"\xff\xfe\x00", "is not in UTF-8")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"Data_Entry_2017_v2020.csv {message}"):
            chest.read_table(root)
    path.write_text(text.replace("Patient Age", "Patient ID"))
    with pytest.raises(ValueError, match=r"lacks the columns \['Patient Age'\]"):
        chest.read_table(root)
    path.write_text(text.replace("View Position,", "View Position,Patient ID,"))
    with pytest.raises(ValueError, match=r"has the columns \['Patient ID'\] twice; rename or remove one"):
        chest.read_table(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",58,M,PA,2500,2048,0.168,0.168", ",58", "2 of 6 rows have fewer than 7 cells, or more than 11 .line 3 has 5"),
        (
            ",58,M,PA",
            ",57,5,M,PA",
            "2 of 6 rows have .*, or more than 11 .line 3 has 12, line 4 has 12.. Complete a row",
        ),
        ("60,M,AP", f"{'6' * 1001},M,AP", "line 2: a cell of 1,001 characters in column Patient Age"),
    ],
)
def test_read_table_rows_that_are_cut_or_shifted_are_refused_by_line(root, old, new, message):
    path = root / "chest/Data_Entry_2017_v2020.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=f"Data_Entry_2017_v2020.csv.*{message}"):
        chest.read_table(root)


def test_read_table_lists_that_are_no_text_are_refused(root):
    (root / "chest/test_list.txt").write_bytes("Schädel.png".encode("latin-1"))
    with pytest.raises(ValueError, match="test_list.txt is not in UTF-8 .byte 0xe4 in line 1.; save it"):
        chest.read_table(root)


def test_read_table_several_tables_are_refused(root):
    (root / "chest/Data_Entry_2017.csv").write_text("")
    with pytest.raises(ValueError, match=r"\['Data_Entry_2017.csv', 'Data_Entry_2017_v2020.csv'\].*; keep one"):
        chest.read_table(root)
    assert chest.folder(root) == root / "chest"


def test_read_table_images_in_no_list_or_in_both_are_refused(root):
    train, test = (root / "chest" / name for name in chest.LISTS.values())
    listed = test.read_text()
    test.write_text(NAMES[5])
    with pytest.raises(
        ValueError, match=r"1 of 6 images that are neither in .* nor in .*First: \['00000030_001.png'\]"
    ):
        chest.read_table(root)
    test.write_text(listed + "\n" + NAMES[1])
    with pytest.raises(ValueError, match=r"1 images are in .* and in test_list.txt .*First: \['00000007_000.png'\]"):
        chest.read_table(root)
    train.unlink()
    with pytest.raises(
        FileNotFoundError, match="train_val_list.txt is absent; .*wants train_val_list.txt and test_list"
    ):
        chest.read_table(root)


def test_folder_and_read_table_without_a_table(root):
    assert chest.folder(root) == chest.part_folder(root, "frontal") == root / "chest"
    (root / "chest/Data_Entry_2017_v2020.csv").unlink()
    assert chest.folder(root) is None and chest.folder(root / "nowhere") is None
    with pytest.raises(FileNotFoundError, match=r"no Data_Entry_2017\*.csv in .*chest; .* Expected chest/Data_Entry"):
        chest.read_table(root)


# --- read ------------------------------------------------------------------------------------------------------------


def test_read_is_the_table_without_absent_images(root, caplog):
    table = chest.read_table(root)
    pd.testing.assert_frame_equal(chest.read(root), table.drop(columns="present"))
    assert not caplog.text
    for name in NAMES[1:5]:
        (root / "chest/images" / name).unlink()
    read = chest.read(root)
    assert [record.getMessage() for record in caplog.records] == [
        "4 of 6 images listed are absent and were left out (a partial download)"
    ]
    pd.testing.assert_frame_equal(read, table.drop(columns="present").iloc[[0, 5]].reset_index(drop=True))
    assert manifest.validate(read, CLASSES) is read


def test_read_without_any_image_and_unknown_part_are_refused(root):
    for name in NAMES:
        (root / "chest/images" / name).unlink()
    with pytest.raises(FileNotFoundError, match="none of the 6 images listed lies under .*chest; expected chest/Data"):
        chest.read(root)
    with pytest.raises(ValueError, match="part 'lateral' is unknown; known is frontal"):
        chest.read(root, "lateral")


def test_check_absent_images_are_no_problem(root):
    (root / "chest/images" / NAMES[0]).unlink()
    for name in NAMES[1:]:
        cv2.imwrite(str(root / "chest/images" / name), np.arange(64, dtype=np.uint8).reshape(8, 8))
    (root / "chest/README_CHESTXRAY.pdf").write_bytes(b"x")
    counts, problems = datasets.check("chest", root)
    assert problems.empty
    table = counts.pivot(index="class", columns="split", values="images")
    assert table.loc[["Mass", "No Finding", "(all images)"], "train"].tolist() == [1, 1, 3]
    assert table.loc[["Hernia", "No Finding", "(none)", "(all images)"], "test"].tolist() == [1, 1, 0, 2]
    (root / "chest/images/00000099_000.png").write_bytes(b"x")
    (root / "chest/images" / NAMES[1]).write_bytes(b"")
    problems = datasets.check("chest", root)[1].set_index("file")["problem"]
    assert set(problems.index) == {"chest/images/00000007_000.png", "chest/images/00000099_000.png"}
    assert "empty file" in problems["chest/images/00000007_000.png"]
    assert problems["chest/images/00000099_000.png"].startswith("left out")


# --- read_boxes ------------------------------------------------------------------------------------------------------


def test_read_boxes_numbers_are_known_by_their_place(root):
    expected = pd.DataFrame(
        {
            "study_id": ["00000030_000", "00000030_001"],
            "label": ["Infiltration", "Pneumonia"],
            "x": [225.5, 0],
            "y": [547, 1.5],
            "width": [86.75, 20],
            "height": [79.0, 1020],
        }
    )
    pd.testing.assert_frame_equal(chest.read_boxes(root), expected)
    path = root / "chest/BBox_List_2017.csv"
    path.write_text(
        "\ufeff" + BOXES.replace("\n", ",,,\r\n").replace("Bbox [x,y,w,h],,,", '"Bbox [x,y,w,h]"') + ",,\r\n"
    )
    pd.testing.assert_frame_equal(chest.read_boxes(root), expected)


@pytest.mark.parametrize("text", [None, BOXES.splitlines()[0], BOXES.splitlines()[0] + "\n"])
def test_read_boxes_without_any_has_the_columns(root, text):
    path = root / "chest/BBox_List_2017.csv"
    path.unlink() if text is None else path.write_text(text)
    boxes = chest.read_boxes(root)
    assert boxes.empty and tuple(boxes.columns) == chest.BOX_COLUMNS
    assert boxes.dtypes.astype(str).tolist() == ["str", "str", *["float64"] * 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOXES.replace("547", "low"), r"1 boxes that are not four numbers .*First: \['00000030_000.png'\]"),
        (BOXES.replace("1.5", ""), r"1 boxes that are not .*First: \['00000030_001.png'\]"),
        (BOXES.replace(",1020", ""), "1 of 2 rows have fewer than 6 cells, .*line 3 has 5"),
        (BOXES.replace("86.75", "0").replace(",20,", ",-20,"), "2 boxes that are not .* with an area"),
        (BOXES.replace("225.5", "inf"), "1 boxes that are not"),
        (BOXES.replace("Pneumonia", "Edma"), r"Finding Label is no known finding in 1 of 2 rows .'Edma'.; known are"),
        (BOXES.replace("Finding Label", "Label"), r"lacks the columns \['Finding Label'\]; it has \['Image Index'"),
        (BOXES.replace("00000030_001.png", ""), r"1 rows without an image; .* First rows: \[2\]"),
    ],
)
def test_read_boxes_that_do_not_fit_are_refused(root, text, message):
    (root / "chest/BBox_List_2017.csv").write_text(text)
    with pytest.raises(ValueError, match=f"BBox_List_2017.csv.*{message}"):
        chest.read_boxes(root)


# --- the real set ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_table(real_data):
    if chest.folder(real_data) is None:
        pytest.skip("no chest tables in KERASMED_REAL_DATA")
    return chest.read_table(real_data)


@pytest.fixture(scope="module")
def real_rows(real_data):
    """The rows of the CSV as dictionaries, read by other means."""
    (path,) = (real_data / "chest").glob("Data_Entry_2017*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_read_table_real_counts_are_the_published_ones(real_table):
    assert len(real_table) == 112_120 and real_table["patient_id"].nunique() == 30_805
    assert real_table["split"].value_counts().to_dict() == {"train": 86_524, "test": 25_596}
    assert real_table.groupby("patient_id")["split"].nunique().max() == 1
    # "89 % of its images are follow-ups"
    assert real_table.loc[real_table["split"] == "test", "has_previous"].mean() == pytest.approx(0.89, abs=0.005)
    assert real_table[["view", "age", "sex"]].notna().all(axis=None)
    assert not real_table.duplicated(["patient_id", "follow_up"]).any()


def test_read_table_real_cells_equal_those_of_the_csv(real_table, real_rows):
    assert [f"{study}.png" for study in real_table["study_id"]] == [row["Image Index"] for row in real_rows]
    sets = [row["Finding Labels"].split("|") for row in real_rows]
    for name in CLASSES:
        np.testing.assert_array_equal(real_table[name], [name in labels for labels in sets])
    assert real_table["age"].tolist() == [int(row["Patient Age"]) for row in real_rows]
    assert real_table["view"].tolist() == [row["View Position"] for row in real_rows]
    assert real_table["sex"].tolist() == [row["Patient Gender"] for row in real_rows]
    assert real_table["follow_up"].tolist() == [int(row["Follow-up #"]) for row in real_rows]
    assert real_table["patient_id"].tolist() == [row["Patient ID"].zfill(8) for row in real_rows]


def test_read_table_real_previous_visits(real_table, real_rows):
    first = real_table[real_table["patient_id"] == "00000001"]
    assert [_positive(row, CLASSES) for _, row in first.iterrows()] == [
        {"Cardiomegaly"},
        {"Cardiomegaly", "Emphysema"},
        {"Cardiomegaly", "Effusion"},
    ]
    assert [_positive(row, PREVIOUS) for _, row in first.iterrows()] == [
        set(),
        {"Cardiomegaly"},
        {"Cardiomegaly", "Emphysema"},
    ]
    assert first["has_previous"].tolist() == [0, 1, 1]
    # File 000 of patient 3 is the last visit, and what is found before it is no first visit's zeros.
    last = real_table.set_index("study_id").loc["00000003_000"]
    assert (last["follow_up"], last["has_previous"], _positive(last, PREVIOUS)) == (7, 1, {"Hernia"})
    # Numbers run from 0 without a gap there, so the visit before number n is number n - 1.
    labels = {(row["Patient ID"], int(row["Follow-up #"])): set(row["Finding Labels"].split("|")) for row in real_rows}
    before = [labels.get((row["Patient ID"], int(row["Follow-up #"]) - 1)) for row in real_rows]
    np.testing.assert_array_equal(real_table["has_previous"], [found is not None for found in before])
    for name in FINDINGS:
        np.testing.assert_array_equal(real_table[f"previous_{name}"], [name in (found or ()) for found in before])


def test_read_real_keeps_the_images_that_are_there(real_data, real_table, caplog):
    read = chest.read(real_data)
    files = {name for _, _, names in os.walk(real_data / "chest") for name in names if name.endswith(".png")}
    assert {f"{study}.png" for study in read["study_id"]} == files and len(read) == real_table["present"].sum()
    assert all((real_data / path).is_file() for path in read["image_path"])
    if len(files) == 90:
        assert "112,030 of 112,120 images listed are absent and were left out (a partial download)" in caplog.text


def test_read_boxes_real_lie_on_test_images(real_data, real_table):
    boxes = chest.read_boxes(real_data)
    assert len(boxes) == 984 and boxes["study_id"].nunique() == 880
    known = real_table.set_index("study_id").loc[boxes["study_id"]]
    assert (known["split"] == "test").all()
    assert boxes["label"].value_counts().to_dict() == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    assert all(
        known[name].iloc[place] == 1 for place, name in enumerate(boxes["label"])
    )  # each is a label of its image
    ends = boxes[["x", "y"]].to_numpy() + boxes[["width", "height"]].to_numpy()
    assert (boxes[["x", "y"]] >= 0).all(axis=None) and ends.max() < 1024
    assert boxes.iloc[0].tolist() == [
        "00013118_008",
        "Atelectasis",
        *(225.084745762712, 547.019216763771, 86.7796610169491, 79.1864406779661),
    ]


@pytest.mark.timed
def test_read_table_real_takes_less_than_three_seconds(real_data, real_table):
    seconds = []
    for _ in range(2):  # a second try, as the machine may be busy
        start = time.perf_counter()
        chest.read_table(real_data)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 3:
            return
    pytest.fail(f"reading took {seconds} s")
