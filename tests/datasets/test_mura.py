import os
import random
import re
import statistics
import time
from collections import Counter

import pandas as pd
import pytest

from kerasmed import manifest
from kerasmed.datasets import mura

HOME = "mura/MURA-v1.1"
# 2 patients of train, one with studies of two types; image and study numbers with gaps, and of one and two digits.
FILES = (
    "train/XR_ELBOW/patient00011/study1_negative/image1.png",
    "train/XR_ELBOW/patient00011/study1_negative/image2.png",
    "train/XR_ELBOW/patient00011/study1_negative/image10.png",
    "train/XR_ELBOW/patient00011/study2_positive/image3.png",
    "train/XR_ELBOW/patient00011/study10_negative/image1.png",
    "train/XR_WRIST/patient00002/study1_positive/image2.png",
    "train/XR_WRIST/patient00011/study1_positive/image1.png",
    "valid/XR_HAND/patient11185/study1_positive/image1.png",
    "valid/XR_HAND/patient11185/study1_positive/image4.png",
)
STUDIES = (
    *["XR_ELBOW/patient00011/study1"] * 3,
    *("XR_ELBOW/patient00011/study2", "XR_ELBOW/patient00011/study10"),
    *("XR_WRIST/patient00002/study1", "XR_WRIST/patient00011/study1"),
    *["XR_HAND/patient11185/study1"] * 2,
)
# Images, studies and patients of the whole set; the tree's valid has those of the unpublished test set too.
WHOLE = {"train": (36_808, 13_457, 11_184), "valid": (3_753, 1_406, 989)}


def _touch(root, *files):
    for file in files:
        path = root / HOME / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def root(tmp_path):
    """The nine images of `FILES`, and one study each of two types that follow no order of names."""
    root = tmp_path / "data"
    _touch(root, *random.Random(0).sample(FILES, len(FILES)))
    return root


def make_tree(root, sizes, *, num_junk=12, seed=0):
    """Write empty files in the real layout.

    Types have unequal numbers of studies; a patient has one study, or several of one type or of several types; a study
    has one image or more, and some numbers are left out; `num_junk` folders of each level hold a hidden file or two and
    a visible one that is no image.

    Args:
        root: data root.
        sizes: split folder to its numbers of images, studies and patients.
        num_junk: folders of each level.
        seed: of all that is drawn.
    """
    draw = random.Random(seed)
    folders = {level: [] for level in range(1, 5)}
    num_earlier = 0
    for split, (num_images, num_studies, num_patients) in sizes.items():
        names = [f"patient{number:05d}" for number in range(num_earlier + 1, num_earlier + num_patients + 1)]
        num_earlier += num_patients
        home_types = dict(zip(names, draw.choices(mura.STUDY_TYPES, weights=(5, 6, 3, 6, 2, 9, 10), k=num_patients)))
        owners = names + draw.choices(names, k=num_studies - num_patients)
        counts = Counter(range(num_studies)) + Counter(draw.choices(range(num_studies), k=num_images - num_studies))
        num_of = Counter()
        for study, patient in enumerate(owners):
            kind = draw.choice(mura.STUDY_TYPES) if num_of[patient] and draw.random() < 0.4 else home_types[patient]
            num_of[patient] += 1
            num_of[patient, kind] += 1
            base = f"{root}/{HOME}/{split}/{kind}/{patient}"
            place = f"{base}/study{num_of[patient, kind]}_{draw.choice(('positive', 'negative', 'negative'))}"
            os.makedirs(place)
            folders[3].append(base)
            folders[4].append(place)
            highest = counts[study] + draw.choice((0, 0, 0, 1, 5))
            for number in draw.sample(range(1, highest + 1), counts[study]):
                open(f"{place}/image{number}.png", "wb").close()
        folders[1].append(f"{root}/{HOME}/{split}")
        folders[2] += sorted({os.path.dirname(base) for base in folders[3] if f"/{split}/XR_" in base})
    for places in folders.values():
        for place in draw.sample(places, min(num_junk, len(places))):
            for name in (".DS_Store", "._image1.png", draw.choice(("Thumbs.db", "notes.txt"))):
                open(f"{place}/{name}", "wb").close()


