"""Ticks to be timed: batches such as a scheduler makes, of chosen sizes, over pages that hold anything.

What a tick takes depends on how many rows and keys it has, not on what they hold. So no prompt is computed: page tables
are filled once, and a row is said to have as many keys as wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.fitting import Loads
from mnemosyne_jax.config import MeshSpec, ModelConfig, ServeConfig
from mnemosyne_jax.model.inputs import StepShape, step_shapes
from mnemosyne_jax.packing import smallest_shape
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow
from mnemosyne_jax.serve.pages import Span, private_layout, striped_layout
from mnemosyne_jax.serve.request import Request

NO_CHUNK = (1, 0, 0)


@dataclass(frozen=True, eq=False)
class TimedTick:
    """A batch to be timed: what `kind` of load it is (empty, decode, chunk or mixed), and in words which."""

    kind: str
    words: str
    batch: Batch


@dataclass(frozen=True, eq=False)
class TickLoads:
    """Makes rows of any size in the slots and pages of a run; the same in every group."""

    serve: ServeConfig
    mesh: MeshSpec
    pool_pages: int
    vocab: int
    page_order: np.ndarray = field(init=False)  # as after much coming and going
    request: Request = field(init=False)

    def __post_init__(self):
        random = np.random.default_rng(0)
        longest = max(self.longest(shared=True), self.serve.buckets[-1])
        prompt = random.integers(self.vocab, size=longest + 1, dtype=np.int32)
        object.__setattr__(self, "page_order", random.permutation(self.pool_pages).astype(np.int32))
        object.__setattr__(self, "request", Request("timed", prompt, 1, stop_ids=()))

    def longest(self, shared: bool) -> int:
        """Tokens of one sequence that has all pages of a group, or of all groups."""
        return self.pool_pages * self.serve.page_tokens * (self.mesh.kvp if shared else 1)

    def page_table(self) -> np.ndarray:
        """The pages of every slot [slot, index], which could have all of a group's.

        Slots begin apart: n of them that are spread evenly share no page until they have an n-th of the pages each.
        """
        shared, private = self.serve.shared_slots(self.mesh), self.serve.private_rows
        first = [i * self.pool_pages // n for n in (shared, private) for i in range(n)]
        return self.page_order[(np.array(first)[:, None] + np.arange(self.pool_pages)) % self.pool_pages]

    def _placed(self, count: int, tokens: int, shared: bool) -> Iterator[tuple[int, int | None, tuple[Span, ...]]]:
        """(slot, group, spans) of `count` sequences of so many tokens in each group, or in all."""
        table, pages, kvp = self.page_table(), -(-tokens // self.serve.page_tokens), self.mesh.kvp
        first, slots = self.serve.shared_slots(self.mesh), self.serve.private_rows
        if shared:
            first, slots = 0, first
        for i in range(count):
            slot = first + i * slots // count
            for group in [None] if shared else range(kvp):
                layout = striped_layout(pages, kvp) if group is None else private_layout(pages)
                groups = range(kvp) if group is None else [group]
                spans = zip(groups, layout, strict=True)
                yield slot, group, tuple(Span(g, start, stride, table[slot, :n]) for g, (start, stride, n) in spans)

    def decodes(self, count: int, keys: int, shared: bool = False) -> tuple[DecodeRow, ...]:
        """Decode rows of so many keys each."""
        token = int(self.request.prompt[0])
        return tuple(
            DecodeRow(self.request, slot, group, spans, keys - 1, token)
            for slot, group, spans in self._placed(count, keys, shared)
        )

    def chunks(self, count: int, tokens: int, keys_before: int, shared: bool = False) -> tuple[ChunkRow, ...]:
        """Chunk rows of so many tokens each."""
        return tuple(
            ChunkRow(self.request, slot, group, spans, keys_before, tokens)
            for slot, group, spans in self._placed(count, keys_before + tokens, shared)
        )

    def empty(self, shape: StepShape) -> tuple[ChunkRow, ...]:
        """Chunk rows that fill a program's chunk areas and have no keys, as of sequences that hold none anywhere."""
        areas = [(None, shape.shared_tokens), *((g, shape.private_tokens) for g in range(self.mesh.kvp))]
        nothing = np.zeros(0, np.int32)
        return tuple(
            ChunkRow(self.request, 0, group, (Span(group or 0, 0, 1, nothing),), 0, tokens)
            for group, tokens in areas
            if tokens
        )


