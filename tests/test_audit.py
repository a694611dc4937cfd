import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit


def _heads(rng, count):
    return np.stack(
        [
            cv2.resize(rng.integers(0, 256, (6, 6), dtype=np.uint8), (64, 64), interpolation=cv2.INTER_CUBIC)
            for _ in range(count)
        ]
    )


def test_similarity_groups_finds_each_patients_slices(rng):
    heads = np.repeat(_heads(rng, 8), 3, axis=0)
    noisy = np.clip(heads + rng.normal(0, 4, heads.shape), 0, 255).astype(np.uint8)
    order = rng.permutation(len(noisy))
    groups = audit.similarity_groups(noisy[order])
    truth = pd.Series(order // 3)
    assert pd.Series(groups).groupby(truth).nunique().eq(1).all()
    assert len(set(groups)) == 8


def test_similarity_groups_joins_through_a_chain(rng):
    one, other = _heads(rng, 2).astype(float)
    # Neighbouring mixtures correlate above 0.98, the ends of the chain far below.
    chain = np.stack([one + share * (other - one) for share in np.linspace(0, 1, 40)]).astype(np.uint8)
    assert len(set(audit.similarity_groups(chain))) == 1
    assert len(set(audit.similarity_groups(chain[[0, -1]]))) == 2


def test_similarity_groups_is_blind_to_brightness_and_contrast(rng):
    head = _heads(rng, 1)[0].astype(float)
    assert len(set(audit.similarity_groups(np.stack([head, head * 0.5 + 40]).astype(np.uint8)))) == 1


def test_similarity_groups_constant_images_join_their_equals(rng):
    black, grey = np.zeros((64, 64), np.uint8), np.full((64, 64), 90, np.uint8)
    groups = audit.similarity_groups(np.stack([black, _heads(rng, 1)[0], black, grey]))
    assert groups[0] == groups[2] and len(set(groups)) == 3


def test_similarity_groups_blocks_do_not_change_the_result(rng, monkeypatch):
    heads = np.repeat(_heads(rng, 10), 2, axis=0)[rng.permutation(20)]
    whole = audit.similarity_groups(heads)
    monkeypatch.setattr(audit, "_BLOCK", 3)
    np.testing.assert_array_equal(audit.similarity_groups(heads), whole)


def test_similarity_groups_threshold_out_of_range_is_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        audit.similarity_groups(np.zeros((1, 64, 64), np.uint8), threshold=98)


def test_similarity_groups_on_the_real_alzheimer_set_are_200_patients(real_data):
    from kerasmed import pipelines
    from kerasmed.datasets import brain

    store = pipelines.decode(brain.read(real_data, "alzheimer"), real_data, image_size=(32, 32), progress=False)
    sizes = np.bincount(audit.similarity_groups(store.thumbnails))
    labels = store.manifest[list(brain.CLASS_NAMES["alzheimer"])].to_numpy().argmax(axis=1)
    pure = pd.Series(labels).groupby(audit.similarity_groups(store.thumbnails)).nunique()
    assert len(sizes) == 200 and pure.eq(1).all()
    if not (real_data / "brain/alzheimer/test").exists():
        assert set(sizes) == {25, 26}


def test_nearest_finds_itself_with_correlation_1(rng):
    heads = _heads(rng, 5)
    positions, correlations = audit.nearest(heads[[3, 1]], heads)
    assert positions.tolist() == [3, 1]
    np.testing.assert_allclose(correlations, 1, atol=1e-5)  # float32 sums of 4,096 terms


def test_nearest_without_references_is_refused():
    with pytest.raises(ValueError, match="at least one training image"):
        audit.nearest(np.zeros((1, 64, 64)), np.zeros((0, 64, 64)))


@pytest.mark.parametrize("column", ["group_id", "patient_id", "study_id"])
def test_gate_names_who_crosses(column):
    frame = pd.DataFrame(
        {
            "group_id": ["g1", "g2", "g3"],
            "patient_id": ["p1", "p2", "p3"],
            "study_id": ["s1", "s2", "s3"],
            "split": ["train", "test", "valid"],
        }
    )
    assert audit.gate(frame)["in several splits"].eq(0).all()
    frame.loc[1, column] = frame.loc[0, column]
    with pytest.raises(audit.LeakError, match=rf"1 of 2 values of {column} lie in several splits: .1 in test\+train"):
        audit.gate(frame)


def test_gate_refuses_rows_without_group():
    frame = pd.DataFrame({"group_id": [pd.NA], "patient_id": ["p"], "study_id": ["s"], "split": ["train"]})
    with pytest.raises(ValueError, match="no `group_id`"):
        audit.gate(frame)


def _manifest(groups, splits, labels=None):
    labels = np.zeros(len(groups), int) if labels is None else np.array(labels)
    return pd.DataFrame(
        {
            "image_path": [f"{row}.png" for row in range(len(groups))],
            "group_id": groups,
            "split": splits,
            "a": (labels == 0).astype(int),
            "b": (labels == 1).astype(int),
        }
    )


def test_assign_groups_names_similarity_groups_by_first_appearance(rng):
    one, other = _heads(rng, 2)
    filled = audit.assign_groups(_manifest([pd.NA] * 3, ["train"] * 3), np.stack([one, other, one]), prefix="t")
    assert filled["group_id"].tolist() == ["t-00000", "t-00001", "t-00000"]


def test_assign_groups_leaves_known_groups_alone(rng):
    manifest = _manifest(["p1", "p2"], ["train"] * 2)
    same = audit.assign_groups(manifest, np.repeat(_heads(rng, 1), 2, axis=0), prefix="t")
    pd.testing.assert_frame_equal(same, manifest)


def test_assign_groups_of_some_rows_only_is_refused():
    with pytest.raises(ValueError, match=r"missing in 1 of 2 rows; give it in all, or in none. First: \['1.png'\]"):
        audit.assign_groups(_manifest(["p", pd.NA], ["train"] * 2), np.zeros((2, 64, 64), np.uint8), prefix="t")
    with pytest.raises(ValueError, match="1 thumbnails for 2 rows"):
        audit.assign_groups(_manifest([pd.NA] * 2, ["train"] * 2), np.zeros((1, 64, 64), np.uint8), prefix="t")


def test_crossing_counts_by_hand():
    # g1 is in all three splits, g2 in train and test, g3 in test only, g4 in valid only.
    groups = ["g1", "g2", "g1", "g4", "g1", "g1", "g2", "g3"]
    table = audit.crossing(_manifest(groups, ["train"] * 2 + ["valid"] * 2 + ["test"] * 4))
    assert table.index.tolist() == ["valid", "test"]
    assert table.loc["valid"].tolist() == [2, 2, 1, 1, 0.5]
    assert table.loc["test"].tolist() == [4, 3, 2, 3, 0.75]


def test_crossing_of_a_clean_split_is_zero_and_of_train_alone_empty():
    clean = audit.crossing(_manifest(["g1", "g2"], ["train", "test"]))
    assert clean.loc["test", ["groups_in_train", "images_in_train", "share_in_train"]].tolist() == [0, 0, 0]
    alone = audit.crossing(_manifest(["g1"], ["train"]))
    assert alone.empty and list(alone.columns) == list(clean.columns)


def test_crossing_without_groups_is_refused():
    with pytest.raises(ValueError, match="1 rows have no `group_id`; fill it with `assign_groups`"):
        audit.crossing(_manifest(["g", pd.NA], ["train", "test"]))


def test_grey_levels_count_every_pixel_of_each_image(rng, monkeypatch):
    monkeypatch.setattr(audit, "_HISTOGRAM_BLOCK", 2)
    pictures = np.stack([np.zeros((2, 3)), np.full((2, 3), 255), [[0, 0, 7], [7, 7, 255]]]).astype(np.uint8)
    counts = audit.grey_levels(pictures)
    assert counts.shape == (3, 256) and (counts.sum(axis=1) == 6).all()
    assert (counts[0, 0], counts[1, 255]) == (6, 6)
    assert counts[2, [0, 7, 255]].tolist() == [2, 3, 1]
    random = rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    # sums of at most 16 · 255, exact in float64
    np.testing.assert_array_equal(audit.grey_levels(random) @ np.arange(256) / 16, random.mean(axis=(1, 2)))


def test_class_means_by_hand_with_shared_and_empty_classes(monkeypatch):
    monkeypatch.setattr(audit, "_HISTOGRAM_BLOCK", 2)
    pictures = np.array([10, 20, 60], np.uint8).reshape(3, 1, 1) * np.ones((1, 2, 2), np.uint8)
    membership = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], bool)  # the second image is in two classes
    means = audit.class_means(pictures, membership)
    assert means[:2, 0, 0].tolist() == [15, 40] and np.isnan(means[2]).all()


