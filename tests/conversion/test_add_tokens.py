"""Tokens are added: rows and names for them, the base still inside, and only the new rows train."""

import base64
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import NEW_ROWS
from llamapro.config import ModelConfig
from llamapro.conversion import add_tokens as growing
from llamapro.conversion.companions import tokenizer_files
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.inspect import describe
from llamapro.conversion.strip import strip_checkpoint
from llamapro.conversion.verify import head_note, render, verify
from llamapro.errors import CheckpointError, ConfigError
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import Tokenizer

TOKENS = ("<|im_start|>", "<|im_end|>")
EMBEDDING, HEAD = NEW_ROWS
LAYOUT = expansion.interleave(2, 1)
Expand = Callable[..., tuple[Path, Path]]


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


def test_what_the_longer_head_moves_is_measured_for_few_tokens_too(
    expand: Expand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product with more rows may sum in another order, for 1 to 3 tokens above all."""
    base, grown = expand(vocab_size=401)
    linear = torch.nn.functional.linear
    assert 0 <= verify(str(grown), str(base))["max_head_difference"] < 1e-5

    def uneven(x: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        return linear(x, weight, *rest) + 0.5 * (len(weight) == 403 and x[..., 0].numel() == 2)

    monkeypatch.setattr(torch.nn.functional, "linear", uneven)
    found = verify(str(grown), str(base))
    assert found["logits_bit_equal"] and found["max_head_difference"] == pytest.approx(0.5)
    assert "longer head moves the base's logits by up to 5.0e-01" in render(found)
    assert head_note(0.0) in render(found | {"max_head_difference": 0.0})


def test_an_unknown_token_has_the_mean_logit_of_a_grown_model(expand: Expand) -> None:
    """Its embedding and head rows are read by the model like all others."""
    model = Checkpoint.open(expand()[1]).load()
    logits = model(torch.tensor([[1, 400, 401, 7]]))
    assert isinstance(logits, Tensor) and logits.shape == (1, 4, 402)
    mean = logits[..., :400].mean(-1, keepdim=True).expand(-1, -1, 2)
    torch.testing.assert_close(logits[..., 400:], mean, rtol=0, atol=1e-4)


def test_strip_gives_back_the_old_vocabulary(expand: Expand, tmp_path: Path) -> None:
    """The latest of two generations goes first: tokens, rows, tokenizer files and record."""
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
    """The number of base rows is that of all rows, or 0, or no number."""
    raw = Checkpoint.open(expand()[1]).config.raw
    for number in (402, 0, -1, "x", [3]):
        damaged = raw | {"llamapro": raw["llamapro"] | {"base_vocab_size": number}}
        with pytest.raises(ConfigError, match="'llamapro' record"):
            ModelConfig.from_dict(damaged)


# ---- Names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocab_size", "files"),
    [
        (400, "model"),
        (403, "model"),
        (400, "json"),
        (403, "table"),
        (400, "legacy"),
        (403, "legacy"),
    ],
)
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


@pytest.mark.parametrize("name", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_transformers_keeps_the_older_tokens_and_roles(
    name: str, expand: Expand, tmp_path: Path
) -> None:
    """Of tokenizer.json, of special_tokens_map.json, and of a role whose token no file lists."""
    transformers = pytest.importorskip("transformers")
    base, _ = expand(vocab_size=404)
    made = tokenizer_files(base / "tokenizer.model")
    tool = {"id": 400, "content": "<tool>", "special": False, "normalized": False}
    tool |= {"rstrip": True, "lstrip": False, "single_word": False}
    made["tokenizer.json"]["added_tokens"].append(tool)
    made["tokenizer_config.json"] |= {"tokenizer_class": name, "pad_token": "<pad>"}
    made["special_tokens_map.json"] = {"eos_token": "<tool>"}
    for file, content in made.items():
        (base / file).write_text(json.dumps(content))
    expand_checkpoint(Checkpoint.open(base), tmp_path / "again", LAYOUT, new_tokens=TOKENS)
    text = "<s>a <tool> b<pad> </s>"
    before, after = map(transformers.AutoTokenizer.from_pretrained, (base, tmp_path / "again"))
    assert before(text).input_ids == after(text).input_ids
    assert before.special_tokens_map == after.special_tokens_map
    assert after.convert_tokens_to_ids(["<tool>", "<pad>", *TOKENS]) == [400, 401, 404, 405]
    ours = [Tokenizer.load(path) for path in (base, tmp_path / "again")]
    assert ours[0].encode(text, special=True) == ours[1].encode(text, special=True)
    assert (ours[0].bos_id, ours[0].eos_id) == (ours[1].bos_id, ours[1].eos_id) == (1, 400)


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
