"""A bounded load on ``mlakit serve`` over loopback: speed, and that no text is lost or mixed up.

    python -m benchmarks.serve_load MODEL       # writes benchmarks/results/serve_load.json

The server is a process of its own, started as a user starts it. Clients ask for streams, each for
another piece of text; some close the connection in the middle. Every text that ended is compared
with what ``mlakit.generate`` writes for the same prompt, and every one that was cut off with the
beginning of it. Each case is one cache: one that holds all clients, and one that holds a part of
them, so that running requests must give their pages back and be computed again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mlakit.api import generate
from mlakit.benching.environment import environment
from mlakit.data import builtin_text

RESULT = Path(__file__).parent / "results" / "serve_load.json"
LENGTHS = (24, 250)
"""New tokens of a request, one of these; the longer one needs pages that were not there when it
was let in."""

WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95, "seed": 1},
)
CASES = ("one client", "all fit", "pages run out", "short queue")
RETRY_SECONDS = 0.2


@dataclass
class Asked:
    """A request and what became of it.

    Attributes:
        prompt: that is continued.
        length: new tokens.
        way: how tokens are chosen.
        leaves_after: pieces after which the client goes away; None for one that stays.
        expected: what ``generate`` writes.
        text: what has come.
        at: when each piece came, after the time the request was sent.
        refused: how many times it was told to come again.
        ended: the last piece has come, with a finish reason.
    """

    prompt: str
    length: int
    way: int
    leaves_after: int | None
    expected: str = ""
    text: str = ""
    at: list[float] = field(default_factory=list)
    refused: int = 0
    ended: bool = False

    @property
    def right(self) -> bool:
        """Neither lost nor mixed with another one."""
        if self.leaves_after is None or self.ended:
            return self.ended and self.text == self.expected
        return self.expected.startswith(self.text)


def requests(count: int, share_that_leaves: float, seed: int) -> list[Asked]:
    """Pieces of text to be continued; every third one begins as others do."""
    chance, text = random.Random(seed), builtin_text("evaluation")
    shared = text[:300]
    asked = []
    for number in range(count):
        start = chance.randrange(len(text) - 400)
        prompt = text[start : start + chance.randrange(5, 100)]
        if number % 3 == 0:
            prompt = shared + prompt[:40]
        leaves = chance.random() < share_that_leaves
        pieces = chance.randrange(1, 20) if leaves else None
        asked.append(Asked(prompt, chance.choice(LENGTHS), number % len(WAYS), pieces))
    return asked


def expect(model: str, asked: Sequence[Asked]) -> None:
    """Fills in what ``generate`` writes, each kind of request in one batch.

    The sampling of a prompt that came before in a batch would be another one: none comes twice.
    """
    assert len({one.prompt for one in asked}) == len(asked)
    for way, options in enumerate(WAYS):
        for length in LENGTHS:
            these = [one for one in asked if (one.way, one.length) == (way, length)]
            if these:
                prompts = [one.prompt for one in these]
                found = generate(model, prompts, max_new_tokens=length, batch_size=32, **options)
                for one, text in zip(these, found.texts, strict=True):
                    one.expected = text


@contextmanager
def server(model: str, *options: Any) -> Iterator[str]:
    """A server of its own process, with its address; its end must be an orderly one."""
    command = [sys.executable, "-m", "mlakit", "serve", model, "--port", 0, *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"address +(http://\S+)", line):
            break
    else:
        sys.exit(f"the server did not start:\n{said}")
    log = threading.Thread(target=process.stderr.read)  # or it would wait for a reader
    log.start()
    try:
        yield found[1]
        process.send_signal(signal.SIGTERM)
        if process.wait(60):
            sys.exit("the server did not end in order")
    finally:
        process.kill()
        log.join()


async def ask(client: httpx.AsyncClient, one: Asked) -> None:
    """One request from its first try to its end, or until its client goes away."""
    body = {"prompt": one.prompt, "max_tokens": one.length, "stream": True, **WAYS[one.way]}
    while True:
        sent = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code == 429:
                one.refused += 1
            elif response.status_code != 200:
                raise SystemExit(f"{response.status_code}: {await response.aread()!r}")
            else:
                await listen(response, one, sent)
                return
        await asyncio.sleep(RETRY_SECONDS)


async def listen(response: httpx.Response, one: Asked, sent: float) -> None:
    """Collects the pieces of a stream."""
    async for line in response.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        one.at.append(time.perf_counter() - sent)
        one.text += choice["text"]
        one.ended = choice["finish_reason"] is not None
        if not one.ended and one.leaves_after == len(one.at):
            return


async def load(url: str, asked: Sequence[Asked], clients: int) -> tuple[float, dict[str, float]]:
    """Sends all requests, so many at a time; seconds, and what the server counted."""
    waiting = list(reversed(asked))

    async def client_of(client: httpx.AsyncClient) -> None:
        while waiting:
            await ask(client, waiting.pop())

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(client_of(client) for _ in range(clients)))
        seconds = time.perf_counter() - started
        for _ in range(100):  # who has gone away is noticed at the next step
            figures = read_figures((await client.get("/metrics")).text)
            if not figures["mlakit_requests_running"] + figures["mlakit_requests_waiting"]:
                break
            await asyncio.sleep(0.05)
    return seconds, figures


def read_figures(text: str) -> dict[str, float]:
    """Prometheus' text as numbers by name."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    p50, p99 = np.percentile(seconds, [50, 99])
    return {"p50_ms": round(1000 * p50, 2), "p99_ms": round(1000 * p99, 2)}


