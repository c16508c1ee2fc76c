"""The Instruct stage: conversations train by the same loop, on the assistant's tokens alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from llamapro import expansion, generate
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import load_state, read_metrics, training_checkpoints
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_template
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge
from llamapro.errors import UserError
from llamapro.inference.chat import Conversation
from llamapro.scripts import train
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.template_files import BUILT_IN, own_template
from llamapro.text.tokenizer import Tokenizer
from llamapro.training import job
from llamapro.training.checks import check
from llamapro.training.preset import parse

TURNS = [("user", "What is {n} + {n}?"), ("assistant", "It is {m}."), ("user", "Sure?")]
TURNS += [("assistant", "Yes: {n} + {n} = {m}.")]


def conversations(count: int) -> list[list[dict[str, str]]]:
    return [
        [{"role": role, "content": text.format(n=n, m=2 * n)} for role, text in TURNS]
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion, a corpus, and 12 + 3 conversations in two forms."""
    home = tmp_path_factory.mktemp("sft")
    config = tiny_config(num_hidden_layers=2, max_position_embeddings=256)
    base = write_random_checkpoint(home / "base", config)
    expand_checkpoint(Checkpoint.open(base), home / "pro", expansion.interleave(2, 1))
    lines = [json.dumps({"messages": messages}) for messages in conversations(12)]
    (home / "train.jsonl").write_text("\n".join(lines))
    names = {"user": "human", "assistant": "gpt"}
    shared = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}
        for messages in conversations(3)
    ]
    (home / "val.json").write_text(json.dumps(shared))
    (home / "corpus.txt").write_text(Path(os.__file__).read_text()[:6000])
    return home


@pytest.fixture
def options(words: Callable[..., list[str]], home: Path) -> Callable[..., list[str]]:
    """`options(run_dir, **changes)`: 4 steps on the conversations."""

    def options(out: Path, **changes: Any) -> list[str]:
        options: dict[str, Any] = {"model.path": home / "pro", "run_dir": out}
        options |= {"data.format": "chat", "data.chat_template": "llama2", "data.seq_len": 160}
        options |= {"data.train": home / "train.jsonl", "data.val": f"chat={home / 'val.json'}"}
        options |= {"data.cache_dir": home / "cache", "train.steps": 4, "train.batch_size": 4}
        options |= {"train.micro_batch_size": 2, "log_every": 1, "eval.every": 2, "save.every": 2}
        return words(options, **changes)

    return options


