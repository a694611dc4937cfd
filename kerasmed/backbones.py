"""Ten backbones behind one builder: uint8 pixels in, pooled features out, weights with a receipt.

`build` lays the graph of `keras.applications` flat behind the preprocessing its weights were trained with, so that
Grad-CAM reaches every layer and a saved `.keras` file takes grey pixels. Weights are matched by shape in graph order,
never by name, and every transfer returns a `Receipt` that says which tensor went where.

Sources: DenseNet arXiv:1608.06993, VGG arXiv:1409.1556, ResNet arXiv:1512.03385, Inception v3 arXiv:1512.00567,
MobileNet v2 arXiv:1801.04381, EfficientNet arXiv:1905.11946, EfficientNet v2 arXiv:2104.00298, Xception
arXiv:1610.02357.
"""

import difflib
import hashlib
import logging
import os
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np
from tqdm import tqdm

from kerasmed import atomic, saved_models
from kerasmed.layers import BATCH_NORM_MOMENTUM, Preprocessing
from kerasmed.parameters import refuse

logger = logging.getLogger(__name__)

PARTS = ("head", "last_stage", "all")
SOCKET_SECONDS = 30.0
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Rescaled once more where Keras builds them with ImageNet weights, and only there: see `_fold_rescaling`.
_RESCALED = ("EfficientNetB0", "EfficientNetB3")
# How the pixels were prepared when the weights were trained: scale, offset, blue first.
_STANDARDISED = (
    [1 / (255 * std) for std in IMAGENET_STD],
    [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)],
    False,
)
_BLUE_FIRST = (1.0, [-103.939, -116.779, -123.68], True)
_TO_ONE = (1 / 127.5, -1.0, False)
_RAW = (1.0, 0.0, False)  # the graph prepares them itself
_KERAS = "https://storage.googleapis.com/keras-applications/"
_TF = "https://storage.googleapis.com/tensorflow/keras-applications/"
_TF_KERNELS = "weights_tf_dim_ordering_tf_kernels"
_NO_TOP = f"{_TF_KERNELS}_notop.h5"


class Backbone(NamedTuple):
    """What `build` must know of one constructor of `keras.applications`."""

    preprocessing: tuple  # scale, offset, bgr of `layers.Preprocessing`
    smallest_side: int  # pixels
    before_last_stage: str  # the last named layer before what follows the last halving of the map
    url: str  # ImageNet weights without the top
    md5: str | None  # None: Keras publishes none


BACKBONES = {
    "DenseNet121": Backbone(
        _STANDARDISED, 32, "pool4_pool", f"{_TF}densenet/densenet121_{_NO_TOP}", "30ee3e1110167f948a6b9946edeeb738"
    ),
    "DenseNet169": Backbone(
        _STANDARDISED, 32, "pool4_pool", f"{_TF}densenet/densenet169_{_NO_TOP}", "b8c4d4c20dd625c148057b9ff1c1176b"
    ),
    "VGG19": Backbone(
        _BLUE_FIRST, 32, "block4_pool", f"{_TF}vgg19/vgg19_{_NO_TOP}", "253f8cb515780f3b799900260a226db6"
    ),
    "ResNet50": Backbone(
        _BLUE_FIRST, 32, "conv4_block6_out", f"{_TF}resnet/resnet50_{_NO_TOP}", "4d473c1dd8becc155b73f8504c6f6626"
    ),
    "InceptionV3": Backbone(
        _TO_ONE, 75, "mixed7", f"{_TF}inception_v3/inception_v3_{_NO_TOP}", "bcbd6486424b2319ff4ef7d526e38f63"
    ),
    "MobileNetV2": Backbone(
        _TO_ONE, 32, "block_12_add", f"{_TF}mobilenet_v2/mobilenet_v2_{_TF_KERNELS}_1.0_224_no_top.h5", None
    ),
    "EfficientNetB0": Backbone(
        _RAW, 32, "block5c_add", f"{_KERAS}efficientnetb0_notop.h5", "50bc09e76180e00e4465e1a485ddc09d"
    ),
    "EfficientNetB3": Backbone(
        _RAW, 32, "block5e_add", f"{_KERAS}efficientnetb3_notop.h5", "af6d107764bb5b1abb91932881670226"
    ),
    "EfficientNetV2S": Backbone(
        _RAW, 32, "block5i_add", f"{_TF}efficientnet_v2/efficientnetv2-s_notop.h5", "af0682fb74e8c54910f2d4393339c070"
    ),
    "Xception": Backbone(
        _TO_ONE, 71, "block12_sepconv3_bn", f"{_TF}xception/xception_{_NO_TOP}", "b0042744bf5b25fce3cb969f33bebb97"
    ),
}
NAMES = tuple(BACKBONES)


