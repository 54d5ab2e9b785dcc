"""How networks are written: ``a[0:4] + b[7:9]``, and with an adapter ``a[0:5] ~ a[5:9]``.

A piece is a donor with the nodes it begins and ends at; ``a`` alone is all of it, ``a[:4]`` and
``a[7:]`` are what they are for Python. Pieces meet with a stitch unless one follows on the other in
the same donor; ``~`` puts one there too. All that is written here can be read here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from dery_cli.errors import UsageError
from dery_cli.types import Anatomy, BlockRef

_PIECE = re.compile(r"([a-z0-9][a-z0-9._-]*)(?:\[(\d*):(\d*)\])?")
EXAMPLE = "write pieces as donor[first node:last node]: 'a[0:4] + b[7:9]'"


def needs_stitch(before: BlockRef, after: BlockRef) -> bool:
    """Whether two blocks in a row need a layer between them."""
    follows = before.donor == after.donor and before.stop == after.start
    return after.adapter or not follows


def merged(refs: Sequence[BlockRef]) -> tuple[BlockRef, ...]:
    """The blocks with those joined that meet without a stitch, so that equal networks are equal."""
    out: list[BlockRef] = []
    for ref in refs:
        if out and not needs_stitch(out[-1], ref):
            first = out[-1]
            out[-1] = BlockRef(ref.donor, first.start, ref.stop, adapter=first.adapter)
        else:
            out.append(ref)
    return tuple(out)


def format_network(refs: Sequence[BlockRef]) -> str:
    """A network as ``parse_network`` reads it."""
    words: list[str] = []
    for ref in merged(refs):
        if words:
            words.append("~" if ref.adapter else "+")
        words.append(str(ref))
    return " ".join(words)


def parse_piece(text: str, anatomies: Mapping[str, Anatomy]) -> BlockRef:
    """One piece of a donor.

    Args:
        text: ``a[2:4]``, ``a[:4]``, ``a[2:]`` or ``a``.
        anatomies: Of the donors there are.

    Raises:
        UsageError: It is no piece, or no donor has it.
    """
    piece = text.strip()
    match = _PIECE.fullmatch(piece)
    if match is None:
        raise UsageError(f"'{piece}' is no piece of a donor", EXAMPLE)
    donor, first, last = match.groups()
    if donor not in anatomies:
        close = difflib.get_close_matches(donor, anatomies, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(close)}?" if close else "see dery zoo list"
        raise UsageError(f"'{piece}': there is no donor {donor}", known)
    units = anatomies[donor].num_units
    start = int(first) if first else 0
    stop = int(last) if last else units
    if stop > units:
        raise UsageError(f"'{piece}': {donor} has nodes 0 to {units}", f"dery zoo show {donor}")
    if start >= stop:
        raise UsageError(
            f"'{piece}' has no unit: it begins at node {start} and ends at node {stop}",
            f"{donor} has nodes 0 to {units}; dery zoo show {donor}",
        )
    return BlockRef(donor, start, stop)


def parse_network(text: str, anatomies: Mapping[str, Anatomy]) -> tuple[BlockRef, ...]:
    """A network, its pieces joined where they follow on one another.

    Args:
        text: Pieces with ``+`` or ``~`` between.
        anatomies: Of the donors there are.

    Raises:
        UsageError: Something of it is wrong; the piece is named.
    """
    words = [word.strip() for word in re.split(r"([+~])", text)]
    refs: list[BlockRef] = []
    for place in range(0, len(words), 2):
        if not words[place]:
            where = "begins" if not place else "ends" if place == len(words) - 1 else "goes on"
            raise UsageError(f"'{text}' {where} without a piece", EXAMPLE)
        piece = parse_piece(words[place], anatomies)
        joint = words[place - 1] if place else "+"
        refs.append(_joined(refs[-1] if refs else None, piece, joint))
    return merged(refs)


def _joined(before: BlockRef | None, piece: BlockRef, joint: str) -> BlockRef:
    """A piece behind another, which it must not lead back from.

    Raises:
        UsageError: It may not stand there.
    """
    if before is None:
        if piece.start:
            raise UsageError(
                f"'{piece}' comes first, and a network begins at a donor's node 0",
                f"'{piece.donor}[0:{piece.stop}]'",
            )
        return piece
    if not piece.start:
        raise UsageError(
            f"'{piece}' begins at the image, where only the first piece can",
            f"'{piece.donor}[1:{piece.stop}]'" if piece.stop > 1 else "leave it out",
        )
    if before.donor == piece.donor and piece.start < before.stop:
        raise UsageError(
            f"'{piece}' goes back to node {piece.start} of {piece.donor}, which '{before}' left at "
            f"node {before.stop}",
            f"begin at node {before.stop} or later, or go by another donor",
        )
    follows = before.donor == piece.donor and before.stop == piece.start
    return BlockRef(piece.donor, piece.start, piece.stop, adapter=joint == "~" and follows)
