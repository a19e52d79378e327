"""An Executor without a device: a clock of fixed ticks, and a naive cache that checks what a device would experience.

Every stage keeps, for every (group, page, offset), whose token of which position was written there. A
row writes its positions when its batch reaches the stage, through page tables that learn of pages by
`Span.touched` alone, and then reads every position before it: it must find its own. Decode rows take their input
from the register of their slot, which must hold the token sampled one position before. And no two requests
in the pipe may own the same page or slot: that is what quarantine is for.
"""

import zlib
from collections import deque

import numpy as np

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.serve.batch import Batch
from mnemosyne_jax.serve.executor import NOT_FINITE, StepResult

VOCAB = 97


def token_at(id: str, position: int) -> int:
    """The token sampled from the logits of `position`: a function of the request's id and the position alone."""
    return zlib.crc32(f"{id} {position}".encode()) % VOCAB


def answer(request) -> list[int]:
    """What `request` gives when it is alone."""
    tokens = []
    while len(tokens) < request.max_new_tokens:
        tokens.append(token_at(request.id, len(request.prompt) - 1 + len(tokens)))
        if tokens[-1] in (request.stop_ids or ()):
            break
    return tokens


class FakeExecutor:
    """Executor on a virtual clock. Rows of requests in `poisoned` come back NOT_FINITE from that position on."""

    in_step = True

    def __init__(self, serve: ServeConfig, mesh: MeshSpec, pool_pages: int, tick_s: float = 1.0):
        self.serve, self.mesh, self.tick_s = serve, mesh, tick_s
        self.poisoned: dict[str, int] = {}
        self.ticks = 0
        self.history: deque[Batch] = deque([Batch(-1)] * mesh.spp, maxlen=mesh.spp)  # history[s] is in stage s
        self._unread: deque[StepResult] = deque()
        self._serial: dict[int, int] = {}  # of a Request object: two requests of one id are told apart
        self._requests = []  # keeps them alive, so that no two have the same id()
        slots, B = serve.slots(mesh), serve.page_tokens
        # A cell is serial << 32 | position; -1 was never written.
        self.cells = np.full((mesh.spp, mesh.kvp, pool_pages, B), -1, np.int64)
        self.page_table = np.full((mesh.spp, mesh.kvp, slots, pool_pages), -1)
        self.register = np.full((mesh.kvp, slots), -1)

    # The protocol.

    @property
    def depth(self) -> int:
        return self.mesh.spp - 1 + self.serve.ahead

    def now(self) -> float:
        return self.ticks * self.tick_s

    def agree(self, events):
        return events

    def step(self, batch: Batch) -> StepResult | None:
        self.history.appendleft(batch)
        self._check_owners()
        self._read_registers(batch)
        for stage, in_stage in enumerate(self.history):
            rows = [(row, row.position, row.position + 1) for row in in_stage.decodes]
            rows += [(row, row.start, row.end) for row in in_stage.chunks]
            for row, begin, end in rows:
                self._apply_deltas(stage, row, begin, end)
            for row, begin, end in rows:
                self._write(stage, row, begin, end)
            for row, _, end in rows:
                self._check_keys(stage, row, end)
        self.ticks += 1
        self._unread.append(self._leave(self.history[-1]))
        return self._unread.popleft() if len(self._unread) > self.serve.ahead else None

    # The device.

    def _check_owners(self) -> None:
        """No page and no slot serves two requests of the batches that are in the pipe together."""
        owner = {}
        for batch in self.history:
            in_batch = [row.request for row in (*batch.decodes, *batch.chunks)]
            assert len(set(map(id, in_batch))) == len(in_batch), "a request has two rows in one batch"
            for row in (*batch.decodes, *batch.chunks):
                held = [("page", s.group, p) for s in row.spans for p in s.pages.tolist()]
                held += [("slot", s.group, row.slot) for s in row.spans]
                assert len(set(held)) == len(held), f"{row.request.id} holds a page twice"
                for thing in held:
                    assert owner.setdefault(thing, row.request) is row.request, f"{thing} serves two requests"

    def _read_registers(self, batch: Batch) -> None:
        for row in batch.decodes:
            for span in row.spans:
                token = self.register[span.group, row.slot]
                wanted = self._sampled(row.request, row.position - 1)
                assert token == wanted, f"{row.request.id} at {row.position}: the register holds {token}, not {wanted}"

    def _apply_deltas(self, stage: int, row, begin: int, end: int) -> None:
        for span in row.spans:
            first, last = span.touched(begin, end, self.serve.page_tokens)
            self.page_table[stage, span.group, row.slot, first:last] = span.pages[first:last]

    def _places(self, stage: int, row, begin: int, end: int):
        """(groups, pages, offsets) of positions [begin, end) as a stage knows them, from the affine rule alone."""
        positions = np.arange(begin, end)
        page, offset = np.divmod(positions, self.serve.page_tokens)
        group, local, owned = np.full((3, len(page)), -1)
        for span in row.spans:
            index, rest = np.divmod(page - span.start, span.stride)
            here = (index >= 0) & (rest == 0) & (index < len(span.pages))
            assert (group[here] == -1).all(), "two groups hold one position"
            group[here], local[here], owned[here] = span.group, index[here], span.pages[index[here]]
        assert (group >= 0).all(), "a position that no group holds"
        known = self.page_table[stage, group, row.slot, local]
        assert (known == owned).all(), f"stage {stage} was not told of a page of {row.request.id}"
        return group, known, offset

    def _write(self, stage: int, row, begin: int, end: int) -> None:
        self.cells[stage][self._places(stage, row, begin, end)] = self._content(row.request, begin, end)

    def _check_keys(self, stage: int, row, end: int) -> None:
        """The row's last query sees positions 0 .. end - 1 of its own sequence at this stage."""
        seen = self.cells[stage][self._places(stage, row, 0, end)]
        wrong = np.flatnonzero(seen != self._content(row.request, 0, end))
        assert not len(wrong), f"stage {stage}: {row.request.id} does not find its positions {wrong.tolist()}"

    def _content(self, request, begin: int, end: int) -> np.ndarray:
        if id(request) not in self._serial:
            self._serial[id(request)] = len(self._requests)
            self._requests.append(request)
        return (self._serial[id(request)] << 32) + np.arange(begin, end)

    def _sampled(self, request, position: int) -> int:
        bad = position >= self.poisoned.get(request.id, position + 1)
        return NOT_FINITE if bad else token_at(request.id, position)

    def _leave(self, batch: Batch) -> StepResult:
        for row in batch.decodes:
            self._set_register(row, row.position)
        for row in batch.chunks:
            if row.last:
                self._set_register(row, row.end - 1)
        return StepResult(
            batch,
            decode_tokens=tuple(self._sampled(row.request, row.position) for row in batch.decodes),
            chunk_tokens=tuple(self._sampled(row.request, row.end - 1) if row.last else 0 for row in batch.chunks),
            logits={},
            time_s=self.now(),
        )

    def _set_register(self, row, position: int) -> None:
        for span in row.spans:
            self.register[span.group, row.slot] = self._sampled(row.request, position)
