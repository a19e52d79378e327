"""Hugging Face folders of safetensors to Params: names and shapes verified, then weights placed slice by slice."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from mnemosyne_jax.config import ModelConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.hf_config import read_config, read_json
from mnemosyne_jax.model.params import APART, Params, abstract, join

# Field of Params -> name on disk, and how the dimensions there become ours; (n h) are two of ours flattened into one.
# The four families agree on every name; a family that does not would bring a table of its own.
ENDS = {
    "embed": ("model.embed_tokens.weight", "v d -> v d"),
    "final_norm": ("model.norm.weight", "d -> d"),
    "unembed": ("lm_head.weight", "v d -> v d"),
}
LAYER = {
    "attn_norm": ("model.layers.{}.input_layernorm.weight", "d -> d"),
    "wq": ("model.layers.{}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    "wk": ("model.layers.{}.self_attn.k_proj.weight", "(k h) d -> d k h"),
    "wv": ("model.layers.{}.self_attn.v_proj.weight", "(k h) d -> d k h"),
    "wo": ("model.layers.{}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    "bq": ("model.layers.{}.self_attn.q_proj.bias", "(n h) -> n h"),
    "bk": ("model.layers.{}.self_attn.k_proj.bias", "(k h) -> k h"),
    "bv": ("model.layers.{}.self_attn.v_proj.bias", "(k h) -> k h"),
    "bo": ("model.layers.{}.self_attn.o_proj.bias", "d -> d"),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight", "h -> h"),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight", "h -> h"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", "d -> d"),
    "w_gate": ("model.layers.{}.mlp.gate_proj.weight", "f d -> d f"),
    "w_up": ("model.layers.{}.mlp.up_proj.weight", "f d -> d f"),
    "w_down": ("model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Read = Callable[[str, tuple[slice, ...]], np.ndarray]


def load(folder: str | Path, mesh: Mesh, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """The model in a local folder: its facts, and its weights on `mesh` in `dtype` (None: the checkpoint's).

    The returned config's dtype is the one the weights have. Names and shapes are verified against the facts before
    any weight is read; then each process reads the slices that its own devices hold, each once.

    Raises: RequestError for what `read_config` refuses, for a missing, extra, misshapen or doubly stored tensor, a
    truncated file, an index that points outside the folder, and a mesh that does not divide the model.
    """
    folder = Path(folder)
    config = read_config(folder)
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    abstract(config, mesh, dtype)  # refuses the mesh before the files are opened
    stored = _open_tensors(folder)
    _verify(config, {name: tuple(tensor.get_shape()) for name, (_, tensor) in stored.items()})
    for name, (file, tensor) in stored.items():
        if tensor.get_dtype() not in DTYPES:
            raise RequestError(f"{file}: {name}", tensor.get_dtype(), f"must be one of {', '.join(DTYPES)}")

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return stored[name][1][index]

    if config.tied and "lm_head.weight" in stored:
        _refuse_untied(config, read)
    return dataclasses.replace(config, dtype=dtype.name), place(config, mesh, dtype, read)


def place(config: ModelConfig, mesh: Mesh, dtype: Any, read: Read) -> Params:
    """Params on `mesh` in `dtype`, from weights that `read(name, index)` gives under Llama's names and shapes on disk.

    `index` has one slice per dimension on disk (a linear weight is [out, in]). A slice that several devices hold is
    read once. At most one array's slices wait on the host at a time, and no host array is larger than one of one layer.
    Vocabulary rows beyond the model's are zero; kv heads fewer than tp are repeated.

    Raises: RequestError if the mesh does not divide the model, or `read` gives another shape than asked.
    """
    target = abstract(config, mesh, dtype)
    stage_layers = config.layers // mesh.shape["spp"]

    def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
        field = path[-1].name

        def fetch(index: tuple[slice, ...]) -> np.ndarray:
            if field in ENDS:
                return _fetch(config, *ENDS[field], index, x.shape, read).astype(x.dtype, copy=False)
            layer = (index[0].start or 0) * stage_layers + path[1].idx  # split over spp: a slice is of one stage
            parts = []
            for part in APART.get(field, (field,)):
                name, dims = LAYER[part]
                where = _within_part(field, part, index[1:], x.shape[1:])
                parts.append(_fetch(config, name.format(layer), dims, *where, read).astype(x.dtype, copy=False))
            return join(field, *parts)[None]

        return _put(x, fetch)

    return jax.tree.map_with_path(leaf, target)


def _put(x: jax.ShapeDtypeStruct, fetch: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    """The array that `x` describes. Not make_array_from_callback: that reads a slice anew for every kvp replica."""
    holders: dict[tuple[tuple[int | None, int | None], ...], list[Any]] = {}
    for device, index in x.sharding.addressable_devices_indices_map(x.shape).items():
        holders.setdefault(tuple((s.start, s.stop) for s in index or ()), []).append(device)
    shards = []
    for bounds, devices in holders.items():
        block = fetch(tuple(slice(*b) for b in bounds))
        shards += [jax.device_put(block, device) for device in devices]
    made = jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards, dtype=x.dtype)
    return made.block_until_ready()  # host slices live until their transfer is done: keep one weight's at a time


def _within_part(
    field: str, part: str, index: tuple[slice, ...], shape: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[int, ...]]:
    """The index and the shape in one of the arrays that `field` joins, for an index into it and its shape."""
    if field not in APART:
        return index, shape
    if field == "w_gate_up":
        return (index[0], index[2]), (shape[0], shape[2])
    *index_before, kv_heads, _, head_dim = index
    *before, K, members, H = shape
    a_head = members - 2 if part in ("wq", "bq") else 1
    first, end, _ = kv_heads.indices(K)
    return (*index_before, slice(first * a_head, end * a_head), head_dim), (*before, K * a_head, H)


def _fetch(
    config: ModelConfig, name: str, dims: str, index: tuple[slice, ...], shape: tuple[int, ...], read: Read
) -> np.ndarray:
    """The block `index` of a weight of `shape` in Params' layout, read from its layout on disk."""
    sizes = _sizes(config)
    disk, ours = dims.split(" -> ")
    letters = ours.split()
    want = {letter: range(*s.indices(n)) for letter, s, n in zip(letters, index, shape, strict=True)}
    block_shape = [len(r) for r in want.values()]
    heads = None
    if "k" in want:
        copies = shape[letters.index("k")] // sizes["k"]
        heads = np.array(want["k"]) // copies
        want["k"] = range(heads[0], heads[-1] + 1)
    if "v" in want:
        want["v"] = range(min(want["v"].start, sizes["v"]), min(want["v"].stop, sizes["v"]))
    asked = []
    for group in _groups(disk):  # only a group's first dimension is ever split
        inner = prod(sizes[letter] for letter in group[1:])
        asked.append(slice(want[group[0]].start * inner, want[group[0]].stop * inner))
    block = read(name, tuple(asked))
    if block.shape != (expected := tuple(s.stop - s.start for s in asked)):
        raise RequestError(name, block.shape, f"must have shape {expected} at {asked}")
    block = rearrange(block, dims, **({"h": sizes["h"]} if "(" in disk else {}))
    if heads is not None and len(heads) != len(want["k"]):
        block = np.take(block, heads - heads[0], axis=letters.index("k"))
    if (missing := block_shape[0] - block.shape[0]) and "v" in want:
        block = np.concatenate([block, np.zeros((missing, *block.shape[1:]), block.dtype)])
    return block


def _groups(disk: str) -> list[list[str]]:
    return [word.strip("()").split() for word in re.findall(r"\([^)]*\)|\w+", disk)]


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "d": config.width, "f": config.ffn, "v": config.vocab,
        "n": config.heads, "k": config.kv_heads, "h": config.head_dim,
    }  # fmt: skip


