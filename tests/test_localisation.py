import json

import numpy as np
import pandas as pd
import pytest

from kerasmed import localisation, metrics

# --- sizes -----------------------------------------------------------------------------------------------------------


def test_upsample_is_bilinear_between_cell_centres_and_keeps_units():
    # Centres of two cells over four pixels are at 1/2 and 5/2; outside them the edge is repeated.
    enlarged = localisation.upsample(np.array([[[0, 8]], [[3, 3]]]), (2, 4))
    np.testing.assert_array_equal(enlarged, [[[0, 2, 6, 8]] * 2, [[3] * 4] * 2])
    assert enlarged.dtype == np.float32


def test_upsample_no_maps_is_empty():
    assert localisation.upsample(np.zeros((0, 2, 2)), (4, 6)).shape == (0, 4, 6)


def test_scale_boxes_by_hand_of_files_of_unlike_sizes():
    # A file of 100×200 pixels is halved in height and kept in width; one of 50×400 kept in height and halved in width.
    boxes = np.array([[10, 20, 30, 40], [100, 20, 30, 10], [np.nan] * 4])
    scaled = localisation.scale_boxes(boxes, np.array([[100, 200], [50, 400], [50, 200]]), (50, 200))
    np.testing.assert_array_equal(scaled, [[10, 10, 30, 20], [50, 20, 15, 10], [np.nan] * 4])


def test_scale_boxes_keeps_the_share_of_the_image(rng):
    sizes = rng.integers(100, 2000, (20, 2))
    corners, sides = rng.random((2, 20, 2)) / 2
    boxes = np.hstack([corners, sides]) * np.tile(sizes[:, ::-1], 2)
    _, chance = localisation.pointing_game(
        np.ones((20, 3, 3)), localisation.scale_boxes(boxes, sizes, (70, 90)), (70, 90)
    )
    np.testing.assert_allclose(chance, sides.prod(axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("boxes", "sizes", "message"),
    [
        (np.ones((2, 3)), np.ones((2, 2)), r"`boxes` have shape \(2, 3\)"),
        (np.ones((2, 4)), np.ones(2), r"`file_sizes` \(2,\); expected"),
        (np.ones((3, 4)), [[9, 9], [0, 9], [9, np.nan]], r"of 2 of 3 boxes have no size.*First rows: \[1, 2\]"),
    ],
)
def test_scale_boxes_unfit_boxes_or_sizes_are_refused(boxes, sizes, message):
    with pytest.raises(ValueError, match=message):
        localisation.scale_boxes(boxes, np.array(sizes), (8, 8))


# --- the pointing game -----------------------------------------------------------------------------------------------


def test_peaks_are_at_the_centre_of_the_highest_cell():
    # A cell of a 2×2 map covers 2×3 pixels of a 4×6 image: rows 2 and 3, columns 0 to 2 for the third cell.
    heat = np.array([[[0, 1], [5, 0]], [[2, 0], [0, 2]], [[0, 0], [0, 0]]])
    np.testing.assert_array_equal(localisation.peaks(heat, (4, 6)), [[2.5, 1], [0.5, 1], [np.nan, np.nan]])


def test_peaks_are_where_the_enlarged_map_is_highest(rng):
    # With an odd number of pixels a cell, its centre is a pixel.
    heat = rng.random((20, 4, 5))
    enlarged = localisation.upsample(heat, (12, 15))
    rows, columns = localisation.peaks(heat, (12, 15)).astype(int).T
    np.testing.assert_array_equal(enlarged[np.arange(20), rows, columns], enlarged.max(axis=(1, 2)))


def test_pointing_game_by_hand():
    # The peak of each 2×2 map lies in the middle of the right upper quarter of a 8×4 image: y 1.5, x 2.5.
    heat = np.array([[[0, 1], [0, 0]]] * 4 + [[[0, 0], [0, 0]]])
    boxes = np.array([[2, 0, 2, 4], [0, 0, 4, 2], [2, 2, 2, 6], [0, 0, 3, 2], [0, 0, 4, 8]])
    hits, chance = localisation.pointing_game(heat, boxes, (8, 4))
    # The box of the second ends at y = 2, the middle of the cell: outside. So begins the third's: inside.
    assert hits.tolist() == [True, False, True, False, False]
    np.testing.assert_array_equal(chance, [8 / 32, 8 / 32, 12 / 32, 6 / 32, 1])


def test_pointing_game_chance_is_the_share_of_all_pixels_that_hit():
    heat = np.eye(6 * 8).reshape(-1, 6, 8)
    for box in ([0, 0, 1, 1], [2, 1, 5, 3], [0, 0, 8, 6]):
        hits, chance = localisation.pointing_game(heat, np.tile(box, (48, 1)), (6, 8))
        assert hits.mean() == chance[0]


def test_pointing_game_counts_only_what_lies_inside_the_image():
    _, chance = localisation.pointing_game(np.ones((1, 2, 2)), np.array([[-0.5, 3, 2.5, 1.5]]), (4, 4))
    assert chance.tolist() == [2 * 1 / 16]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 2, 2]], r"shape \(1, 4\); expected \(2, 4\)"),
        ([[0, 0, 2, 2], [np.nan] * 4], r"1 of 2 boxes are missing.*First rows: \[1\]"),
        ([[0, 0, 2, 0], [0, 0, 2, 2]], "1 of 2 boxes are missing, empty"),
        ([[0, 0, 2, 2], [40, 30, 20, 20]], r"outside an image of \(4, 4\).*scale boxes"),
        ([[2, 2, 2, 4], [-2, 2, 4, 2]], r"2 of 2 boxes are missing, empty, or outside.*First rows: \[0, 1\]"),
    ],
)
def test_pointing_game_unfit_boxes_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        localisation.pointing_game(np.ones((2, 2, 2)), np.array(boxes, float), (4, 4))


