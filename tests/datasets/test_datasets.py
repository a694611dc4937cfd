import os
from pathlib import Path

import pytest

from kerasmed import datasets, paths
from kerasmed.datasets import brain, chest, tritask

TINY = {"synthetic_patients_per_class": 3, "synthetic_slices_per_patient": 1}
TINY_CHEST = {"patients": 20, "image_side": 48}
TINY_TRITASK = {"train_images": 16, "valid_images": 10, "test_images": 10, "black_share": 0.5}


@pytest.fixture
def tritask_root(tmp_path):
    """A synthetic set without its marks, as if real: 16, 10 and 10 images, half of them black."""
    root = datasets.write_synthetic("tritask", tmp_path / "tritask-data", **TINY_TRITASK)
    for name in datasets.SYNTHETIC_FILES:
        (root / "tritask" / name).unlink()
    return root


@pytest.mark.parametrize("system", datasets.SYSTEMS)
def test_reader_states_what_a_system_s_module_must(system, tmp_path):
    module = datasets.reader(system)
    assert isinstance(module.EXCLUSIVE, bool) and module.folder(tmp_path) is None
    assert set(module.ARCHIVE_FOLDERS) <= set(module.SOURCES) <= set(module.CLASS_NAMES)
    for part in module.CLASS_NAMES:
        assert module.part_folder(tmp_path, part).is_relative_to(tmp_path / system)
    assert all(isinstance(name, str) for name in module.TABLES) and module.LAYOUT.startswith(f"{system}/")


def test_locate_auto_takes_real_data_where_present(brain_root):
    assert datasets.locate("brain", {"data_source": "auto"}, data_root=brain_root) == (brain_root, "real")


def test_locate_auto_writes_a_synthetic_set_where_no_root_was_named(tmp_path, monkeypatch):
    (tmp_path / "project/notebooks/params").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    source = datasets.locate("brain", {"data_source": "auto", **TINY})
    assert source.kind == "synthetic" and source.root.is_relative_to(paths.cache_root())
    assert (
        datasets.truth("brain", source)["ceiling"]
        and datasets.locate("brain", {"data_source": "auto", **TINY}) == source
    )
    assert datasets.locate("brain", {"data_source": "synthetic", **TINY, "synthetic_seed": 1}).root != source.root


def test_locate_synthetic_set_of_another_version_is_another_set(monkeypatch):
    first = datasets.locate("brain", {"data_source": "synthetic", **TINY})
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.name == "brain.py"))
    second = datasets.locate("brain", {"data_source": "synthetic", **TINY})
    assert first.root != second.root and first.root.is_dir() and second.root.is_dir()


@pytest.mark.parametrize("data_source", ["auto", "real"])
def test_locate_named_root_without_data_never_falls_back(tmp_path, data_source):
    with pytest.raises(
        FileNotFoundError, match="no brain data under .*typo; expected brain/.*kerasmed data fetch brain"
    ):
        datasets.locate("brain", {"data_source": data_source, **TINY}, data_root=tmp_path / "typo")


@pytest.mark.parametrize("data_source", ["auto", "real"])
def test_locate_without_a_public_link_says_to_lay_files_out_by_hand(tmp_path, data_source):
    with pytest.raises(FileNotFoundError, match="no tritask data under .*expected tritask/.*No public link") as caught:
        datasets.locate("tritask", {"data_source": data_source}, data_root=tmp_path / "typo")
    assert "kerasmed data fetch" not in str(caught.value)


def test_locate_writes_and_finds_tritask(tritask_root):
    options = {f"synthetic_{name}": value for name, value in TINY_TRITASK.items()}
    source = datasets.locate("tritask", {"data_source": "synthetic", **options})
    assert source.kind == "synthetic" and len(tritask.read(source.root)) == 36
    assert datasets.truth("tritask", source)["black_images"] == {"train": 8, "valid": 5, "test": 5}
    assert datasets.locate("tritask", {"data_source": "real"}, data_root=tritask_root) == (tritask_root, "real")


def test_locate_synthetic_set_never_passes_for_real(tmp_path):
    root = datasets.write_synthetic("brain", tmp_path / "s", patients_per_class=3, slices_per_patient=1)
    assert datasets.locate("brain", {"data_source": "auto"}, data_root=root).kind == "synthetic"
    with pytest.raises(ValueError, match="holds a synthetic set"):
        datasets.locate("brain", {"data_source": "real"}, data_root=root)


