"""A model at work: next tokens, conversations, multiple choice, the token-distribution shift.

These modules compute; they print no result and parse no command line. Training, which lets the base
write text for replay, and experiments use them too. They may import the core, `checkpoints` and
`text`, never a command. Open `sampling.py` first.
"""
