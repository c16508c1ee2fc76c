"""Tokens are added: rows and names for them, the base still inside, and only the new rows train."""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from llamapro import expansion, ops
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NEW_ROWS, read_blocks
from llamapro.checkpoints.run import TRAINABLE_FILE, read_metrics
from llamapro.config import ModelConfig
from llamapro.conversion import add_tokens as growing
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.inspect import describe
from llamapro.conversion.merge import merge_checkpoint, merge_many, strip_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import CheckpointError, ConfigError
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.distributed import Frozen, process_group, shard
from llamapro.training.plan import Spread, estimate_memory
from llamapro.training.settings import DataSettings, Settings, TrainSettings

TOKENS = ("<|im_start|>", "<|im_end|>")
EMBEDDING, HEAD = NEW_ROWS
LAYOUT = expansion.interleave(2, 1)
Expand = Callable[..., tuple[Path, Path]]


@pytest.fixture
def expand(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Expand:
    """`expand(dtype=..., **config) -> (base, grown)`: 2 layers, then 3 and `TOKENS`."""

    def make(dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[Path, Path]:
        config = tiny_config(num_hidden_layers=2, **overrides)
        base = write_random_checkpoint(tmp_path / "base", config, dtype)
        grown = tmp_path / "grown"
        expand_checkpoint(Checkpoint.open(base), grown, LAYOUT, new_tokens=TOKENS)
        return base, grown

    return make


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def contents(directory: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.suffix != ".safetensors"}


# ---- Rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_rows_are_the_mean_of_the_bases_and_those_keep_their_bytes(
    dtype: torch.dtype, tied: bool, expand: Expand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In embedding and head, whose mean is summed in fp64 a few rows at a time."""
    monkeypatch.setattr(growing, "CHUNK_BYTES", 1000)
    base, grown = (Checkpoint.open(p) for p in expand(dtype, tie_word_embeddings=tied))
    assert (grown.config.vocab_size, grown.config.raw["vocab_size"]) == (402, 402)
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        before, after = base.tensors[name].read(), grown.tensors[name].read()
        assert torch.equal(bits(after[:400]), bits(before))
        mean = before.double().mean(0).to(dtype)
        assert torch.equal(after[400:].float(), mean.expand(2, -1).float())


def test_the_base_inside_is_verified_by_its_own_rows(expand: Expand) -> None:
    """Hash and logits are its own; a changed base row is found, a changed new row is training's."""
    base, grown = expand()
    found = verify(str(grown), str(base))
    assert found["logits_bit_equal"] and found["base_sha256"] == Checkpoint.open(base).sha256()
    assert found["new_tokens"] == 2 and found["new_blocks"] == "identity"
    head = Checkpoint.open(grown).tensors[HEAD]
    row_bytes = head.nbytes // 402

    def flip(row: int) -> None:
        content = bytearray(head.file.read_bytes())
        content[head.offset + row * row_bytes] ^= 1
        head.file.write_bytes(content)

    flip(400)
    assert verify(str(grown), str(base))["base_intact"]
    flip(399)
    with pytest.raises(CheckpointError, match="base weights were changed"):
        verify(str(grown))


def test_an_unknown_token_has_the_mean_logit_of_a_grown_model(expand: Expand) -> None:
    """Its embedding and head rows are read by the model like all others."""
    model = Checkpoint.open(expand()[1]).load()
    logits = model(torch.tensor([[1, 400, 401, 7]]))
    assert isinstance(logits, Tensor) and logits.shape == (1, 4, 402)
    mean = logits[..., :400].mean(-1, keepdim=True).expand(-1, -1, 2)
    torch.testing.assert_close(logits[..., 400:], mean, rtol=0, atol=1e-4)


def test_strip_gives_back_the_old_vocabulary(expand: Expand, tmp_path: Path) -> None:
    """Of two generations the latest goes first, tokens, rows, tokenizer files and record alike."""
    base, grown = expand()
    twice = tmp_path / "twice"
    done = expand_checkpoint(
        Checkpoint.open(grown), twice, expansion.interleave(3, 1), new_tokens=("<|tool|>",)
    )
    assert done["new_tokens"] == {"<|tool|>": 402}
    assert Tokenizer.load(twice).special_tokens.items() >= {(TOKENS[0], 400), ("<|tool|>", 402)}
    plain = tmp_path / "plain"  # what an expansion without tokens makes of the base's files
    expand_checkpoint(Checkpoint.open(base), tmp_path / "blocks", LAYOUT)
    strip_checkpoint(Checkpoint.open(tmp_path / "blocks"), plain)

    strip_checkpoint(Checkpoint.open(twice), tmp_path / "once")
    once = Checkpoint.open(tmp_path / "once")
    assert once.sha256() == Checkpoint.open(grown).sha256()
    assert once.config == Checkpoint.open(grown).config and contents(once.path) == contents(grown)
    done = strip_checkpoint(once, tmp_path / "back")
    back = Checkpoint.open(tmp_path / "back")
    assert done["removed_tokens"] == 2 and back.sha256() == Checkpoint.open(base).sha256()
    assert back.config == Checkpoint.open(base).config and contents(back.path) == contents(plain)


def test_inspect_says_which_rows_are_new(expand: Expand) -> None:
    """Beside embedding and head."""
    found = describe(str(expand()[1]))
    origins = {row["part"]: row["origin"] for row in found["rows"]}
    assert origins["embed_tokens"] == origins["lm_head"] == "base, 2 new rows"
    assert found["record"]["base_vocab_size"] == 400 and origins["layer 2"] == "new, copy of base 1"


def test_an_impossible_record_is_refused(expand: Expand) -> None:
    """As many base rows as there are rows, or more, or none."""
    raw = Checkpoint.open(expand()[1]).config.raw
    for number in (402, 0, -1, "x", [3]):
        damaged = raw | {"llamapro": raw["llamapro"] | {"base_vocab_size": number}}
        with pytest.raises(ConfigError, match="'llamapro' record"):
            ModelConfig.from_dict(damaged)


# ---- Names -------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", ["model", "json", "table", "legacy"])
@pytest.mark.parametrize("vocab_size", [400, 403])
def test_all_readers_see_the_new_tokens_under_the_ids_of_their_rows(
    vocab_size: int, files: str, expand: Expand, tmp_path: Path
) -> None:
    """Whichever files the base has, and where its embedding has rows that no token had."""
    transformers = pytest.importorskip("transformers")
    base, grown = expand(vocab_size=vocab_size)
    if files != "model":  # what the first expansion wrote belongs to this base
        strip_checkpoint(Checkpoint.open(grown), tmp_path / "with_json")
        base = tmp_path / "with_json"
        if files == "table":
            table = json.loads((base / "tokenizer_config.json").read_text())
            entry = {"content": "<s>", "special": True}
            table |= {"added_tokens_decoder": {"1": entry}, "extra_special_tokens": ["<s>"]}
            (base / "tokenizer_config.json").write_text(json.dumps(table))
        if files == "legacy":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (base / name).unlink()
            (base / "tokenizer_config.json").write_text(
                json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"})
            )
            if vocab_size > 400:
                (base / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
        grown = tmp_path / "again"
        expand_checkpoint(Checkpoint.open(base), grown, LAYOUT, new_tokens=TOKENS)
    ours, theirs = Tokenizer.load(grown), transformers.AutoTokenizer.from_pretrained(grown)
    ids = [vocab_size, vocab_size + 1]
    text = f"{TOKENS[0]}import os{TOKENS[1]}"
    found = ours.encode(text, special=True)
    assert [found[0], found[-1]] == ids and ours.vocab_size == vocab_size + 2
    assert theirs.convert_tokens_to_ids(list(TOKENS)) == ids
    encoded = theirs(text, add_special_tokens=False).input_ids
    assert [encoded[0], encoded[-1]] == ids
    assert theirs.decode(encoded, skip_special_tokens=True).strip() == "import os"
    assert theirs.get_vocab()["<s>"] == 1
    table = json.loads((grown / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [table[str(i)]["content"] for i in ids] == list(TOKENS)
    if (grown / "added_tokens.json").exists():
        assert theirs.get_vocab()["<pad>"] == 400 == ours.encode("<pad>")[-1]
    turns, _ = ChatTemplate.load(grown, ours, "chatml").encode(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    )
    assert turns.count(ids[0]) == turns.count(ids[1]) == 2


def test_llama_3s_ranks_grow_too(
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Their file has no place for names, but the tokenizer.json that is made of it has."""
    base = write_random_checkpoint(tmp_path / "base", tiny_config(vocab_size=512))
    lines = [b"%s %d" % (base64.b64encode(bytes([byte])), byte) for byte in range(256)]
    (base / "tokenizer.model").write_bytes(b"\n".join(lines) + b"\n")
    expand_checkpoint(
        Checkpoint.open(base), tmp_path / "grown", expansion.interleave(4, 1), new_tokens=TOKENS
    )
    ours = Tokenizer.load(tmp_path / "grown")
    assert ours.encode(f"{TOKENS[0]}a{TOKENS[1]}", special=True) == [512, ord("a"), 513]


def test_names_that_cannot_be_added_are_refused(expand: Expand, tmp_path: Path) -> None:
    """Before anything is written: the library would take the id that such a name has."""
    base = Checkpoint.open(expand()[0])
    pieces = map(Tokenizer.load(base.path).bytes_of, range(259, 400))
    word = next(piece.decode() for piece in pieces if piece.startswith(b" ") and len(piece) > 2)
    for tokens in (["<s>"], ["<x>", "<x>"], [" "], [""], [word], [word.replace(" ", "\u2581")]):
        with pytest.raises(ConfigError, match="--add-tokens"):
            expand_checkpoint(base, tmp_path / "out", LAYOUT, new_tokens=tokens)
    again = Checkpoint.open(tmp_path / "grown")
    with pytest.raises(ConfigError, match="im_start"):
        expand_checkpoint(again, tmp_path / "out", expansion.interleave(3, 1), new_tokens=TOKENS)
    assert not (tmp_path / "out").exists()


# ---- Training ----------------------------------------------------------------------------------


def loaded(path: Path, new_tokens: bool) -> tuple[LlamaForCausalLM, list[str]]:
    checkpoint = Checkpoint.open(path)
    model = build_on_meta(checkpoint.config)
    names = expansion.select_trainable(model, "new_blocks", new_tokens)
    load_tensors(model, checkpoint.state_dict())
    return model, names


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_get_the_gradient_that_they_have_in_the_whole_matrix(
    tied: bool, expand: Expand
) -> None:
    """The same loss and logits, the same gradient, and none for what is frozen."""
    _, grown = expand(tie_word_embeddings=tied)
    (apart, names), whole = loaded(grown, True), loaded(grown, False)[0]
    expected = {NEW_ROWS[EMBEDDING]} | (set() if tied else {NEW_ROWS[HEAD]})
    assert {name for name in names if "layers" not in name} == expected
    whole.model.embed_tokens.requires_grad_(True)
    whole.lm_head.requires_grad_(True)
    ids = torch.tensor([[1, 400, 5, 6, 401, 400, 7, 401]])
    assert torch.equal(apart(ids), whole(ids))
    for model in (apart, whole):
        loss, _ = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
    for name in sorted(expected):
        full = whole.get_parameter(name.replace("new_rows", "weight")).grad
        assert full is not None
        torch.testing.assert_close(apart.get_parameter(name).grad, full[400:])
    frozen = [p for n, p in apart.named_parameters() if n not in names]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_frozen_rows_of_the_head_have_a_gradient_of_zero(backend: str, device: str) -> None:
    """The others have theirs, whichever backend computes it."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 32, generator=generator).to(device) for n in (5, 21))
    targets = torch.tensor([20, 3, ops.IGNORE_INDEX, 0, 19], device=device)
    grads = []
    for frozen_rows in (0, 18):
        rows = weight.clone().requires_grad_()
        with ops.use(backend):
            loss, _ = ops.linear_cross_entropy(x, rows, targets, frozen_rows)
        (2 * loss).backward()
        assert rows.grad is not None
        grads.append(rows.grad)
    assert not grads[1][:18].any() and grads[0][:18].any()
    torch.testing.assert_close(grads[1][18:], grads[0][18:])


def test_no_product_is_made_for_the_frozen_rows_of_the_head() -> None:
    """Beside what a frozen head costs, only the gradient of the new rows."""
    flops = []
    for trained in (0, 2):
        weight = torch.randn(21, 32, requires_grad=trained > 0)
        x = torch.randn(5, 32, requires_grad=True)
        with FlopCounterMode(display=False) as counter, ops.use("torch"):
            ops.linear_cross_entropy(x, weight, torch.arange(5), 21 - trained)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 5 * 32 * 2


def test_new_rows_train_only_where_there_are_some(expand: Expand, tmp_path: Path) -> None:
    """The vocabulary must have grown, and with every weight there is nothing to ask for."""
    base, grown = expand()
    expand_checkpoint(Checkpoint.open(base), tmp_path / "blocks", LAYOUT)
    with pytest.raises(ConfigError, match="--add-tokens"):
        loaded(tmp_path / "blocks", True)
    model = build_on_meta(Checkpoint.open(grown).config)
    with pytest.raises(ConfigError, match="'all'"):
        expansion.select_trainable(model, "all", True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", ["shard", "gather", "replicate"])
def test_new_rows_alone_have_masters_beside_a_frozen_embedding(
    frozen: Frozen, tied: bool, expand: Expand
) -> None:
    """In one unit: fp32 shards of what trains, the base's rows in bf16, whole where asked for.
    Backward reaches the embedding; blocks that are to be kept whole until then are."""
    model, names = loaded(expand(tie_word_embeddings=tied)[1], True)
    ids = torch.tensor([[1, 400, 5, 6, 401, 400, 7, 401]])
    with process_group("cpu") as ranks:
        shard(model, ranks, torch.bfloat16, frozen)
        for name, parameter in model.named_parameters():
            trains = name in names
            assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name
            assert isinstance(parameter, DTensor) == (trains or frozen != "replicate"), name
        for _ in range(2):
            loss, _ = model(ids[:, :-1], ids[:, 1:])
            weights = [cast(Any, layer).mlp.down_proj.weight for layer in model.model.layers]
            whole = [index for index, w in enumerate(weights) if not isinstance(w, DTensor)]
            assert whole == ([] if frozen == "shard" else [0, 1])
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert grads.keys() == set(names)
            for name, grad in grads.items():
                assert isinstance(grad, DTensor) and grad.dtype == torch.float32
                assert not expansion.is_new_rows(name) or grad.full_tensor().any(-1).all()
            model.zero_grad()


def test_the_plan_counts_the_new_rows(expand: Expand) -> None:
    """Masters and moments of these rows alone, and activations of every block: the graph begins at
    the embedding."""
    _, grown = expand()
    settings = Settings(data=DataSettings(seq_len=64), train=TrainSettings(micro_batch_size=2))
    spread, cpu = Spread(1, frozen="gather"), torch.device("cpu")
    without, having = (
        estimate_memory(settings, loaded(grown, new_tokens)[0], torch.float32, cpu, spread)
        for new_tokens in (False, True)
    )
    blocks = sum(t.nbytes for i in (0, 1) for t in Checkpoint.open(grown).layer(i).values())
    assert having["gathered weights"] - without["gathered weights"] == blocks
    rows = 2 * 2 * 64  # embedding and head, 2 tokens, C
    assert having["fp32 masters"] - without["fp32 masters"] == rows * 4
    assert having["AdamW moments"] - without["AdamW moments"] == rows * 8
    assert having["frozen weights"] == without["frozen weights"] - rows * 4
    joined, gradient = 402 * 64 * 4, 2 * 64 * 4
    assert having["logits"] - without["logits"] == joined + gradient
    assert having["activations"] > 2 * without["activations"]


def train(root: Path, home: Path, out: Path, *more: str, processes: int = 1) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(root / "train.py")]
    options: dict[str, Any] = {"model.path": home / "grown", "run_dir": out}
    options |= {"data.format": "chat", "data.chat_template": "chatml", "data.seq_len": 96}
    options |= {"data.train": home / "chat.jsonl", "data.val": f"chat={home / 'chat.jsonl'}"}
    options |= {"data.cache_dir": home / "cache", "train.steps": 4, "train.batch_size": 4}
    options |= {"train.micro_batch_size": 2, "eval.every": 4, "save.every": 2, "optim.lr": 1e-2}
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [*command, "--train.new-tokens", *more],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def trained(run: Path, step: int) -> dict[str, Tensor]:
    tensors, _ = read_blocks(run / "checkpoints" / f"step-{step:08d}" / TRAINABLE_FILE)
    return {name: tensor.read() for name, tensor in tensors.items()}


def test_new_rows_train_beside_new_blocks_and_old_rows_keep_their_bytes(
    expand: Expand, root: Path, tmp_path: Path
) -> None:
    """On one process, on two with frozen weights on each, and begun on one and ended on two: the
    same rows; what is saved and merged is new blocks, new rows and the base as it was."""
    base, grown = expand()
    turn = {"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is 1."}
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turn})] * 40))
    train(root, tmp_path, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/checkpoints/step-00000004")
    train(root, tmp_path, tmp_path / "moved", "--train.frozen", "gather", processes=2)
    train(root, tmp_path, tmp_path / "two", "--train.frozen", "replicate", processes=2)
    ours = trained(tmp_path / "one", 4)
    assert ours.keys() == {*NEW_ROWS.values(), *(f"model.layers.2.{p}" for p in parts(grown))}
    for other in ("moved", "two"):
        for name, tensor in trained(tmp_path / other, 4).items():
            torch.testing.assert_close(tensor, ours[name], rtol=1e-4, atol=1e-5)
    losses = [r["loss"] for r in read_metrics(tmp_path / "one") if r["kind"] == "eval"]
    assert losses[-1] < losses[0] - 0.2

    merged = tmp_path / "merged"
    done = merge_checkpoint(Checkpoint.open(grown), tmp_path / "one", merged)
    assert done["base_intact"] and verify(str(merged), str(base))["new_blocks"] == "trained"
    for name in NEW_ROWS:
        before, after = (Checkpoint.open(path).tensors[name].read() for path in (grown, merged))
        assert torch.equal(bits(after[:400]), bits(before[:400]))
        assert torch.equal(after[400:], ours[NEW_ROWS[name]])
        assert not (after[400:] == before[400:]).all(-1).any()
    strip_checkpoint(Checkpoint.open(merged), tmp_path / "back")
    assert Checkpoint.open(tmp_path / "back").sha256() == Checkpoint.open(base).sha256()
    with pytest.raises(CheckpointError, match="merge one file"):
        runs = [tmp_path / "one", tmp_path / "two"]
        merge_many(Checkpoint.open(grown), runs, tmp_path / "both")


def parts(path: Path) -> list[str]:
    return list(Checkpoint.open(path).layer(0))