class WeightsError(ValueError):
    """Weights that do not fit, or a file that holds none."""


class DownloadError(OSError):
    """ImageNet weights that could not be had; the message says how to do without the network."""


class Receipt(NamedTuple):
    """Which tensor of a file went into which tensor of a model.

    Attributes:
        source: where the weights came from.
        matched: pairs [model tensor, file tensor].
        unmatched_model: tensors of the model that kept their values.
        unmatched_file: tensors of the file that went nowhere.
    """

    source: str
    matched: list[list[str]]
    unmatched_model: list[str]
    unmatched_file: list[str]

    @property
    def share(self) -> float:
        """Matched tensors over those of the larger side: a network that merely contains the other's does not pass."""
        larger = len(self.matched) + max(len(self.unmatched_model), len(self.unmatched_file))
        return len(self.matched) / max(larger, 1)

    def as_dict(self) -> dict:
        """Return a plain dict for JSON, `share` among its keys."""
        return {"source": self.source, "share": self.share, **self._asdict()}


# --- the graph -------------------------------------------------------------------------------------------------------


def _backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(NAMES)}.")
    return BACKBONES[name]


def refuse_unfit(
    networks: Sequence[str],
    weights: str | os.PathLike,
    image_size: Sequence[int],
    *,
    smallest_sides: Mapping[str, int] | None = None,
) -> None:
    """Raise ValueError, before any work, for parameters that networks cannot be built with.

    Args:
        networks: names; those that are no backbones may be among them.
        weights: of `build`; a file fits one backbone only.
        image_size: (height, width).
        smallest_sides: name -> pixels, of the networks that are no backbones.
    """
    one_file = weights in ("imagenet", "none") or len(set(networks) & set(NAMES)) <= 1
    refuse("weights", weights, one_file, "imagenet or none, as a file fits one backbone only")
    sides = {name: backbone.smallest_side for name, backbone in BACKBONES.items()} | dict(smallest_sides or {})
    smallest = max([0, *(sides.get(name, 0) for name in networks)])
    expected = f"at least {smallest} pixels a side, for {', '.join(networks)}"
    refuse("image_size", image_size, min(image_size) >= smallest, expected)


def build(
    name: str,
    image_size: tuple[int, int],
    *,
    channels: int = 1,
    weights: str | os.PathLike = "imagenet",
    time_limit: float = 600.0,
    min_share: float = 0.95,
) -> tuple[keras.Model, Receipt | None]:
    """Build a headless backbone: `image` -> `preprocess` -> the flat graph of keras.applications -> `pool`.

    Args:
        name: one of `NAMES`.
        image_size: (height, width) in pixels, each at least 32 (Xception 71, InceptionV3 75).
        channels: 1 (grey) or 3 (red, green, blue).
        weights: "imagenet"; "none" for random ones, with BatchNorm momentum 0.9; a whole `.keras` model of the same
            backbone, whose head may differ; or a `.h5` file of keras.applications. For EfficientNets B, a `.h5` file
            is read as keras.applications reads its own, with the extra rescaling that goes with it.
        time_limit: seconds that a download may take.
        min_share: share of tensors that must match; see `transfer`.

    Returns:
        Model, uint8 (batch, height, width, channels) -> float (batch, num_features), and the receipt of its weights,
        None for "none". The graph is the same whatever the weights.

    Raises:
        ValueError: unknown name, image too small, other channels, or `weights` is none of these.
        WeightsError: the weights are not this backbone's.
        DownloadError: see `fetch`.
        FileNotFoundError: no file at `weights`.
    """
    backbone = _backbone(name)
    if min(image_size) < backbone.smallest_side:
        raise ValueError(
            f"`image_size` is {tuple(image_size)}; {name} needs at least {backbone.smallest_side} pixels a side."
        )
    if channels not in (1, 3):
        raise ValueError(f"`channels` is {channels!r}; expected 1 (grey) or 3 (red, green, blue).")
    path = find_weights(name, weights, time_limit=time_limit)

    scale, offset, bgr = backbone.preprocessing
    inputs = keras.Input((*image_size, channels), dtype="uint8", name="image")
    x = Preprocessing(scale, offset, bgr=bgr, name="preprocess")(inputs)
    # Never weights="imagenet": it has no time limit, gives no receipt, and makes another graph of some EfficientNets.
    graph = getattr(keras.applications, name)(weights=None, include_top=False, input_tensor=x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(graph.output), name=name)
    if path is None:
        for layer in model.layers:
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.momentum = BATCH_NORM_MOMENTUM
        return model, None
    tensors = read_tensors(path)
    if name in _RESCALED:
        tensors = _fold_rescaling(tensors, legacy=path.suffix == ".h5")
    source = f"imagenet: {path.name}" if weights == "imagenet" else str(path)
    return model, transfer(model, tensors, source=source, min_share=min_share)


