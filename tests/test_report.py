import base64
import json
import math
import os
import re
import shutil
import sys

import numpy as np
import pandas as pd
import pytest

from kerasmed import collection, report

BEST_DRAWS = [0.5, 0.5, 0.5]


def write_run(top, digits, value=0.75, **changes):
    """Write a complete run of one headline row by hand; keys of the row or of the folder."""
    options = {"params": {"seed": digits}, "fingerprint": "f", "data_source": "real", "valid": None, "chosen": "auroc"}
    options |= {"profile": "smoke", "images": None}
    options |= {"status": "complete", "error": None, "draws": BEST_DRAWS, "weights": {}, "started": "2026-01-01"}
    options |= {name: changes.pop(name) for name in tuple(options) if name in changes}
    run = top / "brain" / f"07_brain_mri-smoke-{digits}"
    run.mkdir(parents=True)
    baseline = {"variant": "majority", "value": 0.5, "difference": value - 0.5, "difference_ci95": [0.125, 0.375]}
    row = {"task": "tumour", "variant": "net", "split": "test", "metric": "auroc", "label": "all", "value": value}
    row |= {"ci95": [value - 0.125, value + 0.125], "n": 9, "n_groups": 3, "paired_by": "p", "baseline": baseline}
    rows = [row | each for each in changes.pop("rows", [{}])]
    chosen_by = options["valid"] and {"metric": options["chosen"], "split": "valid", "value": options["valid"]}
    if chosen_by and options["images"]:
        chosen_by["images"] = options["images"]
    state = {"status": options["status"], "system": "brain", "notebook": "07_brain_mri", "error": options["error"]}
    state |= {name: options[name] for name in ("data_source", "profile", "started")}
    files = {
        "status": state,
        "params": options["params"],
        "environment": {"fingerprint": options["fingerprint"]},
        "metrics": {
            "headline": [each | changes for each in rows],
            "chosen_by": chosen_by,
            "weights": options["weights"],
        },
    }
    for stem, content in files.items():
        if stem != "metrics" or options["status"] == "complete":
            (run / f"{stem}.json").write_text(json.dumps(content))
    np.savez(run / "draws.npz", **{str(number): np.float32(options["draws"]) for number in range(len(rows))})
    return run


def ranked(top, **options):
    return report.rank(collection.collect(top), **options)


def order(table):
    return [run.rsplit("-", 1)[1] for run in table["run"]]


def test_rank_compares_with_the_best_on_the_same_draws(tmp_path):
    write_run(tmp_path, "a", value=0.75, valid=0.5, draws=[0.5, 0.75, 1.0])
    write_run(tmp_path, "b", value=0.5, valid=0.75)
    table = ranked(tmp_path)
    assert tuple(table) == report.RANKED
    best, other = table.to_dict("records")
    assert (best["run"][-1], best["rank"], best["comparison"], best["ordered_by"]) == ("b", 1, "best", "validation")
    assert math.isnan(best["difference_to_best"])
    # The differences draw by draw are 0, 1/4, 1/2: 2.5 % lies a twentieth of the way from the first to the second.
    ends = [other[f"difference_to_best{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([0.25, 0.0125, 0.4875], abs=1e-12)
    assert (other["rank"], other["comparison"], other["parameters"]) == (2, "paired", "seed=a")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"paired_by": "q"}, "other test groups or draws"),
        ({"draws": [0.5] * 4}, "other test groups or draws"),
        ({"paired_by": None}, "no draws"),
        ({"draws": [math.nan, math.nan, 0.5]}, "undefined in most draws"),
    ],
)
def test_rank_gives_no_difference_of_what_is_not_paired_and_says_why(tmp_path, changes, reason):
    write_run(tmp_path, "a", value=0.9)
    write_run(tmp_path, "b", value=0.8, **changes)
    other = ranked(tmp_path).iloc[1]
    assert other["comparison"] == reason
    assert other[["difference_to_best", "difference_to_best_low", "difference_to_best_high"]].isna().all()


