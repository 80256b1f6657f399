"""A super-network out of any timm model, with a width of its own for every stage: Once-for-all, AlphaNet.

Every step runs the sandwich rule: the full network learns from labels; the smallest one and two random ones (a width
for each stage) learn from the full one's predictions, all into one buffer of gradients. Then any combination of
widths can be calibrated, evaluated and taken out as a plain model. Sources: Cai et al., "Once-for-All", 2020; Yu and
Huang, "Universally Slimmable Networks", 2019; Wang et al., "AlphaNet", 2021. The images are scikit-learn's digits.

    python examples/elastic_stages.py
"""

import random

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from us3l_kernels import gradients, optim, slim, standalone, use_width
from us3l_kernels.nn import calibrating

STAGES = ("", "layer2", "layer3", "layer4")  # "" is the rest: the stem and layer1, which share a residual sum
SMALLEST = 0.25


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 32, 32] in [0, 1], labels [1797]."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return F.interpolate(images, scale_factor=4, mode="bilinear"), torch.tensor(data.target)


def random_plan(draw: random.Random) -> dict[str, float]:
    """A width for each stage."""
    return {stage: draw.uniform(SMALLEST, 1.0) for stage in STAGES}


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In %."""
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


def main(steps: int = 120) -> dict[str, float]:
    """Train; the test accuracy (%) by sub-network."""
    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images))
    test, train = order[:400], order[400:]

    model = timm.create_model("resnet10t", in_chans=1, num_classes=10).to(memory_format=torch.channels_last)
    print(slim(model))
    buffer = gradients.attach(model)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    draw = random.Random(0)
    for step in range(steps):
        batch = train[torch.randint(len(train), (64,))]
        x, y = images[batch].contiguous(memory_format=torch.channels_last), labels[batch]
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        target = logits.detach().softmax(1)
        for width in (random_plan(draw), random_plan(draw), SMALLEST):
            with use_width(model, width):
                F.cross_entropy(model(x), target).backward()  # in-place distillation
        optimizer.step()
        buffer.zero_()
        if step % 20 == 0:
            print(f"step {step}  loss of the full network {loss.item():.2f}")

    gradients.detach(model)
    found = {}
    plans = {"full": 1.0, "half": 0.5, "smallest": SMALLEST, "a random plan": random_plan(draw)}
    for name, width in plans.items():
        with use_width(model, width), calibrating(model), torch.no_grad():  # its own batch norm statistics
            model(images[train])
        network = standalone(model.eval(), width)  # a plain timm model of its own
        model.train()
        found[name] = accuracy(network.eval(), images[test], labels[test])
        size = sum(p.numel() for p in network.parameters())
        print(f"{name:<14} {size / 1e3:6.0f}k parameters  test accuracy {found[name]:.1f} %")
    return found


if __name__ == "__main__":
    main()
