"""Generation: what is drawn, how it is shown, and when it stops."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llamapro
from llamapro import generate as command
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.inference.sampling import generate
from llamapro.model import LlamaForCausalLM
from llamapro.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_random_checkpoint: Write, tiny_config: Config
) -> Path:
    """A random model with a context of 48 tokens, and no end of document to stop at."""
    path = tmp_path_factory.mktemp("generate") / "ckpt"
    config = tiny_config(max_position_embeddings=48, eos_token_id=None)
    write_random_checkpoint(path, config)
    (path / "tokenizer_config.json").write_text('{"eos_token": null}')
    return path


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LlamaForCausalLM:
    return Checkpoint.open(checkpoint).load()


@pytest.fixture
def run(run_command: Run) -> Run:
    """`run(*arguments) -> (exit status, stdout, stderr)` of the command."""
    return lambda *arguments: run_command(command.main, *arguments, "--device", "cpu")


def change_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in `config.json`."""
    shutil.copytree(source, target)
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(raw | changes))
    return target


def test_same_seed_same_text_other_seed_other_text(checkpoint: Path, run: Run) -> None:
    """The seed alone decides what is drawn."""
    options = (checkpoint, "--prompt", "def", "--max-new-tokens", 20, "--temperature", 1.5)
    first, again, other = (run(*options, "--seed", seed)[1] for seed in (3, 3, 4))
    assert first == again != other
    assert run(*options, "--top-p", 1e-6)[1] == run(*options[:-1], 0)[1]


@pytest.mark.parametrize("prompt", ["größe 日本語 ∞", "  two\n\nlines "])
def test_text_shown_as_it_is_written_is_the_decoded_whole(
    checkpoint: Path, model: LlamaForCausalLM, run: Run, prompt: str
) -> None:
    """Prompt and pieces joined are the decoding of all ids, broken characters included."""
    tokenizer = Tokenizer.load(checkpoint)
    prompt_ids = tokenizer.encode(prompt, bos=True)
    broken = 0
    for seed in range(2):  # a random model's bytes are rarely characters
        steps = generate(model, torch.tensor([prompt_ids]), 20, 2.0, 1.0, seed)
        ids = [int(token) for token in steps]
        options = ("--temperature", 2.0, "--seed", seed, "--max-new-tokens", 20)
        status, shown, _ = run(checkpoint, "--prompt", prompt, *options)
        assert status == 0
        assert shown == tokenizer.decode(prompt_ids + ids) + "\n"
        broken += shown.count("\N{REPLACEMENT CHARACTER}")
    assert broken, "no continuation held a broken character: the claim was not tested"


