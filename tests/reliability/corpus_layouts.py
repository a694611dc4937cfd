"""Damaged folders and manifests: lists, links and names of files that no layout has, and paths that lead elsewhere."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from kerasmed import audit, datasets
from kerasmed.datasets import brain, chest, lumbar, mura, tritask
from tests.reliability.corpus_tables import (
    ASIDE,
    REFUSED,
    RIGHT,
    Case,
    by_cells,
    edit,
    read_manifest,
    read_patients,
    refused,
    replaced,
    table_of,
)

# --- folders ---------------------------------------------------------------------------------------------------------


def folders() -> Iterator[Case]:
    """Layouts: lists, folders, links and names of files."""
    entries = table_of("chest/Data_Entry_2017_v2020.csv")
    for name in chest.LISTS.values():
        path = f"chest/{name}"
        yield Case(
            "a list of the split missing",
            "chest",
            lambda root, path=path: (root / path).unlink(),
            entries.read,
            REFUSED,
            "is absent; the official split wants",
            name,
        )
        yield Case(
            "a list of the split cut off",
            "chest",
            edit(path, lambda text: text[: len(text) // 2]),
            entries.read,
            REFUSED,
            "images that are neither in .*; add them to one",
            name,
        )
        yield Case(
            "a list of the split that is no text",
            "chest",
            edit(path, lambda text: text.encode("utf-16")),
            entries.read,
            REFUSED,
            "not in UTF-8",
            name,
        )
        yield Case(
            "a list of the split as a folder",
            "chest",
            replaced(path, Path.mkdir),
            entries.read,
            REFUSED,
            "is a folder; put a file there",
            name,
        )
        for change in (
            lambda text: "\ufeff" + text.replace("\n", "\r\n"),
            lambda text: f"\n\n{text} \n\n",
            lambda text: text.replace("\n", "\r"),
        ):
            yield Case("a list of the split with other line ends", "chest", edit(path, change), entries.read, RIGHT)
        yield Case(
            "a name in the lists that no table has",
            "chest",
            edit(path, lambda text: f"{text}\nx.png\n"),
            entries.read,
            ASIDE,
            r"1 images of the official lists are not in .*\['x.png'\]",
        )
    yield Case(
        "an image in both lists",
        "chest",
        _both_lists,
        entries.read,
        REFUSED,
        "are in .* and in .*keep each in one",
        "test_list.txt",
    )
    yield Case(
        "two tables of labels",
        "chest",
        lambda root: shutil.copy(root / entries.path, root / "chest/Data_Entry_2017.csv"),
        entries.read,
        REFUSED,
        "which may differ; keep one",
        "Data_Entry_2017.csv",
    )
    yield Case(
        "a suffix in upper case",
        "chest",
        _upper("chest", "*.png"),
        entries.read,
        ASIDE,
        "image files are not in the table and were left out",
        expect=lambda sound: sound.assign(
            image_path="chest/images/" + sound["image_path"].str.rpartition("/")[2], present=False
        ),
    )
    for tree, read in (("mura", mura.read), ("tritask", _tritask_upper), ("brain", _patients_apart)):
        pattern = "*.jpg" if tree == "brain" else "*.png"
        yield Case("a suffix in upper case", tree, _upper(tree, pattern), read, RIGHT, expect=_upper_paths)
    for tree, read in (
        ("chest", chest.read_table),
        ("lumbar", lumbar.read),
        ("mura", mura.read),
        ("tritask", tritask.read),
        ("brain", read_patients),
        ("manifest", read_manifest),
    ):
        yield Case("a data root that is a link", tree, lambda root: None, _through_link(read), RIGHT)
        yield Case("a folder of a system that is a link", tree, _linked_system, read, RIGHT)
    for tree, read, place in (
        ("mura", mura.read, "mura/MURA-v1.1/train"),
        ("tritask", tritask.read, "tritask/val_images"),
        ("chest", chest.read_table, "chest/images_001"),
        ("lumbar", lumbar.read, "lumbar/train_images"),
        ("brain", read_patients, "brain/alzheimer/train"),
        ("manifest", read_manifest, "set/images"),
    ):
        yield Case("a folder of images that is a link", tree, _linked(place), read, RIGHT)
    yield Case("an image that is a link", "tritask", _linked("tritask/train_images/*.png"), tritask.read, RIGHT)
    yield Case("an image that is a link", "brain", _linked("brain/alzheimer/train/*/*.jpg"), read_patients, RIGHT)
    yield Case("an image that is a link", "mura", _linked("mura/MURA-v1.1/*/*/*/*/image*.png"), mura.read, RIGHT)
    for tree, read, pattern in (
        ("tritask", tritask.read, "tritask/train_images/*.png"),
        ("brain", read_patients, "brain/alzheimer/train/*/*.jpg"),
        ("mura", mura.read, "mura/MURA-v1.1/valid/*/*/*/image*.png"),
        ("chest", chest.read_table, "chest/images_001/images/*.png"),
    ):
        yield Case("an image that is a link to nothing", tree, _broken(pattern), read, RIGHT)
        system = tree
        yield Case(
            "an image that is a link to nothing",
            tree,
            _broken(pattern),
            _checked(system),
            ASIDE,
            "absent|No such file|cannot be|not there",
        )
    for tree, read, pattern in (
        ("tritask", tritask.read, "tritask/train_images"),
        ("brain", read_patients, "brain/alzheimer/train/MildDemented"),
        ("mura", mura.read, "mura/MURA-v1.1/valid/*/*/study*"),
    ):
        yield Case(
            "a name that is not in UTF-8",
            tree,
            _odd_name(pattern, b"sch\xe4del.png"),
            read,
            REFUSED,
            "is not in UTF-8 in 1 of .*: rename the file",
            "udce4del.png",
        )
    yield Case(
        "a study of both labels", "mura", _both_labels, mura.read, REFUSED, "both positive and negative", "study"
    )
    yield Case(
        "a folder that no layout has",
        "mura",
        lambda root: (root / "mura/MURA-v1.1/train/XR_HAND/p1").mkdir(),
        mura.read,
        REFUSED,
        "1 folders below .* do not fit the layout; .*Rename them so",
        "XR_HAND/p1",
    )
    yield Case(
        "a folder that no layout has",
        "brain",
        lambda root: (root / "brain/alzheimer/train/Mild").mkdir(),
        read_patients,
        REFUSED,
        "is no class of alzheimer; rename it",
        "train/Mild",
    )
    yield Case(
        "a folder that no layout has",
        "brain",
        lambda root: (root / "brain/alzheimer/Test").mkdir(),
        read_patients,
        ASIDE,
        r"1 entries .*were left out: \['brain/alzheimer/Test'\]",
    )
    yield Case(
        "an image without a row",
        "tritask",
        lambda root: shutil.copy(
            next((root / "tritask/val_images").glob("*.png")), root / "tritask/val_images/more.png"
        ),
        tritask.read,
        REFUSED,
        "no row for 1 of 11 images beside it; add the rows",
        "more.png",
    )
    yield Case("a row without an image", "tritask", _gone("tritask/train_images/*.png"), tritask.read, RIGHT)
    yield Case(
        "a row without an image",
        "tritask",
        _gone("tritask/train_images/*.png"),
        _checked("tritask"),
        ASIDE,
        "absent|No such file",
    )
    yield Case(
        "a row without an image",
        "chest",
        _gone("chest/images_001/images/*.png"),
        chest.read,
        ASIDE,
        "1 of .* images listed are absent|[0-9]+ of .* images listed are absent and were left out",
        expect=_without_first("image_path", "chest/images_001/"),
    )
    yield Case(
        "a row without an image",
        "lumbar",
        _gone("lumbar/train_images/*/*"),
        lumbar.read,
        ASIDE,
        "1 described series are not there, .*were left out",
        expect=_without_first("series_path", "lumbar/train_images/"),
    )


def _without_first(column: str, start: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """The sound table without the row of the first file or folder below `start`."""

    def change(sound):
        gone = min(path for path in sound[column] if path.startswith(start))
        return sound[sound[column] != gone].reset_index(drop=True)

    return change


def _both_lists(root: Path) -> None:
    train, test = (root / "chest" / name for name in chest.LISTS.values())
    test.write_text(test.read_text() + "\n" + train.read_text().splitlines()[0])


def _upper(tree: str, pattern: str) -> Callable[[Path], None]:
    def damage(root):
        for path in sorted((root / tree).rglob(pattern)):
            if path.name[0] != ".":
                path.rename(path.with_suffix(path.suffix.upper()))
        if tree == "tritask":
            for name in ("train_labels.csv", "val_labels.csv", "sample_submission.csv"):
                (root / tree / name).write_text((root / tree / name).read_text().replace(".png", ".PNG"))
        for path in root.glob("brain/*/patients.csv"):
            path.unlink()

    return damage


def _tritask_upper(root: Path) -> pd.DataFrame:
    return tritask.read(root)


def _patients_apart(root: Path) -> pd.DataFrame:
    """The images of both tasks, without ids."""
    return pd.concat([brain.read(root, task) for task in brain.TASKS]).drop(columns=["patient_id", "group_id"])


def _upper_paths(sound: pd.DataFrame) -> pd.DataFrame:
    paths = sound["image_path"].str.replace(r"\.(png|jpg)$", lambda found: found[0].upper(), regex=True)
    return sound.assign(image_path=paths)


def _through_link(read: Callable[[Path], pd.DataFrame]) -> Callable[[Path], pd.DataFrame]:
    def call(root):
        link = root.with_name(f"{root.name}-link")
        if not link.is_symlink():
            link.symlink_to(root)
        return read(link)

    return call


def _linked(pattern: str) -> Callable[[Path], None]:
    """Move what a pattern finds to another disk, as it were, and leave links."""

    def damage(root):
        disk = root.with_name(f"{root.name}-disk")
        disk.mkdir()
        for number, path in enumerate(sorted(root.glob(pattern))):
            path.rename(disk / f"{number}{path.suffix}")
            path.symlink_to(disk / f"{number}{path.suffix}")

    return damage


def _linked_system(root: Path) -> None:
    _linked("*")(root)


def _first(root: Path, pattern: str) -> Path:
    return sorted(path for path in root.glob(pattern) if path.name[0] != ".")[0]


def _broken(pattern: str) -> Callable[[Path], None]:
    def damage(root):
        path = _first(root, pattern)
        path.unlink()
        path.symlink_to("nowhere")

    return damage


def _gone(pattern: str) -> Callable[[Path], None]:
    def damage(root):
        path = _first(root, pattern)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _odd_name(pattern: str, name: bytes) -> Callable[[Path], None]:
    return lambda root: (_first(root, pattern) / os.fsdecode(name)).touch()


def _both_labels(root: Path) -> None:
    path = _first(root, "mura/MURA-v1.1/valid/*/*/study1_*")
    other = {"positive": "negative", "negative": "positive"}[path.name.partition("_")[2]]
    shutil.copytree(path, path.with_name(f"study1_{other}"))


def _checked(system: str) -> Callable[[Path], pd.DataFrame]:
    """What `check` finds, noted as warnings, and the counts."""

    def call(root):
        counts, problems = datasets.check(system, root, jobs=1)
        for row in problems.itertuples():
            logging.getLogger("kerasmed").warning("%s: %s", row.file, row.problem)
        return counts

    return call


# --- manifests -------------------------------------------------------------------------------------------------------


def manifests() -> Iterator[Case]:
    """Manifests of somebody else: where their paths lead, and what their labels and splits are."""
    table = table_of("set/m.csv")
    for value in (
        "../secret.png",
        "images/../../secret.png",
        "a/../../b.png",
        "..",
        "/etc/passwd",
        "/",
        "C:\\x.png",
        "C:/x.png",
        "\\\\server\\x.png",
        "..\\x.png",
        "~/x.png",
        "~",
    ):
        yield refused(
            "a path out of the data root", table, "image_path", value, "leaves the data root in 1 of .*: use paths"
        )
    for value in ("https://x.org/a.png", "file:///etc/passwd", "s3://b/a.png"):
        yield refused("a URL for a path", table, "image_path", value, "is a URL in 1 of .*: download the files")
    for value in ("", " ", "\t", "\u3000"):
        yield refused("a blank path", table, "image_path", value, "is empty in 1 of .*: give every row a path")
    for value in ("images\\a.png", "train\\b\\c.png"):
        yield refused("backslashes in a path", table, "image_path", value, "has backslashes in 1 of .*: write '/'")
    for value in ("images//a.png", "images/./a.png", "images/", "."):
        yield refused(
            "a path in another form", table, "image_path", value, "a folder '.' or one without a name in 1 of"
        )
    sound = by_cells(lambda frame: frame.assign(image_path="./" + frame["image_path"]))
    yield Case("a path in another form", "manifest", edit(table.path, sound), table.read, RIGHT)
    yield Case("absolute paths that lie in the data root", "manifest", _absolute, table.read, RIGHT)
    for value in ("2", "-1", "yes", "0.5"):
        damage = edit(
            table.path,
            by_cells(
                lambda frame, value=value: frame.rename(columns={"label": "ill"}).assign(
                    ill=[value, *["0", "1"] * ((len(frame) - 1) // 2), *["0"] * ((len(frame) - 1) % 2)]
                )
            ),
        )
        yield Case(
            "a column of labels with another value",
            "manifest",
            damage,
            _alone,
            ASIDE,
            "left alone: .*ill",
            expect=lambda sound: sound.iloc[:, :5],
        )
    for value in ("Train", "training", "=cmd|' /C calc'!A0", "<b>x</b>"):
        damage = edit(
            table.path, by_cells(lambda frame, value=value: frame.assign(split=frame["split"].replace("train", value)))
        )
        yield Case(
            "splits of other names",
            "manifest",
            damage,
            table.read,
            RIGHT,
            expect=lambda sound, value=value: sound.assign(split=sound["split"].replace("train", value)),
        )
        damage = edit(
            table.path,
            by_cells(lambda frame, value=value: frame.assign(label=frame["label"].replace("MildDemented", value))),
        )
        yield Case(
            "labels of other names",
            "manifest",
            damage,
            table.read,
            RIGHT,
            expect=lambda sound, value=value: _relabelled(sound, value),
        )
    for value in ("NA", "None", "null"):
        damage = edit(table.path, by_cells(lambda frame, value=value: frame.assign(patient_id=value)))
        yield Case(
            "ids spelt as if missing",
            "manifest",
            damage,
            table.read,
            RIGHT,
            expect=lambda sound, value=value: sound.assign(patient_id=pd.array([value] * len(sound), dtype="str")),
        )
    damage = edit(table.path, by_cells(lambda frame: frame.assign(label=["split", *frame["label"][1:]])))
    yield Case(
        "a label with the name of a column",
        "manifest",
        damage,
        table.read,
        REFUSED,
        "names of columns; rename",
        "split",
    )


def _absolute(root: Path) -> None:
    change = by_cells(lambda frame: frame.assign(image_path=f"{root}/set/" + frame["image_path"]))
    edit("set/m.csv", change)(root)


def _relabelled(sound: pd.DataFrame, value: str) -> pd.DataFrame:
    renamed = sound.rename(columns={"MildDemented": value})
    return renamed[[*renamed.columns[:5], *sorted(renamed.columns[5:])]]


def _alone(root: Path) -> pd.DataFrame:
    """What `audit.index` reads, its line of what it left alone noted as a warning."""
    _, table, class_names, taken = audit.index(root / "set/m.csv")
    logging.getLogger("kerasmed").warning("%s", taken)
    return table[["image_path", "patient_id", "study_id", "group_id", "split", *class_names]]
