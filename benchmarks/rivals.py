"""The training steps us3l is measured against: SimCLR with a momentum teacher and sub-networks, in plain PyTorch alone.

Nothing here imports us3l or us3l_kernels. All rivals do the same mathematics (Cao, Sun, Zhou, CVPR 2023) in the way
their name says; `published` takes one optimizer step per width, the others one for all widths.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

MODELS = ("resnet18", "resnet34", "resnet50", "mobilenet_v2", "resnet_tiny")
VIEWS = 2


@dataclass(frozen=True)
class Settings:
    """One training step: what is computed, by whichever side. Widths in order of execution, the full one first."""

    model: str = "resnet18"
    stem: str = "cifar"
    widths: tuple[float, ...] = (1.0, 0.6, 0.25)
    hidden_dim: int = 2048
    dim: int = 256
    temperature: float = 0.5
    teacher_momentum: float = 0.99
    lr: float = 1e-4  # small: a large one feeds rounding back into the next width before results are compared
    momentum: float = 0.9
    weight_decay: float = 1e-4
    alpha: float = 0.05
    groups: int = 8
    dtype: torch.dtype = torch.float32  # bfloat16: parameters in float32, forward passes under autocast
    device: torch.device = torch.device("cpu")

    @property
    def parameter_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype is torch.bfloat16 else self.dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16
        )

    def describe(self) -> dict[str, Any]:
        """What a result says of them."""
        return {
            "model": self.model,
            "stem": self.stem,
            "widths": list(self.widths),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


# --- the sliced network: torchvision's, with layers that read a prefix of their weights through autograd -------------


def active_channels(channels: int, width: float, ratio: int = 1) -> int:
    """Channels of a layer at a width: the nearest multiple of 8 per `ratio`, one step up if that loses over 10 %."""
    exact = channels * width / ratio
    rounded = max(8, int(exact + 4) // 8 * 8)
    if rounded < 0.9 * exact:
        rounded += 8
    return min(rounded * ratio, channels)


class Layer:
    """What the sliced layers share: the active output channels, and how a prefix of a parameter is taken."""

    slice_output = True
    slice_always = False  # the published code slices at full width too
    ratio = 1
    active: int

    def set_width(self, channels: int, width: float) -> None:
        self.active = active_channels(channels, width, self.ratio) if self.slice_output else channels

    def prefix(self, parameter: Tensor, *sizes: int) -> Tensor:
        """`parameter[:sizes[0], :sizes[1], ...]`; the parameter itself where that is all of it."""
        if not self.slice_always and parameter.shape[: len(sizes)] == sizes:
            return parameter
        return parameter[tuple(slice(size) for size in sizes)]


class Conv2d(Layer, nn.Conv2d):
    """A convolution without bias, dense or depthwise."""

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        out, inputs, groups = (channels, 1, channels) if self.groups > 1 else (self.active, channels, 1)
        weight = self.prefix(self.weight, out, inputs)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


class Linear(Layer, nn.Linear):
    """A linear layer that reads as many input features as come; its output is never sliced."""

    slice_output = False

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.prefix(self.weight, self.out_features, x.shape[1]), self.bias)


class Norm(Layer):
    """Batch statistics of each view of the batch, affine parameters by prefix, no running statistics."""

    views = 1
    weight: nn.Parameter
    bias: nn.Parameter
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.prefix(self.weight, x.shape[1]), self.prefix(self.bias, x.shape[1])
        normalised = [
            F.batch_norm(view, None, None, weight, bias, training=True, eps=self.eps)
            for view in x.chunk(self.views)
        ]
        return normalised[0] if self.views == 1 else torch.cat(normalised)


class BatchNorm1d(Norm, nn.BatchNorm1d):
    """Of the heads: features are never sliced there."""


class BatchNorm2d(Norm, nn.BatchNorm2d):
    """Of the backbone."""


def set_width(model: nn.Module, width: float) -> None:
    """Make every sliced layer of `model` use its channels at `width`."""
    for layer in model.modules():
        if isinstance(layer, Conv2d):
            layer.set_width(layer.out_channels, width)


def backbone(settings: Settings) -> nn.Module:
    """torchvision's network of that name with sliced layers; its classifier is the projector."""
    if settings.model == "mobilenet_v2":
        cifar = settings.stem == "cifar"
        # CIFAR: no reduction in the stem and in the 24-channel stage.
        rows = [
            [1, 16, 1, 1], [6, 24, 2, 1 if cifar else 2], [6, 32, 3, 2], [6, 64, 4, 2],
            [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1],
        ]  # fmt: skip
        model = torchvision.models.mobilenet_v2(inverted_residual_setting=rows)
        if cifar:
            model.features[0][0].stride = (1, 1)
        _slim(model)
        model.features[-1][0].slice_output = False
        for block in model.features:
            if isinstance(block, InvertedResidual) and len(block.conv) == 4:
                expand = block.conv[0][0]
                expand.ratio = expand.out_channels // expand.in_channels
        model.classifier = projector(model.last_channel, settings)
        return model
    if settings.model == "resnet_tiny":
        model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1])
        model.inplanes, model.conv1, model.bn1 = 16, nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16)
        model.layer1 = model._make_layer(BasicBlock, 16, 1)
        model.layer2 = model._make_layer(BasicBlock, 32, 1, stride=2)
        model.layer3 = model._make_layer(BasicBlock, 64, 1, stride=2)
        model.layer4 = nn.Identity()
        features = 64
    else:
        model = torchvision.models.get_model(settings.model)
        features = model.fc.in_features
    stem = model.bn1.num_features
    if settings.stem == "cifar":
        model.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model.fc = projector(features, settings)
    _slim(model)
    return model


