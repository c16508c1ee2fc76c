"""Converts, expands, merges, strips, inspects and verifies checkpoints.

    convert.py expand BASE_DIR OUT_DIR --num-new-blocks 8
    convert.py merge EXPANDED_DIR BLOCKS... OUT_DIR
    convert.py COMMAND --help

A checkpoint to read may be hf://owner/name[@revision] (pip install -e '.[hub]').
An output directory appears when it is complete. --json prints the result as one JSON object.
"""

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.errors import ConfigError
from llamapro.files import user_path

DType = Literal["float32", "bfloat16", "float16"]


def open_checkpoint(path: Path) -> Any:
    """Opens a checkpoint; torch is imported here, so that --help is fast."""
    from llamapro.checkpoints.directory import Checkpoint

    return Checkpoint.open(path)


def torch_dtype(name: DType | None) -> Any:
    """Returns torch's dtype of this name."""
    import torch

    return getattr(torch, name) if name else None


@dataclass(kw_only=True)
class Output:
    """Options of the commands that write a directory; `then` is the command that follows."""

    then = ""
    force: bool = False
    """Replace OUT_DIR if it holds a checkpoint, once the new one is complete."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(kw_only=True)
class FromMeta(Output):
    """Convert a Meta release (params.json, consolidated.NN.pth, tokenizer.model)."""

    meta_dir: Annotated[Positional[Path], arg(metavar="META_DIR")]
    """The release directory."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create, in Hugging Face layout."""
    then = "llamapro expand {out_dir} EXPANDED_DIR --num-new-blocks N"
    dtype: DType | None = None
    """Dtype of the result. Default: the release's own."""
    max_position_embeddings: Annotated[int | None, arg(metavar="N")] = None
    """Context length in tokens (4096 for Llama 2). Default: params.json's, else the family's."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.meta import from_meta

        dtype, positions = torch_dtype(self.dtype), self.max_position_embeddings
        result = from_meta(self.meta_dir, self.out_dir, dtype, self.force, positions)
        return result, (
            f"{self.out_dir}: {result['parameters']:,} parameters in {result['dtype']}, "
            f"from {result['shards']} shard(s)"
        )


@dataclass(kw_only=True)
class FromGguf(Output):
    """Convert a LLaMA or Mistral in GGUF, llama.cpp's format, quantised or not."""

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The .gguf file; of a model in several parts, any of them."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create, in Hugging Face layout."""
    then = "llamapro expand {out_dir} EXPANDED_DIR --num-new-blocks N"
    dtype: DType | None = None
    """Dtype of the result. Default: the file's float32 or float16, else bfloat16."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.gguf import from_gguf

        result = from_gguf(self.file, self.out_dir, torch_dtype(self.dtype), self.force)
        return result, (
            f"{self.out_dir}: {result['parameters']:,} parameters in {result['dtype']}, from "
            f"{', '.join(result['quantizations'])} in {result['files']} file(s)"
        )


@dataclass(kw_only=True)
class ToMeta(Output):
    """Write a checkpoint in Meta's release layout: the way back from from-meta."""

    ckpt_dir: Annotated[Positional[Path], arg(metavar="CKPT_DIR")]
    """A checkpoint directory, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The release directory to create."""
    shards: Annotated[int | None, arg(metavar="N")] = None
    """Number of model-parallel shards. Default: as many as the release had, else 1."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.meta import to_meta

        result = to_meta(self.ckpt_dir, self.out_dir, self.shards, self.force)
        return result, (
            f"{self.out_dir}: {result['parameters']:,} parameters, {result['shards']} shard(s)"
        )


@dataclass(kw_only=True)
class Export(Output):
    """Write GGUF by llama.cpp's own converter, and compare it with the checkpoint."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory, such as a merged one, or hf://owner/name."""
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The .gguf file to create."""
    q8: bool = False
    """Round to 8 bits, half the size. Without it nothing is lost."""
    force: bool = False
    """Replace FILE, once the new one is complete."""
    then = "llama-cli -m {file}"

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.export import export_gguf

        result = export_gguf(open_checkpoint(self.dir), self.file, self.q8, self.force)
        said = "rounded" if self.q8 else "not compared: its architecture cannot be read"
        if compared := result["compared"]:
            said = f"verified: {compared} tensors equal to the checkpoint's"
        return result, (
            f"{self.file}: {result['bytes'] / 1e9:.3f} GB in {result['outtype']}; {said}"
        )


@dataclass(kw_only=True)
class Expand(Output):
    """Insert identity blocks (LLaMA Pro, section 3.2): the logits stay the base's."""

    base_dir: Annotated[Positional[Path], arg(metavar="BASE_DIR")]
    """The checkpoint to expand, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create."""
    num_new_blocks: Annotated[int | None, arg(metavar="N")] = None
    """Number of blocks to add in all; the paper adds 8 to LLaMA-2-7B."""
    blocks_per_group: Annotated[int, arg(metavar="P")] = 1
    """New blocks on top of each group of base layers, the paper's P."""
    after: Annotated[str | None, arg(metavar="LAYERS")] = None
    """Base layers that are each followed by one new block, such as 3,7,11."""
    placement: Literal["interleave", "prefix", "suffix"] = "interleave"
    """Where new blocks go: interleaved as in the paper, or all below (prefix) or above (suffix)."""
    add_tokens: Annotated[tuple[str, ...], arg(metavar="TOKEN [TOKEN ...]")] = ()
    """Control tokens to add, such as '<|im_start|>'; their rows start as the mean of all rows."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB (10^9 bytes)."""
    then = "llamapro train --config PRESET --model.path {out_dir} --data.train PATH... --dry-run"

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.expand import choose_layout, expand_checkpoint
        from llamapro.conversion.verify import head_note

        base = open_checkpoint(self.base_dir)
        number, per_group = self.num_new_blocks, self.blocks_per_group
        layers = base.config.num_hidden_layers
        layout = choose_layout(layers, number, per_group, self.after, self.placement)
        if not 0 < self.max_shard_gb < float("inf"):
            raise ConfigError(f"--max-shard-gb {self.max_shard_gb}: expected more than 0")
        shard_bytes = int(self.max_shard_gb * 1e9)
        result = expand_checkpoint(
            base, self.out_dir, layout, self.force, shard_bytes, self.add_tokens
        )
        added = ", ".join(f"{name} is {i}" for name, i in result["new_tokens"].items())
        note = head_note(result["max_head_difference"])
        added = f"new tokens   {added}; {note}\n" if added else ""
        return result, (
            f"{self.out_dir}: {layers} -> {result['layers']} layers, "
            f"{result['bytes'] / 1e9:.3f} GB\n"
            f"new blocks   {result['new_layers']}\n"
            f"copied from  {result['source_layers']}\n"
            f"{added}"
            f"verified: logits of {result['tokens_compared']} random tokens bit-equal to the base's"
        )


