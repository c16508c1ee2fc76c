"""lm-evaluation-harness with our model: `python -m llamapro.harness --model llamapro ...`

Takes lm_eval's own arguments. In float32 the numbers are those of its `hf` model on the same
checkpoint; in others `hf` rounds each log-probability to the dtype, unless given
softmax_dtype=float32.

    python -m llamapro.harness --model llamapro --model_args path=DIR,dtype=bfloat16 \\
        --tasks arc_challenge --num_fewshot 25 --batch_size 8

--model_args: path, dtype, device, ops, skip_new_blocks (as of `ComputeOptions`), max_length and
add_bos_token.

Shapes: B batch, T length, N positions that count, C hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from llamapro import cli
from llamapro.checkpoints.base import check_contained
from llamapro.checkpoints.directory import Checkpoint
from llamapro.errors import ConfigError, DataError, suggest
from llamapro.generate import generate
from llamapro.inference.options import ComputeOptions
from llamapro.text.chat_template import ChatTemplate
from llamapro.text.tokenizer import StreamingDecoder, Tokenizer
from llamapro.text.vocabulary import JSON_NAME, read_object

# Positions whose logits are in memory at once: half a gibibyte for a vocabulary of 128k.
_POSITIONS = 1024
# Names for one thing, in lm_eval's order of precedence.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What has no meaning where the most likely token is taken.
_OF_SAMPLING = ("top_p", "top_k", "min_p", "typical_p")
_MODEL_ARGS = ["path", "dtype", "device", "ops", "skip_new_blocks", "max_length", "add_bos_token"]

# lm_eval's request: what to call it in the cache, the context's ids and the continuation's.
_Scored = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class Generation:
    """How a task wants text written: its `generation_kwargs`.

    Attributes:
        until: texts, or names of control tokens, before which the answer ends.
        limit: tokens of the answer at most.
        temperature, top_p: as for `generate.sample`.
    """

    until: tuple[str, ...]
    limit: int
    temperature: float
    top_p: float

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> "Generation":
        """Reads a task's `generation_kwargs`; raises ConfigError for what is not supported."""
        left = dict(options)
        until = left.pop("until", None) or []
        limits = [left.pop(name, None) for name in _LIMITS]
        limit = next((int(value) for value in limits if value is not None), 256)  # as `hf`
        temperature = float(left.pop("temperature", None) or 0)
        do_sample = left.pop("do_sample", None)
        if not (temperature > 0 if do_sample is None else do_sample):
            temperature = 0.0
            left = {name: value for name, value in left.items() if name not in _OF_SAMPLING}
        elif temperature <= 0:
            left["do_sample without a temperature"] = do_sample
        top_p = float(left.pop("top_p", 1.0))
        if left:
            raise ConfigError(
                f"generation_kwargs: {', '.join(left)}: not supported (known: until, "
                f"{', '.join(_LIMITS)}, do_sample with a temperature above 0, top_p)"
            )
        if not 0 < top_p <= 1 or limit < 1:
            raise ConfigError(
                f"generation_kwargs: top_p {top_p} should be above 0, at most 1; {_LIMITS[0]} "
                f"{limit} 1 or more"
            )
        return cls((until,) if isinstance(until, str) else tuple(until), limit, temperature, top_p)