def test_pointing_game_box_that_ends_before_the_image_is_refused():
    # Within the pixel that is granted, and yet nothing of it is inside.
    with pytest.raises(ValueError, match="1 of 1 boxes are missing, empty, or outside"):
        localisation.pointing_game(np.ones((1, 2, 2)), np.array([[-1, 0, 0.5, 2]]), (4, 4))


@pytest.mark.parametrize("function", [localisation.pointing_game, localisation.energy_inside, localisation.iou])
@pytest.mark.parametrize(
    ("heat", "message"),
    [
        ([[[1, 2]], [[1, -1]]], r"1 of 2 maps are negative.*\[1\]"),
        ([[[np.nan, 2]], [[1, 1]]], r"not finite.*\[0\]"),
        ([[1, 2], [3, 4]], r"`heat` has shape \(2, 2\)"),
    ],
)
def test_maps_that_are_no_heat_are_refused(function, heat, message):
    with pytest.raises(ValueError, match=message):
        function(np.array(heat), np.array([[0, 0, 2, 2]] * 2), (4, 4))


def test_figures_of_no_maps_are_empty():
    none = np.zeros((0, 2, 2)), np.zeros((0, 4)), (4, 4)
    assert [part.shape for part in localisation.pointing_game(*none)] == [(0,), (0,)]
    assert localisation.energy_inside(*none).shape == localisation.iou(*none).shape == (0,)


# --- energy ----------------------------------------------------------------------------------------------------------


def test_energy_inside_by_hand_counts_cut_cells_by_area():
    # Cells of 2×2 pixels. The box covers half of each column, all of the first row and half of the second:
    # (1 + 2) / 2 + (3 + 4) / 4 = 3.25 of 10.
    heat = np.array([[[1, 2], [3, 4]]] * 2)
    boxes = np.array([[1, 0, 2, 3], [2, 2, 2, 2]])
    np.testing.assert_array_equal(localisation.energy_inside(heat, boxes, (4, 4)), [0.325, 0.4])


def test_energy_inside_limits_are_one_all_inside_zero_all_outside_nan_where_dead():
    heat = np.array([[[0, 5], [0, 0]], [[0, 0], [3, 0]], [[0, 0], [0, 0]]])
    energy = localisation.energy_inside(heat, np.array([[2, 0, 2, 2]] * 3), (4, 4))
    np.testing.assert_array_equal(energy, [1, 0, np.nan])


