"""A retrieval model with constructed weights: finds a planted value at any depth of any length, with no training.

A Llama of two layers and no MLP. Prompted with a haystack that holds `KEY V1 .. Vk STOP` once, and ending in KEY, it
generates V1 .. Vk STOP. Three ideas make that exact rather than likely.

Tokens are +-1 words of the extended BCH code [32, 11, 12]: 2,048 of them, whose inner products are at most 8 of 32.
The residual stream has four slots: content [0, 32), previous content [32, 64), output [64, 96), a constant 1 at 96.

Layer 1 writes each token's content into the "previous" slot of the next. It reads only the constant: on rotary pair i
the key is (s, 0) and the query s (cos t, -sin t) for the pair's frequency t, so that the score at distance d is
sum_i A_i cos((d - 1) t_i) with A_i = s_i**2 / sqrt(head_dim), largest at d = 1. With theta = 2**64 the frequencies are
4**-i: a ladder from one radian per token to less than one turn in 2**31 tokens, on which every other distance loses at
least 34 of 552 up to 2 * 10**7 tokens. Positions must be right to a fraction of a radian for that.

Layer 2 looks for the position whose previous content is its own content, on the pairs that barely turn, and copies
that position's content to the output: what followed this token last time. Matched scores are 64, others at most 16.

The second head of each layer is a copy that carries half of the output, so that two shards (tp = 2) divide the work.
Every scale is a short binary fraction: bfloat16 holds it.

Source: previous-token and induction heads (Olsson et al. 2022), set by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mnemosyne_jax.config import ModelConfig, RopeConfig
from mnemosyne_jax.errors import RequestError

BOS, STOP = 0, 1
CODE = 32  # length of a code word, and the width of a slot of the residual stream
GENERATOR = 0o5423325  # of the BCH code [31, 11, 11]; one parity bit makes it [32, 11, 12]
WORD_BITS = 11
ONE = 3 * CODE  # the residual entry that is 1 for every token
WIDTH, HEAD_DIM, HEADS = 128, 64, 2
LADDER = np.array([24.0] + [16.0] * 15)  # s_i of layer 1, rotary pairs 0..15
MATCH = 4.0  # scale of query and of key in layer 2: 32 matches * 4 * 4 / sqrt(64) = 64


def config(dtype: str = "float32") -> ModelConfig:
    """The model's facts: any mesh with tp and spp at most 2 divides it."""
    return ModelConfig(
        width=WIDTH, ffn=8, vocab=2**WORD_BITS, layers=2, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM,
        rope=RopeConfig(theta=2.0**64), norm_eps=1e-6, tied=False, stop_ids=(STOP,), bos_id=BOS, dtype=dtype,
    )  # fmt: skip


def code_words() -> np.ndarray:
    """The code of every token, +-1 as float32 [V, 32]: any two different words have inner product at most 8."""
    generator = np.array([GENERATOR >> bit & 1 for bit in range(CODE - WORD_BITS)])
    rows = np.stack([np.pad(generator, (row, WORD_BITS - 1 - row)) for row in range(WORD_BITS)])
    messages = np.arange(2**WORD_BITS)[:, None] >> np.arange(WORD_BITS) & 1
    bits = messages @ rows % 2
    bits = np.concatenate([bits, bits.sum(axis=1, keepdims=True) % 2], axis=1)
    return (1 - 2 * bits).astype(np.float32)