# --- read ------------------------------------------------------------------------------------------------------------


def test_read_gives_a_manifest_in_the_order_of_numbers(root, caplog):
    frame = mura.read(root)
    assert list(frame.columns) == [*manifest.COLUMNS, "body_part", "abnormal"]
    assert list(frame.index) == list(range(9)) and not caplog.text
    assert frame["image_path"].tolist() == [f"{HOME}/{file}" for file in FILES]
    assert frame["study_id"].tolist() == list(STUDIES)
    assert (
        frame["patient_id"].tolist() == [*["patient00011"] * 5, "patient00002", "patient00011"] + ["patient11185"] * 2
    )
    assert frame["group_id"].tolist() == frame["patient_id"].tolist()
    assert frame["body_part"].tolist() == ["XR_ELBOW"] * 5 + ["XR_WRIST"] * 2 + ["XR_HAND"] * 2
    assert frame["split"].tolist() == ["train"] * 7 + ["test"] * 2
    assert frame["abnormal"].tolist() == [0, 0, 0, 1, 0, 1, 1, 1, 1] and frame["abnormal"].dtype == float
    assert {str(dtype) for dtype in frame.drop(columns="abnormal").dtypes} == {"str"}


def test_read_hidden_entries_and_other_files_count_nowhere(root):
    expected = mura.read(root)
    study, patient = "train/XR_ELBOW/patient00011/study1_negative", "train/XR_ELBOW/patient00011"
    for place in (".", "train", "train/XR_ELBOW", patient, study):
        _touch(
            root, *(f"{place}/{name}" for name in (".DS_Store", "._image1.png", "Thumbs.db", "notes.txt", "a.png.txt"))
        )
        (root / HOME / place / ".cache").mkdir()
    _touch(root, f"{patient}/image1.png", "train/XR_ELBOW/image1.png", "train/image1.png", "image1.png")
    # Hidden folders, and files, whose names would otherwise fit.
    _touch(root, "train/XR_ELBOW/.patient00012/study1_negative/image1.png", "train/.XR_HAND/patient1/x.png")
    _touch(root, "train/XR_HAND.zip", "valid/XR_HAND/patient00012", f"{patient}/study3_positive", f"{study}/more/x.png")
    pd.testing.assert_frame_equal(mura.read(root), expected)


def test_read_suffix_may_be_in_upper_case_and_names_without_number_come_first(root):
    study = "train/XR_WRIST/patient00002/study1_positive"
    _touch(root, f"{study}/image1.PNG", f"{study}/image03.Png", f"{study}/view.png", f"{study}/image4.jpg")
    found = mura.read(root).query("study_id == 'XR_WRIST/patient00002/study1'")["image_path"]
    assert [path.rpartition("/")[2] for path in found] == ["view.png", "image1.PNG", "image2.png", "image03.Png"]


def test_read_other_types_are_types(root):
    _touch(root, "train/XR_KNEE/patient00003/study1_negative/image1.png")
    frame = mura.read(root)
    assert frame["body_part"].tolist() == ["XR_ELBOW"] * 5 + ["XR_KNEE"] + ["XR_WRIST"] * 2 + ["XR_HAND"] * 2


def test_read_both_splits_are_each_split_after_the_other(root, tmp_path):
    alone = []
    for split in ("train", "valid"):
        other = tmp_path / split
        _touch(other, *(file for file in FILES if file.startswith(split)))
        alone.append(mura.read(other))
        assert mura.folder(other) == other / "mura"
    assert [set(frame["split"]) for frame in alone] == [{"train"}, {"test"}]
    pd.testing.assert_frame_equal(pd.concat(alone, ignore_index=True), mura.read(root))


