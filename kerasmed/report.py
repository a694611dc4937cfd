"""The report on all runs: which is best at each question, how surely, and what is wrong with which.

Runs of one notebook and profile on the same data that answer one question on one split form a block. They are ordered
by validation, and compared with the first of them on the same bootstrap draws where both have the same test groups.
"""

import base64
import html
import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kerasmed import atomic, collection
from kerasmed.metrics import LOWER_IS_BETTER, interval
from kerasmed.plots import COLOURS, panels
from kerasmed.runs import LOCATION_PARAMETERS, write_table

# What the runs of a block have in common, and with it what makes figures answers to one question: few images, or
# others, are not the same one.
_KIND = ("system", "notebook", "profile", "data_source", "fingerprint")
QUESTION = (*_KIND, "task", "metric", "label", "split")
RANKED = (
    *QUESTION,
    *("ordered_by", "same_validation", "rank", "run", "parameters", "variant", "validation"),
    *("value", "ci_low", "ci_high", "n", "n_groups"),
    *("difference_to_best", "difference_to_best_low", "difference_to_best_high", "comparison"),
    *("baseline", "baseline_value"),
    *("difference_to_baseline", "difference_to_baseline_low", "difference_to_baseline_high", "verdict"),
    *("trusted", "flags", "chosen_metric", "chosen_split", "chosen_images", "folder"),
)
BEST, PAIRED = "best", "paired"  # of `comparison`, which otherwise says why a run is not compared with the best
NOT_KNOWN = "data not known"
BEATS, LEVEL, WORSE = "beats the baseline", "not told apart from the baseline", "worse than the baseline"
_DRAWN_RUNS, _LABEL_LETTERS, _ERROR_LETTERS = 40, 52, 4000


# --- ranking ---------------------------------------------------------------------------------------------------------


def rank(table: pd.DataFrame, *, metric: str | None = None) -> pd.DataFrame:
    """Order the runs that answer one question, and compare each with the best and with its baseline.

    A block is ordered by the validation value where each of its runs has one, all of one metric and split, else by the
    figure itself: the best test figure of many is too good by chance. A run whose models are not those that were
    measured comes last and is never the best. The difference to the best is value − value of the best; its interval is
    the 2.5th to 97.5th percentile of the differences draw by draw, where both were drawn from the same groups
    (`paired_by`). Runs of unknown data (no fingerprint) form blocks of their own, in which nothing is compared.

    Args:
        table: of `collection.collect`; draws are read from its folders.
        metric: such as "auroc": only blocks of this metric; None for all.

    Returns:
        DataFrame with the columns `RANKED`, a row a run and variant with a figure, blocks one after the other, in each
        the best first; what of `QUESTION` a run does not tell is "". `ordered_by` is "validation" or "test";
        `same_validation` says whether the values that order a block are known to be of the same images; `parameters` is
        what tells a run from the others of its block; `comparison` is `BEST`, `PAIRED` or why there is no difference;
        `verdict` says on which side of 0 the interval of the difference to the baseline lies, "" where there is none or
        the run is not trusted.

    Raises:
        ValueError: no run has a figure of `metric`; names those that there are.
    """
    figures = table[table["value"].notna()].copy()
    known = sorted(figures["metric"].dropna().unique())
    if metric is not None and metric not in known:
        raise ValueError(f"`metric` is {metric!r}; expected one that a complete run has: {', '.join(known) or 'none'}.")
    if metric is not None:
        figures = figures[figures["metric"] == metric]
    figures[list(QUESTION)] = figures[list(QUESTION)].astype(object).fillna("")
    draws = {folder: _draws(folder) for folder in figures.loc[figures["paired_by"].notna(), "folder"].unique()}
    blocks = [_ranked(block, draws) for _, block in figures.groupby(list(QUESTION), sort=False)]
    blocks.sort(key=_place)
    columns = list(RANKED)
    return pd.concat(blocks, ignore_index=True)[columns] if blocks else pd.DataFrame(columns=columns)


