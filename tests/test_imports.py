"""Imports point one way, stay cheap, and the folder `kernels` is in nobody's way.

The order of the rooms is the list in tests/imports.py, which also reads the sources.
"""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCAN = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "imports.py")))
MODULES: dict[str, Path] = SCAN.MODULES
EXTRAS = ("transformers", "tokenizers", "tiktoken", "jinja2", "matplotlib", "tensorboard")
EXTRAS += ("pyarrow", "lm_eval", "huggingface_hub", "wandb", "trackio", "peft")


def packages(file: Path, at_module_level: bool) -> set[str]:
    """The top-level packages a file imports, or only those it imports when it is imported."""
    return {
        name.partition(".")[0]
        for name, is_deferred in SCAN.imports(file)
        if not (at_module_level and is_deferred)
    }


def run(script: str, *path: Path) -> str:
    """Runs a script at the repository root, which is first on its sys.path, then `path`."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- The order of rooms -------------------------------------------------------------------------


def test_the_scan_sees_imports_of_every_form(tmp_path: Path) -> None:
    """The other tests rest on this: the scan sees each form, and whether it runs at import."""
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b, c\nfrom llamapro import ops, __version__\n"
        "try:\n    import d\nexcept ImportError:\n    pass\n"
        "class K:\n    import e\n    def f(self):\n        from g import h\n"
        "if TYPE_CHECKING:\n    import i\n"
    )
    assert SCAN.imports(file) == [
        ("a.b", False),
        ("c", False),
        ("llamapro.ops", False),
        ("llamapro", False),
        ("d", False),
        ("e", False),
        ("g", True),
        ("i", True),
    ]
    assert {"llamapro.model", "llamapro.text.corpus", "llamapro.kernels.rope"} <= MODULES.keys()


def test_upward_imports_and_circles_are_seen() -> None:
    """The two judgements of the order, on a graph made for them."""
    edges = {
        "llamapro.ops": {"llamapro.model"},
        "llamapro.model": {"llamapro.ops", "llamapro.config"},
        "llamapro.text.store": {"llamapro.checkpoints.hub", "llamapro.text.corpus"},
        "llamapro.text.corpus": set(),
        "llamapro.checkpoints.hub": set(),
        "llamapro.config": set(),
    }
    assert SCAN.upward(edges) == [
        ("llamapro.ops", "llamapro.model"),
        ("llamapro.text.store", "llamapro.checkpoints.hub"),
    ]
    assert SCAN.circles(edges) == [["llamapro.model", "llamapro.ops"]]


def test_every_room_has_its_place_in_the_order() -> None:
    """A new module of the core or a new folder gets a line in `ORDER`; a removed one loses it."""
    assert {SCAN.room(module) for module in MODULES} == SCAN.FLOORS.keys()


def test_the_order_is_the_one_that_the_project_promises() -> None:
    """The core lies below every room; text and checkpoints, conversion and training lie apart."""
    core = ["errors", "files", "kernels", "config", "backends", "ops", "model", "expansion"]
    rooms = ["text", "checkpoints", "inference", "conversion", "training"]
    assert max(map(SCAN.FLOORS.get, core)) < min(map(SCAN.FLOORS.get, rooms))
    assert SCAN.FLOORS["text"] == SCAN.FLOORS["checkpoints"]
    assert SCAN.FLOORS["conversion"] == SCAN.FLOORS["training"]


def test_every_import_points_down() -> None:
    """To a lower floor or inside its own room, inside functions too."""
    assert SCAN.upward(SCAN.graph()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not even inside functions, where Python would allow it."""
    assert SCAN.circles(SCAN.graph()) == []


def test_the_package_itself_is_asked_for_its_version_only() -> None:
    """The names of llamapro/__init__.py come from above, so using them inside would be a circle."""
    for module, file in MODULES.items():
        for node, _ in SCAN.nodes(file):
            if isinstance(node, ast.ImportFrom) and node.module == "llamapro":
                names = {alias.name for alias in node.names}
                known = {name for name in names if SCAN.is_module(f"llamapro.{name}")}
                assert names - known <= {"__version__"}, module


