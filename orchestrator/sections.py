"""The whole of run.toml as types: the trainer's sections and the two that belong to the orchestrator. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.fields import FieldInfo

from keepstep.trainer.config import ReductionSection, Section, TrainerConfig


class ClusterSection(ReductionSection):
    """The nodes, and how patient keepstep is with them. Times are seconds."""

    model_config = ConfigDict(extra="forbid")

    nodes: int = Field(1, ge=1)
    """Nodes of a full gang."""
    min_nodes: int = Field(0, ge=0)
    """Train on as few nodes as this when the others stay away; 0: as many as `nodes`, never fewer."""
    spares: int = Field(0, ge=0)
    """Nodes that stand by, warm; one of them takes the place of a lost node at once."""
    ranks_per_node: int = Field(0, ge=0)
    """Ranks on every node; 0: one per GPU, or one where there is none."""
    hot_standby: bool = False
    """A second group of ranks, formed and built, waits on the same nodes for the next attempt, which then begins in a tenth of a second. It
    costs what the first holds all the time: on every node, and on every GPU, the memory of model, gradients and optimizer once more
    (activations only while it warms up). A script must call `standby()`, see trainer/attach.py."""
    lease_s: float = Field(5, gt=0)
    """A node that was silent for so long counts as lost; it stops its own ranks by then."""
    fence_s: float = Field(1, ge=0)
    """Margin on top of the lease before the ranks of a lost node are replaced: the time that stopping them may take."""
    drop_grace_s: float = Field(0.5, ge=0)
    """A node whose connection broke may come back within this time; a node that only fell silent has its whole lease."""
    proof_of_death: bool = True
    """A node's kernel tells the coordinator when its last process is gone, by a connection that they hold: no lease is waited for then.
    Switch it off where something between them ends connections and cannot be seen by the coordinator, such as a transparent proxy."""
    wait_for_nodes_s: float = Field(60, ge=0)
    """Wait so long for a full gang before going on with min_nodes or more."""
    max_failures: int = Field(10, ge=0)
    """Failures that are forgiven; committed progress refills the budget."""
    strikes: int = Field(3, ge=1)
    """Failures that a host may cause before it is quarantined: it gets no ranks while `min_nodes` others are there."""
    backoff_s: float = Field(1, ge=0)
    """Pause after the second failure without progress in between; doubles with each further one. The first restart never waits."""
    max_backoff_s: float = Field(60, ge=0)
    """The longest such pause."""
    hang_s: float = Field(4, gt=0)
    """A rank that is silent for so long, and for four times the 99th percentile of its phase's usual silences, hangs."""
    stall_s: float = Field(300, gt=0)
    """The same while too little is known about its phase: a rank that makes no progress for so long hangs."""
    start_timeout_s: float = Field(600, gt=0)
    """From the launch of an attempt to the first finished step on all ranks, the reading of the checkpoint included."""
    stop_grace_s: float = Field(30, gt=0)
    """Time for the last checkpoint when the run is stopped or a node must leave (unless the notice names another); then the ranks are
    killed."""
    notices: tuple[str, ...] = ()
    """Where an agent looks for the notice that its node will be taken away: "aws", "gcp", "azure" (metadata service), "file:PATH" (its text
    is the reason, a first line such as "in 90" the seconds that are left)."""
    when_preempted: Literal["exit", "wait"] = "exit"
    """When too few nodes are left after such a notice: end with exit code 75, to be queued again, or wait for other nodes."""
    listen: str = "127.0.0.1:0"
    """HOST:PORT where the coordinator serves agents, people and metrics; port 0: any free one."""


class StorageSection(Section):
    """How the storage root is reached. Credentials come from where the store's own tools look for them, never from here."""

    endpoint_url: str = ""
    """URL of an S3-compatible server; empty: the cloud's own."""
    region: str = ""
    """Region of the bucket; empty: as the environment says."""
    ca: str = ""
    """File with the certificates to trust, for a server with a private one."""
    timeout_s: float = Field(60, gt=0)
    """Deadline of one call to the store, its retries included."""
    connections: int = Field(16, ge=8, le=1024)
    """Requests to the store that one process may have under way; fewer while the store says that it is too much."""
    outage_s: float = Field(4 * 3600, gt=0)
    """Training goes on for so long while the run log cannot be read."""
    slow_s: float = Field(120, gt=0)
    """A checkpoint that has been on its way to the store for so long makes the run DEGRADED: something is wrong, training goes on."""


class RunConfig(TrainerConfig):
    """A whole run.toml, every key resolved."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cluster: ClusterSection = ClusterSection()
    storage: StorageSection = StorageSection()


def section_types() -> Mapping[str, type[Section]]:
    """Section name -> its class, in the order of run.toml: "train", then "train.spike" inside it."""
    return {name: kind for field, info in RunConfig.model_fields.items() for name, kind in _sections(field, type(info.default))}


def _sections(name: str, kind: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    """A section and those inside it."""
    yield name, kind
    for key, field in kind.model_fields.items():
        if isinstance(field.default, Section):
            yield from _sections(f"{name}.{key}", type(field.default))


def keys_of(section: str) -> Mapping[str, FieldInfo]:
    """The keys of a section, those of sections inside it excepted."""
    return {key: field for key, field in section_types()[section].model_fields.items() if not isinstance(field.default, Section)}


def known_keys() -> Mapping[str, FieldInfo]:
    """ "section.key" -> its field (type, default, docstring), in the order of run.toml."""
    return {f"{section}.{key}": field for section in section_types() for key, field in keys_of(section).items()}


def values(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Every ("section.key", value) of a config."""
    return ((key, value_of(config, key)) for key in known_keys())


def value_of(config: RunConfig, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
