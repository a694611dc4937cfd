import numpy as np
import pandas as pd
import pytest

from kerasmed import audit

LABELS = ("a", "b")


def _manifest(groups, splits, labels=None):
    labels = np.zeros(len(groups), int) if labels is None else np.array(labels)
    return pd.DataFrame(
        {
            "image_path": [f"{row}.png" for row in range(len(groups))],
            "patient_id": pd.Series(pd.NA, range(len(groups)), dtype="str"),
            "study_id": pd.Series(pd.NA, range(len(groups)), dtype="str"),
            "group_id": groups,
            "split": splits,
            "a": (labels == 0).astype(float),
            "b": (labels == 1).astype(float),
        }
    )


def _identity(constant=None, exact=None, near=None):
    count = len(next(each for each in (constant, exact, near) if each is not None))
    exact = list(range(count)) if exact is None else exact
    return pd.DataFrame({"constant": constant or [""] * count, "exact": exact, "near": near or exact})


def _paths(found):
    return [(kind, "".join(path[0] for path in paths)) for kind, paths in zip(found["kind"], found["image_paths"])]


def test_label_sets_by_hand_with_unknown_and_no_labels():
    frame = pd.DataFrame({"a": [1, 0, 1, np.nan], "b": [1, 0, 0, 1]}, index=[3, 1, 2, 0])
    sets = audit.label_sets(frame, LABELS)
    assert sets.tolist()[:3] == ["a+b", "none", "a"] and pd.isna(sets[0]) and sets.index.tolist() == [3, 1, 2, 0]
    assert audit.label_sets(frame.head(0), LABELS).tolist() == []
    frame["b"] = pd.array([1, 0, None, 1], "Int64")
    assert audit.label_sets(frame, LABELS).isna().tolist() == [False, False, True, True]


# --- find ------------------------------------------------------------------------------------------------------------


def test_find_by_hand():
    manifest = _manifest(list("uvwxyzst"), ["train"] * 6 + ["test"] * 2, labels=[0, 0, 1, 1, 0, 0, 0, 0])
    #   0 and 1 are black; 2 is grey; 3, 4 and 6 have equal pixels; 5 and 7 resemble each other
    identity = _identity(["black", "black", "constant"] + [""] * 5, [0, 1, 2, 3, 3, 5, 3, 7], [0, 1, 2, 3, 3, 5, 3, 5])
    found = audit.find(manifest, identity, LABELS)
    assert found.columns.tolist() == ["kind", "name", "images", "splits", "labels", "image_paths"]
    assert found.drop(columns="image_paths").to_numpy().tolist() == [
        ["black", "0.png", 2, "train", "a"],
        ["constant", "2.png", 1, "train", "b"],
        ["label_conflict", "3.png", 3, "test+train", "a | b"],
        ["leak_duplicate", "3.png", 3, "test+train", "a | b"],
        ["leak_near_duplicate", "5.png", 2, "test+train", "a"],
    ]
    assert found["image_paths"].tolist()[2:] == [["3.png", "4.png", "6.png"]] * 2 + [["5.png", "7.png"]]


def test_find_copies_within_a_split_are_no_leak():
    manifest = _manifest(list("uvwxy"), ["train", "train", "test", "test", "test"])
    found = audit.find(manifest, _identity(exact=[0, 0, 2, 3, 4], near=[0, 0, 2, 2, 4]))
    assert _paths(found) == [("exact_duplicate", "01"), ("near_duplicate", "23")]
    # Without splits, or with unknown ones, nothing lies in several.
    for unsplit in (
        manifest.drop(columns="split"),
        manifest.assign(split=pd.NA),
        manifest.assign(split=[*"ab", *[pd.NA] * 3]),
    ):
        kinds = set(audit.find(unsplit, _identity(exact=[0, 1, 2, 2, 4], near=[0, 1, 2, 2, 2]))["kind"])
        assert kinds == {"exact_duplicate", "near_duplicate"}


@pytest.mark.parametrize(
    ("column", "kind"), [("patient_id", "leak_patient"), ("study_id", "leak_study"), ("group_id", "leak_group")]
)
def test_find_ids_in_several_splits(column, kind):
    manifest = _manifest(list("uvwxyz"), ["train", "train", "test", "valid", "test", pd.NA])
    manifest[column] = ["p", pd.NA, "q", "q", "p", "r"]
    found = audit.find(manifest)
    assert found.drop(columns="image_paths").to_numpy().tolist() == [
        [kind, "p", 2, "test+train", ""],
        [kind, "q", 2, "test+valid", ""],
    ]
    assert _paths(found) == [(kind, "04"), (kind, "23")]


