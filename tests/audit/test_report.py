import hashlib
import json
import time
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit

GATE = ["black", "constant", "label_conflict", "leak_duplicate", "leak_near_duplicate"]


def _touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# --- index -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "split", "label"),
    [
        ("x.png", None, None),
        ("ill/x.png", None, "ill"),
        ("Training/x.png", "Training", None),
        ("val_1/x.png", "val_1", None),
        ("testset/x.png", "testset", None),
        ("train/ill/x.png", "train", "ill"),
        ("north/ill/x.png", "north", "ill"),
        ("brain/test/ill/x.png", "test", "ill"),
        ("ill/test/x.png", "test", "ill"),
        ("train/hand/patient1/study1_positive/x.png", "train", "study1_positive"),
        ("valves/x.png", None, "valves"),
        ("testicle/trained/x.png", "testicle", "trained"),
    ],
)
def test_index_of_a_folder_takes_split_and_label_from_the_path(tmp_path, path, split, label):
    _touch(tmp_path, path, "other/y.JPG", "notes.txt", ".hidden.png")
    root, table, class_names, _ = audit.index(tmp_path)
    assert root == tmp_path and sorted(table["image_path"]) == sorted([path, "other/y.JPG"])
    row = table.set_index("image_path").loc[path]
    assert (row["split"] if pd.notna(row["split"]) else None) == split
    known = [name for name in class_names if row[name] == 1]
    assert known == ([label] if label else [])
    assert row[class_names].isna().all() == (label is None)
    assert table[["patient_id", "study_id", "group_id"]].isna().all(axis=None)


def test_index_of_folders_of_patients_knows_no_labels_and_no_splits(tmp_path):
    _touch(tmp_path, *(f"p{number}/x.png" for number in range(201)))
    _, _, class_names, taken = audit.index(tmp_path)
    assert class_names == [] and taken.startswith("no labels: 201 names are too many, at most 200 are taken for labels")
    assert taken.endswith("; no splits")
    _touch(tmp_path, *(f"p{number}/mri/x.png" for number in range(21)))
    _, table, class_names, taken = audit.index(tmp_path)
    assert table["split"].isna().all() and class_names == []
    assert taken.endswith("; no splits: 21 names are too many, at most 20 are taken for splits")


def test_index_says_what_it_took_for_labels_and_splits(tmp_path):
    _touch(tmp_path, *(f"{split}/l{number}/x.png" for number in range(10) for split in ("train", "test")))
    assert audit.index(tmp_path)[3] == "labels: l0, l1, l2, l3, l4, l5, l6, l7 (2 more); splits: test, train"
    for text, taken in (
        (
            "image_path,split,ill,age,note\na.png,x,1,3,n\nb.png,,,4,n\n",
            "labels: ill; splits: x; left alone: age, note",
        ),
        ("image_path,label,ill\na.png,b,1\n", "labels: b; no splits; left alone: ill"),
        ("image_path\na.png\n", "no labels; no splits"),
    ):
        (tmp_path / "m.csv").write_text(text)
        assert audit.index(tmp_path / "m.csv")[3] == taken


def test_index_of_nothing_says_what_is_read(tmp_path):
    _touch(tmp_path, "notes.txt")
    with pytest.raises(FileNotFoundError, match="no image under .*; files ending in .jpg"):
        audit.index(tmp_path)
    with pytest.raises(FileNotFoundError, match="name a folder of images, or a manifest"):
        audit.index(tmp_path / "typo")
    with pytest.raises(ValueError, match="notes.txt is neither a folder nor a CSV"):
        audit.index(tmp_path / "notes.txt")


def test_index_of_a_manifest_reads_ids_as_text_and_finds_the_labels(tmp_path):
    text = """image_path,patient_id,split,Mass,Nodule,age,follow_up,sex,empty
a.png,007,fold 1,1,,1,2,0,
b.png,,,0,0,,3,1,
"""
    (tmp_path / "m.csv").write_text(text, encoding="utf-8-sig")  # as spreadsheets write it
    root, table, class_names, _ = audit.index(tmp_path / "m.csv")
    assert root == tmp_path and class_names == ["Mass", "Nodule"]
    assert table["patient_id"].tolist()[0] == "007" and pd.isna(table["patient_id"][1])
    assert table["split"].tolist()[0] == "fold 1" and table[["study_id", "group_id"]].isna().all(axis=None)


