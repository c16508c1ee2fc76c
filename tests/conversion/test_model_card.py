"""The model card: it says what record, state and log of the run say; all else is left out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamapro import expansion
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import BlocksInfo
from llamapro.checkpoints.run import STATE_FILE
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint, merge_many
from llamapro.conversion.model_card import Training, licence, render

STATE = {
    "step": 100,
    "tokens": 1_638_400,
    "eval": {"general": 2.25, "code": 1.5},
    "evaluated": 100,
    "elapsed_s": 60.0,
    "loss": 1.4,
    "base_eval": {"general": 2.0, "code": 2.5},
    "settings": {
        "model.path": "/home/jo/pro",
        "data.train": ["/home/jo/corpora/code"],
        "data.seq_len": 512,
        "optim.lr": 0.0002,
        "optim.betas": [0.9, 0.95],
    },
    "identity": {
        "base": "0" * 64,
        "tokenizer": "1" * 64,
        "data": {
            "train /home/jo/corpora/code/": {"tokens": 2_000_000, "sha256": "ab" * 32},
            "val general": {"tokens": 5000, "sha256": "cd" * 32},
        },
    },
}

Write = Callable[..., Path]
CARD = "---\nlicense: other\nlicense_name: tiny\nlanguage: en\n---\n# Tiny Llama\n"


@pytest.fixture
def write_run(write_step: Write, pro: Checkpoint) -> Write:
    """`write_run(path)`: a run of 100 steps; returns its new-block file."""
    return lambda path, step=100: write_step(path, pro, step, STATE)


@pytest.fixture(scope="module")
def pro(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Write,
) -> Checkpoint:
    """A base with a name and a card of its own, expanded by two blocks."""
    home = tmp_path_factory.mktemp("card")
    config = tiny_config(hidden_size=16, intermediate_size=16, _name_or_path="jo/tiny-llama")
    base = write_random_checkpoint(home / "base", config)
    (base / "README.md").write_text(CARD)
    expand_checkpoint(Checkpoint.open(base), home / "pro", expansion.interleave(4, 2))
    return Checkpoint.open(home / "pro")


def merged_card(pro: Checkpoint, run: Path) -> str:
    out = run.parent / "tiny-llama-code"
    merge_checkpoint(pro, run, out)
    return (out / "README.md").read_text()


def rows(card: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = (line.strip("| ") for line in card.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_card_tells_base_blocks_data_settings_and_losses(
    pro: Checkpoint, tmp_path: Path, write_run: Write
) -> None:
    """Everything the run knows, and nothing of whose machine it was."""
    write_run(tmp_path / "run")
    card = merged_card(pro, tmp_path / "run")
    front, page = card.removeprefix("---\n").split("---\n", 1)
    assert front.splitlines() == [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "license: other",
        "license_name: tiny",
        "base_model: jo/tiny-llama",
        "tags:",
        "- llamapro",
    ]
    record = pro.config.expansion
    assert record is not None
    assert "# tiny-llama-code" in page and record.base_sha256 in page
    assert "4 frozen blocks and 2 new ones" in page
    assert "100 optimizer steps on 1,638,400 tokens." in page
    for row in (
        ["2", "1"],
        ["5", "3"],
        ["train", "code", "2,000,000", "ab" * 8],
        ["data.seq_len", "512"],
        ["optim.lr", "0.0002"],
        ["validation set", "before training", "after step 100", "change"],
        ["general", "2.000 (7.39)", "2.250 (9.49)", "+0.250"],
        ["code", "2.500 (12.18)", "1.500 (4.48)", "-1.000"],
    ):
        assert row in rows(page)
    assert "home" not in card
    assert 'from_pretrained("OWNER/NAME")' in page and "Once upon a time" in page
    # From expand on, the base's own card travels under another name.
    for path in (pro.path, tmp_path / "tiny-llama-code"):
        assert (path / "BASE_README.md").read_text() == CARD
    assert not (pro.path / "README.md").exists()
    assert "`BASE_README.md`" in card


def test_a_new_block_file_alone_gives_a_card_without_training(
    pro: Checkpoint, tmp_path: Path, write_run: Write
) -> None:
    """Beside other files too: only a training checkpoint's own state is its story."""
    file = write_run(tmp_path / "run")
    (tmp_path / "shared").mkdir()
    file.rename(tmp_path / "shared" / "code.safetensors")
    (tmp_path / "shared" / STATE_FILE).write_text(json.dumps(STATE))
    card = merged_card(pro, tmp_path / "shared" / "code.safetensors")
    assert "100 optimizer steps." in card and ["5", "3"] in rows(card)
    assert "optim.lr" not in card and "validation" not in card


