"""Placement by measurement: scores are what they say, text is read or written, layers chosen."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llamapro import cli, placement
from llamapro.checkpoints.base import layout_of
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.meta import from_meta
from llamapro.errors import CheckpointError, ConfigError
from llamapro.expansion import insert_after, interleave
from llamapro.model import LlamaForCausalLM, build_on_meta, load_tensors
from llamapro.ops import IGNORE_INDEX
from llamapro.placement import block_importance, block_similarity, choose, measure
from llamapro.text.tokenizer import Tokenizer
from llamapro.training.objective import NextToken

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "sliding window": {"model_type": "mistral", "sliding_window": 8},
    "window as long as the rows": {"model_type": "mistral", "sliding_window": 33},
    "tied embeddings": {"tie_word_embeddings": True},
}
CONTEXT, TOKENS = 64, 700  # ten rows and some
Measure = Callable[..., dict[str, Any]]


def loaded(config: ModelConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    model = build_on_meta(config)
    load_tensors(model, tensors)
    return model.requires_grad_(False).eval()


def random_ids(rows: int = 5, length: int = 33) -> Tensor:
    return torch.randint(400, (rows, length), generator=torch.Generator().manual_seed(7))


def scores(found: dict[str, Any]) -> list[float]:
    return [row[placement.SCORES[found["placement"]]] for row in found["layers"]]


def chosen(found: dict[str, Any]) -> list[int]:
    return [row["layer"] for row in found["layers"] if row["chosen"]]


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Path:
    """A base, its expansion, files of text."""
    home = tmp_path_factory.mktemp("placement")
    config = tiny_config(max_position_embeddings=CONTEXT)
    base = write_random_checkpoint(home / "base", config)
    expand_checkpoint(Checkpoint.open(base), home / "pro", interleave(4, 2))
    (home / "a.txt").write_text("def usage(parser): print(parser.usage)\n" * 400)
    (home / "b.txt").write_text("It was the best of times, it was the worst of times.\n" * 400)
    (home / "short.txt").write_text("A short one.")
    (home / "empty.txt").write_text("")
    rows = [{"story": f"Number {n} of the stories."} for n in range(200)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture
def measured(home: Path) -> Measure:
    """`measured(placement="similar", number=2, *files, name="base", tokens=TOKENS, key="text")`."""

    def call(
        kind: str = "similar",
        number: int = 2,
        *files: str,
        name: str = "base",
        tokens: int = TOKENS,
        key: str = "text",
    ) -> dict[str, Any]:
        text = [str(home / file) for file in files]
        return measure(Checkpoint.open(home / name), kind, number, text, tokens, key)

    return call


# ---- Scores --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_similarity_is_the_cosine_of_what_a_block_takes_and_gives(
    family: dict[str, Any], tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """As hooks on the model's own forward pass see it. Sums of C and of N terms in fp64."""
    config = tiny_config(**family)
    model, ids = loaded(config, random_tensors(config)), random_ids()
    found = block_similarity(model, ids)
    expected: list[float] = []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, taken, given: expected.append(
                F.cosine_similarity(taken[0].double(), given.double(), dim=-1).mean().item()
            )
        )
    model(ids)
    tolerance = (3 * config.hidden_size + ids.numel()) * torch.finfo(torch.float64).eps
    assert len(expected) == config.num_hidden_layers
    assert found == pytest.approx(expected, abs=tolerance, rel=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_importance_is_the_loss_of_the_model_without_the_block(
    family: dict[str, Any], tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """A model is built without it. The same products in the same order: equal, not close."""
    config = tiny_config(**family)
    tensors, ids = random_tensors(config), random_ids()
    targets = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)

    def loss_sum(kept: list[int]) -> float:
        part = {name: tensor for name, tensor in tensors.items() if "layers" not in name}
        for new, old in enumerate(kept):
            for name in tensors:
                inside = name.removeprefix(f"model.layers.{old}.")
                if inside != name:
                    part[f"model.layers.{new}.{inside}"] = tensors[name]
        model = loaded(replace(config, num_hidden_layers=len(kept)), part)
        return NextToken(model)(ids, targets)[0].item()

    layers = list(range(config.num_hidden_layers))
    whole = loss_sum(layers)
    expected = [loss_sum([*layers[:i], *layers[i + 1 :]]) - whole for i in layers]
    found = block_importance(loaded(config, tensors), ids)
    assert found == [loss / ids[:, 1:].numel() for loss in expected]
    assert len(set(found)) == len(layers)


@pytest.mark.parametrize("score", [block_similarity, block_importance])
def test_rows_are_measured_apart(
    score: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Callable[..., ModelConfig],
    random_tensors: Any,
) -> None:
    """One batch or a batch for each two: the mean of the rows, as near as fp32 losses are."""
    config = tiny_config()
    model, ids = loaded(config, random_tensors(config)), random_ids()
    together = score(model, ids)
    alone = [score(model, row[None]) for row in ids]
    monkeypatch.setattr(placement, "_BATCH_TOKENS", 2 * ids.shape[1] + 1)
    apart = score(model, ids)
    # Products of other shapes sum in another order: a few roundings of a loss of about 10 nats.
    tolerance = 100 * torch.finfo(torch.float32).eps
    means = [sum(layer) / len(alone) for layer in zip(*alone, strict=True)]
    assert together == pytest.approx(means, abs=tolerance, rel=0)
    assert apart == pytest.approx(means, abs=tolerance, rel=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_identity_has_similarity_1_and_importance_0(
    dtype: torch.dtype, tiny_config: Callable[..., ModelConfig], random_tensors: Any
) -> None:
    """To the bit, in every dtype: o_proj and down_proj of blocks 1 and 2 are zero."""
    config = tiny_config()
    tensors = random_tensors(config, dtype)
    for layer in (1, 2):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    model, ids = loaded(config, tensors), random_ids()
    similarity, importance = block_similarity(model, ids), block_importance(model, ids)
    assert similarity[1] == similarity[2] == 1.0 > max(similarity[0], similarity[3])
    assert importance[1] == importance[2] == 0.0 != importance[0]
    assert choose(similarity, 2, "similar") == [1, 2]


# ---- The choice ----------------------------------------------------------------------------------


def test_the_most_similar_or_least_important_are_chosen_from_the_bottom_up() -> None:
    """Highest or lowest, a fall of the loss included; of equal ones the lower."""
    assert choose([0.5, 0.9, 0.7, 0.8], 2, "similar") == [1, 3]
    assert choose([0.5, 0.9, -0.1, 0.8], 2, "unimportant") == [0, 2]
    for kind in placement.SCORES:
        assert choose([0.3, 1.0, 1.0, 1.0][1:] * 2, 3, kind) == [0, 1, 2]
        assert choose([1.0, 2.0], 2, kind) == [0, 1]


@pytest.mark.parametrize("kind", placement.SCORES)
def test_blocks_that_do_nothing_are_chosen_first(measured: Measure, kind: str) -> None:
    """Of an expanded model, untrained: its new blocks. Layers are those of the model given."""
    found = measured(kind, 2, name="pro", tokens=2048)
    assert chosen(found) == [2, 5] and len(found["layers"]) == 6
    best = 1.0 if kind == "similar" else 0.0
    assert [score for score in scores(found) if score == best] == [best, best]


# ---- The text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", placement.SCORES)
def test_text_of_the_bases_own_is_the_same_each_time(
    measured: Measure, home: Path, kind: str
) -> None:
    """To the bit; and removing a layer makes a model's own text less likely to it."""
    found = measured(kind)
    assert found == measured(kind)
    assert (found["text"], found["context"], found["tokens"]) == ([], CONTEXT, 640)
    assert scores(found) != scores(measured(kind, 2, "a.txt"))
    if kind == "unimportant":
        assert min(scores(found)) > 0


def test_the_base_writes_documents_from_bos_on(home: Path) -> None:
    """None longer than the context, each after BOS, at temperature 1."""
    base = Checkpoint.open(home / "base")
    model, tokenizer = base.load(), Tokenizer.load(base.path)
    ids = placement._write(model, tokenizer, 300, 16)
    assert len(ids) == 300 and ids[0] == tokenizer.bos_id
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos_id]
    assert max(b - a for a, b in pairwise(starts)) <= 16
    assert ids != placement._write(model, tokenizer, 300, 17)


def test_files_are_read_as_documents_and_cut_into_rows(measured: Measure, home: Path) -> None:
    """BOS, tokens, EOS, as in training; what fills no row is left out."""
    base = Checkpoint.open(home / "base")
    tokenizer = Tokenizer.load(base.path)
    ids = tokenizer.encode((home / "a.txt").read_text(), bos=True, eos=True)[:640]
    found = measured("similar", 1, "a.txt")
    assert (found["tokens"], found["context"]) == (640, CONTEXT)
    assert scores(found) == block_similarity(base.load(), torch.tensor(ids).view(10, CONTEXT))
    assert found["text"] == [str(home / "a.txt")]


def test_a_text_shorter_than_the_context_is_one_row(measured: Measure, home: Path) -> None:
    """All of it is measured."""
    base = Checkpoint.open(home / "base")
    ids = Tokenizer.load(base.path).encode("A short one.", bos=True, eos=True)
    found = measured("unimportant", 1, "short.txt")
    assert (found["tokens"], found["context"]) == (len(ids), len(ids))
    assert scores(found) == block_importance(base.load(), torch.tensor([ids]))


def test_every_file_that_is_named_gives_a_part(home: Path) -> None:
    """The same of each; a short one is made up for by the next. A glob's are one."""
    tokenizer = Tokenizer.load(home / "base")
    whole = {
        name: tokenizer.encode((home / name).read_text(), bos=True, eos=True)
        for name in ("a.txt", "b.txt", "short.txt")
    }

    def read(tokens: int, *names: str) -> list[int]:
        return placement._read([str(home / name) for name in names], tokenizer, "text", tokens)

    assert read(2048, "a.txt", "b.txt") == whole["a.txt"][:1024] + whole["b.txt"][:1024]
    rest = 2048 - len(whole["short.txt"])
    assert read(2048, "short.txt", "a.txt") == whole["short.txt"] + whole["a.txt"][:rest]
    assert read(700, "a.txt", "b.txt") == whole["a.txt"][:512] + whole["b.txt"][:188]
    total = sum(map(len, whole.values()))
    assert len(read(1 << 20, "[abs]*.txt")) == total
    assert read(1 << 20, "[abs]*.txt") == read(1 << 20, "[abs]*.txt")


def test_a_json_lines_file_is_read_by_its_key(measured: Measure) -> None:
    """As training reads it."""
    assert measured("similar", 1, "rows.jsonl", key="story")["tokens"] == 640


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def expand(
    home: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`expand(base, out, *words) -> (exit status, standard output, standard error)`."""
    spec = importlib.util.spec_from_file_location("convert_of_placement", root / "convert.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def call(base: str, *words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["convert.py", "expand", str(home / base), *map(str, words)]
        )
        with pytest.raises(SystemExit) as stop:
            cli.run(module.main)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


Expand = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("kind", placement.SCORES)
def test_expand_puts_new_blocks_where_it_measured(
    expand: Expand, measured: Measure, tmp_path: Path, kind: str
) -> None:
    """Scores of all layers in the result; the record is that of any expansion."""
    words = ["--placement", kind, "--num-new-blocks", 3, "--measure-tokens", TOKENS]
    status, out, error = expand("base", tmp_path / "pro", *words, "--json")
    found = json.loads(out)
    assert status == 0, error
    assert found["logits_bit_equal"] is True
    assert found["measured"] == measured(kind, 3)
    layout = insert_after(4, chosen(found["measured"]))
    assert tuple(found["new_layers"]) == layout.new_layers
    config = Checkpoint.open(tmp_path / "pro").config
    assert config.expansion is not None and layout_of(config) == layout
    plain = json.loads(expand("base", tmp_path / "plain", "--after", "0,1,2", "--json")[1])
    assert plain.keys() == found.keys() - {"measured"}
    pro, plain = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("pro", "plain"))
    assert pro["llamapro"].keys() == plain["llamapro"].keys()


@pytest.mark.parametrize(
    ("kind", "title"), [("similar", "cosine"), ("unimportant", "loss increase")]
)
def test_the_table_names_every_layer_and_marks_the_chosen(
    expand: Expand, home: Path, tmp_path: Path, kind: str, title: str
) -> None:
    """Before what expand says otherwise; with what was measured on."""
    words = ["--placement", kind, "--num-new-blocks", 2, "--measure-on", home / "a.txt"]
    status, out, _ = expand("pro", tmp_path / "out", *words, "--measure-tokens", TOKENS)
    lines = out.splitlines()
    assert status == 0
    assert lines[0] == f"measured on 640 tokens, {CONTEXT} at a time, of {home / 'a.txt'}"
    assert lines[1].split("  ")[0] == "layer" and lines[1].endswith(title)
    rows = lines[2:8]
    assert [int(row.split()[0]) for row in rows] == list(range(6))
    marked = [int(row.split()[0]) for row in rows if row.endswith("new block on top")]
    assert lines[10] == f"copied from  {marked}" and len(marked) == 2
    assert "6 -> 8 layers" in lines[8]


SIMILAR = ["--placement", "similar"]
MISTAKES: list[tuple[list[str], str]] = [
    ([*SIMILAR, "--num-new-blocks", "5"], "similar placement chooses 1 to 4 layers"),
    (["--placement", "unimportant", "--num-new-blocks", "0"], "--num-new-blocks 0: unimportant"),
    (SIMILAR, "--placement similar chooses the layers: give --num-new-blocks N"),
    ([*SIMILAR, "--after", "1,2"], "give --num-new-blocks N, not --after LAYERS"),
    ([*SIMILAR, "--after", "1,2", "--num-new-blocks", "2"], "not --after LAYERS"),
    ([*SIMILAR, "--num-new-blocks", "2", "--blocks-per-group", "2"], "--blocks-per-group 2: "),
    ([*SIMILAR, "--num-new-blocks", "2", "--measure-tokens", "1"], "--measure-tokens 1: expected"),
    (["--num-new-blocks", "2", "--measure-on", "{home}/a.txt"], "--measure-on: is of use with"),
    (["--num-new-blocks", "2", "--measure-tokens", "9"], "--measure-tokens: is of use with"),
    (["--num-new-blocks", "2", "--text-key", "x"], "--text-key: is of use with"),
    ([*SIMILAR, "--num-new-blocks", "2", "--measure-on", "{home}/no"], "{home}/no: no such file"),
    ([*SIMILAR, "--num-new-blocks", "2", "--measure-on", "{home}/empty.txt"], "no text in it"),
    ([*SIMILAR, "--num-new-blocks", "2", "--measure-on", "{home}/rows.jsonl"], "no 'text' key"),
    ([*SIMILAR, "--num-new-blocks", "2", "--add-tokens", "<s>"], "<s>"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_told_before_anything_is_computed(
    expand: Expand,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    """Exit status 2 and one message with the option; no model is loaded, nothing is written."""
    monkeypatch.setattr(Checkpoint, "load", None)
    filled = [word.format(home=home) for word in words]
    status, out, error = expand("base", tmp_path / "out", *filled)
    assert status == 2 and out == "" and "Traceback" not in error
    assert message.format(home=home) in error
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_written_is_told_before_anything_is_computed(
    expand: Expand, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base itself, and a directory that holds something."""
    monkeypatch.setattr(Checkpoint, "load", None)
    (tmp_path / "notes.txt").write_text("mine")
    words = [*SIMILAR, "--num-new-blocks", 2]
    for out, more, message in (
        (home / "base", ["--force"], "is also the source"),
        (tmp_path, [], "exists and is not empty"),
        (tmp_path, ["--force"], "holds no checkpoint"),
        (tmp_path / "notes.txt", [], "is not a directory"),
    ):
        status, _, error = expand("base", out, *words, *more)
        assert status == 2 and message in error
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_base_that_cannot_write_is_told_what_to_name(
    expand: Expand, home: Path, tmp_path: Path
) -> None:
    """No BOS: files will do. No tokenizer: it is needed for either."""
    shutil.copytree(home / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"bos_token": null}')
    words = [tmp_path / "out", *SIMILAR, "--num-new-blocks", 2]
    status, _, error = expand(str(tmp_path / "base"), *words)
    assert status == 2
    assert f"{tmp_path / 'base' / 'tokenizer.model'} has no BOS token" in error
    assert "name text with --measure-on" in error
    files = ["--measure-on", home / "a.txt", "--measure-tokens", 64]
    assert expand(str(tmp_path / "base"), *words, *files)[0] == 0
    (tmp_path / "base" / "tokenizer.model").unlink()
    status, _, error = expand(str(tmp_path / "base"), tmp_path / "o", *words[1:], *files)
    assert status == 2 and f"{tmp_path / 'base'}: no tokenizer.model or tokenizer.json" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


@pytest.mark.parametrize("kind", placement.SCORES)
def test_scores_that_are_not_finite_are_refused(
    measured: Measure, home: Path, tmp_path: Path, kind: str
) -> None:
    """A NaN in block 2: what it gives and all above is named."""
    shutil.copytree(home / "base", tmp_path / "nan")
    stored = Checkpoint.open(tmp_path / "nan").tensors["model.layers.2.input_layernorm.weight"]
    with open(stored.file, "r+b") as file:
        file.seek(stored.offset)
        file.write(b"\xff\xff\xff\x7f")  # a NaN in fp32
    wrong = [2, 3] if kind == "similar" else [0, 1, 2, 3]
    with pytest.raises(CheckpointError) as caught:
        measured(kind, 2, "a.txt", name=str(tmp_path / "nan"))
    assert f"NaN or infinity where layers {wrong} are measured" in str(caught.value)
    with pytest.raises(CheckpointError, match="NaN or infinity in the logits after BOS"):
        measured(kind, 2, name=str(tmp_path / "nan"))


def test_a_gpu_that_is_too_small_is_told(
    measured: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way round it."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(placement, "block_similarity", full)
    with pytest.raises(ConfigError, match="does not fit the GPU; set CUDA_VISIBLE_DEVICES="):
        measured("similar", 2, "a.txt")


def test_a_real_model_is_measured(tmp_path: Path, shared: Path) -> None:
    """TinyStories: its lowest layers change the hidden state least, the highest the loss."""
    release = shared / "checkpoints" / "tinystories-1m"
    if not release.is_dir():
        pytest.skip(f"needs {release}")
    from_meta(release, tmp_path / "base", None)
    base = Checkpoint.open(tmp_path / "base")
    similar = measure(base, "similar", 2, [], 2048, "text")
    unimportant = measure(base, "unimportant", 2, [], 2048, "text")
    assert chosen(similar) == [0, 1] and chosen(unimportant) == [3, 4]
    assert similar["context"] == unimportant["context"] == base.config.max_position_embeddings
    assert all(0 < score < 1 for score in scores(similar))
    assert all(score > 0.5 for score in scores(unimportant))
