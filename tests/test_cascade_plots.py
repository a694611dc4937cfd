"""Figures of a cascade say what their tables say."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from kerasmed import cascade_plots


def test_threshold_draws_both_shares_and_names_what_they_are_at_the_chosen_one():
    truth = np.array([True, True, True, True, False, False])
    scores = np.array([0.9, 0.8, 0.7, 0.2, 0.75, 0.1])
    figure = cascade_plots.threshold([truth], [scores], [0.7], title="T")
    (axis,) = figure.axes
    sensitivity, specificity, mark = axis.lines
    assert [line.get_label() for line in axis.lines] == [
        "sensitivity (0.75 there)",
        "specificity (0.50 there)",
        "threshold 0.70",
    ]
    at = sensitivity.get_xdata()
    np.testing.assert_allclose(sensitivity.get_ydata()[np.searchsorted(at, [0.0, 0.5, 0.85])], [1, 0.75, 0.25])
    np.testing.assert_allclose(specificity.get_ydata()[np.searchsorted(at, [0.0, 0.5, 0.85])], [0, 0.5, 1])
    assert list(mark.get_xdata()) == [0.7, 0.7] and axis.get_title() == ""


def test_threshold_of_folds_draws_a_panel_each():
    truth, scores = np.array([True, False]), np.array([0.6, 0.4])
    figure = cascade_plots.threshold([truth, truth], [scores, scores], [0.5, 0.6], title="T")
    assert [axis.get_title() for axis in figure.axes] == ["fold 1", "fold 2"]


def test_losses_bars_of_a_class_have_its_shares_and_fill_one():
    shares = pd.DataFrame(
        {"images": [40, 3], "right": [0.5, 0.0], "disease": [0.5, 0.0], "kind": [0, 1.0], "severity": 0, "type": 0},
        index=["none", "glioma_tumor"],
    )
    figure = cascade_plots.losses(shares, title="T")
    (axis,) = figure.axes
    bars = {container.get_label(): [patch.get_width() for patch in container] for container in axis.containers}
    assert bars["right"] == [0.5, 0] and bars["lost at disease"] == [0.5, 0] and bars["lost at kind"] == [0, 1]
    assert np.sum(list(bars.values()), axis=0).tolist() == [1, 1]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["none (40)", "glioma_tumor (3)"]
    assert len({to_hex(container[0].get_facecolor()) for container in axis.containers}) == 5
    written = [text.get_text() for text in axis.texts]
    assert written == ["0.50", "0.50", "1.00"]  # a share below 0.06 has no room


def test_losses_without_classes_is_refused():
    empty = pd.DataFrame({"images": [], "right": [], "disease": []})
    with pytest.raises(ValueError, match="no class"):
        cascade_plots.losses(empty, title="T")
