import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kerasmed import modality_plots
from kerasmed.grade_plots import BLANK
from kerasmed.plots import COLOURS

NAN = float("nan")
# zero is the reference, with no difference; pseudo is clearly better on T1 and not on T1 + T2.
CELLS = {
    ("T1 + T2", "zero"): (0.8, 0.75, 0.85, NAN, NAN, NAN),
    ("T1 + T2", "pseudo, dropout 0.3"): (0.81, 0.76, 0.86, 0.01, -0.02, 0.04),
    ("T1", "zero"): (0.6, 0.55, 0.65, NAN, NAN, NAN),
    ("T1", "pseudo, dropout 0.3"): (0.7, 0.64, 0.76, 0.1, 0.05, 0.15),
}


def _texts(texts):
    return [text.get_text() for text in texts]


def _card(cells, **columns):
    rows = [dict(zip(["modalities", "column", *modality_plots.CELL], [*key, *cell])) for key, cell in cells.items()]
    return pd.DataFrame(rows).assign(**columns)


def _in_cells(axis):
    """What stands in each cell (line, column), from top to bottom, and what of it is bold."""
    found, bold = {}, []
    for text in sorted(axis.texts, key=lambda text: text.get_position()[1]):
        column, height = text.get_position()
        found.setdefault((round(height), column), []).append(text.get_text())
        bold += [text.get_text()] * (text.get_fontweight() == "bold")
    return found, bold


def test_report_card_writes_value_interval_and_difference_in_the_cell_of_each_row():
    figure = modality_plots.report_card(_card(CELLS), metric="macro_auroc", title="T")
    axis, bar = figure.axes
    found, bold = _in_cells(axis)
    assert found == {
        (0, 0): ["0.800", "[0.750, 0.850]"],
        (0, 1): ["0.810", "[0.760, 0.860]", "+0.010"],
        (1, 0): ["0.600", "[0.550, 0.650]"],
        (1, 1): ["0.700", "[0.640, 0.760]", "+0.100"],
    }
    assert bold == ["+0.100"]
    assert _texts(axis.get_yticklabels()) == ["T1 + T2", "T1"]
    assert _texts(axis.get_xticklabels()) == ["zero", "pseudo,\ndropout 0.3"]
    assert axis.images[0].get_array().tolist() == [[0.8, 0.81], [0.6, 0.7]]
    assert (figure.get_suptitle(), axis.get_title(), bar.get_ylabel()) == ("T", "", "macro AUROC")
    said = "a cell: value; 95 % interval; paired difference to zero (bold: its 95 % interval excludes 0)"
    assert figure.get_supxlabel() == said


def test_report_card_differences_line_up_beside_cells_that_lack_an_interval():
    bare = CELLS | {("T1", "pseudo, dropout 0.3"): (0.7, NAN, NAN, 0.1, NAN, NAN)}
    axis = modality_plots.report_card(_card(bare), metric="macro_auroc", title="T").axes[0]
    found, bold = _in_cells(axis)
    assert found[1, 1] == ["0.700", "+0.100"] and bold == []
    heights = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert heights["+0.100"] - 1 == pytest.approx(heights["+0.010"], abs=1e-12)


def test_report_card_of_values_alone_centres_them_and_says_no_more():
    alone = _card({key: (cell[0], *[NAN] * 5) for key, cell in CELLS.items()})
    figure = modality_plots.report_card(alone, metric="macro_f1", title="T")
    assert {text.get_position() for text in figure.axes[0].texts} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert figure.get_supxlabel() == "a cell: value"


def test_report_card_difference_that_rounds_to_zero_has_no_minus():
    tiny = CELLS | {("T1", "pseudo, dropout 0.3"): (0.7, 0.6, 0.8, -0.0002, -0.1, 0.1)}
    found, _ = _in_cells(modality_plots.report_card(_card(tiny), metric="macro_auroc", title="T").axes[0])
    assert found[1, 1][-1] == "+0.000"


@pytest.mark.parametrize(
    ("metric", "label", "dark"),
    [("macro_auroc", "macro AUROC", 0.81), ("weighted_log_loss", "weighted log loss, lower is better", 0.6)],
)
def test_report_card_the_better_is_the_darker_and_its_text_is_white(metric, label, dark):
    axis, bar = modality_plots.report_card(_card(CELLS), metric=metric, title="T").axes
    shown = axis.images[0]
    brightness = {value: sum(shown.cmap(shown.norm(value))[:3]) for value in (0.6, 0.7, 0.8, 0.81)}
    assert min(brightness, key=brightness.get) == dark
    assert sorted(brightness.values(), reverse=dark > 0.6) == list(brightness.values())
    colours = {text.get_text(): text.get_color() for text in axis.texts}
    light = 1.41 - dark  # the other end of the scale
    assert (colours[f"{dark:.3f}"], colours[f"{light:.3f}"]) == ("white", "black")
    assert bar.get_ylabel() == label


