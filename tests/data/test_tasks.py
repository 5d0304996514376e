"""Losses by task against the models' own, the data they take, and networks of the user's own; through the CLI too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import CASES, VOCABULARY, Case
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from curvcli.checkpoints import open_checkpoint
from curvcli.cli import app
from curvcli.curvature.problem import Problem
from curvcli.data.examples import holds_examples, read_examples
from curvcli.data.shards import Shard
from curvcli.data.tasks import LOSSES, causal_loss, labelled_loss, masked, predictions
from curvcli.data.tokens import Source
from curvcli.errors import CurvError, InputError, UsageError
from curvcli.models.architecture import named

OWN = '''
import torch
from torch import nn

class Net(nn.Module):
    """Takes ids by a name of its own and returns a tensor."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, 19)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)

def tiny():
    return Net().half()

def broken():
    raise ValueError("no such\\nsize")

def text():
    return "a network"

class Raising(Net):
    def forward(self, tokens):
        raise KeyError("width")

def small():
    net = Net()
    net.head = nn.Linear(8, 12)
    return net

def double_loss(model, batch):
    return 2 * nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

def no_loss(model, batch):
    return 3.0

def rowwise(model, batch):
    return model(batch[:, :-1]).mean(dim=(1, 2))

def failing(model, batch):
    return batch["labels"]

