"""Seeds, precision, and the record of what a run ran on. The only module that touches global state."""

import contextlib
import ctypes
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kerasmed import paths

RECORDED_PACKAGES = (
    "kerasmed",
    "tensorflow",
    "keras",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "albumentations",
    "opencv-python-headless",
    "pillow",
    "joblib",
    "matplotlib",
    "papermill",
    "ipykernel",
)
# Start-up information, and the complaint of a CUDA build on a machine without a GPU.
_NOISE = re.compile(
    r"^I0000|before absl::InitializeLog|rebuild TensorFlow with the appropriate compiler flags|failed call to cuInit"
)
# A notebook trains many models, and each is traced once: TensorFlow takes that for one model traced many times.
_RETRACING = "triggered tf.function retracing"
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_distributed: list = []  # what `strategy` has found for this process: at most one, over all of its devices
# Of glibc's malloc.h, with bytes: blocks below the largest threshold that it takes, and as much as a few batches.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = (-3, 2**25), (-1, 2**28)


def setup(
    *, seed: int, precision: str = "float32", deterministic: bool = False, devices: str | Sequence[str] = "auto"
) -> dict:
    """Seed Python, NumPy and Keras, set precision and devices, keep freed memory, and say what this process runs on.

    A GPU's memory is taken as it is needed, so that two runs can share one.

    Args:
        seed: for `random`, `numpy` and Keras (initial weights, dropout).
        precision: Keras dtype policy: "float32", "mixed_float16" or "mixed_bfloat16".
        deterministic: have the backend choose deterministic kernels, slower on a GPU.
        devices: see `strategy`. Models built from here on are trained over all of them; [] for the backend's default
            one. With TensorFlow, processors alone, as ["CPU:0"], hide the GPUs from all that this process computes.

    Returns:
        dict as of `describe`, with seed, precision and deterministic.

    Raises:
        ValueError: unknown precision or devices.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    if backend() == "jax":  # which reads these when it is first at work
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if deterministic and _DETERMINISTIC not in os.environ.get("XLA_FLAGS", ""):
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()
    with _without_start_up_noise():
        import keras

        if backend() == "tensorflow":
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")
            if devices != "auto" and devices and all(str(name).upper().startswith("CPU") for name in devices):
                tf.config.set_visible_devices([], "GPU")
        keras.utils.set_random_seed(seed)  # of TensorFlow too, which it loads under any backend

    logging.getLogger("tensorflow").addFilter(_is_no_retracing)
    keras.config.set_dtype_policy(precision)
    if backend() == "tensorflow":
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if deterministic:
            tf.config.experimental.enable_op_determinism()
    elif "tensorflow" in sys.modules:
        # Keras loads it under any backend; it would take the GPU's memory for itself.
        sys.modules["tensorflow"].config.set_visible_devices([], "GPU")
    if backend() == "torch":
        import torch

        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(deterministic)
    _distributed[:] = [found for found in [strategy(devices)] if found is not None]
    _install()
    _keep_freed_memory()
    return {**describe(), "seed": seed, "precision": precision, "deterministic": deterministic}


def backend() -> str:
    """Return the name of Keras's backend, "tensorflow", "jax" or "torch": the one at work, or that it will start with.

    Keras is not imported: it takes `KERAS_BACKEND`, else the "backend" of its file `keras.json`, else TensorFlow.
    """
    keras = sys.modules.get("keras")
    if keras is not None:
        return keras.config.backend()
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"]
    file = Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "keras.json"
    try:
        return json.loads(file.read_text()).get("backend", "tensorflow")
    except (OSError, ValueError):  # which Keras passes over as well
        return "tensorflow"


def strategy(devices: str | Sequence[str] = "auto"):
    """Find how a batch is shared out among several devices.

    Each device takes an equal part of every batch, so that batch size, steps and results stay those of one device, up
    to rounding and to what dropout draws: gradients are summed over devices, and so are the statistics of batch
    normalisation (by `kerasmed.training.fit` with TensorFlow, by JAX itself).

    A batch that cannot be parted evenly goes through whole on each device with JAX, which changes nothing. With
    TensorFlow its parts are of unequal size, and the gradients of their mean losses count alike: of 5 images on two
    devices, 3 and 2, each of the 2 weighs 1.5 times as much as each of the 3. Losses and metrics that are reported are
    of all images alike. Where the devices divide the batch size, at most an epoch's last batch is so.

    Args:
        devices: "auto" for all GPUs of this machine that the process may see (`$CUDA_VISIBLE_DEVICES`); or names, such
            as ["GPU:0", "GPU:1"], or "CPU:0" where the processor was parted into several. A name that stands alone
            must be that of the device which the backend takes anyway.

    Returns:
        `tf.distribute.MirroredStrategy` with TensorFlow, a `keras.distribution.DataParallel` with JAX, both with
        `scope()`; None where one device is all there is, and with PyTorch, which takes its first.

    Raises:
        ValueError: names of devices that are not there, one that the backend does not take by default, or several
            with PyTorch.

    Source: keras.io/guides/distribution; MultiWorkerMirroredStrategy is left out, as it fails with `fit` in Keras 3
    (keras issue 20585): on many machines, one run a machine (`kerasmed sweep --scheduler`).
    """
    present = _device_names()
    if devices == "auto":
        names = [name for name in present if not name.startswith("CPU")]
        names = names[:1] if backend() == "torch" else names
    else:
        names = [str(name).upper() for name in devices]
    if isinstance(devices, str) and devices != "auto" or [name for name in names if name not in present]:
        raise ValueError(f"`devices` is {devices!r}; expected 'auto' or names of {', '.join(present)}.")
    if len(names) == 1 and names != present[:1]:
        raise ValueError(
            f"`devices` is {devices!r}, but a single device is {present[0]}, the first that {backend()} sees. For "
            "another GPU set CUDA_VISIBLE_DEVICES to its number before this process starts, for none to an empty text."
        )
    if len(names) < 2:
        return None
    if backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.MirroredStrategy(names)
    if backend() == "jax":
        return _data_parallel([name.lower() for name in names])
    raise ValueError(f"`devices` is {devices!r}; with the backend {backend()} a model is trained on one device.")


def _device_names() -> list[str]:
    """Names of the devices that Keras may compute on, as "GPU:0" and "CPU:0"."""
    if backend() == "tensorflow":
        import tensorflow as tf

        return [
            one.name.removeprefix("/device:") for kind in ("GPU", "CPU") for one in tf.config.list_logical_devices(kind)
        ]
    if backend() == "jax":
        import jax

        return [f"{one.platform}:{one.id}".upper() for one in jax.devices()]
    import torch

    return [f"GPU:{number}" for number in range(torch.cuda.device_count())] + ["CPU:0"]


def _data_parallel(names: Sequence[str]):
    import keras
    from keras.distribution import TensorLayout
    from keras.src.backend.jax import trainer

    def each_by_its_own_layout(self, distribution):
        for data in self.data_adapter.get_jax_iterator():
            yield trainer._distribute_data(data)

    # Keras 3.15 lays all batches out as the first, and a smaller last one fails; there is no public way to its layout.
    trainer.JAXEpochIterator._get_distributed_iterator = each_by_its_own_layout

    class DataParallel(keras.distribution.DataParallel):
        """Keras's, which raises where a batch cannot be parted evenly: such a one goes whole to each device."""

        def get_data_layout(self, data_shape):
            if data_shape[0] % len(names) == 0:
                return super().get_data_layout(data_shape)
            return TensorLayout([None] * len(data_shape), self.device_mesh)

    return DataParallel(devices=names)


