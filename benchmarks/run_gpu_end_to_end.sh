#!/usr/bin/env bash
# LLaVA-1.6-Mistral-7B's geometry on one GPU of 80 GB or more, in under 9 minutes: captured steps
# against eager ones, concurrency, and the table of prefill, decoding and memory, the most
# important runners first. MORE=1 instead runs the rest: Transformers' own loop over captured steps,
# its static cache, kvpress. Options go to pytest: --model NAME for real weights.
# Writes gpu_*.{json,log,md,png} to $OUT (benchmarks/results).
cd "$(dirname "$0")/.." || exit 1
. benchmarks/gpu_parts.sh
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
end_to_end="$PYTHON -m pytest -q benchmarks/test_end_to_end.py"

if [ -n "${MORE:-}" ]; then
    part 540 others $end_to_end -k "stock or static or kvpress" \
        --benchmark-json "$OUT/gpu_others.json" "$@"
else
    part 60 tokens $end_to_end -k captured "$@"
    part 170 lean $end_to_end -k lean --benchmark-json "$OUT/gpu_lean.json" "$@"
    # 40 GiB: on a whole GPU, prefilling the prompts that fit at 10 % takes minutes.
    part 100 concurrency "$PYTHON" -m pytest -q benchmarks/test_concurrency.py --memory-gib 40 \
        --benchmark-json "$OUT/gpu_concurrency.json" "$@"
    part 150 default $end_to_end -k default --benchmark-json "$OUT/gpu_default.json" "$@"
fi
part 15 report "$PYTHON" benchmarks/report.py "$OUT"
exit "$failed"
