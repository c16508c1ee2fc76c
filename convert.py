"""Converts, expands, merges, strips, inspects and verifies checkpoints.

    python convert.py from-meta META_DIR OUT_DIR            Meta release -> Hugging Face layout
    python convert.py expand BASE_DIR OUT_DIR --num-new-blocks 8      insert identity blocks
    python convert.py merge EXPANDED_DIR RUN_DIR OUT_DIR    put trained blocks into a plain model
    python convert.py merge EXPANDED_DIR BLOCKS BLOCKS OUT_DIR        of several domains, into one
    python convert.py strip EXPANDED_DIR OUT_DIR            take the new blocks out: the base again
    python convert.py to-meta CKPT_DIR OUT_DIR              Hugging Face layout -> Meta release
    python convert.py inspect DIR                           what is in it, which layers are new
    python convert.py verify DIR [--base BASE_DIR] [--hf]   is every byte intact, do logits agree

A checkpoint that is read may be hf://owner/name[@revision] (pip install 'llamapro[hub]').
Every output directory appears only once it is complete. With --json the result is one JSON object.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from llamapro import cli
from llamapro.errors import ConfigError

DType = Literal["float32", "bfloat16", "float16"]
MEASURED = ("similar", "unimportant")  # placements that measure the base first


@dataclass(kw_only=True)
class Output:
    """Options of the commands that write a directory."""

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
    dtype: DType | None = None
    """Dtype of the result; the release's own if not given."""
    max_position_embeddings: Annotated[int | None, arg(metavar="N")] = None
    """Context length (Llama 2: 4096, Llama 3: 8192); params.json's if not given, else 2048."""

    def run(self) -> tuple[dict[str, Any], str]:
        import torch

        from llamapro.conversion.meta import from_meta

        dtype = getattr(torch, self.dtype) if self.dtype else None
        positions = self.max_position_embeddings
        found = from_meta(self.meta_dir, self.out_dir, dtype, self.force, positions)
        return found, (
            f"{self.out_dir}: {found['parameters']:,} parameters in {found['dtype']}, "
            f"from {found['shards']} shard(s)"
        )


