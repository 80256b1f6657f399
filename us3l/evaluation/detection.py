"""Object detection and instance segmentation on COCO: Faster and Mask R-CNN with a feature pyramid on a sub-network.

The sub-network becomes a plain model (`us3l_kernels.standalone`), its stages feed torchvision's feature pyramid, and
all of it is fine-tuned by the schedule called 1x (Wu et al., Detectron2, 2019), as self-supervised networks are
compared since He et al. ("Momentum Contrast", CVPR 2020). Metrics are pycocotools'.
"""

from __future__ import annotations

import contextlib
import io
import math
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.transforms.v2.functional import pil_to_tensor

from us3l import checkpoint as checkpoints
from us3l.data.base import EpochOrder
from us3l.data.folder import read_image
from us3l.data.seeding import Stream, uniforms
from us3l.distributed import SINGLE, World
from us3l.errors import CheckpointError, ConfigError, DataError, TrainingError
from us3l.signals import catch_signals
from us3l_kernels.dense import ResidualBatchNorm

try:
    from pycocotools import mask as coco_masks
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
except ImportError as error:
    raise ConfigError(f"detection needs the packages of `pip install us3l[detection]`: {error}") from None

LEVELS = 4  # of the pyramid, from as many of the network's stages; torchvision adds one by pooling
PYRAMID_CHANNELS = 256
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

Target = dict[str, Tensor]
Sample = tuple[Tensor, Target]  # image [C, H, W] in [0, 1]; boxes [n, 4], labels [n], image_id [], masks [n, H, W]


@dataclass(frozen=True)
class DetectionProtocol:
    """Training, by default 1x: SGD, 90,000 batches of 16 images, the learning rate falling tenfold twice.

    task: "detection" (Faster R-CNN) or "segmentation" (Mask R-CNN).
    norm: of the backbone, "sync" (statistics of the batch, over all processes; the pyramid has such norms too) or
        "frozen" (its statistics and affine parameters stay; the pyramid has none).
    min_size: the shorter side of images, pixels; one of these by chance in training, the last one in tests.
    max_size: bound of the longer side.
    """

    task: str = "segmentation"
    norm: str = "sync"
    iterations: int = 90_000
    batch_size: int = 16  # of all processes together
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: int = 1000  # iterations of linear growth from lr / 1000
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    max_size: int = 1333

    def learning_rate(self, iteration: int) -> float:
        """Of an iteration, from 0: a tenth after 2/3 of them, and again after 8/9."""
        lr = self.lr * 0.1 ** ((3 * iteration >= 2 * self.iterations) + (9 * iteration >= 8 * self.iterations))
        grown = min(1.0, iteration / max(1, self.warmup))
        return lr * (1e-3 * (1 - grown) + grown)


# ---------------------------------------------------------------------------------------------- data


class CocoImages(Dataset[Sample]):
    """A split of a COCO-like data set: ROOT/SPLIT/*.jpg and ROOT/annotations/instances_SPLIT.json.

    Item (epoch, index): image and target; in training, flipped by a chance that depends on these and the seed alone.

    Args:
        channels: 3, or 1: images become grey.
        masks: whether targets have masks.
        seed: of the flips. None: a test split, never flipped, and with the images that nothing is on.

    Raises:
        DataError: files are missing, are no COCO annotations, or there is nothing to train on.
    """

    def __init__(self, root: str | Path, split: str, *, channels: int, masks: bool, seed: int | None = None) -> None:
        self.images, annotations = Path(root) / split, Path(root) / "annotations" / f"instances_{split}.json"
        self.channels, self.masks, self.seed = channels, masks, seed
        for path in (self.images, annotations):
            if not path.exists():
                raise DataError(
                    f"{path} is missing: expected {root}/{split}/*.jpg and {annotations} (cocodataset.org; instances)"
                )
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(annotations))
            self.categories = sorted(self.coco.getCatIds())
            self.ids = [i for i in sorted(self.coco.getImgIds()) if seed is None or self._annotations(i)]
        except (ValueError, KeyError, TypeError, AssertionError, OSError) as error:
            raise DataError(f"{annotations} is no file of COCO instances: {error!r}") from error
        if not self.ids or not self.categories:
            raise DataError(f"{annotations} has {len(self.categories)} categories and {len(self.ids)} usable images")

    def __len__(self) -> int:
        return len(self.ids)

    def _annotations(self, image_id: int) -> list[dict[str, Any]]:
        """Those that are trained on: single objects with a box of at least a pixel."""
        listed = self.coco.loadAnns(self.coco.getAnnIds(imgIds=[image_id], iscrowd=False))
        return [each for each in listed if min(each["bbox"][2:]) >= 1]

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image_id = self.ids[index]
        with read_image(str(self.images / self.coco.loadImgs([image_id])[0]["file_name"])) as opened:
            image = pil_to_tensor(opened.convert("RGB" if self.channels == 3 else "L")).float() / 255
        listed = self._annotations(image_id)
        boxes = torch.tensor([each["bbox"] for each in listed], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([1 + self.categories.index(each["category_id"]) for each in listed]),
            "image_id": torch.tensor(image_id),
        }
        if self.masks:
            masks = [torch.from_numpy(self.coco.annToMask(each)) for each in listed]
            target["masks"] = torch.stack(masks) if masks else torch.zeros(0, *image.shape[1:], dtype=torch.uint8)
        if self.seed is not None and uniforms(self.seed, epoch, np.array([index]), Stream.VIEW_1, 1)[0, 0] < 0.5:
            image = image.flip(-1)
            target["boxes"] = torch.stack(
                [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], dim=1
            )
            if self.masks:
                target["masks"] = target["masks"].flip(-1)
        return image, target


