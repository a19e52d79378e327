"""The packed buffer against an obviously right account, token by token, of who works on what at which stage."""

from collections import deque

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.model.inputs import StepShape, buffer_words, step_shapes, unpack_draws, views
from mnemosyne_jax.packing import leaving_rows, pack, pack_draws, smallest_shape
from mnemosyne_jax.serve.batch import Batch, ChunkRow, DecodeRow
from mnemosyne_jax.serve.pages import Span, grown_layout, private_layout, striped_layout
from mnemosyne_jax.serve.request import Request

PAGE = 4
PROMPT = 60  # tokens of every request here; its pages number 20
SERVE = ServeConfig(
    page_tokens=PAGE, private_rows=4, shared_rows=2, private_chunks=2, shared_chunks=1, chunk_tokens=24,
    chunk_buckets=(2, 8, 24), span_tokens=16,
)  # fmt: skip


def group_of_page(spans):
    """{global page: (group, local index, page)}: every page of a request."""
    held = [(s.start + s.stride * j, (s.group, j, int(p))) for s in spans for j, p in enumerate(s.pages)]
    assert len(dict(held)) == len(held)
    return dict(held)


@st.composite
def pipes(draw):
    """(groups, batches in the pipe): each slot's request somewhere in its life, random rows in every batch."""
    groups, spp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mesh, serve = MeshSpec(kvp=groups, spp=spp), SERVE
    shared = serve.shared_slots(mesh)
    owners = []  # (request, slot, group, spans)
    for group in (None, *range(groups)):
        for slot in range(shared) if group is None else range(shared, serve.slots(mesh)):
            request = Request(
                f"{group} {slot}", random.integers(0, 1000, PROMPT), 20, seed=int(random.integers(2**32)),
                temperature=random.random(), top_p=random.random(), first_position=int(random.integers(9)),
            )  # fmt: skip
            striped = striped_layout(20, groups) if random.random() < 0.5 else grown_layout(20, groups, 4)
            layout = list(enumerate(striped)) if group is None else [(group, private_layout(20)[0])]
            spans = [Span(g, a, b, random.permutation(999)[:n].astype(np.int32)) for g, (a, b, n) in layout]
            owners.append((request, slot, group, tuple(spans)))
    return groups, [_random_batch(random, owners, groups, tick) for tick in range(spp)]


def _random_batch(random, owners, groups, tick):
    decodes, chunks = [], []
    room = dict.fromkeys((None, *range(groups)), 10)  # prompt tokens of each kind: within one budget of 24 together
    for i in random.permutation(len(owners)):
        owner, group, kind = owners[i], owners[i][2], random.integers(4)
        taken = sum(row.group == group for row in chunks)
        if kind == 0:
            token = int(random.integers(1000)) if random.random() < 0.3 else None
            decodes.append(DecodeRow(*owner, position=PROMPT + int(random.integers(19)), token=token))
        elif kind == 1 and taken < (SERVE.shared_chunks if group is None else SERVE.private_chunks) and room[group]:
            length = int(random.integers(1, room[group] + 1))
            start = PROMPT - length if random.random() < 0.5 else int(random.integers(PROMPT - length))
            room[group] -= length
            chunks.append(ChunkRow(*owner, start, length))
    return Batch(tick, tuple(decodes), tuple(chunks))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pipes())
def test_buffer_is_what_each_stage_and_group_should_get(pipe):
    groups, history = pipe
    shapes = step_shapes(SERVE, MeshSpec(kvp=groups, spp=len(history)))
    shape = smallest_shape(shapes, history, groups)
    buffer = pack(shape, history, groups)
    assert buffer.dtype == np.int32 and buffer.shape == (len(history), groups, buffer_words(shape))
    got = views(shape, buffer)
    for stage, batch in enumerate(history):
        for g in range(groups):
            check_rows(got, shape, stage, g, batch)
            check_deltas(got, shape, stage, g, batch)
            check_ends(got, shape, stage, g, history[0], history[-1])


def mine(rows, group):
    return [row for row in rows if row.group in (None, group)]


