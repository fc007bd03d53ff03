"""Memory of the host that stays with the process between steps."""

from __future__ import annotations

import ctypes
import platform

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3)."""


def keep_memory(device: torch.device) -> bool:
    """Let a process that trains on a CPU keep what it frees; returns whether it does now.

    glibc gives large pieces back to the system at once. A step frees and asks for the same hundreds
    of MB again, and each page of them is cleared by the system: 5 to 10 % of its time. What is kept
    is used again, so that the highest use is no higher.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # 1 is success; the threshold is an int
    return all((mallopt(M_MMAP_MAX, 0) == 1, mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1))
