"""The reference kernels against attention written out in float64, over every kind of row a kernel can meet."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.reference import MASKED, chunked_prefill, merge_partials, paged_decode

prefill = jax.jit(chunked_prefill, static_argnames="q_tile")
decode = jax.jit(paged_decode)
LAYERS, PAGES, B, K, H = 2, 24, 4, 2, 8


def plain(q_TNH, positions_T, k_SKH, v_SKH, key_positions_S):
    """Attention in float64 over keys at given positions: (out_TNH, lse_TN base 2)."""
    T, N, _ = q_TNH.shape
    out, lse = np.zeros(q_TNH.shape), np.full((T, N), MASKED)
    for t in range(T):
        seen = key_positions_S <= positions_T[t]
        for n in range(N):
            if seen.any():
                s = k_SKH[seen, n * K // N].astype(np.float64) @ q_TNH[t, n] / np.sqrt(H)
                w = np.exp(s - s.max())
                out[t, n] = w @ v_SKH[seen, n * K // N] / w.sum()
                lse[t, n] = np.log2(w.sum()) + s.max() / np.log(2)
    return out, lse


class Case:
    """A cache full of NaN in which a few rows own random pages, with affine positions and ragged queries."""

    def __init__(self, rng, lens, stored, starts, strides, heads):
        self.kv = np.full((LAYERS, PAGES, 2, K, B, H), np.nan, np.float32)
        self.table = rng.integers(0, PAGES, (5, 6)).astype(np.int32)
        R = len(lens)
        self.slots = rng.permutation(5)[:R].astype(np.int32)
        free = list(rng.permutation(PAGES))
        self.cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        T = 48  # the rest is padding behind the last row
        self.q = rng.normal(size=(T, heads, H)).astype(np.float32)
        self.positions = np.zeros(T, np.int32)
        self.stored, self.starts, self.strides = (np.array(x, np.int32) for x in (stored, starts, strides))
        self.keys = []
        for r in range(R):
            k, v = rng.normal(size=(2, stored[r], K, H)).astype(np.float32)
            at = np.arange(stored[r])
            for j in range(-(-stored[r] // B)):
                self.table[self.slots[r], j] = free.pop()
            page = self.table[self.slots[r], at // B]
            self.kv[1, page, 0, :, at % B], self.kv[1, page, 1, :, at % B] = k, v
            key_positions = (starts[r] + strides[r] * (at // B)) * B + at % B
            self.keys.append((k, v, key_positions))
            last = int(rng.integers(0, 2 * B * 6 * strides[r]))
            self.positions[self.cu[r] : self.cu[r + 1]] = max(0, last - lens[r]) + np.arange(lens[r])

    def rows(self):
        return dict(slots_R=self.slots, kv_lens_R=self.stored, key_start_R=self.starts, key_stride_R=self.strides)

    def expected(self):
        out, lse = np.zeros(self.q.shape), np.full(self.q.shape[:2], MASKED)
        for r, keys in enumerate(self.keys):
            rows = slice(self.cu[r], self.cu[r + 1])
            out[rows], lse[rows] = plain(self.q[rows], self.positions[rows], *keys)
        return out, lse


def check(got, want):
    np.testing.assert_allclose(got[0], want[0], atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(got[1], want[1], atol=2e-6, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_chunked_prefill(seed):
    rng = np.random.default_rng(seed)
    lens = rng.integers(0, 12, 4)
    case = Case(rng, lens, rng.integers(0, 6 * B + 1, 4), rng.integers(0, 3, 4), rng.integers(1, 4, 4), heads=4)
    for tile in (5, 128):
        got = prefill(
            case.q,
            case.kv,
            1,
            case.table,
            cu_q_lens_R1=case.cu,
            q_positions_T=case.positions,
            q_tile=tile,
            **case.rows(),
        )
        check(got, case.expected())


@pytest.mark.parametrize("heads", [2, 4, 16])
def test_paged_decode(heads):
    rng = np.random.default_rng(heads)
    case = Case(rng, [1] * 5, [0, 1, 3, 6 * B, 9], [0, 0, 1, 0, 2], [1, 1, 2, 3, 1], heads)
    positions = case.positions[:5]
    got = decode(case.q[:5], case.kv, 1, case.table, q_positions_R=positions, **case.rows())
    check(got, [x[:5] for x in case.expected()])


def test_splitting_keys_over_groups_and_merging_is_the_whole():
    """Pages dealt to three groups, by stripes or in runs, attended apart and merged: as if in one place."""
    rng = np.random.default_rng(0)
    stored, T = 6 * B - 1, 7
    k, v = rng.normal(size=(2, stored, K, H)).astype(np.float32)
    q = rng.normal(size=(T, 4, H)).astype(np.float32)
    positions = np.arange(stored - T, stored, dtype=np.int32)
    want = plain(q, positions, k, v, np.arange(stored))
    for deal in ([(0, 3, 2), (1, 3, 2), (2, 3, 2)], [(0, 1, 4), (4, 1, 2), (8, 1, 0)]):
        parts = []
        for start, stride, count in deal:
            kv = np.full((LAYERS, PAGES, 2, K, B, H), np.nan, np.float32)
            table = rng.permutation(PAGES)[None, :6].astype(np.int32)
            held = 0
            for j in range(count):
                at = np.arange((start + stride * j) * B, min((start + stride * j + 1) * B, stored))
                kv[0, table[0, j], 0, :, at % B], kv[0, table[0, j], 1, :, at % B] = k[at], v[at]
                held += len(at)
            one = np.ones(1, np.int32)
            rows = dict(slots_R=0 * one, kv_lens_R=held * one, key_start_R=start * one, key_stride_R=stride * one)
            parts.append(
                prefill(q, kv, 0, table, cu_q_lens_R1=np.array([0, T], np.int32), q_positions_T=positions, **rows)
            )
        check(merge_partials(*(np.stack(x) for x in zip(*parts, strict=True))), want)


def test_bfloat16_and_float16_inputs_keep_float32_statistics():
    rng = np.random.default_rng(1)
    case = Case(rng, [9, 4], [20, 11], [0, 0], [1, 1], heads=4)
    for dtype, tolerance in (("bfloat16", 3e-2), ("float16", 3e-3)):
        q, kv = (jax.numpy.asarray(x, dtype) for x in (case.q, case.kv))
        out, lse = prefill(q, kv, 1, case.table, cu_q_lens_R1=case.cu, q_positions_T=case.positions, **case.rows())
        assert out.dtype == lse.dtype == np.float32
        want = case.expected()
        np.testing.assert_allclose(out, want[0], atol=tolerance)
        np.testing.assert_allclose(lse, want[1], atol=tolerance, rtol=tolerance)


def test_no_array_grows_with_chunk_times_context():
    """Compiled memory beside arguments and results stays flat when the context grows sixteenfold."""

    def temporaries(pages):
        s = jax.ShapeDtypeStruct
        i = lambda *n: s(n, np.int32)  # noqa: E731
        args = (s((256, 4, H), np.float32), s((LAYERS, pages, 2, K, 16, H), np.float32), i(), i(2, pages))
        rows = dict(
            slots_R=i(2), cu_q_lens_R1=i(3), q_positions_T=i(256), kv_lens_R=i(2), key_start_R=i(2), key_stride_R=i(2)
        )
        return prefill.lower(*args, **rows).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16 * 256) <= 1.1 * temporaries(256)
