#!/usr/bin/env bash
# From a base to an instruct model with its domain: expand, domain stage, SFT, merge.
#   bash demo/recipe.sh BASE_DIR OUT_DIR 'CORPUS...' 'CHATS...'
# Environment variables: NEW_BLOCKS, PROCESSES, DOMAIN_PRESET, SFT_PRESET, and DOMAIN_OPTIONS and
# SFT_OPTIONS for any options of train.py. The same command run again continues.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -eq 4 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
base=$1 out=$2

run() { printf '$ %s\n' "$*" >&2; "$@"; }
train() { run torchrun --nproc-per-node "${PROCESSES:-8}" train.py "$@"; }

[ -e "$out/expanded" ] ||
    run python convert.py expand "$base" "$out/expanded" --num-new-blocks "${NEW_BLOCKS:-8}"
# shellcheck disable=SC2086  (lists of files and options)
train --config "${DOMAIN_PRESET:-configs/llama2-7b.toml}" --model.path "$out/expanded" \
    --run-dir "$out/runs/domain" --data.train $3 ${DOMAIN_OPTIONS:-}
[ -e "$out/domain" ] || run python convert.py merge "$out/expanded" "$out/runs/domain" "$out/domain"
# shellcheck disable=SC2086
train --config "${SFT_PRESET:-configs/sft.toml}" --model.path "$out/domain" \
    --run-dir "$out/runs/instruct" --data.train $4 ${SFT_OPTIONS:-}
[ -e "$out/instruct" ] || run python convert.py merge "$out/domain" "$out/runs/instruct" "$out/instruct"
run python convert.py verify "$out/domain" --base "$base"
