#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under 9 minutes, with the active python and nothing installed: build,
# correctness, benchmarks. Each part has its own time limit and writes its results when it ends, so that a failure or
# a run cut short leaves what came before. With OUT set, every result file is copied there too.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no NVIDIA GPU")' || exit 1
RESULTS=$("$PYTHON" -m benchmarks.provenance) || exit 1
mkdir -p "$RESULTS"
LOG=$RESULTS/gpu.log
PARTS=$RESULTS/parts.txt
: >"$LOG"
: >"$PARTS"
failed=0

keep() {
  if [ -n "${OUT:-}" ]; then cp "$RESULTS"/*.json "$RESULTS"/*.txt "$RESULTS"/*.log "$RESULTS"/*.md "$OUT"/ 2>/dev/null; fi
}

# part NAME SECONDS COMMAND...: interrupted at its limit, so that pytest still writes what it has.
part() {
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  echo "== $name: $*" | tee -a "$LOG"
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee -a "$LOG" | tail -n 25
  rc=${PIPESTATUS[0]}
  echo "$name rc=$rc seconds=$((SECONDS - start)) limit=$limit" | tee -a "$PARTS"
  [ "$rc" -eq 0 ] || failed=1
  keep
}

# bench NAME SECONDS EXPRESSION: the peers whose test ids match, into a file of their own.
bench() {
  part "$1" "$2" "$PYTHON" -m pytest benchmarks/bench_lora_linear.py -q -p no:cacheprovider -k "$3" \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$RESULTS/bench_lora_linear_$1.json"
}

tests() {
  part "$1" "$2" "$PYTHON" -m pytest "${@:3}" -q -m gpu -p no:cacheprovider -n 6 --dist loadgroup
}

part build 80 "$PYTHON" setup.py build_ext --inplace
part doctor 30 "$PYTHON" -m peft_kernels.cli.main doctor
tests gpu_tests 95 tests/gpu
tests op_tests 80 tests/ops
bench libraries 130 'not compiled and not unsloth and not lorafusion'
bench compiled 60 'compiled and r16'
bench others 25 'unsloth or lorafusion'
part report 20 "$PYTHON" -m benchmarks.report "$RESULTS"/bench_*.json --output "$RESULTS/report.md"
cat "$PARTS"
exit $failed
