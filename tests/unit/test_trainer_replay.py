"""Any step that was ever recorded is computed again from the checkpoints that are left, and comes out to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from trainer_ranks import TINY, commit, run_ranks, train_ranks

from keepstep.orchestrator import config as configs
from keepstep.orchestrator import replaycommand
from keepstep.orchestrator.errors import InputError
from keepstep.orchestrator.replaycommand import Asked
from keepstep.orchestrator.replaying import TOLERANCES, Archive, Outcome, Way, replay_steps, travel
from keepstep.storage.records import Attempt, Commit, Retire, Rewind
from keepstep.storage.runlog import RunLog
from keepstep.storage.store import Store
from keepstep.trainer import replaying
from keepstep.trainer.config import ModelSection, TrainerConfig
from keepstep.trainer.contract import Resume
from keepstep.trainer.data import feed_for
from keepstep.trainer.models import Gpt, build_model
from keepstep.trainer.optim import clip_scale
from keepstep.trainer.replay import Job, Stretch, replay
from keepstep.trainer.samples import samples_of
from keepstep.trainer.schedule import learning_rate
from keepstep.trainer.tokens import open_tokens

pytestmark = pytest.mark.slow
STEPS = 10
SKIPS = ("60:63",)  # of step 8
ON_ONE = Way(on_one_process=True)


@dataclass(frozen=True)
class Past:
    """Attempt 1, two ranks: died after step 5, step 3 was committed. Attempt 2, two ranks: died after step 7, step 6 was committed.
    Attempt 3, three ranks, went on from step 6 without some samples, to the end; steps 9 and 10 were committed."""

    root: Path
    config: dict[str, Any]

    def copy(self, place: Path) -> Past:
        shutil.copytree(self.root, place)
        return Past(place, self.config)

    def retire(self, *steps: int) -> None:
        log = RunLog.open(Store.open(self.root))
        log.append(Retire(term=1, directories=tuple(c.directory for c in log.lineage.commits if c.step in steps)))

    def directory(self, step: int) -> Path:
        return self.root / next(c.directory for c in RunLog.open(Store.open(self.root)).lineage.commits if c.step == step)

    def outcome(self, step: int, way: Way | None = None, attempt: int | None = None) -> Outcome:
        archive = Archive(str(self.root))
        return travel(archive, archive.attempt(step, attempt), step, way or Way())


def text_in(folder: Path) -> Path:
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"Chapter {i}. " + "It was a bright cold day in April, and the clocks were striking. " * 30)
    return folder


def write_config(root: Path, config: Mapping[str, Mapping[str, Any]]) -> None:
    (root / "run.toml").write_text(configs.to_toml(configs.parse(tomli_w.dumps(config), "run.toml")))


def committed(log: RunLog, root: Path, attempt: int, step: int, world_size: int) -> Resume:
    (folder,) = root.glob(f"data/a{attempt:06d}/s{step:09d}-*")
    made = commit(root, str(folder.relative_to(root)))
    log.append(
        Commit(term=1, attempt=attempt, step=step, directory=made.directory, manifest_sha256=made.manifest_sha256, world_size=world_size)
    )
    return made


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    folder = tmp_path_factory.mktemp("past")
    root = folder / "root"
    root.mkdir()
    config = TINY | {
        "data": TINY["data"] | {"source": str(text_in(folder / "text"))},
        "checkpoint": {"interval": 3},
        "run": {"seed": 3, "steps": STEPS, "root": str(root)},
    }
    log = RunLog.open(Store.open(root))
    log.open_term(run="test", identity="x", host="here", pid=1)

    def begin(attempt: int, world_size: int, resume: Resume | None, stop_at: int = 0, skips: tuple[str, ...] = ()) -> None:
        source = {"resume_step": resume.step, "resume_directory": resume.directory} if resume else {}
        log.append(Attempt(term=1, attempt=attempt, nodes=("n#1",), world_size=world_size, nonce=f"nonce{attempt}", skips=skips, **source))
        train_ranks(root, config, world_size=world_size, attempt=attempt, resume=resume, stop_at=stop_at, skips=skips)

    begin(1, 2, None, stop_at=5)
    begin(2, 2, committed(log, root, 1, 3, 2), stop_at=7)
    resume = committed(log, root, 2, 6, 2)
    log.append(Rewind(term=1, directory=resume.directory, step=6, skips=SKIPS, overrides=(), why="a test"))
    begin(3, 3, resume, skips=SKIPS)
    for step in (9, STEPS):
        committed(log, root, 3, step, 3)
    write_config(root, config | {"cluster": {"nodes": 1, "ranks_per_node": 2}})
    return Past(root, config)


def files_of(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def compared(outcomes: list[Outcome]) -> set[int]:
    return {step for outcome in outcomes for step in outcome.replayed.records.keys() & outcome.recorded.keys()}


def test_every_step_of_a_run_with_failures_comes_out_to_the_bit_and_nothing_is_written(past: Past) -> None:
    before = files_of(past.root)
    outcomes = replay_steps(str(past.root), range(1, STEPS + 1))
    assert [outcome.comparison.differences for outcome in outcomes] == [()] * 4, "from scratch, 3, 6 and 9"
    assert [outcome.route.base.step if outcome.route.base else 0 for outcome in outcomes] == [0, 3, 6, 9]
    assert compared(outcomes) == set(range(1, STEPS + 1))
    assert files_of(past.root) == before
    spans = [record["samples"] for outcome in outcomes for record in outcome.replayed.records.values()]
    assert [56, 67] in spans, "attempt 3 skips"


def test_without_any_checkpoint_it_is_computed_from_scratch_through_every_change_of_the_world(past: Past, tmp_path: Path) -> None:
    bare = past.copy(tmp_path / "root")
    bare.retire(3, 6, 9)
    outcome = bare.outcome(9)
    assert outcome.route.base is None
    assert [(leg.attempt, leg.world_size, leg.after, leg.last) for leg in outcome.route.legs] == [(1, 2, 0, 3), (2, 2, 3, 6), (3, 3, 6, 9)]
    assert len(outcome.route.stretches()) == 2
    assert outcome.comparison.differences == ()
    assert outcome.comparison.num_compared == 9
    on_one = bare.outcome(9, ON_ONE)
    assert (on_one.comparison.tolerance, on_one.comparison.num_compared) == (TOLERANCES["fp32"], 9)
    assert on_one.comparison.widest < 1e-6


def test_one_process_goes_on_with_one_rank_as_a_smaller_world_did(past: Past) -> None:
    """Its own process did both ranks' work before, so what it leaves behind are no streams of the one rank's."""
    config = TrainerConfig.model_validate(past.config)
    stretches = [
        Stretch(config=config, attempt=1, world_size=2, after=0, last=2, threads=1),
        Stretch(config=config, attempt=2, world_size=1, after=2, last=4, threads=1),
    ]
    ranks, one = (replay(stretches, None, on_one_process=on_one_process) for on_one_process in (False, True))
    assert [one.records[step]["loss_hex"] for step in range(1, 5)] == [ranks.records[step]["loss_hex"] for step in range(1, 5)]


@pytest.mark.parametrize("step", [2, 5, 10])
def test_one_process_does_the_work_of_all_ranks(past: Past, step: int) -> None:
    """Two ranks' gradients have one order only, so there the bits are those of the run."""
    outcome = past.outcome(step, ON_ONE)
    assert outcome.on_one_process
    assert outcome.comparison.holds
    assert outcome.comparison.widest < (1e-6 if step == 10 else 1e-300)


