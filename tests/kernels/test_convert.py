"""slim: models of torchvision and timm, and small ones whose channels cannot be left out.

Two oracles. The hand-sliced one is the model in plain torch.nn with copies of the active slices as its weights. The
masked one is the full plain model with zeros in place of all other weights: it computes a sub-network without ever
moving a channel, so it notices where a prefix would not be the prefix of the same tensor.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from us3l_kernels import backend, set_width, slim, use_width
from us3l_kernels.convert import SlimReport
from us3l_kernels.nn import SlicedBatchNorm2d, SlicedConv2d, SlicedLayerNorm, SlicedLinear, calibrating
from us3l_kernels.width import Sliced

# ---------------------------------------------------------------------------------------------- oracles

Slices = dict[str, tuple[slice, ...]]


def active_slices(model: nn.Module, x: Tensor) -> Slices:
    """The part of every parameter that a forward of the slimmed `model` at its present width uses."""
    slices: Slices = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            dim = -1 if type(module) in (SlicedLinear, SlicedLayerNorm) else 1
            rows, columns = output.size(dim), inputs[0].size(dim)
            if getattr(module, "groups", 1) > 1:
                columns = module.weight.size(1)
            slices[f"{name}.weight"] = (slice(rows), slice(columns))[: module.weight.dim()]
            if module.bias is not None:
                slices[f"{name}.bias"] = (slice(rows),)

        return hook

    model = copy.deepcopy(model)  # the running statistics of the other one stay
    for name, module in model.named_modules():
        if isinstance(module, Sliced):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        model(x)
    return slices


def hand_sliced(plain: nn.Module, slices: Slices) -> nn.Module:
    """A copy of `plain` whose layers are smaller torch.nn ones with copies of the slices."""
    small = copy.deepcopy(plain)
    for name, part in slices.items():
        layer_name, _, which = name.rpartition(".")
        layer = small.get_submodule(layer_name)
        parameter = nn.Parameter(getattr(layer, which).detach()[part].clone())
        setattr(layer, which, parameter)
        if which == "bias":
            continue
        if isinstance(layer, nn.Conv2d):
            groups = 1 if layer.groups == 1 else parameter.size(0) * layer.groups // layer.out_channels
            layer.out_channels, layer.in_channels = parameter.size(0), parameter.size(1) * groups
            layer.groups = groups
        elif isinstance(layer, nn.LayerNorm):
            layer.normalized_shape = tuple(parameter.shape)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.num_features = parameter.size(0)
            layer.running_mean, layer.running_var = (s[part].clone() for s in (layer.running_mean, layer.running_var))
    return small


def masked(plain: nn.Module, slices: Slices) -> dict[str, Tensor]:
    """The parameters of `plain`, zero outside the slices; differentiable."""
    parameters = {}
    for name, parameter in plain.named_parameters():
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        mask[slices.get(name, ())] = True
        parameters[name] = torch.where(mask, parameter, 0.0)
    return parameters


def without_dropout(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def poison(model: nn.Module, slices: Slices) -> None:
    """NaN where the sub-network must not look."""
    with torch.no_grad():
        for name, part in slices.items():
            parameter = model.get_parameter(name)
            kept = parameter[part].clone()
            parameter.fill_(torch.nan)
            parameter[part] = kept


def backward(y: Tensor, *wanted: Tensor) -> list[Tensor]:
    torch.manual_seed(3)
    return torch.autograd.grad(y, wanted, torch.randn_like(y), materialize_grads=True)


def outside(gradient: Tensor, part: tuple[slice, ...]) -> Tensor:
    gradient = gradient.clone()
    gradient[part] = 0
    return gradient


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9, msg=lambda text: f"{what}: {text}")


def assert_exact(
    plain: nn.Module, x: Tensor, widths: Sequence[float], *, divisor: int = 8, with_masked: bool = True
) -> SlimReport:
    """Slim a copy of `plain` and compare it with both oracles, forward and backward, in float64 and training mode."""
    plain, x = plain.double().train(), x.double().requires_grad_()
    slimmed = copy.deepcopy(plain)
    report = slim(slimmed, divisor=divisor, example_input=x)
    for width in widths:
        network = copy.deepcopy(slimmed)
        set_width(network, width)
        slices = active_slices(network, x)
        poison(network, slices)
        parameters = dict(network.named_parameters())
        torch.manual_seed(2)  # of dropout
        y = network(x)
        gx, *gradients = backward(y, x, *parameters.values())

        small = hand_sliced(plain, slices)
        torch.manual_seed(2)
        expected = small(x)
        assert_close(y, expected, f"output at {width}")
        expected_gx, *expected_gradients = backward(expected, x, *small.parameters())
        assert_close(gx, expected_gx, f"gradient of x at {width}")
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in plain.parameters())
        for name, gradient, part in zip(parameters, gradients, expected_gradients, strict=True):
            active = slices.get(name, ())
            assert_close(gradient[active], part, f"gradient of {name} at {width}")
            assert not outside(gradient, active).any(), name

        if with_masked:
            # Dropout would draw another mask for more channels.
            network, same_plain = without_dropout(network), without_dropout(plain)
            torch.manual_seed(2)
            y = network(x)
            torch.manual_seed(2)
            same = torch.func.functional_call(same_plain, masked(plain, slices), x)
            assert_close(y, same, f"output of the masked network at {width}")
    return report


# ---------------------------------------------------------------------------------------------- whole models


def vgg(features: str) -> nn.Module:
    """torchvision's VGG with batch norm, with fewer features in its classifier."""
    model = torchvision.models.get_model(features, num_classes=10, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(512 * 49, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 10))
    return model


