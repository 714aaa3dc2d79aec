"""What decides the last bits beside the program: versions, instruction set, threads. Written down at the begin of every attempt."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

KIND = "surroundings"  # of its line in the steps file


def surroundings() -> dict[str, str]:
    """Of this process."""
    uses_cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if uses_cuda else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
