"""Who runs: admission by free pages, chunks of prompts, preemption of the youngest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mlakit.generation.continuation import Continuation
from mlakit.serving.pages import ROOT, Key, PageLedger
from mlakit.serving.request import Piece, Ticket


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        ticket: what the caller knows it by.
        prompt_length: tokens of the prompt.
        tokens: the prompt and what has been written.
        text: the writing.
        on_piece: who listens.
        pages: where its rows lie, in order.
        nodes: of those pages that are full, their nodes in the ledger.
        computed: tokens whose rows are in the pages.
        found: tokens of the prompt whose rows were there before it came; None until it ran.
    """

    ticket: Ticket
    prompt_length: int
    tokens: list[int]
    text: Continuation
    on_piece: Callable[[Piece], None]
    pages: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    computed: int = 0
    found: int | None = None

    @property
    def missing(self) -> int:
        """Tokens without rows; with one, the job is at its next token."""
        return len(self.tokens) - self.computed


class Scheduler:
    """First come, first served, within the pages there are.

    Jobs run in the order they came. One that needs a page when none is left takes it from the
    youngest, which waits at the head of the queue and is computed again from its tokens, as far
    as its full pages are not found again.

    Args:
        ledger: the pages.
        max_batch_size: most jobs that run.
        prefill_chunk: most tokens of prompts in one step.
    """

    def __init__(self, ledger: PageLedger, max_batch_size: int, prefill_chunk: int) -> None:
        self.ledger = ledger
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.preemptions = 0
        self.prefix_hits = 0

    def decoding(self) -> list[Job]:
        """The jobs at their next token, each with a page for its row; may preempt others."""
        for job in list(self.running):
            while job in self.running and job.missing == 1 and self._short_of(job):
                if self.ledger.available:
                    job.pages += self.ledger.take(1)
                else:
                    self._preempt(self.running[-1])
        return [job for job in self.running if job.missing == 1]

    def admit(self) -> None:
        """Lets waiting jobs run, in order, while their tokens fit and a page for each runner."""
        while self.waiting and len(self.running) < self.max_batch_size:
            job, ledger = self.waiting[0], self.ledger
            hits = self._find_pages(job)
            if self._short_of(job) + len(self.running) > ledger.available:
                self._give_back(job)
                return
            job.pages += ledger.take(self._short_of(job))
            self.running.append(self.waiting.popleft())
            self.prefix_hits += hits
            if job.found is None:
                job.found = job.computed

    def prefilling(self) -> list[tuple[Job, int]]:
        """One chunk: of the oldest prompt, and of as many short ones as fit beside it.

        A job whose next page another one of this chunk computes waits, and finds it then.

        Returns:
            Jobs and how many of their tokens are next; their number times the largest of these
            is at most ``prefill_chunk``.
        """
        chunk: list[tuple[Job, int]] = []
        width, begun = 0, set()
        for job in self.running:
            if job.missing < 2:
                continue
            untouched, hits = job.found == job.computed, self._find_pages(job)
            self.prefix_hits += hits
            if untouched:
                job.found = job.computed
            count = min(job.missing, self.prefill_chunk)
            widest, page = max(width, count), self._next_page(job)
            if not chunk or ((len(chunk) + 1) * widest <= self.prefill_chunk and page not in begun):
                chunk.append((job, count))
                width = widest
                if len(page[1]) == self.ledger.block_size:
                    begun.add(page)
        return chunk

    def computed(self, job: Job, count: int) -> None:
        """Notes that the next ``count`` rows of a job are stored; full pages become known."""
        job.computed += count
        size = self.ledger.block_size
        while (len(job.nodes) + 1) * size <= job.computed:
            index = len(job.nodes)
            node = self.ledger.publish(*self._next_page(job), job.pages[index])
            job.pages[index] = node.page
            job.nodes.append(node.number)

    def leave(self, job: Job) -> None:
        """Takes a job out, wherever it is, and its pages back."""
        if job in self.running:
            self.running.remove(job)
        else:
            self.waiting.remove(job)
        self._give_back(job)

    def forget(self) -> None:
        """Begins anew: no job, and every page free."""
        self.ledger = PageLedger(self.ledger.count, self.ledger.block_size)
        self.waiting.clear()
        self.running.clear()

    def _preempt(self, job: Job) -> None:
        self.leave(job)
        self.waiting.appendleft(job)
        self.preemptions += 1

    def _give_back(self, job: Job) -> None:
        self.ledger.give_back(job.pages)
        job.pages, job.nodes, job.computed = [], [], 0

    def _short_of(self, job: Job) -> int:
        """Pages that all tokens of a job need and it has not got."""
        return max(0, self.ledger.pages_for(len(job.tokens)) - len(job.pages))

    def _find_pages(self, job: Job) -> int:
        """Puts known pages where a job's next rows would be; its last token is always computed.

        Returns:
            How many.
        """
        size, before = self.ledger.block_size, len(job.nodes)
        while job.computed == len(job.nodes) * size and job.missing > size:
            node = self.ledger.find(*self._next_page(job))
            if node is None:
                break
            index = len(job.nodes)
            self.ledger.give_back(job.pages[index : index + 1])
            job.pages[index : index + 1] = [node.page]
            job.nodes.append(node.number)
            job.computed += size
        return len(job.nodes) - before

    def _next_page(self, job: Job) -> Key:
        """What the page after the known ones is found by; its tokens may not fill it."""
        size, start = self.ledger.block_size, len(job.nodes) * self.ledger.block_size
        return job.nodes[-1] if job.nodes else ROOT, tuple(job.tokens[start : start + size])
