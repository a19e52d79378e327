"""Tiny random Hugging Face folders, one per family, from a seed: numpy and safetensors only.

Wide weights (logits of about 5, with a clear greatest), noise on norms and biases (a forgotten one is seen), a prime
vocabulary (padding is exercised), rotary scaling that bites within 300 tokens. `python tests/make_checkpoint.py
FAMILY FOLDER [SHARDS]` makes one.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "vocab_size": 211, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip

# Each family's own facts; between them every spelling of the rotary facts and every bias occurs.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True, "head_dim": 8,
        "eos_token_id": [2, 3], "max_position_embeddings": 512, "rope_theta": 500000.0, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False,
        "num_hidden_layers": 6, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": False,
        "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "llama_yarn": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False, "head_dim": 16,
        "max_position_embeddings": 512, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 16.0, "beta_slow": 2.0,
            "original_max_position_embeddings": 64, "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False,
        },
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "tie_word_embeddings": False,
        "head_dim": None, "sliding_window": None, "rope_theta": 1000000.0,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True,
        "num_key_value_heads": 2, "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 256,
        "max_window_layers": 2,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16,
        "num_key_value_heads": 2, "attention_bias": False, "max_position_embeddings": 256, "rope_theta": 1000000.0,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
}  # fmt: skip


def make(family: str, folder: str | Path, shards: int = 1, seed: int = 0, **overrides: Any) -> Path:
    """`folder`, holding the family's config.json, generation_config.json and its weights in `shards` files.

    `overrides` replace keys of config.json before the weights are drawn; torch_dtype says how they are stored.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = SIZES | FAMILIES[family] | overrides
    generation = {"bos_token_id": 1, "eos_token_id": [2, 5] if family == "llama3" else 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write(folder, weights(config, seed + zlib.crc32(family.encode())), shards)
    return folder


def weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Random weights under their names on disk, each of the stored dtype."""
    rng = np.random.default_rng(seed)
    if config["torch_dtype"] == "bfloat16":  # teaches numpy the name; the oracle's Python has no need of it
        import ml_dtypes  # noqa: F401
    dtype = np.dtype(config["torch_dtype"])
    D, F, V, N = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"))
    H = config.get("head_dim") or D // N
    K = config["num_key_value_heads"]
    tensors: dict[str, np.ndarray] = {}

    def draw(name: str, *shape: int, scale: float, mean: float = 0.0) -> None:
        tensors[name] = (mean + scale * rng.standard_normal(shape, np.float32)).astype(dtype)

    def project(name: str, rows: int, columns: int, bias: bool) -> None:
        draw(f"{name}.weight", rows, columns, scale=0.2)
        if bias:
            draw(f"{name}.bias", rows, scale=0.3)

    draw("model.embed_tokens.weight", V, D, scale=0.3)
    everywhere = config["model_type"] in ("llama", "qwen3") and config.get("attention_bias", False)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            draw(f"{at}.{name}.weight", D, scale=0.2, mean=1.0)
        for name, rows in (("q", N), ("k", K), ("v", K)):
            project(f"{at}.self_attn.{name}_proj", rows * H, D, everywhere or config["model_type"] == "qwen2")
        project(f"{at}.self_attn.o_proj", D, N * H, everywhere)
        if config["model_type"] == "qwen3":
            for name in ("q_norm", "k_norm"):
                draw(f"{at}.self_attn.{name}.weight", H, scale=0.2, mean=1.0)
        for name, rows, columns in (("gate", F, D), ("up", F, D), ("down", D, F)):
            project(f"{at}.mlp.{name}_proj", rows, columns, False)
    draw("model.norm.weight", D, scale=0.2, mean=1.0)
    if not config["tie_word_embeddings"]:
        draw("lm_head.weight", V, D, scale=0.2)
    return tensors


def write(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """`tensors` as model.safetensors, or dealt out over `shards` files with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
