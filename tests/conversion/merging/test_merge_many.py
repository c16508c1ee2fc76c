"""New blocks of several files in one model, and the way back to the base, byte for byte."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llamapro import expansion, generate
from llamapro.checkpoints import new_blocks
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import read_blocks, write_blocks
from llamapro.checkpoints.run import STATE_FILE, TRAINABLE_FILE
from llamapro.checkpoints.stacking import stack
from llamapro.checkpoints.tensors import read_safetensors
from llamapro.checkpoints.writing import in_memory
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge, merge_checkpoint, merge_many
from llamapro.conversion.strip import strip_checkpoint
from llamapro.conversion.verify import verify
from llamapro.errors import CheckpointError, ConfigError, UserError
from llamapro.model import build_on_meta

EVERY_2 = expansion.interleave(4, 2)  # layers 2 and 5 of 6 are new

Write = Callable[..., Path]


def layer_bytes(checkpoint: Checkpoint, index: int) -> dict[str, str]:
    """The hash of each tensor of a block, under its name there."""
    return {name: tensor.sha256() for name, tensor in checkpoint.layer(index).items()}


def test_the_blocks_of_every_file_stand_on_their_base_layer_in_order(
    base: Checkpoint, pro: Checkpoint, files: list[Path], tmp_path: Path
) -> None:
    """4 layers and two files of 2 are 8; every block has the bytes of its file or of the base.

    A later training treats the blocks of both files as one generation.
    """
    found = merge_many(pro, files, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    record = out.config.expansion
    assert record is not None and out.config.num_hidden_layers == found["layers"] == 8
    assert record.new_layers == (2, 3, 6, 7) and record.source_layers == (1, 1, 3, 3)
    assert record.base_sha256 == base.sha256() and record.generations == ()
    for index, source in enumerate((0, 1, None, None, 2, 3, None, None)):
        if source is not None:
            assert layer_bytes(out, index) == layer_bytes(base, source)
    for number, file in enumerate(files):
        merge_checkpoint(pro, file, tmp_path / f"one{number}")
        alone = Checkpoint.open(tmp_path / f"one{number}")
        assert layer_bytes(out, 2 + number) == layer_bytes(alone, 2)
        assert layer_bytes(out, 6 + number) == layer_bytes(alone, 5)
    assert (out.path / "LICENSE.txt").read_text() == "be kind"
    assert verify(str(out.path))["base_intact"]
    names = expansion.select_trainable(build_on_meta(out.config), "new_blocks")
    assert {int(name.split(".")[2]) for name in names} == {2, 3, 6, 7}


def test_the_base_itself_takes_new_blocks(
    base: Checkpoint, pro: Checkpoint, files: list[Path], tmp_path: Path
) -> None:
    """Nobody has to know how it was expanded; the file does. Another base is refused."""
    for name, given in (("one", files[:1]), ("two", files)):
        for source in (base, pro):
            merge(source.path, given, tmp_path / f"{name}-{source.path.name}")
        found = [Checkpoint.open(tmp_path / f"{name}-{source}") for source in ("base", "pro")]
        assert found[0].sha256() == found[1].sha256()
        assert found[0].config.expansion == found[1].config.expansion
    assert merge(base.path, files[:1], tmp_path / "out")["base_intact"]
    ids = torch.arange(12)[None]
    for given in (files[:1], files):
        whole = stack(base, given).checkpoint.load()
        merged = Checkpoint.open(tmp_path / ("one-pro" if len(given) == 1 else "two-pro")).load()
        assert torch.equal(whole(ids), merged(ids))


def test_commands_take_the_base_with_new_blocks(
    base: Checkpoint,
    pro: Checkpoint,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`generate --blocks` writes what the merged model writes, and without them the base."""
    merge(pro.path, files, tmp_path / "out")
    fetched = shutil.copytree(files[1].parent, tmp_path / "hub", ignore=lambda *_: ["pro", "base"])
    (fetched / "2.safetensors").rename(fetched / TRAINABLE_FILE)
    monkeypatch.setattr(new_blocks, "resolve", lambda path: fetched if "hf:" in str(path) else path)

    def written(*words: str | Path) -> str:
        generate.main([*map(str, words), "--prompt", "usage", "--max-new-tokens", "20", "--json"])
        return json.loads(capsys.readouterr().out)["text"]

    stacked = written(base.path, "--blocks", files[0], "hf://jo/blocks")
    assert stacked == written(tmp_path / "out") != written(base.path)
    skipped = written(base.path, "--blocks", *files, "--skip-new-blocks")
    assert skipped == written(base.path)


