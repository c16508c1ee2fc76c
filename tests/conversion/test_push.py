"""`llamapro push` puts what others load on the hub, and nothing of the user's own."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors

from llamapro import push
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.new_blocks import read_blocks
from llamapro.config import ModelConfig
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge
from llamapro.conversion.model_card import Training
from llamapro.expansion import interleave

Push = Callable[..., tuple[int, str, str]]
CARD = "---\nlicense: apache-2.0\n---\n# Tiny Llama\n"
FOUND = {"code": 1.5}
SETTINGS = {"data.train": ["/home/jo/code"], "optim.lr": 0.0002}


class Hub:
    """Stands in for `huggingface_hub`: repositories are dicts of bytes.

    Attributes:
        failure: raised by every call of the API, if given.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.token: str | None = "hf_x"
        self.failure: Exception | None = None

    def repo_exists(self, repo: str) -> bool:
        if self.failure:
            raise self.failure
        return repo in self.repositories

    def list_repo_files(self, repo: str) -> list[str]:
        return list(self.repositories[repo])

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.repositories.setdefault(repo, {".gitattributes": b""})
        self.private.setdefault(repo, private)

    def create_commit(self, repo: str, changes: list[Any], commit_message: str) -> Any:
        for change in changes:
            if change.content is None:
                del self.repositories[repo][change.name]
            else:
                self.repositories[repo][change.name] = change.content
        return SimpleNamespace(commit_url=f"hub/{repo}/commit/1")


def add(name: str, file: Path | bytes) -> Any:
    content = file if isinstance(file, bytes) else file.read_bytes()
    return SimpleNamespace(name=name, content=content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub, module = Hub(), ModuleType("huggingface_hub")
    module.HfApi = lambda: hub  # type: ignore[attr-defined]
    module.errors = errors  # type: ignore[attr-defined]
    module.get_token = lambda: hub.token  # type: ignore[attr-defined]
    module.CommitOperationAdd = add  # type: ignore[attr-defined]
    delete = lambda name: SimpleNamespace(name=name, content=None)  # noqa: E731
    module.CommitOperationDelete = delete  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return hub


@pytest.fixture
def run(run_command: Any) -> Push:
    return lambda *words: run_command(push.main, *words)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
    write_step: Callable[..., Path],
) -> Path:
    """A base with a licence, its expansion, a run of conversations on it, and what merge makes."""
    home = tmp_path_factory.mktemp("push")
    config = tiny_config(hidden_size=16, intermediate_size=16, _name_or_path="jo/tiny-llama")
    (write_random_checkpoint(home / "base", config) / "README.md").write_text(CARD)
    expand_checkpoint(Checkpoint.open(home / "base"), home / "pro", interleave(4, 2))
    state = {"evaluated": 7, "eval": FOUND, "base_eval": {"code": 2.5}, "tokens": 512}
    state |= {"settings": SETTINGS | {"model.path": str(home / "pro")}, "chat_template": "{{ x }}"}
    write_step(home / "run", Checkpoint.open(home / "pro"), 7, state)
    merge(home / "pro", [home / "run"], home / "merged")
    (home / "merged" / "pytorch_model.bin").write_bytes(b"pickled")
    (home / "merged" / "notes.txt").write_text("mine")
    return home


def test_a_dry_run_needs_neither_token_nor_library(
    run: Push, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows files, sizes and the card with the name in it; pickles and notes stay at home."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    status, out, _ = run(home / "merged", "jo/pro", "--dry-run")
    assert status == 0 and "left out: notes.txt, pytorch_model.bin" in out
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "BASE_README.md"):
        assert name in out
    assert 'from_pretrained("jo/pro")' in out and "apply_chat_template" in out
    assert "license: apache-2.0" in out and "base_model: jo/tiny-llama" in out
    assert "2.500 (12.18) | 1.500 (4.48)" in out and "OWNER/NAME" not in out
    status, out, _ = run(home / "run", "hf://jo/blocks", "--dry-run", "--json")
    found = json.loads(out)
    assert found["repository"] == "jo/blocks" and found["address"] is None
    assert set(found["files"]) == {
        "README.md", "config.json", "trainable.safetensors", "chat_template.jinja",
    }  # fmt: skip
    assert "llamapro generate hf://jo/tiny-llama --blocks hf://jo/blocks" in found["card"]
    assert "2 new blocks for a base of 4 frozen ones" in found["card"]
    assert "license: apache-2.0" in found["card"] and "/home/jo" not in found["card"]
    status, _, said = run(home / "merged", "jo/pro")
    assert status == 2 and "pip install -e '.[hub]'" in said


def test_what_is_uploaded_loads_from_the_hub(
    run: Push, hub: Hub, home: Path, tmp_path: Path
) -> None:
    """A model, and new blocks that merge into their base with the template of their training."""
    status, out, _ = run(home / "merged", "jo/pro", "--private")
    assert status == 0 and "uploaded to hub/jo/pro/commit/1" in out and hub.private["jo/pro"]
    run(home / "run", "jo/blocks")
    for repo, files in hub.repositories.items():
        for name, content in files.items():
            file = tmp_path / repo / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    model, blocks = tmp_path / "jo" / "pro", tmp_path / "jo" / "blocks" / "trainable.safetensors"
    assert Checkpoint.open(model).sha256() == Checkpoint.open(home / "merged").sha256()
    config = Checkpoint.open(model).config
    assert config.expansion and config.expansion.new_sha256
    record = replace(config.expansion, new_sha256=None)  # a merged model's own
    assert ModelConfig.from_file(blocks.parent / "config.json") == replace(config, expansion=record)
    assert Training.of(read_blocks(blocks)).template == "{{ x }}"
    merge(home / "base", [blocks], tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ x }}"