def test_rank_compares_nothing_among_runs_of_unknown_data(tmp_path):
    for name, value, fingerprint in (("a", 0.9, None), ("b", 0.8, None), ("c", 0.7, "f")):
        write_run(tmp_path, name, value=value, fingerprint=fingerprint)
    table = ranked(tmp_path)
    assert order(table) == ["c", "a", "b"]
    assert table["comparison"].tolist() == ["best", "best", "data not known"]
    assert table["fingerprint"].tolist() == ["f", "", ""] and np.isnan(table["difference_to_best"]).all()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (("i", "i"), True),
        (("i", "j"), False),
        (("i", None), False),
        ((None, None), False),
        (("i", "i", "j"), True),  # of other weights: no say
    ],
)
def test_rank_says_whether_validation_values_are_of_the_same_images(tmp_path, images, expected):
    weights = ({}, {}, {"model.keras": "0"})
    for position, (told, name) in enumerate(zip(images, "abc")):
        valid = 0.5 + position / 8
        write_run(tmp_path, name, value=0.9 - position / 8, valid=valid, images=told, weights=weights[position])
    table = ranked(tmp_path)
    assert table["same_validation"].tolist() == [expected] * len(images)
    assert order(table) == ["b", "a", "c"][: len(images)] and set(table["ordered_by"]) == {"validation"}


def test_rank_of_one_run_or_of_none_with_validation_says_so_too(tmp_path):
    run = write_run(tmp_path, "a", valid=0.7, rows=[{}, {"variant": "other"}])
    assert ranked(tmp_path)["same_validation"].tolist() == [True, True]
    shutil.rmtree(run)
    write_run(tmp_path, "a")
    assert ranked(tmp_path)["same_validation"].tolist() == [False]


def test_rank_does_without_draws_that_vanished_since_they_were_collected(tmp_path):
    write_run(tmp_path, "a", value=0.9)
    run = write_run(tmp_path, "b", value=0.8)
    table = collection.collect(tmp_path)
    (run / "draws.npz").write_text("x")
    assert report.rank(table)["comparison"].tolist() == ["best", "no draws"]


def test_rank_reads_the_draws_of_a_run_once(tmp_path, monkeypatch):
    runs = [write_run(tmp_path, name, rows=[{}, {"label": "other"}, {"metric": "f1"}]) for name in "ab"]
    table, read, original = collection.collect(tmp_path), [], collection.read_draws
    monkeypatch.setattr(collection, "read_draws", lambda run: read.append(run) or original(run))
    assert report.rank(table)["comparison"].tolist() == ["best", "paired"] * 3
    assert sorted(read) == runs


def test_rank_orders_by_validation_only_where_every_run_has_one_of_one_kind(tmp_path):
    write_run(tmp_path, "a", value=0.9, valid=0.6)
    write_run(tmp_path, "b", value=0.8, valid=0.7)
    assert order(ranked(tmp_path)) == ["b", "a"]
    run = write_run(tmp_path, "c", value=0.85)
    table = ranked(tmp_path)
    assert order(table) == ["a", "c", "b"] and set(table["ordered_by"]) == {"test"}
    shutil.rmtree(run)
    write_run(tmp_path, "d", value=0.85, valid=0.1, chosen="f1")
    assert order(ranked(tmp_path)) == ["a", "d", "b"]


@pytest.mark.parametrize(
    ("metric", "chosen", "expected"),
    [
        ("competition", None, ["a", "b"]),  # by the figure, lowest first
        ("auroc", None, ["b", "a"]),
        ("competition", "auroc", ["b", "a"]),  # by validation, each in its own direction
        ("competition", "weighted_log_loss", ["a", "b"]),
        ("auroc", "weighted_log_loss", ["a", "b"]),
    ],
)
def test_rank_knows_in_which_direction_a_metric_is_better(tmp_path, metric, chosen, expected):
    for name, value in (("a", 0.5), ("b", 0.75)):
        write_run(tmp_path, name, value=value, metric=metric, valid=value if chosen else None, chosen=chosen)
    assert order(ranked(tmp_path)) == expected


