"""`python -m keepstep.trainer`: one rank. Under keepstep everything comes from the environment; under plain torchrun:

    torchrun --nproc-per-node 2 -m keepstep.trainer --config RUN.toml

which trains the same steps with the same losses, but nobody keeps checkpoints.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
from pathlib import Path

import torch.distributed as dist

from .attach import Attached, attach
from .config import TrainerConfig
from .contract import Phase


def main(arguments: list[str] | None = None) -> None:
    """Runs this rank to its end; what goes wrong leaves as an exception, for torchrun and for keepstep's agent alike."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    me = attach()
    config = _config(me, arguments)
    me.report(Phase.INIT, me.resume.step if me.resume else 0)
    from .loop import train  # imports torch's distributed parts: the arguments are checked first
    from .parallel import join
    from .run import open_run

    world = join(me, train=config.train)
    train(open_run(config, me, world))
    dist.destroy_process_group()  # not after a failure: that could wait for peers that wait for us


def _config(me: Attached, arguments: list[str] | None) -> TrainerConfig:
    if me.spec:
        config = TrainerConfig.model_validate_json(Path(me.spec.config_path).read_text())
        return config.model_copy(update={"run": config.run.model_copy(update={"root": me.spec.root})})
    parser = argparse.ArgumentParser(
        prog="python -m keepstep.trainer", description="One rank of a training run, without keepstep's restarts."
    )
    parser.add_argument("--config", type=Path, required=True, help="run.toml")
    path: Path = parser.parse_args(arguments).config
    try:
        return TrainerConfig.model_validate(tomllib.loads(path.read_text()))
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not TOML, or a value that pydantic refuses
        parser.error(f"{path}: {error}")


if __name__ == "__main__":
    main()
