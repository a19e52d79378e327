"""Params to and from disk with orbax, in one layout that belongs to no mesh: any (kvp, spp, tp) assembles its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnemosyne_jax.config import ModelConfig, RopeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.mesh import partition
from mnemosyne_jax.model.params import APART, LayerParams, Params, abstract, join, layer_shapes, split

FACTS = "model.json"
FORMAT = 1
DIMS = {field.name: field.metadata["dims"].removeprefix("stage/spp ") for field in dataclasses.fields(LayerParams)}


def save(folder: str | Path, params: Params, config: ModelConfig) -> None:
    """Writes the weights and facts into a new folder: `ends/`, `layer_00000/`, ... and last, as its seal, model.json.

    Each of these is an orbax checkpoint of plain arrays: no stage axis, the model's own vocabulary and kv heads. While
    it runs a device holds, beyond its weights, its shards of one layer of every stage. In a multi-process run every
    process calls this, on a folder that all of them see.

    Raises: RequestError if the folder exists and is not empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError("snapshot folder", str(folder), "must be new or empty")
    multihost_utils.sync_global_devices("snapshot: every process has looked")
    mesh = params.embed.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    checkpointer = _checkpointer()
    # A vocabulary without its padding seldom divides: the width is split instead, where it divides.
    columns = ("spp", "tp") if config.width % (mesh.shape["spp"] * mesh.shape["tp"]) == 0 else None
    ends = {name: getattr(params, name) for name in _end_shapes(config)}
    specs = {name: PartitionSpec(None, columns) if x.ndim == 2 else PartitionSpec() for name, x in ends.items()}
    unpad = jax.jit(
        lambda ends: {name: x[: config.vocab] if x.ndim == 2 else x for name, x in ends.items()},
        out_shardings={name: NamedSharding(mesh, spec) for name, spec in specs.items()},
    )
    checkpointer.save(folder / "ends", unpad(ends))

    def unstack(layer: LayerParams) -> tuple[dict[str, jax.Array], ...]:
        fields = layer_shapes(config, config.kv_heads)
        arrays = [x for field in fields for x in split(field, getattr(layer, field))]  # as `_saved` names them
        saved = list(zip(_saved(config).items(), arrays, strict=True))
        return tuple({part: _one_copy(x[stage], dims, config) for (part, dims), x in saved} for stage in stages)

    # Every process must hold a part of what orbax writes, so stages receive each other's layers for the while.
    stages = range(mesh.shape["spp"])
    spread = {part: _sharding(mesh.devices, dims, config) for part, dims in _saved(config).items()}
    unstack = jax.jit(unstack, out_shardings=(spread,) * len(stages))
    for local, layer in enumerate(params.layers):
        for stage, tree in enumerate(unstack(layer)):
            checkpointer.save(folder / f"layer_{stage * len(params.layers) + local:05}", tree)
    if jax.process_index() == 0:
        facts = {"format": FORMAT} | dataclasses.asdict(config) | {"dtype": params.embed.dtype.name}
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    multihost_utils.sync_global_devices("snapshot: sealed")


