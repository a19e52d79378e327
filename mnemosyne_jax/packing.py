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
    deltas = [0] * inputs.decodes.slots.shape[1]  # pages made known so far, by group

    def put(rows, index: int, row: DecodeRow | ChunkRow, begin: int, end: int) -> None:
        for span in row.spans:
            g, at = span.group, (stage, span.group, index)
            rows.slots[at], rows.positions[at] = row.slot, begin
            rows.kv_lens[at] = span.local_tokens(end, shape.page_tokens)
            rows.key_start[at], rows.key_stride[at] = span.start, span.stride
            rows.rotary_offsets[at] = row.request.first_position
            first, last = span.touched(begin, end, shape.page_tokens)
            if first < last:
                new = (stage, g, slice(deltas[g], deltas[g] + last - first))
                inputs.deltas.slots[new] = row.slot
                inputs.deltas.indices[new] = np.arange(first, last)
                inputs.deltas.pages[new] = span.pages[first:last]
                deltas[g] += last - first

    for row in batch.decodes:
        put(inputs.decodes, row.slot, row, row.position, row.position + 1)
    for row, index, offset in place_chunks(batch, shape):
        put(inputs.chunks, index, row, row.start, row.end)
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

    def put(index: int, row: DecodeRow | ChunkRow, token_row: int, position: int) -> None:
        at = (slice(None), slice(None) if row.group is None else row.group, index)
        request = row.request
        leaving.rows[at], leaving.slots[at], leaving.positions[at] = token_row, row.slot, position
        leaving.seeds[at], leaving.temperature[at], leaving.top_p[at] = request.seed, request.temperature, request.top_p

    for row in batch.decodes:
        put(row.slot, row, row.slot, row.position)
    for row, index, offset in place_chunks(batch, shape):
        if row.last:
            put(R + index, row, R + offset + row.length - 1, row.end - 1)