def designed(make: TickLoads) -> list[TimedTick]:
    """The ticks of a calibration: each program, then decodes, chunks and both at contexts up to all of a group."""
    ticks = [
        TimedTick(
            "empty", f"{shape.shared_tokens} + {shape.private_tokens} chunk rows", Batch(0, (), make.empty(shape))
        )
        for shape in step_shapes(make.serve, make.mesh)
    ]
    ticks += _designed(make, make.serve.private_rows, make.serve.private_chunks, shared=False)
    ticks += _designed(make, make.serve.shared_slots(make.mesh), make.serve.shared_chunks, shared=True)
    return ticks


def _designed(make: TickLoads, most_rows: int, most_chunks: int, shared: bool) -> Iterator[TimedTick]:
    """Those of one kind of sequence, private or shared; none if a run has no slots for it."""
    if not most_rows:
        return
    longest, whose, buckets = make.longest(shared), "shared" if shared else "private", make.serve.buckets
    contexts = [pages * make.serve.page_tokens for pages in _quarters(longest // make.serve.page_tokens, 1)]
    for count in _quarters(most_rows, 1):
        for keys in (keys for keys in contexts if count * keys <= longest):
            yield TimedTick("decode", f"{count} {whose} of {keys}", Batch(0, make.decodes(count, keys, shared)))
    parts = {tokens for bucket in buckets for tokens in (bucket, bucket * 5 // 8)}  # programs full and not so full
    alone = [(1, tokens) for tokens in (*sorted(parts), max(1, buckets[0] // 4))]
    several = min(most_chunks, most_rows, buckets[0])
    together = [(several, bucket // several) for bucket in buckets if several > 1]
    for count, tokens in alone + together:
        for keys in (keys for keys in (*contexts, tokens) if tokens <= keys <= longest // count):
            chunks = make.chunks(count, tokens, keys - tokens, shared)
            yield TimedTick("chunk", f"{count} {whose} of {tokens} after {keys - tokens}", Batch(0, (), chunks))
    beside = max(1, contexts[min(1, len(contexts) - 1)] // most_rows)
    for tokens in buckets if most_rows > 1 else ():
        for keys in (keys for keys in contexts if tokens <= keys):
            chunks = make.chunks(1, tokens, keys - tokens, shared)
            # The chunk has the first slot, whose place among the decode rows stays free.
            rows = [row for row in make.decodes(most_rows, beside, shared) if row.slot != chunks[0].slot]
            words = f"1 {whose} of {tokens} after {keys - tokens}, {most_rows - 1} of {beside}"
            yield TimedTick("mixed", words, Batch(0, tuple(rows), chunks))


def _quarters(top: int, least: int) -> list[int]:
    """top, a quarter of it, and so on, while at least `least`."""
    return [top] + (_quarters(top // 4, least) if top // 4 >= least else [])


def loads_of(
    batches: Sequence[Batch], model: ModelConfig, serve: ServeConfig, mesh: MeshSpec, dtype_bytes: int
) -> Loads:
    """The loads of ticks whose every stage holds the batch, as the scheduler counts them."""
    shapes = [smallest_shape(step_shapes(serve, mesh), [batch], mesh.kvp) for batch in batches]
    most = max(1, *(len(batch.chunks) for batch in batches))
    chunks = np.tile(np.array(NO_CHUNK, np.float64), (len(batches), mesh.kvp, most, 1))
    decode_keys = np.zeros((len(batches), mesh.kvp))
    for i, batch in enumerate(batches):
        for row in batch.decodes:
            for span in row.spans:
                decode_keys[i, span.group] += span.local_tokens(row.position + 1, serve.page_tokens)
        for c, row in enumerate(batch.chunks):
            for span in row.spans:
                before, after = (span.local_tokens(tokens, serve.page_tokens) for tokens in (row.start, row.end))
                chunks[i, span.group, c] = row.length, before, after - before
    return Loads(
        model=model,
        mesh=mesh,
        dtype_bytes=dtype_bytes,
        rows=np.array([shape.tokens for shape in shapes]),
        merged_rows=np.array([shape.shared_slots + shape.shared_tokens for shape in shapes]),
        chunks=chunks,
        decode_keys=decode_keys,
    )