def test_index_of_a_manifest_with_one_column_of_names_takes_no_other(tmp_path):
    (tmp_path / "m.csv").write_text("image_path,label,portable\na.png,1,0\nb.png,2,1\nc.png,,1\n")
    _, table, class_names, _ = audit.index(tmp_path / "m.csv")
    assert class_names == ["1", "2"] and "label" not in table
    np.testing.assert_array_equal(table[class_names], [[1, 0], [0, 1], [np.nan, np.nan]])


def test_index_of_a_manifest_takes_only_nothing_for_missing(tmp_path):
    (tmp_path / "m.csv").write_text("image_path,patient_id,label\na.png,NA,None\nb.png,,null\nc.png,nan,\n")
    _, table, class_names, _ = audit.index(tmp_path / "m.csv")
    assert class_names == ["None", "null"]
    assert table["patient_id"].fillna("missing").tolist() == ["NA", "missing", "nan"]
    np.testing.assert_array_equal(table[class_names], [[1, 0], [0, 1], [np.nan, np.nan]])
    (tmp_path / "m.csv").write_text("image_path,Mass,Nodule\na.png,1,\nb.png,,0\nc.png,0,1\n")
    _, table, class_names, _ = audit.index(tmp_path / "m.csv")
    assert class_names == ["Mass", "Nodule"] and table[class_names].dtypes.eq(float).all()
    np.testing.assert_array_equal(table[class_names], [[1, np.nan], [np.nan, 0], [0, 1]])


def test_index_of_a_manifest_elsewhere_than_its_images(tmp_path, monkeypatch):
    _touch(tmp_path, "images/a.png", "images/deep/b.png")
    (tmp_path / "tables").mkdir()
    csv = tmp_path / "tables/m.csv"
    csv.write_text(f"image_path\na.png\n{tmp_path}/images/deep/b.png\n")
    with pytest.raises(ValueError, match=r"leaves the data root .*b\.png'\]\. Absolute paths: .* \(--data-root\)"):
        audit.index(csv)
    monkeypatch.chdir(tmp_path / "tables")
    for given in (tmp_path / "images", str(tmp_path / "images/"), "../images"):
        root, table, _, _ = audit.index(csv, root=given)
        assert all((root / path).exists() for path in table["image_path"])
        assert table["image_path"].tolist() == ["a.png", "deep/b.png"]
    with pytest.raises(ValueError, match="leaves the data root"):
        audit.index(csv, root=tmp_path / "tables")
    with pytest.raises(
        FileNotFoundError, match=r"typo is no folder; .* paths of m.csv are relative to \(--data-root\)"
    ):
        audit.index(csv, root=tmp_path / "typo")
    with pytest.raises(ValueError, match="images is a folder, whose images need no other root"):
        audit.index(tmp_path / "images", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "m.csv is empty; write a line of column names, image_path among them"),
        (b"\xef\xbb\xbf\n", "m.csv is empty"),
        ("image_path,label\na.png,Schädel\n".encode("latin-1"), "m.csv is not in UTF-8 .*; save it as a CSV in UTF-8"),
        ("image_path\na.png\n".encode("utf-16"), "m.csv is not in UTF-8"),
        (b"image_path;label\na.png;ill\n", r"\['image_path;label'\]: separate columns by commas, not by ';'"),
        (b"image_path\tlabel\na.png\till\n", r"separate columns by commas, not by '\\t'"),
        (b"path,label\na.png,ill\n", r"it has \['path', 'label'\]: give the column of paths this name"),
        (b'image_path,label\n"a.png,ill\n', "m.csv is no readable CSV: .* Expected a line of column names"),
    ],
)
def test_index_of_a_file_that_is_no_such_csv_names_it_and_the_mend(tmp_path, content, message):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        audit.index(tmp_path / "m.csv")