def projector(features: int, settings: Settings) -> nn.Sequential:
    hidden = settings.hidden_dim
    return nn.Sequential(
        Linear(features, hidden), BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(inplace=True),
        Linear(hidden, hidden), BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(inplace=True),
        Linear(hidden, settings.dim),
    )  # fmt: skip


def predictor(settings: Settings) -> nn.Sequential:
    hidden = settings.hidden_dim
    return nn.Sequential(
        Linear(settings.dim, hidden, bias=False), BatchNorm1d(hidden, track_running_stats=False), nn.ReLU(inplace=True),
        Linear(hidden, settings.dim),
    )  # fmt: skip


def _slim(module: nn.Module) -> None:
    """Replace torchvision's convolutions and norms by sliced ones."""
    for name, child in module.named_children():
        if type(child) is nn.Conv2d:
            setattr(module, name, Conv2d(*geometry(child)))
        elif type(child) is nn.BatchNorm2d:
            setattr(module, name, BatchNorm2d(child.num_features, child.eps, track_running_stats=False))
        else:
            _slim(child)


def geometry(conv: nn.Conv2d) -> Any:
    """The arguments of a convolution's constructor, without a bias."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return (conv.in_channels, conv.out_channels, *sizes, conv.groups, False)


class Student(nn.Module):
    """Encoder (backbone and projector) and the predictor that sub-networks go through."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.encoder = backbone(settings)
        self.predictor = predictor(settings)
        self.to(device=settings.device, dtype=settings.parameter_dtype)
        set_width(self, 1.0)

    def forward(self, images: Tensor, width: float) -> Tensor:
        set_width(self, width)
        projection = self.encoder(images)
        return projection if width == 1.0 else self.predictor(projection)


def initial_weights(settings: Settings, seed: int = 0) -> list[Tensor]:
    """Weights every side starts from, in the order of `Student.parameters()`; norms are not quite 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for name, parameter in Student(settings).named_parameters():
        random = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value = random * (2 / parameter[0].numel()) ** 0.5
        else:
            value = 0.1 * random + (1.0 if name.endswith("weight") else 0.0)
        weights.append(value.to(parameter))
    return weights


def copy_weights(parameters: Iterable[Tensor], weights: list[Tensor]) -> None:
    """Set `parameters` to `weights`, one by one."""
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.copy_(weight)


# --- losses ----------------------------------------------------------------------------------------------------------


def info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent of SimCLR over the 2N samples [a; b], the sample itself left out."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
    positives = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, positives)


def step_loss(predictions: list[Tensor], targets: list[Tensor], width: float, temperature: float) -> Tensor:
    """Both views against the teacher's other view: InfoNCE at full width, negative cosine for sub-networks."""
    pairs = list(zip(predictions, reversed(targets), strict=True))
    if width == 1.0:
        losses = [info_nce(p, t, temperature) for p, t in pairs]
    else:
        losses = [-F.cosine_similarity(p, t, dim=1).mean() for p, t in pairs]
    return (losses[0] + losses[1]) / VIEWS


# --- the rivals ------------------------------------------------------------------------------------------------------


