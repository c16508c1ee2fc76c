"""The convert.py command line: results on standard output, mistakes on standard error, exit 2."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro import cli
from llamapro.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    base = write_random_checkpoint(tmp_path_factory.mktemp("convert") / "base", tiny_config())
    (base / "generation_config.json").write_text('{"temperature": 0.6}')
    return base


@pytest.fixture
def convert(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`convert(*words) -> (exit status, standard output, standard error)`, in this process."""
    spec = importlib.util.spec_from_file_location("convert_under_test", root / "convert.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def call(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.run(module.main)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


Convert = Callable[..., tuple[int, str, str]]


def test_expand_says_what_it_did_and_copies_companions(
    convert: Convert, base: Path, tmp_path: Path
) -> None:
    """New blocks, sources and the verification are told; tokenizer and generation files travel."""
    status, out, _ = convert("expand", base, tmp_path / "pro", "--num-new-blocks", 2)
    assert status == 0
    assert "4 -> 6 layers" in out and "new blocks   [2, 5]" in out and "[1, 3]" in out
    assert "bit-equal to the base's" in out
    for name in ("tokenizer.model", "generation_config.json"):
        assert (tmp_path / "pro" / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((tmp_path / "pro" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["llamapro"]["new_layers"] == [2, 5]
    assert config["llamapro"]["source_layers"] == [1, 3]
    assert config["llamapro"]["base_sha256"] == Checkpoint.open(base).sha256()


def test_expand_answers_one_json_object(convert: Convert, base: Path, tmp_path: Path) -> None:
    """With --json nothing else is on standard output."""
    status, out, _ = convert("expand", base, tmp_path / "pro", "--after", "0,3", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["new_layers"] == [1, 5] and found["logits_bit_equal"] is True


@pytest.mark.parametrize(
    ("words", "new", "sources"),
    [
        (["--num-new-blocks", 2, "--placement", "prefix"], [0, 1], [0, 1]),
        (["--num-new-blocks", 2, "--placement", "suffix"], [4, 5], [2, 3]),
        (["--num-new-blocks", 4, "--blocks-per-group", 2], [2, 3, 6, 7], [0, 1, 2, 3]),
    ],
)
def test_placements(
    convert: Convert,
    base: Path,
    tmp_path: Path,
    words: list[Any],
    new: list[int],
    sources: list[int],
) -> None:
    """Prefix, suffix, and groups of two copies, each bit-equal to the base."""
    status, out, _ = convert("expand", base, tmp_path / "pro", *words, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["new_layers"], found["source_layers"]) == (new, sources)


def test_small_shards_get_an_index(convert: Convert, base: Path, tmp_path: Path) -> None:
    """--max-shard-gb splits the files; the weights are the same."""
    words = ["expand", base, tmp_path / "pro", "--num-new-blocks", 2]
    assert convert(*words, "--max-shard-gb", 0.0002)[0] == 0
    assert len(list((tmp_path / "pro").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "pro" / "model.safetensors.index.json").exists()
    convert("expand", base, tmp_path / "one", "--num-new-blocks", 2)
    one, many = (Checkpoint.open(tmp_path / name) for name in ("one", "pro"))
    assert one.sha256() == many.sha256()


def test_inspect_shows_layers_and_origins(convert: Convert, base: Path, tmp_path: Path) -> None:
    """A base layer keeps its hash wherever it stands in the expanded model."""
    convert("expand", base, tmp_path / "pro", "--num-new-blocks", 2)
    _, before, _ = convert("inspect", base, "--json")
    _, after, _ = convert("inspect", tmp_path / "pro", "--json")
    rows = {row["part"]: row for row in json.loads(after)["rows"]}
    originals = {row["part"]: row for row in json.loads(before)["rows"]}
    assert rows["layer 2"]["origin"] == "new, copy of base 1"
    assert rows["layer 3"]["origin"] == "base 2"
    assert rows["layer 3"]["sha256"] == originals["layer 2"]["sha256"]
    assert rows["layer 2"]["sha256"] != originals["layer 1"]["sha256"]
    status, text, _ = convert("inspect", tmp_path / "pro")
    assert status == 0
    assert "new, copy of base 1" in text and rows["layer 2"]["sha256"][:12] in text


def test_verify_without_a_base_needs_only_the_record(
    convert: Convert, base: Path, tmp_path: Path
) -> None:
    """The base inside is hashed and compared with what expand recorded."""
    convert("expand", base, tmp_path / "pro", "--num-new-blocks", 2)
    status, out, _ = convert("verify", tmp_path / "pro")
    assert status == 0
    assert "base intact" in out and "identity" in out


def test_verify_refuses_another_base(
    convert: Convert,
    base: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """Two models of one shape are told apart by their bytes."""
    convert("expand", base, tmp_path / "pro", "--num-new-blocks", 2)
    other = write_random_checkpoint(tmp_path / "other", tiny_config(), seed=3)
    status, _, error = convert("verify", tmp_path / "pro", "--base", other)
    assert status == 2
    assert "this is another base" in error


def test_verify_finds_nan(convert: Convert, base: Path, tmp_path: Path) -> None:
    """A tensor with a value that is not finite is named."""
    shutil.copytree(base, tmp_path / "copy")
    stored = Checkpoint.open(tmp_path / "copy").tensors["model.norm.weight"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff\xff\xff\x7f")  # a NaN in fp32
    status, _, error = convert("verify", tmp_path / "copy")
    assert status == 2
    assert "NaN or infinity in model.norm.weight" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["expand", "{base}", "{tmp}/o", "--num-new-blocks", "3"], "choose one of 1, 2, 4"),
        (["expand", "{base}", "{tmp}/o", "--after", "1,9"], "base layers 0 to 3"),
        (["expand", "{base}", "{tmp}/o", "--after", "x"], "expected layers like 3,7,11"),
        (["expand", "{base}", "{tmp}/o"], "either --num-new-blocks N or --after"),
        (["expand", "{tmp}/none", "{tmp}/o", "--num-new-blocks", "2"], "no such checkpoint"),
        (["expand", "{base}", "{base}", "--num-new-blocks", "2"], "{base}"),
        (["merge", "{base}", "{tmp}/none", "{tmp}/o"], "no run directory, training checkpoint"),
        (["from-meta", "{tmp}", "{tmp}/o"], "{tmp}/params.json"),
        (["to-meta", "{tmp}/none", "{tmp}/o"], "no such checkpoint"),
        (["inspect", "{tmp}"], "no weights found"),
        (["verify", "{base}", "--base", "{base}"], "not expanded"),
    ],
)
def test_mistakes_exit_2_with_one_message_and_write_nothing(
    convert: Convert, base: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """Each names the file or option and the fix; nothing is on standard output."""
    before = Checkpoint.open(base).sha256()
    filled = [word.format(base=base, tmp=tmp_path) for word in words]
    status, out, error = convert(*filled)
    assert status == 2
    assert (
        out == "" and message.format(base=base, tmp=tmp_path) in error and "Traceback" not in error
    )
    assert list(tmp_path.iterdir()) == []
    assert Checkpoint.open(base).sha256() == before


def test_an_unknown_option_exits_2_with_the_nearest(
    convert: Convert, base: Path, tmp_path: Path
) -> None:
    """A typo is never accepted."""
    status, out, error = convert("expand", base, tmp_path / "o", "--num-new-block", 2)
    assert status == 2
    assert "--num-new-blocks" in out + error
