"""The engine's promises one by one: texts, ends, faults, limits, threads, real checkpoints."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_models import FORMS
from mlakit.conversion.apply import convert
from mlakit.errors import UsageError
from mlakit.evaluation import open_subject
from mlakit.generation import generate
from mlakit.serving.engine import Engine
from mlakit.serving.request import Draining, Piece, QueueFull, Sampling
from serving_cases import Listener, Watched, expected, heard
from test_generation import PROMPTS, TOKENIZER, model_of

GREEDY = Sampling(12, temperature=0.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_of_generate(form: str, temperature: float) -> None:
    model = model_of(form)
    sampling = Sampling(12, temperature=temperature, top_p=0.9, seed=3)
    watched = Watched(model, TOKENIZER, prefill_chunk=5)
    listeners = [watched.submit(prompt, sampling)[1] for prompt in PROMPTS]
    watched.finish()
    assert heard(listeners) == expected(model, TOKENIZER, PROMPTS, sampling)


def test_ends_at_eos_or_ignores_it() -> None:
    model = model_of("compress")
    free = generate(model, TOKENIZER, ["hello there"], max_new_tokens=12).token_ids[0]
    model.generation_config.eos_token_id = [free[4], 1]
    watched = Watched(model, TOKENIZER)
    _, ended = watched.submit("hello there", GREEDY)
    _, ignored = watched.submit("hello there", replace(GREEDY, ignore_eos=True))
    watched.finish()
    assert (ended.token_ids, ended.reason) == (free[: free.index(free[4])], "eos")
    assert (ignored.token_ids, ignored.reason) == (free, "length")


def test_stops_before_a_stop_string_and_gives_whole_characters() -> None:
    model = model_of("compress")
    free = generate(model, TOKENIZER, ["hello there"], max_new_tokens=30).texts[0]
    sampling = Sampling(30, temperature=0.0, stop=(free[8:11], "never"))
    watched = Watched(model, TOKENIZER)
    _, listener = watched.submit("hello there", sampling)
    watched.finish()
    assert listener.reason == "stop"
    assert listener.text == free[: free.index(free[8:11])]
    assert heard([listener]) == expected(model, TOKENIZER, ["hello there"], sampling)


def logits_after(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def test_log_probabilities_are_the_models_own() -> None:
    model, watched = model_of("compress"), Watched(model_of("compress"), TOKENIZER)
    odd = Sampling(6, temperature=2.0, seed=4, presence_penalty=1.0, logprobs=3, ignore_eos=True)
    listeners = [watched.submit("hello there", odd)[1], watched.submit("a", GREEDY)[1]]
    listeners.append(watched.submit("a", replace(odd, logprobs=0))[1])
    watched.finish()
    ids = TOKENIZER("hello there")["input_ids"]
    for piece in listeners[0].pieces:
        (token,), (found,) = piece.token_ids, piece.logprobs
        levels = logits_after(model, ids).log_softmax(dim=-1)
        assert found.token_id == token
        assert found.logprob == pytest.approx(float(levels[token]), abs=1e-4)
        best = levels.topk(3)
        assert [t for t, _ in found.top] == best.indices.tolist()
        assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(token)
    assert all(piece.logprobs == () for piece in listeners[1].pieces)
    assert all(piece.logprobs[0].top == () for piece in listeners[2].pieces)


def test_penalties_and_bias_are_those_of_the_definition() -> None:
    model = model_of("compress")
    wishes = [
        replace(GREEDY, presence_penalty=3.0),
        replace(GREEDY, frequency_penalty=1.5),
        replace(GREEDY, presence_penalty=-2.0, frequency_penalty=0.5, logit_bias={40: 2.0, 7: 9.0}),
        replace(GREEDY, logit_bias={9: 100.0}),
    ]
    watched = Watched(model, TOKENIZER, pages=9)  # some are preempted, and count from their tokens
    listeners = [watched.submit("hello there", wish)[1] for wish in wishes]
    watched.finish()
    for wish, listener in zip(wishes, listeners):
        written: list[int] = []
        for token in listener.token_ids:
            logits = logits_after(model, TOKENIZER("hello there")["input_ids"] + written)
            for other in set(written):
                logits[other] -= wish.presence_penalty
                logits[other] -= wish.frequency_penalty * written.count(other)
            for other, bias in wish.logit_bias.items():
                logits[other] += bias
            assert token == int(logits.argmax())
            written.append(token)
    assert listeners[3].token_ids == [9] * 12
    assert watched.engine.stats().preemptions


def test_without_a_seed_texts_differ_and_with_one_they_do_not() -> None:
    watched = Watched(model_of("compress"), TOKENIZER)
    hot = Sampling(12, temperature=1.5)
    listeners = [watched.submit("a", hot)[1] for _ in range(4)]
    listeners += [watched.submit("a", replace(hot, seed=8))[1] for _ in range(2)]
    watched.finish()
    texts = [tuple(x.token_ids) for x in listeners]
    assert len(set(texts)) == 5
    assert texts[4] == texts[5]


def test_cancelled_at_any_time() -> None:
    model = model_of("compress")
    watched = Watched(model, TOKENIZER, max_batch_size=1, prefill_chunk=4)
    running, first = watched.submit("hello there", GREEDY)
    arrived, second = watched.submit("a", GREEDY)
    watched.engine.cancel(arrived)
    for _ in range(5):
        watched.step()
    waiting, third = watched.submit("b", GREEDY)
    last, fourth = watched.submit("hello there", GREEDY)
    watched.step()
    watched.engine.cancel(running)
    watched.engine.cancel(waiting)
    watched.finish()
    watched.engine.cancel(last)  # it has ended: nothing happens
    assert [x.reason for x in (first, second, third, fourth)] == [*["cancelled"] * 3, "length"]
    assert 0 < len(first.token_ids) < 12
    assert second.pieces == third.pieces == [Piece("", finish_reason="cancelled")]
    assert fourth.token_ids == expected(model, TOKENIZER, ["hello there"], GREEDY)[0][0]


class Faulty:
    """A model that fails where it is told to."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.fails = lambda ids: False
        self.spoils = lambda ids: None
        self.spoilt = float("nan")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **given: Any) -> Any:
        if self.fails(given["input_ids"]):
            raise RuntimeError("out of luck")
        output = self.model(**given)
        rows = self.spoils(given["input_ids"])
        if rows is not None:
            output.logits[rows, ..., 3] = self.spoilt
        return output


