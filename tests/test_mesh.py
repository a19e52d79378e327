"""Where things live changes nothing: every layout and placement gives the tokens and logits of one device."""

import numpy as np
import pytest

import mnemosyne_jax as mn
from tests.engines import LOGIT_TOLERANCE, agreeing_tokens, engine, expected
from tests.test_engine import prompts

LAYOUTS = [
    (kvp, spp, tp)
    for kvp in (1, 2, 3, 4, 8)
    for spp in (1, 2, 4)
    for tp in (1, 2, 4, 8)
    if 1 < kvp * spp * tp <= 8 and (kvp in (1, 2, 4, 8) or tp == 1)
]


def test_there_are_twenty_layouts():
    assert len(LAYOUTS) >= 20


@pytest.mark.parametrize(("kvp", "spp", "tp"), LAYOUTS)
def test_layout_invariance(kvp, spp, tp):
    """One prompt spread over all groups, beside a short one private to a group: logits and tokens as Hugging Face's."""
    want, tolerance = expected("llama3"), LOGIT_TOLERANCE["float32"]
    placement = "grow" if (kvp + spp + tp) % 2 else "stripe"
    many = engine("llama3", kvp, spp, tp, placement=placement)
    logits = many.logits(want["prompt"], want["positions"])
    assert np.abs(logits - want["logits"]).max() <= tolerance
    short = prompts(1, 20)[0]
    long, beside = many.generate([want["prompt"], short], max_new_tokens=len(want["tokens"]), stop_ids=())
    assert agreeing_tokens(long.tokens, want["tokens"], want["gaps"], tolerance) == len(want["tokens"])
    (alone,) = engine("llama3").generate([short], max_new_tokens=len(want["tokens"]), stop_ids=())
    assert beside.tokens == alone.tokens


@pytest.mark.parametrize("placement", ["grow", "stripe"])
def test_placement_invariance(placement):
    """Long and short requests of many lengths at once on 2 x 2 x 2 answer as alone on one device."""
    many = engine("llama3", 2, 2, 2, placement=placement, pool_pages=40, shared_rows=3)
    some = [p[:n] for p, n in zip(prompts(8, 300, seed=3), (300, 16, 65, 64, 1, 129, 33, 200), strict=True)]
    want = [engine("llama3").generate([p], max_new_tokens=10, stop_ids=())[0].tokens for p in some]
    got = [r.tokens for r in many.generate(some, max_new_tokens=10, stop_ids=())]
    assert got == want


def test_shared_rows_have_the_same_bits_in_every_group():
    """After a long request, the activations and the token of every group are equal bit for bit."""
    many = engine("llama3", 4, 1, 1)
    many.generate([prompts(1, 200)[0]], max_new_tokens=4, stop_ids=())
    state = many.executor._state
    _, shared, private = many.executor.shapes[0].hidden_areas
    hidden, tokens = np.moveaxis(np.asarray(state.hidden), 1, 0), np.asarray(state.tokens)
    for rows in (hidden[:, :, :2], hidden[:, :, shared:private], tokens[:, :2]):
        assert np.abs(rows).max() > 0
        assert all(np.array_equal(rows[0], group) for group in rows[1:])


def test_needle_on_meshes():
    for kvp, spp, tp in ((2, 2, 2), (4, 1, 2)):
        serve = mn.ServeConfig(page_tokens=32, pool_pages=64, chunk_tokens=256, chunk_buckets=(256,), span_tokens=512)
        one = mn.Engine.needle(mn.MeshSpec(kvp, spp, tp), serve)
        for depth in (0.0, 0.4, 0.99):
            prompt, want = mn.needle_prompt(1500, [0.2, depth] if depth else [depth], seed=int(depth * 100))
            assert one.generate([prompt], max_new_tokens=8)[0].tokens == want


@pytest.mark.parametrize("precision", ["exact", "hf_float32"])
def test_positions_beyond_float32(precision):
    """Past 2**24 neighbouring positions are one float32: `exact` retrieves there, `hf_float32` cannot."""
    one = mn.Engine.needle(
        serve=mn.ServeConfig(rope_precision=precision, chunk_tokens=256, chunk_buckets=(256,), pool_pages=8)
    )
    prompt, want = mn.needle_prompt(600, [0.3], seed=1)

    def tokens(first):
        handle = one.submit(mn.Request(f"at {first}", prompt, max_new_tokens=8, first_position=first))
        return handle.result().tokens

    assert tokens(0) == want
    assert (tokens(2**24 + 1) == want) == (precision == "exact")
    assert (tokens(2**31 - 1000) == want) == (precision == "exact")