@pytest.mark.parametrize(
    ("one", "other", "conflict"),
    [
        ([1, 0], [0, 1], True),
        ([1, 0], [1, 0], False),
        ([1, np.nan], [0, np.nan], True),
        ([1, np.nan], [1, 0], False),
        ([np.nan, np.nan], [1, 0], False),
    ],
)
def test_find_label_conflict_is_a_label_known_to_be_present_and_absent(one, other, conflict):
    manifest = _manifest(["g", "h"], ["train"] * 2)
    manifest[list(LABELS)] = np.array([one, other])
    found = audit.find(manifest, _identity(near=[0, 0], exact=[0, 1]), LABELS)
    assert ("label_conflict" in set(found["kind"])) == conflict
    assert audit.find(manifest, _identity(exact=[0, 0]))["labels"].tolist() == [""]


def test_find_names_what_is_known_of_labels_that_are_unknown_in_part():
    manifest = _manifest(["g"] * 3, ["train"] * 3)
    manifest[list(LABELS)] = [[1, np.nan], [0, np.nan], [np.nan, np.nan]]
    found = audit.find(manifest, _identity(exact=[0, 0, 0]), LABELS).set_index("kind")["labels"]
    assert found["label_conflict"] == "a (rest unknown) | none (rest unknown)"


def test_find_does_not_depend_on_the_tables_index_or_missing_columns():
    manifest = _manifest(list("uvw"), ["train", "test", "test"])
    identity = _identity(exact=[0, 0, 2])
    expected = audit.find(manifest, identity)
    pd.testing.assert_frame_equal(audit.find(manifest.set_axis([5, 5, 1]), identity.set_axis(list("xyz"))), expected)
    assert audit.find(manifest[["split"]], identity)["image_paths"].tolist() == [["0", "1"]]


def test_find_nothing_in_an_empty_table_and_in_a_clean_one():
    for manifest in (_manifest(list("uv"), ["train", "test"]), _manifest([], [])):
        found = audit.find(manifest, _identity(exact=list(range(len(manifest)))), LABELS)
        assert found.empty and found["images"].dtype == int and found["images"].sum() == 0
        assert audit.find(manifest).empty


