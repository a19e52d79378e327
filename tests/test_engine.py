"""Exactness on one device and in time: Hugging Face's numbers, any chunking, any batch-mates, any seed."""

import dataclasses

import jax
import numpy as np
import pytest

import mnemosyne_jax as mn
from tests.engines import (
    FAMILIES,
    LOGIT_TOLERANCE,
    SMALL,
    agreeing_tokens,
    assert_matches_hugging_face,
    engine,
    expected,
    folder,
)


def prompts(count: int, length: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 211, (count, length), dtype=np.int32))


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_hugging_face(family):
    assert_matches_hugging_face(family)


def test_bfloat16_stays_near_float32():
    """In bfloat16 the logits stay within the table of the float32 ones; where tokens part, the gap was small."""
    want = expected("qwen3")
    low = engine("qwen3", dtype="bfloat16")
    logits = low.logits(want["prompt"], want["positions"])
    assert np.abs(logits - want["logits"]).max() <= LOGIT_TOLERANCE["bfloat16"]
    (result,) = low.generate([want["prompt"]], max_new_tokens=len(want["tokens"]), stop_ids=())
    agree = agreeing_tokens(result.tokens, want["tokens"], want["gaps"], LOGIT_TOLERANCE["bfloat16"])
    part = "" if agree == len(want["tokens"]) else f", then a gap of {want['gaps'][agree]:.3f}"
    print(f"bfloat16: max |difference of logits| {np.abs(logits - want['logits']).max():.3f}, {agree} tokens{part}")
    assert agree > 0


def test_any_chunking_gives_the_same_logits():
    want = expected("llama3")
    rng = np.random.default_rng(1)
    one = engine("llama3")
    for lengths in (
        [1, 2],
        [7],
        [64],
        [13, 31, 2, 61],
        [17, 63, 5, 1, 29],
        *(rng.integers(1, 65, 6) for _ in range(6)),
    ):
        chunks = iter(np.resize(lengths, 200))
        one.scheduler._choose_chunk = lambda s, room, c=chunks: min(
            int(next(c)), room, len(s.request.prompt) - s.prompt_scheduled
        )
        logits = one.logits(want["prompt"], want["positions"])
        assert np.abs(logits - want["logits"]).max() <= LOGIT_TOLERANCE["float32"], lengths
    engine.cache_clear()


def test_batch_mates_change_nothing():
    """A prompt answers alone as it does beside three others, whichever slot and row it gets."""
    one = engine("llama3")
    alone = [one.generate([p], max_new_tokens=12, stop_ids=())[0].tokens for p in prompts(4, 40)]
    together = [r.tokens for r in one.generate(prompts(4, 40), max_new_tokens=12, stop_ids=())]
    backwards = [r.tokens for r in one.generate(prompts(4, 40)[::-1], max_new_tokens=12, stop_ids=())][::-1]
    assert alone == together == backwards


def test_sampling_depends_on_seed_and_position_alone():
    one = engine("llama3")
    p = prompts(1, 40)[0]
    draw = dict(max_new_tokens=12, temperature=1.5, top_p=0.9, stop_ids=())
    (alone,) = one.generate([p], seed=7, **draw)
    beside = one.generate([*prompts(2, 30, seed=5), p], seed=7, **draw)[2]
    (other,) = one.generate([p], seed=8, **draw)
    assert alone.tokens == beside.tokens != other.tokens
    (narrow,) = one.generate([p], seed=7, **(draw | dict(top_p=1e-6)))
    (greedy,) = one.generate([p], max_new_tokens=12, stop_ids=())
    assert narrow.tokens == greedy.tokens


