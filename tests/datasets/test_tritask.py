import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import manifest
from kerasmed.datasets import tritask

NAMES = list(tritask.CLASS_NAMES["scans"])


@pytest.fixture
def root(tmp_path):
    """3 training, 2 validation and 2 test images, with their tables and junk beside them."""
    home = tmp_path / "data/tritask"
    for folder, ids in {"train_images": "cab", "val_images": "de", "test_images": "gf"}.items():
        (home / folder).mkdir(parents=True)
        for name in ids:
            cv2.imwrite(str(home / folder / f"0{name}.png"), np.full((64, 64), ord(name), np.uint8))
        for junk in (".DS_Store", "._0a.png"):
            (home / folder / junk).write_bytes(b"x")
    (home / "train_labels.csv").write_text("id,label1,label2,label3\n0c.png,1,1,1\n0a.png,0,0,0\n0b.png,1,0,1\n")
    (home / "val_labels.csv").write_text("id,label1,label2,label3\n0d.png,0,1,0\n0e.png,1,0,0\n")
    (home / "sample_submission.csv").write_text("id,label1,label2,label3\n0g.png,0,0,0\n0f.png,0,0,0\n")
    return tmp_path / "data"


def _write(root, name, text):
    (root / "tritask" / name).write_text(text)


# --- read ------------------------------------------------------------------------------------------------------------


def test_read_lists_splits_in_order_with_labels(root):
    frame = tritask.read(root)
    assert list(frame.columns) == [*manifest.COLUMNS, *NAMES] and list(frame.index) == list(range(7))
    assert frame["image_path"].tolist() == [
        *(f"tritask/train_images/0{name}.png" for name in "abc"),
        *(f"tritask/val_images/0{name}.png" for name in "de"),
        *(f"tritask/test_images/0{name}.png" for name in "fg"),
    ]
    assert frame["split"].tolist() == ["train"] * 3 + ["valid"] * 2 + ["test"] * 2
    expected = [[0, 0, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 0], *[[np.nan] * 3] * 2]
    np.testing.assert_array_equal(frame[NAMES].to_numpy(float), expected)
    assert set(frame[NAMES].dtypes.astype(str)) == {"float64"}
    assert frame[["patient_id", "study_id", "group_id"]].isna().all(axis=None)
    assert tritask.folder(root) == tritask.part_folder(root, "scans") == root / "tritask"


def test_read_without_test_images_and_sample_gives_labelled_images_only(root):
    for path in (root / "tritask/test_images").iterdir():
        path.unlink()
    assert tritask.read(root)["split"].tolist() == ["train"] * 3 + ["valid"] * 2  # the sample alone gives no rows
    (root / "tritask/test_images").rmdir()
    (root / "tritask/sample_submission.csv").unlink()
    assert len(tritask.read(root)) == 5


def test_read_ids_without_a_file_stay_rows(root):
    (root / "tritask/train_images/0a.png").unlink()
    (root / "tritask/test_images/0f.png").unlink()
    frame = tritask.read(root)
    assert len(frame) == 7 and frame["image_path"].iloc[0] == "tritask/train_images/0a.png"
    assert frame.loc[frame["split"] == "test", "image_path"].tolist() == [
        "tritask/test_images/0f.png",
        "tritask/test_images/0g.png",
    ]


def test_read_gives_the_same_whatever_wrote_the_csv(root):
    expected = tritask.read(root)
    lines = ["\ufeffid , label1,label2,label3,note", "0b,1.0, 0,1,x", "", "0a,0,0,0,", " ", ",,,,", "0c.png,1,1,1,", ""]
    (root / "tritask/train_labels.csv").write_bytes("\r\n".join(lines).encode())
    pd.testing.assert_frame_equal(tritask.read(root), expected)


def test_read_ids_are_text(root):
    """Names that a number would lose its zeros of, and that pandas would take for missing."""
    folder = root / "tritask/val_images"
    (folder / "0d.png").rename(folder / "007.png")
    (folder / "0e.png").rename(folder / "NA.png")
    _write(root, "val_labels.csv", "id,label1,label2,label3\n007,0,1,0\nNA,1,0,0\n")
    frame = tritask.read(root)
    assert frame["image_path"].tolist()[3:5] == ["tritask/val_images/007.png", "tritask/val_images/NA.png"]
    assert frame["label2"].tolist()[3:5] == [1, 0]