def test_index_of_a_manifest_does_not_count_spaces_and_takes_true_for_1(tmp_path):
    (tmp_path / "m.csv").write_text(", image_path , split ,ill,name\n0,./x/a.png, train , True ,5\n1,b.png,,FALSE,x\n")
    _, table, class_names, taken = audit.index(tmp_path / "m.csv")
    assert class_names == ["ill"] and table["ill"].tolist() == [1.0, 0.0]
    assert table["image_path"].tolist() == ["x/a.png", "b.png"]
    assert taken == "labels: ill; splits: train; left alone: name"


def test_index_of_a_manifest_below_a_linked_root_takes_both_names_of_it(tmp_path):
    _touch(tmp_path, "disk/a.png", "disk/b.png")
    (tmp_path / "set").symlink_to("disk")
    csv = tmp_path / "m.csv"
    csv.write_text(f"image_path\n{tmp_path}/disk/a.png\n{tmp_path}/set/b.png\n")
    assert audit.index(csv, root=tmp_path / "set")[1]["image_path"].tolist() == ["a.png", "b.png"]


def test_index_of_a_folder_with_a_name_that_cannot_be_told_is_refused(tmp_path):
    _touch(tmp_path, "a.png", "train\\ill\\b.png")
    with pytest.raises(ValueError, match="the path of an image below .* has backslashes in 1 of 2 rows"):
        audit.index(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image_path\n", "has no rows"),
        ("path,label\na.png,ill\n", r"lacks the columns \['image_path'\]"),
        ("image_path\na.png\na.png\n", "image_path is not unique"),
        ("image_path,age\n,3\n", "image_path is empty"),
        ("image_path\n../a.png\n", "leaves the data root"),
        ("image_path\n/etc/a.png\n", "leaves the data root"),
        ("image_path,label\na.png,split\n", r"labels \['split'\] have the names of columns"),
        ("image_path,label,label\na.png,x,y\n", r"has the columns \['label'\] twice; rename or remove one"),
        ("image_path,label\na.png,x\nb.png\n", r"1 of 2 rows have fewer than 2 cells, or more than 2 .line 3 has 1"),
        ("image_path\na.png\n./a.png\n", "image_path is not unique"),
        ("image_path\nx\\a.png\n", "has backslashes in 1 of 1 rows: write '/' between folders"),
    ],
)
def test_index_of_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        audit.index(tmp_path / "m.csv")


# --- planted faults --------------------------------------------------------------------------------------------------


def _sets(found):
    return {kind: [set(paths) for paths in each["image_paths"]] for kind, each in found.groupby("kind")}


def test_examine_finds_every_planted_fault_and_nothing_else(planted, examined):
    report = examined(planted.root)
    found = report.found
    groups = [*planted.expected["leak_duplicate"], *planted.expected["leak_near_duplicate"]]
    assert _sets(found) == planted.expected | {"leak_group": groups}
    assert found["kind"].tolist() == sorted(found["kind"], key=list(audit.KINDS).index)
    unreadable = found.iloc[0]
    assert (unreadable["name"], unreadable["note"]) == ("train/ill/empty.png", "empty file (0 bytes)")
    assert report.closed_by() == [*GATE, "leak_group"]
    counts = report.by_kind()
    assert counts["findings"].tolist() == [1, 1, 1, 1, 1, 1, 2, 1, 1]
    assert counts["images"].tolist() == [1, 3, 1, 2, 2, 2, 4, 2, 2]
    # Groups hold copies of any kind, and no constant image.
    kinds = ("leak_duplicate", "near_duplicate", "leak_near_duplicate", "exact_duplicate")
    assert sorted(map(sorted, report.groups())) == sorted(sorted(planted.expected[kind][0]) for kind in kinds)


