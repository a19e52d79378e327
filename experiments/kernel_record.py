"""The record of `bench_kernels`: its rows with their musts, and the picture of it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from experiments import results
from experiments.clocks import Timing
from experiments.rivals import Shape

OURS = "ours"
CONVENTION = (
    "A FLOP rate counts 4 * query heads * head dim for each visible (query, key) pair: exactly the causal ones for "
    "ours, all pairs for the others, which mask nothing. A read rate counts the keys and values of the context once. "
    "Ours reads pages in random order, the others contiguous keys: an advantage of theirs. The copy counts bytes read "
    "and written. Times are the device's, for launches of one or several calls that queue up behind other work; the "
    "work list is given, and timed apart. Contenders take turns sample by sample, and the device rests 0.1 s or longer "
    "before each sample; a sustained rate has no rests. A value is the median over samples, its spread from their 10th "
    "to 90th percentile."
)
MAX_ERROR = "<= 0.01"  # relative, of bfloat16 products
SHOWN_VERSIONS = ("jax", "torch", "cudnn", "driver")


@dataclass
class Found:
    """The rows of a run so far, and what is absent from them and why. `bounded_on`: the device, if musts hold there."""

    bounded_on: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float | None, unit: str, **where: Any) -> None:
        self.rows.append(
            results.row(name, _rounded(value), unit, **{key: _rounded(cell) for key, cell in where.items()})
        )

    def leave_out(self, by: str, reason: str, **where: Any) -> None:
        self.absent.append({"by": by, **where, "reason": reason})
        print(f"{words(by=by, **where)}: absent, {reason}", flush=True)

    @contextmanager
    def guarded(self, by: str, **where: Any) -> Iterator[None]:
        """What fails in the block is absent from the record, with its reason; the run goes on."""
        try:
            yield
        except Exception as error:
            if by == OURS:
                traceback.print_exc()
            self.leave_out(by, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", **where)

    def measured(self, by: str, timing: Timing | None, of: Shape, flops: int, rows: int = 1, **where: Any) -> None:
        """Time and FLOP rate of one call, and its read rate if that may bound it; without a timing, missed musts.

        A batch of decodes has several `rows`, a shape whose context is all of theirs, and no FLOP rate.
        """
        seconds = None if timing is None else timing.median_s
        spread = {} if timing is None else {"spread_ms": 1e3 * timing.spread_s}
        values = {"attention time": (seconds and 1e3 * seconds, "ms")}
        if rows == 1:
            values["attention rate"] = (seconds and flops / seconds / 1e12, "TFLOP/s")
        if of.chunk <= 32:
            values["attention read"] = (seconds and of.kv_bytes / seconds / 1e12, "TB/s")
        for name, (value, unit) in values.items():
            limits = bounds(name, of, rows, self.bounded_on) if by == OURS and self.bounded_on else {}
            self.add(name, value, unit, by=by, **where, **spread, **limits)
        if timing is not None:
            shown = ", ".join(f"{value:.4g} {unit}" for value, unit in values.values())
            print(f"{words(by=by, **where)}: {shown} (spread {spread['spread_ms']:.2g} ms)", flush=True)

    def fastest_rival(self, shape: Shape) -> str | None:
        where = shape.where.items()
        rates = [row for row in self.rows if row["name"] == "attention rate" and where <= row.items()]
        others = [row for row in rates if row["by"] != OURS]
        return max(others, key=lambda row: row["value"])["by"] if others else None


def words(**where: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in where.items())


def _rounded(cell: Any) -> Any:
    return float(f"{cell:.4g}") if isinstance(cell, float) else cell


def bounds(name: str, shape: Shape, rows: int, device_kind: str) -> dict[str, str]:
    """The must and the aim of ours on an H100 or an H200, as results.row takes them; few numbers have any."""
    chunk, long = shape.chunk, shape.context >= 131_072
    found = None
    match name, shape.head_dim:
        case "attention rate", 128 if long and chunk >= 512:
            found = (">= 620", ">= 670")
        case "attention rate", 128 if long and chunk == 128:
            found = (">= 600", ">= 650")
        case "attention rate", 64 if long and chunk >= 512:
            found = (">= 500", ">= 570")
        case "attention time", 128 if shape.context == 1_048_576 and chunk == 32:
            found = ("<= 1.65", "<= 1.5")
        case "attention time", 128 if shape.context == 4_096 and chunk == rows == 1:
            found = ("<= 0.015", "<= 0.008")
        case "attention read", 128 if shape.context >= 65_536 and chunk == rows == 1:
            found = (">= 3.7", ">= 4.1") if "H200" in device_kind else (">= 2.75", ">= 2.95")
        case "attention read", 128 if rows == 32:
            found = (">= 2.4", ">= 2.8")
    return {} if found is None else dict(must=found[0], aim=found[1])


def figure(record: Mapping[str, Any]) -> Any:
    """A panel for each head dim, at the longest context, as a matplotlib Figure.

    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    config = record["config"]
    rates = [r for r in record["rows"] if r["name"] == "attention rate" and r.get("value") is not None]
    context = max((r["context"] for r in rates), default=max(config["contexts"]))
    rates = [r for r in rates if r["context"] == context]
    names = list(dict.fromkeys(r["by"] for r in rates))  # a colour belongs to a name, in every panel
    colours = {name: f"C{n}" for n, name in enumerate(sorted(names, key=lambda name: name != OURS))}
    chunks = sorted(chunk for chunk in config["chunks"] if chunk <= context)
    drawn = Figure(figsize=(1 + 6 * len(config["head_dims"]), 5.6), layout="constrained")
    panels = drawn.subplots(1, len(config["head_dims"]), sharey=True, squeeze=False)[0]
    for axes, head_dim in zip(panels, config["head_dims"], strict=True):
        for name, colour in colours.items():
            points = sorted((r["chunk"], r["value"]) for r in rates if r["by"] == name and r["head_dim"] == head_dim)
            if points:
                style = dict(linewidth=3, markersize=7, zorder=3) if name == OURS else dict(linewidth=1.3, markersize=4)
                axes.plot(*zip(*points, strict=True), "o", color=colour, label=name, **style)
                # A straight line from a decode to a chunk would cross the memory's curve, as no kernel does.
                chunked = [point for point in points if point[0] > 1]
                axes.plot([x for x, _ in chunked], [y for _, y in chunked], "-", color=colour, **style)
        _draw_ceilings(axes, record, chunks, context)
        axes.set_xscale("log", base=2)
        axes.set_xticks(chunks, [str(chunk) for chunk in chunks])
        axes.set_xlabel("chunk (queries; 1 is decode)")
        axes.set_title(f"head dim {head_dim}")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("TFLOP/s")
    shown = {line.get_label(): line for axes in panels for line in axes.get_legend_handles_labels()[0]}
    drawn.legend(handles=list(shown.values()), fontsize="small", loc="outside lower center", ncols=4)
    drawn.suptitle(_title(record, context))
    return drawn


