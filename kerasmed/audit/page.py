"""The report of an audit as one HTML page, which needs nothing outside itself."""

import base64
import html
import posixpath

import cv2
import numpy as np
import pandas as pd

from kerasmed.audit import findings, shortcuts

_SHOWN_FINDINGS, _SHOWN_IMAGES, _SHOWN_GROUPS, _SHOWN_FILES = 12, 8, 6, 30
_MOST_LETTERS = 100  # of an id, or of the label sets of a finding
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:72em;padding:0 1em;color:#1c2733}
h1{margin:0} h2{margin:2.2em 0 .3em;border-bottom:2px solid #dde5ee;padding-bottom:.2em;font-size:1.25em}
p{margin:.4em 0} h2 code{font-size:.95em;margin-right:.6em} .small{color:#56677a;font-size:.9em}
.wide{overflow-x:auto} table{border-collapse:collapse;margin:.6em 0}
td,th{padding:.35em 1.1em .35em 0;text-align:left;vertical-align:top;border-bottom:1px solid #dde5ee}
th{color:#56677a;font-weight:600;font-size:.9em} td{overflow-wrap:anywhere} td.key{white-space:nowrap}
td.number,th.number{text-align:right}
.verdict{padding:.8em 1.1em;border-radius:.4em;font-size:1.1em;margin:1em 0} .verdict b{font-size:1.1em}
.open{background:#e3f3e6} .closed{background:#fbe5e3}
.mark{padding:.1em .5em;border-radius:.3em;font-size:.9em;white-space:nowrap;background:#eef2f6}
.mark.closes{background:#c8392b;color:#fff} .mark.warns{background:#f6d58a}
.cards{display:flex;flex-wrap:wrap;gap:.8em;margin:.8em 0}
.card{border:1px solid #dde5ee;border-radius:.4em;padding:.6em .7em;max-width:100%;box-sizing:border-box}
.card>p{margin:0 0 .4em;font-size:.9em;max-width:24em;overflow-wrap:anywhere}
.pictures{display:flex;flex-wrap:wrap;gap:.7em}
figure{margin:0;width:104px}
figure img{display:block;width:104px;height:104px;image-rendering:pixelated;background:#000}
figcaption{font-size:.72em;line-height:1.3;overflow-wrap:anywhere;margin-top:.25em;max-height:5.2em;overflow:hidden}
.card>p.where,figcaption span{color:#56677a}
"""


def render(report) -> str:
    """Lay a `kerasmed.audit.Report` out as a page: verdict, what was found and what to do, the first of each kind.

    Returns:
        HTML; pictures are inside it, and names from the data are escaped.
    """
    title = f"Audit of {html.escape(report.name)}"
    counts = report.by_kind()
    sections = [f"<h1>{title}</h1>", _head(report, counts), _verdict(report, counts), _overview(report, counts)]
    shown = _Pictures(report)
    for kind in counts.index:
        if kind != "shortcut":
            sections += _section(report.found[report.found["kind"] == kind], kind, shown)
    sections += [_groups(report, shown), _shortcuts(report.probe), _contents(report)]
    body = "\n".join(filter(None, sections))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>{body}</html>\n"
    )


def _head(report, counts: pd.DataFrame) -> str:
    unreadable = counts["findings"].get("unreadable", 0)
    parts = [
        f"{_count(len(report.manifest), 'image')} read",
        f"{_count(unreadable, 'file')} unreadable" if unreadable else "",
        _count(report.manifest["split"].nunique(), "split") if report.manifest["split"].notna().any() else "no splits",
        _count(len(report.class_names), "label") if report.class_names else "no labels",
    ]
    return f"<p class=small>{' · '.join(filter(None, parts))}</p>"


def _verdict(report, counts: pd.DataFrame) -> str:
    closed_by = report.closed_by()
    accepted = f"<p>Accepted knowingly: {html.escape(', '.join(report.accepted))}.</p>" if report.accepted else ""
    if not len(report.manifest):
        text = "<b>The gate is closed: no image could be read.</b>"
    elif closed_by:
        reasons = [f"<a href='#{kind}'>{kind}</a> ({counts.loc[kind, 'images']:,})" for kind in closed_by]
        text = f"<b>The gate is closed: do not train on this as it is.</b><p>Closed by {', '.join(reasons)}.</p>"
    else:
        text = "<b>The gate is open</b>: nothing was found that would spoil a result."
    return f"<div class='verdict {'closed' if closed_by else 'open'}'>{text}{accepted}</div>"


def _overview(report, counts: pd.DataFrame) -> str:
    if counts.empty:
        return "<h2>What was found</h2><p>Nothing.</p>"
    closed_by, rows = report.closed_by(), []
    for kind, (number, images) in counts.iterrows():
        mark = "<span class='mark closes'>yes</span>" if kind in closed_by else "no"
        if kind in report.accepted:
            mark = "<span class=mark>accepted</span>"
        cells = [f"<a href='#{kind}'>{kind}</a>", f"{number:,}", f"{images:,}" if images else ""]
        rows.append([*cells, mark, f"{findings.KINDS[kind].capitalize()}.", findings.MENDS[kind]])
    heads = ["kind", "findings", "images", "closes the gate", "what it is", "what to do"]
    return f"<h2>What was found</h2>{_table(heads, rows, numbers=(1, 2))}"


def _section(found: pd.DataFrame, kind: str, shown: "_Pictures") -> list[str]:
    """Show the largest findings of a kind, each with some of its pictures."""
    heading = (
        f"<h2 id={kind}><code>{kind}</code></h2><p>{findings.KINDS[kind].capitalize()}. {findings.MENDS[kind]}</p>"
    )
    if kind == "unreadable":
        rows = [[html.escape(name), html.escape(note)] for name, note in zip(found["name"], found["note"])]
        return [heading, _table(["file", "why"], rows[:_SHOWN_FILES]), _left(len(rows) - _SHOWN_FILES)]
    found = found.sort_values("images", ascending=False, kind="stable")
    named = kind in findings.ID_COLUMNS
    cards = []
    for row in found.head(_SHOWN_FINDINGS).itertuples():
        about = [row.name if named else "", _count(row.images, "image"), row.splits, row.labels]
        cards.append(shown.card(about, row.image_paths))
    return [heading, f"<div class=cards>{''.join(cards)}</div>", _left(len(found) - _SHOWN_FINDINGS)]


def _groups(report, shown: "_Pictures") -> str:
    groups = report.groups()
    if groups.empty:
        return ""
    sizes = groups.map(len)
    cards = [
        shown.card([name, _count(len(paths), "image")], paths) for name, paths in groups.head(_SHOWN_GROUPS).items()
    ]
    return (
        "<h2 id=groups>Images that belong together</h2>"
        f"<p>{_count(len(groups), 'group')} of {sizes.min()} to {sizes.max()} images, {sizes.sum():,} images in all. "
        f"A split must not cut a group. The largest:</p><div class=cards>{''.join(cards)}</div>"
        f"{_left(len(groups) - _SHOWN_GROUPS)}"
    )


def _shortcuts(probe: pd.DataFrame) -> str:
    heading = "<h2 id=shortcut>Shortcuts</h2>"
    if probe.empty:
        return f"{heading}<p>No label and no split to predict.</p>"
    rows = []
    for row in probe.itertuples():
        numbers = [html.escape(row.target), f"{row.images:,}", f"{row.positives:,}"]
        if row.reason:
            rows.append([*numbers, "", row.reason, ""])
            continue
        mark = "<span class='mark warns'>shortcut</span>" if row.low > shortcuts.SHORTCUT else "no"
        area = f"{row.auroc:.2f} [{row.low:.2f}, {row.high:.2f}]"
        rows.append([*numbers, mark, area, f"{row.strongest}: {row.alone:.2f}"])
    heads = ["predicted", "images", "positives", f"above {shortcuts.SHORTCUT}", "AUROC [95 %]", "strongest alone"]
    return (
        f"{heading}<p>How well size, border, intensity and file type alone predict a label or the split of images of "
        "unseen groups; 0.5 is chance. A network that scores no better may have learnt how its images were made.</p>"
        f"{_table(heads, rows, numbers=(1, 2))}"
    )


def _contents(report) -> str:
    """Count images by label and split; labels are rows, as they may be many."""
    splits = report.manifest["split"].fillna("(no split)").astype(str)
    names = sorted(splits.unique())
    counts = report.manifest[list(report.class_names)].eq(1).groupby(splits).sum()
    rows = [["all images", *(f"{(splits == name).sum():,}" for name in names)]]
    rows += [[html.escape(label), *(f"{counts.loc[name, label]:,}" for name in names)] for label in report.class_names]
    heads = ["label", *map(html.escape, names)]
    return f"<h2>Images by label and split</h2>{_table(heads, rows, numbers=range(1, len(heads)))}" if names else ""


class _Pictures:
    """Cards of a report's thumbnails."""

    def __init__(self, report):
        self.thumbnails = report.thumbnails
        manifest = report.manifest
        self.place = pd.Series(range(len(manifest)), manifest["image_path"])
        self.about = pd.DataFrame(
            {
                "split": manifest["split"].fillna(""),
                "labels": findings.shown_labels(manifest, report.class_names).fillna(""),
            }
        )

    def card(self, about: list[str], paths: list[str]) -> str:
        """Show some of the images of `paths`, first one of each split and label, under the words of `about`."""
        rows = self.place.loc[paths].to_numpy()
        each = self.about.iloc[rows].reset_index(drop=True)
        turn = each.groupby(["split", "labels"]).cumcount().sort_values(kind="stable")
        chosen = sorted(turn.index[:_SHOWN_IMAGES])
        differs = [name for name in each if each[name].nunique() > 1]
        folder = posixpath.commonpath([posixpath.dirname(path) for path in paths])
        pictures = [
            self._figure(self.thumbnails[rows[number]], paths[number], folder, each.loc[number, differs])
            for number in chosen
        ]
        words = " · ".join(
            html.escape(word if len(word) <= _MOST_LETTERS else f"{word[:_MOST_LETTERS]}…") for word in about if word
        )
        where = f"<p class=where>{html.escape(folder)}/</p>" if folder else ""
        more = f"<p class=small>and {len(paths) - len(chosen):,} more</p>" if len(paths) > len(chosen) else ""
        return f"<div class=card><p><b>{words}</b></p>{where}<div class=pictures>{''.join(pictures)}</div>{more}</div>"

    @staticmethod
    def _figure(thumbnail: np.ndarray, path: str, folder: str, words: pd.Series) -> str:
        data = base64.b64encode(cv2.imencode(".png", thumbnail)[1].tobytes()).decode()
        name = html.escape(path.removeprefix(f"{folder}/"))
        below = "".join(f"<br><span>{html.escape(word)}</span>" for word in words if word)
        return (
            f"<figure title='{html.escape(path)}'><img alt='' src='data:image/png;base64,{data}'>"
            f"<figcaption>{name}{below}</figcaption></figure>"
        )


def _table(heads: list[str], rows: list[list[str]], *, numbers=()) -> str:
    """Make a table of escaped cells; columns of `numbers` are set right."""
    kinds = ["number" if column in numbers else "" if column else "key" for column in range(len(heads))]
    head = "".join(f"<th class='{kind}'>{cell}</th>" for kind, cell in zip(kinds, heads))
    body = "".join(
        "<tr>" + "".join(f"<td class='{kind}'>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _left(count: int) -> str:
    return f"<p class=small>and {count:,} more in audit.json</p>" if count > 0 else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
