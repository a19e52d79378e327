"""Laws of the constructed retrieval model: its margins at every distance, its prompts, and that it finds the needle."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mnemosyne_jax import needle
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.model.rope import rotary_tables, rotate

FAR = 20_000_000


def cast(dtype):
    """The weights as a checkpoint of `dtype` stores them, computed with in float64."""
    return {name: weight.astype(dtype).astype(np.float64) for name, weight in needle.tensors().items()}


def rms_norm(x_TD, weight):
    return x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + 1e-6) * weight


def turn(x_TH, frequency):
    """One head, the positions being the rows."""
    first, second = np.split(x_TH, 2, axis=1)
    turned = (first + 1j * second) * np.exp(1j * np.arange(len(x_TH))[:, None] * frequency)
    return np.concatenate([turned.real, turned.imag], axis=1)


def forward(weights, ids_T):
    """Logits [T, V] of a two-layer Llama in plain float64."""
    head_dim = needle.config().head_dim
    frequency = needle.config().rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    x_TD = weights["model.embed_tokens.weight"][ids_T]
    for layer in range(2):
        part = {name.split(f"layers.{layer}.")[1]: w for name, w in weights.items() if f"layers.{layer}." in name}
        normed = rms_norm(x_TD, part["input_layernorm.weight"])
        q, k, v = (np.split(normed @ part[f"self_attn.{name}_proj.weight"].T, 2, axis=1) for name in "qkv")
        heads = []
        for head in range(2):
            scores = turn(q[head], frequency) @ turn(k[head], frequency).T / math.sqrt(head_dim)
            scores = np.where(np.tri(len(ids_T), dtype=bool), scores, -np.inf)
            share = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(share / share.sum(axis=1, keepdims=True) @ v[head])
        x_TD = x_TD + np.concatenate(heads, axis=1) @ part["self_attn.o_proj.weight"].T
        normed = rms_norm(x_TD, part["post_attention_layernorm.weight"])
        gate, up = normed @ part["mlp.gate_proj.weight"].T, normed @ part["mlp.up_proj.weight"].T
        x_TD = x_TD + (gate / (1 + np.exp(-gate)) * up) @ part["mlp.down_proj.weight"].T
    return rms_norm(x_TD, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def layer_one_loss(distance_T, dtype=np.float64):
    """How much lower than distance 1 each distance scores, from the stored weights of layer 1's first head."""
    weights, one = cast(dtype), needle.ONE
    query, key = (weights[f"model.layers.0.self_attn.{name}_proj.weight"][:64, one] for name in "qk")
    product = (query[:32] + 1j * query[32:]) * np.conj(key[:32] + 1j * key[32:]) / 8
    pairs = np.flatnonzero(product)
    score = sum(np.abs(product[i]) * np.cos(distance_T * 4.0**-i + np.angle(product[i])) for i in pairs)
    at_one = sum(np.abs(product[i]) * np.cos(4.0**-i + np.angle(product[i])) for i in pairs)
    return at_one - score


def test_code_words_are_far_apart():
    code = needle.code_words()
    assert code.shape == (2048, 32) and set(np.unique(code)) == {-1.0, 1.0}
    products = code @ code.T
    assert (np.diag(products) == 32).all()
    assert sorted(np.unique(products)) == [-32, -8, 0, 8, 32]
    assert products[~np.eye(2048, dtype=bool)].max() == 8


def test_previous_token_wins_at_every_distance():
    """Gap and total leaked mass over all distances 0..2 * 10**7, for the weights in float64."""
    gap, leak = np.inf, 0.0
    for start in range(0, FAR, 1_000_000):
        distance = np.arange(start, start + 1_000_000, dtype=np.float64)
        loss = layer_one_loss(distance[distance != 1])
        gap, leak = min(gap, loss.min()), leak + np.exp(-loss).sum()
    assert gap > 34 and leak < 1e-13


