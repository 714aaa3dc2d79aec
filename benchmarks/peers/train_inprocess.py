"""For NVRx's in-process restart: four ranks train, the others wait as spares. Started without a launcher, as its manual asks for.

The wrapper looks for its argument by annotation: annotations must be classes here, not text.
"""

import os
from datetime import timedelta

import sharded
import torch.distributed as dist
from nvidia_resiliency_ext import inprocess

ACTIVE = 4
# A gloo collective cannot be aborted: survivors leave it at its time-out alone. The manual's own example has 10 s; a step here lasts 0.1 s.
GLOO_TIMEOUT_S = 2.0
OFTEN = timedelta(milliseconds=100)
PORT = int(os.environ["MASTER_PORT"])


@inprocess.Wrapper(
    store_kwargs={"port": PORT + 1},
    rank_assignment=inprocess.Compose(inprocess.rank_assignment.MaxActiveWorldSize(ACTIVE), inprocess.rank_assignment.ShiftRanks()),
    monitor_thread_interval=OFTEN,
    monitor_process_interval=OFTEN,
    last_call_wait=OFTEN,
    heartbeat_interval=OFTEN,
    progress_watchdog_interval=OFTEN,
)
def main(call_wrapper: inprocess.CallWrapper = None) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], PORT + 2 + call_wrapper.iteration, size, rank == 0, multi_tenant=True)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=GLOO_TIMEOUT_S))
    sharded.train(life=call_wrapper.iteration, each_step=call_wrapper.ping)


main()
