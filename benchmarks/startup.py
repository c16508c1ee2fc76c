"""How long a run takes to start, by the shards of its corpus and base, and how fast texts tokenise.

    python benchmarks/startup.py [--shards 1 10 100 1000] [--megabytes 0.25] [--rounds 3]
                                 [--tokenizers FILE_OR_DIR ...] [--seconds 3] [--out RESULT.json]

Start-up is the time from opening the settings' files to the first batch, without starting Python
and loading weights. `first` is with a model that no run has seen, `again` the median of the next
starts, `resume` that of starts from a training checkpoint. `cpu s` is what they used of a
processor, which other load changes less, and `MB` what they read by system calls. On the axis
`corpus` there are more files and token shards of one size; on `base` the same weights lie in more
shards; on `size` one shard has more bytes.

Tokenising is on one core, from files to the tokens in the cache. Beside it is the library's own
batch encoding of the same documents in memory, on one thread beside the main one, as ours: in the
main one tokenizers takes a third longer. Rates are tokens per second of the processor, the medians
of the rounds, in which the sides take turns. Without --tokenizers, a small one of each kind is
made. A tokenizer.model is also measured as the tokenizer.json that this project writes beside it.
`--shards` without a number times no starts.
"""

import argparse
import contextlib
import inspect
import io
import json
import os
import runpy
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import sentencepiece
import tiktoken
import tokenizers
from numpy.typing import NDArray

from llamapro import backends, cli, known_hashes
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.writing import MAX_SHARD_BYTES, in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import tokenizer_files, write_companions
from llamapro.conversion.expand import expand_checkpoint
from llamapro.errors import ConfigError
from llamapro.expansion import interleave
from llamapro.scripts import train
from llamapro.text import corpus, store
from llamapro.text.tokenizer import Tokenizer
from llamapro.text.vocabulary import JSON_NAME, LLAMA_3_PATTERN, is_ranks, parse_ranks
from llamapro.training import checks, lock, preset
from llamapro.training.data import load_data
from llamapro.training.distributed import process_group
from llamapro.training.job import Job, find_state
from llamapro.training.weights import init_random

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE, LAYERS, SEQ_LEN = 2000, 112, 256
SIZES = (64, 256)  # hidden sizes of the axis `size`
NAMES = ("first", "again", "resume")


# ---- A start ------------------------------------------------------------------------------------


