"""Partial attention is a commutative monoid; both merges over groups are its sum, the same bits in every group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.partial import (
    RING_FROM_BYTES,
    Partial,
    gather_merge,
    identity,
    merge,
    merge_over_kvp,
    ring_merge,
)
from pallas_kernels.reference import MASKED

T, N, H = 3, 2, 4
join = jax.jit(merge)


@st.composite
def partials(draw):
    """Random partial attention: rows that saw keys of very different weight, and rows that saw none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    none = identity(T, N, H)
    saw = rng.random((T, N)) < 0.8
    lse = np.where(saw, rng.normal(size=(T, N)) * 30, none.lse_TN)
    return Partial(np.where(saw[..., None], rng.normal(size=(T, N, H)), 0).astype(np.float32), lse.astype(np.float32))


def same(a: Partial, b: Partial) -> None:
    np.testing.assert_allclose(a.out_TNH, b.out_TNH, atol=1e-5)
    np.testing.assert_allclose(a.lse_TN, b.lse_TN, atol=1e-4, rtol=1e-6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(partials(), partials(), partials())
def test_monoid(a, b, c):
    same(join(a, identity(T, N, H)), a)
    same(join(identity(T, N, H), a), a)
    same(join(a, b), join(b, a))
    same(join(join(a, b), c), join(a, join(b, c)))
    same(join(a, b, c), join(join(a, b), c))


@functools.cache
def over_groups(form, kvp):
    """`form` compiled for `kvp` groups: from the partials of all groups to the results of all, both stacked."""

    def run(parts):
        return jax.tree.map(lambda x: x[None], form(jax.tree.map(lambda x: x[0], parts)))

    spec, mesh = PartitionSpec("kvp"), make_mesh(MeshSpec(kvp=kvp))
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))


def float64_merge(parts):
    lse = parts.lse_TN.astype(np.float64)
    weight = np.exp2(lse - lse.max(0))
    out = (weight[..., None] * parts.out_TNH).sum(0) / weight.sum(0)[..., None]
    return Partial(out, lse.max(0) + np.log2(weight.sum(0)))


@pytest.mark.parametrize("rows", [1, 8, 13])
@pytest.mark.parametrize("kvp", [2, 3, 4, 8])
def test_ring_merge_is_gather_merge(kvp, rows):
    """Within rounding; with rows some or no group saw, a row with NaN, and rows that do not divide among groups."""
    rng = np.random.default_rng(kvp * 100 + rows)
    saw = rng.random((kvp, rows, N)) < 0.7
    saw[:, rows // 2, 0] = False
    out = np.where(saw[..., None], rng.normal(size=(kvp, rows, N, H)), 0).astype(np.float32)
    lse = np.where(saw, rng.normal(size=(kvp, rows, N)) * 8, MASKED).astype(np.float32)
    out[kvp - 1, -1, 1] = lse[kvp - 1, -1, 1] = np.nan
    parts = Partial(out, lse)
    ring, gather, want = (
        over_groups(ring_merge, kvp)(parts),
        over_groups(gather_merge, kvp)(parts),
        float64_merge(parts),
    )
    for got in (ring, gather):
        for group in range(kvp):
            np.testing.assert_allclose(got.out_TNH[group], want.out_TNH, atol=1e-5)
            np.testing.assert_allclose(got.lse_TN[group], want.lse_TN, atol=1e-5, rtol=1e-6)
        for leaf in map(np.asarray, jax.tree.leaves(got)):
            assert all(leaf[group].tobytes() == leaf[0].tobytes() for group in range(kvp))
        assert not np.any(got.out_TNH[:, rows // 2, 0]) and np.all(got.lse_TN[:, rows // 2, 0] == np.float32(MASKED))
        assert np.isnan(got.lse_TN).sum() == kvp


def sends(form, kvp, rows):
    """(collective permutes, all-gathers) in the program of `form` for partials of `rows` rows of 16 bytes packed."""
    shapes = Partial(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(kvp, rows, 1, 3), (kvp, rows, 1)]))
    text = over_groups(form, kvp).lower(shapes).as_text()
    return text.count("stablehlo.collective_permute"), text.count("stablehlo.all_gather")


def test_size_and_groups_choose_the_merge():
    large = -(-RING_FROM_BYTES // 16)
    assert sends(merge_over_kvp, 1, large) == (0, 0)
    assert sends(merge_over_kvp, 2, large) == (0, 1)
    assert sends(merge_over_kvp, 4, large) == (3, 1)
    assert sends(merge_over_kvp, 4, large - 1) == (0, 1)
