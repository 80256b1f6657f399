"""Vision transformers: timm's at full width, and at other widths what hand-sliced parameters give."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from us3l.models import VisionTransformer, build_model
from us3l.profile import profile
from us3l_kernels import gradients, standalone
from us3l_kernels.nn import SlicedQKV
from us3l_kernels.width import Sliced, active_channels, set_width, use_width

DIM, DEPTH, HEADS, SIZE, PATCH, CLASSES = 32, 2, 4, 12, 4, 5
HEAD_DIM = DIM // HEADS
WIDTHS = [0.8, 0.5, 0.3]  # 24, 16 and 8 channels: all of a head, and not


def vit(slicing: str, **options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    options = {"image_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES, "divisor": 4} | options
    model = VisionTransformer(DIM, DEPTH, HEADS, slicing=slicing, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def images(n: int = 3, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def heads_of(slicing: str, width: float) -> int:
    """How many heads must be there for what is read."""
    if slicing == "mlp":
        return HEADS
    if slicing == "input":
        return -(-active_channels(DIM, width, divisor=4) // HEAD_DIM)
    return {0.8: 3, 0.5: 2, 0.3: 2}[width]  # 3.2, 2 and 1.2 of 4, never below 0.9 of it


def by_hand(p: dict[str, Tensor], x: Tensor, slicing: str, width: float) -> Tensor:
    """The network with sliced parameters, nothing left out: `input` computes all heads and all hidden features."""
    c = active_channels(DIM, width, divisor=4)
    hidden = active_channels(4 * DIM, width, divisor=4)
    stream = c if slicing == "full" else DIM
    read = DIM if slicing == "mlp" else c
    heads = heads_of(slicing, width) if slicing == "full" else HEADS
    h = heads * HEAD_DIM

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (stream,), p[f"{name}.weight"][:stream], p[f"{name}.bias"][:stream], 1e-6)

    def linear(name: str, x: Tensor, reads: int, out: int) -> Tensor:
        return F.linear(x[..., :reads], p[f"{name}.weight"][:out, :reads], p[f"{name}.bias"][:out])

    x = F.conv2d(x, p["patch_embed.proj.weight"][:stream], p["patch_embed.proj.bias"][:stream], PATCH)
    x = torch.cat([p["cls_token"][..., :stream].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + p["pos_embed"][..., :stream]
    for i in range(DEPTH):
        block = f"blocks.{i}"
        y = norm(f"{block}.norm1", x)[..., :read]
        weight, bias = p[f"{block}.attn.qkv.weight"], p[f"{block}.attn.qkv.bias"]
        q, k, v = (
            F.linear(y, weight[s : s + h, :read], bias[s : s + h]).view(*y.shape[:2], heads, HEAD_DIM).transpose(1, 2)
            for s in (0, DIM, 2 * DIM)
        )
        y = (q @ k.transpose(-2, -1) / HEAD_DIM**0.5).softmax(-1) @ v
        x = x + linear(f"{block}.attn.proj", y.transpose(1, 2).flatten(2), c if slicing == "input" else h, stream)
        y = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x), read, 4 * DIM))
        x = x + linear(f"{block}.mlp.fc2", y, hidden, stream)
    return linear("fc", norm("norm", x)[:, 0], stream, CLASSES)


@pytest.mark.parametrize("slicing", ["full", "mlp", "input"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_slicing_is_what_sliced_parameters_give(slicing: str, width: float) -> None:
    model, x = vit(slicing), images()
    buffer = gradients.attach(model)
    set_width(model, width)
    output = model(x)
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    expected = by_hand(p, x, slicing, width)
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-10)

    upstream = torch.randn_like(output)
    output.backward(upstream)
    expected.backward(upstream)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-8, atol=1e-10, msg=name)
    assert all(slot.touched for slot in buffer.slots)


@pytest.mark.parametrize("slicing", ["full", "mlp", "input"])
def test_nothing_inactive_is_read(slicing: str) -> None:
    model, x, width = vit(slicing), images(), 0.3
    with use_width(model, width):
        expected = model(x)
    c, h = active_channels(DIM, width, divisor=4), heads_of(slicing, width) * HEAD_DIM
    hidden = active_channels(4 * DIM, width, divisor=4)
    stream = c if slicing == "full" else DIM
    read = DIM if slicing == "mlp" else c
    with torch.no_grad():
        for tensor in (model.cls_token, model.pos_embed):
            tensor[..., stream:] = torch.nan
        model.patch_embed.proj.weight[stream:] = torch.nan
        for block in model.blocks:
            qkv = block.attn.qkv.weight.view(3, DIM, DIM)
            qkv[:, h:] = qkv[:, :, read:] = torch.nan
            block.attn.qkv.bias.view(3, DIM)[:, h:] = torch.nan
            block.attn.proj.weight[:, c if slicing == "input" else h :] = torch.nan
            block.attn.proj.weight[stream:] = torch.nan
            block.mlp.fc1.weight[hidden:] = block.mlp.fc1.weight[:, read:] = torch.nan
            block.mlp.fc2.weight[stream:] = block.mlp.fc2.weight[:, hidden:] = torch.nan
            block.norm1.weight[stream:] = block.norm2.bias[stream:] = torch.nan
        model.fc.weight[:, stream:] = torch.nan
    with use_width(model, width):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("slicing", ["full", "mlp", "input"])
def test_timms_weights_load_and_give_its_features(slicing: str) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS,
        num_classes=CLASSES,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state = {name.replace("head.", "fc."): value for name, value in theirs.state_dict().items()}
    model = vit(slicing)
    model.load_state_dict(state)
    torch.testing.assert_close(model(images()), theirs.eval()(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vit_tiny", "vit_tiny_patch16_224"),
        ("vit_small", "vit_small_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
    ],
)
def test_names_and_shapes_are_timms(name: str, theirs: str) -> None:
    with torch.device("meta"):
        ours, timms = build_model(name), timm.create_model(theirs, num_classes=0)
    shapes = {key: tuple(p.shape) for key, p in ours.named_parameters()}
    assert shapes == {key: tuple(p.shape) for key, p in timms.named_parameters()}


@pytest.mark.parametrize("slicing", ["full", "mlp", "input"])
@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_sub_network_stands_alone(slicing: str, width: float) -> None:
    model = vit(slicing).eval()
    plain = standalone(model, width, images())
    assert not any(isinstance(module, Sliced) for module in plain.modules())
    with use_width(model, width):
        torch.testing.assert_close(plain(images()), model(images()), rtol=1e-12, atol=1e-12)


def test_profile_counts_what_a_width_uses() -> None:
    """At width 1.0 timm's parameters; below, those that by_hand reads (input: with the heads that cover them)."""
    full = profile(vit("full").float(), (3, SIZE, SIZE), [1.0, 0.5])
    assert full[0].params == sum(p.numel() for p in vit("full").parameters())
    d, h, tokens = 16, 64, 1 + (SIZE // PATCH) ** 2
    embeddings = (1 + tokens) * d + 3 * PATCH**2 * d + d
    block = 2 * d + (3 * d * d + 3 * d) + (d * d + d) + 2 * d + (h * d + h) + (d * h + d)
    assert full[1].params == embeddings + DEPTH * block + 2 * d + CLASSES * (d + 1)
    matrices = tokens * (4 * d * d + 2 * h * d) + 2 * tokens * tokens * d
    assert full[1].macs == (tokens - 1) * 3 * PATCH**2 * d + DEPTH * matrices + CLASSES * d

    kinds = ("full", "input", "mlp")
    costs = {kind: profile(vit(kind).float(), (3, SIZE, SIZE), [0.3])[0].macs for kind in kinds}
    assert costs["full"] < costs["input"] < costs["mlp"]


def test_a_plan_must_keep_the_residual_stream() -> None:
    model = vit("full")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2"):
        set_width(model, {"blocks.1.mlp.fc2": 0.5})
    with use_width(model, {"blocks.1.mlp.fc1": 0.5, "blocks.0.attn.qkv": 0.25}):
        assert model(images()).shape == (3, CLASSES)


def test_heads_at_a_width() -> None:
    qkv = SlicedQKV(192, 3)
    assert [qkv.heads_at(width) for width in (1.0, 0.75, 0.5, 0.25)] == [3, 3, 2, 1]  # 2.25: 2 would be below 0.9 of it
    covering = SlicedQKV(192, 3, slice_in=True, cover_input=True)
    assert [covering.heads_at(width) for width in (1.0, 0.75, 0.5, 0.25)] == [3, 3, 2, 1]
    assert [SlicedQKV(192, 3, slice_out=False).heads_at(width) for width in (1.0, 0.25)] == [3, 3]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="slicing must be one of full, mlp, input, got 'heads'"):
        vit("heads")
    with pytest.raises(ValueError, match="patch_size must divide image_size=12, got 5"):
        vit("full", patch_size=5)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim=32, got 5"):
        SlicedQKV(32, 5)
    with pytest.raises(ValueError, match="12x12 pixels.*got 8x8"):
        vit("full")(images()[..., :8, :8])
    with pytest.raises(ValueError, match="norm=switchable is for batch norms"):
        build_model("vit_mini", norm="switchable", widths=[1.0, 0.5])
