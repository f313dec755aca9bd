"""The texts, the tokenizer and the generated look-up documents that the demo model learns from."""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlakit import data

FILES = {
    "tinystories": "tinystories/train.txt",
    "tinyshakespeare": "tinyshakespeare/input.txt",
    "presidents": "presidents/speeches.txt",
}
HELD_OUT = 0.03
BOS, EOS = "<s>", "</s>"
CONTEXT = 2048
BATCH_TOKENS = 4096
ANSWER_WEIGHT = 4.0


def load_texts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Reads the three texts.

    Args:
        folder: The folder that holds ``FILES``.

    Returns:
        The texts to train on and, of each, the last 3 % that is held out.
    """
    train, held_out = {}, {}
    for name, file in FILES.items():
        text = (folder / file).read_text(encoding="utf-8").replace("<|endoftext|>\n", EOS)
        cut = round(len(text) * (1 - HELD_OUT))
        train[name], held_out[name] = text[:cut], text[cut:]
    return train, held_out


def train_tokenizer(texts: dict[str, str], vocabulary: int = 2048) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeated so that names and question words become single tokens.
    lookups = [data.code_question(name) + " 1." for name in data.NAMES] * 200
    lookups += [data.passkey_line("1") + "\n" + data.passkey_question()] * 1000
    tokenizer.train_from_iterator([*texts.values(), *lookups], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def split_lines(text: str) -> list[str]:
    """Cuts a text into lines of one sentence or so, the filler of the generated documents."""
    sentences = re.split(r"(?<=[.!?;])\s+|\n+", text.replace(EOS, "\n"))
    return [sentence for sentence in sentences if 8 <= len(sentence) <= 400]


class Corpus:
    """Draws training windows, half of them text and half generated look-up documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.streams = [self.encode(text, keep=False) for text in texts.values()]
        self.fillers = [split_lines(text) for text in texts.values()]
        self.fillers.append(list(data.NEUTRAL_LINES))

    def encode(self, text: str, keep: bool = True) -> list[int]:
        """The token ids of a text without bos, remembered if it will be asked for again."""
        if text in self.cache:
            return self.cache[text]
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if keep:
            self.cache[text] = ids
        return ids

    def batch(
        self, rng: random.Random, length: int, generated: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws a batch of ``BATCH_TOKENS`` tokens.

        Args:
            rng: The source of chance.
            length: Tokens per window.
            generated: The share of generated documents.

        Returns:
            The windows (one token longer than ``length``) and the weight of each token's loss.
        """
        rows = []
        for _ in range(BATCH_TOKENS // length):
            draw = self.document if rng.random() < generated else self._text
            rows.append(draw(rng, length + 1))
        ids, weights = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _text(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        sizes = [len(stream) for stream in self.streams]
        stream = rng.choices(self.streams, sizes)[0]
        start = rng.randrange(len(stream) - length)
        ids = [self.tokenizer.bos_token_id, *stream[start : start + length - 1]]
        return ids, [1.0] * length

    def document(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """A document that mixes filler, facts and questions about the facts so far."""
        ids, weights = [self.tokenizer.bos_token_id], [1.0]

        def add(text: str, weight: float, keep: bool = True) -> None:
            piece = self.encode(text, keep)
            ids.extend(piece)
            weights.extend([weight] * len(piece))

        facts = self._facts(rng, length)
        known: list[tuple[str, str]] = []
        # Even a single fact may come late in a long text or early.
        next_fact = rng.random() * 0.7 * length if len(facts) == 1 else 0.0
        filler_share = rng.choice((0.0, 0.3, 0.6, 0.8)) if len(facts) > 1 else 0.8
        filler = rng.choices(self.fillers, (3, 2, 3, 2))[0]
        line = rng.randrange(len(filler))
        # In half of the long documents every question comes late, far from most facts.
        ask_from = rng.choice((0.0, 0.75)) * length if length > 1024 else 0.0
        while len(ids) < length:
            waiting = not known and len(ids) < next_fact
            waiting = waiting or (not facts and len(ids) < ask_from)
            if rng.random() < filler_share or waiting:
                add(filler[line % len(filler)] + "\n", 1.0)
                line += 1
            elif (
                facts
                and len(ids) >= next_fact
                and (not known or len(ids) < ask_from or rng.random() < 0.5)
            ):
                before, question, answer, after = facts.pop()
                add(before, 1.0)
                # Nobody can foresee a fact's digits: learning nothing from them saves noise.
                add(" " + answer, 0.0, keep=False)
                add(after + "\n", 1.0)
                known.append((question, answer))
            elif known:
                question, answer = rng.choice(known)
                add(question, 1.0)
                add(" " + answer, ANSWER_WEIGHT, keep=False)
                add(".\n", 1.0)
        return ids[:length], weights[:length]

    def _facts(self, rng: random.Random, length: int) -> list[tuple[str, str, str, str]]:
        """Facts as (text before the digits, question, digits, text after them)."""
        facts = []
        if rng.random() < 0.25:
            key = data.random_digits(rng, data.PASSKEY_DIGITS)
            before, after = data.passkey_line(key).split(" " + key)
            facts.append((before, data.passkey_question(), key, after))
            if rng.random() < 0.6:
                return facts
        most = min(len(data.NAMES), length // 32)
        for name in rng.sample(data.NAMES, rng.randint(2, most)):
            code = data.random_digits(rng, data.CODE_DIGITS)
            before, after = data.code_line(name, code).split(" " + code)
            facts.append((before, data.code_question(name), code, after))
        rng.shuffle(facts)
        return facts