def test_read_leaves_junk_out_and_says_so(root, caplog):
    (root / "tritask/train_images/notes.txt").write_text("x")
    (root / "tritask/val_images/more.png").mkdir()
    assert len(tritask.read(root)) == 7
    assert "2 entries are no images" in caplog.text
    assert "train_images/notes.txt" in caplog.text and "val_images/more.png" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label1,label3\n0a.png,1,1\n", r"train_labels.csv lacks the columns \['label2'\]; it has \['id', 'label1'"),
        ("", "train_labels.csv is empty; write the columns id, label1, label2, label3"),
        ("id,label1,label2,label3\n0a.png,1,1,1\n0b.png,0,0,0,0,0\n", "train_labels.csv is no readable CSV: .*line 3"),
        ("id,label1,label2,label3\n0a.png,1,1,1\n0b.png,0,0,0\n0a.png,1,0,0\n", r"1 rows whose id is given before"),
        ("id,label1,label2,label3\n0a,1,1,1\n0b.png,0,0,0\n0a.png,1,0,0\n", r"First: \['0a.png'\]"),
        ("id,label1,label2,label3\n0a.png,1,1,1\n0b.png,0,2,no\n0c.png,1,1,1\n", "2 labels other than 0 and 1"),
        (
            "id,label1,label2,label3\n0a.png,1,1,1\n0b.png,0,2,no\n0c.png,1,1,1\n",
            "First: 0b.png label2 '2', 0b.png",
        ),
        ("id,label1,label2,label3\n0a.png,1,1,1\n0b.png,0,,0\n0c.png,1,1,\n", "2 blank labels; .*First: 0b.png label2"),
        (
            "id,label1,label2,label3\n0a.png,1,1,1\n0c.png,1,1\n",
            "train_labels.csv .*1 of 2 rows have fewer than 4 cells",
        ),
        ("id,label1,label1,label2,label3\n0a.png,0,1,1,1\n", r"has the columns \['label1'\] twice; rename or remove"),
        ("id,label1,label2,label3\n,1,1,1\n0b.png,0,1,0\n", r"1 rows without an id; .*First rows: \[1\]"),
        ("id,label1,label2,label3\n0c.png,1,1,1\n", r"no row for 2 of 3 images .*First: \['0a.png', '0b.png'\]"),
    ],
)
def test_read_table_that_does_not_fit_is_refused(root, text, message):
    _write(root, "train_labels.csv", text)
    with pytest.raises(ValueError, match=message):
        tritask.read(root)


def test_read_absent_files_and_unknown_part_are_refused(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no images of tritask under .*train_images; .*Expected tritask/"):
        tritask.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="part 'images' is unknown; known is scans"):
        tritask.read(root, "images")
    (root / "tritask/val_labels.csv").unlink()
    with pytest.raises(FileNotFoundError, match="val_labels.csv is absent; the 2 images beside it need one"):
        tritask.read(root)
    for path in (root / "tritask/val_images").glob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no images of tritask under .*val_images"):
        tritask.read(root)
    assert tritask.folder(tmp_path / "nowhere") is None


def test_read_real_counts(real_data):
    if tritask.folder(real_data) is None:
        pytest.skip("no tritask images in KERASMED_REAL_DATA")
    counts = tritask.read(real_data)["split"].value_counts()
    assert (counts["train"], counts["valid"]) == (12_000, 3_000)


# --- submission ------------------------------------------------------------------------------------------------------


def _answers(ids=("0f.png", "0g.png")):
    """label1 only for the first id, label3 only for the second."""
    return pd.DataFrame([[1, 0, 0], [0, 0, 1]], index=list(ids), columns=NAMES)


