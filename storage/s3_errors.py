"""What an error of an S3 request means: one word for each kind of answer, from the codes and statuses of AWS and of its imitators."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from enum import StrEnum, auto
from http.client import HTTPException
from typing import Any, Final

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from .errors import NotFound, StorageError, StoreError, StoreForbidden, StoreFull


class Trouble(StrEnum):
    EXISTS = auto()
    """The condition of a conditional write did not hold."""
    MISSING = auto()
    """No such object, upload or bucket."""
    THROTTLED = auto()
    """Too many requests: fewer of them, and later."""
    TRANSIENT = auto()
    """May work the next time, and may have worked this time: no answer came, or one that says nothing."""
    FULL = auto()
    """No space or quota."""
    FORBIDDEN = auto()
    """These credentials are wrong, expired or not enough."""
    REFUSED = auto()
    """Any other clear answer, which the next try would get again."""


class ErrorDocument(Exception):
    """An answer with status 200 whose body is no success: S3 may only find out after it has sent the status."""


_BY_CODE: Final = {
    **dict.fromkeys(("PreconditionFailed",), Trouble.EXISTS),
    **dict.fromkeys(("NoSuchKey", "NoSuchBucket", "NoSuchUpload"), Trouble.MISSING),
    **dict.fromkeys(
        (
            "SlowDown",
            "RequestTimeout",
            "Throttling",
            "ThrottlingException",
            "RequestLimitExceeded",
            "TooManyRequests",
            "ServiceUnavailable",
        ),
        Trouble.THROTTLED,
    ),
    **dict.fromkeys(("IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted"), Trouble.TRANSIENT),  # on the way
    **dict.fromkeys(("QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"), Trouble.FULL),
    **dict.fromkeys(("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed"), Trouble.FORBIDDEN),
}
_BY_STATUS: Final = {
    **dict.fromkeys((401, 403), Trouble.FORBIDDEN),
    404: Trouble.MISSING,
    412: Trouble.EXISTS,
    **dict.fromkeys((429, 503, 509), Trouble.THROTTLED),
    **dict.fromkeys((408, 409, 425, 500, 502, 504), Trouble.TRANSIENT),
    507: Trouble.FULL,
}
_NO_CREDENTIALS: Final = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.TokenRetrievalError)
_NO_ANSWER: Final = (
    HTTPException,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,
    aiohttp.ClientError,
    TimeoutError,
    ConnectionError,
    ErrorDocument,
)


def trouble_of(error: BaseException) -> Trouble | None:
    """None for what no store says: our own bugs, errors of our tree, a keyboard interrupt."""
    match error:
        case StorageError():
            return None
        case boto.ClientError():
            return _BY_CODE.get(code_of(error)) or _BY_STATUS.get(status_of(error), Trouble.REFUSED)
        case boto.SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return Trouble.REFUSED
        case _ if isinstance(error, _NO_CREDENTIALS):
            return Trouble.FORBIDDEN
        case _ if isinstance(error, _NO_ANSWER):
            return Trouble.TRANSIENT
        case boto.BotoCoreError() | OSError():
            return Trouble.REFUSED
    return None


def is_ambiguous(error: BaseException) -> bool:
    """True when the request may have been carried out although it failed."""
    return trouble_of(error) in (Trouble.TRANSIENT, Trouble.THROTTLED)


def is_throttling(error: BaseException) -> bool:
    return trouble_of(error) is Trouble.THROTTLED


def to_store_error(error: Exception, what: str) -> Exception:
    """The member of our tree for an error that no further try will change; what is no store's error stays as it is."""
    message = f"cannot {what}: {error}"
    match trouble_of(error):
        case None:
            return error
        case Trouble.MISSING:
            return NotFound(message)
        case Trouble.FULL:
            return StoreFull(message)
        case Trouble.FORBIDDEN:
            return StoreForbidden(
                f"{message}; correct the credentials (AWS_* variables, profile, role), their permissions, or this node's clock"
            )
        case Trouble.EXISTS | Trouble.THROTTLED | Trouble.TRANSIENT | Trouble.REFUSED:
            return StoreError(message)


def code_of(error: BaseException) -> str:
    """S3's name of an error, "" where no server gave one."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException) -> int:
    """HTTP status of the answer, 0 where none came."""
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _answer(error: BaseException) -> Mapping[str, Any]:
    return error.response if isinstance(error, boto.ClientError) else {}