def test_lost_work_is_computed_again_as_its_attempt_did(past: Past) -> None:
    assert Archive(str(past.root)).attempt(5, None) == 2
    lost = past.outcome(5, attempt=1)
    assert (lost.attempt, lost.route.base.step if lost.route.base else 0) == (1, 3)
    assert lost.comparison.differences == ()
    assert lost.comparison.num_compared == 2


def test_a_committed_step_whose_record_was_lost_is_computed_and_not_compared(past: Past, tmp_path: Path) -> None:
    torn = past.copy(tmp_path / "root")
    steps = torn.root / "steps" / "attempt-000002.jsonl"
    steps.write_text("".join(line for line in steps.read_text().splitlines(keepends=True) if '"step":5' not in line))
    outcome = torn.outcome(5)
    assert sorted(outcome.replayed.records) == [4, 5]
    assert (outcome.comparison.num_compared, outcome.comparison.differences) == (1, ())
    uncommitted = torn.root / "steps" / "attempt-000003.jsonl"
    uncommitted.unlink()
    torn.retire(9, STEPS)
    assert Archive(str(torn.root)).attempt(9, None) == 3, "the log says that it was committed"


def test_a_damaged_checkpoint_is_passed_over_and_named(past: Past, tmp_path: Path) -> None:
    damaged = past.copy(tmp_path / "root")
    shard = damaged.directory(6) / "__1_0.distcp"
    body = bytearray(shard.read_bytes())
    body[len(body) // 2] ^= 1
    shard.write_bytes(body)
    outcome = damaged.outcome(7)
    assert outcome.route.base
    assert outcome.route.base.step == 3
    assert outcome.comparison.differences == ()
    (note,) = outcome.notes
    assert "__1_0.distcp" in note
    assert "before it was taken" in note


def forgetful(job: Job, rank: int, telling: Connection, environment: Mapping[str, str]) -> None:
    """A process that does not put its random streams back."""
    from keepstep.trainer import rng

    rng.STREAMS = {name: replace(stream, restore=lambda saved: None) for name, stream in rng.STREAMS.items()}  # type: ignore[misc]
    replaying.replay_rank(job, rank, telling, environment)


def test_forgetting_the_random_streams_is_noticed_at_the_first_step(
    past: Past, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("keepstep.trainer.replaying.replay_rank", forgetful)
    for processes in (0, 1):
        assert replaycommand.replay(Asked(root=str(past.root), step=5, processes=processes, as_json=True)) == 3
        report = json.loads(capsys.readouterr().out)
        assert not report["holds"]
        first = report["first_difference"]
        assert first["step"] == 4
        assert first["ulps"] > 1000
        assert float.fromhex(first["recorded"]) != float.fromhex(first["computed"])
        assert any("a part of the state was not restored" in cause for cause in first["causes"])


# --- what is shown and dumped, against the same computed by hand ------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """Step 1 of a run without dropout, in one process with plain torch."""

    rows: torch.Tensor
    model: Gpt
    gradients: dict[str, torch.Tensor]
    losses: torch.Tensor
    outputs: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def by_hand(config: TrainerConfig, before: Mapping[str, torch.Tensor], root: Path, scratch: Path) -> ByHand:
    tokens = open_tokens(Store.open(root), scratch)
    samples = samples_of(tokens, config)
    rows = torch.from_numpy(samples.ids(feed_for(samples.sizes, config).samples(0, 8)))
    model = build_model(ModelSection(**dict(config.model)), tokens.index.vocabulary)
    model.load_state_dict(dict(before))
    outputs = dict[str, torch.Tensor]()

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({name: output.detach()})

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name or "logits"))
    logits, targets = model(rows[:, :-1].clamp(min=0)), rows[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(8, -1)  # 0 for padding
    losses = nll.sum(1) / (targets >= 0).sum(1)
    (nll.sum() / (targets >= 0).sum()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients.values()])).item()
    lr, decay = learning_rate(config.optimizer, 1, config.run.steps), config.optimizer.weight_decay
    after = {}
    for name, parameter in model.named_parameters():
        clipped = gradients[name] * clip_scale(norm, config.optimizer.clip_norm)
        kept = parameter.detach() * (1 - lr * decay * (parameter.ndim > 1))
        after[name] = kept - lr * clipped / (clipped.abs() + config.optimizer.eps)  # both moments are corrected for their first step
    return ByHand(rows, model, gradients, losses.detach(), outputs, after)


