"""benchmarks/train_step.py: its sides compute the same, and it says what they took."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import train_step


@pytest.fixture(scope="module")
def script(root: Path) -> Path:
    """The file of the train_step."""
    return root / "benchmarks" / "train_step.py"


def run(script: Path, *words: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """Starts the benchmark on the CPU, with Triton's interpreter or without."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text())["rows"]


def same_losses(rows: list[dict[str, Any]]) -> None:
    """All rows have the first row's losses, before training and after: to fp32's rounding."""
    for row in rows:
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-5)
        assert row["last_loss"] < row["first_loss"] - 0.01


def test_the_sides_of_a_cpu_train_alike(script: Path, tmp_path: Path) -> None:
    """Without the interpreter: torch and transformers, with the same losses; table and JSON."""
    out = tmp_path / "result.json"
    done = run(script, "--steps", "3", "--warmup", "2", "--out", str(out), interpret=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["side"] for row in result["rows"]] == ["torch", "transformers"]
    same_losses(result["rows"])
    for row in result["rows"]:
        parts = [row[f"{part}_s"] for part in ("forward", "backward", "optimizer")]
        assert all(0 < part < row["step_s"] for part in parts)
        assert row["tokens_per_s"] == pytest.approx(2 * 24 / row["step_s"])
        assert row["peak_memory_gb"] is None and row["side"] in done.stdout
    assert result["rows"][0]["ops"] == "all: cpu (asked for)"
    assert result["versions"].keys() == {"python", "torch", "triton", "transformers"}
    assert all(result["versions"].values()) and result["machine"]["cores"] == os.cpu_count()
    assert result["machine"]["gpu"] is None and "references_tokens_per_s" not in result
    assert result["settings"]["steps"] == 3 and result["settings"]["dtype"] == "float32"
    assert "H800" not in done.stdout  # nothing here compares with a GPU's figures


@pytest.mark.interpreted
def test_the_kernels_train_as_plain_torch_does(script: Path, tmp_path: Path) -> None:
    """In the interpreter, where all five run: the losses are those of PyTorch."""
    out = tmp_path / "result.json"
    words = ["--sides", "triton", "torch", "--steps", "1", "--warmup", "1", "--batch-size", "1"]
    done = run(script, *words, "--out", str(out), interpret=True)
    assert done.returncode == 0, done.stderr
    same_losses(rows(out))
    assert [row["ops"] for row in rows(out)] == [
        "all: triton (asked for)",
        "all: cpu (asked for)",
    ]


def test_triton_is_refused_where_it_cannot_run(script: Path) -> None:
    """With the reason, before anything is built, and exit status 2."""
    done = run(script, "--sides", "torch", "triton", interpret=False)
    assert done.returncode == 2 and "measuring" not in done.stderr
    assert "--sides triton: " in done.stderr and "device is cpu" in done.stderr


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And how to go on without; nobody is told who did not ask for it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    cpu, tiny = train_step.torch.device("cpu"), train_step.SIZES["tiny"]
    for asked in (None, ["torch", "transformers"]):
        with pytest.raises(train_step.ConfigError, match=r"llamapro\[hf\].*--sides triton torch"):
            train_step.choose_sides(asked, tiny, cpu)
    assert train_step.choose_sides(["torch"], tiny, cpu) == ["torch"]


def test_the_full_size_is_the_papers() -> None:
    """LLaMA-2-7B, eight of its blocks once more, and only those train: the paper's 8.3 B."""
    base = train_step.ModelConfig.from_dict(train_step.SIZES["7b"].base)
    layout = train_step.interleave(base.num_hidden_layers, train_step.SIZES["7b"].new_blocks)
    model = train_step.build_on_meta(train_step.expand_config(base, layout, base_sha256=""))
    trainable = train_step.select_trainable(model, "new_blocks")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert layout.new_layers == (4, 9, 14, 19, 24, 29, 34, 39)
    assert sum(sizes.values()) == 6_738_415_616 + 8 * 202_383_360
    assert sum(sizes[name] for name in trainable) == 8 * 202_383_360


def test_a_gpus_table_has_the_references_and_what_did_not_fit() -> None:
    """Labelled as not measured here; a side without memory has a line of its own."""
    fitting = {"side": "triton", "tokens_per_s": 12345.6, "step_s": 0.6636, "peak_memory_gb": 71.25}
    fitting |= {"forward_s": 0.25, "backward_s": 0.4, "optimizer_s": 0.0136}
    fitting |= {"first_loss": 10.4, "last_loss": 10.3}
    result = {
        "machine": {"gpu": "Some GPU"},
        "settings": {
            **{"size": "7b", "num_hidden_layers": 32, "new_blocks": 8, "seq_len": 4096},
            **{"batch_size": 2, "dtype": "bfloat16", "steps": 10},
        },
        "rows": [fitting, {"side": "transformers", "failed": "out of memory"}],
    }
    lines = train_step.render(result).splitlines()
    assert "2 x 4096 tokens a step, bfloat16 on Some GPU" in lines[0]
    assert lines[2].split()[:2] == ["triton", "12,346"] and "71.2" in lines[2]
    assert lines[3].split() == ["transformers", "out", "of", "memory"]
    assert lines[4] == "For reference, not measured here:"
    assert lines[5].split()[0] == "7,850" and lines[6].split()[0] == "14,400"