@dataclass(kw_only=True)
class ToMeta(Output):
    """Write a checkpoint in Meta's release layout; undoes from-meta byte for byte."""

    ckpt_dir: Annotated[Positional[Path], arg(metavar="CKPT_DIR")]
    """A checkpoint directory, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The release directory to create."""
    shards: Annotated[int | None, arg(metavar="N")] = None
    """Model-parallel shards; as many as the release had if not given, else 1."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.hub import resolve
        from llamapro.conversion.meta import to_meta

        found = to_meta(resolve(self.ckpt_dir), self.out_dir, self.shards, self.force)
        return found, (
            f"{self.out_dir}: {found['parameters']:,} parameters, {found['shards']} shard(s)"
        )


@dataclass(kw_only=True)
class Expand(Output):
    """Insert identity blocks (LLaMA Pro, section 3.2); the result's logits are the base's."""

    base_dir: Annotated[Positional[Path], arg(metavar="BASE_DIR")]
    """The checkpoint to expand, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create."""
    num_new_blocks: Annotated[int | None, arg(metavar="N")] = None
    """How many blocks to add in all (the paper: 8 for LLaMA-2-7B)."""
    blocks_per_group: Annotated[int, arg(metavar="P")] = 1
    """P: how many copies go on top of each group of base layers."""
    after: Annotated[str | None, arg(metavar="LAYERS")] = None
    """Instead: base layers, comma-separated, after each of which one new block goes (3,7,11)."""
    placement: Literal["interleave", "prefix", "suffix", "similar", "unimportant"] = "interleave"
    """Interleaved as in the paper; or all below (prefix) or above (suffix) the base; or one on top
    of each of the N layers whose output is most like their input (similar), or without which the
    loss rises least (unimportant). Those two compute with the whole base in memory, on a GPU if one
    is visible: one pass over the text; for unimportant, half as many as there are layers."""
    measure_on: Annotated[tuple[str, ...], arg(metavar="FILE [FILE ...]")] = ()
    """Text for similar and unimportant: files, globs, folders; if none is given, the base writes
    it."""
    measure_tokens: Annotated[int, arg(metavar="N")] = 16_384
    """How much of it, up to 512 at a time."""
    text_key: str = "text"
    """Field of a .jsonl line that holds the text."""
    add_tokens: Annotated[tuple[str, ...], arg(metavar="TOKEN [TOKEN ...]")] = ()
    """Control tokens that the vocabulary grows by, such as '<|im_start|>' '<|im_end|>'; their rows
    start as the mean of the base's."""
    max_shard_gb: float = 5.0
    """Largest safetensors file, in GB (10^9 bytes)."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.directory import Checkpoint
        from llamapro.checkpoints.hub import repository, resolve
        from llamapro.conversion.expand import expand_checkpoint

        base = Checkpoint.open(resolve(self.base_dir))
        if name := repository(self.base_dir):  # what the model card will call the base
            raw = base.config.raw | {"_name_or_path": name}
            base = replace(base, config=replace(base.config, raw=raw))
        if not 0 < self.max_shard_gb < float("inf"):
            raise ConfigError(f"--max-shard-gb {self.max_shard_gb}: expected more than 0")
        layout, measured, table = self.place(base)
        shard = int(self.max_shard_gb * 1e9)
        tokens = self.add_tokens
        found = expand_checkpoint(base, self.out_dir, layout, self.force, shard, tokens)
        added = ", ".join(f"{name} is {i}" for name, i in found["new_tokens"].items())
        added = f"new tokens   {added}\n" if added else ""
        return found | measured, (
            f"{table}"
            f"{self.out_dir}: {base.config.num_hidden_layers} -> {found['layers']} layers, "
            f"{found['bytes'] / 1e9:.3f} GB\n"
            f"new blocks   {found['new_layers']}\n"
            f"copied from  {found['source_layers']}\n"
            f"{added}"
            f"verified: logits of {found['tokens_compared']} random tokens bit-equal to the base's"
        )

    def place(self, base: Any) -> tuple[Any, dict[str, Any], str]:
        """Returns the layout and, as result and as text, what was measured for it."""
        layers = base.config.num_hidden_layers
        self.check_placement()
        if self.placement not in MEASURED:
            return self.layout(layers), {}, ""
        from llamapro import expansion, placement
        from llamapro.conversion.add_tokens import check_tokens
        from llamapro.files import refuse_existing, refuse_source

        # What is refused when the result is written is refused before the time is spent.
        refuse_source(self.out_dir, base.path)
        refuse_existing(self.out_dir.resolve(), self.force)
        if self.add_tokens:
            check_tokens(base.path, self.add_tokens, base.config.vocab_size)
        assert self.num_new_blocks is not None
        number, text = self.num_new_blocks, self.measure_on
        tokens, key = self.measure_tokens, self.text_key
        found = placement.measure(base, self.placement, number, text, tokens, key)
        chosen = [row["layer"] for row in found["layers"] if row["chosen"]]
        table = placement.render(found) + "\n"
        return expansion.insert_after(layers, chosen), {"measured": found}, table

    def check_placement(self) -> None:
        """Raises ConfigError with every option that contradicts --placement."""
        wrong = []
        if self.placement in MEASURED:
            if self.num_new_blocks is None or self.after is not None:
                wrong.append(
                    f"--placement {self.placement} chooses the layers: give --num-new-blocks N, "
                    "not --after LAYERS"
                )
            if self.blocks_per_group != 1:
                wrong.append(
                    f"--blocks-per-group {self.blocks_per_group}: --placement {self.placement} "
                    "puts one block on top of each layer it chooses; leave the option out"
                )
            if self.measure_tokens < 2:
                wrong.append(f"--measure-tokens {self.measure_tokens}: expected 2 or more")
        else:
            only = "is of use with --placement similar or unimportant only"
            wrong += [
                f"--{name.replace('_', '-')}: {only}"
                for name in ("measure_on", "measure_tokens", "text_key")
                if getattr(self, name) != getattr(Expand, name)
            ]
        if wrong:
            raise ConfigError("; ".join(wrong))

    def layout(self, num_layers: int) -> Any:
        """Returns the layout of a placement that measures nothing."""
        from llamapro import expansion

        if (self.num_new_blocks is None) == (self.after is None):
            raise ConfigError("expand: give either --num-new-blocks N or --after LAYERS")
        if self.after is not None:
            try:
                layers = [int(layer) for layer in self.after.split(",")]
            except ValueError:
                raise ConfigError(f"--after {self.after!r}: expected layers like 3,7,11") from None
            return expansion.insert_after(num_layers, layers)
        assert self.num_new_blocks is not None
        if self.placement == "interleave":
            return expansion.interleave(num_layers, self.num_new_blocks, self.blocks_per_group)
        return expansion.stack(num_layers, self.num_new_blocks, self.placement)


@dataclass(kw_only=True)
class Merge(Output):
    """Put trained blocks into their base: an ordinary checkpoint, with a model card.

    Several new-block files may have been trained apart, on different domains and in different
    layouts, if only on the same base: each layer of it is followed by the blocks of every file.
    """

    expanded_dir: Annotated[Positional[Path], arg(metavar="EXPANDED_DIR")]
    """The checkpoint that was trained, or the config.json of a run from random weights."""
    blocks: Annotated[Positional[Path], arg(metavar="BLOCKS")]
    """A run directory (its newest intact step), a training checkpoint, or a new-block file."""
    more_and_out: Annotated[Positional[tuple[Path, ...]], arg(metavar="[BLOCKS ...] OUT_DIR")]
    """More of these, then the checkpoint directory to create."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.directory import Checkpoint
        from llamapro.checkpoints.hub import resolve
        from llamapro.conversion.expand import assemble_checkpoint, merge_checkpoint
        from llamapro.conversion.merge import merge_many

        # Options may follow the last words only if these are one list.
        if not self.more_and_out:
            raise ConfigError("merge: OUT_DIR is missing: give EXPANDED_DIR BLOCKS OUT_DIR")
        *more, out_dir = self.more_and_out
        if more:
            files = [self.blocks, *more]
            expanded = Checkpoint.open(resolve(self.expanded_dir))
            found = merge_many(expanded, files, out_dir, self.force)
            return found, (
                f"{out_dir}: {found['layers']} layers, base tensors intact\n"
                f"new blocks   {found['new_layers']} of {len(files)} files\n"
                f"copied from  {found['source_layers']}"
            )
        if self.expanded_dir.is_file():
            found = assemble_checkpoint(self.expanded_dir, self.blocks, out_dir, self.force)
        else:
            expanded = Checkpoint.open(resolve(self.expanded_dir))
            found = merge_checkpoint(expanded, self.blocks, out_dir, self.force)
        base = "base tensors intact" if found["base_intact"] else "all tensors trained"
        return found, (
            f"{out_dir}: {found['tensors_replaced']} trained tensors of step {found['step']} "
            f"merged, {base}"
        )