def test_a_fault_ends_the_request_it_comes_from_and_no_other() -> None:
    model = Faulty(model_of("compress"))
    watched = Watched(model, TOKENIZER)
    texts = ["hello there", "abc", "a", "xyz"]
    want = expected(model.model, TOKENIZER, texts, GREEDY)
    poison = next(t for t in want[1][0][2:] if t not in want[0][0] + want[3][0])
    last = TOKENIZER("a")["input_ids"][-1]
    model.fails = lambda ids: (
        bool((ids == poison).any()) or (ids.shape[1] > 1 and bool((ids[:, -1] == last).any()))
    )
    listeners = [watched.submit(text, GREEDY)[1] for text in texts]
    watched.finish()
    assert [x.reason for x in listeners] == ["length", "error", "error", "length"]
    assert {x.last.error for x in listeners[1:3]} == {"RuntimeError: out of luck"}
    assert [listeners[place].token_ids for place in (0, 3)] == [want[0][0], want[3][0]]
    assert listeners[1].token_ids == want[1][0][: want[1][0].index(poison) + 1]
    assert listeners[2].token_ids == []


def test_memory_that_is_too_small_for_a_batch_is_used_one_by_one() -> None:
    model = Faulty(model_of("compress"))
    watched = Watched(model, TOKENIZER)
    model.fails = lambda ids: len(ids) > 1
    sampling = Sampling(12, temperature=0.8, seed=3)
    listeners = [watched.submit(prompt, sampling)[1] for prompt in PROMPTS]
    watched.finish()
    assert heard(listeners) == expected(model.model, TOKENIZER, PROMPTS, sampling)


