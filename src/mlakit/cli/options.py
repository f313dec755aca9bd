"""Options that several commands share: one name, one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlakit.errors import UsageError
from mlakit.spec import CacheKind

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DeviceOrBest = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, float16; default: the checkpoint's.")
]
CacheFormat = Annotated[
    CacheKind | None, typer.Option(help="Quantise the latents of a converted model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

Text = Annotated[
    list[str] | None,
    typer.Option(
        help="Text to read, PLACE or NAME=PLACE, repeatable: a text or JSONL file, a folder, a"
        " dataset; default: the package's own."
    ),
]
PrefixLength = Annotated[
    int | None, typer.Option(help="Tokens cached first; default: 3/4 of the context.")
]
SuffixLength = Annotated[
    int | None, typer.Option(help="Tokens scored after them; default: 1/4 of the context.")
]
WindowsScored = Annotated[int, typer.Option(min=1, help="Windows of each text to score.")]
Recall = Annotated[bool, typer.Option(help="Ask passkey and key-value questions.")]


def png(path: Path | None) -> Path | None:
    """A picture's name, refused where it promises another format."""
    if path is not None and path.suffix.lower() != ".png":
        raise UsageError(f"--picture {path}: pictures are PNG files", remedy="end it in .png")
    return path


Tasks = Annotated[
    list[str] | None,
    typer.Option(
        help="gsm8k, humaneval, or any task of lm-eval (pip install 'mlakit[tasks]');"
        " NAME=FILE takes the problems from a JSONL file. Repeatable, or between commas."
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Tasks: the first so many problems of each.")
]
Shots = Annotated[
    int | None, typer.Option(min=0, help="Tasks: worked examples before each problem.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Tasks: wrap prompts in the chat template.")]
RunGeneratedCode = Annotated[
    bool,
    typer.Option("--run-generated-code", help="humaneval: allow running what the model writes."),
]
