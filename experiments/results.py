"""What a run came to, as JSON: where it ran, how, and a row for each number; and whether its rows keep their musts.

`python -m experiments.results FILE ...` prints every must of these files as met or missed; it exits with 1 if one is
missed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import operator
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
ROW = ("name", "shape", "context", "chunk", "mesh", "value", "unit", "must", "aim")


def row(
    name: str, value: Any, unit: str, *, must: str | None = None, aim: str | None = None, **where: Any
) -> dict[str, Any]:
    """One number of a run. `must` and `aim` are bounds such as '<= 0.5' or '== 1'.

    `where` may hold shape, context, chunk and mesh, and whatever else tells this row from others.
    """
    for bound in (must, aim):
        if bound is not None:
            keeps(value, bound)
    cells = {"name": name, **where, "value": value, "unit": unit, "must": must, "aim": aim}
    order = sorted(cells, key=lambda key: ROW.index(key) if key in ROW else len(ROW))
    return {key: cells[key] for key in order if cells[key] is not None}


def keeps(value: Any, bound: str) -> bool:
    """Whether `value` is within a bound such as '<= 0.5'; a value that is absent or NaN is not.

    Raises: ValueError if the bound does not read so.
    """
    sign, _, limit = bound.partition(" ")
    if sign not in COMPARE:
        raise ValueError(f"a bound reads like '<= 0.5', with one of {', '.join(COMPARE)}: got {bound!r}")
    return value is not None and bool(COMPARE[sign](value, float(limit)))


def document(
    config: Any, rows: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A run's record. `config` is a dataclass; `ceilings` what the device was measured to reach, where it was."""
    made = {"device": device(), "versions": versions(), "command": shlex.join(sys.orig_argv), "revision": revision()}
    made["config"] = dataclasses.asdict(config)
    if ceilings is not None:
        made["ceilings"] = dict(ceilings)
    return made | {"rows": [dict(r) for r in rows]}


def write(path: str | Path, made: Mapping[str, Any]) -> Path:
    """The path, with the record written there: whole, or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(made, indent=1) + "\n")
    return part.replace(path)


def save_png(figure: Callable[[Mapping[str, Any]], Any], made: Mapping[str, Any], path: str | Path) -> bool:
    """Whether the `figure` of a record was written: not without matplotlib."""
    try:
        drawn = figure(made)
    except ImportError:
        return False
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=120)
    return True


def plain_log(axis: Any) -> None:
    """Labels a logarithmic axis of a picture 0.1 and 20, not 10^-1 and 2 x 10^1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def check(made: Mapping[str, Any]) -> bool:
    """Whether every must is met; prints each as met or missed, and each aim as reached or not yet."""
    kept = True
    for r in made["rows"]:
        where = ", ".join(f"{key} {r[key]}" for key in r if key not in ("name", "value", "unit", "must", "aim"))
        for kind, good, bad in (("must", "met", "MISSED"), ("aim", "reached", "not yet")):
            if kind in r:
                met = keeps(r.get("value"), r[kind])
                kept &= met or kind == "aim"
                print(f"{kind} {r[kind]} {good if met else bad}: {r['name']} ({where}) = {r.get('value')} {r['unit']}")
    return kept


def device() -> dict[str, Any]:
    """The accelerator of this run and how many there are; the host's cores and processor."""
    import jax

    found = jax.devices()
    host = {"host_cores": os.cpu_count(), "host_processor": _processor()}
    return {"kind": found[0].device_kind, "platform": found[0].platform, "count": len(found), **host}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def revision() -> str | None:
    """The git commit of this checkout, with '-dirty' if tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    kept = [check(json.loads(Path(name).read_text())) for name in sys.argv[1:]]
    sys.exit(0 if all(kept) else 1)
