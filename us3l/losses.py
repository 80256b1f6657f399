"""Losses of pre-training, on batches of projections (or logits) [N, D] and their targets.

All are computed in at least float32, whatever the precision of the projections and the autocast state, and
in float64 for float64 input. `criterion` finds those that a configuration names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from us3l.distributed import SINGLE, World

Criterion = Callable[[Tensor, Tensor], Tensor]
"""prediction [N, D], target [N, D] (no gradient reaches it, if it has none) -> scalar."""

CRITERIA = ("infonce", "cosine", "mse", "kl", "relational")
RELATIVE = frozenset({"infonce", "relational", "cross_entropy"})
"""Losses that compare a sample with others, or with fixed classes: their gradient survives a drift of all targets
(guidelines G1 and G2 of US3L). `kl` is none of them: it holds a sample to its own target, wherever that moves."""


def criterion(
    name: str, temperature: float, target_temperature: float | None = None, world: World = SINGLE
) -> Criterion:
    """The loss that `name`, one of CRITERIA, stands for.

    temperature: of its softmax, where it has one. target_temperature: of that of the target (None: the same);
    read by kl and relational. world: the processes among which infonce finds its negatives.
    """
    temperatures = (temperature, temperature if target_temperature is None else target_temperature)
    losses: dict[str, Criterion] = {
        "infonce": partial(info_nce, temperature=temperature, world=world),
        "cosine": negative_cosine,
        "mse": mean_squared_error,
        "kl": partial(kl_divergence, temperatures=temperatures),
        "relational": partial(relational, temperatures=temperatures),
    }
    if name not in losses:
        raise ValueError(f"a loss must be one of {', '.join(CRITERIA)}, got {name!r}")
    return losses[name]


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean negative cosine similarity of two batches [N, D], a scalar in [-1, 1].

    The loss of SimSiam (Chen and He, 2021, eq. 1) and, up to the affine map 2 + 2 L, of BYOL (Grill et al.,
    2020, eq. 2); called MSE in the US3L paper. An absolute loss: all of its gradient depends on the target.
    """
    _check_pair("negative_cosine", prediction, target)
    return -F.cosine_similarity(_full_precision(prediction), _full_precision(target), dim=1).mean()


def info_nce(a: Tensor, b: Tensor, temperature: float, world: World = SINGLE) -> Tensor:
    """NT-Xent loss (Chen et al., 2020, "SimCLR", eq. 1) of two batches [N, D] of matching samples, a scalar.

    Each of the 2N rows of [a; b] is classified among the other 2N - 1 (never itself); its positive is the row
    of the same sample in the other batch. Symmetric in a and b. A relative loss: a drift common to all
    targets cancels.

    world: the processes whose rows are negatives too, with gradients through them. The loss is that of this process's
    rows; its mean over the processes is the loss of one that has all samples.
    """
    _check_pair("info_nce", a, b)
    _check_temperatures("info_nce", temperature)
    samples = a.shape[0]
    # A product under autocast would round the similarities to half precision before the softmax.
    with torch.autocast(a.device.type, enabled=False):
        z = F.normalize(torch.cat([_full_precision(a), _full_precision(b)]), dim=1)
        every = world.gather(z)
        logits = z @ every.T / temperature  # [2N, 2N of every process]
        own = _own_rows(len(z), world, z.device)
        itself = own[:, None] == torch.arange(len(every), device=z.device)
        return F.cross_entropy(logits.masked_fill(itself, -torch.inf), own.roll(samples))