def test_sampled_tokens_follow_the_probabilities():
    """Drawn frequencies of the first token over many seeds match softmax(logits / temperature) within the nucleus."""
    one = engine("llama3")
    p = prompts(1, 20)[0]
    logits = one.logits(p, [19])[0].astype(np.float64) / 2.0
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    nucleus = order[: np.searchsorted(np.cumsum(probs[order]), 0.8) + 1]
    requests = [mn.Request(f"s{i}", p, 1, temperature=2.0, top_p=0.8, seed=i, stop_ids=()) for i in range(200)]
    handles = [one.submit(r) for r in requests]
    drawn = np.array([h.result().tokens[0] for h in handles])
    assert set(drawn) <= set(nucleus)
    top = nucleus[0]
    share, sigma = probs[top] / probs[nucleus].sum(), (0.25 / 200) ** 0.5
    assert abs((drawn == top).mean() - share) < 4 * sigma


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("spp", [1, 2, 4])
def test_tick_law(spp, ahead):
    """A lone request takes chunks + (spp - 1) + (new_tokens - 1) * spp ticks, and `ahead` more to be read."""
    one = engine("llama3", spp=spp, ahead=ahead)
    p = prompts(1, 150)[0]
    begin = one.scheduler.tick
    one.generate([p], max_new_tokens=5, stop_ids=())
    chunks = -(-150 // 64)
    assert one.scheduler.tick - begin == chunks + (spp - 1) + (5 - 1) * spp + ahead


def test_four_groups_run_four_short_requests_in_the_ticks_of_one():
    four = engine("llama3", kvp=4)
    want = [engine("llama3").generate([p], max_new_tokens=8, stop_ids=())[0].tokens for p in prompts(4, 50)]

    def ticks(some):
        begin = four.scheduler.tick
        tokens = [r.tokens for r in four.generate(some, max_new_tokens=8, stop_ids=())]
        return four.scheduler.tick - begin, tokens

    alone, _ = ticks(prompts(1, 50))
    together, tokens = ticks(prompts(4, 50))
    assert together == alone
    assert tokens == want


def test_refusals_leave_the_engine_serving():
    one = engine("llama3")
    p = prompts(1, 30)[0]
    (want,) = one.generate([p], max_new_tokens=6, stop_ids=())
    bad = {
        "prompt": dict(prompt=[]),
        "max_new_tokens": dict(max_new_tokens=0),
        "temperature": dict(temperature=float("nan")),
        "top_p": dict(top_p=0.0),
        "stop_ids": dict(stop_ids=(211,)),
        "prompt + max_new_tokens": dict(max_new_tokens=10_000),
    }
    for field, change in bad.items():
        with pytest.raises(mn.RequestError) as error:
            one.submit(dataclasses.replace(mn.Request("bad", p), **change))
        assert error.value.field == field and error.value.limit
    with pytest.raises(mn.RequestError, match=r"prompts\[1\]") as error:
        one.generate([p, [5, 211]], max_new_tokens=6)
    assert (error.value.field, error.value.value) == ("prompt", 211)
    assert one.loop.idle
    assert one.generate([p], max_new_tokens=6, stop_ids=())[0].tokens == want.tokens


def test_cancel_and_stop_ids():
    one = engine("llama3")
    p = prompts(1, 100)[0]
    (want,) = one.generate([p], max_new_tokens=10, stop_ids=())
    (stopped,) = one.generate([p], max_new_tokens=10, stop_ids=(want.tokens[4],))
    assert stopped.tokens == want.tokens[: want.tokens.index(want.tokens[4]) + 1] and stopped.reason == "stop"
    handle = one.submit(mn.Request("c", p, max_new_tokens=10, stop_ids=()))
    got = []
    for token in handle:
        got.append(token)
        if len(got) == 3:
            handle.cancel()
    assert handle.reason == "cancelled" and got == want.tokens[: len(got)]
    assert handle.progress().processed == 100
    while not one.loop.idle:
        one.tick()
    assert one.scheduler.places.pools[0].free == one.scheduler.places.pools[0].size


def test_not_finite_logits_fail_one_request_alone():
    """NaN in one token's embedding: the request that uses it fails, its neighbour and the pages' next owner do not."""
    one = mn.Engine.load(folder("qwen3"), serve=mn.ServeConfig(**(SMALL | dict(pool_pages=8))))
    victim, neighbour = np.full(40, 77, np.int32), prompts(1, 40)[0] % 77
    (want,) = one.generate([neighbour], max_new_tokens=8, stop_ids=())
    embed = np.array(one.params.embed)
    embed[77] = np.nan
    one.executor.params = one.params.replace(embed=jax.device_put(embed, one.params.embed.sharding))
    failed, beside = one.generate([victim, neighbour], max_new_tokens=8, stop_ids=())
    assert failed.error and "finite" in failed.error and failed.tokens == []
    assert beside.tokens == want.tokens and beside.error is None
    with pytest.raises(mn.GenerationError):
        list(one.submit(mn.Request("again", victim)))
    for _ in range(3):  # on pages and slots that held NaN
        assert one.generate([neighbour], max_new_tokens=8, stop_ids=())[0].tokens == want.tokens


def test_a_saved_engine_loads_onto_another_mesh(tmp_path):
    one = engine("llama3")
    one.save(tmp_path / "saved")
    other = mn.Engine.load(tmp_path / "saved", mn.MeshSpec(1, 2, 2), one.serve)
    p = prompts(1, 70)[0]
    want, got = (e.generate([p], max_new_tokens=6)[0].tokens for e in (one, other))
    assert got == want and other.config == one.config


def test_load_refuses_what_cannot_be_laid_out():
    for mesh, numbers in ((mn.MeshSpec(spp=3), ("3", "4")), (mn.MeshSpec(tp=16), ("16", "8"))):
        with pytest.raises(mn.RequestError) as error:
            mn.Engine.load(folder("llama3"), mesh=mesh)
        assert all(n in str(error.value) for n in numbers)
    with pytest.raises(mn.RequestError, match="devices"):
        mn.Engine.load(folder("llama3"), mesh=mn.MeshSpec(kvp=16))
    for make in (lambda s: mn.Engine.load("no such folder", serve=s), lambda s: mn.Engine.needle(serve=s)):
        with pytest.raises(mn.RequestError, match="mosaic"):  # before the folder is even looked at
            make(mn.ServeConfig(impl="mosaic"))