@torch.no_grad()
def loss_by_hand(path: Path, messages: list[list[dict[str, str]]]) -> tuple[float, int]:
    """Each conversation alone, its trained tokens one by one."""
    model, tokenizer = Checkpoint.open(path).load(), Tokenizer.load(path)
    template = ChatTemplate.load(path, tokenizer, "llama2")
    total, count = 0.0, 0
    for conversation in messages:
        ids, trained = template.encode(conversation)
        scores = model(torch.tensor([ids]))[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if trained[at]:
                total -= scores[at - 1, ids[at]].item()
                count += 1
    return total / count, count


@pytest.mark.parametrize("trainable", ["all", "new_blocks"])
def test_the_loss_is_that_of_the_assistants_tokens(
    trainable: str,
    home: Path,
    options: Callable[..., list[str]],
    train_on: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Of the untrained model, packed, on two processes: each conversation's alone, by hand; it then
    falls, and the start-up shows what trains."""
    done = train_on(2, options(tmp_path / "run", train__trainable=trainable, optim__lr=1e-2))
    records = read_metrics(tmp_path / "run")
    evals = [record for record in records if record["kind"] == "eval"]
    loss, count = loss_by_hand(home / "pro", conversations(3))
    assert evals[0]["loss"] == pytest.approx(loss, rel=1e-5) and evals[0]["tokens"] == count
    assert evals[-1]["loss"] < evals[0]["loss"] - 0.2
    assert "12 conversations, 48 turns" in done.stderr
    assert "sequences of 160 tokens" in done.stderr and "Yes: " in done.stderr
    assert done.stderr.count("⟦") == done.stderr.count("⟧") >= 2


def test_a_template_s_date_is_the_run_s(
    options: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day on which the run began, or the one given: it is recorded, and resuming takes it."""
    clock = tmp_path / "clock.jinja"
    clock.write_text("{{ strftime_now('%d %b %Y %H:%M') }}" + BUILT_IN["llama2"])
    days = iter([datetime(2031, 5, 6, 7, 8), datetime(2031, 5, 9, 7, 8)])

    clock_of_job = SimpleNamespace(now=lambda: next(days), fromisoformat=datetime.fromisoformat)
    monkeypatch.setattr(job, "datetime", clock_of_job)
    changes = {"data__chat_template": clock, "data__cache_dir": tmp_path / "cache"}
    train.main(options(tmp_path / "run", train__steps=2, **changes))
    saved = load_state(training_checkpoints(tmp_path / "run")[-1])
    assert saved["settings"]["data.date"] == "2031-05-06"
    shutil.rmtree(tmp_path / "cache")  # tokenised anew, on another day
    train.main(options(tmp_path / "run", train__steps=4, **changes))
    assert load_state(training_checkpoints(tmp_path / "run")[-1])["step"] == 4
    opened = job.Job.open(parse(options(tmp_path / "new", data__date="2024-07-26", **changes)))
    assert opened.template is not None
    text = opened.template.render([{"role": "user", "content": "hi"}])
    assert text.startswith("26 Jul 2024 00:00")
    with pytest.raises(UserError, match=r"data\.date is '1\.5\.31', expected a day such as"):
        check(parse(options(tmp_path / "new", data__date="1.5.31")), 1)


def test_the_template_of_the_training_is_the_merged_model_s(
    options: Callable[..., list[str]], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the place of one that the model had, so chat and transformers use it unasked.

    `chat` with the run's blocks takes it, too.
    """
    pro = shutil.copytree(home / "pro", tmp_path / "pro")
    file = pro / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "another"}))
    train.main(options(tmp_path / "run", model__path=pro, train__steps=1))
    merge(pro, [tmp_path / "run"], tmp_path / "merged")
    merged, messages = tmp_path / "merged", conversations(1)[0]
    assert own_template(merged) == BUILT_IN["llama2"]
    assert "chat_template" not in json.loads((merged / file.name).read_text())
    theirs = transformers.AutoTokenizer.from_pretrained(merged, local_files_only=True)
    ours = ChatTemplate.load(merged, Tokenizer.load(merged)).render(messages)
    assert theirs.apply_chat_template(messages, tokenize=False) == ours
    assert "apply_chat_template" in (merged / "README.md").read_text()
    used: list[str] = []

    def converse(conversation: Conversation, *_: Any) -> dict[str, Any]:
        used.append(conversation._template.source)
        return {}

    monkeypatch.setattr(generate, "converse", converse)
    for words in ([], ["--skip-new-blocks"], ["--chat-template", "mistral"]):
        blocks = ["--blocks", str(tmp_path / "run"), *words]
        generate.main_chat([str(pro), *blocks], "chat")
    assert used == [BUILT_IN["llama2"], "another", BUILT_IN["mistral"]]


def test_what_ends_an_answer_becomes_an_eos_of_the_merged_model(home: Path, tmp_path: Path) -> None:
    """Other programs stop where generation_config.json says; what it says else, stays."""
    path = shutil.copytree(home / "base", tmp_path / "base")
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ end }}{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant]{% endif %}"
    for end, ends in (("</s>", None), ("<s>", [1, 2])):
        (path / "generation_config.json").write_text('{"temperature": 0.5}')
        write_template(path, f"{{% set end = '{end}' %}}{source}")
        said = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
        assert (said.eos_token_id, said.temperature) == (ends, 0.5)
        assert ChatTemplate.load(path, Tokenizer.load(path)).end_ids() == {1 if ends else 2}


def test_what_cannot_be_used_is_found_before_training(
    options: Callable[..., list[str]], tmp_path: Path
) -> None:
    """By --dry-run, all of it in one message with file and row; nothing is written to the run."""
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"messages": conversations(1)[0]},
        {"text": "no conversation"},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "ho"}]},
    ]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as caught:
        train.main(options(tmp_path / "run", data__train=bad, dry_run=""))
    message = str(caught.value)
    for row in (1, 2, 4, 5):
        assert f"{bad}:{row}: " in message
    assert f"{bad}:3: " not in message and "robot" in message
    assert not (tmp_path / "run").exists()


def test_conversations_that_are_all_too_long_are_named(
    options: Callable[..., list[str]], tmp_path: Path
) -> None:
    """By their corpus, with the settings that help."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "short.jsonl").write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r"^val chat: of 3 .* data\.too_long to 'split'$"):
        train.main(
            options(tmp_path / "run", data__seq_len=40, data__train=tmp_path / "short.jsonl")
        )


def test_a_model_without_a_template_is_told_what_to_give(
    options: Callable[..., list[str]], tmp_path: Path
) -> None:
    """And a template of another model's tokens is refused."""
    for template, expected in (("", "no chat template"), ("llama3", r"<\|start_header_id\|>")):
        words = [*options(tmp_path / "run", dry_run=""), "--data.chat-template", template]
        with pytest.raises(UserError, match=expected):
            train.main(words)


@pytest.mark.slow
def test_the_whole_chain_from_base_to_instruct_model(
    home: Path, root: Path, tmp_path: Path
) -> None:
    """demo/recipe.sh: expand, domain stage, merge, SFT, merge; done again it does nothing twice."""
    small = "--data.seq-len 64 --train.steps 2 --train.batch-size 2"
    small += f" --data.cache-dir {home / 'cache'} --optim.lr 1e-3 --save.every 2 --eval.every 2"
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PROCESSES": "1",
        "NEW_BLOCKS": "1",
        "DOMAIN_OPTIONS": small,
        "SFT_OPTIONS": f"{small} --data.chat-template llama2",
    }
    words = ["bash", str(root / "demo" / "recipe.sh"), str(home / "base"), str(tmp_path / "out")]
    words += [str(home / "corpus.txt"), str(home / "train.jsonl")]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "base intact" in done.stdout
    domain, instruct = (Checkpoint.open(tmp_path / "out" / n) for n in ("domain", "instruct"))
    assert domain.config.expansion is not None and instruct.config.num_hidden_layers == 3
    assert domain.sha256() != instruct.sha256()
    again = run()
    assert again.returncode == 0 and again.stderr.count("is complete: nothing to do") == 2
    few = subprocess.run(words[:3], capture_output=True, text=True)
    assert few.returncode == 2 and "recipe.sh BASE_DIR OUT_DIR" in few.stderr
