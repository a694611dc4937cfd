import errno
import shutil

import pytest

from kerasmed import atomic, runs


def test_whole_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="stop"), atomic.whole(path) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert runs.read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_whole_folder_appears_when_whole_and_yields_to_another(tmp_path):
    (tmp_path / f".a.{atomic.host_hash()}.4194305.tmp").mkdir()  # left by a process that is gone
    with pytest.raises(ValueError, match="stop"), atomic.whole_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with atomic.whole_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
        shutil.copytree(folder, tmp_path / "a")
        (tmp_path / "a/theirs").touch()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["theirs", "x"]


def test_whole_folder_leaves_what_another_machine_may_be_writing(tmp_path):
    (tmp_path / ".a.0123456789.4194305.tmp").mkdir()
    with atomic.whole_folder(tmp_path / "a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.0123456789.4194305.tmp", "a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("4096 requested and 1024 written"),  # of NumPy's tofile
        OSError("Can't write data (file write failed: errno = 28, error message = 'No space left on device')"),  # HDF5
    ],
)
def test_whole_on_a_full_disk_names_the_file_and_the_reason(tmp_path, error):
    message = rf"cannot write {tmp_path}/a.npy: No space left on device(, or a limit)?; make space there"
    with pytest.raises(OSError, match=message), atomic.whole(tmp_path / "a.npy") as temporary:
        temporary.touch()
        raise error
    with pytest.raises(OSError, match=message.replace("a.npy", "a")), atomic.whole_folder(tmp_path / "a"):
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="other"), atomic.whole(tmp_path / "a.npy"):
        raise FileNotFoundError("other")
