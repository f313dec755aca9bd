"""Layers with rotary frequencies of their own: angles, loading, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from mlakit.nn.hf import load, new_cache
from mlakit.nn.models import MLALlamaForCausalLM
from mlakit.nn.rotary import LatentRotaryEmbedding
from toy_models import converted_config

OWN = [[1.0, 0.5, 0.25], [0.9, 0.9, 0.0], [0.1, 0.01, 0.001]]


def own_config() -> object:
    values = converted_config("compress").to_dict()
    return type(converted_config("compress"))(**{**values, "rope_inv_freq": OWN})


def test_angles_of_each_layer() -> None:
    rotary = LatentRotaryEmbedding(own_config())
    positions = torch.tensor([[0, 1, 7], [3, 4, 5]])
    for frequencies, cos, sin in zip(OWN, *rotary(torch.zeros(1), positions), strict=True):
        angles = positions[..., None].double() * torch.tensor(frequencies).double().repeat(2)
        # float32 angles below 10 radians
        torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-6)


def test_the_schedule_as_own_frequencies_changes_nothing_and_is_loaded(tmp_path: Path) -> None:
    config = converted_config("compress")
    torch.manual_seed(0)
    plain = MLALlamaForCausalLM(config).eval()
    schedule = plain.model.rotary_emb.inv_freq.tolist()
    plain.save_pretrained(tmp_path)
    plain.config.rope_inv_freq = [schedule] * 3
    plain.config.save_pretrained(tmp_path)
    own = load(tmp_path)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        torch.testing.assert_close(own(input_ids=ids).logits, expected, rtol=0, atol=0)
        cache = new_cache(own, 1, 16)
        own(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
        rest = own(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits
    # float32 rounding of the absorbed form, logits of order one
    torch.testing.assert_close(rest, expected[:, 8:], rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrong", [OWN[:2], [[1.0]] * 3])
def test_wrong_counts_are_refused(wrong: list[list[float]]) -> None:
    config = converted_config("compress").to_dict()
    with pytest.raises((ValueError, StrictDataclassError), match="rope_inv_freq"):
        type(converted_config("compress"))(**{**config, "rope_inv_freq": wrong})
