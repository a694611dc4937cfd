"""The synthetic lumbar set: layout, headers, geometry, grades and their ceilings, and signs in the pixels."""

import json

import cv2
import joblib
import numpy as np
import pandas as pd
import pydicom
import pytest
from sklearn.metrics import roc_auc_score

from kerasmed import datasets, series
from kerasmed.datasets import lumbar as reader
from kerasmed.datasets.synthetic import lumbar, lumbar_drawing

CANAL, FORAMINAL, SUBARTICULAR = reader.CONDITIONS
T1, T2, AXIAL = reader.MODALITIES
TINY = {"studies": 10, "image_side": (48, 50)}
IDS = {"study_id": str, "series_id": str}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """40 studies: 3 lack a modality, 3 have two series of one kind."""
    return lumbar.write(tmp_path_factory.mktemp("lumbar") / "set", studies=40, image_side=(56, 72))


@pytest.fixture(scope="module")
def manifest(root):
    return reader.read(root)


@pytest.fixture(scope="module")
def truth(root):
    return pd.read_csv(root / "lumbar/truth.csv", dtype=IDS, keep_default_na=False)


@pytest.fixture(scope="module")
def headers(root, manifest):
    """A row a file: its series, and the header without pixels."""
    rows = []
    for place in manifest["series_path"]:
        for path in sorted((root / place).iterdir(), key=lambda path: int(path.stem)):
            rows.append((place, path.stem, pydicom.dcmread(path, stop_before_pixels=True)))
    return pd.DataFrame(rows, columns=["series_path", "stem", "header"])


@pytest.fixture(scope="module")
def volumes(root, manifest):
    """The series as they are read, beside the manifest."""
    names = [sorted((path.name for path in (root / p).iterdir()), key=series.natural) for p in manifest["series_path"]]
    return [series.read(root / place, files) for place, files in zip(manifest["series_path"], names)]