def find_weights(name: str, weights: str | os.PathLike, *, time_limit: float = 600.0) -> Path | None:
    """Return the file that `weights` of `build` means, None for "none"; it is not opened."""
    if weights == "none":
        return None
    if weights == "imagenet":
        return fetch(name, time_limit=time_limit)
    if not isinstance(weights, (str, os.PathLike)) or Path(weights).suffix not in (".keras", ".h5"):
        raise ValueError(f"`weights` is {weights!r}; expected 'imagenet', 'none', or the path of a .keras or .h5 file.")
    if not Path(weights).is_file():
        raise FileNotFoundError(f"no file at `weights` = {weights}; expected 'imagenet', 'none' or a file that exists.")
    return Path(weights)


def _up_to_pool(model) -> list:
    """Layers that the layer `pool` hangs on (and unused inputs), in graph order; all of the model's without `pool`."""
    if "pool" not in {layer.name for layer in model.layers}:
        return model.layers
    # Not get_source_inputs: it walks every path, and DenseNets have exponentially many.
    return keras.Model(model.inputs, model.get_layer("pool").output).layers


def set_trainable(model: keras.Model, name: str, part: str) -> None:
    """Choose what a model on top of `build`'s graph trains; compile it afterwards.

    Layers that `pool` does not hang on are the head, and always train. "head" freezes the whole backbone. "last_stage"
    frees what works on the coarsest maps (DenseNet conv5, ResNet conv5, VGG block 5, Inception after mixed7, MobileNet
    from block 13, EfficientNets from block 6, Xception block 13), but for BatchNorm: a few small batches would wreck
    statistics learnt from a million images. "all" frees everything.

    Args:
        model: from `build`, or a classifier made of it; "head" and "all" take any whose graph has a layer `pool`.
        name: one of `NAMES`; only "last_stage" looks at it.
        part: "head", "last_stage" or "all".

    Raises:
        ValueError: unknown part, no `pool`; for "last_stage", unknown name, or the model holds no such backbone.
    """
    if part not in PARTS:
        raise ValueError(f"`part` is {part!r}; expected one of {', '.join(PARTS)}.")
    layers = _up_to_pool(model)
    names = [layer.name for layer in layers]
    before = _backbone(name).before_last_stage if part == "last_stage" else "pool"
    if missing := sorted({before, "pool"} - set(names)):
        raise ValueError(f"the model has no layer {missing[0]!r}; {part!r} of {name} needs a graph as of `build`.")
    model.trainable = True
    first_free = 0 if part == "all" else names.index(before) + 1
    for index, layer in enumerate(layers):
        keeps_statistics = part != "all" and isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= first_free and not keeps_statistics


# --- weights ---------------------------------------------------------------------------------------------------------


