"""Checkpoints and data behind URLs: fsspec's memory file system, and a real HTTP server."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from fsspec import AbstractFileSystem
from real import curv, process

from curvcli.checkpoints import find_checkpoints, open_checkpoint
from curvcli.errors import InputError
from curvcli.files import remote
from curvcli.files.remote import _address, fetched


@pytest.fixture
def memory(samples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AbstractFileSystem]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.put(str(samples / "calm"), "/bucket/calm", recursive=True)
    yield system
    system.rm("/bucket", recursive=True)


def test_what_is_a_url() -> None:
    assert _address(Path("s3://bucket/run")) is not None
    assert _address(Path("hf://org/model")) is not None
    assert _address(Path("run/checkpoint-10")) is None
    assert _address(Path("/abs/run")) is None
    assert _address(Path("C:/run")) is None


def test_the_newest_checkpoint_of_a_run_is_fetched_once(
    memory: AbstractFileSystem, samples: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = open_checkpoint(Path("memory://bucket/calm"))
    assert checkpoint.step == 600
    assert "fetching" in capsys.readouterr().err
    names = {p.name for p in checkpoint.path.iterdir()}
    assert names == {p.name for p in (samples / "calm" / "checkpoint-600").iterdir()}
    assert (checkpoint.path / "model.safetensors").read_bytes() == (
        samples / "calm" / "checkpoint-600" / "model.safetensors"
    ).read_bytes()
    assert open_checkpoint(Path("memory://bucket/calm")).path == checkpoint.path
    assert capsys.readouterr().err == ""
    assert open_checkpoint(Path("memory://bucket/calm/checkpoint-10")).step == 10


def test_the_trainers_arguments_come_along_and_random_states_do_not(memory: AbstractFileSystem) -> None:
    for name in ("training_args.bin", "rng_state.pth"):
        memory.pipe(f"/bucket/calm/checkpoint-10/{name}", b"anything")
    near = fetched(Path("memory://bucket/calm/checkpoint-10"))
    assert [(near / name).exists() for name in ("training_args.bin", "rng_state.pth")] == [True, False]


def test_every_checkpoint_of_a_run_is_found_and_none_fetched(
    memory: AbstractFileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    found = find_checkpoints(Path("memory://bucket/calm"))
    assert [path.name for path in found] == ["checkpoint-10", "checkpoint-60", "checkpoint-600"]
    assert all(_address(path) for path in found)
    assert capsys.readouterr().err == ""
    assert [open_checkpoint(path).step for path in found[:2]] == [10, 60]


def test_a_checkpoint_is_whole_whatever_lies_in_it(memory: AbstractFileSystem) -> None:
    """As DeepSpeed's of the Trainer, which has the ranks' files in a directory with a step in its name."""
    memory.pipe("/bucket/run/checkpoint-4/global_step4/mp_rank_00_model_states.pt", b"x")
    memory.pipe("/bucket/run/checkpoint-4/config.json", b"{}")
    memory.pipe("/bucket/run/step-90.log", b"x")
    for url in ("memory://bucket/run", "memory://bucket/run/checkpoint-4"):
        copy = fetched(Path(url))
        assert copy.name == "checkpoint-4"
        assert {p.name for p in copy.iterdir()} == {"global_step4", "config.json"}


def test_what_changed_is_fetched_again(memory: AbstractFileSystem) -> None:
    memory.pipe("/bucket/data/shard.bin", b"\x01\x00" * 100)
    first = fetched(Path("memory://bucket/data/shard.bin"))
    assert first.read_bytes() == b"\x01\x00" * 100
    memory.pipe("/bucket/data/shard.bin", b"\x02\x00" * 101)
    assert fetched(Path("memory://bucket/data/shard.bin")).read_bytes() == b"\x02\x00" * 101


def test_a_broken_transfer_leaves_nothing(
    memory: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, far: str, near: str, **kwargs: object) -> None:
        Path(near).write_bytes(b"half")
        raise ConnectionResetError("gone")

    monkeypatch.setattr(type(memory), "get_file", fail)
    with pytest.raises(InputError, match="gone"):
        fetched(Path("memory://bucket/calm/checkpoint-10"), tmp_path / "copies")
    assert not [p for p in (tmp_path / "copies").rglob("*") if p.is_file()]


def test_the_oldest_copies_go(memory: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MOST", 300)
    for i in range(4):
        memory.pipe(f"/bucket/{i}.bin", bytes(100))
        copy = fetched(Path(f"memory://bucket/{i}.bin"), tmp_path)
        os.utime(copy.parent, (i, i))
    assert sorted(p.name for p in tmp_path.rglob("*.bin")) == ["1.bin", "2.bin", "3.bin"]


def test_two_processes_that_fetch_one_checkpoint(
    memory: AbstractFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one takes what is there: a rename onto a directory with files in it is an error of its own."""
    memory.pipe("/bucket/run/checkpoint-4/config.json", b"{}")
    whole = type(memory).get_file

    def slow(self: AbstractFileSystem, far: str, near: str, **kwargs: object) -> None:
        whole(self, far, near, **kwargs)
        done = Path(near).parents[2] / "checkpoint-4"  # what the faster one made meanwhile
        done.mkdir()
        (done / "config.json").write_bytes(b"{}")

    monkeypatch.setattr(type(memory), "get_file", slow)
    copy = fetched(Path("memory://bucket/run"), tmp_path)
    assert [p.name for p in copy.iterdir()] == ["config.json"]
    assert [p.name for p in copy.parent.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("model.safetensors", "pytorch_model.bin"), ["model.safetensors"]),
        (("model-00001-of-00002.safetensors", "pytorch_model.bin.index.json"), ["model-00001-of-00002.safetensors"]),
        (("adapter_model.safetensors", "pytorch_model.bin"), ["adapter_model.safetensors", "pytorch_model.bin"]),
        (("model.safetensors", "pytorch_model_fsdp.bin"), ["model.safetensors", "pytorch_model_fsdp.bin"]),
    ],
)
def test_of_the_same_weights_in_two_forms_one_is_fetched(
    memory: AbstractFileSystem, tmp_path: Path, names: tuple[str, ...], kept: list[str]
) -> None:
    for name in names:
        memory.pipe(f"/bucket/run/checkpoint-4/{name}", b"{}")
    assert sorted(p.name for p in fetched(Path("memory://bucket/run"), tmp_path).iterdir()) == kept


