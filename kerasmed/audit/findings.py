"""What is wrong with a manifest, and the gate that refuses to train on it."""

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

# Kind of finding -> what it means, in the order of reports.
KINDS = {
    "unreadable": "files that cannot be read",
    "black": "entirely black images",
    "constant": "images of one grey level",
    "label_conflict": "the same picture under different labels",
    "leak_duplicate": "equal pixels in several splits",
    "leak_near_duplicate": "the same picture, saved or sized anew, in several splits",
    "leak_patient": "a patient in several splits",
    "leak_study": "a study in several splits",
    "leak_group": "images that belong together in several splits",
    "exact_duplicate": "equal pixels in one split",
    "near_duplicate": "the same picture, saved or sized anew, in one split",
    "shortcut": "something else than the picture tells the label, or the split",
}
# Kind of finding -> what to do about it.
MENDS = {
    "unreadable": "Get them again from their source; they are set aside until then.",
    "black": "They teach nothing, whatever their labels: leave them out of training, or keep one of each label set.",
    "constant": "Leave them out of training, or get them again from their source.",
    "label_conflict": "Ask whoever labelled them; leave out what nobody can decide.",
    "leak_duplicate": "Split anew by group, copies in one group; a published split: score without what leaks.",
    "leak_near_duplicate": "Split anew by group, copies in one group; a published split: score without what leaks.",
    "leak_patient": "Split anew by patient.",
    "leak_study": "Split anew by patient, or by study where patients are unknown.",
    "leak_group": "Split anew by group; a published split: score without what leaks.",
    "exact_duplicate": "Keep copies in one group, or keep one of each, before any new split.",
    "near_duplicate": "Keep copies in one group, or keep one of each, before any new split.",
    "shortcut": "Compare a network with this figure, and test it on images made elsewhere.",
}
FAILING = tuple(kind for kind in KINDS if kind.startswith("leak_")) + ("black", "constant", "label_conflict")
ID_COLUMNS = {"leak_patient": "patient_id", "leak_study": "study_id", "leak_group": "group_id"}
COLUMNS = ("kind", "name", "images", "splits", "labels", "image_paths")
# What to do with black images in training, by name.
POLICIES = ("keep_all", "drop_all", "one_per_label_set", "all_zero_and_all_one")


class GateError(ValueError):
    """An audit found what would spoil a result, and nobody has accepted it."""


class LeakError(GateError):
    """A patient, study, group or picture lies in several splits."""


def label_sets(manifest: pd.DataFrame, class_names: Sequence[str]) -> pd.Series:
    """Name each row's labels: "label1+label3", "none", or missing where a label is unknown.

    Example:
        >>> frame = pd.DataFrame({"a": [1, 0, 1], "b": [1, 0, np.nan]})
        >>> label_sets(frame, ["a", "b"]).tolist()
        ['a+b', 'none', nan]
    """
    labels = manifest[list(class_names)].to_numpy(float, na_value=np.nan)
    codes, number = np.unique(np.nan_to_num(labels, nan=2), axis=0, return_inverse=True)
    names = [None if (code == 2).any() else "+".join(np.array(class_names)[code == 1]) or "none" for code in codes]
    return pd.Series(np.array(names, object)[number.ravel()], manifest.index, dtype="str")


def find(manifest: pd.DataFrame, identity: pd.DataFrame | None = None, class_names: Sequence[str] = ()) -> pd.DataFrame:
    """List what is wrong: constant images, copies, contradictions, and what lies in several splits.

    A row without a split, an id or a label is looked at in everything else. Two rows contradict each other where a
    label is 1 in one and 0 in the other.

    Args:
        manifest: rows with, as far as known, `image_path` (else their position), `split`, `patient_id`, `study_id`,
            `group_id`, labels.
        identity: of `identify`, beside the manifest; without it only ids are looked at.
        class_names: label columns; without them no label is looked at.

    Returns:
        DataFrame, a row a finding, in the order of `KINDS`: kind, name (the id, or the first path), images (how many),
        splits ("test+train"), labels (the label sets, " | " between), image_paths (list).

    Raises:
        ValueError: not one row of `identity` a row of the manifest.
    """
    known = manifest.reset_index(drop=True)
    splits = known["split"] if "split" in known else pd.Series(np.nan, known.index, dtype="str")
    images = known["image_path"] if "image_path" in known else known.index.to_series().astype(str)
    sets = shown_labels(known, class_names)
    keys = _keys(known, splits, class_names, identity)
    tables = [pd.DataFrame(columns=list(COLUMNS)).astype({"images": int})]
    for kind in KINDS:
        number, names = pd.factorize(keys.get(kind, np.zeros(0)))  # numbered by first image, -1 in no finding
        rows = np.flatnonzero(number >= 0)
        if not len(rows):
            continue
        number, paths = number[rows], images.iloc[rows].groupby(number[rows])
        found = {
            "kind": kind,
            "name": names.astype(str) if kind in ID_COLUMNS else paths.first(),
            "images": np.bincount(number),
            "splits": _joined(splits.iloc[rows], number, "+"),
            "labels": _joined(sets.iloc[rows], number, " | "),
            "image_paths": paths.agg(list),
        }
        tables.append(pd.DataFrame(found, columns=list(COLUMNS)))
    return pd.concat(tables, ignore_index=True)


