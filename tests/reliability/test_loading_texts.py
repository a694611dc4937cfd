"""Texts that someone chose to be run: values of parameters, YAML, names in pages, weights from a server."""

import ast
import contextlib
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import click.testing
import h5py
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from kerasmed import (
    audit,
    backbones,
    cli,
    collection,
    medicalnet,
    notebook_page,
    notebooks,
    paths,
    report,
    runs,
    sweeps,
)
from kerasmed.audit import page as audit_page

AS_TEXT = "arrived as that very text"
REFUSED = "refused with a reason, nothing run"
BODY = "\n" + (Path(__file__).parents[1] / "tiny_body.txt").read_text().replace('"sure"', '"sure", "text", "other"')


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


def _hostile(canary):
    """Texts that would make the file if any step took them for code."""
    make = f"open({str(canary)!r}, 'w').close()"
    return [
        '"; import os',
        f'"; {make} #',
        f"'; {make} #",
        f'"""; {make} #',
        f"'''; {make} #",
        f'\\"; {make} #',
        f'\\\\"; {make} #',
        f"\n{make}\n",
        f'"\n{make}\n"',
        f"\r{make}",
        f"\u2028{make}\u2029{make}\x85{make}\x0b{make}\x0c{make}",
        f"{{{make}}}",
        f"{{{{ {make} }}}}",
        f"{{% {make} %}}",
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"!touch {canary}",
        f"\n!touch {canary}",
        f"%run {canary}",
        f"| touch {canary}",
        f"%({make})s",
        f"__import__('os').system('touch {canary}')",
        f"!!python/object/apply:os.system ['touch {canary}']",
        "\\",
        "\\N{BULLET}",
        "\\x41\\u0041\\101",
        "\x00\x07\x1b[31m",
        "\u202e\ufeff\U0001f9e0é",
        "-" * 5000 + "1",
        "[" * 3000,
        "x" * 200_000,
    ]


def _texts(seed, count):
    """Random texts of the characters that quoting goes wrong over."""
    draw = random.Random(seed)
    letters = "\"'\\\n\r\t{}[]()$`!%#;:,= \u2028\u2029\x85\x00axNu0é"
    return ["".join(draw.choices(letters, k=draw.randint(1, 24))) for _ in range(count)]


@pytest.fixture
def texts_notebook(project, canary):
    """The project's notebook with the hostile texts' parameters; it writes what arrived. Returns notebook and file."""
    arrived = canary.with_name("arrived.json")
    project(f"import json, pathlib\npathlib.Path({str(arrived)!r}).write_text(json.dumps([text, other]))" + BODY)
    path = paths.notebooks_root() / "10_tiny.ipynb"
    content = runs.read_json(path)
    content["cells"][1]["source"] = [
        "".join(content["cells"][1]["source"]) + 'text = ""  # type: str  any\nother = []  # type: list  any\n'
    ]
    path.write_text(json.dumps(content))
    return notebooks.describe("10_tiny"), arrived


# --- parameters ------------------------------------------------------------------------------------------------------


def test_parse_value_of_a_hostile_text_stays_that_text(canary, record):
    seen = Counter()
    for text in [*_hostile(canary), *_texts(1, 2000)]:
        value = notebooks.parse_value(text)
        try:
            told = ast.literal_eval(text)  # a literal is what -p says it takes: "[1]" is a list, "'a'" a
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            told = {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)
        assert type(value) is type(told) and repr(value) == repr(told)
        seen[AS_TEXT if value == text else "taken for the literal that it is"] += 1
    assert not canary.exists()
    record("Loading", "value of `-p` and `--grid` with quotes, line ends, braces, commands, as it is parsed", seen)


