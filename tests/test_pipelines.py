import itertools
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest

from kerasmed import augment, images, paths, pipelines


@pytest.fixture
def tree(tmp_path, rng):
    """A folder of 20 small PNG of different sizes, and its manifest."""
    root = tmp_path / "root"
    root.mkdir()
    for number in range(20):
        cv2.imwrite(str(root / f"i {number}.png"), rng.integers(0, 256, (30 + number, 40), dtype=np.uint8))
    return root, pd.DataFrame({"image_path": [f"i {number}.png" for number in range(20)]})


def _decode(tree, **options):
    root, manifest = tree
    return pipelines.decode(manifest, root, image_size=(16, 24), progress=False, **options)


def test_decode_equals_reading_each_file(tree):
    store = _decode(tree)
    assert store.images.shape == (20, 16, 24) and store.images.dtype == np.uint8 and isinstance(store.images, np.memmap)
    for row, path in enumerate(tree[1]["image_path"]):
        np.testing.assert_array_equal(store.images[row], images.read(tree[0] / path, image_size=(16, 24)))
        np.testing.assert_array_equal(store.thumbnails[row], images.thumbnail(images.read(tree[0] / path)))


def test_decode_notes_facts_of_the_whole_pictures_beside_the_manifest(tree, monkeypatch):
    monkeypatch.setattr(pipelines, "SHARD_ROWS", 6)
    (tree[0] / "i 4.png").write_bytes(b"")
    shutil.copy(tree[0] / "i 3.png", tree[0] / "i 9.png")
    store = _decode(tree, max_quarantined_share=0.1)
    assert store.facts.columns.tolist() == list(images.FACTS.names) and len(store.facts) == 19
    for row, path in enumerate(store.manifest["image_path"]):
        facts = images.facts(images.read(tree[0] / path))
        assert store.facts.loc[row, ["height", "width", "maximum", "digest"]].tolist() == [*facts[:3], facts[4]]
        assert store.facts["std"][row] == np.float32(facts[3])
    assert store.facts["height"].tolist()[:4] == [30, 31, 32, 33]  # of the files, not of the store
    copies = store.manifest.loc[store.facts["digest"].duplicated(keep=False), "image_path"]
    assert copies.tolist() == ["i 3.png", "i 9.png"]
    pd.testing.assert_frame_equal(_decode(tree, max_quarantined_share=0.1).facts, store.facts)


def test_decode_again_opens_the_store_without_reading(tree, monkeypatch):
    first = _decode(tree)
    monkeypatch.setattr(images, "read", lambda *_: pytest.fail("decoded twice"))
    assert _decode(tree).folder == first.folder


@pytest.mark.parametrize("change", ["size", "option", "file"])
def test_decode_change_makes_another_store(tree, change):
    first = _decode(tree).folder
    if change == "size":
        second = pipelines.decode(tree[1], tree[0], image_size=(16, 16), progress=False).folder
    elif change == "option":
        second = _decode(tree, read_options={"equalize": True}).folder
    else:
        cv2.imwrite(str(tree[0] / "i 3.png"), np.zeros((9, 9), np.uint8))
        second = _decode(tree).folder
    assert second != first


def test_decode_interrupted_goes_on_with_the_missing_shards(tree, monkeypatch):
    monkeypatch.setattr(pipelines, "SHARD_ROWS", 4)
    whole = np.array(_decode(tree).images)
    monkeypatch.setenv("KERASMED_CACHE", str(tree[0].parent / "other"))
    read, seen = images.read, []

    def stops_at_13(path, **options):
        seen.append(path)
        if len(seen) == 14:
            raise KeyboardInterrupt
        return read(path, **options)

    monkeypatch.setattr(images, "read", stops_at_13)
    with pytest.raises(KeyboardInterrupt):
        _decode(tree, jobs=1)
    assert len(list(paths.cache_root().glob("*.building/*.npy"))) == 3
    seen.clear()
    monkeypatch.setattr(images, "read", lambda path, **options: (seen.append(path), read(path, **options))[1])
    np.testing.assert_array_equal(_decode(tree, jobs=1).images, whole)
    assert len(seen) == 8  # two shards of four were missing
    assert not list(paths.cache_root().glob("*.building"))


