"""The parts of `train.py`. Open that file first: it calls them in the order of a run.

`settings`, `preset` and `checks` read the options; `job` opens what they name, and `plan` estimates
the memory. `launcher`, `distributed`, `agreement`, `peers`, `lock` and `preemption` keep processes
together. `data` and `replay` make the sequences, `objective` the losses, `weights` and `optim` the
steps. `checkpoint` saves, `resume` goes on, `progress` and `metrics` report. The method is in
`objective.py`, FSDP in `distributed.py` and `checkpoint.py`. This room may import the core, text,
checkpoints and inference, but never conversion.
"""
