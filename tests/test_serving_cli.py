"""``mlakit serve`` as a user meets it: the command, its words, its end, and vLLM's turn."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("starlette", reason="mlakit[serve] is not installed")

from mlakit.account import cache_bytes
from mlakit.cli import app
from mlakit.errors import MlakitError, UsageError
from mlakit.nn.hf import attention_specs, load
from mlakit.serving.engine import Engine
from mlakit.serving.handover import KEY
from mlakit.serving.http.serve import serve
from mlakit.serving.http.server import listen
from mlakit.serving.options import KEY as OWN_KEY
from mlakit.serving.options import ServeOptions
from mlakit.serving.plan import CachePlan, pool_bytes
from serving_http import TEMPLATE, small_model, tokenizer_with
from test_generation import model_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint on disk, without a chat template."""
    path = tmp_path_factory.mktemp("serve") / "tiny"
    small_model(4096).save_pretrained(path)
    tokenizer_with(None).save_pretrained(path)
    return path


def dry_run(*words: Any) -> Any:
    """The command without a process of its own."""
    return CliRunner().invoke(app, ["serve", *map(str, words), "--dry-run"])


@pytest.fixture
def started(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own process, with a key and a template, and its address."""
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    command = [sys.executable, "-m", "mlakit", "serve", folder, "--port", 0, "--name", "mine"]
    command += ["--chat-template", template, "--drain-timeout", 60]
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"MLAKIT_API_KEY": "sesame"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"address +(http://\S+)", line):
            break
    else:
        pytest.fail(f"it did not start: {process.wait()}")
    try:
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.slow
def test_a_signal_lets_answers_end(started: tuple[subprocess.Popen[str], str]) -> None:
    process, url = started
    key = {"Authorization": "Bearer sesame"}
    body = {"model": "mine", "messages": [{"role": "user", "content": "a"}], "max_tokens": 300}
    body |= {"stream": True, "ignore_eos": True}
    chat = f"{url}/v1/chat/completions"
    with httpx.stream("POST", chat, json=body, headers=key, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.wait(30) == 0
    said = process.stderr.read() if process.stderr else ""
    logged = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["completion_tokens"] for line in logged] == [300]
    assert "SIGTERM" in said and "every accepted request was answered" in said


def test_a_dry_run_says_what_fits(folder: Path) -> None:
    plan = serve(folder, dry_run=True, cache_memory="1MiB", max_tokens=100, device="cpu")
    assert isinstance(plan, CachePlan)
    model = load(folder)
    page = cache_bytes(attention_specs(model), 1, 64, 4, 64)
    assert (plan.bytes_per_token, plan.pages) == (page // 64, 2**20 // page)
    assert plan.requests == plan.pages // 2
    engine = Engine(model, tokenizer_with(), cache_bytes=2**20, max_tokens_per_request=100)
    stats = engine.stats()
    assert (stats.pages_total, stats.cache_nbytes) == (plan.pages, plan.cache_bytes)
    alone = serve(folder, dry_run=True, max_batch_size=3, device="cpu")
    assert isinstance(alone, CachePlan) and alone.requests == 3
    assert Engine(model, tokenizer_with(), max_batch_size=3).stats().pages_total == alone.pages
    small = serve(folder, dry_run=True, max_batch_size=3, cache_format="int4", device="cpu")
    assert isinstance(small, CachePlan) and small.bytes_per_token < alone.bytes_per_token
    done = dry_run(folder, "--cache-memory", "1MiB", "--device", "cpu", "--max-tokens", 100)
    assert (
        done.exit_code == 0 and done.output == f"{plan}\n" and f"{plan.pages} pages" in done.output
    )
    done = dry_run(
        folder, "--cache-memory", "1MiB", "--device", "cpu", "--max-tokens", 100, "--json"
    )
    assert json.loads(done.output) == plan.as_dict()
    tight = serve(folder, dry_run=True, cache_memory="64KiB", device="cpu")
    assert isinstance(tight, CachePlan)
    assert (tight.requests, tight.request_tokens) == (1, tight.tokens)
    with pytest.raises(UsageError, match="no page"):
        serve(folder, dry_run=True, cache_memory="1KiB", device="cpu")


def test_an_open_door_is_said_loudly(caplog: pytest.LogCaptureFixture) -> None:
    from mlakit.serving.http.run import announce

    caplog.set_level(logging.INFO, "mlakit.serve")
    plan = CachePlan("tiny", 1, 1, 64, 64, 1)
    for host, key, loud in (
        ("127.0.0.1", None, False),
        ("0.0.0.0", "sesame", False),
        ("0.0.0.0", None, True),
    ):
        caplog.clear()
        with listen(host, 0) as listener:
            announce(listener, key, plan)
        assert ("WARNING: anybody" in caplog.text) is loud
        assert f"http://{host}:" in caplog.text
    with pytest.raises(UsageError, match="ASCII"):
        serve("anything", api_key="schlüssel", device="cpu", port=0)


@pytest.mark.slow
def test_the_load_test_finds_every_text(folder: Path, tmp_path: Path) -> None:
    result = tmp_path / "load.json"
    command = ["-m", "benchmarks.serve_load", str(folder), "--requests", "6", "--clients", "3"]
    command += ["--leave", "0.4", "--case", "pages run out", "--small-cache", "110KiB"]
    command += ["--output", str(result)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case in json.loads(result.read_text())["cases"]:
        assert case["complete"] + case["gone_away"] == case["requests"]
        assert case["wrong"] == case["left_behind"]["pages"] == 0


def test_memory_is_bytes_or_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlakit.conversion.samples.free_memory", lambda device: 1000)
    assert pool_bytes(None, "cpu") is None
    assert pool_bytes("2KiB", "cpu") == 2048
    assert pool_bytes("0.5", "cpu") == pool_bytes("50%", "cpu") == 500
    assert pool_bytes("50%", "cpu", taken=200) == 400
    for wrong in ("much", "0", "0%", "150%", "-1"):
        with pytest.raises(UsageError):
            pool_bytes(wrong, "cpu")


def test_a_blank_key_is_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable of a shell must not open a server whose owner asked for a key."""
    monkeypatch.delenv(OWN_KEY, raising=False)
    assert ServeOptions().key is None
    for blank in ("", "  "):
        with pytest.raises(UsageError, match="blank"):
            serve("nowhere", api_key=blank)
    monkeypatch.setenv(OWN_KEY, " ")
    with pytest.raises(UsageError, match="blank"):
        serve("nowhere")
    monkeypatch.setenv(OWN_KEY, "")
    assert ServeOptions().key is None


def test_a_folder_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path / "small")
    assert ServeOptions().called(".") == ServeOptions().called("../small/inner/..") == "small"
    assert ServeOptions().called("org/model") == "model"
    assert ServeOptions(name="mine").called(".") == "mine"


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    model_of("ordinary").save_pretrained(ordinary)
    tokenizer_with(None).save_pretrained(ordinary)
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    for model, options, word in (
        (folder, {"engine": "other"}, "no engine 'other'"),
        (folder, {"engine_options": ["-tp", "2"]}, "for --engine vllm"),
        (folder, {"chat_template": broken, "port": 0}, "line 1"),
        (folder, {"chat_template": tmp_path / "none", "port": 0}, "Cannot read"),
        (folder, {"host": "203.0.113.1"}, "cannot listen"),
        (folder, {"cache_memory": "1KiB", "port": 0}, "no page"),
        (ordinary, {"port": 0}, "caches keys and values"),
        (ordinary, {"dry_run": True}, "no converted checkpoint"),
    ):
        with pytest.raises(MlakitError, match=word):
            serve(model, device="cpu", **options)


