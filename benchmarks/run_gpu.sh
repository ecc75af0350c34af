#!/usr/bin/env bash
# Everything about the kernels on one GPU in under 8 minutes: tests, kernel benchmarks, sanitizer,
# report. Writes gpu_*.{json,log,md,png} to $OUT (benchmarks/results). A part that runs past its
# time is stopped, and the others still run; the exit status says whether all of them passed.
# The whole model: benchmarks/run_gpu_end_to_end.sh.
cd "$(dirname "$0")/.." || exit 1
. benchmarks/gpu_parts.sh

part 60 caches "$PYTHON" -m pytest -q benchmarks/test_caches.py --benchmark-json "$OUT/gpu_caches.json"
part 130 tests "$PYTHON" -m pytest -q -m gpu tests -p no:cacheprovider
part 110 decode "$PYTHON" -m pytest -q benchmarks/test_decode.py --benchmark-json "$OUT/gpu_decode.json"
part 65 kernels "$PYTHON" -m pytest -q benchmarks/test_{score,select,compact}.py \
    --benchmark-json "$OUT/gpu_kernels.json"
if command -v compute-sanitizer >/dev/null; then
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    part 50 memcheck compute-sanitizer --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
    part 40 racecheck compute-sanitizer --tool racecheck --error-exitcode 1 \
        "$PYTHON" benchmarks/sanitize.py
else
    echo "== sanitizer: no compute-sanitizer on this machine, left out"
fi
part 15 report "$PYTHON" benchmarks/report.py "$OUT"
exit "$failed"
