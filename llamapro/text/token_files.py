"""The files beside a vocabulary, which add tokens and give them names and roles."""

from pathlib import Path
from typing import Any

from llamapro.errors import DataError
from llamapro.files import read_json
from llamapro.text.vocabulary import JSON_NAME, AddedToken

# Optional files beside the vocabulary that name tokens.
COMPANIONS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
MAX_JSON_BYTES = 1 << 28  # the largest tokenizer.json of a public model has 33 MB


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if there is no such file; raises DataError."""
    return read_json(path, MAX_JSON_BYTES, DataError) if path.exists() else {}


def name_of(token: Any) -> str | None:
    """Returns a token's name, which may be a string or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def added_tokens(
    directory: Path, names: dict[str, Any], raw_json: dict[str, Any]
) -> dict[str, AddedToken]:
    """Returns the tokens that the files of a directory add to its vocabulary, or rename.

    Args:
        names: `special_tokens_map.json` and `tokenizer_config.json`, as one object.
        raw_json: `tokenizer.json`, or {}.

    Raises:
        DataError: an entry is not a token, or two files disagree about its id.
    """
    lists = [names.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
    lists = [[*found.values()] if isinstance(found, dict) else found for found in lists]
    roles = {name_of(token) for key, token in names.items() if key.endswith("_token")}
    roles |= {name_of(token) for tokens in lists for token in tokens}
    sources: dict[str, list[dict[str, Any]]] = {
        JSON_NAME: raw_json.get("added_tokens", []),
        COMPANIONS[0]: [
            {"id": i, **token} for i, token in (names.get("added_tokens_decoder") or {}).items()
        ],
        COMPANIONS[1]: [
            {"id": i, "content": name, "special": name in roles}
            for name, i in read_object(directory / COMPANIONS[1]).items()
        ],
    }
    added: dict[str, AddedToken] = {}
    for source, tokens in sources.items():
        for raw in tokens:
            try:
                name, flags = raw["content"], (raw.get(k, False) for k in ("lstrip", "rstrip"))
                token = AddedToken(int(raw["id"]), bool(raw.get("special", False)), *flags)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{directory / source}: added token {raw!r}: {error!r}") from None
            if name not in added:
                added[name] = token
            elif added[name].id != token.id:
                raise DataError(
                    f"{directory / source}: {name!r} is token {token.id}, but another file there "
                    f"says {added[name].id}; remove the one that is not of the model"
                )
    return added