@pytest.mark.parametrize(
    ("metric", "ends", "verdict"),
    [
        ("auroc", [0.01, 0.2], "beats the baseline"),
        ("auroc", [0.0, 0.2], "not told apart from the baseline"),
        ("auroc", [-0.2, 0.0], "not told apart from the baseline"),
        ("auroc", [-0.2, -0.01], "worse than the baseline"),
        ("log_loss", [-0.2, -0.01], "beats the baseline"),
        ("log_loss", [0.01, 0.2], "worse than the baseline"),
        ("log_loss", None, ""),
    ],
)
def test_rank_says_on_which_side_of_the_baseline_a_run_is(tmp_path, metric, ends, verdict):
    baseline = {"variant": "svc", "value": 0.5, "difference": 0.1, "difference_ci95": ends}
    write_run(tmp_path, "a", metric=metric, baseline=baseline)
    (row,) = ranked(tmp_path).to_dict("records")
    assert (row["verdict"], row["baseline"], row["difference_to_baseline"]) == (verdict, "svc", 0.1)
    if ends:
        assert [row["difference_to_baseline_low"], row["difference_to_baseline_high"]] == ends


def test_rank_puts_a_run_of_other_weights_last_and_compares_nobody_with_it(tmp_path):
    write_run(tmp_path, "a", value=0.9, valid=0.9, weights={"model.keras": "0"})
    write_run(tmp_path, "b", value=0.6, valid=0.6)
    write_run(tmp_path, "c", value=0.7, valid=0.7)
    table = ranked(tmp_path)
    assert order(table) == ["c", "b", "a"]
    assert table["comparison"].tolist() == ["best", "paired", "not compared: other weights"]
    assert table["trusted"].tolist() == [True, True, False]
    assert table["verdict"].tolist() == ["beats the baseline", "beats the baseline", ""]


def test_rank_of_untrusted_runs_alone_has_no_best(tmp_path):
    for name in "ab":
        write_run(tmp_path, name, weights={"model.keras": "0"})
    assert set(ranked(tmp_path)["comparison"].str[:8]) == {"no best:"}


def test_rank_lets_an_untrusted_run_have_no_say_in_how_a_block_is_ordered(tmp_path):
    write_run(tmp_path, "a", weights={"model.keras": "0"})
    write_run(tmp_path, "b", value=0.9, valid=0.6)
    write_run(tmp_path, "c", value=0.8, valid=0.7)
    assert order(ranked(tmp_path)) == ["c", "b", "a"]


@pytest.mark.parametrize(
    "other",
    [
        {"data_source": "synthetic"},
        {"profile": "full"},
        {"profile": None},
        {"fingerprint": "g"},
        {"task": "t"},
        {"metric": "f1"},
        {"label": "l"},
        {"split": "folds"},
        {"label": None},
    ],
)
def test_rank_keeps_questions_apart(tmp_path, other):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", **other)
    assert ranked(tmp_path)["comparison"].tolist() == ["best", "best"]


def test_rank_keeps_a_run_on_little_out_of_the_block_of_full_ones(tmp_path):
    write_run(tmp_path, "a", valid=0.99, fingerprint="few")
    for name, valid in (("b", 0.7), ("c", 0.8)):
        write_run(tmp_path, name, valid=valid, profile="full")
    table = ranked(tmp_path)
    assert order(table) == ["c", "b", "a"] and table["rank"].tolist() == [1, 2, 1]
    assert table["profile"].tolist() == ["full", "full", "smoke"] and table["comparison"][1] == "paired"


def test_rank_of_one_metric_leaves_the_others_out_and_refuses_an_unknown_one(tmp_path):
    write_run(tmp_path, "a", rows=[{"metric": "f1"}, {"metric": "auroc"}])
    assert ranked(tmp_path, metric="f1")["metric"].tolist() == ["f1"] and len(ranked(tmp_path)) == 2
    with pytest.raises(ValueError, match="`metric` is 'auc'; expected one that a complete run has: auroc, f1"):
        ranked(tmp_path, metric="auc")


def test_rank_without_any_figure_is_empty_with_its_columns(tmp_path):
    write_run(tmp_path, "a", status="failed")
    assert tuple(ranked(tmp_path)) == report.RANKED and ranked(tmp_path).empty
    with pytest.raises(ValueError, match="a complete run has: none"):
        ranked(tmp_path, metric="auroc")


def test_rank_is_the_same_in_whichever_order_runs_are_read(tmp_path):
    for position, name in enumerate("abcde"):
        write_run(tmp_path, name, value=0.5 + position / 16, draws=np.random.default_rng(position).random(50).tolist())
    table = collection.collect(tmp_path)
    columns = ["run", "rank", "difference_to_best_low", "parameters"]
    backwards = report.rank(table.iloc[::-1])
    pd.testing.assert_frame_equal(report.rank(table)[columns], backwards[columns])


