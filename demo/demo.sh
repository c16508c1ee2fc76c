#!/usr/bin/env bash
# Runs the whole path on a laptop with the public commands, and shows each command before it runs.
# Trains a small base on English, expands it, and trains the new blocks on code. For comparison, it
# fine-tunes all weights on as much code. The end shows what each model learned and forgot.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

PROCESSES=2
out=demo-out
rm -rf "$out"
started=$SECONDS

step "1. Real text from this Python installation: English (documentation) and code (library source)"
run python demo/corpus.py $out/corpus

step "2. A tokenizer, and a small base model trained on English"
run python demo/train_tokenizer.py $out/corpus/english/train --vocab-size 2048 --out $out/tokenizer
run env OMP_NUM_THREADS=1 torchrun --nproc-per-node $PROCESSES train.py --config configs/demo-base.toml
run python convert.py merge configs/demo-base.json $out/runs/base $out/base

step "3. Block expansion: 4 identity blocks between the 4 of the base leave the logits bit-equal"
run python convert.py expand $out/base $out/expanded --num-new-blocks 4
run python convert.py inspect $out/expanded

step "4. LLaMA Pro: only the new blocks train, on code"
run env OMP_NUM_THREADS=1 torchrun --nproc-per-node $PROCESSES train.py --config configs/demo.toml

step "5. For comparison: fine-tune all weights of the base for the same tokens"
run env OMP_NUM_THREADS=1 torchrun --nproc-per-node $PROCESSES train.py --config configs/demo.toml \
    --model.path $out/base --train.trainable all --run-dir $out/runs/full

step "6. Back to ordinary checkpoints; the first one holds the base, byte for byte"
run python convert.py merge $out/expanded $out/runs/pro $out/pro
run python convert.py merge $out/base $out/runs/full $out/full
run python convert.py verify $out/pro --base $out/base

step "7. What each model learned and forgot, on all held-out text"
for model in pro full; do
    run python -m llamapro.evaluate $out/$model --against $out/base \
        --data $out/corpus/english/val $out/corpus/code/val
done
run python -m llamapro.report $out/runs/pro $out/runs/full --out $out/report

step "Done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "table:   $out/report/report.md"
echo "picture: $out/report/report.png"
echo "model:   $out/pro (an ordinary LlamaForCausalLM checkpoint)"
echo "samples: a model of this size writes nothing worth reading; make smollm trains one that does"
