"""The one error type of every refusal."""

from __future__ import annotations

from typing import Any


class RequestError(ValueError):
    """A refusal: a request, checkpoint, mesh or setting that cannot be served as asked.

    Raised before anything reaches a device. `field` names what was refused, `value` is what was
    given, `limit` says what would have been accepted.
    """

    def __init__(self, field: str, value: Any, limit: str):
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        super().__init__(f"{field}: got {shown}, {limit}")
        self.field, self.value, self.limit = field, value, limit

    def __reduce__(self):
        return RequestError, (self.field, self.value, self.limit)


class GenerationError(RuntimeError):
    """A request that failed while it ran, such as one whose logits were not finite. Its neighbours are unharmed."""
