import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kerasmed import grade_plots, grades
from kerasmed.plots import COLOURS

NAMES = ("Normal/Mild", "Moderate", "Severe")
FACTORS = ("embedding", "classifier")


def _texts(texts):
    return [text.get_text() for text in texts]


def _picture(level, height=6, width=8):
    return np.full((height, width), level, np.uint8)


@pytest.fixture
def rows():
    known = [("canal", "", "l1_l2", 0)] * 3 + [("canal", "", "l1_l2", 2), ("canal", "", "l2_l3", np.nan)]
    known += [("foraminal", side, "l1_l2", 1) for side in ("right", "left")]
    return pd.DataFrame(known, columns=["condition", "side", "level", "grade"])


def test_shares_bars_are_the_shares_of_each_level_and_side(rows):
    figure = grade_plots.shares(rows, NAMES, title="T")
    canal, foraminal = figure.axes
    assert figure.get_suptitle() == "T" and canal.get_title() == "canal\n4 grades, 1 blank"
    assert _texts(canal.get_yticklabels()) == ["L1–L2", "L2–L3"]
    assert _texts(foraminal.get_yticklabels()) == ["L1–L2 left", "L1–L2 right"]
    widths = [[bar.get_width() for bar in bars] for bars in canal.containers]
    assert widths == [[75, 0], [0, 0], [25, 0], [0, 100]]
    assert _texts(canal.texts) == ["75", "25", "100"]
    assert _texts(figure.legends[0].get_texts()) == [*NAMES, "blank"]


def test_shares_of_a_side_that_is_missing_are_those_of_an_empty_one(rows):
    missing = rows.assign(side=rows["side"].astype(object).where(rows["side"] != "", np.nan))
    figure = grade_plots.shares(missing, NAMES, title="T")
    assert _texts(figure.axes[0].get_yticklabels()) == ["L1–L2", "L2–L3"]
    with pytest.raises(ValueError, match="`rows` is empty"):
        grade_plots.shares(rows.iloc[:0], NAMES, title="T")


def test_modalities_count_series_and_sets():
    studies = pd.DataFrame({"T1": [1, 1, 0, 2, 0], "T2": [1, 1, 7, 0, 0]})
    figure = grade_plots.modalities(studies, ["T1", "T2"], title="T")
    by_count, by_set = figure.axes
    assert [[bar.get_width() for bar in bars] for bars in by_count.containers] == [
        [2, 2],
        [2, 2],
        [1, 0],
        [0, 0],
        [0, 1],
    ]
    assert _texts(by_count.get_yticklabels()) == ["T1\n2 without", "T2\n2 without"]
    assert _texts(figure.legends[0].get_texts())[::4] == ["no series", "4 or more series"]
    assert _texts(by_set.get_yticklabels())[0] == "T1 + T2" and by_set.texts[0].get_text() == "2 (40.0%)"
    assert set(_texts(by_set.get_yticklabels())) == {"T1 + T2", "T1", "T2", "none of them"}
    with pytest.raises(ValueError, match=r"`names` \['PD'\] are no columns"):
        grade_plots.modalities(studies, ["T1", "PD"], title="T")


def test_depths_share_their_scale_and_hold_every_series():
    table = pd.DataFrame({"modality": ["a", "a", "a", "b"], "slices": [3, 5, 5, 90]})
    first, second = grade_plots.depths(table, title="T").axes
    assert first.get_xlim() == second.get_xlim()
    for axis, count in ((first, 3), (second, 1)):
        assert sum(bar.get_height() for bar in axis.patches) == count
    assert first.get_title() == "a: 3 series, median 5, 3 to 5 slices"
    assert "3 a bar" in second.get_xlabel()  # 90 slices in at most forty bars


def test_montage_spreads_slices_from_first_to_last():
    volumes = {"a": np.stack([_picture(level) for level in range(9)]), "b": np.stack([_picture(7), _picture(8)])}
    figure = grade_plots.montage(volumes, title="T", count=3)
    shown = [(axis.get_title(), axis.images[0].get_array().max()) for axis in figure.axes if axis.images]
    first = [("slice 1 of 9", 0), ("slice 5 of 9", 4), ("slice 9 of 9", 8)]
    assert shown == [*first, ("slice 1 of 2", 7), ("slice 2 of 2", 8)]
    assert len(figure.axes) == 6 and [figure.axes[place].texts[0].get_text() for place in (0, 3)] == ["a", "b"]
    assert all(axis.images[0].get_clim() == (0, 255) for axis in figure.axes if axis.images)


