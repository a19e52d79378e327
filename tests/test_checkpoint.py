"""Folders and snapshots: every device holds what the tensors on disk say, once read, and what is wrong is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_checkpoint import FAMILIES, make, write
from safetensors.numpy import load_file

from mnemosyne_jax import checkpoint, snapshot
from mnemosyne_jax.config import MeshSpec, ModelConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.mesh import make_mesh
from mnemosyne_jax.model.params import Params, padded_vocab

WEIGHTS = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj", "w_up": "mlp.up_proj", "w_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}  # fmt: skip
BIASES = {"bq": "self_attn.q_proj", "bk": "self_attn.k_proj", "bv": "self_attn.v_proj", "bo": "self_attn.o_proj"}


def raw(folder: Path) -> dict[str, np.ndarray]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def expected(tensors: dict[str, np.ndarray], config: ModelConfig, spec: MeshSpec) -> dict[str, np.ndarray]:
    """Every leaf of Params as one whole array, spelled out by hand: the slow, obvious twin of `place`."""
    N, K, H, D = config.heads, config.kv_heads, config.head_dim, config.width

    def one(field: str, layer: int) -> np.ndarray:
        if field in BIASES:
            x = tensors[f"model.layers.{layer}.{BIASES[field]}.bias"]
            x = x if field == "bo" else x.reshape(N if field == "bq" else K, H)
            return np.repeat(x, max(1, spec.tp // K), 0) if field in ("bk", "bv") else x
        x = tensors[f"model.layers.{layer}.{WEIGHTS[field]}.weight"].T
        x = x.reshape({"wq": (D, N, H), "wk": (D, K, H), "wv": (D, K, H), "wo": (N, H, D)}.get(field, x.shape))
        return np.repeat(x, max(1, spec.tp // K), 1) if field in ("wk", "wv") else x

    pad = ((0, padded_vocab(config, spec) - config.vocab), (0, 0))
    leaves = {".embed": np.pad(tensors["model.embed_tokens.weight"], pad), ".final_norm": tensors["model.norm.weight"]}
    if not config.tied:
        leaves[".unembed"] = np.pad(tensors["lm_head.weight"], pad)
    fields = list(WEIGHTS | BIASES)
    present = [
        f for f in fields if any((WEIGHTS | BIASES)[f] + (".bias" if f in BIASES else ".weight") in n for n in tensors)
    ]
    per = config.layers // spec.spp
    for j in range(per):
        apart = {field: np.stack([one(field, s * per + j) for s in range(spec.spp)]) for field in present}
        for field, x in joined(apart).items():
            leaves[f".layers[{j}].{field}"] = x
    return leaves


def joined(apart: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As LayerParams has them: behind the query heads of each kv head its key, then its value."""
    heads = lambda name, K: np.split(apart[name], K, axis=-2)  # noqa: E731
    result = {"w_gate_up": np.stack([apart["w_gate"], apart["w_up"]], axis=2)}
    for letter in {name[0] for name in apart if name in ("wq", "bq")}:
        names, K = [letter + member for member in "qkv"], apart[letter + "k"].shape[-2]
        members = [np.concatenate(of_head, axis=-2) for of_head in zip(*(heads(n, K) for n in names), strict=True)]
        result[letter + "qkv"] = np.stack(members, axis=-3)
        apart = {name: x for name, x in apart.items() if name not in names}
    return result | {name: x for name, x in apart.items() if name not in ("w_gate", "w_up")}


