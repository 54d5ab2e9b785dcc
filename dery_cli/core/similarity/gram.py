"""All inner products between the Gram matrices of P nodes, as blocked matrix products.

Every built-in metric is, once its matrices are centred, an inner product <A_i, B_j> of symmetric
M x M matrices, one of node i and one of node j. The upper triangle of each matrix is packed into a
row, off-diagonal entries times sqrt(2); the inner products of all pairs are then V V^T. Three
things keep this small and fast:

- Symmetry is used twice: of Grams and of V V^T only tiles on and right of the diagonal are formed.
- Where the packed rows of all nodes do not fit the memory, the *triangle* is cut into chunks, not
  the nodes into blocks: memory is P x (chunk), whatever the sample count, and nodes are read once a
  chunk.
- Packed rows are float32, of matrices that were scaled in float64; numerators add up in float64
  (float32 where a P x P matrix of float64 does not fit).

Legend: N samples, M samples of a minibatch, C channels, P nodes, K packed entries of a chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from dery_cli.core.similarity.metric import Known, Progress
from dery_cli.errors import UsageError

SQRT2 = math.sqrt(2.0)
_LEAF = 64  # side of the squares on the diagonal: smaller wastes less, larger multiplies faster
_BLOCK = 1024  # side of the blocks of V V^T
_CACHED = 4_000_000  # packed entries of a block that are multiplied before the next are read

Tile = tuple[int, int, int, int]
"""(first row, last + 1, first column, last + 1) of a part of a triangle.

It is either a square on the diagonal, of which both halves are formed, or right of the diagonal.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of the upper triangle of an M x M matrix, packed tile after tile.

    Args:
        size: M.
        tiles: The tiles, each packed row by row.
    """

    size: int
    tiles: tuple[Tile, ...]

    @property
    def area(self) -> int:
        """Packed entries K."""
        return sum(_area(tile) for tile in self.tiles)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factored:
    """The symmetric matrix L R^T / sqrt(2), of which only tiles are ever formed.

    Args:
        left_MR: L, float32 or float64.
        right_MR: R, of the same type.
        hollow: Whether the diagonal is zero instead.
    """

    left_MR: Tensor
    right_MR: Tensor
    hollow: bool = False

    @classmethod
    def gram(cls, x_MC: Tensor) -> Factored:
        """X X^T."""
        return cls(left_MR=x_MC, right_MR=x_MC * SQRT2)


class RowBuilder(Protocol):
    """Gives the packed matrix of a node on a minibatch."""

    @property
    def widths_P(self) -> Sequence[int]:
        """Multiply-adds an entry of each node's matrix."""
        ...

    def write(self, out_K: Tensor, node: int, start: int, stop: int, chunk: Chunk) -> float:
        """Pack ``node``'s matrix on samples ``start:stop`` into ``out_K``.

        Returns:
            The scale the packed matrix is to be multiplied by; 0 where it is zero.
        """
        ...


def triangle_tiles(size: int, leaf: int) -> list[Tile]:
    """Tiles that cover the upper triangle of a size x size matrix once, diagonal included.

    By halving: the rectangle between the halves, then each half. Squares have sides up to ``leaf``.
    """

    def cover(start: int, stop: int) -> Iterator[Tile]:
        if stop - start <= leaf:
            yield start, stop, start, stop
            return
        middle = (start + stop + 1) // 2
        yield start, middle, middle, stop
        yield from cover(start, middle)
        yield from cover(middle, stop)

    return list(cover(0, size))