def _place(block: pd.DataFrame) -> tuple:
    """Where a block stands: real before synthetic data, and what is not known last."""
    first = block.iloc[0]
    told = (first[name] for name in ("data_source", "profile", "fingerprint"))
    return first["system"], first["notebook"], *((text == "", text) for text in told)


def _draws(folder: str) -> dict[int, np.ndarray]:
    try:
        return collection.read_draws(Path(folder))
    except ValueError:  # became unreadable since it was collected, which would have flagged it
        return {}


def _ranked(block: pd.DataFrame, draws: Mapping[str, Mapping[int, np.ndarray]]) -> pd.DataFrame:
    """Order one block, best first, and compare its rows."""
    block = block.assign(trusted=block["flags"].map(collection.is_trusted))
    voters = block[block["trusted"]] if block["trusted"].any() else block
    one_scale = len(voters[["chosen_metric", "chosen_split"]].drop_duplicates()) == 1
    by_validation = bool(one_scale and voters["validation"].notna().all())
    images = voters["chosen_images"].astype(object).fillna(voters["folder"])  # untold: unlike any other run's
    scale = voters["chosen_metric"].iloc[0] if by_validation else block["metric"].iloc[0]
    values = block["validation" if by_validation else "value"]
    block = block.assign(
        ordered_by="validation" if by_validation else "test",
        same_validation=by_validation and images.nunique() == 1,
        goodness=-values if scale in LOWER_IS_BETTER else values,
        parameters=telling(block["parameters"].tolist()),
    )
    block = block.sort_values(["trusted", "goodness"], ascending=False, kind="stable", na_position="last")
    block["rank"] = range(1, len(block) + 1)
    rows = block.to_dict("records")
    compared = [_to_best(row, rows[0], draws) for row in rows]
    names = ("difference_to_best", "difference_to_best_low", "difference_to_best_high", "comparison")
    block = block.assign(**{name: list(values) for name, values in zip(names, zip(*compared))})
    block = block.rename(columns={name: name.replace("difference", "difference_to_baseline") for name in _TO_BASELINE})
    return block.assign(verdict=[_verdict(row) for row in rows])


_TO_BASELINE = ("difference", "difference_low", "difference_high")


def _to_best(row: Mapping, best: Mapping, draws: Mapping) -> tuple[float, float, float, str]:
    """Difference of a row to the best of its block with its interval, and how it was found or why not."""
    none = (np.nan, np.nan, np.nan)
    if not best["trusted"]:
        return *none, "no best: none of these runs' weights are those that were measured"
    if row is best:
        return *none, BEST
    if not row["trusted"]:
        return *none, "not compared: other weights"
    own, of_best = (draws.get(each["folder"], {}).get(each["row"]) for each in (row, best))
    if pd.isna(row["paired_by"]) or pd.isna(best["paired_by"]) or own is None or of_best is None:
        return *none, "no draws"
    if not row["fingerprint"]:
        return *none, NOT_KNOWN
    if row["paired_by"] != best["paired_by"] or len(own) != len(of_best):
        return *none, "other test groups or draws"
    ends = interval(own - of_best)
    if ends is None:
        return *none, "undefined in most draws"
    return row["value"] - best["value"], *ends, PAIRED


def _verdict(row: Mapping) -> str:
    low, high = row["difference_low"], row["difference_high"]
    if pd.isna(low) or pd.isna(high) or not row["trusted"]:
        return ""
    if row["metric"] in LOWER_IS_BETTER:
        low, high = -high, -low
    return BEATS if low > 0 else WORSE if high < 0 else LEVEL


