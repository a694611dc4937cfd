import numpy as np
import pytest

from kerasmed import images, plots, presentation
from kerasmed.systems.brain.cascade import NONE, OUTCOMES, STAGES, Reading, Step, answers, joint


def _reading(threshold=0.5, **stages):
    """What `BrainCascade.predict` says of slices with these probabilities, a list of one row a slice for each stage."""
    by_slice = {
        stage: np.asarray(stages.get(stage, [[1 / len(names)] * len(names)])) for stage, names in STAGES.items()
    }
    means = {stage: told.mean(axis=0, keepdims=True) for stage, told in by_slice.items()}
    outcome = OUTCOMES[answers(means, np.array([threshold]))[0]]
    named = {stage: dict(zip(STAGES[stage], told[0].tolist())) for stage, told in means.items()}
    path = tuple(
        Step(stage, name, named[stage][name])
        for stage, names in STAGES.items()
        for name, outcomes in names.items()
        if outcome in outcomes
    )
    told = joint(means)[0]
    shown = np.zeros((len(by_slice["disease"]), 4, 4), np.uint8)
    return Reading(outcome, path, named, dict(zip(OUTCOMES, told)), OUTCOMES[told.argmax()], shown, by_slice)


def test_words_exist_for_each_stage_class_and_outcome():
    assert set(presentation.QUESTIONS) == set(STAGES) and set(presentation.OUTCOME_WORDS) == set(OUTCOMES)
    assert set(presentation.WORDS) == {name for names in STAGES.values() for name in names}


def test_steps_give_each_stage_its_own_probability():
    told = presentation.steps(_reading(disease=[[0.07, 0.93]], kind=[[0.01, 0.99]], type=[[0.71, 0.2, 0.09]]), 0.3)
    assert [(step["question"], step["answer"], step["probability"]) for step in told] == [
        ("Is there a disease?", "disease", "0.93"),
        ("Alzheimer's or tumour?", "tumour", "0.99"),
        ("Which type of tumour?", "glioma", "0.71"),
    ]
    assert told[0]["own"] == "disease: 0.93, which reaches the threshold, 0.300"
    assert told[2]["own"] == "type: glioma_tumor 0.71, meningioma_tumor 0.20, pituitary_tumor 0.09"


def test_steps_without_disease_end_at_the_first_question():
    (step,) = presentation.steps(_reading(disease=[[0.8, 0.2]]), 0.5)
    assert (step["answer"], step["probability"]) == ("no disease", "0.80")
    assert step["own"] == "disease: 0.20, which is below the threshold, 0.500"


def test_why_other_is_silent_where_path_and_likeliest_agree():
    assert presentation.why_other(_reading(disease=[[0.9, 0.1]]), 0.5) == ""


@pytest.mark.parametrize(
    ("threshold", "stages", "likeliest", "reason"),
    [
        (0.2, {"disease": [[0.7, 0.3]]}, "No disease (0.70)", "set to miss few diseased"),
        (0.9, {"disease": [[0.2, 0.8]], "kind": [[0, 1]], "type": [[1, 0, 0]]}, "Tumour: glioma (0.80)", "only from a"),
        # Every single one of six diseases is less likely than none, although a disease is likelier.
        (0.5, {"disease": [[0.4, 0.6]]}, "No disease (0.40)", "shared out"),
        (0.5, {"disease": [[0, 1]], "kind": [[0.6, 0.4]], "type": [[0, 1, 0]]}, "meningioma (0.40)", "shared out"),
    ],
)
def test_why_other_says_which_and_why(threshold, stages, likeliest, reason):
    told = presentation.why_other(_reading(threshold, **stages), threshold)
    assert likeliest in told and reason in told


def test_slice_outcomes_follow_each_slice_by_the_threshold():
    reading = _reading(
        disease=[[0.7, 0.3], [0.1, 0.9]], kind=[[0, 1]] * 2, type=[[0, 0, 1]] * 2, severity=[[1, 0, 0]] * 2
    )
    assert presentation.slice_outcomes(reading, 0.5) == [NONE, "pituitary_tumor"]
    assert presentation.slice_outcomes(reading, 0.25) == ["pituitary_tumor"] * 2


def test_plain_leaves_one_printable_line_and_both_ends():
    assert presentation.plain("a\u202eb\nc.png") == "a?b?c.png"
    long = presentation.plain("x" * 500 + ".dcm")
    assert len(long) == 80 and long.endswith("x.dcm") and "…" in long


@pytest.mark.parametrize(("size", "shown"), [((64, 32), (256, 128)), ((960, 1920), (240, 480)), ((1, 5000), (1, 480))])
def test_enlarge_keeps_the_aspect_ratio_within_bounds(size, shown):
    assert presentation.enlarge(np.zeros(size, np.uint8)).shape == shown


