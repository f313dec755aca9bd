"""The engine: many requests, one model, one pool of pages, one step after the other."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlakit.errors import UsageError
from mlakit.generation.continuation import Continuation, eos_ids, next_tokens
from mlakit.generation.sampling import Sampling, log_probabilities
from mlakit.nn.configs import LatentConfig
from mlakit.serving.pages import PageLedger
from mlakit.serving.pool import make_pool
from mlakit.serving.request import (
    Draining,
    EngineStats,
    FinishReason,
    Piece,
    QueueFull,
    Ticket,
    TokenLogprob,
)
from mlakit.serving.scheduler import Job, Scheduler
from mlakit.spec import BLOCK_SIZE


class Engine:
    """Writes many texts at once; each is what ``generate`` writes of it alone.

    (In 16 bits that holds up to rounding, as it does for the batches of ``generate``.)

    A step feeds one token of every running request, together, and then at most one chunk of
    prompts, so a long prompt holds nobody up for longer than a chunk. Requests share pages of
    ``[c_kv | k_rope]`` rows: a full page is found again by any later text that begins with the
    same tokens. When pages run out, the youngest request gives its own back and is computed again
    later; it loses nothing but time.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        max_batch_size: most requests that run.
        cache_bytes: bytes of the pool; by default enough for ``max_batch_size`` requests of full
            length, or most of the free memory if that is less.
        max_tokens_per_request: most tokens of a prompt and what follows; the model's context by
            default.
        prefill_chunk: most tokens of prompts in one step.
        max_waiting: most requests that wait.
        block_size: tokens per page.

    Raises:
        UsageError: the model was not converted, or the bytes do not hold a single page.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_batch_size: int = 32,
        cache_bytes: int | None = None,
        max_tokens_per_request: int | None = None,
        prefill_chunk: int = 512,
        max_waiting: int = 256,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        if not isinstance(model.config, LatentConfig):
            raise UsageError(
                f"{model.config.name_or_path or 'this model'} caches keys and values, and the "
                "engine's pages hold latents",
                remedy="mlakit convert MODEL --equal-cache, which is exact and costs no bytes",
            )
        self.model, self.tokenizer = model, tokenizer
        context = int(self.model.config.max_position_embeddings)
        for name, size in (
            ("max_batch_size", max_batch_size),
            ("max_tokens_per_request", max_tokens_per_request),
            ("prefill_chunk", prefill_chunk),
            ("max_waiting", max_waiting),
            ("block_size", block_size),
        ):
            if size is not None and size < 1:
                raise UsageError(f"{name} is {size}; at least 1 is needed")
        self.max_tokens = min(context, max_tokens_per_request or context)
        self.max_waiting = max_waiting
        self.pool = make_pool(model, cache_bytes, max_batch_size, self.max_tokens, block_size)
        self.scheduler = Scheduler(
            PageLedger(self.pool.num_blocks, block_size), max_batch_size, prefill_chunk
        )
        self._eos = eos_ids(model, tokenizer)
        self._wake = threading.Condition()
        self._arrivals: deque[Job] = deque()
        self._cancelled: set[int] = set()
        self._jobs: dict[int, Job] = {}
        self._thread: threading.Thread | None = None
        self._accepts, self._stops = True, False
        self._accepted = self._steps = self._prompt_tokens = self._written_tokens = 0
        self._finished: Counter[FinishReason] = Counter()

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, on_piece: Callable[[Piece], None]
    ) -> Ticket:
        """Accepts a request; may be called from any thread.

        Args:
            prompt_ids: the prompt, at least one token.
            sampling: how to go on.
            on_piece: called with each piece of the text, the last one with a ``finish_reason``, on
                the engine's thread; it should return at once.

        Raises:
            UsageError: the request can never be served: it is too long for the model's context or
                the pool, or a token is not in the vocabulary.
            QueueFull: ``max_waiting`` requests wait.
            Draining: the engine takes no more requests.
        """
        prompt = [int(token) for token in prompt_ids]
        self._check(prompt, sampling)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(63))
        text = Continuation(self.tokenizer, prompt, sampling, self._eos)
        with self._wake:
            if not self._accepts:
                raise Draining("the server is being stopped", remedy="ask another one")
            if len(self._arrivals) + len(self.scheduler.waiting) >= self.max_waiting:
                raise QueueFull(
                    f"{self.max_waiting} requests wait already", remedy="try again later"
                )
            self._accepted += 1
            self._prompt_tokens += len(prompt)
            job = Job(Ticket(self._accepted), len(prompt), prompt, text, on_piece)
            self._jobs[job.ticket.number] = job
            self._arrivals.append(job)
            self._wake.notify_all()
        return job.ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request before the next step, with a last piece; nothing if it has ended."""
        with self._wake:
            if ticket.number in self._jobs:
                self._cancelled.add(ticket.number)
                self._wake.notify_all()

    def stats(self) -> EngineStats:
        """What the engine holds now, and what it has done; may be called from any thread."""
        ledger = self.scheduler.ledger
        free, kept = ledger.free, ledger.kept
        return EngineStats(
            waiting=len(self._arrivals) + len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            pages_total=ledger.count,
            pages_used=ledger.count - free - kept,
            pages_kept=kept,
            pages_free=free,
            cache_nbytes=self.pool.nbytes,
            preemptions=self.scheduler.preemptions,
            prefix_hits=self.scheduler.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            written_tokens=self._written_tokens,
            finished=dict(self._finished),
            steps=self._steps,
        )

    def start(self) -> None:
        """Begins to work, on a thread of its own; once."""
        if self._thread is not None:
            raise UsageError("the engine has been started already")
        self._thread = threading.Thread(target=self._work, name="mlakit-engine", daemon=True)
        self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests and waits for the accepted ones.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Returns:
            Whether all have ended.
        """
        with self._wake:
            self._accepts = False
            return self._wake.wait_for(lambda: not self._jobs, timeout)

    def stop(self) -> None:
        """Takes no more requests, cancels the accepted ones, and ends the thread."""
        with self._wake:
            self._accepts, self._stops = False, True
            self._cancelled |= self._jobs.keys()
            self._wake.notify_all()
        if self._thread is None:
            self._leave_cancelled()
        else:
            self._thread.join()

    def _check(self, prompt: list[int], sampling: Sampling) -> None:
        """Refuses what can never be served."""
        vocabulary = int(self.model.config.vocab_size)
        for name, tokens in (("the prompt", prompt), ("logit_bias", list(sampling.logit_bias))):
            wrong = [token for token in tokens if not 0 <= token < vocabulary]
            if wrong:
                raise UsageError(
                    f"{name} has token {wrong[0]}, and the vocabulary ends at {vocabulary - 1}"
                )
        if not prompt:
            raise UsageError("the prompt has no token", remedy="begin with the bos token")
        needed = len(prompt) + sampling.max_tokens
        if needed > self.max_tokens:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens; with {sampling.max_tokens} new ones that "
                f"is {needed}, and a request may have {self.max_tokens}",
                remedy="shorten the prompt or lower max_tokens",
            )
        ledger = self.scheduler.ledger
        if ledger.pages_for(needed - 1) > ledger.count:  # the last token needs no row
            raise UsageError(
                f"{needed} tokens take {ledger.pages_for(needed - 1)} pages of the cache, which "
                f"has {ledger.count}",
                remedy="shorten the prompt, lower max_tokens, or give the cache more bytes",
            )

    @torch.inference_mode()
    def step(self) -> bool:
        """One step; what the thread does again and again.

        Returns:
            Whether there was anything to compute.
        """
        self._leave_cancelled()
        with self._wake:
            self.scheduler.waiting.extend(self._arrivals)
            self._arrivals.clear()
        self.scheduler.admit()
        batch = self.scheduler.decoding()
        if batch:
            self._feed([(job, 1) for job in batch])
        chunk = self.scheduler.prefilling()
        if chunk:
            self._feed(chunk)
        worked = bool(batch or chunk)
        self._steps += worked
        return worked

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._stops)
                if self._stops:
                    break
            try:
                self.step()
            except Exception as error:  # not of a request: the books may be wrong
                logging.getLogger(__name__).exception("every request ends, every page is freed")
                with self._wake:
                    self.scheduler.forget()
                    self._arrivals.clear()
                    jobs = list(self._jobs.values())
                for job in jobs:
                    self._finish(job, Piece("", finish_reason="error", error=_reason(error)))
        self._leave_cancelled()

    def _leave_cancelled(self) -> None:
        with self._wake:
            jobs = [self._jobs[number] for number in self._cancelled if number in self._jobs]
            self._cancelled.clear()
        for job in jobs:
            self._end(job, Piece("", finish_reason="cancelled"))

    def _feed(self, chunk: list[tuple[Job, int]]) -> None:
        """Computes the next tokens of every job, so many of each, and the one after the last."""
        fault = ""
        try:
            logits = self._forward(chunk)
            spoilt = (~logits.amax(dim=-1).isfinite()).tolist()  # NaN is the largest of all
        except Exception as error:  # the fault of one of them, or memory for so many
            logging.getLogger(__name__).exception("a step of %d requests failed", len(chunk))
            fault = _reason(error)
        if fault and len(chunk) == 1:
            self._end(chunk[0][0], Piece("", finish_reason="error", error=fault))
        elif fault:  # outside of the except clause, which holds on to the memory
            for one in chunk:
                self._feed([one])
        else:
            self._note(chunk, logits, spoilt)

    def _note(self, chunk: list[tuple[Job, int]], logits: Tensor, spoilt: list[bool]) -> None:
        """Enters what was computed, and delivers where a token is due."""
        due = []
        for place, (job, count) in enumerate(chunk):
            if spoilt[place]:
                reason = "the model's logits are not numbers"
                self._end(job, Piece("", finish_reason="error", error=reason))
                continue
            self.scheduler.computed(job, count)
            if not job.missing:
                due.append(place)
        if due:
            self._deliver([chunk[place][0] for place in due], logits[due])

    def _forward(self, chunk: list[tuple[Job, int]]) -> Tensor:
        """Logits ``[B, vocabulary]`` after the next tokens of every job."""
        starts = [job.computed for job, _ in chunk]
        tokens = [job.tokens[job.computed : job.computed + count] for job, count in chunk]
        return self.pool.feed(self.model, [job.pages for job, _ in chunk], starts, tokens)

    def _deliver(self, jobs: list[Job], logits: Tensor) -> None:
        """Chooses the next token of every job and tells its listener."""
        tokens = next_tokens(logits, [job.text for job in jobs])
        for job, token, row in zip(jobs, tokens, logits, strict=True):
            try:
                piece = _accept(job, token, row)
            except Exception as error:  # the tokenizer's
                piece = Piece("", finish_reason="error", error=_reason(error))
            self._written_tokens += len(piece.token_ids)
            if piece.finish_reason is None:
                self._tell(job, piece)
            else:
                self._end(job, piece)

    def _tell(self, job: Job, piece: Piece) -> None:
        """Calls the listener; one that fails is not called again."""
        try:
            job.on_piece(piece)
        except Exception as error:
            job.on_piece = lambda piece: None
            if piece.finish_reason is None:
                self._end(job, Piece("", finish_reason="error", error=_reason(error)))

    def _end(self, job: Job, last: Piece) -> None:
        """Takes a job out, its pages back, and tells its listener."""
        with self._wake:
            if job in self._arrivals:
                self._arrivals.remove(job)
            else:
                self.scheduler.leave(job)
        self._finish(job, last)

    def _finish(self, job: Job, last: Piece) -> None:
        """Tells a listener the end, and forgets the job."""
        assert last.finish_reason is not None
        self._finished[last.finish_reason] += 1
        self._tell(job, replace(last, cached_tokens=job.found or 0))
        with self._wake:
            del self._jobs[job.ticket.number]
            self._wake.notify_all()


def _accept(job: Job, token: int, logits: Tensor) -> Piece:
    """Adds the next token to a job's text; ``logits [vocabulary]`` are what it was chosen by."""
    before, wanted = len(job.text.token_ids), job.text.sampling.logprobs
    text = job.text.accept(token)
    written = tuple(job.text.token_ids[before:])
    job.tokens += written
    likely: tuple[TokenLogprob, ...] = ()
    if wanted is not None and written:
        level, top = log_probabilities(logits, token, wanted)
        likely = (TokenLogprob(token, level, tuple(top)),)
    return Piece(text, written, likely, job.text.finish_reason)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
