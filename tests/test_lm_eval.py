"""lm-evaluation-harness: the command in the docs, and the example in the place of its `hf` model.

With `-m ecosystem`, where lm_eval is installed: pip install -e '.[lm-eval]'. LLAMAPRO_SMOLLM names
SmolLM2-135M-Instruct as a checkpoint directory, or a model that was merged from it.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamapro.checkpoints.writing import in_memory, write_checkpoint
from llamapro.config import ModelConfig
from llamapro.conversion.companions import write_companions
from llamapro.expansion import expand_config, expand_state_dict, interleave
from llamapro.text.template_files import BUILT_IN

pytestmark = pytest.mark.ecosystem

Config = Callable[..., ModelConfig]
Results = tuple[dict[str, Any], dict[str, Any]]
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
    path = tmp_path_factory.mktemp("lm_eval") / "merged"
    path.mkdir()
    write_checkpoint(path, in_memory(tensors))
    write_companions(path, expanded, [])
    (path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    names |= {"unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # type: ignore[dict-item]
    names |= {"chat_template": BUILT_IN["llama2"]}
    (path / "tokenizer_config.json").write_text(json.dumps(names))
    return path


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
def run(root: Path, tasks: Path, tmp_path: Path) -> Callable[..., Results]:
    """`run(*command) -> (results, samples)` by task, in a process of its own, without network."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate", reason="lm_eval's hf model needs it: lm-eval[hf]")

    def run(*command: str) -> Results:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        line = [sys.executable, *command, "--include_path", str(tasks), "--log_samples"]
        line += ["--output_path", str(out)]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
        done = subprocess.run(
            line, cwd=root, env=os.environ | offline, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = out.rglob("results*.json")
        samples = {
            name: sorted(
                map(json.loads, next(out.rglob(f"samples_local_{name}_*")).open()),
                key=lambda sample: sample["doc_id"],
            )
            for name in TASKS
        }
        return json.loads(file.read_text())["results"], samples

    return run


LOCAL = ["--tasks", ",".join(f"local_{name}" for name in TASKS)]


def page_command(root: Path, checkpoint: Path) -> list[str]:
    """The first lm_eval command of docs/using.md, for this checkpoint and the local tasks."""
    text = (root / "docs" / "using.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("lm_eval "))
    words = shlex.split(line.replace("checkpoints/merged", str(checkpoint)), comments=True)
    at = words.index("--tasks")
    assert words[at + 2 :] == ["--num_fewshot", "25"]
    return ["-m", *words[:at], *LOCAL]


def test_the_pages_command_runs_without_a_gpu(
    run: Callable[..., Results], root: Path, checkpoint: Path
) -> None:
    """Each task has its numbers; only the checkpoint and the tasks differ from the page."""
    results, samples = run(*page_command(root, checkpoint))
    assert results.keys() == {f"local_{name}" for name in TASKS}
    assert all(len(rows) == 14 for rows in samples.values())


@pytest.mark.parametrize("model", ["with BOS", "without BOS", "smollm"])
def test_every_number_of_the_example_is_that_of_the_pages_command(
    run: Callable[..., Results], root: Path, checkpoint: Path, tmp_path: Path, model: str
) -> None:
    """Metrics, texts and log-probabilities agree in fp32, numbers up to rounding."""
    if model == "smollm":
        if not (smollm := os.environ.get("LLAMAPRO_SMOLLM")):
            pytest.skip("set LLAMAPRO_SMOLLM to SmolLM2-135M-Instruct as a checkpoint directory")
        checkpoint = Path(smollm)
    elif model == "without BOS":
        checkpoint = Path(shutil.copytree(checkpoint, tmp_path / "no_bos"))
        file = checkpoint / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    command = " ".join(page_command(root, checkpoint)).replace("bfloat16", "float32").split()
    theirs = run(*command)
    example = ["examples/lm_eval_model.py", "--model", "llamapro"]
    ours = run(*example, "--model_args", f"path={checkpoint},dtype=float32", *LOCAL)
    assert leaves(ours[0], float) == leaves(theirs[0], close)
    for name in TASKS:
        for mine, other in zip(ours[1][name], theirs[1][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            assert leaves(mine["resps"], float) == leaves(other["resps"], close), name
    assert len({sample["resps"][0][0] for sample in ours[1]["written"]}) > 3


def test_the_benchmark_finds_the_same_likelihoods(
    root: Path, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    """`evaluate_cpu.py` on both kinds of input, and its file of figures."""
    pytest.importorskip("lm_eval")
    questions = [
        {"prompt": row["text"][:40], "choices": row["choices"], "answer": row["label"]}
        for row in map(json.loads, (tasks / "data.jsonl").read_text().splitlines())
    ]
    asked, out = tmp_path / "questions.jsonl", tmp_path / "figures.json"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions))
    line = [sys.executable, "benchmarks/evaluate_cpu.py", checkpoint, "--choices", asked]
    line += ["--data", tasks / "data.jsonl", "--context", "48", "--rounds", "1", "--out", out]
    line += ["--dtypes", "float32"]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert [row["what"] for row in rows] == ["choices", "texts"]
    differences = [row["difference"] for row in rows]
    assert differences == pytest.approx([0.0, 0.0], abs=1e-4)


def close(number: str | float) -> Any:
    """Equal to fp32's rounding."""
    return pytest.approx(float(number), rel=ROUNDING, abs=ROUNDING, nan_ok=True)


def leaves(value: Any, read: Callable[[Any], Any]) -> list[Any]:
    """The items of lists and mappings, by key, in order; numbers as `read` gives them."""
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in (key, *leaves(value[key], read))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, read)]
    try:  # lm_eval writes log-probabilities as strings
        return [read(value)]
    except ValueError:
        return [value]
