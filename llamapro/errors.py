"""A mistake of the user: one message without a traceback, and exit status 2."""

import difflib


class UserError(Exception):
    """A mistake of the user's: commands print its message without a traceback and exit 2."""


class ConfigError(UserError):
    """A setting or a `config.json` field is missing, unknown or impossible."""


class DivergedError(UserError):
    """A gradient is not finite: with these data and this learning rate training cannot go on."""


class CheckpointError(UserError):
    """A checkpoint file is missing, damaged, or does not fit the model or its base."""


class DataError(UserError):
    """A corpus or tokenizer file is missing, empty, unreadable or of another vocabulary."""


def suggest(name: str, known: list[str], cutoff: float = 0.6) -> str:
    """Returns " (did you mean 'x'?)" for the nearest known name, or "" if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""
