"""Images per second that each way of loading delivers, beside what a training step consumes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.harness import report, synchroniser
from benchmarks.rivals import Settings, initial_weights
from benchmarks.step import US3L
from us3l.config import DataConfig
from us3l.data import make_data
from us3l.data.shards import index_shards, write_shards

FILES, SIDE = 8, (500, 375)  # different images, and their pixels: ImageNet's are about as large


def measure(
    settings: Settings,
    *,
    size: int,
    batch: int,
    workers: Sequence[int],
    images: int = 256,
    seconds: float = 5.0,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """`rows`: for JPEG files and shards, by the number of loader processes and the place of augmentation, and for those
    in memory: images (of two views) per second over `seconds`, without the first batch. `step`: of the trainer's own.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files, shards = Path(folder) / "files", Path(folder) / "shards"
        progress("making images")
        _write_images(files, images)
        write_shards(files, shards, images // max(1, *workers))
        for split in ("train", "val"):
            index_shards(shards / split)
        for name, root in (("image_folder", files), ("shards", shards)):
            for count in workers:
                for on in ("workers", "device"):
                    progress(f"{name}, {count} workers, augmentation on {on}")
                    config = DataConfig(
                        name=name, root=str(root), size=size, batch_size=batch, workers=count, augment_on=on
                    )
                    rate = _rate(config, settings.device, seconds)
                    rows.append({"path": name, "workers": count, "augment_on": on, "images_per_second": rate})
    progress("in memory")
    memory = DataConfig(name="random", size=size, batch_size=batch, train_samples=images)
    rate = _rate(memory, settings.device, seconds)
    rows.append({"path": "memory", "workers": 0, "augment_on": "device", "images_per_second": rate})
    progress("the step")
    return report(
        "data",
        settings.describe() | {"input": size, "batch": batch, "images": images, "pixels": SIDE, "seconds": seconds},
        settings.device,
        rows=rows,
        step={"images_per_second": _step_rate(settings, size, batch, seconds)},
    )


def _write_images(folder: Path, images: int) -> None:
    """JPEG files with the detail of photographs: noise that was enlarged, of two classes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", images), ("val", 2)):
        for i in range(count):
            path = folder / split / f"class{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i < FILES:
                noise = torch.randint(0, 256, (SIDE[1] // 8, SIDE[0] // 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(noise.numpy()).resize(SIDE, Image.Resampling.BICUBIC).save(path, quality=90)
            else:
                path.write_bytes((folder / split / f"class{i % FILES % 2}" / f"{i % FILES}.jpg").read_bytes())


def _rate(config: DataConfig, device: torch.device, seconds: float) -> float:
    """Images per second, epoch after epoch; what starting an epoch costs its workers is left out."""
    loader = make_data(config, 0, device=device).train
    wait = synchroniser(device)
    images, spent, epoch = 0, 0.0, 0
    while spent < seconds:
        batches = iter(loader.epoch(epoch))
        next(batches)
        wait()
        start = time.perf_counter()
        for batch in batches:
            wait()
            images += len(batch) // 2
            if spent + time.perf_counter() - start >= seconds:
                break
        spent += time.perf_counter() - start
        epoch += 1
    return images / spent


def _step_rate(settings: Settings, size: int, batch: int, seconds: float) -> float:
    side = US3L(settings, initial_weights(settings), policy="joint")
    images: Tensor = torch.randn(2 * batch, 3, size, size, device=settings.device)
    wait = synchroniser(settings.device)
    side.step(images)
    wait()
    steps, start = 0, time.perf_counter()
    while steps < 2 or time.perf_counter() - start < seconds:
        side.step(images)
        wait()
        steps += 1
    return steps * batch / (time.perf_counter() - start)
