"""Tiny trees of tables for fuzzing, and what must hold of whatever a table's bytes are.

Run as a program it is fuzzed by atheris, led by coverage: `python fuzzed_tables.py FOLDER COUNTS [libFuzzer options]`.
"""

import csv
import io
import json
import logging
import math
import os
import sys
from collections import Counter
from pathlib import Path

ENTRIES = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,Width,Height\n"
GRADES = "Normal/Mild"
KNOWN = ("ValueError", "FileNotFoundError", "PermissionError")


def plant(root: Path) -> list[tuple[str, str]]:
    """Write a tiny tree of each system that has tables; its images are empty, as no reader of tables opens one.

    Returns:
        The table's path below `root` and the reader's name, a pair for each.
    """
    from kerasmed.datasets import lumbar

    files = {
        "tritask/train_labels.csv": "id,label1,label2,label3\na.png,1,0,1\nb.png,0,0,0\n",
        "tritask/val_labels.csv": "id,label1,label2,label3\nc.png,0,1,1\n",
        "tritask/sample_submission.csv": "id,label1,label2,label3\nd.png,0,0,0\n",
        "chest/Data_Entry_2017.csv": ENTRIES
        + "1_0.png,Mass|Edema,0,1,058Y,M,PA,2,3\n2_0.png,No Finding,0,2,40,F,AP,2,3\n",
        "chest/train_val_list.txt": "1_0.png\n",
        "chest/test_list.txt": "2_0.png",
        "chest/BBox_List_2017.csv": "Image Index,Finding Label,Bbox [x,y,w,h],,,\n2_0.png,Mass,1,2.5,3,4\n",
        "lumbar/train.csv": f"study_id,{','.join(lumbar.TARGETS)}\n7{f',{GRADES}' * 24},Severe\n8{',Moderate' * 24},\n",
        "lumbar/train_series_descriptions.csv": "study_id,series_id,series_description\n"
        "7,1,Sagittal T1\n8,2,Axial T2\n",
        "lumbar/train_label_coordinates.csv": "study_id,series_id,instance_number,condition,level,x,y\n"
        "7,1,1,Spinal Canal Stenosis,L1/L2,1.5,2\n8,2,1,Left Subarticular Stenosis,L5/S1,3,4\n",
        "set/m.csv": "image_path,patient_id,split,label\na.png,p1,train,ill\nx/b.png,,test,\n",
    }
    images = ("tritask/train_images/a.png", "tritask/train_images/b.png", "tritask/val_images/c.png")
    images += ("tritask/test_images/d.png", "chest/images/1_0.png", "chest/images/2_0.png")
    images += ("lumbar/train_images/7/1/1.dcm", "lumbar/train_images/8/2/1.dcm")
    for path, text in {**files, **dict.fromkeys(images, "")}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return [
        ("tritask/train_labels.csv", "tritask"),
        ("tritask/sample_submission.csv", "tritask"),
        ("chest/Data_Entry_2017.csv", "chest"),
        ("chest/test_list.txt", "chest"),
        ("chest/BBox_List_2017.csv", "boxes"),
        ("lumbar/train.csv", "lumbar"),
        ("lumbar/train_series_descriptions.csv", "lumbar"),
        ("lumbar/train_label_coordinates.csv", "coordinates"),
        ("set/m.csv", "manifest"),
    ]


def read(root: Path, reader: str):
    """Read with a reader by its name: the table, and the names of its labels where it is a manifest."""
    from kerasmed import audit
    from kerasmed.datasets import chest, lumbar, tritask

    if reader == "manifest":
        _, table, class_names, _ = audit.index(root / "set/m.csv")
        return table, class_names
    if reader in ("boxes", "coordinates"):
        return {"boxes": chest.read_boxes, "coordinates": lumbar.read_coordinates}[reader](root), None
    module = {"tritask": tritask, "chest": chest, "lumbar": lumbar}[reader]
    return module.read(root), next(iter(module.CLASS_NAMES.values()))


def outcome(root: Path, path: str, reader: str, content: bytes) -> str:
    """Write a table's bytes, read it, and say what came of it; raises AssertionError where that must not come."""
    (root / path).write_bytes(content)
    try:
        table, class_names = read(root, reader)
    except (ValueError, OSError) as error:
        text = str(error)
        assert type(error).__name__ in KNOWN, f"a bare {type(error).__name__}: {text}"
        # Of a path the column is named, of what is absent the folder.
        assert any(name in text for name in (Path(path).name, "image_path", str(root / path.split("/")[0]))), text
        return "refused with a reason"
    if class_names is None:
        numbers = table.select_dtypes("number").to_numpy(float)
        assert all(map(math.isfinite, numbers.ravel())), "a number that is none"
    else:
        check_contract(table, class_names, any_split=reader == "manifest")
    if reader in ("manifest", "boxes", "coordinates"):
        records = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows = sum(1 for cells in records if any(map(str.strip, cells))) - 1
        assert len(table) == rows, f"{rows} rows in the file, {len(table)} in the table"
    return "read right"


def check_contract(table, class_names, *, any_split: bool = False) -> None:
    """Hold a table against what `kerasmed.manifest` promises, by other means than its own."""
    paths = table["image_path"].tolist()
    assert len(set(paths)) == len(paths) > 0
    for path in paths:
        assert isinstance(path, str) and path.strip() and "\0" not in path and "\\" not in path, path
        assert path.encode() and os.path.normpath(f"/data root/{path}") == f"/data root/{path}", path
        assert "://" not in path and path.split("/")[0] != "~" and os.path.splitdrive(path)[0] == "", path
    assert any_split or set(table["split"]) <= {"train", "valid", "test"}
    for name in class_names:
        assert all(value is None or value in (0, 1) or value != value for value in table[name].tolist()), name


def main() -> None:
    """Fuzz every table; the first byte of an input says which."""
    import atheris

    folder, counts = Path(sys.argv[1]), Path(sys.argv[2])
    with atheris.instrument_imports(include=["kerasmed.tables", "kerasmed.manifest", "kerasmed.datasets"]):
        import kerasmed.datasets.chest
        import kerasmed.datasets.lumbar
        import kerasmed.datasets.tritask
        import kerasmed.manifest
        import kerasmed.tables  # noqa: F401
    logging.getLogger("kerasmed").setLevel(logging.ERROR)
    seen, sound = Counter(), {}
    tables = plant(folder / "tree")
    (folder / "corpus").mkdir()
    for number, (path, _) in enumerate(tables):
        sound[path] = (folder / "tree" / path).read_bytes()
        (folder / f"corpus/{number}").write_bytes(bytes([number]) + sound[path])

    def one(data):
        path, reader = tables[data[0] % len(tables) if data else 0]
        seen[outcome(folder / "tree", path, reader, data[1:])] += 1
        (folder / "tree" / path).write_bytes(sound[path])
        if sum(seen.values()) % 20 == 0:
            counts.write_text(json.dumps(seen))

    atheris.Setup([sys.argv[0], *sys.argv[3:], str(folder / "corpus")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
