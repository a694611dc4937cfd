"""The app as `kerasmed app` serves it, in a real browser; skipped where Chromium or Playwright is missing."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np
import psutil
import pydicom
import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("streamlit", reason="streamlit is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium in the path")]

HOST = "127.0.0.1"
MARKER = b"kerasmed-marker-4f1b9c"
DICOM = (Path(pydicom.__path__[0]) / "data/test_files/MR_small.dcm").read_bytes()  # comes with the library
CHROMIUM_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 120_000  # ms: a busy machine loads TensorFlow slowly


class Server(NamedTuple):
    """A running `kerasmed app`."""

    url: str
    process: psutil.Process  # Streamlit's
    folder: Path  # holds its home, its temporary files, its working directory and its log
    run: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory, write_cascade_run):
    models, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("server")
    run = write_cascade_run(models)
    for name in ("home", "tmp", "cwd"):
        (folder / name).mkdir()
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kerasmed", "app", "--port", str(port), "--no-browser", "--models-root", models]
    own = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / "log", "wb") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": folder / "cwd", "start_new_session": True}
        started = subprocess.Popen(command, env={**os.environ, **{k: str(v) for k, v in own.items()}}, **options)
    try:
        _wait_for(f"http://{HOST}:{port}/_stcore/health", started)
        (streamlit,) = psutil.Process(started.pid).children()
        yield Server(f"http://{HOST}:{port}/", streamlit, folder, run)
        started.send_signal(signal.SIGTERM)  # a job in the background may be started deaf to SIGINT
        assert started.wait(timeout=20) == 0 and not streamlit.is_running()
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def _wait_for(url, process, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(url, timeout=5).read()
        time.sleep(0.2)
    raise TimeoutError(f"no answer from {url}")


@pytest.fixture(scope="module")
def browser(server):
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        yield launched
        launched.close()


@pytest.fixture
def page(browser, server):
    """The page, ready for uploads; at the end, all that it asked for must have been of this machine."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened, asked = context.new_page(), []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("websocket", lambda channel: asked.append(channel.url))
    opened.goto(server.url)
    opened.get_by_test_id("stFileUploader").wait_for(timeout=SECONDS)
    yield opened
    context.close()
    schemes = {urlsplit(url).scheme for url in asked}
    assert {"http", "ws"} <= schemes <= {"http", "ws", "data", "blob"}
    assert {urlsplit(url).hostname for url in asked if urlsplit(url).scheme in ("http", "ws")} == {HOST}


def _upload(page, *files):
    given = [{"name": name, "mimeType": "application/octet-stream", "buffer": data} for name, data in files]
    page.locator('[data-testid="stFileUploader"] input[type=file]').set_input_files(given)


def _picture(seed=0, side=96):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


def _encoded(suffix, **options):
    return cv2.imencode(suffix, _picture(**options))[1].tobytes()


def _bomb():
    file = io.BytesIO()
    Image.new("1", (20000, 10000)).save(file, "PNG")
    return file.getvalue()


def _answered(page, slices=1):
    page.get_by_text(f"From {slices} slice{'s' * (slices > 1)}, the path ends at").wait_for(timeout=SECONDS)
    page.get_by_text("All stages' numbers").wait_for(timeout=SECONDS)


@pytest.mark.parametrize(
    ("name", "data", "size"),
    [
        ("a.png", _encoded(".png"), (384, 384)),
        ("a.jpg", _encoded(".jpg"), (384, 384)),
        ("IM0001", DICOM, (256, 256)),
    ],
)
def test_page_shows_image_path_probabilities_and_map(page, name, data, size):
    _upload(page, (name, data))
    _answered(page)
    assert "Research software, no diagnosis" in page.locator(".st-key-notice").inner_text()
    steps = page.locator(".km .step").all_inner_texts()
    assert len(steps) in (1, 3) and "Is there a disease?" in steps[0]
    assert all(re.search(r"(disease|kind|severity|type): .*\d\.\d\d", step) for step in steps)
    bars = page.locator(".km .bar")
    assert bars.count() == 7 and page.locator(".km .bar.path").count() == 1
    lengths = bars.locator("i").evaluate_all(
        "bars => bars.map(bar => bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width)"
    )
    assert sum(lengths) == pytest.approx(1, abs=0.01)  # lengths are whole fractions of a pixel
    images = '[data-testid="stImage"] img'
    page.wait_for_function(f"[...document.querySelectorAll('{images}')].filter(one => one.naturalWidth).length == 2")
    shown = page.locator(images)
    loaded = shown.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")
    assert loaded == [list(size)] * 2
    assert "Grad-CAM" in page.locator('[class*="st-key-slice"]').inner_text()