@pytest.mark.parametrize("fit", images.FITS)
def test_spread_lays_a_map_where_the_network_saw_the_picture(fit):
    picture = np.zeros((40, 120), np.uint8)
    picture[4:12, 90:110] = 255  # to the right, at the top
    options = {"image_size": (60, 60), "fit": fit}
    seen = images.resize(picture, (60, 60), fit=fit).astype(np.float32)
    laid = presentation.spread(seen, picture.shape, (80, 240), options)
    assert laid.shape == (80, 240)
    rows, columns = np.nonzero(laid > 128)
    # Enlarged from half the picture's resolution, an edge is within two pixels of twice its place.
    assert abs(rows.min() - 8) <= 2 and abs(rows.max() - 23) <= 2
    assert abs(columns.min() - 180) <= 4 and abs(columns.max() - 219) <= 4


def test_overlay_leaves_cold_places_bare_and_colours_the_hottest_by_two_thirds():
    picture, heat = np.full((1, 2), 90, np.uint8), np.array([[0.0, 7.0]])
    cold, hot = presentation.overlay(picture, heat)[0]
    inferno = np.array([252, 255, 164])  # the end of the map
    assert cold.tolist() == [90] * 3
    np.testing.assert_allclose(hot, 30 + inferno * 2 / 3, atol=2)  # OpenCV's table is rounded
    assert presentation.overlay(picture, np.zeros((1, 2))).tolist() == [[[90] * 3] * 2]


def test_overlay_looks_as_the_figures_do():
    heat = np.linspace(0, 1, 64)[None]
    picture = np.full((1, 64), 128, np.uint8)
    figure = plots.heat_maps(picture[None], heat[None], [""], title="")
    axis = figure.axes[0]
    colours = axis.images[1].cmap(heat)[..., :3] * 255
    alpha = np.asarray(axis.images[1].get_alpha())[..., None]
    expected = picture[..., None] * (1 - alpha) + colours * alpha
    np.testing.assert_allclose(presentation.overlay(picture, heat), expected, atol=3)  # OpenCV's table is rounded


def test_metric_rows_put_the_baseline_beside_the_interval():
    row = {"task": "people", "metric": "balanced_accuracy", "label": "all", "value": 0.5, "ci95": [0.4, 0.6]}
    row["baseline"] = {"variant": "nearest_neighbour", "value": 0.25}
    shown = [("balanced accuracy, people", "0.500 [0.400, 0.600]", "0.250 (nearest neighbour)")]
    assert list(presentation.metric_rows([row])) == shown
    told = ("balanced accuracy, people", "0.500", "0.250 (nearest neighbour)")
    # Without an interval; and of the outcomes without the rare ones nothing is shown.
    others = [row | {"ci95": None}, row | {"label": "6 classes: all"}]
    assert list(presentation.metric_rows(others)) == [told]


def test_worth_names_what_the_baseline_does_as_well():
    good = {"task": "people", "metric": "accuracy", "label": "all", "value": 0.5}
    good["baseline"] = {"variant": "nearest_neighbour", "value": 0.4}
    bad = good | {"task": "slices", "value": 0.4}
    assert presentation.worth([good]) == "" == presentation.worth([])
    assert presentation.worth([good, bad]).startswith("These are (accuracy, slices) no better than a baseline")
    assert presentation.worth([bad]).startswith("Every number here is no better")
    assert presentation.worth([bad]).endswith("nearest neighbour, the most similar training picture.")
    measures = bad | {"baseline": {"variant": "measures", "value": 0.7}}
    assert presentation.worth([measures]).endswith("nothing of disease: measures.")
    # Figures without the rare outcomes are not on the page, and so not spoken of.
    assert presentation.worth([good, measures | {"label": "6 classes: all"}]) == ""


def test_threshold_words_tell_aim_and_outcome_where_known():
    rows = [{"task": "disease", "variant": "cascade", "metric": "sensitivity", "label": "disease", "value": 0.884}]
    told = presentation.threshold_words(0.2564, {"sensitivity": 0.9}, rows)
    assert told.startswith("Threshold of disease: 0.256, set on validation slices to find 90% of the diseased")
    assert told.endswith("on test slices it found 88%.")
    assert presentation.threshold_words(0.5, {}, [rows[0] | {"value": None}]) == "Threshold of disease: 0.500."
    both = [*rows, rows[0] | {"metric": "specificity", "value": 0.4}]
    told = presentation.threshold_words(0.5, {}, both, folds=5)
    assert "on test slices it found 88%, and called 60% of the healthy diseased." in told
    assert told.endswith("Test figures are over 5 folds; this is the first fold's model.")
