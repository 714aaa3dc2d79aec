"""How patient, how strict, how large: the numbers behind the machine's decisions, and the back-off as a value. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What run.toml says about failures and membership, with a default that a newcomer would choose."""

    steps: int
    """Optimizer steps of the whole run."""
    nodes: int = 1
    """Nodes of a full gang."""
    min_nodes: int = 1
    """Fewest nodes that may train, after `wait_for_nodes_s`."""
    spares: int = 0
    """Nodes wanted beyond the gang; only reported when they are missing."""
    ranks_per_node: int = 1
    """Ranks of a node that does not say how many slots it has."""
    hot_standby: bool = False
    """A second group of ranks, formed beside those that train, waits for the next attempt."""
    needs_final_commit: bool = True
    """The trainer keeps its promise to keepstep: success needs the commit of the last step. False for a user's own script."""

    lease_s: float = 5.0
    """An agent that neither got an answer nor read the log for so long has stopped its ranks."""
    fence_s: float = 1.0
    """Margin on top of a lease: for stopping the ranks, and for clocks that do not run alike."""
    outage_s: float = 4 * 3600.0
    """A coordinator that could not read the log for so long stops answering, and the ranks stop: storage is not coming back."""
    drop_grace_s: float = 0.5
    """A node whose connection broke may come back within this time."""
    wait_for_nodes_s: float = 60.0
    """How long to wait for a full gang before a smaller one is formed."""
    start_timeout_s: float = 300.0
    """From the launch to the first step of every rank."""
    stall_s: float = 300.0
    """A rank that makes no progress for so long hangs, unless its agent has learnt better; also the time that the final commit may take."""
    waits_when_preempted: bool = False
    """Too few nodes after a notice of preemption: wait for others instead of ending with "requeue me"."""
    commit_wait_s: float = 2.0
    """How long a drained attempt may still finish a save that some ranks have finished already."""
    stop_grace_s: float = 60.0
    """How long ranks that were asked to save and leave may take."""

    max_failures: int = 10
    """Failures in a row without a commit between them that are forgiven."""
    backoff_base_s: float = 1.0
    """Pause before the second restart in a row; the first is immediate."""
    backoff_max_s: float = 60.0
    """Longest pause between restarts."""
    rewinds: int = 3
    """Bad steps that the run may be rewound past."""
    stop_at_same_error: bool = True
    """The same error at the same step twice in a row ends the run: it would happen again."""
    strikes: int = 3
    """Failures that a host may cause before it is quarantined: no ranks on it while `min_nodes` others are fit."""
    strike_memory_s: float = 24 * 3600.0
    """A failure is held against its host for so long."""

    save_share: float = 0.0
    """Share of the time that saves may cost at most, where the run decides how often to save; 0: run.toml says how often."""

    retry_s: float = 0.5
    """Pause after the first refusal by the storage."""
    max_retry_s: float = 10.0
    """Longest pause, and how long an answer is waited for before the request is repeated."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_nodes <= self.nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} must be between 1 and nodes = {self.nodes}")
        if self.drop_grace_s > self.lease_s:
            raise ValueError(f"drop_grace_s = {self.drop_grace_s} must not exceed lease_s = {self.lease_s}")


def restart_pause_s(policy: Policy, failures: int) -> float:
    """Pause before the restart after the `failures`-th failure in a row: 0, base, 2 base, 4 base, ... up to the maximum."""
    return 0.0 if failures <= 1 else _exponential(policy.backoff_base_s, policy.backoff_max_s, failures - 2)


def retry_pause_s(policy: Policy, refusals: int) -> float:
    """Pause before a request is repeated after the `refusals`-th refusal in a row."""
    return _exponential(policy.retry_s, policy.max_retry_s, max(refusals - 1, 0))


def _exponential(base_s: float, max_s: float, doublings: int) -> float:
    return min(max_s, base_s * 2.0 ** min(doublings, 60))