def test_read_sample_keeps_spelling_and_order(root):
    sample = tritask.read_sample(root)
    assert list(sample.columns) == ["id", *NAMES] and sample["id"].tolist() == ["0g.png", "0f.png"]
    _write(root, "sample_submission.csv", "\ufeffid,label3,label2,label1\r\n01,0,0.5,\r\n\r\n002,0,0,0\r\n")
    sample = tritask.read_sample(root)
    assert list(sample.columns) == ["id", "label3", "label2", "label1"] and sample["id"].tolist() == ["01", "002"]
    (root / "tritask/sample_submission.csv").unlink()
    assert tritask.read_sample(root) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label1,label2\n", r"lacks the columns \['label3'\]"),
        ("id,label1,label2,label3,usage\n1,0,0,0,x\n", r"has the columns \['usage'\] beside id, label1"),
        ("id,label1,label2,label3\n", "has no rows; expected one for each test image"),
        ("id,label1,label2,label3\n1,0,0,0\n2,0,0,0\n1,0,0,0\n", r"1 rows whose id is given before.*\['1'\]"),
    ],
)
def test_read_sample_that_is_no_form_is_refused(root, text, message):
    _write(root, "sample_submission.csv", text)
    with pytest.raises(ValueError, match=message):
        tritask.read_sample(root)


def test_submission_takes_the_sample_s_order_and_columns(root):
    sample = tritask.read_sample(root)
    answers = _answers().assign(p=0.5)
    answers.loc["other.png"] = [1, 1, 1, 0.5]  # not asked for
    table = tritask.submission(sample, answers)
    assert table.to_csv(index=False) == "id,label1,label2,label3\n0g.png,0,0,1\n0f.png,1,0,0\n"
    assert tritask.submission(sample, answers > 0).equals(table)  # booleans count as 0 and 1
    bare = sample[["label3", "id", "label1", "label2"]].assign(id=["0g", "0f"])
    assert tritask.submission(bare, answers).to_csv(index=False) == "label3,id,label1,label2\n1,0g,0,0\n0,0f,1,0\n"


def test_submission_read_back_passes_the_check(root, tmp_path):
    sample = tritask.read_sample(root)
    tritask.submission(sample, _answers()).to_csv(tmp_path / "submission.csv", index=False)
    tritask.check_submission(pd.read_csv(tmp_path / "submission.csv", dtype={"id": str}), sample)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (_answers().drop(columns="label2"), r"`answers` lacks the columns \['label2'\]"),
        (_answers(("0f.png", "x.png")), r"no row for 1 of 2 ids of the sample; .*First: \['0g.png'\]"),
        (_answers(("0f.png", "0f.png")), r"`answers` has 1 rows whose id is given before.*\['0f.png'\]"),
        (_answers() * 0.7, "2 values other than 0 and 1; compare probabilities .*First: 0g.png label3 0.7, 0f.png lab"),
        (_answers().replace(1, np.nan), "2 values other than 0 and 1"),
    ],
)
def test_submission_answers_that_do_not_fit_are_refused(root, answers, message):
    with pytest.raises(ValueError, match=message):
        tritask.submission(tritask.read_sample(root), answers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda table: table[["id", "label2", "label1", "label3"]],
            r"the columns are \['id', 'label2', 'label1'",
        ),
        (lambda table: table.assign(p=1), "the sample has .*in this order"),
        (lambda table: table.assign(id=[1, 2]), r"2 of 2 ids are no text; .*First: \[1, 2\]"),
        (lambda table: table.iloc[[0, 1, 0]], r"the table has 1 rows whose id is given before.*\['0g.png'\]"),
        (lambda table: table.iloc[:1], r"lacks 1 ids .* and has 0 that are not in it; .*First missing: \['0f.png'\]"),
        (
            lambda table: table.replace("0f.png", "f"),
            r"has 1 that.*missing: \['0f.png'\]; .*sample: \['f'\]",
        ),
        (
            lambda table: table.iloc[::-1],
            "2 of 2 ids are out of .*First: row 0 is '0f.png' where the sample has '0g",
        ),
        (lambda table: table.astype({"label2": float}), r"columns \{'label2': 'float64'\} are no integers"),
        (lambda table: table.astype({"label3": bool}), r"columns \{'label3': 'bool'\} are no integers"),
        (lambda table: table.replace({"label1": {1: 2}}), "1 labels are neither 0 nor 1. First: 0f.png label1 .*2"),
    ],
)
def test_check_submission_says_what_differs(root, change, message):
    sample = tritask.read_sample(root)
    table = tritask.submission(sample, _answers())
    tritask.check_submission(table, sample)
    with pytest.raises(ValueError, match=message):
        tritask.check_submission(change(table), sample)
