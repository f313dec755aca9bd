"""Trains the demo model that ships with mlakit: a small Llama with grouped-query attention.

It learns English from three small public texts and, from generated lines, to look up pass keys
and codes anywhere in its context. A run takes about an hour on two CPU cores, minutes on a GPU:

    python examples/train_demo_model.py --data DATA --output src/mlakit/assets/demo_model
    python examples/train_demo_model.py --output src/mlakit/assets/demo_model --sample

The first command continues from its last checkpoint when it is run again; the second writes the
package's calibration and evaluation text, sampled from the finished model.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mlakit import data

FILES = {
    "tinystories": "tinystories/train.txt",
    "tinyshakespeare": "tinyshakespeare/input.txt",
    "presidents": "presidents/speeches.txt",
}
HELD_OUT = 0.03
BOS, EOS = "<s>", "</s>"
CONTEXT = 2048
LOSS_CONTEXT = 512
ANSWER_WEIGHT = 4.0
BATCH_TOKENS = 8192
PEAK_RATE = 2e-3
# (share of the run at which the phase ends, window length)
PHASES = ((0.45, 256), (0.68, 512), (0.83, 1024), (1.0, CONTEXT))
PROBE_LENGTHS = (256, 512, 1024, 2040)
PROBE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Progress:
    """What a checkpoint remembers of the run besides the weights."""

    seed: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


def load_texts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Reads the three texts.

    Args:
        folder: The folder that holds ``FILES``.

    Returns:
        The texts to train on and, of each, the last 3 % that is held out.
    """
    train, held_out = {}, {}
    for name, file in FILES.items():
        text = data.read_text(folder / file).replace("<|endoftext|>\n", EOS)
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
            draw = self._document if rng.random() < generated else self._text
            rows.append(draw(rng, length + 1))
        ids, weights = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(weights)

    def _text(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        sizes = [len(stream) for stream in self.streams]
        stream = rng.choices(self.streams, sizes)[0]
        start = rng.randrange(len(stream) - length)
        ids = [self.tokenizer.bos_token_id, *stream[start : start + length - 1]]
        return ids, [1.0] * length

    def _document(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
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
        while len(ids) < length:
            if rng.random() < filler_share or (not known and len(ids) < next_fact):
                add(filler[line % len(filler)] + "\n", 1.0)
                line += 1
            elif facts and len(ids) >= next_fact and (not known or rng.random() < 0.5):
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


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: four layers, eight query heads on two key-value heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def learning_rate(done: float, step: int) -> float:
    """Warm-up, a plateau, and a linear fall over the last 40 % of the run."""
    return PEAK_RATE * min(1.0, (step + 1) / 100) * min(1.0, max(0.02, (1 - done) / 0.4))


def autocast(device: str) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device does them fast (on a CPU: with AVX512-BF16)."""
    fast = device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.autocast(device, torch.bfloat16) if fast else nullcontext()


def weighted_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over the weighted tokens, and the mean over the answers' tokens alone."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    answers = losses.detach()[flat == ANSWER_WEIGHT]
    return (losses * flat).sum() / flat.sum(), answers.mean() if len(answers) else torch.tensor(0.0)


def train(
    model: LlamaForCausalLM,
    corpus: Corpus,
    progress: Progress,
    done: Callable[[Progress], float],
    folder: Path,
    device: str,
) -> None:
    """Trains until ``done`` says 1, writing a checkpoint every hundred steps."""
    model.to(device).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        vars(progress).update(state["progress"])
    started = time.monotonic() - progress.seconds
    while (share := done(progress)) < 1:
        length = next(length for end, length in PHASES if share < end)
        rng = random.Random(f"{progress.seed} {progress.step}")
        ids, weights = corpus.batch(rng, length, generated=0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, progress.step)
        with autocast(device):
            loss, answer_loss = weighted_loss(model, ids.to(device), weights.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += BATCH_TOKENS
        progress.seconds = time.monotonic() - started
        if progress.step % 20 == 0:
            entry = {"step": progress.step, "length": length, "loss": round(loss.item(), 4)}
            entry |= {"answers": round(answer_loss.item(), 4), "seconds": int(progress.seconds)}
            progress.log.append(entry)
            print(entry, flush=True)
        if progress.step % 100 == 0 or done(progress) >= 1:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"progress": asdict(progress)}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokenizer: Any, text: str) -> float:
    """The mean loss per token, in nats, over whole windows of ``LOSS_CONTEXT`` tokens."""
    windows = torch.tensor(data.token_windows(text, tokenizer, LOSS_CONTEXT)).to(model.device)
    losses = [model(input_ids=part, labels=part).loss.float() * len(part) for part in windows.split(8)]
    return float(sum(losses) / len(windows))


@torch.no_grad()
def recalls(model: LlamaForCausalLM, tokenizer: Any, probe: data.Probe) -> bool:
    """Whether greedy decoding writes the probe's answer."""
    prompt = tokenizer(probe.prompt)["input_ids"]
    answer = tokenizer(" " + probe.answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer], device=model.device)
    # Greedy decoding gives the answer if and only if each of its tokens wins after the others.
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.argmax(-1).tolist() == answer


def probes(tokenizer: Any, length: int, lines: list[str], count: int) -> Iterator[data.Probe]:
    """Pass-key and key-value probes at all depths, ``count`` of each kind and depth."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for depth in PROBE_DEPTHS:
        for seed in range(count):
            for make in (data.passkey_prompt, data.key_value_prompt):
                yield make(length, depth, count_tokens=count_tokens, seed=seed, lines=lines)


def main() -> None:
    """Trains or continues, then measures and saves; or samples the package's texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the three texts")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("demo_run"), help="checkpoint's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="how long to train")
    parser.add_argument("--steps", type=int, help="how many steps to train, instead of --minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sample", action="store_true", help="write the package's texts instead")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    def done(progress: Progress) -> float:
        if options.steps is not None:
            return progress.step / options.steps
        return progress.seconds / (60 * options.minutes)

    texts, held_out = load_texts(options.data)
    tokenizer = train_tokenizer(texts)
    progress = Progress(seed=options.seed)
    model = build_model(tokenizer)
    options.work.mkdir(parents=True, exist_ok=True)
    train(model, Corpus(tokenizer, texts), progress, done, options.work, options.device)


if __name__ == "__main__":
    main()
