"""For launchers that give torchrun's environment: torchrun itself, a shell loop of it, DLRover."""

from __future__ import annotations

import sharded

sharded.join()
sharded.train()
