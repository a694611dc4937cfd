"""MedicalNet: 3D residual networks of volumes, and the converter of their published weights.

`build` lays a network flat behind the standardisation of a volume, so that a saved `.keras` file takes grey voxels.
Layers bear the published names, with "_" for ".", which Keras's PyTorch backend does not take in names, and `load`
matches tensors by name and shape. It refuses every shape that differs: weights of a 2D network bear the same names, and
with mismatches ignored a 3D network would keep its random kernels.

Sources: Chen, Ma and Zheng 2019, "Med3D: Transfer Learning for 3D Medical Image Analysis", arXiv:1904.00625; code and
weights: https://github.com/Tencent/MedicalNet.
"""

import logging
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from kerasmed.backbones import Receipt, WeightsError
from kerasmed.layers import BATCH_NORM_MOMENTUM

logger = logging.getLogger(__name__)

# Blocks of each stage. Depths 18 and 34 are published with shortcuts of type A, which have no weights.
BLOCKS = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
DEPTHS = tuple(BLOCKS)
POOLS = ("none", "plane", "all")
HEAD = "conv_seg."  # the published networks end in a segmentation, which is left out here

_STAGES = ((64, 1, 1), (128, 2, 1), (256, 1, 2), (512, 1, 4))  # channels, stride, dilation
_EPSILON = 1e-5  # PyTorch's; Keras has 1e-3
_COUNTER = "num_batches_tracked"
# Name of a weight in Keras -> in PyTorch.
_PUBLISHED = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_TO_NPZ = (
    "python -c \"import numpy, torch; s = torch.load('FILE.pth', map_location='cpu', weights_only=True); "
    "numpy.savez('FILE.npz', **{k: v.numpy() for k, v in s.get('state_dict', s).items()})\""
)


@keras.saving.register_keras_serializable(package="kerasmed")
class VolumeStandardisation(keras.layers.Layer):
    """Standardise each volume by the mean and standard deviation of its voxels above 0; background becomes 0.

        x > 0 or x < 0:  (x − mean) / std        x = 0:  0

    Mean and std (the population's, divisor n) run over the voxels above 0 of a volume. A volume without any, or with
    all of them equal, becomes zeros. Computes in float32 under every precision policy.

    Source: MedicalNet's data loader, which fills the background with normal noise. A departure: here it is the noise's
    mean, 0, so that a volume always has the same features.

    Input shape: (batch, depth, height, width, 1), uint8 or float.
    Output shape: the same, float32.
    """

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, inputs):
        x = ops.cast(inputs, "float32")
        above, axes = x > 0, tuple(range(1, len(x.shape)))
        num_above = ops.maximum(ops.sum(ops.cast(above, "float32"), axis=axes, keepdims=True), 1.0)
        centred = x - ops.sum(ops.where(above, x, 0.0), axis=axes, keepdims=True) / num_above
        variance = ops.sum(ops.where(above, ops.square(centred), 0.0), axis=axes, keepdims=True) / num_above
        # Not variance > 0: rounding leaves a constant a variance that is not quite 0.
        varies = ops.max(x, axis=axes, keepdims=True) > ops.min(ops.where(above, x, np.inf), axis=axes, keepdims=True)
        standardised = ops.logical_and(x != 0, varies)
        return ops.where(standardised, centred / ops.sqrt(ops.where(varies, variance, 1.0)), 0.0)

    def compute_output_shape(self, input_shape):
        return input_shape


