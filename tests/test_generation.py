"""Generation: ragged batches, sampling, streaming, stop strings, ends and costs."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from latent_models import FORMS, latent_model
from mlakit.account import cache_bytes
from mlakit.errors import UsageError
from mlakit.generation import generate
from mlakit.generation.sampling import choose_tokens, row_generator
from mlakit.generation.text import TextStream
from mlakit.nn.hf import attention_specs

PROMPTS = ["a", "hello there", "", "one two three four", "grüße €"]


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Every byte is a token; 0 is ``<s>``, which begins every text, and 1 is ``</s>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


TOKENIZER = byte_tokenizer()
SIZES = {"vocab_size": 258, "bos_token_id": 0}


def model_of(form: str, **changes: Any) -> Any:
    """A tiny model in a latent form, or an ordinary Llama."""
    if form != "ordinary":
        return latent_model(form=form, **SIZES, **changes)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
        **SIZES,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


def greedy_without_cache(model: Any, prompt: str, count: int) -> list[int]:
    """The definition: the most likely token, again and again, over the whole text."""
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    for _ in range(count):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)
        ids = torch.cat((ids, best), dim=1)
    return ids[0, -count:].tolist()


@pytest.mark.parametrize("form", [*FORMS, "ordinary"])
def test_ragged_batch_is_the_uncached_computation(form: str) -> None:
    model = model_of(form)
    result = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    for prompt, ids, reason in zip(PROMPTS, result.token_ids, result.finish_reasons):
        expected = greedy_without_cache(model, prompt, 12)
        if reason == "eos":
            expected = expected[: expected.index(TOKENIZER.eos_token_id)]
        assert ids == expected


@pytest.mark.parametrize("form", [*FORMS, "ordinary"])
def test_sampled_rows_equal_single_runs(form: str) -> None:
    model = model_of(form)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "top_k": 40}
    together = generate(model, TOKENIZER, PROMPTS, **options)
    assert together == generate_again(together, generate(model, TOKENIZER, PROMPTS, **options))
    for index, prompt in enumerate(PROMPTS):
        alone = generate(model, TOKENIZER, [prompt], **options)
        assert alone.token_ids == [together.token_ids[index]]
        assert alone.texts == [together.texts[index]]
    backwards = generate(model, TOKENIZER, PROMPTS[::-1], batch_size=2, **options)
    assert backwards.texts == together.texts[::-1]
    assert generate(model, TOKENIZER, PROMPTS, seed=1, **options).texts != together.texts
    twice = generate(model, TOKENIZER, ["same", "same"], **options).token_ids
    assert twice[0] != twice[1]


def test_a_padding_token_outside_the_vocabulary() -> None:
    model, padded = model_of("compress"), byte_tokenizer(pad_token="<pad>")
    assert padded.pad_token_id == model.config.vocab_size
    together = generate(model, padded, PROMPTS, max_new_tokens=4)
    assert together.token_ids == generate(model, TOKENIZER, PROMPTS, max_new_tokens=4).token_ids


def generate_again(first: Any, second: Any) -> Any:
    """``second`` with the clock readings of ``first``: all else must be equal."""
    clock = ("tokens_per_second", "prefill_seconds", "decode_seconds")
    return type(second)(**{**vars(second), **{name: vars(first)[name] for name in clock}})


@pytest.mark.parametrize("form", ["compress", "ordinary"])
def test_pieces_add_up_to_the_texts(form: str) -> None:
    model = model_of(form)
    streamed = dict.fromkeys(range(len(PROMPTS)), "")

    def listen(row: int, piece: str) -> None:
        assert piece
        streamed[row] += piece

    result = generate(
        model, TOKENIZER, PROMPTS, max_new_tokens=40, temperature=1.0, on_text=listen, batch_size=2
    )
    assert list(streamed.values()) == result.texts
    for prompt, ids, text in zip(PROMPTS, result.token_ids, result.texts):
        whole = TOKENIZER.decode(TOKENIZER(prompt)["input_ids"] + ids, skip_special_tokens=True)
        assert prompt + text == whole


@pytest.mark.parametrize("as_list", [False, True])
def test_ends_at_eos_and_leaves_other_rows_alone(as_list: bool) -> None:
    model = model_of("compress")
    free = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    eos = free.token_ids[1][4]
    model.generation_config.eos_token_id = [eos, 1] if as_list else eos
    ended = generate(model, TOKENIZER, PROMPTS, max_new_tokens=12)
    assert ended.finish_reasons[1] == "eos"
    for whole, ids, reason in zip(free.token_ids, ended.token_ids, ended.finish_reasons):
        cut = whole.index(eos) if eos in whole else len(whole)
        assert ids == whole[:cut]
        assert reason == ("eos" if eos in whole else "length")


def test_eos_of_the_tokenizer_when_the_model_names_none() -> None:
    model, tokenizer = model_of("compress"), byte_tokenizer()
    free = generate(model, TOKENIZER, ["a"], max_new_tokens=8).token_ids[0]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(free[5])
    ended = generate(model, tokenizer, ["a"], max_new_tokens=8)
    assert ended.finish_reasons == ["eos"]
    assert ended.token_ids[0] == free[: free.index(free[5])]


def stream(tokens: list[int], stop: tuple[str, ...] = (), prompt: str = "") -> list[str]:
    """Pieces of a byte-token text; the last one is what ``finish`` releases."""
    text = TextStream(TOKENIZER, TOKENIZER(prompt)["input_ids"], stop)
    pieces = []
    for token in tokens:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert "".join(pieces) == text.text
    return pieces


def bytes_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_only_whole_characters_are_released() -> None:
    assert stream(bytes_of("aé€😀")) == ["a", "", "é", "", "", "€", "", "", "", "😀", ""]
    assert stream(bytes_of("a€")[:-1]) == ["a", "", "", "\ufffd"]


class CountingTokenizer:
    """Ids 0 to 255 are bytes, 256 is a special token; counts the ids it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: list[int], **options: Any) -> str:
        self.decoded += len(ids)
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize("token", [256, 0x80], ids=["special", "no character"])
def test_tokens_without_text_are_not_read_again_and_again(token: int) -> None:
    tokenizer = CountingTokenizer()
    text = TextStream(tokenizer, [65], ())
    pieces = [text.push(token) for _ in range(1000)] + [text.push(byte) for byte in "ö".encode()]
    assert tokenizer.decoded < 1000 * 100
    pieces.append(text.finish())
    assert "".join(pieces) == ("" if token == 256 else "\ufffd" * 1000) + "ö"


