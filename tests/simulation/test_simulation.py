"""A seeded cluster in virtual time: whatever breaks, no rule is broken, and when the faults stop the run ends well.

`make sim SEEDS=1000`, or `pytest tests/simulation --seeds 1000 --first-seed 5000`. A failure prints its seed and the story.
"""

from __future__ import annotations

import pytest
from sim_faults import Simulation

BATCH = 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "batch" in metafunc.fixturenames:
        first, seeds = metafunc.config.getoption("first_seed"), metafunc.config.getoption("seeds")
        starts = range(first, first + seeds, BATCH)
        metafunc.parametrize(
            "batch", [range(start, min(start + BATCH, first + seeds)) for start in starts], ids=[str(start) for start in starts]
        )


@pytest.mark.slow
def test_no_rule_is_broken(batch: range) -> None:
    for seed in batch:
        Simulation(seed).run()


def test_a_seed_always_tells_the_same_story() -> None:
    stories = []
    for _ in range(2):
        simulation = Simulation(7)
        simulation.run()
        stories.append(list(simulation.world.story))
    assert stories[0] == stories[1]