def restore(folder: str | Path, mesh: Mesh, dtype: Any = None) -> tuple[ModelConfig, Params]:
    """The saved facts, and the weights on `mesh` in `dtype` (None: the saved one); the config's dtype is the weights'.

    Each process reads the shards of its own devices, one layer at a time.

    Raises: RequestError if the folder holds no whole snapshot, or `mesh` does not divide the model.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    config = _read_facts(folder)
    dtype = jnp.dtype(config.dtype if dtype is None else dtype)
    config = dataclasses.replace(config, dtype=dtype.name)
    target = abstract(config, mesh, dtype)
    # Each process restores alone: which layers it reads depends on its stages, so no other process is to wait for it.
    checkpointer = _checkpointer(alone=True)

    def read(name: str, shapes: dict[str, tuple[int, ...]], want: dict[str, Any]) -> dict[str, jax.Array]:
        try:
            saved = {k: tuple(v.shape) for k, v in checkpointer.metadata(folder / name).item_metadata.tree.items()}
        except (OSError, AttributeError) as error:
            raise RequestError(f"snapshot {name}", str(folder), "must be an orbax checkpoint") from error
        if saved != shapes:
            raise RequestError(f"snapshot {name}", saved, f"must have the shapes {shapes}")
        args = {  # strict: the vocabulary grows by rows of zeros up to the mesh's padding
            field: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape, strict=False)
            for field, x in want.items()
        }
        return checkpointer.restore(folder / name, args=ocp.args.PyTreeRestore(restore_args=args))

    saved = _saved(config)
    sizes = {"model": config.width, "ffn": config.ffn, "head": config.heads, "kv_head": config.kv_heads}
    sizes["head_dim"] = config.head_dim
    shapes = {part: tuple(sizes[word.split("/")[0]] for word in dims.split()) for part, dims in saved.items()}

    def read_layer(local: int) -> LayerParams:
        stacked = {field: getattr(target.layers[local], field) for field in layer_shapes(config, config.kv_heads)}
        shards: dict[str, list[jax.Array]] = {field: [] for field in stacked}
        for stage in range(mesh.shape["spp"]):
            devices = mesh.devices[:, stage : stage + 1]
            want = {
                part: jax.ShapeDtypeStruct(shapes[part], dtype, sharding=_sharding(devices, dims, config))
                for part, dims in saved.items()
            }
            if not want["wo"].sharding.addressable_devices:
                continue
            tree = read(f"layer_{stage * len(target.layers) + local:05}", shapes, want)
            held = {part: {shard.device: shard.data for shard in x.addressable_shards} for part, x in tree.items()}
            for field, of_device in shards.items():
                for device in held["wo"]:
                    of_device.append(join(field, *(held[part][device] for part in _parts(field)))[None])
        return LayerParams(**{
            field: jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards[field], dtype=dtype)
            for field, x in stacked.items()
        })  # fmt: skip

    ends = read("ends", _end_shapes(config), {name: getattr(target, name) for name in _end_shapes(config)})
    return config, Params(layers=tuple(read_layer(local) for local in range(len(target.layers))), **ends)


def _end_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    table = (config.vocab, config.width)
    return {"embed": table, "final_norm": (config.width,)} | ({} if config.tied else {"unembed": table})


def _parts(field: str) -> dict[str, str]:
    """What is saved of a field of LayerParams: names and dimensions, as models keep it."""
    return APART.get(field, {field: DIMS[field]})


def _saved(config: ModelConfig) -> dict[str, str]:
    """Name and dimensions of every array saved of a layer."""
    return {part: dims for field in layer_shapes(config, config.kv_heads) for part, dims in _parts(field).items()}


def _sharding(devices: np.ndarray, dims: str, config: ModelConfig) -> NamedSharding:
    """One layer's weight over `devices` [kvp, spp, tp]; kv heads fewer than tp are copied, not split further."""
    kvp, spp, tp = devices.shape
    shards = min(tp, config.kv_heads) if "kv_head" in dims else tp
    mesh = Mesh(devices.reshape(kvp, spp, shards, tp // shards), ("kvp", "spp", "tp", "copy"))
    return NamedSharding(mesh, partition(dims))


def _one_copy(x: jax.Array, dims: str, config: ModelConfig) -> jax.Array:
    """A layer's weight with the model's own kv heads, each once."""
    words = dims.split()
    if "kv_head/tp" not in words:
        return x
    axis = words.index("kv_head/tp")
    return jax.lax.slice_in_dim(x, 0, None, stride=x.shape[axis] // config.kv_heads, axis=axis)


def _read_facts(folder: Path) -> ModelConfig:
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts.pop("format") != FORMAT:
            raise ValueError("another format")
        rope, stop_ids = RopeConfig(**facts.pop("rope")), tuple(facts.pop("stop_ids"))
        return ModelConfig(rope=rope, stop_ids=stop_ids, **facts)
    except RequestError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RequestError("snapshot", str(folder), f"must hold a finished save, format {FORMAT}") from error


def _checkpointer(alone: bool = False) -> Any:
    import orbax.checkpoint as ocp

    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me if alone else 0,
        active_processes={me} if alone else None,
        barrier_sync_key_prefix=f"process_{me}" if alone else None,
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
    )