def test_read_studies_without_images_are_left_out_and_counted(root, caplog):
    expected = mura.read(root)
    for number in (4, 2, 3, 10):
        (root / HOME / f"train/XR_WRIST/patient00002/study{number}_negative").mkdir()
    _touch(root, "train/XR_WRIST/patient00002/study2_negative/._image1.png")
    (root / HOME / "train/XR_WRIST/patient00003").mkdir()  # nor does a patient without a study
    pd.testing.assert_frame_equal(mura.read(root), expected)
    places = [f"train/XR_WRIST/patient00002/study{number}_negative" for number in (2, 3, 4)]
    assert [record.getMessage() for record in caplog.records] == [
        f"4 study folders hold no image and were left out: {places}"
    ]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/HAND"], "1 folders .*; expected {train,valid}/XR_<TYPE>/.* Rename them so, .*First: ['train/HAND']."),
        (["valid/XR_"], "First: ['valid/XR_']."),
        (["train/XR_HAND/patient", "train/XR_HAND/Patient1"], "First: ['train/XR_HAND/Patient1', 'train/XR_HAND/pat"),
        (["train/XR_HAND/patient00001x"], "First: ['train/XR_HAND/patient00001x']."),
        (["train/XR_HAND/patient00001/study1"], "First: ['train/XR_HAND/patient00001/study1']."),
        (["train/XR_HAND/patient00001/study1_Positive"], "First: ['train/XR_HAND/patient00001/study1_Positive']."),
        (["train/XR_HAND/patient00001/study_negative"], "First: ['train/XR_HAND/patient00001/study_negative']."),
        (
            ["valid/e", "train/b", "train/XR_WRIST/c", "train/a"],
            "4 folders .*: ['train/a', 'train/b', 'train/XR_WRIST/c'].",
        ),
    ],
)
def test_read_folders_that_do_not_fit_are_refused(root, folders, message):
    for folder in folders:
        (root / HOME / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=".*".join(map(re.escape, message.split(".*")))):
        mura.read(root)


@pytest.mark.parametrize("place", ["patient00099", "patient00099/study1_positive"])
def test_read_links_to_folders_that_are_not_there_are_refused(root, place):
    path = root / "mura/MURA-v1.1/train/XR_ELBOW" / place
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=f"{place} is a link to a folder that is not there; restore"):
        mura.read(root)


def test_read_studies_of_both_labels_are_refused(root):
    for file in (FILES[0], FILES[4], *FILES[5:8]):
        swapped = re.sub("positive|negative", lambda found: "negative" if found[0] == "positive" else "positive", file)
        (root / HOME / swapped).parent.mkdir()  # even where one of the two is empty
    first = [
        "train/XR_ELBOW/patient00011/study1",
        "train/XR_ELBOW/patient00011/study10",
        "train/XR_WRIST/patient00002/study1",
    ]
    with pytest.raises(
        ValueError, match=rf"5 studies .* both positive and .*Remove .*First: {re.escape(str(first))}\."
    ):
        mura.read(root)


def test_read_a_patient_in_both_splits_is_left_to_the_audit(root):
    _touch(root, "valid/XR_WRIST/patient00002/study1_negative/image1.png")
    rows = mura.read(root).query("patient_id == 'patient00002'")
    assert rows["split"].tolist() == ["train", "test"] and rows["abnormal"].tolist() == [1, 0]


def test_read_absent_folders_and_unknown_part_are_refused(root, tmp_path):
    with pytest.raises(ValueError, match="part 'wrists' is unknown; known is radiographs"):
        mura.read(root, "wrists")
    for path in (root / HOME).rglob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no images of mura under .*; expected mura/MURA-v1.1/{train,valid}/"):
        mura.read(root)
    (tmp_path / "nothing" / HOME).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images of mura under .*nothing.*; expected mura/MURA-v1.1"):
        mura.read(tmp_path / "nothing")
    assert mura.folder(tmp_path / "nothing") is None
    assert mura.folder(root) == root / "mura" and mura.part_folder(root, mura.PART) == root / HOME


def _counted(root):
    """Images of each study folder, counted by other means: {(split folder, type, patient, study, label): images}."""
    start = len((root / HOME).parts)
    found = [path.parts[start:] for path in (root / HOME).rglob("*") if path.is_file()]
    return Counter(
        (*parts[:3], *parts[3].split("_"))
        for parts in found
        if re.match(r"(?i)[^.].*\.png$", parts[-1]) and len(parts) == 5
    )