def transfer(
    model: keras.Model,
    tensors: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    source: str,
    min_share: float = 0.95,
) -> Receipt:
    """Put weights into a model, layer by layer in graph order, wherever the shapes of a layer's tensors agree.

    Names are not looked at: those of InceptionV3 are numbers that change with every build. Do this before the first
    `predict`, which would keep the constants of a Normalization layer.

    Args:
        model: whose layers are filled.
        tensors: (layer name, arrays in the order of `layer.weights`) in graph order; layers without arrays are passed.
        source: where they came from, for the receipt.
        min_share: least share of matched tensors, of the larger side.

    Returns:
        The receipt.

    Raises:
        WeightsError: fewer match. The model is then as it was.
    """
    ours = [layer for layer in model.layers if layer.weights]
    theirs = [(name, list(arrays)) for name, arrays in tensors if len(arrays)]
    our_names = [[f"{layer.name}/{weight.name}" for weight in layer.weights] for layer in ours]
    their_names = [[f"{name}[{place}]" for place in range(len(arrays))] for name, arrays in theirs]
    blocks = difflib.SequenceMatcher(
        None,
        [tuple(tuple(weight.shape) for weight in layer.weights) for layer in ours],
        [tuple(np.shape(array) for array in arrays) for _, arrays in theirs],
        autojunk=False,
    ).get_matching_blocks()
    pairs = {block.a + step: block.b + step for block in blocks for step in range(block.size)}
    taken = set(pairs.values())
    receipt = Receipt(
        source,
        [list(pair) for our, their in pairs.items() for pair in zip(our_names[our], their_names[their])],
        [name for index, names in enumerate(our_names) if index not in pairs for name in names],
        [name for index, names in enumerate(their_names) if index not in taken for name in names],
    )
    if receipt.share < min_share:
        raise WeightsError(
            f"{source} does not fit {model.name}: {len(receipt.matched)} tensors match of "
            f"{sum(map(len, our_names))} in the model and {sum(map(len, their_names))} in the file, a share of "
            f"{receipt.share:.3f} and less than {min_share:g}. First unmatched of the model: "
            f"{receipt.unmatched_model[:3]}; of the file: {receipt.unmatched_file[:3]}. Give weights of the same "
            "network, or build with `weights: none`."
        )
    for our, their in pairs.items():
        ours[our].set_weights(theirs[their][1])
        if hasattr(ours[our], "finalize_state"):  # Normalization computes with constants made of its weights
            ours[our].finalize_state()
    return receipt


def read_tensors(path: str | os.PathLike) -> list[tuple[str, list[np.ndarray]]]:
    """Read the weights of a file, a layer an entry, in graph order.

    Args:
        path: a whole `.keras` model, or a `.h5` file in the layout of keras.applications (`layer_names`). Of a
            `.keras` model with a layer `pool`, what `pool` hangs on is read and the head left out.

    Returns:
        (layer name, arrays) for every layer, also those without weights.

    Raises:
        WeightsError: the file is neither.
    """
    path = Path(path)
    if path.suffix == ".keras":
        try:
            model = saved_models.read(path, compile=False)
        except ValueError as error:
            raise WeightsError(str(error)) from error
        return [(layer.name, layer.get_weights()) for layer in _up_to_pool(model)]
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            names = _attribute(group, "layer_names")
            tensors = [
                (name, [np.asarray(group[name][tensor]) for tensor in _attribute(group[name], "weight_names")])
                for name in names
            ]
    except (OSError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as HDF5, it is cut short or something else: {error}") from error
    if not tensors:
        raise WeightsError(
            f"{path} has no `layer_names`: it is no .h5 file of keras.applications. Of one's own models, save the "
            "whole, as .keras, not the weights alone."
        )
    return tensors


def _attribute(group, name) -> list[str]:
    """Read a list of names that Keras splits over `name0`, `name1`, … where it is long."""
    chunks = [name] if name in group.attrs else [f"{name}{part}" for part in range(len(group.attrs))]
    values = [value for chunk in chunks if chunk in group.attrs for value in group.attrs[chunk]]
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]