def disk_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape on disk of every weight of the model: what `load` demands and `place` asks for."""
    absent = {"unembed"} if config.tied else set()
    absent |= set() if config.qkv_bias else {"bq", "bk", "bv"}
    absent |= set() if config.out_bias else {"bo"}
    absent |= set() if config.qk_norm else {"q_norm", "k_norm"}
    named = [entry for field, entry in ENDS.items() if field not in absent]
    for layer in range(config.layers):
        named += [(name.format(layer), dims) for field, (name, dims) in LAYER.items() if field not in absent]
    sizes = _sizes(config)
    return {
        name: tuple(prod(sizes[letter] for letter in group) for group in _groups(dims.split(" -> ")[0]))
        for name, dims in named
    }


def _verify(config: ModelConfig, stored: Mapping[str, tuple[int, ...]]) -> None:
    expected = disk_shapes(config)
    spare = {"lm_head.weight": expected["model.embed_tokens.weight"]} if config.tied else {}
    if missing := [name for name in expected if name not in stored]:
        raise RequestError("checkpoint tensors", missing[0], f"is missing ({len(missing)} of {len(expected)} are)")
    if extra := [name for name in stored if name not in expected | spare]:
        raise RequestError("checkpoint tensors", extra[0], f"is not a weight of this model ({len(extra)} such tensors)")
    for name, shape in stored.items():
        if shape != (expected | spare)[name]:
            raise RequestError(f"shape of {name}", shape, f"the facts say {(expected | spare)[name]}")


def _refuse_untied(config: ModelConfig, read: Read) -> None:
    """A tied model may store its unembedding too, but then the same one: transformers would not tie others."""
    for start in range(0, config.vocab, 4096):
        rows = (slice(start, min(start + 4096, config.vocab)), slice(0, config.width))
        if not np.array_equal(read("lm_head.weight", rows), read("model.embed_tokens.weight", rows)):
            raise RequestError("tie_word_embeddings", True, "must be false: lm_head.weight is not the embedding")


def _open_tensors(folder: Path) -> dict[str, tuple[str, Any]]:
    """Name -> (file, lazy tensor) of every tensor in the folder's safetensors; nothing but headers is read."""
    from safetensors import SafetensorError, safe_open

    index_path = folder / "model.safetensors.index.json"
    index: dict[str, str] | None = None
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index_path.is_file():
        index = read_json(index_path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise RequestError(f"{index_path.name}: weight_map", index, "must map tensor names to file names")
        files = sorted(set(index.values()))
    else:
        found = " ".join(sorted(path.name for path in folder.iterdir()))
        raise RequestError("checkpoint", found, "must hold model.safetensors or model.safetensors.index.json")
    stored: dict[str, tuple[str, Any]] = {}
    for file in files:  # all of them before the first is opened
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise RequestError(f"{index_path.name}: weight_map", file, "must be a .safetensors file in the same folder")
    for file in files:
        try:
            handle = safe_open(folder / file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise RequestError(f"checkpoint file {file}", str(error), "must be whole and readable") from error
        for name in handle.keys():  # noqa: SIM118 (not a mapping: only keys() lists it)
            if name.endswith("rotary_emb.inv_freq"):  # old exports store this; it follows from the config
                continue
            if name in stored:
                raise RequestError("checkpoint tensors", name, f"is stored twice, in {stored[name][0]} and {file}")
            if index is not None and index.get(name) != file:
                raise RequestError(f"{index_path.name}: {name}", index.get(name), f"but the tensor is in {file}")
            stored[name] = (file, handle.get_slice(name))
    return stored
