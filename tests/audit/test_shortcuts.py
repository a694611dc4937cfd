import numpy as np
import pandas as pd
import pytest

from kerasmed import audit
from kerasmed.audit import shortcuts


def test_grey_levels_count_every_pixel_of_each_image(rng, monkeypatch):
    monkeypatch.setattr(shortcuts, "_HISTOGRAM_BLOCK", 2)
    pictures = np.stack([np.zeros((2, 3)), np.full((2, 3), 255), [[0, 0, 7], [7, 7, 255]]]).astype(np.uint8)
    counts = audit.grey_levels(pictures)
    assert counts.shape == (3, 256) and (counts.sum(axis=1) == 6).all()
    assert (counts[0, 0], counts[1, 255]) == (6, 6)
    assert counts[2, [0, 7, 255]].tolist() == [2, 3, 1]
    random = rng.integers(0, 256, (5, 4, 4), dtype=np.uint8)
    # sums of at most 16 · 255, exact in float64
    np.testing.assert_array_equal(audit.grey_levels(random) @ np.arange(256) / 16, random.mean(axis=(1, 2)))


def test_class_means_by_hand_with_shared_and_empty_classes(monkeypatch):
    monkeypatch.setattr(shortcuts, "_HISTOGRAM_BLOCK", 2)
    pictures = np.array([10, 20, 60], np.uint8).reshape(3, 1, 1) * np.ones((1, 2, 2), np.uint8)
    membership = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0]], bool)  # the second image is in two classes
    means = audit.class_means(pictures, membership)
    assert means[:2, 0, 0].tolist() == [15, 40] and np.isnan(means[2]).all()


def _labels(labels):
    return pd.DataFrame({name: (np.array(labels) == number).astype(float) for number, name in enumerate("ab")})


def test_by_class_quartiles_and_auroc_by_hand():
    measures = pd.DataFrame({"size": [1, 2, 3, 4, 5, 6], "same": 7})
    table = audit.by_class(_labels([0, 0, 0, 1, 1, 1]), ("a", "b"), measures).set_index(["measure", "class"])
    assert table.loc[("size", "a")].tolist() == [3, 1.5, 2, 2.5, 0]  # every "a" is smaller than every "b"
    assert table.loc[("size", "b"), ["median", "auroc"]].tolist() == [5, 1]
    assert table.loc["same", "auroc"].tolist() == [0.5, 0.5]


def test_by_class_leaves_out_unknown_labels_and_values():
    manifest = _labels([0, 0, 1, 1])
    manifest.loc[0, "a"] = np.nan
    measures = pd.DataFrame({"size": pd.array([1, 2, 3, None], "Int64"), "none": [np.nan] * 4})
    table = audit.by_class(manifest, ("a",), measures).set_index("measure")
    assert table.loc["size", ["images", "median", "auroc"]].tolist() == [1, 2, 0]
    assert table.loc["none", "images"] == 0 and table.loc["none", ["median", "auroc"]].isna().all()
    with pytest.raises(ValueError, match="1 rows of measures for 4"):
        audit.by_class(manifest, ("a",), measures.head(1))


def test_measure_by_hand():
    files = pd.DataFrame(
        {
            "bytes": [10, 20, None],
            "height": [4, 5, None],
            "width": [6, 7, None],
            "bits": [8, 16, None],
            "format": ["PNG", "JPEG", None],
            "mode": ["L", "L", None],
        },
        index=[7, 8, 9],
    ).astype(dict.fromkeys(("bytes", "height", "width", "bits"), "Int64"))
    thumbnails = np.zeros((3, 64, 64), np.uint8)
    thumbnails[1] = 100
    thumbnails[1, 1:-1, 1:-1] = 20
    thumbnails[2, 0] = 63
    table = audit.measure(files, thumbnails)
    assert table.loc[1, ["bytes", "height", "width", "bits"]].tolist() == [20, 5, 7, 16]
    assert table["format"].tolist() == [1, 0, -1] and table["mode"].tolist() == [0, 0, -1]
    assert table.loc[2, ["bytes", "height"]].isna().all()
    # 252 of the 4,096 pixels are border
    np.testing.assert_allclose(table["mean intensity"], [0, (252 * 100 + 3844 * 20) / 4096, 63 / 64], rtol=1e-12)
    np.testing.assert_allclose(table["border intensity"], [0, 100, 64 * 63 / 252], rtol=1e-6)  # float32
    share = 64 / 252
    np.testing.assert_allclose(table["border spread"], [0, 0, 63 * np.sqrt(share * (1 - share))], rtol=1e-5)


@pytest.fixture
def sample(rng):
    """300 images of 100 groups: measures, one of which tells the label "told", and groups."""
    groups = np.repeat(np.arange(100), 3)
    told = groups % 2
    measures = pd.DataFrame({"bytes": rng.random(300), "width": 10 + told * 2 + rng.normal(size=300), "bits": 8.0})
    return measures, told.astype(float), groups


def test_probe_finds_the_measure_that_tells_a_label_and_nothing_in_a_coin(rng, sample):
    measures, told, groups = sample
    targets = pd.DataFrame({"told": told, "coin": rng.integers(0, 2, 100).repeat(3)})
    table = audit.probe(measures, targets, groups).set_index("target")
    assert table.loc["told", ["images", "positives", "strongest", "reason"]].tolist() == [300, 150, "width", ""]
    # two normal distributions two deviations apart: AUROC Φ(√2) = 0.92
    assert 0.8 < table.loc["told", "low"] < table.loc["told", "auroc"] < table.loc["told", "high"] < 0.97
    assert table.loc["told", "alone"] == pytest.approx(0.92, abs=0.03)
    assert table.loc["coin", "low"] < 0.5 < table.loc["coin", "high"]
    pd.testing.assert_frame_equal(audit.probe(measures, targets, groups).set_index("target"), table)


