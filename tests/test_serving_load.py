"""The engine under load: arrivals, cancels, too few pages, shared prefixes, all at random."""

from __future__ import annotations

import random
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from latent_models import FORMS, latent_model
from mlakit.conversion.apply import convert
from mlakit.errors import UsageError
from mlakit.evaluation import open_subject
from mlakit.serving.request import Piece, QueueFull, Sampling
from mlakit.spec import QUANTISED_ROWS
from serving_cases import Listener, Watched, expected, heard
from test_family_matrix import save
from test_generation import SIZES, TOKENIZER

PROMPTS = ["a", "", "the cat sat", "the cat sat on", "the cat sat on the mat", "the dog", "grüße €"]
LONGEST = 20
WISHES = [
    Sampling(LONGEST, temperature=0.0),
    Sampling(LONGEST, temperature=0.9, top_p=0.95, seed=5),
    Sampling(LONGEST, temperature=1.2, top_k=20, seed=6),
]

Case = tuple[int, int, int, int, int | None]


@cache
def model_of(form: str, window: int | None) -> Any:
    return latent_model("mistral", form, sliding_window=window, **SIZES)


@cache
def alone(form: str, window: int | None, prompt: int, wish: int) -> tuple[list[int], str]:
    """Tokens of a prompt on its own, and why it ended."""
    model = model_of(form, window)
    tokens, _, reason = expected(model, TOKENIZER, [PROMPTS[prompt]], WISHES[wish])[0]
    return tokens, reason