class Published:
    """As the authors' code runs: NCHW, one forward per view, one update per width, the regulariser as a loss of
    float64 masks made anew for every parameter (about 19 operations and 120 bytes per weight), EMA into new tensors.
    """

    def __init__(self, settings: Settings, weights: list[Tensor]) -> None:
        self.settings = settings
        self.student = Student(settings)
        for layer in self.student.modules():
            if isinstance(layer, Layer):
                layer.slice_always = True
        copy_weights(self.student.parameters(), weights)
        self.teacher = copy.deepcopy(self.student.encoder).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.student.parameters(), settings.lr, settings.momentum)

    def step(self, images: Tensor) -> Tensor:
        """Train on images [2N, C, H, W], both views stacked; the losses of the widths, without the regulariser."""
        settings, losses = self.settings, []
        views = images.contiguous().chunk(VIEWS)
        targets: list[Tensor] = []
        for width in settings.widths:
            self.optimizer.zero_grad()
            with settings.autocast():
                predictions = [self.student(view, width) for view in views]
                if not targets:
                    self.average()
                    with torch.no_grad():
                        targets = [self.teacher(view) for view in views]
                loss = step_loss(predictions, targets, width, settings.temperature)
            (loss + self.regulariser(width)).backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    @torch.no_grad()
    def average(self) -> None:
        momentum = self.settings.teacher_momentum
        for teacher, student in zip(self.teacher.parameters(), self.student.encoder.parameters(), strict=True):
            teacher.data = teacher.data * momentum + student.data * (1.0 - momentum)

    def regulariser(self, width: float) -> Tensor:
        """Sum over channel groups g of lambda (1 - alpha g) ||p_g||^2, lambda = weight_decay / 2; matrices: g = 0."""
        settings = self.settings
        total = torch.zeros((), dtype=torch.float64, device=settings.device)
        for name, parameter in self.student.named_parameters():
            if width == 1.0 and "predictor" in name:
                continue
            mask = torch.ones(parameter.shape, dtype=torch.float64, device=settings.device)
            if parameter.ndim != 2:
                size = max(1, len(parameter) // settings.groups)
                for group in range(settings.groups):
                    end = None if group == settings.groups - 1 else (group + 1) * size
                    mask[group * size : end] = 1 - settings.alpha * group
            total = total + settings.weight_decay / 2 * (mask * parameter**2).sum()
        return total.to(settings.parameter_dtype)

    def parameters(self) -> list[Tensor]:
        """Of the student, in the order of `initial_weights`."""
        return list(self.student.parameters())

    def teacher_parameters(self) -> list[Tensor]:
        """Of the momentum encoder, in the same order."""
        return list(self.teacher.parameters())


class Eager:
    """The best plain PyTorch: channels_last, full parameters unsliced, one fused update for all widths with the
    regulariser inside, EMA in place by foreach. `stacked`: both views in one batch, norms view by view and
    concatenated; otherwise one forward per view. Equal mathematics; which is faster depends on the machine.
    """

    def __init__(self, settings: Settings, weights: list[Tensor], *, stacked: bool) -> None:
        self.settings = settings
        self.stacked = stacked
        self.student = Student(settings).to(memory_format=torch.channels_last)
        copy_weights(self.student.parameters(), weights)
        self.teacher = copy.deepcopy(self.student.encoder).requires_grad_(False)
        for model in (self.student, self.teacher):
            for layer in model.modules():
                if isinstance(layer, Norm):
                    layer.views = VIEWS if stacked else 1
        trained = self.student if len(settings.widths) > 1 else self.student.encoder
        self._prepare_update(list(trained.parameters()), list(self.student.encoder.parameters()))

    def _prepare_update(self, parameters: list[nn.Parameter], averaged: list[nn.Parameter]) -> None:
        """`parameters` are trained: all of them get a gradient in a step. The teacher follows `averaged`."""
        settings = self.settings
        self._parameters, self._averaged = parameters, averaged
        self._decays = [row_decay(parameter, settings) for parameter in parameters]
        self._average = get_ema_multi_avg_fn(settings.teacher_momentum)
        self._optimizer = torch.optim.SGD(parameters, settings.lr, settings.momentum, fused=True)

    def step(self, images: Tensor) -> Tensor:
        """Train on images [2N, C, H, W], both views stacked; the losses of the widths, without the regulariser."""
        settings, losses = self.settings, []
        images = images.to(memory_format=torch.channels_last)
        batches = [images] if self.stacked else list(images.chunk(VIEWS))
        self._average(list(self.teacher.parameters()), self._averaged, 0)
        with torch.no_grad(), settings.autocast():
            targets = [target for batch in batches for target in self._views(self.teacher(batch))]
        for width in settings.widths:
            loss = self.loss(batches, targets, width)
            loss.backward()
            losses.append(loss.detach())
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        with torch.no_grad():
            torch._foreach_addcmul_(gradients, list[Tensor](self._parameters), self._decays)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack(losses)

    def loss(self, batches: list[Tensor], targets: list[Tensor], width: float) -> Tensor:
        """Of the sub-network of one width."""
        with self.settings.autocast():
            predictions = [p for batch in batches for p in self._views(self.student(batch, width))]
            return step_loss(predictions, targets, width, self.settings.temperature)

    def _views(self, outputs: Tensor) -> tuple[Tensor, ...]:
        return outputs.chunk(VIEWS) if self.stacked else (outputs,)

    def parameters(self) -> list[Tensor]:
        """Of the student, in the order of `initial_weights`."""
        return list(self.student.parameters())

    def teacher_parameters(self) -> list[Tensor]:
        """Of the momentum encoder, in the same order."""
        return list(self.teacher.parameters())


class Compiled(Eager):
    """`Eager` with forward and loss under torch.compile: one specialisation per width, of few and fixed ones.

    mode: of torch.compile; "reduce-overhead" makes CUDA graphs.
    """

    def __init__(self, settings: Settings, weights: list[Tensor], *, stacked: bool, mode: str | None = None) -> None:
        super().__init__(settings, weights, stacked=stacked)
        torch._dynamo.reset()
        self.teacher.compile(dynamic=False, mode=mode)
        self.loss = torch.compile(self.loss, dynamic=False, mode=mode)  # type: ignore[method-assign]

    def step(self, images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # nothing of the last step is needed any more
        return super().step(images)


class Standalone(Eager):
    """One dense network per width, each with heads of its own, trained as `Eager` trains its sub-networks with one
    teacher: what slicing should cost is nothing.
    """

    def __init__(self, settings: Settings, weights: list[Tensor], *, stacked: bool) -> None:
        super().__init__(settings, weights, stacked=stacked)
        self.networks = {width: self._dense(width) for width in settings.widths}
        parameters = [
            parameter
            for width, network in self.networks.items()
            for parameter in (network.encoder if width == 1.0 else network).parameters()
        ]
        self._prepare_update(parameters, list(self.networks[1.0].encoder.parameters()))

    def loss(self, batches: list[Tensor], targets: list[Tensor], width: float) -> Tensor:
        """Of the network of one width."""
        with self.settings.autocast():
            predictions = [p for batch in batches for p in self._views(self.networks[width](batch, width))]
            return step_loss(predictions, targets, width, self.settings.temperature)

    def parameters(self) -> list[Tensor]:
        """Of all the networks."""
        return list(self._parameters)

    def _dense(self, width: float) -> Student:
        """The sub-network of a width with weights of its own: its layers are as large as what they read."""
        network = copy.deepcopy(self.student)
        read: dict[Any, int] = {}  # the active channels that reach a layer are only known once images pass through
        for layer in network.modules():
            if isinstance(layer, Layer):
                layer.register_forward_pre_hook(lambda layer, inputs: read.__setitem__(layer, inputs[0].shape[1]))
        with torch.no_grad():
            images = torch.randn(VIEWS * 2, 3, 32, 32, device=self.settings.device, dtype=self.settings.parameter_dtype)
            network(images, width)
        for layer, channels in read.items():
            sizes: tuple[int, ...]
            if isinstance(layer, Conv2d):
                depthwise = layer.groups > 1
                sizes = (channels, 1) if depthwise else (layer.active, channels)
                layer.groups = channels if depthwise else 1
                layer.out_channels = sizes[0]
                layer.slice_output = False
            elif isinstance(layer, Linear):
                sizes = (layer.out_features, channels)
            else:
                sizes = (channels,)
                layer.bias = nn.Parameter(layer.bias[:channels].detach().clone())
            weight = layer.weight[tuple(slice(size) for size in sizes)]
            layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
            layer._forward_pre_hooks.clear()
        return network.to(memory_format=torch.channels_last)


def row_decay(parameter: Tensor, settings: Settings) -> Tensor:
    """Weight decay of every row (or element) of a parameter, to be multiplied with it; one number for a matrix."""
    decay = torch.full((), settings.weight_decay, device=parameter.device, dtype=parameter.dtype)
    if parameter.ndim == 2:
        return decay
    rows = len(parameter)
    group = torch.arange(rows, device=parameter.device) // max(1, rows // settings.groups)
    group = group.clamp(max=settings.groups - 1).to(parameter.dtype)
    return (decay * (1 - settings.alpha * group)).view(-1, *[1] * (parameter.ndim - 1))


Rival = Published | Eager
