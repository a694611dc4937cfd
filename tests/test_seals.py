import logging

import pandas as pd
import pytest

from kerasmed import runs, seals


@pytest.fixture
def stage(tmp_path):
    runs.write_table(tmp_path / "predictions.csv", pd.DataFrame({"p": [0.25, 0.5]}))
    (tmp_path / "model.keras").write_bytes(b"weights")
    runs.write_json(tmp_path / runs.PROGRESS, {})
    seals.seal(tmp_path)
    return tmp_path


def test_is_sealed_of_a_stage_that_is_done_is_yes_whatever_comes_beside_it(stage):
    (stage / runs.PROGRESS).unlink()
    (stage / "later.csv").touch()
    assert seals.is_sealed(stage) and seals.is_sealed(stage)


def test_is_sealed_without_a_seal_is_no_and_leaves_all(stage):
    (stage / seals.SEAL).unlink()
    assert not seals.is_sealed(stage)
    assert {path.name for path in stage.iterdir()} == {"predictions.csv", "model.keras", runs.PROGRESS}


def test_is_sealed_with_a_changed_digit_is_no_and_removes_that_file_alone(stage, caplog):
    (stage / "predictions.csv").write_text("p\n0.25\n0.6\n")
    with caplog.at_level(logging.WARNING, "kerasmed.seals"):
        assert not seals.is_sealed(stage)
    assert not (stage / "predictions.csv").exists() and (stage / "model.keras").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"predictions.csv of {stage} is damaged or gone; it is made anew"
    ]
    assert not seals.is_sealed(stage)  # nor later


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"gone.csv": "0"}'])
def test_is_sealed_by_a_seal_that_is_damaged_is_no(stage, content):
    (stage / seals.SEAL).write_text(content)
    assert not seals.is_sealed(stage) and not (stage / seals.SEAL).exists()


@pytest.mark.parametrize("name", ["../theirs.csv", "{}/theirs.csv", "..", "theirs.txt"])
def test_is_sealed_by_a_seal_that_names_another_file_than_seal_writes_leaves_that_file(stage, name):
    folder = stage / "variant"
    for path in (stage / "theirs.csv", folder / "theirs.txt"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    runs.write_json(folder / seals.SEAL, {name.format(stage): "0"})
    assert not seals.is_sealed(folder) and not (folder / seals.SEAL).exists()
    assert (stage / "theirs.csv").exists() and (folder / "theirs.txt").exists()
