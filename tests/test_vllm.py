"""Converted models in a real vLLM: its greedy tokens are ours.

Needs the path of a Python that has vLLM in MLAKIT_VLLM_PYTHON (``make test-vllm`` builds one with
the CPU wheel). vLLM's CPU kernel takes rows of 512 + 64 only, so small models are filled up.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from mlakit.conversion.apply import convert
from mlakit.engines.export import export
from mlakit.evaluation.subject import open_tokenizer
from mlakit.generation.generate import generate, prompt_ids
from mlakit.nn.hf import load
from tiny_models import TEXT, save_tiny

pytestmark = pytest.mark.slow

RUNNER = Path(__file__).with_name("vllm_runner.py")
COUNT = 24
FAST = {"refine_steps": 0, "calibration_tokens": 1024}
STORIES = ("Once upon a time", "Lily and Tom went to the park. They", "The dog", "One day, a girl")
LETTERS = ("abc", "Hello, World.", "the quick brown", "z")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model in vLLM.

    Attributes:
        options: of the conversion.
        source: keyword arguments of ``save_tiny``; None for the real small checkpoint.
        to: what it is exported to; None for the converted folder itself, through the plugin.
        parallel: also on two processes.
    """

    options: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] | None = None
    to: str | None = None
    parallel: bool = False


CASES = {
    "stock, stories": Case({"engine": "sglang"}, to="vllm", parallel=True),
    "stock, llama": Case({"engine": "sglang"}, {"num_key_value_heads": 1}, to="vllm"),
    "own code, stories": Case(to="vllm-transformers", parallel=True),
    "own code, llama with biases and llama3 rope": Case(
        {}, {"attention_bias": True, "rope_parameters": LLAMA3}, to="vllm-transformers"
    ),
    "own code, qwen2": Case(
        {"ranks": "measured"}, {"family": "qwen2"}, to="vllm-transformers", parallel=True
    ),
    "own code, gemma": Case({}, {"family": "gemma"}, to="vllm-transformers"),
    "own code, granite": Case(
        {}, {"family": "granite", "attention_multiplier": 0.4, "logits_scaling": 2.0},
        to="vllm-transformers",
    ),
    "plugin, stories": Case(parallel=True),
    "plugin, llama with biases and llama3 rope, tied": Case(
        {"ranks": "measured"},
        {"attention_bias": True, "rope_parameters": LLAMA3, "tie_word_embeddings": True,
         "mlp_bias": True},
    ),
    "plugin, mistral": Case({}, {"family": "mistral", "sliding_window": None}),
    "plugin, qwen2": Case({}, {"family": "qwen2"}),
    "plugin, qwen3": Case({}, {"family": "qwen3"}, parallel=True),
    "plugin, phi3": Case({}, {"family": "phi3", "sliding_window": None, "pad_token_id": 0},
                         parallel=True),
    "plugin, smollm3": Case({}, {"family": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0}),
}  # fmt: skip
REFUSED = {
    "gemma": ({"family": "gemma"}, {}, "decoder layers are not those of gemma"),
    "windows": ({"family": "mistral", "sliding_window": 8}, {}, "no sliding windows"),
    "equal-cache": ({}, {"equal_cache": True}, "no class for the form equal-cache"),
    "wide": ({"head_dim": 80}, {"qk_rope_head_dim": 80}, "not .* and \\(80, 80, 80\\)"),
    "newer": ({}, {}, "format version 2, this mlakit reads 1"),
}
"""Models that the plugin refuses: source, conversion, and the words."""


@pytest.fixture(scope="module")
def python() -> str:
    """The Python that has vLLM."""
    path = os.environ.get("MLAKIT_VLLM_PYTHON")
    if not path:
        pytest.skip("MLAKIT_VLLM_PYTHON names no Python that has vLLM; `make test-vllm` makes one")
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> dict[str, tuple[Path, Path]]:
    """Of each case the converted folder and the one that vLLM loads."""
    root = tmp_path_factory.mktemp("models")
    letters = root / "letters.txt"
    letters.write_text(TEXT)
    stories = shared / "data" / "tinystories" / "valid.txt"
    made: dict[str, tuple[Path, Path]] = {}
    for number, (name, case) in enumerate(CASES.items()):
        source, text = shared / "models" / "stories260k", stories
        if case.source is not None:
            source, text = save_tiny(root / f"{number}-source", **case.source), letters
        converted = root / f"{number}-converted"
        convert(source, converted, calibration=text, **{"cache_ratio": 0.75} | FAST | case.options)
        target = converted
        if case.to is not None:
            target = root / f"{number}-exported"
            export(converted, target, to=case.to, width=576, text=text)
        made[name] = (converted, target)
    return made