def test_decode_sets_bad_files_aside_and_reads_odd_ones(tree, rng, write_odd_files):
    root, manifest = tree
    picture = rng.integers(0, 256, (40, 40), dtype=np.uint8)
    write_odd_files(root, picture)
    odd = ["zero.jpg", "deep.png", "cut.jpg", "rgba.png", "text.jpg", "cmyk.jpg", "gone.png"]
    store = pipelines.decode(
        pd.concat([manifest, pd.DataFrame({"image_path": odd})]),
        root,
        image_size=(16, 16),
        max_quarantined_share=0.2,
        progress=False,
    )
    reasons = store.quarantine.set_index("image_path")["reason"]
    assert sorted(reasons.index) == ["cut.jpg", "gone.png", "text.jpg", "zero.jpg"]
    assert (
        "truncated" in reasons["cut.jpg"] and "empty" in reasons["zero.jpg"] and "not an image" in reasons["text.jpg"]
    )
    assert reasons["gone.png"] == "absent"
    kept = store.manifest["image_path"].tolist()
    assert kept == [*manifest["image_path"], "deep.png", "rgba.png", "cmyk.jpg"]
    for name in ("deep.png", "rgba.png", "cmyk.jpg"):
        got = store.images[kept.index(name)].astype(int)
        # 12 bits in 16 are stretched to the full range; JPEG and CMYK cost some grey levels
        assert np.abs(got - images.resize(picture, (16, 16))).mean() < 8, name


def test_decode_too_many_bad_files_stop_with_reasons(tree):
    for number in range(4):
        (tree[0] / f"i {number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 of 20 files cannot be read.*i 0.png: empty file"):
        _decode(tree)


def test_decode_all_files_bad_stops_with_reasons(tree):
    for path in tree[0].iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="20 of 20 files cannot be read"):
        _decode(tree, max_quarantined_share=0.5)