def test_never_a_part_of_a_stop_string() -> None:
    assert stream(bytes_of("one###two"), ("###",)) == ["o", "n", "e", "", "", "", ""]
    assert stream(bytes_of("a##b"), ("###",)) == ["a", "", "", "##b", ""]
    assert stream(bytes_of("a##"), ("###",)) == ["a", "", "", "##"]
    assert "".join(stream(bytes_of("xabcy"), ("bc", "abcd", "c"))) == "xa"
    assert "".join(stream(bytes_of("1€2"), ("€",))) == "1"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab#é€ ", max_size=30),
    stop=st.lists(st.text(alphabet="ab#é", min_size=1, max_size=3), max_size=2),
)
def test_streamed_text_is_cut_at_the_first_stop(text: str, stop: list[str]) -> None:
    tokens, ends = bytes_of(text), []
    for end in range(len(text) + 1):  # the stop string that completes first wins
        ends += [text.find(s) for s in stop if s in text[:end] and not ends]
    pieces = stream(tokens, tuple(stop), prompt="ab#")
    assert "".join(pieces) == (text[: min(ends)] if ends else text)


def test_generate_stops_before_a_stop_string() -> None:
    model = model_of("compress")
    free = generate(model, TOKENIZER, ["hello there"], max_new_tokens=30).texts[0]
    stop = free[8:11]
    pieces: list[str] = []
    result = generate(
        model,
        TOKENIZER,
        ["hello there", "a"],
        max_new_tokens=30,
        stop=[stop],
        on_text=lambda row, piece: pieces.append(piece) if row == 0 else None,
    )
    assert result.finish_reasons[0] == "stop"
    assert result.texts[0] == "".join(pieces) == free[: free.index(stop)]