def _keys(manifest, splits, class_names, identity) -> dict[str, pd.Series]:
    """Give each row, kind by kind, the key that it shares with the rest of its finding; missing where it is in none."""

    def cut(keys):
        return splits.groupby(keys).transform("nunique") > 1

    keys = {}
    for kind, column in ID_COLUMNS.items():
        if column in manifest:
            keys[kind] = manifest[column].where(cut(manifest[column]))
    if identity is None:
        return keys
    _check_beside(manifest, identity)
    constant, exact, near = (pd.Series(identity[name].to_numpy()) for name in ("constant", "exact", "near"))
    labels = manifest[list(class_names)].astype(float).groupby(near)
    contradicting = (labels.transform("max") > labels.transform("min")).any(axis=1)
    copied, anew = exact.duplicated(keep=False), exact.groupby(near).transform("nunique") > 1
    return keys | {
        "black": constant.where(constant == "black"),
        "constant": constant.where(constant == "constant"),
        "label_conflict": near.where(contradicting),
        "leak_duplicate": exact.where(copied & cut(exact)),
        "leak_near_duplicate": near.where(anew & cut(near)),
        "exact_duplicate": exact.where(copied & ~cut(exact)),
        "near_duplicate": near.where(anew & ~cut(near)),
    }


def shown_labels(manifest: pd.DataFrame, class_names: Sequence[str]) -> pd.Series:
    """Name each row's known labels as `label_sets` does; missing where none is known."""
    labels = manifest[list(class_names)]
    if not len(class_names):
        return pd.Series(np.nan, manifest.index, dtype="str")
    sets = label_sets(labels.fillna(0), class_names)
    return sets.mask(labels.isna().any(axis=1), sets + " (rest unknown)").mask(labels.isna().all(axis=1))


def _joined(values: pd.Series, number: np.ndarray, separator: str) -> pd.Series:
    """Join the distinct values of each number in sorted order, "" where all are missing."""
    distinct = pd.DataFrame({"number": number, "value": values.to_numpy()}).dropna().drop_duplicates()
    joined = distinct.astype({"value": str}).sort_values("value").groupby("number")["value"].agg(separator.join)
    return joined.reindex(range(number.max() + 1), fill_value="")


def _check_beside(manifest: pd.DataFrame, identity: pd.DataFrame) -> None:
    if len(identity) != len(manifest):
        raise ValueError(
            f"{len(identity)} rows of `identity` for {len(manifest)} of the manifest; identify the same images."
        )


def check_accepted(accepted: Collection[str]) -> None:
    """Raise ValueError where `accepted` names what is no kind of finding that closes the gate."""
    unknown = [kind for kind in accepted if kind not in FAILING]
    if unknown:
        raise ValueError(f"`accepted` names {unknown}; expected some of {', '.join(FAILING)}.")


