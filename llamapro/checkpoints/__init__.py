"""Weights on disk: safetensors files, checkpoint directories, new-block files, run directories.

Open `directory.py` first: a `Checkpoint` is a directory in Hugging Face layout whose files were
checked. `tensors.py` reads single tensors, `writing.py` streams them, `base.py` finds the base
inside an expanded checkpoint, `new_blocks.py` and `run.py` read what training saves. This room may
import the core (config, model, expansion, files, errors), but no other room.
"""
