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