def test_before_after_draws_a_histogram_under_each_image():
    image = np.repeat(np.array([[0] * 6 + [101, 255]], np.uint8), 4, axis=0)
    figure = grade_plots.before_after({"raw": [image] * 2, "HIST": [_picture(9)] * 2}, ["one", "two"], title="T")
    axes = np.array(figure.axes).reshape(4, 2)
    assert [axis.get_title() for axis in axes[0]] == ["raw", "HIST"]
    assert [axis.get_ylabel() for axis in axes[::2, 0]] == ["one", "two"]
    heights = [bar.get_height() for bar in axes[1, 0].patches]
    # levels 0, 101 and 255 in bins of four
    assert heights[0] == 75 and heights[25] == 12.5 and heights[63] == 12.5 and sum(heights) == 100
    assert axes[1, 0].get_title() == "75% at 0–3" and axes[1, 1].get_title() == "100% at 8–11"
    with pytest.raises(ValueError, match=r"there are \{'HIST': 1\} images beside 2 `row_labels`"):
        grade_plots.before_after({"raw": [image] * 2, "HIST": [image]}, ["one", "two"], title="T")


def test_slice_weights_mark_the_slices_of_the_finding_and_show_the_top_one():
    weights = [np.array([0.1, 0.7, 0.2]), np.array([0.6, 0.4])]
    signal = [np.array([False, True, False]), np.array([False, True])]
    options = {"title": "T", "signal": signal, "images": [_picture(1), _picture(2)]}
    figure = grade_plots.slice_weights(weights, ["x", "y"], **options)
    bars, picture, second, other = figure.axes
    assert [bar.get_height() for bar in bars.patches] == [0.1, 0.7, 0.2]
    assert [to_hex(bar.get_facecolor()) for bar in bars.patches] == [COLOURS[0], COLOURS[1], COLOURS[0]]
    assert bars.get_lines()[0].get_ydata()[0] == 1 / 3 and second.get_lines()[0].get_ydata()[0] == 1 / 2
    assert [axis.get_title() for axis in figure.axes] == ["x", "slice 2, with it", "y", "slice 1, without it"]
    assert (picture.images[0].get_array().max(), other.images[0].get_array().max()) == (1, 2)
    plain = grade_plots.slice_weights(weights, ["x", "y"], title="T", columns=1)
    assert len(plain.axes) == 2 and _texts(plain.legends[0].get_texts()) == ["weight in a plain mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": ["x", "y"]}, "`captions` has 2 entries beside 1 series"),
        ({"images": []}, "`images` has 0 entries"),
        ({"signal": [np.array([True])]}, r"signal of 'x' has shape \(1,\); expected \(2,\)"),
    ],
)
def test_slice_weights_refuse_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        grade_plots.slice_weights([np.array([0.5, 0.5])], **{"captions": ["x"], "title": "T"} | options)


def _grid(values, metric="macro_auroc"):
    """A table of `grades.table` of {(condition, embedding, classifier): value}."""
    return pd.DataFrame(
        [
            {
                "condition": condition,
                "variant": " ".join([e, c]).strip(),
                "embedding": e,
                "classifier": c,
                metric: value,
            }
            for (condition, e, c), value in values.items()
        ]
    )