@dataclass(kw_only=True)
class Adopt(Output):
    """Record which layers of a model that another tool expanded are new blocks."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """The model that was expanded elsewhere, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create: the same bytes, and the record in config.json."""
    new_layers: Annotated[str | None, arg(metavar="LAYERS")] = None
    """The new blocks, such as 4,9,14. Default: the blocks whose o_proj and down_proj are zero."""
    then = Expand.then

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.adopt import adopt, render

        result = adopt(open_checkpoint(self.dir), self.out_dir, self.new_layers, self.force)
        return result, render(result)


@dataclass(kw_only=True)
class Merge(Output):
    """Put trained blocks into their base and write an ordinary checkpoint with a card.

    Blocks of several domains and layouts go together, if their base is the same.
    """

    expanded_dir: Annotated[Positional[Path], arg(metavar="EXPANDED_DIR")]
    """The checkpoint that was trained, its base, or the config.json that a run started from."""
    blocks: Annotated[Positional[Path], arg(metavar="BLOCKS")]
    """A run directory, training checkpoint or new-block file, or hf://owner/name."""
    more_and_out: Annotated[Positional[tuple[Path, ...]], arg(metavar="[BLOCKS ...] OUT_DIR")]
    """More BLOCKS, if any, then the checkpoint directory to create."""
    out_dir = Path()
    then = "llamapro evaluate {out_dir} --against BASE_DIR --data FILE..."

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.merge import merge, render

        # Options may follow the last words only if these are one list.
        if not self.more_and_out:
            raise ConfigError("merge: OUT_DIR is missing: give EXPANDED_DIR BLOCKS OUT_DIR")
        *more, self.out_dir = self.more_and_out
        result = merge(self.expanded_dir, [self.blocks, *more], self.out_dir, self.force)
        return result, render(self.out_dir, result)


