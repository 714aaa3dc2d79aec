"""Reads a golden story: a policy line, then `> TIME EVENT ...` lines, each followed by what it led to.

    policy nodes=2 ranks_per_node=2 steps=100
    > 0.0 opened 1
    > 0.1 report node0#a,node1#b
    > 0.2 found nothing
    > 0.2 logged
    > 1.0 report node0#a,node1#b *:STEP@1
    > 2.0-9.0 tick alive=node0#a

A report repeats the node's last one, but for what is said. Its sequence grows, its term and revision are the newest unless said.
Ranks: `*:STEP@5` (all of the node, running), `3:SIGKILL@41`, `2:lost@41` (a peer), `1:damaged@20`, `0:stopped@41` (by its agent),
`*:bad3/96:98@2` (all refuse step 3, whose positions 96 to 97 were found bad by the rank of which this is one; `bad3/` cannot say which;
`bad3/96:98/1` names rank 1), `*:done@100` and `*:left@50` (exit code 0 in phase DONE or STOPPED), `1:exit7@3`,
`'1:ValueError: bad batch@3'`; `*:mute@0` (running, without any progress report); at the end `~75`: quiet for 75 s,
`^4`: 4 s are its limit, `!40`: it has begun 40 collectives (others 41).
`standby=forming@29600` (the first node tells the port of its store), `standby=ready`, `'standby=failed:rank 1 was killed'`, of the one that
is wanted; `standby=-` none any more.
`persisted=20` all ranks of the node, `persisted=20:0,1` some. `-` drops what the report said before: `persisted=-`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from keepstep.orchestrator import events as ev
from keepstep.orchestrator.machine import begin
from keepstep.orchestrator.policy import Policy
from keepstep.orchestrator.story import Story
from keepstep.orchestrator.wire import AgentReport, Persisted, RankReport, StandbyReport, StoreAddress
from keepstep.trainer.contract import Phase

RANGE_PERIOD_S = 0.5
PHASES = {phase.name: phase for phase in Phase}


def checkpoint(step: int, attempt: int = 1) -> ev.Checkpoint:
    return ev.Checkpoint(step=step, directory=directory(attempt, step), manifest_sha256=f"sha-{step}")


def directory(attempt: int, step: int) -> str:
    return f"data/a{attempt:06d}/s{step:09d}"


@dataclass
class Script:
    """A story being told; remembers what each node said last."""

    story: Story
    reports: dict[str, AgentReport] = field(default_factory=dict)
    seats: dict[str, tuple[int, int]] = field(default_factory=dict)  # node -> first rank, number of ranks
    checkpoints: dict[int, ev.Checkpoint] = field(default_factory=dict)

    @staticmethod
    def begin(policy_line: str) -> Script:
        words = dict(word.split("=", 1) for word in policy_line.split()[1:])
        values: dict[str, Any] = {name: _number(text) for name, text in words.items()}
        return Script(Story(begin(Policy(**({"steps": 100} | values)))))

    def play(self, line: str) -> Iterator[str]:
        """The lines that follow an event line."""
        when, kind, *words = shlex.split(line.removeprefix(">"))
        first, _, last = when.partition("-")
        at, until = float(first), float(last or first)
        while at <= until:
            told = list(self._play_once(at, kind, words))
            yield from [f"at {at:.1f}", *(f"  {each}" for each in told)] if last and told else told
            at += RANGE_PERIOD_S

    def _play_once(self, at: float, kind: str, words: list[str]) -> Iterator[str]:
        for event in self._events(at, kind, words):
            yield from self.story.step(event)[1]

    def _events(self, at: float, kind: str, words: list[str]) -> Iterator[ev.Event]:
        options = {name: value for name, found, value in (word.partition("=") for word in words) if found}
        match kind:
            case "opened":
                yield self._opened(at, words, options)
            case "tick":
                for node in filter(None, options.get("alive", "").split(",")):
                    yield ev.Reported(at, self._report(node, []))
                yield ev.Tick(at)
            case "report":
                for node in words[0].split(","):
                    yield ev.Reported(at, self._report(node, words[1:]))
            case "gone":
                yield ev.Disconnected(at, words[0])
            case "died":
                yield ev.Died(at, words[0])
            case "alone":
                request = next(ask.request for ask in self.story.run.asks if isinstance(ask.request, ev.FindAlone))
                ended = frozenset(word.removesuffix("=ended") for word in words if word.endswith("=ended"))
                yield ev.FoundAlone(at, request, frozenset(word for word in words if word != "nobody") | ended, ended)
            case "found":
                found = None if words[0] == "nothing" else self._checkpoint(int(words[0]))
                yield ev.Found(at, found, rolled_forward="forward" in words)
            case "logged":
                yield from self._logged(at, words)
            case "lost":
                request = next(ask.request for ask in self.story.run.asks if isinstance(ask.request, ev.LogRewind))
                yield ev.RewindVoid(at, request, " ".join(words))
            case "rewind":
                yield self._rewind_asked(at, int(words[0]), words[1:])
            case "policy":
                yield ev.Reconfigured(at, replace(self.story.run.policy, **{name: _number(text) for name, text in options.items()}))
            case "refused":
                request = next(ask.request for ask in self.story.run.asks if type(ask.request).__name__ == words[0])
                yield ev.LogFailed(at, request, " ".join(words[1:]))
            case "read":
                yield ev.LogRead(at, at)
            case "committed":
                yield self._committed(at, int(words[0]), int(options.get("attempt", self.story.run.attempt)))
            case "uncommitted":
                yield self._commit_failed(at, int(words[0]), damaged="damaged" in words)
            case "scrubbed":
                yield ev.Damaged(at, self._checkpoint(int(words[0])).directory, " ".join(words[1:]))
            case "void":
                yield ev.AttemptVoid(at, int(words[0]), " ".join(words[1:]))
            case "fenced":
                yield ev.Fenced(at, int(words[0]), "another host")
            case "stop":
                yield ev.StopAsked(at, " ".join(words))
            case "save":
                yield ev.SaveAsked(at)
            case "drain":
                yield ev.DrainAsked(at, words[0], " ".join(words[1:]))
            case "readmit":
                yield ev.ReadmitAsked(at, words[0])
            case "resize":
                yield ev.ResizeAsked(at, int(words[0]))
            case _:
                raise ValueError(f"{kind}: no such event")

    def _checkpoint(self, step: int) -> ev.Checkpoint:
        return self.checkpoints.setdefault(step, checkpoint(step))

    def _opened(self, at: float, words: list[str], options: dict[str, str]) -> ev.Opened:
        resume, commit = options.get("resume"), options.get("commit")
        return ev.Opened(
            at=at,
            term=int(words[0]),
            last_attempt=int(options.get("last", 0)),
            last_gang=tuple(filter(None, options.get("gang", "").split(","))),
            last_world_size=int(options.get("world", 0)),
            last_nonce="nonce" if "last" in options else "",
            last_resume=self._checkpoint(int(resume)) if resume else None,
            last_standing=options.get("standing", ""),
            last_unconfirmed=tuple(filter(None, options.get("unconfirmed", "").split(","))),
            newest_commit=self._checkpoint(int(commit)) if commit else None,
            ever_committed="ever" in words,
            ended="ended" in words,
            rewound="rewound" in words,
            skips=tuple(filter(None, options.get("skips", "").split(","))),
            overrides=tuple(filter(None, options.get("overrides", "").split(","))),
            rewinds=int(options.get("rewinds", 0)),
        )

    def _rewind_asked(self, at: float, to: int, words: list[str]) -> ev.RewindAsked:
        overrides = tuple(word for word in words if "=" in word)
        skips = tuple(word for word in words if "=" not in word)
        return ev.RewindAsked(at=at, to=to, skips=skips, overrides=overrides, why=f"a person asked to go back to step {to}")

    def _logged(self, at: float, words: list[str]) -> Iterator[ev.Event]:
        """A rewind needs the step of its checkpoint, or "scratch"."""
        for ask in self.story.run.asks:
            match ask.request:
                case ev.LogAttempt() as wanted:
                    record = ev.AttemptRecord(
                        attempt=wanted.attempt,
                        gang=wanted.gang,
                        world_size=wanted.world_size,
                        nonce=f"nonce-{wanted.attempt}",
                        resume=wanted.resume,
                        unconfirmed=wanted.unconfirmed,
                        standing=wanted.standing,
                        skips=wanted.skips,
                        overrides=wanted.overrides,
                    )
                    yield ev.Logged(at, record)
                case ev.LogRewind() as wanted:
                    resume = None if words[0] == "scratch" else self._checkpoint(int(words[0]))
                    found = {name: getattr(wanted, name) for name in ("skips", "overrides", "bad_step", "why")}
                    yield ev.Logged(at, ev.RewindRecord(resume=resume, **found))
                case ev.LogQuarantine(directory=key):
                    yield ev.Logged(at, ev.QuarantineRecord(key))
                case ev.LogEnd() as end:
                    yield ev.Logged(at, ev.EndRecord(outcome=end.outcome, step=end.step, why=end.why, requeue=end.requeue))

    def _committed(self, at: float, step: int, attempt: int) -> ev.Committed:
        found = self.checkpoints[step] = checkpoint(step, attempt)
        return ev.Committed(at=at, attempt=attempt, step=step, directory=found.directory, manifest_sha256=found.manifest_sha256)

    def _commit_failed(self, at: float, step: int, *, damaged: bool) -> ev.CommitFailed:
        attempt = self.story.run.attempt
        why = "rank-00001.json is not what rank 1 reported" if damaged else "503 slow down"
        return ev.CommitFailed(at=at, attempt=attempt, step=step, directory=directory(attempt, step), why=why, damaged=damaged)

    # --- reports ----------------------------------------------------------------------------------------------------

    def _report(self, node: str, words: list[str]) -> AgentReport:
        run = self.story.run
        known = self.reports.get(node) or _first_report(node)
        launch = directive_launch(self.story, node)
        if launch is not None:
            self.seats[node] = (launch.first_rank, launch.num_ranks)
        state: dict[str, Any] = dict(known) | {"sequence": known.sequence + 1, "term": run.term, "obeyed": run.revision}
        for word in words:
            state |= self._said(node, word, state, launch.attempt if launch else state["attempt"])
        self.reports[node] = AgentReport(**state)
        return self.reports[node]

    def _said(self, node: str, word: str, state: dict[str, Any], attempt: int) -> dict[str, Any]:
        if re.match(r"[*\d]\S*:", word):
            return {"attempt": attempt, "ranks": self._ranks(node, word, state["ranks"] if state["attempt"] == attempt else ())}
        name, _, value = word.partition("=")
        match name:
            case "unready" | "ready":
                return {"ready": name == "ready"}
            case "seq" | "sequence":
                return {"sequence": int(value)}
            case "attempt" | "term" | "obeyed" | "slots":
                return {name: int(value)}
            case "leaving" | "problem" | "storage":
                return {name: value}
            case "leaves_in_s" | "save_s":
                return {name: float(value)}
            case "buried":
                return {"buried": tuple(value.split(","))}
            case "store":
                return {"store": StoreAddress(attempt=attempt, host=state["address"], port=int(value))}
            case "standby":
                return {"standby": self._standby(state, value)}
            case "persisted":
                return {"persisted": self._persisted(node, value, attempt, state["persisted"])}
            case _:
                raise ValueError(f"{word}: no report says that")

    def _ranks(self, node: str, word: str, known: tuple[RankReport, ...]) -> tuple[RankReport, ...]:
        which, _, state = word.partition(":")
        first, count = self.seats.get(node) or self.seats.setdefault(node, _span(which))
        ranks = {rank.rank: rank for rank in known}
        for rank in range(first, first + count) if which == "*" else _range(which):
            ranks[rank] = _rank(rank, rank - first, state, sum(each.state == "exited" for each in ranks.values()))
        return tuple(ranks[rank] for rank in sorted(ranks))

    def _standby(self, state: dict[str, Any], value: str) -> StandbyReport | None:
        standby, known = self.story.run.standby, state["standby"]
        number = standby.group.number if standby else (known.number if known else 0)
        said, _, port = value.partition("@")
        said, _, why = said.partition(":")
        store = StoreAddress(attempt=0, host=state["address"], port=int(port)) if port else (known.store if known else None)
        if said == "-":
            return None
        return StandbyReport(term=self.story.run.term, number=number, state=said, why=why, store=store)  # type: ignore[arg-type]

    def _persisted(self, node: str, value: str, attempt: int, known: tuple[Persisted, ...]) -> tuple[Persisted, ...]:
        if value == "-":
            return ()
        step, _, which = value.partition(":")
        first, count = self.seats[node]
        ranks = map(int, which.split(",")) if which else range(first, first + count)
        return known + tuple(
            Persisted(
                attempt=attempt,
                step=int(step),
                rank=rank,
                directory=directory(attempt, int(step)),
                index_sha256=f"index-{step}-{rank}",
                num_bytes=1,
            )
            for rank in ranks
        )


def _range(text: str) -> range:
    """ "0-1" or "3"."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _span(text: str) -> tuple[int, int]:
    ranks = _range(text)
    return ranks[0], len(ranks)


