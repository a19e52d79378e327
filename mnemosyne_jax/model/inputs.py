"""What one tick needs from the host: a few hundred integers, in one buffer per device.

Rows of a tick are `[decode rows | shared chunk tokens | private chunk tokens]`; decode row i is
that of slot i, shared slots first. Every array stands in one int32 buffer
`[stage, group, words]`, so a tick costs one host-to-device copy, of a size that its StepShape fixes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.errors import RequestError

MOST_BUCKETS_OF_PAIRS = 5  # with kvp > 1 shared and private areas are compiled apart: at most 14 ticks


@dataclass(frozen=True)
class StepShape:
    """The static sizes of one compiled program.

    `hidden_areas` are the first rows in State.hidden of decodes, shared chunks and private chunks.
    """

    shared_slots: int
    private_slots: int
    shared_tokens: int
    private_tokens: int
    shared_chunks: int
    private_chunks: int
    page_tokens: int
    hidden_areas: tuple[int, int, int]

    @property
    def slots(self) -> int:
        """Decode rows: one for each slot."""
        return self.shared_slots + self.private_slots

    @property
    def chunk_tokens(self) -> int:
        return self.shared_tokens + self.private_tokens

    @property
    def tokens(self) -> int:
        """Rows of every linear layer."""
        return self.slots + self.chunk_tokens

    @property
    def chunk_rows(self) -> int:
        """Chunks of a tick, plus the gap between the shared and the private ones, which counts as a chunk."""
        if not self.chunk_tokens:
            return 0
        return self.shared_chunks + self.private_chunks + 1

    @property
    def areas(self) -> list[tuple[int, int]]:
        """(first row in State.hidden, rows of this program) of decodes, shared chunks, private chunks."""
        return list(zip(self.hidden_areas, (self.slots, self.shared_tokens, self.private_tokens), strict=True))

    def hidden_row(self, row: int) -> int:
        """Where State.hidden keeps a row of the tick."""
        for first, rows in self.areas:
            if row < rows:
                return first + row
            row -= rows
        raise IndexError(row)

    @property
    def sampled(self) -> int:
        """Rows whose logits are computed: every decode row, and the last token of every chunk."""
        return self.slots + self.chunk_rows

    @property
    def deltas(self) -> int:
        """New pages a batch can touch in one group: its chunks' pages, a partial one for each, one for each decode."""
        return self.slots + self.chunk_rows + -(-self.chunk_tokens // self.page_tokens)

    def holds(self, shared_tokens: int, private_tokens: int) -> bool:
        return self.shared_tokens >= shared_tokens and self.private_tokens >= private_tokens


def hidden_areas(serve: ServeConfig, mesh: MeshSpec) -> tuple[int, int, int]:
    """First row in State.hidden of the decodes, of the shared and of the private chunks: each area at its largest."""
    slots = serve.slots(mesh)
    return 0, slots, slots + (serve.buckets[-1] if mesh.kvp > 1 else 0)


def step_shapes(serve: ServeConfig, mesh: MeshSpec) -> tuple[StepShape, ...]:
    """All programs of a run, cheapest first: no chunk, each bucket, and with kvp > 1 a few pairs (shared, private).

    Raises: RequestError if they would be too many to compile.
    """
    buckets = serve.buckets
    count = len(buckets)
    if mesh.kvp > 1 and count > MOST_BUCKETS_OF_PAIRS:
        raise RequestError(
            "serve.chunk_buckets", buckets, "at most 5 with kvp > 1: shared and private ones are compiled"
        )
    pairs = {(0, 0)} | {(0, b) for b in buckets}
    if mesh.kvp > 1:
        small, large = buckets[0], buckets[-1]
        # Beside a long prompt's chunk of any size a short one has a place, or it would wait for the long one's end. A
        # smaller chunk that is alone does without a program of its own; a prompt alone runs large ones.
        pairs |= {(b, small) for b in buckets} | {(large, 0), (small, large), (large, large)}
    shapes = [
        StepShape(
            shared_slots=serve.shared_slots(mesh),
            private_slots=serve.private_rows,
            shared_tokens=shared,
            private_tokens=private,
            shared_chunks=serve.shared_chunks if shared else 0,
            private_chunks=serve.private_chunks if private else 0,
            page_tokens=serve.page_tokens,
            hidden_areas=hidden_areas(serve, mesh),
        )
        for shared, private in pairs
    ]
    return tuple(sorted(shapes, key=lambda s: (s.tokens, s.shared_tokens)))


@flax.struct.dataclass
class Rows:
    """R sequences of one stage's batch in one group: their queries, and the affine pages of their keys here.

    `positions` is the position of a row's first query; `kv_lens` counts the local keys once this batch is written;
    `rotary_offsets` is added to positions before rotation; queries of row r are cu_q_lens[r] .. cu_q_lens[r+1].
    """

    slots: Any
    positions: Any
    kv_lens: Any
    key_start: Any
    key_stride: Any
    rotary_offsets: Any
    cu_q_lens: Any


@flax.struct.dataclass
class Deltas:
    """Pages that a batch is the first to touch: page_table[slots, indices] = pages. Padding has a slot out of range."""

    slots: Any
    indices: Any
    pages: Any


@flax.struct.dataclass
class Entering:
    """Tokens of the batch entering stage 0, the same in every stage: the vocabulary is split over all of them.

    A decode row whose `known` is 0 takes its token from the register of its slot.
    """

    tokens: Any
    known: Any


@flax.struct.dataclass
class Leaving:
    """Whose next token comes of the batch leaving the last stage, the same in every stage.

    `rows` index the tick's rows; `slots` say whose register takes the greedy token (out of range: nobody's).
    """

    rows: Any
    slots: Any


@flax.struct.dataclass
class Draws:
    """Rows of the batch that left the pipe whose tokens are drawn, [X] each, the same on every device.

    `rows` index State.hidden of group `groups`; the register `slots` (out of range: nobody's) of that group takes the
    token, of every group where `shared` is not 0. On their way to the devices all are int32, one below the other.
    """

    rows: Any
    groups: Any
    shared: Any
    slots: Any
    positions: Any
    seeds: Any
    temperature: Any
    top_p: Any


DRAW_DTYPES = (np.int32,) * 5 + (np.uint32, np.float32, np.float32)  # of the fields of Draws


def unpack_draws(buffer_8X: jax.Array) -> Draws:
    """Draws read from their buffer on the device."""
    return Draws(*(lax.bitcast_convert_type(row, dtype) for row, dtype in zip(buffer_8X, DRAW_DTYPES, strict=True)))


@flax.struct.dataclass
class StepInputs:
    """One tick's inputs; in the buffer every leaf has leading dimensions [stage, group]."""

    entering: Entering
    decodes: Rows
    chunks: Rows
    deltas: Deltas
    leaving: Leaving


@functools.cache
def _template(shape: StepShape) -> StepInputs:
    """StepInputs of slices: where each leaf lies in the buffer."""
    R, C, X, E = shape.slots, shape.chunk_rows, shape.sampled, shape.deltas
    sizes = StepInputs(
        entering=Entering(shape.tokens, R),
        decodes=Rows(R, R, R, R, R, R, R + 1),
        chunks=Rows(C, C, C, C, C, C, C + 1),
        deltas=Deltas(E, E, E),
        leaving=Leaving(X, X),
    )
    leaves, tree = jax.tree.flatten(sizes)
    ends = np.cumsum(leaves)
    return jax.tree.unflatten(tree, [slice(int(end) - size, int(end)) for end, size in zip(ends, leaves, strict=True)])


def buffer_words(shape: StepShape) -> int:
    """int32 words per stage and group that a tick of this shape sends to the devices."""
    return max(part.stop for part in jax.tree.leaves(_template(shape)))


def views(shape: StepShape, buffer: np.ndarray) -> StepInputs:
    """StepInputs whose leaves are views into the last axis of an int32 buffer: writing to them packs it."""

    return jax.tree.map(lambda part: buffer[..., part], _template(shape))


def unpack(shape: StepShape, buffer_W: jax.Array) -> StepInputs:
    """StepInputs of one stage and group, read from its buffer on the device."""

    return jax.tree.map(lambda part: buffer_W[part], _template(shape))


def row_of_token(rows: Rows, T: int) -> jax.Array:
    """The row of each of T tokens [T]; tokens past the last row count to it."""
    row_T = jnp.searchsorted(rows.cu_q_lens, jnp.arange(T), side="right", method="compare_all") - 1
    return jnp.clip(row_T, 0, rows.slots.shape[0] - 1)


def positions_of(rows: Rows, T: int) -> tuple[jax.Array, jax.Array]:
    """(position_T, rotary_position_T) of each of T tokens."""
    row_T = row_of_token(rows, T)
    position_T = jnp.take(rows.positions, row_T) + jnp.arange(T) - jnp.take(rows.cu_q_lens, row_T)
    return position_T, position_T + jnp.take(rows.rotary_offsets, row_T)
