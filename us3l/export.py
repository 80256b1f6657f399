"""A sub-network for use elsewhere: plain torch.nn layers, compared with the sliced network before anything is written.

    torch        a torch.export program (.pt2), for any batch size
    safetensors  a folder: model.safetensors, model.py (plain PyTorch) and config.json
    onnx         an ONNX model, checked in onnxruntime

None of them needs this package. Parameter names are those of the backbone (torchvision's, for a ResNet).
"""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from us3l.errors import US3LError
from us3l.models import Backbone
from us3l.profile import profile
from us3l_kernels import standalone, use_width
from us3l_kernels.dense import PrefixLinear, ResidualBatchNorm
from us3l_kernels.version import __version__
from us3l_kernels.width import Width, width_key

# Largest relative errors: of the arithmetic, in float64, and of the written file, in float32.
EXACT, WRITTEN = 1e-9, 1e-4
_IMAGES = 3  # of the comparisons


class ExportError(US3LError):
    """A sub-network cannot be exported, or the exported one does not compute the same."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    path: file or folder.  params, macs: of the sub-network, for one image.  features: length of its output.
    error: relative difference of the written model, run on its own, from the sub-network (float32).
    """

    path: Path
    params: int
    macs: int
    features: int
    error: float


def export(
    model: Backbone,
    width: Width,
    path: str | Path,
    *,
    image_shape: Sequence[int],
    format: str = "torch",
    fold: bool = False,
    about: dict[str, Any] | None = None,
) -> Exported:
    """Write the sub-network of `model` at one width as a model of its own.

    It maps images [N, C, H, W] to pooled features [N, features] in float32, or to what a classifier `fc` makes of
    them; a projector is left behind. Nothing is written unless the plain network equals the sliced one in float64
    (relative error below EXACT), and the written model, read back, the plain one (below WRITTEN). The file appears
    under its name when it is whole.

    Args:
        model: calibrated at `width`. It is not changed.
        width: a width in (0, 1], or a plan.
        path: the file, or the folder of "safetensors", which must not exist.
        image_shape: (C, H, W) of the images.
        format: "torch", "safetensors" or "onnx".
        fold: put batch norms into the convolutions before them.
        about: more entries for the metadata (strings, numbers, lists, dicts).

    Raises:
        ExportError: the network cannot be traced, a comparison fails, a package is missing, the folder exists.
        ValueError: an unknown format.
        RuntimeError: `model` has no statistics for `width`.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    if path.is_dir():
        raise ExportError(f"the folder {path} exists already: choose another name, or remove it")
    # In float64 until the end: there a wrong formula cannot hide behind rounding.
    network = copy.deepcopy(model).cpu().double().eval()
    if not isinstance(network.fc, nn.Linear):
        network.fc = nn.Identity()
    images = torch.randn(_IMAGES, *image_shape, generator=torch.Generator().manual_seed(0))
    plain = plain_graph(standalone(network, width, images.double()), images)
    if fold:
        plain = folded(plain)
    with torch.no_grad():
        with use_width(network, width):
            exact = network(images.double())
        _require_equal("the plain network", plain(images.double()), exact, EXACT)
        expected = plain.float()(images)

    (cost,) = profile(network.float(), image_shape, [width])
    metadata = {
        **(about or {}),
        "architecture": type(model).__name__,
        "width": width_key(width),
        "image_shape": list(image_shape),
        "features": expected.shape[1],
        "params": cost.params,
        "macs": cost.macs,
        "folded": fold,
        "us3l": __version__,
        "torch": str(torch.__version__),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with _atomically(path) as temporary:
        run = FORMATS[format](plain, images, temporary, metadata)
        with torch.no_grad():
            error = _require_equal(f"the written model ({format})", run(images), expected, WRITTEN)
            _require_equal(f"the written model ({format}), one image", run(images[:1]), expected[:1], WRITTEN)
    return Exported(path, cost.params, cost.macs, expected.shape[1], error)


def plain_graph(network: nn.Module, images: Tensor) -> fx.GraphModule:
    """`network` (of `us3l_kernels.standalone`) as a graph of torch.nn layers and torch functions alone.

    The names of the parameters stay. Decisions on the shape of the input are those for `images` [N, C, H, W]. Raises
    ExportError if the forward cannot be traced symbolically.
    """
    tracer = _PlainTracer(images.shape)
    try:
        graph = tracer.trace(network)
    except Exception as error:  # the forward is anybody's code
        raise ExportError(f"{type(network).__name__} cannot be traced by torch.fx: {error}") from error
    plain = fx.GraphModule(tracer.root, graph, type(network).__name__)
    for name, module in list(plain.named_modules()):
        if isinstance(module, ResidualBatchNorm | PrefixLinear):
            plain.set_submodule(name, module.plain())
    return plain.eval()


class _PlainTracer(fx.Tracer):
    """Leaves are torch.nn's layers; identities go, and what is joined to a layer becomes a step of its own."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def layer(x: Any) -> Any:
            return self.create_proxy("call_module", self.path_of_module(m), (x,), {})

        if type(m) is nn.Identity:
            return args[0]
        if isinstance(m, PrefixLinear):
            return layer(args[0][..., : m.in_features])
        if isinstance(m, ResidualBatchNorm):
            x, residual = (*args, *kwargs.values(), None)[:2]
            return m.finish(layer(x), residual)
        return super().call_module(m, forward, args, kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The outcome of a condition, which only the shape of the input may decide."""
        return bool(self._value(obj.node))

    def _value(self, node: fx.Node) -> Any:
        if node.op == "call_function" and node.target is getattr and node.args[1] == "shape":
            (source,) = node.all_input_nodes
            if source.op == "placeholder":
                return self.shape
        if node.op != "call_function" or getattr(node.target, "__module__", "") != "_operator":
            raise fx.proxy.TraceError(f"a condition depends on {node}, which is not the shape of the input")
        return node.target(*fx.node.map_arg(node.args, self._value))  # type: ignore[operator]


def folded(plain: fx.GraphModule) -> fx.GraphModule:
    """A copy of :func:`plain_graph`'s result with the batch norms inside the convolutions before them."""
    fused = fuse(plain, no_trace=True)
    assert isinstance(fused, fx.GraphModule)
    fused.delete_all_unused_submodules()
    fused.recompile()
    return fused.eval()


def _require_equal(what: str, given: Tensor, expected: Tensor, tolerance: float) -> float:
    """The largest error relative to the largest output; ExportError if it is above `tolerance` or not a number."""
    if given.shape != expected.shape:
        raise ExportError(f"{what} gives shape {tuple(given.shape)}, expected {tuple(expected.shape)}")
    error = float((given - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= tolerance:
        raise ExportError(
            f"{what} differs from the sub-network by {error:.1e} (relative to its largest output), allowed are "
            f"{tolerance:.0e}. Nothing was written"
        )
    return error


@contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """A place for the file or folder `path`, which gets its name on exit, when all of it is on the disk."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        for file in [temporary, *temporary.rglob("*")]:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- formats

Run = Callable[[Tensor], Tensor]  # the written model, read back: images [N, C, H, W] -> its output


def _write_torch(plain: fx.GraphModule, images: Tensor, path: Path, metadata: dict[str, Any]) -> Run:
    batch = torch.export.Dim("batch")
    program = torch.export.export(plain, (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path, extra_files={"us3l.json": json.dumps(metadata, indent=2)})
    return torch.export.load(path).module()


def _write_safetensors(plain: fx.GraphModule, images: Tensor, path: Path, metadata: dict[str, Any]) -> Run:
    from safetensors.torch import save_file

    path.mkdir()
    (path / "model.py").write_text(python_source(plain, metadata), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in plain.state_dict().items()}, path / "model.safetensors")
    return runpy.run_path(str(path / "model.py"))["load"]()


def _write_onnx(plain: fx.GraphModule, images: Tensor, path: Path, metadata: dict[str, Any]) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it, and says so less clearly)
    except ImportError as error:
        raise ExportError(f"--format onnx needs the packages of `pip install us3l[onnx]`: {error}") from None

    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        plain,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update({f"us3l.{key}": json.dumps(value) for key, value in metadata.items()})
    program.save(path)
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


FORMATS: dict[str, Callable[[fx.GraphModule, Tensor, Path, dict[str, Any]], Run]] = {
    "torch": _write_torch,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
SUFFIXES = {"torch": ".pt2", "safetensors": "", "onnx": ".onnx"}

# ---------------------------------------------------------------------------------------------- Python source

_SOURCE = '''"""{title}

Written by us3l {version}. It needs torch and safetensors alone:

    from model import load

    network = load()           # weights from model.safetensors beside this file
    y = network(images)        # {images} -> [N, {features}]; config.json says more
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{layers}

    def forward(self, {argument}):
{body}


def load(weights=Path(__file__).with_name("model.safetensors")):
    """The network with its weights, in evaluation mode."""
    network = {name}()
    network.load_state_dict(load_file(weights))
    return network.eval()
'''


def python_source(plain: fx.GraphModule, metadata: dict[str, Any]) -> str:
    """The text of model.py: layers by the names that they have in the state_dict, and the forward line by line."""
    code = plain.graph.python_code("self").src
    name = metadata["architecture"]
    return _SOURCE.format(
        title=f"{name}, the sub-network of width {metadata['width']} as a model of its own.",
        version=metadata["us3l"],
        images="[" + ", ".join(map(str, ["N", *metadata["image_shape"]])) + "]",
        features=metadata["features"],
        name=name,
        layers="\n".join(_layer_lines(plain)),
        argument=next(node.target for node in plain.graph.nodes if node.op == "placeholder"),
        body="\n".join(_readable(line) for line in code.splitlines() if line.startswith("    ") and line.strip()),
    )


def _readable(line: str) -> str:
    """A line of the code that fx writes, as a person would have it."""
    line = re.sub(r";\s+(\w+ = )+None\s*(#.*)?$", "", line.rstrip())  # what a function forgets by itself
    line = line.replace("torch.nn.functional.", "F.").replace(", inplace = False", "")
    # Children whose names are numbers: entries of a ModuleDict.
    while (indexed := re.sub(r'getattr\((self[\w.\[\]"]*), "(\w+)"\)', r'\1["\2"]', line)) != line:
        line = indexed
    return f"    {line}"


def _layer_lines(plain: fx.GraphModule) -> Iterator[str]:
    for name, module in plain.named_children():
        yield f"        self.{name} = {_constructor(module, 8)}"
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not _is_layer(plain.get_submodule(owner)):
            place = f"self.get_submodule({owner!r})" if owner else "self"
            yield f"        {place}.{leaf} = nn.Parameter(torch.empty({tuple(parameter.shape)}))"


def _is_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and type(module) is not nn.Module


def _constructor(module: nn.Module, indent: int) -> str:
    """The Python expression for a layer, or for the layers below it. torch's repr of a layer is its constructor."""
    if _is_layer(module):
        # Older versions of torch do not know `bias` of a norm, which is True by default everywhere.
        return f"nn.{module!r}".replace(", bias=True", "")
    inside, outside = " " * (indent + 4), " " * indent
    children = (f'{inside}"{name}": {_constructor(child, indent + 4)},' for name, child in module.named_children())
    return "\n".join(["nn.ModuleDict({", *children, f"{outside}}})"])