def test_previous_token_wins_where_the_ladder_comes_round():
    """Up to 2**31: the distances nearest to whole turns of the slow pairs are the dangerous ones; and at random."""
    rounds = [np.arange(1, min(2**31 / (2 * np.pi * 4**pair), 5000)) * 2 * np.pi * 4**pair for pair in range(9, 16)]
    near = np.unique(np.rint(np.concatenate(rounds)[:, None] + np.arange(-8, 9)))
    assert layer_one_loss(near[(near > 1) & (near < 2**31)]).min() > 30
    assert layer_one_loss(np.random.default_rng(0).integers(2, 2**31, 300_000).astype(np.float64)).min() > 30


def test_margins_survive_bfloat16_weights():
    distance = np.concatenate([np.r_[0, 2:300_000], np.random.default_rng(1).integers(2, FAR, 300_000)])
    assert layer_one_loss(distance.astype(np.float64), ml_dtypes.bfloat16).min() > 33


def test_matching_barely_turns():
    """Layer 2 at the farthest distance: matched above 63.9, any other at most 16.2, so 2**31 of them weigh nothing."""
    code, frequency = needle.code_words().astype(np.float64), 4.0 ** -np.arange(16, 32)
    words = (code[:, :16] + 1j * code[:, 16:]) * needle.MATCH
    for distance in (0, FAR, 2**31 - 1):
        scores = (words[:300] * np.exp(1j * distance * frequency)) @ np.conj(words).T
        scores = scores.real / 8
        matched = np.diag(scores[:, :300]).copy()
        scores[np.arange(300), np.arange(300)] = -np.inf
        gap = matched.min() - scores.max()
        assert gap > (47.9 if distance <= FAR else 40) and 2**31 * math.exp(-gap) < 1e-8


def test_exact_positions_are_needed_beyond_2_to_the_24():
    """With the engine's own tables, exact angles keep the previous token; float32 angles lose it on most rows."""
    weights, rows = needle.tensors(), 96
    query, key = (weights[f"model.layers.0.self_attn.{name}_proj.weight"][:64, needle.ONE] for name in "qk")
    right = {}
    for start in (0, 2**24 - rows, 2**24 + 1, FAR):
        for precision in ("exact", "hf_float32"):
            tables = rotary_tables(np.arange(start, start + rows, dtype=np.int32), needle.config().rope, 64, precision)
            q_TH, k_TH = (np.asarray(rotate(np.tile(x, (rows, 1, 1)), *tables))[:, 0] for x in (query, key))
            scores = np.where(np.tri(rows, dtype=bool), q_TH @ k_TH.T, -np.inf)
            right[start, precision] = (scores.argmax(axis=1)[1:] == np.arange(rows - 1)).mean()
    assert all(share == 1 for (start, precision), share in right.items() if precision == "exact" or start < 2**24)
    assert max(right[2**24 + 1, "hf_float32"], right[FAR, "hf_float32"]) < 0.6


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_finds_the_needle_in_plain_numpy(dtype):
    depths, weights = [0.0, 0.3, 0.55, 0.8, 1.0], cast(dtype)
    ids, expected = needle.prompt(600, depths, seed=3)
    positions, answers = needle.tail_checks(600, depths, seed=3)
    for token in expected:
        logits = forward(weights, ids)
        if len(ids) == 600:
            assert logits[positions].argmax(axis=1).tolist() == answers.tolist()
            best = np.sort(logits[positions], axis=1)
            assert (best[:, -1] - best[:, -2]).min() > 23.5
        assert logits[-1].argmax() == token
        ids = np.append(ids, logits[-1].argmax())


CASES = [(500, [0.5], 3), (4001, [0.1, 0.5], 3), (10_000, [1.0, 0.0, 0.4], 7)]