def test_a_server_that_gives_a_time_alone() -> None:
    """As a web server does that has no entity tags: the time tells a changed file of the same size."""
    assert remote._version({"size": 2, "Last-Modified": "Mon"}) != remote._version({"size": 2, "Last-Modified": "Tue"})


@pytest.mark.parametrize(
    ("url", "message"),
    [("memory://bucket/nowhere", "memory://bucket/nowhere"), ("nonsense://bucket/run", "nonsense")],
)
def test_what_cannot_be_read_is_one_line(memory: AbstractFileSystem, url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        find_checkpoints(Path(url))
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_backend_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match="pip install s3fs"):
        fetched(Path("s3://bucket/run"))


@pytest.fixture
def served(samples: Path) -> Iterator[str]:
    """The samples behind a web server."""
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(samples)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
def test_data_over_http_by_the_real_command(samples: Path, served: str, tmp_path: Path) -> None:
    done = process("inspect", samples / "calm", "--data", f"{served}/data/shard.bin", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"][0]["tokens"] == 65_536
    assert "fetching 1 file, 0.1 MB" in done.stderr


@pytest.mark.slow
def test_a_gate_on_a_checkpoint_over_http(samples: Path, served: str, tmp_path: Path) -> None:
    data = ("--data", samples / "data" / "shard.bin", "--tokens", 128, "--max-hvps", 3)
    gate = ("gate", f"{served}/nanogpt/ckpt.pt", "--max-rho", 50, *data, "--format", "json", "-q")
    done = curv(*gate, XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode in (0, 3), done.stderr
    assert json.loads(done.stdout)["subject"]["step"] == 300
