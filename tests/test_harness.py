"""The lm_eval model: likelihoods and texts by definition; with `-m ecosystem`, as lm_eval's `hf`.

Most tests need no lm_eval: the class does without it until `register` joins the two.
"""

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llamapro import cli, harness
from llamapro.checkpoints.directory import Checkpoint
from llamapro.checkpoints.tensors import DTYPE_CODES, TensorSpec, tensor_chunks
from llamapro.checkpoints.writing import write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.errors import ConfigError, DataError
from llamapro.expansion import expand_config, expand_state_dict, interleave
from llamapro.harness import Generation, HarnessModel, adds_bos
from llamapro.text.chat_template import BUILT_IN

Config = Callable[..., ModelConfig]
CONTEXT = 64
# As fp32 sums in another order give: about one unit in the last place of each of 64 logits.
ROUNDING = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Config,
    random_tensors: Callable[..., dict[str, Tensor]],
    tokenizer_file: Path,
) -> Path:
    """An expanded model whose new blocks compute something: what a merged export is."""
    config = tiny_config(max_position_embeddings=CONTEXT)
    layout = interleave(config.num_hidden_layers, 2)
    expanded = expand_config(config, layout, "0" * 64)
    tensors = expand_state_dict(random_tensors(config), layout)
    generator = torch.Generator().manual_seed(7)
    for name, tensor in tensors.items():
        if not tensor.any():
            tensors[name] = 0.1 * torch.randn(tensor.shape, generator=generator)
    # No bytes that are no text: libraries differ in what they show for them.
    tensors["lm_head.weight"][3:259] *= 0.05
    path = tmp_path_factory.mktemp("harness") / "merged"
    path.mkdir()
    specs = [TensorSpec(n, DTYPE_CODES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    write_checkpoint(path, specs, lambda s: tensor_chunks(tensors[s.name]))
    write_companions(path, expanded, [])
    (path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # type: ignore[dict-item]
    names |= {"chat_template": BUILT_IN["llama2"]}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


class Finished(list[tuple[Any, ...]]):
    """In the place of lm_eval's cache."""

    def add_partial(self, *what: Any) -> None:
        self.append(what)


@pytest.fixture
def load(checkpoint: Path) -> Callable[..., HarnessModel]:
    """`load(**model_args)`: the model, on the CPU, without lm_eval."""

    def load(**model_args: Any) -> HarnessModel:
        model = HarnessModel(**{"path": str(checkpoint), "device": "cpu"} | model_args)
        model.cache_hook = Finished()
        return model

    return load


@pytest.fixture(scope="module")
def logits_of(checkpoint: Path) -> Callable[[list[int]], Tensor]:
    """`logits_of(ids)`: (T, V), of one sequence and nothing around it."""
    model = Checkpoint.open(checkpoint).load()

    @torch.inference_mode()
    def logits_of(ids: list[int]) -> Tensor:
        return model(torch.tensor([ids]))[0]

    return logits_of


def ids_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 400, (length,), generator=generator).tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loglikelihoods_are_those_of_the_logits(
    load: Callable[..., HarnessModel],
    logits_of: Callable[[list[int]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    """Of any length, in any batch and order; too long ones lose their beginning, as in `hf`."""
    monkeypatch.setattr(harness, "_POSITIONS", 5)
    shapes = [(3, 2), (1, 1), (40, 24), (9, 13), (CONTEXT, 1), (CONTEXT + 30, 7), (1, CONTEXT)]
    asked: list[Any] = [
        ((f"c{i}", "x"), ids_of(a, i), ids_of(b, i + 50)) for i, (a, b) in enumerate(shapes)
    ]
    best = logits_of([1, 300]).argmax(-1).tolist()
    asked += [(None, [1, 300], [best[1]]), (None, [1], [300, best[1]]), (None, [1, 300], [9])]
    model = load(batch_size=batch_size)
    found = model._loglikelihood_tokens(asked, disable_tqdm=True)
    for (_, context, continuation), (value, is_greedy) in zip(asked, found, strict=True):
        ids = (context + continuation)[-(CONTEXT + 1) :]
        logits = logits_of(ids[:-1])[-len(continuation) :].double()
        chosen = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert value == pytest.approx(chosen.sum().item(), rel=ROUNDING)
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
    assert [is_greedy for _, is_greedy in found[-3:]] == [True, best[0] == 300, False]
    kept = {what[1][0]: what[2] for what in model.cache_hook}
    assert kept == {f"c{i}": found[i] for i in range(len(shapes))}


def test_choices_that_differ_in_the_last_token_share_a_forward_pass(
    load: Callable[..., HarnessModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question with four letters to choose from costs one input, not four."""
    model = load(batch_size=8)
    rows: list[int] = []
    model._model.model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    context = ids_of(20)
    found = model._loglikelihood_tokens([(None, context, [i]) for i in range(300, 304)])
    assert rows == [1] and len(set(found)) == 4


def test_a_continuation_longer_than_the_context_is_refused(
    load: Callable[..., HarnessModel],
) -> None:
    """Its beginning would be left out of the sum."""
    with pytest.raises(DataError, match=r"9 tokens, .* longer than max_length 8"):
        load(max_length=8)._loglikelihood_tokens([(None, [1], ids_of(9))])


def written(model: HarnessModel, *asked: tuple[str, dict[str, Any]]) -> list[str]:
    requests = [SimpleNamespace(args=args) for args in asked]
    found = model.generate_until(requests, disable_tqdm=True)
    kept = {what[1][0]: what[2] for what in model.cache_hook}
    assert kept == {args[0]: text for args, text in zip(asked, found, strict=True)}
    return found


PROMPTS = ["import sys", "def main(", "", "a longer text, " * 20, "x = 1\n", "def name("]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_are_the_most_likely_tokens_one_after_the_other(
    load: Callable[..., HarnessModel],
    logits_of: Callable[[list[int]], Tensor],
    batch_size: int,
) -> None:
    """Whatever is in the batch beside them; contexts that leave no room lose their beginning."""
    model = load(batch_size=batch_size)
    found = written(model, *((prompt, {"max_gen_toks": 12}) for prompt in PROMPTS))
    assert len(set(found)) > 3
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = model.tok_encode(prompt)[-(CONTEXT - 12) :]
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != 2:
            ids.append(int(logits_of(ids)[-1].argmax()))
        assert text == model._tokenizer.decode(ids[start:])
    without = load(add_bos_token=False)
    assert written(without, ("", {"max_gen_toks": 12})) == [found[PROMPTS.index("")]]


def test_texts_end_before_their_stops(load: Callable[..., HarnessModel]) -> None:
    """At the first stop of each row's own; tokens after it are not computed once all have one."""
    model = load(batch_size=8)
    whole = written(model, ("import sys", {"max_gen_toks": 40}))[0]
    stop = whole[7:10]
    steps: list[int] = []
    model._model.model.register_forward_pre_hook(lambda _, args: steps.append(args[0].shape[1]))
    model.cache_hook.clear()
    asked = {"max_gen_toks": 40, "until": ["never\0", stop, ""]}
    assert written(model, ("import sys", asked)) == [whole.partition(stop)[0]]
    assert len(steps) < 20
    model.cache_hook.clear()
    assert written(model, ("import sys", asked | {"until": stop})) == [whole.partition(stop)[0]]


def test_texts_end_at_control_tokens(
    load: Callable[..., HarnessModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At EOS, at any of the model's, and at one a task names; their names are not in the text."""
    model = load(batch_size=2)
    letters = [model._tokenizer.encode(text, continues=True)[0] for text in "abc"]
    control = {"</s>": 2, "<|end|>": 1}
    monkeypatch.setattr(model._tokenizer, "special_tokens", control)
    for end, until in [(2, []), (0, []), (1, ["<|end|>"])]:
        monkeypatch.setattr(
            model, "_model", SimpleNamespace(config=SimpleNamespace(eos_token_ids=(0,)))
        )
        rows = [[letters[0], end, letters[1]], [letters[2], letters[2], 3 + 0xE2]]
        steps = [torch.tensor(step)[:, None] for step in zip(*rows, strict=True)]
        monkeypatch.setattr(harness, "generate", lambda *_, steps=steps: iter(steps))
        wanted = Generation.read({"until": until})
        assert model._write([[1], [1]], wanted) == [
            "a",
            "cc\ufffd",
        ]  # the last one: part of a character


def test_samples_follow_torch_s_seed(load: Callable[..., HarnessModel]) -> None:
    """lm_eval's --seed: the same run again writes the same, repeats within it do not."""
    asked = ("import sys", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = load()
        requests = [SimpleNamespace(args=asked)] * 3
        runs.append(model.generate_until(requests, disable_tqdm=True))
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_generation_kwargs_are_read_or_refused() -> None:
    """Sampling options count with sampling alone; what would be ignored in silence is named."""
    read = Generation.read
    assert read({}) == Generation((), 256, 0.0, 1.0)
    assert read({"until": ["Q", "</s>"], "max_gen_toks": 7}) == Generation(("Q", "</s>"), 7, 0, 1)
    assert read({"until": "Q", "max_new_tokens": 5}).limit == 5
    greedy = {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "top_k": 5}
    assert read(greedy) == read({})
    assert read({"temperature": 0.7, "top_p": 0.9}) == Generation((), 256, 0.7, 0.9)
    for options, message in [
        ({"num_beams": 4}, "num_beams"),
        ({"temperature": 1.0, "top_k": 5}, "top_k"),
        ({"do_sample": True}, "do_sample without a temperature"),
        ({"temperature": 1.0, "top_p": 0}, "top_p 0"),
        ({"max_gen_toks": 0}, "max_gen_toks 0"),
    ]:
        with pytest.raises(ConfigError, match=f"generation_kwargs: .*{message}"):
            read(options)


@pytest.mark.parametrize(
    "model_args, message",
    [
        ({"path": ""}, "path is missing"),
        ({"max_lenght": 3}, r"'max_lenght' \(did you mean 'max_length'\?\)"),
        ({"dtype": "fp8"}, "dtype 'fp8': expected one of auto, float32"),
        ({"device": "cuda:1"}, "device 'cuda:1': expected one of auto, cpu, cuda"),
        ({"batch_size": "auto"}, "--batch_size auto"),
        ({"max_length": CONTEXT + 1}, f"max_length 65: .* takes 1 to {CONTEXT}"),
    ],
)
def test_wrong_model_args_are_named(
    load: Callable[..., HarnessModel], model_args: dict[str, Any], message: str
) -> None:
    """Before anything is loaded, with what is possible instead."""
    with pytest.raises(ConfigError, match=message):
        load(**model_args)


def test_no_room_for_a_context_is_said(load: Callable[..., HarnessModel]) -> None:
    """As many tokens to write as the context has."""
    with pytest.raises(ConfigError, match=f"max_gen_toks {CONTEXT} leaves no room"):
        written(load(), ("a", {"max_gen_toks": CONTEXT}))


def test_bos_is_added_as_the_files_say(tmp_path: Path) -> None:
    """tokenizer_config.json, else tokenizer.json's post-processor; sentencepiece's has one."""
    assert adds_bos(tmp_path)
    made: dict[str, Any] = {"post_processor": None}
    template = {"single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    for processor, expected in [
        (None, False),
        ({"type": "ByteLevel"}, False),
        (template, True),
        ({"single": [{"Sequence": {"id": "A"}}]}, False),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}, True),
    ]:
        made["post_processor"] = processor
        (tmp_path / "tokenizer.json").write_text(json.dumps(made))
        assert adds_bos(tmp_path) == expected
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not adds_bos(tmp_path)


def test_bos_is_put_once_before_texts(load: Callable[..., HarnessModel]) -> None:
    """Not before one that names it, as chat templates do, nor where it is not wanted."""
    model = load()
    plain = model.tok_encode("abc", add_special_tokens=False)
    assert 1 not in plain
    assert model.tok_encode("abc") == [1, *plain]
    assert model.tok_encode("<s>abc")[:2] != [1, 1] == model.tok_encode("<s><s>abc")[:2]
    assert load(add_bos_token=False).tok_encode("abc") == plain
    assert model.prefix_token_id == 1 and model.eot_token_id == 2


def test_conversations_are_rendered_as_transformers_does(
    load: Callable[..., HarnessModel], checkpoint: Path, tmp_path: Path
) -> None:
    """By the model's template or a named one; a last turn that is to be continued stays open."""
    theirs = AutoTokenizer.from_pretrained(checkpoint)
    turns = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "The two "}]
    trimming = tmp_path / "own.jinja"
    trimming.write_text("{% for m in messages %}{{ m.role }}:{{ m.content | trim }}\n{% endfor %}!")
    model = load()
    assert model.chat_template(False) is None
    for choice, source in [
        (None, BUILT_IN["llama2"]),
        (True, BUILT_IN["llama2"]),
        ("mistral", BUILT_IN["mistral"]),
        (str(trimming), trimming.read_text()),
    ]:
        if choice is not None:
            assert model.chat_template(choice) == source
        options = {"tokenize": False, "chat_template": source}
        asked = theirs.apply_chat_template(turns[:1], add_generation_prompt=True, **options)
        assert model.apply_chat_template(turns[:1]) == asked
        begun = theirs.apply_chat_template(turns, continue_final_message=True, **options)
        assert model.apply_chat_template(turns, add_generation_prompt=False) == begun


def test_missing_lm_eval_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit status 2."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as caught:
        cli.run(harness.main)
    signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "pip install 'llamapro[lm-eval]'" in error and error.count("\n") == 1


# ---- With lm_eval ------------------------------------------------------------------------------

TEXT = "def parse(self, args):\n    return [name for name in args if name]\n"
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "metadata": {"version": 1},
    "num_fewshot": 0,
}
TASKS: dict[str, dict[str, Any]] = {
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": "word_perplexity"},
            {"metric": "byte_perplexity"},
            {"metric": "bits_per_byte"},
        ],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "se", "</s>"], "max_gen_toks": 24},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks, one of each output type, with data of their own."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            # transformers 5 forgets sentencepiece's space before a text that begins with one.
            "text": TEXT[i % 30 :].lstrip() * (1 + i % 4) + "x" * (i % 3),
            "answer": ["return", " name in args", "0"][i % 3],
            "choices": ["a", " name", "return self.args", "b"][: 2 + i % 3],
            "label": i % 2,
        }
        for i in range(14)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    for name, task in TASKS.items():
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        content = COMMON | files | task | {"task": f"local_{name}"}
        (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder


@pytest.fixture
def run(
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., tuple[dict[str, Any], dict[str, Any]]]]:
    """`run(*arguments) -> (results, samples)` by task, of the command in this process."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs it: lm-eval[hf]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    handler = signal.getsignal(signal.SIGTERM)
    numbers = itertools.count()

    def run(*arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
        out = tmp_path / f"out{next(numbers)}"
        shared = ["--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
        shared += ["--tasks", ",".join(f"local_{name}" for name in TASKS), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, *shared])
        with pytest.raises(SystemExit) as caught:
            cli.run(harness.main)
        assert caught.value.code == 0, capsys.readouterr().err
        (file,) = out.rglob("results*.json")
        samples = {
            name: sorted(
                map(json.loads, next(out.rglob(f"samples_local_{name}_*")).open()),
                key=lambda sample: sample["doc_id"],
            )
            for name in TASKS
        }
        return json.loads(file.read_text())["results"], samples

    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.ecosystem
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_every_number_is_that_of_the_hf_model(
    run: Callable[..., tuple[dict[str, Any], dict[str, Any]]], checkpoint: Path, chat: bool
) -> None:
    """Metrics, and each answer: texts equal, log-probabilities to fp32's rounding."""
    more = ["--apply_chat_template"] if chat else []
    theirs = run(
        "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", *more,
        "--batch_size", "1",
    )  # fmt: skip
    ours = run(
        "--model", "llamapro", "--model_args", f"path={checkpoint},dtype=float32", *more,
        "--batch_size", "4",
    )  # fmt: skip
    assert ours[0].keys() == {f"local_{name}" for name in TASKS}
    assert leaves(ours[0], float) == leaves(theirs[0], close)
    for name in TASKS:
        for mine, other in zip(ours[1][name], theirs[1][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert leaves(mine["resps"], float) == leaves(other["resps"], close), name
    assert len({sample["resps"][0][0] for sample in ours[1]["written"]}) > 3


def close(number: str | float) -> Any:
    """Equal to fp32's rounding."""
    return pytest.approx(float(number), rel=ROUNDING, abs=ROUNDING, nan_ok=True)


def leaves(value: Any, read: Callable[[Any], Any]) -> list[Any]:
    """What is in lists and mappings, by key, in order; numbers as `read` gives them."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in (key, *leaves(value[key], read))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, read)]
    try:  # lm_eval writes log-probabilities as strings
        return [read(value)]
    except ValueError:
        return [value]
