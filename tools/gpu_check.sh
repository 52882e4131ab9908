#!/bin/bash
# All that a GPU can tell, in one command: builds, runs the CUDA tests with each algorithm, looks for errors with
# compute-sanitizer, measures, and ends with a table in Markdown.
#   tools/gpu_check.sh              # half an hour; TORCH_CUDA_ARCH_LIST=9.0 builds for that architecture only
#   tools/gpu_check.sh --quick      # one tiny benchmark, and a part of the tests: whether it runs
#   tools/gpu_check.sh --no-build   # takes birnn_ext as it is
# PYTHON names a Python with torch to use; else it is .venv's, made by `make install`. Output of each check goes to
# build/gpu_check/. The exit status is 1 if anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."

build=1
quick=0
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    --no-build) build=0 ;;
    *)
      echo "usage: tools/gpu_check.sh [--quick] [--no-build]" >&2
      exit 2
      ;;
  esac
done
python=${PYTHON:-.venv/bin/python}
logs=build/gpu_check
algorithms=(stepwise persistent-cta persistent-grid persistent-cluster)

torch_sees_a_gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; }
if ! { nvidia-smi -L 2> /dev/null | grep -q '^GPU'; } && ! torch_sees_a_gpu; then
  echo "gpu_check: there is no GPU here: neither nvidia-smi nor PyTorch finds one." >&2
  exit 1
fi

mkdir -p "$logs"
results=()
failed=0

# check NAME COMMAND...: runs it, and notes in the table how it went.
check() {
  local name=$1 log said status=0 begin=$SECONDS
  shift
  log=$logs/${name//[^a-z0-9]/_}.log
  echo "== $name" >&2
  "$@" > "$log" 2>&1 || status=$?
  if [ "$status" = 0 ]; then
    said=$(grep -oE '[0-9]+ passed.*|[A-Z]+ SUMMARY: .*' "$log" | tail -n 1 | tr -d '=' || true)
    results+=("| $name | passed${said:+: $said} | $((SECONDS - begin)) |")
  else
    failed=1
    results+=("| $name | **failed**, status $status: $log | $((SECONDS - begin)) |")
    tail -n 30 "$log" >&2
  fi
}

if [ "$build" = 1 ]; then
  if [ -n "${PYTHON:-}" ]; then
    check "build" env BIRNN_CUDA=1 "$python" -m pip install --no-build-isolation -e '.[test]'
  else
    check "build" env BIRNN_CUDA=1 make install
  fi
fi
if ! torch_sees_a_gpu; then
  "$python" -c 'import torch; torch.zeros(1, device="cuda")' 2>&1 | tail -n 1 >&2 || true
  echo "gpu_check: nvidia-smi finds a GPU, but PyTorch in $python can't use it (the reason is above)." >&2
  exit 1
fi

# ---- tests: of each algorithm and stepwise the better one, as the model says; test_cuda_persistent.py forces each
tests=(tests/test_*.py --ignore tests/test_cuda_persistent.py)
if [ "$quick" = 1 ]; then
  tests=(tests/test_recurrence.py)
else
  check "tests, algorithm as chosen" "$python" -m pytest -q -m cuda
fi
for algorithm in "${algorithms[@]}"; do
  check "tests, $algorithm" env BIRNN_CUDA_ALGO="$algorithm,stepwise" \
    "$python" -m pytest -q -m 'cuda and not slow' "${tests[@]}"
done

# ---- compute-sanitizer, on layers small enough for a tool that slows kernels down a hundred times
small_layers='
import torch, birnn_ext
for dtype in torch.float32, torch.float16, torch.bfloat16:
    for hidden in 20, 128:  # rows that are no multiples of 16 bytes in 16-bit types; rows that are
        lstm = birnn_ext.LSTM(8, hidden, batch_first=True, bidirectional=True, device="cuda", dtype=dtype)
        x = torch.randn(18, 5, 8, device="cuda", dtype=dtype, requires_grad=True)
        state = [torch.randn(2, 18, hidden, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
        lengths = torch.arange(18, device="cuda") % 6
        y, (h_n, c_n) = lstm(x, state, lengths=lengths)
        (y.sum() + h_n.sum() + c_n.sum()).backward()
torch.cuda.synchronize()
print({name: calls for name, calls in birnn_ext.op_calls().items() if calls})
'
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck synccheck; do
    for algorithm in "${algorithms[@]}"; do
      # without the allocator's cache each tensor has its own bounds
      check "$tool, $algorithm" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 BIRNN_CUDA_ALGO="$algorithm,stepwise" \
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -c "$small_layers"
    done
  done
else
  echo "gpu_check: compute-sanitizer is not on PATH (it is in the CUDA toolkit's bin): its checks are left out" >&2
  results+=("| compute-sanitizer | left out: not on PATH | |")
fi

# ---- speed
benchmark=("$python" benchmarks/cuda_speed.py)
if [ "$quick" = 1 ]; then benchmark+=(--quick); fi
check "benchmark" "${benchmark[@]}"

card=$("$python" -c 'import torch; p = torch.cuda.get_device_properties(0)
print(f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors")')
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
if [ -s "$logs/benchmark.log" ]; then
  echo
  grep "^|" "$logs/benchmark.log" || cat "$logs/benchmark.log"
fi
exit "$failed"