def test_decode_two_calls_at_once_decode_each_file_once(tree, monkeypatch):
    read, asked, both = images.read, [], threading.Barrier(2)

    def counted(path, **options):
        asked.append(path)
        time.sleep(0.01)
        return read(path, **options)

    def decode(_):
        both.wait()
        return _decode(tree, jobs=1)

    monkeypatch.setattr(images, "read", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(decode, range(2))
    assert len(asked) == len(set(asked)) == 20
    assert first.folder == second.folder and np.array_equal(first.images, second.images)


def test_decode_shard_that_is_lost_before_the_end_is_made_again(tree, monkeypatch):
    monkeypatch.setattr(pipelines, "SHARD_ROWS", 5)
    whole, decode_shard, lost = _decode(tree), pipelines.decode_shard, []

    def loses_the_first(shard, *arguments):
        if shard.name.startswith("000000010") and not lost:
            lost.append(shard.with_name("000000000.npy"))
            lost[0].unlink()
        return decode_shard(shard, *arguments)

    shutil.rmtree(whole.folder)
    monkeypatch.setattr(pipelines, "decode_shard", loses_the_first)
    assert np.array_equal(_decode(tree, jobs=1).images, whole.images) and lost


def test_decode_file_that_the_system_refused_is_tried_again(tree, monkeypatch, caplog):
    read, asked = images.read, []

    def refuses_two(path, **options):
        asked.append(path.name)
        if path.name in ("i 3.png", "i 5.png"):
            raise PermissionError(13, "Permission denied")
        return read(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(images, "read", refuses_two)
        store = _decode(tree, max_quarantined_share=0.1)
        assert len(asked) == 20
        # As long as the system refuses them, these two alone are tried, and the store stays as it is
        again = _decode(tree, max_quarantined_share=0.1)
    assert asked[20:] == ["i 3.png", "i 5.png"] and not caplog.records and len(again.images) == 18
    assert store.quarantine["reason"].tolist() == ["system refused: PermissionError: Permission denied"] * 2
    assert len(_decode(tree).images) == 20
    assert [entry.getMessage() for entry in caplog.records if entry.levelname == "WARNING"] == [
        f"the decoded store {store.folder} is made again: 2 of the 2 files that the system refused can now be read. "
        "First: ['i 3.png', 'i 5.png']"
    ]


@pytest.mark.slow
def test_decode_file_that_did_not_fit_into_memory_is_tried_again(tree, monkeypatch):
    read = images.read

    def starves(path, **options):
        if path.name == "i 7.png":
            raise MemoryError
        return read(path, **options)

    monkeypatch.setattr(images, "read", starves)
    assert _decode(tree).quarantine["reason"].tolist() == ["system refused: out of memory"]
    monkeypatch.setattr(images, "read", read)
    assert not len(_decode(tree).quarantine)


@pytest.mark.parametrize("name", ["6154", "0007", "1e5", "NA", "null", "nan", 'a,"b\nc', " a "])
def test_decode_bad_file_of_an_odd_name_is_set_aside_under_that_name(tree, name):
    root, manifest = tree
    (root / name).write_bytes(b"no picture")
    first = pd.concat([pd.DataFrame({"image_path": [name]}), manifest.head(2)])
    for _ in range(2):  # made, and opened
        store = _decode((root, first), max_quarantined_share=0.5)
        assert store.quarantine["image_path"].tolist() == [name]
        assert store.manifest["image_path"].tolist() == ["i 0.png", "i 1.png"] and len(store.images) == 2


def test_decode_folder_is_set_aside_for_good(tree, monkeypatch):
    root, manifest = tree
    (root / "folder.png").mkdir()
    odd = pd.concat([manifest, pd.DataFrame({"image_path": ["folder.png"]})])
    store = _decode((root, odd), max_quarantined_share=0.1)
    assert store.quarantine["reason"].tolist() == ["a folder, where a file is expected"]
    monkeypatch.setattr(images, "read", lambda *_: pytest.fail("decoded twice"))
    assert _decode((root, odd), max_quarantined_share=0.1).folder == store.folder


@pytest.mark.slow
def test_decode_killed_goes_on_with_the_missing_shards(tmp_path, rng):
    (tmp_path / "data").mkdir()
    noise = rng.integers(0, 256, (900, 900), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "data/0000.jpg"), noise)
    for number in range(1, 1024):
        os.link(tmp_path / "data/0000.jpg", tmp_path / f"data/{number:04d}.jpg")
    script = (
        "import pandas as pd; from kerasmed import pipelines; "
        "paths = pd.DataFrame({'image_path': [f'{number:04d}.jpg' for number in range(1024)]}); "
        f"store = pipelines.decode(paths, {str(tmp_path / 'data')!r}, image_size=(32, 32), jobs=1); "
        "print(len(store.images), int(store.images.std(axis=0).max()))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(paths.cache_root().glob("*.building/0*.npy")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    finished = {path: path.stat().st_mtime_ns for path in paths.cache_root().glob("*.building/0*.npy")}
    shards = 1024 // pipelines.SHARD_ROWS
    assert 0 < len(finished) < shards
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"{100 * len(finished) / shards:.0f}%" in said and said.splitlines()[-1] == "1024 0"
    assert [path.suffix for path in paths.cache_root().glob("[!.]*")] == [""]


def test_decode_stream_equals_the_store(tree):
    store = _decode(tree)
    parts = list(pipelines.decode_stream(tree[0], tree[1]["image_path"].tolist(), image_size=(16, 24), chunk=6))
    np.testing.assert_array_equal(np.concatenate([pixels for pixels, _ in parts]), store.images)
    assert [len(pixels) for pixels, _ in parts] == [6, 6, 6, 2]


@pytest.fixture
def arrays(rng):
    return rng.integers(0, 256, (30, 8, 8), dtype=np.uint8), np.arange(3, 30, 2), np.eye(14, dtype=np.float32)


def _batches(*arrays, **options):
    return pipelines.training_dataset(*arrays, **options).as_numpy_iterator()


def test_batches_show_every_row_once_an_epoch_in_a_new_order(arrays):
    images_, rows, targets = arrays
    stream = _batches(images_, rows, targets, batch_size=4, seed=0)
    epochs = [[*itertools.islice(stream, 4)] for _ in range(2)]
    orders = [np.concatenate([y.argmax(axis=1) for _, y in epoch]) for epoch in epochs]
    assert [len(y) for _, y in epochs[0]] == [4, 4, 4, 2]
    assert all(sorted(order) == list(range(14)) for order in orders)
    assert (orders[0] != orders[1]).any()
    for pixels, y in epochs[0]:
        np.testing.assert_array_equal(pixels[..., 0], images_[rows[y.argmax(axis=1)]])


def test_batches_resumed_epoch_sees_the_same_pixels(arrays):
    images_, rows, targets = arrays
    options = {"batch_size": 4, "seed": 5, "augment": augment.build(("flip", "noise", "rotate"), (8, 8))}
    through = list(itertools.islice(_batches(images_, rows, targets, **options), 12))[8:]
    resumed = list(itertools.islice(_batches(images_, rows, targets, first_epoch=2, **options), 4))
    for (pixels, y), (again, y_again) in zip(through, resumed, strict=True):
        np.testing.assert_array_equal(pixels, again)
        np.testing.assert_array_equal(y, y_again)


def test_training_and_evaluation_dataset_shapes_and_types(arrays):
    images_, rows, targets = arrays
    pixels, y = next(iter(pipelines.training_dataset(images_, rows, targets, batch_size=4, seed=0)))
    assert pixels.shape == (4, 8, 8, 1) and pixels.dtype == "uint8" and y.shape == (4, 14)
    dataset = pipelines.evaluation_dataset(images_, rows, targets, batch_size=5)
    got = list(dataset)
    assert len(dataset) == len(got) == 3
    np.testing.assert_array_equal(np.concatenate([x for x, _ in got])[..., 0], images_[rows])
    np.testing.assert_array_equal(np.concatenate([y for _, y in got]), targets)
    assert next(iter(pipelines.evaluation_dataset(images_, rows, batch_size=5))).shape == (5, 8, 8, 1)


def test_batches_with_further_inputs_keep_them_beside_their_images(arrays):
    images_, rows, targets = arrays
    beside = {"patient": np.arange(30, dtype=np.float32)[:, None] * [1, np.nan]}
    for inputs, y in itertools.islice(_batches(images_, rows, targets, batch_size=4, seed=0, beside=beside), 8):
        chosen = rows[y.argmax(axis=1)]
        np.testing.assert_array_equal(inputs["image"][..., 0], images_[chosen])
        np.testing.assert_array_equal(inputs["patient"], beside["patient"][chosen])
    dataset = pipelines.evaluation_dataset(images_, rows, targets, batch_size=5, beside=beside)
    got = [inputs["patient"].numpy() for inputs, _ in dataset]
    np.testing.assert_array_equal(np.concatenate(got), beside["patient"][rows])
    first, _ = next(iter(pipelines.training_dataset(images_, rows, targets, batch_size=4, seed=0, beside=beside)))
    assert set(first) == {"image", "patient"} and first["image"].dtype == "uint8" and first["patient"].shape == (4, 2)


def test_batches_with_weights_keep_them_beside_their_images_over_epochs(arrays):
    images_, rows, targets = arrays
    weights = np.linspace(0.1, 1, 14, dtype=np.float32)
    options = {"batch_size": 4, "seed": 0, "augment": augment.build(("flip",), (8, 8)), "weights": weights}
    seen = []
    for pixels, y, w in itertools.islice(_batches(images_, rows, targets, **options), 8):
        chosen = y.argmax(axis=1)
        np.testing.assert_array_equal(w, weights[chosen])
        for image, row in zip(pixels[..., 0], rows[chosen], strict=True):
            assert (image == images_[row]).all() or (image == images_[row][:, ::-1]).all()
        seen.append(w)
    orders = np.concatenate(seen).reshape(2, 14)
    assert (orders[0] != orders[1]).any() and (np.sort(orders) == weights).all()


def test_datasets_with_weights_give_them_third_and_in_float32(arrays):
    images_, rows, targets = arrays
    weights = np.linspace(0.1, 1, 14, dtype=np.float32)
    got = list(pipelines.evaluation_dataset(images_, rows, targets, batch_size=5, weights=weights))
    np.testing.assert_array_equal(np.concatenate([w for _, _, w in got]), weights)
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in got]), targets)
    beside = {"age": np.arange(30, dtype=np.float32)[:, None]}
    dataset = pipelines.training_dataset(images_, rows, targets, batch_size=4, seed=0, weights=weights, beside=beside)
    inputs, y, w = next(iter(dataset))
    assert w.shape == (4,) and w.dtype == "float32"
    np.testing.assert_array_equal(w, weights[y.numpy().argmax(axis=1)])
    np.testing.assert_array_equal(inputs["age"][:, 0], rows[y.numpy().argmax(axis=1)])


