"""JSON with exactly one spelling, so that equal values have equal bytes and equal hashes. Pure.

A *sealed* object carries a check over itself: whoever reads it knows whether a bit was flipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from .errors import CorruptRecord


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinities, which JSON cannot hold: write `float.hex()` instead."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def seal(fields: Mapping[str, Any]) -> bytes:
    """The fields with their check, canonical JSON with a newline at the end."""
    return canonical_json({**fields, "check": sha256_hex(canonical_json(fields))}) + b"\n"


def unseal(body: bytes, what: str) -> dict[str, Any]:
    """The fields that were sealed; `what` is their name in messages. Raises CorruptRecord, whatever the bytes are."""
    try:
        fields = json.loads(body)
        if not isinstance(fields, dict):
            raise CorruptRecord(f"{what} is no JSON object")
        check = fields.pop("check", None)
        is_right = check == sha256_hex(canonical_json(fields))
    except (ValueError, RecursionError) as error:  # no JSON; or NaN, infinities, half characters, brackets without end
        raise CorruptRecord(f"{what} is no JSON: {error}") from None
    if not is_right:
        raise CorruptRecord(f"{what}: its check does not fit its bytes")
    return fields