def test_a_tokenizer_that_fails_ends_one_request() -> None:
    watched = Watched(model_of("compress"), TOKENIZER)
    listeners = [watched.submit(prompt, GREEDY)[1] for prompt in ("abc", "hello there")]
    job = watched.engine._jobs[1]
    job.text.stream.push = lambda token: 1 // 0  # type: ignore[method-assign]
    watched.finish()
    assert listeners[0].last.error == "ZeroDivisionError: integer division or modulo by zero"
    assert heard(listeners[1:]) == expected(
        watched.engine.model, TOKENIZER, ["hello there"], GREEDY
    )


def test_a_spoilt_page_is_not_shared() -> None:
    model = Faulty(model_of("compress"))
    watched = Watched(model, TOKENIZER)
    model.spoils = lambda ids: 0
    _, first = watched.submit("hello there", GREEDY)
    watched.finish()
    model.spoils = lambda ids: None
    _, second = watched.submit("hello there", GREEDY)
    watched.finish()
    assert first.reason == "error"
    assert second.last.cached_tokens == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_end_their_own_request_only(value: float) -> None:
    model = Faulty(model_of("compress"))
    model.spoilt = value
    watched = Watched(model, TOKENIZER)
    listeners = [watched.submit(prompt, GREEDY)[1] for prompt in ("hello there", "abc")]
    watched.step()
    watched.step()
    model.spoils = lambda ids: 0 if ids.shape == (2, 1) else None
    watched.finish()
    assert listeners[0].last.error == "the model's logits are not numbers"
    assert heard(listeners[1:]) == expected(model.model, TOKENIZER, ["abc"], GREEDY)


def test_a_listener_that_fails_harms_nobody_else() -> None:
    watched = Watched(model_of("compress"), TOKENIZER)
    calls = []

    def fails(piece: Piece) -> None:
        calls.append(piece)
        raise ConnectionError("gone")

    _, fine = watched.submit("abc", GREEDY)
    watched.engine.submit([0, 5], GREEDY, fails)
    watched.finish()
    assert len(calls) == 1
    assert heard([fine]) == expected(model_of("compress"), TOKENIZER, ["abc"], GREEDY)


def test_after_a_fault_in_the_books_everything_begins_anew() -> None:
    engine = Watched(model_of("compress"), TOKENIZER).engine
    first, ended = Listener(), threading.Event()

    def listen(piece: Piece) -> None:
        first(piece)
        if piece.finish_reason:
            ended.set()
        else:
            engine.scheduler.ledger._holders = []

    engine.submit(TOKENIZER("hello there")["input_ids"], GREEDY, listen)
    engine.start()
    assert ended.wait(timeout=60)
    second = Listener()
    engine.submit(TOKENIZER("hello there")["input_ids"], GREEDY, second)
    assert engine.drain(timeout=60)
    engine.stop()
    assert (first.last.error or "").startswith("IndexError: list")
    assert heard([second]) == expected(engine.model, TOKENIZER, ["hello there"], GREEDY)
    assert engine.stats().finished == {"error": 1, "length": 1}


