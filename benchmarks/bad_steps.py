"""What it costs to look out for bad steps: in every healthy step, and once, when one is examined.

    python benchmarks/bad_steps.py                  results/bad_steps.json and a table
    python benchmarks/bad_steps.py --steps 20       a look

One process trains the default model on the installed documentation. *Looking out* is what `guard.find` and the window add to a step, the
mean of many calls. An *autopsy* is timed behind a computed step, in the place where a bad one would have it, in steps: about the loss (a
forward pass), and about the gradient (forward and backward, and once more sample by sample, since here none is to blame).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Verdict, machine, parser, publish

from keepstep.trainer import guard
from keepstep.trainer.agreement import Agreed, agree
from keepstep.trainer.attach import Attached
from keepstep.trainer.autopsy import examine
from keepstep.trainer.config import TrainerConfig
from keepstep.trainer.loop import advance
from keepstep.trainer.parallel import join
from keepstep.trainer.run import Run, open_run
from keepstep.trainer.spikes import NonFinite

CALLS = 20_000


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=80, help="training steps; more than half a window")
    options = made.parse_args()
    steps, began_on = 36 if options.quick else options.steps, machine()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ks-bench-") as root:
        config = TrainerConfig.model_validate({"run": {"root": root, "steps": steps + 1}, "data": {"max_bytes": 4_000_000}})
        me = Attached(None)
        run = open_run(config, me, join(me))
        figures = measure(run, steps)
    for name, value in figures.items():
        print(f"{name:32} {value:.6g}")
    result = f"{figures['looking_out_us']:.0f} us of a step of {1e3 * figures['step_s']:.0f} ms"
    verdict = Verdict(what="looking out for bad steps, a healthy step", target="(a figure)", result=result, met=None)
    publish("bad_steps", [verdict], {"figures": figures, "steps": steps}, began_on=began_on)


def measure(run: Run, steps: int) -> dict[str, float]:
    seconds = [timed(lambda step=step: advance(run, run.share[step])) for step in range(1, steps + 1)]  # type: ignore[misc]
    parts = run.share[run.step + 1]
    agreed = agree(run, run.step + 1, run.engine.backward(parts, step=run.step + 1), parts)
    step_s = statistics.median(seconds[steps // 2 :])
    return {
        "step_s": step_s,
        "looking_out_us": looking_out_s(run, agreed) * 1e6,
        "autopsy_of_a_loss_steps": timed(lambda: examine(run, run.step + 1, parts, NonFinite("loss", float("nan"), (0,)))) / step_s,
        "autopsy_of_a_gradient_steps": timed(lambda: examine(run, run.step + 1, parts, NonFinite("gradient", float("nan"), ()))) / step_s,
    }


def looking_out_s(run: Run, agreed: Agreed) -> float:
    """Of one step."""

    def look() -> None:
        for _ in range(CALLS):
            assert guard.find(run.window, agreed, run.config.train.spike) is None
            run.window.add(agreed.loss, agreed.grad_norm)

    return timed(look) / CALLS


def timed(work: Callable[[], Any]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
