import numpy as np
import pandas as pd
import pytest

from kerasmed import manifest

CLASSES = ("a", "b")


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "image_path": ["x/1.png", "x/2.png"],
            "patient_id": pd.NA,
            "study_id": pd.NA,
            "group_id": ["g", "h"],
            "split": ["train", "test"],
            "a": [1, 0],
            "b": [0, 1],
        }
    )


def test_validate_good_table_is_returned(frame):
    assert manifest.validate(frame, CLASSES, exclusive=True) is frame


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("image_path", "../secret.png", "column image_path leaves the data root in 1 of 2 rows"),
        ("image_path", "/etc/secret.png", "leaves the data root"),
        ("image_path", "x/../../secret.png", "leaves the data root"),
        ("image_path", "x/..", "leaves the data root"),
        ("image_path", "C:\\data\\1.png", "leaves the data root"),
        ("image_path", "C:/data/1.png", "leaves the data root"),
        ("image_path", "..\\1.png", "leaves the data root"),
        ("image_path", "\\\\server\\1.png", "leaves the data root"),
        ("image_path", "~/1.png", "leaves the data root"),
        ("image_path", "x\\1.png", "has backslashes in 1 of 2 rows: write '/' between folders"),
        ("image_path", "https://x.org/1.png", "is a URL in 1 of 2 rows: download the files"),
        ("image_path", "file:///etc/1.png", "is a URL"),
        ("image_path", "x/1\0.png", "holds a NUL byte"),
        ("image_path", "", "is empty in 1 of 2 rows: give every row a path"),
        ("image_path", " \u3000", "is empty"),
        ("image_path", "./x/1.png", "has a folder '.' or one without a name in 1 of 2 rows: write it in its shortest"),
        ("image_path", "x//2.png", "has a folder '.' or one without a name"),
        ("image_path", "x/./2.png", "has a folder '.' or one without a name"),
        ("image_path", "x/", "has a folder '.' or one without a name"),
        ("image_path", ".", "has a folder '.' or one without a name"),
        ("image_path", "x/2.png", "is not unique in 2 of 2 rows"),
        ("split", "validation", "column split is none of"),
        ("a", 2, "column a is not 1, 0 or NaN"),
        ("b", 1, "mark none or several classes"),
    ],
)
def test_validate_names_column_rows_and_mend(frame, column, value, message):
    frame.loc[0, column] = value
    with pytest.raises(ValueError, match=message):
        manifest.validate(frame, CLASSES, exclusive=True)


def test_validate_unknown_label_is_allowed_where_not_exclusive(frame):
    manifest.validate(frame.assign(a=[np.nan, 1.0]), CLASSES)


def test_validate_missing_column_and_empty_table_are_refused(frame):
    with pytest.raises(ValueError, match=r"lacks the columns \['group_id'\]"):
        manifest.validate(frame.drop(columns="group_id"), CLASSES)
    with pytest.raises(ValueError, match="no rows"):
        manifest.validate(frame.iloc[:0], CLASSES)


def test_validate_unknown_label_is_refused_where_exclusive(frame):
    """The position of the one class would be that of the unknown label."""
    frame["b"] = [np.nan, 1.0]
    with pytest.raises(ValueError, match="column a, b mark none or several classes in 1 of 2 rows"):
        manifest.validate(frame, CLASSES, exclusive=True)


def test_validate_a_column_twice_is_refused(frame):
    with pytest.raises(ValueError, match=r"manifest has the columns \['a'\] twice; rename or remove one"):
        manifest.validate(pd.concat([frame, frame[["a"]]], axis=1), CLASSES)


@pytest.mark.parametrize(
    "path", ["x/..1.png", "x/1..png", "...", "~x/1.png", "x/~/1.png", "a:b.png", ".x/ä 1.png", "x/-"]
)
def test_check_paths_odd_names_are_names(path):
    manifest.check_paths([path, "x/2.png"])


def test_check_paths_counts_and_says_what_they_are():
    with pytest.raises(ValueError, match=r"the name of a file is not in UTF-8 in 1 of 2 rows: rename .*'\\udce4.png'"):
        manifest.check_paths(["a.png", "\udce4.png"], "the name of a file")
    with pytest.raises(ValueError, match=r"column image_path is no text in 2 of 3 rows: .*\[5, None\]"):
        manifest.check_paths(["a.png", 5, None])


def test_class_ids_and_targets_follow_the_given_order(frame):
    assert manifest.class_ids(frame, ("b", "a")).tolist() == [1, 0]
    assert manifest.targets(frame, CLASSES).tolist() == [[1, 0], [0, 1]]
    assert manifest.targets(frame, CLASSES).dtype == np.float32


def test_samples_spread_over_each_class_in_class_order():
    table = pd.DataFrame({"a": [1] * 9 + [0] * 3, "b": [0] * 9 + [1] * 2 + [np.nan]})
    of_a, of_b = manifest.samples(table, ["a", "b"], count=3)
    assert of_a.tolist() == [0, 4, 8] and of_b.tolist() == [9, 10]
    assert manifest.samples(table.assign(c=0), ["c"])[0].tolist() == []