def test_injected_cell_of_hostile_texts_is_nothing_but_their_literals(texts_notebook, canary, record):
    """What papermill writes into a notebook, kerasmed's run and plain papermill alike, read as Python reads it."""
    notebook, _ = texts_notebook
    seen = Counter()
    content = load_notebook_node(str(notebook.path))
    for text in [*_hostile(canary), *_texts(2, 500)]:
        parameters = notebooks.resolve(notebook, profile="smoke", given={"text": text, "other": [text, {text: text}]})
        cells = parameterize_notebook(content, parameters).cells
        injected = next(cell for cell in cells if "injected-parameters" in cell.metadata.get("tags", []))
        found = {}
        for node in ast.parse(injected.source).body:  # raises where a text broke out of its quotes
            assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            found[node.targets[0].id] = ast.literal_eval(node.value)
        assert found == parameters and found["text"] == text
        seen[AS_TEXT] += 1
    record("Loading", "such a value in the cell that papermill writes, text, list and mapping", seen)


def test_resolve_of_a_name_that_is_code_refuses_it(texts_notebook, canary):
    notebook, _ = texts_notebook
    for name in ("x = __import__('os')", f"text\nopen({str(canary)!r}, 'w')", "text ", "", "text;", "__class__"):
        with pytest.raises(ValueError, match="is unknown to 10_tiny"):
            notebooks.resolve(notebook, profile="smoke", given={name: "a"})


def _yaml_objects(canary):
    make = f'"touch {canary}"'
    return [
        f"text: !!python/object/apply:os.system [{make}]\n",
        f"text: !!python/object/new:subprocess.Popen [[sh, -c, {make}]]\n",
        "text: !!python/name:os.system\n",
        "text: !!python/module:os\n",
        f"? !!python/object/apply:os.system [{make}]\n: 1\n",
        f"!!python/object/apply:os.system [{make}]\n",
        f"text: !!python/object/apply:builtins.open [{canary}, w]\n",
        "text: !mine {a: 1}\n",
        "[" * 2000,
        "text: [a\n",
        "- text\n",
        "1: text\n",
    ]


def test_profile_and_grid_of_yaml_objects_are_refused(texts_notebook, tmp_path, canary, record):
    notebook, _ = texts_notebook
    seen = Counter()
    profile = paths.notebooks_root() / "params/smoke/10_tiny.yaml"
    for content in _yaml_objects(canary):
        profile.write_text(content)
        with pytest.raises(
            ValueError, match=r"(?s)10_tiny.yaml (cannot be read as YAML|holds).*expected a YAML mapping"
        ):
            notebooks.resolve(notebook, profile="smoke", given={})
        (tmp_path / "grid.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"(?s)grid.yaml (cannot be read as YAML|holds).*expected a YAML mapping"):
            sweeps.read_grid(tmp_path / "grid.yaml")
        seen[REFUSED] += 2
    assert not canary.exists()
    told = click.testing.CliRunner().invoke(cli.main, ["run", "10_tiny", "--profile", "smoke"])
    assert told.exit_code == 2 and "10_tiny.yaml holds" in told.output
    record("Loading", "YAML of parameters and of a grid with objects, or that is no mapping", seen)


@pytest.mark.slow
def test_run_with_hostile_texts_by_each_way_hands_them_on_as_they_are(texts_notebook, tmp_path, canary, record):
    """`kerasmed run -p`, a profile, a grid and its file, and plain papermill: the kernel gets that very text."""
    notebook, arrived = texts_notebook
    seen = Counter()
    every = _hostile(canary)
    profile = paths.notebooks_root() / "params/smoke/10_tiny.yaml"
    runner = click.testing.CliRunner()

    def expect(text, other=None):
        assert json.loads(arrived.read_text()) == [text, other or []] and not canary.exists()
        arrived.unlink()
        seen[AS_TEXT] += 1 + len(other or [])

    def command(*words):
        told = runner.invoke(cli.main, [*words, "--profile", "smoke"])
        assert told.exit_code == 0, told.output

    # Of all texts one list, in a kernel each way: what is in a list goes through the same quoting.
    profile.write_text(yaml.safe_dump({"profile": "smoke", "text": every[1], "other": every}))
    command("run", "10_tiny")
    expect(every[1], every)
    profile.write_text("profile: smoke\n")
    short = [text for text in every if len(text) < 9000 and "\x00" not in text]
    command("run", "10_tiny", "-p", f"text={short[2]}", "-p", f"other={short!r}")
    expect(short[2], short)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"text": [every[8]], "other": [every]}))
    command("sweep", "10_tiny", "--grid-file", str(tmp_path / "grid.yaml"))
    expect(every[8], every)
    command("sweep", "10_tiny", "--grid", f"text={short[14]}")
    expect(short[14])
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"data_root": str(tmp_path / "data"), "other": every}))
    plain = [sys.executable, "-m", "papermill", notebook.path, tmp_path / "out.ipynb", "-f", tmp_path / "plain.yaml"]
    subprocess.run(
        [*plain, "-p", "text", short[9]], check=True, capture_output=True, env=os.environ, cwd=tmp_path / "project"
    )
    expect(short[9], every)
    record("Loading", "such a value through run, profile, grid, its file and plain papermill, in the kernel", seen)