def read_bytes() -> int:
    """Returns what this process has read by system calls, in bytes; 0 where nobody counts."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])
    return 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def start(words: Sequence[str]) -> tuple[float, float, float]:
    """Starts a run up to its first batch.

    Returns:
        The seconds, those of the processor, and the MB that it read.
    """
    before, started, used = read_bytes(), time.perf_counter(), time.process_time()
    with quiet():
        settings = preset.parse(words)
        checks.check(settings, 1)
        job = Job.open(settings)
        with process_group("cpu") as ranks, backends.use("torch"), lock.locked(job.run_dir, ranks):
            job, state, _ = find_state(job, ranks)
            load_data(job, state, ranks).batch(state.samples, ranks)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    return seconds, used, (read_bytes() - before) / 1e6


def measure(words: Sequence[str], rounds: int) -> dict[str, Any]:
    """Returns seconds and MB of a first start, of later ones, and of those from a checkpoint."""
    time.sleep(known_hashes.SETTLED_NS / 1e9)  # of files written just now no hash is kept
    found: dict[str, Any] = {}
    for name in NAMES:
        if name == "resume":
            with quiet():
                train.main(words)
        starts = [start(words) for _ in range(1 if name == "first" else rounds)]
        medians = map(statistics.median, zip(*starts, strict=True))
        found |= zip((f"{name}_s", f"{name}_cpu_s", f"{name}_read_mb"), medians, strict=True)
    if len(list(Path(words[words.index("--run-dir") + 1]).glob("checkpoints/step-*"))) != 1:
        raise ConfigError("the run saved no training checkpoint to resume from")
    return found


# ---- What is started ----------------------------------------------------------------------------


def sources() -> list[str]:
    """Returns the sources of modules that every Python has, as texts."""
    names = ("argparse", "textwrap", "inspect", "typing", "tarfile", "zipfile", "pathlib", "ast")
    return [inspect.getsource(__import__(name)) for name in names]


def make_sentencepiece(folder: Path) -> Path:
    """Trains a small tokenizer.model as the demo does; returns its path."""
    train_tokenizer = runpy.run_path(str(ROOT / "demo" / "train_tokenizer.py"))["train"]
    (file := folder / "tokenizer.model").write_bytes(train_tokenizer(sources(), VOCAB_SIZE))
    return file


def make_model(folder: Path, hidden_size: int, tokenizer: Path, max_shard_bytes: int) -> int:
    """Writes an expanded model of random weights; returns the number of its shards."""
    config = ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": VOCAB_SIZE, "hidden_size": hidden_size, "rms_norm_eps": 1e-5,
            "intermediate_size": 2 * hidden_size, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "max_position_embeddings": SEQ_LEN,
        }
    )  # fmt: skip
    tensors = init_random(config, 0)
    with tempfile.TemporaryDirectory() as base, quiet():
        write_checkpoint(Path(base), in_memory(tensors))
        write_companions(Path(base), config, [])
        shutil.copyfile(tokenizer, Path(base) / "tokenizer.model")
        layout, opened = interleave(LAYERS, 1), Checkpoint.open(Path(base))
        expand_checkpoint(opened, folder, layout, max_shard_bytes=max_shard_bytes)
    return len(list(folder.glob("*.safetensors")))


@contextlib.contextmanager
def made_tokens(shards: int, tokens: int) -> Iterator[None]:
    """Random tokens in shards of this many tokens stand for those of the texts."""
    generator, before = np.random.default_rng(0), (corpus._encode_all, store.SHARD_TOKENS)

    def encode(pieces: Iterable[object], *_: object) -> Iterator[NDArray[Any]]:
        for _piece in pieces:
            pass
        for _number in range(shards):
            yield generator.integers(3, VOCAB_SIZE, tokens, dtype=np.uint16)

    corpus._encode_all, store.SHARD_TOKENS = encode, tokens  # type: ignore[assignment]
    try:
        yield
    finally:
        corpus._encode_all, store.SHARD_TOKENS = before


def point(home: Path, files: int, megabytes: float, model: Path, rounds: int) -> dict[str, Any]:
    """Measures the starts of a run on this model with this many files and token shards."""
    home.mkdir()
    (text := home / "text").mkdir()
    for number in range(files):
        (text / f"{number:05}.txt").write_text(f"text {number}")
    words = ["--model.path", model, "--data.train", text, "--data.cache-dir", home / "cache"]
    words += ["--run-dir", home / "run", "--data.seq-len", SEQ_LEN, "--train.batch-size", 1]
    words += ["--train.steps", 1, "--train.device", "cpu", "--train.ops", "torch"]
    arguments = list(map(str, words))
    with made_tokens(files, round(megabytes * 5e5)), quiet():
        Job.open(preset.parse(arguments)).tokenize()
    return measure(arguments, rounds)


def measure_starts(home: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the rows of all axes."""
    tokenizer, rows = make_sentencepiece(home), []
    weights = home / "one"
    make_model(weights, SIZES[0], tokenizer, MAX_SHARD_BYTES)
    whole = Checkpoint.open(weights).nbytes

    def add(axis: str, number: int, files: int, model: Path, base_shards: int) -> None:
        found = point(home / f"{axis}-{number}", files, args.megabytes, model, args.rounds)
        row = {"axis": axis, "corpus_shards": files, "corpus_mb": files * args.megabytes}
        row |= {"base_shards": base_shards, "base_mb": Checkpoint.open(model).nbytes / 1e6}
        rows.append(row | found)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    for files in args.shards:
        add("corpus", files, files, weights, 1)
    for number in args.shards:
        if number == 1:  # as above
            continue
        model = home / f"base-of-{number}"
        # About as many; a thousand takes a file for each of its tensors.
        most = whole // number + 1 if number < 1000 else 1
        add("base", number, 1, model, make_model(model, SIZES[0], tokenizer, most))
    for size in SIZES[1:]:
        model = home / f"hidden-{size}"
        add("size", size, 1, model, make_model(model, size, tokenizer, MAX_SHARD_BYTES))
    return rows


# ---- Tokenising ---------------------------------------------------------------------------------


def library(file: Path) -> tuple[str, Callable[[list[str]], list[list[int]]]]:
    """Returns the library that reads a tokenizer's file, and its batch encoding on one thread."""
    content = file.read_bytes()
    if file.suffix == ".json":
        fast = tokenizers.Tokenizer.from_file(str(file))
        return "tokenizers", lambda texts: [
            found.ids for found in fast.encode_batch_fast(texts, add_special_tokens=False)
        ]
    if is_ranks(content):
        ranks = parse_ranks(file, content)
        encoding = tiktoken.Encoding("llama-3", pat_str=LLAMA_3_PATTERN, mergeable_ranks=ranks,
                                     special_tokens={})  # fmt: skip
        return "tiktoken", lambda texts: encoding.encode_ordinary_batch(texts, num_threads=1)
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    return "sentencepiece", lambda texts: model.encode(texts, out_type=int, num_threads=1)


