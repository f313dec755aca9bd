"""Which implementation runs where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from decode_cases import problem
from mlakit.errors import UsageError
from mlakit.ops import choose as choose_module
from mlakit.ops.choose import choose


def asked(device, dtype):
    """As much of a call as the choice looks at; a GPU that is not here has no tensors."""
    return SimpleNamespace(q=SimpleNamespace(device=torch.device(device), dtype=dtype))


def test_choice_of_implementation(monkeypatch):
    """The first that can: the CPU's own, Hopper's, Triton's, plain torch."""
    answers = {"gluon": "", "triton": "", "flash_mla": "no such package"}
    monkeypatch.setattr(choose_module, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(choose_module, "find_spec", lambda name: name)
    monkeypatch.setattr(
        choose_module,
        "implementation",
        lambda name: SimpleNamespace(why_not=lambda call: answers[name]),
    )
    gpu, cpu = asked("cuda", torch.bfloat16), asked("cpu", torch.bfloat16)
    assert choose(cpu).name == "cpu"
    assert choose(asked("cpu", torch.float64)).name == "torch"
    assert choose(asked("cuda", torch.float64)).name == "torch"
    assert choose(asked("mps", torch.float16)).name == "torch"
    assert choose(gpu).name == "gluon"
    answers["gluon"] = "pages of 16"
    assert choose(gpu).name == "triton"
    with pytest.raises(UsageError, match="'gluon', which cannot run this call: pages of 16"):
        choose(gpu, "gluon")
    with pytest.raises(UsageError, match="no such package"):
        choose(gpu, "flash_mla")
    with pytest.raises(UsageError, match="tensors on the CPU"):
        choose(gpu, "cpu")
    with pytest.raises(UsageError, match="not on cpu"):
        choose(cpu, "triton")
    with pytest.raises(UsageError, match="no implementation"):
        choose(cpu, "magic")
    assert "MLAKIT_KERNEL" in choose(cpu, "reference").reason
    monkeypatch.setattr(choose_module, "find_spec", lambda name: None)
    choice = choose(gpu)
    assert choice.name == "torch" and "Triton is not installed" in choice.reason
    monkeypatch.setattr(choose_module, "find_spec", lambda name: name)
    monkeypatch.setattr(choose_module, "_capability", lambda device: (7, 5))
    assert "older than" in choose(gpu).reason


def test_override_reaches_the_operator(monkeypatch):
    case = problem([70, 5], 2, rank=16, rope=8)
    monkeypatch.setenv("MLAKIT_KERNEL", "reference")
    assert torch.equal(case.decode()[0], case.run("reference")[0].float())