FAST = {
    "torchvision resnet18": 32,
    "torchvision mobilenet_v3_small": 32,
    "timm regnety_002": 32,
}
SLOW = {
    "torchvision resnet50": 32,
    "torchvision resnext50_32x4d": 32,
    "torchvision wide_resnet50_2": 32,
    "torchvision mobilenet_v2": 64,
    "torchvision mobilenet_v3_large": 64,
    "torchvision mnasnet0_5": 64,
    "torchvision efficientnet_b0": 64,
    "torchvision regnet_y_400mf": 64,
    "torchvision regnet_x_400mf": 64,
    "torchvision vgg11_bn": 32,
    "torchvision alexnet": 64,
    "timm resnet18": 32,
    "timm resnet26d": 32,
    "timm seresnet50": 32,
    "timm mobilenetv2_100": 64,
    "timm mobilenetv3_small_100": 64,
    "timm mobilenetv4_conv_small": 64,
    "timm efficientnet_b0": 64,
    "timm regnetx_032": 32,
    "timm repvgg_a0": 32,
}
# Some layers keep their channels: what is left to slice, and what needs them.
PARTLY = {
    "torchvision densenet121": (32, "cat in features.denseblock1.denselayer1"),
    "torchvision shufflenet_v2_x0_5": (64, "cat in stage2.0"),
    "torchvision squeezenet1_1": (64, "cat in features.3"),
    "torchvision convnext_tiny": (32, "mul in features.1.0, with a tensor of full size"),
    "torchvision vit_b_32": (224, "cat in VisionTransformer"),
    "timm convnext_atto": (32, "mul in stages.0.blocks.0, with a tensor of full size"),
    "timm tf_efficientnet_b0": (64, "convolution in blocks.1.0.conv_dw"),
    "timm vit_tiny_patch16_224": (224, "cat in VisionTransformer"),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    library, name = name.split()
    if library == "timm":
        return timm.create_model(name, num_classes=10)
    return vgg(name) if name.startswith("vgg") else torchvision.models.get_model(name, num_classes=10)


def images(pixels: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def of(models: dict[str, Any], *, slow: bool) -> list[Any]:
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(name, value, id=name.replace(" ", "-"), marks=marks) for name, value in models.items()]


@pytest.mark.parametrize(("name", "pixels"), of(FAST, slow=False) + of(SLOW, slow=True))
def test_subnetworks_of_a_model_are_exact(name, pixels):
    report = assert_exact(build(name), images(pixels), [0.25, 0.6])
    assert list(report.kept.values()) == ["an output of the model"]
    assert not report.unreached


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels_and_reason"), of(PARTLY, slow=True))
def test_subnetworks_are_exact_where_layers_keep_their_channels(name, pixels_and_reason):
    pixels, reason = pixels_and_reason
    report = assert_exact(build(name), images(pixels, 2), [0.25])
    assert reason in report.kept.values()


def test_convnext_without_layer_scale_is_sliced_throughout():
    torch.manual_seed(0)
    plain = timm.models.ConvNeXt(num_classes=10, ls_init_value=None, depths=(1, 1, 2, 1), dims=(16, 24, 32, 40))
    # A layer norm over fewer channels is no masked one over all of them.
    report = assert_exact(plain, images(64), [0.25, 0.6], with_masked=False)
    assert list(report.kept) == ["head.fc"]
    assert "SlicedLayerNorm2d" in report.converted.values()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "pixels"), of(FAST, slow=False) + of(SLOW, slow=True))