constant = 3
'''


# --- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit"])
def test_loss_is_the_models_own_where_that_is_a_plain_mean(name: str) -> None:
    case = CASES[name]()
    model, batch = case.build(), case.batch()
    columns = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else batch
    with torch.no_grad():
        assert LOSSES[case.task](model, batch).item() == pytest.approx(model(**columns).loss.item(), rel=1e-5)


def test_labels_of_a_causal_model_are_shifted_and_ignored() -> None:
    case = CASES["llama"]()
    model, window = case.build(), case.batch()
    labels = window.clone()
    labels[:, :4] = -100  # a prompt
    columns = {"input_ids": window, "attention_mask": torch.ones_like(window), "labels": labels}
    with torch.no_grad():
        assert causal_loss(model, {**columns, "labels": window}).item() == pytest.approx(causal_loss(model, window).item())
        own = model(**columns).loss.item()
        assert causal_loss(model, columns).item() == pytest.approx(own, rel=1e-5)
    assert predictions(columns, "causal-lm") == 3 * 4
    assert predictions({**columns, "labels": window}, "causal-lm") == 3 * 7
    assert predictions(window, "causal-lm") == 3 * 7


@pytest.mark.parametrize(
    "form",
    [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None), lambda x: type("Output", (), {"logits": x})()],
    ids=["tensor", "mapping", "tuple", "output"],
)
def test_forms_of_output(form: Callable[[Tensor], Any]) -> None:
    class Net(nn.Module):
        def forward(self, anything: Tensor) -> Any:
            return form(nn.functional.one_hot(anything, 5).float())

    window = torch.tensor([[0, 1, 1]])
    expected = nn.functional.cross_entropy(torch.eye(5)[:2], torch.tensor([1, 1]))
    assert causal_loss(Net(), window).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("output", "labels", "said"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 3, dtype=torch.int64), "do not go with labels"),
        (torch.zeros(2, 3, 5), torch.tensor([[0, 1, 5], [0, 0, 0]]), "label 5 is none of the model's 5 classes"),
        (torch.zeros(2, 3, 5), torch.tensor([[0, 1, -1], [0, 0, 0]]), "label -1 is none"),
        ("text", torch.zeros(2, 3, dtype=torch.int64), "returned a str, not logits"),
    ],
)
def test_what_is_no_loss_is_said(output: Any, labels: Tensor, said: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output

    with pytest.raises(CurvError, match=said):
        labelled_loss(Net(), {"x": torch.zeros(2, 3), "labels": labels})


def test_masking() -> None:
    ids = torch.randint(19, (40, 21), generator=torch.Generator().manual_seed(0))
    shard = Shard(ids, (Source(Path("s"), "tokens", None, lambda n: ids.numpy()),), "first", np.arange(len(ids)))
    first, again, other = (masked(shard, 18, seed) for seed in (0, 0, 1))
    chosen = first.columns["labels"] != -100
    assert (chosen.sum(1) == 3).all()  # 15 % of 20
    assert first.tokens == 120
    assert torch.equal(first.columns["labels"][chosen], ids[:, :-1][chosen])
    assert (first.columns["input_ids"][chosen] == 18).all()
    assert torch.equal(first.columns["input_ids"][~chosen], ids[:, :-1][~chosen])
    assert torch.equal(first.columns["labels"], again.columns["labels"])
    assert not torch.equal(first.columns["labels"], other.columns["labels"])
    assert first.sha256 == shard.sha256


# --- examples --------------------------------------------------------------------------------


def _jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_both_forms_give_the_same_examples(tmp_path: Path) -> None:
    ids, labels = torch.randint(19, (6, 5)), torch.randint(19, (6, 4))
    labels[2] = -100
    save_file({"input_ids": ids.int(), "labels": labels}, tmp_path / "e.safetensors")
    rows = [{"input_ids": i, "labels": j} for i, j in zip(ids.tolist(), labels.tolist(), strict=True)]
    one = read_examples(tmp_path / "e.safetensors", predictions=1000)
    two = read_examples(_jsonl(tmp_path / "e.jsonl", rows), predictions=1000)
    kept = [0, 1, 3, 4, 5]  # the row without labels is left out
    assert torch.equal(one.columns["input_ids"], ids[kept])
    assert one.columns["input_ids"].dtype == torch.int64
    assert (one.sha256, one.tokens) == (two.sha256, 20)
    assert [len(b["labels"]) for b in one.batches(2)] == [2, 2, 1]
    assert read_examples(tmp_path / "e.jsonl", predictions=9).rows == 2
    assert read_examples(tmp_path / "e.jsonl", predictions=1).rows == 1
    assert read_examples(tmp_path / "e.jsonl", predictions=9).sha256 != one.sha256


def test_lists_of_unequal_length_are_padded_and_masked(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [8], "labels": [2, 3]}]
    examples = read_examples(_jsonl(tmp_path / "e.jsonl", rows), predictions=100)
    assert examples.columns["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert examples.columns["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert examples.columns["labels"].tolist() == [[1, -100], [2, 3]]
    assert examples.tokens == 3


def test_padding_does_not_change_the_loss(tmp_path: Path) -> None:
    case = CASES["t5"]()
    model = case.build()
    rows = [{"input_ids": [5, 6, 7], "labels": [1]}, {"input_ids": [8], "labels": [2, 3]}]
    both = read_examples(_jsonl(tmp_path / "e.jsonl", rows), predictions=100).columns
    shift = model.prepare_decoder_input_ids_from_labels

    def loss(columns: dict[str, Tensor]) -> float:
        return labelled_loss(model, {**columns, "decoder_input_ids": shift(labels=columns["labels"])}).item()

    alone = [{name: torch.tensor([values]) for name, values in row.items()} for row in rows]
    assert loss(dict(both)) == pytest.approx((loss(alone[0]) + 2 * loss(alone[1])) / 3, rel=1e-5)


def _apart(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory."""
    return {name: column.clone().contiguous() for name, column in columns.items()}


def test_batches_count_by_their_labels(tmp_path: Path) -> None:
    """One label in the first row and four in the second: the mean over batches is the mean over labels."""
    case = CASES["bert"]()
    ids = torch.randint(1, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 1:] = -100
    examples = read_examples(_save(input_ids=ids, labels=labels)(tmp_path), predictions=100)
    batches = examples.batches(1)
    problem = Problem.create(case.build(), labelled_loss, batches, [predictions(b, "masked-lm") for b in batches])
    assert problem.mean_loss() == pytest.approx(labelled_loss(problem.model, examples.columns).item(), rel=1e-6)


def _save(**columns: Tensor) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        save_file(_apart(columns), folder / "e.safetensors")
        return folder / "e.safetensors"

    return write


def _rows(*rows: Any) -> Callable[[Path], Path]:
    return lambda folder: _jsonl(folder / "e.jsonl", list(rows))


def _raw(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "e.jsonl").write_bytes(content)
        return folder / "e.jsonl"

    return write


IDS = torch.ones(4, 3, dtype=torch.int64)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unequal rows": (_save(input_ids=IDS, labels=IDS[:3]), "unequal length"),
    "no labels": (_save(input_ids=IDS, labels=IDS * 0 - 100), "no label other than -100"),
    "float labels": (_save(input_ids=IDS, labels=torch.ones(4)), "--loss package.module:function"),
    "float ids": (_save(input_ids=IDS.float(), labels=IDS), "floats, not ids"),
    "NaN": (_save(pixel_values=torch.full((4, 2), float("nan")), labels=IDS[:, 0]), "NaN"),
    "mask of four dimensions": (_save(input_ids=IDS, attention_mask=IDS[:, None, None], labels=IDS), "attention_mask"),
    "scalar": (_save(input_ids=IDS, labels=torch.tensor(1)), "no rows in labels"),
    "empty column": (_save(input_ids=IDS[:0], labels=IDS[:0]), "no rows"),
    "text": (_rows({"input_ids": "the whale", "labels": 1}), "tokenised for classifiers alone"),
    "column missing in a row": (_rows({"input_ids": [1], "labels": 1}, {"input_ids": [1]}), "row 2"),
    "ragged pixels": (_rows(*({"pixel_values": [[0.1] * n], "labels": 1} for n in (2, 3))), "unequal shapes"),
    "huge integer": (_rows({"input_ids": [2**70], "labels": 1}), "holds no numbers"),
    "no JSON": (_raw(b"{'a': 1}\n"), "line 1"),
    "no object": (_raw(b"[1, 2]\n"), "no object"),
    "complex": (_save(pixel_values=torch.ones(4, 2) * 1j, labels=IDS[:, 0]), "is complex"),
    "a line without end": (_raw(b" " * 2**26 + b"1"), "longer than 64 MiB"),
    "no text at all": (_raw(b"\xff\xfe\n"), "line 1"),
    "depth": (_raw(b"[" * 200_000), "line 1"),
    "empty": (_raw(b""), "no examples"),
    "truncated": (lambda p: (p / "e.safetensors").write_bytes(b"\x10\0\0") and p / "e.safetensors", "cannot be read"),  # type: ignore[dict-item]
    "not named columns": (lambda p: (p / "e.bin").write_bytes(b"ab") and p / "e.bin", "named columns"),  # type: ignore[dict-item]
    "missing": (lambda p: p / "nowhere.jsonl", "no file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_examples(case: str, tmp_path: Path) -> None:
    write, said = BAD[case]
    with pytest.raises(InputError, match=said) as caught:
        read_examples(write(tmp_path), predictions=100)
    assert ";" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokens_are_told_from_examples(tmp_path: Path) -> None:
    assert not holds_examples(_save(input_ids=IDS)(tmp_path))
    assert holds_examples(_save(input_ids=IDS, labels=IDS)(tmp_path))
    assert not holds_examples(_rows({"text": "whale"})(tmp_path))
    assert holds_examples(_rows({"pixel_values": [1.0], "labels": 2})(tmp_path))


# --- the command line ------------------------------------------------------------------------


def _saved(case: Case, folder: Path, **columns: Tensor) -> tuple[Path, Path]:
    """A save_pretrained directory, and examples or a stream of tokens beside it."""
    case.build().save_pretrained(folder / "model")
    if columns:
        save_file(_apart(columns), folder / "data.safetensors")
        return folder / "model", folder / "data.safetensors"
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(1, VOCABULARY, 2000))
    return folder / "model", folder / "ids.npy"


def _tokenizer(model: Path, mask: int) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)} | {"[MASK]": mask}
    words = {k: v for k, v in words.items() if v != mask or k == "[MASK]"}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]").save_pretrained(model)  # noqa: S106


def _analyze(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["analyze", "--quiet", "--format", "json", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def _refused(*arguments: object, verb: str = "analyze") -> str:
    result = CliRunner().invoke(app, [verb, *(["--quiet"] if verb == "analyze" else []), *map(str, arguments)])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert "internal error" not in lines[0]
    assert ";" in lines[0]
    return lines[0]


def _converged(report: dict[str, Any], layers: int) -> None:
    assert report["full"]["status"] == "converged"
    assert [e["status"] for e in report["layers"]] == ["converged"] * layers
    for curve in report["cumulative"].values():
        assert [e["status"] for e in curve] == ["converged"] * (layers + 1)


def test_masked_lm(tmp_path: Path) -> None:
    model, data = _saved(CASES["bert"](), tmp_path)
    arguments = (model, "--data", data, "--tokens", 120, "--sequence-length", 14, "--optimizer", "none")
    assert "which token is the mask" in _refused(*arguments)
    _tokenizer(model, 18)
    report = _analyze(*arguments)
    _converged(report, 2)
    assert report["data"]["tokens"] == 114  # 2 of 14 positions, in 57 windows of 15 tokens
    said = {f["code"]: f["message"] for f in report["findings"]}
    assert "114 of 798 positions" in said["masked-positions"]
    assert _analyze(*arguments, "--seed", 1)["data"]["loss"] != report["data"]["loss"]


def test_seq2seq(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(1, VOCABULARY, (16, n), generator=draw) for n in (7, 5))
    labels[:8, 2:] = -100  # batches of unequal weight
    case = CASES["t5"]()
    model, data = _saved(case, tmp_path, input_ids=ids, labels=labels)
    report = _analyze(model, "--data", data, "--optimizer", "none")
    _converged(report, 2)
    assert (report["data"]["tokens"], report["data"]["sequence_length"]) == (56, 7)
    with torch.no_grad():
        own = case.build()(input_ids=ids, labels=labels).loss.item()
    assert report["data"]["loss"] == pytest.approx(own, rel=1e-4)
    assert "other-stacks" in [f["code"] for f in report["findings"]]


def test_a_decoder_without_a_start_token_needs_its_inputs(tmp_path: Path) -> None:
    model, data = _saved(CASES["t5"](), tmp_path, input_ids=IDS, labels=IDS)
    config = json.loads((model / "config.json").read_text())
    del config["decoder_start_token_id"]
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").unlink(missing_ok=True)
    assert "no column decoder_input_ids" in _refused(model, "--data", data)
    save_file(_apart({"input_ids": IDS, "labels": IDS, "decoder_input_ids": IDS}), data)
    assert _analyze(model, "--data", data, "--optimizer", "none", "--max-hvps", 3)["data"]["tokens"] == 12


def test_classification(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(16, 3, 8, 8, generator=draw), torch.arange(16) % 3
    model, data = _saved(CASES["vit"](), tmp_path, pixel_values=pixels, labels=labels)
    report = _analyze(model, "--data", data, "--optimizer", "none")
    _converged(report, 2)
    assert (report["data"]["tokens"], report["data"]["sequence_length"]) == (16, None)
    save_file({"pixel_values": pixels, "labels": labels + 5}, data)
    assert "label 7 is none of the model's 3 classes" in _refused(model, "--data", data)


def test_experts(tmp_path: Path) -> None:
    model, data = _saved(CASES["mixtral"](), tmp_path)
    built = open_checkpoint(model).model()
    assert (built.config._experts_implementation, built.config._attn_implementation) == ("eager", "eager")
    report = _analyze(model, "--data", data, "--tokens", 256, "--sequence-length", 8, "--optimizer", "none")
    _converged(report, 2)
    assert "forward" in report["cost"]["mode_seconds"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the user's own module, weights of its network, and tokens."""
    (tmp_path / "mynets.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    model = named("mynets:tiny").build()
    save_file(model.state_dict(), tmp_path / "weights/model.safetensors")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(1, VOCABULARY, 2000))
    sys.modules.pop("mynets")
    return tmp_path


DATA = ("--data", "ids.npy", "--tokens", 256, "--sequence-length", 8, "--optimizer", "none")


def test_a_factory_of_ones_own(own: Path) -> None:
    assert "--model" in _refused("weights", *DATA)
    assert "mynets" not in sys.modules
    report = _analyze("weights", *DATA, "--model", "mynets:tiny")
    _converged(report, 2)
    double = _analyze("weights", *DATA, "--model", "mynets:tiny", "--loss", "mynets:double_loss")
    assert double["full"]["eigenvalue"] == pytest.approx(2 * report["full"]["eigenvalue"], rel=1e-2)
    assert double["data"]["loss"] == pytest.approx(2 * report["data"]["loss"], rel=1e-5)


def test_inspect_names_the_task_and_builds_nothing(own: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", "weights", "--json", "--model", "mynets:broken"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["architecture"], facts["task"], facts["tensors"]) == ("mynets:broken", "causal-lm", 11)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mynets"], "neither a directory with a config.json nor package.module:factory"),
        (["--model", "mynets:"], "package.module:name"),
        (["--model", "nowhere.nets:tiny"], "no module nowhere"),
        (["--model", "mynets:absent"], "has no absent"),
        (["--model", "mynets:constant"], "is a int"),
        (["--model", "mynets:broken"], "ValueError: no such size"),
        (["--model", "mynets:text"], "gave a str"),
        (["--model", "mynets:Raising"], "the forward pass of mynets:Raising failed: KeyError: 'width'"),
        (["--model", "mynets:small"], "head.weight has shape (19, 8)"),
        (["--model", "mynets:nn.Identity"], "none of the model's"),
        (["--model", "mynets:tiny", "--loss", "mynets:no_loss"], "returned a float"),
        (["--model", "mynets:tiny", "--loss", "mynets:rowwise"], "return the mean loss"),
        (["--model", "mynets:tiny", "--loss", "mynets:failing"], "--loss mynets:failing failed: IndexError"),
        (["--model", "mynets:tiny", "--loss", "hinge"], "unknown loss"),
        (["--model", "mynets:tiny", "--loss", "masked-lm"], "mask"),
        (["--model", "mynets:tiny", "--loss", "classification"], "named columns"),
    ],
)
def test_what_is_wrong_with_ones_own_code_is_one_line(arguments: list[str], said: str, own: Path) -> None:
    assert said in _refused("weights", *DATA, *arguments)


def test_ids_beyond_a_factorys_embedding(own: Path) -> None:
    np.save("ids.npy", np.full(500, VOCABULARY))
    assert f"id {VOCABULARY}, the model's vocabulary has {VOCABULARY}" in _refused(
        "weights", *DATA, "--model", "mynets:tiny"
    )


def test_a_module_that_fails_itself_is_blamed(own: Path) -> None:
    (own / "mynets2.py").write_text("import absent_dependency\n")
    assert "ModuleNotFoundError: No module named 'absent_dependency'" in _refused(
        "weights", *DATA, "--model", "mynets2:tiny"
    )


def test_a_traceback_on_request_and_the_working_directory(own: Path) -> None:
    """In a process of its own, whose path does not begin with the working directory, as that of `curv` does not."""

    def run(model: str, **environment: str) -> subprocess.CompletedProcess[str]:
        code = "from curvcli.cli import main; main()"
        command = [sys.executable, "-P", "-c", code, "analyze", "weights", "-q", *map(str, DATA), "--model", model]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})

    done = run("mynets:tiny")
    assert done.returncode == 0, done.stderr
    assert 'raise ValueError("no such' in run("mynets:broken", CURV_TRACEBACK="1").stderr


def test_a_configuration_for_weights_without_one(tmp_path: Path) -> None:
    model, data = _saved(CASES["mixtral"](), tmp_path)
    arguments = ("--data", data, "--tokens", 128, "--sequence-length", 8, "--optimizer", "none", "--max-hvps", 30)
    report = _analyze(model, *arguments)
    (model / "config.json").rename(tmp_path / "config_of_mine.json")
    again = _analyze(model, *arguments, "--model", tmp_path / "config_of_mine.json")
    assert again["full"]["eigenvalue"] == report["full"]["eigenvalue"]
    CASES["mixtral"]().build(num_hidden_layers=1).config.save_pretrained(tmp_path / "shallow")
    assert "none of the model's" in _refused(model, *arguments, "--model", tmp_path / "shallow")
    CASES["mixtral"]().build(num_hidden_layers=3).config.save_pretrained(tmp_path / "deep")
    assert "missing" in _refused(model, *arguments, "--model", tmp_path / "deep")


def test_ids_of_examples_are_checked(tmp_path: Path) -> None:
    ids = torch.ones(8, 5, dtype=torch.int64)
    for name, columns, said in [
        ("input_ids", {"input_ids": ids * 40, "labels": ids}, "column input_ids"),
        ("labels", {"input_ids": ids, "labels": ids * 40}, "column labels"),
        ("decoder", {"input_ids": ids, "labels": ids, "decoder_input_ids": -ids}, "holds id -1"),
    ]:
        (tmp_path / name).mkdir()
        model, data = _saved(CASES["t5"](), tmp_path / name, **columns)
        assert said in _refused(model, "--data", data)
    case = CASES["bert"]()
    (tmp_path / "long").mkdir()
    model, data = _saved(case, tmp_path / "long", input_ids=torch.ones(4, 17).long(), labels=torch.ones(4, 17).long())
    assert "context is 16" in _refused(model, "--data", data)


def test_a_class_without_a_known_loss_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForQuestionAnswering

    BertForQuestionAnswering(BertConfig(**CASES["bert"]().options)).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.ones(500, dtype=np.int64))
    assert "no loss is known" in _refused(tmp_path / "model", "--data", tmp_path / "ids.npy", "--sequence-length", 8)


def test_tasks_read_from_names_are_transformers_own() -> None:
    """Every class that transformers' tables list for a task is read as of that task, or as one that lists it too."""
    from transformers.models.auto import modeling_auto

    from curvcli.models.registered import _CLASSES, _task

    listed: dict[str, set[str]] = {}
    for task, tables in _CLASSES.items():
        for _, table in tables:
            for names in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values():
                for name in (names,) if isinstance(names, str) else names:
                    listed.setdefault(name, set()).add(task)
    encoder_decoder = {name for name, tasks in listed.items() if "seq2seq" in tasks}
    wrong = {n: t for n, t in listed.items() if _task(n, encoder_decoder=n in encoder_decoder) not in t}
    assert len(listed) > 300
    assert wrong == {}


def test_config_of_an_unnamed_class(tmp_path: Path) -> None:
    """Without architectures a Llama is a language model; a BERT may be any of several."""
    for kind, fine in (("llama", True), ("bert", False)):
        file = tmp_path / f"{kind}.json"
        file.write_text(json.dumps({"model_type": kind, **CASES[kind]().options}))
        if fine:
            assert isinstance(named(str(file)).build(), nn.Module)
        else:
            with pytest.raises(CurvError, match="no loss is known"):
                named(str(file)).build()


def test_usage_of_a_sequence_length_with_examples(tmp_path: Path) -> None:
    model, data = _saved(CASES["t5"](), tmp_path, input_ids=IDS, labels=IDS)
    assert "holds examples" in _refused(model, "--data", data, "--sequence-length", 2)
    with pytest.raises(UsageError):
        named("no such thing")
