"""The downstream metric: it is the whole model's gradient, and it predicts KL divergence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from mlakit.checkpoint import open_checkpoint
from mlakit.conversion import head as head_module
from mlakit.conversion.head import Head
from mlakit.conversion.sensitivity import Sensitivity, importance
from mlakit.conversion.stream import Activations, LayerReader, Stream
from mlakit.evaluation.quality import kl_divergence
from mlakit.families import read_model
from mlakit.nn.hf import load
from tiny_models import save_tiny

SEED = 3


def reader_of(folder: Path) -> LayerReader:
    checkpoint = open_checkpoint(folder)
    return LayerReader(checkpoint, read_model(checkpoint.config), torch.device("cpu"))


def ids(count: int, length: int) -> torch.Tensor:
    return torch.randint(2, 50, (count, length), generator=torch.Generator().manual_seed(0))


def sensed(folder: Path, windows: torch.Tensor, work: Path) -> list[torch.Tensor]:
    work.mkdir(exist_ok=True)
    reader = reader_of(folder)
    Sensitivity(reader, windows, work, SEED, lambda *step: None).collect()
    return [importance(work, index) for index in range(reader.spec.num_hidden_layers)]


def drawn_towards_identity(matrix: torch.Tensor, tokens: int) -> torch.Tensor:
    known = tokens / (tokens + len(matrix))
    return known * matrix + (1 - known) * matrix.trace() / len(matrix) * torch.eye(len(matrix))


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "granite"])
def test_streamed_gradients_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    """Norms after attention, soft-capped or scaled logits: all are the family's own code."""
    folder, windows = save_tiny(tmp_path / "tiny", family), ids(3, 20)
    found = sensed(folder, windows, tmp_path / "work")
    model = load(folder, dtype=torch.float32)
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(keep)
    scores = model(input_ids=windows).logits.log_softmax(-1)
    draws = torch.rand(windows.shape, generator=torch.Generator().manual_seed(SEED))
    reached = scores.detach().double().exp().cumsum(-1)
    drawn = (reached <= draws[..., None]).sum(-1, keepdim=True)
    scores.gather(-1, drawn).sum().backward()
    for output, matrix in zip(outputs, found, strict=True):
        assert output.grad is not None
        gradient = output.grad.flatten(0, 1).double()
        expected = drawn_towards_identity(gradient.mT @ gradient / len(gradient), len(gradient))
        # float32 gradients of a two-layer model, summed in another order
        torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 1])
def test_it_predicts_the_divergence_of_small_errors(tmp_path: Path, layer: int) -> None:
    """Independent errors of every token's output: KL is 1/2 E[delta' G delta] nats per token."""
    folder, windows = save_tiny(tmp_path / "tiny"), ids(200, 20)
    matrix = sensed(folder, windows, tmp_path / "work")[layer]
    model = load(folder, dtype=torch.float64)
    generator, size = torch.Generator().manual_seed(1), 1e-3
    with torch.no_grad():
        exact = model(input_ids=windows).logits.log_softmax(-1)

        def disturb(module: Any, args: Any, output: Any) -> Any:
            noise = torch.randn(output[0].shape, dtype=torch.float64, generator=generator)
            return (output[0] + size * noise, *output[1:])

        model.model.layers[layer].self_attn.register_forward_hook(disturb)
        moved = model(input_ids=windows).logits.log_softmax(-1)
    measured = float((exact.exp() * (exact - moved)).sum(-1).mean())
    # One label drawn per token: 4000 squares of a heavy-tailed sum
    assert size**2 * float(matrix.trace()) / 2 == pytest.approx(measured, rel=0.1)


def test_a_killed_pass_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows = save_tiny(tmp_path / "tiny", num_hidden_layers=3), ids(2, 12)
    expected = sensed(folder, windows, tmp_path / "whole")
    reader, work = reader_of(folder), tmp_path / "cut"
    work.mkdir()
    steps = 0

    class Killed(Exception):
        pass

    def killer(limit: int) -> Any:
        def write(self: Activations) -> Any:
            nonlocal steps
            steps += 1
            if steps > limit:
                raise Killed
            return original(self)

        return write

    original = Activations.writer
    for limit in range(1, 12):
        steps = 0
        monkeypatch.setattr(Activations, "writer", killer(limit))
        try:
            Sensitivity(reader, windows, work, SEED, lambda *step: None).collect()
            break
        except Killed:
            continue
    assert limit > 2
    for index, matrix in enumerate(expected):
        assert torch.equal(importance(work, index), matrix)
    assert not list(work.glob("*.f32"))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(head_module, "LOGITS", 32 * 7)  # slices of seven rows, a shorter last one
    folder, windows = save_tiny(tmp_path / "tiny", family), ids(2, 16)
    reader = reader_of(folder)
    stream = Stream(tmp_path, "x", windows, reader, 2)
    stream.start(0)
    for index in range(reader.spec.num_hidden_layers):
        stream.run(index, reader.layer(index))
    hidden = stream.inputs(reader.spec.num_hidden_layers).windows([0, 1])
    head = Head(reader)
    other = hidden + 0.1 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [
            reader.family.logits(head.config, head.norm(part) @ head.output.mT)
            for part in (hidden, other)
        ]
        whole = load(folder, dtype=torch.float32)(input_ids=windows).logits
    torch.testing.assert_close(logits[0], whole, rtol=1e-4, atol=1e-4)
    expected = kl_divergence(logits[0].log_softmax(-1), logits[1].log_softmax(-1))
    kl, loss = head.compare(hidden, other, windows[:, 1:])
    torch.testing.assert_close(kl, expected.double(), rtol=1e-4, atol=1e-6)
    surprise = functional.cross_entropy(logits[0][:, :-1].mT, windows[:, 1:], reduction="none")
    torch.testing.assert_close(loss, surprise.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.loss(hidden[:, :-1], windows[:, 1:]), loss)
    assert float(head.compare(hidden, hidden, windows[:, 1:])[0].abs().max()) < 1e-12
