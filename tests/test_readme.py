"""The README speaks of what is there: its file map, its options, its presets."""

import dataclasses
import re
from pathlib import Path

import simulate

from llamapro import evaluate, generate
from llamapro.training import settings

TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--max-restarts"}
HARNESS = {"--model", "--model_args", "--batch_size", "--tasks", "--num_fewshot"}
HARNESS |= {"--confirm_run_unsafe_code"}  # lm_eval's own


def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def test_file_map_lists_every_module(root: Path) -> None:
    """And nothing that is not there."""
    text = readme(root)
    named = set(re.findall(r"`((?:llamapro/|kernels/|train|convert)[\w/]*\.py)`", text))
    modules = {str(f.relative_to(root)) for f in root.glob("*/[!_]*.py")}
    modules = {name for name in modules if name.startswith(("llamapro/", "kernels/"))}
    assert named >= modules | {"train.py", "convert.py"}
    for name in named | set(re.findall(r"`([\w-]+/)`", text)):
        assert (root / name).exists() or name == "results/", name
    for preset in re.findall(r"configs/[\w-]+\.toml", text):
        assert (root / preset).exists(), preset


def test_every_option_it_names_exists(root: Path) -> None:
    """A renamed option would leave a command that does not run as written."""
    known = {"--" + key.replace("_", "-") for key in settings.flatten(settings.Settings())}
    for kind in (generate.Args, evaluate.Args, simulate.Options):
        known |= {"--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)}
    fields = re.findall(r"^    (\w+): ", (root / "convert.py").read_text(), re.MULTILINE)
    known |= {"--" + name.replace("_", "-") for name in fields} | TORCHRUN | HARNESS | {"--help"}
    study = (root / "experiments" / "options.py").read_text()
    study = study[study.index("class StudySettings") :]
    fields = re.findall(r"^    (\w+): ", study, re.MULTILINE)
    known |= {"--" + name.replace("_", "-") for name in fields}
    for file in (root / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', file.read_text()))
    named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", readme(root)))
    assert named <= known, named - known
