"""Where outputs go: behind links, through pipes and devices, whole or not at all, and for whom."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from curvcli.cli import app
from curvcli.documents.output import check_writable, write_whole
from curvcli.errors import InputError


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "report.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("far/report.json")
    check_writable(link)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert [p.name for p in target.parent.iterdir()] == ["report.json"]


def test_a_link_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "to come")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "to come").read_bytes() == b"new"


def test_a_link_to_itself_and_one_into_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("no/such/folder")
    for name in ("loop", "lost"):
        for write in (check_writable, lambda path: write_whole(path, b"")):
            with pytest.raises(InputError, match="cannot write"):
                write(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loop", "lost"]


def test_permissions_of_what_was_there_stay(tmp_path: Path) -> None:
    file = tmp_path / "secret.json"
    file.write_text("old")
    file.chmod(0o600)
    write_whole(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    umask = os.umask(0o027)
    try:
        write_whole(tmp_path / "fresh.json", b"new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "fresh.json").stat().st_mode) == 0o640


def test_a_pipe_is_written_through_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)  # opens nothing: its reader would see an end
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    content = bytes(300_000)  # more than a pipe holds
    for _ in range(500):
        try:
            write_whole(pipe, content)
            break
        except InputError:  # the reader is not there yet
            reader.join(0.01)
    reader.join(10)
    assert got == [content]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="nobody reads it; start its reader first"):
        write_whole(tmp_path / "pipe", b"x")


@pytest.mark.skipif(not Path("/dev/pts").is_dir(), reason="no pseudo-terminals here")
def test_a_device_is_written_through_and_stays() -> None:
    """A pseudo-terminal of our own stands for /dev/null, which no test may risk."""
    ours, theirs = os.openpty()
    device = Path(os.ttyname(theirs))
    before = device.stat()
    try:
        check_writable(device)
        write_whole(device, b"whole\n")
        assert os.read(ours, 100).split() == [b"whole"]
        assert stat.S_ISCHR(device.stat().st_mode)
        assert device.stat().st_ino == before.st_ino
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_disk_a_socket_and_a_directory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(tmp_path / "s"))
        for path, word in ((tmp_path / "s", "no file"), (tmp_path, "a directory")):
            with pytest.raises(InputError, match=f"it is {word}"):
                write_whole(path, b"x")
    disk = tmp_path / "disk"
    disk.write_bytes(b"of great value")
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: False)
    monkeypatch.setattr(stat, "S_ISBLK", lambda mode: True)
    for write in (check_writable, lambda path: write_whole(path, b"x")):
        with pytest.raises(InputError, match="it is a disk"):
            write(disk)
    assert disk.read_bytes() == b"of great value"


def test_standard_output_by_its_name_is_appended_to_and_not_replaced(tmp_path: Path) -> None:
    """`-o /dev/stdout > file`: the file that the shell opened gets both, in order.

    By a link like the system's own, which a fault here could replace.
    """
    stdout = tmp_path / "stdout"
    stdout.symlink_to("/proc/self/fd/1" if sys.platform == "linux" else "/dev/fd/1")
    code = (
        "from curvcli.documents.output import write_whole; from pathlib import Path; print('before')\n"
        f"write_whole(Path({str(stdout)!r}), b'document\\n'); write_whole(Path('/dev/fd/1'), b'again\\n'); print('after')"
    )
    file = tmp_path / "out"
    with file.open("wb") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True, timeout=60)
    assert file.read_text() == "before\ndocument\nagain\nafter\n"
    assert stdout.is_symlink()


@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_verbs_write_behind_links(option: str, tmp_path: Path) -> None:
    name = "schedule.json" if option == "-o" else "schedule.svg"
    (tmp_path / name).write_text("old")
    (tmp_path / f"link-{name}").symlink_to(name)
    done = CliRunner().invoke(app, ["schedule", "--depth", "4", option, str(tmp_path / f"link-{name}")])
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / f"link-{name}").is_symlink()
    assert len((tmp_path / name).read_text()) > 100


def test_private_files_are_for_their_owner_and_follow_no_link(tmp_path: Path) -> None:
    (tmp_path / "of others").write_text("mine")
    (tmp_path / "link").symlink_to("of others")
    write_whole(tmp_path / "link", b"entry", private=True)
    assert (tmp_path / "of others").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "link").stat().st_mode) == 0o600
