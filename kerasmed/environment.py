"""Seeds, precision, and the record of what a run ran on. The only module that touches global state."""

import contextlib
import ctypes
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile

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
# Of glibc's malloc.h, with bytes: blocks below the largest threshold that it takes, and as much as a few batches.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = (-3, 2**25), (-1, 2**28)


def setup(*, seed: int, precision: str = "float32", deterministic: bool = False) -> dict:
    """Seed Python, NumPy and Keras, set the precision, keep freed memory, and say what this process runs on.

    Args:
        seed: for `random`, `numpy` and Keras (initial weights, dropout).
        precision: Keras dtype policy: "float32", "mixed_float16" or "mixed_bfloat16".
        deterministic: make TensorFlow choose deterministic kernels, slower on a GPU.

    Returns:
        dict as of `describe`, with seed, precision and deterministic.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    with _without_start_up_noise():
        import keras

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            gpus = tf.config.list_physical_devices("GPU")

    logging.getLogger("tensorflow").addFilter(_is_no_retracing)
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(precision)
    if keras.backend.backend() == "tensorflow":
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        if deterministic:
            tf.config.experimental.enable_op_determinism()
    _keep_freed_memory()
    return {**describe(), "seed": seed, "precision": precision, "deterministic": deterministic}


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

    policy = keras.config.dtype_policy()  # which clearing forgets as well
    keras.utils.clear_session()
    keras.config.set_dtype_policy(policy)
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
    """Return versions, source commit, platform and devices, without any personal name or path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "devices": _devices(),
        "commit": _commit(),
        "versions": {name: _version(name) for name in RECORDED_PACKAGES},
    }


def _devices() -> list[str]:
    """GPUs by name where TensorFlow is already loaded, else the CPU."""
    tf = sys.modules.get("tensorflow")
    gpus = tf.config.list_physical_devices("GPU") if tf else []
    return [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus] or ["CPU"]


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
