#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in under 9 minutes, with the active python and nothing installed: build,
# correctness, tuning, benchmarks. Each part has its own time limit and writes its results when it ends, so that a failure or
# a run cut short leaves what came before. With OUT set, every result file is copied there too; with ONLY set to a regular
# expression, such as 'build|nf4', only the parts whose names match run.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch sees no NVIDIA GPU")' || exit 1
RESULTS=$("$PYTHON" -m benchmarks.provenance) || exit 1
mkdir -p "$RESULTS"
# What is tuned here is in force for the benchmarks after it, and belongs to the results.
export PEFT_KERNELS_TUNING=$PWD/$RESULTS/tuning
LOG=$RESULTS/gpu.log
PARTS=$RESULTS/parts.txt
: >"$LOG"
: >"$PARTS"
failed=0

keep() {
  if [ -n "${OUT:-}" ]; then cp "$RESULTS"/*.json "$RESULTS"/*.txt "$RESULTS"/*.log "$RESULTS"/*.md \
    "$RESULTS"/*.png "$PEFT_KERNELS_TUNING"/*.json "$OUT"/ 2>/dev/null; fi
}

# part NAME SECONDS COMMAND...: interrupted at its limit, so that pytest still writes what it has.
part() {
  local name=$1 limit=$2 start=$SECONDS rc
  [[ $name =~ ^(${ONLY:-.*})$ ]] || return 0
  shift 2
  echo "== $name: $*" | tee -a "$LOG"
  timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee -a "$LOG" | tail -n 25
  rc=${PIPESTATUS[0]}
  echo "$name rc=$rc seconds=$((SECONDS - start)) limit=$limit" | tee -a "$PARTS"
  [ "$rc" -eq 0 ] || failed=1
  keep
}

# bench NAME SECONDS FILES EXPRESSION: the rows of benchmarks/bench_FILES.py whose ids match, into a file of their own.
bench() {
  local files=() file
  for file in $3; do files+=("benchmarks/bench_$file.py"); done
  part "$1" "$2" "$PYTHON" -m pytest "${files[@]}" -q -p no:cacheprovider -k "$4" \
    --benchmark-columns=median,iqr,rounds --benchmark-json="$RESULTS/bench_$1.json"
}

tests() {
  part "$1" "$2" "$PYTHON" -m pytest "${@:3}" -q -m gpu -p no:cacheprovider -n 6 --dist loadgroup
}

BLOCKS="dora_linear lora_linear_group lora_swiglu_mlp"

part build 65 "$PYTHON" setup.py build_ext --inplace
part doctor 20 "$PYTHON" -m peft_kernels.cli.main doctor
tests gpu_tests 80 tests/gpu
tests op_tests 55 tests/ops
part compare 34 "$PYTHON" -m peft_kernels.cli.main tune --op lora_linear --extent none --minutes 0.45
part tune 32 "$PYTHON" -m peft_kernels.cli.main tune --op lora_linear --minutes 0.45
bench lora_linear 40 lora_linear 'not compiled and not unsloth and not lorafusion and not reference'
bench blocks 28 "$BLOCKS" 'not compiled and not unsloth and not liger and not reference'
# What decides first: forward of one layer's shapes against bitsandbytes, then training.
bench nf4 36 "nf4_linear nf4_lora_linear" 'not reference and not unsloth'
# The update of decoding by itself first: it has the bars.
bench multi_decode 22 multi_lora_linear 'delta and not reference'
bench multi 18 multi_lora_linear 'not delta and not reference'
# Decoding by compressed weights first, then masks, blocks and chosen weights in training.
bench pruned_decode 18 pruned '(bitmap or csr) and not reference'
bench pruned 28 pruned '(masked or block or chosen) and not reference'
bench sweep 13 sweep 'test_sweep'
bench compiled 15 lora_linear 'compiled and M8192 and r16 and p0-'
bench others 10 "lora_linear $BLOCKS" 'unsloth or lorafusion or liger'
part memory 15 "$PYTHON" -m benchmarks.block_memory --json "$RESULTS/block_memory.json"
part report 10 sh -c '"$0" -m benchmarks.report "$1"/bench_*.json --output "$1/report.md" &&
  "$0" -m benchmarks.charts "$1/bench_sweep.json" --output "$1"' "$PYTHON" "$RESULTS"
cat "$PARTS"
exit $failed
