"""Request traces: read from a file in any of four formats, drawn at a Poisson rate, and mixed with synthetic long ones.

Real traces hold no prompt beyond some 200 thousand tokens, so long requests are always synthetic: their kind is "long".
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from mnemosyne_jax.errors import RequestError

MOST_TOKENS = 2**31 - 1
MOST_TIME = 2**53  # floats tell one unit of time from the next up to here
# By what each writer calls them; capitals do not matter.
PROMPT = ("num_prefill_tokens", "prompt_tokens", "input_length", "ContextTokens", "Request tokens")
OUTPUT = ("num_decode_tokens", "output_tokens", "output_length", "GeneratedTokens", "Response tokens")
ARRIVAL = ("arrived_at", "arrival_s", "timestamp")
# Linear patterns of ASCII digits only: int() and float() would also take 1_000, 'nan' and other scripts' digits.
INTEGER, NUMBER = (
    re.compile(r"-?[0-9]{1,20}"),
    re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?"),
)
DATE = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,9}))? ?(Z|[-+][0-9]{2}:[0-9]{2})?"
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
P90_SIGMAS = NormalDist().inv_cdf(0.9)


class TraceError(RequestError):
    """A trace that cannot be read as meant: names the file, and where there is one the line and the field."""

    def __init__(self, file: str, line: int | None, field: str, value: Any, limit: str):
        super().__init__(
            ", ".join([file, *([f"line {line}"] if line else []), *([field] if field else [])]), value, limit
        )
        self.file, self.line, self.field = file, line, field

    def __reduce__(self):
        return TraceError, (self.file, self.line, self.field, self.value, self.limit)


@dataclass(frozen=True)
class Arrival:
    """One request of a trace: how long, and when. `arrival_s` is NaN where the trace holds lengths only."""

    id: str
    arrival_s: float
    prompt_tokens: int
    new_tokens: int
    deadline_s: float | None = None
    kind: str = "trace"  # or "long": synthetic


@dataclass(frozen=True)
class LongLengths:
    """Lognormal lengths of long requests, by median and 90th percentile; the defaults are those of the Medha paper."""

    prompt_p50_tokens: int = 393_000
    prompt_p90_tokens: int = 839_000
    new_p50_tokens: int = 518
    new_p90_tokens: int = 808
    shortest_prompt_tokens: int = 131_072
    longest_prompt_tokens: int = 10_000_000

    def __post_init__(self):
        # Limits within [P50, P90] would clip the very percentiles that are asked for.
        _check_rising(self, "shortest_prompt_tokens", "prompt_p50_tokens", "prompt_p90_tokens", "longest_prompt_tokens")
        _check_rising(self, "new_p50_tokens", "new_p90_tokens")


class _Row(NamedTuple):
    line: int
    prompt_tokens: int
    new_tokens: int
    at: int | float | None  # in the file's own unit of time


def read(path: str | Path) -> list[Arrival]:
    """The requests of a trace, in order of arrival, the first at 0 s; their ids are their line numbers in the file.

    The format is told by the content, never by the file's name:
    - JSON lines (Mooncake): timestamp in ms, input_length and output_length; other keys are ignored.
    - CSV with one column of PROMPT, one of OUTPUT and at most one of ARRIVAL, in any order; other columns are ignored.
      Arrivals are dates with a time of day (Azure; UTC unless they say otherwise) or seconds (BurstGPT), throughout as
      in the first row. Without that column (ShareGPT) requests stay in the file's order and `arrival_s` is NaN.

    Traces do hold outputs of 0 tokens. They count as 1, the least that a request can ask for: the prompt was processed
    all the same. Raises: TraceError for a file that is anything else, or that cannot be read.
    """
    file, lines = str(path), _lines(path)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise TraceError(file, None, "", "an empty file", "must hold at least one request")
    reader = _json_rows if first.lstrip().startswith("{") else _csv_rows
    rows, units_per_s = reader(file, lines)
    if not rows:
        raise TraceError(file, None, "", "a header alone", "must hold at least one request")
    start = min(row.at for row in rows if row.at is not None) if units_per_s else 0
    found = [
        Arrival(str(line), math.nan if at is None else (at - start) / units_per_s, prompt_tokens, new_tokens)
        for line, prompt_tokens, new_tokens, at in rows
    ]
    return sorted(found, key=lambda arrival: arrival.arrival_s) if units_per_s else found


def with_poisson_arrivals(
    arrivals: Sequence[Arrival], queries_per_s: float, seed: int, duration_s: float
) -> list[Arrival]:
    """Requests with lengths drawn from `arrivals`, with replacement, that arrive at random until `duration_s`.

    An id names the draw and then whom it drew: '3:17' is the fourth request, drawn from '17'.
    """
    if not arrivals:
        raise RequestError("arrivals", "none", "must hold at least one request to draw from")
    _check_positive("queries_per_s", queries_per_s)
    generator = _generator(seed, "poisson")
    times_s = _poisson_times_s(generator, queries_per_s, duration_s)
    drawn = [arrivals[i] for i in generator.integers(len(arrivals), size=len(times_s))]
    return [
        replace(one, id=f"{n}:{one.id}", arrival_s=at) for n, (one, at) in enumerate(zip(drawn, times_s, strict=True))
    ]


def long_requests(
    queries_per_s: float, long_share: float, seed: int, duration_s: float, lengths: LongLengths | None = None
) -> list[Arrival]:
    """Synthetic long requests until `duration_s`: the `long_share` of `queries_per_s`, which counts all requests."""
    _check_positive("queries_per_s", queries_per_s)
    _check_share(long_share)
    generator = _generator(seed, "long")
    times_s = _poisson_times_s(generator, queries_per_s * long_share, duration_s)
    return _long(generator, [f"long-{n}" for n in range(len(times_s))], times_s, lengths or LongLengths())


def mix(short: Sequence[Arrival], long_share: float, seed: int, lengths: LongLengths | None = None) -> list[Arrival]:
    """`short` with a random `long_share` of it, rounded to whole requests, made long ones that arrive when those did."""
    _check_share(long_share)
    generator = _generator(seed, "mix")
    chosen = generator.choice(len(short), size=round(long_share * len(short)), replace=False) if short else []
    made = list(short)
    gone = [short[i] for i in chosen]
    ids, times_s = [f"long-{one.id}" for one in gone], [one.arrival_s for one in gone]
    for i, one in zip(chosen, _long(generator, ids, times_s, lengths or LongLengths()), strict=True):
        made[i] = one
    return made


def describe(arrivals: Sequence[Arrival]) -> dict[str, float | int | None]:
    """Counts, percentiles of the lengths in tokens, and the pace; None for what these arrivals do not tell."""
    times_s = [one.arrival_s for one in arrivals]
    span_s = max(times_s) - min(times_s) if times_s and not math.isnan(sum(times_s)) else None
    made = {"requests": len(arrivals), "long_requests": sum(one.kind == "long" for one in arrivals)}
    return {
        **made,
        **_percentiles("prompt_tokens", [one.prompt_tokens for one in arrivals]),
        **_percentiles("new_tokens", [one.new_tokens for one in arrivals]),
        "span_s": span_s,
        "requests_per_s": len(arrivals) / span_s if span_s else None,
    }


def _lines(path: str | Path) -> list[str]:
    """A file's lines, whatever ends them; the n-th is line n."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TraceError(str(path), None, "", error.strerror, "must be a readable file") from error
    data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode("utf-8-sig").split("\n")  # splitlines() would also split at characters within JSON strings
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TraceError(str(path), line, "", error.object[error.start : error.end], "must be UTF-8 text") from error


