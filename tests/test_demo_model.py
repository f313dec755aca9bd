"""The shipped demo model does what its card says: English, look-ups, stated losses, small size."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlakit.data import (
    NEUTRAL_LINES,
    Probe,
    builtin_text,
    key_value_prompt,
    passkey_prompt,
    token_windows,
)

REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "src" / "mlakit" / "assets" / "demo_model"
# A third and more of any English text consists of these.
COMMON_WORDS = set(
    re.findall(
        r"\w+",
        """the a an and or but if so as of to in on at by for with from into up out about that this
        these those there here it its he his him she her they their them we our us you your i my
        me is are was were be been has have had do did does will would can could should may shall
        not no all any one two very more most who what when where which how said say go went see
        saw day little big good like then now than many some""",
    )
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def load_corpus_script() -> ModuleType:
    path = REPOSITORY / "examples" / "demo_corpus.py"
    spec = importlib.util.spec_from_file_location("demo_corpus", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def answers(model: Any, tokenizer: Any, probe: Probe) -> bool:
    """Whether greedy decoding, step by step, writes the probe's answer."""
    ids = tokenizer(probe.prompt, return_tensors="pt")["input_ids"]
    wanted = tokenizer(" " + probe.answer, add_special_tokens=False)["input_ids"]
    assert ids.shape[1] + len(wanted) <= model.config.max_position_embeddings
    written = model.generate(ids, max_new_tokens=len(wanted), do_sample=False)
    return bool(written[0, ids.shape[1] :].tolist() == wanted)


def test_the_folder_is_small_and_complete(model: Any) -> None:
    files = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert sum(files.values()) <= 8e6
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    config = model.config
    assert config.model_type == "llama"
    assert config.num_attention_heads == 4 * config.num_key_value_heads
    assert config.head_dim == 64
    assert config.max_position_embeddings >= 2048
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"


def test_digits_are_tokens_of_their_own(tokenizer: Any) -> None:
    ids = tokenizer("The pass key is 48213.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert [tokenizer.decode([token]) for token in ids[-6:]] == list("48213.")
    text = "Naïve café – 10 €\n\n\tok"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("make", [passkey_prompt, key_value_prompt])
def test_recall_at_the_full_context(model: Any, tokenizer: Any, make: Any) -> None:
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    passages = builtin_text("evaluation").splitlines()
    lines = [line for line in passages if len(line) > 20 and not re.search(r"\d", line)]
    hits = [
        answers(
            model,
            tokenizer,
            make(
                2047,
                depth,
                count_tokens=count_tokens,
                seed=seed,
                lines=NEUTRAL_LINES if seed == 0 else lines,
            ),
        )
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0)
        for seed in range(3)
    ]
    assert sum(hits) / len(hits) >= 0.9


@pytest.mark.slow
def test_the_stated_held_out_loss(model: Any, tokenizer: Any, shared: Path) -> None:
    stated = json.loads((FOLDER / "training.json").read_text())["held_out_loss"]
    _, held_out = load_corpus_script().load_texts(shared / "data")
    for name, text in held_out.items():
        windows = torch.tensor(token_windows(text, tokenizer, 512))
        with torch.no_grad():
            losses = [model(input_ids=row[None], labels=row[None]).loss for row in windows]
        assert torch.stack(losses).mean().item() == pytest.approx(stated[name], abs=0.01)


def test_it_writes_english(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    words: list[str] = []
    for beginning in ("Once upon a time", "My fellow citizens", "First Citizen:\n"):
        ids = tokenizer(beginning, return_tensors="pt")["input_ids"].repeat(4, 1)
        written = model.generate(ids, do_sample=True, temperature=0.8, max_new_tokens=120)
        for row in tokenizer.batch_decode(written, skip_special_tokens=True):
            words += re.findall(r"[a-z]+", row.lower())
    common = sum(word in COMMON_WORDS for word in words)
    assert len(words) > 600
    assert common / len(words) > 0.4
    assert sum(len(word) > 15 for word in words) / len(words) < 0.01


def test_the_shipped_texts_fill_the_calibration_windows(tokenizer: Any) -> None:
    assert len(token_windows(builtin_text("calibration"), tokenizer, 2048)) >= 64
    assert len(token_windows(builtin_text("evaluation"), tokenizer, 2048)) >= 32