def test_datasets_of_a_store_give_each_split_its_images_weights(tree):
    root, manifest = tree
    (root / "i 2.png").write_bytes(b"")
    splits = ["train", "valid", "train", "test", "valid"] * 4
    store = _decode((root, manifest.assign(split=splits)), max_quarantined_share=0.1)
    numbers = store.manifest["image_path"].str.extract(r"(\d+)", expand=False).to_numpy("float32")
    train_from, valid = pipelines.datasets_of(
        store, numbers[:, None], batch_size=3, seed=0, weights=numbers / np.float32(20)
    )
    (pixels, y, w), *_ = valid
    assert y[:, 0].numpy().tolist() == [1, 4, 6, 9, 11, 14, 16, 19]
    np.testing.assert_array_equal(w, y[:, 0] / 20)
    np.testing.assert_array_equal(pixels[..., 0], store.images[np.isin(numbers, y[:, 0])])
    parts = [(y[:, 0].numpy(), w.numpy()) for _, y, w in train_from(1).take(3)]
    y, w = (np.concatenate(values) for values in zip(*parts, strict=True))
    assert sorted(y) == [0, 5, 7, 10, 12, 15, 17]
    np.testing.assert_array_equal(w, y / np.float32(20))


@pytest.mark.parametrize("make", [pipelines.training_dataset, pipelines.evaluation_dataset])
def test_datasets_weights_that_are_not_beside_the_rows_are_refused(arrays, make):
    images_, rows, targets = arrays
    options = {"batch_size": 4} | ({"seed": 0} if make is pipelines.training_dataset else {})
    with pytest.raises(ValueError, match=r"shape \(30,\) with 14 targets; expected one weight a row"):
        make(images_, rows, targets, weights=np.ones(30, np.float32), **options)


