"""What the forkserver imports before any rank exists, so that a rank goes from fork to its first step without importing anything.

Importing this module imports all of it. The list holds what a first step, a save and a restore import beyond the packages' own imports;
`tests/unit/test_trainer_preload.py` finds what is missing by comparing `sys.modules`. Nothing here may start a thread or touch CUDA: a
fork keeps neither.
"""

from __future__ import annotations

import importlib
from typing import Final

PRELOAD: Final = (
    "keepstep.trainer.__main__",
    "keepstep.trainer.loop",
    "keepstep.storage.arena",
    "keepstep.storage.posix",
    "torch._dynamo",  # 0.9 s, inside the first fully_shard
    "torch.utils.data",
    "torch.utils.serialization",
    "torch.profiler._cupti_monitor",
    "numpy.ma",
    "numpy.random",
    "configparser",
)

for _name in PRELOAD:
    importlib.import_module(_name)
