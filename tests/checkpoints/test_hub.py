"""hf://owner/name is fetched into the cache, or one message says why it cannot be."""

import fnmatch
import json
import runpy
import shutil
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
    """The HTTP library's own error, which is none of the built-in ones."""


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
    """So is one that does not exist, and one that looks like a repository."""
    for path in ("checkpoints/x", "jo/tiny-llama", "runs/hf:/x"):
        assert hub.resolve(path) == Path(path) and hub.repository(path) is None
    assert fake.calls == []


@pytest.mark.parametrize("kind", [str, Path])
def test_a_repository_is_fetched_and_opens_as_a_checkpoint(
    fake: Hub, kind: Callable[[str], Any]
) -> None:
    """The name may be a path, which loses a slash; nothing pickled is fetched."""
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
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hub\]'"):
        hub.resolve("hf://jo/tiny-llama")


@pytest.fixture
def offline(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The command line of convert.py; the real library is offline, with its cache in `hub`."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return runpy.run_path(str(root / "convert.py"))["main"]


def test_the_real_library_offline_says_to_go_online(
    offline: Callable[..., None], run_command: Callable[..., Any]
) -> None:
    """The command prints one line and exits with status 2."""
    status, out, said = run_command(offline, "inspect", "hf://jo/tiny-llama", "--json")
    assert status == 2 and out == ""
    assert "hf://jo/tiny-llama: not in the cache, and the hub cannot be reached" in said


def test_the_real_library_finds_what_its_cache_holds(
    offline: Callable[..., None],
    run_command: Callable[..., Any],
    tmp_path: Path,
    tiny_config: Callable[..., ModelConfig],
    write_random_checkpoint: Callable[..., Path],
) -> None:
    """A repository that was fetched before opens offline; its files are links there."""
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
    status, out, said = run_command(offline, "verify", "hf://jo/tiny-llama", "--json")
    assert status == 0, said
    assert json.loads(out)["sha256"] == Checkpoint.open(local).sha256()