def tensors() -> dict[str, np.ndarray]:
    """The weights under Hugging Face's Llama names, float32, matrices as [out, in]."""
    facts, code, slot = config(), code_words(), np.eye(WIDTH, dtype=np.float32)
    content, previous, output = slot[:CODE], slot[CODE : 2 * CODE], slot[2 * CODE : ONE]
    embedding = code @ content + slot[ONE]
    pairs = np.arange(len(LADDER))
    frequency = 4.0**-pairs

    # Layer 1: first halves of the pairs are head rows [0, 16), second halves [32, 48).
    query, key = np.zeros((2, HEAD_DIM, WIDTH), np.float32)
    query[pairs, ONE], query[pairs + HEAD_DIM // 2, ONE] = LADDER * np.cos(frequency), -LADDER * np.sin(frequency)
    key[pairs, ONE] = LADDER
    value = np.concatenate([content, np.zeros_like(content)])
    layers = [(query, key, value, previous)]

    # Layer 2: the 32 code positions lie on the slow pairs 16..31, which are head rows [16, 32) and [48, 64).
    slow = np.r_[HEAD_DIM // 4 : HEAD_DIM // 2, 3 * HEAD_DIM // 4 : HEAD_DIM]
    query, key = np.zeros((2, HEAD_DIM, WIDTH), np.float32)
    query[slow], key[slow] = MATCH * content, MATCH * previous
    layers.append((query, key, value, output))

    # RMSNorm divides by a length that is the same for every token, because the codes are +-1: its weight undoes it.
    def undo_norm(filled: int) -> np.ndarray:
        return np.full(WIDTH, math.sqrt(filled / WIDTH + facts.norm_eps), np.float32)

    names = {"model.embed_tokens.weight": embedding, "lm_head.weight": code @ output}
    names["model.norm.weight"] = undo_norm(3 * CODE + 1)
    for index, (query, key, value, target) in enumerate(layers):
        layer = f"model.layers.{index}."
        names[layer + "input_layernorm.weight"] = undo_norm((index + 1) * CODE + 1)
        names[layer + "post_attention_layernorm.weight"] = np.ones(WIDTH, np.float32)
        for name, weight in (("q", query), ("k", key), ("v", value)):
            names[f"{layer}self_attn.{name}_proj.weight"] = np.concatenate([weight] * HEADS)
        out = np.concatenate([target, np.zeros_like(target)]).T / HEADS
        names[layer + "self_attn.o_proj.weight"] = np.concatenate([out] * HEADS, axis=1)
        for name, shape in (("gate", (facts.ffn, WIDTH)), ("up", (facts.ffn, WIDTH)), ("down", (WIDTH, facts.ffn))):
            names[f"{layer}mlp.{name}_proj.weight"] = np.zeros(shape, np.float32)
    return names


def save_checkpoint(folder: str | Path, dtype: str = "float32") -> None:
    """Writes config.json and model.safetensors: an ordinary Llama checkpoint, for this package and for transformers."""
    import ml_dtypes
    from safetensors.numpy import save_file

    if dtype not in ("float32", "bfloat16"):
        raise RequestError("dtype", dtype, "must be 'float32' or 'bfloat16'")
    facts, folder = config(dtype), Path(folder)
    # Transformers 4 reads rope_theta and torch_dtype, 5 reads rope_parameters and dtype; theta must be a JSON float,
    # since torch has no integer as large.
    words = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": facts.width, "intermediate_size": facts.ffn, "vocab_size": facts.vocab,
        "num_hidden_layers": facts.layers, "num_attention_heads": facts.heads, "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim, "rms_norm_eps": facts.norm_eps, "max_position_embeddings": 2**31 - 1,
        "rope_theta": facts.rope.theta, "rope_parameters": {"rope_type": "default", "rope_theta": facts.rope.theta},
        "tie_word_embeddings": facts.tied, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": BOS, "eos_token_id": STOP, "torch_dtype": dtype, "dtype": dtype,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(words, indent=2) + "\n")
    stored = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    weights = {name: np.ascontiguousarray(weight, stored) for name, weight in tensors().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def prompt(length: int, depths: Sequence[float], seed: int = 0, values: int = 3) -> tuple[np.ndarray, list[int]]:
    """A haystack of exactly `length` tokens with one needle per depth, and the tokens that generation must give.

    A needle is KEY V1 .. Vk STOP, k = `values`, planted at that fraction of the haystack (0 the start, 1 the end); its
    tokens occur nowhere else. The prompt's tail asks again for all of them in order, KEY V1 .. Vk each, the last one by
    its KEY alone: so generation gives the last needle's values and STOP, and `logits` at `tail_checks` the others'.

    Shapes: int32 [length], list of k + 1.
    Raises: RequestError if the needles do not fit the length, the vocabulary, or one another.
    """
    needle_ids, starts, tail, filler, rng = _plan(length, depths, seed, values)
    ids = filler[rng.integers(0, len(filler), length, dtype=np.int32)]
    ids[0] = BOS
    for start, needle in zip(starts, needle_ids, strict=True):
        ids[start : start + len(needle) + 1] = [*needle, STOP]
    ids[length - len(tail) :] = tail
    return ids, [*needle_ids[-1, 1:].tolist(), STOP]


def tail_checks(length: int, depths: Sequence[float], seed: int = 0, values: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the tail of `prompt` (same arguments), and the token that must come out as largest logit at each.

    Shapes: two int32 [(len(depths) - 1) * (values + 1) + 1], ascending; the last is the prompt's last position.
    """
    needle_ids, _, tail, _, _ = _plan(length, depths, seed, values)
    answers = np.concatenate([needle_ids[:, 1:], np.full((len(needle_ids), 1), STOP)], axis=1).ravel()
    return np.arange(length - len(tail), length, dtype=np.int32), answers[: len(tail)].astype(np.int32)


def _plan(length: int, depths: Sequence[float], seed: int, values: int):
    """Needles as [needle, KEY and values], their starts, the tail, the filler's ids, the generator to draw it with."""
    at, vocab = np.atleast_1d(np.asarray(depths, np.float64)), 2**WORD_BITS
    needles, size = len(at), values + 2
    if needles < 1 or not ((at >= 0) & (at <= 1)).all():
        raise RequestError("depths", at.tolist(), "must be one or more fractions from 0 to 1")
    if values < 1 or needles * (values + 1) > vocab - 3:
        raise RequestError("values", values, f"{needles} needles of KEY and values must leave filler among {vocab} ids")
    tail_tokens = (needles - 1) * (values + 1) + 1
    shortest = 1 + needles * size + tail_tokens
    if not shortest <= length < 2**31:
        raise RequestError("length", length, f"must be from {shortest} to {2**31 - 1}")
    starts = 1 + np.rint(at * (length - 1 - tail_tokens - size)).astype(np.int64)
    if needles > 1 and np.diff(np.sort(starts)).min() < size:
        raise RequestError("depths", at.tolist(), f"needles of {size} tokens overlap in {length}")
    rng = np.random.default_rng(seed)
    ids = 2 + rng.permutation(vocab - 2).astype(np.int32)
    needle_ids = ids[: needles * (values + 1)].reshape(needles, values + 1)
    return needle_ids, starts, needle_ids.ravel()[:tail_tokens], ids[needle_ids.size :], rng
