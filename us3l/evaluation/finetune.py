"""Fine-tuning of sub-networks: transfer to other data sets, and semi-supervised learning from a share of the labels.

Each width is taken out of the slimmable network as a model of its own (`us3l_kernels.standalone`), gets a linear
classifier, and is trained as a whole: the widths are independent of each other, as in the paper. A run of several
widths and learning rates leaves a state after every epoch, and goes on from there.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, recall_score
from torch import Tensor, nn

from us3l import checkpoint as checkpoints
from us3l.data.seeding import IndexArray, Stream, permutation
from us3l.errors import CheckpointError, DataError, TrainingError
from us3l.evaluation.calibration import calibrate, has_statistics
from us3l.evaluation.features import device_of
from us3l.evaluation.linear import SGDProtocol
from us3l.evaluation.protocol import classifier_costs
from us3l.results import Results, Row, weights_checksum
from us3l_kernels import standalone
from us3l_kernels.nn.calibration import statistics
from us3l_kernels.width import Width, width_key

if TYPE_CHECKING:
    from us3l.data.base import Data, EvaluationLoader, Part
    from us3l.models import Backbone

OnEpoch = Callable[[Width, float, int, float], None]  # width, learning rate, epochs done, mean loss

HELD_OUT = 5  # to choose a learning rate, every fifth labelled image of a class is left out of the training


@dataclass(frozen=True)
class FinetuneProtocol(SGDProtocol):
    """Fine-tuning by SGD: the hyper-parameters.

    head_lr: learning rate of the classifier; None: that of the backbone.
    crop_scale: areas of the random crops, fractions.
    """

    head_lr: float | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)

    def of(self, epochs: int) -> FinetuneProtocol:
        """This protocol in another number of epochs; milestones stay where they are in the run."""
        milestones = tuple(round(milestone * epochs / self.epochs) for milestone in self.milestones)
        return replace(self, epochs=epochs, milestones=milestones)


# Transfer, as in the published configurations (64 images per GPU; the number of GPUs is taken to be their scripts' 4).
TRANSFER_PROTOCOL = FinetuneProtocol(epochs=100, lr=0.1, batch_size=256, milestones=(60, 80), weight_decay=1e-4)
CIFAR10_TRANSFER_PROTOCOL = FinetuneProtocol(
    epochs=50, lr=0.001, batch_size=256, milestones=(30, 40), weight_decay=1e-4
)
CIFAR100_TRANSFER_PROTOCOL = replace(CIFAR10_TRANSFER_PROTOCOL, lr=0.01)
# Semi-supervised, as in SwAV (Caron et al., NeurIPS 2020): 1 % and 10 % of ImageNet's labels.
SEMI_1_PROTOCOL = FinetuneProtocol(epochs=20, lr=0.02, head_lr=5.0, batch_size=256, milestones=(12, 16), gamma=0.2)
SEMI_10_PROTOCOL = replace(SEMI_1_PROTOCOL, lr=0.01, head_lr=0.2)


def protocol_for(data_name: str, share: float | None) -> FinetuneProtocol:
    """The published protocol for a data set (`data.name`), or for a share of the labels."""
    if share is not None:
        return SEMI_1_PROTOCOL if share < 0.05 else SEMI_10_PROTOCOL
    cifar = {"cifar10": CIFAR10_TRANSFER_PROTOCOL, "cifar100": CIFAR100_TRANSFER_PROTOCOL}
    return cifar.get(data_name, TRANSFER_PROTOCOL)


def balanced_subset(labels: Tensor, share: float, seed: int) -> IndexArray:
    """Indices of the same number of images of every class, about `share` of all, in ascending order.

    Args:
        labels: [n], int64. share: in (0, 1]. seed: which images.

    A class has at least one image in it, and all of its own where it has fewer than the others.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a fraction in (0, 1], got {share}")
    per_class = max(1, round(share * len(labels) / len(labels.unique())))
    return np.flatnonzero(_rank_in_class(labels.numpy(), seed) < per_class)


