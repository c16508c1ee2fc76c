"""Training added tokens: their rows of embedding and head move, the base's keep every bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NEW_ROWS, read_blocks
from llamapro.checkpoints.run import TRAINABLE_FILE, read_metrics
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint, merge_many
from llamapro.conversion.strip import strip_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import CheckpointError, ConfigError
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.training.distributed import process_group, shard
from llamapro.training.objective import NextToken
from llamapro.training.optim import build_adamw
from llamapro.training.plan import estimate_memory
from llamapro.training.settings import DataSettings, Frozen, OptimSettings, Settings, TrainSettings
from llamapro.training.weights import freeze, mask_gradients

TOKENS = ("<|im_start|>", "<|im_end|>")
EMBEDDING, HEAD = NEW_ROWS
LAYOUT = expansion.interleave(2, 1)
Expand = Callable[..., tuple[Path, Path]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def loaded(path: Path, new_tokens: bool) -> tuple[LlamaForCausalLM, list[str]]:
    checkpoint = Checkpoint.open(path)
    model = build_on_meta(checkpoint.config)
    names = freeze(model, "new_blocks", new_tokens)
    load_tensors(model, checkpoint.state_dict())
    return model, names


@pytest.mark.parametrize("tied", [False, True])
def test_the_mask_leaves_the_gradient_of_the_new_rows_alone(tied: bool, expand: Expand) -> None:
    """It is 0 in the base's rows, also when gradients are accumulated; nothing frozen has one."""
    _, grown = expand(tie_word_embeddings=tied)
    (masked, names), plain = loaded(grown, True), loaded(grown, True)[0]
    assert {n for n in names if "layers" not in n} == ({EMBEDDING} if tied else {EMBEDDING, HEAD})
    mask_gradients(dict(masked.named_parameters()), 400)
    ids = torch.tensor([[1, 400, 5, 6, 401, 400, 7, 401]])
    for model in (masked, plain):
        for _ in range(2):
            loss, _ = NextToken(model)(ids[:, :-1], ids[:, 1:])
            loss.backward()
    for name, parameter in masked.named_parameters():
        expected = plain.get_parameter(name).grad
        if name in (EMBEDDING, HEAD):
            assert parameter.grad is not None and expected is not None
            assert not parameter.grad[:400].any() and expected[:400].any()
            assert torch.equal(parameter.grad[400:], expected[400:])
        else:
            assert (parameter.grad is None) == (name not in names)


def test_new_rows_train_only_where_there_are_some(expand: Expand, tmp_path: Path) -> None:
    """The vocabulary must have grown, and with every weight there is nothing to ask for."""
    base, grown = expand()
    expand_checkpoint(Checkpoint.open(base), tmp_path / "blocks", LAYOUT)
    with pytest.raises(ConfigError, match="--add-tokens"):
        loaded(tmp_path / "blocks", True)
    model = build_on_meta(Checkpoint.open(grown).config)
    with pytest.raises(ConfigError, match="'all'"):
        freeze(model, "all", True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", ["shard", "gather", "replicate"])
def test_the_base_rows_keep_every_bit_through_steps_in_bf16(
    frozen: Frozen, tied: bool, expand: Expand
) -> None:
    """fp32 masters of what was bf16, gradient 0 and no decay: AdamW leaves these rows alone."""
    model, names = loaded(expand(torch.bfloat16, tie_word_embeddings=tied)[1], True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = torch.tensor([[1, 400, 5, 6, 401, 400, 7, 401]])
    with process_group("cpu") as ranks:
        objective = NextToken(model)
        shard(objective, ranks, torch.bfloat16, TrainSettings(frozen=frozen))
        parameters = {n: p for n, p in model.named_parameters() if n in names}
        mask_gradients(parameters, 400)
        undecayed = [p for n, p in parameters.items() if n in NEW_ROWS]
        optimizer = build_adamw(parameters.values(), OptimSettings(), undecayed)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for _ in range(3):
            loss, _ = objective(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            trains = name in names
            assert parameter.dtype == (torch.float32 if trains else torch.bfloat16), name
            assert isinstance(parameter, DTensor) == (trains or frozen != "replicate"), name
            now = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            rows = 400 if name in NEW_ROWS else 0 if trains else None
            assert torch.equal(bits(now[:rows].bfloat16()), bits(before[name][:rows])), name
            if name in NEW_ROWS:
                assert not (now[400:].bfloat16() == before[name][400:]).all(-1).any()


def test_the_plan_counts_embedding_and_head(expand: Expand) -> None:
    """They have masters and moments, and the graph begins at the embedding."""
    _, grown = expand()
    train = TrainSettings(micro_batch_size=2, frozen="gather")
    settings, cpu = Settings(data=DataSettings(seq_len=64), train=train), torch.device("cpu")
    without, having = (
        estimate_memory(settings, loaded(grown, new_tokens)[0], torch.float32, cpu, 1)
        for new_tokens in (False, True)
    )
    blocks = sum(t.nbytes for i in (0, 1) for t in Checkpoint.open(grown).layer(i).values())
    assert having["gathered weights"] - without["gathered weights"] == blocks
    numbers = 2 * 402 * 64  # embedding and head
    assert having["fp32 masters"] - without["fp32 masters"] == numbers * 4
    assert having["AdamW moments"] - without["AdamW moments"] == numbers * 8
    assert having["frozen weights"] == without["frozen weights"] - numbers * 4
    assert having["logits"] - without["logits"] == numbers // 2 * 4  # the head's gradient
    assert having["activations"] > 2 * without["activations"]


@pytest.fixture
def train(
    train_on: Callable[..., Any], words: Callable[..., list[str]], tmp_path: Path
) -> Callable[..., None]:
    """`train(processes, run_dir, **changes)`: 4 steps on conversations, with the new rows."""

    def train(processes: int, out: Path, **changes: Any) -> None:
        options: dict[str, Any] = {"model.path": tmp_path / "grown", "run_dir": out}
        options |= {"data.format": "chat", "data.chat_template": "chatml", "data.seq_len": 96}
        chat = tmp_path / "chat.jsonl"
        options |= {"data.train": chat, "data.val": f"chat={chat}", "train.new_tokens": ""}
        options |= {"data.cache_dir": tmp_path / "cache", "train.steps": 4, "train.batch_size": 4}
        options |= {"train.micro_batch_size": 2, "eval.every": 4, "save.every": 2, "optim.lr": 1e-2}
        train_on(processes, words(options, **changes))

    return train


def trained(run: Path, step: int) -> dict[str, Tensor]:
    blocks = read_blocks(run / "checkpoints" / f"step-{step:08d}" / TRAINABLE_FILE)
    return {name: tensor.read() for name, tensor in blocks.tensors.items()}


def test_new_rows_train_beside_new_blocks_and_old_rows_keep_their_bytes(
    expand: Expand, train: Callable[..., None], tmp_path: Path
) -> None:
    """On one process, on two with frozen weights on each, and begun on one and ended on two: the
    same rows; what is saved and merged is new blocks, new rows and the base as it was."""
    base, grown = expand()
    turn = {"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "It is 1."}
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turn})] * 40))
    train(1, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/checkpoints/step-00000004")
    train(2, tmp_path / "moved", train__frozen="gather")
    train(2, tmp_path / "two", train__frozen="replicate")
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