def _json_rows(file: str, lines: Sequence[str]) -> tuple[list[_Row], int]:
    """The rows of JSON lines, and how many of their units of time make a second."""
    rows = []
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of more digits than Python reads
            found = None
        if not isinstance(found, dict):
            raise TraceError(file, line, "", text, "must be one whole JSON object")
        for key in ("timestamp", "input_length", "output_length"):
            if key not in found:
                raise TraceError(file, line, key, "nothing", "must be there")
        prompt_tokens = _tokens((file, line, "input_length"), found["input_length"], 1)
        new_tokens = _tokens((file, line, "output_length"), found["output_length"], 0)
        at = _time((file, line, "timestamp"), found["timestamp"], "milliseconds")
        rows.append(_Row(line, prompt_tokens, max(new_tokens, 1), at))
    return rows, 1000


def _csv_rows(file: str, lines: Sequence[str]) -> tuple[list[_Row], int]:
    """The rows of a CSV, and how many of their units of time make a second: 0 without times."""
    table = _csv_cells(file, lines)
    line, header = next(table)
    wanted = ((PROMPT, "exactly one"), (OUTPUT, "exactly one"), (ARRIVAL, "at most one"))
    [prompt], [output], arrival = (_columns(file, line, header, *names) for names in wanted)
    rows, dates = [], None
    for line, cells in table:
        if len(cells) < len(header):
            raise TraceError(file, line, header[len(cells)], "nothing", "must be there: the row is cut short")
        if len(cells) > len(header):
            raise TraceError(file, line, "columns", cells, f"must be {len(header)} cells, as in the header")
        prompt_tokens = _tokens((file, line, header[prompt]), _number(cells[prompt]), 1)
        new_tokens = _tokens((file, line, header[output]), _number(cells[output]), 0)
        at = None
        for column in arrival:
            dates = DATE.fullmatch(cells[column]) is not None if dates is None else dates
            place = (file, line, header[column])
            at = _date_ns(place, cells[column]) if dates else _time(place, _number(cells[column]), "seconds")
        rows.append(_Row(line, prompt_tokens, max(new_tokens, 1), at))
    return rows, 0 if not arrival else 10**9 if dates else 1


