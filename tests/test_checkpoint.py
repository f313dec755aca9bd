"""Checkpoints: headers believed only when the bytes are there, writes that are whole or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mlakit.checkpoint import (
    ShardWriter,
    copy_side_files,
    open_checkpoint,
    read_header,
)
from mlakit.checkpoint.writing import INDEX_NAME
from mlakit.errors import MlakitError, UnsupportedModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
FOLDER = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tables = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.tuples(shapes, st.sampled_from(sorted(DTYPES))),
    min_size=1,
    max_size=5,
).filter(lambda table: "__metadata__" not in table)


def tensor(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return (torch.randn(shape) * 3).to(DTYPES[dtype])


def make_model(folder: Path, shards: int = 2) -> dict[str, torch.Tensor]:
    """A folder with ``shards`` files, written by the safetensors library."""
    folder.mkdir(exist_ok=True)
    tensors = {f"layer.{i}.weight": torch.randn(4, 3) for i in range(4)}
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for shard in range(shards):
        part = dict(list(tensors.items())[shard::shards])
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@FOLDER
@given(table=tables)
def test_headers_and_tensors_are_those_of_the_library(table, tmp_path):
    made = {name: tensor(*what, seed) for seed, (name, what) in enumerate(table.items())}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours"
    save_file(made, theirs, metadata={"format": "pt"})
    with ShardWriter(ours, 1) as writer:
        writer.write(1, made)
    header, own = read_header(theirs), read_header(writer.path(1))
    assert own.metadata == header.metadata and set(own.tensors) == set(made)
    back = load_file(writer.path(1))
    for name, value in made.items():
        for info in (header.tensors[name], own.tensors[name]):
            assert info.shape == tuple(value.shape) and DTYPES[info.dtype] == value.dtype
            assert info.nbytes == value.numel() * value.element_size()
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        bits = [these.reshape(-1).view(torch.uint8) for these in (back[name], value)]
        assert torch.equal(*bits)


@FOLDER
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_header_or_one_clear_error(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(MlakitError, match=r"model\.safetensors is damaged or cut short"):
        read_header(path)


@FOLDER
@given(text=st.recursive(
    st.none() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets"]), inner, max_size=4),
    max_leaves=8,
))  # fmt: skip
def test_any_json_is_a_header_or_one_clear_error(text, tmp_path):
    path = tmp_path / "model.safetensors"
    body = json.dumps(text).encode()
    path.write_bytes(len(body).to_bytes(8, "little") + body + b"x")
    with pytest.raises(MlakitError, match="damaged"):
        read_header(path)


@pytest.mark.parametrize("keep", [0, 4, 8, 30, 200, -1])
def test_truncated_shard_is_named_with_both_sizes(keep, tmp_path):
    make_model(tmp_path)
    path = tmp_path / "model-00002-of-00002.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(MlakitError) as caught:
        open_checkpoint(tmp_path)
    assert path.name in caught.value.message and caught.value.remedy
    size = len(whole[:keep])
    assert str(size) in caught.value.message
    if keep == -1:
        assert str(len(whole)) in caught.value.message
    path.write_bytes(whole + b"\0")
    with pytest.raises(MlakitError, match="promises"):
        open_checkpoint(tmp_path)


def test_missing_shard_and_missing_tensor_are_named(tmp_path):
    make_model(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["ghost.weight"] = shard.name
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MlakitError, match=f"places ghost.weight in {shard.name}"):
        open_checkpoint(tmp_path)
    shard.unlink()
    with pytest.raises(MlakitError, match=f"lacks {shard.name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", 3])
def test_index_cannot_point_elsewhere(place, tmp_path):
    make_model(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(MlakitError, match="no plain file name"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[1]", "not a JSON object"),
        (INDEX_NAME, "{}", "no weight_map"),
        (INDEX_NAME, "{", "not valid JSON"),
        ("config.json", None, "no config.json"),
    ],
)
def test_bad_small_files(name, text, words, tmp_path):
    make_model(tmp_path)
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(MlakitError, match=words):
        open_checkpoint(tmp_path)


def test_pickles_are_refused_with_a_remedy(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model\.bin, a pickle") as caught:
        open_checkpoint(tmp_path)
    assert "safetensors" in caught.value.remedy and caught.value.exit_code == 3


def test_an_unfinished_conversion_says_so(tmp_path):
    (tmp_path / "plan.json").write_text('{"status": "running"}')
    with pytest.raises(MlakitError, match="has not finished") as caught:
        open_checkpoint(tmp_path)
    assert "mlakit convert" in caught.value.remedy


def test_no_weights_no_index_no_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MlakitError, match="holds no weights"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(tmp_path, weights=False).names == []
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(MlakitError, match="did not finish"):
        open_checkpoint(tmp_path)
    with pytest.raises(MlakitError, match="is a file"):
        open_checkpoint(tmp_path / "config.json")
    with pytest.raises(MlakitError, match="does not exist"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_is_stored(shards, dtype, tmp_path):
    made = make_model(tmp_path, shards)
    if shards == 1:
        made = {name: value.to(dtype) for name, value in made.items()}
        save_file(made, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names) == set(made)
    assert checkpoint.nbytes_total == sum(t.numel() * t.element_size() for t in made.values())
    for name, value in made.items():
        assert torch.equal(checkpoint.read(name), value)
        assert checkpoint.read(name).dtype == value.dtype
        assert checkpoint.shape(name) == tuple(value.shape) == checkpoint.shapes[name]
    with pytest.raises(MlakitError, match="no tensor ghost"):
        checkpoint.read("ghost")


def test_single_file_goes_before_an_index(tmp_path):
    make_model(tmp_path)
    save_file({"only": torch.ones(2)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names == ["only"]


def test_fingerprint_tells_sources_apart(tmp_path):
    make_model(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_checkpoint(tmp_path / "a").fingerprint
    (tmp_path / "b" / "README.md").write_text("not part of it")
    assert open_checkpoint(tmp_path / "b").fingerprint == first
    path = tmp_path / "b" / "model-00001-of-00002.safetensors"
    changed = load_file(path)
    save_file({name: value + 1 for name, value in changed.items()}, path, {"format": "pt"})
    second = open_checkpoint(tmp_path / "b").fingerprint
    (tmp_path / "a" / "config.json").write_text('{"model_type": "qwen2"}')
    third = open_checkpoint(tmp_path / "a").fingerprint
    assert len({first, second, third}) == 3


def test_side_files_travel_and_weights_do_not(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    make_model(source)
    target.mkdir()
    wanted = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt",
              "tokenizer.json", "tokenizer_config.json", "vocab.json"]  # fmt: skip
    for name in [*wanted, "README.md", "modeling_evil.py", "pytorch_model.bin"]:
        (source / name).write_text(name)
    assert copy_side_files(source, target) == wanted
    assert listing(target) == set(wanted)
    assert all((target / name).read_text() == name for name in wanted)


def test_hub_model_is_opened_by_headers_and_read_on_demand(tmp_path, monkeypatch):
    remote, cache = tmp_path / "remote", tmp_path / "snapshots" / "abc123"
    made = make_model(remote)
    cache.mkdir(parents=True)
    fetched = []

    class RemoteFile:
        def __init__(self, path: Path) -> None:
            self.file, self.size = path.open("rb"), path.stat().st_size

        def __enter__(self):
            return self

        def __exit__(self, *problem):
            self.file.close()

        def read(self, count: int) -> bytes:
            return self.file.read(count)

    class Remote:
        def list_repo_files(self, model, revision):
            assert (model, revision) == ("org/toy", "abc123")
            return [path.name for path in remote.iterdir()]

        def open(self, address, mode, block_size):
            return RemoteFile(remote / address.removeprefix("org/toy@abc123/"))

    def snapshot(model, allow_patterns):
        for name in ("config.json", INDEX_NAME):
            assert name in allow_patterns
            shutil.copy(remote / name, cache / name)
        return str(cache)

    def download(model, name, revision):
        fetched.append(name)
        shutil.copy(remote / name, cache / name)
        return str(cache / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Remote)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Remote)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    checkpoint = open_checkpoint("org/toy")
    assert checkpoint.path == cache and checkpoint.shapes == dict.fromkeys(made, (4, 3))
    print_of_hub = checkpoint.fingerprint
    assert fetched == [] and checkpoint.revision == "abc123"
    assert print_of_hub != open_checkpoint(remote).fingerprint
    name = next(iter(made))
    assert torch.equal(checkpoint.read(name), made[name])
    assert fetched == ["model-00001-of-00002.safetensors"]
    assert open_checkpoint(checkpoint.download()).shapes == checkpoint.shapes
    (cache / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setattr(Remote, "list_repo_files", lambda *a, **k: 1 / 0)  # the network is gone
    with pytest.raises(MlakitError, match=r"lacks model-00002"):
        open_checkpoint("org/toy")


def test_unreachable_hub_is_one_error(monkeypatch):
    def offline(*args, **options):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MlakitError, match=r"There is no folder org/toy here.*: no route to host\n"):
        open_checkpoint("org/toy")
