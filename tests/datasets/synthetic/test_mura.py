"""The synthetic MURA set: layout, labels of studies, ceilings, boxes, and what can and cannot read its signs."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from kerasmed import audit, datasets, images
from kerasmed.datasets import mura as reader
from kerasmed.datasets.synthetic import mura

CORNERS = ["x", "y", "width", "height"]
SIGNS = ["fracture", "hardware", "lesion"]
TINY = {"patients": 40, "image_side": (64, 80)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """300 + 100 patients, some 1,300 images."""
    return mura.write(tmp_path_factory.mktemp("mura") / "set", patients=400)


@pytest.fixture(scope="module")
def table(root):
    """What the reader reads beside what truth.csv tells of it."""
    truth = pd.read_csv(root / "mura/truth.csv", keep_default_na=False, na_values=dict.fromkeys(CORNERS, ""))
    return reader.read(root).merge(truth.drop(columns="study_id"), on="image_path", validate="one_to_one")


@pytest.fixture(scope="module")
def pictures(root, table):
    return [images.read(root / path) for path in table["image_path"]]


@pytest.fixture(scope="module")
def thumbnails(pictures):
    return np.stack([images.thumbnail(picture) for picture in pictures])


def _file_bytes(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _description(root):
    return json.loads((root / "mura/synthetic.json").read_text())


def _draw_truth(**options):
    """Studies and images of a set of 900 patients, without its pictures."""
    defaults = {"patients": 900, "label_noise": 0.04, "visible_share": 0.6, "image_side": (120, 220), "seed": 0}
    return mura._draw_truth(mura._checked_parameters(**{**defaults, **options}))


# --- layout ----------------------------------------------------------------------------------------------------------


def test_write_layout_is_the_real_one(root, table):
    assert [path.name for path in root.iterdir()] == ["mura"]
    assert sorted(path.name for path in (root / "mura").iterdir()) == ["MURA-v1.1", "synthetic.json", "truth.csv"]
    truth = pd.read_csv(root / "mura/truth.csv")
    assert list(truth.columns) == ["image_path", "study_id", "sign", "visible", *CORNERS]
    read = reader.read(root)
    assert truth["image_path"].tolist() == read["image_path"].tolist()
    assert truth["study_id"].tolist() == read["study_id"].tolist()
    counts, problems = datasets.check("mura", root)
    assert problems.empty and counts["images"].sum() >= len(table)


def test_write_hidden_files_of_macos_lie_among_the_images(root, table):
    hidden = [path for path in root.rglob(".*") if path.is_file()]
    assert {path.name for path in hidden} == {".DS_Store", "._image1.png"}
    forks = [path.read_bytes() for path in hidden if path.suffix == ".png"]
    assert len(forks) >= 5 and all(data.startswith(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X") for data in forks)
    stores = [path.read_bytes() for path in hidden if path.name == ".DS_Store"]
    assert all(data.startswith(b"\x00\x00\x00\x01Bud1") for data in stores)
    assert len(list(root.rglob("*.png"))) == len(table) + len(forks)


def test_write_patients_are_in_one_split_and_have_studies_of_several_types(table):
    numbers = table["patient_id"].str.removeprefix("patient").astype(int)
    assert set(numbers[table["split"] == "train"]) == set(range(1, 301))
    assert set(numbers[table["split"] == "test"]) == set(range(301, 401))
    studies = table.drop_duplicates("study_id")
    # Of 300 and of 100 patients 14 % have a second study of the same type, and 10 % one of another.
    assert studies["study_id"].str.endswith("/study2").sum() == 42 + 14
    assert (studies.groupby("patient_id")["body_part"].nunique() == 2).sum() == 30 + 10
    assert len(studies) == 400 + 56 + 40


def test_write_images_of_a_study_are_1_to_5_and_their_numbers_have_gaps(table):
    numbers = table["image_path"].str.extract(r"image(\d+)\.png")[0].astype(int)
    by_study = numbers.groupby(table["study_id"]).agg(["size", "max"])
    assert by_study["size"].min() == 1 and by_study["size"].max() == 5
    # 496 studies of standard deviation 1.03: 2.7 ± 0.046; 0.14 is three of them.
    assert by_study["size"].mean() == pytest.approx(2.7, abs=0.14)
    assert 0.02 < (by_study["max"] > by_study["size"]).mean() < 0.15
    assert (numbers >= 10).any()  # image10 comes after image2, as the test of the layout has seen


def test_write_images_are_grey_in_one_or_three_equal_channels_and_vary_in_size(root, table):
    stored = [cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED) for path in table["image_path"]]
    assert all(image.dtype == np.uint8 for image in stored)
    assert all((image == image[..., :1]).all() for image in stored if image.ndim == 3)
    # 1,300 draws of 0.03: ± 0.005; 0.02 is four of them.
    assert 0.01 < np.mean([image.ndim == 3 for image in stored]) < 0.05
    sizes = np.array([image.shape[:2] for image in stored])
    assert sizes.max(axis=1).min() >= 120 and sizes.max(axis=1).max() <= 220 and np.ptp(sizes.max(axis=1)) > 90
    aspects = sizes[:, 1] / sizes[:, 0]
    # 0.72 to 1.15, but for the rounding of a side of at least 86 pixels.
    assert aspects.min() > 0.71 and aspects.max() < 1.16 and np.ptp(aspects) > 0.4


def test_write_same_seed_gives_identical_files_and_times(tmp_path):
    first, again, other = (
        mura.write(tmp_path / name, seed=seed, **TINY) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert _file_bytes(first) == _file_bytes(again)
    times = {path.stat().st_mtime_ns for root in (first, again) for path in root.rglob("*") if path.is_file()}
    assert len(times) == 1
    shown = [{path.read_bytes() for path in root.rglob("image*.png")} for root in (first, other)]
    assert len(shown[0]) == len(reader.read(first)) and shown[0].isdisjoint(shown[1])


# --- labels ----------------------------------------------------------------------------------------------------------


def test_types_are_of_unequal_size_and_abnormality():
    studies, _ = _draw_truth()
    sizes = studies.groupby("type").size()
    expected = ["WRIST", "SHOULDER", "HAND", "FINGER", "ELBOW", "FOREARM", "HUMERUS"]
    assert [reader.STUDY_TYPES[index] for index in sizes.sort_values().index[::-1]] == [f"XR_{n}" for n in expected]
    assert studies[studies["split"] == "valid"].groupby("type").size().min() >= 10
    for _, part in studies.groupby("split"):
        counts = part.groupby("type")["abnormal"].agg(["sum", "size"])
        # Systematic sampling: within one of the share.
        assert (counts["sum"] - counts["size"] * mura._ABNORMAL_SHARES).abs().max() <= 1
    shares = studies.groupby("type")["abnormal"].mean()
    assert reader.STUDY_TYPES[shares.idxmax()] == "XR_HUMERUS" and reader.STUDY_TYPES[shares.idxmin()] == "XR_HAND"


def test_label_noise_flips_the_stated_number_of_studies_a_split(table):
    studies = table.groupby(["split", "study_id"])[["abnormal", "visible"]].max()
    flipped = (studies["abnormal"] != studies["visible"]).groupby("split").agg(["sum", "size"])
    # 0.04 × 372 = 14.88 and 0.04 × 124 = 4.96: an abnormal study shows its sign at least once.
    assert flipped.loc["train"].tolist() == [15, 372] and flipped.loc["test"].tolist() == [5, 124]


def test_sign_is_visible_in_the_stated_share_of_the_images_and_one_a_study(table):
    assert (
        set(table.loc[table["visible"] == 1, "sign"]) == set(SIGNS)
        and (table["visible"] == (table["sign"] != "")).all()
    )
    shown = table[table.groupby("study_id")["visible"].transform("max") == 1]
    assert (shown[shown["visible"] == 1].groupby("study_id")["sign"].nunique() == 1).all()
    for _, part in shown.groupby("split"):
        assert part["visible"].sum() == round(0.6 * len(part))
    counts = shown[shown["visible"] == 1].drop_duplicates("study_id").groupby(["split", "sign"]).size().unstack()
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()  # a third each


def test_description_states_what_is_known(root, table):
    tested = table[table["split"] == "test"]
    means = tested.groupby("study_id")[["abnormal", "visible"]].mean()
    by_type = tested["visible"] + tested["body_part"].map(dict(zip(reader.STUDY_TYPES, mura._ABNORMAL_SHARES)))
    assert _description(root) == {
        "system": "mura",
        "seed": 0,
        "patients": 400,
        "label_noise": 0.04,
        "visible_share": 0.6,
        "image_side": [120, 220],
        "images": {"train": int((table["split"] == "train").sum()), "valid": len(tested)},
        "studies": {"train": 372, "valid": 124},
        "prevalence": {
            "train": pytest.approx(table[table["split"] == "train"].groupby("study_id")["abnormal"].first().mean()),
            "valid": pytest.approx(means["abnormal"].mean()),
        },
        "ceiling": {
            "image_auroc": pytest.approx(roc_auc_score(tested["abnormal"], tested["visible"])),
            "study_auroc": pytest.approx(roc_auc_score(means["abnormal"], means["visible"])),
            "image_auroc_with_type": pytest.approx(roc_auc_score(tested["abnormal"], by_type)),
        },
    }


@pytest.mark.parametrize("seed", range(3))
def test_ceiling_of_studies_is_below_1_and_clearly_above_that_of_images(seed):
    ceiling = mura._describe(*_draw_truth(seed=seed))["ceiling"]
    assert 0.75 < ceiling["image_auroc"] < 0.8 and 0.94 < ceiling["study_auroc"] < 0.97


def test_ceiling_without_noise_and_hidden_signs_is_1():
    described = mura._describe(*_draw_truth(label_noise=0, visible_share=1))
    assert described["ceiling"] == dict.fromkeys(("image_auroc", "study_auroc", "image_auroc_with_type"), 1)
    # Half of them hidden, no noise: every study is told, and of the images those that show it: (1 + 1/2) / 2.
    half = mura._describe(*_draw_truth(label_noise=0, visible_share=0.5))["ceiling"]
    assert half["study_auroc"] == 1 and half["image_auroc"] == pytest.approx(0.75, abs=0.001)  # of some 300 images


def test_smallest_set_has_every_type_in_both_splits(tmp_path):
    table = reader.read(mura.write(tmp_path, **TINY))
    assert (table.groupby("split")["body_part"].nunique() == 7).all()
    assert all(0 < _description(tmp_path)["prevalence"][split] < 1 for split in ("train", "valid"))


# --- pictures --------------------------------------------------------------------------------------------------------


def test_boxes_lie_in_the_picture_and_take_about_a_fifth_of_its_width(table, pictures):
    shown = (table["visible"] == 1).to_numpy()
    assert table.loc[~shown, CORNERS].isna().all(axis=None)
    boxes = table.loc[shown, CORNERS].to_numpy()
    sizes = np.array([picture.shape[::-1] for picture, is_shown in zip(pictures, shown) if is_shown])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] >= 5).all()
    assert 0.15 < np.median(boxes[:, 2] / sizes[:, 0]) < 0.25


def test_boxes_hold_what_the_sign_is_of(table, pictures):
    def levels(sign, of):
        rows = table.index[table["sign"] == sign]
        parts = []
        for row in rows:
            x, y, width, height = table.loc[row, CORNERS].astype(int)
            parts.append(of(pictures[row][y : y + height, x : x + width]) - np.median(pictures[row]))
        return np.array(parts)

    def middle(part):
        height, width = part.shape
        return part[height // 3 : height - height // 3, width // 3 : width - width // 3].mean()

    assert np.median(levels("hardware", np.max)) > 120 and np.median(levels("fracture", np.max)) < 120
    assert np.median(levels("fracture", np.min)) < np.median(levels("hardware", np.min))
    # Of lesions about half are dark and half are bright.
    lesions = levels("lesion", middle)
    assert 0.25 < (lesions < 40).mean() < 0.75 and 0.25 < (lesions > 80).mean() < 0.75


def test_types_are_told_by_a_nearest_neighbour_of_another_patient(table, thumbnails):
    test = (table["split"] == "test").to_numpy()
    found = table.loc[~test, "body_part"].to_numpy()[audit.nearest(thumbnails[test], thumbnails[~test])[0]]
    assert (found == table.loc[test, "body_part"]).groupby(table.loc[test, "body_part"]).mean().min() > 0.7
    assert (found == table.loc[test, "body_part"]).mean() > 0.9


def test_nearest_neighbour_does_not_tell_the_label(table, thumbnails):
    test = (table["split"] == "test").to_numpy()
    score = table.loc[~test, "abnormal"].to_numpy()[audit.nearest(thumbnails[test], thumbnails[~test])[0]]
    # 124 studies: a standard error of at most 0.05 by image, as its study is what is drawn; 0.15 is three of them.
    assert abs(roc_auc_score(table.loc[test, "abnormal"], score) - 0.5) < 0.15


def test_size_shape_and_mean_intensity_do_not_tell_the_label(table, pictures, thumbnails):
    measures = pd.DataFrame([picture.shape for picture in pictures], columns=["height", "width"])
    measures["aspect"] = measures["width"] / measures["height"]
    edge = np.ones((64, 64), bool)
    edge[1:-1, 1:-1] = False
    measures["mean"], measures["border"] = thumbnails.mean(axis=(1, 2)), thumbnails[:, edge].mean(axis=1)
    areas = audit.by_class(table, ["abnormal"], measures)["auroc"]
    # 1,300 images of 496 studies: a standard error of 0.016 to 0.026; 0.08 is three of them.
    assert ((areas - 0.5).abs() < 0.08).all()


def test_thumbnails_of_different_patients_do_not_correlate_above_098(table, thumbnails):
    vectors = audit.standardize(thumbnails)
    patients = table["patient_id"].to_numpy()
    assert (vectors @ vectors.T)[patients[:, None] != patients].max() < 0.98


def test_side_letter_is_a_study_s_and_says_nothing_of_the_sign(monkeypatch):
    seen, put_text = [], cv2.putText
    monkeypatch.setattr(cv2, "putText", lambda *given: seen.append(given[1]) or put_text(*given))
    for study in range(30):
        for image, sign in enumerate(("", "", *SIGNS)):
            rngs = [np.random.default_rng(key) for key in ([1, study], [2, study], [3, study, image])]
            mura._draw_image(3, sign, *rngs, (64, 64))
    letters = np.reshape(seen, (30, 5))
    assert (letters == letters[:, :1]).all() and set(seen) == {"L", "R"}


# --- parameters and what is there already ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("patients", 39),
        ("label_noise", 0.5),
        ("label_noise", -0.1),
        ("label_noise", float("nan")),
        ("visible_share", 0),
        ("visible_share", 1.1),
        ("image_side", (63, 80)),
        ("image_side", (120, 100)),
        ("image_side", (120,)),
        ("seed", -1),
    ],
)
def test_write_parameter_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is .*expected"):
        mura.write(tmp_path / "set", **{option: value})
    assert not (tmp_path / "set").exists()


def test_write_real_data_in_the_way_is_never_touched(tmp_path):
    image = tmp_path / "mura/MURA-v1.1/train/XR_HAND/patient00001/study1_positive/image1.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be real data"):
        mura.write(tmp_path, **TINY)
    assert image.read_bytes() == b"real" and len(_file_bytes(tmp_path)) == 1


def test_write_other_parameters_in_the_way_are_refused(tmp_path):
    mura.write(tmp_path, **TINY)
    before = _file_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="describes another set"):
        mura.write(tmp_path, seed=1, **TINY)
    assert _file_bytes(tmp_path) == before


def test_write_whole_set_is_left_as_it_is(tmp_path):
    root = mura.write(str(tmp_path), **TINY)
    assert root == tmp_path
    image = next(root.rglob("image*.png"))
    image.write_bytes(b"kept")
    assert mura.write(tmp_path, **TINY) == root
    assert image.read_bytes() == b"kept"


def test_write_interrupted_leaves_no_set_and_is_done_anew(tmp_path, monkeypatch):
    whole = mura.write(tmp_path / "whole", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(mura, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mura.write(tmp_path / "killed", **TINY)
    assert not (tmp_path / "killed/mura").exists()
    assert _file_bytes(mura.write(tmp_path / "killed", **TINY)) == _file_bytes(whole)
