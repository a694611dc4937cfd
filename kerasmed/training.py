"""Fit a model so that a killed training goes on exactly where its last whole epoch ended."""

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd

from kerasmed import atomic, backbones, runs, saved_models

logger = logging.getLogger(__name__)

SCHEDULES = ("cosine", "plateau", "constant")
OPTIMIZERS = ("adam", "sgd")
# TensorFlow takes as long to trace a network's training as to do about a dozen steps without a graph.
_STEPS_WORTH_A_GRAPH = 12
# A notebook trains dozens of networks: short epochs share a line.
_SECONDS_A_LINE = 60.0


class Variant(NamedTuple):
    """A training to be done: its name, network and configuration, and the variant that it departs from in one thing."""

    name: str
    network: str
    config: object  # of the system
    reference: str | None


class Stage(NamedTuple):
    """One of several trainings that follow one another: which part of the network learns, how long and how fast."""

    name: str
    part: str  # of `kerasmed.backbones.PARTS`
    epochs: int
    learning_rate: float


class Trained(NamedTuple):
    """What a training left: a network's name (with its stage), its folder's name, history and predictions."""

    variant: str
    folder: str
    history: pd.DataFrame
    predictions: pd.DataFrame


def fit(
    model: keras.Model,
    train: Callable,
    valid,
    *,
    folder: Path,
    steps_per_epoch: int,
    epochs: int,
    loss,
    metrics=(),
    optimizer: str = "adam",
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "plateau",
    monitor: str = "val_loss",
    stop_patience: int = 5,
    plateau_patience: int = 2,
    plateau_factor: float = 0.2,
    jit_compile: bool | str = "auto",
) -> pd.DataFrame:
    """Train a model's logits, keep the best weights by a value of the validation split, and save it whole.

    After each epoch `folder/checkpoint.npz` holds everything that the next one depends on: weights, optimizer slots,
    dropout's seed states, and the counters and best weights of early stopping and plateau. A later call on the same
    folder goes on from there, with results equal to an undisturbed call's; one on a finished folder only loads.

    Args:
        model: uncompiled, with a layer "logits" before its output.
        train: function of the first epoch to run -> dataset without end, from `pipelines.training_dataset`.
        valid: dataset of the validation split. Where either dataset has sample weights as a third part, they weigh the
            loss, over the number of images, and not the metrics.
        folder: where checkpoint.npz, history.csv and model.keras go; the model's last, so that its presence means done.
        steps_per_epoch: batches an epoch.
        epochs: at most so many.
        loss: of (targets, logits).
        metrics: Keras metrics of (targets, logits), shown and kept beside the loss.
        optimizer: "adam", or "sgd" with momentum 0.9.
        learning_rate: the optimizer's first one.
        weight_decay: share of a weight taken off per step, times the rate (with Adam: AdamW's); 0 for none.
        schedule: "cosine" (to 0 at the last epoch), "plateau" (times `plateau_factor` after `plateau_patience` epochs
            without a `monitor` better by at least 1e-4) or "constant".
        monitor: "val_loss", or "val_" and a metric's name: the column of the history that tells which epoch is best.
            Lower is better for the loss and for metrics that Keras counts as errors, higher for all others.
        stop_patience: stop after so many epochs without a better `monitor`.
        plateau_patience, plateau_factor: see `schedule`.
        jit_compile: as in `keras.Model.compile`; a training of at most a dozen steps has no graph unless this is True.

    Returns:
        History, a row per epoch: epoch, learning_rate, loss, val_loss, each metric, seconds, and kept: true in the
        best epoch, whose weights the model holds.

    Raises:
        ValueError: unknown schedule, optimizer or monitor, no epochs, or a checkpoint of another architecture or
            monitor.
        FloatingPointError: a loss or the monitor is not finite.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"`schedule` is {schedule!r}; expected one of {', '.join(SCHEDULES)}.")
    if epochs < 1:
        raise ValueError(f"`epochs` is {epochs}; expected at least 1.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"`optimizer` is {optimizer!r}; expected one of {', '.join(OPTIMIZERS)}.")
    mode = _mode(monitor, metrics)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.keras").exists() and (folder / "history.csv").exists():
        try:
            model.set_weights(saved_models.read(folder / "model.keras").get_weights())
            return pd.read_csv(folder / "history.csv")
        except runs.DAMAGED as error:
            _begin_anew(folder / "model.keras", error)

    # What dropout draws in a stage must not depend on whether the stage before it was trained or found finished.
    for variable in model.variables:
        if variable.path.endswith("seed_generator_state"):
            variable.assign(variable * np.array([1, 0], "uint32"))
    if keras.backend.backend() == "torch":
        # Without a seed of its own, a layer draws from PyTorch's global state, which is no part of the checkpoint.
        for layer in model._flatten_layers():  # those of nested models as well
            if hasattr(layer, "seed_generator") and layer.seed_generator._initial_seed is None:
                layer.seed_generator._initial_seed = 0
    trained = keras.Model(model.inputs, model.get_layer("logits").output, name=model.name)
    rate = (
        keras.optimizers.schedules.CosineDecay(learning_rate, steps_per_epoch * epochs)
        if schedule == "cosine"
        else learning_rate
    )
    # Keras resets no metric before a first epoch: one that served an earlier training would begin with its counts.
    for metric in metrics:
        metric.reset_state()
    trained.compile(
        _optimizer(optimizer, rate, weight_decay),
        loss,
        metrics=list(metrics),
        run_eagerly=_is_short(trained, steps_per_epoch * epochs, jit_compile),
        jit_compile=jit_compile,
    )
    # Half precision wraps the optimizer, so its variables are those of the compiled one.
    trained.optimizer.build(trained.trainable_variables)

    stopping = keras.callbacks.EarlyStopping(monitor, mode=mode, patience=stop_patience, restore_best_weights=True)
    plateau = keras.callbacks.ReduceLROnPlateau(monitor, factor=plateau_factor, patience=plateau_patience, mode=mode)
    watched = [stopping, plateau] if schedule == "plateau" else [stopping]
    checkpoint = _Checkpoint(folder, watched, monitor, mode)
    first_epoch = checkpoint.load(trained)
    if first_epoch:
        logger.warning("resuming %s after epoch %d", folder.name, first_epoch)
    with _statistics_of_whole_batches(trained):
        trained.fit(
            train(first_epoch),
            validation_data=valid,
            epochs=max(epochs, first_epoch),
            initial_epoch=epochs if checkpoint.stopped else first_epoch,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,
            verbose=0,
            callbacks=[*watched, checkpoint],
        )
    # The two models share their layers: early stopping has put the best weights into both.
    history = pd.DataFrame(checkpoint.history)
    values = history[monitor]
    history["kept"] = history.index == (values.idxmin() if mode == "min" else values.idxmax())
    runs.write_table(folder / "history.csv", history)
    runs.write_model(folder / "model.keras", model)
    (folder / "checkpoint.npz").unlink(missing_ok=True)
    return history


def _is_short(model, steps: int, jit_compile) -> bool:
    """Whether so few steps are done sooner without a graph, which is TensorFlow's; several devices need one."""
    if keras.backend.backend() != "tensorflow" or jit_compile is True or _num_devices(model) > 1:
        return False
    return steps <= _STEPS_WORTH_A_GRAPH


