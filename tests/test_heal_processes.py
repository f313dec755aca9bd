"""Several processes on CPUs, over gloo, give the losses of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from healing_cases import QUICK, log, make_pair, quick_heal, stored

pytest.importorskip("accelerate", reason="accelerate launches the processes")

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
use_cpu: true
mixed_precision: "no"
num_machines: 1
num_processes: 2
"""

SHARDED = """
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind,train", [("FSDP", "kv"), ("FSDP", "lora"), ("MULTI_CPU", "kv")])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, kind: str, train: str) -> None:
    original, student, text = pair = make_pair(tmp_path)
    options = {"layer_steps": 2, "ce_weight": 0.5, "layer_weight": 0.3, "train": train}
    options |= {"learning_rate": 1e-3}
    quick_heal(pair, tmp_path / "one", control=True, **options)
    config = tmp_path / "accelerate.yaml"
    config.write_text(CONFIG.format(kind=kind) + (SHARDED if kind == "FSDP" else ""))
    flags = [
        word
        for name, value in {**QUICK, **options}.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command = [*launch, "-m", "mlakit", "heal", str(student), "--teacher", str(original)]
    command += ["--data", str(text), "-o", str(tmp_path / "two"), "--control", *flags]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = log(tmp_path / "one"), log(tmp_path / "two")
    assert [(row["arm"], row["kind"], row["step"]) for row in alone] == [
        (row["arm"], row["kind"], row["step"]) for row in shared
    ]
    for one, two in zip(alone, shared, strict=True):
        for name in ("loss", "nll", "kl"):
            if name in one:
                # float32 sums in another order, through Adam, which divides by a root
                assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-6)
    ours, theirs = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-3 for name in ours)