def telling(parameters: Sequence[Mapping]) -> list[str]:
    """Name each run by the parameters that tell it from the others; where things lie does not count.

    Example:
        >>> telling([{"seed": 0, "rate": 0.1, "data_root": "a"}, {"seed": 1, "rate": 0.1, "data_root": "b"}])
        ['seed=0', 'seed=1']
    """
    kept = [{name: value for name, value in each.items() if name not in LOCATION_PARAMETERS} for each in parameters]
    for each in kept:
        if isinstance(each.get("from_run"), str):
            each["from_run"] = Path(each["from_run"]).name
    names = dict.fromkeys(name for each in kept for name in each)
    told = [name for name in names if len({str(each.get(name, "")) for each in kept if each}) > 1]
    return [", ".join(f"{name}={each[name]}" for name in told if name in each) for each in kept]


def write_csv(path: str | os.PathLike, ranked: pd.DataFrame) -> None:
    """Write a table of `rank` as CSV, whole: a column a number, without the interval's brackets."""
    write_table(path, ranked)


# --- figure ----------------------------------------------------------------------------------------------------------


def forest(block: pd.DataFrame, *, title: str) -> Figure:
    """Draw the figures of a block with their intervals, best on top, each beside its baseline.

    Args:
        block: rows of one block of `rank`; the first 40 are drawn, and the figure says how many are left out.
        title: of the figure.
    """
    shown = block.head(_DRAWN_RUNS)
    # As narrow as a telephone shows it without making it small, so names stand above the intervals, not beside them.
    figure, axes = panels(4.8, 0.42 * len(shown) + 1.5)
    axis, labels = axes[0, 0], []
    for place, (name, row) in enumerate(zip(_names(block), shown.to_dict("records"))):
        colour = COLOURS[3] if not row["trusted"] else COLOURS[2] if row["comparison"] == BEST else COLOURS[0]
        has_interval = not (pd.isna(row["ci_low"]) or pd.isna(row["ci_high"]))
        axis.plot([row["ci_low"], row["ci_high"]] if has_interval else [row["value"]] * 2, [place] * 2, color=colour)
        axis.plot(row["value"], place, "o", color=colour, markersize=5, markerfacecolor=None if row["trusted"] else "w")
        axis.plot(row["baseline_value"], place, "|", color=COLOURS[5], markersize=11, markeredgewidth=2)
        labels.append(f"{row['rank']}.  {_shortened(' '.join(name.split()), _LABEL_LETTERS)}")
    # A "$" in a name begins no formula.
    places = np.arange(len(labels)) - 0.2
    axis.set_yticks(places, labels, fontsize=9, parse_math=False, ha="left", va="bottom")
    axis.tick_params(axis="y", length=0, pad=-4)
    lower = " (lower is better)" if block["metric"].iloc[0] in LOWER_IS_BETTER else ""
    axis.set_xlabel(f"{block['metric'].iloc[0].replace('_', ' ')}{lower}, 95 % interval over groups", parse_math=False)
    axis.set_ylim(len(labels) - 0.6, -0.9)
    axis.margins(x=0.08)
    axis.locator_params(axis="x", nbins=6)
    axis.grid(axis="x", color="#e4e8ee", linewidth=0.7)
    axis.set_axisbelow(True)
    kinds = [("best", "o", COLOURS[2], None), ("other", "o", COLOURS[0], None)]
    kinds += [] if block["trusted"].all() else [("weights not those measured", "o", COLOURS[3], "w")]
    for name, marker, colour, face in (*kinds, ("baseline", "|", COLOURS[5], None)):
        axis.plot([], [], marker, color=colour, markerfacecolor=face, markeredgewidth=2, label=name)
    figure.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside lower left", ncols=4, frameon=False)
    left_out = f"\n{len(block) - len(shown)} of {len(block)} left out" if len(block) > len(shown) else ""
    figure.suptitle("\n".join(textwrap.wrap(title, 60)) + left_out, fontsize=10, parse_math=False)
    if block["data_source"].iloc[0] == "synthetic":
        figure.text(1, 1.0, "synthetic data", ha="right", va="bottom", fontsize=9, color="firebrick")
    return figure


