"""The picture of a record of `bench_engine`: TTFT and TBT against context, beside a rival and the floors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import results
from experiments.bench_engine_record import RIVAL, RIVAL_POINTS, TBT, TTFT, floors
from mnemosyne_jax.config import MeshSpec, ModelConfig, from_yaml

MARKERS = "os^Dv"


def together(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of several runs in one record, with the ceilings of the first.

    Raises: ValueError if they are of different devices or meshes.
    """
    first, *others = records
    for other in others:
        if (other["device"]["kind"], other["config"]["mesh"]) != (first["device"]["kind"], first["config"]["mesh"]):
            raise ValueError(f"records of {first['device']['kind']} and {other['device']['kind']}, or of two meshes")
    models = list(dict.fromkeys(path for record in records for path in record["config"]["models"]))
    rows = [row for record in records for row in record["rows"]]
    return {**first, "config": {**first["config"], "models": models}, "rows": rows}


def figure(record: Mapping[str, Any]) -> Any:
    """TTFT and TBT against context for each shape, as a matplotlib Figure. Raises: ImportError without matplotlib."""
    from matplotlib.figure import Figure

    config, mesh = record["config"], MeshSpec(**record["config"]["mesh"])
    measured = {row["name"] for row in record["rows"]}
    columns = [(TTFT, "s", 0), (TBT, "ms", 1)] if TTFT in measured else [(TBT, "ms", 1)]  # a filled cache has no TTFT
    drawn = Figure(figsize=(6 * len(columns), 0.6 + 4.2 * len(config["models"])), layout="constrained")
    panels = drawn.subplots(len(config["models"]), len(columns), squeeze=False)
    for path, row in zip(config["models"], panels, strict=True):
        shape = Path(path).stem
        for axes, (name, unit, column) in zip(row, columns, strict=True):
            ours = [r for r in record["rows"] if r["name"] == name and r.get("shape") == shape]
            for number, label in enumerate(dict.fromkeys(_label(r) for r in ours)):
                points = _points(ours, label)
                marker: Any = dict(marker=MARKERS[number % len(MARKERS)], markersize=6, markerfacecolor="none")
                axes.plot(*zip(*points, strict=True), linewidth=1.5, label=label, **marker)
            rival = [(context, point[column]) for context, point in RIVAL_POINTS.get(shape, {}).items()]
            if rival:
                axes.plot(*zip(*rival, strict=True), "x--", color="black", linewidth=1.2, label=RIVAL)
            contexts = sorted({r["context"] for r in ours} | {context for context, _ in rival})
            if contexts and record.get("ceilings") and Path(path).exists():
                model = from_yaml(ModelConfig, path)
                lows = [floors(model, context, record["ceilings"], mesh.devices)[column] for context in contexts]
                axes.plot(contexts, lows, ":", color="grey", label="floor of this run's matmul or copy")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            results.plain_log(axes.yaxis)
            axes.set_title(f"{shape}: {name}")
            axes.set_xlabel("context (tokens)")
            axes.set_ylabel(f"{name} ({unit})")
            axes.grid(alpha=0.25, which="both")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small")
    versions, device = record["versions"], record["device"]
    drawn.suptitle(f"{device['kind']}, {mesh}, bf16, one request; jax {versions['jax']}", fontsize="medium")
    return drawn


def _points(rows: Sequence[Mapping[str, Any]], label: str) -> list[tuple[int, float]]:
    """Contexts and values of one line, each as often as it was measured. A context that only other lines have is a gap:
    nothing is drawn across it."""
    mine = sorted((row["context"], row["value"]) for row in rows if _label(row) == label)
    others = {row["context"] for row in rows} - {context for context, _ in mine}
    return sorted([*mine, *((context, math.nan) for context in others)])


def _label(row: Mapping[str, Any]) -> str:
    if row.get("cache") == "filled":
        return "ours, cache filled"
    return f"ours, chunk {row['chunk']}"