@pytest.fixture(scope="module", params=["stream", "documents"])
def plain(request: pytest.FixtureRequest, past: Past, tmp_path_factory: pytest.TempPathFactory) -> Past:
    """Two ranks, no dropout, two steps, nothing committed. With "documents" a batch holds padding, which does not count."""
    folder = tmp_path_factory.mktemp("plain")
    root = folder / "root"
    root.mkdir()
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i:02d}.txt").write_text(f"{i}: " + "the clocks were striking " * (i % 3 + 1))
    config = past.config | {
        "data": TINY["data"] | {"source": str(folder / "text"), "pack": request.param},
        "model": TINY["model"] | {"dropout": 0.0},
        "run": {"seed": 4, "steps": 2, "root": str(root)},
    }
    log = RunLog.open(Store.open(root))
    log.open_term(run="test", identity="x", host="here", pid=1)
    log.append(Attempt(term=1, attempt=1, nodes=("n#1",), world_size=2, nonce="nonce1"))
    train_ranks(root, config, world_size=2)
    write_config(root, config)
    return Past(root, config)


@pytest.mark.parametrize("processes", [0, 1])
def test_a_dump_holds_what_a_computation_by_hand_gives(
    plain: Past, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    out = tmp_path / "out"
    asked = Asked(root=str(plain.root), step=1, processes=processes, dump="gradients,activations,parameters", out=str(out), as_json=True)
    assert replaycommand.replay(asked) == 0
    report = json.loads(capsys.readouterr().out)
    index = json.loads((out / "index.json").read_text())
    assert index == report
    assert {path.name for path in out.iterdir()} == {"index.json", *index["dump"]["files"]}

    before, after, gradients = (load_file(out / f"{name}.safetensors") for name in ("parameters-before", "parameters-after", "gradients"))
    hand = by_hand(TrainerConfig.model_validate(plain.config), before, plain.root, tmp_path)
    assert bool((hand.rows < 0).any()) == (plain.config["data"]["pack"] == "documents")
    torch.testing.assert_close(gradients, hand.gradients, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(after, hand.after, rtol=1e-4, atol=2e-5)
    outputs = [load_file(out / f"activations-rank-0000{rank}.safetensors") for rank in (0, 1)]
    for name, output in hand.outputs.items():
        got = outputs[0][name] if name == "positions" else torch.cat([of_rank[name] for of_rank in outputs])
        torch.testing.assert_close(got, output, rtol=1e-4, atol=1e-5)
    assert set(outputs[0]) == set(hand.outputs)

    assert {sample["position"]: sample["loss"] for sample in report["samples"]} == pytest.approx(
        dict(enumerate(hand.losses.tolist())), rel=1e-5
    )
    worst = int(hand.losses.argmax())
    assert report["worst"][0]["position"] == worst
    assert report["worst"][0]["text"] == bytes(token for token in hand.rows[worst].tolist() if 0 <= token < 256).decode()
    up = report["parameters"]["blocks.0.mlp.up.weight"]
    assert up["norm"] == pytest.approx(float(before["blocks.0.mlp.up.weight"].norm()), rel=1e-5)
    gelu = report["activations"]["blocks.1.mlp"]
    assert gelu["max"] == pytest.approx(float(hand.outputs["blocks.1.mlp"].max()), rel=1e-4)
    assert gelu["mean"] == pytest.approx(float(hand.outputs["blocks.1.mlp"].mean()), rel=1e-2)

    with pytest.raises(InputError, match="nothing is overwritten"):
        replaycommand.replay(asked)


def test_people_see_the_samples_of_one_rank_and_no_escape_sequences(
    past: Past, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # which test runners set, and which would narrow the tables
    assert replaycommand.replay(Asked(root=str(past.root), step=5, rank=1)) == 0
    shown = capsys.readouterr().out
    assert "checked: bits of the loss, equal in all 2 steps" in shown
    assert "the worst of 4 samples of rank 1" in shown
    assert all(word in shown for word in ("blocks.1.mlp.up.weight", "logits", "nats per token: position 3"))
    assert replaycommand.printable("a\x1b[31mb\n\u202e") == "a\\x1b[31mb\\n\\u202e"


WRONG = {
    "step 11 is not recorded; the history reaches from step 1 to 10": {"step": 11},
    "there was no attempt 4; there were: 1, 2, 3": {"step": 5, "attempt": 4},
    "attempt 1 recorded no step 6, it recorded 1 to 5": {"step": 6, "attempt": 1},
    "--rank 2: step 5 was computed by ranks 0 to 1": {"step": 5, "rank": 2},
    "--dump gradient: not known; give one or more of gradients,activations,parameters": {"step": 5, "dump": "gradient"},
    "--processes 2: step 9 was computed by 3 ranks; give 1, or leave it out": {"step": 9, "processes": 2},
}


@pytest.mark.parametrize(("sentence", "asked"), WRONG.items(), ids=range(len(WRONG)))
def test_what_cannot_be_is_said_in_one_sentence(past: Past, sentence: str, asked: dict[str, Any]) -> None:
    with pytest.raises(InputError) as raised:
        replaycommand.replay(Asked(root=str(past.root), **asked))
    assert sentence in str(raised.value)


def test_no_run_no_tokens_and_a_script_are_refused(past: Past, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run lives there"):
        Archive(str(tmp_path))
    bare = past.copy(tmp_path / "root")
    shutil.rmtree(bare.root / "tokens")
    with pytest.raises(InputError, match="its tokens are gone"):
        Archive(str(bare.root))
    write_config(bare.root, bare.config | {"train": {"script": "mine.py"}})
    with pytest.raises(InputError, match="only keepstep's own trainer can be replayed"):
        Archive(str(bare.root))


# --- other ways to compute --------------------------------------------------------------------------------------------


def begun(root: Path, config: Mapping[str, Any], world_size: int) -> None:
    """A root with an attempt 1 that has not begun to train."""
    root.mkdir(exist_ok=True)
    log = RunLog.open(Store.open(root))
    log.open_term(run="test", identity="x", host="here", pid=1)
    log.append(Attempt(term=1, attempt=1, nodes=("n#1",), world_size=world_size, nonce="nonce1"))
    write_config(root, config)


def test_with_exact_reduction_one_process_has_the_bits_of_three(past: Past, tmp_path: Path) -> None:
    root = tmp_path / "root"
    exact = {"cluster": {"exact_reduction": True, "logical_ranks": 4}, "run": {"seed": 5, "steps": 4, "root": str(root)}}
    begun(root, past.config | exact, 3)
    train_ranks(root, past.config | exact, world_size=3)
    for on_one_process in (False, True):
        (outcome,) = replay_steps(str(root), [4], on_one_process=on_one_process)
        assert (outcome.comparison.tolerance, outcome.comparison.num_compared, outcome.comparison.differences) == (0, 4, ())


def refuses(rank: int, world_size: int, root: str, config: dict[str, Any]) -> None:
    import trainer_ranks

    from keepstep.trainer.guard import BadStep

    with pytest.raises(BadStep):
        trainer_ranks._train(rank, world_size, root, config, 1, None, 0, "")


@pytest.mark.parametrize("processes", [0, 1])
def test_a_step_that_the_run_refused_is_looked_into_and_refused_again(
    past: Past, tmp_path: Path, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    root = tmp_path / "root"
    strict = {"train": TINY["train"] | {"spike": {"window": 8, "gradient_factor": 0.5}}, "run": {"seed": 5, "steps": 9, "root": str(root)}}
    begun(root, past.config | strict, 2)
    run_ranks(2, refuses, str(root), past.config | strict)
    assert replaycommand.replay(Asked(root=str(root), step=5, processes=processes, as_json=True)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rejected"].startswith("step 5: the gradient")
    assert report["rejected"] == report["rejected_then"]
    assert report["gradients"]["tokens.weight"]["norm"] > 0
    assert len(report["samples"]) == 8
    assert (report["steps_computed"], report["steps_compared"], report["updates"]) == (5, 4, {})