def test_report_card_below_zero_is_bold_where_its_interval_is():
    worse = CELLS | {("T1", "pseudo, dropout 0.3"): (0.5, 0.4, 0.6, -0.1, -0.15, -0.05)}
    _, bold = _in_cells(modality_plots.report_card(_card(worse), metric="macro_auroc", title="T").axes[0])
    assert bold == ["-0.100"]


def test_report_card_panels_share_lines_columns_and_scale_and_leave_absent_cells_blank():
    first, second = dict(list(CELLS.items())[:3]), {("T1", "zero"): (0.4, 0.3, 0.5, NAN, NAN, NAN)}
    second[("T2", "zero")] = (NAN,) * 6
    card = pd.concat([_card(first, panel="joint"), _card(second, panel="late_mean")])
    figure = modality_plots.report_card(card, metric="macro_auroc", title="T")
    left, right, _ = figure.axes
    assert [axis.get_title() for axis in (left, right)] == ["joint", "late mean"]
    assert _texts(left.get_yticklabels()) == ["T1 + T2", "T1", "T2"]
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0.4, 0.81)
    assert set(_in_cells(left)[0]) == {(0, 0), (0, 1), (1, 0)} and set(_in_cells(right)[0]) == {(1, 0)}
    assert to_hex(right.get_facecolor()) == BLANK
    masked = np.ma.getmaskarray(right.images[0].get_array())
    assert masked.tolist() == [[True, True], [False, True], [True, True]]


@pytest.mark.parametrize(
    ("number", "suffix", "places"),
    [(2, ", modality dropout", [(0, 0), (0, 1)]), (5, "", [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)])],
)
def test_report_card_panels_fill_rows_evenly_and_the_texts_stay_in_their_cells(number, suffix, places):
    subsets, names = ["a + b + c", "b"], [f"{way}{suffix}" for way in ("zero", "mean", "neutral", "pseudo")]
    cell = (0.8, 0.75, 0.85, 0.01, -0.02, 0.04)
    one = _card({(subset, name): cell for subset in subsets for name in names})
    card = pd.concat([one.assign(panel=f"p{place}") for place in range(number)])
    figure = modality_plots.report_card(card, metric="macro_auroc", title="T")
    figure.draw_without_rendering()
    drawn = figure.axes[:number]
    assert [axis.axison for axis in figure.axes] == [True] * number + [False] * (number % 2) + [True]
    assert [axis.get_subplotspec().rowspan.start for axis in drawn] == [row for row, _ in places]
    assert [axis.get_subplotspec().colspan.start for axis in drawn] == [column for _, column in places]
    for axis in drawn:
        headings = [label.get_window_extent() for label in axis.get_xticklabels()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(headings))
        for text in axis.texts:
            box = axis.transData.inverted().transform(text.get_window_extent())
            column, line = text.get_position()[0], round(text.get_position()[1])
            assert line in (0, 1)
            assert abs(box[:, 0] - column).max() < 0.5 and abs(box[:, 1] - line).max() < 0.5


def test_report_card_of_one_finite_value_has_a_scale():
    cells = {("T1", "zero"): (0.5, 0.4, 0.6, NAN, NAN, NAN)}
    cells |= {(f"{value}", "zero"): (value, *[NAN] * 5) for value in (float("inf"), -float("inf"))}
    figure = modality_plots.report_card(_card(cells), metric="log_loss", title="T")
    figure.draw_without_rendering()
    low, high = figure.axes[0].images[0].get_clim()
    assert 0.4 < low <= 0.5 <= high < 0.6
    assert _in_cells(figure.axes[0])[0] == {(0, 0): ["0.500", "[0.400, 0.600]"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda card: card.iloc[:0], "`card` is empty; expected a row for each modalities, column"),
        (lambda card: pd.DataFrame(), "`card` is empty"),
        (lambda card: card.drop(columns=["low", "column"]), r"`card` lacks the columns \['column', 'low'\]"),
        (
            lambda card: pd.concat([card, card[:1]]),
            r"`card` has 1 of 5 rows whose \(modalities, column\) is there before.*First: \[\('T1 \+ T2', 'zero'\)\]",
        ),
        (
            lambda card: pd.concat([card, card[2:3]]).assign(panel="a"),
            r"\(panel, modalities, column\).*First: \[\('a', 'T1', 'zero'\)\]",
        ),
        (lambda card: card.assign(panel=None), "`card` has 4 of 4 rows that lack a text in panel, modalities, column"),
        (lambda card: card.assign(value=NAN), "`card` holds no finite value in 4 rows; expected some macro AUROC"),
    ],
)
def test_report_card_refuses_what_it_cannot_draw(change, message):
    with pytest.raises(ValueError, match=message):
        modality_plots.report_card(change(_card(CELLS)), metric="macro_auroc", title="T")


