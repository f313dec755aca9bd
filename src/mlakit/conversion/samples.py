"""Text that the source itself writes, to calibrate with where there is no other.

Samples are drawn at temperature one from the first token on. A model without a chat template begins
as its training texts did, with bos (or what ended the text before), and begins a new text when one
ends. A model with a template is given the header of a user's turn and writes the user, then the
assistant (Xu et al. 2024, "Magpie", arXiv 2406.08464).

Sampling needs the whole model at once, unlike the conversion.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlakit.account import cache_bytes
from mlakit.checkpoint import Checkpoint, write_json_atomic
from mlakit.conversion.domains import rows_together, sampling_bytes
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.hf import attention_specs, load, new_cache
from mlakit.spec import ModelSpec

MARK = "\x00message\x00"


@dataclass(frozen=True)
class Script:
    """What stands between the tokens that the model chooses.

    Attributes:
        opening: what a sample begins with, and every further text in it.
        answer: what follows the end of a user's turn; empty where the model writes turns itself.
        ends: tokens that end a turn or a text.
        dropped: tokens of the opening that are no part of the sample.
    """

    opening: list[int]
    answer: list[int]
    ends: frozenset[int]
    dropped: int = 0


def read_script(model: Any, tokenizer: Any) -> Script:
    """How samples of a model begin and go on.

    Raises:
        UsageError: its tokenizer has no token to begin with.
    """
    given = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *([given] if isinstance(given, int) else given or [])}
    ends.discard(None)
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": MARK}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, found, after = text.partition(MARK)
        opening, answer = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)
        )
        if found and opening:
            turns = bool(answer) and answer[0] in ends
            return Script(opening, answer if turns else [], frozenset(ends))
    if tokenizer.bos_token_id is not None:
        return Script([tokenizer.bos_token_id], [], frozenset(ends))
    if ends:
        between = min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return Script([between], [], frozenset(ends), dropped=1)
    raise UsageError(
        "self: the tokenizer has neither bos nor eos, so there is nothing to begin a sample with",
        remedy="give a text instead",
    )


@torch.inference_mode()
def draw_samples(
    model: Any,
    script: Script,
    count: int,
    length: int,
    seed: int,
    on_sample: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Samples ``[count, length]`` of token ids; the same seed on the same machine gives the same.

    Args:
        model: the source, whole.
        script: how they begin.
        count: samples.
        length: tokens of each.
        seed: of the draws.
        on_sample: told how many are done.
    """
    width = length + script.dropped
    generator = torch.Generator().manual_seed(seed)
    together = rows_together(cache_bytes(attention_specs(model), 1, width, model.dtype.itemsize))
    found: list[torch.Tensor] = []
    for start in range(0, count, together):
        rows = min(together, count - start)
        found.append(_draw(model, script, rows, width, generator)[:, script.dropped :])
        on_sample(start + rows)
    return torch.cat(found)


def _draw(
    model: Any, script: Script, rows: int, width: int, generator: torch.Generator
) -> torch.Tensor:
    opening = script.opening[:width]
    written = [list(opening) for _ in range(rows)]
    waiting: list[list[int]] = [[] for _ in range(rows)]
    answering = [not script.answer] * rows
    cache = new_cache(model, rows, width)
    tokens = torch.tensor(written, device=model.device)
    for seen in range(len(opening), width):
        output = model(
            input_ids=tokens,
            attention_mask=torch.ones(rows, seen, dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chances = output.logits[:, -1].double().softmax(-1).cpu()
        if not bool(chances.isfinite().all()):
            raise MlakitError(
                "self: the model computes probabilities that are not finite",
                remedy="check that the source itself works: mlakit generate",
            )
        drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
        for row, token in enumerate(drawn):
            if not waiting[row] and token in script.ends:
                again = [token] * (token != script.opening[0]) + script.opening
                waiting[row] = again if answering[row] else [*script.answer]
                answering[row] = not script.answer or not answering[row]
            written[row].append(waiting[row].pop(0) if waiting[row] else token)
        tokens = torch.tensor([[row[-1]] for row in written], device=model.device)
    return torch.tensor(written)


def require_memory(checkpoint: Checkpoint, model: ModelSpec, length: int, device: str) -> None:
    """Refuses, before anything is loaded, a model that does not fit into memory whole.

    Raises:
        MlakitError: how much it needs and how much there is.
    """
    needed, free = sampling_bytes(checkpoint, model, length), free_memory(device)
    if free is not None and needed > free:
        raise MlakitError(
            f"self: to write samples the whole model has to be in memory: about"
            f" {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free",
            remedy="calibrate on a text (--calib FILE), which needs one layer at a time, or write"
            " samples elsewhere (mlakit generate) and give the file",
        )


def free_memory(device: str) -> int | None:
    """Bytes that can still be had on a device; None where the system does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = {name: value.split()[0] for name, _, value in (x.partition(":") for x in lines)}
    return int(kilobytes["MemAvailable"]) * 1024 if "MemAvailable" in kilobytes else None


def stored_samples(
    path: Path,
    checkpoint: Checkpoint,
    tokenizer: Any,
    shape: tuple[int, int],
    seed: int,
    device: str,
    on_sample: Callable[[int], None],
) -> torch.Tensor:
    """The samples ``shape`` = ``[count, length]`` of a file, drawn first if it is not there."""
    if not path.exists():
        model = load(checkpoint.download(), device=device)
        script = read_script(model, tokenizer)
        samples = draw_samples(model, script, *shape, seed, on_sample)
        write_json_atomic(path, samples.tolist())
    return torch.tensor(json.loads(path.read_text(encoding="utf-8")))
