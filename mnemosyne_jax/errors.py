"""The one error type of every refusal."""

from __future__ import annotations

import reprlib
from typing import Any


class RequestError(ValueError):
    """A refusal: a request, checkpoint, mesh or setting that cannot be served as asked.

    Raised before anything reaches a device. `field` names what was refused, `value` is what was
    given, `limit` says what would have been accepted.
    """

    def __init__(self, field: str, value: Any, limit: str):
        super().__init__(f"{field}: got {_shown(value)}, {limit}")
        self.field, self.value, self.limit = field, value, limit

    def __reduce__(self):
        return RequestError, (self.field, self.value, self.limit)


def _shown(value: Any) -> str:
    """A value in at most 80 characters, without walking through millions of them."""
    short = reprlib.Repr(maxstring=80, maxother=80)
    try:
        shown = short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        shown = f"an integer of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return shown if len(shown) <= 80 else shown[:77] + "..."


class GenerationError(RuntimeError):
    """A request that failed while it ran, such as one whose logits were not finite. Its neighbours are unharmed."""