def test_telling_names_what_differs_but_for_places():
    given = [
        {"seed": 0, "from_run": "/a/02-x-1", "models_root": "/a", "data_root": "/c", "profile": "full"},
        {"seed": 0, "from_run": "/b/02-x-2", "models_root": "/b", "data_root": "/d", "profile": "full", "new": [1]},
        {},  # unreadable
    ]
    assert report.telling(given) == ["from_run=02-x-1", "from_run=02-x-2, new=[1]", ""]
    given[1]["from_run"] = "/b/02-x-1"
    assert report.telling(given[:2]) == ["", "new=[1]"]


def test_write_csv_round_trips_numbers(tmp_path):
    write_run(tmp_path, "a", value=0.9)
    write_run(tmp_path, "b", value=0.8, draws=[0.5, 0.75, 1.0])
    table = ranked(tmp_path)
    report.write_csv(tmp_path / "out/r.csv", table)
    read = pd.read_csv(tmp_path / "out/r.csv")
    assert tuple(read) == report.RANKED and read["rank"].tolist() == [1, 2] and read["n_groups"].tolist() == [3, 3]
    for name in ("value", "ci_low", "difference_to_best_low", "difference_to_baseline_high"):
        np.testing.assert_array_equal(read[name], table[name])


# --- the page --------------------------------------------------------------------------------------------------------


def page_of(top, path=None, **options):
    path = path or top / "report.html"
    report.write_html(path, collection.collect(top), **options)
    return path.read_text(encoding="utf-8")


def text_of(page):
    return " ".join(re.sub("<[^>]+>", " ", page.split("</style>")[1].replace("<wbr>", "")).split())


def test_write_html_counts_and_shows_failures_before_the_ranking(tmp_path):
    write_run(tmp_path, "a", value=0.9, draws=[0.5, 0.75, 1.0])
    write_run(tmp_path, "b", value=0.8)
    write_run(tmp_path, "c", status="failed", error="cell 7 (In [4]): LeakError: 3 <b>pictures</b>\n  at line 2: x")
    write_run(tmp_path, "d", status="running")
    run = write_run(tmp_path, "e")
    (run / "metrics.json").write_text("{")
    page = page_of(tmp_path)
    text = text_of(page)
    assert "5 runs : 3 complete, 1 failed, 1 interrupted, 0 running; 3 flagged" in text
    assert "07_brain_mri-smoke-c : failed at cell 7 (In [4]) brain · 07_brain_mri · seed=c failed at the audit" in text
    assert "<pre>LeakError: 3 &lt;b&gt;pictures&lt;/b&gt;\n  at line 2: x</pre>" in page
    assert "07_brain_mri-smoke-d : interrupted brain · 07_brain_mri · seed=d" in text
    assert "07_brain_mri-smoke-e : complete, but damaged" in text and "metrics.json (it is no JSON: Expecting" in text
    assert text.index("LeakError") < text.index("tumour · all · auroc · test")
    assert "0.900 [0.775, 1.025]" in text and "0.000 [" not in text
    assert "-0.100 [-0.487, -0.013] majority 0.500 +0.300 [+0.125, +0.375] beats the baseline" in text
    assert "the best test figure of many is too good by chance" in text


def test_write_html_says_nothing_of_chance_where_validation_orders(tmp_path):
    for name, valid in (("a", 0.7), ("b", 0.8)):
        write_run(tmp_path, name, valid=valid, chosen="weighted_log_loss")
    text = text_of(page_of(tmp_path))
    expected = "Ordered by weighted log loss on the validation split, lowest first; the test figures shown had no say."
    assert expected in text and "by chance" not in text