# --- pages -----------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Names of the tags and attributes that a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.words = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen |= {tag, *(name for name, _ in attrs)}
        self.seen |= {f"{name}=javascript" for name, value in attrs if (value or "").lower().startswith("javascript")}

    def handle_data(self, data):
        self.words.append(data)


MARKUP = [
    "<script>document.title='hit'</script>",
    "<img src=x onerror=document.title='hit'>",
    "'\"><svg onload=document.title='hit'>",
    "</pre></td></style><iframe srcdoc=hit>",
    "javascript:document.title='hit'",
    "&lt;script&gt;",
]
_BAD = {"script", "iframe", "svg", "onerror", "onload", "srcdoc", "href=javascript", "src=javascript"}


def test_pages_of_names_that_are_markup_show_them_as_text(tmp_path, rng, record):
    seen = Counter()

    def look(text, wanted):
        tags = _Tags(text)
        assert not tags.seen & _BAD, f"{tags.seen & _BAD} of {wanted!r}"
        assert wanted in "".join(tags.words), wanted
        seen["shown as text"] += 1

    for markup in MARKUP:
        rows = range(4)
        manifest = pd.DataFrame(
            {
                "image_path": [f"train/{markup}/{row}.png" for row in rows],
                **{name: pd.NA for name in ("patient_id", "study_id")},
                "group_id": ["g"] * 3 + ["h"],
                "split": ["train"] * 3 + ["test"],
                markup: [1.0] * 3 + [0.0],
            }
        )
        identity = pd.DataFrame({"constant": [""] * 4, "exact": [0, 0, 0, 3], "near": [0, 0, 0, 3]})
        found = audit.find(manifest, identity, [markup]).assign(note=markup)
        probe = audit.probe(pd.DataFrame({"bytes": np.arange(4.0)}), manifest[[markup]], np.arange(4))
        shown = rng.integers(0, 256, (4, 64, 64), dtype=np.uint8)
        made = audit.Report(markup, manifest, shown, [markup], found, probe, [markup])
        look(audit_page.render(made), markup)

        run = tmp_path / str(len(seen)) / hashlib.md5(markup.encode()).hexdigest()[:6] / "brain/07_brain_mri-smoke-0"
        state = {"status": "failed", "system": "brain", "notebook": "07_brain_mri", "error": f"ValueError: {markup}"}
        runs.write_json(run / "status.json", {**state, "profile": markup, "started": markup, "data_source": markup})
        runs.write_json(run / "params.json", {"seed": 1, "notes": markup, markup: markup})
        runs.write_json(run / "environment.json", {"fingerprint": markup})
        report.write_html(tmp_path / "report.html", collection.collect(run.parents[1]))
        look((tmp_path / "report.html").read_text(), markup)

        cells = [
            nbformat.v4.new_code_cell(f"notes = {markup!r}", outputs=[nbformat.v4.new_output("stream", text=markup)]),
            nbformat.v4.new_code_cell(
                "1/0", outputs=[nbformat.v4.new_output("error", ename=markup, evalue=markup, traceback=[markup])]
            ),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "n.ipynb")
        notebook_page.write(tmp_path / "n.ipynb", tmp_path / "n.html")
        look((tmp_path / "n.html").read_text(), markup)
    record(
        "Loading", "names, labels, values and errors that are markup, in the pages of audit, collect and a run", seen
    )


