"""Where the files of a checkpoint are: a folder here, or a model on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlakit.checkpoint.header import ShardHeader, parse_header, read_header
from mlakit.checkpoint.writing import INDEX_NAME, SIDE_FILES
from mlakit.errors import MlakitError

HEADER_BYTES = 2**17
"""Asked for at once where a header is read over the network: most headers are shorter."""


@dataclass(frozen=True)
class Files:
    """The files of one checkpoint, wherever they are.

    Attributes:
        folder: local folder with at least config.json and the index.
        revision: commit of a hub model; None for a folder.
        names: every file of the checkpoint.
        fetch: brings one file to ``folder`` and returns its path.
        header: reads the safetensors header of one file, without fetching the file.
    """

    folder: Path
    revision: str | None
    names: frozenset[str]
    fetch: Callable[[str], Path]
    header: Callable[[str], ShardHeader]


def hub_files(model: str) -> Files:
    """A hub model's small files in the hub cache; weight files stay there until asked for.

    Args:
        model: hub id, ``name`` or ``org/name``.

    Raises:
        MlakitError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

    with _hub_errors(model):
        small = ["config.json", "README.md", INDEX_NAME, *SIDE_FILES]
        folder = Path(snapshot_download(model, allow_patterns=small))
    revision = folder.name
    try:
        names = HfApi().list_repo_files(model, revision=revision)
    except Exception:  # offline: what the cache holds is all there is
        names = [path.name for path in folder.iterdir()]

    def fetch(name: str) -> Path:
        with _hub_errors(model):
            return Path(hf_hub_download(model, name, revision=revision))

    def header(name: str) -> ShardHeader:
        if (folder / name).exists():
            return read_header(folder / name)
        address = f"{model}@{revision}/{name}"
        with (
            _hub_errors(model),
            HfFileSystem().open(address, "rb", block_size=HEADER_BYTES) as file,
        ):
            return parse_header(file, file.size, f"{model}/{name}")

    return Files(folder, revision, frozenset(names), fetch, header)


@contextmanager
def _hub_errors(model: str) -> Iterator[None]:
    try:
        yield
    except MlakitError:
        raise
    except Exception as error:  # the hub client's network errors have no common class
        reason = str(error).splitlines() or [type(error).__name__]
        raise MlakitError(
            f"There is no folder {model} here, and the hub did not give the model: {reason[0]}",
            remedy="check the name, the network and, for a gated model, the login",
        ) from error
