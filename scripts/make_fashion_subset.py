"""Make us3l/data/fashion_subset.npz again from the full Fashion-MNIST.

python scripts/make_fashion_subset.py FOLDER_WITH_THE_IDX_FILES [OUTPUT.npz]

The file holds the first 3000 training and the first 4000 test images, 28x28 uint8, and their labels. The
sha256 printed is that of the arrays (not of the file, whose bytes depend on the version of zlib): the test
suite compares it.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from us3l.data.arrays import read_fashion_folder

OUTPUT = Path(__file__).parent.parent / "us3l" / "data" / "fashion_subset.npz"
TRAIN, TEST = 3000, 4000


def main(source: Path, output: Path) -> None:
    train_images, train_labels, test_images, test_labels = read_fashion_folder(source)
    arrays = {
        "train_images": train_images[:TRAIN],
        "train_labels": train_labels[:TRAIN],
        "test_images": test_images[:TEST],
        "test_labels": test_labels[:TEST],
    }
    np.savez_compressed(output, **arrays)  # type: ignore[arg-type]  # numpy types the keywords as its own options
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    print(f"{output}: {output.stat().st_size} bytes, sha256 of the arrays {digest}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else OUTPUT)