def _num_devices(model) -> int:
    return getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)


@contextlib.contextmanager
def _statistics_of_whole_batches(model):
    """Have batch normalisation see a batch whole where TensorFlow shares it out among devices, while a block runs.

    Not for good: a model that is saved so could not be trained with another backend.
    """
    # Those of nested models as well.
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    apart = [layer for layer in norms if not layer.synchronized]
    for layer in apart:
        layer.synchronized = _num_devices(model) > 1
    try:
        yield
    finally:
        for layer in apart:
            layer.synchronized = False


def _begin_anew(path, error):
    """Warn of a file that cannot be read, and remove it."""
    logger.warning("%s is damaged (%s); this training begins anew", path, str(error) or type(error).__name__)
    path.unlink()


def fit_stages(
    model: keras.Model, stages: Sequence[Stage], fit_one: Callable, *, network: str, folder: Path
) -> pd.DataFrame:
    """Train a model in stages, each going on from the best weights of the one before, and keep the best stage.

    The best is that of the lowest validation loss: a later stage that overfits from its first epoch on does not win.

    Args:
        model: with a layer `pool`; it ends with the weights that are kept.
        stages: at least one, in order.
        fit_one: function of folder, epochs and learning_rate that trains the model by `fit`.
        network: of `kerasmed.backbones.set_trainable`.
        folder: where history.csv, of all stages, and model.keras of the best one go. Of several stages, each has a
            folder beside it, `<folder>-<stage>`.

    Returns:
        History of all stages, epochs counted through; of several, with `stage`, and `kept` true in the best one alone.
    """
    folder = Path(folder)
    finished = []
    for stage in stages:
        finished.append(folder.with_name(f"{folder.name}-{stage.name}") if len(stages) > 1 else folder)
        finished[-1].mkdir(parents=True, exist_ok=True)
        if len(stages) > 1:
            print(f"{finished[-1].name}: {stage.part} of the network learns", flush=True)
        backbones.set_trainable(model, network, stage.part)
        fit_one(folder=finished[-1], epochs=stage.epochs, learning_rate=stage.learning_rate)
    if len(stages) == 1:
        return pd.read_csv(folder / "history.csv")
    tables = [pd.read_csv(each / "history.csv").assign(stage=stage.name) for each, stage in zip(finished, stages)]
    best = int(np.argmin([table.loc[table["kept"], "val_loss"].iloc[0] for table in tables]))
    if best != len(stages) - 1:  # whose weights the model has
        model.set_weights(saved_models.read(finished[best] / "model.keras").get_weights())
    history = pd.concat([table.assign(kept=table["kept"] & (at == best)) for at, table in enumerate(tables)])
    history = history.assign(epoch=np.arange(1, len(history) + 1)).reset_index(drop=True)
    runs.write_table(folder / "history.csv", history)
    with atomic.whole(folder / "model.keras") as temporary:
        shutil.copyfile(finished[best] / "model.keras", temporary)
    return history