def test_evaluation_dataset_weights_without_targets_are_refused(arrays):
    images_, rows, _ = arrays
    with pytest.raises(ValueError, match=r"shape \(14,\) with no targets"):
        pipelines.evaluation_dataset(images_, rows, weights=np.ones(14, np.float32))


@pytest.mark.parametrize("devices", [1, 2])  # each of which answers all of a batch, one after another
def test_predict_files_further_inputs_are_those_of_the_readable_files(tree, devices):
    (tree[0] / "i 3.png").write_bytes(b"")
    seen = []

    class Told:
        def predict_on_batch(self, inputs):
            seen.append(inputs["image"].shape)
            return np.concatenate([inputs["patient"]] * devices)

    def beside(names):
        return {"patient": np.array([[float(name.split()[1].removesuffix(".png"))] for name in names])}

    table = pipelines.predict_files(
        tree[0], [(Told(), ["number"])], image_size=(16, 24), beside=beside, progress=False
    ).set_index("image_path")
    assert seen == [(len(table) - 1, 16, 24, 1)]
    told = table["p_number"].drop("i 3.png")
    assert told.tolist() == [float(name.split()[1].removesuffix(".png")) for name in told.index]
    assert np.isnan(table.loc["i 3.png", "p_number"]) and "empty" in table.loc["i 3.png", "error"]


_ENDS = """
import numpy as np
from kerasmed import augment, pipelines
images = np.zeros((640, 224, 224), np.uint8)
options = {"batch_size": 32, "seed": 0, "augment": augment.build(("flip", "noise", "rotate"), (224, 224))}
batches = iter(pipelines.training_dataset(images, np.arange(640), np.zeros(640), **options))
next(batches)
print("done")
"""


def test_training_dataset_that_is_under_way_does_not_keep_python_from_ending():
    # Without end, it makes batches ahead while the interpreter goes.
    done = subprocess.run([sys.executable, "-c", _ENDS], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_training_dataset_passes_on_what_went_wrong(arrays):
    images_, rows, targets = arrays

    def broken(images_, seed):
        raise ValueError("no such picture")

    with pytest.raises(Exception, match="no such picture"):
        next(iter(pipelines.training_dataset(images_, rows, targets, batch_size=4, seed=0, augment=broken)))


@pytest.mark.parametrize("path", ["../outside.png", "/etc/hostname", "a\0b.png", "~/b.png"])
def test_decode_of_a_path_that_leaves_the_root_is_refused(tmp_path, path):
    with pytest.raises(ValueError, match="column image_path .* in 1 of 2 rows"):
        pipelines.decode(pd.DataFrame({"image_path": ["a.png", path]}), tmp_path, image_size=(8, 8))


def test_decode_of_a_file_that_changes_meanwhile_is_refused_by_name(tree, monkeypatch):
    read, last = images.read, tree[0] / "i 3.png"

    def changes(path, **options):
        found = read(path, **options)
        if path == last:
            os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(images, "read", changes)
    with pytest.raises(RuntimeError, match=r"1 files were changed while they were decoded.*First: \['i 3.png'\]"):
        _decode(tree)
    assert not list(paths.cache_root().glob("*/images.npy")) and not list(paths.cache_root().glob("*.building/0*"))
    assert len(_decode(tree).manifest) == 20


def test_decode_store_that_is_cut_is_made_again_and_says_so(tree, caplog):
    whole = _decode(tree)
    expected = np.array(whole.images)
    content = (whole.folder / "images.npy").read_bytes()
    (whole.folder / "images.npy").write_bytes(content[:-1])
    with caplog.at_level(logging.WARNING, "kerasmed.pipelines"):
        np.testing.assert_array_equal(_decode(tree).images, expected)
    assert f"the decoded store {whole.folder} is damaged and is made again" in caplog.text