def test_a_repository_is_replaced_only_if_asked_for(run: Push, hub: Hub, home: Path) -> None:
    """What it holds is named; with --force the weights of the model before go, and nothing else."""
    before = {"model-00002-of-00002.safetensors": b"old", "config.json": b"old", "demo.py": b"x"}
    hub.repositories["jo/pro"] = dict(before)
    status, _, said = run(home / "merged", "jo/pro")
    assert status == 2 and "holds config.json, model-00002-of-00002.safetensors already" in said
    assert hub.repositories["jo/pro"] == before
    assert run(home / "merged", "jo/pro", "--force")[0] == 0
    found = hub.repositories["jo/pro"]
    assert "model-00002-of-00002.safetensors" not in found and found["demo.py"] == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "jo",
        "jo/a/b",
        "../x",
        "jo/x@main",
        "jo/-x",
        "jo/x.git",
        "jo/a--b",
        "jo/" + "x" * 99,
        "j o/x",
    ],
)
def test_a_name_that_the_hub_refuses_is_refused_here(run: Push, home: Path, name: str) -> None:
    """Before anything is read or asked."""
    status, out, said = run(home / "nowhere", name)
    assert status == 2 and out == "" and f"{name}: expected OWNER/NAME" in said


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached: go online"),
        (
            OSError("Name or service not known"),
            "cannot be uploaded: OSError: Name or service not known",
        ),
        (
            OSError("403"),
            "cannot be uploaded: OSError: 403; 'hf auth login' takes a token that may",
        ),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_message(
    run: Push, hub: Hub, home: Path, failure: Exception, expected: str
) -> None:
    """So is a token that may not write."""
    hub.failure = failure
    status, _, said = run(home / "merged", "jo/pro")
    warning, error = said.splitlines()
    assert "pytorch_model.bin: not read" in warning
    assert status == 2 and error.startswith(f"CheckpointError: hf://jo/pro: {expected}")


def test_mistakes_are_named_before_anything_is_uploaded(
    run: Push, hub: Hub, home: Path, tmp_path: Path, write_step: Callable[..., Path]
) -> None:
    """No token, all weights trained, no base known, no card, a link to the user's secrets."""
    everything = write_step(tmp_path / "all", Checkpoint.open(home / "pro"), 1, trainable="all")
    alone = tmp_path / "alone.safetensors"
    os.link(home / "run" / "checkpoints" / "step-00000007" / "trainable.safetensors", alone)
    linked = tmp_path / "linked"
    merge(home / "pro", [home / "run"], linked)
    (tmp_path / "secret").write_text("secret")
    (linked / "LICENSE").symlink_to(tmp_path / "secret")
    no_card = tmp_path / "no-card"
    no_card.mkdir()
    for file in (home / "base").iterdir():
        if file.name != "README.md":
            os.link(file, no_card / file.name)
    for source, message in (
        (everything, "holds all weights of a model, not new blocks"),
        (alone, "does not say what it was trained on: give --base DIR"),
        (no_card, "has no README.md; write one"),
        (linked, "a link that leaves its directory"),
    ):
        status, _, said = run(source, "jo/x")
        assert status == 2 and message in said, said
    status, _, said = run(home / "merged", "jo/x", "--license", "be kind")
    assert status == 2 and "--license 'be kind': expected a short name" in said
    hub.token = None
    status, _, said = run(alone, "jo/x", "--base", home / "base")
    assert status == 2 and "no token of the hub: run 'hf auth login'" in said
    assert not hub.repositories


def test_a_licence_that_nobody_knows_is_said(
    run: Push, home: Path, tmp_path: Path, tiny_config: Any, write_random_checkpoint: Any
) -> None:
    """--license names one, in a card that has another or no front matter too."""
    path = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=1))
    (path / "README.md").write_text("# Mine\n")
    _, _, said = run(path, "jo/m", "--dry-run")
    assert "no licence is known, so the card names none; give --license" in said
    _, out, said = run(path, "jo/m", "--dry-run", "--license", "mit", "--json")
    assert not said and json.loads(out)["card"] == "---\nlicense: mit\n---\n# Mine\n"
    _, out, _ = run(home / "merged", "jo/m", "--dry-run", "--license", "mit")
    assert out.count("license: ") == 1 and "license: mit" in out


@pytest.mark.parametrize(
    "licence",
    ['license: "mit"', "license: mit  # ours", "license:\n- mit\n- isc", "license: mit "],
    ids=["quoted", "comment", "list", "space"],
)
def test_a_licence_is_known_however_its_card_writes_it(
    run: Push, tmp_path: Path, tiny_config: Any, write_random_checkpoint: Any, licence: str
) -> None:
    """An expanded model has its base's; --license replaces all lines of it and no other line."""
    base = write_random_checkpoint(tmp_path / "m", tiny_config(num_hidden_layers=2))
    (base / "README.md").write_text(f"---\nlanguage:\n- en\n{licence}\ntags: x\n---\n# Mine\n")
    _, out, said = run(base, "jo/m", "--dry-run", "--license", "isc", "--json")
    front = "---\nlanguage:\n- en\ntags: x\nlicense: isc\n---\n"
    assert not said and json.loads(out)["card"] == f"{front}# Mine\n"
    expand_checkpoint(Checkpoint.open(base), tmp_path / "pro", interleave(2, 1))
    _, out, said = run(tmp_path / "pro", "jo/m", "--dry-run", "--json")
    assert not said and f"\n{licence.strip()}\n" in json.loads(out)["card"]
