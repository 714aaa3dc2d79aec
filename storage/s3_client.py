"""Requests to one bucket through s3fs' session: each within its time, at the store's pace, with the credentials of now."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractContextManager
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import s3fs

from .s3_errors import ErrorDocument, Trouble, is_throttling, trouble_of
from .store import StorageOptions
from .throttle import Throttle

T = TypeVar("T")
Answer = Mapping[str, Any]

RENEW_EVERY_S: Final = 5.0  # the least time between two looks for fresh credentials
SIGNED_S: Final = 3600  # how long a server accepts a signed address, by its clock

_MUST_HAVE: Final = {
    "put_object": "ETag",
    "upload_part": "ETag",
    "complete_multipart_upload": "ETag",
    "create_multipart_upload": "UploadId",
}


class S3Client:
    """Thread-safe. s3fs finds the credentials and holds the session; its and botocore's own retries are off."""

    def __init__(self, bucket: str, options: StorageOptions) -> None:
        self.bucket = bucket
        self.throttle = Throttle(options.max_connections)
        self.filesystem = _filesystem(options)
        self._has_fixed_key = bool(options.key)
        self._ca_file = options.ca_file
        self._renewing = threading.Lock()
        self.renewals = 0  # of the session, so far
        self._renewed_at = float("-inf")

    def request(self, method: str, left_s: float, **arguments: Any) -> Answer:
        """The answer of one request; a body is read to its end ("Body" is bytes then).

        A refusal of the credentials is answered once with a new session, which reads files, roles and the environment again.

        Args:
            method: of botocore's client, e.g. "put_object".
            left_s: the request is cancelled after so many seconds, however lively it looks.

        Raises:
            what botocore and aiohttp raise: see s3_errors.py.
        """
        return self.renewing(lambda until: self._request(method, until, arguments), left_s)

    def renewing(self, work: Callable[[float], T], left_s: float) -> T:
        """The result of `work(until)`, tried once more with a new session when the credentials were refused."""
        until, renewals = time.monotonic() + left_s, self.renewals
        try:
            return work(until)
        except Exception as error:
            if trouble_of(error) is not Trouble.FORBIDDEN or not self._renew(renewals, until):
                raise
        return work(until)

    def paced(self, until: float) -> AbstractContextManager[None]:
        """Holds one of the places for requests, and learns from how it ends. Raises StoreUnavailable."""
        return self.throttle.place(until - time.monotonic(), is_throttling=is_throttling)

    def send(self, method: str, until: float, **arguments: Any) -> Answer:
        """As `request`, by whoever holds a place already and sees to refused credentials."""
        return self.run(self._send(method, arguments), until)

    def sign(self, method: str, until: float, **arguments: Any) -> str:
        """An address that does this without credentials, for a while ("presigned"). A secret: it must not be logged."""
        return self.run(self._sign(method, arguments), until)

    @property
    def ca_file(self) -> str:
        """Of the authority that signed the server's certificate; "": one that everybody knows."""
        return self._ca_file or str(self.filesystem.session.get_config_variable("ca_bundle") or "")

    def close(self) -> None:
        self.filesystem.invalidate_cache()

    def _request(self, method: str, until: float, arguments: Mapping[str, Any]) -> Answer:
        with self.paced(until):
            return self.send(method, until, **arguments)

    async def _sign(self, method: str, arguments: Mapping[str, Any]) -> str:
        client = await self.filesystem.set_session()
        url: str = await client.generate_presigned_url(method, Params={"Bucket": self.bucket, **arguments}, ExpiresIn=SIGNED_S)
        return url

    async def _send(self, method: str, arguments: Mapping[str, Any]) -> Answer:
        client = await self.filesystem.set_session()
        answer = await getattr(client, method)(Bucket=self.bucket, **arguments)
        if needed := _MUST_HAVE.get(method):
            _check_has(answer, needed, method)
        if (stream := answer.get("Body")) is None:
            return dict(answer)
        try:
            body = await stream.read()  # raises when fewer bytes come than were announced
        finally:
            stream.close()
        return {**answer, "Body": body}

    def _renew(self, renewals: int, until: float) -> bool:
        """True when the session is newer than the one that was refused: by this call or by another thread's."""
        if self._has_fixed_key:
            return False
        with self._renewing:
            if self.renewals != renewals:
                return True
            if time.monotonic() - self._renewed_at < RENEW_EVERY_S:
                return False
            self.run(self.filesystem.set_session(refresh=True), until)
            self.renewals, self._renewed_at = self.renewals + 1, time.monotonic()
            return True

    def run(self, work: Coroutine[Any, Any, T], until: float) -> T:
        """Runs on s3fs' loop; cancelled, with its connection, when the time is over or the caller is interrupted."""
        left_s = max(0.0, until - time.monotonic())
        future = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, left_s), self.filesystem.loop)  # noqa: TID251  (what comes with the cancellation is a result)
        try:
            return future.result()
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"no whole answer within {left_s:.1f} s") from error
        except BaseException:
            future.cancel()
            raise


def server_time(answer: Answer) -> float:
    """Seconds by the server's clock when it answered, from the Date header that every HTTP server sends."""
    return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()


def _check_has(answer: Answer, needed: str, method: str) -> None:
    if not answer.get(needed):
        raise ErrorDocument(f"the server answered {method} with success but without {needed}")


def _filesystem(options: StorageOptions) -> Any:
    """Whatever is empty is left to botocore: AWS_* variables, AWS_ENDPOINT_URL(_S3), profiles, web identities, instance roles."""
    return s3fs.S3FileSystem(
        key=options.key or None,
        secret=options.secret or None,
        endpoint_url=options.endpoint_url or None,
        client_kwargs=_given(region_name=options.region or os.environ.get("AWS_REGION", ""), verify=options.ca_file),
        config_kwargs={
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},  # a repeated conditional PUT would meet its own object
            "request_checksum_calculation": "when_required",  # several servers refuse the CRC32 that newer SDKs add
            "response_checksum_validation": "when_required",
            "max_pool_connections": options.max_connections,
            "signature_version": "s3v4",  # of signed addresses, too: botocore's default for them is the old one, which many refuse
        },
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _given(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}
