from kerasmed import paths


def test_roots_follow_argument_then_variable_then_project(tmp_path, monkeypatch):
    monkeypatch.delenv("KERASMED_MODELS")
    project = tmp_path / "project"
    (project / "notebooks" / "params").mkdir(parents=True)
    monkeypatch.chdir(project / "notebooks")
    assert paths.project_root() == project
    assert paths.data_root() == project / "data"
    assert paths.models_root() == project / "models"
    monkeypatch.setenv("KERASMED_DATA", str(tmp_path / "elsewhere"))
    assert paths.data_root() == tmp_path / "elsewhere"
    assert paths.data_root(tmp_path / "given") == tmp_path / "given"


def test_cache_is_never_beside_given_data(tmp_path, monkeypatch):
    monkeypatch.delenv("KERASMED_CACHE")
    monkeypatch.setenv("KERASMED_DATA", str(tmp_path / "readonly"))
    assert not paths.cache_root().is_relative_to(tmp_path / "readonly")


def test_is_data_root_chosen_knows_argument_and_variable(monkeypatch):
    assert not paths.is_data_root_chosen("")
    assert paths.is_data_root_chosen("somewhere")
    monkeypatch.setenv("KERASMED_DATA", "somewhere")
    assert paths.is_data_root_chosen()
