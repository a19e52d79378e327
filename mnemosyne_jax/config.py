"""Frozen dataclasses that hold every fact and every choice: model, mesh, serving, hardware."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from mnemosyne_jax.errors import RequestError

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
COUNTS = (
    "page_tokens", "private_rows", "shared_rows", "private_chunks", "shared_chunks", "chunk_tokens", "span_tokens",
    "max_waiting", "ahead", "least_chunk_every",
)  # fmt: skip
MAY_BE_ZERO = ("link_latency_s", "softmax_dims", "overhead_rows", "layer_overhead_s", "tick_overhead_s")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary facts of a checkpoint, in Hugging Face's words.

    `attention_factor` None means the type's own default (yarn: 0.1 ln(factor) + 1).
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            why = (
                " (it depends on the length, which a chunked run does not know)"
                if self.type in ("dynamic", "longrope")
                else ""
            )
            raise RequestError("rope type", self.type, f"supported: {', '.join(ROPE_TYPES)}{why}")


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a model: the legend's letters D F V L N K H, plus rotary, norm and bias facts."""

    width: int
    ffn: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-6
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    stop_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("width", "ffn", "vocab", "layers", "heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise RequestError(name, getattr(self, name), "must be at least 1")
        if self.heads % self.kv_heads:
            raise RequestError("heads", self.heads, f"must be a multiple of kv_heads = {self.kv_heads}")
        if self.head_dim % 2:
            raise RequestError("head_dim", self.head_dim, "must be even: rotary turns pairs")

    def refuse_mesh(self, mesh: MeshSpec) -> None:
        """Raises RequestError, naming both numbers, if this model cannot be laid out on `mesh`."""
        for axis, name, value in (("spp", "layers", self.layers), ("tp", "heads", self.heads), ("tp", "ffn", self.ffn)):
            size = getattr(mesh, axis)
            if value % size:
                raise RequestError(f"mesh.{axis}", size, f"must divide {name} = {value}")
        if self.kv_heads % mesh.tp and mesh.tp % self.kv_heads:
            raise RequestError("mesh.tp", mesh.tp, f"must divide kv_heads = {self.kv_heads}, or be a multiple of it")

    def kv_bytes_per_token(self, dtype_bytes: int, tp: int = 1) -> int:
        """Bytes of keys and values per token over all layers (kv heads fewer than tp are replicated)."""
        return 2 * self.layers * max(self.kv_heads, tp) * self.head_dim * dtype_bytes

    @property
    def weights(self) -> int:
        """Number of weights, embeddings included."""
        qkv = self.width * (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = qkv + self.heads * self.head_dim * self.width + 3 * self.width * self.ffn + 2 * self.width
        layer += self.qkv_bias * (self.heads + 2 * self.kv_heads) * self.head_dim
        layer += self.out_bias * self.width + self.qk_norm * 2 * self.head_dim
        return self.layers * layer + (2 - self.tied) * self.vocab * self.width + self.width


@dataclass(frozen=True)
class MeshSpec:
    """Sizes of the three axes: kvp groups, spp stages, tp shards."""

    kvp: int = 1
    spp: int = 1
    tp: int = 1

    def __post_init__(self):
        for axis in ("kvp", "spp", "tp"):
            if getattr(self, axis) < 1:
                raise RequestError(f"mesh.{axis}", getattr(self, axis), "must be at least 1")

    @property
    def devices(self) -> int:
        return self.kvp * self.spp * self.tp

    def __str__(self) -> str:
        return f"kvp {self.kvp} x spp {self.spp} x tp {self.tp}"


@dataclass(frozen=True)
class ServeConfig:
    """How requests are served: pages, rows of a tick, chunking, placement, numerics.

    `pool_pages` is the number of pages in each kvp group (None: what device memory allows; on a
    CPU, 131,072 tokens or 2 GiB). A request that can grow past `span_tokens` is shared by all groups: under
    `grow` it fills group after group, `span_tokens` each (the paper's onboarding); under `stripe`
    its pages alternate between groups from the start. Shorter requests are private to one group.
    `private_rows` and `shared_rows` are how many sequences of each kind run at once (private: per group),
    `private_chunks` and `shared_chunks` how many of them may prefill in one tick. `chunk_tokens` is
    the prefill token budget of a tick; `chunk_buckets` are the row counts for which programs are
    compiled (None: a sixteenth, a quarter and the whole of `chunk_tokens`): on a GPU a bucket and the decode rows
    together are best a multiple of 128, and decode rows 8 or more. `ahead` is how many ticks are submitted before a
    token is read.

    Prompts go in the order of `policy` (`serve/policy.py`). Chunks are `adaptive`: they fill the time that a cost model
    predicts. While anything decodes, a token of it may take `tbt_slo_s` through the whole pipe; else a tick may take
    `idle_tick_s`, which is how long an arrival waits. Beside others a long prompt leaves a share of the budget to them:
    its relative slack, at least `least_yield` and at most `long_yield`. Where not even the smallest chunk fits, one
    still runs every `least_chunk_every` ticks. `fixed` chunks fill the token budget, whatever time that takes.

    At most `max_waiting` requests, and `max_waiting_tokens` of prompts (None: any), wait. A request is `late` if its
    deadline is predicted to be missed even if it ran alone from now on. Such a request is served in its turn (`serve`),
    or, if it takes more than half a second alone, behind all that can still be in time until ten times its deadline has
    passed (`demote`), or, if the deadline was asked for and it still waits, not at all (`refuse`).
    """

    page_tokens: int = 128
    pool_pages: int | None = None
    private_rows: int = 8
    shared_rows: int = 2
    private_chunks: int = 4
    shared_chunks: int = 1
    chunk_tokens: int = 512
    chunk_buckets: tuple[int, ...] | None = None
    placement: Literal["grow", "stripe"] = "stripe"
    span_tokens: int = 8192
    max_waiting: int = 4096
    max_waiting_tokens: int | None = None
    ahead: int = 1
    policy: Literal["fcfs", "fcfs_exclusive", "edf", "srpt", "lars"] = "lars"
    late: Literal["serve", "demote", "refuse"] = "demote"
    chunking: Literal["adaptive", "fixed"] = "adaptive"
    tbt_slo_s: float = 0.030
    idle_tick_s: float = 0.25
    least_yield: float = 0.1
    long_yield: float = 0.4
    least_chunk_every: int = 4
    impl: Literal["auto", "reference", "mosaic"] = "auto"
    rope_precision: Literal["exact", "hf_float32"] = "exact"

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise RequestError(f"serve.{name}", getattr(self, name), f"must be one of {', '.join(get_args(kind))}")
        for name in COUNTS:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise RequestError(f"serve.{name}", getattr(self, name), "must be an integer of at least 1")
        for name in ("pool_pages", "max_waiting_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"serve.{name}", value, "must be at least 1")
        for name in ("tbt_slo_s", "idle_tick_s"):
            if not 0 < getattr(self, name) < float("inf"):  # a NaN is refused, too
                raise RequestError(f"serve.{name}", getattr(self, name), "must be a positive, finite number of seconds")
        for name in ("least_yield", "long_yield"):
            if not 0 <= getattr(self, name) < 1:
                raise RequestError(f"serve.{name}", getattr(self, name), "is a share: at least 0 and below 1")
        buckets = self.buckets
        if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
            raise RequestError("serve.chunk_buckets", buckets, "must be positive and strictly increasing")
        if self.chunk_tokens > buckets[-1]:
            raise RequestError(
                "serve.chunk_tokens", self.chunk_tokens, f"must be at most the largest chunk bucket, {buckets[-1]}"
            )
        if len(buckets) > 8:
            raise RequestError("serve.chunk_buckets", buckets, "at most 8 buckets: each is compiled")
        if self.span_tokens % self.page_tokens:
            raise RequestError(
                "serve.span_tokens", self.span_tokens, f"must be a multiple of page_tokens = {self.page_tokens}"
            )

    @property
    def buckets(self) -> tuple[int, ...]:
        """Sizes of the chunk area of the compiled programs, increasing."""
        if self.chunk_buckets is not None:
            return self.chunk_buckets
        return tuple(sorted({max(1, self.chunk_tokens // part) for part in (16, 4, 1)}))

    def shared_slots(self, mesh: MeshSpec) -> int:
        """Sequences that can be spread over all groups at once: none where there is one group."""
        return self.shared_rows if mesh.kvp > 1 else 0

    def slots(self, mesh: MeshSpec) -> int:
        """Sequences that can run at once in each group; shared ones hold the same slot in every group."""
        return self.shared_slots(mesh) + self.private_rows


@dataclass(frozen=True)
class HardwareConfig:
    """One kind of device: its public peak figures, and what share of each a tick reaches.

    `link_bytes_per_s` is what one device sends to another of its node. The rest are the coefficients of the cost model:
    guesses of the field's usual figures until `calibrate` has fitted them (`fitted`). Of HBM's rate, weights, keys and
    values and activations (what is read and written between matrix products) each reach a share. The softmax of a pair
    of query and key takes as long as the products of `softmax_dims` more head dimensions, at `attention_share` of the
    matmul rate; it comes in tiles of `tile_rows` queries times heads of a kv head, full or not, and in half as many
    again where a chunk has 512 or more at a head dim of 64. A layer loses `layer_overhead_s` to the starts and ends of
    its kernels; a program of `overhead_rows` rows loses half of it.
    """

    name: str = "cpu"
    memory_bytes: int = 8 * 2**30
    hbm_bytes_per_s: float = 2e10
    matmul_flops_per_s: float = 1e11
    link_bytes_per_s: float = 1e10
    link_latency_s: float = 1e-5
    matmul_share: float = 0.75
    weight_read_share: float = 0.9
    attention_share: float = 0.8
    kv_read_share: float = 0.9
    activation_share: float = 0.8
    link_share: float = 0.75
    softmax_dims: float = 40.0
    tile_rows: int = 1
    layer_overhead_s: float = 8e-5
    overhead_rows: float = 12.0
    tick_overhead_s: float = 1e-4
    fitted: bool = False

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if kind in (int, float) and not getattr(self, name) >= (0 if name in MAY_BE_ZERO else 1e-12):
                raise RequestError(f"hardware.{name}", getattr(self, name), "must be positive")
            if name.endswith("_share") and getattr(self, name) > 1:
                raise RequestError(f"hardware.{name}", getattr(self, name), "is a share: at most 1")


def from_yaml[Config](kind: type[Config], path: str | Path) -> Config:
    """The `kind` (ModelConfig, HardwareConfig, ...) that a YAML file describes; typos and wrong types are refused."""
    import draccus

    return draccus.parse(kind, config_path=str(path), args=[])
