"""What a Hugging Face config.json says of a model, as transformers reads it; what is not served is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from make_checkpoint import FAMILIES, SIZES

from mnemosyne_jax import checkpoint
from mnemosyne_jax.config import ModelConfig, RopeConfig
from mnemosyne_jax.errors import RequestError


def facts(tmp_path: Path, family: str, *dropped: str, **overrides) -> ModelConfig:
    given = {k: v for k, v in (SIZES | FAMILIES[family] | overrides).items() if k not in dropped}
    (tmp_path / "config.json").write_text(json.dumps(given))
    return checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_transformers_reads(folders, family):
    from transformers import AutoConfig

    ours, theirs = checkpoint.read_config(folders[family]), AutoConfig.from_pretrained(folders[family])
    assert (ours.width, ours.ffn, ours.vocab) == (theirs.hidden_size, theirs.intermediate_size, theirs.vocab_size)
    assert (ours.layers, ours.heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.norm_eps, ours.tied, ours.bos_id) == (1e-5, theirs.tie_word_embeddings, 1)
    rope, names = theirs.rope_parameters, {"rope_type": "type", "rope_theta": "theta"}
    names["original_max_position_embeddings"] = "original_positions"
    for key, value in rope.items():
        if key != "type":
            assert getattr(ours.rope, str(names.get(key, key))) == value, key


def test_facts_of_each_family(tmp_path):
    assert [facts(tmp_path, f).qkv_bias for f in FAMILIES] == [False, True, False, False, True, False]
    assert [facts(tmp_path, f).out_bias for f in FAMILIES] == [False, True, False, False, False, False]
    assert [facts(tmp_path, f).qk_norm for f in FAMILIES] == [False] * 5 + [True]
    assert facts(tmp_path, "qwen3", attention_bias=True).out_bias
    assert facts(tmp_path, "qwen3", "head_dim").head_dim == 128
    assert facts(tmp_path, "llama", "num_key_value_heads").kv_heads == 8
    assert facts(tmp_path, "mistral", "torch_dtype", dtype="bfloat16").dtype == "bfloat16"
    assert facts(tmp_path, "mistral", "architectures").heads == facts(tmp_path, "mistral", "model_type").heads == 8


def test_stop_ids_join_both_files(folders, tmp_path):
    assert checkpoint.read_config(folders["llama3"]).stop_ids == (2, 3, 5)
    assert checkpoint.read_config(folders["qwen2"]).stop_ids == (2,)
    assert (
        facts(tmp_path, "qwen2", "eos_token_id").stop_ids == () == facts(tmp_path, "qwen2", eos_token_id=None).stop_ids
    )


def test_three_spellings_of_rope_agree(tmp_path):
    scaled = {"factor": 4.0, "original_max_position_embeddings": 64}
    none = ("rope_scaling", "rope_parameters", "rope_theta")
    want = RopeConfig("yarn", 5e5, factor=4.0, original_positions=64)
    for spelled in (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5} | scaled},
        {"rope_scaling": {"rope_type": "yarn"} | scaled, "rope_theta": 5e5},
        {"rope_scaling": {"type": "yarn"} | scaled, "rope_theta": 500000},
        {"rope_parameters": {"rope_type": "yarn"} | scaled, "rope_scaling": None, "rope_theta": 5e5},
    ):
        assert facts(tmp_path, "llama", *set(none) - set(spelled), **spelled).rope == want
    assert facts(tmp_path, "llama", *none).rope == RopeConfig()
    short = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "attention_factor": 1.5}
    rope = facts(tmp_path, "llama", "rope_scaling", rope_parameters=short, max_position_embeddings=256).rope
    assert (rope.original_positions, rope.attention_factor, rope.beta_fast) == (256, 1.5, 32.0)
    short |= {"factor": None, "original_max_position_embeddings": 64}
    rope = facts(tmp_path, "llama", "rope_scaling", rope_parameters=short, max_position_embeddings=256).rope
    assert rope.factor == 4.0


@pytest.mark.parametrize(
    ("family", "overrides", "field", "value"),
    [
        ("llama", {"model_type": "gemma"}, "model_type", "gemma"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures", "LlamaForSequenceClassif"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ("llama", {"mlp_bias": True}, "mlp_bias", "True"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type", "dynamic"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type", "longrope"),
        ("llama", {"rope_scaling": {"rope_type": "spiral"}}, "rope type", "spiral"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor", "None"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor", "None"),
        ("llama", {"rope_scaling": {"full_attention": {"rope_type": "default"}}}, "rope_scaling", "full_attention"),
        ("llama", {"rope_theta": "1e4"}, "rope_theta", "1e4"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config", "fp8"),
        ("llama", {"num_local_experts": 8}, "num_local_experts", "8"),
        ("llama", {"hidden_size": None}, "hidden_size", "None"),
        ("llama", {"hidden_size": "64"}, "hidden_size", "64"),
        ("llama", {"hidden_size": 65}, "hidden_size", "65"),
        ("llama", {"num_key_value_heads": 3}, "heads", "8"),
        ("llama", {"torch_dtype": "int8"}, "torch_dtype", "int8"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings", "1"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id", "</s>"),
        ("mistral", {"sliding_window": 1024}, "sliding_window", "1024"),
        ("qwen2", {"use_sliding_window": True}, "sliding_window", "256"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window", "None"),
        ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types", "linear_attention"),
    ],
)
def test_facts_refused(tmp_path, family, overrides, field, value):
    with pytest.raises(RequestError) as caught:
        facts(tmp_path, family, **overrides)
    assert field in caught.value.field and value in str(caught.value.value) and caught.value.limit


def test_missing_facts_refused(tmp_path):
    for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(RequestError, match=key):
            facts(tmp_path, "mistral", key)
    with pytest.raises(RequestError, match="sliding_window: got 4096"):  # transformers' default for an absent key
        facts(tmp_path, "mistral", "sliding_window", max_position_embeddings=8192)


def test_window_that_cannot_bite_is_accepted(tmp_path):
    facts(tmp_path, "mistral", sliding_window=4096)
    facts(tmp_path, "qwen2", use_sliding_window=True, sliding_window=256, max_window_layers=4)
    facts(tmp_path, "qwen2", use_sliding_window=False, sliding_window=256)
