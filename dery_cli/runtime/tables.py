"""Tables as lines of text that fit a width: what is too long folds, and numbers are never cut.

A table that fits is one line a row. Where it does not, its headings fold at words first; then the
widest column of words folds, or moves to lines of its own: below each row (as a network's name
does), above it if it is the first (as the path of an image does), whichever takes fewer lines.
What is left is printed in several parts, each with the first column before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

GAP = "  "
INDENT = "  "
FOLDS = 2
"""Lines a cell may take beside its neighbours before it is tall."""
_LEAST = 12
_NUMBER = re.compile(r"-|[+-]?\.?\d\S*( [^\W\d]{1,3})?")
_HEADING_PIECE = re.compile(r"[^\s-]+-?|-")

Rows = Sequence[Sequence[str]]


class Line(NamedTuple):
    """A line, and what it is: ``title``, ``head``, ``rule`` or the row's index as text."""

    text: str
    kind: str


class _Part(NamedTuple):
    """Columns side by side with their widths in terminal cells, and lines of columns below them.

    The first column stands above where its width is 0.
    """

    beside: list[int]
    widths: list[int]
    below: list[list[int]]


def is_number(cell: str) -> bool:
    """Whether a cell is a figure, its unit included, or the dash of an unknown one."""
    return _NUMBER.fullmatch(cell) is not None


def draw_table(title: str | None, columns: Sequence[str], rows: Rows, width: int) -> list[Line]:
    """The lines of a table, none wider than ``width`` terminal cells.

    Args:
        title: A line above it.
        columns: Headings.
        rows: A text for every column of every row, without control characters.
        width: Terminal cells.
    """
    lines = [Line(text, "title") for text in fold(title, width)] if title else []
    right = [bool(rows) and all(is_number(row[c]) for row in rows) for c in range(len(columns))]
    for part in _parts(columns, rows, right, width):
        lines += _draw_part(part, columns, rows, right, width)
    return lines


def fold(text: str, width: int) -> list[str]:
    """Break at spaces, and within a word only where it is wider than ``width`` itself."""
    from rich.cells import cell_len, chop_cells

    lines: list[str] = []
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines += chop_cells(word, max(width, 1)) or [""]
    return lines


def _fold_heading(text: str, width: int) -> list[str]:
    """The same, at hyphens too: multiply-adds is the widest word of most tables."""
    from rich.cells import cell_len

    words = [
        piece
        for word in text.split(" ")
        for piece in ([word] if cell_len(word) <= width else _HEADING_PIECE.findall(word))
    ]
    return fold(" ".join(words), width)


def _widest(texts: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts), default=0)


def _parts(columns: Sequence[str], rows: Rows, right: list[bool], width: int) -> list[_Part]:
    from rich.cells import cell_len

    every = list(range(len(columns)))
    cells = [_widest([row[c] for row in rows]) for c in every]
    full = [max(cell_len(columns[c]), cells[c]) for c in every]
    if _total(full) <= width:
        return [_Part(every, full, [])]
    folded = [
        max(cells[c], min(_widest(_HEADING_PIECE.findall(columns[c])), _LEAST)) for c in every
    ]
    beside, below = every, list[int]()
    words = [c for c in every if not right[c]]
    while words and _total([folded[c] for c in beside]) > width:
        longest = max(words, key=lambda c: folded[c])
        room = width - _total([folded[c] for c in beside]) + folded[longest]
        if _folds_beside(columns, rows, longest, room, width):
            folded[longest] = room
            break
        words.remove(longest)
        if longest:
            beside = [c for c in beside if c != longest]
            below = sorted([*below, longest])
        elif len(beside) > 1 and folded[0] > width // 3:
            folded[0] = 0
    return _split(beside, _together(below, full, width), folded, width)