def test_examine_of_a_manifest_finds_the_patient_in_two_splits_too(planted, examined):
    table = pd.DataFrame({"image_path": sorted(path for path in _paths(planted.root))})
    table["split"], table["label"] = (table["image_path"].str.split("/").str[place] for place in (0, 1))
    table["patient_id"] = [f"p{row:02d}" for row in table.index]
    shared = [planted.names[4], planted.names[9]]  # in train and in test
    table.loc[table["image_path"].isin(shared), "patient_id"] = "p99"
    table.to_csv(planted.root / "m.csv", index=False)
    report = examined(planted.root / "m.csv", accepted=["black"])
    assert _sets(report.found) == planted.expected | {"leak_patient": [set(shared)]}
    leak = report.found.set_index("kind").loc["leak_patient"]
    assert (leak["name"], leak["splits"], leak["labels"]) == ("p99", "test+train", "ill")
    assert report.closed_by() == [*GATE[1:], "leak_patient"]
    assert report.groups().empty  # patients are known: nobody is grouped by likeness


def _paths(root):
    return [path.relative_to(root).as_posix() for path in root.rglob("*.*")]


def test_examine_groups_by_likeness_where_asked_and_ids_are_unknown(drawn, plant, examined):
    folder = plant(drawn).root
    assert examined(folder, similarity=None).groups().empty
    table = pd.DataFrame({"image_path": sorted(_paths(folder))})
    table.loc[3, "group_id"] = "known"
    table.to_csv(folder / "m.csv", index=False)
    assert examined(folder / "m.csv").groups().empty


def test_examine_groups_no_nearly_black_image(tmp_path, examined):
    for split in ("train", "test"):
        (tmp_path / "s" / split).mkdir(parents=True)
        picture = np.zeros((64, 64), np.uint8)
        picture[30, 20 if split == "train" else 21] = 1
        picture[31, 20:22] = 3
        cv2.imwrite(str(tmp_path / "s" / split / "dim.png"), picture)
    report = examined(tmp_path / "s", similarity=0.5)
    assert report.closed_by() == ["black"] and report.manifest["group_id"].nunique() == 2
    assert report.lines() == ["no groups of several images"]


def test_lines_count_groups_and_name_the_first_shortcuts(tmp_path, heads, examined):
    (tmp_path / "s").mkdir()
    one, other = heads(2)
    for name, picture in {"a": one, "b": one, "c": one, "d": other}.items():
        cv2.imwrite(str(tmp_path / "s" / f"{name}.png"), picture)
    assert examined(tmp_path / "s").lines() == ["1 similarity group of 3 images, 3 images in all"]
    cv2.imwrite(str(tmp_path / "s/e.png"), other)
    report = examined(tmp_path / "s")
    assert report.lines() == ["2 similarity groups of 2 to 3 images, 5 images in all"]
    told = pd.DataFrame({"kind": "shortcut", "name": list("uvwxyz"), "images": 0, "note": "AUROC 0.90"})
    assert report._replace(found=pd.concat([report.found, told])).lines()[1] == (
        f"shortcuts: {', '.join(f'{name} (AUROC 0.90)' for name in 'uvwxy')} (1 more)"
    )
    pd.DataFrame({"image_path": ["a.png", "d.png"], "group_id": "g"}).to_csv(tmp_path / "s/m.csv", index=False)
    assert examined(tmp_path / "s/m.csv").lines() == ["1 group of 2 images, 2 images in all"]


def test_examine_finds_a_shortcut_and_lets_it_pass(tmp_path, heads, examined):
    for number, head in enumerate(heads(60)):
        label, size = ("ill", (90, 80)) if number % 2 else ("well", (80, 80))
        (tmp_path / "s" / label).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "s" / label / f"{number}.png"), cv2.resize(head, size))
    report = examined(tmp_path / "s")
    assert report.found["kind"].tolist() == ["shortcut"] * 2 and report.found["name"].tolist() == ["ill", "well"]
    assert report.found["note"].tolist() == ["AUROC 1.00, most by width"] * 2
    assert report.by_kind().loc["shortcut"].tolist() == [2, 0] and report.closed_by() == []
    assert report.lines()[1] == "shortcuts: ill (AUROC 1.00, most by width), well (AUROC 1.00, most by width)"


def test_examine_accepts_only_what_could_close_the_gate(drawn, plant, examined):
    with pytest.raises(ValueError, match=r"names \['blak'\]"):
        examined(plant(drawn).root, accepted=["blak"])


