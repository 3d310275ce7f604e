"""The memory that a client's process holds: how much, how much there is, and how to hold no more than needed."""

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
    """Return the resident memory of this process; where Linux's /proc is missing, the most that it ever was."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_bytes() -> int:
    """Return the memory of this machine, or of this container if it may use less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # not there, or "max"
            total = min(total, int(Path(limit).read_text()))
    return total


def check_budget(budget: int | None, needed: int = 0) -> None:
    """Check that this process may hold `needed` bytes more.

    Raises
    ------
    MemoryBudgetError
        If that is more than its budget; None: there is no limit.
    """
    if budget is None:
        return
    if (held := resident_bytes()) + needed > budget:
        hold_less()  # what an earlier round left behind does not count
        held = resident_bytes()
    if held + needed > budget:
        more = f", and needs {needed // MB} MB more" if needed else ""
        raise MemoryBudgetError(
            f"memory: expected at most {budget // MB} MB resident, got {held // MB} MB{more}. Set a larger "
            "memory-mb or a smaller micro-batch in the node config, or leave this node out."
        )


def hold_less() -> None:
    """Give back what was freed, and let what is freed from now on go back at once.

    glibc keeps freed tensors for later, and oneDNN a compiled kernel for each length of a batch: 40 MB and more in
    training on sentences. Elsewhere than on Linux with glibc nothing happens.
    """
    os.environ.setdefault(ONEDNN_CACHE, "0")  # read when the first kernel is compiled
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_TRIM_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def page_out(address: int, size: int) -> None:
    """Let go of pages that were read from a file, as safetensors maps it; whoever needs them reads them again.

    Where they are of another kind, or the system is not Linux, nothing happens.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    begin, end = -(-address // page) * page, (address + size) // page * page
    with suppress(OSError, AttributeError):
        if sys.platform == "linux" and begin < end:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _PAGEOUT)


def weight_bytes(folder: str | Path) -> int:
    """Return the size of the weights in a folder, or in a file, as transformers saves them; 0 if there are none.

    What loading takes is at most that: of MiniLM's 91 MB, page by page, all in float32, and less in int8.
    """
    path = Path(folder)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.bin")]
    return sum(file.stat().st_size for file in files)
