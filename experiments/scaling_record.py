"""The record of `scaling`: where its rows were measured, what follows from them, and what that is to come to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments import results
from experiments.bench_engine_record import CONVENTION as ONE_REQUEST
from experiments.bench_engine_record import TBT, TTFT, Bench
from experiments.kernel_record import words
from mnemosyne_jax.config import MeshSpec

EFFICIENCY, SPEED_UP, TIME_CUT, PENALTY = "prefill efficiency", "decode speed-up", "decode time cut", "decode penalty"
LEAST_TTFT = "least TTFT"
GROWING = {TTFT: "TTFT growing over striping", TBT: "TBT growing over striping"}
DERIVED = (EFFICIENCY, SPEED_UP, TIME_CUT, PENALTY, LEAST_TTFT, *GROWING.values())
CONVENTION = ONE_REQUEST + (
    " Of a layout's chunks and placements the fastest counts. Prefill efficiency is device seconds of the fastest "
    "layout among those of the fewest devices that were measured, over those of a layout. Decodes are compared with "
    "the pipeline of the fewest stages that was measured, one device where the context fits: stages take turns, so "
    "that a token takes them as long as one device, and the links beside. Speed-up is the ratio of TBT, time cut and "
    "penalty what is less or more than that TBT, as a share of it."
)
# (name, shape or None for any, context, mesh) -> (must, aim) on H100 or H200; of an efficiency from that context on.
BOUNDS = {
    (EFFICIENCY, None, 524_288, MeshSpec(spp=2)): (">= 0.9", ">= 0.97"),
    (EFFICIENCY, None, 524_288, MeshSpec(spp=4)): (">= 0.95", None),
    (EFFICIENCY, None, 524_288, MeshSpec(spp=8)): (">= 0.9", None),
    (TIME_CUT, "qwen2.5-0.5b", 10_000_000, MeshSpec(kvp=2)): (">= 0.4", ">= 0.45"),
    (TIME_CUT, "qwen2.5-0.5b", 10_000_000, MeshSpec(kvp=4)): (">= 0.68", None),
    (TIME_CUT, "llama-3.2-1b", 1_048_576, MeshSpec(kvp=2)): (">= 0.33", ">= 0.42"),
    (PENALTY, None, 0, MeshSpec(spp=8)): ("<= 0.1", None),
}
LEAST_TTFT_S = {("llama-3-8b", 1_048_576, 8): "<= 62"}  # shape, context, devices

Row = Mapping[str, Any]
Work = tuple[str, int]  # shape, context
Times = dict[Work, dict[MeshSpec, float]]


@dataclass(frozen=True, eq=False)
class LayoutBench(Bench):
    """A Bench whose rows and absences say on which layout they were."""

    placement: str

    @property
    def place(self) -> dict[str, Any]:
        return dict(mesh=str(self.mesh)) | (dict(placement=self.placement) if self.mesh.kvp > 1 else {})

    def add(self, name: str, value: float, unit: str, **where: Any) -> None:
        place = {key: cell for key, cell in self.place.items() if key != "mesh"}
        super().add(name, value, unit, **where, **place, devices=self.mesh.devices, **asdict(self.mesh))

    def leave_out(self, reason: str, **where: Any) -> None:
        super().leave_out(reason, **where, **self.place)


# What follows.


def derived(rows: Sequence[Row], device_kind: str) -> list[dict[str, Any]]:
    """Rows of efficiency, speed-up, time cut, penalty, least TTFT and of growing over striping."""
    bounded = any(card in device_kind for card in ("H100", "H200"))

    def row(name: str, value: float, unit: str, work: Work, mesh: MeshSpec, **where: Any) -> dict[str, Any]:
        limits = bounds(name, work, mesh) if bounded else {}
        where |= dict(shape=work[0], context=work[1], mesh=str(mesh), devices=mesh.devices)
        return results.row(name, float(f"{value:.4g}"), unit, **where, **asdict(mesh), **limits)

    made = []
    for work, times in least_times(rows, TTFT).items():
        for devices in sorted({mesh.devices for mesh in times}):
            fastest = _fastest({mesh: s for mesh, s in times.items() if mesh.devices == devices})
            made.append(row(LEAST_TTFT, times[fastest], "s", work, fastest))
        base = _fastest(_fewest_devices(times))
        for mesh, seconds in times.items():
            if mesh.devices > base.devices:
                share = base.devices * times[base] / (mesh.devices * seconds)
                made.append(row(EFFICIENCY, share, "1", work, mesh, against=str(base)))
    for work, times in least_times(rows, TBT).items():
        pipelines = {mesh: ms for mesh, ms in times.items() if mesh.kvp == mesh.tp == 1}
        if not pipelines:
            continue
        base = min(pipelines, key=lambda mesh: mesh.spp)
        for mesh in (mesh for mesh in times if mesh != base):
            ratio = times[mesh] / times[base]
            made.append(row(SPEED_UP, 1 / ratio, "1", work, mesh, against=str(base)))
            if mesh in pipelines:
                made.append(row(PENALTY, ratio - 1, "1", work, mesh, against=str(base)))
            else:
                made.append(row(TIME_CUT, 1 - ratio, "1", work, mesh, against=str(base)))
    for name, derived_name in GROWING.items():
        striping = least_times((r for r in rows if r.get("placement") == "stripe"), name)
        growing = least_times((r for r in rows if r.get("placement") == "grow"), name)
        for work, times in growing.items():
            for mesh in (mesh for mesh in times if mesh in striping.get(work, {})):
                made.append(row(derived_name, times[mesh] / striping[work][mesh], "1", work, mesh))
    return made


def bounds(name: str, work: Work, mesh: MeshSpec) -> dict[str, str | None]:
    """The must and the aim of a derived number on Hoppers, as results.row takes them; few have any."""
    shape, context = work
    if name == LEAST_TTFT:
        return dict(must=LEAST_TTFT_S.get((shape, context, mesh.devices)))
    for (bounded, of_shape, of_context, on), (must, aim) in BOUNDS.items():
        right_work = (context >= of_context) if of_shape is None else (shape, context) == (of_shape, of_context)
        if (bounded, on) == (name, mesh) and right_work:
            return dict(must=must, aim=aim)
    return {}


def least_times(rows: Iterable[Row], name: str) -> Times:
    """The least TTFT, or TBT over a filled cache, of each layout at each work, whatever its chunks and placement."""
    found: Times = defaultdict(dict)
    for row in rows:
        if row["name"] == name and row.get("value") is not None and (name == TTFT or row.get("cache") == "filled"):
            times, mesh = found[row["shape"], row["context"]], MeshSpec(row["kvp"], row["spp"], row["tp"])
            times[mesh] = min(row["value"], times.get(mesh, row["value"]))
    return found


def _fewest_devices(times: dict[MeshSpec, float]) -> dict[MeshSpec, float]:
    fewest = min(mesh.devices for mesh in times)
    return {mesh: seconds for mesh, seconds in times.items() if mesh.devices == fewest}


def _fastest(times: dict[MeshSpec, float]) -> MeshSpec:
    return min(times, key=lambda mesh: times[mesh])


def line(row: Row) -> str:
    """A derived row in words."""
    where = {key: row[key] for key in ("shape", "context", "mesh", "against") if key in row}
    return f"{words(**where)}: {row['name']} {row['value']:.4g} {row['unit'].strip('1')}".rstrip()


def joined(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all that these measured, with what follows from all of it; config and versions are the first's.

    Raises: ValueError if they are of different kinds of device.
    """
    kinds = list(dict.fromkeys(record["device"]["kind"] for record in records))
    if len(kinds) > 1:
        raise ValueError(f"records of {' and '.join(kinds)}")
    measured = [row for record in records for row in record["rows"] if row["name"] not in DERIVED]
    absent = [left_out for record in records for left_out in record["absent"]]
    commands = [command for record in records for command in record.get("commands", [record["command"]])]
    return {
        **records[0], "commands": commands, "rows": [*measured, *derived(measured, kinds[0])], "absent": absent,
    }  # fmt: skip