def _file_bytes(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _description(root):
    return json.loads((root / "lumbar/synthetic.json").read_text())


def _grades(**options):
    """Grades of a set of 300 studies, without its pictures, and the label noise."""
    defaults = {"studies": 300, "seed": 0, "image_side": (72, 104), "label_noise": 0.02, "echo": 0.35}
    parameters = lumbar._checked_parameters(**{**defaults, "missing_share": 0.08, **options})
    rng = np.random.default_rng([parameters["seed"], 0])
    return lumbar._draw_grades(rng, parameters), parameters


# --- layout ----------------------------------------------------------------------------------------------------------


def test_write_layout_is_the_real_one(root, manifest, truth):
    assert [path.name for path in root.iterdir()] == ["lumbar"]
    names = ["synthetic.json", "train.csv", "train_images", "train_label_coordinates.csv"]
    names += ["train_series_descriptions.csv", "truth.csv"]
    assert sorted(path.name for path in (root / "lumbar").iterdir()) == names
    columns = ["study_id", "series_id", "instance_number", "position", "condition", "side", "level", "grade"]
    assert list(truth.columns) == [*columns, "x", "y", "width", "height"]
    table = pd.read_csv(root / "lumbar/train.csv", dtype=str)
    assert list(table.columns) == ["study_id", *reader.TARGETS] and table["study_id"].map(int).is_monotonic_increasing
    counts, problems = datasets.check("lumbar", root)
    assert problems.empty
    assert counts.set_index("class").loc["(all images)", "images"] == len(manifest)


def test_write_nothing_is_missing_or_more_than_described(root, manifest, headers, caplog):
    reader.read(root)
    assert not caplog.text
    described = _description(root)
    assert manifest.groupby("modality").size().to_dict() == described["series"]
    assert manifest.groupby("modality")["slices"].sum().to_dict() == described["slices"]
    assert len(headers) == sum(described["slices"].values())


def test_write_slices_of_a_series_are_as_many_as_stated(manifest):
    first = manifest.drop_duplicates(["study_id", "modality"])
    sagittal = manifest[manifest["modality"] != AXIAL]["slices"]
    assert sagittal.min() == 7 and sagittal.max() == 11
    stacks = manifest[manifest["modality"] == AXIAL].groupby("study_id")["slices"].sum()
    assert stacks.min() == 8 and stacks.max() == 12 and len(first) < len(manifest)


def test_write_some_studies_lack_a_modality_and_some_have_two_series_of_one(root, manifest):
    counts = reader.read_studies(root)[list(reader.MODALITIES)]
    assert (counts == 0).sum().tolist() == [1, 1, 1] and (counts == 2).sum().tolist() == [1, 1, 1]  # 8 % of 40 each
    assert ((counts == 0).sum(axis=1) <= 1).all() and _description(root)["missing"] == dict.fromkeys(counts, 1)


def test_write_same_seed_gives_identical_files_and_times(tmp_path):
    first, again, other = (
        lumbar.write(tmp_path / name, seed=seed, **TINY) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert _file_bytes(first) == _file_bytes(again)
    times = [
        {path.relative_to(root): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
        for root in (first, again)
    ]
    assert times[0] == times[1] and len(set(times[0].values())) > 50
    shown = [{path.read_bytes() for path in root.rglob("*.dcm")} for root in (first, other)]
    assert len(shown[0]) == reader.read(first)["slices"].sum() and shown[0].isdisjoint(shown[1])


def test_write_by_processes_gives_the_same_files(tmp_path, monkeypatch):
    options = {"studies": 24, "image_side": (48, 50)}
    by_processes = lumbar.write(tmp_path / "a", **options)
    asked, parallel = [], joblib.Parallel
    monkeypatch.setattr(joblib, "Parallel", lambda n_jobs: asked.append(n_jobs) or parallel(n_jobs=1))
    assert _file_bytes(by_processes) == _file_bytes(lumbar.write(tmp_path / "b", **options)) and asked == [-1]


# --- headers ---------------------------------------------------------------------------------------------------------


def test_headers_are_of_mr_images_and_fit_their_place(headers):
    for place, stem, header in headers.itertuples(index=False):
        _, _, study, number = place.split("/")
        assert header.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
        assert header.SOPClassUID == header.file_meta.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.4"
        assert header.SOPInstanceUID == header.file_meta.MediaStorageSOPInstanceUID
        assert str(header.InstanceNumber) == stem
        assert header.StudyInstanceUID.endswith(study) and header.SeriesInstanceUID.endswith(f"{study}.{number}")
    uids = [header.SOPInstanceUID for header in headers["header"]]
    assert len(set(uids)) == len(uids) and max(map(len, uids)) <= 64


def test_headers_hold_invented_identity_to_be_removed(headers):
    for header in headers["header"]:
        assert str(header.PatientName).startswith("SYNTHETIC^") and header.PatientID.startswith("SYNTHETIC-")
        assert header.InstitutionName == "SYNTHETIC HOSPITAL"


def test_series_vary_as_scanners_do(headers):
    first = headers.drop_duplicates("series_path")["header"]
    inverted = [header.PhotometricInterpretation == "MONOCHROME1" for header in first]
    assert sum(inverted) == round(0.15 * len(first))
    bits = pd.Series([(each.BitsAllocated, each.BitsStored, each.HighBit) for each in first]).value_counts()
    assert bits.to_dict() == {(16, 16, 15): round(0.4 * len(first)), (16, 12, 11): len(first) - round(0.4 * len(first))}
    sizes = np.array([(each.Rows, each.Columns) for each in first])
    assert len(np.unique(sizes, axis=0)) > len(first) // 2
    # Roots of areas of 56 to 72, sides up to 4.5 % from them, rounded.
    assert sizes.min() >= 53 and sizes.max() <= 76
    names = ["PixelSpacing", "SliceThickness", "MagneticFieldStrength", "Manufacturer", "PatientSex", "PatientAge"]
    names += ["RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"]
    shares = pd.DataFrame([[name in each for name in names] for each in first], columns=names).mean()
    # 120 series: standard errors of at most 0.046; ± 0.15 is three of them.
    expected = np.array([0.92] * 4 + [0.7] * 2 + [0.2] * 2 + [0.5] * 2)
    assert (np.abs(shares - expected) < 0.15).all() and ((shares > 0) & (shares < 1)).all()
    assert {float(each.MagneticFieldStrength) for each in first if "MagneticFieldStrength" in each} == {1.5, 3.0}
    makers = {each.Manufacturer for each in first if "Manufacturer" in each}
    assert makers == {"SIEMENS", "GE MEDICAL SYSTEMS", "Philips Medical Systems", "TOSHIBA"}


def test_stored_values_use_their_bits(root, manifest):
    largest = {}
    for place in manifest["series_path"]:
        header = pydicom.dcmread(next((root / place).glob("*.dcm")))
        pixels = header.pixel_array
        assert pixels.dtype == np.uint16 and pixels.max() < 2**header.BitsStored
        largest.setdefault(header.BitsStored, []).append(np.ptp(pixels.astype(int)))
    assert min(largest[16]) > 4095 and min(largest[12]) > 1200


# --- geometry --------------------------------------------------------------------------------------------------------


def test_slices_are_ordered_by_place_and_numbers_follow_it_in_half_of_the_series(volumes):
    assert {volume.ordered_by for volume in volumes} == {"position"}
    assert all(volume.quarantine.empty for volume in volumes)
    numbers = [volume.table["instance_number"].to_numpy(int) for volume in volumes]
    assert all(sorted(each) == list(range(1, len(each) + 1)) for each in numbers)
    steps = [set(np.diff(each)) for each in numbers]
    ordered = np.array([each in ({1}, {-1}) for each in steps])
    # Half of them are shuffled; of 3 slices or more a shuffle may be in order, though seldom.
    assert abs((~ordered).sum() - len(ordered) / 2) <= 3
    assert {1} in steps and {-1} in steps


def test_position_of_truth_is_the_rank_along_the_normal(manifest, volumes, truth):
    read = pd.concat([volume.table.assign(series_id=id) for id, volume in zip(manifest["series_id"], volumes)])
    merged = truth.merge(read, on=["series_id", "instance_number"], suffixes=("", "_read"), validate="many_to_one")
    assert len(merged) == len(truth) and (merged["position"] == merged["position_read"]).all()


def test_sagittal_slices_go_from_right_to_left_and_axial_ones_up(manifest, volumes):
    for modality, volume in zip(manifest["modality"], volumes):
        middles = []
        for each in volume.slices:
            right, down = np.reshape(each.orientation, (2, 3))
            assert right @ down == pytest.approx(0, abs=1e-6) and np.linalg.norm(right) == pytest.approx(1, abs=1e-6)
            middles.append(each.position)
        step = np.diff(middles, axis=0)
        assert (step[:, 2 if modality == AXIAL else 0] > 0).all()


def test_series_are_oblique_and_axial_planes_differ_from_disc_to_disc(manifest, volumes):
    tilts = {T1: [], T2: [], AXIAL: []}
    whole = ~manifest.duplicated(["study_id", "modality"], keep=False)
    for modality, volume, is_whole in zip(manifest["modality"], volumes, whole):
        normals = [np.cross(*np.reshape(each.orientation, (2, 3))) for each in volume.slices]
        axis = 2 if modality == AXIAL else 0
        tilts[modality].append([np.degrees(np.arccos(min(1, abs(normal[axis])))) for normal in normals])
        if modality != AXIAL:
            assert np.ptp(normals, axis=0).max() < 1e-6
        elif is_whole:  # from -6° to 6° by 1° at most
            assert np.ptp([normal[1] for normal in normals]) > 2 * np.sin(np.deg2rad(4.9))
    for modality in (T1, T2):
        of_series = np.array([each[0] for each in tilts[modality]])
        assert 1 < np.median(of_series) < 8.6 and of_series.max() < 8.6  # at most 6° about each of two axes
    assert max(max(each) for each in tilts[AXIAL]) < 7.1


# --- grades ----------------------------------------------------------------------------------------------------------


def test_grades_have_the_stated_shares_and_are_worse_below():
    grades, _ = _grades(label_noise=0)
    for number, name in enumerate(reader.CONDITIONS):
        values = grades.grade[:, number == lumbar._CONDITION_OF]
        shares = [(values == grade).mean() for grade in range(3)]
        # 1,500 to 3,000 grades, stratified by the study's latent: standard errors of at most 0.01.
        np.testing.assert_allclose(shares, lumbar._SHARES[name], atol=0.03)
    by_level = [grades.grade[:, level == lumbar._LEVEL_OF].mean() for level in range(5)]
    assert by_level[0] < by_level[2] < by_level[4]


def test_latent_explains_most_and_conditions_go_together_weakly():
    grades, _ = _grades(studies=2000)
    apart = np.corrcoef(grades.latent.T)[np.triu_indices(3, 1)]
    np.testing.assert_allclose(apart, 0.3, atol=0.07)  # standard error 0.02
    # Severity is √0.7 · latent + √0.3 · own: two places of one level and condition correlate by 0.7.
    left, right = (reader.TARGETS.index(f"{side}_{SUBARTICULAR}_l3_l4") for side in ("left", "right"))
    assert np.corrcoef(grades.grade[:, left], grades.grade[:, right])[0, 1] > 0.5


def test_recorded_grades_differ_by_one_in_the_stated_number_of_places():
    grades, parameters = _grades()
    known = ~np.isnan(grades.recorded)
    away = np.abs(grades.recorded - grades.grade)
    assert set(away[known]) == {0, 1}
    # round(0.02 · 7,500) = 150, less those that are blank.
    assert 140 <= (away[known] == 1).sum() <= 150
    blanks = [(~known[:, number == lumbar._CONDITION_OF]).sum() for number in range(3)]
    assert blanks == [8, 30, 90]  # 0.5 % of 1,500 (7.5 rounds to 8), 1 % and 3 % of 3,000


def test_train_csv_holds_the_recorded_grades(root, truth):
    studies, described = reader.read_studies(root), _description(root)
    table = reader.long(studies)
    for name in reader.CONDITIONS:
        values = table.loc[table["condition"] == name, "grade"]
        counts = [int((values == grade).sum()) for grade in range(3)] + [int(values.isna().sum())]
        assert list(described["grades"][name].values()) == counts and counts[-1] >= 1
    merged = truth.merge(table, on=["study_id", "condition", "side", "level"], suffixes=("", "_recorded"))
    places = merged.drop_duplicates(["study_id", "target"]).dropna(subset="grade_recorded")
    flipped = (places["grade"] != places["grade_recorded"]).mean()
    assert 0 < flipped < 0.04 and len(merged) == len(truth)  # 2 % of 1,000


@pytest.mark.parametrize("seed", range(3))
def test_ceilings_are_below_1_above_those_of_the_latent_and_level_tells_little(seed):
    grades, parameters = _grades(seed=seed)
    found = lumbar._ceilings(grades, 0.02)
    assert list(found) == [*reader.CONDITIONS, "macro"]
    for name in reader.CONDITIONS:
        assert 0.94 < found[name]["grade"] < 0.985
        assert 0.84 < found[name]["latent_and_level"] < 0.92
        assert 0.55 < found[name]["level"] < 0.65
    assert found["macro"]["grade"] == pytest.approx(np.mean([found[name]["grade"] for name in reader.CONDITIONS]))


def test_ceiling_of_the_grades_without_noise_is_1():
    grades, _ = _grades(label_noise=0)
    found = lumbar._ceilings(grades, 0.0)
    assert [each["grade"] for each in found.values()] == [1] * 4 and found["macro"]["latent_and_level"] < 0.95


def test_ceiling_of_the_grades_equals_a_count_by_other_means():
    grades, _ = _grades()
    of_canal = lumbar._CONDITION_OF == 0
    recorded, true = grades.recorded[:, of_canal].ravel(), grades.grade[:, of_canal].ravel()
    known = ~np.isnan(recorded)
    # P(recorded | true): a Normal/Mild or Severe grade may become Moderate, a Moderate one either.
    table = np.array([[0.98, 0.02, 0], [0.01, 0.98, 0.01], [0, 0.02, 0.98]])[true[known]]
    areas = [roc_auc_score(recorded[known] == grade, table[:, grade]) for grade in range(3)]
    assert lumbar._ceilings(grades, 0.02)[CANAL]["grade"] == pytest.approx(np.mean(areas), abs=1e-12)


# --- signs -----------------------------------------------------------------------------------------------------------


def test_signs_lie_in_their_own_modality_at_their_place(manifest, truth):
    rows = truth.merge(manifest[["series_id", "modality", "slices"]], on="series_id")
    assert (rows["modality"] == rows["condition"].map(reader.PAIRED)).all()
    middle = (rows["slices"] - 1) / 2
    canal = rows["condition"] == CANAL
    assert (np.abs(rows["position"] - middle)[canal] <= 1).all()
    foraminal = rows["condition"] == FORAMINAL
    assert ((rows["position"] > middle) == (rows["side"] == "left"))[foraminal].all()
    per_sign = rows.groupby(["series_id", "condition", "side", "level"]).size()
    of = per_sign.groupby("condition").agg(["min", "max"])
    assert of.loc[CANAL].tolist() == [2, 3] and of.loc[FORAMINAL].tolist() == [1, 2]
    assert of.loc[SUBARTICULAR].tolist() == [1, 2]
    # From the feet up: the lower a level, the earlier its slices; left is right in the picture.
    recess = rows[rows["condition"] == SUBARTICULAR].assign(
        number=lambda table: table["level"].map(reader.LEVELS.index)
    )
    by_slice = recess.groupby(["series_id", "position"])["number"].agg(["min", "max"])
    assert (by_slice["min"] == by_slice["max"]).all()
    assert (by_slice["max"].groupby("series_id").diff().dropna() <= 0).all()
    x = recess.pivot_table(index=["series_id", "position"], columns="side", values="x")
    assert (x["left"] > x["right"] + 5).all()


def test_every_place_of_a_study_that_has_the_modality_is_in_truth_and_coordinates(root, truth):
    studies = reader.read_studies(root)
    present = {modality: set(studies.loc[studies[modality] > 0, "study_id"]) for modality in reader.MODALITIES}
    expected = {(study, *place) for place in reader.PLACES.values() for study in present[reader.PAIRED[place[0]]]}
    keys = ["study_id", "condition", "side", "level"]
    points = reader.read_coordinates(root)
    assert set(truth[keys].itertuples(index=False, name=None)) == expected
    assert sorted(points[keys].itertuples(index=False, name=None)) == sorted(expected)  # each but once
    merged = points.merge(truth, on=[*keys, "series_id", "instance_number"], suffixes=("", "_box"))
    assert len(merged) == len(points)
    for at, box, size in (("x", "x_box", "width"), ("y", "y_box", "height")):
        assert ((merged[at] >= merged[box] - 1) & (merged[at] <= merged[box] + merged[size])).all()


def test_boxes_lie_in_the_picture_and_take_a_few_per_cent_of_it(headers, truth):
    sizes = headers.drop_duplicates("series_path").assign(
        series_id=lambda table: table["series_path"].str.rpartition("/")[2],
        columns=lambda table: [each.Columns for each in table["header"]],
        rows=lambda table: [each.Rows for each in table["header"]],
    )
    rows = truth.merge(sizes[["series_id", "columns", "rows"]], on="series_id")
    assert (rows[["x", "y"]] >= 0).all(axis=None) and (rows[["width", "height"]] > 4).all(axis=None)
    assert (rows["x"] + rows["width"] <= rows["columns"]).all() and (rows["y"] + rows["height"] <= rows["rows"]).all()
    area = rows["width"] * rows["height"] / (rows["columns"] * rows["rows"])
    assert 0.02 < area[rows["grade"] == 2].median() < 0.08


def test_pixels_in_boxes_are_textured_by_grade(manifest, volumes, truth):
    """Standard deviation of what a blur takes away, in boxes; own noise and edges of anatomy are far below."""
    pictures = {}
    for id, volume in zip(manifest["series_id"], volumes):
        for position, each in enumerate(series.normalise(volume.slices)):
            smooth = cv2.GaussianBlur(each.astype(np.float32), (0, 0), 3)
            pictures[id, position] = each - smooth
    boxes = zip(truth["series_id"], truth["position"], truth["x"], truth["y"], truth["width"], truth["height"])
    strength = pd.Series([pictures[id, p][y : y + h, x : x + w].std() for id, p, x, y, w, h in boxes])
    for name in reader.CONDITIONS:
        of_condition = (truth["condition"] == name).to_numpy()
        medians = strength[of_condition].groupby(truth["grade"][of_condition]).median()
        assert medians[1] > 2.5 * medians[0] and medians[2] > 1.25 * medians[1]
        told = roc_auc_score(truth["grade"][of_condition] > 0, strength[of_condition])
        assert told > 0.97  # not 1: signs of two levels or conditions overlap


def test_echo_draws_signs_in_the_other_modalities_by_its_energy():
    strength = np.linspace(0.1, 1, 25)
    for modality in reader.MODALITIES:
        stacks = [lumbar._stack(np.random.default_rng(0), modality, 10, strength, echo) for echo in (0.25, 0)]
        for (place, signs), (other_place, without) in zip(*stacks):
            assert place == other_place
            for (sign, target, _), (silent, _, _) in zip(signs, without):
                if reader.PAIRED[sign.condition] == modality:
                    assert sign.strength == silent.strength == strength[reader.TARGETS.index(target)]
                else:
                    assert target is None and silent.strength == 0
        found = [sign for _, signs in stacks[0] for sign, target, _ in signs if target is None]
        others = {name for name in reader.CONDITIONS if reader.PAIRED[name] != modality}
        assert {sign.condition for sign in found} == others
        # √0.25 = 0.5 of the contrast.
        numbers = {(sign.condition, sign.side, sign.level): sign.strength for sign in found}
        for name, (condition, side, level) in reader.PLACES.items():
            if condition in others:
                key = condition, {"": 0, "left": 1, "right": -1}[side], reader.LEVELS.index(level)
                assert numbers[key] == pytest.approx(0.5 * strength[reader.TARGETS.index(name)])


def test_sign_of_strength_0_changes_nothing_but_noise():
    rngs = [np.random.default_rng(1) for _ in range(2)]
    body = lumbar_drawing.anatomy(np.random.default_rng(2))
    shown = lumbar_drawing.exposure(np.random.default_rng(3))._replace(noise=0.0)
    signs = [lumbar_drawing.Sign(CANAL, 0, 2, 0.0)], []
    silent, bare = (
        lumbar_drawing.sagittal(rng, body, shown, T2, (64, 64), 0.0, each)[0] for rng, each in zip(rngs, signs)
    )
    np.testing.assert_array_equal(silent, bare)


def test_bands_are_black_in_front_and_white_behind_whatever_is_stored(manifest, volumes):
    """So MONOCHROME1, both depths, rescaling and the turn of the picture come out right."""
    for modality, volume in zip(manifest["modality"], volumes):
        for picture in series.normalise(volume.slices):
            along = picture if modality == AXIAL else picture.T
            assert along[0].mean() < 20 and along[-1].mean() > 235


def test_windows_show_what_the_percentiles_show(volumes):
    compared = 0
    for volume in volumes:
        if volume.slices[0].window is not None:
            one, other = (np.stack(series.normalise(volume.slices, window=use)).astype(float) for use in (True, False))
            compared += 1
            assert np.abs(one - other).mean() < 25
    assert compared > len(volumes) // 4


# --- parameters and what is there already ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("studies", 9),
        ("seed", -1),
        ("image_side", (47, 80)),
        ("image_side", (100, 80)),
        ("image_side", (80,)),
        ("label_noise", 0.5),
        ("label_noise", float("nan")),
        ("echo", 1.1),
        ("missing_share", 0.95),
    ],
)
def test_write_parameter_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is .*expected"):
        lumbar.write(tmp_path / "set", **{option: value})
    assert not (tmp_path / "set").exists()


def test_write_real_data_in_the_way_is_never_touched(tmp_path):
    image = tmp_path / "lumbar/train_images/1/2/3.dcm"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be real data"):
        lumbar.write(tmp_path, **TINY)
    assert image.read_bytes() == b"real" and len(_file_bytes(tmp_path)) == 1


def test_write_whole_set_is_left_as_it_is_and_another_is_refused(tmp_path):
    root = lumbar.write(str(tmp_path), **TINY)
    assert root == tmp_path
    image = next(root.rglob("*.dcm"))
    image.write_bytes(b"kept")
    assert lumbar.write(tmp_path, **TINY) == root and image.read_bytes() == b"kept"
    with pytest.raises(FileExistsError, match="describes another set"):
        lumbar.write(tmp_path, seed=1, **TINY)


def test_write_interrupted_leaves_no_set_and_is_done_anew(tmp_path, monkeypatch):
    whole = lumbar.write(tmp_path / "whole", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(lumbar, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lumbar.write(tmp_path / "killed", **TINY)
    assert not (tmp_path / "killed/lumbar").exists()
    assert _file_bytes(lumbar.write(tmp_path / "killed", **TINY)) == _file_bytes(whole)


def test_write_files_of_unlike_pixels_have_unlike_times(tmp_path):
    """Sizes of uncompressed DICOM do not tell files apart; a cache that goes by size and time must not mix them up."""
    options = {"studies": 10, "image_side": (48, 48), "seed": 3}
    roots = [lumbar.write(tmp_path / str(echo), **options, echo=echo) for echo in (0.0, 0.9)]
    changed = 0
    for path in sorted((roots[0] / "lumbar/train_images").rglob("*.dcm")):
        other = roots[1] / path.relative_to(roots[0])
        if path.read_bytes() != other.read_bytes():
            changed += 1
            assert path.stat().st_mtime_ns != other.stat().st_mtime_ns
    assert changed > 20