def test_by_class_quartiles_and_auroc_by_hand():
    manifest = _manifest(["g"] * 6, ["train"] * 6, labels=[0, 0, 0, 1, 1, 1])
    measures = pd.DataFrame({"size": [1, 2, 3, 4, 5, 6], "same": 7})
    table = audit.by_class(manifest, ("a", "b"), measures).set_index(["measure", "class"])
    assert table.loc[("size", "a")].tolist() == [3, 1.5, 2, 2.5, 0]  # every "a" is smaller than every "b"
    assert table.loc[("size", "b"), ["median", "auroc"]].tolist() == [5, 1]
    assert table.loc["same", "auroc"].tolist() == [0.5, 0.5]


def test_by_class_leaves_out_unknown_labels_and_values():
    manifest = _manifest(["g"] * 4, ["train"] * 4, labels=[0, 0, 1, 1]).astype({"a": float})
    manifest.loc[0, "a"] = np.nan
    measures = pd.DataFrame({"size": pd.array([1, 2, 3, None], "Int64"), "none": [np.nan] * 4})
    table = audit.by_class(manifest, ("a",), measures).set_index("measure")
    assert table.loc["size", ["images", "median", "auroc"]].tolist() == [1, 2, 0]
    assert table.loc["none", "images"] == 0 and table.loc["none", ["median", "auroc"]].isna().all()
    with pytest.raises(ValueError, match="1 rows of measures for 4"):
        audit.by_class(manifest, ("a",), measures.head(1))
