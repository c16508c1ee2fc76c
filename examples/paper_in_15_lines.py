"""The paper in 15 lines: expand a LLaMA, check that nothing changed, train only what is new, save.

python examples/paper_in_15_lines.py BASE_DIR OUT_DIR    # BASE_DIR may be hf://owner/name
"""

import sys

import torch
from torch.nn.functional import cross_entropy

import llamapro

if len(sys.argv) != 3:
    print("usage: python examples/paper_in_15_lines.py BASE_DIR OUT_DIR", file=sys.stderr)
    sys.exit(2)
base_dir, out_dir = sys.argv[1:]

base = llamapro.load(base_dir, dtype=torch.float32)
tokenizer = llamapro.Tokenizer.load(base.config.directory)
ids = torch.tensor([tokenizer.encode("def square(x): return x * x", bos=True)])
model = llamapro.expand(base, 2)  # section 3.2: copies of two blocks, with W_O and W_3 zero
assert torch.equal(model(ids), base(ids))  # ... are the identity, to the bit
optimizer = torch.optim.AdamW(llamapro.train_only_new(model), lr=1e-3)  # all else is frozen
for step in range(1, 6):
    loss = cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}, loss {loss.item():.4f}")
llamapro.save(model, out_dir)  # an ordinary checkpoint, with more layers
print(llamapro.generate(model, "def square(", max_new_tokens=20))
