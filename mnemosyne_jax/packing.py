"""From the batches in the pipe to the integers one tick sends: the only bridge between control and data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from mnemosyne_jax.model.inputs import StepInputs, StepShape, buffer_words, views
from mnemosyne_jax.serve.batch import Batch, ChunkRow
from mnemosyne_jax.serve.pages import local_tokens, touched


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
    buffer = np.zeros((len(history), groups, buffer_words(shape)), np.int32)
    inputs = views(shape, buffer)
    _blank(inputs, shape)
    for stage, batch in enumerate(history):
        if not batch.empty:
            _pack_rows(inputs, stage, batch, shape)
    _pack_entering(inputs, history[0], shape)
    _pack_leaving(inputs, history[-1], shape)
    return buffer


def _blank(inputs: StepInputs, shape: StepShape) -> None:
    R = shape.slots
    inputs.decodes.slots[...] = np.arange(R)
    inputs.decodes.key_stride[...] = 1
    inputs.decodes.cu_q_lens[...] = np.arange(R + 1)
    inputs.chunks.key_stride[...] = 1
    inputs.chunks.cu_q_lens[..., shape.shared_chunks + 1 :] = shape.shared_tokens
    inputs.deltas.slots[...] = R
    inputs.leaving.slots[...] = R


@dataclass(frozen=True, eq=False)
class _Keys:
    """Whose keys the rows of a batch read, a cell for each row (decodes first) and group that holds some of them.

    The `leaves` are those of inputs.Rows but for cu_q_lens. `new` gives for each group the (slots, indices, pages) that
    the batch is the first to use.
    """

    page_tokens: int
    row: np.ndarray
    group: np.ndarray
    leaves: tuple[np.ndarray, ...]
    new: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]


# The keys of a batch are the same at every stage: found once, kept while it is in the pipe.
_keys: WeakKeyDictionary[Batch, _Keys] = WeakKeyDictionary()


def _keys_of(batch: Batch, page_tokens: int) -> _Keys:
    if (known := _keys.get(batch)) is None or known.page_tokens != page_tokens:
        known = _keys[batch] = _find_keys(batch, page_tokens)
    return known


def _find_keys(batch: Batch, page_tokens: int) -> _Keys:
    ranges = [(row, row.position, row.position + 1) for row in batch.decodes]
    ranges += [(row, row.start, row.end) for row in batch.chunks]
    spans = [s for row, *_ in ranges for s in row.spans]
    cells = [
        (i, s.group, row.slot, begin, end, s.start, s.stride, len(s.pages), row.request.first_position)
        for i, (row, begin, end) in enumerate(ranges)
        for s in row.spans
    ]
    row, group, slot, begin, end, start, stride, pages, first_position = np.array(cells).T
    lengths = local_tokens(end, start, stride, pages, page_tokens)
    first, last = touched(begin, end, start, stride, pages, page_tokens)
    new = {}
    for g in set(group[first < last].tolist()):
        at = np.flatnonzero((first < last) & (group == g))
        indices = [np.arange(first[i], last[i]) for i in at]
        held = [spans[i].pages[first[i] : last[i]] for i in at]
        new[g] = np.repeat(slot[at], (last - first)[at]), np.concatenate(indices), np.concatenate(held)
    return _Keys(page_tokens, row, group, (slot, begin, lengths, start, stride, first_position), new)


def _pack_rows(inputs: StepInputs, stage: int, batch: Batch, shape: StepShape) -> None:
    keys, placed = _keys_of(batch, shape.page_tokens), place_chunks(batch, shape)
    index_of_row = np.array([row.slot for row in batch.decodes] + [index for _, index, _ in placed])
    decodes = np.searchsorted(keys.row, len(batch.decodes))  # cells of decode rows
    for rows, part in ((inputs.decodes, slice(decodes)), (inputs.chunks, slice(decodes, None))):
        at = (stage, keys.group[part], index_of_row[keys.row[part]])
        leaves = (rows.slots, rows.positions, rows.kv_lens, rows.key_start, rows.key_stride, rows.rotary_offsets)
        for leaf, values in zip(leaves, keys.leaves, strict=True):
            leaf[at] = values[part]
    deltas = inputs.deltas
    for group, (slots, indices, pages) in keys.new.items():
        at = (stage, group, slice(len(slots)))
        deltas.slots[at], deltas.indices[at], deltas.pages[at] = slots, indices, pages
    for row, index, offset in placed:
        groups = slice(None) if row.group is None else row.group
        gap = shape.shared_chunks + 1
        stop = gap if row.group is None else None  # later rows of the same kind begin where this one ends
        inputs.chunks.cu_q_lens[stage, groups, index + 1 : stop] = offset + row.length


def _pack_entering(inputs: StepInputs, batch: Batch, shape: StepShape) -> None:
    for row in batch.decodes:
        if row.token is not None:
            at = (slice(None), slice(None) if row.group is None else row.group, row.slot)
            inputs.entering.tokens[at], inputs.entering.known[at] = row.token, 1
    for row, _, offset in place_chunks(batch, shape):
        groups = slice(None) if row.group is None else row.group
        tokens = slice(shape.slots + offset, shape.slots + offset + row.length)
        inputs.entering.tokens[:, groups, tokens] = row.request.prompt[row.start : row.end]


def _pack_leaving(inputs: StepInputs, batch: Batch, shape: StepShape) -> None:
    leaving, R = inputs.leaving, shape.slots
    sampled = [(row, row.slot, row.slot, row.position) for row in batch.decodes]
    placed = place_chunks(batch, shape)
    sampled += [(row, R + i, R + offset + row.length - 1, row.end - 1) for row, i, offset in placed if row.last]
    every_group = range(leaving.rows.shape[1])
    cells = [
        (group, index, token_row, row.slot, position, r.seed, r.temperature, r.top_p)
        for row, index, token_row, position in sampled
        for r in (row.request,)
        for group in (every_group if row.group is None else (row.group,))
    ]
    if cells:
        group, index, *columns = zip(*cells, strict=True)
        at = (slice(None), np.array(group), np.array(index))
        leaves = (leaving.rows, leaving.slots, leaving.positions, leaving.seeds, leaving.temperature, leaving.top_p)
        for leaf, values in zip(leaves, columns, strict=True):
            leaf[at] = values