def listed_subset(names: Sequence[str] | None, file: Path) -> IndexArray:
    """Indices of the training images that a text file lists, one file name a line, in ascending order.

    `names` are those of the training images; None, where they are no files: a line is an index, from 0 on.

    Raises:
        DataError: the file cannot be read, is empty, or lists an image that is not there.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list of labelled images {file} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"{file} lists no image: expected one a line")
    if names is None:
        if wrong := [line for line in lines if not line.isdecimal()]:
            raise DataError(f"{file}: these images have no file names: expected an index a line, got {wrong[0]!r}")
        return np.unique([int(line) for line in lines])
    index = {Path(name).name: i for i, name in enumerate(names)}
    if missing := [line for line in lines if Path(line).name not in index]:
        raise DataError(f"{file}: {len(missing)} of {len(lines)} images are no training images, e.g. {missing[0]}")
    return np.unique([index[Path(line).name] for line in lines])


def _rank_in_class(labels: np.ndarray[Any, np.dtype[np.int64]], seed: int) -> IndexArray:
    """For every image its place, from 0, among those of its class in a random order: [n]."""
    order = permutation(seed, 0, len(labels), Stream.SUBSET)
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = np.arange(len(members))
    return ranks


def finetune(
    model: Backbone,
    data: Data,
    widths: Sequence[Width],
    protocol: FinetuneProtocol,
    folder: str | Path,
    *,
    indices: IndexArray | None = None,
    learning_rates: Sequence[float] = (),
    seed: int = 0,
    amp: str = "none",
    subject: dict[str, Any] | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[Row]:
    """Fine-tune the sub-network of every width on the labelled training images, and test it.

    Widths that are done, and epochs of the one that is not, are taken from `folder`.

    Args:
        model: pre-trained; not changed, except that a width without statistics is calibrated, with all training
            images (no labels).
        widths: widths in (0, 1], or plans, in the order of the result.
        folder: for `results.jsonl` and the weights, `width-W.pt`.
        indices: of the training images with labels; None: all.
        learning_rates: several: the one that is best on held-out labelled images (a fifth of each class) replaces the
            protocol's, for each width; the classifier's moves in proportion.
        seed: of the classifier's weights, and of the images that are held out.
        amp: "none", "bf16" or "fp16".
        subject: more of what the results depend on (of the data, say).
        on_epoch: called with width, learning rate, epochs done and the mean loss of the last one.

    Returns:
        One row per width: `width` (float, or the canonical text of a plan), `accuracy` (%, top-1, test images),
        `per_class` (%, mean over the classes), `lr`, `validation` (accuracy by learning rate; None: it diverged),
        `macs` and `params` (with the classifier).

    Raises:
        CheckpointError: `folder` has results of something else, or a broken state.
        DataError: `indices` out of range, or too few images to hold any out.
        TrainingError: the loss is not finite.
    """
    chosen = np.arange(len(data.train_labels)) if indices is None else indices
    if len(chosen) == 0 or not 0 <= chosen.min() <= chosen.max() < len(data.train_labels):
        raise DataError(f"indices: expected some of the {len(data.train_labels)} training images, got {chosen}")
    subject = {
        "weights": weights_checksum(model),
        "protocol": asdict(protocol),
        "learning_rates": list(learning_rates),
        "labelled": [len(chosen), zlib.crc32(chosen.tobytes())],
        "seed": seed,
        "amp": amp,
        **(subject or {}),
    }
    folder = Path(folder)
    results = Results(folder / "results.jsonl", subject)
    training = _Training(data, protocol, folder, subject, seed, amp, on_epoch)
    rows = []
    for width, cost in zip(widths, classifier_costs(model, data, widths), strict=True):
        key = width_key(width)
        if "accuracy" not in results.rows.get(key, {}):
            network = sub_network(model, data, width, seed)
            lr = protocol.lr
            if len(learning_rates) > 1:
                lr = _best_learning_rate(network, width, chosen, learning_rates, training, results)
            network = training.run(network, width, chosen, lr, f"width-{key}.pt")
            accuracy, per_class = _accuracies(network, data.test)
            measured = {"accuracy": accuracy, "per_class": per_class, "lr": lr}
            results.add(key, {**measured, "macs": cost.macs, "params": cost.params})
        name = float(width) if isinstance(width, int | float) else key
        rows.append({"validation": {}, **results.rows[key], "width": name})
    return rows


def sub_network(model: Backbone, data: Data, width: Width, seed: int) -> nn.Module:
    """The sub-network of `width` as a plain model, with a new linear classifier for the classes of `data`."""
    if has_statistics(model) and width_key(width) not in statistics(model):
        calibrate(model, data.train_eval, width)
    shape = (data.in_channels, data.size, data.size)
    network = headless(model, width, shape)
    with torch.no_grad():
        features = network(torch.zeros(1, *shape, device=device_of(model))).shape[1]
    classifier = nn.Linear(features, data.num_classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    network.fc = classifier.to(device_of(model))
    return network.to(memory_format=torch.channels_last)


def headless(model: Backbone, width: Width, image_shape: Sequence[int]) -> nn.Module:
    """The sub-network of `width`, calibrated, as a plain model of images (C, H, W) with pooled features as output."""
    model = copy.deepcopy(model)
    model.fc = nn.Identity()
    return standalone(model, width, torch.zeros(2, *image_shape, device=device_of(model)))


def _best_learning_rate(
    network: nn.Module,
    width: Width,
    indices: IndexArray,
    learning_rates: Sequence[float],
    training: _Training,
    results: Results,
) -> float:
    """The learning rate with the best accuracy on held-out images; the first of equals."""
    data, key = training.data, width_key(width)
    held_out = _rank_in_class(data.train_labels.numpy()[indices], training.seed) % HELD_OUT == HELD_OUT - 1
    if not held_out.any():
        raise DataError(
            f"a learning rate is chosen on every fifth labelled image of a class, but in {len(indices)} images no "
            f"class has {HELD_OUT}: give one learning rate"
        )
    validation: dict[str, float | None] = dict(results.rows.get(key, {}).get("validation", {}))
    for lr in learning_rates:
        if f"{lr:g}" in validation:
            continue
        file = f"width-{key}-lr-{lr:g}.pt"
        try:
            tuned = training.run(network, width, indices[~held_out], lr, file)
            validation[f"{lr:g}"] = _accuracies(tuned, data.part(indices[held_out], (1.0, 1.0)).plain)[0]
        except TrainingError:
            validation[f"{lr:g}"] = None
        results.add(key, {"validation": validation})
        (training.folder / file).unlink(missing_ok=True)
    best = max(learning_rates, key=lambda lr: -1.0 if (value := validation[f"{lr:g}"]) is None else value)
    if validation[f"{best:g}"] is None:
        raise TrainingError(f"width {key}: the loss is not finite with any of the learning rates {learning_rates}")
    return best


@dataclass(frozen=True)
class _Training:
    """What all trainings of a run share; see :func:`finetune`."""

    data: Data
    protocol: FinetuneProtocol
    folder: Path
    subject: dict[str, Any]
    seed: int
    amp: str
    on_epoch: OnEpoch | None

    def run(self, network: nn.Module, width: Width, indices: IndexArray, lr: float, file: str) -> nn.Module:
        """A trained copy of `network`; its state is in `file` after every epoch, and is taken up from there."""
        network, device = copy.deepcopy(network).train(), device_of(network)
        protocol = replace(self.protocol, lr=lr)
        head = list(network.fc.parameters())  # type: ignore[union-attr]
        body = [p for name, p in network.named_parameters() if not name.startswith("fc.")]
        ratio = 1.0 if protocol.head_lr is None else protocol.head_lr / self.protocol.lr
        optimizer = torch.optim.SGD(
            [{"params": body, "ratio": 1.0}, {"params": head, "ratio": ratio}],
            lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        parts = {"network": network, "optimizer": optimizer, "scaler": scaler}
        path, subject = self.folder / file, {**self.subject, "lr": lr}
        epochs_done = 0
        if path.is_file():
            state = checkpoints.read(path)
            if not isinstance(state, dict) or state.get("subject") != subject:
                raise CheckpointError(f"{path} is not a state of this fine-tuning: remove it")
            for name, part in parts.items():
                part.load_state_dict(state[name])  # type: ignore[attr-defined]
            epochs_done = state["epoch"]
        images = self.data.part(indices, protocol.crop_scale)
        for epoch in range(epochs_done, protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = group["ratio"] * protocol.learning_rate(epoch)
            loss = self._epoch(network, optimizer, scaler, images, epoch, len(indices))
            if not math.isfinite(loss):
                raise TrainingError(
                    f"width {width_key(width)}: the loss is {loss} in epoch {epoch + 1} with learning rate {lr:g}"
                )
            state = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
            checkpoints.save(path, {"subject": subject, "epoch": epoch + 1, **state})
            if self.on_epoch is not None:
                self.on_epoch(width, lr, epoch + 1, loss)
        return network.eval()

    def _epoch(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        part: Part,
        epoch: int,
        images: int,
    ) -> float:
        """One pass over the labelled images; the mean loss."""
        device = device_of(network)
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        total, batches = torch.zeros((), device=device), 0
        for x, labels in part.augmented(epoch, self.protocol.batch_size):
            if len(labels) < min(self.protocol.batch_size, images):
                continue  # what does not fill a batch: its statistics would be those of a few images
            x = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            with torch.autocast(device.type, dtype, enabled=self.amp != "none"):
                loss = F.cross_entropy(network(x), labels.to(device, non_blocking=True))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
            batches += 1
        return float(total) / batches


@torch.no_grad()
def _accuracies(network: nn.Module, images: EvaluationLoader) -> tuple[float, float]:
    """Top-1 accuracy, and its mean over the classes that occur, in percent."""
    device = device_of(network)
    predicted, labels = [], []
    for x, y in images:
        predicted.append(network(x.to(device, memory_format=torch.channels_last)).argmax(1).cpu())
        labels.append(y.cpu())
    truth, given = torch.cat(labels).numpy(), torch.cat(predicted).numpy()
    per_class = recall_score(truth, given, labels=np.unique(truth), average="macro")
    return 100.0 * float(accuracy_score(truth, given)), 100.0 * float(per_class)
