"""Typed configuration: dataclasses, filled from a recipe or YAML file and `KEY=VALUE` overrides by OmegaConf.

Every key exists here with its type, unit and default; anything else is a :class:`ConfigError` that names the
nearest valid key. Recipes are the YAML files of the package `us3l.recipes`.

OmegaConf is imported by what reads and writes text alone: a Config made in Python needs none.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from us3l.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf.errors import ValidationError


def _one_of(default: str, *others: str, or_class: bool = False) -> Any:
    """A string field with a closed list of choices; `or_class` takes "module:Class" too."""
    return field(default=default, metadata={"choices": (default, *others), "or_class": or_class})


def _number(
    default: float | int | None,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> Any:
    """A number field (None: may be absent), required to be > above, >= least, < below and <= most."""
    return field(default=default, metadata={"above": above, "least": least, "below": below, "most": most})


@dataclass
class ModelConfig:
    """The backbone. Channel counts are those of width 1.0."""

    name: str = _one_of(
        "resnet_tiny", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2",
        "vit_tiny", "vit_small", "vit_base", "vit_mini",
    )  # fmt: skip
    stem: str = _one_of("cifar", "imagenet", "small")  # small: 3x3, stride 2; a ViT has none
    in_channels: int | None = _number(None, least=1)  # None: those of data.name
    divisor: int = _number(8, least=1)  # active channels are rounded to multiples of it
    norm: str = _one_of("sliced", "switchable")  # switchable: one private norm per width of a fixed list
    base_channels: int = _number(16, least=1)  # channels of the first stage; read by resnet_tiny only
    slicing: str = _one_of("full", "mlp", "input")  # what a ViT slices, see us3l.models.vit; input: as published
    patch_size: int = _number(16, least=1)  # of a ViT, pixels
    image_size: int | None = _number(None, least=1)  # of a ViT, pixels; None: that of the training views
    num_classes: int | None = _number(None, least=2)  # of supervised training; None: those of data.name


CHANNELS = {
    "fashion_mini": 1, "fashion_mnist": 1, "cifar10": 3, "cifar100": 3, "image_folder": 3, "random": 3,
    "shards": 3,
    "flowers102": 3, "oxford_pets": 3, "dtd": 3, "fgvc_aircraft": 3, "food101": 3,
}  # fmt: skip
"""Channels of the images of every `data.name`."""
SIZES = {
    "fashion_mini": 14, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "image_folder": 224, "random": 32,
    "shards": 224,
    "flowers102": 224, "oxford_pets": 224, "dtd": 224, "fgvc_aircraft": 224, "food101": 224,
}  # fmt: skip
"""Side of the training views, where `data.size` is not given."""
CLASSES = {
    "fashion_mini": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "random": 10,
    "flowers102": 102, "oxford_pets": 37, "dtd": 47, "fgvc_aircraft": 100, "food101": 101,
}  # fmt: skip
"""Classes, where `data.name` says them."""


@dataclass
class DataConfig:
    """The images."""

    name: str = _one_of(*CHANNELS)
    root: str | None = None  # folder of the data set; the embedded and random ones need none
    download: bool = False  # let torchvision fetch what is missing in `root`
    size: int | None = _number(None, least=1)  # side of the training views, pixels; None: the data set's own
    batch_size: int = _number(128, least=2)  # images per step and process; each gives two views
    workers: int = _number(0, least=0)  # loader processes
    # Colours and blur of image_folder and shards; crops are the workers'. (Data in memory are augmented on the device.)
    augment_on: str = _one_of("workers", "device")
    train_samples: int | None = _number(None, least=1)  # the first n images; None: all
    test_samples: int | None = _number(None, least=1)
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])  # area of the random crops, fractions


@dataclass
class MethodConfig:
    """The method and the three switches of US3L (method.base_loss, .target, .aux_head)."""

    name: str = _one_of(
        "simclr", "simsiam", "byol", "moco_v2", "moco_v3", "dino", "seed", "supervised", or_class=True
    )  # module:Class: a method of your own
    hidden_dim: int = _number(2048, least=1)  # projector
    dim: int = _number(256, least=1)  # embeddings
    predictor_hidden: int | None = _number(None, least=1)  # None: hidden_dim
    base_loss: str = _one_of("infonce", "cosine", "mse", "kl", "relational", "cross_entropy")  # see us3l.losses
    temperature: float = _number(0.5, above=0)  # of the softmax in infonce, kl and relational
    teacher_temperature: float | None = _number(None, above=0)  # of the target's, in kl and relational; None: the same
    # live: the full network's own detached projections; frozen: those of the network in `teacher`
    target: str = _one_of("momentum", "live", "frozen")
    momentum: float = _number(0.99, least=0, most=1)  # of the teacher: t = m t + (1 - m) s, once per iteration
    momentum_schedule: str = _one_of("constant", "cosine")  # cosine: from `momentum` to 1 over the run
    teacher: str | None = None  # target=frozen: a checkpoint
    queue_size: int = _number(65536, least=1)  # past targets that moco_v2 and seed keep
    distillation: str = _one_of("cosine", "infonce", "mse", "kl", "relational", "none")  # none: the base loss again
    aux_head: bool = True  # sub-networks predict through a head of their own
    gather_negatives: bool = False  # infonce within the batch: contrast with the samples of all processes
    feature_weight: float = _number(0.0, least=0)  # of the distillation of intermediate features; 0: none
    options: dict[str, Any] = field(default_factory=dict)  # what a method of your own asks for


@dataclass
class SamplerConfig:
    """The widths of an iteration."""

    kind: str = _one_of("dynamic", "sandwich", "uniform", "fixed")
    n: int = _number(3, least=1)  # widths per iteration; `fixed` reads `widths` instead
    min_width: float = _number(0.25, above=0, most=1)
    widths: list[float] = field(default_factory=lambda: [1.0, 0.75, 0.5, 0.25])  # fixed; one entry: an individual net


@dataclass
class OptimizerConfig:
    """Optimizer and schedule: linear warm-up, then cosine to 0, per iteration."""

    name: str = _one_of("sgd", "adamw", "lars")
    lr: float = _number(0.1, least=0)  # peak learning rate, as is (never scaled by the batch size)
    momentum: float = _number(0.9, least=0, below=1)  # sgd, lars
    weight_decay: float = _number(1e-4, least=0)
    warmup_epochs: int = _number(0, least=0)
    clip_norm: float | None = _number(None, above=0)  # largest 2-norm of the whole gradient


@dataclass
class RegulariserConfig:
    """group: lambda_g = weight_decay / 2 * (1 - alpha g) for channel group g replaces plain weight decay."""

    kind: str = _one_of("group", "none")
    alpha: float = _number(0.05, least=0)  # reached at half of the epochs
    groups: int = _number(8, least=1)
    warmup_epochs: int = _number(0, least=0)  # epochs with alpha = 0, before its linear ramp


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = _number(100, least=1)
    step: str = _one_of("joint", "per_width")  # one update per iteration, or (as published) one after every width
    amp: str = _one_of("none", "bf16", "fp16")  # fp16 with a gradient scaler
    graphs: str = _one_of("auto", "true", "false", "one")  # CUDA graphs, for each width or one; auto: where they can be
    accumulate: int = _number(1, least=1)  # parts of a batch, one by one, with less memory: their gradients add up
    sync_norms: bool = False  # batch norms of several processes take their statistics together
    max_skipped: int = _number(10, least=0)  # updates in a row whose gradient is not finite; one more ends the run
    channels_last: bool = True
    seed: int = _number(0, least=0)
    device: str = "auto"  # "auto": CUDA when there is a GPU; else what torch.device takes
    threads: int | None = _number(None, least=1)  # CPU threads of torch; None: its own choice
    knn_every: int = _number(0, least=0)  # epochs between evaluations (kNN; supervised: the classifier); 0: never
    log_every: int = _number(10, least=1)  # steps between readings of the losses
    wandb: str | None = None  # project of Weights & Biases that gets what TensorBoard gets


@dataclass
class CheckpointConfig:
    """When checkpoints are written (also at the end of every epoch and of the run), and how many are kept."""

    dir: str | None = "runs/us3l"  # also of the TensorBoard files; None: nothing is written
    every_minutes: float = _number(10.0, above=0)
    every_steps: int | None = _number(None, least=1)
    keep: int = _number(2, least=1)  # newest checkpoints; the best by online kNN is kept beside them
    bit_identical: bool = True  # refuse to resume where another result is to be expected (ISA, backend, torch)


@dataclass
class Config:
    """A whole run. The defaults train a small US3L network on the images that come with the package.

    What `model` leaves to the data (None) becomes a number here, so that whatever is built or stored later has one,
    and other data does not change a trained network.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    regulariser: RegulariserConfig = field(default_factory=RegulariserConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        if self.model.in_channels is None:
            # `get`: validate is the one to reject an unknown name.
            self.model = replace(self.model, in_channels=CHANNELS.get(self.data.name))
        if self.model.image_size is None and self.model.name.startswith("vit_"):
            self.model = replace(self.model, image_size=self.data.size or SIZES.get(self.data.name))
        if self.model.num_classes is None and self.method.name == "supervised":
            self.model = replace(self.model, num_classes=CLASSES.get(self.data.name))


def load(name_or_file: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """A checked :class:`Config`: defaults, then a recipe or YAML file, then `section.key=value` overrides.

    Raises :class:`ConfigError` for an unknown recipe or file, an unknown key (naming the nearest valid one),
    an ill-typed value, a value out of its range or list of choices, and combinations that contradict.
    """
    recipe = [] if name_or_file is None else [_read(name_or_file)]
    return _build(recipe + _read_overrides(overrides))


def from_dict(values: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The checked Config of nested dicts, as written by :func:`to_dict`. Errors as in :func:`load`."""
    from omegaconf import OmegaConf

    return _build([("configuration", OmegaConf.create(values)), *_read_overrides(overrides)])


def _read_overrides(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers: list[tuple[str, Any]] = []
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"expected KEY=VALUE, e.g. train.epochs=20, but got {override!r}")
        try:
            layers.append((f"override {override!r}", OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read override {override!r}: {error}") from None
    return layers


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts, lists, strings, numbers: what a checkpoint stores."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def to_yaml(config: Config) -> str:
    """YAML text that :func:`load` reads back to an equal Config."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every key in which two results of :func:`to_dict` differ."""
    changes = []
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += [(f"{name}.{key}", a, b) for key, a, b in differences(before, after)]
        elif before != after:
            changes.append((name, before, after))
    return changes


def recipes() -> list[str]:
    """Names that `--config` accepts besides a file."""
    folder = resources.files("us3l") / "recipes"
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def validate(config: Config) -> None:
    """Check ranges, choices and combinations; :func:`load` does so. Raises :class:`ConfigError`."""
    for key, value, spec in _leaves(config):
        _check_value(key, value, spec)

    _require(
        len(config.data.crop_scale) == 2 and 0 < config.data.crop_scale[0] <= config.data.crop_scale[1] <= 1,
        "data.crop_scale",
        "two fractions of the area, 0 < smallest <= largest <= 1",
        config.data.crop_scale,
    )
    widths = config.sampler.widths
    _require(
        len(widths) > 0 and len(set(widths)) == len(widths) and all(0 < width <= 1 for width in widths),
        "sampler.widths",
        "different widths in (0, 1]",
        widths,
    )
    if config.model.norm == "switchable" and config.sampler.kind != "fixed":
        raise ConfigError(
            "model.norm=switchable has one norm per width of a fixed list and so needs sampler.kind=fixed, "
            f"but sampler.kind is {config.sampler.kind!r}"
        )
    if config.model.name.startswith("vit_"):
        _validate_vit(config.model)
    if config.model.name == "mobilenet_v2" and config.model.stem == "small":
        raise ConfigError("model.stem: expected cifar or imagenet for model.name=mobilenet_v2, got 'small'")
    if config.method.name == "supervised" and config.model.num_classes is None:
        raise ConfigError(f"model.num_classes: data.name={config.data.name} does not say how many classes there are")
    if config.method.feature_weight > 0 and (config.method.distillation == "none" or config.method.target == "frozen"):
        raise ConfigError(
            "method.feature_weight distils from the network itself or its momentum teacher: it needs a "
            "method.distillation, and method.target=momentum or live"
        )
    if config.method.target == "frozen" and config.method.teacher is None:
        raise ConfigError("method.target=frozen needs method.teacher, the checkpoint of a trained network")
    if config.sampler.kind in ("dynamic", "sandwich") and config.sampler.n < 2:
        raise ConfigError(
            f"sampler.kind={config.sampler.kind} draws 1.0 and a smallest width together: "
            f"expected sampler.n >= 2, got {config.sampler.n}"
        )
    alone = len(widths) == 1 if config.sampler.kind == "fixed" else config.sampler.n == 1
    if alone and config.method.distillation != "none":
        raise ConfigError(
            f"method.distillation={config.method.distillation} teaches sub-networks, but the sampler draws one "
            "width per iteration: set method.distillation=none, more sampler.widths (kind fixed) or sampler.n"
        )
    if config.regulariser.kind == "group":
        last = 1 - config.regulariser.alpha * (config.regulariser.groups - 1)
        _require(
            last >= 0,
            "regulariser.alpha",
            f"at most 1 / (groups - 1) = {1 / max(1, config.regulariser.groups - 1):.4g}, "
            "or the last group's decay would be negative",
            config.regulariser.alpha,
        )
        if config.regulariser.alpha > 0 and config.regulariser.warmup_epochs >= max(1, config.train.epochs / 2):
            raise ConfigError(
                "regulariser.alpha ramps up between regulariser.warmup_epochs and half of train.epochs: "
                f"expected warmup_epochs < {config.train.epochs / 2:g}, got {config.regulariser.warmup_epochs}"
            )
    _validate_gather(config.method)
    _require(
        config.data.batch_size % config.train.accumulate == 0 and config.data.batch_size > config.train.accumulate,
        "train.accumulate",
        f"a divisor of data.batch_size={config.data.batch_size}, with parts of two images or more",
        config.train.accumulate,
    )
    if config.train.accumulate > 1 and config.method.feature_weight > 0:
        raise ConfigError("train.accumulate: method.feature_weight keeps the features of one batch; expected 1")
    if config.optimizer.warmup_epochs >= config.train.epochs and config.optimizer.warmup_epochs > 0:
        raise ConfigError(
            f"optimizer.warmup_epochs must be smaller than train.epochs ({config.train.epochs}), "
            f"got {config.optimizer.warmup_epochs}"
        )


def _validate_vit(model: ModelConfig) -> None:
    if model.norm == "switchable":
        raise ConfigError(f"model.norm=switchable is for batch norms: {model.name} has layer norms")
    assert model.image_size is not None
    _require(
        model.image_size % model.patch_size == 0,
        "model.patch_size",
        f"a divisor of model.image_size={model.image_size}",
        model.patch_size,
    )


def _validate_gather(method: MethodConfig) -> None:
    contrasts = "infonce" in (method.base_loss, method.distillation) and method.name != "moco_v2"
    if method.gather_negatives and not contrasts:
        raise ConfigError(
            "method.gather_negatives is for infonce within the batch: it needs method.base_loss or method.distillation "
            "= infonce, and a method other than moco_v2, whose queue holds the samples of all processes anyway"
        )


def _require(condition: bool, key: str, expected: str, given: object) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {given!r}")


def _check_value(key: str, value: Any, spec: Field[Any]) -> None:
    choices = spec.metadata.get("choices")
    named_class = spec.metadata.get("or_class") and ":" in value
    if choices is not None and value not in choices and not named_class:
        near = difflib.get_close_matches(value, choices, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        own = ", or module:Class" if spec.metadata.get("or_class") else ""
        raise ConfigError(f"{key}: expected one of {', '.join(choices)}{own}, got {value!r}{hint}")
    if "least" in spec.metadata and value is not None:
        above, least, below, most = (spec.metadata[bound] for bound in ("above", "least", "below", "most"))
        bounds = (
            [f"> {above:g}"] * (above > -math.inf)
            + [f">= {least:g}"] * (least > -math.inf)
            + [f"< {below:g}"] * (below < math.inf)
            + [f"<= {most:g}"] * (most < math.inf)
        )
        inside = above < value < below and least <= value <= most
        _require(inside, key, f"a finite number {' and '.join(bounds)}", value)


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    for spec in fields(section):
        value = getattr(section, spec.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{spec.name}.")
        else:
            yield f"{prefix}{spec.name}", value, spec


def _read(name_or_file: str) -> tuple[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        source = f"file {name_or_file}"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the configuration file {name_or_file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source} is not a text file: {error}") from None
    else:
        known = recipes()
        if name_or_file not in known:
            near = difflib.get_close_matches(name_or_file, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"--config: expected a YAML file or a recipe ({', '.join(known)}), got {name_or_file!r}{hint}"
            )
        source = f"recipe {name_or_file}"
        text = (resources.files("us3l") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    try:
        layer = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    return source, layer


def _build(layers: list[tuple[str, Any]]) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

    merged = OmegaConf.structured(Config)
    for source, layer in layers:
        _check_sections(source, layer)
        try:
            merged = OmegaConf.merge(merged, layer)
        except ConfigKeyError as error:
            raise ConfigError(f"{source}: unknown key {error.full_key!r}{_nearest(error.full_key or '')}") from None
        except ValidationError as error:
            raise ConfigError(f"{source}: {_ill_typed(error, layer)}") from None
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {error}") from None
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    validate(config)
    return config


def _check_sections(source: str, layer: Any) -> None:
    """What OmegaConf lets pass, or reports without a key: values for sections, and 7 for True."""
    from omegaconf import OmegaConf

    _require(OmegaConf.is_dict(layer), source, "sections of keys and values", OmegaConf.to_container(layer))
    for name, section in layer.items():
        if not hasattr(Config(), name):
            continue  # merging reports unknown keys
        _require(OmegaConf.is_dict(section), f"{source}: {name}", "a section of keys, e.g. train.epochs=20", section)
        kind = type(getattr(Config(), name))
        hints = get_type_hints(kind)
        words = {spec.name for spec in fields(kind) if "true" in spec.metadata.get("choices", ())}
        for key, value in list(section.items()):
            if key in words and isinstance(value, bool):
                section[key] = str(value).lower()  # YAML reads these words as something else
            elif key in hints and isinstance(value, bool) != (hints[key] is bool):
                raise ConfigError(f"{source}: {name}.{key}: expected {_name(hints[key])}, got {value!r}")


def _ill_typed(error: ValidationError, layer: Any) -> str:
    from omegaconf import OmegaConf

    full_key = error.full_key or ""
    section, _, leaf = full_key.partition(".")
    hints = get_type_hints(type(getattr(Config(), section, None)))
    expected = _name(hints.get(leaf.partition("[")[0], "another type"))
    return f"{full_key}: expected {expected}, got {OmegaConf.select(layer, full_key)!r}"


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _nearest(key: str) -> str:
    """The valid key closest to `key`: as a whole and, as sections are easily forgotten, by its last part."""
    valid = [name for name, _, _ in _leaves(Config())] + [spec.name for spec in fields(Config)]
    leaf = key.rpartition(".")[2]

    def similarity(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, leaf, candidate.rpartition(".")[2]).ratio()
        return whole + last

    return f"; did you mean {max(valid, key=similarity)!r}?"
