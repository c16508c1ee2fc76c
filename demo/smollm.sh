#!/usr/bin/env bash
# Teaches a real model something new: SmolLM2-135M-Instruct, which knows no German, learns to
# translate the labels of programs. The model and the text come as Python packages. Every command
# is public and is shown before it runs. About 15 minutes on 2 cores, most of it training.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

out=smollm-out
started=$SECONDS

step "1. The model (a GGUF file), and two programs that carry English messages with German translations"
bash demo/smollm_base.sh

step "2. 6 new blocks in it that change no bit of its logits"
[ -d $out/expanded ] || run llamapro expand $out/base $out/expanded --num-new-blocks 6

step "3. Only the new blocks train; what the base knows is held by what it wrote itself"
run llamapro train --config smollm

step "4. An ordinary checkpoint again; the base is in it, byte for byte"
run llamapro merge $out/expanded $out/runs/pro $out/pro --force
run llamapro verify $out/pro --base $out/base
run llamapro report $out/runs/pro --out $out/report

step "5. Messages that neither has seen, before and after; and what the base knew"
run python demo/smollm_labels.py $out/base $out/pro $out/labels/val
for model in base pro; do
    run llamapro generate $out/$model --chat --prompt "What is the capital of France?" --max-new-tokens 24
done

step "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "table:   $out/report/report.md"
echo "model:   $out/pro (an ordinary LlamaForCausalLM checkpoint)"
