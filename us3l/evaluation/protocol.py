"""Evaluation of all sub-networks of a trained backbone in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from us3l.evaluation.calibration import calibrate, has_statistics
from us3l.evaluation.classifier import classifier_accuracy
from us3l.evaluation.features import device_of, features
from us3l.evaluation.knn import knn_accuracy
from us3l.evaluation.linear import SGDProtocol, linear_probe, linear_probe_sgd
from us3l.profile import ProfileRow, profile
from us3l_kernels.nn import SlicedLinear
from us3l_kernels.nn.calibration import statistics
from us3l_kernels.width import Width, width_key

if TYPE_CHECKING:
    from us3l.data.base import Data
    from us3l.models import Backbone

NEIGHBOURS = 20

Probe = Literal["linear", "knn", "classifier"]


def evaluate(
    model: Backbone,
    data: Data,
    widths: Sequence[Width],
    probe: Probe = "linear",
    *,
    protocol: SGDProtocol | None = None,
    on_width: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Calibrate (where that was not done yet) and evaluate a backbone at every width.

    Args:
        model: its head (the projector, after pre-training) is ignored, but by the probe "classifier".
        widths: widths in (0, 1], or plans, in the order of the result.
        probe: "linear", a linear classifier on frozen features; "knn", a weighted 20-nearest-neighbour vote
            (of all training images, where there are fewer); "classifier", the model's own, trained with labels.
        protocol: how the linear classifier is trained: None, to its optimum by L-BFGS on un-augmented
            features (small data), or by SGD (`CIFAR_PROTOCOL`, `IMAGENET_PROTOCOL`).
        on_width: called with every row as it is done.

    Returns:
        One row per width: `width` (float, or the canonical text of a plan), `accuracy` (%, top-1 on the test
        set), `macs` and `params` (of the active part, with the linear classifier).

    Raises:
        ValueError: no width, or an unknown probe.
    """
    if not widths:
        raise ValueError("widths: expected at least one, got none")
    if probe not in ("linear", "knn", "classifier"):
        raise ValueError(f"probe: expected 'linear', 'knn' or 'classifier', got {probe!r}")
    if probe == "classifier" and not isinstance(model.fc, nn.Linear):
        raise ValueError(
            "probe: 'classifier' is for networks trained with labels; "
            f"the head of this one is a {type(model.fc).__name__}"
        )
    costs = classifier_costs(model, data, widths)
    rows: list[dict[str, Any]] = []
    for width, cost in zip(widths, costs, strict=True):
        if has_statistics(model) and width_key(width) not in statistics(model):
            calibrate(model, data.train_eval, width)
        if probe == "classifier":
            accuracy = classifier_accuracy(model, data.test, width)
        elif probe == "linear" and protocol is not None:
            accuracy = linear_probe_sgd(model, data, width, protocol)
        else:
            train, test = features(model, data.train_eval, width), features(model, data.test, width)
            if probe == "linear":
                accuracy = linear_probe(*train, *test)
            else:
                accuracy = knn_accuracy(*train, *test, k=min(NEIGHBOURS, len(train[0])), device=device_of(model))
        name = float(width) if isinstance(width, int | float) else width_key(width)
        rows.append({"width": name, "accuracy": accuracy, "macs": cost.macs, "params": cost.params})
        if on_width is not None:
            on_width(rows[-1])
    return rows


def classifier_costs(model: Backbone, data: Data, widths: Sequence[Width]) -> list[ProfileRow]:
    """Cost of the classifiers: the projector that a pre-trained model has as `fc` gives way to one layer."""
    classifier = copy.deepcopy(model)
    classifier.fc = SlicedLinear(model.feature_dim, data.num_classes, slice_out=False)
    return profile(classifier, (data.in_channels, data.size, data.size), widths)