def _install() -> None:
    """Make the strategy found that of everything built from here on; none where there is none."""
    import keras

    found = _distributed[0] if _distributed else None
    if backend() == "tensorflow":
        import tensorflow as tf

        if found is not None or tf.distribute.has_strategy():
            tf.distribute.experimental_set_strategy(found)
    elif backend() == "jax":
        keras.distribution.set_distribution(found)


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of freed batches for the next ones, up to 256 MB.

    Where tf.data is at work every array above 128 KB is otherwise mapped anew and given back, page by page: making
    batches takes about twice as long.
    """
    if platform.libc_ver()[0] == "glibc":
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(*option)


def _is_no_retracing(record: logging.LogRecord) -> bool:
    return _RETRACING not in str(record.msg)


def fresh(seed: int) -> None:
    """Forget the models built so far and seed anew, so that a training depends on nothing that ran before it.

    A notebook trains many models; whether an earlier one was trained or found finished must not change the next.
    """
    import keras

    policy = keras.config.dtype_policy()  # which clearing forgets, as it does the devices
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
    _install()
    keras.utils.set_random_seed(seed)


@contextlib.contextmanager
def _without_start_up_noise():
    """Hold back what TensorFlow's C++ libraries print while they load, and pass on what is not in `_NOISE`.

    They write before any log level applies, straight to the file descriptor.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held.read().decode(errors="replace").splitlines():
                if not _NOISE.search(line):
                    print(line, file=sys.stderr)


