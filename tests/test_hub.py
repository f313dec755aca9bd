"""A model of the hub, over HTTP: what is fetched, when, and that the result is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import Hub, serve
from mlakit.checkpoint import open_checkpoint
from mlakit.checkpoint.hub import HEADER_BYTES
from tiny_models import TEXT, save_tiny

OPTIONS = ["--cache-ratio", "0.5", "--calib-tokens", "512", "--refine-steps", "0"]


def client(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process whose hub is this one and whose cache is empty at first."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "no_proxy": "*",
    }
    program = "import sys; from mlakit.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """Every tensor in a file of its own, the matrices of half a megabyte and more."""
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64}
    return save_tiny(tmp_path / "remote", sharded=True, **sizes)


def test_a_dry_run_reads_headers_and_no_weights(remote: Path, tmp_path: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in remote.glob("*.safetensors")}
    large = [name for name, size in sizes.items() if size > 4 * HEADER_BYTES]
    assert len(large) > 5
    with serve("org/toy", remote) as hub:
        done = client(hub, tmp_path / "home", "convert", "org/toy", *OPTIONS, "--dry-run")
        assert done.returncode == 0, done.stderr
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        assert all(hub.sent(name) > 0 for name in sizes)
        assert all(hub.sent(name) <= 2 * HEADER_BYTES for name in large), hub.served


@pytest.mark.slow
def test_a_conversion_fetches_each_shard_once_when_it_is_needed(
    remote: Path, tmp_path: Path
) -> None:
    text, home = tmp_path / "text.txt", tmp_path / "home"
    text.write_text(TEXT)
    options = [*OPTIONS, "--calib", str(text), "--without", "downstream"]
    with serve("org/toy", remote) as hub:
        done = client(hub, home, "convert", "org/toy", *options, "-o", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr
    sizes = {path.name: path.stat().st_size for path in remote.glob("*.safetensors")}
    fetched = [name for name, count in hub.served if count == sizes.get(name)]
    whole = [name for name in fetched if sizes[name] > 2 * HEADER_BYTES]
    assert len(whole) == len(set(whole)) > 5, "none twice"
    checkpoint = open_checkpoint(remote)
    layers = [
        {checkpoint.location[name] for name in checkpoint.names if f"layers.{index}." in name}
        for index in range(2)
    ]
    assert max(map(whole.index, layers[0] & set(whole))) < min(
        map(whole.index, layers[1] & set(whole))
    ), "a layer's files come when the layer is reached"
    local = ["convert", str(remote), *options, "-o", str(tmp_path / "local")]
    assert client(hub, home, *local).returncode == 0
    for path in (tmp_path / "local").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