def _load(
    images: CocoImages, batches: Iterator[list[tuple[int, int]]] | list[list[tuple[int, int]]], workers: int
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_lists,
        generator=torch.Generator(),  # it draws a seed for its workers: not from the run's
    )
    return iter(loader)


def _lists(samples: list[Sample]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]


# ---------------------------------------------------------------------------------------------- model


class Pyramid(nn.Module):
    """Features of several resolutions: a feature pyramid (Lin et al., CVPR 2017) on the last stages of a network.

    Args:
        network: plain (of `us3l_kernels.standalone`); `body` is what of it comes before the end of its last stage.
        stages: names of the modules whose outputs the pyramid reads; children of one module, which runs its
            children one after the other.
        channels: of the images.
        norm: "frozen" or "sync", see :class:`DetectionProtocol`.
        synchronise: with "sync": over all processes.

    Attributes:
        out_channels: of every level.
        strides: pixels of an image per step in each level, the pooled one last.
    """

    def __init__(
        self, network: nn.Module, stages: Sequence[str], channels: int, *, norm: str, synchronise: bool
    ) -> None:
        super().__init__()
        (container,) = {name.rpartition(".")[0] for name in stages}
        self.levels = {name.rpartition(".")[2]: str(level) for level, name in enumerate(stages)}
        children = list(network.get_submodule(container).named_children())
        last = [name for name, _ in children].index(list(self.levels)[-1])
        self.body = nn.Sequential(OrderedDict(children[: last + 1]))
        side = 64 * 2 ** len(stages)
        with torch.no_grad():
            example = torch.zeros(1, channels, side, side, device=next(network.parameters()).device)
            maps = list(self.maps(example).values())
        self.strides = [side // x.shape[3] for x in maps]
        self.strides.append(2 * self.strides[-1])
        self.out_channels = PYRAMID_CHANNELS
        self.frozen = norm == "frozen"
        new_norm: type[nn.Module] | None = None if self.frozen else nn.SyncBatchNorm if synchronise else nn.BatchNorm2d
        self.fpn = FeaturePyramidNetwork(
            [x.shape[1] for x in maps], PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool(), norm_layer=new_norm
        ).to(example.device)
        for name, module in list(self.body.named_modules()):
            if isinstance(module, _BatchNorm):
                module.requires_grad_(not self.frozen)
                if synchronise and not self.frozen:
                    self.body.set_submodule(name, _synchronised(module))

    def maps(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """The outputs of the stages, the finest first, by level."""
        maps, x = OrderedDict(), images
        for name, module in self.body.named_children():
            x = module(x)
            if name in self.levels:
                maps[self.levels[name]] = x
        return maps

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Images [N, C, H, W] to maps [N, PYRAMID_CHANNELS, H / stride, W / stride], by level."""
        return self.fpn(self.maps(images))

    def train(self, mode: bool = True) -> Pyramid:
        """As of any module, but frozen norms stay in evaluation mode."""
        super().train(mode)
        for module in self.body.modules():
            if self.frozen and isinstance(module, _BatchNorm):
                module.eval()
        return self


class ResidualSyncBatchNorm(ResidualBatchNorm, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm, see `ResidualBatchNorm`."""


def _synchronised(norm: _BatchNorm) -> nn.SyncBatchNorm:
    """torch's own conversion would forget the residual sum and the activation."""
    kind = ResidualSyncBatchNorm if isinstance(norm, ResidualBatchNorm) else nn.SyncBatchNorm
    synchronised = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, device="meta")
    synchronised.load_state_dict(norm.state_dict(), assign=True)
    if isinstance(norm, ResidualBatchNorm) and isinstance(synchronised, ResidualBatchNorm):
        synchronised.activation = norm.activation
    return synchronised


def detector(
    network: nn.Module,
    stages: Sequence[str],
    num_classes: int,
    protocol: DetectionProtocol,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    synchronise: bool = False,
) -> FasterRCNN:
    """Faster or Mask R-CNN on a sub-network, as torchvision builds it on its own ResNets.

    Args:
        network: plain (of `us3l_kernels.standalone`).
        stages: names of the modules that end a resolution, see `Backbone.stages`; the last four are used.
        num_classes: of objects; the detector has one more, the background.
        mean, std: of the images that the network was trained on, per channel (pixels in [0, 1]).
        synchronise: norms over all processes.
    """
    backbone = Pyramid(network, list(stages)[-LEVELS:], len(mean), norm=protocol.norm, synchronise=synchronise)
    # The published sizes, 32 pixels at stride 4 to 512 at 64, for any strides.
    sizes = tuple((8 * stride,) for stride in backbone.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    levels = list(backbone.levels.values())
    options: dict[str, Any] = {
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        "min_size": protocol.min_size,
        "max_size": protocol.max_size,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if protocol.task == "detection":
        return FasterRCNN(backbone, num_classes + 1, **options)
    mask_pool = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    return MaskRCNN(backbone, num_classes + 1, mask_roi_pool=mask_pool, **options)


# ---------------------------------------------------------------------------------------------- training and metrics


class Detection:
    """The training of a detector, and its evaluation. A run that was stopped goes on from `folder`.

    Args:
        model: of :func:`detector`, on its device.
        train, test: splits with the same categories.
        folder: for the state, `last.pt`, and `results.json`.
        subject: what the run depends on, besides the protocol.
        every_minutes: between states.
        amp: "none", "bf16" or "fp16".
        on_step: called with (iterations done, mean loss since the last call), every 20 iterations.

    Raises:
        ConfigError: synchronised norms on several processes without GPUs.
        CheckpointError: `folder` holds the state of another run.
        DataError: the splits differ in their categories, or there are less images than a batch.
    """

    def __init__(
        self,
        model: FasterRCNN,
        train: CocoImages,
        test: CocoImages,
        protocol: DetectionProtocol,
        folder: str | Path,
        *,
        subject: dict[str, Any],
        every_minutes: float = 10.0,
        amp: str = "none",
        workers: int = 0,
        seed: int = 0,
        world: World = SINGLE,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        if world.size > 1 and protocol.norm == "sync" and next(model.parameters()).device.type != "cuda":
            raise ConfigError("norm=sync on several processes needs GPUs: use norm=frozen, or one process")
        if train.categories != test.categories:
            raise DataError(f"the splits have other categories: {train.categories} and {test.categories}")
        if len(train) < protocol.batch_size or protocol.batch_size % world.size:
            raise DataError(
                f"a batch of {protocol.batch_size} images on {world.size} process(es) has to be a multiple of "
                f"{world.size} and at most the {len(train)} training images"
            )
        self.model, self.train, self.test, self.protocol = model, train, test, protocol
        self.folder, self.every_minutes, self.amp = Path(folder), every_minutes, amp
        self.workers, self.seed, self.world, self.on_step = workers, seed, world, on_step
        self.subject = {"protocol": asdict(protocol), "seed": seed, "processes": world.size, "amp": amp, **subject}
        self.order = EpochOrder(len(train), protocol.batch_size // world.size, seed, world.rank, world.size)
        self.device = next(model.parameters()).device
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trained, protocol.lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.iteration = 0
        self.state = self.folder / "last.pt"
        if self.state.is_file():
            self._resume()

    def _resume(self) -> None:
        saved = checkpoints.read(self.state)
        if not isinstance(saved, dict) or saved.get("subject") != self.subject:
            raise CheckpointError(f"{self.state} is the state of another run: choose another --out, or remove it")
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.iteration = saved["iteration"]
        checkpoints.set_rng_state(saved["rng"][self.world.rank])

    def save(self) -> None:
        """Write the state. All processes must call it."""
        rng: list[Any] = [checkpoints.rng_state()]
        if self.world.size > 1:
            rng = rng * self.world.size
            dist.all_gather_object(rng, checkpoints.rng_state())
        if self.world.is_main:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            about = {"subject": self.subject, "iteration": self.iteration, "rng": rng}
            checkpoints.save(self.state, {**about, **state})
        self.world.barrier()

    def fit(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: the loss is not finite.
            KeyboardInterrupt, SystemExit: after SIGINT and SIGTERM, when the state has been saved.
        """
        model: nn.Module = self.model.train()
        if self.iteration == 0:
            torch.manual_seed(self.seed + self.world.rank)  # of the proposals that are learnt from, and image sizes
        if self.world.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            model = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        saved_at, losses = time.monotonic(), []
        with catch_signals() as stopped_by:
            for images, targets in _load(self.train, self._batches(), self.workers):
                losses.append(self._step(model, images, targets))
                self.iteration += 1
                done = self.iteration == self.protocol.iterations
                if self.on_step is not None and (self.iteration % 20 == 0 or done):
                    self.on_step(self.iteration, sum(losses) / len(losses))
                    losses = []
                stop = self.world.any(bool(stopped_by), self.device)
                due = time.monotonic() - saved_at > 60 * self.every_minutes
                if stop or done or self.world.any(due, self.device):
                    self.save()
                    saved_at = time.monotonic()
                if stop:
                    raise SystemExit(128 + signal.SIGTERM) if signal.SIGTERM in stopped_by else KeyboardInterrupt

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index) of this process's images, from the current iteration to the last one."""
        for iteration in range(self.iteration, self.protocol.iterations):
            epoch, batch = divmod(iteration, len(self.order))
            if iteration == self.iteration or batch == 0:
                batches = self.order.batches(epoch)
            yield [(epoch, int(index)) for index in batches[batch]]

    def _step(self, model: nn.Module, images: list[Tensor], targets: list[Target]) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.protocol.learning_rate(self.iteration)
        dtype = torch.float16 if self.amp == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=self.amp != "none"):
            losses = model(
                [image.to(self.device, non_blocking=True) for image in images],
                [{key: value.to(self.device, non_blocking=True) for key, value in each.items()} for each in targets],
            )
            loss = sum(losses.values())
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        value = float(loss.detach())
        if self.world.any(not math.isfinite(value), self.device):
            parts = {name: float(part.detach()) for name, part in losses.items()}
            raise TrainingError(f"the loss is not finite in iteration {self.iteration + 1}: {parts}; lower --lr")
        return value

    def evaluate(self) -> dict[str, dict[str, float | None]]:
        """COCO's metrics (%) of the test images, by kind: "box" and, for segmentation, "mask".

        None where there is no object of that size. All processes must call it, and get the same.
        """
        found = self._detections()
        if self.world.size > 1:
            parts: list[Any] = [None] * self.world.size
            dist.all_gather_object(parts, found)
            found = [each for part in parts for each in part]
        kinds = {"box": "bbox"} | ({"mask": "segm"} if self.protocol.task == "segmentation" else {})
        return {name: coco_metrics(self.test.coco, found, kind) for name, kind in kinds.items()}

    @torch.no_grad()
    def _detections(self) -> list[dict[str, Any]]:
        """What the detector finds in this process's share of the test images, in COCO's format of results."""
        self.model.eval()
        mine = list(range(len(self.test)))[self.world.rank :: self.world.size]
        found = []
        for images, targets in _load(self.test, [[(0, index)] for index in mine], self.workers):
            for output, target in zip(self.model([x.to(self.device) for x in images]), targets, strict=True):
                boxes = output["boxes"].cpu()
                boxes[:, 2:] -= boxes[:, :2]
                masks = output["masks"][:, 0].cpu() >= 0.5 if "masks" in output else None
                labels, scores = output["labels"].tolist(), output["scores"].tolist()
                for i, (box, label, score) in enumerate(zip(boxes.tolist(), labels, scores, strict=True)):
                    each = {"image_id": int(target["image_id"]), "bbox": box, "score": score}
                    each["category_id"] = self.test.categories[label - 1]
                    if masks is not None:
                        each["segmentation"] = coco_masks.encode(np.asfortranarray(masks[i].numpy().astype(np.uint8)))
                    found.append(each)
        return found


def coco_metrics(truth: COCO, found: list[dict[str, Any]], kind: str) -> dict[str, float | None]:
    """METRICS in percent, by pycocotools; None where there is no object of that size.

    Args:
        found: detections in COCO's format of results. kind: "bbox" or "segm".
    """
    with contextlib.redirect_stdout(io.StringIO()):
        # A box would otherwise give the area, which decides what is small, medium and large, for masks too.
        listed = [{k: v for k, v in each.items() if k != "bbox" or kind == "bbox"} for each in found]
        detections = truth.loadRes(listed) if listed else COCO()
        evaluation = COCOeval(truth, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = dict(zip(METRICS, evaluation.stats.tolist(), strict=False))  # recalls follow
    return {name: None if value < 0 else 100 * value for name, value in values.items()}
