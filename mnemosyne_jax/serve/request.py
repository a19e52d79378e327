"""What was asked (Request), what was done about it (Sequence), and when (Timeline)."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.pages import Span

MAX_POSITION = 2**31 - 1
HOTTEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # devices sample in float32
COLDEST = 1e-6  # a lower temperature is greedy: logits divided by it could overflow


@dataclass(frozen=True, eq=False, slots=True)
class Request:
    """One prompt and how to continue it.

    `prompt` is a list or 1-D integer array of token ids. `temperature` 0 is greedy. `stop_ids` end
    the answer; None means the checkpoint's own. `deadline_s` is relative to `arrival_s` (None: none
    asked). `read_positions` asks for the logits at these prompt positions. `first_position` is the
    rotary position of the first token.
    """

    id: str | int
    prompt: np.ndarray | Seq[int]
    max_new_tokens: int = 32
    arrival_s: float | None = None
    deadline_s: float | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] | None = None
    read_positions: Seq[int] = ()
    first_position: int = 0

    @property
    def total_tokens(self) -> int:
        """Keys and values this request can need: the last new token is never fed back."""
        return len(self.prompt) + self.max_new_tokens - 1


def checked(request: Request, vocab: int, longest: int, now_s: float, stop_ids: tuple[int, ...] = ()) -> Request:
    """The request with its prompt as an int32 array, its arrival and stop ids filled in.

    Raises: RequestError naming field, value and limit, for anything that cannot be served as asked.
    """
    if not isinstance(request.id, str | int):
        raise RequestError("id", request.id, "must be a string or an integer")
    prompt = _checked_ids("prompt", request.prompt, vocab)
    if prompt.size == 0:
        raise RequestError("prompt", "empty", "must hold at least one token")
    if not _is_int(request.max_new_tokens) or request.max_new_tokens < 1:
        raise RequestError("max_new_tokens", request.max_new_tokens, "must be an integer of at least 1")
    new_tokens = int(request.max_new_tokens)  # from here on no sum can overflow a small numpy type
    stops = stop_ids if request.stop_ids is None else request.stop_ids
    stops = tuple(int(i) for i in _checked_ids("stop_ids", stops, vocab))
    if not _is_finite(request.temperature) or not 0 <= float(request.temperature) <= HOTTEST:
        raise RequestError("temperature", request.temperature, "must be a finite float32, 0 (greedy) or more")
    temperature = float(request.temperature)
    if not _is_finite(request.top_p) or not 0 < float(request.top_p) <= 1:
        raise RequestError("top_p", request.top_p, "must be in (0, 1]")
    if not _is_int(request.seed) or not 0 <= request.seed < 2**32:
        raise RequestError("seed", request.seed, "must be an integer in [0, 2**32)")
    if request.arrival_s is not None and not _is_finite(request.arrival_s):
        raise RequestError("arrival_s", request.arrival_s, "must be a finite number of seconds")
    arrival_s = now_s if request.arrival_s is None else float(request.arrival_s)
    if request.deadline_s is not None:
        if not _is_finite(request.deadline_s) or request.deadline_s <= 0:
            raise RequestError("deadline_s", request.deadline_s, "must be a positive number of seconds after arrival")
        if arrival_s + float(request.deadline_s) <= now_s:
            raise RequestError(
                "deadline_s", request.deadline_s, f"has passed: it is {now_s - arrival_s:.3f} s since arrival"
            )
    total = prompt.size + new_tokens - 1
    if total > longest:
        most = longest + 1 - new_tokens
        fits = (
            f"a prompt of at most {most} tokens" if most > 0 else f"at most {longest} new tokens after a prompt of one"
        )
        raise RequestError(
            "prompt + max_new_tokens",
            prompt.size + new_tokens,
            f"the longest that fits is {longest + 1} tokens in all: with {new_tokens} new tokens, {fits}",
        )
    first = request.first_position
    if not _is_int(first) or not 0 <= first <= MAX_POSITION - total:
        raise RequestError(
            "first_position", first, f"must be in [0, {MAX_POSITION - total}]: positions are below 2**31"
        )
    wanted = _flat_integers("positions", request.read_positions)
    if wanted.size and (wanted.min() < 0 or wanted.max() >= prompt.size):
        raise RequestError("positions", request.read_positions, f"must be integers in [0, {prompt.size})")
    return Request(
        id=request.id, prompt=prompt, max_new_tokens=new_tokens, arrival_s=arrival_s,
        deadline_s=None if request.deadline_s is None else float(request.deadline_s),
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_p=max(float(request.top_p), SMALLEST), seed=int(request.seed), stop_ids=stops,
        read_positions=tuple(int(p) for p in np.unique(wanted)), first_position=int(first),
    )  # fmt: skip


def _is_int(x: object) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_finite(x: object) -> bool:
    if not isinstance(x, int | float | np.integer | np.floating) or isinstance(x, bool):
        return False
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond every float
        return False


def _checked_ids(name: str, ids: object, vocab: int) -> np.ndarray:
    array = _flat_integers(name, ids)
    if array.size and (array.min() < 0 or array.max() >= vocab):
        wrong = int(array.min() if array.min() < 0 else array.max())
        raise RequestError(name, wrong, f"token ids must be in [0, {vocab})")
    return np.array(array, np.int32)  # a copy: the caller's array may change while the prompt waits


def _flat_integers(name: str, values: object) -> np.ndarray:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, OverflowError):
        array = np.asarray(None)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(name, values, "must be a flat list or 1-D array of integers, each below 2**63")
    return array


class Phase(enum.Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(slots=True)
class Timeline:
    """When things happened to one request, in seconds of the executor's clock."""

    arrival_s: float
    admitted_s: float | None = None
    token_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        """Time to first token, queueing included; NaN before there is one."""
        return self.token_s[0] - self.arrival_s if self.token_s else float("nan")

    @property
    def tbt_s(self) -> np.ndarray:
        """Gaps between consecutive tokens, [tokens - 1]."""
        return np.diff(np.array(self.token_s))

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; NaN with fewer than two."""
        return float(self.tbt_s.mean()) if len(self.token_s) > 1 else float("nan")

    @property
    def e2e_s(self) -> float:
        """Last token minus arrival; NaN before there is one."""
        return self.token_s[-1] - self.arrival_s if self.token_s else float("nan")


@dataclass(eq=False, slots=True)  # slots: fields of many are read at every tick, long after their last use
class Sequence:
    """A request under way. What was *scheduled* is counted apart from what *came back*: a pipeline lies between."""

    request: Request
    timeline: Timeline
    phase: Phase = Phase.WAITING
    pages: int = 0  # that it can ever need, in all groups together
    slot: int = -1
    group: int | None = None  # None: shared by all groups
    spans: tuple[Span, ...] = ()
    prompt_scheduled: int = 0
    prompt_done: int = 0
    tokens_scheduled: int = 0
    tokens: list[int] = field(default_factory=list)
    due_s: float = math.inf  # when the first token is to be there, on the executor's clock
    forgiven_s: float = math.inf  # until when it may have to stand back for being late
    work_s: float = 0.0  # predicted seconds of the whole prefill alone
    left_s: float = 0.0  # those of what has not been scheduled
    unit_s: float = 1.0  # in which its slack is measured: its work, if it is not too small for that
    logits: dict[int, np.ndarray] = field(default_factory=dict)  # by prompt position, where asked for
    last_tick: int = -1  # the newest tick that carries a row of this sequence
    reason: str = ""  # why it finished: length, stop, cancelled, or an error's text

    @property
    def arrival_s(self) -> float:
        return self.timeline.arrival_s

    @property
    def groups(self) -> set[int]:
        """Those that hold its keys and values."""
        return {span.group for span in self.spans}

    @property
    def finished(self) -> bool:
        return self.phase is Phase.FINISHED
