"""Open saved models as data: a `.keras` file is looked through before Keras builds anything of it.

A `.keras` file is a zip of config.json, which names classes and functions by module, metadata.json, and the weights as
HDF5. Whoever writes one chooses the names. Keras's safe mode refuses the most dangerous of them, but one call of
`keras.config.enable_unsafe_deserialization()` anywhere in the process overrides `safe_mode=True`; so `read` has a list
of its own, of what may be named, and asks for safe mode as well.
"""

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import keras

# Files of the zip, which `save` writes and no more: assets are of lookup tables, which are refused.
_MEMBERS = ("config.json", "metadata.json", "model.weights.h5")
# Where the classes of a config are looked for; those of `keras.src` are what Keras has no public name for.
_MODULES = (
    "keras",
    "keras.constraints",
    "keras.dtype_policies",
    "keras.initializers",
    "keras.layers",
    "keras.losses",
    "keras.metrics",
    "keras.optimizers",
    "keras.optimizers.schedules",
    "keras.regularizers",
    "keras.src.models.functional",
)
_OPERATIONS = "keras.src.ops."  # `keras.ops` called on symbolic tensors
_FUNCTIONS = "builtins"  # as Keras calls its own activations, losses and metrics by name
# They run code of the file, or read other files.
_REFUSED = (
    "FlaxLayer",
    "IntegerLookup",
    "JaxLayer",
    "Lambda",
    "StringLookup",
    "TFSMLayer",
    "TextVectorization",
    "TorchModuleWrapper",
)
_DATA = ("__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__", "__slice__")


def read(path: str | os.PathLike, *, compile: bool = True) -> keras.Model:
    """Open a model that `runs.write_model`, or Keras itself, wrote as a `.keras` file; run nothing that it holds.

    Allowed are the layers, losses, metrics, optimizers and operations of Keras, and classes that are registered in this
    process, which those of this package are. Not allowed are functions of any other module, classes that hold code or
    read other files (`Lambda`, `TFSMLayer`, `StringLookup`, …), further files in the zip, and compressed ones, which
    Keras does not write and which may grow without bound.

    How large the layers are that a file names is not looked at: one that asks for more memory than there is ends as any
    such model does.

    Args:
        path: a `.keras` file.
        compile: also take up the loss, metrics and optimizer that it was saved with.

    Returns:
        The model.

    Raises:
        FileNotFoundError: no file there.
        ValueError: it is no `.keras` file, is damaged, or names what is not allowed. Says which, and what to do.
    """
    # Registers all classes of the package. Not above: `medicalnet` imports `backbones`, which reads weights by `read`.
    from kerasmed import fusion, layers, losses, medicalnet, modalities  # noqa: F401

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; expected a model saved as .keras.")
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is no .keras file, which is a zip of config.json and weights; take a whole one. A legacy .h5 "
            "model has to be saved anew, as .keras, by whoever made it."
        )
    try:
        strange = next(_not_allowed(path), None)
    except (OSError, ValueError, KeyError, RecursionError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(_damaged(path, error)) from error
    if strange:
        raise ValueError(
            f"{path} is not opened: {strange}. A model that is only layers of Keras and of kerasmed needs no such "
            "thing; take the file from where it was made, or train it anew."
        )
    try:
        return keras.saving.load_model(path, compile=compile, safe_mode=True)
    except MemoryError:
        raise
    except Exception as error:  # a config that was tampered with fails in any way
        raise ValueError(_damaged(path, error)) from error


def _damaged(path, error) -> str:
    told = " ".join(str(error).split())
    return (
        f"{path} cannot be opened as a model: {type(error).__name__}: {told[:300]}. It is damaged, or of another "
        "version of Keras; take the file from where it was made, or train it anew."
    )


def _not_allowed(path) -> Iterator[str]:
    """Say of a `.keras` file what is not allowed, one after the other."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename not in _MEMBERS:
                yield f"it holds {member.filename!r} beside {', '.join(_MEMBERS)}"
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                yield f"it holds {member.filename!r} compressed, which Keras does not write"
        config = json.loads(archive.read("config.json"))
    yield from _strange_names(config)


def _strange_names(config) -> Iterator[str]:
    """Yield each class or function of a nested config that is not allowed."""
    left = [config]
    while left:  # not by recursion: how deep a config is nested is up to who wrote it
        one = left.pop()
        if isinstance(one, dict):
            if "class_name" in one and not _is_allowed(one):
                name = one["config"] if one["class_name"] == "function" else one["class_name"]
                yield f"its config.json names {str(name)[:80]!r} of module {str(one.get('module'))[:80]!r}"
            left.extend(one.values())
        elif isinstance(one, list):
            left.extend(one)


def _is_allowed(entry) -> bool:
    name, module = str(entry["class_name"]), str(entry.get("module"))
    if name in _DATA:
        return True
    if name == "function":
        return module == _FUNCTIONS
    # Keras looks up module.name: a name with dots leads on to other modules. "__" are bytecode, type specifications.
    if name in _REFUSED or "." in name or name.startswith("__"):
        return False
    registered = keras.saving.get_registered_object(str(entry.get("registered_name"))) is not None
    return registered or module in _MODULES or module.startswith(_OPERATIONS)
