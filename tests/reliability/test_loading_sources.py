"""The sources hold no call that would run what a file says: pickles, unsafe YAML, eval, shells, unpacked archives."""

import ast
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import kerasmed

PACKAGE = Path(kerasmed.__file__).parent
HOME = PACKAGE.parent
_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle"}
_BUILTINS = {"eval", "exec", "__import__"}
# Attributes that are refused wherever they are named, called or not; by what stands before them, "" for anything.
_ATTRIBUTES = {
    "os": {"system", "popen", "execv", "execve", "execvp", "execl", "execlp", "spawnv", "spawnl", "posix_spawn"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "joblib": {"load", "dump"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "Loader", "FullLoader", "UnsafeLoader"},
    "": {"read_pickle", "to_pickle", "extractall", "unpack_archive", "enable_unsafe_deserialization", "load_model"},
}
# Keywords that must have one value where they are given.
_KEYWORDS = {"allow_pickle": False, "shell": False, "safe_mode": True, "weights_only": True}
_MAGICS = ("%matplotlib inline",)
# Where and what: the one place that opens models, after it has looked through them.
ALLOWED = {("kerasmed/saved_models.py", "load_model")}


def dangerous(source):
    """List what a source, of a module or a notebook's cell, has of the above, by name."""
    lines = source.splitlines()
    found = [line.strip() for line in lines if line.lstrip()[:1] in ("!", "%") and line.strip() not in _MAGICS]
    plain = "\n".join(re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in lines)
    for node in ast.walk(ast.parse(plain)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += [module] if module in _MODULES else []
            refused = _ATTRIBUTES.get(module, set()) | _ATTRIBUTES[""] | ({"load"} if module == "torch" else set())
            found += [alias.name for alias in node.names if alias.name in refused]
        elif isinstance(node, ast.Name) and node.id in _BUILTINS | _MODULES | _ATTRIBUTES[""]:
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            before = node.value.id if isinstance(node.value, ast.Name) else ""
            found += [node.attr] if node.attr in _ATTRIBUTES.get(before, set()) | _ATTRIBUTES[""] else []
        elif isinstance(node, ast.Call):
            for word in node.keywords:
                wanted = _KEYWORDS.get(word.arg, word)
                given = word.value.value if isinstance(word.value, ast.Constant) else None
                found += [word.arg] if wanted is not word and given is not wanted else []
            name = ast.unparse(node.func)
            found += [name] if name == "compile" else []  # the word alone is an argument of Keras
            if name == "torch.load" and "weights_only" not in {word.arg for word in node.keywords}:
                found.append(name)
    return found


def _sources():
    """Path from the project and source of each module, and of each code cell of a notebook."""
    for path in sorted([*PACKAGE.rglob("*.py"), *(HOME / "benchmarks").glob("*.py")]):
        yield path.relative_to(HOME).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((HOME / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield path.relative_to(HOME).as_posix(), "".join(cell["source"])


PLANTED = [
    "import pickle",
    "from pickle import loads",
    "import marshal as m",
    "import shelve",
    "import dill",
    "import cloudpickle",
    "eval(text)",
    "exec(text)",
    "compile(text, '', 'eval')",
    "__import__('os')",
    "map(eval, texts)",
    "import os\nos.system('true')",
    "from os import system",
    "import os\nos.popen('true')",
    "import subprocess\nsubprocess.run('true', shell=True)",
    "subprocess.Popen(command, shell=flag)",
    "subprocess.getoutput('true')",
    "yaml.load(text)",
    "yaml.load(text, Loader=yaml.UnsafeLoader)",
    "yaml.unsafe_load(text)",
    "yaml.full_load(text)",
    "from yaml import unsafe_load",
    "np.load(path, allow_pickle=True)",
    "np.load(path, allow_pickle=flag)",
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "from torch import load",
    "joblib.load(path)",
    "from joblib import load",
    "pd.read_pickle(path)",
    "keras.saving.load_model(path, safe_mode=False)",
    "keras.models.load_model(path)",
    "keras.config.enable_unsafe_deserialization()",
    "tar.extractall(folder)",
    "shutil.unpack_archive(path)",
    "!pip install x",
    "if True:\n    !rm x",
    "%%bash\ntrue",
    "%run other.py",
]
HARMLESS = [
    "np.load(path)\nnp.load(path, mmap_mode='r', allow_pickle=False)",
    "yaml.safe_load(text)",
    "torch.load(path, map_location='cpu', weights_only=True)",
    "import ast\nast.literal_eval(text)",
    "model.compile('adam', 'mse')\nmodel.eval()",
    "subprocess.run(['true'], check=True)",
    "%matplotlib inline\nx = '!pip'",
    "joblib.Parallel(2)(joblib.delayed(f)(x) for x in y)",
]


@pytest.mark.parametrize("source", PLANTED)
def test_dangerous_of_a_planted_call_finds_it(source):
    assert dangerous(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_dangerous_of_a_harmless_call_finds_nothing(source):
    assert dangerous(source) == []


def test_sources_hold_no_call_that_runs_what_a_file_says(record):
    found, files = [], Counter()
    for path, source in _sources():
        files[path] += 1
        found += [(path, name) for name in dangerous(source)]
    assert set(found) == ALLOWED, "a call that runs what a file says, or one that is allowed no longer stands"
    assert len(files) > 90 and sum(path.endswith(".ipynb") for path in files) == 9
    record(
        "Loading",
        "modules, benchmarks and notebooks, by syntax tree",
        {"no pickle, eval, shell or unpacking": len(files)},
        exact=False,
        timed=True,
    )