def check_rows(got, shape, stage, g, batch):
    """Decode row = slot; chunk rows cut the chunk area, shared ones first; keys are counted one by one."""
    decodes = {row.slot: row for row in mine(batch.decodes, g)}
    at = lambda rows, name, index: int(getattr(rows, name)[stage, g, index])  # noqa: E731
    assert got.decodes.cu_q_lens[stage, g].tolist() == list(range(shape.slots + 1))
    for slot in range(shape.slots):
        row = decodes.get(slot)
        assert at(got.decodes, "slots", slot) == slot
        if row is None:
            assert at(got.decodes, "kv_lens", slot) == 0  # nobody's keys are read or written
        else:
            check_keys(at, got.decodes, slot, row, g, row.position, row.position + 1)
    cu = got.chunks.cu_q_lens[stage, g]
    assert (np.diff(cu) >= 0).all() and cu[0] == 0
    areas = {None: (0, 0, shape.shared_tokens), g: (shape.shared_chunks + 1, shape.shared_tokens, shape.chunk_tokens)}
    for group, (index, offset, end) in areas.items():
        for row in (row for row in batch.chunks if row.group == group):
            assert (cu[index], cu[index + 1]) == (offset, offset + row.length)
            check_keys(at, got.chunks, index, row, g, row.start, row.end)
            index, offset = index + 1, offset + row.length
        assert offset <= end
        used = (
            []
            if not shape.chunk_tokens
            else range(index, shape.shared_chunks + 1 if group is None else shape.chunk_rows)
        )
        assert all(at(got.chunks, "kv_lens", i) == 0 for i in used)