def test_locate_data_root_beside_synthetic_is_refused(brain_root):
    with pytest.raises(ValueError, match="would ignore it; add -p data_source=real"):
        datasets.locate("brain", {"data_source": "synthetic", **TINY}, data_root=brain_root)


def test_locate_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'brian' is unknown; known are brain, chest, lumbar, mura, tritask"):
        datasets.locate("brian", {"data_source": "auto"})
    with pytest.raises(ValueError, match="expected one of auto, real, synthetic"):
        datasets.locate("brain", {"data_source": "fake"})


def test_fingerprint_sees_every_change_and_no_junk(brain_root):
    source = datasets.Source(brain_root, "real")
    first = datasets.fingerprint("brain", source)
    (brain_root / "brain/.DS_Store").write_bytes(b"x")
    assert datasets.fingerprint("brain", source) == first
    path = next((brain_root / "brain").rglob("*.jpg"))
    os.utime(path, (1, 1))
    second = datasets.fingerprint("brain", source)
    path.rename(path.with_name("renamed.jpg"))
    path.symlink_to("nowhere")
    assert len({first, second, datasets.fingerprint("brain", source)}) == 3


def test_files_follows_links_but_not_round_and_round(tmp_path, caplog):
    for name in ("set/a/1.png", "set/b/2.png", "disk/3.png", "disk/deep/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    home = tmp_path / "set"
    (home / "far").symlink_to("../disk")
    (home / "a/up").symlink_to("..")  # 2 links round: 2 to the power of 40 files, were they followed
    (home / "b/up").symlink_to("..")
    (home / "gone.png").symlink_to("nowhere")
    (home / "self.png").symlink_to("self.png")
    found = [os.path.relpath(entry.path, home) for entry in datasets.files(home)]
    assert found == ["a/1.png", "b/2.png", "far/3.png", "far/deep/4.png", "gone.png", "self.png"]
    assert caplog.text.count("is a link to a folder that it lies in") == 2 and "set/b/up is a link" in caplog.text
    (tmp_path / "elsewhere").symlink_to("set")
    assert len(list(datasets.files(tmp_path / "elsewhere"))) == 6


def test_names_that_are_not_in_utf_8_are_refused_or_told(brain_root):
    odd = os.fsdecode(b"sch\xe4del.jpg")
    (brain_root / "brain/alzheimer" / odd).touch()
    _, problems = datasets.check("brain", brain_root, jobs=1)
    assert problems["file"].tolist() == [r"brain/alzheimer/sch\xe4del.jpg"]
    before = datasets.fingerprint("brain", datasets.Source(brain_root, "real"))
    (brain_root / "brain/alzheimer" / odd).write_bytes(b"x")
    assert datasets.fingerprint("brain", datasets.Source(brain_root, "real")) != before
    for name in ("alzheimer/train/MildDemented", "brain_tumor"):
        with pytest.raises(ValueError, match=r"an image below .* is not in UTF-8 in 1 of .*'.*sch\\udce4del.jpg'"):
            (brain_root / "brain" / name / odd).touch()
            datasets.image_files(brain_root / "brain" / name)
    with pytest.raises(ValueError, match="the name of the image is not in UTF-8"):
        datasets.image_files(brain_root / "brain/alzheimer" / odd)
    with pytest.raises(ValueError, match="the path of a file below .*alzheimer is not in UTF-8 in 1 of 49 rows"):
        brain.read(brain_root, "alzheimer")


def test_check_counts_and_names_what_is_wrong(brain_root):
    counts, problems = datasets.check("brain", brain_root)
    assert counts["images"].sum() == 96 and problems.empty
    (brain_root / "brain/alzheimer/train/MildDemented/zero.jpg").write_bytes(b"")
    (brain_root / "brain/brain_tumor/train/Unknown").mkdir()
    _, problems = datasets.check("brain", brain_root)
    assert problems["part"].tolist() == ["alzheimer", "brain_tumor"]
    assert "empty file" in problems["problem"][0] and "is no class of brain_tumor" in problems["problem"][1]
    (brain_root / "brain/brain_tumor/train/Unknown").rmdir()
    (brain_root / "brain/brain_tumor/train/Thumbs.db").write_bytes(b"x")
    (brain_root / "brain/brain_tumor/train/no_tumor/more").mkdir()
    (brain_root / "brain/brain_tumor/train/no_tumor/more/a.jpg").write_bytes(b"x")
    _, problems = datasets.check("brain", brain_root)
    left_out = problems[problems["problem"].str.startswith("left out")]["file"].tolist()
    assert left_out == ["brain/brain_tumor/train/Thumbs.db", "brain/brain_tumor/train/no_tumor/more/a.jpg"]
    assert datasets.check("brain", brain_root / "nowhere")[1]["problem"][0].startswith("no data")


def test_check_counts_labels_and_unlabelled_images(tritask_root):
    (tritask_root / "tritask/train_labels.csv").write_text(
        "id,label1,label2,label3\n"
        + "".join(f"{number:05d}.png,{','.join('110' if number <= 3 else '000')}\n" for number in range(1, 17))
    )
    counts, problems = datasets.check("tritask", tritask_root)
    assert problems.empty and counts["part"].unique().tolist() == ["scans"]
    table = counts.pivot(index="class", columns="split", values="images")
    assert counts["split"].unique().tolist() == ["train", "valid", "test"]
    assert table["train"].to_dict() == {
        "label1": 3,
        "label2": 3,
        "label3": 0,
        "(none)": 13,
        "(no label)": 0,
        "(all images)": 16,
    }
    assert table.loc[["label1", "(none)", "(no label)", "(all images)"], "test"].tolist() == [0, 0, 10, 10]


def test_check_of_one_layout_for_all_parts_names_what_is_wrong(tritask_root):
    home = tritask_root / "tritask"
    (home / "train_images/00001.png").unlink()
    (home / "val_images/00017.png").write_bytes(b"")
    (home / "val_images/more").mkdir()
    (home / "val_images/more/a.png").write_bytes(b"x")
    (home / "truth.csv").write_text("x")  # no part of a real set
    (home / "train_images/.DS_Store").write_bytes(b"x")
    _, problems = datasets.check("tritask", tritask_root)
    assert problems["file"].tolist() == [
        "tritask/train_images/00001.png",
        "tritask/val_images/00017.png",
        "tritask/truth.csv",
        "tritask/val_images/more/a.png",
    ]
    assert "No such file" in problems["problem"][0] and "empty file" in problems["problem"][1]
    assert problems["problem"][2:].str.startswith("left out").all()
    (home / "val_labels.csv").unlink()
    counts, problems = datasets.check("tritask", tritask_root)
    assert counts.empty and "val_labels.csv is absent" in problems["problem"][0]


@pytest.mark.parametrize("system", datasets.SYSTEMS)
def test_check_synthetic_set_has_no_problems(system, tmp_path):
    tiny_brain = {"patients_per_class": 3, "slices_per_patient": 1}
    tiny_lumbar = {"studies": 10, "image_side": (48, 50)}
    tiny = {"brain": tiny_brain, "chest": TINY_CHEST, "mura": {"patients": 40}, "tritask": TINY_TRITASK}
    options = (tiny | {"lumbar": tiny_lumbar})[system]
    root = datasets.write_synthetic(system, tmp_path / "s", **options)
    counts, problems = datasets.check(system, root)
    assert problems.empty and len(counts)


def test_fetch_without_a_public_link_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tritask has no link to download from; lay .* by hand under .*, as tritask/"):
        datasets.fetch("tritask", tmp_path, download=lambda _: pytest.fail("nothing to download"))
    assert not list(tmp_path.iterdir())


def test_fetch_and_locate_of_a_set_behind_a_registration_name_its_page(tmp_path):
    page = "https://stanfordmlgroup.github.io/competitions/mura/"
    with pytest.raises(ValueError, match=f"only the page {page} .*after registration.*; lay .* as mura/MURA"):
        datasets.fetch("mura", tmp_path, download=lambda _: pytest.fail("nothing to download"))
    with pytest.raises(FileNotFoundError, match=f"no mura data under .* Get them from {page} and lay them out so"):
        datasets.locate("mura", {"data_source": "real"}, data_root=tmp_path)


def test_fetch_lays_archives_out_as_the_reader_expects(tmp_path, brain_root):
    asked = []

    def download(handle):
        asked.append(handle)
        part = "alzheimer" if "alzheimers" in handle else "brain_tumor"
        archive = tmp_path / "archives" / part
        for split, name in brain.ARCHIVE_FOLDERS[part].items():
            for class_name in brain.CLASS_NAMES[part]:
                (archive / name / class_name).mkdir(parents=True)
                (archive / name / class_name / f"{split} (1).jpg").write_bytes(b"x")
        return str(archive)

    made = datasets.fetch("brain", tmp_path / "fetched", download=download)
    assert len(made) == 4 and asked == [
        "tourist55/alzheimers-dataset-4-class-of-images",
        "sartajbhuvaji/brain-tumor-classification-mri",
    ]
    assert (
        len(brain.read(tmp_path / "fetched", "alzheimer")) == len(brain.read(tmp_path / "fetched", "brain_tumor")) == 8
    )
    assert datasets.fetch("brain", tmp_path / "fetched", download=download) == [] and len(asked) == 2


@pytest.fixture
def chest_archive(tmp_path):
    """The public archive's layout: one image in each of images_001/images to images_012/images, and the tables."""
    archive = tmp_path / "archive"
    names = [f"{number:08d}_000.png" for number in range(1, 13)]
    for number, name in enumerate(names, 1):
        (archive / f"images_{number:03d}/images").mkdir(parents=True)
        (archive / f"images_{number:03d}/images" / name).write_bytes(b"x")
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name},Mass,0,{number},58,M,PA" for number, name in enumerate(names, 1)]
    (archive / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]))
    (archive / "train_val_list.txt").write_text("\n".join(names[:9]))
    (archive / "test_list.txt").write_text("\n".join(names[9:]))
    (archive / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    (archive / "README_CHESTXRAY.pdf").write_bytes(b"x")  # not asked for
    return archive


def test_fetch_takes_folders_and_files_of_an_archive(tmp_path, chest_archive):
    asked, root = [], tmp_path / "fetched"

    def download(handle):
        asked.append(handle)
        return str(chest_archive)

    made = datasets.fetch("chest", root, download=download)
    home = root / "chest"
    assert made == [home / name for name in chest.ARCHIVE_FOLDERS["frontal"]] and len(made) == 16
    assert sorted(home.iterdir()) == sorted(made) and asked == ["nih-chest-xrays/data"]
    assert len(chest.read(root)) == 12 and chest.read_boxes(root).empty
    assert datasets.fetch("chest", root, download=download) == [] and len(asked) == 1

    # What is there stays as it is; what a broken-off download left behind is no file of the set.
    (home / "test_list.txt").write_text("mine")
    (home / "Data_Entry_2017.csv").rename(home / ".Data_Entry_2017.csv.copying")
    (home / ".Data_Entry_2017.csv.copying").write_text("half")
    assert chest.folder(root) is None
    assert datasets.fetch("chest", root, download=download) == [home / "Data_Entry_2017.csv"]
    assert (home / "test_list.txt").read_text() == "mine" and sorted(home.iterdir()) == sorted(made)
    assert (home / "Data_Entry_2017.csv").read_bytes() == (chest_archive / "Data_Entry_2017.csv").read_bytes()


def test_fetch_without_a_file_of_the_archive_is_refused(tmp_path, chest_archive):
    (chest_archive / "BBox_List_2017.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file BBox_List_2017.csv; it holds \['Data_Entry_2017.csv', "):
        datasets.fetch("chest", tmp_path / "d", download=lambda _: str(chest_archive))
    assert chest.folder(tmp_path / "d") is None


def test_fetch_unknown_archive_layout_is_refused(tmp_path):
    (tmp_path / "archive/New").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no folder Alzheimer_s Dataset/train; it holds \['New'\]"):
        datasets.fetch("brain", tmp_path / "d", download=lambda _: str(tmp_path / "archive"))


def test_image_files_takes_dicom_of_any_name_and_says_what_it_leaves_out(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for name, content in {"a/IM0001": b"\0" * 128 + b"DICM", "b.PNG": b"", "a/1.2.840": b"\0" * 128 + b"DICM"}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("notes.txt", "a/short", ".DS_Store", "._b.PNG"):
        (tmp_path / name).write_text("x")
    root, names = datasets.image_files(tmp_path)
    assert root == tmp_path and names == ["a/1.2.840", "a/IM0001", "b.PNG"]
    assert "2 files are no images and were left out: a/short, notes.txt" in caplog.text
    # What is named outright is tried, whatever its name.
    assert datasets.image_files(tmp_path / "notes.txt") == (tmp_path, ["notes.txt"])


def test_image_files_without_an_image_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="no image under .*; files ending in .jpg.*, and DICOM of any name"):
        datasets.image_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        datasets.image_files(tmp_path / "absent")


def test_refuse_changed_raises_once_a_file_is_another(brain_root):
    source = datasets.Source(brain_root, "real")
    told = datasets.fingerprint("brain", source)
    datasets.refuse_changed("brain", source, told)
    next((brain_root / "brain").rglob("*.jpg")).unlink()
    with pytest.raises(RuntimeError, match=f"the brain data under {brain_root} have changed since .*then {told}"):
        datasets.refuse_changed("brain", source, told)