def test_energy_inside_of_equal_heat_is_the_chance_to_hit(rng):
    corners, sides = rng.random((2, 50, 2)) * [45, 30]
    boxes = np.hstack([corners, sides])
    heat = np.broadcast_to(rng.random((50, 1, 1)) + 0.1, (50, 7, 5))
    _, chance = localisation.pointing_game(heat, boxes, (60, 90))
    np.testing.assert_allclose(localisation.energy_inside(heat, boxes, (60, 90)), chance, rtol=1e-12)


def test_energy_inside_is_the_sum_over_the_pixels_of_nearest_cells(rng):
    # Whole pixels, and cells of 4×3 of them.
    heat = rng.random((10, 5, 6))
    boxes = np.hstack([rng.integers(0, 9, (10, 2)), rng.integers(1, 9, (10, 2))])
    enlarged = heat.repeat(4, axis=1).repeat(3, axis=2)
    expected = [map_[y : y + h, x : x + w].sum() / map_.sum() for map_, (x, y, w, h) in zip(enlarged, boxes)]
    np.testing.assert_allclose(localisation.energy_inside(heat, boxes, (20, 18)), expected, rtol=1e-12)


# --- overlap ---------------------------------------------------------------------------------------------------------


def test_iou_by_hand_counts_cut_pixels_by_area():
    # Hot is the first row, 4 and 2. The first box has one of its pixels and one other: 1/3. The second half of the one
    # and all of the other: 1.5 / 2.
    heat = np.array([[[4, 2], [1, 0]]] * 2)
    np.testing.assert_array_equal(
        localisation.iou(heat, np.array([[0, 0, 1, 2], [0.5, 0, 1.5, 1]]), (2, 2)), [1 / 3, 0.75]
    )


def test_iou_enlarges_bilinearly_and_cuts_at_the_threshold():
    # Over four pixels: 0, 2, 6, 8. Hot from 4 are the last two, from 2 the last three, from 8 the last.
    heat, box = np.array([[[0, 8]]]), np.array([[2, 0, 2, 1]])
    found = [localisation.iou(heat, box, (1, 4), threshold=threshold)[0] for threshold in (0.5, 0.25, 1)]
    assert found == [1, 2 / 3, 1 / 2]


def test_iou_limits_are_zero_where_dead_or_apart_and_the_chance_of_equal_heat(rng):
    heat = np.array([np.zeros((2, 2)), [[0, 0], [0, 1]], np.full((2, 2), 1e-9)])
    boxes = np.array([[0, 0, 3.5, 3.5]] * 3)
    # At 2 of 4 cells' distance no pixel of the box reaches half of the maximum.
    found = localisation.iou(heat, np.array([boxes[0], [0, 0, 1, 1], boxes[2]]), (7, 7))
    np.testing.assert_allclose(found, [0, 0, 0.25], rtol=1e-15)


def test_iou_does_not_depend_on_how_many_maps_are_looked_at_together(rng, monkeypatch):
    heat, boxes = rng.random((7, 3, 3)), np.hstack([rng.random((7, 2)) * 10, 1 + rng.random((7, 2)) * 9])
    at_once = localisation.iou(heat, boxes, (20, 20))
    monkeypatch.setattr(localisation, "_CHUNK", 800)
    np.testing.assert_array_equal(localisation.iou(heat, boxes, (20, 20)), at_once)
    assert len(set(at_once)) == 7


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5, np.nan])
def test_iou_unfit_threshold_is_refused(threshold):
    with pytest.raises(ValueError, match=f"`threshold` is {threshold}; expected a share"):
        localisation.iou(np.ones((1, 2, 2)), np.array([[0, 0, 1, 1]]), (4, 4), threshold=threshold)


def test_real_boxes_lie_inside_the_scaled_images(real_data):
    rows = pd.read_csv(real_data / "chest" / "BBox_List_2017.csv", header=None, skiprows=1, usecols=[2, 3, 4, 5])
    boxes = rows.to_numpy(float)  # in files of 1024×1024 pixels
    scaled = localisation.scale_boxes(boxes, np.full((len(boxes), 2), 1024), (320, 320))
    # A map of one pixel a cell, hot at the middle of the box.
    heat = np.zeros((len(boxes), 320, 320), np.float32)
    x, y = (scaled[:, :2] + scaled[:, 2:] / 2).astype(int).T
    heat[np.arange(len(boxes)), y, x] = 1
    hits, chance = localisation.pointing_game(heat, scaled, (320, 320))
    assert len(boxes) == 984 and hits.all()
    assert 0.05 < chance.mean() < 0.08
    np.testing.assert_allclose(localisation.energy_inside(heat, scaled, (320, 320)), 1, rtol=1e-9)


