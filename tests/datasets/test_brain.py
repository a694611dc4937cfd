import pytest

from kerasmed.datasets import brain


def test_read_lists_images_with_fixed_class_order(brain_root):
    frame = brain.read(brain_root, "brain_tumor")
    assert len(frame) == 48
    assert [name for name in frame.columns if name in brain.CLASS_NAMES["brain_tumor"]] == list(
        brain.CLASS_NAMES["brain_tumor"]
    )
    assert frame["image_path"].iloc[0] == "brain/brain_tumor/train/glioma_tumor/gl (0).jpg"
    assert frame["glioma_tumor"].iloc[0] == 1 and frame[list(brain.CLASS_NAMES["brain_tumor"])].to_numpy().sum() == 48
    assert frame["group_id"].isna().all() and set(frame["split"]) == {"train"}


def test_read_published_test_folder_where_present(brain_root):
    (brain_root / "brain/alzheimer/test/MildDemented").mkdir(parents=True)
    (brain_root / "brain/alzheimer/test/MildDemented/26 (19).jpg").write_bytes(b"x")
    assert (brain.read(brain_root, "alzheimer")["split"] == "test").sum() == 1


def test_read_leaves_junk_out_and_says_so(brain_root, caplog):
    folder = brain_root / "brain/alzheimer/train/MildDemented"
    for name in (".DS_Store", "._x.jpg", "notes.txt"):
        (folder / name).write_bytes(b"x")
    assert len(brain.read(brain_root, "alzheimer")) == 48
    assert "1 entries are no images" in caplog.text and "notes.txt" in caplog.text


def test_read_patients_csv_gives_groups(brain_root):
    home = brain_root / "brain/alzheimer"
    relative = [path.relative_to(home).as_posix() for path in sorted(home.rglob("*.jpg"))]
    lines = [f"{path},P{number // 4}" for number, path in enumerate(relative)]
    (home / "patients.csv").write_text("\ufeffimage_path,patient_id\r\n" + "\r\n".join(lines))
    frame = brain.read(brain_root, "alzheimer")
    assert frame["patient_id"].nunique() == 12 and (frame["group_id"] == frame["patient_id"]).all()
    (home / "patients.csv").write_text("image_path,patient_id\n" + "\n".join(lines[1:]))
    with pytest.raises(ValueError, match="gives no patient for 1 of 48 images"):
        brain.read(brain_root, "alzheimer")
    (home / "patients.csv").write_text(
        "image_path,patient_id,note\n" + "\n".join(f"{line},x\n{line},y" for line in lines)
    )
    assert brain.read(brain_root, "alzheimer")["patient_id"].nunique() == 12
    (home / "patients.csv").write_text("image_path,patient_id\n" + "\n".join([*lines, f"{relative[0]},P99"]))
    with pytest.raises(ValueError, match="gives 1 images two patients"):
        brain.read(brain_root, "alzheimer")
    (home / "patients.csv").write_text("file,patient\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['image_path', 'patient_id'\]"):
        brain.read(brain_root, "alzheimer")


def test_read_patients_csv_of_images_that_are_not_there_is_counted(brain_root, caplog):
    home = brain_root / "brain/alzheimer"
    lines = [f"{path.relative_to(home).as_posix()},P{number}" for number, path in enumerate(home.rglob("*.jpg"))]
    (home / "patients.csv").write_text("\n".join(["image_path,patient_id", *lines, "train/gone.jpg,P0"]))
    assert len(brain.read(brain_root, "alzheimer")) == 48
    assert "1 images of" in caplog.text and "are not there and were left out: ['train/gone.jpg']" in caplog.text
    (home / "patients.csv").write_bytes(b"image_path,patient_id\n\xe4,P0\n")
    with pytest.raises(ValueError, match="patients.csv is not in UTF-8 .byte 0xe4 in line 2"):
        brain.read(brain_root, "alzheimer")


def test_read_what_lies_beside_splits_and_classes_is_counted(brain_root, caplog):
    (brain_root / "brain/alzheimer/Test").mkdir()
    (brain_root / "brain/alzheimer/train/loose.jpg").touch()
    assert len(brain.read(brain_root, "alzheimer")) == 48
    assert "2 entries are no images by their suffix, or no split, and were left out" in caplog.text
    assert "'brain/alzheimer/Test', 'brain/alzheimer/train/loose.jpg'" in caplog.text


def test_read_unknown_class_folder_is_refused(brain_root):
    (brain_root / "brain/alzheimer/train/Mild").mkdir()
    with pytest.raises(ValueError, match="train/Mild in .* is no class of alzheimer; rename it to one of NonDemented"):
        brain.read(brain_root, "alzheimer")


def test_read_empty_class_is_refused(brain_root):
    for path in (brain_root / "brain/brain_tumor/train/no_tumor").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="has no image of no_tumor"):
        brain.read(brain_root, "brain_tumor")


def test_read_missing_folder_and_unknown_task_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images of alzheimer"):
        brain.read(tmp_path, "alzheimer")
    with pytest.raises(ValueError, match="task 'stroke' is unknown"):
        brain.read(tmp_path, "stroke")


def test_read_real_counts(real_data):
    if (real_data / "brain/alzheimer/test").exists():
        pytest.skip("counts below are of the training folders alone")
    counts = brain.read(real_data, "alzheimer")[list(brain.CLASS_NAMES["alzheimer"])].sum().tolist()
    assert counts == [2560, 1792, 717, 52]
    assert brain.read(real_data, "brain_tumor")[list(brain.CLASS_NAMES["brain_tumor"])].sum().tolist() == [
        395,
        826,
        822,
        827,
    ]
