"""What a text is before anything is learnt from it: one spelling of each character, one kind of line end, nothing invisible. Pure."""

from __future__ import annotations

import re
import unicodedata
from typing import Final, Literal

from .config import DataSection

# What begins or ends a line or a page becomes "\n". Other control characters (C0, DEL, C1) vanish, the tab excepted. All in UTF-8, where
# this takes a tenth of the time that regular expressions over characters need.
_LINE_ENDS: Final = b"\r\v\f"
_TO_LINE_END: Final = bytes.maketrans(_LINE_ENDS, b"\n" * len(_LINE_ENDS))
_CONTROL: Final = bytes({*range(0x20), 0x7F} - {*b"\t\n", *_LINE_ENDS})
_C1: Final = re.compile(rb"\xc2[\x80-\x9f]")
_NEXT_LINE: Final = "\x85".encode()
_SEPARATORS: Final = ("\u2028".encode(), "\u2029".encode())
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_FORMS: Final[dict[str, Literal["NFC", "NFKC"]]] = {"nfc": "NFC", "nfkc": "NFKC"}


def clean(text: str, config: DataSection) -> str:
    """As data.strip_control and data.normalize say. Cleaning it once more changes nothing.

    Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD in any case.
    """
    text = encodable(text)
    if config.strip_control:
        text = without_control(text)
    if config.normalize == "none" or text.isascii():
        return text
    return unicodedata.normalize(_FORMS[config.normalize], text)


def encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\ufffd", text)
    return text


def without_control(text: str) -> str:
    before = text.encode()
    body = before.replace(b"\r\n", b"\n").translate(_TO_LINE_END, _CONTROL)
    if b"\xc2" in body:
        body = _C1.sub(lambda found: b"\n" if found[0] == _NEXT_LINE else b"", body)
    for separator in _SEPARATORS:
        body = body.replace(separator, b"\n")
    return text if body == before else body.decode()


def cut_to(text: str, max_bytes: int) -> str:
    """As much of its beginning as has at most so many bytes in UTF-8."""
    body = text.encode()
    return text if len(body) <= max_bytes else body[:max_bytes].decode(errors="ignore")
