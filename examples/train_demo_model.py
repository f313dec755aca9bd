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
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_corpus import (
    ANSWER_WEIGHT,
    BATCH_TOKENS,
    BOS,
    CONTEXT,
    EOS,
    Corpus,
    load_texts,
    split_lines,
    train_tokenizer,
)
from mlakit import data

LOSS_CONTEXT = 512
PEAK_RATE = 3e-3
# (share of the run at which the phase ends, window length)
PHASES = ((0.45, 256), (0.68, 512), (0.83, 1024), (1.0, CONTEXT))
SAMPLE_TOKENS = 400
BEGINNINGS = {
    "tinystories": ("Once upon a time", "One day,", "There was a little girl", "Tom and"),
    "tinyshakespeare": ("ROMEO:\n", "KING RICHARD III:\n", "First Citizen:\n", "CORIOLANUS:\n"),
    "presidents": ("My fellow citizens", "The Congress", "During the past year", "We must"),
}
CARD = (Path(__file__).parent / "demo_model_card.md").read_text(encoding="utf-8")
PROBE_LENGTHS = (256, 512, 1024, 2040)
PROBE_COUNT = 20
PROBE_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class Progress:
    """What a checkpoint remembers of the run besides the weights."""

    seed: int
    device: str
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)


@torch.no_grad()
def plant_look_back(model: LlamaForCausalLM) -> None:
    """Starts the first two layers near an induction circuit, which a short run would not find.

    The heads of the first layer look 1 to 6 tokens back: all embeddings share one large entry,
    and the query and key weights of that entry make the scores peak at the head's offset. The
    first head carries the token before. The second layer's first group compares that with the
    current token, in the slowly rotating dimensions, and copies the token it finds.
    """
    embedding = model.model.embed_tokens.weight
    for layer in model.model.layers:  # the planted weights must outweigh the random ones
        layer.self_attn.o_proj.weight *= 0.05
        layer.mlp.down_proj.weight *= 0.05
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    size = model.config.head_dim
    pairs = size // 2
    embedding[:, 0] = 0.5
    angles = 10000.0 ** (-torch.arange(pairs // 2) / pairs)
    first.k_proj.weight[:, 0] = 0.0
    for group in range(2):
        first.k_proj.weight[group * size : group * size + pairs // 2, 0] = 0.7
    for head in range(6):
        start = head * size
        first.q_proj.weight[start : start + size, 0] = 0.0
        turned = (head + 1) * angles
        first.q_proj.weight[start : start + pairs // 2, 0] = 0.7 * turned.cos()
        middle = start + pairs
        first.q_proj.weight[middle : middle + pairs // 2, 0] = -0.7 * turned.sin()
    content = first.v_proj.weight[:size]
    content[:, 0] = 0.0
    first.o_proj.weight[:, :size] = 0.3 * content.T
    slow = torch.cat([torch.arange(pairs // 2, pairs), torch.arange(pairs + pairs // 2, size)])
    match = torch.zeros_like(content)
    match[slow] = 2.0 * content[: len(slow)]
    second.k_proj.weight[:size] = match
    second.q_proj.weight[: 4 * size] = 0.3 * second.q_proj.weight[: 4 * size] + match.repeat(4, 1)
    copied = second.v_proj.weight[:size]
    second.o_proj.weight[:, : 4 * size] = 0.2 * copied.T.repeat(1, 4)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: four layers, eight query heads on two key-value heads."""
    model = LlamaForCausalLM(
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
            initializer_range=0.06,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    plant_look_back(model)
    return model


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
        if device == "cpu":  # plain attention is faster there while windows are short
            model.set_attn_implementation("eager" if length <= 512 else "sdpa")
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
    parts = windows.split(8)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in parts]
    return sum(losses) / len(windows)


@torch.no_grad()
def recalls(model: LlamaForCausalLM, tokenizer: Any, probe: data.Probe) -> bool:
    """Whether greedy decoding writes the probe's answer."""
    prompt = tokenizer(probe.prompt)["input_ids"]
    answer = tokenizer(" " + probe.answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer], device=model.device)
    # Greedy decoding gives the answer if and only if each of its tokens wins after the others.
    logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
    return logits.argmax(-1).tolist() == answer


def recall(
    model: LlamaForCausalLM, tokenizer: Any, length: int, depth: float, lines: list[str], count: int
) -> dict[str, float]:
    """The share of ``count`` probes of each kind that the model answers."""

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    shares = {}
    for kind, make in (("passkey", data.passkey_prompt), ("key_value", data.key_value_prompt)):
        probes = [
            make(length, depth, count_tokens=count_tokens, seed=seed, lines=lines)
            for seed in range(count)
        ]
        shares[kind] = sum(recalls(model, tokenizer, probe) for probe in probes) / count
    return shares


def measure(model: LlamaForCausalLM, tokenizer: Any, held_out: dict[str, str]) -> dict[str, Any]:
    """The losses of the held-out texts, and recall by length, depth and kind within them."""
    lines = [line for text in held_out.values() for line in split_lines(text)]
    return {
        "held_out_loss": {
            name: round(held_out_loss(model, tokenizer, text), 4) for name, text in held_out.items()
        },
        "recall": {
            length: {
                depth: recall(model, tokenizer, length, depth, lines, PROBE_COUNT)
                for depth in PROBE_DEPTHS
            }
            for length in PROBE_LENGTHS
        },
    }


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: dict[str, str],
    progress: Progress,
    folder: Path,
) -> None:
    """Writes the model in bfloat16, its tokenizer, its measured numbers and its card."""
    model.cpu().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Measured from the saved weights, so that the card speaks of what is shipped.
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    record = asdict(progress) | measure(saved, tokenizer, held_out)
    record["log"] = [e for e in progress.log if e["step"] % 200 == 0 or e is progress.log[-1]]
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    # The keys of the tables are strings from here on, as they are in the file.
    card = model_card(json.loads(json.dumps(record)), model)
    (folder / "README.md").write_text(card)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def model_card(record: dict[str, Any], model: LlamaForCausalLM) -> str:
    """The README.md of the model folder."""
    config = model.config
    recall_rows = [
        [length, kind, *(f"{shares[kind]:.2f}" for shares in depths.values())]
        for length, depths in record["recall"].items()
        for kind in ("passkey", "key_value")
    ]
    size = sum(parameter.numel() for parameter in model.parameters())
    loss_rows = [[name, f"{loss:.3f}"] for name, loss in record["held_out_loss"].items()]
    log_rows = [list(entry.values()) for entry in record["log"]]
    return CARD.format(
        size=f"{size / 1e6:.2f} M",
        config=config,
        seed=record["seed"],
        steps=record["step"],
        tokens=f"{record['tokens'] / 1e6:.1f} M",
        minutes=round(record["seconds"] / 60),
        device=record["device"],
        batch=BATCH_TOKENS,
        context=LOSS_CONTEXT,
        count=PROBE_COUNT,
        losses=table(["text", "loss (nats per token)"], loss_rows),
        recall=table(["tokens", "kind", *map(str, PROBE_DEPTHS)], recall_rows),
        log=table(["step", "window", "loss", "loss of the answers", "seconds"], log_rows),
    )


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Any, rows: int, seed: int) -> str:
    """Samples passages and look-up documents around them, shuffled and joined by blank lines.

    Args:
        model: The finished model.
        tokenizer: Its tokenizer.
        rows: Passages per beginning.
        seed: The seed of the sampling.

    Returns:
        The text.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model.generation_config.eos_token_id = None  # a story's end may be followed by a new one
    passages: dict[str, list[str]] = {}
    for style, beginnings in BEGINNINGS.items():
        prompts = tokenizer(
            list(beginnings) * rows, return_tensors="pt", padding=True, padding_side="left"
        ).to(model.device)
        written = model.generate(
            **prompts, do_sample=True, temperature=0.9, top_k=0, max_new_tokens=SAMPLE_TOKENS
        )
        texts = tokenizer.batch_decode(written)
        passages[style] = [text.replace(BOS, "").replace(EOS, "\n\n").strip() for text in texts]
    corpus = Corpus(tokenizer, {style: "\n".join(texts) for style, texts in passages.items()})
    parts = [text for texts in passages.values() for text in texts]
    for _ in range(len(parts) // 3):
        ids, _ = corpus.document(rng, SAMPLE_TOKENS)
        parts.append(tokenizer.decode(ids, skip_special_tokens=True))
    rng.shuffle(parts)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def write_samples(folder: Path, device: str) -> None:
    """Writes the calibration and the evaluation text next to the model's folder."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    target = folder.parent / "text"
    target.mkdir(parents=True, exist_ok=True)
    for seed, (name, rows) in enumerate({"calibration": 24, "evaluation": 12}.items(), start=1):
        text = sample(model, tokenizer, rows, seed)
        (target / f"{name}.txt").write_text(text, encoding="utf-8")


def main() -> None:
    """Trains or continues, then measures and saves; or samples the package's texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the three texts")
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=Path("demo_run"), help="checkpoint's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=70, help="how long to train")
    parser.add_argument("--steps", type=int, help="how many steps to train, instead of --minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sample", action="store_true", help="write the package's texts instead")
    options = parser.parse_args()
    if options.sample:
        return write_samples(options.output, options.device)
    if options.data is None:
        parser.error("training needs --data")
    torch.manual_seed(options.seed)

    def done(progress: Progress) -> float:
        if options.steps is not None:
            return progress.step / options.steps
        return progress.seconds / (60 * options.minutes)

    texts, held_out = load_texts(options.data)
    tokenizer = train_tokenizer(texts)
    progress = Progress(options.seed, options.device)
    model = build_model(tokenizer)
    options.work.mkdir(parents=True, exist_ok=True)
    train(model, Corpus(tokenizer, texts), progress, done, options.work, options.device)
    save(model, tokenizer, held_out, progress, options.output)


if __name__ == "__main__":
    main()
