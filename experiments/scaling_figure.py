"""The picture of a record of `scaling`: TTFT and TBT against devices, a line for each axis and context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.bench_engine_record import TBT, TTFT
from experiments.scaling_record import least_times
from mnemosyne_jax.config import MeshSpec

AXES = {"spp": ("C0", "o"), "kvp": ("C1", "s"), "tp": ("C2", "^")}
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))  # by context


def figure(record: Mapping[str, Any]) -> Any:
    """A row of panels for each shape, as a matplotlib Figure: layouts of one axis as lines, mixed ones as crosses.

    Dotted is the ideal: the time on the fewest devices that were measured, divided by what devices are more.
    Raises: ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    found = {name: least_times(record["rows"], name) for name in (TTFT, TBT)}
    shapes = list(dict.fromkeys(shape for works in found.values() for shape, _ in works))
    drawn = Figure(figsize=(13, 0.6 + 4.6 * max(1, len(shapes))), layout="constrained")
    panels = drawn.subplots(max(1, len(shapes)), 2, squeeze=False)
    for shape, row in zip(shapes, panels, strict=False):
        for axes, name, unit in zip(row, (TTFT, TBT), ("s", "ms"), strict=True):
            works = {context: times for (of, context), times in sorted(found[name].items()) if of == shape}
            for number, (context, times) in enumerate(works.items()):
                _draw(axes, context, times, LINES[number % len(LINES)])
            counts = sorted({mesh.devices for times in works.values() for mesh in times})
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(counts, [str(count) for count in counts], minor=False)
            axes.set(title=f"{shape}: {name}", xlabel="devices", ylabel=f"{name} ({unit})")
            axes.grid(alpha=0.25, which="both")
            if works:
                axes.legend(fontsize="small")
    versions, device = record["versions"], record["device"]
    drawn.suptitle(f"{device['kind']}, one request alone, dotted: ideal; jax {versions['jax']}")
    return drawn


def _draw(axes: Any, context: int, times: Mapping[MeshSpec, float], line: Any) -> None:
    label, mixed = f"{context:,}", dict(times)
    fewest = min(mesh.devices for mesh in times)
    ideal = fewest * min(time for mesh, time in times.items() if mesh.devices == fewest)
    counts = sorted({mesh.devices for mesh in times})
    for axis, (colour, marker) in AXES.items():
        points = sorted((mesh.devices, time) for mesh, time in times.items() if getattr(mesh, axis) == mesh.devices)
        if any(devices > 1 for devices, _ in points):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=f"{axis}, {label}")
        mixed = {mesh: time for mesh, time in mixed.items() if getattr(mesh, axis) != mesh.devices}
    for mesh, time in mixed.items():
        axes.plot(mesh.devices, time, "x", color="grey", markersize=5)
        sizes = " x ".join(f"{axis} {size}" for axis, size in asdict(mesh).items() if size > 1)
        axes.annotate(sizes, (mesh.devices, time), fontsize=5, xytext=(-4, 0), textcoords="offset points", ha="right")
    axes.plot(counts, [ideal / count for count in counts], color="black", linestyle=":", linewidth=1)
