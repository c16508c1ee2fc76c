"""The runs that benchmarks/forked_faults.py hurts, and the faults between two of their starts."""

import argparse
import json
import os
import platform
import random
import shutil
from io import BytesIO
from pathlib import Path

import sentencepiece
from fault_judge import STEPS, checkpoints

from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.run import write_manifest
from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.expansion import interleave
from llamapro.training.weights import init_random

DAMAGE = ("flip a bit", "cut a file", "delete a file")
BETWEEN = (*DAMAGE, "half a log line", "stale lock", "leftovers")
VARIANTS = ("text", "replay", "chat")
# What the second of two machines has instead: words of the command line, or its file system.
OTHER_WORDS = {
    "rate": ("--optim.lr", "0.5"), "length": ("--train.steps", "25"),
    "interval": ("--eval.every", "5"), "seed": ("--train.seed", "9"),
    "batch": ("--train.batch-size", "4"),
}  # fmt: skip
OTHER_FILES = {
    "base": "--model.path", "config.json": "--model.path", "tokenizer": "--model.path",
    "cache": "--data.cache-dir", "run directory": "--run-dir",
    "checkpoint of the same name": "--run-dir",
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


# ---- The runs -----------------------------------------------------------------------------------


def prepare(home: Path) -> dict[str, list[str]]:
    """Writes a tiny expanded model and its texts.

    Returns:
        Name of a variant -> options of the command, without its run directory. Two rows a step, and
        no clipping: so one process and two compute the same bits.
    """
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    (home / "train.py").write_text(text, encoding="utf-8")
    (home / "val.py").write_text(text[:8000], encoding="utf-8")
    config = ModelConfig.from_dict(CONFIG)
    tensors = init_random(config, seed=0)
    (home / "base").mkdir()
    write_checkpoint(home / "base", in_memory(tensors))
    write_companions(home / "base", config, [])
    (home / "base" / "tokenizer.model").write_bytes(_train_tokenizer(text))
    (home / "other.model").write_bytes(_train_tokenizer(text[:20_000]))
    expand_checkpoint(Checkpoint.open(home / "base"), home / "pro", interleave(2, 1))
    words = f"--model.path {home / 'pro'} --data.cache-dir {home / 'cache'} --data.seq-len 32 "
    words += f"--train.steps {STEPS} --train.batch-size 2 --train.micro-batch-size 1 "
    words += "--train.device cpu --optim.lr 1e-2 --optim.clip 1e9 --eval.every 6 "
    words += "--eval.sequences 5 --save.every 2 --save.keep 3 --log-every 1 --log-seconds 0 "
    texts = f"--data.train {home / 'train.py'} --data.val code={home / 'val.py'} "
    foreground, background = "--save.background no ", "--save.background yes "
    replay = "--replay.share 0.25 --replay.distill --replay.tokens 600 "
    return {
        "text": (words + texts + foreground).split(),
        "replay": (words + texts + background + replay).split(),
        "chat": (words + _write_chats(home) + foreground).split(),
    }


def _train_tokenizer(text: str) -> bytes:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_writer=model, model_type="bpe",
        vocab_size=CONFIG["vocab_size"], byte_fallback=True, num_threads=1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return model.getvalue()


def _write_chats(home: Path) -> str:
    """Writes conversations from the lines of the corpus; returns the options that train on them."""
    lines = [line.strip() for line in (home / "train.py").read_text().splitlines()]
    lines = [line for line in lines if 10 < len(line) < 40]
    for name, part in (("chats", lines[:300]), ("held-out", lines[300:360])):
        rows = [
            {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
            for a, b in zip(part[::2], part[1::2], strict=True)
        ]
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--data.format chat --data.chat-template llama2 --data.too-long truncate "
    words += f"--data.train {home / 'chats.jsonl'} "
    return words + f"--data.val code={home / 'held-out.jsonl'} "


# ---- Between two starts -------------------------------------------------------------------------


def damage(kind: str, path: Path, rng: random.Random) -> tuple[Path, bytes]:
    """Damages a file of a training checkpoint; returns it, and what it held."""
    file = rng.choice(sorted(path.iterdir()))
    data = file.read_bytes()
    if kind == "delete a file":
        file.unlink()
    elif kind == "cut a file":
        file.write_bytes(data[: rng.randrange(len(data) - 1)])  # more than a last line's end
    else:
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    return file, data


def clutter(kind: str, run_dir: Path, step: int, rng: random.Random) -> None:
    """Leaves behind what a killed process may: half a log line, a lock file, hidden directories."""
    if kind == "half a log line":
        line = json.dumps({"kind": "train", "step": step + 1, "loss": 1.0})
        with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line[: rng.randrange(1, len(line))])
    elif kind == "stale lock":
        (run_dir / ".lock").write_text(f"pid {os.getpid()} on {platform.node()}\n")
    else:
        whole = checkpoints(run_dir)[step]
        for name in (f".step-{step + 1:08d}.partial-{platform.node()}-1", f".{whole.name}.removed"):
            left = whole.with_name(name)
            shutil.copytree(whole, left, dirs_exist_ok=True)
            damage(rng.choice(DAMAGE), left, rng)


# ---- A second machine ---------------------------------------------------------------------------


def differ(kind: str, words: list[str], nodes: Path) -> tuple[list[str], list[str]]:
    """Returns the command lines of two machines, the second of which has something else.

    Where files differ, both name them "thing", in folders node-0 and node-1 of `nodes`.
    """
    shutil.rmtree(nodes, ignore_errors=True)
    there = list(words)
    if kind in OTHER_WORDS:
        return words, [*there, *OTHER_WORDS[kind]]
    at = words.index(OTHER_FILES[kind]) + 1
    here, mine = list(words), Path(words[at])
    here[at] = there[at] = "thing"
    other = nodes / "node-1" / "thing"
    mine.mkdir(exist_ok=True)
    for node in (nodes / "node-0", nodes / "node-1"):
        node.mkdir(parents=True)
    (nodes / "node-0" / "thing").symlink_to(mine)
    if OTHER_FILES[kind] != "--model.path":
        other.mkdir()
    else:
        shutil.copytree(mine, other)
    if kind == "base":
        _change_end(other / "model.safetensors")
    elif kind == "config.json":
        file = other / "config.json"
        file.write_text(file.read_text().replace("1e-05", "1e-06"))
    elif kind == "tokenizer":
        shutil.copyfile(nodes.with_name("other.model"), other / "tokenizer.model")
    elif kind == "checkpoint of the same name" and checkpoints(mine):  # else as "run directory"
        (other / ".lock").symlink_to(mine / ".lock")
        for path in checkpoints(mine).values():
            copy = shutil.copytree(path, other / "checkpoints" / path.name)
            _change_end(copy / "trainable.safetensors")
            (copy / "manifest.json").unlink()
            write_manifest(copy)
    return here, there


def _change_end(file: Path) -> None:
    with open(file, "r+b") as out:
        out.seek(-8, os.SEEK_END)
        out.write(b"\1\2\3\4")