def test_examine_of_a_folder_of_unreadable_files_closes_the_gate(tmp_path, examined):
    _touch(tmp_path, "s/train/ill/a.png", "s/test/well/b.png")
    report = examined(tmp_path / "s")
    assert report.manifest.empty and report.closed_by() == ["unreadable"]
    assert report.found["name"].tolist() == ["test/well/b.png", "train/ill/a.png"]
    for file in audit.write(report, tmp_path / "out"):
        assert "empty file (0 bytes)" in file.read_text()


def test_examine_of_one_image_finds_nothing(tmp_path, drawn, examined):
    (tmp_path / "s").mkdir()
    drawn[0].rename(tmp_path / "s/one.png")
    report = examined(tmp_path / "s")
    assert report.found.empty and report.closed_by() == [] and report.groups().empty
    audit.write(report, tmp_path / "out")


def test_examine_finds_no_pair_among_the_real_radiographs(real_data, examined):
    report = examined(real_data / "chest/images")
    assert len(report.manifest) == 90 and report.found.empty and report.groups().empty and report.closed_by() == []
    others = [
        audit.nearest(report.thumbnails[[row]], np.delete(report.thumbnails, row, axis=0))[1] for row in range(90)
    ]
    assert max(others)[0] == pytest.approx(0.946, abs=0.001)  # far below `SAME_PICTURE`


@pytest.mark.slow
def test_examine_counts_the_copies_in_the_real_brain_sets(real_data, examined):
    files = Counter(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (real_data / "brain/brain_tumor/train").rglob("*.jpg")
    )
    copied = [count for count in files.values() if count > 1]
    assert (len(copied), sum(copied) - len(copied)) == (73, 93)
    report = examined(real_data / "brain/brain_tumor/train")
    exact = report.found[report.found["kind"] == "exact_duplicate"]
    assert (len(exact), (exact["images"] - 1).sum()) == (75, 101)  # by decoded pixels
    same = {path: number for number, paths in enumerate(exact["image_paths"]) for path in paths}
    root = real_data / "brain/brain_tumor/train"
    by_bytes = pd.Series({path: hashlib.sha256((root / path).read_bytes()).hexdigest() for path in same})
    assert by_bytes.groupby(by_bytes).size().gt(1).sum() == 73
    assert pd.Series(same).groupby(by_bytes).nunique().eq(1).all()
    assert set(report.found["kind"]) == {"exact_duplicate", "near_duplicate", "shortcut"}  # no conflict
    assert len(report.groups()) >= 75


@pytest.mark.timed
@pytest.mark.slow
def test_examine_of_all_7991_real_slices_takes_less_than_90_seconds_after_decoding(real_data, examined):
    examined(real_data / "brain")  # decodes
    start = time.perf_counter()
    report = examined(real_data / "brain")
    assert time.perf_counter() - start < 90
    assert len(report.manifest) == 7991 and report.groups().map(len).ge(25).sum() >= 200


# --- what is written -------------------------------------------------------------------------------------------------


def test_write_json_holds_every_finding_without_nan_or_absolute_path(tmp_path, drawn, plant, examined):
    folder = plant(drawn)
    report = examined(folder.root, accepted=["black"])
    written, page = audit.write(report, tmp_path / "deep/out")
    assert (written.name, page.name) == ("audit.json", "audit.html")
    text = written.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text and str(tmp_path) not in text + page.read_text(encoding="utf-8")
    content = json.loads(text)
    assert content["gate"] == {"open": False, "closed_by": [*GATE[1:], "leak_group"], "accepted": ["black"]}
    assert (content["name"], content["images"], len(content["groups"])) == ("t", 20, 4)
    assert content["kinds"]["leak_group"] == {"findings": 2, "images": 4}
    assert [each["image_paths"] for each in content["findings"]] == report.found["image_paths"].tolist()
    assert [(row["target"], row["images"]) for row in content["probe"]][:2] == [("ill", 20), ("well", 20)]
    assert sorted(path.name for path in (tmp_path / "deep/out").iterdir()) == ["audit.html", "audit.json"]


def test_write_twice_gives_the_same_files(tmp_path, drawn, plant, examined):
    folder = plant(drawn).root
    one, other = (audit.write(examined(folder), tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
