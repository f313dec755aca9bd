"""An engine under observation, for the tests of serving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mlakit.generation import generate
from mlakit.serving.engine import Engine
from mlakit.serving.request import Piece, Sampling, Ticket

NAN = float("nan")


class Listener:
    """Collects the pieces of one request; none may come after the last."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, piece: Piece) -> None:
        assert not self.pieces or self.pieces[-1].finish_reason is None
        self.pieces.append(piece)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]

    @property
    def reason(self) -> str | None:
        return self.last.finish_reason if self.pieces else None

    @property
    def token_ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


class Watched:
    """An engine stepped by hand, every unused row of its pages NaN, its books checked."""

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer
        pages = options.pop("pages", None)
        self.engine = Engine(model, tokenizer, **{"block_size": 4, **options})
        if pages is not None:
            page = self.engine.pool.nbytes // self.engine.pool.num_blocks
            options["cache_bytes"] = pages * page
            self.engine = Engine(model, tokenizer, **{"block_size": 4, **options})
        self.check()

    def submit(self, prompt: str, sampling: Sampling) -> tuple[Ticket, Listener]:
        listener = Listener()
        ids = self.tokenizer(prompt)["input_ids"]
        return self.engine.submit(ids, sampling, listener), listener

    def step(self) -> bool:
        worked = self.engine.step()
        self.check()
        return worked

    def finish(self) -> None:
        """Steps to the end; then nobody holds a page."""
        for _ in range(3000):
            if not self.step():
                break
        else:
            raise AssertionError("the engine does not come to an end")
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
        assert stats.pages_free + stats.pages_kept == stats.pages_total

    def check(self) -> None:
        """Every page has as many holders as jobs that list it, or is free or kept, once."""
        ledger, scheduler = self.engine.scheduler.ledger, self.engine.scheduler
        holders = Counter(page for job in scheduler.running for page in job.pages)
        assert [holders[page] for page in range(ledger.count)] == ledger._holders
        idle = [*ledger._free, *ledger._kept]
        assert sorted([*idle, *holders]) == list(range(ledger.count))
        assert set(ledger._kept) <= set(ledger._keys)
        assert not set(ledger._free) & set(ledger._keys)
        assert not any(job.pages or job.computed for job in scheduler.waiting)
        self._poison(dict.fromkeys(ledger._free, 0))
        used: Counter[int] = Counter()
        for job in scheduler.running:
            for place, page in enumerate(job.pages):
                used[page] = max(used[page], job.computed - place * ledger.block_size)
        self._poison({page: max(0, used[page]) for page in holders})

    def _poison(self, filled: dict[int, int]) -> None:
        """Makes the rows of these pages NaN from some row on (255 is NaN or huge in bytes)."""
        for pages in self.engine.pool.pages:
            for page, rows in filled.items():
                if rows < pages.shape[1]:
                    pages[page, rows:] = NAN if pages.is_floating_point() else 255


def expected(
    model: Any, tokenizer: Any, prompts: Sequence[str], sampling: Sampling
) -> list[tuple[list[int], str, str]]:
    """Tokens, text and finish reason of every prompt, as ``generate`` writes it alone."""
    found = []
    for prompt in prompts:
        result = generate(
            model,
            tokenizer,
            [prompt],
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=sampling.stop,
            seed=sampling.seed or 0,
        )
        found.append((result.token_ids[0], result.texts[0], result.finish_reasons[0]))
    return found


def heard(listeners: Sequence[Listener]) -> list[tuple[list[int], str, str | None]]:
    """The same of what listeners heard."""
    return [(x.token_ids, x.text, x.reason) for x in listeners]
