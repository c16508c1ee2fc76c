"""Evaluation: every token is predicted once, with the loss Hugging Face's model has for it."""

import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import llamapro
from llamapro import evaluate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, ConfigError, DataError
from llamapro.evaluate import Args, evaluate, measure, read_text, windows
from llamapro.inference.distribution_shift import shift, write_greedily
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]

GENERATOR = torch.Generator().manual_seed(7)
TEXT = "def größe(self, parser):\n    return [x for x in parser]  # 日本\n"


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> ModelConfig:
    # No EOS: a random model writes it now and then, and fewer positions would count.
    return tiny_config(max_position_embeddings=32, num_hidden_layers=2, eos_token_id=None)


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Write, config: ModelConfig
) -> Path:
    """A random model of two layers with a context of 32 tokens."""
    return write_random_checkpoint(tmp_path_factory.mktemp("evaluate") / "ckpt", config)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> transformers.LlamaForCausalLM:
    """Hugging Face's model, as it loads the same directory."""
    return transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of several contexts."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def ids(text_file: Path, checkpoint: Path) -> list[int]:
    """Its tokens, BOS first."""
    return Tokenizer.load(checkpoint).encode(text_file.read_text(encoding="utf-8"), bos=True)


@pytest.fixture
def args(checkpoint: Path, text_file: Path) -> Args:
    """Small enough for the small context."""
    return Args(
        checkpoint,
        data=(str(text_file),),
        shift_prompts=4,
        shift_prompt_tokens=8,
        shift_new_tokens=8,
        device="cpu",
    )


def only(result: dict[str, Any]) -> dict[str, Any]:
    """The measurements of the single file."""
    (found,) = result["files"].values()
    assert isinstance(found, dict)
    return found


def their_losses(model: transformers.LlamaForCausalLM, ids: list[int]) -> Tensor:
    """The loss of every token but the first, each given all before it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return F.cross_entropy(logits.float(), torch.tensor(ids[1:]), reduction="none")


# ---- Windows ----------------------------------------------------------------------------------


def test_windows_predict_every_token_once_with_enough_before_it() -> None:
    """This holds for all lengths to 40, contexts to 12 and strides up to the context."""
    for context in range(1, 13):
        for stride in range(1, context + 1):
            for length in range(41):
                predicted: list[int] = []
                for start, end, first in windows(length, context, stride):
                    assert 0 <= start < first <= end < length
                    assert end - start <= context
                    for token in range(first, end + 1):
                        # Those before the first full window have all there is.
                        assert token - start >= min(token, context - stride + 1)
                    predicted += range(first, end + 1)
                assert predicted == list(range(1, length)), (length, context, stride)


def test_windows_move_by_the_stride() -> None:
    """The cost is what was asked for: no more windows than the text needs."""
    assert list(windows(11, 4, 2)) == [(0, 4, 1), (2, 6, 5), (4, 8, 7), (6, 10, 9)]
    assert list(windows(11, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert list(windows(5, 4, 2)) == [(0, 4, 1)]
    assert list(windows(6, 4, 2)) == [(0, 4, 1), (2, 5, 5)]


# ---- Loss -------------------------------------------------------------------------------------


def test_text_shorter_than_the_context_is_plain_cross_entropy(
    args: Args, tmp_path: Path, theirs: transformers.LlamaForCausalLM
) -> None:
    """One window: the mean over all tokens but BOS of transformers' losses."""
    file = tmp_path / "short.txt"
    file.write_text("def f(self)")
    ids = Tokenizer.load(args.dir).encode("def f(self)", bos=True)
    assert 4 < len(ids) < 32
    found = only(evaluate(replace(args, data=(str(file),))))
    losses = their_losses(theirs, ids)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_stride_1_gives_every_token_the_whole_context(
    args: Args, ids: list[int], theirs: transformers.LlamaForCausalLM
) -> None:
    """Each token's loss is transformers' after exactly the 8 tokens before it, or all if fewer."""
    by_hand = [their_losses(theirs, ids[max(0, at - 8) : at + 1])[-1] for at in range(1, len(ids))]
    found = only(evaluate(replace(args, context=8, stride=1)))
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