def check(params: Params, tensors: dict[str, np.ndarray], config: ModelConfig, spec: MeshSpec) -> None:
    want = expected(tensors, config, spec)
    have = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    assert have.keys() == want.keys()
    for path, x in have.items():
        assert x.shape == want[path].shape, path
        for shard in x.addressable_shards:  # every replica, not only the first
            np.testing.assert_array_equal(np.asarray(shard.data), want[path][shard.index].astype(x.dtype), err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_load_gives_every_device_its_slices(folders, family, sizes):
    spec = MeshSpec(*sizes)
    config, params = checkpoint.load(folders[family], make_mesh(spec))
    check(params, raw(folders[family]), config, spec)
    assert config.dtype == "float32" and params.embed.dtype == jnp.float32


def test_dtype_is_the_checkpoints_unless_told_otherwise(tmp_path):
    folder, mesh = make("qwen3", tmp_path, torch_dtype="bfloat16", num_hidden_layers=2), make_mesh(MeshSpec(1, 2, 4))
    for dtype, name in ((None, "bfloat16"), (jnp.float32, "float32"), ("float16", "float16")):
        config, params = checkpoint.load(folder, mesh, dtype)
        assert config.dtype == name and {str(x.dtype) for x in jax.tree.leaves(params)} == {name}
        check(params, raw(folder), config, MeshSpec(1, 2, 4))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 1, 8)], ids=str)
def test_place_reads_every_element_once_and_never_more_than_one_weight(folders, sizes):
    folder, spec = folders["llama_yarn"], MeshSpec(*sizes)
    config, tensors = checkpoint.read_config(folder), raw(folder)
    seen: dict[str, list[int]] = {}

    def read(name, index):
        seen.setdefault(name, []).append(tensors[name][index].size)
        return tensors[name][index]

    check(checkpoint.place(config, make_mesh(spec), jnp.float32, read), tensors, config, spec)
    for name, x in tensors.items():
        repeats = max(1, spec.tp // config.kv_heads) if "k_proj" in name or "v_proj" in name else 1
        assert sum(seen[name]) == x.size * repeats, name
        if x.ndim == 2:
            rows = -(-config.vocab // (spec.spp * spec.tp)) * config.width
            shard = rows if x.shape[0] == config.vocab else x.size * repeats // spec.tp
            assert max(seen[name]) == shard, name


def test_place_refuses_a_block_of_another_shape(folders):
    config, tensors = checkpoint.read_config(folders["mistral"]), raw(folders["mistral"])
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((5, 5), np.float32)
    with pytest.raises(RequestError, match=r"model.layers.2.mlp.up_proj.weight: got \(5, 5\)"):
        checkpoint.place(config, make_mesh(MeshSpec()), jnp.float32, lambda name, index: tensors[name][index])


def test_folders_refused(folders, tmp_path):
    def refused(folder: Path, match: str) -> None:
        with pytest.raises(RequestError, match=match):
            checkpoint.load(folder, make_mesh(MeshSpec()))

    refused(tmp_path / "nowhere", "nowhere.*must be a local folder")
    refused(tmp_path, "config.json.*must be readable")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json.*must be valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json.*JSON object, not list")
    shutil.copy(folders["llama"] / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "pytorch_model.bin.*must hold model.safetensors")
    with pytest.raises(RequestError, match=r"mesh.tp: got 3, must divide heads = 8"):
        checkpoint.load(folders["llama"], make_mesh(MeshSpec(tp=3)))


def test_damaged_weights_refused_before_a_device_is_touched(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "place", lambda *_: pytest.fail("a device was touched"))
    source, tied = raw(folders["llama_yarn"]), raw(folders["llama3"])
    last = "model.layers.3.mlp.down_proj.weight"

    def refused(match: str, family: str = "llama_yarn", tensors: dict | None = None, shards: int = 1) -> None:
        if tensors is not None:
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            shutil.copy(folders[family] / "config.json", tmp_path)
            write(tmp_path, tensors, shards)
        if match:
            with pytest.raises(RequestError, match=match):
                checkpoint.load(tmp_path, make_mesh(MeshSpec()))

    refused(f"'{last}', is missing \\(1 of", tensors={k: v for k, v in source.items() if k != last})
    refused("'model.layers.0.mlp.gate_proj.bias', is not a weight", tensors=source | {
        "model.layers.0.mlp.gate_proj.bias": np.zeros(128, np.float32)})  # fmt: skip
    refused(
        "'model.layers.4.input", tensors=source | {"model.layers.4.input_layernorm.weight": source["model.norm.weight"]}
    )
    refused(rf"{last}: got \(128, 64\), .*\(64, 128\)", tensors=source | {last: source[last].T.copy()})
    refused(f"{last}: got 'I32'", tensors=source | {last: source[last].astype(np.int32)})
    refused("lm_head.weight', is missing", tensors={k: v for k, v in source.items() if k != "lm_head.weight"})
    head = tied["model.embed_tokens.weight"]
    refused("tie_word_embeddings: got True", "llama3", tied | {"lm_head.weight": head + 1})
    refused(r"lm_head.weight: got \(210, 64\)", "llama3", tied | {"lm_head.weight": head[:210].copy()})

    refused("", tensors=source)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"\xff" * 8 + whole[8:], whole + b"\0"):
        file.write_bytes(damaged)
        refused("checkpoint file model.safetensors")

    refused("", tensors=source, shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../model.safetensors", "/etc/passwd", "sub/x.safetensors", "model.bin"):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {last: name}}))
        refused(f"weight_map: got '{name}'")
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {last: "gone.safetensors"}}))
    refused("checkpoint file gone.safetensors")
    path.write_text(json.dumps({"weight_map": {}, "metadata": {}}))
    refused("checkpoint tensors: got 'model.embed_tokens.weight', is missing")
    path.write_text(json.dumps({"metadata": {}}))
    refused("weight_map: got None")
    path.write_text(json.dumps(index))
    first, second = (load_file(tmp_path / file) for file in sorted(set(index["weight_map"].values())))
    from safetensors.numpy import save_file

    twice = next(iter(first))
    save_file(second | {twice: first[twice]}, tmp_path / "model-00002-of-00002.safetensors")
    refused(f"'{twice}', is stored twice")


