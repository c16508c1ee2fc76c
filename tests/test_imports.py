"""Imports point one way, stay cheap, and the folder `kernels` is in nobody's way."""

import ast
import graphlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = {f"llamapro.{file.stem}": file for file in sorted((ROOT / "llamapro").glob("[!_]*.py"))}
KERNELS = {
    f"llamapro.kernels.{file.stem}": file for file in sorted((ROOT / "kernels").glob("[!_]*.py"))
}
SCRIPTS = {name: ROOT / f"{name}.py" for name in ("train", "convert")}
EXTRAS = ("transformers", "tokenizers", "tiktoken", "jinja2", "matplotlib", "tensorboard")
EXTRAS += ("pyarrow", "lm_eval", "huggingface_hub", "wandb", "trackio")


def walk(node: ast.AST, is_deferred: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether importing the file passes it by: in a function, or for mypy."""
    for child in ast.iter_child_nodes(node):
        yield child, is_deferred
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_for_mypy = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from walk(child, is_deferred or is_function or is_for_mypy)


def imports(file: Path) -> list[tuple[str, bool]]:
    """(full module name, is deferred); `from a import b` is a.b if that is a module."""
    found = []
    for node, is_deferred in walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, is_deferred) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file.name}: relative import"
            known = MODULES | KERNELS | {"llamapro.kernels": file}
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.append((full if full in known else node.module, is_deferred))
    return found


def roots(file: Path, at_module_level: bool) -> set[str]:
    """The top-level packages a file imports, or only those it imports when it is imported."""
    return {
        name.partition(".")[0]
        for name, is_deferred in imports(file)
        if not (at_module_level and is_deferred)
    }


def sources() -> dict[str, Path]:
    scripts = {name: file for name, file in SCRIPTS.items() if file.exists()}
    return MODULES | KERNELS | scripts


def test_the_scan_sees_imports_of_every_form(tmp_path: Path) -> None:
    """What the other tests rest on: it tells the forms apart and where they run."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b, c\nfrom llamapro import ops, __version__\n"
        "try:\n    import d\nexcept ImportError:\n    pass\n"
        "class K:\n    import e\n    def f(self):\n        from g import h\n"
        "if TYPE_CHECKING:\n    import i\n"
    )
    assert imports(file) == [
        ("a.b", False),
        ("c", False),
        ("llamapro.ops", False),
        ("llamapro", False),
        ("d", False),
        ("e", False),
        ("g", True),
        ("i", True),
    ]
    assert {"llamapro.model", "llamapro.ops", "llamapro.config"} <= MODULES.keys()


@pytest.mark.parametrize(
    "module, allowed",
    [
        ("config", set()),
        ("functional", set()),
        ("ops", {"llamapro.kernels.cpu", "llamapro.config"}),
        ("model", {"llamapro.config", "llamapro.kernels.cpu", "llamapro.ops"}),
        ("expansion", {"llamapro.config", "llamapro.model"}),
        ("checkpoint", {"llamapro.config", "llamapro.model", "llamapro.checkpoints.tensors"}),
        ("tensor_file", {"llamapro.config"}),
    ],
)
def test_the_core_imports_only_what_lies_below_it(module: str, allowed: set[str]) -> None:
    """config and functional stand alone, ops and model on them, the rest on model."""
    own = {name for name, is_deferred in imports(MODULES[f"llamapro.{module}"]) if not is_deferred}
    own = {name for name in own if name.partition(".")[0] == "llamapro"}
    assert own <= allowed


def test_third_party_packages_of_the_core_are_few() -> None:
    """config: tyro at most; model and expansion: torch; ops: torch, kernels inside functions."""
    limits = {
        "config": {"tyro"},
        "model": {"torch"},
        "expansion": {"torch"},
        "ops": {"torch"},
        "checkpoint": {"torch", "safetensors", "tqdm"},
    }
    for module, allowed in limits.items():
        found = roots(MODULES[f"llamapro.{module}"], at_module_level=False)
        assert found - sys.stdlib_module_names - {"llamapro"} <= allowed, module
    for name, is_deferred in imports(MODULES["llamapro.ops"]):
        assert is_deferred or not name.startswith("llamapro.kernels")


def test_the_model_reaches_no_data_checkpoint_or_distribution() -> None:
    """Not even through another module, and not inside a function."""
    reached, todo = set(), ["llamapro.model"]
    while todo:
        for name, _ in imports(MODULES[todo.pop()]):
            if name in MODULES and name not in reached:
                reached.add(name)
                todo.append(name)
    assert reached == {"llamapro.config", "llamapro.kernels.cpu", "llamapro.ops"}