def test_make_imports_prints_the_order() -> None:
    """The script runs with nothing but Python, and ends with the counts."""
    done = subprocess.run(
        [sys.executable, "-I", "tests/imports.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(SCAN.FLOORS)} rooms, {len(MODULES)} modules" in done.stdout


# ---- Third-party packages ------------------------------------------------------------------------


def test_third_party_packages_of_the_core_are_few() -> None:
    """The core needs torch alone; of the rooms around it, checkpoints needs safetensors too."""
    limits = {
        "errors": set(),
        "files": set(),
        "config": set(),
        "backends": {"torch"},
        "ops": {"torch"},
        "model": {"torch"},
        "expansion": {"torch"},
        "kernels": {"torch", "triton"},
        "checkpoints": {"torch", "safetensors", "tqdm", "numpy", "huggingface_hub"},
    }
    for module, file in MODULES.items():
        if (allowed := limits.get(SCAN.room(module))) is not None:
            found = packages(file, at_module_level=False) - sys.stdlib_module_names
            assert found <= allowed | {"llamapro"}, module


def test_kernels_know_torch_and_triton_only() -> None:
    """And each other; importing the folder itself costs nothing."""
    for imported, _ in SCAN.imports(ROOT / "kernels" / "__init__.py"):
        assert imported.partition(".")[0] in sys.stdlib_module_names
    for name, file in SCAN.KERNELS.items():
        for imported, _ in SCAN.imports(file):
            is_own = imported == "llamapro.kernels" or imported.startswith("llamapro.kernels.")
            assert is_own or not imported.startswith("llamapro"), f"{name} imports {imported}"


def test_the_scripts_are_imported_by_their_full_name_only() -> None:
    """`import train` finds the file only where the repository root is the working directory."""
    by_name = re.compile(r"^ *(?:import|from) (?:train|convert)\b", re.MULTILINE)
    for folder in ("llamapro", "kernels", "benchmarks", "experiments", "demo", "tests"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not by_name.search(file.read_text(encoding="utf-8")), file


def test_transformers_is_imported_where_it_is_compared_with() -> None:
    """Only the modules made for it import it, and only inside functions."""
    made_for_it = {"llamapro.conversion.hf_parity", "llamapro.text.comparison"}
    for module, file in MODULES.items():
        found = [
            is_deferred
            for name, is_deferred in SCAN.imports(file)
            if name.partition(".")[0] == "transformers"
        ]
        assert all(found) and (module in made_for_it or not found), module


def test_extras_are_imported_where_they_are_used() -> None:
    """No optional dependency at module level."""
    for module, file in MODULES.items():
        assert not packages(file, at_module_level=True) & set(EXTRAS), module


def test_importing_reads_no_environment_and_calls_no_cuda() -> None:
    """os.environ, os.getenv and torch.cuda appear inside functions only."""
    for module, file in MODULES.items():
        for node, is_deferred in SCAN.nodes(file):
            if isinstance(node, ast.Attribute) and not is_deferred:
                name = ast.unparse(node)
                assert name not in ("os.environ", "os.getenv", "torch.cuda"), (module, node.lineno)


def test_no_wheel_of_ours_ships_a_top_level_kernels() -> None:
    """Every installed package is llamapro or inside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = project["tool"]["setuptools"]["packages"]
    assert names and all(name.partition(".")[0] == "llamapro" for name in names)


def test_every_module_is_imported_without_triton_and_extras() -> None:
    """The required packages are enough, without Triton, and nothing starts CUDA."""
    run(f"""
import importlib, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {("triton", *EXTRAS)!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
for name in {[name for name in MODULES if not name.startswith("llamapro.kernels.")]!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
""")


def test_importing_costs_no_more_than_it_must() -> None:
    """Importing a module loads nothing that it does not need; names are imported on first use."""
    # The model needs torch and the core, and none of the rooms around it.
    rooms = {f"llamapro.{name}" for name in ("text", "checkpoints", "inference", "training")}
    absent = {"triton", "safetensors", "sentencepiece", "tyro", "tqdm", *EXTRAS, *rooms}
    run(f"""
import sys
import llamapro
assert not sys.modules.keys() & {{"torch", "numpy", "safetensors", "tyro"}}
import torch
before = set(sys.modules)  # torch loads what torch needs
import llamapro.model, llamapro.expansion
assert not (sys.modules.keys() - before) & {absent!r}
for name in llamapro.__all__:
    assert callable(getattr(llamapro, name)), name
from llamapro.generate import main
assert callable(llamapro.generate)  # the function is still there, beside the module
try:
    llamapro.nothing
except AttributeError as error:
    assert str(error) == "module 'llamapro' has no attribute 'nothing'"
""")


# ---- Hugging Face's package of the same name ----------------------------------------------------

# All that transformers takes from Hugging Face's package if it is recent enough.
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


@pytest.mark.parametrize("is_installed", [False, True])
def test_transformers_is_imported_beside_the_folder(is_installed: bool, tmp_path: Path) -> None:
    """Hugging Face's `kernels` absent, and installed in a version that transformers accepts."""
    path = []
    if is_installed:
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
