"""Results that survive a crash: one JSON line per finding, and a header that says what they are of."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from us3l.config import differences
from us3l.errors import CheckpointError
from us3l.files import write_text

Row = dict[str, Any]

_HEADER = '{"subject": '  # how every results file begins


class Results:
    """The lines of a results file: what is known of every width, and of which network and data.

    subject: what all the results are of. A file that was written for another subject is refused.
    """

    def __init__(self, path: Path, subject: dict[str, Any]) -> None:
        self.path = path
        subject = json.loads(json.dumps(subject))  # as it is read back: tuples are lists
        self.rows: dict[str, Row] = {}
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not a results file of us3l: {error}") from None
        torn = bool(lines) and not lines[-1].endswith("\n")  # by a crash
        if torn and (len(lines) > 1 or _HEADER.startswith(lines[0][: len(_HEADER)])):
            lines.pop()
            write_text(path, "".join(lines))
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"subject": subject})
            return
        try:
            header, *rows = [json.loads(line) for line in lines]
            if header["subject"] != subject:
                changes = [f"{key}: {a!r} there, {b!r} here" for key, a, b in differences(header["subject"], subject)]
                raise CheckpointError(
                    f"{path} has results of something else ({'; '.join(changes)}): choose another place, or remove it"
                )
            for row in rows:
                self.rows.setdefault(row["width"], {}).update(row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a results file of us3l: {error!r}") from None

    def add(self, width: str, values: Row) -> Row:
        """Store `values` of a width, beside what is known of it; returns all of that."""
        self.rows.setdefault(width, {}).update(width=width, **values)
        self._append({"width": width, **values})
        return self.rows[width]

    def _append(self, line: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def weights_checksum(model: nn.Module) -> int:
    """Of the weights of a backbone without its head."""
    checksum = 0
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), checksum)
    return checksum
