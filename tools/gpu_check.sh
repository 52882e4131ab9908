#!/bin/bash
# Runs every check that needs a GPU: it builds, runs the CUDA tests with each algorithm, looks for errors with
# compute-sanitizer, measures and trains. It ends with a table in Markdown.
#   tools/gpu_check.sh                             # runs all parts, one after the other
#   tools/gpu_check.sh --part build --part speed   # runs some of them; each ends within 8 minutes
#   tools/gpu_check.sh --list                      # prints their names
#   tools/gpu_check.sh --quick                     # runs a little of each part
# PYTHON names a Python with torch; by default it is the one of .venv, which `make install` makes. The part "build"
# builds for this GPU only, or for TORCH_CUDA_ARCH_LIST; the others use the birnn_ext that is there. Each check's output
# goes to build/gpu_check/, and figures to build/gpu_check/speed.json. The exit status is 1 if anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."

algorithms=(stepwise persistent-cta persistent-grid persistent-cluster)
parts=(build tests "${algorithms[@]/#/tests-}" sanitizer speed mnist)
limit=480 # seconds of a part; a check may take those that are left

usage() {
  echo "usage: tools/gpu_check.sh [--list] [--quick] [--part NAME]...; parts are ${parts[*]}" >&2
  exit 2
}

quick=0
wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=1 ;;
    --list)
      printf '%s\n' "${parts[@]}"
      exit 0
      ;;
    --part)
      [[ $# -gt 1 && " ${parts[*]} " == *" $2 "* ]] || usage
      wanted+=("$2")
      shift
      ;;
    *) usage ;;
  esac
  shift
done
if [ ${#wanted[@]} = 0 ]; then wanted=("${parts[@]}"); fi

python=${PYTHON:-.venv/bin/python}
logs=build/gpu_check

torch_sees_a_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; }
if ! { nvidia-smi -L 2> /dev/null | grep -q '^GPU'; } && ! torch_sees_a_gpu; then
  echo "gpu_check: there is no GPU here: neither nvidia-smi nor PyTorch finds one." >&2
  exit 1
fi

mkdir -p "$logs"
results=()
failed=0
deadline=0

# check NAME COMMAND...: runs the command, and adds its result to the table.
check() {
  local name=$1 log said status=0 begin=$SECONDS
  shift
  log=$logs/${name//[^a-z0-9]/_}.log
  echo "== $name" >&2
  if [ "$SECONDS" -ge "$deadline" ]; then
    failed=1
    results+=("| $name | **not run**: the part has had its $limit s | 0 |")
    return
  fi
  timeout -k 10 $((deadline - SECONDS)) "$@" > "$log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    said=$(grep -oE '[0-9]+ passed.*|[A-Z]+ SUMMARY: .*|Test Accuracy .*' "$log" | tail -n 1 | tr -d '=' || true)
    results+=("| $name | passed${said:+: $said} | $((SECONDS - begin)) |")
  else
    failed=1
    results+=("| $name | **failed**, status $status: $log | $((SECONDS - begin)) |")
    tail -n 30 "$log" >&2
  fi
}

part_build() {
  local capability
  capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 || true)
  if [ -n "$capability" ]; then export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}; fi
  export MAX_JOBS=${MAX_JOBS:-$(nproc)} BIRNN_CUDA=1
  if [ -n "${PYTHON:-}" ]; then
    check "build" "$python" -m pip install --no-build-isolation -e '.[mnist,test]'
  else
    check "build" make install
  fi
}

# Runs all tests with the algorithm that is chosen. test_cuda_persistent.py also forces each.
part_tests() {
  if [ "$quick" = 1 ]; then
    check "tests, algorithm as chosen" "$python" -m pytest -q -m cuda tests/test_recurrence.py -k "aligned or repeatable"
  else
    check "tests, algorithm as chosen" "$python" -m pytest -q -m cuda
  fi
}

# Runs the tests of a layer's results with one algorithm, or stepwise if the choice prefers it.
part_tests_of() {
  local tests=(tests/test_{recurrence,layer,modules,birnn,variants}.py)
  if [ "$quick" = 1 ]; then tests=(tests/test_recurrence.py -k "aligned or repeatable"); fi
  check "tests, $1" env BIRNN_CUDA_ALGO="$1,stepwise" "$python" -m pytest -q -m 'cuda and not slow' "${tests[@]}"
}

# The tool slows kernels down a hundred times, so these layers are small.
part_sanitizer() {
  local tool algorithm tools=(memcheck racecheck synccheck) small_layers='
import torch, birnn_ext
for dtype in torch.float32, torch.float16, torch.bfloat16:
    for hidden in 20, 128:  # in 16-bit types, rows of 20 are no multiple of 16 bytes, and rows of 128 are
        lstm = birnn_ext.LSTM(8, hidden, batch_first=True, bidirectional=True, device="cuda", dtype=dtype)
        x = torch.randn(18, 5, 8, device="cuda", dtype=dtype, requires_grad=True)
        state = [torch.randn(2, 18, hidden, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
        lengths = torch.arange(18, device="cuda") % 6
        y, (h_n, c_n) = lstm(x, state, lengths=lengths)
        (y.sum() + h_n.sum() + c_n.sum()).backward()
torch.cuda.synchronize()
print({name: calls for name, calls in birnn_ext.op_calls().items() if calls})
'
  if ! command -v compute-sanitizer > /dev/null; then
    echo "gpu_check: compute-sanitizer is not on PATH (it is in the CUDA toolkit's bin): its checks are left out" >&2
    results+=("| compute-sanitizer | left out: not on PATH | |")
    return
  fi
  if [ "$quick" = 1 ]; then tools=(memcheck); fi
  for tool in "${tools[@]}"; do
    for algorithm in "${algorithms[@]}"; do
      # without the allocator's cache each tensor is an allocation, whose bounds the tool checks
      check "$tool, $algorithm" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 BIRNN_CUDA_ALGO="$algorithm,stepwise" \
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -c "$small_layers"
    done
  done
}

part_speed() {
  local quickly=()
  if [ "$quick" = 1 ]; then quickly=(--quick); fi
  rm -f "$logs/speed.json"
  check "speed" "$python" benchmarks/cuda_speed.py --json "$logs/speed.json" "${quickly[@]}"
}

part_mnist() {
  local steps=() compared=()
  if [ "$quick" = 1 ]; then steps=(--max-steps 2 --data-source sample) compared=(--steps 2 --data-source sample); fi
  check "mnist, training" "$python" -m birnn_ext.mnist train --device cuda --out "$logs/mnist" "${steps[@]}"
  check "mnist, beside the tutorial's code" "$python" benchmarks/mnist_end_to_end.py --device cuda "${compared[@]}"
}

for part in "${wanted[@]}"; do
  deadline=$((SECONDS + limit))
  if [ "$part" != build ] && ! torch_sees_a_gpu; then
    "$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>&1 | tail -n 1 >&2 || true
    echo "gpu_check: nvidia-smi finds a GPU, but PyTorch in $python can't use it (the reason is above)." >&2
    exit 1
  fi
  case $part in
    tests-*) part_tests_of "${part#tests-}" ;;
    *) "part_$part" ;;
  esac
done

card=$("$python" -c 'import torch; p = torch.cuda.get_device_properties(0)
print(f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors")' || echo unknown)
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2> /dev/null | head -n 1 || true)
revision=$(git describe --always --dirty 2> /dev/null || echo unknown)
echo
echo "### $card"
echo
echo "Driver ${driver:-unknown}; revision $revision; $(date -u +%F)"
echo
echo "| check | result | s |"
echo "|---|---|---:|"
printf '%s\n' "${results[@]}"
for part in "${wanted[@]}"; do
  for log in "$logs/$part"*.log; do
    if [[ $part == speed || $part == mnist ]] && grep -q "^|" "$log" 2> /dev/null; then
      echo
      grep "^|" "$log"
    fi
  done
done
exit "$failed"
