"""What the README shows must run as it stands."""

import re
from pathlib import Path

import pytest

import kerasmed

README = Path(kerasmed.__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_readme_example_runs(brain_root, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert '"imagenet"' in example
    monkeypatch.chdir(brain_root.parent)  # where its data root, `data`, lies
    names = {}
    exec(example.replace('"imagenet"', '"none"'), names)  # the network may be out of reach
    assert names["maps"].heat.shape[0] == 32 and (names["manifest"]["split"] == "test").any()


def test_shipped_texts_hold_no_placeholders():
    placeholder = r"\b(SMOKE|DEMO|RESULTS|EXPECTED|[A-Z]+TIME|TODO|FIXME|XXX)\b|@@"
    for path in (README, *README.parent.glob("notebooks/*.ipynb"), *README.parent.glob("*/README.md")):
        assert not re.search(placeholder, path.read_text(encoding="utf-8")), path
