"""JSON with exactly one spelling, so that equal values have equal bytes and equal hashes. Pure.

A *sealed* object carries a check over itself: whoever reads it knows whether a bit was flipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from .errors import CorruptRecord


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8. Raises ValueError for NaN and infinities, which JSON cannot hold: write `float.hex()` instead."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def seal(fields: Mapping[str, Any]) -> bytes:
    """Canonical JSON of the fields, of which there are some, with a check over its bytes as the last member; a newline at the end."""
    body = canonical_json(fields)
    return body[:-1] + _check_of(body) + b"\n"


def unseal(body: bytes, what: str) -> dict[str, Any]:
    """The fields that were sealed; `what` is their name in messages. Raises CorruptRecord, whatever the bytes are."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # no JSON; or brackets without end
        raise CorruptRecord(f"{what} is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise CorruptRecord(f"{what} is no JSON object")
    line = body.removesuffix(b"\n")
    payload, check = line[:-_CHECK_BYTES] + b"}", line[-_CHECK_BYTES:]
    if check != _check_of(payload):
        raise CorruptRecord(f"{what}: its check does not fit its bytes")
    del fields["check"]
    return fields


def _check_of(body: bytes) -> bytes:
    return b',"check":"%s"}' % sha256_hex(body).encode()


_CHECK_BYTES: Final = len(_check_of(b""))