def test_pieces_appear_one_by_one(
    checkpoint: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is written and flushed while the next tokens are still to come."""
    seen: list[str] = []

    def note(piece: str, end: str = "\n", flush: bool = False, file: Any = None) -> None:
        if file is None:
            seen.append(piece + end)
            assert flush

    monkeypatch.setattr(command, "print", note, raising=False)
    tokenizer = Tokenizer.load(checkpoint)
    args = command.Args(checkpoint, prompt="def", max_new_tokens=10)
    result = command.continue_prompt(Checkpoint.open(checkpoint), tokenizer, args)
    assert len([piece for piece in seen if piece.strip()]) > 5
    assert "".join(seen) == "def" + result["text"] + "\n"


def test_empty_prompt_starts_from_bos(checkpoint: Path, model: LlamaForCausalLM, run: Run) -> None:
    """The continuation is that of the BOS token alone; no --prompt means the same."""
    ids = [int(token) for token in generate(model, torch.tensor([[1]]), 8)]
    expected = Tokenizer.load(checkpoint).decode([1, *ids]) + "\n"
    assert run(checkpoint, "--max-new-tokens", 8)[:2] == (0, expected)
    assert run(checkpoint, "--prompt", "", "--max-new-tokens", 8)[:2] == (0, expected)


def test_full_context_stops_with_a_note(checkpoint: Path, run: Run) -> None:
    """48 positions, less the prompt's: that many tokens are written, and the note says why."""
    prompt = len(Tokenizer.load(checkpoint).encode("def f", bos=True))
    _, shown, note = run(checkpoint, "--prompt", "def f", "--json")
    assert json.loads(shown)["tokens"] == 48 - prompt
    assert "\ncontext full, " in note
    _, shown, note = run(checkpoint, "--prompt", "def f", "--json", "--max-new-tokens", 5)
    assert json.loads(shown)["tokens"] == 5
    assert "context full" not in note


@pytest.mark.parametrize("source", ["config", "generation_config", "tokenizer"])
def test_every_file_that_names_an_eos_ends_the_text(
    checkpoint: Path, model: LlamaForCausalLM, run: Run, tmp_path: Path, source: str
) -> None:
    """Each alone ends the text of the command and of `api.generate`; the EOS gives no text."""
    tokenizer = Tokenizer.load(checkpoint)
    prompt = tokenizer.encode("def", bos=True)
    written = [int(token) for token in generate(model, torch.tensor([prompt]), 12)]
    at = next(n for n, token in enumerate(written) if n > 2 and token not in written[:n])
    eos = written[at]
    ends = change_config(checkpoint, tmp_path / "ends")
    if source == "config":
        ends = change_config(checkpoint, tmp_path / "listed", eos_token_id=[0, eos])
    elif source == "generation_config":
        (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, eos]}))
    else:
        name = "<|im_end|>"
        added = {str(eos): {"content": name, "special": True}}
        names = {"eos_token": name, "added_tokens_decoder": added}
        (ends / "tokenizer_config.json").write_text(json.dumps(names))
    _, shown, note = run(ends, "--prompt", "def", "--json")
    result = json.loads(shown)
    assert result["tokens"] == at + 1 and "context full" not in note
    assert "def" + result["text"] == tokenizer.decode(prompt + written[:at])
    text = llamapro.generate(llamapro.load(ends), "def", 12)
    assert text == llamapro.generate(llamapro.load(checkpoint), "def", at)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": [2.5]}']
)
def test_a_damaged_generation_config_is_one_message(
    checkpoint: Path, run: Run, tmp_path: Path, content: str
) -> None:
    """It names the file, before anything is loaded or shown."""
    broken = change_config(checkpoint, tmp_path / "broken")
    (broken / "generation_config.json").write_text(content)
    status, shown, note = run(broken, "--prompt", "def")
    assert (status, shown, note.count("\n")) == (2, "", 1)
    assert "generation_config.json" in note


# ---- What generation_config.json says of sampling -------------------------------------------

LINE = " from generation_config.json"


def test_generate_draws_as_the_model_says(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    """The text is that of the same options; --temperature 0 and `llamapro.generate` are greedy."""
    own = change_config(checkpoint, tmp_path / "own")
    (own / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 1.5, "top_p": 0.95}'
    )
    line = f"temperature 1.5, top_p 0.95{LINE}\n"
    common = ["--prompt", "de", "--max-new-tokens", 8]
    greedy, drawn = run(checkpoint, *common), run(own, *common)
    options = ("--temperature", 1.5, "--top-p", 0.95)
    assert drawn[0] == 0 and drawn[1] == run(checkpoint, *common, *options)[1] != greedy[1]
    assert drawn[2].count(line) == 1 and line not in greedy[2]
    assert run(own, *common, "--temperature", 0)[1] == greedy[1]
    assert "de" + llamapro.generate(llamapro.load(own), "de", 8) + "\n" == greedy[1]


@pytest.mark.parametrize(
    "content",
    [
        {"do_sample": "yes"},
        {"do_sample": True, "temperature": -1},
        {"do_sample": True, "temperature": "0.6"},
        {"do_sample": True, "temperature": True},
        {"do_sample": True, "temperature": 10**400},
        {"do_sample": True, "top_p": 0},
        {"do_sample": True, "top_p": math.nan},
    ],
    ids=str,
)
def test_impossible_sampling_settings_of_a_model_are_one_message(
    checkpoint: Path, run: Run, tmp_path: Path, content: dict[str, Any]
) -> None:
    """It names the file, the field, the value and what is expected."""
    broken = change_config(checkpoint, tmp_path / "broken")
    (broken / "generation_config.json").write_text(json.dumps(content))
    status, shown, note = run(broken, "--prompt", "def")
    assert (status, shown, note.count("\n")) == (2, "", 1)
    name = list(content)[-1]
    assert re.search(rf"generation_config\.json: {name} is .*, expected ", note)


