"""`/metrics` in Prometheus' text format, made from the same status document that people see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class StatusCollector(Collector):
    """One scrape of one status document."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        yield CounterMetricFamily("keepstep_attempts", "Launches of all ranks, the first included.", value=status["attempt"])
        yield GaugeMetricFamily("keepstep_step", "Optimizer updates finished by the slowest rank.", value=status["step"])
        yield GaugeMetricFamily("keepstep_steps", "Optimizer updates of the whole run.", value=status["steps"])
        yield GaugeMetricFamily("keepstep_world_size", "Ranks of the current attempt.", value=status["world_size"])
        yield GaugeMetricFamily("keepstep_term", "Coordinators that have reigned.", value=status["coordinator"]["term"])
        yield GaugeMetricFamily("keepstep_last_commit_step", "Step of the newest committed checkpoint.", value=_commit(status)["step"])
        yield GaugeMetricFamily("keepstep_last_commit_age_seconds", "Since the newest commit.", value=_commit(status)["age_s"])
        degraded_s = status["degraded"]["since_s"] if status["degraded"] else 0.0
        yield GaugeMetricFamily("keepstep_degraded_seconds", "How long storage has been in the way; 0: all is well.", value=degraded_s)
        yield CounterMetricFamily("keepstep_lost_steps", "Steps that had to be computed again.", value=status["goodput"]["lost_steps"])
        yield GaugeMetricFamily(
            "keepstep_goodput_ratio", "Productive seconds / all seconds but those away.", value=status["goodput"]["ratio"]
        )
        yield self._seconds()
        yield self._recovery()
        yield self._phase()

    def _seconds(self) -> Metric:
        """A gauge: when a checkpoint proves damaged, what was productive becomes redone."""
        text = "Where the wall time of the run went, all coordinators together; sums to it."
        family = GaugeMetricFamily("keepstep_time_seconds", text, labels=["class"])
        for name, seconds in self._status["goodput"]["seconds"].items():
            family.add_metric([name], seconds)
        return family

    def _recovery(self) -> Metric:
        text = "The last recovery, from what ended an attempt to the first step of the next; empty before the first."
        family = GaugeMetricFamily("keepstep_last_recovery_seconds", text, labels=["span"])
        for span in (self._status["recovery"] or {"spans": ()})["spans"]:
            family.add_metric([span["name"]], span["seconds"])
        return family

    def _phase(self) -> Metric:
        family = GaugeMetricFamily("keepstep_phase", "1 for the phase that the run is in.", labels=["phase"])
        family.add_metric([self._status["phase"]], 1)
        return family


def _commit(status: Mapping[str, Any]) -> Mapping[str, Any]:
    return status["last_commit"] or {"step": -1, "age_s": -1.0}


def exposition(status: Mapping[str, Any]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    return generate_latest(registry)
