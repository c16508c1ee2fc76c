"""A model for lm-evaluation-harness: this implementation in the place of its `hf` model.

A merged checkpoint does not need it: `lm_eval --model hf --model_args pretrained=DIR` computes the
same numbers. It shows how to evaluate what only this implementation has, such as the base inside
(`skip_new_blocks=True`). It takes lm_eval's own arguments (pip install -e '.[lm-eval]'):

    python examples/lm_eval_model.py run --model llamapro --model_args path=DIR --tasks arc_easy
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llamapro.checkpoints.directory import Checkpoint
from llamapro.inference.options import ComputeOptions
from llamapro.inference.sampling import end_ids, write_text
from llamapro.text.streaming import StreamingDecoder
from llamapro.text.tokenizer import Tokenizer


@register_model("llamapro")
class LlamaProLM(TemplateLM):
    """Scores and writes one request at a time."""

    def __init__(
        self, path: str, skip_new_blocks: bool = False, dtype: Any = "auto", **lm_eval_options: Any
    ) -> None:
        """Loads a checkpoint directory; batch size and device of lm_eval are not used.

        Args:
            skip_new_blocks: evaluate the base inside.
            dtype: of `ComputeOptions`; "auto" is that of the checkpoint.
        """
        super().__init__()
        checkpoint = Checkpoint.open(path)
        self.model = ComputeOptions(dtype=dtype, skip_new_blocks=skip_new_blocks).load(checkpoint)
        self.text_tokenizer = Tokenizer.load(path)
        self.context = self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self.text_tokenizer.eos_id or 0

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        bos_id = self.text_tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns ids, after what the tokenizer puts first unless text or caller say otherwise."""
        ids = self.text_tokenizer.encode(string, special=True)
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        return self.text_tokenizer.prefix + ids if add_special_tokens else ids

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Returns each continuation's log-probability, and whether greedy decoding writes it."""
        results = []
        for _name, context, continuation in requests:
            ids = torch.tensor([(context + continuation)[-(self.context + 1) :]])
            targets = ids[0, -len(continuation) :].to(self.model.lm_head.weight.device)  # (N,)
            logits = self.model(ids[:, :-1].to(targets.device))[0, -len(targets) :]  # (N, V)
            chosen = logits.log_softmax(-1, dtype=torch.float32).gather(-1, targets[:, None])
            is_greedy = torch.equal(logits.argmax(-1), targets)
            results.append((chosen.sum(dtype=torch.float64).item(), is_greedy))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Returns the log-probability of each whole text, cut into windows that do not overlap."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.context, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Returns the text written after each context, up to the first of the task's stops."""
        texts = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample"):
                raise ValueError("this example decodes greedily; the task asks for sampling")
            limit = int(options.get("max_gen_toks", 256))
            prompt = self.tok_encode(context)[-(self.context - limit) :]
            ends = end_ids(self.model.config, self.text_tokenizer)
            decoder, text = StreamingDecoder(self.text_tokenizer), ""
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            for _token, piece in write_text(self.model, decoder, prompt, limit, stop_ids=ends):
                text += piece
                if any(stop in text for stop in stops):
                    break
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts


if __name__ == "__main__":
    cli_evaluate()
