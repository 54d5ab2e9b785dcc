"""What the licences of several donors mean for a network that has parts of all of them.

It reads names, it gives no legal advice: what is called out is for people to look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PERMISSIVE = re.compile(
    r"apache|^mit|^bsd|^isc|^cc0|^cc-by-\d|^cc-by$|^unlicense|^zlib|^0bsd|public domain", re.I
)
_NON_COMMERCIAL = re.compile(r"-nc|non-?commercial|research|fair|internal use", re.I)
_NO_DERIVATIVES = re.compile(r"-nd\b|no-?derivatives", re.I)
_COPYLEFT = re.compile(r"gpl|-sa\b|share-?alike|^mpl|^epl", re.I)
_HUB_IDS = {
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-3.0",
    "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0", "cc-by-nc-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0", "gpl-3.0", "gpl-2.0", "agpl-3.0",
    "lgpl-3.0", "lgpl-2.1", "mpl-2.0", "isc", "unlicense", "zlib", "unknown",
}  # fmt: skip
"""Licences by the identifier that the Hugging Face hub gives them."""


def hub_licence(names: Iterable[str]) -> str:
    """The hub's identifier for a network of donors under these licences; ``other`` for a mixture.

    Example:
        >>> hub_licence(["Apache-2.0"]), hub_licence(["MIT", "CC-BY-NC-4.0"])
        ('apache-2.0', 'other')
    """
    found = {re.sub(r"-(only|or-later)$", "", name.strip().lower()) for name in names}
    only = next(iter(found)) if len(found) == 1 else ""
    return only if only in _HUB_IDS else "other"


def licence_conflicts(names: Iterable[str]) -> list[str]:
    """What speaks against passing on a network of donors under these licences, a sentence each.

    Example:
        >>> licence_conflicts(["MIT", "Apache-2.0"])
        []
        >>> licence_conflicts(["GPL-3.0", "CC-BY-NC-4.0"])[0]
        'GPL-3.0 forbids further restrictions, and CC-BY-NC-4.0 has one: no commercial use'
    """
    known = sorted(set(names))
    unclear = [
        n for n in known
        if not any(kind.search(n) for kind in (
            _PERMISSIVE, _NON_COMMERCIAL, _NO_DERIVATIVES, _COPYLEFT
        ))
    ]  # fmt: skip
    bound = [n for n in known if _COPYLEFT.search(n)]
    unpaid = [n for n in known if _NON_COMMERCIAL.search(n)]
    found = [
        f"{n} forbids further restrictions, and {m} has one: no commercial use"
        for n in bound
        for m in unpaid
        if n != m and not _NON_COMMERCIAL.search(n)
    ]
    found += [
        f"{a} and {b} each ask that the whole be passed on under itself"
        for i, a in enumerate(bound)
        for b in bound[i + 1 :]
    ]
    found += [f"{n} forbids passing on what is derived" for n in known if _NO_DERIVATIVES.search(n)]
    found += [f"the licence '{n}' is not known; ask whoever made the weights" for n in unclear]
    if unpaid and len(known) > len(unpaid):
        found.append(f"{' and '.join(unpaid)}: no commercial use of the whole network")
    return found
