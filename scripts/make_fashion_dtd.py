"""Write images of the embedded Fashion-MNIST as the files of a data set that torchvision reads.

    python scripts/make_fashion_dtd.py FOLDER

makes FOLDER/dtd/dtd, in the layout of the Describable Textures Dataset: images/CLASS/*.png, and
labels/{train,val,test}1.txt, which list 30, 30 and 100 images of each of the ten classes. With it,
`us3l finetune CKPT data.name=dtd data.root=FOLDER` can be tried without a download.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from us3l.data import arrays


def write_split(root: Path, split: str, source: arrays.Split, places: range) -> None:
    """places: which images of each class."""
    names = []
    for label in range(10):
        of_class = (source.labels == label).nonzero().flatten().tolist()
        for place in places:
            name = f"class-{label}/{split}-{place}.png"
            path = root / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[of_class[place], 0].numpy()).save(path)
            names.append(name)
    (root / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    root, data = parser.parse_args().folder / "dtd" / "dtd", arrays.fashion_mini(28)
    (root / "labels").mkdir(parents=True)
    write_split(root, "train", data.train, range(30))
    write_split(root, "val", data.train, range(30, 60))
    write_split(root, "test", data.test, range(100))


if __name__ == "__main__":
    main()
