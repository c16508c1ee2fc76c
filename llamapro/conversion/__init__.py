"""Checkpoint in, checkpoint out: expand, merge, strip, Meta's layout, GGUF, verify, inspect.

Open `expand.py` first; a command is a list of tensors that `checkpoints/writing.py` streams.
`meta.py` converts Meta's releases and `gguf.py` llama.cpp's files. `verify.py` proves that a base
is intact. `model_card.py` and `companions.py` write the files beside the weights. This room may
import the core, text, checkpoints and inference, but never training.

A wrong argument raises ConfigError; a file that is missing, damaged or of another model raises
CheckpointError, of a tokenizer DataError. What was to be written is then not there.
"""
