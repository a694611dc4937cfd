"""The synthetic chest set: layout, findings over visits, ceilings, boxes, and what can and cannot read its signs."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from kerasmed import audit, images
from kerasmed.datasets import chest as reader
from kerasmed.datasets.synthetic import chest

FINDINGS = list(reader.FINDINGS)
DRAWN = [f"drawn_{name}" for name in FINDINGS]
BOXED = {"Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"}
TINY = {"patients": 20, "image_side": 48}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """300 patients, some 1,000 images of 64×64."""
    return chest.write(tmp_path_factory.mktemp("chest") / "set", patients=300, image_side=64)


@pytest.fixture(scope="module")
def table(root):
    """What the reader reads, with the columns of truth.csv that tell which signs are drawn."""
    truth = pd.read_csv(root / "chest/truth.csv")
    return reader.read_table(root).merge(truth[["study_id", *DRAWN]], on="study_id", validate="one_to_one")


@pytest.fixture(scope="module")
def pictures(root, table):
    return np.stack([images.read(root / path) for path in table.loc[table["present"], "image_path"]])


def _draw_truth(**options):
    """The rows of a set of 64×64 pixels, without its images."""
    defaults = {"image_side": 64, "header": "2020", "missing_share": 0.02, "rgba_share": 0.03, "unseen_share": 0.15}
    return chest._draw_truth(chest._checked_parameters(**{**defaults, "patients": 1000, "seed": 0, **options}))


def _file_bytes(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _description(root):
    return json.loads((root / "chest/synthetic.json").read_text())


# --- layout ----------------------------------------------------------------------------------------------------------


def test_write_layout_is_the_real_one(root, table):
    assert [path.name for path in root.iterdir()] == ["chest"]
    assert sorted(path.name for path in (root / "chest").iterdir()) == [
        "BBox_List_2017.csv",
        "Data_Entry_2017_v2020.csv",
        "images_001",
        "images_002",
        "images_003",
        "synthetic.json",
        "test_list.txt",
        "train_val_list.txt",
        "truth.csv",
    ]
    truth = pd.read_csv(root / "chest/truth.csv")
    assert list(truth.columns) == ["image_path", "study_id", "split", "present", *FINDINGS, *DRAWN]
    # The reader sees what truth.csv records.
    assert (
        table[["study_id", "split", "present", *FINDINGS]] == truth[["study_id", "split", "present", *FINDINGS]]
    ).all(axis=None)
    there = truth["present"] == 1
    assert table.loc[there, "image_path"].tolist() == truth.loc[there, "image_path"].tolist()
    on_disk = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    assert on_disk == truth.loc[there, "image_path"].tolist()
    for name in ("train_val_list.txt", "test_list.txt"):
        assert not (root / "chest" / name).read_text().endswith("\n")


def test_write_headers_are_the_real_ones(root, real_data):
    for name in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        written, real = ((folder / "chest" / name).read_text().split("\n", 1)[0] for folder in (root, real_data))
        assert written == real


def test_write_both_headers_are_read_alike(tmp_path):
    newer, older = (chest.write(tmp_path / year, header=year, **TINY) for year in ("2020", "2017"))
    pd.testing.assert_frame_equal(reader.read_table(newer), reader.read_table(older))
    line = (older / "chest/Data_Entry_2017.csv").read_text().splitlines()[0]
    assert "Patient Sex" in line and "OriginalImageWidth,OriginalImageHeight" in line and line.endswith(",")


def test_write_patients_have_plausible_visits(table):
    assert (table.groupby("patient_id")["split"].nunique() == 1).all()
    patients = table.groupby("patient_id").agg(split=("split", "first"), visits=("split", "size"))
    # A quarter of 300; means planted at 3.01 and 4.44, met but for rounding.
    assert (patients["split"] == "test").sum() == 75
    means = patients.groupby("split")["visits"].mean()
    assert means["train"] == pytest.approx(3.01, abs=0.05) and means["test"] == pytest.approx(4.44, abs=0.1)
    assert patients["visits"].min() == 1 and patients["visits"].max() == 8
    visits = table.groupby("patient_id")
    assert (visits["follow_up"].first() == 0).all() and (visits["sex"].nunique() == 1).all()
    steps = visits["follow_up"].diff().dropna()
    assert set(steps) == {1, 2} and (steps == 2).mean() < 0.1
    # 1,009 images, views correlated within patients: 0.4 ± 0.025.
    assert 0.3 < (table["view"] == "AP").mean() < 0.5
    assert table["age"].isna().sum() == 6 and table["age"].min() >= 20  # round(0.006 × 1,009)
    years = visits["age"].diff().dropna()
    assert (years >= 0).all() and years.max() < 8


def test_write_unknown_ages_are_written_as_over_100(root, table):
    ages = pd.read_csv(root / "chest/Data_Entry_2017_v2020.csv", index_col=False)["Patient Age"]
    assert (ages[table["age"].isna()] > 100).all() and (ages[table["age"].notna()] < 100).all()


def test_write_shares_of_missing_and_rgba_files_are_as_asked(root, table):
    assert abs((~table["present"]).sum() - 0.02 * len(table)) < 1
    shown = table.loc[table["present"], "image_path"]
    stored = [cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED) for path in shown]
    assert all(image.dtype == np.uint8 and image.shape[:2] == (64, 64) for image in stored)
    deep = [image for image in stored if image.ndim == 3]
    assert abs(len(deep) - 0.03 * len(stored)) < 1
    for image in deep:
        assert image.shape[2] == 4 and (image[..., 3] == 255).all() and (image[..., :3] == image[..., :1]).all()


def test_write_same_seed_gives_identical_files_and_times(tmp_path):
    first, again, other = (
        chest.write(tmp_path / name, seed=seed, **TINY) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert _file_bytes(first) == _file_bytes(again)
    times = {path.stat().st_mtime_ns for root in (first, again) for path in root.rglob("*") if path.is_file()}
    assert len(times) == 1
    pictures = [{data for name, data in _file_bytes(root).items() if name.endswith(".png")} for root in (first, other)]
    assert len(pictures[0]) > 50 and pictures[0].isdisjoint(pictures[1])


# --- findings --------------------------------------------------------------------------------------------------------


def test_rates_of_edema_worked_by_hand():
    rows = pd.DataFrame({"age": [75.0, np.nan], "view": ["AP", "PA"], "sex": ["F", "F"]})
    rates = chest._rates(rows)[:, FINDINGS.index("Edema")]
    # ln(0.08 / 0.92) = -2.4423; + 0.2 for 20 years, + 0.5 for AP: -1.7423; - 0.5 for PA alone: -2.9423.
    np.testing.assert_allclose(rates, [0.14903, 0.05010], atol=2e-5)


@pytest.mark.parametrize(
    ("rate", "before", "there", "not_there"),
    # 0.64 × 0.5 + 0.36 × 0.1 and 0.36 × 0.1; 0.64 + 0.36 × 0.2 and 0.64 × 0.1 / 0.9 + 0.36 × 0.2.
    [(0.1, 0.2, 0.356, 0.036), (0.2, 0.1, 0.712, 0.143111)],
)
def test_carried_chances_worked_by_hand_average_to_the_rate(rate, before, there, not_there):
    chances = [float(chest._carried(rate, before, label)) for label in (1, 0)]
    np.testing.assert_allclose(chances, [there, not_there], atol=1e-6)
    assert before * chances[0] + (1 - before) * chances[1] == pytest.approx(rate, abs=1e-12)


def test_posterior_worked_by_hand():
    # 0.085 / (0.085 + 0.018) with the sign, 0.015 / (0.015 + 0.882) without it.
    found = chest._posterior(np.full(2, 0.1), np.array([1, 0]), 0.15)
    np.testing.assert_allclose(found, [0.825243, 0.016722], atol=1e-6)


def test_draw_meets_the_sum_and_on_average_each_chance(rng):
    chances = rng.uniform(0, 0.5, (40, 3))
    chances[0], chances[1] = 0, 1
    draws = np.stack([chest._draw(rng, chances) for _ in range(2000)])
    assert set(np.unique(draws)) == {0, 1}
    assert (np.abs(draws.sum(axis=1) - chances.sum(axis=0)) < 1).all()
    assert not draws[:, 0].any() and draws[:, 1].all()
    # Standard error at most 0.5 / √2000 = 0.011; 0.045 is four of them, for 120 means.
    np.testing.assert_allclose(draws.mean(axis=0), chances, atol=0.045)


@pytest.mark.parametrize("seed", range(3))
def test_write_default_prevalence_is_at_least_5_percent_in_both_lists(seed):
    truth = _draw_truth(seed=seed)
    prevalence = truth.groupby("split")[FINDINGS].mean()
    assert (prevalence >= 0.06).all(axis=None) and (prevalence <= 0.12).all(axis=None)
    none = (truth[FINDINGS].sum(axis=1) == 0).groupby(truth["split"]).mean()
    assert none.between(0.25, 0.33).all()
    # Each list has the number that its chances sum to, within one.
    labels, rate, first = truth[FINDINGS].to_numpy(), chest._rates(truth), (truth["visit"] == 0).to_numpy()
    chance = rate.copy()
    chance[~first] = chest._carried(rate[~first], rate[:-1][~first[1:]], labels[:-1][~first[1:]])
    for split in ("train", "test"):
        rows = (truth["split"] == split).to_numpy()
        assert (np.abs(labels[rows].sum(axis=0) - chance[rows].sum(axis=0)) < 1).all()


def test_write_findings_persist_over_follow_ups(table):
    later = table[table["has_previous"] == 1]
    labels, before = later[FINDINGS].to_numpy(), later[list(reader.PREVIOUS)].to_numpy()
    # k = 0.64, less where the rate falls, and 0.36 of the rate: 900 findings, so ± 0.016.
    assert labels[before == 1].mean() == pytest.approx(0.65, abs=0.05)
    assert labels[before == 0].mean() == pytest.approx(0.033, abs=0.01)


def test_write_rate_is_the_chance_of_a_finding_at_any_visit():
    truth = _draw_truth(patients=4000)
    excess = pd.DataFrame(truth[FINDINGS].to_numpy() - chest._rates(truth), columns=FINDINGS)
    old = np.where(truth["age"].isna(), "unknown", truth["age"] > 60)
    groups = excess.mean(axis=1).groupby([truth["visit"].clip(upper=3), truth["view"], truth["sex"], old])
    sizes, means = groups.size(), groups.mean()
    # Means of 14 findings of rate 0.09, some of one patient in the last group: three and a half standard errors of
    # independent ones, times 1.5.
    assert (np.abs(means) < 3.5 * 1.5 * np.sqrt(0.09 * 0.91 / 14 / sizes)).all()
    # It does depend on the patient: the sharpest effects, of old age and of AP views.
    young, pa = truth["age"] < 45, truth["view"] == "PA"
    assert truth.loc[truth["age"] > 65, "Fibrosis"].mean() > 2 * truth.loc[young, "Fibrosis"].mean()
    assert truth.loc[young, "Pneumothorax"].mean() > 1.5 * truth.loc[truth["age"] > 65, "Pneumothorax"].mean()
    assert truth.loc[~pa, "Edema"].mean() > 2 * truth.loc[pa, "Edema"].mean()


def test_write_signs_are_drawn_at_the_planted_shares(table):
    labels, drawn = table[FINDINGS].to_numpy(), table[DRAWN].to_numpy()
    # Shares are met within one finding of two lists: 2 / 75 at worst for one label, far less over all.
    assert drawn[labels == 1].mean() == pytest.approx(0.85, abs=0.03)
    assert drawn[labels == 0].mean() == pytest.approx(0.02, abs=0.003)


def _log_odds(table):
    """Planted log odds of a finding by age, view and sex, from the formula: shape (num_images, num_findings)."""
    columns = []
    for name in FINDINGS:
        middle, of_age, of_view, of_sex = chest._RATES[name]
        value = np.log(middle / (1 - middle)) + of_age * (table["age"].fillna(55) - 55) / 20
        value += of_view * table["view"].map({"AP": 0.5, "PA": -0.5}) + of_sex * table["sex"].map({"M": 0.5, "F": -0.5})
        columns.append(value)
    return np.stack(columns, axis=1)


def test_write_ceilings_are_those_of_the_exact_log_odds(root, table):
    """Anew from what the reader reads: log odds, plus the log-likelihood ratio of the sign."""
    sign = np.where(table[DRAWN] == 1, np.log(0.85 / 0.02), np.log(0.15 / 0.98))
    odds = _log_odds(table)
    rate, later = 1 / (1 + np.exp(-odds)), table["has_previous"].to_numpy() == 1
    after = odds.copy()
    for row in np.flatnonzero(later):
        p, q, there = rate[row], rate[row - 1], table.loc[row, list(reader.PREVIOUS)].to_numpy(float) == 1
        assert table.loc[row, "patient_id"] == table.loc[row - 1, "patient_id"]
        chance = np.where(there, 0.64 * np.minimum(1, p / q), 0.64 * np.maximum(0, p - q) / (1 - q)) + 0.36 * p
        after[row] = np.log(chance / (1 - chance))
    answers = {
        "image": sign,
        "patient": odds,
        "image + patient": odds + sign,
        "image + patient + previous": after + sign,
    }
    shown = ((table["split"] == "test") & table["present"]).to_numpy()
    ceiling = _description(root)["ceiling"]
    assert list(ceiling) == list(answers)
    for part, rows in {"test": shown, "test, first visits": shown & ~later, "test, follow-ups": shown & later}.items():
        labels = table.loc[rows, FINDINGS].to_numpy()
        known = [position for position in range(len(FINDINGS)) if 0 < labels[:, position].mean() < 1]
        for kind, answer in answers.items():
            areas = [roc_auc_score(labels[:, position], answer[rows, position].round(9)) for position in known]
            assert ceiling[kind][part] == pytest.approx(np.mean(areas), abs=1e-9), (kind, part)


@pytest.mark.parametrize("seed", range(3))
def test_write_default_ceilings_rise_with_what_is_known(seed):
    ceiling = chest._describe(_draw_truth(seed=seed), 0.15)["ceiling"]
    whole = [ceiling[kind]["test"] for kind in ceiling]
    # (1 + 0.85 - 0.02) / 2 = 0.915 for the signs alone, but for the share of a list's signs that are drawn.
    assert whole[0] == pytest.approx(0.915, abs=0.02) and 0.6 < whole[1] < 0.69
    assert whole[2] > whole[0] + 0.015 and whole[3] > whole[2] + 0.015
    first = [ceiling[kind]["test, first visits"] for kind in ceiling]
    assert first[2] == first[3]


def test_write_description_states_parameters_and_prevalence(root, table):
    description = _description(root)
    assert description.pop("ceiling")
    assert description == {
        "system": "chest",
        "seed": 0,
        "patients": 300,
        "image_side": 64,
        "header": "2020",
        "missing_share": 0.02,
        "rgba_share": 0.03,
        "unseen_share": 0.15,
        "images": table["split"].value_counts().to_dict(),
        "prevalence": {
            split: {name: pytest.approx(part[name].mean(), abs=1e-12) for name in (*FINDINGS, reader.NO_FINDING)}
            for split, part in table.groupby("split")
        },
    }


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_write_boxes_are_of_recorded_and_drawn_signs_of_test_images(root, table):
    boxes = reader.read_boxes(root)
    rows = table.set_index("study_id")
    test = rows[(rows["split"] == "test") & rows["present"]]
    expected = {
        (study, name) for name in BOXED for study in test.index[(test[name] == 1) & (test[f"drawn_{name}"] == 1)]
    }
    found = set(zip(boxes["study_id"], boxes["label"]))
    assert len(found) == len(boxes) and found <= expected
    # A sign may be hidden under others.
    assert len(found) >= 0.98 * len(expected) and set(boxes["label"]) == BOXED
    assert (boxes[["x", "y"]] >= 0).all(axis=None) and (boxes[["width", "height"]] >= 3).all(axis=None)
    assert ((boxes["x"] + boxes["width"] <= 64) & (boxes["y"] + boxes["height"] <= 64)).all()
    text = (root / "chest/BBox_List_2017.csv").read_text()
    assert text.startswith("Image Index,Finding Label,Bbox [x,y,w,h],,,\n") and ",Infiltrate," in text


def test_write_boxes_hold_the_sign_tightly(root, table):
    boxes = reader.read_boxes(root)
    rows = {study: position for position, study in enumerate(table["study_id"])}
    for box in boxes.itertuples():
        row = table.iloc[rows[box.study_id]]
        signs = [name for name in FINDINGS if row[f"drawn_{name}"] == 1]
        anatomy = chest._draw_anatomy(np.random.default_rng([0, 1, int(row["patient_id"])]))
        key = [0, 2, rows[box.study_id]]
        image, _ = chest._draw_image(key, anatomy, row["view"], signs, 64)
        assert (image == images.read(root / row["image_path"])).all()
        rest, _ = chest._draw_image(key, anatomy, row["view"], [name for name in signs if name != box.label], 64)
        change = np.abs(image.astype(int) - rest)
        x, y, width, height = (int(value) for value in (box.x, box.y, box.width, box.height))
        held = np.zeros(change.shape, bool)
        held[y : y + height, x : x + width] = True
        # More than 10 grey levels within the box alone, and somewhere on each of its edges; 1 for rounding.
        assert change[~held].max() <= 11, box
        inside = change[y : y + height, x : x + width]
        edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
        assert min(edge.max() for edge in edges) >= 9, box


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FINDINGS)
def test_sign_changes_its_part_of_the_picture_alone(name):
    shares = []
    for number in range(8):
        anatomy = chest._draw_anatomy(np.random.default_rng(number))
        view = ("AP", "PA")[number % 2]
        with_sign, boxes = chest._draw_image([number], anatomy, view, [name], 96, [name])
        without, none = chest._draw_image([number], anatomy, view, [], 96, [name])
        changed = np.abs(with_sign.astype(int) - without) > 10
        shares.append(changed.mean())
        assert list(boxes) == [name] and not none
        # At least a tenth of the side across or along, at most six tenths: to be seen at 64×64, and not everywhere.
        assert 10 <= max(boxes[name][2:]) <= 58
    assert min(shares) > 0.01 and max(shares) < 0.15


def test_sign_unknown_is_refused():
    with pytest.raises(ValueError, match="'Fracture' has no sign; known are Cardiomegaly"):
        chest._pattern("Fracture", np.zeros((4, 4)), np.zeros((4, 4)))


def test_pictures_of_a_patient_look_alike_and_of_others_less(table, pictures):
    vectors = audit.standardize(pictures)
    matrix = vectors @ vectors.T
    patient = table.loc[table["present"], "patient_id"].to_numpy()
    same = patient[:, None] == patient
    others = matrix[~same]
    np.fill_diagonal(same, False)
    assert matrix[same].mean() > others.mean() + 0.05
    # No pair of patients passes for one patient, and no two visits for one picture.
    assert others.max() < audit.SAME_ANATOMY and matrix[same].max() < audit.SAME_PICTURE


def _mean_auroc(labels, scores):
    return np.mean([roc_auc_score(y, score) for y, score in zip(labels.T, scores.T)])


def test_nearest_neighbour_among_other_patients_is_weak(table, pictures):
    shown = table[table["present"]]
    test = (shown["split"] == "test").to_numpy()
    labels = shown[FINDINGS].to_numpy()
    found = labels[~test][audit.nearest(pictures[test], pictures[~test])[0]]
    assert _mean_auroc(labels[test], found) < 0.62


def test_file_size_and_grey_levels_hardly_tell_a_finding(root, table, pictures):
    shown = table[table["present"]].reset_index(drop=True)
    sizes = [(root / path).stat().st_size for path in shown["image_path"]]
    measures = {"size": sizes, "mean": pictures.mean(axis=(1, 2)), "contrast": pictures.std(axis=(1, 2))}
    areas = audit.by_class(shown, FINDINGS, pd.DataFrame(measures)).set_index(["measure", "class"])["auroc"]
    # Some 90 of 990 images, so ± 0.032; the largest effect is 0.14, of a bright haze on the mean.
    assert (np.abs(areas - 0.5) < 0.2).all() and np.abs(areas["size"] - 0.5).mean() < 0.07


def test_view_can_be_seen_in_the_picture(table, pictures):
    is_ap = table.loc[table["present"], "view"] == "AP"
    assert roc_auc_score(is_ap, pictures[:, 16:48, 8:56].mean(axis=(1, 2))) > 0.65


# --- parameters and what is there already ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("patients", 19),
        ("image_side", 47),
        ("header", "2018"),
        ("header", 2020),
        ("missing_share", -0.1),
        ("missing_share", 0.95),
        ("missing_share", float("nan")),
        ("rgba_share", 1.1),
        ("unseen_share", -0.1),
        ("unseen_share", 0.95),
        ("seed", -1),
    ],
)
def test_write_parameter_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is .*expected"):
        chest.write(tmp_path / "set", **{option: value})
    assert not (tmp_path / "set").exists()


def test_write_smallest_set_of_few_files_is_whole(tmp_path):
    root = chest.write(tmp_path, missing_share=0.9, rgba_share=1, unseen_share=0, **TINY)
    truth = pd.read_csv(root / "chest/truth.csv")
    labels, drawn = truth[FINDINGS].to_numpy(), truth[DRAWN].to_numpy()
    assert (drawn[labels == 1] == 1).all() and abs(truth["present"].sum() - 0.1 * len(truth)) < 1
    frame = reader.read(root)
    assert len(frame) == truth["present"].sum() and len(reader.read_table(root)) == len(truth)
    assert all(cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED).shape == (48, 48, 4) for path in frame["image_path"])


def test_write_nothing_missing_and_no_rgba_is_all_grey(tmp_path):
    root = chest.write(tmp_path, missing_share=0, rgba_share=0, **TINY)
    frame = reader.read(root)
    assert len(frame) == len(reader.read_table(root))
    assert all(cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED).ndim == 2 for path in frame["image_path"])


def test_mean_auroc_without_a_finding_to_rank_is_none():
    scores = np.array([[0.1, 0.4], [0.2, 0.3]])
    assert chest._mean_auroc(np.array([[0, 1], [0, 1]]), scores) is None
    # The first column has no positive; the second orders its pair wrongly.
    assert chest._mean_auroc(np.array([[0, 0], [0, 1]]), scores) == 0


def test_write_real_data_in_the_way_is_never_touched(tmp_path):
    image = tmp_path / "chest/images/00000001_000.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be real data"):
        chest.write(tmp_path, **TINY)
    assert image.read_bytes() == b"real"


def test_write_other_parameters_in_the_way_is_refused(tmp_path):
    chest.write(tmp_path, **TINY)
    before = _file_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="describes another set"):
        chest.write(tmp_path, seed=1, **TINY)
    assert _file_bytes(tmp_path) == before


def test_write_whole_set_is_left_as_it_is(tmp_path):
    root = chest.write(str(tmp_path), **TINY)
    assert root == tmp_path
    image = next(root.rglob("*.png"))
    image.write_bytes(b"kept")
    assert chest.write(tmp_path, **TINY) == root
    assert image.read_bytes() == b"kept"


def test_write_interrupted_leaves_no_set_and_is_done_anew(tmp_path, monkeypatch):
    whole = chest.write(tmp_path / "whole", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(chest, "write_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            chest.write(tmp_path / "killed", **TINY)
    assert not (tmp_path / "killed/chest").exists()
    assert _file_bytes(chest.write(tmp_path / "killed", **TINY)) == _file_bytes(whole)
