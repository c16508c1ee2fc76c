"""LLaMA Pro from scratch: expand a LLaMA with identity blocks, train only those, keep the rest.

Read in this order: `llamapro/model.py` (the network), `llamapro/expansion.py` (the method),
`train.py` (the training loop). Importing the package imports nothing but this line.
"""

__version__ = "0.1.0"
