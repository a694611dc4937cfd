import base64
import http.server
import re
import shutil
import subprocess
import threading

import nbformat
import pytest
from bs4 import BeautifulSoup

from kerasmed import notebook_page

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def _cell(*outputs, source="print()"):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=1)


def _write(path, *cells, **metadata):
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells), metadata=metadata), path)
    return path


def _page(tmp_path, *cells, **metadata):
    """The page of a notebook with these cells, parsed."""
    notebook_page.write(_write(tmp_path / "notebook.ipynb", *cells, **metadata), tmp_path / "notebook.html")
    return BeautifulSoup((tmp_path / "notebook.html").read_text(encoding="utf-8"), "html.parser")


def _stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def _shown(**data):
    return nbformat.v4.new_output("display_data", data={kind.replace("__", "/"): text for kind, text in data.items()})


def test_write_shows_headings_code_tables_and_pictures(tmp_path):
    page = _page(
        tmp_path,
        nbformat.v4.new_markdown_cell("intro\n\n# Chest: *what* helps?\n\n## Look"),
        nbformat.v4.new_markdown_cell("# Another"),
        _cell(_stream("0.875\n"), _shown(image__png=PIXEL), _shown(text__html="<table><td>0.75</td></table>")),
    )
    assert page.title.text == "Chest: *what* helps?"
    assert [heading.find(string=True) for heading in page.find_all("h1")] == ["Chest: ", "Another"]
    assert "0.875" in page.text and page.find("td").text == "0.75"
    assert page.img["src"] == f"data:image/png;base64,{PIXEL}"


def test_write_of_a_notebook_without_a_heading_takes_the_file_name_as_title(tmp_path):
    assert _page(tmp_path, _cell(source="# a comment")).title.text == "notebook"


def test_write_makes_a_page_that_needs_no_other_host_and_forbids_it(tmp_path):
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2, "version_minor": 0}}
    page = _page(
        tmp_path,
        nbformat.v4.new_markdown_cell("# T\n\n$x^2$ and ```mermaid\ngraph TD\n```"),
        _cell(_shown(**{"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text__plain": "100%|bar|"})),
        _cell(_shown(application__javascript="fetch('https://example.org')", text__plain="<Script>")),
        _cell(_shown(**{"text/vnd.mermaid": "graph TD", "text__plain": "<Graph>"})),
        widgets=widgets,
    )
    assert not page.find_all(["script", "link", "iframe"])
    assert not [tag for tag in page.find_all(["img", "source"]) if not tag["src"].startswith("data:")]
    assert "@import" not in str(page) and "url(http" not in str(page)
    assert page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"].startswith("default-src 'none'; ")
    for text in ("$x^2$", "100%|bar|", "<Script>", "<Graph>"):
        assert text in page.text


def test_write_of_a_progress_bar_leaves_its_last_state(tmp_path):
    bar = [
        _stream("decode:   0%\rdecode:  50%\r", "stderr"),
        _stream("decode: 100%\n", "stderr"),
        _stream("done\r\nnext"),
    ]
    text = _page(tmp_path, _cell(*bar)).text
    assert "decode: 100%" in text and "done\nnext" in text
    assert "50%" not in text and "\r" not in text


def test_write_of_a_notebook_that_failed_shows_the_error_and_papermills_note(tmp_path):
    note = '<span id="papermill-error-cell" style="color:red">Execution using papermill stopped:</span>'
    trace = ["\x1b[31mValueError\x1b[39m: no <images>"]
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no <images>", traceback=trace)
    page = _page(tmp_path, nbformat.v4.new_markdown_cell(note), _cell(error))
    assert page.find(id="papermill-error-cell").text == "Execution using papermill stopped:"
    assert "ValueError: no <images>" in page.text and "\x1b" not in page.text
    assert page.find(class_="ansi-red-fg").text == "ValueError"


def test_write_embeds_the_projects_pictures_and_no_file_beyond(tmp_path, monkeypatch):
    (tmp_path / "project" / "notebooks" / "params").mkdir(parents=True)
    (tmp_path / "project" / "notebooks" / "a picture.png").write_bytes(base64.b64decode(PIXEL))
    (tmp_path / "beyond.png").write_bytes(base64.b64decode(PIXEL))
    monkeypatch.chdir(tmp_path / "project")
    names = ("a%20picture.png", "../notebooks/a%20picture.png", "../../beyond.png", "absent.png")
    markdown = "\n".join(f"![shown]({name})" for name in names) + '\n<img alt="x" src="a picture.png">'
    pictures = [picture["src"] for picture in _page(tmp_path, nbformat.v4.new_markdown_cell(markdown)).find_all("img")]
    embedded = f"data:image/png;base64,{PIXEL}"
    assert pictures == [embedded, embedded, "../../beyond.png", "absent.png", embedded]


def test_write_twice_gives_the_same_page_and_leaves_nothing_beside_it(tmp_path):
    _page(tmp_path, nbformat.v4.new_markdown_cell("# T"), _cell(_stream("x")))
    first = (tmp_path / "notebook.html").read_bytes()
    notebook_page.write(tmp_path / "notebook.ipynb", tmp_path / "notebook.html")
    assert (tmp_path / "notebook.html").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notebook.html", "notebook.ipynb"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"nbformat": 3, "worksheets": []}', '{"cells": []}'])
def test_write_of_no_notebook_is_refused_and_writes_nothing(tmp_path, text):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(ValueError, match=r"x\.ipynb is no notebook"):
        notebook_page.write(tmp_path / "x.ipynb", tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_page_in_a_browser_asks_nobody_for_what_its_outputs_name(tmp_path):
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"http://127.0.0.1:{server.server_port}"
        output = (
            f'<p id="kept">kept</p><script>document.getElementById("kept").remove(); fetch("{host}/a")</script>'
            f'<img src="{host}/b"><link rel="stylesheet" href="{host}/c"><iframe src="{host}/d"></iframe>'
        )
        _page(tmp_path, nbformat.v4.new_markdown_cell(f"![x]({host}/e)"), _cell(_shown(text__html=output)))
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        where = [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "notebook.html").as_uri()]
        page = subprocess.run([*command, *where], capture_output=True, text=True, timeout=120).stdout
        server.shutdown()
    assert re.search(r'<p id="kept">kept</p>', page)
    assert asked == []
