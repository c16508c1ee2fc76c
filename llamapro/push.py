"""Puts a model, or new blocks alone, on the Hugging Face hub: `llamapro push DIR OWNER/NAME`.

What others load goes there and nothing else: weights, configuration, tokenizer, licence and card.
The state of a run stays at home, because it names files and folders of its user.
"""

import re
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.hub import ALLOWED, NEVER, check_name, upload
from llamapro.checkpoints.new_blocks import is_training_output, open_blocks
from llamapro.checkpoints.run import TRAINABLE_FILE
from llamapro.checkpoints.stacking import stack
from llamapro.conversion.model_card import (
    CARD_FILE,
    NAME,
    Training,
    front_matter,
    read_card,
    render,
)
from llamapro.conversion.verify import verify
from llamapro.errors import ConfigError, warn
from llamapro.files import refuse_link, user_path
from llamapro.formatting import format_bytes

Files = dict[str, Path | bytes]


@dataclass
class Args:
    """Upload a model, or new blocks alone, with its card to the Hugging Face hub."""

    source: Annotated[Positional[Path], arg(metavar="DIR|BLOCKS")]
    """A checkpoint directory; or new blocks: a run directory, training checkpoint or file."""
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")]
    """The repository, which is created if there is none."""
    base: str = ""
    """Base of new blocks, or the expanded model, or hf://owner/name. Default: the run's."""
    license: str = ""
    """Licence for the card, such as apache-2.0. Default: that of the base's card or LICENSE."""
    private: bool = False
    """Create a private repository."""
    force: bool = False
    """Replace what the repository holds; its history keeps the old files."""
    dry_run: bool = False
    """Check everything and show files, sizes and card, without a token or a network."""
    json: bool = False
    """Print the result as one JSON object."""


def main(argv: list[str] | None = None, prog: str = "python -m llamapro.push") -> None:
    """Runs the command with these arguments, those of the process by default."""
    args = cli.arguments(Args, argv, prog)
    repo, source = check_name(args.repository), user_path(args.source)
    left_out: list[str] = []
    if is_training_output(source):
        files, card = blocks_files(source, args.base)
    else:
        files, card, left_out = model_files(source)
    card = _with_licence(card.replace(NAME, repo), args.license)
    if not front_matter(card)[1]:
        warn(f"{source}: no licence is known, so the card names none; give --license")
    files[CARD_FILE] = card.encode()
    sizes = {
        name: len(file) if isinstance(file, bytes) else file.stat().st_size
        for name, file in sorted(files.items())
    }
    address = None if args.dry_run else upload(repo, files, args.private, args.force)
    result = {"repository": repo, "files": sizes, "left_out": left_out, "card": card}
    text = [f"{name:<40} {format_bytes(size):>10}" for name, size in sizes.items()]
    text += [f"left out: {', '.join(left_out)}"] if left_out else []
    text += ["", card] if args.dry_run else [f"uploaded to {address}"]
    cli.print_result(result | {"address": address}, args.json, "\n".join(text))


def model_files(path: Path) -> tuple[Files, str, list[str]]:
    """Returns the files of a checkpoint directory to upload, the card, and the files left out."""
    verify(path)  # reads every byte: a damaged model is not published
    config = Checkpoint.open(path).config
    names = [f.relative_to(path).as_posix() for f in sorted(path.rglob("*")) if f.is_file()]
    files: Files = {}
    for name in names:  # those that others load
        is_allowed = any(fnmatch(name, kind) for kind in ALLOWED)
        if is_allowed and not any(fnmatch(name, kind) for kind in NEVER):
            refuse_link(path / name)
            files[name] = path / name
    if CARD_FILE in files:  # made by merge, and perhaps edited
        card = read_card(path / CARD_FILE)
    elif config.expansion is not None:
        card = render(NAME, config, [], path)
    else:
        raise ConfigError(f"{path}: has no {CARD_FILE}; write one, which the hub will show")
    return files, card, [name for name in names if name not in files]


def blocks_files(path: Path, base: str) -> tuple[Files, str]:
    """Returns a new-block file, the `config.json` of its whole model, and the card."""
    blocks = open_blocks(path)
    file, _, info = blocks
    training = Training.of(blocks)
    if not info.base_sha256:
        raise ConfigError(
            f"{file}: holds all weights of a model, not new blocks: push the directory that "
            "'llamapro merge' makes of it"
        )
    base = base or str(training.part("settings").get("model.path") or "")
    if not base:
        raise ConfigError(f"{file}: does not say what it was trained on: give --base DIR")
    model = Checkpoint.open(base)
    config, record = model.config, model.config.expansion
    if not record or (record.base_sha256, record.new_layers) != (info.base_sha256, info.new_layers):
        config = stack(model, [file]).checkpoint.config
    if model.repository and not record:
        config = replace(config, raw=config.raw | {"_name_or_path": model.repository})
    files: Files = {TRAINABLE_FILE: file, "config.json": config.to_json().encode()}
    if training.template:
        files["chat_template.jinja"] = training.template.encode()
    return files, render(NAME, config, [training], model.path, is_blocks=True)


def _with_licence(card: str, name: str) -> str:
    """Returns a card whose front matter names this licence, or its own if there is none."""
    if not name:
        return card
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigError(f"--license {name!r}: expected a short name, such as apache-2.0")
    front, _, page = front_matter(card)
    return f"---\n{front}license: {name}\n---\n{page}"


if __name__ == "__main__":
    cli.run(main)