@pytest.fixture(scope="module")
def refused(
    folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Converted folders that the plugin cannot run."""
    root = tmp_path_factory.mktemp("refused")
    (root / "text.txt").write_text(TEXT)
    made = {}
    for name, (source, options, _) in REFUSED.items():
        goal = options if "equal_cache" in options else {"cache_ratio": 0.75} | FAST | options
        calibration = {} if "equal_cache" in options else {"calibration": root / "text.txt"}
        made[name] = root / name
        convert(save_tiny(root / f"{name}-source", **source), made[name], **calibration, **goal)
    path = made["newer"] / "config.json"
    config = json.loads(path.read_text())
    config["mlakit"]["format_version"] = 2
    path.write_text(json.dumps(config))
    return made


Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def run(
    python: str, folders: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Runs cases in one process of vLLM."""

    def runs(
        names: list[str],
        *,
        plugins: str | None,
        processes: int = 1,
        also: Mapping[str, Path] = MappingProxyType({}),
    ) -> dict[str, dict[str, Any]]:
        place = tmp_path_factory.mktemp("vllm")
        jobs = {}
        for name in (*names, *also):
            trust = name in CASES and CASES[name].to == "vllm-transformers"
            folder = also[name] if name in also else folders[name][1]
            prompts: Any = [[2, 3]]
            if name not in also:
                texts, ids = asked(name, folders)
                prompts = texts if texts is STORIES else ids  # vLLM's own tokenizer, once
            llm = {"model": str(folder), "dtype": "float32", "max_model_len": 64,
                   "trust_remote_code": trust, "tensor_parallel_size": processes}  # fmt: skip
            jobs[name] = {"llm": llm, "prompts": prompts, "count": COUNT}
        (place / "jobs.json").write_text(json.dumps(jobs))
        binding = "|".join(map(str, range(processes)))
        environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes > 1)), "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": binding,
        }  # fmt: skip
        environment.pop("PYTHONPATH", None)
        environment.pop("VLLM_PLUGINS", None)
        if plugins is not None:
            environment["VLLM_PLUGINS"] = plugins
        command = [python, str(RUNNER), str(place / "jobs.json"), str(place / "results.json")]
        done = subprocess.run(
            command, env=environment, cwd=place, capture_output=True, text=True, timeout=1500
        )
        assert (place / "results.json").exists(), done.stderr[-4000:]
        (place / "log.txt").write_text(done.stdout + done.stderr)
        found: dict[str, dict[str, Any]] = json.loads((place / "results.json").read_text())
        return {name: one | {"log": done.stdout + done.stderr} for name, one in found.items()}

    return runs


def asked(
    name: str, folders: dict[str, tuple[Path, Path]]
) -> tuple[tuple[str, ...], list[list[int]]]:
    """The prompts of a case and their ids."""
    prompts = STORIES if CASES[name].source is None else LETTERS
    tokenizer = open_tokenizer(folders[name][0])
    return prompts, [prompt_ids(tokenizer, prompt, False) for prompt in prompts]


def require_ours(name: str, folders: dict[str, tuple[Path, Path]], found: dict[str, Any]) -> None:
    """vLLM's tokens and their log probabilities are those of ``mlakit.generate`` in float32."""
    assert "error" not in found, found["error"] + found["log"][-3000:]
    folder, (prompts, ids) = folders[name][0], asked(name, folders)
    model, tokenizer = load(folder, dtype="float32"), open_tokenizer(folder)
    written = generate(model, tokenizer, prompts, max_new_tokens=COUNT, batch_size=1)
    if prompts is STORIES:
        assert found["texts"] == written.texts
    for prompt, own, theirs, logprobs in zip(
        ids, written.token_ids, found["tokens"], found["logprobs"]
    ):
        assert theirs[: len(own)] == own
        whole = torch.tensor([prompt + theirs])
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, whole[0, len(prompt) :, None])[:, 0]
        # float32, products in another order; 2e-5 was seen
        assert (expected - torch.tensor(logprobs)).abs().max() < 2e-4


def names(plugin: bool, parallel: bool = False) -> list[str]:
    return [
        name for name, case in CASES.items()
        if (case.to is None) == plugin and (case.parallel or not parallel)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def exported(run: Run) -> dict[str, dict[str, Any]]:
    return run(names(plugin=False), plugins="")


@pytest.mark.parametrize("name", names(plugin=False))
def test_an_export_in_vllm(
    name: str,
    exported: dict[str, dict[str, Any]],
    folders: dict[str, tuple[Path, Path]],
) -> None:
    require_ours(name, folders, exported[name])
    assert "Fused: self_attn (LatentAttention) -> MLAAttention" in exported[name]["log"]
    assert "Falling back to full attention" not in exported[name]["log"]


@pytest.fixture(scope="module")
def exported_parallel(run: Run) -> dict[str, dict[str, Any]]:
    return run(names(plugin=False, parallel=True), plugins="", processes=2)


@pytest.mark.parametrize("name", names(plugin=False, parallel=True))
def test_an_export_on_two_processes(
    name: str,
    exported_parallel: dict[str, dict[str, Any]],
    folders: dict[str, tuple[Path, Path]],
) -> None:
    require_ours(name, folders, exported_parallel[name])


AGAIN = ("own code, stories", "own code, gemma")
"""Folders with code beside the plugin, whose class goes before the code where it has the family."""


@pytest.fixture(scope="module")
def plugged(run: Run, refused: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return run([*names(plugin=True), *AGAIN], plugins=None, also=refused)


@pytest.mark.parametrize("name", [*names(plugin=True), *AGAIN])
def test_a_converted_folder_through_the_plugin(
    name: str, plugged: dict[str, dict[str, Any]], folders: dict[str, tuple[Path, Path]]
) -> None:
    require_ours(name, folders, plugged[name])
    assert plugged[name]["log"].count("Using Transformers modeling backend") == 1  # gemma's
    assert "filled up with zeros, and the zeros are cached" in plugged[name]["log"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_plugin_cannot_run_it_refuses_by_name(
    name: str, plugged: dict[str, dict[str, Any]]
) -> None:
    assert re.search(REFUSED[name][2], plugged[name]["error"])


@pytest.fixture(scope="module")
def plugged_parallel(run: Run) -> dict[str, dict[str, Any]]:
    return run(names(plugin=True, parallel=True), plugins=None, processes=2)


@pytest.mark.parametrize("name", names(plugin=True, parallel=True))
def test_the_plugin_on_two_processes(
    name: str, plugged_parallel: dict[str, dict[str, Any]], folders: dict[str, tuple[Path, Path]]
) -> None:
    require_ours(name, folders, plugged_parallel[name])