def build(
    depth: int = 152,
    input_shape: tuple[int, int, int, int] = (24, 224, 224, 1),
    *,
    pool: str = "none",
    dtype: str = "uint8",
) -> keras.Model:
    """Build a headless 3D ResNet with random weights: `volume` -> `standardise` -> the flat graph -> `maps`.

        conv1    7×7×7, 64 channels, stride 2; batch normalisation, ReLU, 3×3×3 max pooling, stride 2
        layer1    64 channels
        layer2   128 channels, stride 2
        layer3   256 channels, dilation 2
        layer4   512 channels, dilation 4

    Depth 10 has a block of two 3×3×3 convolutions a stage. The others have bottlenecks of 1×1×1, 3×3×3 and 1×1×1, the
    last with four times the channels. Where a block changes size or channels, a 1×1×1 convolution with normalisation is
    its shortcut (type B). Convolutions have no biases. All sides shrink by 8, rounded up: d = ⌈D / 8⌉.

    As PyTorch counts parameters (kernels, gamma and beta, without the running statistics), the encoder of depth 152 has
    117,359,936.

    Args:
        depth: one of `DEPTHS`.
        input_shape: (D, H, W, 1), slices first.
        pool: "none"; "plane": "planes", the mean of each map over height and width, a row a depth position; "all":
            "pool", the mean over all three.
        dtype: of the voxels, "uint8" or "float32".

    Returns:
        Uncompiled model, (batch, D, H, W, 1) -> float maps (batch, d, h, w, C), planes (batch, d, C) or pooled (batch,
        C), with C 2048 (512 for depth 10). Put weights in by `load`.

    Raises:
        ValueError: unknown depth, pool or dtype, or another kind of shape.
    """
    if depth not in BLOCKS:
        raise ValueError(
            f"`depth` is {depth!r}; expected one of {', '.join(map(str, DEPTHS))}: those published with shortcuts of "
            "type B."
        )
    if pool not in POOLS or dtype not in ("uint8", "float32"):
        raise ValueError(
            f"`pool` is {pool!r} and `dtype` {dtype!r}; expected one of {', '.join(POOLS)}, and uint8 or float32."
        )
    if len(input_shape) != 4 or input_shape[3] != 1 or not all(isinstance(side, int) for side in input_shape):
        raise ValueError(f"`input_shape` is {tuple(input_shape)}; expected (depth, height, width, 1), fixed numbers.")
    inputs = keras.Input(input_shape, dtype=dtype, name="volume")
    x = VolumeStandardisation(name="standardise")(inputs)
    x = _normalised(_convolution(x, 64, 7, "conv1", stride=2), "bn1")
    x = layers.ReLU(name="relu")(x)
    # PyTorch pads with −∞; after the ReLU, 0 is never the larger either.
    x = layers.ZeroPadding3D(1, name="maxpool_pad")(x)
    x = layers.MaxPooling3D(3, 2, name="maxpool")(x)
    block = _basic if depth == 10 else _bottleneck
    for stage, ((channels, stride, dilation), num_blocks) in enumerate(zip(_STAGES, BLOCKS[depth]), start=1):
        for place in range(num_blocks):
            name = "maps" if (stage, place + 1) == (4, num_blocks) else None
            x = block(x, channels, f"layer{stage}_{place}", stride if place == 0 else 1, dilation, name)
    if pool == "plane":
        x = layers.AveragePooling3D((1, *x.shape[2:4]), name="plane_means")(x)
        x = layers.Reshape((x.shape[1], x.shape[4]), name="planes")(x)
    elif pool == "all":
        x = layers.GlobalAveragePooling3D(name="pool")(x)
    return keras.Model(inputs, x, name=f"medicalnet{depth}")