# --- many maps -------------------------------------------------------------------------------------------------------

OK, ZERO, NEGATIVE = localisation.STATUSES
# 4×4 pixels: label a hits with all its heat, and is dead twice; label b hits with a third, and misses.
HEAT = np.array([[[0, 2], [0, 0]], np.zeros((2, 2)), np.zeros((2, 2)), [[2, 3], [4, 0]], [[1, 0], [0, 0]]], float)
STATUS = [OK, ZERO, NEGATIVE, OK, OK]
LABELS = ["a", "a", "a", "b", "b"]
BOXES = np.array([[2, 0, 2, 2], [0, 0, 4, 4], [0, 0, 4, 4], [0, 2, 3, 2], [2, 0, 2, 4]])
GROUPS = ["p", "p", "q", "q", "r"]


@pytest.fixture
def told():
    return localisation.table(HEAT, STATUS, pd.Series(LABELS, index=range(5, 10)), BOXES, (4, 4))


def test_health_shares_sum_to_one_by_label_as_it_first_occurs():
    counts = localisation.health([NEGATIVE, OK, OK, ZERO, OK], ["b", "a", "a", "a", "a"])
    assert counts.index.tolist() == ["all", "b", "a"] and counts["n"].tolist() == [5, 1, 4]
    np.testing.assert_allclose(counts.loc["all", list(localisation.STATUSES)].astype(float), [0.6, 0.2, 0.2])
    np.testing.assert_allclose(counts[list(localisation.STATUSES)].sum(axis=1), 1, rtol=1e-15)
    assert counts.loc["b", NEGATIVE] == 1 and counts.loc["a", ZERO] == 0.25


@pytest.mark.parametrize(
    ("status", "labels", "message"),
    [
        ([], [], "at least one map"),
        ([OK], ["a", "b"], r"shape \(1,\) and `labels` \(2,\)"),
        ([OK, "dead"], ["a", "b"], r"holds \['dead'\]; expected ok, zero_gradient, negative"),
    ],
)
def test_health_unfit_statuses_are_refused(status, labels, message):
    with pytest.raises(ValueError, match=message):
        localisation.health(status, labels)


def test_table_has_a_row_a_box_worked_by_hand(told):
    expected = pd.DataFrame(
        {
            "label": LABELS,
            "status": STATUS,
            "hit": [True, False, False, True, False],
            "chance": [0.25, 1, 1, 6 / 16, 0.5],
            "energy": [1, np.nan, np.nan, 4 / 9, 0],
            "iou": localisation.iou(HEAT, BOXES, (4, 4)),
        }
    )
    pd.testing.assert_frame_equal(told, expected, rtol=1e-15)
    assert told["iou"].gt(0).tolist() == [True, False, False, True, False]


def test_table_of_maps_and_statuses_in_another_order_is_refused():
    with pytest.raises(ValueError, match=r"3 of 5 maps have heat and a status other.*First rows: \[0, 1, 2\]"):
        localisation.table(HEAT, [NEGATIVE, OK, OK, OK, OK], LABELS, BOXES, (4, 4))
    with pytest.raises(ValueError, match=r"5 maps, `status` the shape \(4,\)"):
        localisation.table(HEAT, STATUS[:4], LABELS, BOXES, (4, 4))


def _by_metric(rows, label):
    return {row["metric"]: row for row in rows if row["label"] == label}


