"""Writes tests/expected/rope.json with transformers' own numbers: run with a Python that has torch and transformers 5.

Each case: the RopeConfig fields, head_dim, float32 inverse frequencies, attention factor, and cosine and sine as a
Llama model computes them at `positions`.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

OURS = {"rope_type": "type", "rope_theta": "theta", "original_max_position_embeddings": "original_positions"}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 32768}
CASES = [
    (64, {"rope_type": "default", "rope_theta": 1e4}),
    (128, {"rope_type": "default", "rope_theta": 5e5}),
    (128, {"rope_type": "default", "rope_theta": 1e7}),
    (64, {"rope_type": "default", "rope_theta": 2.0**64}),
    (128, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    (128, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}),
    (64, {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}),
    (128, {**YARN, "rope_theta": 1e6, "factor": 4.0}),
    (128, {**YARN, "rope_theta": 1e6, "factor": 4.0, "attention_factor": 1.25}),
    (64, {**YARN, "rope_theta": 1.5e5, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
    (64, {**YARN, "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16.0,
          "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.707}),
]  # fmt: skip
POSITIONS = [0, 1, 7, 1000, 123456, 10_000_000]


def compute(head_dim: int, rope: dict) -> dict:
    config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(rope))
    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1, 1, 1), torch.tensor([POSITIONS]))
    half = head_dim // 2
    return {
        "rope": {OURS.get(key, key): value for key, value in rope.items()},
        "head_dim": head_dim,
        "inv_freq": module.inv_freq.tolist(),
        "attention_factor": float(module.attention_scaling),
        "cos": cos[0, :, :half].tolist(),
        "sin": sin[0, :, :half].tolist(),
    }


if __name__ == "__main__":
    out = {"transformers": transformers.__version__, "torch": torch.__version__, "positions": POSITIONS}
    out["cases"] = [compute(head_dim, rope) for head_dim, rope in CASES]
    path = Path(__file__).parent / "expected" / "rope.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(out) + "\n")
