# Sourced by run_gpu.sh and run_gpu_end_to_end.sh: the interpreter, $OUT, and `part`.
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=0

"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 1
# The machine may be offline: only what is missing is asked for.
for module in pytest pytest_benchmark hypothesis transformers matplotlib; do
    "$PYTHON" -c "import $module" 2>/dev/null || "$PYTHON" -m pip install -q "${module//_/-}"
done

# part SECONDS NAME COMMAND...: run it for so long at most; its output also goes to gpu_NAME.log.
# An interrupted pytest still writes what it has measured.
part() {
    local limit=$1 name=$2 start=$SECONDS status
    shift 2
    echo "== $name (at most $limit s)"
    timeout --signal=INT --kill-after=5 "$limit" "$@" 2>&1 | tee "$OUT/gpu_$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    [ "$status" -eq 0 ] || failed=1
}