def summary(asked: Sequence[Asked], seconds: float, figures: dict[str, float]) -> dict[str, Any]:
    """What one case has shown."""
    gaps = [later - earlier for one in asked for earlier, later in zip(one.at, one.at[1:])]
    written = figures["mlakit_completion_tokens_total"]
    return {
        "requests": len(asked),
        "complete": sum(one.ended for one in asked),
        "gone_away": sum(not one.ended for one in asked),
        "wrong": sum(not one.right for one in asked),
        "told_to_come_again": sum(one.refused for one in asked),
        "tokens": int(written),
        "seconds": round(seconds, 2),
        "tokens_per_second": round(written / seconds, 1),
        "first_token": percentiles([one.at[0] for one in asked if one.at]),
        "per_token": percentiles(gaps),
        "pages": int(figures["mlakit_cache_pages"]),
        "preemptions": int(figures["mlakit_preemptions_total"]),
        "prefix_pages_found": int(figures["mlakit_prefix_pages_found_total"]),
        "cancelled_in_engine": int(
            figures.get('mlakit_sequences_finished_total{reason="cancelled"}', 0)
        ),
        "left_behind": {
            "sequences": int(
                figures["mlakit_requests_running"] + figures["mlakit_requests_waiting"]
            ),
            "pages": int(figures["mlakit_cache_pages_used"]),
        },
    }


def main() -> None:
    """Runs the cases and writes the result; exit code 1 if any text was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a converted checkpoint")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=72)
    parser.add_argument("--leave", type=float, default=0.2, help="share that goes away")
    parser.add_argument("--small-cache", default="1MiB", help="of the case that runs out")
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    where = environment() | {"load_average": os.getloadavg()}
    cases = []
    asked = requests(options.requests, options.leave, options.seed)
    expect(options.model, asked)
    shape = ("--device", "cpu", "--max-batch-size", options.clients)
    for name, clients, more in zip(
        CASES,
        (1, options.clients, options.clients, 2 * options.clients),
        (
            (),
            (),
            ("--cache-memory", options.small_cache),
            ("--max-waiting", max(1, options.clients // 4)),
        ),
        strict=True,
    ):
        if options.case not in (None, name):
            continue
        these = requests(options.requests, options.leave, options.seed)
        these = these[: max(1, options.requests // 5)] if clients == 1 else these
        for one, known in zip(these, asked):
            one.expected = known.expected
        with server(options.model, *shape, *more) as url:
            found = summary(these, *asyncio.run(load(url, these, clients)))
        cases.append({"case": name, "clients": clients, **found})
        print(json.dumps(cases[-1]), flush=True)
    result = {
        "environment": where,
        "load_average_after": os.getloadavg(),
        "model": Path(options.model).name,
        "seed": options.seed,
        "cases": cases,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    wrong = sum(case["wrong"] + case["left_behind"]["pages"] for case in cases)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
