"""From the batches in the pipe to the integers one tick sends: the only bridge between control and data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mnemosyne_jax.model.inputs import StepInputs, StepShape, buffer_words, views
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow


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


def _pack_rows(inputs: StepInputs, stage: int, batch: Batch, shape: StepShape) -> None:
    pages_known = [0] * inputs.decodes.slots.shape[1]  # of this batch, by group
    placed = place_chunks(batch, shape)
    decodes = [(row, row.slot, row.position, row.position + 1) for row in batch.decodes]
    chunks = [(row, index, row.start, row.end) for row, index, _ in placed]
    for rows, entries in ((inputs.decodes, decodes), (inputs.chunks, chunks)):
        cells = []  # one for each row and group: (group, index, and the values of `leaves`)
        for row, index, begin, end in entries:
            slot, first_position = row.slot, row.request.first_position
            for span in row.spans:
                keys = span.local_tokens(end, shape.page_tokens)
                cells.append((span.group, index, slot, begin, keys, span.start, span.stride, first_position))
                first, last = span.touched(begin, end, shape.page_tokens)
                if first < last:
                    at = pages_known[span.group]
                    pages_known[span.group] += last - first
                    new = (stage, span.group, slice(at, at + last - first))
                    inputs.deltas.slots[new] = slot
                    inputs.deltas.indices[new] = np.arange(first, last)
                    inputs.deltas.pages[new] = span.pages[first:last]
        leaves = (rows.slots, rows.positions, rows.kv_lens, rows.key_start, rows.key_stride, rows.rotary_offsets)
        _scatter(leaves, stage, cells)
    for row, index, offset in placed:
        groups = slice(None) if row.group is None else row.group
        gap = shape.shared_chunks + 1
        stop = gap if row.group is None else None  # later rows of the same kind begin where this one ends
        inputs.chunks.cu_q_lens[stage, groups, index + 1 : stop] = offset + row.length


def _scatter(leaves: Sequence[np.ndarray], stages: int | slice, cells: Sequence[tuple]) -> None:
    """leaves[i][stages, group, index] = value i of every cell (group, index, *values); one assignment for each leaf."""
    if cells:
        group, index, *columns = zip(*cells, strict=True)
        at = (stages, np.array(group), np.array(index))
        for leaf, column in zip(leaves, columns, strict=True):
            leaf[at] = column


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
    cells = []
    for row, index, token_row, position in sampled:
        r = row.request
        values = (index, token_row, row.slot, position, r.seed, r.temperature, r.top_p)
        cells += [(group, *values) for group in (every_group if row.group is None else (row.group,))]
    leaves = (leaving.rows, leaving.slots, leaving.positions, leaving.seeds, leaving.temperature, leaving.top_p)
    _scatter(leaves, slice(None), cells)