@pytest.mark.parametrize(("context", "stride"), [(32, 16), (32, 32), (20, 7)])
def test_loss_is_transformers_on_the_same_windows(
    args: Args,
    ids: list[int],
    theirs: transformers.LlamaForCausalLM,
    context: int,
    stride: int,
) -> None:
    """Padding, masking and batching leave the sum over windows as it is window by window."""
    assert len(ids) > 3 * context
    total = 0.0
    for start, end, first in windows(len(ids), context, stride):
        total += their_losses(theirs, ids[start : end + 1])[first - 1 - start :].sum().item()
    found = only(evaluate(replace(args, context=context, stride=stride)))
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-5)


def test_default_is_the_models_context_and_half_of_it_as_stride(args: Args) -> None:
    """0 and 0 stand for 32 and 16, and the result says so."""
    result = evaluate(args)
    assert (result["context"], result["stride"]) == (32, 16)
    assert result["files"] == evaluate(replace(args, context=32, stride=16))["files"]
    assert result["files"] != evaluate(replace(args, context=32, stride=32))["files"]


def test_batch_size_does_not_change_the_result(args: Args) -> None:
    """Losses agree up to the order of fp32 sums."""
    losses = [only(evaluate(replace(args, batch_size=n)))["loss"] for n in (1, 2, 5, 100)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_uniform_model_has_the_loss_and_bits_worked_out_by_hand(
    args: Args, model: LlamaForCausalLM, config: ModelConfig, ids: list[int], text_file: Path
) -> None:
    """Logits of 0 over 400 tokens: ln 400 a token, log2(400) * tokens / bytes of UTF-8 a byte."""
    uniform = build_on_meta(config)
    weights = model.state_dict()
    load_tensors(uniform, weights | {"lm_head.weight": torch.zeros(400, config.hidden_size)})
    text = read_text(str(text_file), Tokenizer.load(args.dir), "text")
    found = measure(uniform, text, 32, 16, 8)
    predicted, size = len(ids) - 1, text_file.stat().st_size
    assert text.bytes == size > len(TEXT * 4)
    assert found["loss"] == pytest.approx(math.log(400), rel=1e-6)
    assert found["perplexity"] == pytest.approx(400, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(400) * predicted / size, rel=1e-6)


def test_documents_of_a_jsonl_file_are_kept_apart(
    args: Args, tmp_path: Path, theirs: transformers.LlamaForCausalLM
) -> None:
    """Each line starts from BOS and sees nothing of the line before it; no EOS is predicted."""
    texts = ["def f(self)", "return [x for x in parser]"]
    file = tmp_path / "two.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.load(args.dir)
    apart = torch.cat([their_losses(theirs, tokenizer.encode(t, bos=True)) for t in texts])
    found = only(evaluate(replace(args, data=(str(file),), text_key="body")))
    assert found["tokens"] == len(apart)
    assert found["loss"] == pytest.approx(apart.mean().item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(
        apart.sum().item() / math.log(2) / sum(map(len, texts)), rel=1e-5
    )


def test_each_argument_is_measured_by_itself(args: Args, tmp_path: Path) -> None:
    """Two files and a folder that holds both: three results; tokens add up."""
    names = []
    for name, text in {"a.txt": "def f(self)", "b.txt": "return parser"}.items():
        (tmp_path / name).write_text(text)
        names.append(str(tmp_path / name))
    files = evaluate(replace(args, data=(*names, str(tmp_path))))["files"]
    a, b, both = files[names[0]], files[names[1]], files[str(tmp_path)]
    assert both["tokens"] == a["tokens"] + b["tokens"]
    total = a["loss"] * a["tokens"] + b["loss"] * b["tokens"]
    assert both["loss"] * both["tokens"] == pytest.approx(total, rel=1e-6)


# ---- Against a base ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expanded(tmp_path_factory: pytest.TempPathFactory, model: LlamaForCausalLM) -> Path:
    """The checkpoint with two new blocks that nothing has trained."""
    path = tmp_path_factory.mktemp("expanded") / "ckpt"
    llamapro.save(llamapro.expand(model, 2), path)
    return path


@pytest.mark.parametrize("tuned", ["checkpoint", "expanded"])
def test_untouched_model_against_its_base_shows_no_change(
    args: Args, tuned: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base against itself, or its expansion against it: the same to the bit, 100 % unshifted."""
    monkeypatch.setattr(command, "end_ids", lambda *_: set())  # all positions count
    path = request.getfixturevalue(tuned)
    result = evaluate(replace(args, dir=path, against=args.dir))
    found = only(result)
    assert found["base"] == {key: found[key] for key in found["base"]}
    assert set(found["base"]) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert found["shift"] == {"unshifted": 1.0, "marginal": 0.0, "shifted": 0.0, "positions": 32}
    shown = command.render(result)
    assert "changed 0.0000 nats per token" in shown and "unshifted 100.0%" in shown


@torch.no_grad()
def test_trained_model_is_told_apart_from_its_base(
    args: Args, expanded: Path, tmp_path: Path
) -> None:
    """Change the new blocks: base keeps its loss, this has its own, some tokens are shifted."""
    trained, path = llamapro.load(expanded), tmp_path / "trained"
    for parameter in llamapro.train_only_new(trained):
        parameter += 0.2 * torch.randn(parameter.shape, generator=GENERATOR)
    llamapro.save(trained, path)
    result = evaluate(replace(args, dir=path, against=args.dir))
    found, alone = only(result), only(evaluate(args))
    assert found["base"] == alone
    assert found["loss"] != alone["loss"]
    shares = found["shift"]
    assert shares["unshifted"] < 1
    assert shares["unshifted"] + shares["marginal"] + shares["shifted"] == pytest.approx(1)
    verdict = "learned" if found["loss"] < alone["loss"] else "forgot"
    difference = abs(found["loss"] - alone["loss"])
    assert f"{verdict} {difference:.4f} nats per token" in command.render(result)


class Table(nn.Module):
    """A base whose logits depend on the last token alone: one row of a table."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.lm_head = nn.Linear(1, 1)
        self.logits = logits

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits[ids]


def ranked(
    prompts: list[list[int]], chosen: list[list[int]], ends: Collection[int] = ()
) -> dict[str, float]:
    # After token t, the likeliest is t, then t + 1, and so on around the five tokens.
    logits = torch.stack([-((torch.arange(5) - t) % 5).float() for t in range(5)])
    samples = (torch.tensor(prompts), torch.tensor(chosen))
    return shift(Table(logits), samples, ends)  # type: ignore[arg-type]


def test_shift_counts_ranks_in_the_base() -> None:
    """Ranks 1 2 3 4 and 1 1 5 2 by construction: 3 unshifted, 3 marginal, 2 shifted of 8."""
    found = ranked([[3, 0], [1, 4]], [[0, 1, 3, 1], [4, 4, 3, 4]])
    assert found == {"unshifted": 3 / 8, "marginal": 3 / 8, "shifted": 2 / 8, "positions": 8}


def test_shift_leaves_out_what_follows_the_end_of_a_document() -> None:
    """Ranks 1 2 and, at EOS, 3; the fourth token is of no text. The other row goes on."""
    found = ranked([[0], [0]], [[0, 1, 3, 2], [0, 0, 0, 0]], ends={3})
    assert found["positions"] == 7
    assert found["unshifted"] == 5 / 7 and found["marginal"] == 2 / 7


def test_equal_logits_share_the_best_rank() -> None:
    """A token as likely as the likeliest is not shifted."""
    samples = (torch.tensor([[0]]), torch.tensor([[4, 2]]))
    found = shift(Table(torch.zeros(5, 5)), samples, ())  # type: ignore[arg-type]
    assert found["unshifted"] == 1.0


def test_prompts_are_cut_evenly_and_continued_greedily(
    model: LlamaForCausalLM, args: Args, text_file: Path, ids: list[int]
) -> None:
    """Prompts are pieces of the text from all its length; a text too short gives none."""
    text = read_text(str(text_file), Tokenizer.load(args.dir), "text")
    samples = write_greedily(model, text.documents, 4, 8, 6)
    assert samples is not None
    prompts, continuations = samples
    places = len(ids) // 8
    starts = [i * places // 4 * 8 for i in range(4)]
    assert prompts.tolist() == [ids[start : start + 8] for start in starts]
    whole = torch.cat((prompts, continuations), dim=1)
    with torch.no_grad():
        logits = model(whole[:, :-1])
    assert isinstance(logits, Tensor)
    assert torch.equal(continuations, logits[:, 7:].argmax(-1))
    assert write_greedily(model, text.documents, 4, len(ids) + 1, 6) is None


def test_file_too_short_for_a_prompt_has_no_shift(args: Args, tmp_path: Path) -> None:
    """Its losses are still measured, and the table is still printed."""
    file = tmp_path / "short.txt"
    file.write_text("if")
    result = evaluate(replace(args, data=(str(file),), against=args.dir))
    assert only(result)["shift"] is None
    assert only(result)["base"]["tokens"] == only(result)["tokens"]
    assert "short.txt" in command.render(result)


# ---- Questions --------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> str:
    """Six short prompts with two choices, of which the first is right."""
    file = tmp_path / "law.jsonl"
    choices = [["self", "parser"], ["x", "return x"], ["no", "for x in parser"]] * 2
    rows = [{"prompt": f"def {i}(", "choices": c, "answer": 0} for i, c in enumerate(choices)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_questions_alone_need_no_data(args: Args, questions: str, run: Run) -> None:
    """Only --choices: no text is measured, and --against asks for no room for the shift."""
    options = ("--choices", questions, "--shots", 1, "--against", args.dir, "--json")
    status, shown, _ = run(args.dir, *options)
    assert status == 0
    result = json.loads(shown)
    assert result["files"] == {}
    found = result["choices"][questions]
    marks = {"accuracy", "accuracy_sum", "stderr"}
    assert set(found["base"]) == marks
    shared = {"questions", "cut", "chance", "majority", "base", "gained", "lost"}
    assert set(found) == marks | shared
    assert (found["questions"], found["chance"], found["majority"]) == (5, 0.5, 1.0)
    assert (found["gained"], found["lost"]) == (0, 0)
    assert found["base"] == {key: found[key] for key in marks}
    lines = command.render(result).splitlines()
    assert len(lines) == 5 and "perplexity" not in lines[1] and "per token" in lines[1]


def test_answers_are_compared_with_the_bases_one_by_one(
    args: Args, questions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This: right right wrong; base: wrong wrong right. Two gained, one lost; texts beside."""
    answers = iter(
        [({"accuracy": 2 / 3}, [True, True, False]), ({"accuracy": 1 / 3}, [False, False, True])]
    )
    monkeypatch.setattr(command, "measure_choices", lambda *_: next(answers))
    result = evaluate(replace(args, choices=(questions,), against=args.dir))
    found = result["choices"][questions]
    assert (found["accuracy"], found["base"]) == (2 / 3, {"accuracy": 1 / 3})
    assert (found["gained"], found["lost"]) == (2, 1)
    assert only(result)["tokens"] > 0


def test_context_and_batch_size_hold_for_questions_too(args: Args, questions: str) -> None:
    """Prompts are cut to --context; how many are computed at once changes nothing."""
    asked = replace(args, data=(), choices=(questions,), context=16, shots=2)
    found = [evaluate(replace(asked, batch_size=n))["choices"][questions] for n in (1, 8)]
    assert found[0] == found[1]
    assert found[0]["cut"] == 4
    assert evaluate(replace(asked, shots=0))["choices"][questions]["cut"] == 0


# ---- The command ------------------------------------------------------------------------------


@pytest.fixture
def run(run_command: Run) -> Run:
    """`run(*arguments) -> (exit status, stdout, stderr)` of the command."""
    return lambda *arguments: run_command(command.main, *arguments, "--device", "cpu")


def test_command_prints_one_json_object(
    checkpoint: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, run_command: Run
) -> None:
    """`python -m llamapro.evaluate --json`: files and their four numbers, progress elsewhere."""
    line = ["evaluate", checkpoint, "--data", text_file, "--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", list(map(str, line)))
    monkeypatch.delitem(sys.modules, "llamapro.evaluate")  # runpy warns of a module run twice
    status, shown, notes = run_command(
        lambda _: runpy.run_module("llamapro.evaluate", run_name="__main__", alter_sys=True)
    )
    assert status == 0
    result = json.loads(shown)
    assert shown.count("\n") == 1
    assert set(result) == {"model", "against", "context", "stride", "files", "choices"}
    assert result["choices"] == {}
    assert (result["model"], result["against"]) == (str(checkpoint), None)
    assert set(result["files"]) == {str(text_file)}
    assert set(only(result)) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    assert f"{text_file}: 1 documents" in notes


def test_command_prints_a_table(run: Run, args: Args, text_file: Path) -> None:
    """One row a file, with the numbers of the result."""
    found = only(evaluate(args))
    status, shown, _ = run(args.dir, "--data", text_file)
    assert status == 0
    row = next(line for line in shown.splitlines() if line.startswith(str(text_file)))
    expected = ["this", str(found["tokens"]), f"{found['loss']:.4f}", f"{found['perplexity']:.3f}"]
    assert row.split()[1:] == [*expected, f"{found['bits_per_byte']:.4f}"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "33"], "--context 33"),
        (["--context", "-1"], "--context -1"),
        (["--context", "8", "--stride", "9"], "--stride 9"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--shift-new-tokens", "0"], "--shift"),
        (["--choices", "x", "--shots", "-1"], "--shots -1"),
        (["--shots", "1"], "--shots 1: expected 0 or more, with --choices"),
        (["--against", "{dir}"], "--shift-prompt-tokens 32 and --shift-new-tokens 64"),
        (["--against", "nowhere"], "nowhere"),
        (["--text-key"], "--text-key"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_wrong_options_exit_2(
    run: Run,
    checkpoint: Path,
    text_file: Path,
    options: list[str],
    told: str,
) -> None:
    """One message on standard error names the option and the value; no traceback, no result."""
    options = [option.format(dir=checkpoint) for option in options]
    status, shown, message = run(checkpoint, "--data", text_file, *options)
    assert (status, shown) == (2, "")
    assert told in message
    assert "Traceback" not in message


def test_no_data_exits_2(run: Run, checkpoint: Path) -> None:
    """Neither an absent --data nor one with nothing after it measures anything."""
    for options in ([], ["--data"], ["--choices"]):
        status, shown, message = run(checkpoint, *options)
        assert (status, shown) == (2, "")
        assert "--data: name at least one file, folder or glob" in message


def test_all_wrong_options_come_in_one_message(args: Args) -> None:
    """Three impossible options, three complaints."""
    with pytest.raises(ConfigError) as caught:
        evaluate(replace(args, context=99, stride=100, batch_size=0))
    for option in ("--context 99", "--stride 100", "--batch-size 0"):
        assert option in str(caught.value)


def test_files_that_cannot_be_used_are_named(args: Args, tmp_path: Path) -> None:
    """Missing file, missing key, empty text, missing checkpoint."""
    lines, empty = tmp_path / "x.jsonl", tmp_path / "empty.txt"
    lines.write_text('{"content": "x"}\n')
    empty.touch()
    with pytest.raises(DataError, match="none"):
        evaluate(replace(args, data=(str(tmp_path / "none.txt"),)))
    with pytest.raises(DataError, match=r"x\.jsonl:1: no 'text' key"):
        evaluate(replace(args, data=(str(lines),)))
    with pytest.raises(ConfigError, match=r"empty\.txt: has no token to predict"):
        evaluate(replace(args, data=(str(empty),)))
    with pytest.raises(CheckpointError, match="nowhere"):
        evaluate(replace(args, dir=tmp_path / "nowhere"))


def test_base_with_another_tokenizer_is_refused(
    args: Args, tmp_path: Path, train_tokenizer: Callable[..., bytes]
) -> None:
    """Losses per token and ranks cannot be compared across tokenizers."""
    other = tmp_path / "other"
    shutil.copytree(args.dir, other)
    (other / "tokenizer.model").write_bytes(train_tokenizer([TEXT * 9], 300))
    with pytest.raises(ConfigError, match=r"other: its tokenizer is not that of"):
        evaluate(replace(args, against=other))


def test_base_with_a_shorter_context_is_refused(args: Args, tmp_path: Path) -> None:
    """The default context is the tuned model's: a base of 16 positions cannot be measured so."""
    short = tmp_path / "short"
    shutil.copytree(args.dir, short)
    raw = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(raw | {"max_position_embeddings": 16}))
    with pytest.raises(ConfigError, match=r"--context 32: .*short takes 1 to 16"):
        evaluate(replace(args, against=short))
    assert only(evaluate(replace(args, against=short, context=16)))["base"]["tokens"] > 0
