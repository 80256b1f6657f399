"""The tables that `us3l reproduce` makes, as data: rows, the paper's figures, and the claims that are checked.

A row is a recipe with overrides, one for each scale at which there is one; a table names its rows, and shares them (and
so their training runs) with the other tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

WIDTHS = (1.0, 0.75, 0.5, 0.25)
SCALES = ("mini", "full")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    recipes: by scale, the name of a recipe and overrides (`section.key=value`) of it.
    paper: the paper's accuracies by width (%; None: collapses); empty where it gives none.
    alone: a network is trained for each width. trained: False evaluates initial weights.
    """

    title: str
    recipes: Mapping[str, tuple[str, ...]]
    paper: tuple[float | None, ...] = ()
    alone: bool = False
    trained: bool = True


def _row(
    title: str,
    mini: str,
    full: str,
    *overrides: str,
    mini_only: tuple[str, ...] = (),
    batch: int = 512,
    paper: tuple[float | None, ...] = (),
    alone: bool = False,
    trained: bool = True,
) -> Row:
    """overrides: of both scales. batch: of all the GPUs of the published run, which are one process here."""
    recipes = {"mini": (mini, *mini_only, *overrides), "full": (full, f"data.batch_size={batch}", *overrides)}
    return Row(title, MappingProxyType(recipes), paper, alone, trained)


_SIMCLR = "mini_us3l", "cifar100_resnet18_simclr"
_SIMSIAM = "mini_individual", "cifar100_resnet18_simsiam"
_BYOL = "mini_byol", "cifar100_resnet50_byol"
_MOCO_V2 = "mini_moco_v2", "cifar100_resnet18_moco_v2"
_VIT = "mini_vit_moco_v3", "cifar10_vit_tiny_moco_v3"
_SNET = "model.norm=switchable", "sampler.widths=[1.0,0.75,0.5,0.25]"
# A recipe of US3L as a network for each width.
_PLAIN = "sampler.kind=fixed", "method.distillation=none", "method.aux_head=false", "regulariser.kind=none"
# SimSiam with US3L's sampling and regularisation: no teacher, and a base loss that is not relative.
_ABSOLUTE = "sampler.kind=dynamic", "regulariser.kind=group"

