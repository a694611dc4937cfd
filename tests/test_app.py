"""The page itself, run by Streamlit's own tester: no server, no browser."""

import gc
import io
import logging
import re
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from kerasmed import images, runs

streamlit_testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")

from kerasmed import app  # noqa: E402  needs streamlit

DICOM = Path(pydicom.__path__[0]) / "data/test_files/MR_small.dcm"  # comes with the library


@pytest.fixture(scope="module")
def models_root(tmp_path_factory, write_cascade_run):
    root = tmp_path_factory.mktemp("models")
    write_cascade_run(root)
    return root


@pytest.fixture(scope="module")
def cascade(models_root):
    from kerasmed.systems.brain import BrainCascade

    return BrainCascade.load(runs.find("brain", app.NOTEBOOK, models_root=models_root) / "cascade")


@pytest.fixture(scope="module")
def _quick_collections(cascade):
    """Streamlit collects garbage after each run of the page, which takes long among TensorFlow's objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def open_page(models_root, monkeypatch, _quick_collections):
    """Function: the page as it is first seen, with the runs under a root."""

    def open_(root=models_root, run="auto"):
        monkeypatch.setenv("KERASMED_MODELS", str(root))
        monkeypatch.setenv("KERASMED_RUN", str(run))
        page = streamlit_testing.AppTest.from_file(app.__file__, default_timeout=120).run()
        assert not page.exception
        return page

    return open_


def _picture(seed=0, size=(60, 50)):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def _encoded(suffix, **options):
    return cv2.imencode(suffix, _picture(**options))[1].tobytes()


def _bomb():
    """A whole PNG of 20000×10000 pixels in 24 kB."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 20000, 10000, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(2501) * 10000, 9)),
        (b"IEND", b""),
    ]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _dicom_without_pixels():
    data_set = pydicom.dcmread(DICOM)
    del data_set.PixelData
    file = io.BytesIO()
    data_set.save_as(file)
    return file.getvalue()


def _send(page, *files):
    page.file_uploader[0].set_value([(name, data, "application/octet-stream") for name, data in files]).run()
    assert not page.exception
    return page


def _text(page):
    """All words on the page, with HTML's tags left out."""
    parts = [*page.html, *page.markdown, *page.caption, *page.text, *page.error, *page.warning]
    return "\n".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", part.value, flags=re.S) for part in parts)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", _encoded(".png")),
        ("a.jpg", _encoded(".jpg")),
        ("IM0001", DICOM.read_bytes()),  # without a suffix, as scanners write them
    ],
)
def test_page_shows_what_the_cascade_predicts(open_page, cascade, name, data):
    page = _send(open_page(), (name, data))
    reading = cascade.predict(io.BytesIO(data))
    text = _text(page)
    assert f"the path ends at {app.OUTCOME_WORDS[reading.outcome]} {reading.outcome}" in re.sub(r"\s+", " ", text)
    bars = "".join(part.value for part in page.html if "class='bar" in part.value)
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bars)]
    np.testing.assert_allclose(widths, [100 * value for value in reading.joint.values()], atol=0.006)  # as written
    assert sum(widths) == pytest.approx(100, abs=0.04)
    marked = re.findall(r"class='bar path'><span>([^<]+)<", bars)
    assert marked == [app.OUTCOME_WORDS[reading.outcome]]
    for step in app.steps(reading, cascade.threshold):
        assert f"{step['answer']} {step['probability']}" in text.replace("&gt;", ">").replace("&lt;", "<")
    for told in reading.stages.values():
        assert all(answer in text and f"{value:.4f}" in text for answer, value in told.items())
    stage, answer, _ = reading.path[-1]
    captions = [caption for image in page.get("image") for caption in image.captions]
    status = cascade.explain(reading).status[0]
    dead = app.DEAD_WORDS.get(status)
    assert captions == ["image", f"Grad-CAM: {dead}" if dead else f"Grad-CAM, {stage}: {answer}"]
    assert name in [part.value for part in page.text] and not page.error


