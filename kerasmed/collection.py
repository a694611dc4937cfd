"""All runs in one table: as a frame, as text, as a page."""

import html
import os
from pathlib import Path

import pandas as pd

from kerasmed import paths
from kerasmed.runs import read_json, status, whole

# The columns of `collect`.
COLLECTED = (
    *("run", "status", "data_source", "task", "variant", "validation", "metric", "label", "value", "ci_low", "ci_high"),
    *("baseline", "baseline_value", "difference", "difference_low", "difference_high", "error", "folder"),
)


def collect(models_root=None) -> pd.DataFrame:
    """Read every run under a folder into one table: a row per headline number, or one per run that has none.

    A run with summary.json instead of metrics has no numbers in the table.

    Args:
        models_root: a folder that holds `<system>/<run>/status.json`, or one system's folder, or one run.

    Returns:
        DataFrame with the columns `COLLECTED`, newest run last; the difference is to the strongest baseline, and
        `validation` is the value that a run may be chosen by (None where it gives none).
    """
    top = paths.models_root(models_root)
    found = sorted(
        {path.parent for depth in ("", "*/", "*/*/") for path in top.glob(f"{depth}status.json")},
        key=lambda run: status(run).get("started", ""),
    )
    records = []
    for run in found:
        state = status(run)
        common = {
            "run": run.name,
            "status": state["status"],
            "data_source": state.get("data_source"),
            "error": state.get("error"),
            "folder": str(run),
        }
        has_metrics = state["status"] == "complete" and not (run / "summary.json").exists()
        content = read_json(run / "metrics.json") if has_metrics else {"headline": [{}]}
        for row in content["headline"]:
            baseline = row.get("baseline") or {}
            ends, difference = row.get("ci95") or [None] * 2, baseline.get("difference_ci95") or [None] * 2
            records.append(
                {
                    **common,
                    "validation": (content.get("chosen_by") or {}).get("value"),
                    **{name: row.get(name) for name in ("task", "variant", "metric", "label", "value")},
                    **dict(zip(("ci_low", "ci_high"), ends)),
                    "baseline": baseline.get("variant"),
                    "baseline_value": baseline.get("value"),
                    "difference": baseline.get("difference"),
                    **dict(zip(("difference_low", "difference_high"), difference)),
                }
            )
    return pd.DataFrame(records, columns=COLLECTED)


def as_text(table: pd.DataFrame) -> pd.DataFrame:
    """Format a table for reading: three decimals, and nothing where a value is missing."""

    def shown(value):
        return "" if pd.isna(value) else f"{value:.3f}" if isinstance(value, float) else str(value)

    return table.astype(object).map(shown)


def write_html(path: str | os.PathLike, table: pd.DataFrame) -> None:
    """Write a table of `collect` as one page without scripts or outside resources."""
    style = "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.3em .7em}"
    escaped = as_text(table.drop(columns="folder")).map(html.escape)
    escaped["folder"] = [f'<a href="{Path(folder).as_uri()}">folder</a>' for folder in table["folder"]]
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>kerasmed runs</title><style>{style}</style>"
        f"<h1>Runs</h1>{escaped.to_html(index=False, escape=False, border=0)}</html>\n"
    )
    with whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