def test_find_is_quick_where_everything_is_wrong(rng):
    count = 20_000
    manifest = _manifest(rng.integers(0, 5000, count).astype(str), rng.choice(["train", "test"], count))
    found = audit.find(manifest, _identity(exact=(np.arange(count) // 2 * 2).tolist()), LABELS)
    kinds = found.groupby("kind")["images"].sum()
    assert kinds["leak_duplicate"] + kinds["exact_duplicate"] == count
    crossing = manifest.groupby("group_id")["split"].transform("nunique") == 2
    assert kinds["leak_group"] == crossing.sum() and found["kind"].eq("leak_group").sum() > 3000


def test_find_identity_of_other_images_is_refused():
    with pytest.raises(ValueError, match="1 rows of `identity` for 2 of the manifest"):
        audit.find(_manifest(["g", "h"], ["train"] * 2), _identity(exact=[0]))


# --- gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["group_id", "patient_id", "study_id"])
def test_gate_names_who_crosses(column):
    frame = pd.DataFrame(
        {
            "group_id": ["g1", "g2", "g3"],
            "patient_id": ["p1", "p2", "p3"],
            "study_id": ["s1", "s2", "s3"],
            "split": ["train", "test", "valid"],
        }
    )
    checked = audit.gate(frame)
    assert checked.columns.tolist() == ["check", "looked_at", "found", "images", "accepted"]
    assert checked["check"].tolist() == ["leak_patient", "leak_study", "leak_group"]
    assert checked["looked_at"].eq(3).all() and checked[["found", "images"]].eq(0).all(axis=None)
    frame.loc[1, column] = frame.loc[0, column]
    with pytest.raises(audit.LeakError, match=rf"1 of 2 values of {column} lie in several splits: .1 in test\+train"):
        audit.gate(frame)


@pytest.mark.parametrize(
    ("identity", "message", "leak"),
    [
        (_identity(["black", "", "black"]), r"2 of 3 images: entirely black.*\(black\): \['0.png', '2.png'\]", False),
        (_identity(["", "constant", ""]), r"1 of 3 images: .*\(constant\): \['1.png'\]. Leave these images out", False),
        (_identity(exact=[0, 0, 2]), r"label_conflict\): \['0.png', '1.png'\] \(a \| b\)", False),
        (_identity(exact=[0, 1, 0]), r"leak_duplicate\): \['0.png', '2.png'\]. Split by `group_id`", True),
        (_identity(exact=[0, 1, 2], near=[0, 1, 0]), r"leak_near_duplicate\): \['0.png', '2.png'\]", True),
    ],
)
def test_gate_closes_names_the_offenders_and_opens_where_it_is_accepted(identity, message, leak):
    manifest = _manifest(list("ghi"), ["train", "train", "test"], labels=[0, 1, 0])
    with pytest.raises(audit.GateError, match=message) as caught:
        audit.gate(manifest, identity, LABELS)
    assert isinstance(caught.value, audit.LeakError) == leak
    kind = next(kind for kind in audit.FAILING if f"({kind})" in str(caught.value))
    checked = audit.gate(manifest, identity, LABELS, accepted=[kind]).set_index("check")
    assert set(checked.index) == set(audit.FAILING)
    assert checked["found"].to_dict() == {other: int(other == kind) for other in checked.index}
    assert checked.index[checked["accepted"]].tolist() == [kind]
    with pytest.raises(audit.GateError):
        audit.gate(manifest, identity, LABELS, accepted=[other for other in audit.FAILING if other != kind])


def test_gate_lets_copies_within_a_split_through():
    manifest = _manifest(list("ghij"), ["train", "train", "test", "test"])
    checked = audit.gate(manifest, _identity(exact=[0, 0, 2, 3], near=[0, 0, 2, 2]), LABELS)
    assert checked["found"].eq(0).all() and not checked["accepted"].any()


def test_gate_names_every_kind_and_only_the_first_offenders():
    count = 30
    manifest = _manifest([str(row // 2) for row in range(count)], ["train", "test"] * 15)
    with pytest.raises(audit.LeakError) as caught:
        audit.gate(manifest, _identity(["black"] * count))
    text = str(caught.value)
    assert "15 of 15 values of group_id" in text and "4 in test+train. Split" in text and "5 in test" not in text
    assert "['0.png', '1.png', '2.png']" in text and text.endswith("accept knowingly: black, leak_group.")


@pytest.mark.parametrize("column", ["group_id", "split"])
def test_gate_refuses_rows_that_it_cannot_vouch_for(column):
    manifest = _manifest(["g", "h"], ["train"] * 2)
    manifest[column] = ["g", pd.NA]
    with pytest.raises(ValueError, match=f"1 rows have no `{column}`"):
        audit.gate(manifest)


@pytest.mark.parametrize("kind", ["blak", "exact_duplicate", "shortcut"])
def test_gate_accepts_only_what_could_close_it(kind):
    with pytest.raises(ValueError, match=rf"names \['{kind}'\]; expected some of leak_duplicate"):
        audit.gate(_manifest(["g"], ["train"]), accepted=[kind])


def test_kinds_all_have_a_mend():
    assert list(audit.KINDS) == list(audit.MENDS) and set(audit.FAILING) < set(audit.KINDS)


# --- deduplicate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ("keep_all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("drop_all", [0, 7]),
        ("one_per_label_set", [0, 1, 2, 5, 7]),
        ("all_zero_and_all_one", [0, 1, 5, 7]),
    ],
)
def test_deduplicate_policies_by_hand(policy, kept):
    nan = np.nan
    manifest = pd.DataFrame({"a": [0, 0, 1, 1, 0, 1, nan, 0], "b": [0, 0, 0, 0, 0, 1, 0, 0]}, index=list("abcdefgh"))
    identity = _identity(["", "black", "black", "black", "constant", "black", "black", ""])
    rows = audit.deduplicate(manifest, identity, LABELS, policy=policy)
    assert rows.dtype == bool and np.flatnonzero(rows).tolist() == kept


@pytest.mark.parametrize("policy", audit.POLICIES)
def test_deduplicate_keeps_every_row_that_shows_something(policy):
    manifest = _manifest(["g"] * 3, ["train"] * 3)
    assert audit.deduplicate(manifest, _identity(exact=[0, 0, 0]), LABELS, policy=policy).all()
    assert audit.deduplicate(manifest.head(0), _identity(exact=[]), LABELS, policy=policy).shape == (0,)


def test_deduplicate_unknown_policy_and_other_images_are_refused():
    manifest = _manifest(["g"], ["train"])
    with pytest.raises(ValueError, match="'drop'; expected one of keep_all, drop_all"):
        audit.deduplicate(manifest, _identity(exact=[0]), LABELS, policy="drop")
    with pytest.raises(ValueError, match="2 rows of `identity` for 1"):
        audit.deduplicate(manifest, _identity(exact=[0, 1]), LABELS, policy="drop_all")


# --- crossing --------------------------------------------------------------------------------------------------------


def test_crossing_counts_by_hand():
    # g1 is in all three splits, g2 in train and test, g3 in test only, g4 in valid only.
    groups = ["g1", "g2", "g1", "g4", "g1", "g1", "g2", "g3"]
    table = audit.crossing(_manifest(groups, ["train"] * 2 + ["valid"] * 2 + ["test"] * 4))
    assert table.index.tolist() == ["valid", "test"]
    assert table.loc["valid"].tolist() == [2, 2, 1, 1, 0.5]
    assert table.loc["test"].tolist() == [4, 3, 2, 3, 0.75]


def test_crossing_of_a_clean_split_is_zero_and_of_train_alone_empty():
    clean = audit.crossing(_manifest(["g1", "g2"], ["train", "test"]))
    assert clean.loc["test", ["groups_in_train", "images_in_train", "share_in_train"]].tolist() == [0, 0, 0]
    alone = audit.crossing(_manifest(["g1"], ["train"]))
    assert alone.empty and list(alone.columns) == list(clean.columns)


def test_crossing_without_groups_is_refused():
    with pytest.raises(ValueError, match="1 rows have no `group_id`; fill it with `assign_groups`"):
        audit.crossing(_manifest(["g", pd.NA], ["train", "test"]))
