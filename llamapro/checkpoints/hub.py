"""Checkpoints by name: `hf://owner/name[@revision]` is fetched from the Hugging Face hub.

Weights as safetensors, JSON, tokenizer and licence files are fetched; pickled weights never are.
The library keeps them in its cache, so a second call costs nothing.
"""

import re
from pathlib import Path

from llamapro.checkpoints.run import TRAINABLE_FILE
from llamapro.errors import CheckpointError, ConfigError
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
    text = re.sub(r"^https?:/+huggingface\.co/", "", str(path)).removesuffix("/")
    return f" (did you mean hf://{text}?)" if _NAME.fullmatch(text) else ""


def _parse(path: str | Path) -> re.Match[str] | None:
    text = str(path)
    if (scheme := _SCHEME.match(text)) is None:
        return None
    if (found := _NAME.fullmatch(text, scheme.end())) is None:
        raise ConfigError(f"{text}: expected hf://owner/name or hf://owner/name@revision")
    return found


def resolve(path: str | Path) -> Path:
    """Returns a local path as it is, and for `hf://owner/name[@revision]` the fetched directory.

    Raises:
        ConfigError: the name is not of that form, or `huggingface_hub` is not installed.
        CheckpointError: the hub does not give the files; the message says why and the fix.
    """
    found = _parse(path)
    if found is None:
        return user_path(path)
    repo, revision = found["repo"], found["revision"]
    shown = f"hf://{repo}" + (f"@{revision}" if revision else "")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise ConfigError(
            f"{shown}: needs huggingface_hub: pip install -e '.[hub]'; or give a directory"
        ) from None
    # The bases are those of the HTTP library's own errors, another library in every version.
    unreachable: tuple[type[Exception], ...] = (OSError, ValueError)
    unreachable += errors.HfHubHTTPError.__bases__
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=ALLOWED, ignore_patterns=NEVER
        )
    except errors.GatedRepoError:
        fix = "gated: accept its licence on its page, then run 'hf auth login'"
    except errors.RepositoryNotFoundError:
        fix = "no such repository, or a private one: check the name, or run 'hf auth login'"
    except errors.RevisionNotFoundError:
        fix = f"has no revision {revision!r}: check the branch, tag or commit"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        fix = "not in the cache, and the hub cannot be reached: go online, or give a directory"
    except unreachable as error:
        fix = f"cannot be fetched: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    else:
        return Path(folder)
    raise CheckpointError(f"{shown}: {fix}")