def directive_launch(story: Story, node: str) -> Any:
    from keepstep.orchestrator.machine import directive

    return directive(story.run, node).launch


def _first_report(node: str) -> AgentReport:
    host = node.partition("#")[0]
    return AgentReport(node=node, host=host, pid=1, address=host, slots=0, sequence=0, term=0, ready=True)


def _rank(rank: int, local_rank: int, text: str, order: int) -> RankReport:
    text, _, collective = text.partition("!")
    text, _, limit = text.partition("^")
    text, _, quiet = text.partition("~")
    state, _, step = text.rpartition("@")
    common: dict[str, Any] = {"rank": rank, "local_rank": local_rank, "pid": 100 + rank, "step": int(step)}
    if state == "mute":
        return RankReport(**common, state="running")
    if state in PHASES:
        pace = {"beats": int(step) + 1, "quiet_s": float(quiet or 0), "limit_s": float(limit or 0), "collective": int(collective or 41)}
        return RankReport(**common, state="running", phase=PHASES[state], stands_by=True, **pace)
    return RankReport(**common, state="exited", exit_order=order, **_exit(state))


def _exit(state: str) -> dict[str, Any]:
    if state in ("done", "left"):
        return {"exit_code": 0, "phase": Phase.DONE if state == "done" else Phase.STOPPED}
    if state == "stopped":
        return {"exit_code": -9, "stopped_by_agent": True, "kind": "signal", "why": "SIGKILL", "phase": Phase.STEP}
    if state == "lost":
        return {"exit_code": 1, "kind": "peer-lost", "why": "RuntimeError: connection closed by peer", "phase": Phase.STEP}
    if state == "damaged":
        return {"exit_code": 1, "kind": "damaged-checkpoint", "why": "block 3 of __0_0.distcp", "damaged": "x", "phase": Phase.LOAD}
    if state.startswith("SIG"):
        return {"exit_code": -9, "kind": "signal", "why": state, "phase": Phase.STEP}
    if found := re.fullmatch(r"exit(\d+)", state):
        return {"exit_code": int(found[1]), "kind": "exit", "why": f"exit code {found[1]}", "phase": Phase.STEP}
    if found := re.fullmatch(r"bad(\d+)/([\d:,]*)/?(\d*)", state):
        named = {
            "bad_step": int(found[1]),
            "skips": tuple(filter(None, found[2].split(","))),
            "bad_ranks": tuple(map(int, found[3] or "0")),
        }
        why = f"BadStep: step {found[1]}: the loss of rank {found[3] or 0} is nan"
        return {"exit_code": 1, "kind": "bad-step", "why": why, "phase": Phase.STEP, **named}
    return {"exit_code": 1, "kind": "exception", "why": state, "phase": Phase.STEP}


def _number(text: str) -> float | int | bool:
    if text in ("True", "False"):
        return text == "True"
    return float(text) if "." in text else int(text)
