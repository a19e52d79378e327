"""The Mosaic kernels, interpreted on a CPU with race detection, against `reference`, in every shape that ships.

Interpreted copies are synchronous: a wait that is missing shows on a GPU only. Warpgroups that wait hold a thread of
XLA each; the eight devices of conftest bring enough of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import merge as merge_kernel
from pallas_kernels import mosaic, reference, work
from pallas_kernels import tiling as cutting
from pallas_kernels.reference import MASKED
from pallas_kernels.tiling import Tiling
from tests.test_kernel_lowering import shipped

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
B, LAYERS, PAGES, COLUMNS = mosaic.PAGE_TOKENS, 2, 12, 6
# Weights are rounded to the cache's type before they meet the values; statistics stay float32.
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4}


@pytest.fixture(autouse=True, scope="module")
def two_sms():
    """Work lists of a chip with two SMs: short enough to interpret. Some merges take a head at a time, others all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "SMS", 2)
        patch.setattr(merge_kernel, "MANY_CTAS", 24)
        yield


@pytest.fixture(autouse=True)
def no_race(capsys):
    """Where the interpreter finds a race, jax 0.12 raises and 0.11 prints: either fails the test."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


@dataclasses.dataclass
class Case:
    """A call on a cache that is NaN wherever no row of it has a key."""

    q_TNH: jax.Array
    kv_LP2KBH: jax.Array
    table_SJ: np.ndarray
    cu_q_lens_R1: np.ndarray
    positions_T: np.ndarray
    rows: dict[str, np.ndarray]
    layer: int = 1

    def keys(self, row: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """(where the keys of a row lie: pages and offsets, their positions)."""
        slot, stored, start, stride = (x[row] for x in self.rows.values())
        at = np.arange(stored)
        return (self.table_SJ[slot, at // B], at % B), (start + stride * (at // B)) * B + at % B

    def queries(self, row: int) -> range:
        return range(*self.cu_q_lens_R1[row : row + 2])


def make_case(
    dtype, heads, kv_heads, head_dim, lens, firsts, stored, starts, strides, padding=0, integers=False
) -> Case:
    """Consecutive queries from `firsts` on, to which later keys matter more: maxima grow from page to page.

    With `integers` all keys weigh the same and values are small and whole.
    """
    rng = np.random.default_rng(0)
    R = len(lens)
    cu = np.append(0, np.cumsum(lens)).astype(np.int32)
    positions = np.append(np.concatenate([f + np.arange(n) for f, n in zip(firsts, lens, strict=True)]), [7] * padding)
    names = ("slots_R", "kv_lens_R", "key_start_R", "key_stride_R")
    rows = (rng.permutation(R + 1)[:R], stored, starts, strides)
    table, free = rng.integers(0, PAGES, (R + 1, COLUMNS)), list(rng.permutation(PAGES))
    kv = np.full((LAYERS, PAGES, 2, kv_heads, B, head_dim), np.nan)
    q = rng.normal(size=(cu[-1] + padding, heads, head_dim)) * (not integers)
    case = Case(
        jnp.asarray(q, dtype),
        kv,
        table.astype(np.int32),
        cu,
        positions.astype(np.int32),
        {name: np.array(x, np.int32) for name, x in zip(names, rows, strict=True)},
    )
    for r in range(R):
        used = -(-stored[r] // B)
        case.table_SJ[case.rows["slots_R"][r], :used] = [free.pop() for _ in range(used)]
        (pages, offsets), _ = case.keys(r)
        shape = (stored[r], 2, kv_heads, head_dim)
        values = rng.integers(-8, 9, shape).astype(float) if integers else rng.normal(size=shape)
        values[:, 0] *= np.linspace(0.5, 3, stored[r])[:, None, None]
        kv[case.layer, pages, :, :, offsets] = values
    case.kv_LP2KBH = jnp.asarray(kv, dtype)
    return case


@functools.partial(jax.jit, static_argnames=("tiling", "singles", "dtype"))
def attend_tiled(
    q_TNH, kv_LP2KBH, layer, table_SJ, *, cu_q_lens_R1, q_positions_T, tiling, singles=0, dtype=jnp.float32, **rows_R
):
    """`mosaic.chunked_prefill` with a tiling of one's own."""
    K = kv_LP2KBH.shape[3]
    cut = dict(heads_per_kv=q_TNH.shape[1] // K, kv_heads=K, page_tokens=B, tiling=tiling, singles=singles)
    listed = work.work_list(cu_q_lens_R1, q_positions_T, **rows_R, **cut)
    return mosaic.attend_work(q_TNH, kv_LP2KBH, layer, table_SJ, listed, dtype=dtype, interpret=INTERPRET)


prefill = jax.jit(functools.partial(mosaic.chunked_prefill, interpret=INTERPRET))
decode = jax.jit(functools.partial(mosaic.paged_decode, interpret=INTERPRET))
merge = jax.jit(functools.partial(mosaic.merge_partials, interpret=INTERPRET))
expected_prefill = jax.jit(reference.chunked_prefill)


def call(f, case: Case, **options):
    """(out, lse) of a kernel as numpy arrays."""
    ragged = dict(q_positions_R=case.positions_T)
    if f is not decode:
        ragged = dict(q_positions_T=case.positions_T, cu_q_lens_R1=case.cu_q_lens_R1)
    results = f(case.q_TNH, case.kv_LP2KBH, case.layer, case.table_SJ, **ragged, **case.rows, **options)
    assert [x.dtype for x in results] == [options.get("dtype", np.float32), np.float32]
    return tuple(map(np.asarray, results))


def check(got, case: Case):
    """As the reference has it in float32; queries that see nothing, to the bit."""
    in_float32 = dataclasses.replace(
        case, q_TNH=case.q_TNH.astype(jnp.float32), kv_LP2KBH=case.kv_LP2KBH.astype(jnp.float32)
    )
    out, lse = call(expected_prefill, in_float32)
    np.testing.assert_allclose(got[0], out, rtol=0, atol=TOLERANCE[case.q_TNH.dtype.name])
    np.testing.assert_allclose(got[1], lse, rtol=0, atol=1e-5)
    blind = lse == np.float32(MASKED)
    assert blind.any() and not blind.all()
    assert (got[0][blind] == 0).all() and (got[1][blind] == np.float32(MASKED)).all()


# Each shape that ships, by (rows, stages, heads together, CTAs, head dim): (dtype, kv heads, query heads for each,
# queries of the longest row: they fill two tiles, all warpgroups or neither; waves that cut its five pages in two or
# three).
SHAPES = {
    (64, 2, None, 1, 64): ("bfloat16", 1, 4, 18, 2),
    (64, 2, None, 1, 128): ("float16", 2, 1, 5, 2),
    (128, 2, 2, 1, 64): ("float16", 1, 3, 24, 1),
    (128, 2, 2, 1, 128): ("bfloat16", 4, 2, 9, 2),
    (256, 2, 2, 2, 128): ("bfloat16", 1, 4, 34, 2),
    (256, 2, 1, 2, 128): ("bfloat16", 2, 2, 5, 2),
    (192, 2, 2, 1, 64): ("bfloat16", 1, 4, 34, 1),
    (192, 2, 1, 1, 64): ("float16", 2, 1, 5, 2),
}


def attend_shape(shape, case: Case) -> tuple[np.ndarray, ...]:
    rows, stages, heads_together, ctas, _ = shape
    *_, waves = SHAPES[shape]
    return call(attend_tiled, case, tiling=Tiling(rows, stages, waves, 1, heads_together, ctas))


@functools.cache
def prefill_case(shape) -> tuple[Case, tuple[np.ndarray, ...]]:
    """(a prefill, what the kernel makes of it). Its rows: one over five pages, the last partly full; an empty one; one
    without keys; one that sees its first key half way. Then padding."""
    dtype, K, G, queries, _ = SHAPES[shape]
    case = make_case(
        dtype,
        K * G,
        K,
        shape[-1],
        lens=[queries, 0, 1, 3],
        firsts=[508, 9, 5, 126],
        stored=[600, 128, 0, 200],
        starts=[0, 0, 0, 1],
        strides=[1, 1, 1, 2],
        padding=1,
    )
    return case, attend_shape(shape, case)


@pytest.mark.parametrize("shape", SHAPES)
def test_chunked_prefill(shape):
    case, got = prefill_case(shape)
    check(got, case)


@pytest.mark.parametrize("f", [decode, prefill])
def test_one_query_a_row(f):
    """Rows over five pages; without keys; over one; over every third, up to the middle of the second; over none."""
    case = make_case(
        "bfloat16",
        16,
        1,
        128,
        lens=[1] * 5,
        firsts=[598, 9, 0, 530, 10],
        stored=[599, 0, 128, 200, 100],
        starts=[0, 0, 0, 1, 9],
        strides=[1, 1, 1, 3, 1],
    )
    check(call(f, case), case)


@pytest.mark.parametrize(("tiling", "dtype", "head_dim"), [
    (mosaic.DECODE, "float16", 64),
    (Tiling(128, 2, 2, 1, 2), "bfloat16", 128),
    (Tiling(256, 2, 2, 1, 1, ctas=2), "bfloat16", 128),
])  # fmt: skip
def test_decodes_beside_chunks(tiling, dtype, head_dim):
    """One list for both: warpgroups without a query let pass the pages of tiles of one, and of the last of a chunk."""
    case = make_case(
        dtype,
        8,
        2,
        head_dim,
        lens=[1, 1, 1, 35, 0, 7],
        firsts=[249, 9, 530, 100, 3, 150],
        stored=[250, 0, 200, 135, 0, 157],
        starts=[0, 0, 1, 0, 0, 0],
        strides=[1, 1, 3, 1, 1, 1],
        padding=3,
    )
    asked: dict[str, Any] = dict(tiling=tiling, singles=3)
    got = call(attend_tiled, case, **asked)
    check(got, case)
    rounded, lse = call(attend_tiled, case, dtype=dtype, **asked)
    np.testing.assert_array_equal(rounded, got[0].astype(dtype))
    np.testing.assert_array_equal(lse, got[1])


@pytest.mark.parametrize("side", ["key", "value"])
def test_nan_reaches_those_who_see_it_and_no_other_row(side):
    """A NaN in one number of a key, or of a value, that some queries see among others and one sees alone."""
    shape, kv_head, column = (64, 2, None, 1, 128), 1, 5
    case, clean = prefill_case(shape)
    kv, sees_T = case.kv_LP2KBH, np.zeros(len(case.positions_T), bool)
    for row, key in ((0, 510), (3, 0)):
        (pages, offsets), key_positions = case.keys(row)
        kv = kv.at[case.layer, pages[key], ["key", "value"].index(side), kv_head, offsets[key], column].set(jnp.nan)
        queries = case.queries(row)
        sees_T[queries] = case.positions_T[queries] >= key_positions[key]
        assert 0 < sees_T[queries].sum() < len(queries)
    out, lse = attend_shape(shape, dataclasses.replace(case, kv_LP2KBH=kv))
    G = case.q_TNH.shape[1] // case.kv_LP2KBH.shape[3]
    hit_TN = sees_T[:, None] & (np.arange(case.q_TNH.shape[1]) // G == kv_head)
    if side == "key":
        assert np.isnan(out[hit_TN]).all() and np.isnan(lse[hit_TN]).all()
        np.testing.assert_array_equal(lse[~hit_TN], clean[1][~hit_TN])
    else:
        assert np.isnan(out[hit_TN][:, column]).all()
        np.testing.assert_array_equal(lse, clean[1])
        hit_TN[case.queries(0)] = True  # a weight of 0 times NaN is NaN: the row may share it, in `reference` too
    np.testing.assert_array_equal(out[~hit_TN], clean[0][~hit_TN])


@pytest.mark.parametrize(("f", "dtype"), [(prefill, "bfloat16"), (decode, "float16")])
def test_mean_of_whole_values_is_exact(f, dtype):
    """Equal weights, small whole values and a power of two of visible keys, cut over two items: no rounding at all."""
    lens, firsts = ([1, 4, 1, 1], [511, 0, 900, 70]) if f is prefill else ([1] * 4, [511, 3, 900, 70])
    keys = dict(stored=[520, 100, 256, 64], starts=[0, 0, 1, 0], strides=[1, 1, 3, 1])
    case = make_case(dtype, 2, 1, 64, lens, firsts, **keys, padding=2 * (f is prefill), integers=True)
    out, lse = call(f, case)
    counts = []
    for row in range(4):
        place, key_positions = case.keys(row)
        values_SH = np.asarray(case.kv_LP2KBH, np.float32)[case.layer, place[0], 1, 0, place[1]]
        for t in case.queries(row):
            seen = key_positions <= case.positions_T[t]
            counts.append(int(seen.sum()))
            rounding = 0 if counts[-1].bit_count() == 1 else 1e-6
            np.testing.assert_allclose(out[t], [values_SH[seen].mean(0)] * 2, rtol=rounding)
    np.testing.assert_allclose(lse[: len(counts), 0], np.log2(counts), rtol=1e-6)
    assert sum(n.bit_count() == 1 for n in counts) == len(counts) - (f is prefill) and max(counts) == 512


@pytest.mark.parametrize(("X", "T", "N", "H"), [(2, 4, 3, 64), (3, 2, 8, 128), (8, 3, 4, 64)])
def test_merge_partials(X, T, N, H):
    rng = np.random.default_rng(X)
    out_XTNH, lse_XTN = (rng.normal(size=(X, T, N, H)).astype(np.float32), rng.normal(size=(X, T, N)) * 4)
    lse_XTN[rng.random(lse_XTN.shape) < 0.3] = MASKED
    lse_XTN[:, 1, 0] = MASKED
    lse_XTN[0, 0, 1] = 2000  # of scores far apart
    out_XTNH[lse_XTN == MASKED] = 0
    lse_XTN = lse_XTN.astype(np.float32)
    got = merge(out_XTNH, lse_XTN)
    for x, want in zip(got, reference.merge_partials(out_XTNH, lse_XTN), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-6, atol=1e-6)
    assert (got[0][1, 0] == 0).all() and got[1][1, 0] == np.float32(MASKED)
    # The same bits again, and with partials of nobody's keys before and behind.
    nothing = np.zeros((1, T, N, H), np.float32), np.full((1, T, N), MASKED, np.float32)
    wider = [np.concatenate([none, x, none]) for x, none in zip((out_XTNH, lse_XTN), nothing, strict=True)]
    for again in (merge(out_XTNH, lse_XTN), merge(*wider)):
        for x, y in zip(got, again, strict=True):
            np.testing.assert_array_equal(x, y)


def test_races_are_found(capsys):
    """Two warpgroups write one place: what the fixture looks for is there."""

    def body(x_ref, out_ref, *, smem):
        warpgroup = lax.axis_index("warpgroup")
        smem[...] = x_ref[warpgroup]
        out_ref[warpgroup] = smem[...]

    racy = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((2, 128), jnp.float32),
        scratch_types=dict(smem=plgpu.SMEM((128,), jnp.float32)),
        grid=(1,),
        grid_names=("item",),
        num_threads=2,
        thread_name="warpgroup",
        interpret=INTERPRET,
    )
    raised = ""
    try:
        jax.block_until_ready(racy(jnp.ones((2, 128))))
    except jax.errors.JaxRuntimeError as error:
        raised = str(error)
    assert "RACE DETECTED" in raised + capsys.readouterr().out


def test_every_shape_that_ships_is_interpreted():
    assert set(SHAPES) == {(x.rows, x.stages, x.heads_together, x.ctas, H) for x, *_, H in shipped()}