def check_keys(at, rows, index, row, g, begin, end):
    held = group_of_page(row.spans)
    span = next(s for s in row.spans if s.group == g)
    values = [at(rows, name, index) for name in ("slots", "positions", "rotary_offsets", "key_start", "key_stride")]
    assert values == [row.slot, begin, row.request.first_position, span.start, span.stride]
    assert at(rows, "kv_lens", index) == sum(held[t // PAGE][0] == g for t in range(end))


def check_deltas(got, shape, stage, g, batch):
    """Every page of this group of which the batch holds the first token, once; the rest is padding."""
    wanted = {}
    ranges = [(row, [row.position]) for row in batch.decodes] + [
        (row, range(row.start, row.end)) for row in batch.chunks
    ]
    for row, positions in ranges:
        held = group_of_page(row.spans)
        for t in positions:
            if t % PAGE == 0 and held[t // PAGE][0] == g:
                wanted[row.slot, held[t // PAGE][1]] = held[t // PAGE][2]
    slots, indices, pages = (x[stage, g].tolist() for x in (got.deltas.slots, got.deltas.indices, got.deltas.pages))
    real = [(s, i, p) for s, i, p in zip(slots, indices, pages, strict=True) if s < shape.slots]
    assert sorted(real) == sorted((s, i, p) for (s, i), p in wanted.items())


def check_ends(got, shape, stage, g, entering, leaving):
    """Every stage knows the tokens that enter and which rows that leave give a token."""
    tokens, known = {}, {row.slot: row.token for row in mine(entering.decodes, g) if row.token is not None}
    sampled = {row.slot: (row.slot, row.slot) for row in mine(leaving.decodes, g)}
    for batch in (entering, leaving):
        offsets = {None: (0, shape.slots), g: (shape.shared_chunks + 1, shape.slots + shape.shared_tokens)}
        for row in mine(batch.chunks, g):
            index, offset = offsets[row.group]
            offsets[row.group] = index + 1, offset + row.length
            if batch is entering:
                tokens |= {offset + i: int(row.request.prompt[row.start + i]) for i in range(row.length)}
            if batch is leaving and row.last:
                sampled[shape.slots + index] = (offset + row.length - 1, row.slot)
    assert np.flatnonzero(got.entering.known[stage, g]).tolist() == sorted(known)
    assert got.entering.tokens[stage, g].tolist() == [(tokens | known).get(i, 0) for i in range(shape.tokens)]
    for i in range(shape.sampled):
        row, slot = got.leaving.rows[stage, g, i], got.leaving.slots[stage, g, i]
        assert (row, slot) == sampled[i] if i in sampled else slot == shape.slots


@settings(max_examples=50, deadline=None, derandomize=True)
@given(pipes())
def test_draws_say_where_the_rows_that_left_are_and_whose_they_were(pipe):
    groups, history = pipe
    shape = smallest_shape(step_shapes(SERVE, MeshSpec(kvp=groups, spp=len(history))), history, groups)
    X, leaving = 16, leaving_rows(history[-1], shape)
    buffer = pack_draws(leaving, shape, X)
    draws = jax.tree.map(np.asarray, unpack_draws(buffer))
    decodes, shared, private = shape.hidden_areas
    area_of = {row: decodes + row for row in range(shape.slots)}
    area_of |= {shape.slots + i: shared + i for i in range(shape.shared_tokens)}
    area_of |= {shape.slots + shape.shared_tokens + i: private + i for i in range(shape.private_tokens)}
    assert len(leaving) == len(history[-1].decodes) + sum(row.last for row in history[-1].chunks)
    for i, (row, _, token_row) in enumerate(leaving):
        r, position = row.request, row.position if isinstance(row, DecodeRow) else PROMPT - 1
        assert (draws.rows[i], draws.slots[i], draws.positions[i]) == (area_of[token_row], row.slot, position)
        assert draws.shared[i] if row.group is None else draws.groups[i] == row.group and not draws.shared[i]
        assert (draws.seeds[i], draws.temperature[i], draws.top_p[i]) == (
            r.seed, np.float32(r.temperature), np.float32(r.top_p),
        )  # fmt: skip
    assert (draws.slots[len(leaving) :] >= shape.slots).all() and (draws.temperature > 0).all()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pipes())
def test_smallest_shape_is_the_cheapest_that_holds_the_pipe(pipe):
    groups, history = pipe
    shapes = step_shapes(SERVE, MeshSpec(kvp=groups, spp=len(history)))
    holds = [
        s for s in shapes
        if all(b.chunk_tokens(None) <= s.shared_tokens for b in history)
        and all(b.chunk_tokens(g) <= s.private_tokens for b in history for g in range(groups))
    ]  # fmt: skip
    assert smallest_shape(shapes, history, groups).tokens == min(s.tokens for s in holds)


@pytest.mark.parametrize("kvp", [1, 2])
def test_programs_are_few_and_ordered_by_cost(kvp):
    shapes = step_shapes(SERVE, MeshSpec(kvp=kvp))
    assert len(set(shapes)) == len(shapes) <= 2 * len(SERVE.buckets) + 4 and shapes[0].chunk_tokens == 0
    beside = {s.shared_tokens for s in shapes if s.private_tokens == SERVE.buckets[0]}
    assert kvp == 1 or beside == {0, *SERVE.buckets}  # beside any shared chunk
    assert [s.tokens for s in shapes] == sorted(s.tokens for s in shapes)
    assert any(s.holds(24 * (kvp > 1), 24) for s in shapes)


@pytest.mark.parametrize("groups", [1, 2])
def test_buffer_does_not_grow_with_the_context(groups):
    """From a page to 10 million tokens: as many bytes, and a decode sends at most one page number."""
    mesh, sizes = MeshSpec(kvp=groups), set()
    for tokens in (PAGE, 10_000_000):
        layout = striped_layout(tokens // PAGE + 1, groups)
        spans = tuple(Span(g, a, b, np.arange(n, dtype=np.int32)) for g, (a, b, n) in enumerate(layout))
        row = DecodeRow(Request("a", np.zeros(1, np.int32), 1), 0, None if groups > 1 else 0, spans, tokens)
        history = deque([Batch(0, (row,))])
        shape = smallest_shape(step_shapes(SERVE, mesh), history, groups)
        assert isinstance(shape, StepShape) and shape.chunk_tokens == 0
        buffer = pack(shape, history, groups)
        sizes.add(buffer.nbytes)
        assert (views(shape, buffer).deltas.slots < shape.slots).sum() == 1
        assert views(shape, buffer).decodes.kv_lens[..., 0].sum() == tokens + 1
    assert len(sizes) == 1