def test_probe_learns_nothing_of_groups_by_heart(rng):
    # The measure names the group, whose label is a coin: of groups never seen it tells nothing.
    groups = np.repeat(np.arange(60), 5)
    targets = pd.DataFrame({"coin": rng.integers(0, 2, 60).repeat(5)})
    measures = pd.DataFrame({"name": rng.permutation(60).repeat(5).astype(float)})
    (row,) = audit.probe(measures, targets, groups).itertuples()
    assert row.low < 0.5 < row.high
    (alone,) = audit.probe(measures, targets, np.arange(300)).itertuples()
    assert alone.low > 0.9  # with images as groups, the same trees know them all


def test_probe_leaves_out_unknown_labels_and_takes_unknown_measures(sample):
    measures, told, groups = sample
    unknown = told.copy()
    unknown[:60] = np.nan
    measures.loc[100:140, "width"] = np.nan
    measures["never"] = np.nan
    (row,) = audit.probe(measures, pd.DataFrame({"told": unknown}), groups).itertuples()
    assert (row.images, row.positives, row.strongest) == (240, 120, "width") and row.low > 0.7


@pytest.mark.parametrize("positives", [0, 4, 12])
def test_probe_says_why_there_is_no_figure(positives):
    groups = np.repeat(np.arange(12), 3)
    targets = pd.DataFrame({"rare": (groups < positives).astype(float)})
    (row,) = audit.probe(pd.DataFrame({"bytes": groups * 1.0}), targets, groups).itertuples()
    assert row.reason.startswith("fewer than 5 groups") and np.isnan(row.auroc) and row.positives == positives * 3


def test_probe_without_targets_or_images_is_empty(sample):
    measures, _, groups = sample
    assert audit.probe(measures, pd.DataFrame(index=measures.index), groups).empty
    (row,) = audit.probe(measures.head(0), pd.DataFrame({"a": np.zeros(0)}), []).itertuples()
    assert row.images == 0 and row.reason


def test_probe_of_unlike_tables_is_refused(sample):
    measures, told, groups = sample
    with pytest.raises(ValueError, match="300 rows of measures, 2 of targets and 300 of groups"):
        audit.probe(measures, pd.DataFrame({"told": told[:2]}), groups)


def test_classify_tells_what_the_training_images_show_of_every_image(rng):
    ids = np.arange(240) % 3
    measures = pd.DataFrame({"width": 10.0 * ids, "noise": rng.random(240)})
    train = np.arange(120)
    told = audit.classify(measures, ids[train], train, 3, seed=0)
    assert told.shape == (240, 3)
    np.testing.assert_allclose(told.sum(axis=1), 1, atol=1e-12)
    assert (told.argmax(axis=1) == ids).all() and told[np.arange(240), ids].min() > 0.9
    np.testing.assert_array_equal(audit.classify(measures, ids[train], train, 3, seed=0), told)
    # The labels are those of the rows named, in their order.
    backwards = audit.classify(measures, ids[train[::-1]], train[::-1], 3, seed=0)
    assert (backwards.argmax(axis=1) == ids).all()


def test_classify_knows_nothing_from_noise_and_nothing_of_other_rows(rng):
    ids, measures = rng.integers(0, 2, 400), pd.DataFrame({"noise": rng.random(400)})
    train = np.arange(0, 400, 2)
    told = audit.classify(measures, ids[train], train, 2)
    held_out = np.setdiff1d(np.arange(400), train)
    # 200 trials of a coin: three standard errors of 0.035
    assert abs((told.argmax(axis=1) == ids)[held_out].mean() - 0.5) < 0.11
    changed = measures.copy()
    changed.loc[held_out, "noise"] = rng.random(200)
    np.testing.assert_array_equal(audit.classify(changed, ids[train], train, 2)[train], told[train])


def test_classify_gives_a_class_that_no_training_image_has_nothing(rng):
    ids = np.resize([1, 3], 100)
    told = audit.classify(pd.DataFrame({"width": ids * 1.0}), ids, np.arange(100), 5)
    assert told.shape == (100, 5) and not told[:, [0, 2, 4]].any()
    assert (told.argmax(axis=1) == ids).all()


def test_classify_takes_unknown_measures():
    ids = np.arange(120) % 2
    width = np.where(ids == 1, np.nan, 5.0)
    measures = pd.DataFrame({"width": width, "never": np.nan, "bits": pd.array([8, 8, None, None] * 30, "Int64")})
    told = audit.classify(measures, ids, np.arange(120), 2)
    assert (told.argmax(axis=1) == ids).all()


@pytest.mark.parametrize("seed", range(5))
def test_folds_cut_no_group_and_hold_both_kinds(seed):
    # 5 groups with positives, of which 2 are mixed, and 3 without: 5 groups with negatives
    groups = np.repeat(np.arange(8), [1, 9, 1, 4, 2, 7, 1, 3])
    positive = groups < 5
    positive[np.searchsorted(groups, [3, 4])] = False
    table = pd.DataFrame({"fold": shortcuts._folds(positive, groups, seed), "group": groups, "positive": positive})
    assert table.groupby("group")["fold"].nunique().eq(1).all()
    assert table.groupby("fold")["positive"].nunique().eq(2).all() and table["fold"].nunique() == 5


def test_classify_of_one_class_answers_it_everywhere():
    told = audit.classify(pd.DataFrame({"height": [1.0, 2.0, 3.0]}), np.array([2, 2]), np.array([0, 1]), 4)
    assert told.tolist() == [[0, 0, 1, 0]] * 3
