"""What kernels derive from whole parameters (transformed filters), kept from one update of a parameter to the next.

An entry is valid for one version of its parameter: torch counts in-place changes, so optimizers, `copy_`,
`load_state_dict` and averaging invalidate it by themselves, and a copy of a model starts with none. What torch does not
count are writes through `parameter.data` or through other memory aliases: call `invalidate(model)` after those.
US3L_CHECK_CACHE=1 finds a forgotten call by comparing checksums.

Deriving for the whole parameter pays only if it is used again before the next update. So the first use of a version
derives it only if the version before was used more than once; otherwise the second use does. A teacher that sees one
batch between two updates costs no memory this way; several widths of a step, or an evaluation, share one entry.

All entries together stay within US3L_WEIGHT_CACHE_MB (default 1024). What does not fit is left to the calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from us3l_kernels.errors import SettingError


@dataclass
class _Entry:
    """Of one parameter and one kind. `uses` counts the calls since the version came; `data` may be of an older one."""

    version: tuple[int, int] | None = None
    uses: int = 0
    uses_before: int = 2  # as of a version before the first: kept at its first use
    data: Tensor | None = None
    filled: bool = False
    checksum: int = 0


@dataclass
class _Cache:
    budget: int  # bytes
    check: bool
    entries: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)  # parameter -> kind -> _Entry
    lock: threading.Lock = field(default_factory=threading.Lock)

    def bytes(self) -> int:
        return sum(e.data.nbytes for kinds in self.entries.values() for e in kinds.values() if e.data is not None)


def _environment() -> _Cache:
    text = os.environ.get("US3L_WEIGHT_CACHE_MB") or "1024"
    if not text.isdecimal():
        raise SettingError(f"US3L_WEIGHT_CACHE_MB: expected a number of megabytes (2**20 bytes), got {text!r}")
    check = os.environ.get("US3L_CHECK_CACHE") or "0"
    if check not in ("0", "1"):
        raise SettingError(f"US3L_CHECK_CACHE: expected 0 or 1, got {check!r}")
    return _Cache(int(text) << 20, check == "1")


_cache = _environment()


def derived(parameter: Tensor, kind: str, *, size: Callable[[], int], fill: Callable[[Tensor], None]) -> Tensor | None:
    """What `fill` makes of the parameter as it is now, kept while the parameter stays as it is.

    kind: names what is derived. size: number of float32 elements. fill: writes them into the given vector. Returns None
    where it is not worth keeping, or does not fit: then the caller derives what it needs for itself.

    Raises RuntimeError with US3L_CHECK_CACHE=1 if the parameter has changed and torch did not count it.
    """
    if _cache.budget == 0 or parameter.is_inference():  # the latter has no version
        return None
    with _cache.lock:
        kinds = _cache.entries.get(parameter)
        if kinds is None:
            kinds = _cache.entries[parameter] = {}
        entry = kinds.setdefault(kind, _Entry())
        version = (parameter._version, parameter.data_ptr())
        if entry.version != version:
            if entry.version is not None:
                entry.uses_before = entry.uses
            entry.version, entry.uses, entry.filled = version, 0, False
        entry.uses += 1
        if not entry.filled:
            if entry.uses == 1 and entry.uses_before < 2:
                entry.data = None
                return None
            if entry.data is None:
                elements = size()
                if _cache.bytes() + 4 * elements > _cache.budget:
                    return None
                entry.data = torch.empty(elements, dtype=torch.float32, device=parameter.device)
            fill(entry.data)
            entry.filled = True
            if _cache.check:
                entry.checksum = _checksum(parameter)
        elif _cache.check and entry.checksum != _checksum(parameter):
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} was changed in a way that torch does not count "
                "(through `.data`, or another alias of its memory): call us3l_kernels.invalidate(model) after that"
            )
        return entry.data


def _checksum(parameter: Tensor) -> int:
    return int(parameter.detach().contiguous().view(torch.int32).sum(dtype=torch.int64))


def invalidate(model: nn.Module) -> None:
    """Forget what was derived from the parameters of `model`: after writing to them through `.data` or an alias."""
    with _cache.lock:
        for parameter in model.parameters():
            _cache.entries.pop(parameter, None)
    # Now torch counts the write, too: that is what packed copies (us3l_kernels.packed) go by while they live.
    torch.autograd.graph.increment_version([p for p in model.parameters() if not p.is_inference()])


def cached_bytes() -> int:
    """Memory that derived weights take at the moment, in bytes."""
    with _cache.lock:
        return _cache.bytes()
