"""The whole path on a real checkpoint, through the public commands.

With the tinystories-1m release of LLAMAPRO_SHARED where that is set; else with a release of the
same layout that the test makes, random weights and a tokenizer trained on the spot. Training runs
in processes of its own; the other commands run here, as `llamapro X` would call them.
"""

import contextlib
import io
import json
import shutil
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.__main__ import run_command
from llamapro.checkpoints.base import base_names, layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.meta import to_meta
from llamapro.errors import UserError


def command(name: str, *words: Any) -> str:
    """Runs `llamapro NAME ...` and returns its standard output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_command(name, list(map(str, words)))
    return output.getvalue()


def train(*words: Any) -> None:
    """Runs `llamapro train` in two processes, which the launcher starts from here."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        command("train", "--processes", 2, *words)
    for number, handler in handlers.items():  # the launcher hands signals on to the processes
        signal.signal(number, handler)
    assert ended.value.code == 0


def python_source(modules: list[types.ModuleType]) -> str:
    return "\n".join(Path(str(m.__file__)).read_text(encoding="utf-8") for m in modules)


@pytest.fixture(scope="module")
def release(
    shared: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """Meta's layout: the real one if present."""
    real = shared / "checkpoints" / "tinystories-1m"
    if real.is_dir():
        return real
    made = tmp_path_factory.mktemp("release")
    to_meta(write_random_checkpoint(made / "hf", tiny_config()), made / "meta")
    return made / "meta"


@pytest.fixture(scope="module")
def home(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """from-meta, expand, train on Python source with 2 processes, merge."""
    import dis
    import inspect
    import pydoc
    import tarfile
    import zipfile

    home = tmp_path_factory.mktemp("whole")
    (home / "train.py").write_text(python_source([pydoc, tarfile, zipfile, inspect]))
    (home / "code.py").write_text(python_source([dis])[:12_000])
    (home / "story.txt").write_text(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "sunshine. One day, she saw a big red ball in the park. She was very happy.\n" * 10
    )
    command("from-meta", release, home / "base")
    layers = Checkpoint.open(home / "base").config.num_hidden_layers
    words = [home / "base", home / "pro", "--num-new-blocks", layers]
    assert "bit-equal to the base's" in command("expand", *words)
    options: dict[str, Any] = {
        "--model.path": home / "pro", "--data.train": home / "train.py",
        "--data.seq-len": 128, "--data.cache-dir": home / "cache", "--train.steps": 40,
        "--train.batch-size": 4, "--train.micro-batch-size": 2, "--optim.lr": 6e-3,
        "--eval.every": 40, "--eval.sequences": 12, "--save.every": 20, "--run-dir": home / "run",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--data.val", f"code={home / 'code.py'}", f"story={home / 'story.txt'}"]
    train(*words)
    command("merge", home / "pro", home / "run", home / "merged")
    return home


@torch.no_grad()
def hf_model(path: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(path, local_files_only=True).eval()


def test_greedy_text_is_that_of_transformers(home: Path, release: Path) -> None:
    """The converted weights write, token for token, what Hugging Face writes with them."""
    from llamapro.text.tokenizer import Tokenizer

    words = [home / "base", "--max-new-tokens", 100, "--json"]
    found = json.loads(command("generate", *words))
    ids = torch.tensor([[1]])
    generated = hf_model(home / "base").generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=100, do_sample=False
    )
    text = Tokenizer.load(home / "base").decode(generated[0].tolist())
    assert found["text"] == text
    if "tinystories" in release.name:
        start = "Once upon a time, there was a little girl named Lily. She loved to play outside"
        assert text.startswith(start)


def test_code_loss_falls_by_over_one_nat(home: Path) -> None:
    """Training only the new blocks, with 2 processes, on Python source."""
    records = map(json.loads, (home / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [r["loss"] for r in records if r["kind"] == "eval" and r["set"] == "code"]
    assert losses[-1] < losses[0] - 1


def test_transformers_gives_the_logits_of_the_merged_model(home: Path) -> None:
    """The result is an ordinary checkpoint: Hugging Face loads it and computes the same."""
    model, theirs = Checkpoint.open(home / "merged").load(), hf_model(home / "merged")
    ids = torch.randint(
        model.config.vocab_size, (2, 60), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-5)


def test_every_base_tensor_keeps_its_bytes(home: Path) -> None:
    """In the merged model each base tensor is the base's, and `verify` says so."""
    base, merged = Checkpoint.open(home / "base"), Checkpoint.open(home / "merged")
    assert merged.config.expansion is not None
    layout = layout_of(merged.config)
    names = base_names(merged.tensors, layout)
    assert set(names.values()) == set(base.tensors)
    for name, base_name in names.items():
        assert b"".join(map(bytes, merged.tensors[name].chunks())) == b"".join(
            map(bytes, base.tensors[base_name].chunks())
        )
    found = json.loads(command("verify", home / "merged", "--base", home / "base", "--json"))
    assert found["base_intact"] and found["new_blocks"] == "trained"
    assert found["logits_bit_equal"] is False and found["max_logit_difference"] > 0.01


def test_to_meta_and_back_is_identical(home: Path, release: Path) -> None:
    """Meta -> Hugging Face -> Meta -> Hugging Face: the release's tensors and our files, equal."""
    command("to-meta", home / "base", home / "meta")
    command("from-meta", home / "meta", home / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        assert (home / "again" / name).read_bytes() == (home / "base" / name).read_bytes(), name
    for file in sorted(release.glob("*.pth")):
        before, after = (
            torch.load(f, weights_only=True) for f in (file, home / "meta" / file.name)
        )
        before.pop("rope.freqs", None)  # follows from params.json, and is not written
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
    command("to-meta", home / "merged", home / "merged-meta")
    params = json.loads((home / "merged-meta" / "params.json").read_text())
    assert params["n_layers"] == Checkpoint.open(home / "merged").config.num_hidden_layers


def test_evaluate_puts_base_and_result_side_by_side(home: Path) -> None:
    """Better on code, worse on stories, and greedy text that is rarely what the base would say."""
    words = [home / "merged", "--against", home / "base", "--json"]
    words += ["--data", home / "code.py", home / "story.txt", "--shift-prompts", 4]
    words += ["--shift-new-tokens", 16]
    found = json.loads(command("evaluate", *words))["files"]
    code, story = (found[str(home / name)] for name in ("code.py", "story.txt"))
    assert code["loss"] < code["base"]["loss"] - 1
    assert code["tokens"] == code["base"]["tokens"]
    assert story["bits_per_byte"] > 0
    assert sum(code["shift"][k] for k in ("unshifted", "marginal", "shifted")) == pytest.approx(1)


def test_a_second_domain_expands_the_result_again(home: Path) -> None:
    """The merged model is a base like any other; its record keeps the first generation."""
    command("expand", home / "merged", home / "second", "--after", "0")
    table = json.loads(command("inspect", home / "second", "--json"))
    origins = {row["part"]: row["origin"] for row in table["rows"]}
    assert table["record"]["new_layers"] == [1]
    assert "generation 2" in origins["layer 1"] and "generation 1" in origins["layer 2"]
    assert "base intact" in command("verify", home / "second")


def test_report_draws_the_run(home: Path) -> None:
    """The run directory is all that the report needs."""
    text = command("report", home / "run", "--out", home / "report")
    assert "code" in text and "learned" in text
    assert (home / "report" / "report.png").stat().st_size > 20_000


def test_verify_against_transformers(home: Path) -> None:
    """`verify --hf` runs both on the user's weights; in fp32 they agree to rounding."""
    words = [home / "merged", "--hf", "--json"]
    found = json.loads(command("verify", *words))["hf"]
    assert found["max_logit_difference"] < 1e-5 and found["loss_difference"] < 1e-5
    rounded = json.loads(command("verify", *words, "--dtype", "bfloat16"))["hf"]
    # No further from fp32 than Hugging Face's own bf16 is.
    bound = 1.05 * rounded["hf_vs_hf_fp32_max_logit_difference"]
    assert 0 < rounded["ours_vs_hf_fp32_max_logit_difference"] <= bound


def test_damage_to_the_base_inside_is_found(
    home: Path, tmp_path: Path, flip_bit: Callable[..., None]
) -> None:
    """One flipped byte in a frozen tensor of the merged model."""
    shutil.copytree(home / "merged", tmp_path / "damaged")
    stored = Checkpoint.open(tmp_path / "damaged").tensors["model.layers.0.mlp.up_proj.weight"]
    flip_bit(stored.file, stored.offset)
    with pytest.raises(UserError, match="base weights were changed"):
        command("verify", tmp_path / "damaged")
