import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, splits

CLASSES = ("a", "b", "c")


def _manifest(groups_per_class, images_per_group=5):
    rows = [
        (f"{name}{group}_{image}.png", f"{name}{group}", name)
        for name, groups in zip(CLASSES, groups_per_class)
        for group in range(groups)
        for image in range(images_per_group)
    ]
    frame = pd.DataFrame(rows, columns=["image_path", "group_id", "label"])
    labels = {name: (frame["label"] == name).astype(int) for name in CLASSES}
    return frame.assign(patient_id=frame["group_id"], study_id=pd.NA, split="train", **labels)


def test_assign_cuts_no_group_and_keeps_shares():
    frame = splits.assign(_manifest((80, 60, 60)), CLASSES, seed=3)
    assert (frame.groupby("group_id")["split"].nunique() == 1).all()
    audit.gate(frame)
    shares = frame["split"].value_counts(normalize=True)
    # 200 groups in 20 folds: a fold is 5 %, and a group 0.5 %
    assert shares["test"] == pytest.approx(0.15, abs=0.01) and shares["valid"] == pytest.approx(0.15, abs=0.01)
    by_class = frame.groupby("label")["split"].value_counts(normalize=True).unstack()
    assert by_class["test"].between(0.11, 0.19).all()


def test_assign_same_seed_same_split_other_seed_another():
    frame = _manifest((30, 30, 30))
    one, two, other = (splits.assign(frame, CLASSES, seed=seed)["split"].tolist() for seed in (1, 1, 2))
    assert one == two
    assert one != other


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_groups", "expected"), [(1, [1, 0, 0]), (2, [1, 0, 1]), (3, [1, 1, 1])])
def test_assign_class_of_few_groups_goes_to_train_then_test(num_groups, expected, seed):
    frame = splits.assign(_manifest((40, 40, num_groups)), CLASSES, seed=seed)
    counts = splits.groups_per_split(frame, CLASSES).loc["c"]
    assert [counts[split, "groups"] for split in ("train", "valid", "test")] == expected
    assert sum(counts[split, "images"] for split in ("train", "valid", "test")) == 5 * num_groups
    audit.gate(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_id": pd.NA}, "`group_id` is missing in 30 rows"),
        ({"group_id": "one"}, "1 groups cannot fill"),
        ({"b": 1}, "not exclusive"),
    ],
)
def test_assign_unfit_manifest_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        splits.assign(_manifest((2, 2, 2)).assign(**change), CLASSES)


def test_assign_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="together below 1"):
        splits.assign(_manifest((5, 5, 5)), CLASSES, test_share=0.6, valid_share=0.5)


def test_folds_partition_the_groups():
    frame = _manifest((10, 10, 10))
    fold = splits.folds(frame, CLASSES, num_folds=5)
    assert np.bincount(fold).tolist() == [30] * 5
    assert (frame.assign(fold=fold).groupby("group_id")["fold"].nunique() == 1).all()
