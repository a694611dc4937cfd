"""The synthetic tritask set: layout, black images, label noise, and what can and what cannot read its shapes."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import audit, images
from kerasmed.datasets import tritask as reader
from kerasmed.datasets.synthetic import tritask

NAMES = list(tritask.NAMES)
SIGNALS = ["signal1", "signal2", "signal3"]
SIZES = {"train_images": 240, "valid_images": 120, "test_images": 40}
TINY = {"train_images": 12, "valid_images": 10, "test_images": 10}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """240 + 120 + 40 images, a quarter of them black."""
    return tritask.write(tmp_path_factory.mktemp("tritask") / "set", **SIZES)


@pytest.fixture(scope="module")
def truth(root):
    return pd.read_csv(root / "tritask/truth.csv").assign(
        split=lambda table: table["image_path"].str.split("/").str[1].map({v: k for k, v in reader.FOLDERS.items()})
    )


@pytest.fixture(scope="module")
def pictures(root, truth):
    return np.stack([images.read(root / path) for path in truth["image_path"]])


def _file_bytes(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _shows_something(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE).any()


def _description(root):
    return json.loads((root / "tritask/synthetic.json").read_text())


# --- layout ----------------------------------------------------------------------------------------------------------


def test_write_layout_is_the_real_one(root, truth):
    assert [path.name for path in root.iterdir()] == ["tritask"]
    assert sorted(path.name for path in (root / "tritask").iterdir()) == sorted(
        [*reader.FOLDERS.values(), *reader.TABLES, "truth.csv", "synthetic.json"]
    )
    columns = ["image_path", "black", *SIGNALS, *NAMES]
    assert list(truth.columns) == [*columns, "split"]
    assert truth["image_path"].tolist() == sorted(
        (path.relative_to(root).as_posix() for path in root.rglob("*.png")), key=lambda path: path[-9:]
    )
    # The reader sees what truth.csv records, but for the test images, whose labels are in truth.csv alone.
    frame = reader.read(root)
    assert frame["image_path"].tolist() == truth["image_path"].tolist()
    labelled = truth["split"] != "test"
    assert (frame.loc[labelled, NAMES] == truth.loc[labelled, NAMES]).all(axis=None)
    assert frame.loc[~labelled, NAMES].isna().all(axis=None)
    sample = reader.read_sample(root)
    assert ("tritask/test_images/" + sample["id"]).tolist() == truth.loc[~labelled, "image_path"].tolist()
    assert not sample[NAMES].any(axis=None)
    answers = truth.loc[~labelled].set_index(sample["id"].to_numpy())
    assert reader.submission(sample, answers)["label1"].tolist() == answers["label1"].tolist()


def test_write_images_are_grey_in_one_or_three_equal_channels(root, truth):
    stored = [cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED) for path in truth["image_path"]]
    assert {image.shape for image in stored} == {(64, 64), (64, 64, 3)}
    assert all(image.dtype == np.uint8 for image in stored)
    assert all((image == image[..., :1]).all() for image in stored if image.ndim == 3)
    in_three = np.array([image.ndim == 3 for image in stored])
    # 400 fair coins: 0.5 ± 0.025; black images and others alike.
    assert 0.4 < in_three.mean() < 0.6
    assert 0 < in_three[truth["black"] == 1].mean() < 1


def test_write_same_seed_gives_identical_files_and_times(tmp_path):
    first, again, other = (
        tritask.write(tmp_path / name, seed=seed, **TINY) for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert _file_bytes(first) == _file_bytes(again)
    times = {path.stat().st_mtime_ns for root in (first, again) for path in root.rglob("*") if path.is_file()}
    assert len(times) == 1
    shown = [
        {data for name, data in _file_bytes(root).items() if name.endswith(".png") and _shows_something(data)}
        for root in (first, other)
    ]
    assert len(shown[0]) == len(shown[1]) == 25 and shown[0].isdisjoint(shown[1])


# --- labels ----------------------------------------------------------------------------------------------------------


def test_write_description_states_what_is_known(root, truth):
    description = _description(root)
    shown = truth[truth["black"] == 0]
    assert {name: description.pop(name) for name in ("prevalence", "ceiling_f1")} == {
        "prevalence": {split: table[NAMES].mean().to_dict() for split, table in shown.groupby("split", sort=False)},
        "ceiling_f1": {
            split: {
                name: pytest.approx(2 * (table[name] * table[sign]).sum() / (table[name] + table[sign]).sum())
                for name, sign in zip(NAMES, SIGNALS)
            }
            for split, table in shown.groupby("split", sort=False)
        },
    }
    # Of 180, 90 and 30 images that are not black, round(0.05 × 180) = 9, round(4.5) = 4 and round(1.5) = 2 are flipped.
    assert description == {
        "system": "tritask",
        "seed": 0,
        **SIZES,
        "black_share": 0.25,
        "label_noise": 0.05,
        "black_images": {"train": 60, "valid": 30, "test": 10},
        "ceiling": {"train": 1 - 9 / 180, "valid": pytest.approx(1 - 4 / 90), "test": pytest.approx(1 - 2 / 30)},
    }


def test_write_label_noise_flips_the_stated_number_a_label_and_split(truth):
    shown = truth[truth["black"] == 0]
    flipped = pd.DataFrame(shown[NAMES].to_numpy() != shown[SIGNALS].to_numpy(), columns=NAMES)
    counts = flipped.groupby(shown["split"].to_numpy(), sort=False).sum()
    assert counts.to_numpy().tolist() == [[9] * 3, [4] * 3, [2] * 3]
    assert (flipped.sum(axis=1) == 1).any()  # a label flips by itself


def test_write_signals_have_their_shares_and_go_together(truth):
    signals = truth.loc[(truth["black"] == 0) & (truth["split"] == "train"), SIGNALS]
    # P(all three) = (0.2 × 0.1 × 0.05 + 0.8 × 0.7 × 0.55) / 2 = 0.1545: 27.81 of 180; none: 0.3420 + 0.0135 = 0.3555.
    assert signals.all(axis=1).sum() == 28 and (~signals.any(axis=1)).sum() == 64
    np.testing.assert_allclose(signals.mean(), [0.5, 0.4, 0.3], atol=0.01)  # 0.01: the rounding of eight counts
    given = signals.groupby("signal1")["signal2"].mean()
    # (0.2 × 0.1 + 0.8 × 0.7) / 2 / 0.5 = 0.58 of those with label1, 0.22 of those without.
    assert given[1] == pytest.approx(0.58, abs=0.02) and given[0] == pytest.approx(0.22, abs=0.02)
    phi = signals.corr().to_numpy()[np.triu_indices(3, 1)]
    assert (phi > 0.3).all() and (phi < 0.4).all()


def test_write_black_images_are_empty_and_contradict_one_another(root, truth, pictures):
    black = (truth["black"] == 1).to_numpy()
    assert truth.groupby("split", sort=False)["black"].sum().tolist() == [60, 30, 10]
    assert not pictures[black].any() and (pictures[~black].std(axis=(1, 2)) > 5).all()
    assert not truth.loc[black, SIGNALS].any(axis=None)
    in_train = truth[black & (truth["split"] == "train")]
    assert in_train.groupby(NAMES).ngroups >= 6
    other = truth[~black & (truth["split"] == "train")]
    # 60 draws of a share near 0.4 have a standard error of 0.063; 0.2 is three of them.
    np.testing.assert_allclose(in_train[NAMES].mean(), other[NAMES].mean(), atol=0.2)


def test_write_without_noise_and_black_images_is_all_signal(tmp_path):
    root = tritask.write(tmp_path, black_share=0, label_noise=0, **TINY)
    truth = pd.read_csv(root / "tritask/truth.csv")
    assert not truth["black"].any() and (truth[NAMES].to_numpy() == truth[SIGNALS].to_numpy()).all()
    description = _description(root)
    assert description["ceiling"] == {"train": 1, "valid": 1, "test": 1}
    assert description["ceiling_f1"]["test"] == dict.fromkeys(NAMES, 1)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_thumbnails_of_no_two_images_correlate_above_095(truth, pictures):
    vectors = audit.standardize(pictures[truth["black"] == 0])
    matrix = vectors @ vectors.T - np.eye(len(vectors))
    assert matrix.max() < 0.95


def _mean_f1(y_true, y_pred):
    both = (y_true & y_pred).sum(axis=-2)
    return (2 * both / (y_true.sum(axis=-2) + y_pred.sum(axis=-2))).mean(axis=-1)


def test_nearest_neighbour_scores_near_chance(truth, pictures, rng):
    labels, shown = truth[NAMES].to_numpy(), (truth["black"] == 0).to_numpy()
    known, asked = (np.flatnonzero(shown & (truth["split"] == split)) for split in ("train", "valid"))
    found = labels[known][audit.nearest(pictures[asked], pictures[known])[0]]
    chance = [_mean_f1(labels[asked], rng.permutation(found)) for _ in range(200)]
    # Three standard deviations of the same answers given to other images; all labels 1 for all scores higher.
    assert abs(_mean_f1(labels[asked], found) - np.mean(chance)) < 3 * np.std(chance)
    assert _mean_f1(labels[asked], found) < _mean_f1(labels[asked], np.ones_like(found))


def _matched(pictures, side):
    """Highest correlation of each shape with any place of a picture of `side` pixels: what a reader of shapes sees."""
    small = np.stack([cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA) for picture in pictures])
    steps = (2 * np.arange(64) + 1) / 64 - 1
    scores = []
    for kind in ("ring", "spot", "cross"):
        best = np.full(len(small), -1.0)
        for angle in np.linspace(0, np.pi / 2, 6, endpoint=False) if kind == "cross" else [0.0]:
            x, y = tritask.rotated(steps[None, :] / 0.25, steps[:, None] / 0.25, angle)
            kernel = cv2.resize(tritask._shape(kind, x, y)[22:42, 22:42], (20 * side // 64,) * 2, interpolation=3)
            kernel = kernel.astype(np.float32)
            found = [cv2.matchTemplate(i.astype(np.float32), kernel, cv2.TM_CCOEFF_NORMED).max() for i in small]
            best = np.maximum(best, found)
        scores.append(best)
    return np.stack(scores, axis=1)


@pytest.mark.parametrize("change", ["none", "half size", "quarter turn", "mirror"])
def test_shapes_can_be_read_whatever_the_size_and_orientation(truth, pictures, change):
    changed = {"quarter turn": np.rot90(pictures, 1, (1, 2)), "mirror": pictures[:, :, ::-1]}.get(change, pictures)
    scores = _matched(changed, 32 if change == "half size" else 64)
    shown = (truth["black"] == 0).to_numpy()
    for score, sign in zip(scores[shown].T, SIGNALS):
        drawn = truth.loc[shown, sign].to_numpy() == 1
        # Share of pairs, one with and one without the shape, that are ordered rightly: AUROC.
        assert (score[drawn][:, None] > score[~drawn]).mean() > 0.9, sign


def test_mean_intensity_and_contrast_do_not_tell_the_labels(truth, pictures):
    shown = (truth["black"] == 0).to_numpy()
    measures = pd.DataFrame({"mean": pictures.mean(axis=(1, 2)), "contrast": pictures.std(axis=(1, 2))})[shown]
    areas = audit.by_class(truth[shown].reset_index(drop=True), SIGNALS, measures.reset_index(drop=True))["auroc"]
    # 300 images, about 0.033 standard error: 0.1 is three of them.
    assert ((areas - 0.5).abs() < 0.1).all()


# --- parameters and what is there already ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train_images", 9),
        ("valid_images", 0),
        ("test_images", -1),
        ("black_share", 0.95),
        ("black_share", -0.1),
        ("black_share", float("nan")),
        ("label_noise", 0.5),
        ("label_noise", float("nan")),
        ("seed", -1),
    ],
)
def test_write_parameter_out_of_range_is_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=f"`{option}` is .*expected"):
        tritask.write(tmp_path / "set", **{option: value})
    assert not (tmp_path / "set").exists()


def test_write_smallest_set_of_mostly_black_images_is_whole(tmp_path):
    root = tritask.write(tmp_path, train_images=10, valid_images=10, test_images=10, black_share=0.9, label_noise=0.49)
    description = _description(root)
    assert description["black_images"] == {"train": 9, "valid": 9, "test": 9} and len(reader.read(root)) == 30
    # One image a split, and round(0.49 × 1) = 0 flips: that of no signals, the most frequent set, so no F1 either.
    assert description["ceiling"]["train"] == 1 and description["ceiling_f1"]["train"] == dict.fromkeys(NAMES)


def test_write_real_data_in_the_way_is_never_touched(tmp_path):
    image = tmp_path / "tritask/train_images/0.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"real")
    with pytest.raises(FileExistsError, match="may be real data"):
        tritask.write(tmp_path, **TINY)
    assert image.read_bytes() == b"real"


def test_write_other_parameters_in_the_way_is_refused(tmp_path):
    tritask.write(tmp_path, **TINY)
    before = _file_bytes(tmp_path)
    with pytest.raises(FileExistsError, match="describes another set"):
        tritask.write(tmp_path, seed=1, **TINY)
    assert _file_bytes(tmp_path) == before


def test_write_whole_set_is_left_as_it_is(tmp_path):
    root = tritask.write(str(tmp_path), **TINY)
    assert root == tmp_path
    image = next(root.rglob("*.png"))
    image.write_bytes(b"kept")
    assert tritask.write(tmp_path, **TINY) == root
    assert image.read_bytes() == b"kept"


def test_write_interrupted_leaves_no_set_and_is_done_anew(tmp_path, monkeypatch):
    whole = tritask.write(tmp_path / "whole", **TINY)
    with monkeypatch.context() as patch:
        patch.setattr(tritask, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tritask.write(tmp_path / "killed", **TINY)
    assert not (tmp_path / "killed/tritask").exists()
    assert _file_bytes(tritask.write(tmp_path / "killed", **TINY)) == _file_bytes(whole)
