"""Admission, and what enters the pipe at each tick: decodes first, then chunks of prompts by policy and budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mnemosyne_jax.config import MeshSpec, ServeConfig
from mnemosyne_jax.errors import RequestError
from mnemosyne_jax.serve.batch import Batch, ChunkRow
from mnemosyne_jax.serve.budget import TickTime
from mnemosyne_jax.serve.chunking import ChooseChunk, largest_chunk
from mnemosyne_jax.serve.decoding import Decoding
from mnemosyne_jax.serve.executor import NOT_FINITE, StepResult
from mnemosyne_jax.serve.filling import MOST_PASSED, TimeFilling, token_filling
from mnemosyne_jax.serve.pace import Pace
from mnemosyne_jax.serve.placement import Places
from mnemosyne_jax.serve.policy import PrefillTimes, estimate, is_short, priority_at
from mnemosyne_jax.serve.request import Phase, Request, Sequence, Timeline, checked
from mnemosyne_jax.serve.room import ChunkRoom
from mnemosyne_jax.serve.waiting import WaitingQueue


class Scheduler:
    """Sole owner of Sequences and of their Places. It never reads a clock and never sees a token before it must.

    `fits(shared_tokens, private_tokens)` says whether a compiled program holds these chunk areas. With `prefill_times`
    requests go in the order of the policy, without in order of arrival. With `tick_time` chunks fill a time budget, at
    the `pace` that ticks were seen to have; without a token budget, as `choose_chunk` says.
    """

    def __init__(
        self,
        serve: ServeConfig,
        mesh: MeshSpec,
        *,
        pool_pages: int,
        vocab: int,
        fits: Callable[[int, int], bool],
        choose_chunk: ChooseChunk = largest_chunk,
        tick_time: TickTime | None = None,
        prefill_times: PrefillTimes | None = None,
    ):
        assert tick_time is None or prefill_times, "a time budget goes by the policy"
        self.serve, self.mesh, self.vocab = serve, mesh, vocab
        self._prefill_times, self._choose_chunk = prefill_times, choose_chunk
        self.pace, self._area = Pace(), ChunkRoom(serve, mesh.kvp, fits)
        self.filling = tick_time and TimeFilling(serve, mesh, tick_time, self._area, self.pace)
        self.places = Places(serve, mesh, pool_pages)
        self.tick = 0  # the next to be submitted
        self.sequences: dict[str | int, Sequence] = {}  # waiting and running
        self._waiting = WaitingQueue(serve.policy if prefill_times else None, serve.late == "demote")
        self._prefilling: list[Sequence] = []  # in order of admission
        self._decoding = Decoding(mesh.spp)
        self._running = (self._prefilling, self._decoding)

    # Requests in and out.

    @property
    def longest(self) -> int:
        """The most tokens of keys and values that one request can have when it is alone."""
        return self.places.pools[0].size * self.serve.page_tokens * self.mesh.kvp

    @property
    def waiting(self) -> int:
        """Requests that have no pages yet."""
        return len(self._waiting)

    def check(self, request: Request, now_s: float, stop_ids: tuple[int, ...] = ()) -> Request:
        """The request with every default filled in; `stop_ids` are the model's.

        Raises: RequestError if it can never be served as asked.
        """
        request = checked(request, self.vocab, self.longest, now_s, stop_ids)
        if self.serve.late == "refuse" and request.deadline_s is not None and self._prefill_times:
            alone_s = self._prefill_times.alone_s(len(request.prompt))
            if now_s + alone_s > (request.arrival_s or 0.0) + request.deadline_s:
                raise RequestError(
                    "deadline_s", request.deadline_s, f"is too short: alone it would take {alone_s:.3g} s"
                )
        return request

    def check_queue(self, waiting: Iterable[Request] = ()) -> None:
        """Raises: RequestError if the queue, with these beside it, has no room for another request."""
        most, more = self.serve.max_waiting_tokens, list(waiting)
        if self.waiting + len(more) >= self.serve.max_waiting:
            raise RequestError(
                "queue", self.waiting + len(more), f"is full: at most {self.serve.max_waiting} requests wait"
            )
        tokens = self._waiting.tokens + sum(len(request.prompt) for request in more)
        if most is not None and tokens >= most:
            raise RequestError("queue", tokens, f"is full: no request is taken while {most} tokens of prompts wait")

    def submit(self, request: Request, now_s: float, stop_ids: tuple[int, ...] = ()) -> Sequence:
        """The Sequence of an accepted request, queued.

        Raises: RequestError if it cannot be served as asked; nothing has changed then.
        """
        request = self.check(request, now_s, stop_ids)
        if request.id in self.sequences:
            raise RequestError("id", request.id, "is already queued or running")
        self.check_queue()
        return self.enqueue(request)

    def enqueue(self, request: Request) -> Sequence:
        """The Sequence of a checked request, queued. Refuses nothing: a deadline may have passed since the check."""
        assert request.id not in self.sequences, f"request {request.id} is already queued or running"
        if self.idle:
            self.pace.rest()
        pages = -(-request.total_tokens // self.serve.page_tokens)
        sequence = Sequence(request, Timeline(arrival_s=request.arrival_s or 0.0), pages=pages)
        if self._prefill_times:
            estimate(sequence, self._prefill_times)
        self.sequences[request.id] = sequence
        self._waiting.append(sequence)
        return sequence

    def cancel(self, id: str | int) -> bool:
        """Ends a request in any phase; its pages go to quarantine at once. False if there is none of that id."""
        sequence = self.sequences.get(id)
        if sequence is not None:
            self._finish(sequence, "cancelled")
        return sequence is not None

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs (late rows may still be in the pipe)."""
        return not self.sequences

    # One tick.

    def next_batch(self, now_s: float) -> Batch:
        """The batch of the next tick, which is thereby submitted: it must be run."""
        self.places.drain(self.tick - self.mesh.spp)
        self._admit(now_s)
        decodes = self._decoding.rows(self.tick)
        prefills = self._prefills(now_s) if self._prefilling else ()
        if self.filling is None:
            chunks = token_filling(prefills, self._area, self._choose_chunk)
        else:
            decoding = bool(decodes or self._decoding)
            chunks = self.filling.chunks(self.tick, now_s, decodes, decoding, prefills)
        batch = Batch(self.tick, decodes, tuple(self._take_chunk(s, length) for s, length in chunks))
        self.tick += 1
        return batch

    def commit(self, result: StepResult) -> list[Sequence]:
        """Takes in what a batch gave; returns the sequences that it moved on."""
        moved = []
        for row, token in zip(result.batch.chunks, result.chunk_tokens, strict=True):
            sequence = self.sequences.get(row.request.id)
            if sequence is None or sequence.request is not row.request:
                continue  # it ended while this row was in the pipe
            sequence.prompt_done = row.end
            sequence.logits |= {p: v for (id, p), v in result.logits.items() if id == row.request.id}
            moved.append(sequence)
            if row.last:
                sequence.phase = Phase.DECODE
                self._take_token(sequence, token, result.time_s)
        for row, token in zip(result.batch.decodes, result.decode_tokens, strict=True):
            sequence = self.sequences.get(row.request.id)
            if sequence is not None and sequence.request is row.request:
                moved.append(sequence)
                self._take_token(sequence, token, result.time_s)
        self.places.drain(self.tick - self.mesh.spp)  # an idle scheduler, too, holds nothing back
        return moved

    def _take_token(self, sequence: Sequence, token: int, time_s: float) -> None:
        if token == NOT_FINITE:
            self._finish(sequence, "error: a logit was not finite")
            return
        sequence.tokens.append(token)
        sequence.timeline.token_s.append(time_s)
        if token in (sequence.request.stop_ids or ()):
            self._finish(sequence, "stop")
        elif len(sequence.tokens) == sequence.request.max_new_tokens:
            self._finish(sequence, "length")

    def _prefills(self, now_s: float) -> list[Sequence]:
        """Prompts under way that may have a chunk, the first to have one first."""
        policy, demote_late, prefills = self.serve.policy, self.serve.late == "demote", self._prefilling.copy()
        if self._prefill_times and len(prefills) > 1:  # a stable sort: ties by admission
            prefills.sort(key=priority_at(policy, now_s, demote_late))
        return prefills[:1] if self._prefill_times and policy == "fcfs_exclusive" else prefills

    def _take_chunk(self, s: Sequence, length: int) -> ChunkRow:
        row = ChunkRow(s.request, s.slot, s.group, s.spans, s.prompt_scheduled, length)
        s.prompt_scheduled += length
        s.last_tick = self.tick
        if self._prefill_times:
            s.left_s = s.work_s - self._prefill_times.alone_s(s.prompt_scheduled)
        if s.prompt_scheduled == len(s.request.prompt):
            s.tokens_scheduled = 1
            self._prefilling.remove(s)
            self._decoding.append(s)
        return row

    # Into and out of the groups.

    def _admit(self, now_s: float) -> None:
        """Places waiting requests in order; who finds no room and must not be passed is passed by short ones only."""
        if not self.places.any_slot_free or not self.waiting:
            return
        places, passed, kept, refuses = self.places, 0, None, self.serve.late == "refuse"
        for sequence in self._waiting.in_order(now_s):
            if refuses and sequence.request.deadline_s is not None and now_s + sequence.left_s > sequence.due_s:
                self._finish(sequence, "refused: its deadline can no longer be kept")
            elif kept and not is_short(sequence):
                continue
            elif places.place(sequence, self._running, kept):
                self._waiting.remove(sequence)
                sequence.phase = Phase.PREFILL
                sequence.timeline.admitted_s = now_s
                self._prefilling.append(sequence)
                if not refuses and not places.any_slot_free:
                    break  # nothing can come of looking at others
            elif (passed := passed + 1) == MOST_PASSED or self._waiting.strict:
                break
            elif not kept and not self._waiting.lets_pass(sequence, now_s):
                kept = places.needed_by(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        else:
            (self._decoding if sequence.tokens_scheduled else self._prefilling).remove(sequence)
            self.places.release(sequence)
        sequence.phase, sequence.reason = Phase.FINISHED, reason
        del self.sequences[sequence.request.id]
        self.places.drain(self.tick - self.mesh.spp)  # of one that no tick has carried yet, at once
