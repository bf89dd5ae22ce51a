"""How this process keeps its memory."""

from __future__ import annotations

import ctypes
import sys


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free instead of returning every page to the kernel and faulting it in again.

    Large activations are otherwise mapped afresh for each operator: Restormer's forward on a 480×320 photo took 2.5
    times as long. Other C libraries have no mallopt and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_mmap_max, 0)
