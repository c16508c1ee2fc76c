"""Triton kernels of LLaMA Pro, installed and imported as `llamapro.kernels`.

The folder lies at the top level to be found and read, but its import name is `llamapro.kernels`.
The version below is deliberate: `transformers` probes for a package called `kernels` at import, may
find this folder when Python is started beside it, and takes version 0.0.0 for too old to use.
"""

__version__ = "0.0.0"
