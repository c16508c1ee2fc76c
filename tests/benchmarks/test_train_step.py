"""benchmarks/train_step.py: its sides compute the same, and it says what they took."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_step

from llamapro.kernels import device as kernel_device


def command(words: list[str]) -> None:
    """The command with these options, for `run_command`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_step.py", *words])
        train_step.main()


@pytest.mark.slow
@pytest.mark.interpreted
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are not interpreted")
def test_the_sides_of_a_cpu_train_alike(run_command: Callable[..., Any], tmp_path: Path) -> None:
    """All three sides run in the interpreter, with the same losses; table and JSON tell them."""
    out = tmp_path / "result.json"
    words = ["--steps", "1", "--warmup", "1", "--batch-size", "1", "--out", str(out)]
    status, printed, errors = run_command(command, *words)
    assert status == 0, errors
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert [row["side"] for row in rows] == ["triton", "torch", "transformers"]
    for row in rows:
        # Before training and after: to fp32's rounding.
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
        assert row["last_loss"] == pytest.approx(rows[0]["last_loss"], rel=1e-5)
        assert row["last_loss"] < row["first_loss"] - 0.01
        parts = [row[f"{part}_s"] for part in ("forward", "backward", "optimizer")]
        assert all(0 < part < row["step_s"] for part in parts)
        assert row["tokens_per_s"] == pytest.approx(24 / row["step_s"])
        assert row["peak_memory_gb"] is None and row["side"] in printed
    assert rows[0]["ops"] == "all: triton (asked for)"
    assert rows[1]["ops"] == "all: cpu (asked for)"
    assert result["versions"].keys() == {"python", "torch", "triton", "transformers"}
    assert all(result["versions"].values()) and result["machine"]["cores"] == os.cpu_count()
    assert result["machine"]["gpu"] is None
    assert result["settings"]["steps"] == 1 and result["settings"]["dtype"] == "float32"


def test_triton_is_left_out_or_refused_where_it_cannot_run(
    run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left out by default; asked for, it ends the command with the reason and status 2."""
    monkeypatch.setattr(kernel_device, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu, tiny = torch.device("cpu"), train_step.SIZES["tiny"]
    assert train_step.choose_sides(None, tiny, cpu) == ["torch", "transformers"]
    status, _, errors = run_command(command, "--sides", "torch", "triton")
    assert status == 2 and "measuring" not in errors
    assert "--sides triton: " in errors and "device is cpu" in errors


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says how to go on without it; those who did not ask for it see nothing."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    cpu, tiny = torch.device("cpu"), train_step.SIZES["tiny"]
    for asked in (None, ["torch", "transformers"]):
        with pytest.raises(train_step.ConfigError, match=r"\.\[hf\].*--sides triton torch"):
            train_step.choose_sides(asked, tiny, cpu)
    assert train_step.choose_sides(["torch"], tiny, cpu) == ["torch"]


def test_the_full_size_is_the_papers() -> None:
    """It is LLaMA-2-7B with eight new blocks, which alone train: the paper's 8.3 B."""
    base = train_step.ModelConfig.from_dict(train_step.SIZES["7b"].base)
    layout = train_step.interleave(base.num_hidden_layers, train_step.SIZES["7b"].new_blocks)
    model = train_step.build_on_meta(train_step.expand_config(base, layout, base_sha256=""))
    trainable = train_step.select_trainable(model, "new_blocks")
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert layout.new_layers == (4, 9, 14, 19, 24, 29, 34, 39)
    assert sum(sizes.values()) == 6_738_415_616 + 8 * 202_383_360
    assert sum(sizes[name] for name in trainable) == 8 * 202_383_360


def test_a_gpus_table_has_what_did_not_fit() -> None:
    """A side without memory has a line of its own."""
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
    assert lines[3] == "transformers: out of memory"


def test_both_sides_share_a_tied_head() -> None:
    """A base without a head of its own, such as SmolLM2, gives both the same logits."""
    size = train_step.SIZES["tiny"]
    tied = dataclasses.replace(size, base=size.base | {"tie_word_embeddings": True})
    input_ids = torch.arange(8)[None]
    logits = []
    for side in ("torch", "transformers"):
        model = train_step.build_model(side, tied, torch.device("cpu"), torch.float32)
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
        out = model(input_ids)
        logits.append(out if side == "torch" else out.logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
