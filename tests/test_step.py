"""The tick's account: memory, copies, programs, host traffic, weights per device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mnemosyne_jax as mn
from mnemosyne_jax.model.cache import abstract as abstract_state
from mnemosyne_jax.model.cache import state_bytes_per_device
from mnemosyne_jax.model.inputs import buffer_words, step_shapes
from mnemosyne_jax.model.params import abstract as abstract_params
from mnemosyne_jax.model.params import init, weight_bytes_per_device
from mnemosyne_jax.model.step import make_step
from mnemosyne_jax.serve.batch import Batch, DecodeRow
from mnemosyne_jax.serve.pages import Span
from tests.engines import SMALL, engine, folder
from tests.test_engine import prompts


class Compilations:
    """Counts XLA compilations between creation and `count`."""

    total = 0

    def __init__(self):
        self.begin = Compilations.total

    @property
    def count(self) -> int:
        return Compilations.total - self.begin


def _listen(event: str, duration: float, **kwargs) -> None:
    Compilations.total += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_memory_is_weights_and_cache_and_one_tick(mesh):
    """State is donated whole, and what a tick needs beside it does not grow with the cache."""
    temporaries = []
    for pages in (32, 512):
        one = engine("llama3", *mesh, pool_pages=pages).executor
        for shape in (one.shapes[0], one.shapes[-1]):
            memory = one.memory_analysis(shape)
            state, weights = state_bytes_per_device(one.target), weight_bytes_per_device(one.params)
            sent = 4 * buffer_words(shape)
            assert memory.alias_size_in_bytes == state
            assert 0 <= memory.argument_size_in_bytes - (state + weights + sent) < 4096
            temporaries.append(memory.temp_size_in_bytes)
    small, large = temporaries[:2], temporaries[2:]
    assert large == small


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
def test_cache_is_never_copied(mesh):
    """No copy, transpose or convert of the cache's shape stands in the compiled tick."""
    one = engine("llama3", *mesh).executor
    kv = one.target.cache.kv
    shape = ",".join(str(n) for n in kv.sharding.shard_shape(kv.shape))
    for program in (one.shapes[0], one.shapes[-1]):
        text = one._program(program).as_text()
        makers = set(re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", text))
        assert "scatter" in text and makers
        assert " conditional(" not in text, "a branch has the host wait for what decides it"
        assert not makers & {"copy", "copy-start", "transpose", "convert", "concatenate", "slice", "dynamic-slice"}, (
            makers
        )


def test_programs_are_built_by_warmup_and_not_after():
    serve = mn.ServeConfig(**(SMALL | dict(private_rows=3)))
    folder("qwen2")
    counted = Compilations()
    one = mn.Engine.load(folder("qwen2"), mn.MeshSpec(2, 1, 1), serve)
    assert counted.count == 0, "load compiles nothing"
    programs = one.warmup()
    assert counted.count == programs <= 17
    rng = np.random.default_rng(0)
    for n in range(6):
        some = [rng.integers(0, 211, length) for length in rng.integers(1, 200, 5)]
        one.generate(some, max_new_tokens=4, temperature=float(n % 2), stop_ids=())
        one.logits(some[0], [0])
    handle = one.submit(mn.Request("gone", some[0]))
    one.tick()
    handle.cancel()
    one.tick()
    assert counted.count == programs, "none is built after warm-up"


def test_most_programs_a_configuration_can_ask_for():
    from mnemosyne_jax.model.inputs import step_shapes

    for mesh, buckets in ((mn.MeshSpec(), (1, 2, 3, 4, 5, 6, 7, 512)), (mn.MeshSpec(kvp=2), (1, 2, 3, 4, 512))):
        assert len(step_shapes(mn.ServeConfig(chunk_tokens=512, chunk_buckets=buckets), mesh)) <= 14
    with pytest.raises(mn.RequestError, match="chunk_buckets"):
        mn.ServeConfig(chunk_tokens=9, chunk_buckets=tuple(range(1, 10)))
    with pytest.raises(mn.RequestError, match="kvp"):
        step_shapes(mn.ServeConfig(chunk_tokens=6, chunk_buckets=tuple(range(1, 7))), mn.MeshSpec(kvp=2))


def record_sent(executor, monkeypatch):
    """The list that grows by the bytes each tick sends: what a program is called with that is not on the devices."""
    sent: list[int] = []
    build = executor._program

    def recorded(key):
        def call(*args):
            sent.append(sum(x.nbytes for x in jax.tree.leaves(args) if not isinstance(x, jax.Array)))
            return build(key)(*args)

        return call

    monkeypatch.setattr(executor, "_program", recorded)
    return sent


def test_host_traffic_does_not_grow_with_context(monkeypatch):
    """A decode tick sends one buffer, of the same size with 10 and with 480 tokens behind it, and nothing else."""
    one = engine("llama3")
    one.warmup()
    sent = record_sent(one.executor, monkeypatch)
    by_length = []
    for length in (10, 480):
        handle = one.submit(mn.Request(f"n{length}", prompts(1, length)[0], 8, stop_ids=()))
        while handle.progress().processed < length:
            one.tick()
        sent.clear()
        handle.result()
        by_length.append((max(sent), min(sent)))
    assert by_length[0] == by_length[1] == (4 * buffer_words(one.executor.shapes[0]),) * 2


def test_host_traffic_at_a_million_tokens(monkeypatch):
    """A decode row at position 1,000,000 sends what one at position 1,000 sends."""
    one = engine("llama3", dtype="bfloat16", pool_pages=62_600).executor
    one.warmup()
    span = Span(0, 0, 1, np.arange(62_600, dtype=np.int32))
    sent = record_sent(one, monkeypatch)
    for tick, position in enumerate((1_000, 1_000_000)):
        row = DecodeRow(mn.Request("far", [1]), slot=0, group=0, spans=(span,), position=position)
        one.step(Batch(tick, decodes=(row,)))
    assert sent == [4 * buffer_words(one.shapes[0])] * 2


def test_ticks_are_submitted_before_tokens_are_read(monkeypatch):
    """With ahead = 2 the token of a tick is read only after two more ticks were submitted, and tokens are the same."""
    events = []
    for ahead in (1, 2):
        one = engine("llama3", spp=2, ahead=ahead)
        step, result = one.executor.step, one.executor._result

        def submitted(batch: Batch, step=step):
            events.append(("submit", batch.tick))
            return step(batch)

        def read(result=result):
            answer = result()
            events.append(("read", answer.batch.tick))
            return answer

        monkeypatch.setattr(one.executor, "step", submitted)
        monkeypatch.setattr(one.executor, "_result", read)
        events.clear()
        (got,) = one.generate(prompts(1, 40), max_new_tokens=6, stop_ids=())
        assert got.tokens == engine("llama3").generate(prompts(1, 40), max_new_tokens=6, stop_ids=())[0].tokens
        submitted_at = {tick: i for i, (kind, tick) in enumerate(events) if kind == "submit"}
        for i, (kind, tick) in enumerate(events):
            if kind == "read" and tick in submitted_at:
                later = sum(1 for t, at in submitted_at.items() if t > tick and at < i)
                assert later == one.executor.depth == 1 + ahead


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1), (1, 1, 8), (1, 2, 4), (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("family", ["llama3", "mistral"])
def test_weights_per_device(family, mesh):
    """Each device holds total / (spp * tp), within 5%: tables are split too (kv heads fewer than tp are replicated)."""
    params = engine(family, *mesh).params
    one = engine(family).config
    kv_copies = max(one.kv_heads, mesh[2]) / one.kv_heads
    total = one.weights + (kv_copies - 1) * one.layers * 2 * one.width * one.kv_heads * one.head_dim
    held = weight_bytes_per_device(params) / 4
    assert held == pytest.approx(total / (mesh[1] * mesh[2]), rel=0.05)


def test_random_weights_are_made_where_they_live():
    many = engine("llama", 1, 2, 2)
    params = init(many.config, many.mesh, np.dtype("float32"), seed=1)
    same = jax.tree.map(
        lambda a, b: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding), params, many.params
    )
    assert all(jax.tree.leaves(same))
    layer = params.layers[0]
    assert np.all(np.asarray(layer.attn_norm) == 1) and abs(np.asarray(layer.w_gate_up).std() / 0.02 - 1) < 0.05


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 2), (1, 1, 4), (2, 4, 1)], ids=str)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_one_seed_is_one_model_on_every_mesh(mesh, qkv_bias):
    """Also where a vocabulary is padded, and where shards are more than kv heads."""
    config = mn.ModelConfig(
        width=16, ffn=32, vocab=97, layers=4, heads=4, kv_heads=2, head_dim=8, qkv_bias=qkv_bias, tied=False
    )
    prompt, serve = np.arange(50), mn.ServeConfig(page_tokens=16, pool_pages=8, chunk_tokens=64, chunk_buckets=(64,))
    want, got = (
        mn.Engine(config, init(config, made, np.dtype("float32"), seed=1, scale=0.3), made, serve).logits(prompt)
        for made in (mn.make_mesh(mn.MeshSpec(*sizes)) for sizes in ((1, 1, 1), mesh))
    )
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_functions_for_ones_own_loop():
    """prefill_chunk and decode_step, two slots, on one device and on 2 x 2 x 2, against the engine."""
    first, second = prompts(2, 70, seed=4)
    one = engine("llama3")
    want = [r.tokens for r in one.generate([first, second], max_new_tokens=5, stop_ids=())]
    for mesh in ((1, 1, 1), (2, 2, 2)):
        many = engine("llama3", *mesh)
        cache = mn.init_cache(many.config, many.mesh, slots=2, context_tokens=96, page_tokens=16, chunk_tokens=40)
        tokens = [[], []]
        for slot, prompt in ((1, second), (0, first)):
            cache, _ = mn.prefill_chunk(many.params, cache, prompt[:33], slot=slot)
            cache, logits = mn.prefill_chunk(many.params, cache, prompt[33:], slot=slot, start=33)
            np.testing.assert_allclose(logits, one.logits(prompt, [69])[0], atol=2e-4)
            tokens[slot].append(int(logits.argmax()))
        for i in range(4):
            cache, new = mn.decode_step(many.params, cache, [tokens[1][-1], tokens[0][-1]], [1, 0], [70 + i, 70 + i])
            tokens[1].append(int(new[0]))
            tokens[0].append(int(new[1]))
        assert tokens == want
        with pytest.raises(mn.RequestError, match="slot"):
            mn.prefill_chunk(many.params, cache, first[:4], slot=2)
        with pytest.raises(mn.RequestError, match="positions_R"):
            mn.decode_step(many.params, cache, [1], [0], [96])


