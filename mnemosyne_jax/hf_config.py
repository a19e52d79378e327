"""A Hugging Face config.json to ModelConfig: three spellings of rotary facts, four families, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnemosyne_jax.config import ModelConfig, RopeConfig
from mnemosyne_jax.errors import RequestError

DTYPES = ("float32", "float16", "bfloat16")

# What a config.json may leave out, with the value its family gives it in transformers.
COMMON = {
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "head_dim": None
}  # fmt: skip
QWEN = COMMON | {"max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": COMMON | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": QWEN,
    "qwen3": QWEN | {"head_dim": 128},
}


def read_config(folder: str | Path) -> ModelConfig:
    """The facts in a local folder's config.json; its end-of-sequence ids joined by generation_config.json's.

    A sliding window is accepted only where it cannot bite: in no layer, or at least as long as max_position_embeddings.

    Raises: RequestError naming the key, what it says and what would be served.
    Source: the configuration classes and `modeling_rope_utils` of transformers 5; users.md section 5.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError("checkpoint", str(folder), "must be a local folder in Hugging Face's layout")
    given = read_json(folder / "config.json")
    family = _family(given)
    facts = FAMILIES[family] | given
    _refuse_unserved(facts, family)

    heads = _number(facts, "num_attention_heads", int)
    width = _number(facts, "hidden_size", int)
    if facts["head_dim"] is None and heads and width % heads:
        raise RequestError("hidden_size", width, f"must be a multiple of num_attention_heads = {heads}")
    generation = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    biased = facts["attention_bias"] and family in ("llama", "qwen3")
    return ModelConfig(
        width=width,
        ffn=_number(facts, "intermediate_size", int),
        vocab=_number(facts, "vocab_size", int),
        layers=_number(facts, "num_hidden_layers", int),
        heads=heads,
        kv_heads=heads if facts.get("num_key_value_heads", 0) is None else _number(facts, "num_key_value_heads", int),
        head_dim=width // max(heads, 1) if facts["head_dim"] is None else _number(facts, "head_dim", int),
        rope=_rope(facts),
        norm_eps=_number(facts, "rms_norm_eps", float),
        tied=facts["tie_word_embeddings"],
        qkv_bias=family == "qwen2" or biased,
        out_bias=biased,
        qk_norm=family == "qwen3",
        stop_ids=tuple(dict.fromkeys(_ids(given) + _ids(generation))),
        bos_id=generation.get("bos_token_id") if given.get("bos_token_id") is None else given["bos_token_id"],
        dtype=_dtype(facts),
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: RequestError naming the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(
            f"checkpoint {path.name}", str(path.parent), f"must be readable ({error.strerror})"
        ) from error
    except ValueError as error:
        raise RequestError(f"checkpoint {path.name}", str(path.parent), f"must be valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise RequestError(
            f"checkpoint {path.name}", str(path.parent), f"must hold a JSON object, not {type(found).__name__}"
        )
    return found


def _number(facts: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    value = facts.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        limit = f"must be {'an integer' if kind is int else 'a number'}"
        raise RequestError(f"config.json: {where}{key}", value, limit)
    return kind(value)


def _ids(facts: Mapping[str, Any]) -> list[int]:
    ids = facts.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise RequestError("config.json: eos_token_id", ids, "must be an integer or a list of integers")
    return ids


def _family(given: Mapping[str, Any]) -> str:
    classes = {f"{name.capitalize()}ForCausalLM": name for name in FAMILIES}
    named = given.get("architectures") or []
    if unknown := [name for name in named if name not in classes]:
        raise RequestError("config.json: architectures", unknown[0], f"supported: {', '.join(classes)}")
    family = given.get("model_type") or (classes[named[0]] if named else None)
    if family not in FAMILIES:
        raise RequestError("config.json: model_type", family, f"supported: {', '.join(FAMILIES)}")
    return family


def _refuse_unserved(facts: Mapping[str, Any], family: str) -> None:
    """Facts that this engine would get wrong."""

    def refuse(key: str, limit: str) -> None:
        raise RequestError(f"config.json: {key}", facts[key], limit)

    if facts["hidden_act"] != "silu":
        refuse("hidden_act", "supported: silu")
    for key in ("quantization_config", "num_experts", "num_local_experts", "n_routed_experts"):
        if facts.get(key):
            refuse(key, "must be absent: only dense, unquantized weights are served")
    if facts.get("mlp_bias"):
        refuse("mlp_bias", "must be false")
    for key in ("tie_word_embeddings", "attention_bias"):
        if not isinstance(facts[key], bool):
            refuse(key, "must be true or false")

    window, layer_types = facts.get("sliding_window"), facts.get("layer_types") or ()
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise RequestError("config.json: layer_types", sorted(unknown), "supported: full_attention")
    if family.startswith("qwen") and not facts.get("use_sliding_window"):
        window = None
    slides = "sliding_attention" in layer_types or (family == "mistral" and window is not None)
    if family.startswith("qwen") and window is not None and not layer_types:
        slides = _number(facts, "max_window_layers", int) < _number(facts, "num_hidden_layers", int)
    longest = _number(facts, "max_position_embeddings", int)
    if slides and (window is None or window < longest):
        limit = f"must be null or at least max_position_embeddings = {longest}: attention here is over every key"
        raise RequestError("config.json: sliding_window", window, limit)


def _rope(facts: Mapping[str, Any]) -> RopeConfig:
    """Rotary facts from any of the three spellings, the older key winning over the newer as it does in transformers."""
    spelled = "rope_scaling" if facts.get("rope_scaling") else "rope_parameters"
    rope = facts.get(spelled) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise RequestError(f"config.json: {spelled}", rope, "must be one flat object, the same for every layer")
    partial = rope.get("partial_rotary_factor", facts.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise RequestError("config.json: partial_rotary_factor", partial, "must be 1: every pair of a head is turned")

    def number(key: str, default: Any = ..., kind: type = float) -> Any:
        if rope.get(key) is None and default is not ...:
            return default
        return _number(rope, key, kind, where=f"{spelled}.")

    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = number("rope_theta", _number({"rope_theta": 1e4} | dict(facts), "rope_theta", float))
    config = RopeConfig(type=kind, theta=theta)  # refuses an unknown type
    if kind == "default":
        return config
    if kind == "linear":
        return dataclasses.replace(config, factor=number("factor"))
    longest = _number(facts, "max_position_embeddings", int)
    original = number("original_max_position_embeddings", longest, int)
    if "original_max_position_embeddings" in facts:  # beside the rotary facts it wins, as in transformers
        original = _number(facts, "original_max_position_embeddings", int)
    config = dataclasses.replace(config, original_positions=original)
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return dataclasses.replace(config, **{key: number(key) for key in keys})
    return dataclasses.replace(
        config,
        factor=longest / original if "factor" in rope and rope["factor"] is None else number("factor"),
        beta_fast=number("beta_fast", 32.0) or 32.0,
        beta_slow=number("beta_slow", 1.0) or 1.0,
        truncate=bool(rope.get("truncate", True)),
        **{key: number(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim")},
    )


def _dtype(facts: Mapping[str, Any]) -> str:
    """The dtype that config.json names; where it names none, transformers' float32."""
    key = "dtype" if facts.get("dtype") else "torch_dtype"
    name = str(facts.get(key) or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise RequestError(f"config.json: {key}", name, f"supported: {', '.join(DTYPES)}")
    return name