def test_full_width_is_bit_equal_to_the_plain_model(name, pixels, training):
    plain, x = build(name).train(training), images(pixels)
    slimmed = copy.deepcopy(plain)
    slim(slimmed)
    with backend("aten"):
        torch.manual_seed(2)
        y = slimmed(x)
    torch.manual_seed(2)
    assert torch.equal(y, plain(x))
    for (key, value), (expected_key, expected) in zip(
        slimmed.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert key == expected_key
        assert torch.equal(value, expected), key  # running statistics too


# ---------------------------------------------------------------------------------------------- what cannot be left out


class Net(nn.Module):
    """Two convolutions, something in between, a classifier. `between` maps [N, 24, 8, 8] to [N, channels, ...]."""

    def __init__(self, between: Callable[..., Tensor], channels: int = 24, **modules: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.inner = nn.Conv2d(24, 24, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(24, 1, 1))
        for name, module in modules.items():
            setattr(self, name, module)
        self.second = nn.Conv2d(channels, 32, 3)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.second(self.between(self, x))
        return self.fc(x.mean((2, 3)))


def shuffle(net: Net, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def attend(net: Net, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


def only_in_training(net: Net, x: Tensor) -> Tensor:
    return x.flip(1) if net.training else x


def crop_channels(net: Net, x: Tensor) -> Tensor:
    return torch.cat([x[:, :12], x[:, 12:]], 1)


def full_weight(net: Net, x: Tensor) -> Tensor:
    return F.conv2d(x, net.inner.weight, padding=1)


def fill_buffer(net: Net, x: Tensor) -> Tensor:
    buffer = torch.zeros(x.size(0), 24, *x.shape[2:], dtype=x.dtype)
    buffer += x
    return buffer


# what stands between two layers, the reason to keep the channels of the first
WHOLE = {
    "concatenation": (lambda net, x: torch.cat([x, net.inner(x)], 1), "cat in Net", 48),
    "channel shuffle": (shuffle, "view in Net", 24),
    "softmax over channels": (lambda net, x: x.softmax(1) * x, "_softmax in Net", 24),
    "mean over channels": (lambda net, x: x * x.mean(1, keepdim=True), "mean in Net", 24),
    "a half of the channels": (crop_channels, "slice in Net", 24),
    "gate by halves": (lambda net, x: F.glu(x, 1), "glu in Net", 12),
    "padding of channels": (lambda net, x: F.pad(x, (0, 0, 0, 0, 4, 4)), "constant_pad_nd in Net", 32),
    "full parameter": (lambda net, x: x * net.scale, "mul in Net, with a tensor of full size", 24),
    "full weight": (full_weight, "convolution in Net", 24),
    "full buffer": (fill_buffer, "add in Net, with a tensor of full size", 24),
    "group norm": (lambda net, x: net.group_norm(x), "native_group_norm in group_norm", 24),
    "attention": (attend, None, 24),
    "hard-coded size": (lambda net, x: x.mean((2, 3)).view(-1, 24)[:, :, None, None] + x, "view in Net", 24),
    "in training only": (only_in_training, "flip in Net", 24),
    "channels from positions": (
        lambda net, x: x[..., :3].flatten(1, 2)[..., None, :3].expand(-1, -1, 3, -1),
        None,
        192,
    ),
    "not channel-major": (
        lambda net, x: x.permute(0, 2, 3, 1).flatten(1)[:, :, None, None].expand(-1, -1, 3, 3),
        "_unsafe_view in Net",
        24 * 64,
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_channels_that_an_operation_needs_whole_are_kept(case):
    between, reason, channels = WHOLE[case]
    plain = Net(between, channels, group_norm=nn.GroupNorm(4, 24))
    report = assert_exact(plain, images(8), [0.3, 0.6])
    if reason is not None:
        assert report.kept["first"] == reason
    assert "second" not in report.kept


def test_a_flatten_is_channel_major_so_its_prefix_goes_on():
    plain = nn.Sequential(nn.Conv2d(3, 24, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 36, 5))
    assert list(assert_exact(plain, images(8), [0.3, 0.6]).kept) == ["3"]


def test_a_layer_that_also_gets_a_whole_tensor_gets_whole_ones():
    report = assert_exact(Net(lambda net, x: net.inner(x) + net.inner(x.flip(1))), images(8), [0.3])
    assert set(report.kept) == {"first", "fc"}


def test_a_layer_called_twice_ties_its_inputs():
    report = assert_exact(Net(lambda net, x: net.inner(net.inner(x).relu())), images(8), [0.3, 0.6])
    assert report.tied == [["first", "inner"]]


def test_grouped_convolutions_are_cut_between_groups():
    layers = {
        "grouped": nn.Conv2d(24, 48, 3, padding=1, groups=4),  # 6 channels of each group -> 12
        "depthwise": nn.Conv2d(48, 96, 3, padding=1, groups=48),
    }
    plain = Net(lambda net, x: net.depthwise(net.grouped(x)), 96, **layers)
    slimmed = copy.deepcopy(plain)
    report = assert_exact(plain, images(8), [0.3, 0.6], divisor=4)
    assert list(report.kept) == ["fc"]
    slim(slimmed, divisor=4)
    for width in (0.1, 0.5, 0.7, 1.0):
        set_width(slimmed, width)
        assert slimmed.first.active_out_channels % 12 == 0  # divisor and groups
        assert slimmed.grouped.active_out_channels == 2 * slimmed.first.active_out_channels
        assert slimmed.depthwise.active_out_channels == 4 * slimmed.first.active_out_channels
        assert slimmed(images(8)).shape == (4, 5)


def test_squeeze_and_excitation_ties_its_gate():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(24, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 1), nn.Sigmoid())
    report = assert_exact(Net(lambda net, x: x * net.gate(x), gate=gate), images(8), [0.3, 0.6])
    assert report.tied == [["first", "gate.3"]]


# ---------------------------------------------------------------------------------------------- the model stays itself


def residual(net: Net, x: Tensor) -> Tensor:
    return x + net.inner(x)


def test_modules_parameters_and_hooks_stay_the_same_objects():
    model = Net(residual)
    modules, parameters, calls = dict(model.named_modules()), dict(model.named_parameters()), []
    model.first.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = slim(model)
    assert report.converted == {
        "first": "SlicedConv2d",
        "norm": "SlicedBatchNorm2d",
        "inner": "SlicedConv2d",
        "second": "SlicedConv2d",
        "fc": "SlicedLinear",
    }
    assert report.count == 5
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert type(model.first) is SlicedConv2d and type(model.norm) is SlicedBatchNorm2d
    calls.clear()  # it sees the forwards on the meta device too
    before = model.first.weight.detach().clone()
    with use_width(model, 0.5):
        y = model(images(8))
        y.backward(torch.randn_like(y))
    optimizer.step()
    assert calls == [16]
    changed = (model.first.weight != before).flatten(1).any(1)
    assert changed[:16].all() and not changed[16:].any()


def test_slim_looks_but_does_not_touch():
    model = Net(lambda net, x: net.drop(x), drop=nn.Dropout())
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    slim(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.first._forward_hooks and "forward" not in vars(model.first)


def test_a_slimmed_model_copies_pickles_and_compiles():
    model = timm.create_model("regnety_002", num_classes=5)
    slim(model)
    x = images(32)
    with use_width(model, 0.5):
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    small = Net(residual)
    slim(small)
    with use_width(small, 0.5):
        compiled = torch.compile(small, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), small(x))


def test_evaluation_at_a_width_is_calibrated():
    model = timm.create_model("regnety_002", num_classes=5).eval()
    slim(model)
    x = images(32)
    with torch.no_grad(), use_width(model, 0.5):
        with pytest.raises(RuntimeError, match="calibrating"):
            model(x)
        with calibrating(model):
            expected = model(x)
        torch.testing.assert_close(model(x), expected)


def test_a_plan_that_breaks_a_sum_raises_with_the_layers():
    model = Net(residual)
    assert slim(model).tied == [["first", "inner"]]
    with pytest.raises(ValueError, match=r"first \(8 channels\), inner \(24 channels\)"):
        set_width(model, {"first": 0.3})
    set_width(model, {"first": 0.3, "inner": 0.3, "second": 0.5})
    assert model(images(8)).shape == (4, 5)


def test_a_kept_stage_stays_whole():
    plain = torchvision.models.resnet18(num_classes=10)
    slimmed = copy.deepcopy(plain)
    report = slim(slimmed, keep=("layer2", "layer1.0.conv1"))
    kept = {name for name, reason in report.kept.items() if reason == "asked for by keep"}
    assert kept == {name for name in report.converted if name.startswith("layer2.") and "bn" not in name} - {
        "layer2.0.downsample.1"
    } | {"layer1.0.conv1"}
    set_width(slimmed, 0.5)
    x = images(32)
    expected = hand_sliced(plain, active_slices(slimmed, x))(x)
    torch.testing.assert_close(slimmed(x), expected)
    assert slimmed.layer2(torch.randn(2, 32, 8, 8)).size(1) == 128


# ---------------------------------------------------------------------------------------------- refusals


def no_meta(net: Net, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (Net(no_meta), {}, ValueError, r"cannot follow the forward of Net .* Net raised .*item"),
        (Net(residual), {"example_input": torch.zeros(2, 3, 2, 2)}, ValueError, "second raised RuntimeError"),
        (Net(residual), {"divisor": 0}, ValueError, "divisor: expected an integer >= 1, got 0"),
        (
            Net(residual),
            {"keep": "first"},
            TypeError,
            "keep: expected a sequence of module names, got the text 'first'",
        ),
        (Net(residual), {"keep": ("frist",)}, ValueError, "got 'frist'; the nearest name is 'first'"),
        (Net(residual), {"keep": ("norm",)}, ValueError, "keep: expected .* got 'norm'"),
        (nn.Linear(8, 4), {}, ValueError, "example_input: expected a tensor"),
        (nn.Conv2d(3, 16, 3), {}, ValueError, "no layer of Conv2d can leave out channels. : an output of the model"),
        (Net(lambda net, x: x, n=nn.SyncBatchNorm(24)), {}, ValueError, "'n' is of type SyncBatchNorm.*set `sync`"),
        (Net(lambda net, x: x, n=nn.InstanceNorm2d(24, track_running_stats=True)), {}, ValueError, "InstanceNorm2d"),
        (Net(lambda net, x: x, n=SlicedConv2d(8, 8, 3)), {}, ValueError, "'n' is a SlicedConv2d: .* already"),
    ],
)
def test_a_refusal_names_the_place_and_changes_nothing(model, options, error, message):
    before = classes(model)
    with pytest.raises(error, match=message):
        slim(model, **options)
    assert classes(model) == before
    assert not hasattr(model, "residual_sums")


def test_the_report_says_what_was_done():
    model = Net(lambda net, x: torch.cat([x, x], 1), 48)
    text = str(slim(model))
    assert text.splitlines() == [
        "4 layers converted: 2 SlicedConv2d, 1 SlicedBatchNorm2d, 1 SlicedLinear",
        "2 with all their output channels at every width, because of:",
        "  first: cat in Net",
        "  fc: an output of the model",
        "not reached by the forward, and left alone: inner",
    ]