def describe() -> dict:
    """Return versions, source commit, platform, Keras backend and devices, without any personal name or path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "backend": backend(),
        "devices": _devices(),
        "replicas": _replicas(),
        "commit": _commit(),
        # Further backends are not named where they only lie about.
        "versions": {name: _version(name) for name in dict.fromkeys((*RECORDED_PACKAGES, backend()))},
    }


def _replicas() -> int:
    """Into how many parts a training batch goes."""
    if not _distributed:
        return 1
    found = _distributed[0]
    return found.num_replicas_in_sync if hasattr(found, "num_replicas_in_sync") else found.num_model_replicas


def _devices() -> list[str]:
    """GPUs by name, with what is known of them, where a backend is already loaded, else the CPU."""
    return [_of_gpu(*one) for one in _gpus()] or ["CPU"]


def _gpus() -> list[tuple]:
    """Of each GPU that the backend sees: name, compute capability, bytes of memory; None for what is not told."""
    if backend() == "tensorflow" and "tensorflow" in sys.modules:
        tf = sys.modules["tensorflow"]
        physical = tf.config.list_physical_devices("GPU")
        found = [(gpu.name, tf.config.experimental.get_device_details(gpu)) for gpu in physical]
        return [(told.get("device_name", name), told.get("compute_capability"), None) for name, told in found]
    if backend() == "jax" and "jax" in sys.modules:
        gpus = [one for one in sys.modules["jax"].devices() if one.platform != "cpu"]
        limits = [(one.memory_stats() or {}).get("bytes_limit") for one in gpus]
        return [(one.device_kind, getattr(one, "compute_capability", None), size) for one, size in zip(gpus, limits)]
    if backend() == "torch" and "torch" in sys.modules:
        cuda = sys.modules["torch"].cuda
        found = [cuda.get_device_properties(number) for number in range(cuda.device_count())]
        return [(one.name, (one.major, one.minor), one.total_memory) for one in found]
    return []


def _of_gpu(name: str, capability, size: int | None) -> str:
    """Example:
    >>> _of_gpu("NVIDIA H200", (9, 0), 141 * 2**30), _of_gpu("NVIDIA H200", "9.0", None), _of_gpu("METAL", None, None)
    ('NVIDIA H200, compute capability 9.0, 141 GiB', 'NVIDIA H200, compute capability 9.0', 'METAL')
    """
    capability = ".".join(map(str, capability)) if isinstance(capability, tuple) else capability
    parts = [name, capability and f"compute capability {capability}", size and f"{size / 2**30:.0f} GiB"]
    return ", ".join(part for part in parts if part)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout, with "-dirty" where tracked files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=paths.project_root(),
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
