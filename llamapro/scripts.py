"""Finds `train.py`, `convert.py` and the presets, in a clone and in an installed wheel.

    from llamapro.scripts import train

In a clone the two files stand beside this package. A wheel carries copies in `llamapro/scripts/`,
and the presets in `llamapro/configs/`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
_IN_WHEEL = (_HERE / "scripts").is_dir()

# A module with `__path__` is a package: its submodules are looked for here.
__path__ = [str(_HERE / "scripts" if _IN_WHEEL else _HERE.parent)]

CONFIGS = (_HERE if _IN_WHEEL else _HERE.parent) / "configs"

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Tells mypy that the submodules exist."""
