"""A slimmable ResNet-18 in an ordinary training loop: a stock optimizer, DistributedDataParallel, no engine of ours.

Run it alone or on several processes:  python examples/plain_loop.py
                                       torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import os
import random

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from us3l.models import build_model
from us3l_kernels import use_width


def main(steps: int = 10) -> None:
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)  # the same initial weights everywhere
    network = build_model("resnet18", stem="cifar", num_classes=10).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(network) if torch.distributed.is_initialized() else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    torch.manual_seed(1 + rank)  # images of its own for each process
    widths = random.Random(0)  # the same seed everywhere: all processes must run the same width
    for step in range(steps):
        images, labels = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
        optimizer.zero_grad()
        for width in (1.0, widths.uniform(0.25, 1.0), 0.25):  # the sandwich rule
            with use_width(network, width):
                loss = F.cross_entropy(model(images), labels)
                loss.backward()  # gradients of the three sub-networks add up
        optimizer.step()
        print(f"rank {rank}  step {step}  loss at width 0.25: {loss.item():.3f}")
    # DistributedDataParallel averages the gradients: the processes must end with the same weights.
    norm = torch.nn.utils.get_total_norm(network.parameters())
    print(f"rank {rank}  norm of the weights: {norm.item():.9g}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
