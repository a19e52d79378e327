"""The same laws on GPUs, as many as there are: MNEMOSYNE_TEST_PLATFORM=cuda python -m pytest -s tests/test_gpu.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnemosyne_jax as mn
from mnemosyne_jax.model.params import init
from mnemosyne_jax.model.ring import ring_attention, stripe, unstripe
from pallas_kernels import mosaic, reference
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


@functools.lru_cache(maxsize=4)
def random_engine(head_dim: int, mesh: tuple[int, int, int], impl: str, placement: str = "stripe") -> mn.Engine:
    """An Engine of random bfloat16 weights, its logits as large as those of the other tests."""
    config = mn.ModelConfig(
        width=256, ffn=512, vocab=512, layers=4, heads=16, kv_heads=4, head_dim=head_dim, rope=mn.RopeConfig(theta=1e5)
    )
    serve = mn.ServeConfig(
        pool_pages=96, chunk_tokens=512, chunk_buckets=(512,), span_tokens=1024, impl=impl, placement=placement
    )
    device_mesh = mn.make_mesh(mn.MeshSpec(*mesh))
    return mn.Engine(config, init(config, device_mesh, jnp.bfloat16, scale=0.1), device_mesh, serve)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("kvp", "spp", "tp"), LAYOUTS)
@pytest.mark.parametrize("placement", ["grow", "stripe"])
def test_mosaic_serves_as_the_reference(head_dim, kvp, spp, tp, placement):
    """Kernels, layout, chunks and company change bfloat16 logits by less than the tolerance, and no clear token."""
    need(kvp * spp * tp)
    if kvp == 1 and placement == "grow":
        pytest.skip("one group: nothing to place")
    tolerance = LOGIT_TOLERANCE["bfloat16"]
    long, short = np.random.default_rng(0).integers(0, 512, 3_000), np.arange(100) % 512
    plain = random_engine(head_dim, (1, 1, 1), "reference")
    ours = random_engine(head_dim, (kvp, spp, tp), "mosaic", placement)
    assert (plain.executor.impl, ours.executor.impl) == ("reference", "mosaic")
    positions = [0, 127, 128, 777, 2_047, 2_999]
    want, got = (e.logits(long, positions) for e in (plain, ours))
    print(f"H {head_dim}, kvp {kvp} spp {spp} tp {tp} {placement}: |logit| to {np.abs(want).max():.1f}, "
          f"max difference {np.abs(got - want).max():.3f}")  # fmt: skip
    assert np.abs(want).max() > 4 and np.abs(got - want).max() <= tolerance
    for prompt, alone in ((long, False), (short, True)):
        (right,) = plain.generate([prompt], max_new_tokens=8, stop_ids=())
        after = np.concatenate([prompt, right.tokens])
        top = np.sort(plain.logits(after, np.arange(len(prompt) - 1, len(after) - 1)), axis=1)
        batch = [prompt] if alone else [short, prompt]
        tokens = ours.generate(batch, max_new_tokens=8, stop_ids=())[-1].tokens
        agreeing_tokens(tokens, np.array(right.tokens), top[:, -1] - top[:, -2], tolerance)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ring_attention_by_mosaic(devices, head_dim):
    """Striped ring attention over GPUs is the attention of one GPU, up to rounding of bfloat16 weights."""
    need(devices)
    tokens, T = 3_777, 4_096
    q, k, v = (
        jax.random.normal(jax.random.key(i), (T, heads, head_dim), jnp.bfloat16) for i, heads in enumerate((16, 4, 4))
    )
    mesh = mn.make_mesh(mn.MeshSpec(kvp=devices))
    spec = jax.sharding.PartitionSpec("kvp")
    attend = functools.partial(ring_attention, tokens=tokens, chunked_prefill=mosaic.chunked_prefill)
    run = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    part = run(*(stripe(x, devices, 128) for x in (q, k, v)))
    got = unstripe(np.asarray(part.out_TNH), devices, 128)[:tokens]
    pages = jnp.stack([k, v]).reshape(1, 2, T // 128, 128, 4, head_dim).transpose(0, 2, 1, 4, 3, 5)
    one = dict(slots_R=[0], cu_q_lens_R1=[0, tokens], kv_lens_R=[tokens], key_start_R=[0], key_stride_R=[1])
    rows = {name: jnp.array(x, jnp.int32) for name, x in one.items()} | dict(q_positions_T=jnp.arange(T))
    exact, _ = jax.jit(reference.chunked_prefill)(q, pages, 0, jnp.arange(T // 128)[None], **rows)
    want = np.asarray(exact)[:tokens]
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"ring over {devices}, H {head_dim}: relative error {error:.1e}")
    assert error <= 3e-3