# --- files of arrays, and what comes from a server -------------------------------------------------------------------


def test_arrays_of_objects_are_refused(tmp_path, canary, record):
    class Making:
        def __reduce__(self):
            return open, (str(canary), "w")

    seen = Counter()
    objects = np.array([Making()], object)
    np.savez(tmp_path / "state.npz", weight=objects)
    with pytest.raises(backbones.WeightsError, match="state.npz cannot be read as .npz of plain arrays"):
        medicalnet.read_state_dict(tmp_path / "state.npz")
    seen[REFUSED] += 1
    with contextlib.suppress(ImportError):
        import torch

        torch.save({"weight": Making()}, tmp_path / "state.pth")
        with pytest.raises(backbones.WeightsError, match="state.pth cannot be read as a file of tensors"):
            medicalnet.read_state_dict(tmp_path / "state.pth")
    run = tmp_path / "models/brain/07_brain_mri-smoke-0"
    run.mkdir(parents=True)
    np.savez(run / "draws.npz", **{"0": objects})
    with pytest.raises(ValueError, match="allow_pickle"), np.load(run / "draws.npz") as file:
        file["0"]
    assert not canary.exists()
    record("Loading", "weights as `.npz` or `.pth` that hold objects", seen)


@contextlib.contextmanager
def _served(folder):
    """Address of a server of this machine that has a folder's files."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_downloaded_weights_of_another_content_are_refused_and_not_kept(tmp_path, monkeypatch, record):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    seen = Counter()
    with h5py.File(tmp_path / "whole.h5", "w") as file:
        file["a"] = np.arange(1000.0)
    whole = (tmp_path / "whole.h5").read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    told = {
        "whole": whole,
        "one bit changed": bytes(changed),
        "a byte more": whole + b"\0",
        "a byte less": whole[:-1],
        "a page": b"<html>sign in</html>",
        "nothing": b"",
    }
    (tmp_path / "served").mkdir()
    for name, known in backbones.BACKBONES.items():
        file = known.url.rsplit("/", 1)[1]
        sums = [hashlib.md5(whole).hexdigest()] + [None] * (known.md5 is None)
        for md5 in sums:
            for kind, content in told.items():
                if name != "VGG19" and md5 is not None and kind != "one bit changed":
                    continue  # one table, one function: every kind once, the hardest for each backbone
                (tmp_path / "served" / file).write_bytes(content)
                with _served(tmp_path / "served") as url:
                    monkeypatch.setitem(backbones.BACKBONES, name, known._replace(url=url + file, md5=md5))
                    if content == whole or (md5 is None and kind in ("one bit changed", "a byte more")):
                        assert backbones.fetch(name, time_limit=10).read_bytes() == content
                        (backbones.cache_folder() / file).unlink()
                        seen["kept: right sum" if md5 else "kept: HDF5, Keras publishes no sum"] += 1
                        continue
                    with pytest.raises(backbones.DownloadError, match=r"wrong checksum or are no HDF5.*by hand"):
                        backbones.fetch(name, time_limit=10)
                assert not list(backbones.cache_folder().glob("*")), kind
                seen["refused with a reason, not kept"] += 1
    record("Loading", "ImageNet weights from a server that sends something else", seen)
