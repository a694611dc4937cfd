"""Numbered batches -> what Keras's `fit`, `evaluate` and `predict` take, whichever backend Keras has.

Under TensorFlow it is a `tf.data.Dataset`, elsewhere a `keras.utils.PyDataset`. Both give the same arrays in the same
order, made two at once and two ahead.
"""

import atexit
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kerasmed import environment

_AT_ONCE = 2  # batches


class _AtWork:
    """Counts the batches that are being made, so that the interpreter can end between them.

    A dataset without end that is still there when Python ends makes batches ahead: one that is under way then would
    wait for an interpreter that waits for it. From that moment on batches are empty, which fills the queues at once.
    """

    def __init__(self):
        self._changed, self._count, self._closing, self._used = threading.Condition(), 0, False, False

    def __enter__(self) -> bool:
        with self._changed:
            self._count += 1
            self._used = True
            return self._closing

    def __exit__(self, *_):
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def close(self):
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._count)
        if self._used:
            time.sleep(0.1)  # for the queues


_at_work = _AtWork()
atexit.register(_at_work.close)


def numbered_dataset(make: Callable[[int], object], empty, *, first: int = 0, count: int | None = None):
    """Make a dataset of what a function makes of a batch's number, two batches at once and two ahead.

    Args:
        make: number -> nested dicts and tuples of arrays; called from several threads. TensorFlow takes the memory of
            an array that is aligned, and may write into it (a loss that puts 0 in place of NaN, on two devices, did):
            a view of what is read again is not to be handed out.
        empty: a batch of no rows, nested alike, for types and shapes: an axis of length 0 is of any length.
        first: number of the first batch.
        count: of batches; None for no end.

    Returns:
        `tf.data.Dataset` in the order of numbers, or under another backend a `keras.utils.PyDataset`.
    """
    # Beside another backend TensorFlow would take the GPU's memory, and its threads the cores.
    if environment.backend() != "tensorflow":
        return _py_dataset(make, first, count)
    return _tf_dataset(make, empty, first, count)


def _tf_dataset(make, empty, first, count):
    import tensorflow as tf

    # Not `from_generator`: it has the C library give back every array's memory, which costs half of the speed.
    of_no_rows = tf.nest.flatten(empty)

    def arrays_of(number):
        with _at_work as closing:
            return of_no_rows if closing else tf.nest.flatten(make(int(number)))

    def batch_of(number):
        arrays = tf.numpy_function(arrays_of, [number], [one.dtype for one in of_no_rows])
        for array, one in zip(arrays, of_no_rows):
            array.set_shape([size or None for size in one.shape])
        return tf.nest.pack_sequence_as(empty, arrays)

    numbers = tf.data.Dataset.counter(first) if count is None else tf.data.Dataset.range(first, first + count)
    found = numbers.map(batch_of, num_parallel_calls=_AT_ONCE).prefetch(_AT_ONCE)
    # There is nothing to tune, and tf.data's autotuner sleeps ever longer, and may not wake where a dataset ends:
    # `predict` and `evaluate` then stand still for up to as long as they took.
    options = tf.data.Options()
    options.autotune.enabled = False
    return found.with_options(options)


def _py_dataset(make, first, count):
    import keras

    pool, ahead = ThreadPoolExecutor(_AT_ONCE), {}

    class Numbered(keras.utils.PyDataset):
        """Batches by number; it makes the next ones itself, as Keras's own threads lose the batch it looks at first."""

        @property
        def num_batches(self):
            return count

        def __getitem__(self, index):
            nonlocal ahead
            last = index + _AT_ONCE if count is None else min(index + _AT_ONCE, count - 1)
            ahead = {each: ahead.get(each) or pool.submit(make, first + each) for each in range(index, last + 1)}
            return ahead.pop(index).result()

    return Numbered()
