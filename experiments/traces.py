"""Request traces: read from a file in any of four formats, drawn at a Poisson rate, and mixed with synthetic long ones.

Real traces hold no prompt beyond some 200 thousand tokens, so long requests are always synthetic: their kind is "long".
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne_jax.errors import RequestError

MOST_TOKENS = 2**31 - 1
MOST_TIME = 2**53  # floats tell one unit of time from the next up to here
# A CSV's columns by what each writer calls them; capitals do not matter.
PROMPT = ("num_prefill_tokens", "prompt_tokens", "input_length", "ContextTokens", "Request tokens")
OUTPUT = ("num_decode_tokens", "output_tokens", "output_length", "GeneratedTokens", "Response tokens")
ARRIVAL = ("arrived_at", "arrival_s", "timestamp")
MOONCAKE = ("input_length", "output_length", "timestamp")
DATE = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))? ?(Z|[-+]\d\d:\d\d)?", re.ASCII)
P90_SIGMAS = 1.2815515655446004  # the 90th percentile of the standard normal distribution


class TraceError(RequestError):
    """A trace that cannot be read as meant: names the file and, where there is one, the line and the field."""

    def __init__(self, file: str, line: int | None, field: str, value: Any, limit: str):
        super().__init__(", ".join(filter(None, (file, f"line {line}" if line else "", field))), value, limit)


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
        # Bounds between P50 and P90 would clip the very percentiles that are asked for.
        prompt = ("shortest_prompt_tokens", "prompt_p50_tokens", "prompt_p90_tokens", "longest_prompt_tokens")
        for low, high in (*pairwise(prompt), ("new_p50_tokens", "new_p90_tokens")):
            value, most = getattr(self, low), getattr(self, high)
            _check(1 <= value <= most <= MOST_TOKENS, low, value, f"must be in [1, {high}]: {most}, below 2**31")


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
    is_json = bool(lines) and lines[0][1].lstrip().startswith("{")
    found = list((_json_rows if is_json else _csv_rows)(file, lines)) if lines else []
    if not found:
        raise TraceError(file, None, "", "no requests", "must hold at least one")
    found.sort(key=lambda row: row[0])  # NaN comes before none: without times nothing moves
    return [replace(arrival, arrival_s=(at_ns - found[0][0]) / 10**9) for at_ns, arrival in found]


def with_poisson_arrivals(
    arrivals: Sequence[Arrival], queries_per_s: float, seed: int, duration_s: float
) -> list[Arrival]:
    """Requests drawn from `arrivals` with replacement, until `duration_s`: id '3:17' is the fourth, drawn from '17'."""
    _check(len(arrivals) > 0, "arrivals", "none", "must hold at least one request to draw from")
    generator = np.random.default_rng([seed, *b"poisson"])  # a stream of its own: never in step with `long_requests`
    times_s = _poisson_times_s(generator, queries_per_s, duration_s)
    drawn = [arrivals[i] for i in generator.integers(len(arrivals), size=len(times_s))]
    return [replace(drawn[n], id=f"{n}:{drawn[n].id}", arrival_s=at_s) for n, at_s in enumerate(times_s)]


def long_requests(
    queries_per_s: float, long_share: float, seed: int, duration_s: float, lengths: LongLengths | None = None
) -> list[Arrival]:
    """Synthetic long requests until `duration_s`: the `long_share` of `queries_per_s`, which counts all requests."""
    generator = np.random.default_rng([seed, *b"long"])
    times_s = _poisson_times_s(generator, queries_per_s, duration_s, long_share)
    drawn = _draw(generator, len(times_s), lengths or LongLengths())
    return [Arrival(f"long-{n}", times_s[n], *drawn[n], kind="long") for n in range(len(times_s))]


def mix(short: Sequence[Arrival], long_share: float, seed: int, lengths: LongLengths | None = None) -> list[Arrival]:
    """`short` with a random `long_share` of it, in whole requests, replaced by long ones that arrive at those times."""
    _check(0 <= long_share <= 1, "long_share", long_share, "must be in [0, 1]")
    generator = np.random.default_rng([seed, *b"mix"])
    replaced = generator.permutation(len(short))[: round(long_share * len(short))].tolist()
    made = list(short)
    for i, tokens in zip(replaced, _draw(generator, len(replaced), lengths or LongLengths()), strict=True):
        made[i] = Arrival(f"long-{short[i].id}", short[i].arrival_s, *tokens, kind="long")
    return made


def describe(arrivals: Sequence[Arrival]) -> dict[str, float | None]:
    """Counts, percentiles of the lengths in tokens, and the pace; None for what these arrivals do not tell."""
    long = sum(arrival.kind == "long" for arrival in arrivals)
    made: dict[str, float | None] = {"requests": len(arrivals), "long_requests": long}
    for name in ("prompt_tokens", "new_tokens"):
        tokens = [getattr(arrival, name) for arrival in arrivals]
        values = np.percentile(tokens, [50, 99, 100]).tolist() if tokens else [None] * 3
        made |= zip((f"{name}_p50", f"{name}_p99", f"{name}_max"), values, strict=True)
    times_s = [arrival.arrival_s for arrival in arrivals if not math.isnan(arrival.arrival_s)]
    span_s = max(times_s) - min(times_s) if times_s else None
    return made | {"span_s": span_s, "requests_per_s": len(times_s) / span_s if span_s else None}


def _lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, whatever ends them, and their numbers."""
    try:
        data = Path(path).read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    except OSError as error:
        raise TraceError(str(path), None, "", error.strerror, "must be a readable file") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")  # splitlines() would also split at characters within JSON strings
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TraceError(str(path), line, "", error.object[error.start : error.end], "must be UTF-8 text") from error
    return [(line, text) for line, text in enumerate(lines, 1) if text.strip()]


