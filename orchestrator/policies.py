"""From run.toml to the machine's numbers. Pure."""

from __future__ import annotations

from .policy import Policy
from .sections import RunConfig


def policy_of(config: RunConfig) -> Policy:
    cluster = config.cluster
    return Policy(
        steps=config.run.steps,
        nodes=cluster.nodes,
        min_nodes=cluster.min_nodes or cluster.nodes,
        spares=cluster.spares,
        ranks_per_node=cluster.ranks_per_node or 1,
        hot_standby=cluster.hot_standby,
        needs_final_commit=not config.train.script,
        lease_s=cluster.lease_s,
        outage_s=config.storage.outage_s,
        fence_s=cluster.fence_s,
        drop_grace_s=cluster.drop_grace_s,
        wait_for_nodes_s=cluster.wait_for_nodes_s,
        start_timeout_s=cluster.start_timeout_s,
        stall_s=cluster.stall_s,
        waits_when_preempted=cluster.when_preempted == "wait",
        stop_grace_s=cluster.stop_grace_s,
        max_failures=cluster.max_failures,
        rewinds=config.train.spike.budget,
        strikes=cluster.strikes,
        save_share=config.checkpoint.max_overhead if config.checkpoint.interval == "auto" and not config.train.script else 0.0,
        backoff_base_s=cluster.backoff_s,
        backoff_max_s=cluster.max_backoff_s,
    )
