"""The memory of a client's process: how much it holds, how much there is, and how to hold less."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedkit.errors import MemoryBudgetError

MB: Final = 1_000_000
ONEDNN_CACHE: Final = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGE = -1, -3, 1 << 20  # of glibc's mallopt
_PAGEOUT: Final = 21  # of Linux's madvise, from 5.4 on


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes; where Linux's /proc is missing, its peak so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_bytes() -> int:
    """Return the memory of this machine in bytes, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            total = min(total, int(Path(limit).read_text()))
    return total


def check_budget(budget: int | None, needed: int = 0) -> None:
    """Check that this process may hold `needed` bytes more.

    Raises
    ------
    MemoryBudgetError
        If the process would then hold more than `budget` bytes; None: there is no limit.
    """
    if budget is None:
        return
    if (held := resident_bytes()) + needed > budget:
        hold_less()  # memory left over from an earlier round does not count
        held = resident_bytes()
    if held + needed > budget:
        more = f", and needs {needed // MB} MB more" if needed else ""
        raise MemoryBudgetError(
            f"memory: expected at most {budget // MB} MB resident, got {held // MB} MB{more}. Set a larger "
            "memory-mb or a smaller micro-batch in the node config, or leave this node out."
        )


def hold_less() -> None:
    """Return freed memory to the system, now and, from now on, as soon as it is freed.

    glibc keeps freed tensors for later, and oneDNN keeps a compiled kernel for each length of a batch: 40 MB and
    more in training on sentences. This has no effect except on Linux with glibc.
    """
    os.environ.setdefault(ONEDNN_CACHE, "0")  # read when the first kernel is compiled
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def page_out(address: int, size: int) -> None:
    """Drop memory pages mapped from a file, as by safetensors; a later access reads them from the file again.

    For pages of another kind, or on a system other than Linux, this has no effect.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    begin, end = -(-address // page) * page, (address + size) // page * page
    with suppress(OSError, AttributeError):
        if sys.platform == "linux" and begin < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _PAGEOUT)


def weight_bytes(folder: str | Path) -> int:
    """Return the bytes of the weights in a folder or file, as transformers saves them; 0 if there are none.

    Loading takes at most that much memory: for MiniLM's 91 MB, page by page, all of it in float32, less in int8.
    """
    path = Path(folder)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sum(file.stat().st_size for file in files)