def test_an_expanded_model_takes_new_blocks_of_the_hub(
    pro: Checkpoint, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a base does: the merged model is that of the same file on the disk."""
    (tmp_path / "hub").mkdir()
    shutil.copyfile(files[0], tmp_path / "hub" / TRAINABLE_FILE)
    monkeypatch.setattr(
        new_blocks, "resolve", lambda path: tmp_path / "hub" if "hf:" in str(path) else path
    )
    merge(pro.path, [Path("hf://jo/blocks")], tmp_path / "fetched")
    merge(pro.path, files[:1], tmp_path / "local")
    found, expected = (Checkpoint.open(tmp_path / n).sha256() for n in ("fetched", "local"))
    assert found == expected != pro.sha256()


def test_files_of_other_layouts_of_the_same_base_fit_together(
    base: Checkpoint, pro: Checkpoint, files: list[Path], tmp_path: Path, write_trained: Write
) -> None:
    """Each is put where it was in its own layout, with the source it names; below all as well."""
    layouts = [expansion.insert_after(4, [0, 1]), expansion.stack(4, 2, "prefix")]
    merged = files[:1]
    for number, layout in enumerate(layouts):
        expand_checkpoint(base, tmp_path / f"pro{number}", layout)
        expanded = Checkpoint.open(tmp_path / f"pro{number}")
        file = tmp_path / f"{number}.safetensors"
        merged.append(write_trained(file, expanded, 1.0, seed=2 + number))
    found = merge_many(pro, merged, tmp_path / "out")
    #                            new: prefix x2, base 0, 1 with two, 2, 3 with one
    assert found["new_layers"] == [0, 1, 3, 5, 6, 9]
    assert found["source_layers"] == [0, 1, 0, 1, 1, 3]
    out = Checkpoint.open(tmp_path / "out")
    own = {name: tensor.sha256() for name, tensor in read_safetensors(merged[1])[0].items()}
    assert layer_bytes(out, 3)["mlp.up_proj.weight"] == own["model.layers.1.mlp.up_proj.weight"]
    assert layer_bytes(out, 6)["mlp.up_proj.weight"] == own["model.layers.3.mlp.up_proj.weight"]
    assert verify(str(out.path), str(base.path))["new_blocks"] == "trained"


def test_untrained_blocks_of_two_files_leave_the_logits_as_they_are(
    base: Checkpoint, pro: Checkpoint, tmp_path: Path, write_trained: Write
) -> None:
    """Identity after identity is the identity, to the bit."""
    expand_checkpoint(base, tmp_path / "pro2", expansion.insert_after(4, [0, 2]))
    models = [pro, Checkpoint.open(tmp_path / "pro2")]
    files = [write_trained(tmp_path / f"{n}.safetensors", m) for n, m in enumerate(models)]
    merge_many(pro, files, tmp_path / "out")
    found = verify(str(tmp_path / "out"), str(base.path))
    assert found["new_blocks"] == "identity" and found["logits_bit_equal"]


def test_the_result_has_the_dtype_of_the_base(
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    write_trained: Write,
) -> None:
    """fp32 masters become bf16, rounded to nearest."""
    config = tiny_config(hidden_size=16, intermediate_size=16)
    path = write_random_checkpoint(tmp_path / "base", config, torch.bfloat16)
    expand_checkpoint(Checkpoint.open(path), tmp_path / "pro", EVERY_2)
    pro = Checkpoint.open(tmp_path / "pro")
    files = [write_trained(tmp_path / f"{s}.safetensors", pro, 1.0, seed=s) for s in (1, 2)]
    merge_many(pro, files, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    assert {tensor.dtype for tensor in out.tensors.values()} == {"BF16"}
    master = read_safetensors(files[1])[0]["model.layers.5.mlp.up_proj.weight"]
    merged = out.tensors["model.layers.7.mlp.up_proj.weight"].read()
    assert torch.equal(merged, master.read().bfloat16())


# ---- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("other base", CheckpointError, "was trained on base sha256 .* this model's base is"),
        (
            "other theta",
            CheckpointError,
            "another config.json: rope_theta was 500000.0, is 10000.0",
        ),
        ("all weights", CheckpointError, "holds all weights of a model"),
        ("twice", ConfigError, "given twice, before as"),
        ("same", ConfigError, "given twice, before as"),
        ("same run", ConfigError, r"step-2/trainable\.safetensors: of the same run as .*/step-1/"),
        ("copy", ConfigError, r"bad\.safetensors: given twice, before as .*; its blocks would"),
        ("no sources", CheckpointError, "do not say from which layers"),
        ("too high", ConfigError, r"its metadata: .* new_layers \[2, 6\]"),
        ("too many", CheckpointError, "name 99 new blocks, but it holds 18 tensors"),
        ("shape", CheckpointError, r"is \[8, 16\], expected \[16, 16\]"),
        ("tokenizers", CheckpointError, "trained with different tokenizers"),
    ],
)
def test_what_does_not_belong_together_is_refused_and_nothing_written(
    base: Checkpoint,
    pro: Checkpoint,
    tmp_path: Path,
    files: list[Path],
    write_random_checkpoint: Callable[..., Path],
    write_trained: Write,
    case: str,
    kind: type[UserError],
    message: str,
) -> None:
    """The message names the file and why."""
    good, bad, pair = files[0], tmp_path / "bad.safetensors", files[:2]
    expanded, files = pro, [good, bad]
    if case == "other base":
        other = write_random_checkpoint(tmp_path / "other", base.config, seed=5)
        expand_checkpoint(Checkpoint.open(other), tmp_path / "other-pro", EVERY_2)
        write_trained(bad, Checkpoint.open(tmp_path / "other-pro"))
    elif case == "other theta":  # the same weights
        other = shutil.copytree(base.path, tmp_path / "other")
        raw = json.loads((other / "config.json").read_text()) | {"rope_theta": 5e5}
        (other / "config.json").write_text(json.dumps(raw))
        expand_checkpoint(Checkpoint.open(other), tmp_path / "other-pro", EVERY_2)
        write_trained(bad, Checkpoint.open(tmp_path / "other-pro"))
    elif case == "all weights":
        write_trained(bad, base, trainable="all")
    elif case == "twice":
        files = [good, good.parent / "pro" / ".." / good.name]
    elif case == "same":
        files = [good, good]
    elif case == "same run":  # as a glob names its training checkpoints
        steps = [tmp_path / "run" / "checkpoints" / f"step-{number}" for number in (1, 2)]
        for file, step in zip(pair, steps, strict=True):
            step.mkdir(parents=True)
            shutil.copy(file, step / "trainable.safetensors")
        files = [step / "trainable.safetensors" for step in steps]
    elif case == "copy":
        shutil.copy(good, bad)
    elif case in ("no sources", "too high", "too many", "shape"):
        layout = expansion.insert_after(4, [1, 2])
        expand_checkpoint(base, tmp_path / "pro2", layout)
        _rewrite(write_trained(bad, Checkpoint.open(tmp_path / "pro2")), case)
    else:
        files = []
        for seed in (1, 2):
            file = write_trained(tmp_path / f"step{seed}" / TRAINABLE_FILE, pro, 1.0, seed)
            state = {"identity": {"tokenizer": str(seed) * 64}}
            (file.parent / STATE_FILE).write_text(json.dumps(state))
            files.append(file)
    with pytest.raises(kind, match=message):
        merge_many(expanded, files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_in_folders_of_one_named_checkpoints_are_of_two_runs(
    pro: Checkpoint, files: list[Path], tmp_path: Path
) -> None:
    """Only the names of steps say that a run saved them."""
    for file in files:
        (tmp_path / "checkpoints" / file.stem).mkdir(parents=True)
    copies = [shutil.copy(file, tmp_path / "checkpoints" / file.stem) for file in files]
    assert merge_many(pro, copies, tmp_path / "out")["blocks"] == [*map(str, copies)]


def _rewrite(file: Path, case: str) -> None:
    """Writes the file anew with one thing wrong."""
    _, stored, info = read_blocks(file)
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    if case == "no sources":
        info = dataclasses.replace(info, source_layers=())
    elif case == "too many":
        info = dataclasses.replace(info, new_layers=tuple(range(99)), source_layers=())
    elif case == "too high":
        info = dataclasses.replace(info, new_layers=(2, 6))
        tensors = {n.replace("layers.4.", "layers.6."): t for n, t in tensors.items()}
    else:
        name = "model.layers.2.self_attn.q_proj.weight"
        tensors[name] = tensors[name][:8]
    write_blocks(file, in_memory(tensors), info)


def test_a_file_without_sources_takes_those_of_its_own_layout(
    pro: Checkpoint, files: list[Path], tmp_path: Path
) -> None:
    """Files from before the sources were noted go into the checkpoint they were trained on."""
    old = [Path(shutil.copy(file, tmp_path)) for file in files]
    for file in old:
        _rewrite(file, "no sources")
    assert merge_many(pro, old, tmp_path / "out")["source_layers"] == [1, 1, 3, 3]


def test_one_flipped_bit_of_a_merged_block_is_found(
    pro: Checkpoint, files: list[Path], tmp_path: Path, flip_bit: Callable[..., None]
) -> None:
    """The record of a merged model has the hash of its new blocks, too, also of several files."""
    for out, merged in ((tmp_path / "one", files[:1]), (tmp_path / "many", files)):
        merge(pro.path, merged, out)
        assert verify(out)["new_blocks"] == "trained"
        stored = Checkpoint.open(out).tensors["model.layers.2.mlp.up_proj.weight"]
        flip_bit(stored.file, stored.offset)
        with pytest.raises(CheckpointError, match=r"the new blocks hash to .*merge again"):
            verify(out)


def test_new_blocks_need_their_base(pro: Checkpoint, files: list[Path], tmp_path: Path) -> None:
    """A config.json, from which a run of all weights may start, has no weights to put them in."""
    with pytest.raises(ConfigError, match=r"config\.json: .*holds new blocks alone; give the exp"):
        merge(pro.path / "config.json", files[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["merge", "strip"])
def test_a_changed_base_is_found_and_nothing_written(
    copy: Checkpoint, files: list[Path], tmp_path: Path, what: str, flip_bit: Callable[..., None]
) -> None:
    """One bit of a frozen weight: neither merged nor handed out as the base."""
    stored = copy.tensors["model.layers.3.mlp.up_proj.weight"]
    flip_bit(stored.file, stored.offset)
    with pytest.raises(CheckpointError, match="base weights were changed"):
        if what == "merge":
            merge_many(copy, files, tmp_path / "out")
        else:
            strip_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_generation_is_merged_and_stripped_on_top_of_the_first(
    pro: Checkpoint, tmp_path: Path, write_trained: Write
) -> None:
    """Generation 1 keeps its record, renumbered; stripping generation 2 gives its bytes back."""
    expand_checkpoint(pro, tmp_path / "pro2", expansion.interleave(6, 3))
    second = Checkpoint.open(tmp_path / "pro2")
    files = [write_trained(tmp_path / f"{s}.safetensors", second, 1.0, seed=s) for s in (1, 2)]
    merge_many(second, files, tmp_path / "out")
    out = Checkpoint.open(tmp_path / "out")
    record = out.config.expansion
    assert record is not None and record.base_sha256 == pro.sha256()
    assert record.new_layers == (2, 3, 6, 7, 10, 11)
    (first,) = record.generations
    assert first["new_layers"] == [4, 9] and first["source_layers"] == [1, 3]
    for index, layer in zip(first["new_layers"], (2, 5), strict=True):
        assert layer_bytes(out, index) == layer_bytes(pro, layer)
    strip_checkpoint(out, tmp_path / "back")
    back = Checkpoint.open(tmp_path / "back")
    assert back.sha256() == pro.sha256()
    assert json.loads((back.path / "config.json").read_text()) == json.loads(
        (pro.path / "config.json").read_text()
    )