def test_json_is_for_a_dry_run() -> None:
    done = CliRunner().invoke(app, ["serve", "a/model", "--json"])
    assert isinstance(done.exception, UsageError) and "--dry-run" in str(done.exception)


VLLM = ("a/model", "--engine", "vllm")


def test_vllm_gets_the_same_options_in_its_words() -> None:
    options = ("--max-batch-size", 8, "--cache-memory", "1GiB", "--max-tokens", 4096)
    more = ("--dtype", "bfloat16", "--cors-origin", "https://a.example", "--drain-timeout", 20)
    secret = ("--api-key", "sesame")
    words = ["serve", *VLLM, *options, *more, *secret, "--dry-run", "--", "-tp", 2]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.output == (
        "vllm serve a/model --host 127.0.0.1 --port 8000 --served-model-name model"
        " --max-num-seqs 8 --kv-cache-memory-bytes 1073741824 --max-model-len 4096"
        " --dtype bfloat16 --allowed-origins '[\"https://a.example\"]' --shutdown-timeout 20"
        " -tp 2\n"
    )
    for option in (
        ("--max-waiting", 3),
        ("--max-body", "1MiB"),
        ("--cache-format", "fp8"),
        ("--device", "cuda:1"),
        ("--cache-memory", "50%"),
    ):
        done = dry_run(*VLLM, *option)
        assert isinstance(done.exception, UsageError) and "no counterpart" in str(done.exception)


def test_vllm_takes_over(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nprint(sys.argv[1:], os.environ[{KEY!r}])"
    )
    program.chmod(0o755)
    command = [sys.executable, "-m", "mlakit", "serve", *VLLM]
    for path, code in (("/nowhere", 1), (str(tmp_path), 0)):
        environment = os.environ | {"MLAKIT_API_KEY": "sesame", "PATH": path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == code
        assert "vllm serve a/model" in done.stderr and "sesame" not in done.stderr
        assert code == 0 or "vLLM is not installed" in done.stderr
    assert done.stdout.startswith("['serve', 'a/model', '--host', '127.0.0.1'")
    assert done.stdout.endswith(" sesame\n")


def test_without_its_packages_the_verb_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlakit.serving.http.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlakit.serving.http.server", raising=False)
    done = CliRunner().invoke(app, ["serve", "anything"])
    assert isinstance(done.exception, MlakitError) and "mlakit[serve]" in str(done.exception)


def test_the_page_says_what_the_commands_print() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ mlakit (serve .+ --engine vllm .+)\n(vllm .+\n)", page, re.MULTILINE)
    assert len(shown) == 4
    for command, output in shown:
        assert CliRunner().invoke(app, shlex.split(command)).output == output
