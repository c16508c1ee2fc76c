"""The convert.py command line: results on standard output, mistakes on standard error, exit 2."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import read_blocks, write_blocks
from llamapro.checkpoints.run import TRAINABLE_FILE, training_checkpoints
from llamapro.checkpoints.writing import in_memory

Convert = Callable[..., tuple[int, str, str]]
HUB_ERRORS = (
    "HfHubHTTPError GatedRepoError RepositoryNotFoundError RevisionNotFoundError "
    "LocalEntryNotFoundError OfflineModeIsEnabled"
).split()


def test_expand_says_what_it_did_and_copies_companions(
    convert: Convert, base: Path, tmp_path: Path
) -> None:
    """New blocks, sources and the verification are told; tokenizer and generation files travel."""
    made = tmp_path / "my pro"
    status, out, _ = convert("expand", base, made, "--num-new-blocks", 2)
    assert status == 0 and f"--model.path '{made}' --data.train" in out
    assert "4 -> 6 layers" in out and "new blocks   [2, 5]" in out and "[1, 3]" in out
    assert "bit-equal to the base's" in out
    for name in ("tokenizer.model", "generation_config.json"):
        assert (made / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((made / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["llamapro"]["new_layers"] == [2, 5]
    assert config["llamapro"]["source_layers"] == [1, 3]
    assert config["llamapro"]["base_sha256"] == Checkpoint.open(base).sha256()


def test_expand_answers_one_json_object(convert: Convert, base: Path, tmp_path: Path) -> None:
    """Nothing else is on standard output with --json."""
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


def test_small_shards_get_an_index(convert: Convert, base: Path, pro: Path, tmp_path: Path) -> None:
    """--max-shard-gb splits the files; the weights are the same."""
    words = ["expand", base, tmp_path / "many", "--num-new-blocks", 2]
    assert convert(*words, "--max-shard-gb", 0.00003)[0] == 0
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "many" / "model.safetensors.index.json").exists()
    assert Checkpoint.open(tmp_path / "many").sha256() == Checkpoint.open(pro).sha256()


def test_inspect_shows_layers_and_origins(convert: Convert, base: Path, pro: Path) -> None:
    """A base layer keeps its hash wherever it stands in the expanded model."""
    _, before, _ = convert("inspect", base, "--json")
    _, after, _ = convert("inspect", pro, "--json")
    rows = {row["part"]: row for row in json.loads(after)["rows"]}
    originals = {row["part"]: row for row in json.loads(before)["rows"]}
    assert rows["layer 2"]["origin"] == "new, copy of base 1"
    assert rows["layer 3"]["origin"] == "base 2"
    assert rows["layer 3"]["sha256"] == originals["layer 2"]["sha256"]
    assert rows["layer 2"]["sha256"] != originals["layer 1"]["sha256"]
    status, text, _ = convert("inspect", pro)
    assert status == 0
    assert "new, copy of base 1" in text and rows["layer 2"]["sha256"][:12] in text


def test_verify_without_a_base_needs_only_the_record(convert: Convert, pro: Path) -> None:
    """The base inside is hashed and compared with what expand recorded."""
    status, out, _ = convert("verify", pro)
    assert status == 0
    assert "base intact" in out and "identity" in out


def test_verify_refuses_another_base(
    convert: Convert,
    base: Path,
    pro: Path,
    tmp_path: Path,
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """Two models of one shape are told apart by their bytes."""
    config = Checkpoint.open(base).config
    other = write_random_checkpoint(tmp_path / "other", config, seed=3)
    status, _, error = convert("verify", pro, "--base", other)
    assert status == 2
    assert "this is another base" in error


def test_verify_compares_the_configuration_of_the_base_too(
    base: Path, pro: Path, convert: Convert, tmp_path: Path
) -> None:
    """The same weights with another theta are another base."""
    other = shutil.copytree(base, tmp_path / "other")
    raw = json.loads((other / "config.json").read_text()) | {"rope_theta": 5e5}
    (other / "config.json").write_text(json.dumps(raw))
    status, _, error = convert("verify", pro, "--base", other)
    assert status == 2 and "rope_theta was 500000.0, is 10000.0" in error


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--after", "1", "--placement", "suffix"], "leave --placement suffix out"),
        (["--after", "1", "--blocks-per-group", 2], "--blocks-per-group is for interleaved"),
        (
            ["--num-new-blocks", 2, "--placement", "prefix", "--blocks-per-group", 2],
            "--blocks-per-group is for interleaved",
        ),
    ],
)
def test_an_option_that_another_makes_void_is_refused(
    options: list[Any], expected: str, base: Path, convert: Convert, tmp_path: Path
) -> None:
    """It used to be ignored."""
    status, _, error = convert("expand", base, tmp_path / "out", *options)
    assert status == 2 and expected in error and not (tmp_path / "out").exists()


def test_verify_beside_transformers_answers_in_words(
    base: Path, pro: Path, convert: Convert
) -> None:
    """Lines with the names of what was compared, and no key of the JSON object."""
    pytest.importorskip("transformers")
    status, out, _ = convert("verify", pro, "--base", base, "--hf", "--dtype", "bfloat16")
    assert status == 0 and "logits bit-equal to the base's" in out
    assert "bfloat16, 128 random tokens" in out and " nats per token; training's loss" in out
    assert "\n  this implementation and transformers in fp32: logits differ by up to " in out
    assert "_difference" not in out


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
        (["from-meta", "{base}/config.json", "{tmp}/o"], "directory of the release, {base}"),
        (["from-gguf", "{base}", "{tmp}/o"], "no such file; give a model's .gguf file"),
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


# ---- Runs ---------------------------------------------------------------------------------------


# ---- Several new-block files, and the way back --------------------------------------------------


def test_merge_takes_several_files_and_strip_gives_the_base_back(
    convert: Convert, base: Path, run_dir: Path, tmp_path: Path
) -> None:
    """OUT_DIR comes last, options before or after; `verify` shows the base inside."""
    files = [tmp_path / f"{name}.safetensors" for name in ("code", "law")]
    kept, info = read_blocks(training_checkpoints(run_dir)[-1] / TRAINABLE_FILE)[1:]
    for number, file in enumerate(files, 2):
        tensors = {name: tensor.read() * number for name, tensor in kept.items()}
        write_blocks(file, in_memory(tensors), info)
    status, out, _ = convert("merge", tmp_path / "pro", *files, tmp_path / "both", "--json")
    found = json.loads(out)
    assert status == 0 and found["blocks"] == [str(file) for file in files]
    assert found["new_layers"] == [2, 3, 6, 7] and found["steps"] == [3, 3]
    words = ["merge", tmp_path / "pro", *files, run_dir, tmp_path / "both"]
    status, out, _ = convert(words[0], "--force", *words[1:])
    assert status == 0 and "10 layers, base tensors intact" in out and "of 3 files" in out

    sha256 = Checkpoint.open(base).sha256()
    assert f"base intact: its tensors hash to {sha256}" in convert("verify", tmp_path / "both")[1]
    status, out, _ = convert("strip", tmp_path / "both", tmp_path / "back")
    assert status == 0 and f"sha256 {sha256}, the base's" in out
    assert f"sha256 {sha256}" in convert("verify", tmp_path / "back")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["merge", "{tmp}/pro", "{tmp}/run"], "OUT_DIR is missing"),
        (["merge", "{base}", "{tmp}/run", "{tmp}/run", "{tmp}/o"], "given twice"),
        (["merge", "{base}/model.safetensors", "{base}", "{tmp}/o"], "the checkpoint directory or"),
        (["strip", "{base}", "{tmp}/o"], "no 'llamapro' record"),
        (["strip", "{tmp}/run", "{tmp}/o"], "run, make a model of it: llamapro merge EXPANDED_DIR"),
        (["strip", "{tmp}/run/checkpoints", "{tmp}/o"], "EXPANDED_DIR {tmp}/run/checkpoints OUT"),
        (["expand", "hf://owner", "{tmp}/o", "--num-new-blocks", "2"], "hf://owner/name"),
    ],
)
def test_mistakes_of_merge_and_strip_write_nothing(
    convert: Convert, base: Path, run_dir: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """One message, exit status 2."""
    *words, message = [word.format(base=base, tmp=tmp_path) for word in (*words, message)]
    status, out, error = convert(*words)
    assert status == 2 and out == "" and message in error and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_every_command_that_reads_a_checkpoint_takes_one_from_the_hub(
    convert: Convert, base: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """expand notes the name of its base, which the model card then says."""
    places = {"jo/base": base, "jo/pro": tmp_path / "hub-pro"}
    hub = ModuleType("huggingface_hub")
    hub.errors = SimpleNamespace(**{name: OSError for name in HUB_ERRORS})  # type: ignore[attr-defined]
    hub.snapshot_download = lambda repo, **_: str(places[repo])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    words = ["expand", "hf://jo/base", places["jo/pro"], "--num-new-blocks", 2]
    assert convert(*words)[0] == 0
    assert convert("verify", "hf://jo/pro", "--base", "hf://jo/base")[0] == 0
    assert "expanded checkpoint" in convert("inspect", "hf://jo/pro")[1]
    assert convert("merge", "hf://jo/pro", run_dir, tmp_path / "out")[0] == 0
    assert "base_model: jo/base\n" in (tmp_path / "out" / "README.md").read_text()
    first = shutil.copytree(training_checkpoints(run_dir)[0], tmp_path / "first")
    assert convert("merge", "hf://jo/pro", run_dir, first, tmp_path / "two")[0] == 0
    assert "base_model: jo/base\n" in (tmp_path / "two" / "README.md").read_text()
    assert convert("strip", "hf://jo/pro", tmp_path / "back")[0] == 0
    assert convert("to-meta", "hf://jo/base", tmp_path / "meta")[0] == 0