def _mode(monitor, metrics):
    """Whether the best `monitor` is the lowest ("min") or the highest ("max")."""
    # A metric of Keras says in which direction it gets better; its own "auto" mode reads the same.
    errors = {"val_loss": True}
    errors |= {f"val_{metric.name}": getattr(metric, "_direction", "up") == "down" for metric in metrics}
    if monitor not in errors:
        raise ValueError(
            f"`monitor` is {monitor!r}, which no epoch logs; expected one of {', '.join(errors)}. Add the metric to "
            "`metrics`, or give it that name."
        )
    return "min" if errors[monitor] else "max"


def _optimizer(name, rate, weight_decay):
    if name == "sgd":
        return keras.optimizers.SGD(rate, momentum=0.9, weight_decay=weight_decay or None)
    return keras.optimizers.AdamW(rate, weight_decay=weight_decay) if weight_decay else keras.optimizers.Adam(rate)


class _Checkpoint(keras.callbacks.Callback):
    """Writes all training state after each epoch, prints a line a minute, and puts all back when training begins.

    It stands last among the callbacks: the others reset themselves when training begins.
    """

    def __init__(self, folder, watched, monitor, mode):
        super().__init__()
        self.path = folder / "checkpoint.npz"
        self.watched = watched
        self.monitor = monitor
        self._better = min if mode == "min" else max
        self.history = []
        self.stopped = False
        self._loaded = None
        self._printed, self._printed_epoch = time.perf_counter(), 0

    def load(self, model) -> int:
        """Put saved variables into the model and its optimizer; return the number of epochs that they have seen."""
        if not self.path.exists():
            return 0
        try:
            with np.load(self.path) as saved:  # which compares checksums
                state = json.loads(str(saved["state"]))
                arrays = {name: saved[name] for name in saved.files if name != "state"}
        except runs.DAMAGED as error:
            _begin_anew(self.path, error)
            return 0
        variables = _variables(model)
        if [list(v.shape) for v in variables] != state["shapes"]:
            raise ValueError(
                f"{self.path} holds {len(state['shapes'])} variables of another architecture or optimizer, the model "
                f"has {len(variables)}; delete it to start anew."
            )
        # The best value so far is of no use to another monitor. A checkpoint that names none is of the loss.
        if state.get("monitor", "val_loss") != self.monitor:
            raise ValueError(
                f"{self.path} was written with monitor {state.get('monitor', 'val_loss')!r}, this call has "
                f"{self.monitor!r}; use the former, or delete it to start anew."
            )
        for position, variable in enumerate(variables):
            variable.assign(arrays[f"variable_{position}"])
        self._loaded = state, arrays
        self.history = state["history"]
        self.stopped = state["stopped"]
        return len(self.history)

    def on_train_begin(self, logs=None):
        if self._loaded is None:
            return
        state, arrays = self._loaded
        for callback, saved in zip(self.watched, state["callbacks"], strict=True):
            for name, value in saved.items():
                setattr(callback, name, value)
        if state["num_best"]:
            self.watched[0].best_weights = [arrays[f"best_{position}"] for position in range(state["num_best"])]

    def on_epoch_begin(self, epoch, logs=None):
        now = {"epoch": epoch + 1, "epochs": self.params["epochs"]}
        runs.write_json(self.path.with_name(runs.PROGRESS), now)
        self._began = time.perf_counter()
        self._rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def on_epoch_end(self, epoch, logs=None):
        values = {name: float(value) for name, value in logs.items() if name != "learning_rate"}
        decisive = {name: values[name] for name in ("loss", "val_loss", self.monitor)}
        if not np.isfinite(list(decisive.values())).all():
            raise FloatingPointError(
                f"{', '.join(f'{name} {value}' for name, value in decisive.items())} in epoch {epoch + 1} at rate "
                f"{self._rate:.1e}; lower `learning_rate` or look at the targets."
            )
        seconds = round(time.perf_counter() - self._began, 2)
        self.history.append({"epoch": epoch + 1, "learning_rate": self._rate, **values, "seconds": seconds})
        best = self.watched[0].best_weights or []
        variables = _variables(self.model)
        state = {
            "history": self.history,
            "stopped": bool(self.model.stop_training),
            "num_best": len(best),
            "monitor": self.monitor,
            "shapes": [list(v.shape) for v in variables],
            "callbacks": [
                {
                    name: getattr(callback, name)
                    for name in ("wait", "best", "best_epoch", "stopped_epoch", "cooldown_counter")
                    if hasattr(callback, name)
                }
                for callback in self.watched
            ],
        }
        arrays = {f"variable_{position}": keras.ops.convert_to_numpy(v) for position, v in enumerate(variables)}
        arrays |= {f"best_{position}": weight for position, weight in enumerate(best)}
        with atomic.whole(self.path) as temporary:
            np.savez(temporary, state=np.array(json.dumps(state, default=float)), **arrays)
        runs.write_table(self.path.with_name("history.csv"), pd.DataFrame(self.history))
        if time.perf_counter() - self._printed >= _SECONDS_A_LINE:
            self._print()

    def on_train_end(self, logs=None):
        self.path.with_name(runs.PROGRESS).unlink(missing_ok=True)
        if self._printed_epoch < len(self.history):
            self._print()

    def _print(self):
        """Print where training stands: the last epoch, and the best one."""
        self._printed, self._printed_epoch = time.perf_counter(), len(self.history)
        best = self._better(self.history, key=lambda row: row[self.monitor])
        shown = "  ".join(
            f"{name} {value:.3f}"
            for name, value in self.history[-1].items()
            if name not in ("epoch", "learning_rate", "seconds")
        )
        seconds = sum(row["seconds"] for row in self.history)
        print(
            f"  epoch {self.history[-1]['epoch']:3d} of {self.params['epochs']}  {shown}  "
            f"(best {self.monitor} {best[self.monitor]:.3f} in epoch {best['epoch']}; {seconds:.0f} s)",
            flush=True,
        )


def _variables(model):
    """Everything that an epoch changes: weights, moving averages, dropout's seed states, optimizer slots and rate."""
    return [*model.variables, *model.optimizer.variables]