def test_json_is_one_object_with_the_same_text(checkpoint: Path, run: Run) -> None:
    """Standard output is one JSON object, speed included; notes go to standard error."""
    options = (checkpoint, "--prompt", "größe", "--max-new-tokens", 9)
    status, shown, note = run(*options, "--json")
    result = json.loads(shown)
    assert (status, shown.count("\n")) == (0, 1)
    assert set(result) == {"prompt", "text", "tokens", "tokens_per_s"}
    assert (result["prompt"], result["tokens"]) == ("größe", 9)
    assert result["tokens_per_s"] > 0
    assert "9 tokens, " in note and "tokens/s" in note
    assert run(*options)[1] == "größe" + result["text"] + "\n"


def test_tokenizer_of_another_vocabulary_is_refused(
    tmp_path: Path, write_random_checkpoint: Write, tiny_config: Config, run: Run
) -> None:
    """A model of 300 tokens with a tokenizer of 400 would meet ids it has no row for."""
    path = write_random_checkpoint(tmp_path / "small", tiny_config(vocab_size=300))
    status, shown, message = run(path, "--prompt", "def")
    assert (status, shown) == (2, "")
    assert "400 tokens" in message and "300" in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "0"], "--top-p 0"),
        (["--top-p", "1.1"], "--top-p 1.1"),
        (["--top-p", "nan"], "--top-p nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--system", "Be brief."], "--system: is of use with --chat only"),
        (["--chat-template", "llama2"], "--chat-template: is of use with --chat only"),
        (["--seed", str(1 << 64)], f"--seed {1 << 64}"),
        (["--prompt", "x " * 48], "--prompt has"),
        (["--prompt", "caf\udce9"], "not valid Unicode"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--dtype", "int8"], "--dtype"),
        (["--promt", "x"], "--prompt"),
    ],
)
def test_wrong_options_exit_2(checkpoint: Path, run: Run, options: list[str], told: str) -> None:
    """One message on standard error names the option and the value; nothing is written."""
    status, shown, message = run(checkpoint, *options)
    assert (status, shown) == (2, "")
    assert told in message
    assert "Traceback" not in message


def test_all_wrong_options_come_in_one_message(checkpoint: Path, run: Run) -> None:
    """Two impossible options, two complaints."""
    _, _, message = run(checkpoint, "--top-p", 2, "--max-new-tokens", 0)
    assert "--top-p 2" in message and "--max-new-tokens 0" in message


def test_missing_files_exit_2(checkpoint: Path, run: Run, tmp_path: Path) -> None:
    """No directory, and a directory without tokenizer: each is named."""
    assert run(tmp_path / "none")[0] == 2
    bare = change_config(checkpoint, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    status, shown, message = run(bare)
    assert (status, shown) == (2, "")
    assert str(bare) in message and "tokenizer.model" in message


def test_prompt_that_fills_the_context_is_refused(checkpoint: Path, run: Run) -> None:
    """48 tokens leave room for none, 47 for one."""
    tokenizer = Tokenizer.load(checkpoint)
    prompt = "7" * 100  # digits are tokens of their own
    while len(tokenizer.encode(prompt, bos=True)) > 48:
        prompt = prompt[:-1]
    assert len(tokenizer.encode(prompt, bos=True)) == 48
    status, _, message = run(checkpoint, "--prompt", prompt)
    assert status == 2 and "48 tokens" in message and "shorten" in message
    status, shown, _ = run(checkpoint, "--prompt", prompt[:-1], "--json")
    assert status == 0 and json.loads(shown)["tokens"] == 1


def test_command_runs_as_a_module(checkpoint: Path, root: Path) -> None:
    """`python -m llamapro.generate` writes the text."""
    line = [sys.executable, "-m", "llamapro.generate", str(checkpoint), "--prompt", "größe"]
    line += ["--device", "cpu", "--max-new-tokens", "3"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("größe")