def _convolution(x, channels, size, name, *, stride=1, dilation=1):
    """Convolve as PyTorch does with padding (size − 1) / 2 · dilation on both sides."""
    if stride > 1 and size > 1:
        # Keras's "same" pads one side more than the other where the stride is 2.
        x = layers.ZeroPadding3D((size - 1) // 2, name=f"{name}_pad")(x)
    return layers.Conv3D(
        channels,
        size,
        stride,
        padding="same" if stride == 1 else "valid",
        dilation_rate=dilation,
        use_bias=False,
        kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
        name=name,
    )(x)


def _normalised(x, name):
    return layers.BatchNormalization(momentum=BATCH_NORM_MOMENTUM, epsilon=_EPSILON, name=name)(x)


def _shortcut(x, channels, name, stride):
    if stride == 1 and x.shape[-1] == channels:
        return x
    return _normalised(_convolution(x, channels, 1, f"{name}_downsample_0", stride=stride), f"{name}_downsample_1")


def _added(x, shortcut, name, last):
    return layers.ReLU(name=last or f"{name}_out")(layers.Add(name=f"{name}_add")([x, shortcut]))


def _basic(x, channels, name, stride, dilation, last):
    shortcut = _shortcut(x, channels, name, stride)
    x = _normalised(_convolution(x, channels, 3, f"{name}_conv1", stride=stride, dilation=dilation), f"{name}_bn1")
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = _normalised(_convolution(x, channels, 3, f"{name}_conv2", dilation=dilation), f"{name}_bn2")
    return _added(x, shortcut, name, last)


def _bottleneck(x, channels, name, stride, dilation, last):
    shortcut = _shortcut(x, 4 * channels, name, stride)
    x = _normalised(_convolution(x, channels, 1, f"{name}_conv1"), f"{name}_bn1")
    x = layers.ReLU(name=f"{name}_relu1")(x)
    x = _normalised(_convolution(x, channels, 3, f"{name}_conv2", stride=stride, dilation=dilation), f"{name}_bn2")
    x = layers.ReLU(name=f"{name}_relu2")(x)
    x = _normalised(_convolution(x, 4 * channels, 1, f"{name}_conv3"), f"{name}_bn3")
    return _added(x, shortcut, name, last)


# --- weights ---------------------------------------------------------------------------------------------------------


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a published state dict: names of tensors -> arrays, as PyTorch lays them out.

    A `.npz` needs no torch. It is made of a `.pth`, once, where torch is installed, by

        python -c "import numpy, torch; s = torch.load('FILE.pth', map_location='cpu', weights_only=True);
        numpy.savez('FILE.npz', **{k: v.numpy() for k, v in s.get('state_dict', s).items()})"

    Args:
        path: a `.npz` file with an array a tensor, or a `.pth` file as torch saves it: a state dict, or a dict that
            holds one under "state_dict". Only tensors and plain containers are read of either, never code.

    Returns:
        name -> array; `module.`, which parallel training puts before names, is taken off.

    Raises:
        ValueError: another kind of file.
        FileNotFoundError: no file there.
        ImportError: a `.pth` file without torch; the message says how to convert it elsewhere.
        WeightsError: the file is cut short, holds something else than arrays, or a name twice.
    """
    path = Path(path)
    if path.suffix not in (".npz", ".pth"):
        raise ValueError(f"`path` is {path}; expected a .npz or .pth file.")
    if not path.is_file():
        raise FileNotFoundError(f"no file at `path` = {path}; expected weights as .npz or .pth.")
    return _plain_names(_read_npz(path) if path.suffix == ".npz" else _read_pth(path), path)


def _read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise WeightsError(f"{path} cannot be read as .npz of plain arrays: {error}. Make it by {_TO_NPZ}") from error


def _read_pth(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs torch, which is not installed. Install it, or turn the file into .npz where it is, "
            f"and give that: {_TO_NPZ}"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{path} cannot be read as a file of tensors: it is cut short, or holds objects that would run code: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    strange = [name for name, tensor in content.items() if not isinstance(tensor, torch.Tensor)]
    if strange or not content:
        raise WeightsError(f"{path} holds no state dict, names -> tensors. First entries that are none: {strange[:5]}.")
    return {name: tensor.numpy() for name, tensor in content.items()}


def _plain_names(state, source):
    """Take `module.` off the names."""
    plain = {name.removeprefix("module."): array for name, array in state.items()}
    if len(plain) < len(state):
        twice = sorted(name for name in plain if name in state and f"module.{name}" in state)
        raise WeightsError(f"{source} has {len(twice)} tensors both with and without `module.`. First: {twice[:5]}.")
    return plain


def load(
    model: keras.Model,
    state: Mapping[str, np.ndarray],
    *,
    source: str,
    min_share: float = 0.99,
) -> Receipt:
    """Put a published state dict into a model of `build`, tensor by tensor, by name and shape.

    Kernels are turned from (out, in, d, h, w) to (d, h, w, in, out). `num_batches_tracked`, a counter that inference
    has no use for, is passed over. Tensors of the segmentation head, `conv_seg.*`, which the model does not have, are
    listed among the receipt's `unmatched_file`; its `share` counts them, but `min_share` does not ask for them.

    The model is then frozen: batch normalisation keeps to the published statistics even where the model is called with
    `training=True`. Set `model.trainable = True` to train it.

    Args:
        model: from `build`, of the depth that the weights are of.
        state: from `read_state_dict`.
        source: where it came from, for the receipt.
        min_share: least share of matched tensors, of the larger side.

    Returns:
        The receipt: pairs such as ["layer1_0_conv1/kernel", "layer1.0.conv1.weight"].

    Raises:
        WeightsError: a tensor of a known name has another shape (a single one is enough), holds a value that is not
            finite, or fewer than `min_share` match. The model is then as it was.
    """
    state = {name: np.asarray(array) for name, array in _plain_names(state, source).items()}
    values, matched, unmatched, other_shapes = [], [], [], []
    for layer in model.layers:
        for weight in layer.weights:
            ours = f"{layer.name}/{weight.name}"
            theirs = f"{layer.name.replace('_', '.')}.{_PUBLISHED.get(weight.name, weight.name)}"
            if theirs not in state:
                unmatched.append(ours)
                continue
            array = state[theirs]
            if array.ndim == 5:
                array = array.transpose(2, 3, 4, 1, 0)
            if array.shape != tuple(weight.shape):
                other_shapes.append((theirs, state[theirs].shape, _published_shape(weight.shape)))
            values.append((weight, array))
            matched.append([ours, theirs])
    if other_shapes:
        raise WeightsError(_shapes_message(source, model, other_shapes))
    infinite = [theirs for (_, array), (_, theirs) in zip(values, matched) if not np.isfinite(array).all()]
    if infinite:
        raise WeightsError(
            f"{source} has {len(infinite)} tensors with values that are not finite; take a sound file. First: "
            f"{infinite[:5]}."
        )
    used = {theirs for _, theirs in matched}
    rest = [name for name in state if name not in used and not name.endswith(_COUNTER)]
    receipt = Receipt(source, matched, unmatched, rest)
    asked = receipt._replace(unmatched_file=[name for name in rest if not name.startswith(HEAD)])
    if asked.share < min_share:
        raise WeightsError(
            f"{source} does not fit {model.name}: {len(matched)} tensors match, a share of {asked.share:.3f} and less "
            f"than {min_share:g}. First unmatched of the model: {unmatched[:3]}; of the file: "
            f"{asked.unmatched_file[:3]}. Build the depth that the weights are of."
        )
    for weight, array in values:
        weight.assign(array)
    model.trainable = False
    logger.info("%s: %d tensors matched, %d of the file left over", source, len(matched), len(rest))
    return receipt


def _published_shape(shape):
    return (shape[4], shape[3], *shape[:3]) if len(shape) == 5 else tuple(shape)


def _shapes_message(source, model, other_shapes):
    """What to say of tensors (name, shape in the file, shape expected) that do not fit."""
    flat = [name for name, theirs, ours in other_shapes if len(theirs) == 4 and len(ours) == 5]
    first = ", ".join(f"{name} {theirs} for {ours}" for name, theirs, ours in other_shapes[:5])
    reason = (
        f"{len(flat)} of its kernels have four dimensions: these are weights of a 2D network, which bear the same "
        "names and say nothing about a 3D one. Give MedicalNet's own weights"
        if flat
        else "Build the depth that the weights are of"
    )
    return (
        f"{source} does not fit {model.name}: {len(other_shapes)} tensors have other shapes, and none is passed over. "
        f"{reason}. First, file for model: {first}."
    )
