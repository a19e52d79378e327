"""From the batches in the pipe to the integers one tick sends: the only bridge between control and data."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from mnemosyne_jax.model.inputs import DRAW_DTYPES, Draws, StepInputs, StepShape, buffer_words, views
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow
from mnemosyne_jax.serve.pages import Span

LeavingRow = tuple[DecodeRow | ChunkRow, int, int]


def smallest_shape(shapes: Sequence[StepShape], history: Iterable[Batch], groups: int) -> StepShape:
    """The cheapest program that holds every batch in the pipe. `shapes` are ordered by cost."""
    shared = private = 0
    for batch in history:
        if batch.chunks:
            shared = max(shared, batch.chunk_tokens(None))
            private = max(private, *(batch.chunk_tokens(g) for g in range(groups)))
    return next(shape for shape in shapes if shape.holds(shared, private))


def place_chunks(batch: Batch, shape: StepShape) -> list[tuple[ChunkRow, int, int]]:
    """(chunk, index of its chunk row, offset of its first token within the chunk area) of every chunk of a batch."""
    first: dict[int | None, tuple[int, int]] = {None: (0, 0)}
    placed = []
    for row in batch.chunks:
        index, offset = first.get(row.group, (shape.shared_chunks + 1, shape.shared_tokens))
        placed.append((row, index, offset))
        first[row.group] = (index + 1, offset + row.length)
    return placed


def pack(shape: StepShape, history: Sequence[Batch], groups: int) -> np.ndarray:
    """The buffer of one tick, int32 [stage, group, words]: history[s] is the batch that stage s works on."""
    blank = _layout(shape).blank
    buffer = np.empty((len(history), groups, len(blank)), np.int32)
    buffer[...] = blank
    for stage, batch in enumerate(history):
        if not batch.empty:
            _pack_rows(buffer[stage], batch, shape)
    _pack_entering(buffer, history[0], shape)
    _pack_leaving(buffer, history[-1], shape)
    return buffer


class _Layout(NamedTuple):
    """The words of a stage and group. A table lists those of each row [row, leaf]: one assignment packs many rows."""

    blank: np.ndarray  # what all words hold where there are no rows
    words: StepInputs  # the numbers of the words of each leaf
    decodes: np.ndarray  # tables of inputs.Rows, but for cu_q_lens
    chunks: np.ndarray
    deltas: np.ndarray
    leaving: np.ndarray


@functools.lru_cache(maxsize=64)  # an engine has at most 16 programs
def _layout(shape: StepShape) -> _Layout:
    blank = np.zeros(buffer_words(shape), np.int32)
    _blank(views(shape, blank), shape)
    words = views(shape, np.arange(len(blank)))
    tables = (_table(rows) for rows in (words.decodes, words.chunks, words.deltas, words.leaving))
    return _Layout(blank, words, *tables)


def _table(rows: Any) -> np.ndarray:
    """[row, leaf] of the leaves that are as long as the first."""
    leaves = [getattr(rows, field.name) for field in fields(rows)]
    return np.stack([leaf for leaf in leaves if len(leaf) == len(leaves[0])], axis=1)


def _blank(inputs: StepInputs, shape: StepShape) -> None:
    R = shape.slots
    inputs.decodes.slots[...] = np.arange(R)
    inputs.decodes.key_stride[...] = 1
    inputs.decodes.cu_q_lens[...] = np.arange(R + 1)
    inputs.chunks.key_stride[...] = 1
    inputs.chunks.cu_q_lens[..., shape.shared_chunks + 1 :] = shape.shared_tokens
    inputs.deltas.slots[...] = R
    inputs.leaving.slots[...] = R


class _Keys(NamedTuple):
    """Whose keys the rows of a batch read: a cell for each row and group in which it stands.

    A cell is the group and the leaves of inputs.Rows but for cu_q_lens. `new` gives for each group the
    [page, (slot, index, page)] that the batch is the first to use.
    """

    page_tokens: int
    decodes: np.ndarray  # [cell, 7]
    chunks: np.ndarray  # [cell, 7]
    new: dict[int, np.ndarray]


# The keys of a batch are the same at every stage: found once, kept while it is in the pipe.
_keys: WeakKeyDictionary[Batch, _Keys] = WeakKeyDictionary()


def _keys_of(batch: Batch, page_tokens: int) -> _Keys:
    if (known := _keys.get(batch)) is None or known.page_tokens != page_tokens:
        known = _keys[batch] = _find_keys(batch, page_tokens)
    return known


def _find_keys(batch: Batch, page_tokens: int) -> _Keys:
    ranges: list[tuple[DecodeRow | ChunkRow, int, int]]
    ranges = [(row, row.position, row.position + 1) for row in batch.decodes]
    ranges += [(row, row.start, row.end) for row in batch.chunks]
    cells = [
        (s.group, row.slot, begin, s.local_tokens(end, page_tokens), s.start, s.stride, row.request.first_position)
        for row, begin, end in ranges
        for s in row.spans
    ]
    new = defaultdict(list)
    for row, begin, end in ranges:
        if -begin % page_tokens < end - begin:  # a page begins here: seldom in a decode row
            for span in row.spans:
                new[span.group].append(_new_pages(row.slot, span, *span.touched(begin, end, page_tokens)))
    table = np.fromiter(chain.from_iterable(cells), int).reshape(-1, 7)
    decodes = len(cells) - sum(len(row.spans) for row in batch.chunks)
    return _Keys(page_tokens, table[:decodes], table[decodes:], {g: np.concatenate(of) for g, of in new.items()})


def _new_pages(slot: int, span: Span, first: int, last: int) -> np.ndarray:
    """[page, (slot, index, page)] of the local pages [first, last)."""
    new = np.empty((last - first, 3), int)
    new[:, 0], new[:, 1], new[:, 2] = slot, np.arange(first, last), span.pages[first:last]
    return new


def _pack_rows(buffer_GW: np.ndarray, batch: Batch, shape: StepShape) -> None:
    layout, keys, placed = _layout(shape), _keys_of(batch, shape.page_tokens), place_chunks(batch, shape)
    buffer_GW[keys.decodes[:, :1], layout.decodes[keys.decodes[:, 1]]] = keys.decodes[:, 1:]
    if placed:
        index = [index for row, index, _ in placed for _ in row.spans]
        buffer_GW[keys.chunks[:, :1], layout.chunks[index]] = keys.chunks[:, 1:]
    for group, new in keys.new.items():
        buffer_GW[group, layout.deltas[: len(new)]] = new
    for row, index, offset in placed:
        gap = shape.shared_chunks + 1
        stop = gap if row.group is None else None  # later rows of the same kind begin where this one ends
        buffer_GW[_groups(row), layout.words.chunks.cu_q_lens[index + 1 : stop]] = offset + row.length


def _pack_entering(buffer: np.ndarray, batch: Batch, shape: StepShape) -> None:
    entering = _layout(shape).words.entering
    for row in batch.decodes:
        if row.token is not None:
            buffer[:, _groups(row), entering.tokens[row.slot]] = row.token
            buffer[:, _groups(row), entering.known[row.slot]] = 1
    for row, _, offset in place_chunks(batch, shape):
        begin = entering.tokens[shape.slots + offset]
        buffer[:, _groups(row), begin : begin + row.length] = row.request.prompt[row.start : row.end]


def _pack_leaving(buffer: np.ndarray, batch: Batch, shape: StepShape) -> None:
    leaving, cells = _layout(shape).leaving, _keys_of(batch, shape.page_tokens).decodes
    buffer[:, cells[:, :1], leaving[cells[:, 1]]] = cells[:, 1:2]  # decode row i is that of slot i
    for row, index, token_row in _last_chunks(batch, shape):
        buffer[:, _groups(row), leaving[index]] = token_row, row.slot


def _groups(row: DecodeRow | ChunkRow) -> slice | int:
    return slice(None) if row.group is None else row.group


def leaving_rows(batch: Batch, shape: StepShape) -> list[LeavingRow]:
    """(row, its place among the tick's tokens, its row of the tick) of all rows whose next token comes of a batch."""
    return [(row, row.slot, row.slot) for row in batch.decodes] + _last_chunks(batch, shape)


def _last_chunks(batch: Batch, shape: StepShape) -> list[LeavingRow]:
    R = shape.slots
    return [(row, R + i, R + offset + row.length - 1) for row, i, offset in place_chunks(batch, shape) if row.last]


def pack_draws(rows: Sequence[LeavingRow], shape: StepShape, X: int) -> np.ndarray:
    """The buffer of the Draws of at most X of the `leaving_rows`, int32 [8, X]; padding has nobody's register."""
    buffer = np.zeros((8, X), np.int32)
    draws = Draws(*(leaf.view(dtype) for leaf, dtype in zip(buffer, DRAW_DTYPES, strict=True)))
    draws.slots[:] = np.iinfo(np.int32).max
    draws.temperature[:] = 1
    for i, (row, _, token_row) in enumerate(rows):
        draws.rows[i], draws.slots[i] = shape.hidden_row(token_row), row.slot
        draws.groups[i], draws.shared[i] = row.group or 0, row.group is None
        draws.positions[i] = row.position if isinstance(row, DecodeRow) else row.end - 1
        draws.seeds[i], draws.temperature[i], draws.top_p[i] = (
            row.request.seed,
            row.request.temperature,
            row.request.top_p,
        )
    return buffer