class HarnessModel:
    """What lm_eval asks of a model; `register` puts its `TemplateLM` beneath.

    Attributes:
        max_length: longest input in tokens; of longer ones the end is kept.
    """

    cache_hook: Any  # lm_eval's: keeps finished requests

    def __init__(
        self,
        path: str = "",
        dtype: str = "auto",
        device: str = "auto",
        ops: str = "auto",
        skip_new_blocks: bool = False,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        """Loads a checkpoint directory; the arguments are lm_eval's and its --model_args.

        Args:
            path: the directory, with its tokenizer.
            dtype, device, ops, skip_new_blocks: as of `ComputeOptions`.
            max_length: in tokens; None: the model's max_position_embeddings.
            add_bos_token: put BOS before contexts; None: as `adds_bos`.
            batch_size: inputs per forward pass; "auto", with max_batch_size, is not supported.
            unknown: refused by name.

        Raises:
            ConfigError, CheckpointError, DataError: something of it cannot be used.
        """
        super().__init__()
        wrong = [f"unknown {name!r}{suggest(name, _MODEL_ARGS)}" for name in unknown]
        if not path:
            wrong.append("path is missing: give path=DIR, a checkpoint directory")
        for name, value in (("dtype", dtype), ("device", device)):
            known = get_args(get_type_hints(ComputeOptions)[name])
            if value not in known:
                wrong.append(f"{name} {value!r}: expected one of {', '.join(known)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            wrong.append(f"--batch_size {batch_size}: expected a number, 1 or more")
        if wrong:
            raise ConfigError(f"--model_args: {'; '.join(wrong)} (known: {', '.join(_MODEL_ARGS)})")
        self.batch_size = int(batch_size)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "ops": ops}
        self._options = ComputeOptions(**options, skip_new_blocks=skip_new_blocks)
        checkpoint = Checkpoint.open(path)
        if skip_new_blocks:
            check_contained(checkpoint, special=True)
        limit = checkpoint.config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ConfigError(f"--model_args: max_length {max_length}: {path} takes 1 to {limit}")
        self._path = checkpoint.path
        self._tokenizer = Tokenizer.load(path)
        self._tokenizer.check_fits(checkpoint.config.vocab_size, str(path))
        if self._tokenizer.eos_id is None:
            raise DataError(f"{self._tokenizer.path}: has no EOS token, which lm_eval needs")
        self._adds_bos = adds_bos(self._path) if add_bos_token is None else add_bos_token
        self._template: ChatTemplate | None = None
        with self._options.backends():
            self._model = self._options.load(checkpoint)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        assert self._tokenizer.eos_id is not None
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Part of the name of lm_eval's cached requests."""
        return f"llamapro-{self._tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the ids of a text, in which names of control tokens stand for them, as in `hf`.

        Where a text begins with a space they are sentencepiece's, not transformers 5's: that omits
        the space which is put before every text.

        Args:
            string: the text.
            add_special_tokens: put BOS first; None: as the tokenizer does, once.
        """
        ids = self._tokenizer.encode(string, special=True)
        bos = self._tokenizer.bos_id
        if add_special_tokens is None:
            add_special_tokens = self._adds_bos and ids[:1] != [bos]
        return [bos, *ids] if add_special_tokens and bos is not None else ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability (nats), and whether greedy writes it."""
        # The choices of a question often differ in their last token alone: one input for them all.
        asked: dict[tuple[int, ...], list[int]] = {}
        for index, (_name, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens, {continuation[:8]}..., is "
                    f"longer than max_length {self.max_length}: leave the task out"
                )
            ids = (context + continuation)[-(self.max_length + 1) :]
            asked.setdefault(tuple(ids[:-1]), []).append(index)
        results = [(0.0, True)] * len(requests)
        longest_first = sorted(asked, key=len, reverse=True)  # memory is short at once, or never
        progress = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or None)
        with progress, self._options.backends():
            for at in range(0, len(longest_first), self.batch_size):
                batch = longest_first[at : at + self.batch_size]
                padded = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)  # (B, T)
                for row, inputs in enumerate(batch):  # padding comes after: causal, so unseen
                    padded[row, : len(inputs)] = torch.tensor(inputs)
                hidden = self._model.model(padded.to(self._model.lm_head.weight.device))
                for row, inputs in enumerate(batch):
                    for index in asked[inputs]:
                        name, _context, continuation = requests[index]
                        first = len(inputs) - len(continuation)
                        results[index] = self._score(hidden[row, first : len(inputs)], continuation)
                        if name is not None:
                            self.cache_hook.add_partial("loglikelihood", name, results[index])
                    progress.update(len(asked[inputs]))
        return results

    def _score(self, hidden: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Scores tokens by the hidden states (N, C) before them; in fp32, whatever the weights."""
        total, is_greedy = 0.0, True
        targets = torch.tensor(continuation, device=hidden.device)  # (N,)
        for x, y in zip(hidden.split(_POSITIONS), targets.split(_POSITIONS), strict=True):
            logits = self._model.lm_head(x)  # (N, V)
            chosen = log_softmax(logits, -1, dtype=torch.float32).gather(-1, y[:, None])
            total += chosen.sum(dtype=torch.float64).item()
            is_greedy &= bool((logits.argmax(-1) == y).all())
        return total, is_greedy

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability (nats) of each whole text, in disjoint windows."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[_Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (value, _) in zip(owners, scored, strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the text written after each context, up to the first of the task's stops.

        Raises:
            ConfigError: the task's `generation_kwargs` are not supported or leave no room.
        """
        groups: dict[tuple[int, Generation], list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, options = request.args
            wanted = Generation.read(options)
            room = self.max_length - wanted.limit
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks {wanted.limit} leaves no room for a context in max_length "
                    f"{self.max_length}: set a smaller one with --gen_kwargs max_gen_toks=..."
                )
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            # One cache serves prompts of one length.
            groups.setdefault((len(ids), wanted), []).append((index, ids))
        texts = [""] * len(requests)
        progress = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or None)
        with progress, self._options.backends():
            for (_, wanted), group in sorted(groups.items(), key=lambda g: -g[0][0]):
                for at in range(0, len(group), self.batch_size):
                    batch = group[at : at + self.batch_size]
                    written = self._write([ids for _, ids in batch], wanted)
                    for (index, _), text in zip(batch, written, strict=True):
                        texts[index] = text
                        request = requests[index]
                        self.cache_hook.add_partial("generate_until", request.args, text)
                    progress.update(len(batch))
        return texts

    def _write(self, prompts: list[list[int]], wanted: Generation) -> list[str]:
        """Continues prompts of one length until each has stopped."""
        control = self._tokenizer.special_tokens
        ends = {self.eot_token_id, *self._model.config.eos_token_ids}
        ends |= {control[name] for name in wanted.until if name in control}
        names = [name for name, token_id in control.items() if token_id == self.eot_token_id]
        stops = [text for text in (*wanted.until, *names) if text]
        decoders = [StreamingDecoder(self._tokenizer) for _ in prompts]
        texts, is_open = [""] * len(prompts), [True] * len(prompts)
        draws = torch.default_generator  # which lm_eval's --seed sets
        how = (wanted.limit, wanted.temperature, wanted.top_p, draws)
        steps = generate(self._model, torch.tensor(prompts), *how)
        for step in steps:
            for row, token_id in enumerate(step[:, 0].tolist()):
                if is_open[row]:
                    texts[row] += "" if token_id in ends else decoders[row].feed(token_id)
                    is_open[row] = token_id not in ends and not any(s in texts[row] for s in stops)
            if not any(is_open):
                break
        texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
        for stop in stops:
            texts = [text.partition(stop)[0] for text in texts]
        return texts

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses the template of `--apply_chat_template [NAME]`; returns its source.

        Args:
            chat_template: True: the model's own; or a name or file, as for `ChatTemplate.load`.
        """
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else ""
        self._template = ChatTemplate.load(self._path, self._tokenizer, name)
        return self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as text; the model answers it, or continues its last turn."""
        template = self._template or ChatTemplate.load(self._path, self._tokenizer)
        text = template.render(chat_history, add_generation_prompt)
        if not add_generation_prompt:  # nothing may close the turn that is continued
            last = chat_history[-1]["content"]
            last = last if last in text else last.strip()  # many templates strip what is said
            text = text[: text.rindex(last) + len(last)]
        return text


def adds_bos(directory: Path) -> bool:
    """Returns whether transformers puts BOS before texts with this directory's tokenizer files."""
    stated = read_object(directory / "tokenizer_config.json").get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    if not (file := directory / JSON_NAME).exists():
        return True  # a sentencepiece file
    processor = read_object(file).get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("single"))


@cache  # the registry refuses a name it has
def register() -> type:
    """Makes the model known to lm_eval as "llamapro"; returns its class.

    Raises:
        ConfigError: lm_eval is not installed.
    """
    try:
        import lm_eval.models  # noqa: F401  # else its registry holds ours alone
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'llamapro[lm-eval]'"
        ) from None
    return register_model("llamapro")(type("LlamaProLM", (HarnessModel, TemplateLM), {}))


def main() -> None:
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    cli.run(main)
