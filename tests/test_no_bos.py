"""What stands before a text, end to end: the numbers of transformers.

Like SmolLM2's, the tokenizer of most tests names one token as BOS and EOS and puts nothing before a
text. `VARIANTS` puts other things there.
"""

import json
import math
import runpy
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llamapro
from llamapro import evaluate, generate
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave
from llamapro.inference.multiple_choice import read_choices
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.corpus import tokenize
from llamapro.text.template_files import BUILT_IN
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.replay import written_by_base
from llamapro.training.settings import ReplaySettings

END = 256  # "<|endoftext|>", both BOS and EOS
TEXTS = [f"document number {n} is short" for n in range(20)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    write_random_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    byte_level: Callable[..., dict[str, Any]],
) -> Path:
    """A random model of two layers, its generation_config.json, and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("no_bos") / "model"
    sizes = {"num_hidden_layers": 2, "vocab_size": 260, "max_position_embeddings": 64}
    write_random_checkpoint(path, tiny_config(**sizes, bos_token_id=END, eos_token_id=END))
    (path / "tokenizer.model").unlink()
    raw = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    (path / "tokenizer.json").write_text(json.dumps(raw))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"tokenizer_class": "GPT2Tokenizer", **names}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    ends = {"bos_token_id": END, "eos_token_id": [END, 257]}
    (path / "generation_config.json").write_text(json.dumps(ends))
    return path


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def lm_eval_adapter(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """The example's class for lm_eval, without that library, whose names it only inherits."""
    names: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.__main__": {"cli_evaluate": None},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
        "lm_eval.api.registry": {"register_model": lambda _: lambda kind: kind},
        "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
    }
    for name, content in names.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return runpy.run_path(str(root / "examples" / "lm_eval_model.py"))["LlamaProLM"]


def _first(*names: str, last: str = "") -> dict[str, Any]:
    """A post-processor that puts these tokens before a text, and one behind it."""
    ids = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    before, after = ([{"SpecialToken": {"id": n, "type_id": 0}} for n in part if n]
                     for part in (names, [last]))  # fmt: skip
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [*before, texts[0], *after],
        "pair": [*before, *texts, *after],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in ids.items()},
    }