def test_page_takes_several_slices_as_one_person(open_page, cascade):
    files = [(f"{seed}.png", _encoded(".png", seed=seed)) for seed in range(4)]
    page = _send(open_page(), *files)
    reading = cascade.predict([io.BytesIO(data) for _, data in files])
    own = [cascade.predict(io.BytesIO(data)).outcome for _, data in files]
    assert f"From 4 slices, the path ends at {app.OUTCOME_WORDS[reading.outcome]}" in re.sub(r"\s+", " ", _text(page))
    alone = [part.value for part in page.caption if part.value.startswith("This slice alone")]
    assert alone == [f"This slice alone ends at: {app.OUTCOME_WORDS[outcome]}" for outcome in own]
    (told,) = [part.value for part in page.markdown if "Each alone ends at" in part.value]
    assert ("disagree" in told) == (len(set(own)) > 1)
    assert sum(int(count) for count in re.findall(r"\((\d)\)", told)) == 4
    assert len(page.get("image")) == 8


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("notes.txt", b"hello, no picture", "not an image"),
        ("empty.png", b"", "empty file (0 bytes)"),
        ("cut.jpg", _encoded(".jpg")[:-200], "truncated JPEG"),
        ("bomb.png", _bomb(), "200000000 pixels"),
        ("none.dcm", _dicom_without_pixels(), "DICOM"),
        ("large.png", _encoded(".png") + bytes(app.MAX_MEGABYTES * 2**20), "larger than 64 MB"),
    ],
)
def test_page_names_a_file_that_cannot_be_read_and_goes_on(open_page, name, data, reason):
    page = _send(open_page(), ("good.png", _encoded(".png")), (name, data))
    assert page.error[0].value.startswith("1 of 2 slices read.") and "Expected: PNG, JPEG" in page.error[0].value
    said = page.text[0].value
    assert said.startswith(f"{name}: ") and reason in said and len(said) < 400
    assert "From 1 slice, the path ends at" in _text(page)


def test_page_with_nothing_but_unreadable_files_lives_on(open_page):
    page = _send(open_page(), ("a.png", b""), ("b.png", b"text"))
    assert page.error[0].value.startswith("0 of 2 slices read.") and "the path ends at" not in _text(page)
    _send(page, ("good.png", _encoded(".png")))
    assert not page.error and "From 1 slice, the path ends at" in _text(page)
    page.file_uploader[0].set_value(None).run()
    assert "the path ends at" not in _text(page) and "look" not in page.session_state


def test_page_says_where_another_outcome_is_likelier_than_the_paths(open_page, cascade):
    readings = {seed: cascade.predict(_picture(seed)) for seed in range(6)}
    (other, *_) = [seed for seed, reading in readings.items() if reading.likeliest != reading.outcome]
    (same, *_) = [seed for seed, reading in readings.items() if reading.likeliest == reading.outcome]
    page = _send(open_page(), ("a.png", _encoded(".png", seed=other)))
    assert [part.value for part in page.warning[1:]] == [app.why_other(readings[other], cascade.threshold)]
    assert len(_send(page, ("a.png", _encoded(".png", seed=same))).warning) == 1


def test_page_reads_no_more_slices_than_it_says(open_page):
    small = _encoded(".png", size=(8, 8))
    page = _send(open_page(), *((f"{number}.png", small) for number in range(app.MAX_SLICES + 1)))
    assert page.error[0].value.startswith(f"{app.MAX_SLICES} of {app.MAX_SLICES + 1} slices read.")


def test_page_shows_file_names_as_plain_text_only(open_page):
    name = "<img src=//evil.example/a.png> ![x](//evil.example/b.png) :red[c].png"
    page = _send(open_page(), (name, _encoded(".png")), (f"bad {name}", b"![x](//evil.example/c)"))
    rendered = [*page.html, *page.markdown, *page.caption, *page.error, *page.warning, *page.title]
    assert not any("evil" in part.value for part in rendered)
    assert not any("evil" in caption for image in page.get("image") for caption in image.captions)
    assert name in [part.value for part in page.text]


def test_page_looks_once_at_the_same_files(open_page):
    page = _send(open_page(), ("a.png", _encoded(".png")))
    found = page.session_state["look"]
    page.run()
    assert page.session_state["look"] is found
    _send(page, ("a.png", _encoded(".png", seed=1)))  # other content under the same name
    assert page.session_state["look"] is not found


