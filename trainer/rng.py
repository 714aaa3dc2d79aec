"""Every random stream of a rank: captured as JSON, restored exactly, or derived when there is nothing exact to restore.

Python's random, NumPy's global generator, torch's CPU generator, the generator of every CUDA device of this process.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from keepstep.storage.canonical import canonical_json, sha256_hex

PARTS: Final = frozenset({"python", "numpy", "torch", "cuda"})


class RngMismatch(ValueError):
    """The saved streams are not those of this process; going on would silently train something else."""


def seed_everything(*facts: int) -> None:
    """Streams that depend on `facts` alone, e.g. (seed, rank): dropout masks must differ between ranks."""
    digest = hashlib.sha256(" ".join(map(str, facts)).encode()).digest()
    random.seed(digest)
    np.random.seed(np.frombuffer(digest, dtype=np.uint32))
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))  # CUDA too


def capture() -> dict[str, Any]:
    """All streams, as JSON."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    return {
        "python": {"version": version, "words": _pack(np.array(words, dtype=np.uint32)), "gauss": _hex(gauss)},
        "numpy": {"name": name, "keys": _pack(keys), "position": int(position), "has_gauss": int(has_gauss), "cached": float(cached).hex()},
        "torch": _pack_tensor(torch.get_rng_state()),
        "cuda": [_pack_tensor(state) for state in _cuda_states()],
    }


def restore(saved: Mapping[str, Any]) -> None:
    """Puts all streams back. Raises RngMismatch, before it changes any, when a part is missing or of another machine."""
    _check(saved)
    python, numpy = saved["python"], saved["numpy"]
    words = tuple(int(word) for word in _unpack(python["words"], np.uint32))
    random.setstate((python["version"], words, None if python["gauss"] is None else float.fromhex(python["gauss"])))
    keys = _unpack(numpy["keys"], np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], float.fromhex(numpy["cached"])))
    torch.set_rng_state(_unpack_tensor(saved["torch"]))
    if saved["cuda"]:
        torch.cuda.set_rng_state_all([_unpack_tensor(state) for state in saved["cuda"]])


def digest(saved: Mapping[str, Any]) -> str:
    """SHA-256 of captured streams."""
    return sha256_hex(canonical_json(saved))


def _check(saved: Mapping[str, Any]) -> None:
    if wrong := PARTS ^ set(saved):
        raise RngMismatch(f"the checkpoint's random streams lack or add {sorted(wrong)}: refusing to train on with other ones")
    if len(saved["cuda"]) != len(_cuda_states()):
        raise RngMismatch(
            f"the checkpoint holds random streams of {len(saved['cuda'])} CUDA devices, this process has {len(_cuda_states())}"
        )


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _pack(array: np.ndarray[Any, Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype="<u4").tobytes()).decode()


def _unpack(text: str, dtype: type[np.uint32]) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(base64.b64decode(text), dtype="<u4").astype(dtype)


def _pack_tensor(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _hex(value: float | None) -> str | None:
    return None if value is None else float(value).hex()