def test_what_can_never_be_served_is_refused() -> None:
    model = model_of("compress")
    engine = Watched(model, TOKENIZER, pages=6, max_tokens_per_request=40).engine
    for prompt, sampling, word in (
        ([], GREEDY, "no token"),
        ([300], GREEDY, "the prompt has token 300"),
        ([3], replace(GREEDY, logit_bias={258: 1.0}), "logit_bias has token 258"),
        ([3] * 29, GREEDY, "may have 40"),
        ([3] * 20, GREEDY, "32 tokens take 8 pages"),
    ):
        with pytest.raises(UsageError, match=word):
            engine.submit(prompt, sampling, Listener())
    for name in ("max_batch_size", "max_tokens_per_request", "prefill_chunk", "block_size"):
        with pytest.raises(UsageError, match=f"{name} is 0"):
            Engine(model, TOKENIZER, **{name: 0})
    with pytest.raises(UsageError, match="holds no page"):
        Engine(model, TOKENIZER, cache_bytes=100)
    with pytest.raises(UsageError, match="--equal-cache"):
        Engine(model_of("ordinary"), TOKENIZER)
    for wrong in (
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": -1},
        {"stop": ("",)},
        {"stop": "x"},
        {"logprobs": -1},
        {"presence_penalty": float("inf")},
        {"logit_bias": {3: float("nan")}},
    ):
        with pytest.raises(UsageError):
            Sampling(**{"max_tokens": 5, **wrong})


def test_the_queue_has_an_end() -> None:
    watched = Watched(model_of("compress"), TOKENIZER, max_waiting=2, max_batch_size=1)
    listeners = [watched.submit("a", GREEDY)[1]]
    watched.step()
    listeners += [watched.submit("a", GREEDY)[1] for _ in range(2)]
    assert (watched.engine.stats().running, watched.engine.stats().waiting) == (1, 2)
    with pytest.raises(QueueFull, match="2 requests wait"):
        watched.submit("a", GREEDY)
    watched.finish()
    assert len({tuple(x.token_ids) for x in listeners}) == 1


def test_a_thread_serves_many_and_is_drained() -> None:
    model = model_of("compress")
    engine = Engine(model, TOKENIZER, block_size=4, max_batch_size=3)
    engine.start()
    listeners: dict[tuple[int, int], Listener] = {}

    def client(number: int) -> None:
        for index, prompt in enumerate(PROMPTS):
            listeners[number, index] = Listener()
            ids = TOKENIZER(prompt)["input_ids"]
            engine.submit(ids, GREEDY, listeners[number, index])

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert engine.drain(timeout=60)
    want = expected(model, TOKENIZER, PROMPTS, GREEDY)
    for number in range(3):
        assert heard([listeners[number, index] for index in range(len(PROMPTS))]) == want
    with pytest.raises(Draining):
        engine.submit([0], GREEDY, Listener())
    engine.stop()
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("started", [True, False])
def test_stop_cancels_what_was_accepted(started: bool) -> None:
    engine, listener = Engine(model_of("compress"), TOKENIZER), Listener()
    if started:
        engine.start()
    engine.submit([0, 5, 6], Sampling(250, ignore_eos=True), listener)
    assert not engine.drain(timeout=0.01)
    engine.stop()
    assert listener.reason == "cancelled"
    assert engine.stats().pages_used == 0


COMPRESS = {"cache_ratio": 0.5, "method": "transmla", "calibration_tokens": 1024}


@pytest.mark.parametrize("goal", [{"equal_cache": True}, COMPRESS], ids=["equal", "compress"])
@pytest.mark.parametrize("name", ["stories260k", "llama2xs280k"])
def test_real_checkpoints(shared: Path, tmp_path: Path, name: str, goal: dict[str, Any]) -> None:
    convert(shared / "models" / name, tmp_path / "mla", **goal)
    subject = open_subject(tmp_path / "mla")
    texts = ["Once upon a time", "Once upon a time there was a little", "The dog", "Lily and"]
    for sampling in (Sampling(60, temperature=0.0), Sampling(60, temperature=0.8, seed=2)):
        watched = Watched(
            subject.model, subject.tokenizer, block_size=16, pages=14, prefill_chunk=4
        )
        listeners = [watched.submit(text, sampling)[1] for text in texts]
        watched.finish()
        assert heard(listeners) == expected(subject.model, subject.tokenizer, texts, sampling)
        assert watched.engine.stats().preemptions