def info_nce_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of queries [N, D] with their keys [N, D] as positives and a queue [K, D] as negatives, a scalar.

    The queue's rows must be L2-normalised. Source: He et al., 2020, "MoCo", eq. 1.
    """
    _check_pair("info_nce_queue", query, key)
    _check_temperatures("info_nce_queue", temperature)
    with torch.autocast(query.device.type, enabled=False):
        query, key = _unit(query), _unit(key)
        positive = (query * key).sum(1, keepdim=True)
        logits = torch.cat([positive, query @ queue.to(query.dtype).T], 1) / temperature  # [N, 1 + K]
        return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.int64))


def in_batch_contrast(query: Tensor, key: Tensor, temperature: float, world: World = SINGLE) -> Tensor:
    """InfoNCE of queries [N, D] with the keys [N, D] of the batch: its own positive, the others negatives; a scalar.

    Times 2 * temperature, which makes the size of the gradient independent of it. Source: Chen, Xie and He, 2021,
    "MoCo v3", Algorithm 1.

    world: the processes whose keys are negatives too, as for `info_nce`.
    """
    _check_pair("in_batch_contrast", query, key)
    _check_temperatures("in_batch_contrast", temperature)
    with torch.autocast(query.device.type, enabled=False):
        logits = _unit(query) @ world.gather(_unit(key)).T / temperature  # [N, N of every process]
        return 2 * temperature * F.cross_entropy(logits, _own_rows(len(query), world, query.device))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [N, classes] with labels [N], int64, a scalar."""
    return F.cross_entropy(_full_precision(logits), labels)


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of (prediction - target)^2 over all elements of [N, D], a scalar. Nothing is normalised."""
    _check_pair("mean_squared_error", prediction, target)
    return F.mse_loss(_full_precision(prediction), _full_precision(target))


def kl_divergence(prediction: Tensor, target: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """Mean KL(softmax(target / t2) || softmax(prediction / t1)) of logits [N, D], a scalar >= 0.

    temperatures: (t1, t2), of the prediction and of the target. Source: Hinton, Vinyals and Dean, 2015, eq. 1;
    with temperature 1 and the logits of the full network, the in-place distillation of US-Nets (Yu and Huang, 2019).
    """
    _check_pair("kl_divergence", prediction, target)
    _check_temperatures("kl_divergence", *temperatures)
    return _kl(_full_precision(prediction) / temperatures[0], _full_precision(target) / temperatures[1])


def relational(prediction: Tensor, target: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """How far the similarities between samples differ among predictions and among targets [N, D], a scalar >= 0.

    Sample i has a distribution over the others, softmax over j != i of cos(z_i, z_j) / t: the loss is the mean KL
    divergence of the predictions' from the targets', temperatures (t1, t2). A relative loss, which only asks for the
    relations that the targets have, not for their places. N >= 3: two samples have one relation each.

    Source: Passalis and Tefas, 2018, eq. 6 (similarities as conditional probabilities); the idea is relational
    knowledge distillation (Park et al., 2019).
    """
    _check_pair("relational", prediction, target)
    _check_temperatures("relational", *temperatures)
    if len(prediction) < 3:
        raise ValueError(f"relational: expected at least 3 samples, got {len(prediction)}")
    with torch.autocast(prediction.device.type, enabled=False):
        return _kl(*(_similarities(z) / t for z, t in zip((prediction, target), temperatures, strict=True)))


def queue_relations(prediction: Tensor, target: Tensor, queue: Tensor, temperatures: tuple[float, float]) -> Tensor:
    """Cross-entropy of a sample's similarities to a queue [K, D] of targets and to its own target, a scalar.

    For each row of prediction and target [N, D], softmax([cos to its own target, cos to every row of the queue] / t)
    with temperatures (t1, t2). The queue's rows must be L2-normalised. Source: Fang et al., 2021, "SEED", eq. 5.
    """
    _check_pair("queue_relations", prediction, target)
    _check_temperatures("queue_relations", *temperatures)
    with torch.autocast(prediction.device.type, enabled=False):
        p, t = _unit(prediction), _unit(target)
        queue = queue.to(p.dtype)
        student, teacher = (
            torch.cat([(z * t).sum(1, keepdim=True), z @ queue.T], 1) / temperature  # [N, 1 + K]
            for z, temperature in zip((p, t), temperatures, strict=True)
        )
        return F.cross_entropy(student, teacher.softmax(1))


def cross_view(loss: Criterion, predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of loss(p1, t2) and loss(p2, t1), for predictions and targets [2N, D] of two stacked views, view-major.

    A view is never compared with its own target, which would be solved without any invariance.
    """
    _check_pair("cross_view", predictions, targets)
    if predictions.shape[0] % 2:
        raise ValueError(f"cross_view: predictions must stack two views of equal size, got {predictions.shape[0]} rows")
    p1, p2 = predictions.chunk(2)
    t1, t2 = targets.chunk(2)
    return (loss(p1, t2) + loss(p2, t1)) / 2


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(_full_precision(x), dim=1)


def _own_rows(n: int, world: World, device: torch.device) -> Tensor:
    """Where this process's n rows are among those of all, int64 [n]."""
    return torch.arange(world.rank * n, (world.rank + 1) * n, device=device)


def _kl(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean KL divergence of two batches of logits."""
    return F.kl_div(prediction.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def _similarities(z: Tensor) -> Tensor:
    """Cosines of every sample to the others, [N, N - 1]: the similarity to itself says nothing."""
    z, n = _unit(z), len(z)
    # Without its first element, the diagonal is the last column of rows of n + 1. (A mask would wait for the device.)
    return (z @ z.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def _check_temperatures(function: str, *temperatures: float) -> None:
    for temperature in temperatures:
        if not temperature > 0:
            raise ValueError(f"{function}: temperature must be positive, got {temperature}")


def _check_pair(function: str, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(
            f"{function}: expected two tensors of one shape [N, D], got {tuple(a.shape)} and {tuple(b.shape)}"
        )