@pytest.mark.parametrize("length, depths, values", CASES)
def test_prompt_holds_what_it_says(length, depths, values):
    ids, expected = needle.prompt(length, depths, seed=5, values=values)
    positions, answers = needle.tail_checks(length, depths, seed=5, values=values)
    tail = (len(depths) - 1) * (values + 1) + 1
    assert ids.dtype == np.int32 and ids.shape == (length,) and ids.min() >= 0 and ids.max() < 2048
    assert ids[0] == needle.BOS and (ids == needle.BOS).sum() == 1 and (ids == needle.STOP).sum() == len(depths)
    assert len(expected) == values + 1 and expected[-1] == needle.STOP and needle.config().stop_ids == (needle.STOP,)
    assert positions.tolist() == list(range(length - tail, length)) and answers[-1] == expected[0]
    seen = set()
    for number, depth in enumerate(depths):
        key = ids[length - tail + number * (values + 1)]
        start = np.flatnonzero(ids == key)[0]
        found = ids[start : start + values + 2].tolist()
        assert abs(start - depth * (length - tail)) <= values + 3 and found[-1] == needle.STOP
        last = number == len(depths) - 1
        assert found[1:] == (expected if last else answers[number * (values + 1) :][: values + 1].tolist())
        for place, token in enumerate(found[:-1]):  # in the haystack, and in the tail unless generation must give it
            assert (ids == token).sum() == (1 if last and place else 2)
        assert not seen & set(found[:-1]) and len(set(found)) == values + 2
        seen |= set(found[:-1])
    assert len(np.unique(ids)) > min(length, 2048) * 0.6


def test_prompt_is_a_function_of_its_arguments():
    first, again, other = (needle.prompt(2000, [0.2, 0.7], seed=seed)[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).mean() > 0.9


def test_prompt_of_twenty_million_tokens():
    ids, expected = needle.prompt(FAR, np.linspace(0.05, 0.95, 5))
    assert ids.shape == (FAR,) and ids[-1] in ids[int(0.94 * FAR) : int(0.96 * FAR)] and len(expected) == 4


def test_refusals():
    for field, call in (
        ("length", lambda: needle.prompt(8, [0.1, 0.5])),
        ("depths", lambda: needle.prompt(500, [0.1, 1.5])),
        ("depths", lambda: needle.prompt(500, [])),
        ("depths", lambda: needle.prompt(500, [0.5, 0.5])),
        ("values", lambda: needle.prompt(10_000, [0.5], values=2046)),
        ("dtype", lambda: needle.save_checkpoint("nowhere", "float8")),
    ):
        with pytest.raises(RequestError) as refusal:
            call()
        assert refusal.value.field == field
    shortest = 1 + 2 * 5 + 5  # BOS, two needles, the tail
    assert needle.prompt(shortest, [0.0, 1.0])[0].tolist().count(needle.STOP) == 2
    with pytest.raises(RequestError, match=f"from {shortest} to"):
        needle.prompt(shortest - 1, [0.0, 1.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoint_reads_back(tmp_path, dtype):
    needle.save_checkpoint(tmp_path / "needle", dtype)
    stored, facts = load_file(tmp_path / "needle" / "model.safetensors"), needle.config(dtype)
    tensors = needle.tensors()
    assert stored.keys() == tensors.keys() and sum(w.size for w in stored.values()) == facts.weights
    for name, weight in tensors.items():
        assert stored[name].dtype.name == dtype
        np.testing.assert_allclose(stored[name].astype(np.float32), weight, rtol=2**-8 * (dtype == "bfloat16"))
    words = json.loads((tmp_path / "needle" / "config.json").read_text())
    assert words["rope_theta"] == words["rope_parameters"]["rope_theta"] == 2.0**64
    assert isinstance(words["rope_theta"], float) and not words["tie_word_embeddings"]
    shape = {"hidden_size": facts.width, "num_key_value_heads": facts.kv_heads, "head_dim": facts.head_dim}
    assert shape.items() <= words.items()
    assert (words["bos_token_id"], words["eos_token_id"]) == (facts.bos_id, *facts.stop_ids)