# name: (changes to tokenizer.json, changes to tokenizer_config.json)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "add_bos_token is not read": ({}, {"add_bos_token": True}),
    "BOS that is EOS": ({"post_processor": _first("<|endoftext|>")}, {"add_bos_token": False}),
    "BOS and EOS": (
        {"post_processor": _first("<|im_start|>", last="<|im_end|>")},
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "add_eos_token": True},
    ),
    "two tokens": ({"post_processor": _first("<|im_start|>", "<|im_end|>")}, {"bos_token": None}),
    "a space": ({"pre_tokenizer": {"add_prefix_space": True}}, {"add_prefix_space": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_evaluate_and_training_begin_texts_as_transformers_does(
    checkpoint: Path,
    docs: Path,
    run_command: Run,
    theirs: Any,
    lm_eval_adapter: Callable[[str], Any],
    tmp_path: Path,
    variant: str,
) -> None:
    """The same ids before a prompt, a document that is measured, and one that is trained on.

    An empty prompt starts from the BOS that is named. The EOS that some tokenizers put behind a
    text is no part of a prompt, and ends each document once. The first token of a document is
    predicted from nothing: neither it nor its bytes count.
    """
    model = shutil.copytree(checkpoint, tmp_path / "model")
    for name, changes in zip(("tokenizer", "tokenizer_config"), VARIANTS[variant], strict=True):
        raw = json.loads((model / f"{name}.json").read_text())
        for key, value in changes.items():
            raw[key] = raw[key] | value if isinstance(raw.get(key), dict) else value
        (model / f"{name}.json").write_text(json.dumps(raw))
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = Tokenizer.load(model)

    def ids_of(text: str) -> list[int]:
        ids = tokenizer(text).input_ids
        return ids[:-1] if variant == "BOS and EOS" else ids

    for prompt in ("document number", ""):
        ids = torch.tensor([ids_of(prompt) or [END]])
        ends = {*ours.suffix, END, 257}
        out = theirs.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=[*ends])
        written = out[0, ids.shape[1] :]
        options = ("--prompt", prompt, "--max-new-tokens", 16, "--device", "cpu", "--json")
        result = json.loads(run_command(generate.main, model, *options)[1])
        assert result["text"] == tokenizer.decode(written, skip_special_tokens=True)
        assert result["tokens"] == len(written)
    assert llamapro.generate(llamapro.load(model), "", 16) == result["text"]
    loss_sum, count, size = 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([ids_of(text)])
        with torch.inference_mode():
            loss_sum += theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        size += len(text) - (not ours.prefix and not ours.adds_space)  # a token for each byte
    shown = run_command(evaluate.main, model, "--data", docs, "--device", "cpu", "--json")[1]
    found = json.loads(shown)["files"][str(docs)]
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(loss_sum / count, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(loss_sum / math.log(2) / size, rel=1e-6)
    store = tokenize([str(docs)], ours, tmp_path / "cache")
    expected = [i for text in TEXTS for i in (*ids_of(text), *ours.suffix)]
    assert store.read(0, store.tokens).tolist() == expected
    assert ours.suffix == ([] if variant == "BOS that is EOS" else [tokenizer.eos_token_id])
    adapter = lm_eval_adapter(str(model))
    assert [adapter.tok_encode(text) for text in TEXTS] == [ids_of(text) for text in TEXTS]
    assert adapter.prefix_token_id == (tokenizer.bos_token_id or tokenizer.eos_token_id)
    if variant != "a space":  # said: transformers puts one behind control tokens, too
        turns, source = [{"role": "user", "content": "Hi"}], BUILT_IN["chatml"]
        how = {"chat_template": source, "add_generation_prompt": True}
        expected = tokenizer.apply_chat_template(turns, **how)["input_ids"]
        assert ChatTemplate(source, ours, "chatml").encode_prompt(turns) == expected


def test_questions_have_no_bos(checkpoint: Path, tmp_path: Path) -> None:
    """A prompt that is cut keeps its end only."""
    file, tokenizer = tmp_path / "questions.jsonl", Tokenizer.load(checkpoint)
    rows = [{"prompt": p, "choices": ["yes", "no"], "answer": 0} for p in ("Is it?", "x" * 90)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short, long = read_choices(str(file), tokenizer, 64, 0)
    assert short.prompt == tokenizer.encode("Is it?") and END not in short.prompt
    assert long.is_cut and set(long.prompt) == set(tokenizer.encode("x"))


def test_what_the_base_writes_is_separated_once(
    checkpoint: Path, random_tensors: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    """Documents begin with the separator of training, which also ends the one before."""
    layout = interleave(2, 1)
    expand_checkpoint(Checkpoint.open(checkpoint), tmp_path / "pro", layout)
    expanded, settings = Checkpoint.open(tmp_path / "pro"), ReplaySettings(tokens=2000)
    tokenizer, cpu = Tokenizer.load(tmp_path / "pro"), torch.device("cpu")
    store = written_by_base(
        expanded, tokenizer, settings, 64, tmp_path / "cache", torch.float32, cpu
    )
    ids = store.read(0, 2000)
    starts = np.flatnonzero(ids == END)
    lengths = np.diff(np.append(starts, 2000))
    assert starts[0] == 0 and len(starts) == store.documents
    assert lengths.max() <= 64 and (lengths < 64).sum() > 1
    numbers = [store.document_of(int(start)) for start in starts]
    assert numbers == list(range(store.documents))


def test_another_tool_s_ends_of_text_are_read(checkpoint: Path, tmp_path: Path) -> None:
    """Replay written with more ends than config.json's has a cache entry of its own."""
    shutil.copytree(checkpoint, tmp_path / "base")
    stores = []
    for ends in ([END], [END, 257]):
        text = json.dumps({"eos_token_id": ends})
        (tmp_path / "base" / "generation_config.json").write_text(text)
        pro = tmp_path / f"pro{len(ends)}"
        expand_checkpoint(Checkpoint.open(tmp_path / "base"), pro, interleave(2, 1))
        tokenizer, settings = Tokenizer.load(pro), ReplaySettings(tokens=600)
        stores.append(
            written_by_base(
                Checkpoint.open(pro),
                tokenizer,
                settings,
                64,
                tmp_path,
                torch.float32,
                torch.device("cpu"),
            )
        )
    assert stores[0].path != stores[1].path
    assert 257 in stores[1].index["made_of"][2]["ends"]
    assert "more_ends" not in stores[0].index["made_of"][2]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_another_bos_than_the_tokenizer_s_is_said(
    checkpoint: Path, run_command: Run, tmp_path: Path, name: str
) -> None:
    """An empty text starts from the tokenizer's, in transformers from the file's."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    raw = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps(raw | {"bos_token_id": 7}))
    options = ("--prompt", "", "--max-new-tokens", 1, "--device", "cpu", "--json")
    said = run_command(generate.main, model, *options)[2]
    assert f"bos_token_id is 7 in {name}, but the tokenizer's BOS is token 256" in said
    assert "bos_token_id" not in run_command(generate.main, checkpoint, *options)[2]
