"""Weights from elsewhere become a checkpoint of ours: the US3L authors', those of MoCo and SEED, torchvision's, timm's.

Files of a whole method are dicts whose `state_dict` has its names behind `module.` (DataParallel):

| file | student | teacher | besides |
|---|---|---|---|
| the US3L authors' | `encoder_q` | `encoder_k` | `predictor`; BYOL's head of sub-networks is `predictor_new` |
| MoCo v1, v2 | `encoder_q` | `encoder_k` | `queue` [D, K], `queue_ptr` |
| MoCo v3 | `base_encoder` | `momentum_encoder` | `predictor`; a ViT's projector is `head` |
| SEED | `student` | `teacher`, which stays in its own file here | `queue`, `queue_ptr` |

The projector is the encoder's `fc`. Other files have the names of a backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from us3l import checkpoint as checkpoints
from us3l.config import Config, to_dict
from us3l.errors import CheckpointError
from us3l.methods import Method, build_method
from us3l.models import MobileNetV2, VisionTransformer
from us3l.models.mobilenet_v2 import STAGES
from us3l.sampling import make_sampler
from us3l.step import make_optimizer
from us3l_kernels.nn import load_statistics
from us3l_kernels.nn.batch_norm import SlicedBatchNorm
from us3l_kernels.nn.calibration import Statistics, statistics
from us3l_kernels.width import width_key


@dataclass(frozen=True)
class Imported:
    """What came out of a file, by the names of the method's state_dict.

    matched: tensors that are the file's.  copied: teacher's tensors that are the student's, the file having none.
    initial: tensors that are as in a new run.  unused: names of the file that nothing here has.
    statistics: whether the file's running statistics became those of width 1.0.
    """

    matched: list[str]
    copied: list[str]
    initial: list[str]
    unused: list[str]
    statistics: bool


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one written by torch.save, by name and without `module.`.

    Raises CheckpointError for a missing, broken or hostile file (nothing but tensors is unpickled), or one without
    tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            values: Any = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # broken bytes make the readers raise all kinds of exceptions
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(
            f"{path} cannot be read: it is broken, or holds other things than tensors, which are never unpickled. "
            f"{reason}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(values, dict) and isinstance(values.get(key), Mapping):
            values = values[key]
    weights = {}
    if isinstance(values, Mapping):
        weights = {
            str(name).removeprefix("module."): tensor for name, tensor in values.items() if isinstance(tensor, Tensor)
        }
    if not weights:
        raise CheckpointError(f"{path} has no weights: expected tensors by name, alone or under the key 'state_dict'")
    return weights


def load_weights(method: Method, weights: Mapping[str, Tensor]) -> Imported:
    """Load `weights` (of :func:`read_weights`) into a method, and say what matched.

    The backbone must be in the file as a whole; heads that are not keep their initial values. A teacher that is not
    becomes a copy of the student. Running statistics of a plain backbone become the statistics of width 1.0; those of
    a whole method are left out, because the authors' mix all widths.

    Raises CheckpointError, and changes nothing, if a tensor has another shape here, or the backbone is not complete.
    """
    whole = any(name.startswith(tuple(_ENCODERS)) for name in weights)
    if "queue" in weights and "queue_ptr" in weights:
        weights = {**weights, "queue": weights["queue"].T, "queue_ptr": weights["queue_ptr"].squeeze()}
    given = {_our_name(name, method, whole): name for name in weights}
    own = method.state_dict()
    wrong = [
        f"{name}: {tuple(weights[given[name]].shape)} in the file, {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in given and weights[given[name]].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"the weights are of another network ({few(wrong)}). Keys that decide shapes are model.name, model.stem, "
            "model.in_channels, method.name, method.hidden_dim, method.dim and method.queue_size"
        )
    backbone = [name for name in own if name.startswith("encoder_q.") and not name.startswith("encoder_q.fc.")]
    if missing := [name for name in backbone if name not in given]:
        raise CheckpointError(
            f"the weights are of another network: {len(missing)} of the {len(backbone)} tensors of the backbone are "
            f"not in the file ({few(missing)}). The file has {few(list(weights))}"
        )
    matched = [name for name in own if name in given]
    values = {name: weights[given[name]] for name in matched}
    copied = []
    for name in own:
        student = name.replace("encoder_k.", "encoder_q.", 1)
        if name not in values and student != name and student in values:
            values[name] = values[student]
            copied.append(name)
    method.load_state_dict({**own, **values})
    table = {} if whole else _running_statistics(method, {name: weights[key] for name, key in given.items()})
    if table:
        load_statistics(method.encoder_q, table)
    used = {given[name] for name in matched}
    averages = () if not table and not whole else ("running_mean", "running_var")
    return Imported(
        matched=matched,
        copied=copied,
        initial=[name for name in own if name not in values],
        unused=[name for name in weights if name not in used and not name.endswith(("num_batches_tracked", *averages))],
        statistics=bool(table),
    )


def import_checkpoint(config: Config, path: str | Path, out: str | Path) -> Imported:
    """Write a checkpoint of `config` at `out`, before its first epoch, with the weights of the file `path`.

    It can be evaluated, calibrated and exported, and `us3l pretrain --resume` trains from it. Errors as of
    :func:`read_weights` and :func:`load_weights`.
    """
    weights = read_weights(path)
    torch.manual_seed(config.train.seed)
    method = build_method(config)
    imported = load_weights(method, weights)
    scaler = torch.amp.GradScaler("cpu", enabled=config.train.amp == "fp16")
    checkpoints.save(
        out,
        {
            "format": checkpoints.FORMAT,
            "config": to_dict(config),
            "method": method.state_dict(),
            "optimizer": make_optimizer(config.optimizer, method, config.regulariser.groups).state_dict(),
            "scaler": scaler.state_dict(),
            "sampler": make_sampler(config.sampler, config.train.epochs, config.train.seed).state_dict(),
            "epoch": 0,
            "batch": 0,
            "best": None,
            "statistics": statistics(method.encoder_q) if imported.statistics else None,
            "environment": checkpoints.environment(torch.device("cpu"), 1),
        },
    )
    return imported


def few(names: list[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


_ENCODERS = {
    "encoder_q.": "encoder_q.",
    "encoder_k.": "encoder_k.",
    "base_encoder.": "encoder_q.",
    "momentum_encoder.": "encoder_k.",
    "student.": "encoder_q.",
}
_QUEUE = {"queue": "queue.keys", "queue_ptr": "queue.position"}


def _our_name(name: str, method: Method, whole: bool) -> str:
    """The name here of a tensor of a published method (`whole`) or of a backbone."""
    if not whole:
        return f"encoder_q.{_mobilenet_name(name) if isinstance(method.encoder_q, MobileNetV2) else name}"
    for theirs, ours in _ENCODERS.items():
        if name.startswith(theirs):
            inner = name.removeprefix(theirs)
            if isinstance(method.encoder_q, VisionTransformer):
                inner = re.sub("^head[.]", "fc.", inner)
            return ours + inner
    if name in _QUEUE:
        return _QUEUE[name]
    # SimCLR's only predictor is that of its sub-networks.
    auxiliary = "predictor." if method.predictor is None else "predictor_new."
    return f"aux_predictor.{name.removeprefix(auxiliary)}" if name.startswith(auxiliary) else name


_BODY = (0, 1, 3, 4, 6, 7)  # a block of our MobileNetV2: three times a convolution and its norm; the first has two
_TIMM_ENDS = {"conv_stem": "features.0.0", "bn1": "features.0.1", "conv_head": "features.18.0", "bn2": "features.18.1"}


def _mobilenet_name(name: str) -> str:
    """The name in our MobileNetV2 of torchvision's or timm's; other names are returned as they are."""
    layer, _, leaf = name.rpartition(".")
    if layer in _TIMM_ENDS:
        return f"{_TIMM_ENDS[layer]}.{leaf}"
    layers: tuple[str, ...]
    if found := re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)", layer):  # torchvision
        block, inner = int(found[1]), found[2]
        layers = ("0.0", "0.1", "1.0", "1.1", "2", "3") if block > 1 else ("0.0", "0.1", "1", "2")
    elif found := re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)", layer):  # timm
        stage, inner = int(found[1]), found[3]
        block = 1 + sum(depth for _, _, depth, _ in STAGES[:stage]) + int(found[2])
        expands = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        layers = expands if stage > 0 else ("conv_dw", "bn1", "conv_pw", "bn2")
    else:
        return name
    return f"features.{block}.body.{_BODY[layers.index(inner)]}.{leaf}" if inner in layers else name


def _running_statistics(method: Method, given: Mapping[str, Tensor]) -> Statistics:
    """Those of the backbone's norms at width 1.0; empty if one norm has none, or there are no norms."""
    entries = {}
    for name, module in method.encoder_q.named_modules():
        if isinstance(module, SlicedBatchNorm) and not name.startswith("fc."):
            mean, var = (given.get(f"encoder_q.{name}.running_{which}") for which in ("mean", "var"))
            if mean is None or var is None:
                return {}
            entries[name] = (mean, var)
    return {width_key(1.0): entries} if entries else {}