def _names(block: pd.DataFrame) -> list[str]:
    """Name each row of a block by what tells it from the others: parameters, and the variant where it says more."""
    names = []
    for row in block.to_dict("records"):
        said = block["variant"].nunique() == 1 or (row["variant"] or "") in row["parameters"]
        names.append(" · ".join(filter(None, (row["parameters"] or row["run"], "" if said else row["variant"]))))
    return names


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


# --- page ------------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--text:#1c2733;--soft:#56677a;--line:#dde5ee;--back:#fff;--good:#e3f3e6;--bad:#fbe5e3;
--mark:#eef2f6;--warn:#f6d58a;--warntext:#3d2c00;--link:#1f5fa8}
@media(prefers-color-scheme:dark){:root{--text:#dfe6ee;--soft:#9aabbd;--line:#34404d;--back:#151b22;--good:#173a22;
--bad:#4a201d;--mark:#26313c;--warn:#6b5213;--warntext:#ffe9b5;--link:#86b9f2}}
*{box-sizing:border-box}
body{font:15px/1.45 system-ui,sans-serif;margin:1.5em auto;max-width:84em;padding:0 1em;color:var(--text);
background:var(--back);overflow-wrap:anywhere}
h1{margin:0}h2{margin:2.2em 0 .3em;border-bottom:2px solid var(--line);padding-bottom:.2em;font-size:1.25em}
h3{margin:1.8em 0 .2em;font-size:1.05em}p{margin:.4em 0}a{color:var(--link)}.small{color:var(--soft);font-size:.9em}
.wide{overflow-x:auto;max-width:100%}table{border-collapse:collapse;margin:.6em 0;font-size:.93em}
td,th{padding:.35em .9em .35em 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;font-size:.9em;vertical-align:bottom}th,td{overflow-wrap:break-word}
td.number{white-space:nowrap;font-variant-numeric:tabular-nums}td.text{min-width:15em;overflow-wrap:anywhere}
td.flags,td.verdict{min-width:9em}
tr.best td{background:var(--good)}tr.untrusted td{background:var(--bad)}
td:first-child,th:first-child{padding-left:.5em}
.mark{display:inline-block;padding:.1em .5em;margin:0 .3em .2em 0;border-radius:.3em;font-size:.85em;
background:var(--mark)}.mark.warns{background:var(--warn);color:var(--warntext)}
.note{padding:.6em .9em;border-radius:.4em;background:var(--warn);color:var(--warntext)}
.head{padding:.8em 1.1em;border-radius:.4em;font-size:1.1em;margin:1em 0;background:var(--mark)}
pre{white-space:pre-wrap;margin:.3em 0;padding:.6em .8em;border-radius:.4em;background:var(--bad);font-size:.85em}
figure{margin:.6em 0}figure img{display:block;width:36em;max-width:100%;background:#fff;border-radius:.3em}
@media screen and (max-width:800px){thead{display:none}table,tbody,tr,td{display:block}
tr{padding:.5em 0;border-bottom:1px solid var(--line)}tr.best{background:var(--good)}tr.untrusted{background:var(--bad)}
td{display:flow-root;min-width:0!important;padding:.15em .5em .15em 11.2em;border:0}td.number{white-space:normal}
td::before{content:attr(data-label);float:left;width:12em;margin-left:-12em;font-size:.89em;color:var(--soft)}
td.title,td.rank{padding-left:.5em}td.title::before,td.rank::before{content:none}td.rank{float:left}td:empty{display:none}}
@media print{body{max-width:none;font-size:10px}.wide{overflow:visible}
figure,tr,pre{break-inside:avoid}h2,h3{break-after:avoid}}
"""
# Nothing is fetched, nothing runs: what a run wrote cannot do more than stand there.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_TOO_GOOD = (
    "Ordered by the test figure itself, as {why}: the best test figure of many is too good by chance. Choose by "
    "validation, and report the test figure of the one chosen."
)
_OTHER_IMAGES = (
    "The validation figures {are} of different images, as with other seeds of the split, so that small differences in "
    "order mean little."
)
_DIFFERENCES = (
    "Differences are the run's value minus that of the best, or of its baseline; their intervals, and those of values, "
    "are the 2.5th to 97.5th percentile over bootstrap draws of whole groups. Runs are compared with the best on the "
    "same draws, and not at all where they have none in common."
)


def write_html(path: str | os.PathLike, table: pd.DataFrame, ranked: pd.DataFrame | None = None) -> None:
    """Write the report on all runs as one page, which needs nothing outside itself, and no script.

    Args:
        path: of the page; links lead from its folder to the runs.
        table: of `collection.collect`.
        ranked: of `rank`; None ranks the whole table.
    """
    ranked = rank(table) if ranked is None else ranked
    top = Path(path).resolve().parent
    each = table.drop_duplicates("folder").reset_index(drop=True)
    each = each.assign(told=_told(each), flags=each["folder"].map(_all_flags(table)))
    sections = ["<h1>Runs</h1>", _head(each), _failures(each, top)]
    data_sets = ranked.groupby(["system", "notebook"])["fingerprint"].nunique()
    for (system, notebook, profile, _, fingerprint), runs in ranked.groupby(list(_KIND), sort=False):
        data = f"data {fingerprint[:6]}" if fingerprint else NOT_KNOWN
        data = "" if fingerprint and data_sets[system, notebook] == 1 else data
        about = " · ".join(filter(None, (notebook, profile, data)))
        sections.append(f"<h2>{_named(system)} · {_named(about)}</h2>")
        sections += [_section(block, about, top) for _, block in runs.groupby(list(QUESTION), sort=False)]
    if ranked.empty:
        sections.append("<h2>Ranking</h2><p>No complete run has a figure.</p>")
    else:
        sections.append(f"<p class=small>{_DIFFERENCES}</p>")
    sections += [_explained(each), _places(each, top)]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'><meta name=referrer content=no-referrer>"
        f"<title>kerasmed runs</title><style>{_STYLE}</style>{''.join(filter(None, sections))}</html>\n"
    )
    with atomic.whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _told(each: pd.DataFrame) -> pd.Series:
    """What tells each run from the others of its notebook."""
    told = pd.Series("", each.index)
    for _, group in each.groupby(["system", "notebook"]):
        told.loc[group.index] = telling(group["parameters"].tolist())
    return told


def _all_flags(table: pd.DataFrame) -> dict[str, str]:
    """Folder -> the flags of all its rows."""
    joined = table.groupby("folder")["flags"].agg("; ".join)
    return {folder: "; ".join(filter(None, dict.fromkeys(flags.split("; ")))) for folder, flags in joined.items()}


def _head(each: pd.DataFrame) -> str:
    counts = each["status"].value_counts()
    order = dict.fromkeys(("complete", "failed", "interrupted", "running", *counts.index))
    states = ", ".join(f"{counts.get(state, 0)} {_escaped(state)}" for state in order)
    flagged = int((each["flags"] != "").sum())
    return f"<div class=head><b>{_plural(len(each), 'run')}</b>: {states}; {flagged} flagged</div>"


def _failures(each: pd.DataFrame, top: Path) -> str:
    """Show what ended without a result, or left one that cannot be read, each with its error."""
    broken = each["flags"].str.contains(f"{collection.MISSING}|{collection.DAMAGED}")
    failed = each[broken | ~each["status"].isin(["complete", "running"])]
    parts = []
    for row in failed.to_dict("records"):
        cell, error = _failing_cell(row["error"])
        at = f" at {_escaped(cell)}" if cell else ", but damaged" if row["status"] == "complete" else ""
        about = " · ".join(_escaped(text) for text in (row["system"], row["notebook"], row["told"]) if text)
        text = f"<pre>{_escaped(_shortened(error, _ERROR_LETTERS))}</pre>" if error else ""
        parts.append(
            f"<h3>{_link(row, top)}: {_escaped(row['status'])}{at}</h3><p class=small>{about}</p>"
            f"<p>{_marks(row['flags'])}</p>{text}"
        )
    return f"<h2>Failed, interrupted and broken</h2>{''.join(parts)}" if parts else ""


def _failing_cell(error) -> tuple[str, str]:
    """Part an error's text into the cell that failed, "" where it does not say, and the rest."""
    text = "" if pd.isna(error) else str(error)
    cell, colon, rest = text.partition(": ")
    return (cell, rest) if colon and cell.startswith("cell ") else ("", text)


def _section(block: pd.DataFrame, about: str, top: Path) -> str:
    """Show one block: how it is ordered, its figure and its table."""
    first = block.iloc[0]
    title = " · ".join(filter(None, (first["task"], first["label"], first["metric"].replace("_", " "), first["split"])))
    last = "" if block["trusted"].all() else "<p>Shaded red, and last: runs whose weights are not those measured.</p>"
    picture, about = io.BytesIO(), f"{about}: {title}"
    forest(block, title=about).savefig(picture, format="png", dpi=180, bbox_inches="tight")
    data = base64.b64encode(picture.getvalue()).decode()
    heads = ["", "run", "value [95 %]", "validation", "to the best [95 %]", "baseline", "to the baseline [95 %]"]
    rows = [_row(row, name, top) for row, name in zip(block.to_dict("records"), _names(block))]
    return (
        f"<h3>{_named(title)}{' (lower is better)' if first['metric'] in LOWER_IS_BETTER else ''}"
        f"{' · synthetic data' if first['data_source'] == 'synthetic' else ''}</h3>{_order(block)}{last}"
        f"<figure><img alt='Runs with intervals: {_escaped(about)}' src='data:image/png;base64,{data}'>"
        f"</figure>{_table([*heads, 'verdict', 'flags'], rows)}"
    )


def _order(block: pd.DataFrame) -> str:
    """Say what a block is ordered by, and what its order is worth."""
    first = block.iloc[0]
    voters = block[block["trusted"] | ~block["trusted"].any()]
    if first["ordered_by"] != "validation":
        missing = voters["validation"].isna().any()
        why = "not every run has a validation value" if missing else "the runs' validation values are of several kinds"
        return f"<p class=note>{_TOO_GOOD.format(why=why)}</p>" if len(block) > 1 else ""
    metric, split = ("" if pd.isna(first[name]) else first[name] for name in ("chosen_metric", "chosen_split"))
    places = {"": "validation", "valid": "the validation split", "folds": "the folds"}
    told = f"{metric.replace('_', ' ') or 'the value'} on {places.get(split, f'the split {split}')}"
    direction = "lowest" if metric in LOWER_IS_BETTER else "highest"
    no_say = f"; the {'test ' * first['split'].startswith('test')}figures shown had no say" * (first["split"] != split)
    order = f"<p>Ordered by {_named(told)}, {direction} first{no_say}.</p>"
    if first["same_validation"]:
        return order
    are = "are" if voters["chosen_images"].nunique() > 1 else "may be"
    return f"{order}<p>{_OTHER_IMAGES.format(are=are)}</p>"


def _row(row: Mapping, name: str, top: Path) -> tuple[str, list[tuple[str, str]]]:
    """One row of a block's table: its class, and class and content of each cell."""
    to_best = _interval(row, "difference_to_best", "+") if row["comparison"] == PAIRED else row["comparison"]
    kind = "best" if row["comparison"] == BEST else "" if row["trusted"] else "untrusted"
    baseline = f"{row['baseline'] or ''} {row['baseline_value']:.3f}" if pd.notna(row["baseline_value"]) else ""
    return kind, [
        ("rank", str(row["rank"])),
        ("text title", f"<b>{_named(name)}</b><br><span class=small>{_link(row, top)}</span>"),
        ("number", _interval(row, "value", "", "ci")),
        ("number", "" if pd.isna(row["validation"]) else f"{row['validation']:.3f}"),
        ("number" if row["comparison"] == PAIRED else "", _escaped(to_best)),
        ("", _escaped(baseline.replace("_", " "))),
        ("number", _interval(row, "difference_to_baseline", "+")),
        ("verdict", _escaped(row["verdict"])),
        ("flags" if row["flags"] else "", _marks(row["flags"])),
    ]


def _explained(each: pd.DataFrame) -> str:
    """Explain every flag that there is, those that occur first."""
    counts = {
        kind: sum(kind in {flag.split(": ")[0] for flag in flags.split("; ")} for flags in each["flags"])
        for kind in collection.FLAGS
    }
    rows = []
    for kind in sorted(counts, key=lambda kind: counts[kind] == 0):
        mark = f"<span class='mark{' warns' if counts[kind] else ''}'>{kind}</span>"
        rows.append(("", [("title", mark), ("number", str(counts[kind])), ("title", collection.FLAGS[kind])]))
    return f"<h2>Flags</h2>{_table(['flag', 'runs', 'what it means'], rows)}"


def _places(each: pd.DataFrame, top: Path) -> str:
    """List every run with links to what it holds."""
    rows = []
    for row in each.to_dict("records"):
        folder = Path(row["folder"])
        notebook = next((name for name in ("notebook.html", "notebook.ipynb") if (folder / name).exists()), None)
        links = [_anchor(folder / notebook, top, notebook)] if notebook else []
        links += [_anchor(folder / "figures", top, "figures")] if (folder / "figures").is_dir() else []
        ended = "" if pd.isna(row["finished"]) else row["finished"].replace("T", " ")[:16]
        cells = [("text title", _link(row, top)), ("", _escaped(row["system"])), ("", _escaped(row["status"]))]
        cells += [("number", _escaped(ended)), ("text", _named(row["told"])), ("", " · ".join(links))]
        rows.append(("", [*cells, ("text", _marks(row["flags"]))]))
    heads = ["run", "system", "status", "last written (UTC)", "parameters of its own", "open", "flags"]
    return f"<h2>Where the runs lie</h2>{_table(heads, rows)}"


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """Lay rows of (class, cells of (class, content)) out; each cell has its head by it, for narrow screens."""
    head, body = "".join(f"<th>{name}</th>" for name in heads), ""
    for kind, cells in rows:
        each = [f"<td class='{column}' data-label='{name}'>{cell}</td>" for name, (column, cell) in zip(heads, cells)]
        body += f"<tr class='{kind}'>{''.join(each)}</tr>"
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _marks(flags: str) -> str:
    """Show flags, those that spoil a figure in the colour of a warning."""
    calm = (collection.SYNTHETIC, collection.NO_DRAWS)
    each = [("mark" if flag in calm else "mark warns", flag) for flag in flags.split("; ") if flag]
    return "".join(f"<span class='{kind}'>{_escaped(flag)}</span>" for kind, flag in each)


def _interval(row: Mapping, name: str, sign: str = "", ends: str | None = None) -> str:
    low, high = row[f"{ends or name}_low"], row[f"{ends or name}_high"]
    if pd.isna(row[name]):
        return ""
    return f"{row[name]:{sign}.3f}" + ("" if pd.isna(low) or pd.isna(high) else f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _link(row: Mapping, top: Path) -> str:
    return _anchor(Path(row["folder"]), top, row["run"])


def _anchor(target: Path, top: Path, text: str) -> str:
    """Link to a file, relative to the page's folder where there is a way."""
    try:
        address = quote(Path(os.path.relpath(target, top)).as_posix())
    except ValueError:  # on another drive
        address = target.as_uri()
    return f"<a href='{address}'>{_named(text)}</a>"


def _escaped(text) -> str:
    return html.escape(str(text))


def _named(text) -> str:
    """Escape a name, and let it break where its parts end rather than within a number."""
    return re.sub(r"([_/,])", r"\1<wbr>", _escaped(text))


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
