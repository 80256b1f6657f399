"""Write a small data set in COCO's format: pieces of clothing from the embedded Fashion-MNIST on noise.

    python scripts/make_fashion_coco.py FOLDER

makes FOLDER/{train2017,val2017} (200 and 50 grey images of 96x96 pixels with one to three objects of ten categories)
and their annotations, boxes and masks, for `us3l detect --coco-root FOLDER`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_masks

from us3l.data import arrays

SIDE, OBJECT = 96, 28
CELLS = [(x, y) for x in (0, 48) for y in (0, 48)]  # an object in each, so that none hides another
CATEGORIES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def write_split(root: Path, split: str, source: arrays.Split, images: int, draw: np.random.Generator) -> None:
    folder = root / split
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    annotations: list[dict[str, Any]] = []
    for i in range(images):
        pixels = draw.integers(0, 40, (SIDE, SIDE), dtype=np.uint8)
        for cell in draw.permutation(len(CELLS))[: draw.integers(1, 4)]:
            chosen = int(draw.integers(len(source.labels)))
            size = int(draw.integers(OBJECT, 48))
            item = np.asarray(Image.fromarray(source.images[chosen, 0].numpy()).resize((size, size)))
            x, y = (start + int(draw.integers(0, 48 - size + 1)) for start in CELLS[cell])
            mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
            mask[y : y + size, x : x + size] = item > 25
            pixels[mask > 0] = item[item > 25]
            encoded = coco_masks.encode(mask)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(source.labels[chosen]) + 1,
                    "iscrowd": 0,
                    "area": float(coco_masks.area(encoded)),
                    "bbox": coco_masks.toBbox(encoded).tolist(),
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                }
            )
        Image.fromarray(pixels).save(folder / f"{i:06d}.png")
    content = {
        "info": {"description": "Fashion-MNIST (Zalando, MIT licence) on noise"},
        "images": [{"id": i, "file_name": f"{i:06d}.png", "width": SIDE, "height": SIDE} for i in range(images)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CATEGORIES, 1)],
        "annotations": annotations,
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    root = parser.parse_args().folder
    data, draw = arrays.fashion_mini(OBJECT), np.random.default_rng(0)
    write_split(root, "train2017", data.train, 200, draw)
    write_split(root, "val2017", data.test, 50, draw)


if __name__ == "__main__":
    main()
