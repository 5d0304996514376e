"""`curv init`: a configuration of what lies there, which the tool itself takes, and nothing that nobody knows."""

from __future__ import annotations

import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from places import SAMPLES
from real import curv, refusal

from curvcli.analysis.config import Config, find_config
from curvcli.analysis.init import initial
from curvcli.errors import InputError, UsageError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of the Trainer, and no data."""
    shutil.copytree(SAMPLES / "calm" / "checkpoint-10", tmp_path / "run" / "checkpoint-10")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokens(path: Path, count: int = 20_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (np.arange(count) % 250).astype(np.uint16).tofile(path)
    return path


def test_the_one_file_of_tokens_is_found_and_the_rest_is_said(home: Path) -> None:
    tokens(home / "data" / "train.bin")
    done = curv("init", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "wrote curv.toml\n", "")
    text = (home / "curv.toml").read_text()
    said = tomllib.loads(text)
    assert said == {
        "data": "data/train.bin", "tokens": 8192, "gate": {"max-rho": 1.0, "max-loss-rise": 20.0, "require-healthy": True}
    }  # fmt: skip
    assert "# sequence-length = 65\n" in text
    assert "in no file: the model takes up to 65" in text
    assert max(map(len, text.splitlines())) <= 125
    config, file = find_config(home / "run" / "checkpoint-10")
    assert file == home / "curv.toml"
    assert config.data == (home / "data" / "train.bin",)


def test_nanogpt_says_its_sequence_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(SAMPLES / "nanogpt" / "ckpt.pt", tmp_path / "out")
    tokens(tmp_path / "out" / "train.bin", 1000)
    monkeypatch.chdir(tmp_path)
    text = initial(Path("out")).text
    said = tomllib.loads(text)
    assert (said["sequence-length"], said["tokens"], said["data"]) == (64, 1000, "out/train.bin")
    assert said["gate"] == {"max-rho": 1.0}, "without a log there are no rules on the loss"
    assert "# require-healthy = true" in text


def test_two_files_are_a_guess_and_stay_comments(home: Path) -> None:
    for name in ("a.bin", "b.bin"):
        tokens(home / "data" / name)
    found = initial(Path("run"))
    assert "data" not in tomllib.loads(found.text)
    assert '# data = "data/a.bin"\n# data = "data/b.bin"\n' in found.text
    assert len(found.notes) == 1
    assert "no data is set" in found.notes[0]
    tokens(home / "data" / "train.bin")
    assert tomllib.loads(initial(Path("run")).text)["data"] == "data/train.bin"


def test_what_a_configuration_above_says_is_not_lost(home: Path) -> None:
    tokens(home / "elsewhere" / "my.bin")
    (home / "curv.toml").write_text('data = "elsewhere/my.bin"\nsequence-length = 32\ntokens = 4096\n')
    said = tomllib.loads(initial(Path("run"), output=Path("run/curv.toml")).text)
    assert (said["data"], said["sequence-length"], said["tokens"]) == ("../elsewhere/my.bin", 32, 4096)
    assert tomllib.loads(initial(Path("run"), force=True).text)["data"] == "elsewhere/my.bin"


def test_no_data_is_said(home: Path) -> None:
    done = curv("init", "run")
    assert done.returncode == 0
    assert done.stderr == "curv: no data is set: uncomment or fill in data in curv.toml\n"
    assert "(none was found: name the file" in (home / "curv.toml").read_text()


def test_a_file_that_is_there_is_replaced_by_force_alone(home: Path) -> None:
    (home / "curv.toml").write_text("tokens = 5\n")
    assert "--force" in refusal("init", "run")
    assert (home / "curv.toml").read_text() == "tokens = 5\n"
    assert curv("init", "run", "--force").returncode == 0
    said = tomllib.loads((home / "curv.toml").read_text())
    assert (said["tokens"], said["gate"]["max-rho"]) == (5, 1.0)


def test_named_data_may_be_patterns_and_names_are_escaped(home: Path) -> None:
    odd = tokens(home / "a b" / 'x"\\\x7f\n.bin')
    tokens(home / "shards" / "t_0.bin")
    found = initial(Path("run"), data=[Path("shards/t_*.bin"), odd])
    said = Config.model_validate(tomllib.loads(found.text))
    assert said.data == (Path("shards/t_*.bin"), Path('a b/x"\\\x7f\n.bin'))


def test_a_name_that_is_no_utf8_is_refused(home: Path) -> None:
    odd = Path(os.fsdecode(b"\xff.bin"))
    try:
        tokens(home / odd)
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(InputError, match="not UTF-8"):
        initial(Path("run"), data=[odd])


def test_a_run_elsewhere_gets_the_file_and_a_warning(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    found = initial(home / "run")
    assert found.place == home / "run" / "curv.toml"
    assert any("count only where curv is run from there" in note for note in found.notes)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_a_link_in_a_run_does_not_say_where_to_write(
    there: bool, force: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dangling one does not exist, and would be written through."""
    victim = tmp_path / "victim"
    if there:
        victim.write_text("tokens = 5\n")
    (home / "run" / "curv.toml").symlink_to(victim)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    with pytest.raises(UsageError, match=r"is a link|is there already"):
        initial(home / "run", force=force)
    assert initial(home / "run", output=home / "run" / "curv.toml", force=True).place == home / "run" / "curv.toml"


def test_logs_are_no_data(home: Path) -> None:
    for place in (home / "run" / "curvature.jsonl", home / "metrics.jsonl", home / "notes.txt"):
        place.write_text('{"text": "a"}\n')
    assert "none was found" in initial(Path("run")).text
    (home / "data").mkdir()
    shutil.move(home / "metrics.jsonl", home / "data" / "train.jsonl")
    assert tomllib.loads(initial(Path("run")).text)["data"] == "data/train.jsonl"


def test_weights_called_bin_are_no_data(home: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.bin"):
        tokens(home / "run" / name)
    assert "none was found" in initial(Path("run")).text


@pytest.mark.parametrize("name", ["s3://bucket/run", "nowhere"])
def test_what_is_no_run_here_is_refused(name: str, home: Path) -> None:
    refusal("init", name)
    assert not (home / "curv.toml").exists()