def test_read_counts_equal_an_independent_count(tmp_path):
    make_tree(tmp_path, {"train": (1_500, 400, 300), "valid": (150, 60, 45)})
    frame, counted = mura.read(tmp_path), _counted(tmp_path)
    assert len(frame) == sum(counted.values()) == 1_650 and len(counted) == 460
    assert frame["patient_id"].nunique() == 345 and frame["image_path"].is_unique
    label = frame["abnormal"].map({1.0: "positive", 0.0: "negative"})
    keys = zip(frame["split"].map({"train": "train", "test": "valid"}), frame["study_id"], label)
    assert Counter((split, *study.split("/"), name) for split, study, name in keys) == counted
    assert all((tmp_path / path).is_file() for path in frame["image_path"])
    numbers = frame["image_path"].str.extract(r"study(\d+)_\w+/image(\d+)\.png$").astype(int)
    order = frame[["split", "body_part", "patient_id"]].assign(study=numbers[0], image=numbers[1])
    by_hand = order.sort_values(["split", "body_part", "patient_id", "study", "image"], ascending=[False, *[True] * 4])
    assert by_hand.index.tolist() == list(range(1_650))
    # The tree has what makes it like the real one.
    assert order.groupby("patient_id")["body_part"].nunique().max() > 1
    assert order.groupby(["patient_id", "body_part"])["study"].nunique().max() > 1
    assert (order.groupby(frame["study_id"])["image"].max() > frame.groupby("study_id").size()).any()
    assert len(list(tmp_path.rglob(".DS_Store"))) > 30


def test_study_types_are_those_of_the_layout():
    names = ",".join(name.removeprefix("XR_") for name in mura.STUDY_TYPES)
    assert mura.LAYOUT.startswith(f"{HOME}/{{train,valid}}/XR_{{{names}}}/patient")
    assert list(mura.STUDY_TYPES) == sorted(mura.STUDY_TYPES) and len(mura.STUDY_TYPES) == 7


# --- speed: as fast as walking the tree and no more ------------------------------------------------------------------


def _walked(root):
    return [os.path.join(folder, name) for folder, _, files in os.walk(root) for name in files]


def _ratio(function, root, *, rounds=5):
    """Median seconds of the function by those of `_walked`, in turns; the caches are warm."""
    seconds = {function: [], _walked: []}
    for timed in [*seconds] * (rounds + 1):
        start = time.perf_counter()
        timed(root)
        seconds[timed].append(time.perf_counter() - start)
    return statistics.median(seconds[function][1:]) / statistics.median(seconds[_walked][1:])


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory):
    """A tree of 40,561 images of the real size."""
    root = tmp_path_factory.mktemp("whole")
    make_tree(root, WHOLE)
    return root


@pytest.mark.timed
@pytest.mark.slow
def test_read_whole_tree_counts(whole_tree):
    frame = mura.read(whole_tree)
    studies = frame.drop_duplicates("study_id").groupby("split")
    counts = {
        split: (int((frame["split"] == split).sum()), len(rows), rows["patient_id"].nunique())
        for split, rows in studies
    }
    assert counts == {"train": WHOLE["train"], "test": WHOLE["valid"]}
    assert (len(frame), frame["study_id"].nunique(), frame["patient_id"].nunique()) == (40_561, 14_863, 12_173)


@pytest.mark.timed
@pytest.mark.slow
def test_read_whole_tree_takes_no_longer_than_walking_it(whole_tree):
    assert _ratio(mura.read, whole_tree) <= 1


@pytest.mark.timed
@pytest.mark.slow
def test_read_and_study_table_take_no_longer_than_walking(whole_tree):
    from kerasmed import studies

    assert _ratio(lambda root: studies.table(mura.read(root), ["abnormal"]), whole_tree) <= 1


# --- real images -----------------------------------------------------------------------------------------------------


def test_read_real_counts_are_the_published_ones(real_data):
    if mura.folder(real_data) is None:
        pytest.skip("no mura images in KERASMED_REAL_DATA")
    frame = mura.read(real_data)
    of_split = {
        split: (len(rows), rows["study_id"].nunique(), rows["patient_id"].nunique())
        for split, rows in frame.groupby("split")
    }
    assert of_split == {"train": (36_808, 13_457, 11_184), "test": (3_197, 1_199, 783)}
    assert tuple(sorted(frame["body_part"].unique())) == mura.STUDY_TYPES
    assert frame.groupby("study_id")["abnormal"].nunique().max() == 1
