"""Several processes on CPUs, over gloo: the losses of one, and one clear end when one fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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

FAULTY = Path(__file__).with_name("faulty_process.py")


def launch(
    folder: Path,
    kind: str,
    pair: tuple[Path, Path, Path],
    *words: str,
    fault: str = "",
    **given: Any,
) -> subprocess.CompletedProcess[str]:
    """A run of two processes, ``folder / "two"`` its result; a hang fails by its time limit."""
    original, student, text = pair
    config = folder / "accelerate.yaml"
    # Only the kind named for GPUs starts processes; it takes CPUs as well.
    config.write_text(
        CONFIG.format(kind=kind) + (SHARDED if kind == "FSDP" else ""), encoding="utf-8"
    )
    flags = [
        word
        for name, value in {**QUICK, **given}.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(FAULTY), fault] if fault else ["-m", "mlakit"]
    command += ["heal", str(student), "--teacher", str(original), "--data", str(text)]
    return subprocess.run(
        [*command, "-o", str(folder / "two"), *words, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind,train", [("FSDP", "kv"), ("FSDP", "lora"), ("MULTI_GPU", "kv")])
def test_two_processes_give_the_losses_of_one(tmp_path: Path, kind: str, train: str) -> None:
    pair = make_pair(tmp_path)
    options = {"layer_steps": 2, "ce_weight": 0.5, "layer_weight": 0.3, "train": train}
    options |= {"learning_rate": 1e-3}
    quick_heal(pair, tmp_path / "one", control=True, **options)
    done = launch(tmp_path, kind, pair, "--control", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "heal.json").read_text())["processes"] == 2
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind,fault,message",
    [
        ("FSDP", "nan:1:5", "the loss of step 5 is not a finite number"),
        ("MULTI_GPU", "nan:0:5", "the loss of step 5 is not a finite number"),
        ("FSDP", "memory:1:5", "out of memory in process 1 of 2"),
        ("MULTI_GPU", "memory:0:5", "out of memory in process 0 of 2"),
        ("FSDP", "error:1:5", "unexpected RuntimeError: a kernel failed"),
    ],
)
def test_a_fault_in_one_process_ends_all_and_loses_nothing(
    tmp_path: Path, kind: str, fault: str, message: str
) -> None:
    pair = make_pair(tmp_path)
    options = {"micro_batch": 2, "learning_rate": 1e-3}
    failed = launch(tmp_path, kind, pair, fault=fault, **options)
    assert failed.returncode != 0
    errors = re.findall("^error: .*", failed.stderr, re.MULTILINE)
    assert len(errors) == 1 and message in errors[0], failed.stderr[-3000:]
    arm = tmp_path / "two.partial" / "arms" / "healed"
    assert json.loads((arm / "checkpoint-4" / "complete.json").read_text()) == {"step": 4}
    assert not list(arm.rglob("*.pth"))  # nothing that is pickled
    done = launch(tmp_path, kind, pair, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [row for row in log(tmp_path / "two") if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    halved = 0.5 if fault.startswith("nan") else 1.0
    assert steps[4]["rate"] / steps[3]["rate"] == pytest.approx(
        halved * rate_share(4) / rate_share(3)
    )


def rate_share(step: int) -> float:
    """Of the largest rate, in the six steps of ``QUICK``."""
    from mlakit.healing.trainer import share

    return share(step, QUICK["steps"], 0.05)