def memory_ceiling_tflops(config: Mapping[str, Any], chunk: float, context: int, copy_tb_per_s: float) -> float:
    """The rate at which the keys and values, read once, arrive as fast as a copy moves bytes.

    A visible pair costs 4 * heads * head_dim operations, a key and its value 4 * kv_heads * head_dim bytes in bfloat16:
    heads / kv_heads operations per byte for each query that sees the key.
    """
    visible = chunk * (2 * context - chunk + 1) / 2
    return copy_tb_per_s * config["query_heads"] / config["kv_heads"] * visible / context


def _draw_ceilings(axes: Any, record: Mapping[str, Any], chunks: list[int], context: int) -> None:
    """The matrix product's rate, and the memory's up to where it crosses that."""
    ceilings, config = record.get("ceilings", {}), record["config"]
    matmul, copy = ceilings.get("matmul_tflops"), ceilings.get("copy_tb_per_s")
    if matmul is not None:
        axes.axhline(matmul, color="black", linestyle=":", linewidth=1.3, label=f"matmul ceiling, {matmul:.0f} TFLOP/s")
        axes.set_ylim(0, 1.1 * matmul)
    if copy is not None and chunks:
        # As many points as make the curve smooth on its logarithmic axis.
        steps = [chunks[0] * (chunks[-1] / chunks[0]) ** (i / 200) for i in range(201)]
        rates = [(x, memory_ceiling_tflops(config, x, context, copy)) for x in steps]
        shown = [(x, y) for x, y in rates if matmul is None or y <= matmul]
        if shown:
            label = f"memory ceiling, copy {copy:.2f} TB/s"
            axes.plot(*zip(*shown, strict=True), color="black", linestyle="--", linewidth=1.3, label=label)


def _title(record: Mapping[str, Any], context: int) -> str:
    config, versions = record["config"], record["versions"]
    ptxas = [f"ptxas {version}" for name, version in versions.items() if name.startswith("ptxas")][:1]
    shown = [f"{name} {versions[name]}" for name in SHOWN_VERSIONS if name in versions] + ptxas
    heads = f"{config['query_heads']} query heads, {config['kv_heads']} kv heads"
    return (
        f"{record['device']['kind']}: attention of a chunk to {context:,} tokens, {heads}, bf16\n"
        f"ours causal over random pages, others unmasked over contiguous keys; {', '.join(shown)}"
    )
