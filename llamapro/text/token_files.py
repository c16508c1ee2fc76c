"""The files beside a vocabulary, which add tokens and give them names and roles.

Several files may say the same. Where they differ, what transformers 5 reads counts, and is said.
Two ids for a token, or two tokens for an id, are refused.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamapro.errors import DataError, warn
from llamapro.files import read_json
from llamapro.text.vocabulary import JSON_NAME, AddedToken, Vocabulary, byte_characters

# Optional files beside the vocabulary that name tokens.
COMPANIONS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
_CONFIG, _ADDED, _ROLES = COMPANIONS
MAX_JSON_BYTES = 1 << 28  # the largest tokenizer.json of a public model has 33 MB
_FLAGS = ("lstrip", "rstrip", "single_word")
_SPACE = r"[^\S\x1c-\x1f]"  # these four are white space for Python alone
_EXTRA = ("extra_special_tokens", "model_specific_special_tokens")  # lists, or role -> token


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, {} if there is no such file; raises DataError."""
    return read_json(path, MAX_JSON_BYTES, DataError) if path.exists() else {}


def name_of(token: Any) -> str | None:
    """Returns a token's name, which may be a string or an object with `content`; None if empty."""
    name = token.get("content") if isinstance(token, dict) else token
    return None if name == "" else name


