#!/usr/bin/env bash
# Build, test and measure the CUDA kernels on a machine with a GPU, in at most six minutes and without a network:
#
#     bench/gpu_check.sh [FOLDER]        # folder for logs and results; default: build/gpu
#
# Needs nvcc, a C++20 compiler, and a python3 with torch, numpy, pip, pybind11, scikit-build-core, cmake, ninja, pytest
# and hypothesis. The package is installed into build/gpu-site, in addition to that python3's packages; a second run
# compiles only what has changed. After a failed step the later ones still run; the exit status is the highest of all
# steps. STEPS="build tests" in the environment runs these steps only.
set -uo pipefail
out=$(realpath -m -- "${1:-$(dirname "$0")/../build/gpu}")
cd "$(dirname "$0")/.." || exit

readonly out site=$PWD/build/gpu-site deadline=$((SECONDS + 360))
mkdir -p "$out" "$site" || exit
export PYTHONPATH=$site PYTHONUNBUFFERED=1
summary=()
worst=0

# step NAME SECONDS COMMAND...: run a command with a time limit, and write its output to the terminal and NAME.log.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS status
  shift 2
  [[ " ${STEPS:-$name} " == *" $name "* ]] || return 0
  [ "$limit" -lt "$left" ] || limit=$left
  printf '\n== %s\n' "$name"
  if [ "$limit" -gt 0 ]; then
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 40 "$out/$name.log"
  else
    status=124
  fi
  case $status in
    0) summary+=("ok      $name, $((SECONDS - began)) s") ;;
    124 | 137) summary+=("FAILED  $name: out of time after $((SECONDS - began)) s") ;;
    *) summary+=("FAILED  $name: status $status, $((SECONDS - began)) s") ;;
  esac
  [ "$status" -le "$worst" ] || worst=$status
}

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  rm -rf "$site/onepass"  # so that after a failed build no older one is tested
  # --split-compile=0: nvcc compiles the kernels of one file in parallel.
  CUDAFLAGS="--split-compile=0 ${CUDAFLAGS:-}" python3 -m pip install --disable-pip-version-check --no-index --no-deps \
    --no-build-isolation --upgrade --target "$site" -C build-dir=build/gpu-build -C cmake.define.ONEPASS_CUDA=on \
    -C "cmake.define.ONEPASS_CUDA_ARCH=$arch" .
}
export -f build
export site

# The project's pytest settings need plugins and turn warnings into errors, which fits the versions of development only.
# Other machines have other versions, and installed plugins may interfere, so these settings replace them.
cat >"$site/pytest.ini" <<INI
[pytest]
addopts = -ra --tb=short
pythonpath = $PWD/tests/support $PWD/bench
markers =
    cpu: not on an imitated GPU
    cuda: needs a GPU
    slow: left out by tests/run quick
faulthandler_timeout = 60
INI
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=(python3 -m pytest -c "$site/pytest.ini" --rootdir "$PWD" -p no:cacheprovider -q -m cuda)
cuda_tests=tests/numerics/test_cuda.py
parallel=()
if python3 -c "import xdist" 2>/dev/null; then parallel=(-p xdist -n 12); fi

step build 150 bash -c build
step info 30 python3 -m onepass info
step tests 120 "${pytest[@]}" "${parallel[@]}" "$cuda_tests" tests/bench/test_gpu.py
step bench 150 python3 bench/gpu.py --json "$out/bench.json" --rounds 5 --seconds "${BENCH_SECONDS:-130}"
if command -v compute-sanitizer >/dev/null; then
  # Without torch's caching allocator, which would hide accesses past the end of a tensor. Graphs need the allocator.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitized=("${pytest[@]}" -x "$cuda_tests")
  step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 99 "${sanitized[@]}" \
    -k '(AdamW or ASGD) and not graph and not groups and not layouts and not bit_pattern and not skipped'
  step racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 99 "${sanitized[@]}" \
    -k 'AdamW and (scaler or (test_tail and float32))'
fi

printf '\n'
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit "$worst"
