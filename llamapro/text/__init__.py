"""From files to tokens: everything between the user's text and the samples that are trained on.

Tokenizers (`vocabulary`, `tokenizer`) turn text into ids. Corpora (`documents`, `rows`,
`corpus`) and conversations (`chat_template`, `conversations`, `packing`) become token stores on
disk (`store`), which a `mixture` cuts and orders into samples. This folder may import the core and
what is below it, but not checkpoints, conversion or training. Open `mixture.py` first.
"""