@pytest.fixture
def weights():
    rows = [("canal", "T2 + T1", "T2", 0.93), ("canal", "T2 + T1", "T1", 0.07), ("canal", "T1", "T1", 1.0)]
    rows += [("right_foraminal", "T2 + T1", "T2", 0.25), ("right_foraminal", "T2 + T1", "T1", 0.75)]
    return pd.DataFrame(rows, columns=["group", "modalities", "modality", "weight"])


def test_modality_weights_stack_to_100_percent_in_order_of_first_appearance(weights):
    figure = modality_plots.modality_weights(weights, title="T")
    canal, foraminal = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["canal", "right foraminal"]
    assert _texts(canal.get_yticklabels()) == ["T2 + T1", "T1"] and canal.get_ylim() == (1.5, -0.5)
    found = [[(bar.get_x(), bar.get_width()) for bar in bars] for bars in canal.containers]
    assert np.array(found) == pytest.approx(np.array([[(0, 93), (0, 0)], [(93, 7), (0, 100)]]), abs=1e-12)
    # 7 % has no room; a subset that a group lacks has no bar.
    assert _texts(canal.texts) == ["93", "100"] and _texts(foraminal.texts) == ["25", "75"]
    assert foraminal.texts[1].get_position() == (62.5, 0)
    assert {to_hex(bar.get_facecolor()) for bar in foraminal.containers[1]} == {COLOURS[1]}
    assert _texts(figure.legends[0].get_texts()) == ["T2", "T1"]
    assert (figure.get_suptitle(), canal.get_xlabel()) == ("T", "mean weight, %")


def test_modality_weights_of_8_percent_are_written_and_tolerate_rounding(weights):
    weights.loc[:1, "weight"] = [0.9195, 0.08]  # a sum of 0.9995
    canal = modality_plots.modality_weights(weights, title="T").axes[0]
    assert _texts(canal.texts) == ["92", "8", "100"]
    assert [text.get_color() for text in canal.texts] == ["white", "black", "black"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.iloc[:0], "`weights` is empty"),
        (lambda table: table.drop(columns="weight"), r"`weights` lacks the columns \['weight'\]"),
        (
            lambda table: pd.concat([table, table[:1]]),
            r"`weights` has 1 of 6 rows whose \(group, modalities, modality\)",
        ),
        (
            lambda table: table.drop(index=4),
            r"`weights` of 1 of 3 bars do not have a sum of 1.*\{\('right_foraminal', 'T2 \+ T1'\): 0.25\}",
        ),
        (lambda table: table.replace({"weight": {0.93: 0.932}}), r"1 of 3 bars.*\('canal', 'T2 \+ T1'\): 1.002"),
        (
            lambda table: table.replace({"weight": {0.25: -0.25, 0.75: 1.25}}),
            r"2 of 5 weights .* NaN or outside \[0, 1\]",
        ),
        (lambda table: table.replace({"weight": {0.07: NAN}}), r"1 of 5 weights .*First: .*'modality': 'T1'"),
    ],
)
def test_modality_weights_refuse_what_is_no_share(weights, change, message):
    with pytest.raises(ValueError, match=message):
        modality_plots.modality_weights(change(weights), title="T")


def test_report_card_says_what_differences_are_to_where_it_is_told():
    card = pd.DataFrame(
        [(*key, *cell) for key, cell in CELLS.items()],
        columns=["modalities", "column", "value", "low", "high", "difference", "difference_low", "difference_high"],
    )
    figure = modality_plots.report_card(card, metric="macro_auroc", title="t", reference="its like")
    assert "paired difference to its like (bold" in figure._supxlabel.get_text()
    assert (
        "paired difference to zero (bold"
        in modality_plots.report_card(card, metric="macro_auroc", title="t")._supxlabel.get_text()
    )