def test_page_keeps_uploads_of_the_allowed_size_in_memory(open_page):
    from starlette.formparsers import MultiPartParser

    open_page()
    assert MultiPartParser.spool_max_size > app.MAX_MEGABYTES * 2**20


def test_page_logs_no_file_name(open_page, caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        _send(open_page(), ("Doe_Jane.png", _encoded(".png")), ("Doe_John.txt", b"text"))
    captured = capfd.readouterr()
    assert "Doe" not in caplog.text + captured.out + captured.err


def test_page_has_notice_and_what_the_model_is_worth(open_page, models_root):
    page = open_page()
    text = re.sub(r"\s+", " ", _text(page))
    assert "Research software, no diagnosis" in page.warning[0].value
    assert runs.find("brain", app.NOTEBOOK, models_root=models_root).name in text and "trained on real images" in text
    assert "balanced accuracy, slices 0.500 [0.375, 0.625] 0.250 (nearest neighbour)" in text
    assert "Threshold of disease: 0.500, set on validation slices to find 90% of the diseased; on test slices" in text
    assert not page.error


def test_page_warns_of_a_model_of_synthetic_data(open_page, tmp_path, write_cascade_run):
    write_cascade_run(tmp_path, data_source="synthetic")
    page = open_page(tmp_path)
    assert "SYNTHETIC data: its answers mean nothing on real images" in page.error[0].value
    assert "trained on synthetic images" in _text(page)


def test_page_without_a_run_names_the_command(open_page, tmp_path):
    page = open_page(tmp_path)
    assert "kerasmed run 07_brain_mri 08_brain_cascade --profile demo" in [part.value for part in page.code]
    assert not page.file_uploader and "no complete run of 08_brain_cascade" in _text(page)
    assert "Research software" in page.warning[0].value


def test_page_of_a_run_that_is_gone_says_so(open_page, models_root):
    assert "no run folder at gone" in _text(open_page(run="gone"))


@pytest.mark.parametrize("harm", ["folder", "model", "zip", "json", "metrics"])
def test_page_of_a_broken_run_says_so(open_page, models_root, tmp_path, harm):
    shutil.copytree(models_root, tmp_path / "copy")
    run = runs.find("brain", app.NOTEBOOK, models_root=tmp_path / "copy")
    model = run / "cascade/kind.keras"
    if harm == "folder":
        shutil.rmtree(run / "cascade")
    elif harm == "model":
        model.write_bytes(model.read_bytes()[:-4000])
    elif harm == "zip":
        content = bytearray(model.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 500] = bytes(500)
        model.write_bytes(content)
    else:
        (run / ("cascade/cascade.json" if harm == "json" else "metrics.json")).write_text("{}")
    page = open_page(tmp_path / "copy")
    assert "cannot be loaded: its run is damaged" in page.error[0].value and not page.file_uploader


def test_look_shows_a_padded_picture_under_its_own_part_of_the_map(tmp_path, write_cascade_run):
    from kerasmed.systems.brain import BrainCascade

    cascade = BrainCascade.load(write_cascade_run(tmp_path, fit="pad") / "cascade")
    file = io.BytesIO(_encoded(".png", size=(20, 60)))
    file.name = "wide.png"
    found = app.look(cascade, [file])
    assert found.pictures[0].shape == (80, 240) and found.overlays[0].shape == (80, 240, 3)
    maps = cascade.explain(found.reading)
    heat = app.spread(maps.heat[0], (20, 60), (80, 240), cascade.read_options)
    np.testing.assert_array_equal(found.overlays[0], app.overlay(found.pictures[0], heat))


def test_look_reads_each_file_as_images_read_does(cascade):
    file = io.BytesIO(DICOM.read_bytes())
    file.name = "x"
    found = app.look(cascade, [file])
    np.testing.assert_array_equal(found.pictures[0], app.enlarge(images.read(DICOM)))
    np.testing.assert_array_equal(found.reading.pixels[0], cascade.read(DICOM))