def _csv_cells(file: str, lines: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Each row's cells and the line it begins on, without blank lines."""
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    line = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield line, [cell.strip() for cell in cells]
            line = reader.line_num + 1
    except csv.Error as error:  # such as a quotation mark that nothing closes
        raise TraceError(file, line, "", lines[line - 1], f"must be CSV ({error})") from error


def _columns(file: str, line: int, header: Sequence[str], names: Sequence[str], how_many: str) -> list[int]:
    known = {name.lower() for name in names}
    found = [i for i, name in enumerate(header) if name.lower() in known]
    if len(found) > 1 or (not found and how_many == "exactly one"):  # of two columns, either could be the one meant
        raise TraceError(file, line, "columns", header, f"must hold {how_many} of {', '.join(names)}")
    return found


def _number(text: str) -> int | float | str:
    """What a CSV's cell is, as JSON would have it; a text where it is no number."""
    if INTEGER.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def _tokens(place: tuple[str, int, str], value: Any, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
        raise TraceError(*place, value, f"must be an integer of at least {least} and at most {MOST_TOKENS}")
    return value


def _time(place: tuple[str, int, str], value: Any, unit: str) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < MOST_TIME:
        raise TraceError(*place, value, f"must be a number of {unit} of at least 0 and below {MOST_TIME}")
    return value


def _date_ns(place: tuple[str, int, str], text: str) -> int:
    match = DATE.fullmatch(text)
    try:
        moment = datetime.fromisoformat(match[1] + (match[3] or "Z")) if match else None
    except ValueError:  # the 30th of February
        moment = None
    if match is None or moment is None:
        raise TraceError(
            *place, text, "must be a date and time such as 2023-11-16 18:15:46.6805900, as in the first row"
        )
    whole_s = (moment - EPOCH) // timedelta(seconds=1)
    return whole_s * 10**9 + int((match[2] or "").ljust(9, "0"))


def _long(
    generator: np.random.Generator, ids: Sequence[str], times_s: Sequence[float], lengths: LongLengths
) -> list[Arrival]:
    prompts = _lognormal(generator, lengths.prompt_p50_tokens, lengths.prompt_p90_tokens, len(ids))
    prompts = np.clip(prompts, lengths.shortest_prompt_tokens, lengths.longest_prompt_tokens)
    outputs = np.clip(_lognormal(generator, lengths.new_p50_tokens, lengths.new_p90_tokens, len(ids)), 1, MOST_TOKENS)
    drawn = zip(ids, times_s, prompts, outputs, strict=True)
    return [Arrival(id, at, round(prompt), round(output), kind="long") for id, at, prompt, output in drawn]


def _lognormal(generator: np.random.Generator, p50: float, p90: float, count: int) -> np.ndarray:
    return generator.lognormal(math.log(p50), math.log(p90 / p50) / P90_SIGMAS, count)


def _poisson_times_s(generator: np.random.Generator, per_s: float, duration_s: float) -> list[float]:
    _check_positive("duration_s", duration_s)
    times_s, at_s = [], 0.0
    while per_s > 0 and (at_s := at_s + generator.exponential(1 / per_s)) < duration_s:
        times_s.append(at_s)
    return times_s


def _generator(seed: int, use: str) -> np.random.Generator:
    """One stream of its own for each use: under one seed, long requests would else arrive in step with short ones."""
    return np.random.default_rng([seed, *use.encode()])


def _percentiles(name: str, tokens: Sequence[int]) -> dict[str, float | int | None]:
    p50, p99, most = np.percentile(tokens, [50, 99, 100]).tolist() if tokens else (None, None, None)
    return {f"{name}_p50": p50, f"{name}_p99": p99, f"{name}_max": most}


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise RequestError(name, value, "must be a positive, finite number")


def _check_share(long_share: float) -> None:
    if not 0 <= long_share <= 1:
        raise RequestError("long_share", long_share, "must be in [0, 1]")


def _check_rising(lengths: LongLengths, *names: str) -> None:
    for low, high in itertools.pairwise(names):
        if not 1 <= getattr(lengths, low) <= getattr(lengths, high):
            limit = f"must be at least 1 and at most {high}, {getattr(lengths, high)}"
            raise RequestError(low, getattr(lengths, low), limit)
