"""Text of others (class names, files, licences, messages of libraries) as it may be shown."""

from __future__ import annotations

import re

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters: they move the cursor, and more
    "\u2028\u2029"  # line ends too
    "\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the order of what follows around
    "\ud800-\udfff]"  # half characters, which no encoding writes
)
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~>])")


def printable(text: str) -> str:
    r"""``text`` in one line of harmless characters, the others written as ``\x1b``."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return _SHORT.get(found[0]) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def markdown(text: str) -> str:
    """``text`` as plain words of a Markdown page or table: neither markup nor HTML."""
    plain = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", plain)
