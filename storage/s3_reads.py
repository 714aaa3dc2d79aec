"""Small objects through obstore, which gets several times as many of them a second as s3fs (benchmarks/s3_clients.py).

Only an accelerator: whatever does not end in the bytes or a clear "there is none" is left to the s3fs client, which knows what errors
mean, and obstore is left alone for a while. So retries, throttling, credentials and messages have one place.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from .errors import NotFound, StorageError
from .s3_client import S3Client
from .store import StorageOptions

REST_S: Final = 60.0  # after an error
ASK_AGAIN_S: Final = 900.0  # obstore asks for credentials when fewer than 300 of these are left

_TOO_MUCH: Final = re.compile(r"status code: (?:429|503)\b")

log = logging.getLogger(__name__)


class QuickReader:
    """Thread-safe. Its library is imported, and its connections are opened, by the first read."""

    def __init__(self, client: S3Client, options: StorageOptions) -> None:
        self._client = client
        self._options = options
        self._making = threading.Lock()
        self._store: Any = None
        self._renewals = -1  # the client's session whose credentials and address `_store` has
        self._rests_until = float("-inf")

    def get(self, path: str, left_s: float) -> bytes | None:
        """The object; None: ask s3fs. Raises NotFound, StoreUnavailable (too many requests under way)."""
        import obstore

        return self._ask(path, left_s, lambda store: obstore.get(store, path).bytes())

    def _ask(self, path: str, left_s: float, read: Callable[[Any], Any]) -> bytes | None:
        until = time.monotonic() + left_s
        if time.monotonic() < self._rests_until or left_s < self._patience_s:
            return None
        try:
            with self._client.throttle.place(left_s, is_throttling=_is_throttling):
                return bytes(read(self._connected(until)))
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise NotFound(f"no object {path} in s3://{self._client.bucket}: {error}") from error
        except Exception as error:  # noqa: BLE001 - nobody is hurt: s3fs is asked next, and its errors count
            log.info("s3://%s is read through s3fs for %.0f s: %s", self._client.bucket, REST_S, str(error).partition("\n")[0])
            self._rests_until = time.monotonic() + REST_S
            return None

    @property
    def _patience_s(self) -> float:
        """Of one request: what remains of a try is for s3fs."""
        return min(self._options.read_timeout_s, self._options.deadline_s / 4)

    def _connected(self, until: float) -> Any:
        with self._making:
            if self._renewals != self._client.renewals:
                self._store, self._renewals = self._connect(until), self._client.renewals
            return self._store

    def _connect(self, until: float) -> Any:
        """With s3fs' address, region and credentials: found once, in one way."""
        from obstore.store import S3Store

        session = self._client.filesystem
        found = self._client.run(session.set_session(), until)
        patience = {
            "timeout": timedelta(seconds=self._patience_s),
            "connect_timeout": timedelta(seconds=self._options.connect_timeout_s),
        }
        trust = {"root_certificate": Path(ca_file).read_bytes()} if (ca_file := self._client.ca_file) else {}
        options: Any = {"allow_http": True, **patience, **trust}
        return S3Store(
            self._client.bucket,
            endpoint=found.meta.endpoint_url,
            region=found.meta.region_name,
            credential_provider=self._credentials(found),
            client_options=options,
            retry_config={"max_retries": 0},
        )

    def _credentials(self, found: Any) -> Any:
        """What obstore calls for credentials; the session refreshes those of roles before they expire."""
        held, loop = found._request_signer._credentials, self._client.filesystem.loop

        def provide() -> dict[str, Any]:
            frozen = asyncio.run_coroutine_threadsafe(held.get_frozen_credentials(), loop).result(self._patience_s)
            expires_at = datetime.now(UTC) + timedelta(seconds=ASK_AGAIN_S)
            names = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key, "token": frozen.token}
            return {**names, "expires_at": expires_at}

        return provide


def _is_throttling(error: BaseException) -> bool:
    """obstore's errors have words, not codes."""
    return bool(_TOO_MUCH.search(str(error)))
