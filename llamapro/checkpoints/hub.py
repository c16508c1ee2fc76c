"""Checkpoints by name: `hf://owner/name[@revision]` is fetched from the Hugging Face hub.

Weights as safetensors, JSON, tokenizer and licence files are fetched; pickled weights never are.
The library keeps them in its cache, so a second call costs nothing. `upload` is the way back.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamapro.checkpoints.run import TRAINABLE_FILE
from llamapro.errors import CheckpointError, ConfigError, needed
from llamapro.files import user_path

BASE_CARD_FILE = "BASE_README.md"  # the model card of the base, where README.md is another's
# These files travel with the weights.
COMPANION_FILES = (
    "tokenizer*",
    "original/tokenizer.model",  # Llama 3's ranks
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "USE_POLICY*",
    BASE_CARD_FILE,
)
WEIGHTS = ["model*.safetensors*", TRAINABLE_FILE]  # of a model, or of new blocks alone
ALLOWED = ["config.json", *WEIGHTS, "README.md", *COMPANION_FILES]
NEVER = ["*.bin", "*.pth", "*.pt", "*.pkl"]
# `Path("hf://owner/name")` has one slash left.
_SCHEME = re.compile(r"hf:/{1,2}")
_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def repository(path: str | Path) -> str | None:
    """Returns `owner/name` of an `hf://` path, None of any other; ConfigError for a wrong name."""
    found = _parse(path)
    return found and found["repo"]


def suggest_hub(path: str | Path) -> str:
    """Returns " (did you mean hf://...?)" for a path that looks like a name or page of the hub."""
    text, is_page = re.subn(r"^(https?:/+)?(huggingface\.co|hf\.co)/", "", str(path))
    text = re.sub(r"/((tree|blob|resolve)/.*)?$", "", text) if is_page else text.removesuffix("/")
    return f" (did you mean hf://{text}?)" if _NAME.fullmatch(text) else ""


def check_name(name: str) -> str:
    """Returns `owner/name`, with or without hf:// before it; ConfigError for any other form."""
    repo = _SCHEME.sub("", name, count=1)
    found = _NAME.fullmatch(repo)
    is_odd = re.search(r"--|\.\.|\.git$|[.-]$|(^|/)[.-]", repo) or len(repo) > 96
    if found is None or found["revision"] or is_odd:
        raise ConfigError(
            f"{name}: expected OWNER/NAME of the hub, of letters, digits, '-', '_' and '.'"
        )
    return repo


def _parse(path: str | Path) -> re.Match[str] | None:
    text = str(path)
    if (scheme := _SCHEME.match(text)) is None:
        return None
    if (found := _NAME.fullmatch(text, scheme.end())) is None:
        raise ConfigError(f"{text}: expected hf://owner/name or hf://owner/name@revision")
    return found


def resolve(path: str | Path) -> Path:
    """Returns a local path as it is, and for `hf://owner/name[@revision]` the fetched directory.

    Raises ConfigError if the name is not of that form or `huggingface_hub` is not installed, and
    CheckpointError, with the reason and the fix, if the hub does not give the files.
    """
    found = _parse(path)
    if found is None:
        return user_path(path)
    repo, revision = found["repo"], found["revision"]
    shown = f"hf://{repo}" + (f"@{revision}" if revision else "")
    with _errors_named(shown, "fetched", revision):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=NEVER
        )
    return Path(folder)


def upload(
    repo: str, files: Mapping[str, Path | bytes], private: bool = False, force: bool = False
) -> str:
    """Uploads files in one commit to a repository, which is created if there is none.

    Args:
        files: name in the repository -> a file, or its content.
        private: whether a repository that is created is private.
        force: replace files that the repository holds; weights of another model go.

    Returns:
        The address of the commit.
    """
    with _errors_named(f"hf://{repo}", "uploaded"):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

        if get_token() is None:
            raise ConfigError(
                f"hf://{repo}: no token of the hub: run 'hf auth login', or set HF_TOKEN, with a "
                "token that may write; --dry-run needs none"
            )
        api = HfApi()
        there = set(api.list_repo_files(repo)) if api.repo_exists(repo) else set[str]()
        weights = {name for name in there for kind in WEIGHTS if fnmatch.fnmatch(name, kind)}
        if (taken := sorted(files.keys() & there | weights)) and not force:
            raise ConfigError(
                f"hf://{repo}: holds {', '.join(taken[:5])} already; choose another name, or "
                "replace them with --force (the hub keeps the old ones in its history)"
            )
        changes: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
        changes += [CommitOperationDelete(name) for name in sorted(weights - files.keys())]
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, changes, commit_message="llamapro push").commit_url)


@contextmanager
def _errors_named(shown: str, done: str, revision: str | None = None) -> Iterator[None]:
    """Turns what the library raises into one message with the fix; `done` is fetched, uploaded."""
    before, instead = "", ""
    if done == "fetched":
        before, instead = "not in the cache, and ", "; or give a directory"
    with needed(f"{shown}: needs huggingface_hub", "hub"):
        from huggingface_hub import errors
    # The bases are those of the HTTP library's own errors, another library in every version.
    unreachable: tuple[type[Exception], ...] = (OSError, ValueError)
    unreachable += errors.HfHubHTTPError.__bases__
    try:
        yield
        return
    except errors.GatedRepoError:
        fix = "gated: accept its licence on its page, then run 'hf auth login'"
    except errors.RepositoryNotFoundError:
        fix = "no such repository, or a private one: check the name, or run 'hf auth login'"
    except errors.RevisionNotFoundError:
        fix = f"has no revision {revision!r}: check the branch, tag or commit"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        fix = f"{before}the hub cannot be reached: go online{instead.replace(';', ',')}"
    except unreachable as error:
        reason = " ".join(str(error).split())[:300]
        fix = f"cannot be {done}: {type(error).__name__}: {reason}"
        if re.search(r"\b40[13]\b", reason):
            fix += "; 'hf auth login' takes a token that may do this"
    raise CheckpointError(f"{shown}: {fix}")
