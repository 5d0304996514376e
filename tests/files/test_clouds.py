"""Checkpoints, runs and data on object stores: the stores' own Python clients against servers in processes of their own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import real
from real import process

pytestmark = pytest.mark.slow  # a server, and commands that import torch
FEW = ("--tokens", "256", "--sequence-length", "32")
# In processes of their own: the clients read the environment when they are imported.
analyzed: Callable[..., Any] = partial(real.analyzed, run=process)
inspected: Callable[..., Any] = partial(real.inspected, run=process)
refusal: Callable[..., str] = partial(real.refusal, run=process)
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def served(command: Callable[[int], list[str]]) -> Iterator[str]:
    """A server's address, while it runs."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", *command(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
    )
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def s3(samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the command's environment needs to find the store, which has a run and data."""
    for package in ("s3fs", "moto", "flask"):
        pytest.importorskip(package, reason="pip install s3fs 'moto[server]'")
    files = ["calm/checkpoint-10", "calm/checkpoint-60", "data/shard.bin"]
    put = f"""
import s3fs
system = s3fs.S3FileSystem()
system.mkdir("bucket")
for name in {files!r}:
    system.put({str(samples)!r} + "/" + name, "bucket/" + name, recursive="checkpoint" in name)
"""
    with served(lambda port: ["moto.server", "-p", str(port)]) as url:
        there = {**KEYS, "AWS_ENDPOINT_URL": url, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
        subprocess.run([sys.executable, "-c", put], env={**os.environ, **there}, check=True, timeout=120)
        yield there


def test_s3_a_run_its_data_and_what_is_not_there(s3: dict[str, str], samples: Path) -> None:
    found = inspected("s3://bucket/calm", **s3)
    assert (found["step"], found["format"]) == (60, "trainer")
    data = "s3://bucket/data/shard.bin"
    far = analyzed("s3://bucket/calm/checkpoint-10", data, *FEW, **s3)
    near = analyzed(samples / "calm" / "checkpoint-10", samples / "data" / "shard.bin", *FEW)
    assert far["full"]["eigenvalue"] == near["full"]["eigenvalue"]
    assert far["data"]["sha256"] == near["data"]["sha256"]
    assert "s3://bucket/nothing" in refusal("inspect", "s3://bucket/nothing", **s3)


def test_s3_a_track_has_every_checkpoint(s3: dict[str, str]) -> None:
    few = (*FEW, "--max-hvps", "3", "--device", "cpu", "--quiet", "--format", "json")
    done = process("track", "s3://bucket/calm", "--data", "s3://bucket/data/shard.bin", *few, **s3)
    assert done.returncode == 0, done.stderr
    assert [point["step"] for point in json.loads(done.stdout)["points"]] == [10, 60]


def test_gs(samples: Path, tmp_path: Path) -> None:
    for package in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(package, reason="pip install gcsfs gcp-storage-emulator")
    # gcsfs otherwise asks the store by gRPC, which the emulator does not speak, what kind of bucket it is.
    plain = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "XDG_CACHE_HOME": str(tmp_path)}

    def command(port: int) -> list[str]:
        start = ["start", "--host=127.0.0.1", f"--port={port}"]
        return ["gcp_storage_emulator", *start, "--in-memory", "--default-bucket=bucket"]

    put = "import gcsfs, sys; gcsfs.GCSFileSystem(token='anon').put(*sys.argv[1:], recursive=True)"
    with served(command) as url:
        there = {**plain, "STORAGE_EMULATOR_HOST": url}
        run = [sys.executable, "-c", put, str(samples / "calm" / "checkpoint-10"), "bucket/calm/checkpoint-10"]
        subprocess.run(run, env={**os.environ, **there}, check=True, cwd="/", timeout=120)
        found = inspected("gs://bucket/calm", **there)
        assert (found["step"], found["format"]) == (10, "trainer")
        assert "gs://bucket/nothing" in refusal("inspect", "gs://bucket/nothing", **there)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as its client asks of one model: what is in it, and its files."""

    home: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = unquote(urlsplit(self.path).path)
        if place.startswith("/org/model/resolve/"):
            return self._file(self.home / place.split("/", 5)[5])
        if place.startswith("/api/models/org/model/tree/"):
            entries = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in self.home.iterdir()
            ]
            return self._send(200, json.dumps(entries).encode())
        if place.startswith("/api/models/org/model"):
            return self._send(200, json.dumps({"id": "org/model", "sha": "1" * 40, "siblings": []}).encode())
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        files = [self.home / name for name in asked["paths"] if name and (self.home / name).is_file()]
        found = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
        self._send(200, json.dumps(found).encode())

    def _file(self, file: Path) -> None:
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return self._send(200, content, {"ETag": '"0"', "X-Repo-Commit": "1" * 40})

    def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def test_hf(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's own client, from a small server in the hub's place."""
    pytest.importorskip("huggingface_hub", reason="its client")
    monkeypatch.setattr(Hub, "home", samples / "calm" / "checkpoint-10", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }  # fmt: skip
    try:
        assert inspected("hf://org/model", **there)["step"] == 10
        assert "hf://org/other" in refusal("inspect", "hf://org/other", **there)
    finally:
        server.shutdown()


@pytest.mark.parametrize(("url", "package"), [("s3://bucket/run", "s3fs"), ("gs://bucket/run", "gcsfs")])
def test_a_backend_that_is_missing(url: str, package: str, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text(f'raise ModuleNotFoundError("No module named {package}")\n')
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert f"pip install {package}" in refusal("inspect", url, PYTHONPATH=path)