def test_write_html_names_the_folds_that_order_and_claims_no_innocence_of_figures_of_them(tmp_path):
    for name in "ab":
        run = write_run(tmp_path, name, valid=0.5, rows=[{"split": "folds"}, {"split": "test"}])
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["chosen_by"]["split"] = "folds"
        (run / "metrics.json").write_text(json.dumps(metrics))
    text = text_of(page_of(tmp_path))
    assert "Ordered by auroc on the folds, highest first." in text
    assert "Ordered by auroc on the folds, highest first; the test figures shown had no say." in text


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (("i", "i"), None),
        (("i", "j"), "The validation figures are of different images, as with other seeds of the split, so"),
        (("i", None), "The validation figures may be of different images, as with other seeds of the split, so"),
    ],
)
def test_write_html_says_what_an_order_by_other_images_is_worth(tmp_path, images, said):
    for name, told in zip("ab", images):
        write_run(tmp_path, name, valid=0.5, images=told)
    text = text_of(page_of(tmp_path))
    assert ("different images" in text) == (said is not None) and (said or "") in text


def test_write_html_heads_each_profile_and_tells_several_data_sets_apart(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", profile="full")
    headings = re.findall("<h2>(.*?)</h2>", page_of(tmp_path).replace("<wbr>", ""))
    assert headings[:2] == ["brain · 07_brain_mri · full", "brain · 07_brain_mri · smoke"]
    write_run(tmp_path, "c", fingerprint="0123456789abcdef")
    write_run(tmp_path, "d", fingerprint=None)
    headings = re.findall("<h2>(.*?)</h2>", page_of(tmp_path).replace("<wbr>", ""))
    told = ["full · data f", "smoke · data 012345", "smoke · data f", "smoke · data not known"]
    assert headings[:4] == [f"brain · 07_brain_mri · {each}" for each in told]
    write_run(tmp_path / "alone", "a", fingerprint=None)
    assert "<h2>brain · 07_<wbr>brain_<wbr>mri · smoke · data not known</h2>" in page_of(tmp_path / "alone")


def test_write_html_labels_each_cell_for_narrow_screens_and_breaks_names_at_their_parts(tmp_path):
    write_run(tmp_path, "a", params={"learning_rate": 0.003})
    write_run(tmp_path, "b", params={"learning_rate": 0.001})
    page = page_of(tmp_path)
    assert "<b>learning_<wbr>rate=0.003</b>" in page
    assert "<td class='verdict' data-label='verdict'>beats the baseline</td>" in page
    cells = re.findall("<td[^>]*>", page)
    assert cells and all("data-label=" in cell for cell in cells)
    narrow = page.split("(max-width:800px)")[1].split("@media")[0]
    assert "content:attr(data-label)" in narrow and "tr,td{display:block}" in narrow and "max-width:100%" in page


def test_write_html_explains_every_flag_with_the_number_of_its_runs(tmp_path):
    write_run(tmp_path, "a", data_source="synthetic", rows=[{}, {"label": "b"}])
    write_run(tmp_path, "b", weights={"model.keras": "0"})
    text = text_of(page_of(tmp_path))
    for kind, meaning in collection.FLAGS.items():
        count = 1 if kind in (collection.SYNTHETIC, collection.OTHER_WEIGHTS) else 0
        assert f"{kind} {count} {meaning}" in text
    assert "Shaded red, and last" in text


def test_write_html_asks_for_nothing_and_runs_nothing(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", status="failed", error="<script src=http://x>")
    page = page_of(tmp_path)
    assert page.startswith("<!doctype html>") and "<script" not in page and "://" not in page.replace("http://x", "")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:;" in page
    sources = re.findall(r"src='([^']{22})", page)
    assert sources == ["data:image/png;base64,"] and not re.search(r"<link|@import|url\(|<iframe", page)
    picture = base64.b64decode(re.search(r"base64,([^']+)'", page)[1])
    assert picture.startswith(b"\x89PNG")


EVIL = "<img src=x onerror='alert(1)'>\"&$x_$"


def test_write_html_escapes_all_that_runs_say(tmp_path):
    texts = {name: EVIL for name in ("task", "variant", "metric", "label", "split")}
    baseline = {"variant": EVIL, "value": 0.5, "difference": 0.1, "difference_ci95": [0, 1]}
    for position, name in enumerate("ab"):
        params = {EVIL: f"{EVIL}{name}", "accepted": [EVIL]}
        write_run(tmp_path, name, **texts, baseline=baseline, params=params, chosen=EVIL, valid=0.5 + position / 4)
    write_run(tmp_path, "c", status=EVIL, error=EVIL, params={EVIL: 1})
    write_run(tmp_path, "d", status="failed", error=f"cell {EVIL}: {EVIL}")
    state = tmp_path / "brain/07_brain_mri-smoke-d/status.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"system": EVIL, "notebook": EVIL, "finished": EVIL}))
    page = page_of(tmp_path)
    assert page.count("<img") == page.count("<img alt='Runs with intervals: ") == 1
    assert "&lt;img src=x onerror=&#x27;alert(1)&#x27;&gt;&quot;&amp;$x_$" in page and "onerror='" not in page


@pytest.mark.parametrize("name", ["a b&'\"<i>#?%", "javascript:x", "ä"])
def test_write_html_links_lead_to_runs_of_any_name(tmp_path, name):
    from urllib.parse import unquote

    folder = write_run(tmp_path / "models", "a").rename(tmp_path / "models/brain" / name)
    (folder / "figures").mkdir()
    (folder / "notebook.ipynb").touch()
    page = page_of(tmp_path / "models", tmp_path / "pages/here/report.html")
    links = {unquote(link) for link in re.findall(r"<a href='([^']*)'", page)}
    assert links == {f"../../models/brain/{name}{part}" for part in ("", "/figures", "/notebook.ipynb")}
    (folder / "notebook.html").touch()
    assert "/notebook.html'" in page_of(tmp_path / "models", tmp_path / "pages/here/report.html")


@pytest.mark.filterwarnings("ignore:Glyph 0")
def test_write_html_stands_what_is_no_text(tmp_path):
    run = write_run(tmp_path, "a", params={"seed": "\ud800 \x00\n\t"}, task="\ud800")
    write_run(tmp_path, "b", task="\ud800")
    if sys.platform == "linux":  # others refuse such a name
        os.rename(run, os.fsdecode(os.fsencode(run)[:-1] + b"\xff"))
    assert "0.750" in page_of(tmp_path)
    report.write_csv(tmp_path / "report.csv", ranked(tmp_path))


def test_write_html_without_a_complete_run_says_so(tmp_path):
    write_run(tmp_path, "a", status="failed", error="no")
    assert "No complete run has a figure." in page_of(tmp_path)


def test_write_html_shows_the_ranking_that_it_is_given(tmp_path):
    write_run(tmp_path, "a", rows=[{"metric": "f1"}, {"metric": "auroc"}])
    text = text_of(page_of(tmp_path, ranked=ranked(tmp_path, metric="f1")))
    assert "tumour · all · f1 · test" in text and "tumour · all · auroc · test" not in text


def test_forest_draws_40_runs_and_says_how_many_are_left_out(tmp_path):
    for number in range(43):
        write_run(tmp_path, f"{number:02}", value=0.5 + number / 128)
    block = ranked(tmp_path)
    figure = report.forest(block, title="t")
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert len(labels) == 40 and labels[0] == "1.  seed=42" and "3 of 43 left out" in figure.get_suptitle()
    page = page_of(tmp_path)
    assert page.count("<td class='rank'") == 43 and page.count("data:image") == 1


def test_forest_puts_the_best_on_top_beside_its_baseline_and_marks_synthetic_data(tmp_path):
    write_run(tmp_path, "a", value=0.75, data_source="synthetic", params={"x": "$a$"})
    write_run(tmp_path, "b", value=0.5, data_source="synthetic", ci95=None, params={"x": "b" * 90}, label="$l_$")
    write_run(tmp_path, "c", value=0.625, data_source="synthetic", weights={"model.keras": "0"})
    block = ranked(tmp_path)
    figure = report.forest(block[block["label"] == "all"], title="$t_$")
    axis = figure.axes[0]
    drawn = [line.get_xdata().tolist() for line in axis.lines if len(line.get_xdata())]
    assert drawn == [[0.625, 0.875], [0.75], [0.5], [0.5, 0.75], [0.625], [0.5]]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    assert [text.get_text() for text in figure.texts][-1] == "synthetic data"
    assert "weights not those measured" in [text.get_text() for text in figure.legends[0].get_texts()]
    figure.canvas.draw()
    figure = report.forest(block[block["label"] != "all"], title="$t_$")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "1.  07_brain_mri-smoke-b"
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0.5, 0.5]  # no interval