def read_roles(directory: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json` with the roles of tokens that count, a model's own too.

    Beside an `added_tokens_decoder`, `special_tokens_map.json` is not read; otherwise it comes
    first. A difference is said.
    """
    config, roles = read_object(directory / _CONFIG), read_object(directory / _ROLES)
    has_table = "added_tokens_decoder" in config
    for key in (key for key in roles if key.endswith("_token")):
        here, there = name_of(config.get(key)), name_of(roles[key])
        if here != there and (has_table or key in config):
            taken = _CONFIG if has_table else _ROLES
            warn(
                f"{directory}: {key} is {here!r} in {_CONFIG} and {there!r} in {_ROLES}: {taken} "
                f"counts, as in transformers 5"
            )
    return config if has_table else config | roles


def roles_of(names: dict[str, Any]) -> dict[str, Any]:
    """Returns role -> token, of any role that ends in "_token" or is one of the model's own."""
    found = {key: token for key, token in names.items() if key.endswith("_token")}
    for own in map(names.get, _EXTRA):
        found |= own if isinstance(own, dict) else {}
    return {key: token for key, token in found.items() if isinstance(name_of(token), str)}


def _lists(names: dict[str, Any]) -> list[Any]:
    """Returns the tokens without a role that are control tokens if no list says what they are."""
    found = map(names.get, ("additional_special_tokens", *_EXTRA))
    return [token for part in found if isinstance(part, list) for token in part]


def added_tokens(
    directory: Path, names: dict[str, Any], raw_json: dict[str, Any]
) -> dict[str, AddedToken]:
    """Returns the tokens that the files of a directory add to its vocabulary, or rename.

    `names` are those of `read_roles`. Raises DataError for an entry that is not a token, or if two
    files disagree about its id.
    """
    roles = {name_of(token) for token in [*roles_of(names).values(), *_lists(names)]}
    sources: dict[str, list[dict[str, Any]]] = {
        JSON_NAME: raw_json.get("added_tokens", []),
        _CONFIG: [{"id": i, **t} for i, t in (names.get("added_tokens_decoder") or {}).items()],
        _ADDED: [
            {"id": i, "content": name, "special": name in roles}
            for name, i in read_object(directory / _ADDED).items()
        ],
    }
    added: dict[str, AddedToken] = {}
    by_id: dict[int, str] = {}
    for source, tokens in sources.items():
        for raw in tokens:
            try:
                name, flags = raw["content"], {key: raw.get(key, False) for key in _FLAGS}
                special = bool(raw.get("special", False))
                changed = bool(raw.get("normalized", not special))  # as in transformers
                token = AddedToken(int(raw["id"]), special, **flags, normalized=changed)
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{directory / source}: added token {raw!r}: {error!r}") from None
            if name == "":  # it stands for nothing, and is not read, as in transformers
                continue
            known, other = added.get(name), by_id.get(token.id, name)
            if (known or token).id != token.id:
                raise DataError(
                    f"{directory / source}: {name!r} is token {token.id}, but another file there "
                    f"says {added[name].id}; remove the one that is not of the model"
                )
            if other != name:
                raise DataError(
                    f"{directory / source}: token {token.id} is {name!r}, but another file there "
                    f"says {other!r}; remove the one that is not of the model"
                )
            if source == _ADDED and (known or "added_tokens_decoder" in names):
                if known is None:
                    warn(
                        f"{directory / source}: {name!r} is not read, as in transformers 5: the "
                        f"added_tokens_decoder of {_CONFIG} has no such token"
                    )
                continue
            if known not in (None, token):
                warn(
                    f"{directory}: {name!r} is {_flags(known)} in {JSON_NAME} and {_flags(token)} "
                    f"in {_CONFIG}, which counts, as in transformers 5"
                )
            added[name], by_id[token.id] = token, name
    return added


def _flags(token: AddedToken | None) -> str:
    """Returns the flags of a token in words."""
    flags = [key for key in ("special", *_FLAGS) if getattr(token, key)]
    return " and ".join(flags) or "an ordinary word"


def join_tokens(
    directory: Path, names: dict[str, Any], own: dict[str, AddedToken], vocabulary: Vocabulary
) -> dict[str, AddedToken]:
    """Returns all added tokens by name; adds to `own` those that transformers 5 makes of a role."""
    tokens = dict(vocabulary.added)
    following = max(*vocabulary.pieces, *(t.id for t in tokens.values())) + 1
    for name, token in sorted(own.items(), key=lambda item: item[1].id):
        if (given := tokens.get(name, token).id) != token.id:
            raise DataError(
                f"{directory}: {name!r} is token {token.id} in its files, but {given} in the "
                f"vocabulary; remove the file that is not of the model"
            )
        if token.id > following or not _may_be(name, vocabulary.pieces.get(token.id)):
            warn(
                f"{directory}: {name!r} is token {token.id}, as its files say; transformers, which "
                f"leaves no gap and renames nothing, makes it token {following}"
            )
        following = max(following, token.id + 1)
        # A reserved token may get a name here; two names for one id would be ambiguous.
        tokens = {n: t for n, t in tokens.items() if n == name or t.id != token.id}
        tokens[name] = token
    roles = roles_of(names)
    for key in ("bos_token", "eos_token"):
        if key not in roles and name_of(names.get(key)) is not None:
            raise DataError(f"{directory}: {key} is {names[key]!r:.80}, which is no token of it")
    for key, raw in [*roles.items(), *(("extra_special_tokens", t) for t in _lists(names))]:
        role = name_of(raw)
        if role is None or (role in tokens and key not in roles):
            continue
        found = tokens.get(role) or _piece(vocabulary, role)
        if found is None and key in ("bos_token", "eos_token"):
            raise DataError(f"{directory}: {key} is {role!r}, which is no token of it")
        if found is None:
            flags = {key: raw[key] for key in _FLAGS if isinstance(raw, dict) and key in raw}
            found, following = AddedToken(following, special=True, **flags), following + 1
            warn(f"{directory}: {key} {role!r} is in no list: token {found.id}, as in transformers")
        if tokens.get(role) != (control := replace(found, special=True)):
            tokens[role] = own[role] = control
    return tokens


def _may_be(name: str, piece: bytes | None) -> bool:
    """Whether a token's name, sentencepiece's or a byte-level one, is that of a piece, if any."""
    if piece is None or name.replace("\u2581", " ").encode() == piece:
        return True
    return name == "".join(map(byte_characters().__getitem__, piece))


def _piece(vocabulary: Vocabulary, name: str) -> AddedToken | None:
    """Returns an ordinary token of the vocabulary as one that can have a role."""
    text = name.replace("\u2581", " ").encode()
    found = next((i for i, piece in vocabulary.pieces.items() if piece == text), None)
    return None if found is None else AddedToken(found, special=False)


def names_pattern(
    tokens: dict[str, AddedToken], others: dict[str, AddedToken]
) -> re.Pattern[str] | None:
    """Returns a pattern, one group, that matches the tokens' names in a text, longest first.

    A token takes the white space around it up to where a name begins that is found before, or with
    it; such names of `others` are matched, too, and longer ones that hold a token's name.
    """
    if not tokens:
        return None
    spaced = {n: t for n, t in (others | tokens).items() if re.match(_SPACE, n)}

    def stops(token: AddedToken) -> set[str]:
        strips = token.lstrip or token.rstrip
        return {n for n, t in spaced.items() if strips and t.normalized <= token.normalized}

    def part(name: str, token: AddedToken) -> str:
        names = "|".join(map(re.escape, sorted(stops(token))))
        space = f"(?:(?!{names}){_SPACE})*" if names else f"{_SPACE}*"
        return (
            r"(?<!\w)" * token.single_word
            + space * token.lstrip
            + re.escape(name)
            + r"(?!\w)" * token.single_word
            + space * token.rstrip
        )

    found = tokens | {n: spaced[n] for token in tokens.values() for n in stops(token)}
    for name, token in tokens.items():
        longer = {n: t for n, t in others.items() if name in n}
        found |= {n: t for n, t in longer.items() if t.normalized <= token.normalized}
    ordered = sorted(found.items(), key=lambda item: len(item[0]), reverse=True)
    return re.compile(f"({'|'.join(part(name, token) for name, token in ordered)})")