ROWS: Mapping[str, Row] = MappingProxyType(
    {
        "random": _row("random initialisation", *_SIMCLR, trained=False),
        # Table 1
        "supervised": _row(
            "supervised, individually trained", "mini_supervised", "cifar100_resnet18_supervised",
            batch=128, paper=(73.8, 72.8, 71.4, 67.3), alone=True,
        ),
        "supervised_snet": _row(
            "supervised, S-Net", "mini_supervised", "cifar100_resnet18_supervised_snet",
            mini_only=_SNET, batch=128, paper=(71.9, 71.7, 70.8, 66.2),
        ),
        "supervised_snet_distilled": _row(
            "supervised, S-Net + distillation", "mini_supervised", "cifar100_resnet18_supervised_snet_distilled",
            mini_only=(*_SNET, "method.distillation=kl"), batch=128, paper=(73.1, 71.9, 70.5, 67.2),
        ),
        "individual": _row("SimSiam, individually trained", *_SIMSIAM, paper=(65.2, 64.0, 60.6, 51.2), alone=True),
        "snet": _row("SimSiam, S-Net", "mini_snet", "cifar100_resnet18_simsiam_snet", paper=(None,) * 4),
        "snet_distilled": _row(
            "SimSiam, S-Net + distillation", "mini_snet_distilled", "cifar100_resnet18_simsiam_snet_distilled",
            paper=(46.9, 46.9, 46.7, 45.3),
        ),
        "us3l": _row("US3L", *_SIMCLR, paper=(65.5, 65.3, 63.2, 59.7)),
        "us3l_no_teacher": _row("US3L without momentum teacher", *_SIMCLR, "method.target=live"),
        "us3l_sandwich": _row("US3L, sandwich rule throughout", *_SIMCLR, "sampler.kind=sandwich"),
        # Guidelines
        "absolute": _row("cosine, live targets", *_SIMSIAM, *_ABSOLUTE, "method.distillation=cosine"),
        "infonce_base": _row(
            "InfoNCE + cosine, live targets", *_SIMCLR, "method.target=live", "method.aux_head=false"
        ),
        "infonce_distillation": _row(
            "cosine + InfoNCE, live targets", *_SIMSIAM, *_ABSOLUTE, "method.distillation=infonce"
        ),
        "absolute_head": _row(
            "cosine, live targets, auxiliary head",
            *_SIMSIAM, *_ABSOLUTE, "method.distillation=cosine", "method.aux_head=true",
        ),
        "infonce": _row(
            "InfoNCE, live targets",
            *_SIMCLR, "method.target=live", "method.aux_head=false", "method.distillation=infonce",
        ),
        "absolute_teacher": _row(
            "cosine, momentum teacher", *_SIMSIAM, *_ABSOLUTE, "method.distillation=cosine", "method.target=momentum"
        ),
        "us3l_no_head": _row("US3L without auxiliary head", *_SIMCLR, "method.aux_head=false"),
        # Sampling
        "us3l_sandwich4": _row(
            "US3L, sandwich rule throughout, n = 4", *_SIMCLR, "sampler.kind=sandwich", "sampler.n=4"
        ),
        "us3l_dynamic4": _row("US3L, n = 4", *_SIMCLR, "sampler.n=4"),
        "us3l_uniform": _row("US3L, uniform widths throughout", *_SIMCLR, "sampler.kind=uniform"),
        "us3l_fixed": _row("US3L, the evaluated widths throughout", *_SIMCLR, "sampler.kind=fixed"),
        # Group regularisation
        "us3l_plain_decay": _row("US3L with plain weight decay", *_SIMCLR, "regulariser.kind=none"),
        "us3l_alpha0": _row("US3L, alpha = 0", *_SIMCLR, "regulariser.alpha=0.0"),
        "us3l_alpha025": _row("US3L, alpha = 0.025", *_SIMCLR, "regulariser.alpha=0.025"),
        "us3l_alpha100": _row("US3L, alpha = 0.1", *_SIMCLR, "regulariser.alpha=0.1"),
        "us3l_groups4": _row("US3L, 4 groups", *_SIMCLR, "regulariser.groups=4"),
        "us3l_groups16": _row("US3L, 16 groups", *_SIMCLR, "regulariser.groups=16"),
        # Base methods
        "simclr_alone": _row("SimCLR_Momentum, individually trained", *_SIMCLR, *_PLAIN, alone=True),
        "byol_alone": _row("BYOL, individually trained", *_BYOL, *_PLAIN, alone=True),
        "byol": _row("US3L on BYOL", *_BYOL),
        "moco_v2_alone": _row("MoCo v2, individually trained", *_MOCO_V2, *_PLAIN, alone=True),
        "moco_v2": _row("US3L on MoCo v2", *_MOCO_V2),
        # Vision transformers
        "vit_random": _row("random initialisation", *_VIT, trained=False),
        "vit_alone": _row("MoCo v3, individually trained", *_VIT, *_PLAIN, alone=True),
        "vit_input": _row("US3L, inputs sliced (as published)", *_VIT),
        "vit_mlp": _row("US3L, hidden features sliced", *_VIT, "model.slicing=mlp"),
        "vit_full": _row("US3L, everything sliced", *_VIT, "model.slicing=full"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """`better` is `least` points of accuracy above `worse` at `width`: in the mean over seeds, or in every seed."""

    better: str
    worse: str
    width: float
    least: float
    every_seed: bool = False


@dataclass(frozen=True)
class Spread:
    """The smallest spread of a width's embeddings, mean over seeds, is at least, or at most, a bound."""

    row: str
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class WidthsPerStep:
    """The mean number of widths per iteration is exactly `value`."""

    row: str
    value: float


Claim = Gap | Spread | WidthsPerStep


@dataclass(frozen=True)
class Table:
    """A table.

    title: what it is about. rows: keys of ROWS. columns: beside the accuracies (`us3l.reproduce.COLUMNS`).
    claims: checked at the scale "mini", where they hold with a margin over the noise between seeds.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...] = ("spread",)
    claims: tuple[Claim, ...] = ()


_TEACHER = (Gap("us3l", "us3l_no_teacher", 1.0, 2.0), Gap("us3l", "us3l_no_teacher", 0.25, 5.0))
_HEALTHY = (Spread("us3l", least=0.90),)
_DYNAMIC = (WidthsPerStep("us3l", 2.5),)  # with n = 3: (1 + 3 + 3 + 3) / 4
_AS_GOOD = (Gap("us3l", "individual", 1.0, -2.5), Gap("us3l", "individual", 0.25, 0.5))

TABLES: Mapping[str, Table] = MappingProxyType(
    {
        "table1": Table(
            "Table 1",
            (
                "random", "supervised", "supervised_snet", "supervised_snet_distilled", "individual", "snet",
                "snet_distilled", "us3l", "us3l_no_teacher", "us3l_sandwich",
            ),
            claims=(
                Gap("individual", "random", 1.0, 5.0),
                Gap("individual", "random", 0.25, 10.0),
                Gap("individual", "snet", 1.0, 2.0),
                Gap("individual", "snet", 0.25, 8.0),
                Gap("individual", "snet_distilled", 1.0, 4.0),
                Gap("individual", "snet_distilled", 0.25, 3.0),
                *_AS_GOOD,
                Gap("us3l", "individual", 0.25, -1.0, every_seed=True),
                Gap("us3l", "snet_distilled", 1.0, 4.0),
                Gap("us3l", "snet_distilled", 0.25, 4.0),
                Gap("us3l", "snet", 0.25, 8.0),
                *_TEACHER,
                Spread("snet", most=0.85),
                *_HEALTHY,
                *_DYNAMIC,
            ),
        ),
        "ablation-guidelines": Table(
            "The three guidelines; base loss + distillation loss",
            (
                "absolute", "infonce_base", "infonce_distillation", "absolute_head", "infonce", "us3l_no_teacher",
                "absolute_teacher", "us3l_no_head", "us3l",
            ),
            ("guidelines", "spread"),
            (*_TEACHER, *_HEALTHY),
        ),
        "ablation-sampling": Table(
            "Samplers of widths; US3L has dynamic sampling, n = 3",
            ("us3l_fixed", "us3l_uniform", "us3l_sandwich", "us3l_sandwich4", "us3l_dynamic4", "us3l"),
            ("widths per step", "spread"),
            (*_HEALTHY, *_DYNAMIC),
        ),
        "ablation-groupreg": Table(
            "Group regularisation; US3L has alpha = 0.05 and 8 groups",
            (
                "us3l_plain_decay", "us3l_alpha0", "us3l_alpha025", "us3l_alpha100", "us3l_groups4", "us3l_groups16",
                "us3l",
            ),
            claims=_HEALTHY,
        ),
        "cifar": Table(
            "Base methods; ResNet-18, BYOL: ResNet-50",
            ("random", "simclr_alone", "us3l", "byol_alone", "byol", "moco_v2_alone", "moco_v2"),
            claims=_HEALTHY,
        ),
        "vit": Table("Vision transformers", ("vit_random", "vit_alone", "vit_input", "vit_mlp", "vit_full")),
        "demo": Table(
            "One network for all widths, or one for each",
            ("individual", "us3l"),
            claims=(*_AS_GOOD, *_HEALTHY, *_DYNAMIC),
        ),
    }
)  # fmt: skip
