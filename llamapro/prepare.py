"""Tokenises the data of a run ahead of it, on one machine or in parts on several.

The options are those of `train`, so that the run finds what it needs in `--data.cache-dir`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamapro import cli
from llamapro.errors import ConfigError
from llamapro.text.parts import Part
from llamapro.training import checks, preset
from llamapro.training.job import Job
from llamapro.training.settings import Settings

DESCRIPTION = """Tokenises the data of a run into its cache, so that no GPU waits for it.

Give the options of the run. Machines that share --data.cache-dir may take a part each.

Examples:
    llamapro prepare --config llama2-7b --data.train corpus/ --shard 3/8
    llamapro prepare --config llama2-7b --data.train corpus/
"""


@dataclass(frozen=True)
class PrepareSettings(Settings):
    """Settings of the run, and what to tokenise here."""

    shard: str = ""
    """Part to tokenise here, such as 3/8, the third of eight. Default: everything."""


def main(argv: Sequence[str] | None = None, prog: str = "python -m llamapro.prepare") -> None:
    """Runs the command with these arguments, those of the process by default."""
    words = sys.argv[1:] if argv is None else argv
    settings = preset.parse(words, prog, PrepareSettings, DESCRIPTION)
    assert isinstance(settings, PrepareSettings)
    part = Part.parse(settings.shard) if settings.shard else None
    if settings.dry_run:
        raise ConfigError("--dry-run: is of 'llamapro train'; leave it out to tokenise")
    if part is not None and settings.data.format == "chat":
        raise ConfigError(
            f"--shard {part}: conversations are not prepared in parts; leave it out for all of them"
        )
    # Nothing is computed here, so this machine needs neither the run's GPUs nor its trackers.
    train = replace(settings.train, device="cpu", shard_size=0)
    settings = replace(settings, train=train, log_to=())
    checks.check(settings, 1)
    job = Job.open(settings)
    stores = job.tokenize(part)
    found = {
        label: {"path": str(store.path), "tokens": store.tokens, "documents": store.documents}
        for label, store in stores.items()
    }
    lines = [f"{label}: {store.tokens:,} tokens in {store.path}" for label, store in stores.items()]
    lines.append("next: llamapro train with the same options")
    if part is not None:
        lines[-1] = f"part {part} is done; when all are, run the same command without --shard"
    cli.print_result({"shard": str(part or ""), "stores": found}, settings.json, "\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
