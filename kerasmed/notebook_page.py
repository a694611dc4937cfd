"""Executed notebooks as pages: one HTML file that asks no other host for anything."""

import base64
import html as markup
import json
import logging
import mimetypes
import os
import re
import urllib.parse
from pathlib import Path

from kerasmed import atomic, paths

# The page's own parts alone: no script runs, and neither pictures nor styles come from elsewhere.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:; base-uri 'none'"
# Without the scripts that nbconvert's template fetches from content delivery networks.
TEMPLATE = f"""{{%- extends 'index.html.j2' -%}}
{{%- block html_head -%}}
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{{{{ super() }}}}
{{%- endblock -%}}
{{%- block html_head_js -%}}{{%- endblock -%}}
{{%- block jupyter_widgets -%}}{{%- endblock -%}}
{{%- block html_head_js_mathjax -%}}{{%- endblock -%}}
{{%- block html_head_js_mermaidjs -%}}{{%- endblock -%}}
"""
# Not what needs a script (widgets, JavaScript, Mermaid): such an output shows its other form, mostly text.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain", "text/latex"]

_PICTURE = re.compile(r"""(<img\b[^>]*?\bsrc=")(?!data:|https?:)([^"]+)(?=")""")


def write(notebook: str | os.PathLike, html: str | os.PathLike) -> None:
    """Write an executed notebook as one HTML page, whole.

    The page holds its styles and pictures itself and forbids everything else by a content security policy: opened, it
    makes no request and runs no script. Formulae therefore stay as their TeX text, and widgets as their text. Pictures
    that Markdown cells name by a path are looked for in the project's `notebooks/`, where the notebook was written; one
    of another host is not shown. Of a line that a progress bar wrote again and again, the last state stays. A notebook
    that failed is written like any other, error included. The title is the notebook's first heading.

    Args:
        notebook: .ipynb file of format 4, with outputs.
        html: file to write.

    Raises:
        ValueError: the file is no notebook.
        OSError: it cannot be read, or the page cannot be written.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = Path(notebook)
    text = notebook.read_text(encoding="utf-8")
    _refuse_other(notebook, text)
    content = nbformat.reads(text, as_version=4)
    content.metadata.pop("widgets", None)
    settings = {
        "NbConvertBase": {"display_data_priority": SHOWN},
        "CoalesceStreamsPreprocessor": {"enabled": True},  # which also leaves what carriage returns leave on a screen
    }
    quiet = logging.getLogger(f"{__name__}.nbconvert")  # it warns of every figure without an alternative text
    quiet.setLevel(logging.ERROR)
    exporter = HTMLExporter(
        config=Config(settings),
        raw_template=TEMPLATE,
        extra_template_basedirs=[],  # a folder "lab" where the command runs is no template
        log=quiet,
    )
    about = {"name": _title(content) or notebook.stem}
    page, _ = exporter.from_notebook_node(content, resources={"metadata": about})
    # nbconvert's own embedding closes every HTML tag of a Markdown cell at once, such as papermill's red note.
    page = _PICTURE.sub(_embedded, page)
    with atomic.whole(html) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _refuse_other(path: Path, text: str) -> None:
    """Raise ValueError where a file's text is no notebook of format 4."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no notebook: {error}; name an .ipynb file.") from error
    if not isinstance(content, dict) or content.get("nbformat") != 4 or not isinstance(content.get("cells"), list):
        raise ValueError(f"{path} is no notebook of format 4 (no `nbformat: 4` and `cells`); name an executed .ipynb.")


def _title(content) -> str:
    """First heading of the first order, "" for none."""
    markdown = (cell.source.splitlines() for cell in content.cells if cell.cell_type == "markdown")
    return next((line.removeprefix("# ").strip() for lines in markdown for line in lines if line.startswith("# ")), "")


def _embedded(tag: re.Match) -> str:
    """A picture's tag with the file in it, where the project has one."""
    name = urllib.parse.unquote(markup.unescape(tag[2]))
    file = (paths.notebooks_root() / name).resolve()
    kind = mimetypes.guess_type(file.name)[0] or ""
    if not kind.startswith("image/") or not file.is_relative_to(paths.project_root()) or not file.is_file():
        return tag[0]
    return f"{tag[1]}data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
