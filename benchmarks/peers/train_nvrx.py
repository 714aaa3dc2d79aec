"""For NVRx's ft_launcher: the toy with one heartbeat per step to the rank's monitor."""

from __future__ import annotations

import nvidia_resiliency_ext.fault_tolerance as fault_tolerance
import sharded

sharded.join()
client = fault_tolerance.RankMonitorClient()
client.init_workload_monitoring()
sharded.train(each_step=client.send_heartbeat)