def test_harmless_spares_are_accepted(folders, tmp_path):
    tensors, mesh = raw(folders["llama3"]), make_mesh(MeshSpec())
    shutil.copy(folders["llama3"] / "config.json", tmp_path)
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    write(tmp_path, tensors | spare)
    config, params = checkpoint.load(tmp_path, mesh)
    assert params.unembed is None
    check(params, tensors, config, MeshSpec())


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("llama", (1, 1, 1), (1, 3, 2)),
        ("llama", (2, 3, 1), (1, 2, 4)),  # tp > kv heads
        ("qwen2", (1, 1, 8), (2, 2, 2)),  # from tp > kv heads, biases and all
        ("qwen3", (1, 2, 1), (1, 1, 2)),
    ],
)
def test_snapshot_is_of_no_mesh(folders, tmp_path, family, before, after):
    config, params = checkpoint.load(folders[family], make_mesh(MeshSpec(*before)))
    snapshot.save(tmp_path / "saved", params, config)
    restored, again = snapshot.restore(tmp_path / "saved", make_mesh(MeshSpec(*after)))
    assert restored == config
    check(again, raw(folders[family]), config, MeshSpec(*after))


def test_snapshot_dtype_and_refusals(folders, tmp_path):
    mesh = make_mesh(MeshSpec(1, 2, 2))
    config, params = checkpoint.load(folders["mistral"], mesh, jnp.bfloat16)
    saved = tmp_path / "saved"
    snapshot.save(saved, params, config)
    assert snapshot.restore(saved, mesh)[0].dtype == "bfloat16"
    wide, again = snapshot.restore(saved, mesh, jnp.float32)
    assert wide.dtype == "float32" and again.embed.dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b))

    with pytest.raises(RequestError, match="must be new or empty"):
        snapshot.save(saved, params, config)
    with pytest.raises(RequestError, match="mesh.spp: got 3, must divide layers = 4"):
        snapshot.restore(saved, make_mesh(MeshSpec(spp=3)))
    known = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_text(json.dumps(known | {"ffn": 64}))
    with pytest.raises(RequestError, match="snapshot layer_00000"):
        snapshot.restore(saved, mesh)
    (saved / "model.json").write_text(json.dumps(known | {"layers": 6}))
    with pytest.raises(RequestError, match="layer_00004"):
        snapshot.restore(saved, mesh)
    (saved / "model.json").write_text(json.dumps(known | {"format": 0}))
    with pytest.raises(RequestError, match="format 1"):
        snapshot.restore(saved, mesh)
    (saved / "model.json").unlink()  # what an interrupted save leaves
    with pytest.raises(RequestError, match="must hold a finished save"):
        snapshot.restore(saved, mesh)
