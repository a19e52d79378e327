"""Partial attention is a commutative monoid."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne_jax.model.partial import Partial, identity, merge

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