def test_summary_by_hand(told):
    rows = localisation.summary(told, GROUPS, task="t", variant="v", split="boxes", num_draws=50)
    assert [(row["label"], row["metric"]) for row in rows] == [
        (label, metric) for label in ("all", "a", "b") for metric in localisation.METRICS
    ]
    one = {metric: row["value"] for metric, row in _by_metric(rows, "all").items()}
    # Hits count dead maps, energy leaves them out, the overlap is 0 for them.
    expected = {"dead_zero_gradient": 1 / 5, "dead_negative": 1 / 5, "pointing_hit": 2 / 5, "chance": 3.125 / 5}
    expected |= {"energy_inside": (1 + 4 / 9) / 3, "iou": told["iou"].sum() / 5}
    assert one == pytest.approx(expected, rel=1e-12)
    of_a = _by_metric(rows, "a")["pointing_hit"]
    assert (of_a["task"], of_a["split"], of_a["variant"], of_a["n"], of_a["n_groups"]) == ("t", "boxes", "v", 3, 2)
    assert of_a["value"] == pytest.approx(1 / 3) and of_a["baseline"]["value"] == pytest.approx(2.25 / 3)
    assert of_a["baseline"]["difference"] == pytest.approx((1 - 2.25) / 3)
    assert of_a["baseline"]["variant"] == "box area"
    assert all(row["baseline"] is None for row in rows if row["metric"] != "pointing_hit")


def test_summary_intervals_are_over_groups_on_common_draws(told):
    rows = localisation.summary(told, GROUPS, task="t", variant="v", num_draws=4, seed=0)
    # Few draws: every one moves the interval.
    draws = metrics.bootstrap_weights(GROUPS, num_draws=4, seed=0)
    hit, chance, energy, is_b = (np.array(told[name]) for name in ("hit", "chance", "energy", "label"))
    is_b = is_b == "b"
    drawn = [np.repeat(np.arange(5), weights.astype(int)) for weights in draws]
    row = _by_metric(rows, "all")["pointing_hit"]
    np.testing.assert_allclose(row["ci95"], metrics.interval(np.array([hit[part].mean() for part in drawn])))
    above = np.array([hit[part].mean() - chance[part].mean() for part in drawn])
    np.testing.assert_allclose(row["baseline"]["difference_ci95"], metrics.interval(above))
    # A draw without a living map of b says nothing of it.
    of_b = [energy[part[is_b[part]]] for part in drawn]
    expected = metrics.interval(np.array([part.mean() if len(part) else np.nan for part in of_b]))
    np.testing.assert_allclose(_by_metric(rows, "b")["energy_inside"]["ci95"], expected)
    assert rows == localisation.summary(told, GROUPS, task="t", variant="v", num_draws=4, seed=0)


def test_summary_of_dead_maps_has_no_energy_and_says_why(told):
    rows = localisation.summary(told[1:3], GROUPS[1:3], task="t", variant="v", num_draws=20)
    for label, reason in (("all", "every map is dead"), ("a", "every map of a is dead")):
        found = _by_metric(rows, label)
        assert (found["energy_inside"]["value"], found["energy_inside"]["ci95"]) == (None, None)
        assert found["energy_inside"]["reason"] == reason
        assert [found[metric]["value"] for metric in ("pointing_hit", "iou", "chance")] == [0, 0, 1]
        assert found["pointing_hit"]["ci95"] == [0, 0] and "reason" not in found["pointing_hit"]


def test_summary_of_one_group_has_no_spread(told):
    for row in localisation.summary(told, ["p"] * 5, task="t", variant="v", num_draws=20):
        assert row["n_groups"] == 1 and row["ci95"] == pytest.approx([row["value"]] * 2)


def test_summary_without_boxes_counts_the_dead_alone(told):
    whole = localisation.summary(told, GROUPS, task="t", variant="v", num_draws=20)
    rows = localisation.summary(told[["label", "status"]], GROUPS, task="t", variant="v", num_draws=20)
    assert rows == [row for row in whole if row["metric"].startswith("dead")]


def test_summary_rows_are_plain_and_can_be_laid_out(told):
    rows = localisation.summary(told, GROUPS, task="t", variant="v", num_draws=20)
    assert json.loads(json.dumps(rows)) == rows
    shown = metrics.tabulate(rows)
    hit = shown[(shown["metric"] == "pointing_hit") & (shown["label"] == "all")].iloc[0]
    assert hit["shown"].startswith("0.400 [") and hit["baseline"] == "box area 0.625"
    assert hit["difference"].startswith("-0.225 [")


def test_summary_unfit_groups_and_empty_tables_are_refused(told):
    with pytest.raises(ValueError, match=r"5 rows and `groups` the shape \(4,\)"):
        localisation.summary(told, GROUPS[:4], task="t", variant="v")
    with pytest.raises(ValueError, match="0 rows .* at least one map"):
        localisation.summary(told[:0], [], task="t", variant="v")
