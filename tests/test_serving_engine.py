"""The engine: every request's text is what ``generate`` writes, whatever happens around it."""

from __future__ import annotations

from typing import Any

import pytest

from latent_models import FORMS
from mlakit.generation import generate
from mlakit.serving.engine import Engine
from mlakit.serving.request import Draining, Piece, Sampling
from test_generation import PROMPTS, TOKENIZER, model_of


class Listener:
    """Collects the pieces of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def __call__(self, piece: Piece) -> None:
        assert not self.pieces or self.pieces[-1].finish_reason is None
        self.pieces.append(piece)

    @property
    def reason(self) -> str | None:
        return self.pieces[-1].finish_reason if self.pieces else None

    @property
    def token_ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.token_ids]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def engine_of(model: Any, **options: Any) -> Engine:
    engine = Engine(model, TOKENIZER, **{"block_size": 4, **options})
    for pages in engine.pool.pages:
        pages.fill_(float("nan"))
    return engine


def run(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_those_of_generate(form: str, temperature: float) -> None:
    model = model_of(form)
    expected = generate(
        model, TOKENIZER, PROMPTS, max_new_tokens=12, temperature=temperature, top_p=0.9, seed=3
    )
    engine = engine_of(model, prefill_chunk=5)
    listeners = [Listener() for _ in PROMPTS]
    sampling = Sampling(12, temperature=temperature, top_p=0.9, seed=3)
    for prompt, listener in zip(PROMPTS, listeners):
        engine.submit(TOKENIZER(prompt)["input_ids"], sampling, listener)
    run(engine)
    assert [x.token_ids for x in listeners] == expected.token_ids
    assert [x.text for x in listeners] == expected.texts
    assert [x.reason for x in listeners] == expected.finish_reasons
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_a_thread_serves_until_it_is_drained() -> None:
    model = model_of("compress")
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12).token_ids
    engine = engine_of(model)
    engine.start()
    listeners = [Listener() for _ in PROMPTS]
    for prompt, listener in zip(PROMPTS, listeners):
        engine.submit(TOKENIZER(prompt)["input_ids"], Sampling(12, temperature=0.0), listener)
    assert engine.drain(timeout=60)
    assert [x.token_ids for x in listeners] == expected
    with pytest.raises(Draining):
        engine.submit([0], Sampling(1), Listener())
    engine.stop()
    assert engine.stats().pages_used == 0


def test_stop_cancels_what_was_accepted() -> None:
    for started in (True, False):
        engine, listener = engine_of(model_of("compress")), Listener()
        if started:
            engine.start()
        engine.submit([0, 5, 6], Sampling(250, ignore_eos=True), listener)
        engine.stop()
        assert listener.reason == "cancelled"
        assert engine.stats().pages_used == 0
