"""Good inputs of every kind that a user can be handed, and the command that reads each."""

import gzip
import json
import lzma
import runpy
import shutil
from pathlib import Path

from llamapro.checkpoints.directory import INDEX_FILE, SINGLE_FILE
from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import tokenizer_files, write_companions
from llamapro.training.weights import init_random

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
SMALL = ("--device", "cpu", "--json", "--max-new-tokens", "2", "--prompt", "a <s> b\n")
TRAIN = (
    *("--model.path", "pro", "--data.seq-len", "48", "--train.steps", "2", "--train.batch-size"),
    *("2", "--data.cache-dir", "cache"),
)
EVALUATE = ("evaluate", "base", "--device", "cpu", "--json")
# kind: (the file that is changed, the command); in a folder of good inputs
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "config.json": ("pro/config.json", ("generate", "pro", *SMALL)),
    "config.json, inspect": ("pro/config.json", ("inspect", "pro")),
    "generation_config.json": ("base/generation_config.json", ("generate", "base", *SMALL)),
    "tokenizer.model": ("base/tokenizer.model", ("generate", "base", *SMALL)),
    "tokenizer.json": ("json/tokenizer.json", ("generate", "json", *SMALL)),
    "tokenizer_config.json": ("json/tokenizer_config.json", ("generate", "json", *SMALL)),
    "special_tokens_map.json": ("json/special_tokens_map.json", ("generate", "json", *SMALL)),
    "added_tokens.json": ("json/added_tokens.json", ("generate", "json", *SMALL)),
    "chat_template.jinja": ("base/chat_template.jinja", ("chat", "base", *SMALL)),
    "index": (f"shards/{INDEX_FILE}", ("generate", "shards", *SMALL)),
    "safetensors": (f"base/{SINGLE_FILE}", ("generate", "base", *SMALL)),
    "params.json": ("meta/params.json", ("from-meta", "meta", "out")),
    ".pth": ("meta/consolidated.00.pth", ("from-meta", "meta", "out")),
    "GGUF": ("m.gguf", ("from-gguf", "m.gguf", "out")),
    "new blocks": (
        "run/checkpoints/step-00000002/trainable.safetensors",
        ("merge", "pro", "run/checkpoints/step-00000002/trainable.safetensors", "out"),
    ),
    "manifest": ("run/checkpoints/step-00000002/manifest.json", ("merge", "pro", "run", "out")),
    "state": (
        "run/checkpoints/step-00000002/state.json",
        ("train", *TRAIN, "--run-dir", "run", "--data.train", "rows.jsonl"),
    ),
    "metrics": ("run/metrics.jsonl", ("report", "run")),
    "preset": ("preset.toml", ("train", "--config", "preset.toml", "--dry-run")),
    "adapter_config.json": ("adapter/adapter_config.json", ("inspect", "adapter")),
    **{
        f"rows{suffix}": (f"rows{suffix}", (*EVALUATE, "--data", f"rows{suffix}"))
        for suffix in (".jsonl", ".json", ".csv", ".parquet", ".ndjson.gz", ".txt.gz", ".txt.xz")
    },
    "questions": ("questions.jsonl", (*EVALUATE, "--choices", "questions.jsonl")),
    **{
        f"chats{suffix}": (
            f"chats{suffix}",
            (
                *("train", *TRAIN, "--data.format", "chat", "--data.chat-template"),
                *("base/chat_template.jinja", "--data.train", f"chats{suffix}", "--run-dir", "new"),
            ),
        )
        for suffix in (".jsonl", ".parquet")
    },
}
# What makes the other good inputs of those that `write_good` writes.
MAKE = (
    ("expand", "base", "pro", "--num-new-blocks", "1"),
    ("to-meta", "base", "meta"),
    ("train", *TRAIN, "--run-dir", "run", "--data.train", "rows.jsonl"),
)


def write_good(root: Path) -> None:
    """Writes good inputs of every kind into a folder, but those that `MAKE` makes of them."""
    import pyarrow
    import pyarrow.parquet

    tests = Path(__file__).resolve().parents[1] / "tests"
    shared = runpy.run_path(str(tests / "conftest.py"))
    write_gguf = runpy.run_path(str(tests / "conversion" / "conftest.py"))["_write_gguf"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config: ModelConfig = shared["_tiny_config"](**sizes, max_position_embeddings=64)
    train = runpy.run_path(str(tests.parent / "demo" / "train_tokenizer.py"))["train"]
    vocabulary = train([Path(__file__).read_text(encoding="utf-8")], 400)
    tensors = init_random(config, 0)
    for name, limit in (("base", 1 << 30), ("shards", 10_000), ("json", 1 << 30)):
        path = root / name
        path.mkdir(parents=True)
        write_checkpoint(path, in_memory(tensors), max_shard_bytes=limit)
        write_companions(path, config, [])
        (path / "tokenizer.model").write_bytes(vocabulary)
        (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')
        (path / "chat_template.jinja").write_text(CHATML)
    files = tokenizer_files(root / "json" / "tokenizer.model")
    files |= {"added_tokens.json": {"</s>": 2}, "special_tokens_map.json": {"eos_token": "</s>"}}
    for name, content in files.items():
        (root / "json" / name).write_text(json.dumps(content))
    (root / "json" / "tokenizer.model").unlink()
    write_gguf(root / "m.gguf", shared["_tiny_config"](**sizes, vocab_size=259), {
        n: t[:259] if "embed" in n or "head" in n else t for n, t in tensors.items()
    })  # fmt: skip
    rows = [{"text": f"document {n} of a few words", "more": [n, None]} for n in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    texts = {
        "rows.jsonl": lines,
        "rows.json": json.dumps(rows),
        "rows.csv": "text,more\n" + 'some words,"a, b"\n' * 5,
        "chats.jsonl": (json.dumps(CHAT) + "\n") * 5,
        "questions.jsonl": json.dumps({"prompt": "a", "choices": ["b", "c"], "answer": 0}) + "\n",
        "preset.toml": '[model]\npath = "pro"\n[data]\ntrain = ["rows.jsonl"]\nseq_len = 16\n'
        "[train]\nsteps = 2\nbatch_size = 2\n[optim]\nlr = 1e-3\n",
        "adapter/adapter_config.json": '{"peft_type": "LORA", "r": 8, "target_modules": ["q"]}',
    }
    (root / "adapter").mkdir()
    for name, text in texts.items():
        (root / name).write_text(text)
    shutil.copy(root / "base" / SINGLE_FILE, root / "adapter" / "adapter_model.safetensors")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([CHAT] * 5), root / "chats.parquet")
    (root / "rows.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "rows.txt.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "rows.txt.xz").write_bytes(lzma.compress(lines.encode()))