@dataclass(kw_only=True)
class Strip(Output):
    """Take the new blocks out of a model and give its base back, byte for byte."""

    expanded_dir: Annotated[Positional[Path], arg(metavar="EXPANDED_DIR")]
    """An expanded or merged checkpoint, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.strip import strip_checkpoint

        result = strip_checkpoint(open_checkpoint(self.expanded_dir), self.out_dir, self.force)
        return result, (
            f"{self.out_dir}: {result['layers']} layers, new blocks {result['removed_layers']} "
            f"taken out, new tokens {result['removed_tokens']}\n"
            f"sha256 {result['sha256']}, the base's"
        )


@dataclass(kw_only=True)
class Input:
    """Options of the commands that only read."""

    then = ""
    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory, hf://owner/name, run, training checkpoint or new-block file."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclass(kw_only=True)
class Inspect(Input):
    """Show which layers are new, copied from where, with sizes, dtypes and hashes."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.conversion.inspect import describe, render

        result = describe(self.dir)
        return result, render(result)


@dataclass(kw_only=True)
class Verify(Input):
    """Check every byte of a checkpoint and of its base, of a run, or of cached tokens."""

    base: Annotated[Path | None, arg(metavar="BASE_DIR")] = None
    """The base it was expanded from, to compare its hash and its logits."""
    hf: bool = False
    """Compare logits with those of transformers: PASS, or FAIL and exit status 1."""
    dtype: DType | None = None
    """Dtype in which --hf computes. Default: the checkpoint's own."""
    grads: bool = False
    """With --hf, also compare the gradient of every weight."""
    text: Path | None = None
    """UTF-8 file, on whose first tokens --hf compares. Default: random tokens."""
    tolerance: Annotated[float | None, arg(metavar="X")] = None
    """Largest difference of a logit that passes --hf. Default: a bound from rounding, printed."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.new_blocks import is_training_output
        from llamapro.conversion import hf_parity
        from llamapro.conversion.verify import render, verify, verify_run, verify_tokens
        from llamapro.text.store import INDEX_FILE

        if self.tolerance is not None and not (self.hf and self.tolerance >= 0):
            raise ConfigError(f"--tolerance {self.tolerance}: at least 0, and with --hf only")
        if (self.grads or self.text) and not self.hf:
            raise ConfigError("--grads and --text: with --hf only")
        is_run, is_store = is_training_output(self.dir), (self.dir / INDEX_FILE).is_file()
        if (is_run or is_store) and (self.base or self.hf):
            raise ConfigError(f"{self.dir}: --base and --hf are for checkpoint directories")
        if is_run:
            result = verify_run(self.dir)
            return result, "\n".join(f"{path}: intact" for path in result["intact"])
        if is_store:
            result = verify_tokens(self.dir)
            return result, f"{self.dir}: {result['tokens']:,} tokens intact"
        result = verify(self.dir, self.base)
        text = render(result)
        if self.hf:
            how: Any = {"tolerance": self.tolerance, "text": self.text, "gradients": self.grads}
            result["hf"] = hf_parity.compare_with_hf(self.dir, torch_dtype(self.dtype), **how)
            text += "\n" + hf_parity.render(result["hf"])
        return result, text


Command = FromMeta | FromGguf | Expand | Adopt | Merge | Strip | ToMeta | Export | Inspect | Verify


def main(argv: list[str] | None = None, prog: str = "convert.py") -> None:
    """Runs the command in `argv`, or that of the process, with the help text of program `prog`."""
    about = (__doc__ or "").replace("convert.py", prog)
    command = cli.arguments(Command, argv, prog, description=about)
    for field in fields(command):
        value = getattr(command, field.name)
        if isinstance(value, Path):
            setattr(command, field.name, user_path(value))
        elif isinstance(value, tuple) and field.name == "more_and_out":
            setattr(command, field.name, tuple(map(user_path, value)))
    result, text = command.run()
    if command.then:
        paths = {n: shlex.quote(str(getattr(command, n, ""))) for n in ("out_dir", "file")}
        text += f"\nnext: {command.then.format(**paths)}"
    cli.print_result(result, command.json, text)
    if result.get("hf", {}).get("passed") is False:
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
