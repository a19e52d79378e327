"""What runs batches: a device mesh or a model of one. The executor owns time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mnemosyne_jax.serve.batch import Batch

NOT_FINITE = -1


@dataclass(frozen=True, eq=False)
class StepResult:
    """What came of a batch: a token for each decode row and each chunk row, and the logits that were asked for.

    The token of a chunk that is not its prompt's last means nothing; NOT_FINITE marks a row whose
    logits were not finite. `logits` is float32 [rows, vocab], keyed by (request id, position).
    `late`: devices had done all they had when the newest batch came, so the result was there some time before `time_s`.
    """

    batch: Batch
    decode_tokens: tuple[int, ...]
    chunk_tokens: tuple[int, ...]
    logits: dict[tuple[str | int, int], np.ndarray]
    time_s: float
    late: bool = False


class Executor(Protocol):
    """Runs one batch a tick."""

    @property
    def depth(self) -> int:
        """Ticks from a batch's submission to the call of `step` that returns its result."""
        ...

    @property
    def in_step(self) -> bool:
        """Whether all stages begin and end together: then the time from one result to the next is that of a tick."""
        ...

    def now(self) -> float:
        """Seconds on the executor's clock."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Lets time pass, if it has not yet, up to `time_s` on the executor's clock."""
        ...

    def agree(self, events: Any) -> Any:
        """The events of the process that decides, the same in every process of the run."""
        ...

    def step(self, batch: Batch) -> StepResult | None:
        """Submits a batch (it may be empty) and gives the result of the one submitted `depth` ticks before."""
        ...
