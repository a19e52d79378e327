"""The same laws on GPUs, as many as there are: MNEMOSYNE_TEST_PLATFORM=cuda python -m pytest -s tests/test_gpu.py."""

import jax
import numpy as np
import pytest

import mnemosyne_jax as mn
from tests.engines import FAMILIES, LOGIT_TOLERANCE, agreeing_tokens, assert_matches_hugging_face, engine, expected

pytestmark = pytest.mark.gpu
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2)]


def need(devices: int) -> None:
    if jax.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_hugging_face(family):
    assert_matches_hugging_face(family)


@pytest.mark.parametrize(("kvp", "spp", "tp"), LAYOUTS)
@pytest.mark.parametrize("placement", ["grow", "stripe"])
def test_layouts(kvp, spp, tp, placement):
    need(kvp * spp * tp)
    want, tolerance = expected("llama3"), LOGIT_TOLERANCE["float32"]
    many = engine("llama3", kvp, spp, tp, placement=placement)
    assert np.abs(many.logits(want["prompt"], want["positions"]) - want["logits"]).max() <= tolerance
    short = want["prompt"][:20]
    long, beside = many.generate([want["prompt"], short], max_new_tokens=len(want["tokens"]), stop_ids=())
    assert agreeing_tokens(long.tokens, want["tokens"], want["gaps"], tolerance) == len(want["tokens"])
    (alone,) = engine("llama3").generate([short], max_new_tokens=len(want["tokens"]), stop_ids=())
    assert beside.tokens == alone.tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kvp", "spp", "tp"), LAYOUTS)
def test_needle(kvp, spp, tp, dtype):
    need(kvp * spp * tp)
    serve = mn.ServeConfig(pool_pages=300, chunk_tokens=2048, chunk_buckets=(2048,), span_tokens=4096)
    one = mn.Engine.needle(mn.MeshSpec(kvp, spp, tp), serve, dtype)
    for first in (0, 2**24 + 1):
        prompt, want = mn.needle_prompt(30_000, [0.1, 0.5, 0.77], seed=first % 100)
        handle = one.submit(mn.Request(f"{first}", prompt, max_new_tokens=8, first_position=first))
        assert handle.result().tokens == want
        print(f"kvp {kvp} spp {spp} tp {tp} {dtype} at {first}: TTFT {handle.timeline.ttft_s:.2f} s, "
              f"TBT {np.median(handle.timeline.tbt_s) * 1e3:.1f} ms")  # fmt: skip


def test_compiled_tick_copies_no_cache():
    """On a GPU too the cache is updated in place: all of it aliased, and little beside it."""
    one = engine("llama3", pool_pages=512).executor
    memory = one.memory_analysis(one.shapes[-1])
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one.target))
    assert memory.alias_size_in_bytes >= state
    kv = one.target.cache.kv
    assert memory.temp_size_in_bytes < kv.size * kv.dtype.itemsize // 2