requests = st.lists(
    st.tuples(
        st.integers(0, 6),  # steps before it comes
        st.integers(0, len(PROMPTS) - 1),
        st.integers(0, len(WISHES) - 1),
        st.integers(1, LONGEST),
        st.none() | st.integers(0, 25),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize(
    "form,window", [("compress", None), ("compress", 5), ("equal-cache", None), ("article", 5)]
)
@settings(max_examples=12, deadline=None)
@given(
    cases=requests,
    pages=st.integers(1, 40),
    block_size=st.sampled_from([1, 3, 4, 16]),
    chunk=st.sampled_from([1, 3, 8, 512]),
    batch=st.integers(1, 5),
)
def test_every_survivor_is_what_it_is_alone(
    form: str, window: int | None, cases: list[Case], pages: int, block_size: int, chunk: int,
    batch: int,
) -> None:  # fmt: skip
    watched = Watched(
        model_of(form, window), TOKENIZER, pages=pages, block_size=block_size,
        prefill_chunk=chunk, max_batch_size=batch,
    )  # fmt: skip
    accepted, cancels, now = [], [], 0
    for wait, prompt, wish, count, cancel in cases:
        for _ in range(wait):
            watched.step()
            now += 1
            for ticket in [t for when, t in cancels if when == now]:
                watched.engine.cancel(ticket)
        how = WISHES[wish]
        sampling = Sampling(count, how.temperature, how.top_p, how.top_k, seed=how.seed)
        needed = len(TOKENIZER(PROMPTS[prompt])["input_ids"]) + count - 1
        if needed > pages * block_size:
            with pytest.raises(UsageError, match="pages of the cache"):
                watched.submit(PROMPTS[prompt], sampling)
            continue
        ticket, listener = watched.submit(PROMPTS[prompt], sampling)
        accepted.append((prompt, wish, count, listener))
        if cancel is not None:
            cancels.append((now + cancel, ticket))
    watched.finish()
    for prompt, wish, count, listener in accepted:
        tokens, reason = alone(form, window, prompt, wish)
        if listener.reason == "cancelled":
            assert listener.token_ids == tokens[: len(listener.token_ids)]
        else:
            assert listener.token_ids == tokens[:count]
            assert listener.reason == (reason if len(tokens) < count else "length")


@pytest.mark.parametrize("kind", QUANTISED_ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_quantised_pages(form: str, kind: str) -> None:
    model = latent_model(form=form, cache_format=kind, **SIZES)
    sampling = Sampling(15, temperature=0.7, seed=1)
    for options in ({}, {"pages": 11, "prefill_chunk": 3}):
        watched = Watched(model, TOKENIZER, **options)
        listeners = [watched.submit(prompt, sampling)[1] for prompt in PROMPTS]
        watched.finish()
        assert heard(listeners) == expected(model, TOKENIZER, PROMPTS, sampling)
        assert bool(watched.engine.stats().preemptions) == bool(options)


@pytest.mark.parametrize(
    "case", ["gemma2", "gemma3_text", "smollm3", "qwen3_moe", "glm", "phi3-window"]
)
def test_families_with_windows_caps_and_experts(case: str, tmp_path: Path) -> None:
    convert(save(tmp_path / "source", case), tmp_path / "out", equal_cache=True)
    subject = open_subject(tmp_path / "out")
    texts = ["abcabc", "abc", "hello abc", "zzzz zzz", "abcabcabcabcabd", "q"]
    for sampling in (Sampling(20, temperature=0.0), Sampling(20, temperature=0.9, seed=1)):
        watched = Watched(subject.model, subject.tokenizer, pages=17, prefill_chunk=7)
        listeners = [watched.submit(text, sampling)[1] for text in texts]
        watched.finish()
        assert heard(listeners) == expected(subject.model, subject.tokenizer, texts, sampling)


def test_preempted_texts_lose_nothing_and_find_their_pages_again() -> None:
    model = model_of("compress", None)
    watched = Watched(model, TOKENIZER, pages=12)
    listeners = [watched.submit(prompt, WISHES[1])[1] for prompt in PROMPTS]
    watched.finish()
    assert heard(listeners) == expected(model, TOKENIZER, PROMPTS, WISHES[1])
    stats = watched.engine.stats()
    assert stats.preemptions > 2
    assert stats.prefix_hits > 0


@pytest.mark.parametrize("window", [None, 5])
def test_a_prefix_is_found_again(window: int | None) -> None:
    model, sampling = model_of("compress", window), Sampling(6, temperature=0.0)
    watched = Watched(model, TOKENIZER)
    texts = ["the cat sat on the mat", "the cat sat on the mat", "the cat sits", "cat sat on"]
    cached = []
    for text in texts:  # 23 tokens with the first one: 5 full pages, and 2 of "the cat s"
        _, listener = watched.submit(text, sampling)
        watched.finish()
        assert heard([listener]) == expected(model, TOKENIZER, [text], sampling)
        cached.append(listener.last.cached_tokens)
    assert cached == [0, 20, 8, 0]
    kept = watched.engine.stats().pages_kept
    assert kept == watched.engine.scheduler.ledger.kept > 5


def test_prompts_that_come_together_share_what_the_first_computes() -> None:
    watched = Watched(model_of("compress", None), TOKENIZER)
    text = "the cat sat on the mat"
    listeners = [watched.submit(text, WISHES[wish])[1] for wish in (0, 1, 0)]
    watched.step()
    assert len({tuple(job.pages[:5]) for job in watched.engine.scheduler.running}) == 3
    watched.finish()
    assert [x.last.cached_tokens for x in listeners] == [0, 20, 20]
    assert listeners[0].token_ids == listeners[2].token_ids == alone("compress", None, 4, 0)[0]


def test_short_prompts_share_a_chunk() -> None:
    watched = Watched(model_of("compress", None), TOKENIZER, prefill_chunk=24)
    texts = ["abc", "x" * 11, "hello", "y" * 30, "b"]  # 4, 12, 6, 31 and 2 tokens
    listeners = [watched.submit(text, WISHES[1])[1] for text in texts]
    heard_from = []
    for _ in range(4):
        watched.step()
        heard_from.append([bool(listener.pieces) for listener in listeners])
    assert heard_from == [
        [True, True, False, False, False],  # 2 x 12
        [True, True, True, False, True],  # 2 x 6; 31 are more than a chunk
        [True, True, True, False, True],
        [True, True, True, True, True],
    ]
    watched.finish()
    assert heard(listeners) == expected(model_of("compress", None), TOKENIZER, texts, WISHES[1])


def test_a_full_pool_forgets_the_prefix_used_longest_ago() -> None:
    watched = Watched(model_of("compress", None), TOKENIZER, pages=8)
    sampling = Sampling(1, temperature=0.0)
    cached = []
    for text in ("a" * 12, "b" * 12, "a" * 12, "c" * 12, "a" * 12, "b" * 12):
        _, listener = watched.submit(text, sampling)
        watched.finish()
        cached.append(listener.last.cached_tokens)
    assert cached == [0, 0, 12, 0, 12, 4]  # of "bbb..." the last pages went first


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    watched = Watched(model_of("compress", None), TOKENIZER, prefill_chunk=8)
    _, short = watched.submit("a", Sampling(40, temperature=0.0, ignore_eos=True))
    watched.step()
    _, long = watched.submit("x" * 80, Sampling(2, temperature=0.0))
    before = len(short.token_ids)
    for steps in range(1, 11):
        watched.step()
        assert len(short.token_ids) == before + steps
        assert not long.pieces
    watched.finish()
    assert len(long.token_ids) == 2


def test_clients_on_threads_cancel_retry_and_are_not_mixed_up() -> None:
    model = model_of("compress", None)
    watched = Watched(model, TOKENIZER, pages=14, max_batch_size=4, max_waiting=3)
    engine = watched.engine
    engine.start()
    wrong: list[str] = []

    def client(number: int) -> None:
        draw = random.Random(number)
        for _ in range(8):
            prompt, wish = draw.randrange(len(PROMPTS)), draw.randrange(len(WISHES))
            listener, ended = Listener(), threading.Event()

            def listen(piece: Piece, listener: Listener = listener, ended: Any = ended) -> None:
                listener(piece)
                if piece.finish_reason:
                    ended.set()

            ids = TOKENIZER(PROMPTS[prompt])["input_ids"]
            while True:
                try:
                    ticket = engine.submit(ids, WISHES[wish], listen)
                    break
                except QueueFull:
                    time.sleep(0.01)
            if draw.random() < 0.4:
                time.sleep(draw.random() * 0.1)
                engine.cancel(ticket)
            if not ended.wait(timeout=60):
                wrong.append(f"{number} was forgotten")
            tokens = alone("compress", None, prompt, wish)[0]
            if listener.reason == "cancelled":
                tokens = tokens[: len(listener.token_ids)]
            if listener.token_ids != tokens:
                wrong.append(f"{number} heard {listener.token_ids} and not {tokens}")

    for prompt in range(len(PROMPTS)):
        for wish in range(len(WISHES)):
            alone("compress", None, prompt, wish)
    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    engine.stop()
    assert not wrong
    watched.check()
    stats = engine.stats()
    assert sum(stats.finished.values()) == 48
    assert stats.pages_used == stats.running == stats.waiting == 0