def plan_chunks(size: int, max_area: int) -> list[Chunk]:
    """Cut the triangle of a size x size matrix into chunks of at most ``max_area`` entries."""
    leaf = min(_LEAF, max(32, size // 32), math.isqrt(max_area))
    tiles = triangle_tiles(size, leaf)
    total = sum(_area(tile) for tile in tiles)
    if total > max_area:
        share = max(1, max_area // 8)
        tiles = [part for tile in tiles for part in _halved(tile, share)]
        max_area = min(max_area, total // -(-total // max_area) + share)
    chunks: list[list[Tile]] = [[]]
    area = 0
    for tile in tiles:
        if area + _area(tile) > max_area:
            chunks.append([])
            area = 0
        chunks[-1].append(tile)
        area += _area(tile)
    return [Chunk(size=size, tiles=tuple(chunk)) for chunk in chunks]


def _area(tile: Tile) -> int:
    return (tile[1] - tile[0]) * (tile[3] - tile[2])


def _halved(tile: Tile, limit: int) -> Iterator[Tile]:
    """A rectangle right of the diagonal in parts of at most ``limit`` entries; squares as is."""
    top, bottom, left, right = tile
    if top == left or _area(tile) <= limit:
        yield tile
    elif bottom - top >= right - left:
        middle = (top + bottom) // 2
        yield from _halved((top, middle, left, right), limit)
        yield from _halved((middle, bottom, left, right), limit)
    else:
        middle = (left + right) // 2
        yield from _halved((top, bottom, left, middle), limit)
        yield from _halved((top, bottom, middle, right), limit)


def pack_factored(out_K: Tensor, matrix: Factored, chunk: Chunk) -> None:
    """Pack a chunk of ``matrix`` into ``out_K``; off-diagonal entries times sqrt(2)."""
    left, right = matrix.left_MR, matrix.right_MR
    for tile, view in _views(out_K, chunk):
        rows, columns = left[tile[0] : tile[1]], right[tile[2] : tile[3]].T
        square = tile[0] == tile[2]
        if left.dtype == out_K.dtype:
            torch.addmm(view, rows, columns, beta=0, alpha=1 / SQRT2 if square else 1, out=view)
        else:
            view.copy_(rows @ columns / (SQRT2 if square else 1))
        if square and matrix.hollow:
            view.fill_diagonal_(0.0)


def pack_dense(out_K: Tensor, matrix_MM: Tensor, chunk: Chunk) -> None:
    """Pack a chunk of a symmetric matrix into ``out_K``; off-diagonal entries times sqrt(2)."""
    for tile, view in _views(out_K, chunk):
        view.copy_(matrix_MM[tile[0] : tile[1], tile[2] : tile[3]])
        if tile[0] != tile[2]:
            view.mul_(SQRT2)


def _views(out_K: Tensor, chunk: Chunk) -> Iterator[tuple[Tile, Tensor]]:
    offset = 0
    for tile in chunk.tiles:
        yield tile, out_K[offset : offset + _area(tile)].view(tile[1] - tile[0], tile[3] - tile[2])
        offset += _area(tile)


def inner_products(
    left: RowBuilder,
    right: RowBuilder | None,
    spans: Sequence[tuple[int, int]],
    *,
    num_nodes: int,
    memory: int,
    device: torch.device,
    work_bytes: int = 0,
    known: Known | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over minibatches of <A_i, B_j>, for all pairs of nodes.

    Args:
        left: Gives the A of every node.
        right: Gives the B of every node; None where B = A (then the result is symmetric and only
            half of it is computed).
        spans: (first, last + 1) sample of each minibatch.
        num_nodes: P.
        memory: Bytes that may be in use at once, result included.
        device: Where to compute.
        work_bytes: Bytes the builders need beside the packed rows.
        known: Earlier numerators; only rows and columns of new nodes are computed (the packed rows
            of old nodes are built again for it).
        progress: Told the multiply-adds done and in all.

    Returns:
        numer_PP, in units of unit_i * unit_j, and unit_P, on the CPU.

    Raises:
        UsageError: The result, or with it one row of every Gram, does not fit ``memory``.
    """
    position_P = [None] * num_nodes if known is None else list(known.positions)
    order = [p for p in range(num_nodes) if position_P[p] is None]
    num_new = len(order)
    order += [p for p in range(num_nodes) if position_P[p] is not None]
    sides = 1 if right is None else 2
    longest = max(stop - start for start, stop in spans)
    dtype, row_bytes = _budget(num_nodes, memory, work_bytes, 4 * num_nodes * sides * longest)

    numer_PP = torch.zeros(num_nodes, num_nodes, dtype=dtype, device=device)
    unit_P = torch.zeros(num_nodes, dtype=torch.float64)
    if known is not None:
        kept = torch.tensor([position_P[p] for p in order[num_new:]], dtype=torch.long)
        old = known.similarity.numer_PP.to(dtype)
        numer_PP[num_new:, num_new:] = old[kept][:, kept].to(device)
        unit_P[num_new:] = known.similarity.unit_P[kept]
    if num_new:
        _accumulate(
            numer_PP, unit_P, left, right, spans, order, num_new, row_bytes, device, progress
        )
    if right is None:
        mirror_(numer_PP, num_new)
    numer_PP = numer_PP.cpu()
    if order != list(range(num_nodes)):
        back = torch.empty(num_nodes, dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(num_nodes)
        numer_PP, unit_P = numer_PP[back][:, back], unit_P[back]
    return numer_PP, unit_P


def _accumulate(
    numer_PP: Tensor,
    unit_P: Tensor,
    left: RowBuilder,
    right: RowBuilder | None,
    spans: Sequence[tuple[int, int]],
    order: Sequence[int],
    num_new: int,
    row_bytes: int,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Add every minibatch to the rows (and, of a directional metric, columns) of new nodes."""
    num_nodes = len(order)
    sides = [left] if right is None else [left, right]
    max_area = row_bytes // (4 * num_nodes * len(sides))
    plan = {size: plan_chunks(size, max_area) for size in {stop - start for start, stop in spans}}
    depth = max(chunk.area for chunks in plan.values() for chunk in chunks)
    buffers = [torch.empty(num_nodes, depth, device=device) for _ in sides]
    if right is None:
        pairs = num_new * num_nodes - num_new * (num_new - 1) // 2
    else:
        pairs = num_new * (2 * num_nodes - num_new)
    gram_cost = sum(sum(side.widths_P) for side in sides)
    total = sum(c.area * (pairs + gram_cost) for start, stop in spans for c in plan[stop - start])
    done = 0
    with _full_precision():
        for start, stop in spans:
            for chunk in plan[stop - start]:
                packed, weight = [], []
                for side, buffer in zip(sides, buffers, strict=True):
                    rows_PK = buffer[:, : chunk.area]
                    scale_P = torch.zeros(num_nodes, dtype=torch.float64)
                    for slot, node in enumerate(order):
                        scale = side.write(rows_PK[slot], node, start, stop, chunk)
                        if scale == 0.0:
                            rows_PK[slot].zero_()
                        elif unit_P[slot] == 0.0:
                            unit_P[slot] = scale
                        scale_P[slot] = scale
                        done += chunk.area * side.widths_P[node]
                        if progress is not None:
                            progress(done, total)
                    packed.append(rows_PK)
                    weight.append((scale_P / unit_P).nan_to_num(0.0).to(device))
                if right is None:
                    _add_products(numer_PP, packed[0], weight[0], num_new)
                else:
                    _add_cross(numer_PP, packed, weight, slice(0, num_new), slice(0, num_nodes))
                    _add_cross(
                        numer_PP, packed, weight, slice(num_new, num_nodes), slice(0, num_new)
                    )
                done += chunk.area * pairs
                if progress is not None:
                    progress(done, total)


def _add_products(numer_PP: Tensor, rows_PK: Tensor, weight_P: Tensor, num_new: int) -> None:
    """Add w_i w_j (V V^T)_ij to the upper triangle of the first ``num_new`` rows."""
    num_nodes = rows_PK.shape[0]
    for top in range(0, num_new, _BLOCK):
        rows = slice(top, min(top + _BLOCK, num_new))
        side = rows.stop - top
        height = max(96, side // 8)
        tiles: list[Tile] = []
        for start in range(0, side, height):
            stop = min(start + height, side)
            inner = triangle_tiles(stop - start, min(_LEAF, height // 2))
            tiles += [(a + start, b + start, c + start, d + start) for a, b, c, d in inner]
            if stop < side:
                tiles.append((start, stop, stop, side))
        both, weights = (rows_PK, rows_PK), (weight_P, weight_P)
        _add_block(numer_PP, both, weights, rows, rows, tiles)
        _add_cross(numer_PP, both, weights, rows, slice(rows.stop, num_nodes))


def _add_cross(
    numer_PP: Tensor,
    packed: Sequence[Tensor],
    weight: Sequence[Tensor],
    rows: slice,
    columns: slice,
) -> None:
    """Add w_i u_j (V U^T)_ij to ``rows`` x ``columns``."""
    for top in range(rows.start, rows.stop, _BLOCK):
        bottom = min(top + _BLOCK, rows.stop)
        for left in range(columns.start, columns.stop, _BLOCK):
            right = min(left + _BLOCK, columns.stop)
            tiles = [(0, bottom - top, 0, right - left)]
            _add_block(numer_PP, packed, weight, slice(top, bottom), slice(left, right), tiles)


def _add_block(
    numer_PP: Tensor,
    packed: Sequence[Tensor],
    weight: Sequence[Tensor],
    rows: slice,
    columns: slice,
    tiles: Sequence[Tile],
) -> None:
    """Add the ``tiles`` of one block: float32 products over a few entries, summed in float64.

    So few entries at a time that the slices of all its nodes stay in the cache.
    """
    rows_IK, rows_JK = packed[0][rows], packed[1][columns]
    num_rows, num_columns = rows_IK.shape[0], rows_JK.shape[0]
    total = torch.zeros(num_rows, num_columns, dtype=torch.float64, device=numer_PP.device)
    depth = _CACHED // max(num_rows, num_columns)
    for k in range(0, rows_IK.shape[1], depth):
        some_IK, some_JK = rows_IK[:, k : k + depth], rows_JK[:, k : k + depth]
        for top, bottom, left, right in tiles:
            total[top:bottom, left:right] += some_IK[top:bottom] @ some_JK[left:right].T
    total *= weight[0][rows, None]
    total *= weight[1][None, columns]
    numer_PP[rows, columns] += total


def mirror_(numer_PP: Tensor, num_new: int) -> None:
    """Copy the upper triangle of the first ``num_new`` rows to the lower, in place."""
    for start in range(0, num_new, 256):
        stop = min(start + 256, num_new)
        square = numer_PP[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)
        numer_PP[stop:, start:stop] = numer_PP[start:stop, stop:].T


def _budget(num_nodes: int, memory: int, work_bytes: int, least: int) -> tuple[torch.dtype, int]:
    """Type of the numerators, and the bytes left for packed rows, which need ``least``."""
    entries = num_nodes * num_nodes
    usable = memory * 9 // 10  # the rest is for temporaries
    dtype = torch.float64 if entries * 16 <= usable // 2 else torch.float32
    left = usable - entries * dtype.itemsize - work_bytes
    if entries * 2 * dtype.itemsize > usable or left < least:
        needed = max(entries * 8, entries * 4 + work_bytes + least) * 10 / 9
        raise UsageError(
            f"{num_nodes:,} nodes do not fit a memory bound of {memory / 1e6:,.0f} MB",
            f"use --memory {math.ceil(needed / 1e6) + 1}M or more",
        )
    return dtype, left


@contextmanager
def _full_precision() -> Iterator[None]:
    """Keep float32 products float32 (no TF32, no bfloat16), whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
