"""The throw-away step of a hot standby: whatever the first step of a process makes is there, and nothing of it is left in the state.

A first step fills caches, allocates buffers, opens connections, and lets FSDP find its order: 30 to 100 ms on a small model, more where
something is compiled. It computes what step 1 computes, and nothing else of the training sees it: no record, no guard, no schedule, no
checkpoint. What it changed, and why none of that can reach a bit of the training:

* parameters: before the attempt's first step all are loaded, or initialised from the seed;
* moments and counts of the optimizer: loaded, or zero, as they are made. So they are zeroed here;
* gradients: none are left; the learning rate: that of a new optimizer again;
* random streams and the number of threads: as before (then loaded, or seeded);
* buffers of the exact engine and of FSDP: written before they are read.

Loss scaler, window, traces, registry, cadence are made after the order: they do not exist yet, or have not been touched.
"""

from __future__ import annotations

import torch

from . import rng
from .config import TrainerConfig
from .data import feed_for
from .engine import Engine
from .loader import Share
from .parallel import World, initialise
from .samples import Samples


def throw_away_step(config: TrainerConfig, world: World, samples: Samples, engine: Engine) -> None:
    """Collective. One step with the shapes of a real one, and then as if there had been none, but for the parameters' values."""
    streams, threads = rng.capture(), torch.get_num_threads()
    initialise(engine.sharded, seed=config.run.seed)  # what memory holds may be no number, and slow
    engine.settle()
    shares, num_shares = engine.shares
    share = Share(
        samples=samples,
        feed=feed_for(samples.sizes, config),
        shares=shares,
        num_shares=num_shares,
        micro_batch_samples=config.train.micro_batch_samples,
    )
    sums = engine.backward(share[1], step=1)
    world.gather([*sums.nll_rests, *sums.gradient_square_rests])
    engine.update(lr=config.optimizer.lr, scale=1.0)
    for moments in engine.optimizer.state().values():
        for moment in moments.values():
            moment.zero_()
    rng.restore(streams)
    torch.set_num_threads(threads)