@dataclass(kw_only=True)
class Strip(Output):
    """Take the new blocks out of a model: its base again, byte for byte."""

    expanded_dir: Annotated[Positional[Path], arg(metavar="EXPANDED_DIR")]
    """An expanded or merged checkpoint, or hf://owner/name."""
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The checkpoint directory to create."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.directory import Checkpoint
        from llamapro.checkpoints.hub import resolve
        from llamapro.conversion.merge import strip_checkpoint

        expanded = Checkpoint.open(resolve(self.expanded_dir))
        found = strip_checkpoint(expanded, self.out_dir, self.force)
        return found, (
            f"{self.out_dir}: {found['layers']} layers, new blocks {found['removed_layers']} taken "
            f"out, new tokens {found['removed_tokens']}\nsha256 {found['sha256']}, the base's"
        )


@dataclass
class Inspect:
    """Show layers, which are new and from where, parameters, dtypes, sizes, hashes."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory or hf://owner/name, run directory, training checkpoint or new-block
    file."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.hub import resolve
        from llamapro.conversion.inspect import describe, render

        found = describe(str(resolve(self.dir)))
        return found, render(found)


@dataclass
class Verify:
    """Check all bytes: of an expanded model, that its base is intact; of a run, what it saved."""

    dir: Annotated[Positional[Path], arg(metavar="DIR")]
    """A checkpoint directory or hf://owner/name, run directory, training checkpoint or new-block
    file."""
    base: Annotated[Path | None, arg(metavar="BASE_DIR")] = None
    """The base it was expanded from: compare hashes and logits."""
    hf: bool = False
    """Run this implementation and transformers' on these weights; print the differences."""
    dtype: DType | None = None
    """With --hf: dtype of the computation; the checkpoint's own if not given."""
    json: bool = False
    """Print the result as one JSON object."""

    def run(self) -> tuple[dict[str, Any], str]:
        from llamapro.checkpoints.hub import resolve
        from llamapro.checkpoints.new_blocks import is_training_output
        from llamapro.conversion.verify import verify, verify_run

        directory = resolve(self.dir)
        if is_training_output(directory):
            if self.base or self.hf:
                raise ConfigError(f"{directory}: --base and --hf are for checkpoint directories")
            found = verify_run(str(directory))
            return found, "\n".join(f"{path}: intact" for path in found["intact"])
        found = verify(str(directory), str(resolve(self.base)) if self.base else None)
        lines = [f"{directory}: {found['tensors']} tensors complete and finite"]
        lines.append(f"sha256 {found['sha256']}")
        if "base_sha256" in found:
            lines.append(f"base intact: its tensors hash to {found['base_sha256']}, as recorded")
            lines.append(f"new blocks {found['new_layers']}: {found['new_blocks']}")
            if found["new_tokens"]:
                lines.append(f"new tokens {found['new_tokens']}: rows after the base's")
        if "logits_bit_equal" in found:
            lines.append(
                "logits bit-equal to the base's"
                if found["logits_bit_equal"]
                else f"logits differ from the base's by up to {found['max_logit_difference']:.3g}"
            )
        if self.hf:
            found["hf"] = self.compare_with_hf(directory)
            lines += [f"  {key:<40} {value}" for key, value in found["hf"].items()]
        return found, "\n".join(lines)

    def compare_with_hf(self, directory: Path) -> dict[str, Any]:
        import torch

        from llamapro.conversion.hf_parity import compare_with_hf

        return compare_with_hf(str(directory), getattr(torch, self.dtype) if self.dtype else None)


Command = (
    Annotated[FromMeta, tyro.conf.subcommand("from-meta")]
    | Annotated[Expand, tyro.conf.subcommand("expand")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Strip, tyro.conf.subcommand("strip")]
    | Annotated[ToMeta, tyro.conf.subcommand("to-meta")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main() -> None:
    command: Any = tyro.cli(
        Command,
        prog="convert.py",
        description=__doc__,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    result, text = command.run()
    cli.print_result(result, command.json, text)


if __name__ == "__main__":
    cli.run(main)
