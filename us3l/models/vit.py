"""Width-sliced vision transformers (Dosovitskiy et al., 2021), with timm's names, so that its weights load.

What a width slices is a choice, `slicing`. With D channels of the residual stream, c the active part of D, h the
active part of the MLPs' hidden features, and H heads of d channels:

| | residual stream, norms, patches | qkv and fc1 read | heads | attn.proj reads | hidden features |
|---|---|---|---|---|---|
| input | D | c | those that cover c: ceil(c / d) | c | h |
| mlp | D | D | H | D | h |
| full | c | c | H * width, rounded | all of them | h |

`input` is what the US3L paper trains: every linear layer reads a prefix of its input. What no layer reads afterwards
is not computed, which changes no result. `full` is the only one in which the features are narrower too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l.models.backbone import Backbone
from us3l_kernels.nn import SlicedConv2d, SlicedLayerNorm, SlicedLinear, SlicedQKV

SLICINGS = ("full", "mlp", "input")


class Attention(nn.Module):
    """Multi-head self-attention with as many heads as `qkv` gives."""

    def __init__(self, dim: int, heads: int, slicing: str, divisor: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        reads_prefix = slicing == "input"
        self.qkv = SlicedQKV(
            dim,
            heads,
            slice_in=reads_prefix,
            slice_out=slicing != "mlp",
            cover_input=reads_prefix,
            divisor=divisor,
        )
        self.proj = SlicedLinear(dim, dim, slice_in=reads_prefix, slice_out=slicing == "full", divisor=divisor)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] -> [N, L, C]."""
        # [N, L, 3 * heads * d] -> three of [N, heads, L, d]
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def macs(self, tokens: int) -> int:
        """Multiply-accumulates of the two products of the active heads, for one sample of so many tokens."""
        return 2 * tokens * tokens * self.qkv.active_out_features // 3


class MLP(nn.Module):
    """Two linear layers with a GELU between them; the hidden features are sliced."""

    def __init__(self, dim: int, slicing: str, divisor: int) -> None:
        super().__init__()
        self.fc1 = SlicedLinear(dim, 4 * dim, slice_in=slicing == "input", divisor=divisor)
        self.fc2 = SlicedLinear(4 * dim, dim, slice_out=slicing == "full", divisor=divisor)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, slicing: str, divisor: int) -> None:
        super().__init__()
        self.norm1 = SlicedLayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, slicing, divisor)
        self.norm2 = SlicedLayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, slicing, divisor)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Images [N, C, H, W] to tokens [N, L, D_active], one per patch."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, slice_out: bool, divisor: int) -> None:
        super().__init__()
        self.proj = SlicedConv2d(in_channels, dim, patch_size, patch_size, slice_out=slice_out, divisor=divisor)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(Backbone):
    """A vision transformer; the features are those of its class token, behind the last norm.

    Parameters are named and shaped as timm's `VisionTransformer` (whose `head` is `fc` here).

    Args:
        dim, depth, heads: channels of the residual stream, blocks, heads per block (a divisor of dim).
        slicing: "full", "mlp" or "input", see the table above.
        image_size, patch_size: side of the images, and of the patches that it is a multiple of; pixels.
        num_classes: outputs of the classifier; None for none (`fc` is then the identity).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        *,
        slicing: str = "full",
        image_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int | None = None,
        divisor: int = 8,
    ) -> None:
        super().__init__()
        if slicing not in SLICINGS:
            raise ValueError(f"slicing must be one of {', '.join(SLICINGS)}, got {slicing!r}")
        if image_size % patch_size:
            raise ValueError(f"patch_size must divide image_size={image_size}, got {patch_size}")
        self.image_size = image_size
        patches = (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.patch_embed = PatchEmbedding(in_channels, dim, patch_size, slicing == "full", divisor)
        self.blocks = nn.Sequential(*(Block(dim, heads, slicing, divisor) for _ in range(depth)))
        self.norm = SlicedLayerNorm(dim, eps=1e-6)
        self.residual_sums = [
            ["patch_embed.proj", *(f"blocks.{i}.{last}" for i in range(depth) for last in ("attn.proj", "mlp.fc2"))]
        ]
        self.stages = {}
        self.feature_dim = dim
        self.fc = nn.Identity()
        if num_classes is not None:
            self.fc = SlicedLinear(dim, num_classes, slice_out=False, divisor=divisor)
        self._initialise()

    def _initialise(self) -> None:
        """As timm (and BERT before it): truncated normals of deviation 0.02."""
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"x: expected images of {self.image_size}x{self.image_size} pixels, for which the position "
                f"embeddings are, got {x.shape[-2]}x{x.shape[-1]}"
            )
        x = self.patch_embed(x)
        channels = x.shape[-1]
        tokens = [self.cls_token[..., :channels].expand(x.shape[0], -1, -1), x]
        x = torch.cat(tokens, 1) + self.pos_embed[..., :channels]
        # The norm acts on each token by itself, and only the class token is read.
        return self.norm(self.blocks(x)[:, 0])

    def embedding_parameters(self) -> int:
        """Active elements of the class token and the position embeddings."""
        return (1 + self.pos_embed.shape[1]) * self.patch_embed.proj.active_out_channels