def test_spaces_of_a_sentencepiece_vocabulary_survive() -> None:
    """A first token that begins a word keeps its space after a prompt, not at the start."""
    vocabulary = {"<s>": 0, "▁Once": 1, "▁upon": 2, "▁a": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    text = TextStream(wrapped, [0, 1], ())
    assert [text.push(2), text.push(3)] == [" upon", " a"]
    assert TextStream(wrapped, [0], ()).push(1) == "Once"


def test_a_prompt_is_not_read_from_amid_a_character() -> None:
    """Only its last tokens are, and a decoder of bytes spoils a run that begins within one."""
    vocabulary = {"<s>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    text = TextStream(wrapped, [0, *(byte + 1 for byte in "龘龘龘".encode())], ())
    pieces = [text.push(token) for token in [*(byte + 1 for byte in "龍".encode()), 257]]
    assert pieces == ["", "", "龍", " a"]


CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"


def test_chat_template() -> None:
    model, tokenizer = model_of("compress"), byte_tokenizer()
    with pytest.raises(UsageError, match="no chat template"):
        generate(model, tokenizer, ["hi"], chat=True)
    tokenizer.chat_template = CHAT
    chat = generate(model, tokenizer, ["hi"], chat=True, max_new_tokens=6)
    tokenizer._tokenizer.post_processor = processors.ByteLevel()  # templates bring their own bos
    plain = generate(model, tokenizer, ["[user] hi\n[assistant]"], max_new_tokens=6)
    assert chat.token_ids == plain.token_ids


@pytest.mark.parametrize(
    "options,word",
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_new_tokens": 254}, "context is 256"),
    ],
)
def test_senseless_options(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        generate(model_of("compress"), TOKENIZER, ["ab"], **options)


def test_senseless_prompts() -> None:
    model = model_of("compress")
    for prompts, word in (([], "no prompt"), ("text", "one string")):
        with pytest.raises(UsageError, match=word):
            generate(model, TOKENIZER, prompts)
    bare = byte_tokenizer()
    bare._tokenizer.post_processor = processors.ByteLevel()
    assert generate(model, bare, [""], max_new_tokens=2).finish_reasons == ["length"]
    bare.bos_token = None
    with pytest.raises(UsageError, match="empty prompt"):
        generate(model, bare, [""])


@pytest.mark.parametrize("form", [*FORMS, "ordinary"])
def test_costs_are_measured(form: str) -> None:
    model = model_of(form)
    result = generate(model, TOKENIZER, ["abc", "a"], max_new_tokens=9)
    specs = attention_specs(model)
    assert result.cache_bytes_per_token == 4 * sum(spec.cache_width for spec in specs)
    if form == "ordinary":
        assert result.cache_nbytes == cache_bytes(specs, 2, 4 + 9 - 1, 4)
    else:
        assert result.cache_nbytes == cache_bytes(specs, 2, 4 + 9, 4, block_size=64)
    assert result.tokens_per_second == pytest.approx(2 * 8 / result.decode_seconds)
    assert result.prefill_seconds > 0
    record = result.as_dict(["abc", "a"])
    assert [row["prompt"] for row in record["results"]] == ["abc", "a"]
    assert "18 tokens" in result.summary()


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    draws = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]

    def shares(temperature: float, top_k: int, top_p: float) -> list[float]:
        tokens = choose_tokens(logits.repeat(2000, 1), draws, temperature, top_k, top_p)
        return (torch.bincount(tokens, minlength=4) / 2000).tolist()

    for temperature in (1.0, 0.5):
        expected = (logits[0] / temperature).softmax(dim=0)
        assert shares(temperature, 0, 1.0) == pytest.approx(expected.tolist(), abs=1e-3)
    two = (logits[0, 1:3]).softmax(dim=0).tolist()
    assert shares(1.0, 2, 1.0) == pytest.approx([0.0, *two, 0.0], abs=1e-3)
    assert shares(1.0, 0, 0.7) == pytest.approx([0.0, *two, 0.0], abs=1e-3)
    assert shares(1.0, 1, 1.0) == shares(1.0, 0, 0.0) == [0.0, 1.0, 0.0, 0.0]
    assert choose_tokens(logits, None, 0.0, 0, 1.0).tolist() == [1]
    for temperature in (1e-5, 1e-307, 5e-324):
        assert shares(temperature, 0, 1.0) == shares(temperature, 2, 0.5) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (0, 0.9), (0, 0.999), (7, 1.0), (9000, 0.5)])
def test_choices_are_those_of_the_sorted_distribution(top_k: int, top_p: float) -> None:
    """Flat rows, which need many candidates, beside sharp ones; no row minds its neighbours."""
    rows, size, temperature = 64, 5000, 0.7
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(0.1, 6, rows).unsqueeze(1)
    logits = torch.randn(rows, size, generator=generator) * sharpness
    draws = torch.rand(rows, generator=generator, dtype=torch.float64)
    chosen = choose_tokens(logits, draws, temperature, top_k, top_p)
    for row, draw, token in zip(logits, draws, chosen.tolist()):
        single = choose_tokens(row[None], draw[None], temperature, top_k, top_p)
        assert single.tolist() == [token]
        weights = (row.double() / temperature).exp()
        order = list(range(size))
        order.sort(key=lambda index: -float(row[index]))
        order = order[: top_k or size]
        total, kept = float(weights[order].sum()), []
        for index in order:
            if kept and sum(kept) >= top_p * total:
                break
            kept.append(float(weights[index]))
        target, place = float(draw) * sum(kept), 0
        while (target := target - kept[place]) >= 0:
            place += 1
        assert order[place] == token


def test_row_generators_differ() -> None:
    keys = [(0, [7], 0), (0, [7], 1), (1, [7], 0), (0, [8], 0)]
    draws = {torch.rand((), generator=row_generator(*key)).item() for key in keys}
    assert len(draws) == 4