def gate(
    manifest: pd.DataFrame,
    identity: pd.DataFrame | None = None,
    class_names: Sequence[str] = (),
    *,
    accepted: Collection[str] = (),
) -> pd.DataFrame:
    """Refuse to go on where something would spoil a result: call it before every training.

    It stops at black and constant images, at pictures under several labels, and at patients, studies, groups or
    pictures in several splits. Copies within a split are let through: they spoil nothing as long as no new split parts
    them.

    Args:
        manifest: rows with `split`, `group_id`, `patient_id`, `study_id`; ids may be NaN but for `group_id`.
        identity: of `identify`, beside the manifest; without it only the ids are checked.
        class_names: label columns; without them contradictions are not looked for.
        accepted: kinds of finding, of `FAILING`, that are known and let through; record them with the run.

    Returns:
        DataFrame of what was checked: check (kind), looked_at (ids, or images), found, images (in what was found),
        accepted.

    Raises:
        LeakError: something lies in several splits; counts and first offenders.
        GateError: other faults.
        ValueError: a row has no group or no split, `accepted` names no kind, or `identity` has other rows.
    """
    check_accepted(accepted)
    for name in ("group_id", "split"):
        if manifest[name].isna().any():
            raise ValueError(
                f"{int(manifest[name].isna().sum())} rows have no `{name}`; the gate cannot vouch for them."
            )
    found = find(manifest, identity, class_names)
    checked, closed = [], []
    for kind in KINDS:
        if kind not in FAILING or (identity is None and kind not in ID_COLUMNS):
            continue
        looked_at = manifest[ID_COLUMNS[kind]].nunique() if kind in ID_COLUMNS else len(manifest)
        findings = found[found["kind"] == kind]
        checked.append((kind, looked_at, len(findings), findings["images"].sum(), kind in accepted))
        if len(findings) and kind not in accepted:
            closed.append((kind, _complaint(kind, findings, looked_at)))
    if closed:
        text = "; ".join(complaint for _, complaint in closed)
        leaks = [kind for kind, _ in closed if kind.startswith("leak_")]
        mend = "Split by `group_id` with `splits.assign`" if leaks else "Leave these images out"
        names = ", ".join(kind for kind, _ in closed)
        raise (LeakError if leaks else GateError)(f"{text}. {mend}, or accept knowingly: {names}.")
    return pd.DataFrame(checked, columns=["check", "looked_at", "found", "images", "accepted"])


def _complaint(kind: str, findings: pd.DataFrame, looked_at: int) -> str:
    """Say how much was found of a kind, and name the first offenders."""
    first = findings.head(5)
    if kind in ID_COLUMNS:
        shown = ", ".join(f"{name} in {splits}" for name, splits in zip(first["name"], first["splits"]))
        return f"{len(findings)} of {looked_at} values of {ID_COLUMNS[kind]} lie in several splits: {shown}"
    shown = ", ".join(
        f"{paths[:3]}{f' ({labels})' if kind == 'label_conflict' else ''}"
        for paths, labels in zip(first["image_paths"], first["labels"])
    )
    return f"{findings['images'].sum()} of {looked_at} images: {KINDS[kind]} ({kind}): {shown}"


def deduplicate(
    manifest: pd.DataFrame, identity: pd.DataFrame, class_names: Sequence[str], *, policy: str
) -> np.ndarray:
    """Say which rows to train on, by a policy for black and constant images.

    Args:
        manifest: rows with label columns.
        identity: of `identify`, beside it.
        class_names: label columns.
        policy: "keep_all"; "drop_all" of them; "one_per_label_set", the first of each; "all_zero_and_all_one", the
            first without any label and the first with all of them. The last two drop those with an unknown label.

    Returns:
        bool array, shape (num_rows,); rows that are not constant are always kept.

    Raises:
        ValueError: unknown policy, or not one row of `identity` a row of the manifest.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` is {policy!r}; expected one of {', '.join(POLICIES)}.")
    _check_beside(manifest, identity)
    constant = identity["constant"].to_numpy() != ""
    if policy in ("keep_all", "drop_all"):
        return ~constant | (policy == "keep_all")
    sets = label_sets(manifest, class_names).where(constant)
    first = sets.notna() & ~sets.duplicated()
    if policy == "all_zero_and_all_one":
        first &= sets.isin(["none", "+".join(class_names)])
    return ~constant | first.to_numpy()


def crossing(manifest: pd.DataFrame) -> pd.DataFrame:
    """Count the images of validation and test whose group is in train as well: what a split leaks.

    Args:
        manifest: rows with `split` and `group_id`.

    Returns:
        DataFrame indexed by split (those of valid and test that occur): images, groups, groups_in_train,
        images_in_train (images of these groups), share_in_train (of the images).

    Raises:
        ValueError: a row has no group.
    """
    if manifest["group_id"].isna().any():
        raise ValueError(
            f"{int(manifest['group_id'].isna().sum())} rows have no `group_id`; fill it with `assign_groups` first."
        )
    in_train = manifest["group_id"].isin(manifest.loc[manifest["split"] == "train", "group_id"])
    records = []
    for split in ("valid", "test"):
        chosen = manifest["split"] == split
        if chosen.any():
            leaked = manifest.loc[chosen & in_train, "group_id"]
            records.append(
                {
                    "split": split,
                    "images": int(chosen.sum()),
                    "groups": manifest.loc[chosen, "group_id"].nunique(),
                    "groups_in_train": leaked.nunique(),
                    "images_in_train": len(leaked),
                    "share_in_train": len(leaked) / int(chosen.sum()),
                }
            )
    columns = ["split", "images", "groups", "groups_in_train", "images_in_train", "share_in_train"]
    return pd.DataFrame(records, columns=columns).set_index("split")