def _json_rows(file: str, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[float, Arrival]]:
    """Each request and the ns at which it came."""
    for line, text in lines:
        record = _json(text)
        if not isinstance(record, dict):
            raise TraceError(file, line, "", text, "must be one whole JSON object")
        prompt, output, at = (record.get(name, "nothing") for name in MOONCAKE)
        arrival = _arrival(file, line, MOONCAKE, prompt, output)
        yield _time_ns((file, line, MOONCAKE[2]), at, 10**6), arrival


def _csv_rows(file: str, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[float, Arrival]]:
    """Each request and the ns at which it came; NaN in a file without times."""
    header = _cells(file, *lines[0])
    wanted = ((PROMPT, "exactly one"), (OUTPUT, "exactly one"), (ARRIVAL, "at most one"))
    [prompt], [output], at = (_columns(file, lines[0][0], header, names, how_many) for names, how_many in wanted)
    dated = None
    for line, text in lines[1:]:
        cells = _cells(file, line, text)
        if len(cells) != len(header):
            field = header[len(cells)] if len(cells) < len(header) else "columns"
            raise TraceError(file, line, field, cells, f"must be {len(header)} cells, as in the header")
        arrival = _arrival(file, line, (header[prompt], header[output]), _json(cells[prompt]), _json(cells[output]))
        at_ns = math.nan
        for i in at:
            dated = DATE.fullmatch(cells[i]) is not None if dated is None else dated
            place = (file, line, header[i])
            at_ns = _date_ns(place, cells[i]) if dated else _time_ns(place, _json(cells[i]), 10**9)
        yield at_ns, arrival


def _cells(file: str, line: int, text: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([text], strict=True, skipinitialspace=True))]
    except csv.Error as error:  # such as a quotation mark that its line does not close
        raise TraceError(file, line, "", text, f"must be CSV ({error})") from error


def _columns(file: str, line: int, header: Sequence[str], names: Sequence[str], how_many: str) -> list[int]:
    found = [i for i, name in enumerate(header) if name.lower() in map(str.lower, names)]
    if len(found) > 1 or (not found and how_many == "exactly one"):  # of two columns, either could be the one meant
        raise TraceError(file, line, "columns", header, f"must hold {how_many} of {', '.join(names)}")
    return found


def _json(text: str) -> Any:
    """What a text is in JSON; the text itself where it is nothing. Stricter than int() and float(): not 1_000."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: not JSON, or an integer of more digits than Python reads
        return text


def _arrival(file: str, line: int, fields: Sequence[str], prompt_tokens: Any, new_tokens: Any) -> Arrival:
    """A request that has no time yet."""
    for field, value, least in zip(fields, (prompt_tokens, new_tokens), (1, 0), strict=False):
        if type(value) is not int or not least <= value <= MOST_TOKENS:
            raise TraceError(file, line, field, value, f"must be an integer of at least {least}, at most {MOST_TOKENS}")
    return Arrival(str(line), math.nan, prompt_tokens, max(new_tokens, 1))


def _time_ns(place: tuple[str, int, str], value: Any, unit_ns: int) -> int:
    if type(value) not in (int, float) or not 0 <= value < MOST_TIME:
        unit = "milliseconds" if unit_ns == 10**6 else "seconds (or in every row a date and time)"
        raise TraceError(*place, value, f"must be a number of {unit} of at least 0 and below {MOST_TIME}")
    return round(value * unit_ns)


def _date_ns(place: tuple[str, int, str], text: str) -> int:
    if match := DATE.fullmatch(text):
        with suppress(ValueError):  # such as the 30th of February
            whole_s = int(datetime.fromisoformat(match[1] + (match[3] or "Z")).timestamp())
            return whole_s * 10**9 + int((match[2] or "").ljust(9, "0"))  # datetime has no digits beyond microseconds
    raise TraceError(*place, text, "must be a date and time such as 2023-11-16 18:15:46.6805900, as in the first row")


def _draw(generator: np.random.Generator, count: int, lengths: LongLengths) -> list[list[int]]:
    """Prompt and new tokens of `count` long requests."""
    p50 = np.array([lengths.prompt_p50_tokens, lengths.new_p50_tokens])
    p90 = np.array([lengths.prompt_p90_tokens, lengths.new_p90_tokens])
    tokens = p50 * (p90 / p50) ** (generator.standard_normal((count, 2)) / P90_SIGMAS)
    bounds = [lengths.shortest_prompt_tokens, 1], [lengths.longest_prompt_tokens, MOST_TOKENS]
    return np.rint(np.clip(tokens, *bounds)).astype(int).tolist()


def _poisson_times_s(generator: np.random.Generator, queries_per_s: float, duration_s: float, share=1.0) -> list[float]:
    for name, value in (("queries_per_s", queries_per_s), ("duration_s", duration_s)):
        _check(0 < value < math.inf, name, value, "must be a positive, finite number")
    _check(0 <= share <= 1, "long_share", share, "must be in [0, 1]")
    rate_per_s, times_s, at_s = queries_per_s * share, [], 0.0
    while rate_per_s > 0 and (at_s := at_s + generator.exponential(1 / rate_per_s)) < duration_s:
        times_s.append(at_s)
    return times_s


def _check(holds: bool, name: str, value: Any, limit: str) -> None:
    if not holds:
        raise RequestError(name, value, limit)
