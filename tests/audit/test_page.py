import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from kerasmed import audit
from kerasmed.audit import page

VOID = {"meta", "img", "br"}


class _Checked(HTMLParser):
    """Reads a page, and notes its words, links and pictures; fails at tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


@pytest.fixture
def report(heads):
    """Function of changes: a report of 12 images in two splits, ten of them equal to the first."""

    def make(**changes):
        paths = [f"{'train' if row < 10 else 'test'}/ill/<i>{row}</i> & co.png" for row in range(12)]
        manifest = pd.DataFrame(
            {
                "image_path": paths,
                "patient_id": pd.NA,
                "study_id": pd.NA,
                "group_id": ["g"] * 11 + ["h"],
                "split": ["train"] * 10 + ["test"] * 2,
                "<b>ill</b>": [1.0] * 11 + [0.0],
            }
        )
        identity = pd.DataFrame({"constant": [""] * 12, "exact": [0] * 11 + [11], "near": [0] * 11 + [11]})
        found = audit.find(manifest, identity, ["<b>ill</b>"]).assign(note="")
        probe = audit.probe(pd.DataFrame({"bytes": np.arange(12.0)}), manifest[["<b>ill</b>"]], np.arange(12))
        fields = {
            "name": "a <set>",
            "manifest": manifest,
            "thumbnails": heads(12),
            "class_names": ["<b>ill</b>"],
            "found": found,
            "probe": probe,
            "accepted": [],
        }
        return audit.Report(**fields | changes)

    return make


def test_render_says_the_verdict_first_and_what_to_do(report):
    read = _Checked(page.render(report()))
    words = " ".join(read.words)
    assert words.index("The gate is closed") < words.index("What was found") < words.index(audit.MENDS["leak_group"])
    assert "12 images read · 2 splits · 1 label" in words and not read.open
    assert {"#leak_duplicate", "#leak_group"} <= set(read.values("href"))
    assert {"leak_duplicate", "leak_group"} <= set(read.values("id"))
    accepted = " ".join(_Checked(page.render(report(accepted=["leak_duplicate", "leak_group"]))).words)
    assert "The gate is open" in accepted and "Accepted knowingly: leak_duplicate, leak_group." in accepted


def test_render_escapes_what_comes_from_the_data(report):
    text = page.render(report())
    assert "<i>" not in text and "<b>ill" not in text and "<set>" not in text
    read = _Checked(text)
    assert "a <set>" in " ".join(read.words) and "train/ill/<i>0</i> & co.png" in read.values("title")
    assert any("<b>ill</b>" in word for word in read.words)


def test_render_needs_nothing_outside_itself(report):
    text = page.render(report())
    read = _Checked(text)
    assert all(source.startswith("data:image/png;base64,") for source in read.values("src")) and read.values("src")
    assert all(link.startswith("#") for link in read.values("href"))
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)


def test_render_shows_some_of_many_images_of_each_split(report):
    read = _Checked(page.render(report()))
    titles = read.values("title")[:8]  # the first finding: ten images of train and one of test
    assert len(set(titles)) == 8 and sum(title.startswith("test/") for title in titles) == 1
    assert "and 3 more" in read.words


def test_render_of_much_names_what_is_left_to_the_json(report):
    one = report().found.head(1)
    text = page.render(report(found=pd.concat([one] * 40)))
    assert text.count("and 28 more in audit.json") == 1
    unreadable = one.assign(kind="unreadable", note="<why>")
    words = " ".join(_Checked(page.render(report(found=pd.concat([unreadable] * 40)))).words)
    assert "and 10 more in audit.json" in words and words.count("<why>") == 30
    assert "40 files unreadable" in words


def test_render_cuts_long_words_off(report):
    found = report().found.head(1).assign(labels=" | ".join(f"label {number}" for number in range(100)))
    words = " ".join(_Checked(page.render(report(found=found))).words)
    assert "label 7 |" in words and "…" in words and "label 20" not in words


def test_render_of_nothing_found_is_short(report):
    clean = report()
    empty = clean._replace(
        found=clean.found.head(0),
        class_names=[],
        probe=clean.probe.head(0),
        manifest=clean.manifest.assign(split=pd.NA, group_id=pd.NA),
    )
    read = _Checked(page.render(empty))
    words = " ".join(read.words)
    assert "The gate is open" in words and "Nothing." in words and "no splits · no labels" in words
    assert not read.values("src") and "No label and no split to predict." in words


def test_render_marks_shortcuts_beside_what_is_none(report, rng):
    label = np.repeat([0.0, 1.0], 60)
    targets = pd.DataFrame({"told": label, "coin": rng.integers(0, 2, 120), "rare": np.arange(120) == 0})
    measures = pd.DataFrame({"width": label * 100 + rng.random(120), "bytes": rng.random(120)})
    probe = audit.probe(measures, targets, np.arange(120))
    words = _Checked(page.render(report(probe=probe))).words
    assert words.count("shortcut") == 1 and "width: 1.00" in words and "1.00 [1.00, 1.00]" in words
    assert "fewer than 5 groups with, or without, it" in words
