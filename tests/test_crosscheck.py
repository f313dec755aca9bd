"""Rows of ``compare`` against kvpress and optimum-quanto, in an environment of their own.

Needs the path of a Python that has both in MLAKIT_CROSSCHECK_PYTHON; ``make test-crosscheck``
builds one. kvpress wants an older transformers than this package.
"""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlakit.baselines.bits import IntegerLayer
from mlakit.baselines.prefix import Prefix, read_prefix
from mlakit.baselines.tokens import RULES, attention_scores, choose, evict, pooled, slide
from mlakit.nn.hf import load
from tiny_models import save_tiny

RUNNER = Path(__file__).with_name("crosscheck_runner.py")
LENGTH = 640

CLOSE = 1e-6
"""float32 in another order, scores of attention below 1: measured 7.5e-8 at most, integers 0."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (LENGTH,), generator=generator)
    save_file({"ids": ids, "x": exact_numbers(generator)}, path / "inputs.safetensors")
    return path


def exact_numbers(generator: torch.Generator) -> Tensor:
    """``[1, 2, 64, 64]`` that both libraries round to the same codes.

    Every token, and every channel in every group of 32 tokens, runs from -8 to 7 and else keeps
    away from the middle between two codes of 4 bits, so steps are exact in float16. It does so by
    whole numbers plus a tenth in a pattern in which each row and column has both ends.
    """
    x = torch.randint(-7, 7, (1, 2, 64, 64), generator=generator).float() + 0.1
    token = torch.arange(64)
    x[:, :, token, token] = -8.0
    x[:, :, token, (token + 1) % 64] = 7.0
    x[:, :, token, (token + 32) % 64] = -8.0
    x[:, :, token, (token + 33) % 64] = 7.0
    return x


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    python = os.environ.get("MLAKIT_CROSSCHECK_PYTHON")
    if not python:
        pytest.skip(
            "MLAKIT_CROSSCHECK_PYTHON names no Python that has kvpress and optimum-quanto; "
            "`make test-crosscheck` makes one"
        )
    out = tmp_path_factory.mktemp("theirs") / "found.safetensors"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, str(RUNNER), str(folder), str(out)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def prefix(folder: Path) -> Prefix:
    ids = load_file(folder / "inputs.safetensors")["ids"]
    return read_prefix(load(folder), ids, max_length=LENGTH, queries=True)


def scores(prefix: Prefix, name: str, layer: int) -> Tensor:
    keys = prefix.layers[layer][0]
    weights = RULES[name].weights(LENGTH)
    return attention_scores(prefix.queries[layer], keys, weights, prefix.scale)


@pytest.mark.parametrize("layer", [0, 1])
def test_snapkv_scores_are_those_of_kvpress(
    layer: int, prefix: Prefix, theirs: dict[str, Tensor]
) -> None:
    """Its are means over 32 queries and the two heads of a group, ours are sums."""
    ours = pooled(scores(prefix, "snapkv", layer)[:, :-32], RULES["snapkv"].pool) / (32 * 2)
    torch.testing.assert_close(ours, theirs[f"snapkv.{layer}.scores"][:, :-32], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_tova_scores_are_those_of_kvpress(
    layer: int, prefix: Prefix, theirs: dict[str, Tensor]
) -> None:
    ours = scores(prefix, "tova", layer).sum(0)[:-1] / 4
    torch.testing.assert_close(ours, theirs[f"tova.{layer}.scores"][0, :-1], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_accumulated_attention_is_that_of_kvpress(
    layer: int, prefix: Prefix, theirs: dict[str, Tensor]
) -> None:
    """Its are over the queries that could see a token; H2O's are not."""
    ours = scores(prefix, "h2o", layer) / 2 / torch.arange(LENGTH, 0, -1)
    torch.testing.assert_close(ours, theirs[f"h2o.{layer}.scores"], atol=CLOSE, rtol=0)


@pytest.mark.parametrize("name", ["snapkv", "tova", "window"])
def test_what_is_kept_is_what_kvpress_keeps(
    name: str, prefix: Prefix, theirs: dict[str, Tensor]
) -> None:
    make: Any = partial(slide, 0.5) if name == "window" else partial(evict, RULES[name], 0.5)
    for layer, own in enumerate(make(prefix).layers):
        kept = theirs[f"{name}.{layer}.keys"]
        assert own.keys[0].shape == kept.shape
        for ours, other in zip(own.keys[0], kept, strict=True):
            apart = torch.cdist(ours.double(), other.double()).amin(1)
            # the same keys of two versions of transformers
            assert float(apart.max()) < 1e-4


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("by_channel", [False, True])
def test_integers_are_those_of_quanto(
    bits: int, by_channel: bool, folder: Path, theirs: dict[str, Tensor]
) -> None:
    x = load_file(folder / "inputs.safetensors")["x"]
    layer = IntegerLayer(x, x, bits=bits, by_channel=by_channel, residual=0)
    name = "channel" if by_channel else "token"
    torch.testing.assert_close(layer.unpack()[0], theirs[f"{name}.{bits}"], atol=CLOSE, rtol=0)


def test_heads_choose_by_the_pooled_votes(prefix: Prefix) -> None:
    rule, votes = RULES["snapkv"], scores(prefix, "snapkv", 0)
    best = pooled(votes[:, :-32], rule.pool).topk(320 - 32).indices.sort(-1).values
    assert torch.equal(choose(votes, rule, 320)[:, : 320 - 32], best)