def make_byte_level(folder: Path) -> Path:
    """Trains a small tokenizer.json, byte-level BPE; returns its path."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, show_progress=False, special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(sources(), trainer)
    made.save(str(file := folder / "tokenizer.json"))
    return file


def forms(file: Path, home: Path) -> list[Path]:
    """Returns a tokenizer's file, and that of the same tokenizer as a tokenizer.json."""
    if file.name == JSON_NAME or JSON_NAME not in (made := tokenizer_files(file)):
        return [file]
    (folder := home / "json" / file.parent.name).mkdir(parents=True)
    (folder / JSON_NAME).write_text(json.dumps(made[JSON_NAME]), encoding="utf-8")
    return [file, folder / JSON_NAME]


def measure_tokenizer(file: Path, home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Returns tokens per second and core, ours and the library's, of the same documents."""
    name, encode = library(file)
    ours = Tokenizer.load(file)
    texts = [text for text in sources() for _ in range(2)]
    started = time.perf_counter()
    encode(texts)
    times = max(1, round(args.seconds / args.rounds / (time.perf_counter() - started)))
    texts *= times
    for number, text in enumerate(texts):
        (home / f"{number:05}.txt").write_text(text, encoding="utf-8")
    rates: dict[str, list[float]] = {"library": [], "ours": []}
    for round_ in range(args.rounds):
        started = time.process_time()  # of all threads; other load changes it little
        with ThreadPoolExecutor(1) as pool:  # as ours is
            theirs = sum(map(len, pool.submit(encode, texts).result()))
        middle = time.process_time()
        with quiet():
            made = corpus.tokenize([str(home)], ours, home.parent / f"{round_}", workers=1)
        rates["library"].append(theirs / (middle - started))
        rates["ours"].append(theirs / (time.process_time() - middle))
    frame = (len(ours.prefix) + len(ours.suffix)) * len(texts)
    both = {f"{side}_tokens_per_s": statistics.median(found) for side, found in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["library"], strict=True))
    return {
        "tokenizer": file.parent.name, "library": name, "tokens": theirs,
        **both, "ratio": ratio, "same_number": made.tokens - frame == theirs,
    }  # fmt: skip


# ---- Command ------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    parser = measuring.parser(__doc__ or "")
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 10, 100, 1000], help="shards")
    parser.add_argument("--megabytes", type=float, default=0.25, help="size of a token shard")
    parser.add_argument("--rounds", type=int, default=3, help="times that each figure is taken")
    parser.add_argument("--tokenizers", type=Path, nargs="*", default=[], help="files or folders")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each tokenizer and side")
    args = parser.parse_args(argv)
    if min([*args.shards, 1]) < 1 or args.rounds < 1 or args.megabytes * 5e5 < 20:
        raise ConfigError("--shards, --rounds and --megabytes must be above 0")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        starts = measure_starts(home, args) if args.shards else []
        for kind in ("sentencepiece", "byte-level") if not args.tokenizers else ():
            (home / kind).mkdir()
            make = make_sentencepiece if kind == "sentencepiece" else make_byte_level
            args.tokenizers.append(make(home / kind))
        rates = []
        files = [f for path in args.tokenizers for f in forms(Tokenizer.load(path).path, home)]
        for number, file in enumerate(files):
            (texts := home / f"texts-{number}" / "texts").mkdir(parents=True)
            rates.append(measure_tokenizer(file, texts, args))
    heads = ["axis", "corpus shards", "base shards", "base MB"]
    heads += [f"{name} {unit}" for unit in ("s", "cpu s", "MB") for name in NAMES]
    keys = [f"{name}_{unit}" for unit in ("s", "cpu_s", "read_mb") for name in NAMES]
    rows = [
        [row["axis"], row["corpus_shards"], row["base_shards"], f"{row['base_mb']:.0f}"]
        + [f"{row[key]:.2f}" for key in keys]
        for row in starts
    ]
    print(measuring.table(heads, rows), end="\n\n")
    shown = [
        [rate["tokenizer"], rate["library"], f"{rate['ours_tokens_per_s']:,.0f}",
         f"{rate['library_tokens_per_s']:,.0f}", f"{rate['ratio']:.2f}"]
        for rate in rates
    ]  # fmt: skip
    print(measuring.table(["tokenizer", "library", "ours tokens/s", "its own", "ratio"], shown))
    about = measuring.machine()
    packages = ("torch", "llamapro", "sentencepiece", "tokenizers", "tiktoken")
    found = {"machine": about, "versions": measuring.versions(*packages)}
    measuring.write(args.out, found | {"starts": starts, "tokenising": rates})


if __name__ == "__main__":
    cli.run(main)