def test_grid_heat_map_prints_values_frames_the_best_and_centres_on_chance():
    values = {("a", "flat", "svc"): 0.4, ("a", "flat", "trees"): 0.8, ("a", "deep", "svc"): 0.6}
    table = _grid(values | {("b", "deep", "trees"): 0.55})
    table = pd.concat([table, _grid({("a", "", ""): 0.5}).assign(variant="level_share")])
    figure = grade_plots.grid_heat_map(table, metric="macro_auroc", title="T", rows=["embedding"])
    first, second, bar = figure.axes
    assert {text.get_position(): text.get_text() for text in first.texts} == {
        **{(0, 0): "0.400", (1, 0): "0.800", (0, 1): "0.600"}
    }
    assert _texts(first.get_yticklabels()) == ["flat", "deep"] and _texts(first.get_xticklabels()) == ["svc", "trees"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == pytest.approx((0.2, 0.8))
    assert [patch.get_xy() for patch in first.patches] == [(0.5, -0.5)]
    assert first.get_title() == "a\nlevel share 0.500" and second.get_title() == "b"
    assert bar.get_ylabel() == "macro AUROC"


def test_grid_heat_map_of_a_loss_frames_the_lowest():
    table = _grid({("a", "flat", "svc"): 1.4, ("a", "deep", "svc"): 0.9}, "weighted_log_loss")
    figure = grade_plots.grid_heat_map(table, metric="weighted_log_loss", title="T", rows=["embedding"])
    assert figure.axes[0].patches[0].get_xy() == (-0.5, 0.5)
    assert figure.axes[1].get_ylabel() == "weighted log loss, lower is better"


def test_grid_heat_map_refuses_cells_of_several_values_and_absent_columns():
    table = _grid({("a", "flat", "svc"): 0.4})
    with pytest.raises(ValueError, match=r"1 of 2 rows share a cell of condition, embedding and classifier"):
        twice = pd.concat([table, table])
        grade_plots.grid_heat_map(twice, metric="macro_auroc", title="T", rows=["embedding"])
    with pytest.raises(ValueError, match=r"lacks the columns \['pooling'\]"):
        grade_plots.grid_heat_map(table, metric="macro_auroc", title="T", rows=["pooling"])


def test_contrasts_draw_each_difference_with_its_interval_and_pairs():
    zeros = np.linspace(-0.1, 0.1, 101)
    points = {("flat", "svc"): (0.5, zeros), ("deep", "svc"): (0.6, 2 * zeros), ("flat", "trees"): (0.7, zeros)}
    points |= {("deep", "trees"): (0.6, 2 * zeros)}
    found = [
        grades.contrast(points, FACTORS, "embedding", "flat", "deep") | {"condition": "canal"},
        grades.contrast(points, FACTORS, "classifier", "svc", ("trees", "boosted")) | {"condition": "canal"},
    ]
    figure = grade_plots.contrasts(found, title="T")
    axis = figure.axes[0]
    assert _texts(axis.get_yticklabels()) == ["deep − flat", "trees/boosted − svc"]
    singles, interval, middle, zero = axis.get_lines()
    assert singles.get_xdata().tolist() == pytest.approx([0.1, -0.1])
    assert interval.get_xdata() == pytest.approx([-0.095, 0.095]) and middle.get_xdata()[0] == pytest.approx(0)
    assert zero.get_xdata() == [0, 0]
    shown = _texts(axis.texts)
    assert shown[0].endswith("[-0.095, +0.095], 2 pairs") and shown[1] == " no pair"
    assert _texts(figure.legends[0].get_texts()) == ["canal"]
    assert "better to the right" in axis.get_xlabel()
    loss = grade_plots.contrasts(found[:1], title="T", metric="weighted_log_loss").axes[0]
    assert loss.get_xlabel() == "difference in weighted log loss, 95 % interval over studies; better to the left"
    with pytest.raises(ValueError, match="`found` is empty"):
        grade_plots.contrasts([], title="T")


def test_retrieval_shows_the_query_then_its_neighbours():
    queries = [(_picture(1), "q1"), (_picture(2), "q2")]
    neighbours = [[(_picture(3, 5, 5), "n1"), (_picture(4), "n2")], [(_picture(5), "n3")]]
    figure = grade_plots.retrieval(queries, neighbours, title="T")
    shown = [(axis.get_title(), axis.images[0].get_array().max()) for axis in figure.axes if axis.images]
    assert shown == [("q1", 1), ("n1", 3), ("n2", 4), ("q2", 2), ("n3", 5)]
    assert [axis.axison for axis in figure.axes] == [True, False, False, True, False, False]
    with pytest.raises(ValueError, match="there are 2 queries and 1 lists of neighbours"):
        grade_plots.retrieval(queries, neighbours[:1], title="T")