def test_kernels_know_torch_and_triton_only() -> None:
    """And each other; importing the folder itself costs nothing."""
    for imported, _ in imports(ROOT / "kernels" / "__init__.py"):
        assert imported.partition(".")[0] in sys.stdlib_module_names
    for name, file in KERNELS.items():
        for imported, _ in imports(file):
            package = imported.partition(".")[0]
            assert package in {"torch", "triton"} | sys.stdlib_module_names or imported.startswith(
                "llamapro.kernels"
            ), f"{name} imports {imported}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The imports at module level have an order."""
    graph = {
        module: {name for name, is_deferred in imports(file) if name in MODULES and not is_deferred}
        for module, file in MODULES.items()
    }
    assert set(graphlib.TopologicalSorter(graph).static_order()) == set(MODULES)


def test_nothing_imports_the_scripts() -> None:
    """train.py and convert.py are at the top: they import, and are run."""
    for folder in ("llamapro", "kernels", "benchmarks", "demo"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not roots(file, at_module_level=False) & SCRIPTS.keys(), file


def test_transformers_is_imported_in_one_function() -> None:
    """In llamapro/conversion/hf_parity.py, when the comparison is asked for; nowhere else."""
    for module, file in sources().items():
        found = [
            is_deferred for name, is_deferred in imports(file) if name.startswith("transformers")
        ]
        if module == "llamapro.conversion.hf_parity":
            assert found and all(found)
        else:
            assert not found, module


def test_extras_are_imported_where_they_are_used() -> None:
    """No optional dependency at module level."""
    for module, file in sources().items():
        assert not roots(file, at_module_level=True) & set(EXTRAS), module


def test_importing_reads_no_environment_and_calls_no_cuda() -> None:
    """os.environ, os.getenv and torch.cuda appear inside functions only."""
    for module, file in sources().items():
        for node, is_deferred in walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and not is_deferred:
                name = ast.unparse(node)
                assert name not in ("os.environ", "os.getenv", "torch.cuda"), (module, node.lineno)


def test_no_wheel_of_ours_ships_a_top_level_kernels() -> None:
    """Every installed package is llamapro or inside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    assert packages and all(name.partition(".")[0] == "llamapro" for name in packages)


def run(script: str, *path: Path) -> str:
    """Runs a script at the repository root, which is first on its sys.path, then `path`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_imported_without_triton_and_extras() -> None:
    """With only the required packages and no Triton; nothing starts CUDA."""
    run(f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {("triton", *EXTRAS)!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
for name in {list(MODULES)!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
""")


def test_importing_the_model_costs_little_beyond_torch() -> None:
    """`import llamapro` and its model: under 0.2 s after `import torch`, the median of 5."""
    script = """
import time, torch
start = time.perf_counter()
import llamapro, llamapro.model
print(time.perf_counter() - start)
"""
    assert statistics.median(float(run(script)) for _ in range(5)) < 0.2


# What transformers takes from Hugging Face's package when it finds one recent enough.
FAKE_KERNELS = """
__version__ = {version!r}
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else self
    def __getattr__(self, name): return _Anything()
def use_kernel_forward_from_hub(*args, **kwargs): return lambda decorated: decorated
use_kernelized_func = replace_kernel_forward_from_hub = use_kernel_forward_from_hub
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return _Anything if name[0].isupper() else _Anything()
"""


@pytest.mark.parametrize(
    "version",
    [
        None,
        "0.10.0",
        "accepted",
    ],
)
def test_transformers_is_imported_beside_the_folder(version: str | None, tmp_path: Path) -> None:
    """Hugging Face's `kernels` absent, installed but old, installed in a version it accepts."""
    path = []
    if version is not None:
        if version == "accepted":
            from transformers.utils.import_utils import KERNELS_MIN_VERSION as version
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(FAKE_KERNELS.format(version=version))
        info = tmp_path / f"kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
        )
        path = [tmp_path]
    elif (installed := importlib.util.find_spec("kernels")) and installed.origin:
        assert Path(installed.origin).is_relative_to(ROOT), "run the tests without that package"
    # Not transformers.models.llama alone: it is lazy, and would import nothing that matters.
    run(
        "import importlib.util as u; "
        f"assert u.find_spec('kernels').origin.startswith({str(ROOT / 'kernels')!r}); "
        "import transformers.models.llama.modeling_llama",
        *path,
    )
