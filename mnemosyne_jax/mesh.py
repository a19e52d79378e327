"""The named 3D device mesh, the notation that says where dimensions live, and process start-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mnemosyne_jax.config import MeshSpec
from mnemosyne_jax.errors import RequestError

AXES = ("kvp", "spp", "tp")
MESSAGE_BYTES = 512


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `spec` over the first devices (default: all of this run's), kvp outermost, tp innermost.

    Raises: RequestError if there are fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < spec.devices:
        raise RequestError("mesh", str(spec), f"needs {spec.devices} devices, this run has {len(devices)}")
    grid = np.array(devices[: spec.devices]).reshape(spec.kvp, spec.spp, spec.tp)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def partition(dims: str) -> PartitionSpec:
    """The PartitionSpec of a notation string: 'stage/spp model head/tp' -> P('spp', None, 'tp').

    A dimension is a word (or a number), with the mesh axes it is split over behind slashes:
    'vocab/spp/tp' is split over both, spp first.
    """
    axes = [tuple(word.split("/")[1:]) for word in dims.split()]
    return PartitionSpec(*(a[0] if len(a) == 1 else (a or None) for a in axes))


def array(dims: str) -> Any:
    """A flax.struct field whose array has the dimensions `dims` in the notation."""
    return flax.struct.field(metadata={"dims": dims})


def optional_array(dims: str) -> Any:
    """As `array`, for a weight that some models lack (None there)."""
    return flax.struct.field(default=None, metadata={"dims": dims})


def partitions(tree: Any) -> Any:
    """The pytree of PartitionSpecs of `tree`, read off the notation of its dataclass fields."""
    if isinstance(tree, tuple):
        return tuple(partitions(item) for item in tree)
    specs = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if value is None or "dims" not in field.metadata:
            specs[field.name] = None if value is None else partitions(value)
        else:
            specs[field.name] = partition(field.metadata["dims"])
    return tree.replace(**specs)


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The pytree of NamedShardings of `tree` on `mesh`."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), partitions(tree), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def spec_of(mesh: Mesh) -> MeshSpec:
    """The MeshSpec that made `mesh`."""
    return MeshSpec(**{axis: mesh.shape[axis] for axis in AXES})


def start_processes(coordinator: str, processes: int, index: int) -> None:
    """Joins this process, number `index` of `processes`, to one run over all their devices.

    Call it before anything touches a device. `coordinator` is host:port of process 0. Every process
    then runs the same script; process 0 decides what is scheduled, the others follow.
    """
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=index)


def broadcast(payload: bytes) -> bytes:
    """Process 0's payload, in every process of the run.

    One message of fixed size, and a second, padded to a power of two, if that is too small: each size is compiled once.
    """
    from jax.experimental.multihost_utils import broadcast_one_to_all

    def send(content: bytes, size: int) -> bytes:
        return np.asarray(broadcast_one_to_all(np.frombuffer(content.ljust(size, b"\0"), np.uint8))).tobytes()

    prefix = len(payload).to_bytes(8)
    first = send((prefix + payload)[:MESSAGE_BYTES], MESSAGE_BYTES)
    length, content = int.from_bytes(first[:8]), first[8:]
    if length > len(content):
        mine = payload if jax.process_index() == 0 else b""
        content = send(mine, 1 << (length - 1).bit_length())
    return content[:length]
