"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERIES, _BANK = 1024, 65536  # rows of one similarity block: 256 MB in float32


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    device: torch.device | str | None = None,
) -> float:
    """Top-1 accuracy, in percent, of the cosine-weighted vote of the k nearest training features.

    Neighbour i votes for its class with exp(cos_i / temperature) (Wu et al., "Unsupervised Feature Learning
    via Non-Parametric Instance Discrimination", CVPR 2018). Similarities are computed block by block, so
    that memory does not grow with either set.

    Args:
        train_features: [n, d]; the bank. train_labels: [n], int64.
        test_features: [m, d]; the queries. test_labels: [m], int64.
        k: number of neighbours, at most n.
        temperature: of the weights, > 0.
        device: where to compute; None: where the features are.

    Raises:
        ValueError: shapes do not match, k is not in [1, n], or the temperature is not positive.
    """
    n, classes = len(train_features), int(train_labels.max()) + 1
    shapes = tuple(train_features.shape), tuple(test_features.shape)
    if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"knn_accuracy: expected train_features [n, d] and test_features [m, d], got {shapes[0]} and {shapes[1]}"
        )
    if len(train_labels) != n or len(test_labels) != len(test_features):
        raise ValueError(
            f"knn_accuracy: expected one label per feature ({n} and {len(test_features)}), got "
            f"{len(train_labels)} and {len(test_labels)}"
        )
    if not 1 <= k <= n:
        raise ValueError(f"k: expected between 1 and the {n} training features, got {k}")
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")

    device = torch.device(device) if device is not None else train_features.device
    correct = 0
    for query, label in zip(test_features.split(_QUERIES), test_labels.split(_QUERIES), strict=True):
        query = F.normalize(query.to(device), dim=1)
        similarity = query.new_empty(len(query), 0)  # the best so far [q, <= k], and the labels they carry
        neighbour = torch.empty(len(query), 0, dtype=torch.int64, device=device)
        for bank, bank_label in zip(train_features.split(_BANK), train_labels.split(_BANK), strict=True):
            block = query @ F.normalize(bank.to(device), dim=1).t()  # [q, b]
            block, index = block.topk(min(k, len(bank)), dim=1)
            similarity = torch.cat([similarity, block], dim=1)
            neighbour = torch.cat([neighbour, bank_label.to(device)[index]], dim=1)
            similarity, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
            neighbour = neighbour.gather(1, index)
        votes = torch.zeros(len(query), classes, device=device, dtype=similarity.dtype)
        votes.scatter_add_(1, neighbour, (similarity / temperature).exp())
        correct += int((votes.argmax(1) == label.to(device)).sum())
    return 100.0 * correct / len(test_features)
