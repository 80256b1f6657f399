"""Evaluation of pre-trained sub-networks: calibration, features, kNN, linear probe, fine-tuning, collapse measures."""

from __future__ import annotations

from us3l.evaluation.calibration import calibrate
from us3l.evaluation.classifier import classifier_accuracy
from us3l.evaluation.features import features
from us3l.evaluation.finetune import FinetuneProtocol, balanced_subset, finetune
from us3l.evaluation.knn import knn_accuracy
from us3l.evaluation.linear import (
    CIFAR_PROTOCOL,
    IMAGENET_PROTOCOL,
    SGDProtocol,
    linear_probe,
    linear_probe_sgd,
)
from us3l.evaluation.protocol import evaluate
from us3l.evaluation.spread import effective_rank, spread

__all__ = [
    "CIFAR_PROTOCOL",
    "IMAGENET_PROTOCOL",
    "FinetuneProtocol",
    "SGDProtocol",
    "balanced_subset",
    "calibrate",
    "classifier_accuracy",
    "effective_rank",
    "evaluate",
    "features",
    "finetune",
    "knn_accuracy",
    "linear_probe",
    "linear_probe_sgd",
    "spread",
]