def _folds_beside(columns: Sequence[str], rows: Rows, column: int, room: int, width: int) -> bool:
    """Whether a column of words fits ``room``, in no more lines than lines of its own would take.

    A word is not cut for it, nor a heading's, and few of the cells are tall.
    """
    cells = [row[column] for row in rows]
    words = [word for cell in cells for word in cell.split(" ")]
    heading = min(_widest(_HEADING_PIECE.findall(columns[column])), _LEAST)
    if room < max(_widest(words), heading, 1):
        return False
    if 2 * sum(len(fold(cell, room)) > FOLDS for cell in cells) >= len(cells):
        return False
    own = [fold(cell, width - len(INDENT)) for cell in cells if _is_told(cell)]
    return sum(len(fold(cell, room)) for cell in cells) <= len(rows) + sum(map(len, own))


def _is_told(cell: str) -> bool:
    """Whether a cell says something, for which it gets a line of its own."""
    return cell not in ("", "-")


def _together(below: list[int], full: list[int], width: int) -> list[list[int]]:
    """Columns below the rows, as many on a line as fit."""
    lines: list[list[int]] = []
    for column in below:
        if lines and len(INDENT) + _total([full[c] for c in [*lines[-1], column]]) <= width:
            lines[-1].append(column)
        else:
            lines.append([column])
    return lines


def _split(beside: list[int], below: list[list[int]], widths: list[int], width: int) -> list[_Part]:
    """Parts of the columns ``beside`` that fit, the first column in each."""
    first, *rest = beside
    widths = [min(one, width) for one in widths]
    parts = [[first]]
    for column in rest:
        if _total([widths[c] for c in [*parts[-1], column]]) > width and len(parts[-1]) > 1:
            parts.append([first])
        parts[-1].append(column)
    for part in parts:
        over = _total([widths[c] for c in part]) - width
        if over > 0 and widths[first]:
            widths[first] = max(widths[first] - over, 1)
    return [
        _Part(part, [widths[c] for c in part], below if not index else [])
        for index, part in enumerate(parts)
    ]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _draw_part(
    part: _Part, columns: Sequence[str], rows: Rows, right: list[bool], width: int
) -> list[Line]:
    sides = [right[c] for c in part.beside]
    heading = [_fold_heading(columns[c], w) for c, w in zip(part.beside, part.widths, strict=True)]
    above = part.widths[0] == 0
    heads = list[str]()
    if above:
        heads, heading[0] = fold(columns[0], width), [""]
    tall = max(map(len, heading))
    heading = [[""] * (tall - len(one)) + one for one in heading]
    heads = [text for text in heads if text] + _side_by_side(heading, part.widths, sides)
    heads += _draw_below(part.below, columns, columns, rows, width)
    lines = [Line(text, "head") for text in heads]
    ruled = max([_total(part.widths), _widest(heads)])
    lines.append(Line("─" * min(ruled, width), "rule"))
    for index, row in enumerate(rows):
        cells = [fold(row[c], w) for c, w in zip(part.beside, part.widths, strict=True)]
        texts = list[str]()
        if above:
            texts, cells[0] = fold(row[0], width) if row[0] else [], [""]
        texts += _side_by_side(cells, part.widths, sides)
        texts += _draw_below(part.below, row, columns, rows, width)
        lines += [Line(text, str(index)) for text in texts]
    return [*lines, Line("", "rule")]


def _draw_below(
    below: list[list[int]], row: Sequence[str], columns: Sequence[str], rows: Rows, width: int
) -> list[str]:
    """The lines below a row, or below the headings."""
    texts = list[str]()
    for line in below:
        if not any(_is_told(row[c]) for c in line):
            continue
        room = max(width - len(INDENT), 1)
        widths = [_widest([columns[c], *(one[c] for one in rows)]) for c in line]
        widths = widths if len(line) > 1 else [room]
        cells = [fold(row[c], w) for c, w in zip(line, widths, strict=True)]
        texts += [INDENT + text for text in _side_by_side(cells, widths, [False] * len(line))]
    return texts


def _side_by_side(cells: list[list[str]], widths: list[int], right: list[bool]) -> list[str]:
    from rich.cells import cell_len

    lines = []
    for index in range(max(map(len, cells))):
        texts = []
        for cell, width, to_the_right in zip(cells, widths, right, strict=True):
            text = cell[index] if index < len(cell) else ""
            blank = " " * (width - cell_len(text))
            texts.append(blank + text if to_the_right else text + blank)
        lines.append(GAP.join(texts).rstrip())
    return lines
