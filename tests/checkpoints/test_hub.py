"""hf://owner/name: what is fetched, where it then lies, and what is said when it cannot be."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llamapro.checkpoints import hub
from llamapro.checkpoints.directory import Checkpoint
from llamapro.config import ModelConfig
from llamapro.errors import CheckpointError, ConfigError


class HTTPError(Exception):
    """Of the HTTP library: none of the built-in errors."""


class HfHubHTTPError(HTTPError, OSError):
    pass


class RepositoryNotFoundError(HfHubHTTPError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(HfHubHTTPError):
    pass


class LocalEntryNotFoundError(FileNotFoundError):
    pass


class OfflineModeIsEnabled(ConnectionError):
    pass


ERRORS = (HTTPError, HfHubHTTPError, RepositoryNotFoundError, GatedRepoError)
ERRORS += (RevisionNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled)


class Hub:
    """Stands in for `huggingface_hub`: repositories are folders, a download copies what it may.

    Attributes:
        calls: (repository, revision) of each download.
        failure: raised instead, if given.
    """

    def __init__(self, repositories: Path, cache: Path) -> None:
        self.repositories, self.cache = repositories, cache
        self.calls: list[tuple[str, str | None]] = []
        self.failure: Exception | None = None

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        self.calls.append((repo_id, revision))
        if self.failure:
            raise self.failure
        source, target = self.repositories / repo_id, self.cache / repo_id
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()

            def matches(patterns: list[str], name: str = name) -> bool:
                return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

            if file.is_file() and matches(allow_patterns) and not matches(ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
        return str(target)


@pytest.fixture
def fake(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> Hub:
    """A hub with one repository, jo/tiny-llama, two shards and an index."""
    fake = Hub(tmp_path / "hub", tmp_path / "cache")
    config = tiny_config(hidden_size=16, intermediate_size=16)
    repo = tmp_path / "hub" / "jo" / "tiny-llama"
    write_random_checkpoint(repo, config, max_shard_bytes=40_000)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "consolidated.safetensors"):
        (repo / name).write_bytes(b"the same again")
    (repo / "original").mkdir()
    (repo / "original" / "model.safetensors").write_bytes(b"and again")
    (repo / "README.md").write_text("# Tiny\n")
    (repo / "LICENSE.txt").write_text("be kind")
    (repo / "tokenizer.bin").write_bytes(b"pickled")
    module = ModuleType("huggingface_hub")
    module.snapshot_download = fake.snapshot_download  # type: ignore[attr-defined]
    module.errors = SimpleNamespace(**{e.__name__: e for e in ERRORS})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return fake


def test_a_local_path_is_returned_as_it_is(fake: Hub) -> None:
    """Also one that does not exist, and one that looks like a repository."""
    for path in ("checkpoints/x", "jo/tiny-llama", "runs/hf:/x"):
        assert hub.resolve(path) == Path(path) and hub.repository(path) is None
    assert fake.calls == []


@pytest.mark.parametrize("kind", [str, Path])
def test_a_repository_is_fetched_and_opens_as_a_checkpoint(
    fake: Hub, kind: Callable[[str], Any]
) -> None:
    """As text and as a path, which loses a slash; weights once, and nothing pickled."""
    path = hub.resolve(kind("hf://jo/tiny-llama"))
    source = Checkpoint.open(fake.repositories / "jo" / "tiny-llama")
    assert Checkpoint.open(path).sha256() == source.sha256()
    assert hub.repository(kind("hf://jo/tiny-llama")) == "jo/tiny-llama"
    found = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    shards = {tensor.file.name for tensor in source.tensors.values()}
    assert len(shards) > 1
    assert found - shards == {
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.model",
        "README.md",
        "LICENSE.txt",
    }


def test_a_revision_is_asked_for(fake: Hub) -> None:
    """A branch with a slash as well; without one the library's default."""
    for name in ("hf://jo/tiny-llama@refs/pr/1", Path("hf://jo/tiny-llama@v1.0")):
        hub.resolve(name)
    hub.resolve("hf://jo/tiny-llama")
    assert [revision for _, revision in fake.calls] == ["refs/pr/1", "v1.0", None]
    assert hub.repository("hf://jo/tiny-llama@v1.0") == "jo/tiny-llama"


@pytest.mark.parametrize("name", ["hf://", "hf://jo", "hf://jo/a/b", "hf://../x", "hf://jo/x@"])
def test_a_name_of_another_form_is_refused(fake: Hub, name: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigError, match="expected hf://owner/name"):
        hub.resolve(name)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (GatedRepoError("403"), "gated: accept its licence"),
        (RepositoryNotFoundError("404"), "no such repository, or a private one"),
        (RevisionNotFoundError("404"), "has no revision 'v1'"),
        (LocalEntryNotFoundError("x"), "not in the cache, and the hub cannot be reached"),
        (OfflineModeIsEnabled("x"), "not in the cache, and the hub cannot be reached"),
        (HTTPError("proxy\nsaid no"), "cannot be fetched: HTTPError: proxy said no"),
        (OSError(28, "No space left on device"), "cannot be fetched: .*No space left"),
        (ValueError("Repo id"), "cannot be fetched: ValueError: Repo id"),
    ],
)
def test_the_hub_s_errors_become_one_line_with_the_fix(
    fake: Hub, failure: Exception, message: str
) -> None:
    """Each names the repository as it was given."""
    fake.failure = failure
    with pytest.raises(CheckpointError, match=f"^hf://jo/tiny-llama@v1: {message}") as error:
        hub.resolve("hf://jo/tiny-llama@v1")
    assert "\n" not in str(error.value)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for a name on the hub: a directory needs no library."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert hub.resolve("checkpoints/x") == Path("checkpoints/x")
    with pytest.raises(ConfigError, match=r"pip install 'llamapro\[hub\]'"):
        hub.resolve("hf://jo/tiny-llama")


def test_the_real_library_offline_says_to_go_online(root: Path, tmp_path: Path) -> None:
    """From the command line: one line, exit status 2, no traceback."""
    pytest.importorskip("huggingface_hub")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = [sys.executable, "convert.py", "inspect", "hf://jo/tiny-llama", "--json"]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "hf://jo/tiny-llama: not in the cache, and the hub cannot be reached" in done.stderr


def test_the_real_library_finds_what_its_cache_holds(
    root: Path,
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """Offline, a repository fetched before still opens: its files are links there."""
    pytest.importorskip("huggingface_hub")
    config = tiny_config(hidden_size=16, intermediate_size=16)
    local = write_random_checkpoint(tmp_path / "local", config)
    repo, commit = tmp_path / "hub" / "models--jo--tiny-llama", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in local.iterdir():
        shutil.copyfile(file, repo / "blobs" / file.name)
        (repo / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    env.pop("HF_HUB_CACHE", None)
    words = [sys.executable, "convert.py", "verify", "hf://jo/tiny-llama", "--json"]
    done = subprocess.run(words, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sha256"] == Checkpoint.open(local).sha256()
