"""MatFormer on sliced linear layers: a language model whose feed-forward layers are nested, trained once for all sizes.

Every step trains one granularity, drawn at random; afterwards every block may run at a granularity of its own
("mix and match"), also in combinations that no step has trained. Source: Devvrit et al., "MatFormer: Nested Transformer
for Elastic Inference", 2023. The text is Python's own documentation, which comes with the interpreter.

    python examples/matformer.py
"""

import random
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from us3l_kernels import gradients, optim, standalone, use_width
from us3l_kernels.nn import SlicedLinear

GRANULARITIES = (1.0, 0.5, 0.25, 0.125)  # of the hidden features
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1 = SlicedLinear(dim, 4 * dim)  # the width decides how many hidden features there are
        self.fc2 = SlicedLinear(4 * dim, dim, slice_out=False)  # reads as many as come, and returns all of `dim`

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class LanguageModel(nn.Module):
    """Bytes [N, L] -> logits [N, L, 256] of the next ones."""

    def __init__(self, dim: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.position.weight[: text.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    return F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def main(steps: int = 600) -> dict[str, float]:
    """Train; the validation loss (nats per byte) by granularity."""
    torch.manual_seed(0)
    text = torch.tensor(bytearray("\n".join(topics.values()).encode()), dtype=torch.int64)
    windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    windows = windows[torch.randperm(len(windows))]
    validation, training = windows[:256], windows[256:]

    model = LanguageModel()
    buffer = gradients.attach(model)  # gradients add up in place: a narrow step touches its slice alone
    optimizer = optim.AdamW(model.parameters(), lr=2e-3)
    granularities = random.Random(0)
    for step in range(steps):
        batch = training[torch.randint(len(training), (16,))]
        with use_width(model, granularities.choice(GRANULARITIES)):
            loss = loss_of(model, batch)
            loss.backward()
        optimizer.step()
        buffer.zero_()
        if step % 100 == 0:
            print(f"step {step}  loss {loss.item():.2f}")

    mixed = {"": 1.0, "blocks.1": 0.5, "blocks.2": 0.25, "blocks.3": 0.5}  # no step has trained it
    losses = {}
    gradients.detach(model)
    for name, width in {**{f"{g:g}": g for g in GRANULARITIES}, "mixed": mixed}.items():
        network = standalone(model, width, example_input=validation[:1, 1:])  # a plain torch.nn model of its own
        with torch.no_grad():
            losses[name] = loss_of(network, validation).item()
        size = sum(p.numel() for p in network.parameters())
        print(f"granularity {name:<6} {size / 1e3:5.0f}k parameters  validation loss {losses[name]:.3f}")
    return losses


if __name__ == "__main__":
    main()