def test_what_was_evaluated_before_training_only_is_no_result(pro: Checkpoint) -> None:
    """A run that saved before its second evaluation has measured nothing yet."""
    info = BlocksInfo.of(pro.config, "new_blocks", 50)
    training = Training(info, STATE | {"evaluated": 0})
    assert "validation set" not in render("x", pro.config, [training], Path("none"))


def test_a_set_without_a_first_loss_shows_no_change(pro: Checkpoint) -> None:
    """An earlier version did not save it."""
    state = STATE | {"base_eval": {}}
    training = Training(BlocksInfo.of(pro.config, "new_blocks", 100), state)
    assert ["general", "-", "2.250 (9.49)", "-"] in rows(
        render("x", pro.config, [training], Path("none"))
    )


def test_several_files_say_that_they_were_not_measured_together(
    pro: Checkpoint, tmp_path: Path, write_run: Write
) -> None:
    """Each has its own section."""
    files = [write_run(tmp_path / f"run{step}", step) for step in (100, 200)]
    merge_many(pro, files, tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert "## Training of new-block file 1" in card and "file 2" in card
    assert "4 frozen blocks and 4 new ones" in card
    assert "What the blocks do together was not measured" in card


def test_a_damaged_story_does_not_keep_the_blocks_from_being_merged(
    pro: Checkpoint, tmp_path: Path, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state that is no JSON: said on standard error, and left out."""
    file = write_run(tmp_path / "run")
    (file.parent / STATE_FILE).write_text("no JSON")
    merge_checkpoint(pro, file, tmp_path / "again")
    assert f"{STATE_FILE}: damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "state",
    [
        {"settings": 3, "identity": [], "eval": "x", "tokens": "many", "evaluated": 5},
        {"identity": {"data": 3, "tokenizer": 3}, "eval": {"a": "b", "c": None}, "evaluated": {}},
        {"identity": {"data": {"train x": 3}}, "settings": {"optim.lr": None}},
    ],
)
def test_a_stranger_s_state_of_any_shape_makes_a_card(
    pro: Checkpoint, state: dict[str, Any]
) -> None:
    """Entries of a wrong type are left out."""
    training = Training(BlocksInfo.of(pro.config, "new_blocks", 100), state)
    assert training.tokenizer is None
    assert "100 optimizer steps." in render("x", pro.config, [training], Path("none"))


def test_what_a_file_says_can_be_no_markdown_and_no_front_matter(pro: Checkpoint) -> None:
    """Links, tables, new lines and a base_model that is none."""
    raw = pro.config.raw | {"_name_or_path": "x\nlicense: mit"}
    config = ModelConfig.from_dict(raw)
    state = {"settings": {"optim.lr": "1|2\n## [x](y) <b>"}}
    training = Training(BlocksInfo.of(config, "new_blocks", 100), state)
    card = render("x", config, [training], Path("none"))
    assert "license" not in card and "base_model" not in card
    assert r"| optim.lr | 1\|2 \#\# \[x\](y) \<b\> |" in card


@pytest.mark.parametrize(
    "said",
    [
        "license: 'apache-2.0'",
        'license: "mit"  # of the code',
        "license: [mit, other]",
        "license:\n- mit\n- other\nlicense_name: 'Two licences'",
        "license:\n  - mit",
        "license: nobody-1.0\nlicense_name: 'no'",
        "license: other\nlicense_link: https://x.org/a",
    ],
)
def test_a_licence_in_any_form_of_yaml_is_kept(tmp_path: Path, said: str) -> None:
    """In quotes, or a list."""
    (tmp_path / "README.md").write_text(f"---\n{said}\nlanguage: en\n---\n# Tiny\n")
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load("\n".join(licence(tmp_path))) == yaml.safe_load(said)
    assert all(line.startswith("license") for line in licence(tmp_path))  # as push looks for it


@pytest.mark.parametrize(
    "said", "'mit|a: b|\n- mit: x|no|Yes # all|null|1.0|2024-01-01|[mit, off]|\n- true".split("|")
)
def test_a_licence_that_is_no_name_is_left_out(tmp_path: Path, said: str) -> None:
    """It could be anything; and YAML reads `no` as false."""
    (tmp_path / "README.md").write_text(f"---\nlicense: {said}\n---\n# Tiny\n")
    assert licence(tmp_path) == []


def test_a_model_of_which_all_was_trained_claims_no_base(
    pro: Checkpoint, tiny_config: Callable[..., ModelConfig]
) -> None:
    """No record, no hash of a base."""
    card = render("x", tiny_config(), [Training(BlocksInfo("all", "", (), 7), {})], Path("none"))
    assert "All weights of this model were trained" in card
    assert "## Base" not in card and "New blocks" not in card
