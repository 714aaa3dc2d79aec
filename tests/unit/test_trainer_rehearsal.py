"""A rehearsal leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import os, random
import keepstep.trainer.preload
import numpy, torch, torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import init_device_mesh
from keepstep.trainer.rehearsal import rehearse

def streams():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

before, threads, environment = streams(), torch.get_num_threads(), dict(os.environ)
rehearse()
rehearse()
assert streams() == before
assert torch.get_num_threads() == threads
assert dict(os.environ) == environment
assert len(os.listdir("/proc/self/task")) == 1, "native threads"
assert not dist.is_initialized() and not c10d._world.pg_map and c10d._world.group_count == 0
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
assert mesh.get_group().size() == 1
"""


def test_a_rehearsal_leaves_no_group_no_thread_and_no_trace_in_random_streams() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], check=True, timeout=120, env={"OMP_NUM_THREADS": "1"})
