"""Triton kernels of LLaMA Pro, installed and imported as `llamapro.kernels`.

The folder lies at the top level to be found and read. But Hugging Face publishes a package called
`kernels`, for which `transformers` looks when it is imported; started beside this folder, Python
would find this one instead. So under that name it steps aside for the installed package, and
where there is none, its version is one that `transformers` takes for too old to use.
"""

__version__ = "0.0.0"

IGNORE_INDEX = -100  # a target that adds neither loss nor count

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _here = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [p for p in sys.path if Path(p).resolve() != _here])
    if _spec is not None and _spec.loader is not None:
        sys.modules[__name__] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