def test_page_says_what_is_wrong_with_files_and_reads_on(page):
    for name, data, reason in (
        ("notes.txt", b"hello, no picture", "not an image"),
        ("cut.jpg", _encoded(".jpg")[:-300], "truncated JPEG"),
        ("bomb.png", _bomb(), "200000000 pixels"),
    ):
        _upload(page, (name, data))
        page.get_by_text(re.compile(f"{name}: .*{reason}")).wait_for(timeout=SECONDS)
    assert "0 of 3 slices read" in page.get_by_test_id("stAlertContentError").inner_text()
    _upload(page, ("good.png", _encoded(".png")))
    _answered(page)
    assert "1 of 4 slices read" in page.get_by_test_id("stAlertContentError").inner_text()


def test_page_keeps_a_notice_in_sight_and_fits_a_narrow_screen(page):
    page.set_viewport_size({"width": 400, "height": 800})
    _upload(page, ("a.png", _encoded(".png")), ("b.png", _encoded(".png", seed=1)))
    _answered(page, slices=2)
    page.get_by_text("All stages' numbers").scroll_into_view_if_needed()
    box = page.locator(".st-key-notice").bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] < 200
    widest = "Math.max(...[...document.querySelectorAll('*')].map(one => one.getBoundingClientRect().right))"
    assert page.evaluate(widest) <= 400


def test_page_shows_a_hostile_file_name_as_text(page):
    name = "<img src=x onerror=document.title='hacked'> ![x](http://example.invalid/x.png).png"
    _upload(page, (name, _encoded(".png")))
    _answered(page)
    assert page.locator('img[src*="example.invalid"], img[src="x"]').count() == 0
    assert page.title() == "kerasmed: brain MRI"
    assert "onerror" in page.locator('[class*="st-key-slice"] [data-testid="stText"]').inner_text()


def test_server_listens_on_this_machine_only(server, page):
    listening = [one.laddr for one in server.process.net_connections() if one.status == psutil.CONN_LISTEN]
    assert [address.ip for address in listening] == [HOST]
    others = {one.raddr.ip for one in server.process.net_connections() if one.raddr}
    assert others <= {HOST}


def _files(folder):
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # gone since it was listed, or a folder
            found[path.relative_to(folder)] = path.read_bytes()
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts of what a process wrote are Linux's")
def test_server_writes_no_upload_to_disk(server, page):
    # Above 1 MB the server below Streamlit would by itself put an upload into a temporary file without a name.
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2000), dtype=np.uint8)
    marked, file = PngImagePlugin.PngInfo(), io.BytesIO()
    marked.add_text("Comment", MARKER.decode() * 1000)
    Image.fromarray(noise).save(file, "PNG", pnginfo=marked, compress_level=1)
    assert len(file.getvalue()) > 4 * 2**20
    page.get_by_text(server.run.name).wait_for(timeout=SECONDS)
    before, written = _files(server.folder), server.process.io_counters().write_chars
    during, stop = {}, threading.Event()

    def watch():
        while not stop.wait(0.01):
            during.update(_files(server.folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        _upload(page, ("Doe_Jane.png", file.getvalue()), ("Doe_John.txt", MARKER * 1000))
        _answered(page)
        page.get_by_text(re.compile("Doe_John.txt: not an image")).wait_for(timeout=SECONDS)
    finally:
        stop.set()
        watcher.join()
    after = _files(server.folder)
    assert set(before) == set(during) == set(after)
    assert not any(MARKER in content or b"Doe_J" in content for content in (*during.values(), *after.values()))
    assert server.process.io_counters().write_chars - written < 2**20  # of 5 MB that were sent