def test_plan_names_what_fits():
    config = engine("llama3").config
    card = mn.HardwareConfig(memory_bytes=10**9)
    alone, spread = (mn.plan(config, card, mesh, 100_000) for mesh in (mn.MeshSpec(), mn.MeshSpec(2, 2, 2)))
    per_token = 2 * config.layers * config.kv_heads * config.head_dim * 4
    assert alone.kv_bytes_per_token == spread.kv_bytes_per_token == per_token
    assert 7.9 < spread.longest_context_tokens / alone.longest_context_tokens < 8.1
    assert alone.fits and alone.longest_context_tokens * per_token < 10**9
    assert not mn.plan(config, card, mn.MeshSpec(), alone.longest_context_tokens + 1).fits


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_mosaic_tick_lowers_for_cuda(mesh, head_dim):
    """The whole tick with the Hopper kernels, on every axis, passes their compiler's front end; layers share a body."""
    config = mn.ModelConfig(width=64, ffn=64, vocab=64, layers=4, heads=16, kv_heads=4, head_dim=head_dim)
    serve = mn.ServeConfig(pool_pages=8, chunk_tokens=256, chunk_buckets=(256,), impl="mosaic")
    device_mesh = mn.make_mesh(mn.MeshSpec(*mesh))
    state = abstract_state(config, serve, device_mesh, jnp.bfloat16, 8)
    params = abstract_params(config, device_mesh, jnp.bfloat16)
    for shape in step_shapes(serve, mn.MeshSpec(*mesh)):
        buffer = jax.ShapeDtypeStruct((mesh[1], mesh[0], buffer_words(shape)), np.int32)
        step = make_step(device_mesh, config, shape, jnp.bfloat16, impl="mosaic")
        text = step.trace(params, state, buffer).lower(lowering_platforms=("cuda",)).as_text()
        kernels = text.count("custom_call @mosaic_gpu")
        assert kernels == 2, kernels  # attend and merge, decodes and chunks together