def _fold_rescaling(tensors, *, legacy: bool):
    """Fold the rescaling that EfficientNets have only with ImageNet weights into its Normalization.

    keras.applications divides by √std once more after Normalization, if and only if weights="imagenet":
    (x − mean) / √variance / √std = (x − mean) / √(variance · std). A legacy file does not hold that layer, and one of
    this package's graph, which is folded already, is known by its layer `preprocess`.
    """
    names = [name for name, _ in tensors]
    shapes = [[array.shape for array in arrays] for _, arrays in tensors]
    if [(3,), (3,), ()] not in shapes:
        return tensors
    index = shapes.index([(3,), (3,), ()])
    has_rescaling = "".join(names[index + 1 : index + 2]).startswith("rescaling")
    if not has_rescaling and not (legacy and "preprocess" not in names):
        return tensors
    mean, variance, count = tensors[index][1]
    folded = (variance * np.asarray(IMAGENET_STD)).astype(variance.dtype)
    return [*tensors[:index], (names[index], [mean, folded, count]), *tensors[index + 1 :]]


# --- download --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder that Keras keeps ImageNet weights in: `$KERAS_HOME/models`, else `~/.keras/models`."""
    home = os.environ.get("KERAS_HOME") or os.path.join(
        "~" if os.access(os.path.expanduser("~"), os.W_OK) else "/tmp", ".keras"
    )
    return Path(home).expanduser() / "models"


def fetch(name: str, *, time_limit: float = 600.0) -> Path:
    """Return the file of a backbone's ImageNet weights without top, downloaded unless the cache has it.

    The cache and its file names are those of keras.applications. A file there that is cut short or foreign is
    downloaded again and replaced once the new one is whole.

    Args:
        name: one of `NAMES`.
        time_limit: seconds that the download may take, strictly: name resolution and a server that stalls included.

    Returns:
        Path of the `.h5` file.

    Raises:
        DownloadError: no network, too slow, an HTTP error or a wrong checksum.
    """
    backbone = _backbone(name)
    path = cache_folder() / backbone.url.rsplit("/", 1)[1]
    found = path.is_file()
    if found and _is_sound(path, backbone.md5):
        return path
    logger.info("downloading %s to %s", backbone.url, path.parent)
    try:
        content = _download(backbone.url, time_limit)
        with atomic.whole(path) as temporary:
            temporary.write_bytes(content)
            if not _is_sound(temporary, backbone.md5):
                raise OSError(f"the {len(content)} bytes received have a wrong checksum or are no HDF5")
    except Exception as error:
        raise DownloadError(
            f"no ImageNet weights for {name}: downloading {backbone.url} failed within the time limit of "
            f"{time_limit:g} s: {type(error).__name__}: {error}. "
            + (f"The file {path} is cut short or foreign: delete it. " if found else "")
            + f"Put {path.name} into {path.parent} ($KERAS_HOME/models) by hand, or do without pretraining: "
            "`weights: none`."
        ) from error
    return path


def _is_sound(path, md5) -> bool:
    """Whether a file has its checksum or, where none is known, opens as HDF5 (which a file cut short does not)."""
    if md5 is not None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == md5
    try:
        h5py.File(path, "r").close()
    except OSError:
        return False
    return True


def _download(url, time_limit) -> bytes:
    """Return what lies at a URL, or raise within `time_limit` seconds whatever name service and server do."""
    stop, outcome = threading.Event(), {}

    def work():
        try:
            outcome["content"] = _receive(url, min(time_limit, SOCKET_SECONDS), stop)
        except Exception as error:
            outcome["error"] = error

    # A thread can be left behind, a blocked call cannot. It keeps what it gets in memory (at most 100 MB), so that one
    # that is left behind never touches the cache.
    thread = threading.Thread(target=work, daemon=True, name="download")
    thread.start()
    try:
        thread.join(time_limit)
    finally:
        stop.set()
    if "content" in outcome:
        return outcome["content"]
    raise outcome.get("error") or TimeoutError("out of time")


def _receive(url, socket_seconds, stop) -> bytes:
    content = bytearray()
    with urllib.request.urlopen(url, timeout=socket_seconds) as response:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(
            desc=url.rsplit("/", 1)[1], total=length or None, unit="B", unit_scale=True, ascii=True, disable=None
        ) as bar:
            while not stop.is_set() and (chunk := response.read1(1 << 16)):
                content += chunk
                bar.update(len(chunk))
    if stop.is_set() or len(content) < length:
        raise ConnectionError(f"the connection ended after {len(content)} of {length or 'unknown'} bytes")
    return bytes(content)
