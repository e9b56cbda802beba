#!/usr/bin/env bash
# One suite on a machine with an NVIDIA GPU: builds the extensions, runs its tests, then its measurements.
#
#   bench/gpu.sh kernels|step|quality OUT
#
# OUT gets environment.txt, build.log, tests.log, bench.log and the rows, each written when it is measured; of kernels,
# if there is time, a profile and its trace.json; of step a trace.json, and besides whole steps of 1B, 8B and 30B models
# a 30B run through `zo train` (train.log) and the host memory of loading 1B from disk (loading.log).  `quality` takes
# several calls: the first one pretrains a base, those after it learn and deploy on it, each going on where the last one
# ended.  Ends within 9 minutes, whatever hangs.  Needs no package index and no network.  Exit status: 0, 1 when a part
# failed, 2 when it could not begin.
#   ZO_DATA     folder of models and data sets       (default: ../shared)
#   ZO_BASE     the base model of `quality`          (default: runs/base)
#   ZO_COMMIT   `git describe --always --dirty` of the origin, where this is a copy and no checkout
#   PYTHON      the interpreter that has torch       (default: python3)
set -uo pipefail

readonly LIMIT=535 BUILD_LIMIT=150 TEST_LIMIT=240 # seconds; what is left when the tests end is for the measurements
readonly LOADING=40                               # of them, to write a checkpoint of 2.5 GB and load it twice

stop() {
  echo "gpu.sh: $1" >&2
  exit 2
}

[ $# -eq 2 ] || stop "usage: bench/gpu.sh kernels|step|quality OUT"
suite=$1
mkdir -p "$2" 2>/dev/null || stop "cannot make the folder $2"
out=$(cd "$2" && pwd) || stop "cannot enter the folder $2"
python=$(command -v "${PYTHON:-python3}") || stop "there is no ${PYTHON:-python3}"
python=$(realpath -s "$python")
data=$(cd "${ZO_DATA:-$(dirname "$0")/../../shared}" 2>/dev/null && pwd) || data=
cd "$(dirname "$0")/.." || stop "cannot enter the repository"
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[ -z "$data" ] || export ZO_DATA="$data"

# Tests of a suite, of which those run that name a GPU, and options of its case.
shopt -s nullglob
case $suite in
  kernels)
    tests=(tests/test_triton*.py tests/test_cuda_stats*.py tests/test_block_stats*.py tests/test_fused*.py
      tests/test_ops.py tests/test_gpu*.py tests/test_bench_gpu.py)
    options=()
    ;;
  step | quality)
    tests=(tests/test_engine*.py tests/test_probing.py tests/test_loading.py tests/test_bench_step.py
      tests/test_"$suite"*.py)
    [ -n "$data" ] || stop "no folder of models and data: set ZO_DATA"
    options=(--shared "$data")
    ;;
  *) stop "there is no suite '$suite'; there are: kernels, step, quality" ;;
esac
cases=$("$python" -m bench --list) || stop "$python cannot import bench"
grep -qx "$suite" <<<"$cases" || stop "the bench case '$suite' is not there"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || stop "torch sees no CUDA device"

SECONDS=0
failed=()

# part NAME SECONDS LOG COMMAND...: runs it, its output to OUT/LOG, and notes its name if it fails or takes too long.
part() {
  local name=$1 limit=$2 log=$3 began=$SECONDS status
  shift 3
  timeout --kill-after=5 "$limit" "$@" >>"$out/$log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed+=("$name")
  [ $status -ne 124 ] || echo "stopped after $limit s" >>"$out/$log"
  echo "gpu.sh: $name: $([ $status -eq 0 ] && echo ok || echo "exit status $status"), $((SECONDS - began)) s"
}

build() {
  cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DZO_OUTPUT_DIR="$PWD/zo_kernels" && cmake --build build/native
}

: >"$out/build.log"
: >"$out/tests.log"
: >"$out/bench.log"
rm -f "$out"/{profile,train,loading}.log
{
  date -u
  nvidia-smi
  nvcc --version
  "$python" -c 'import sys, torch; print("python", sys.version, "torch", torch.__version__, torch.version.cuda)'
  "$python" -c 'import triton; print("triton", triton.__version__)'
} >"$out/environment.txt" 2>&1

export -f build
export python
part build $BUILD_LIMIT build.log bash -c build

# Many processes: compiling takes the tests' time, on the host.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
part tests $TEST_LIMIT tests.log "$python" -m pytest -q -p no:cacheprovider -k "cuda or gpu" --maxfail=20 \
  ${workers[@]+"${workers[@]}"} ${tests[@]+"${tests[@]}"}
tail -n 1 "$out/tests.log"

left=$((LIMIT - SECONDS))
base=${ZO_BASE:-runs/base}
case $suite in
  kernels) options+=(--budget $((left - 30))) ;;
  step)
    # Two fifths of the time are for zo train and for loading; a case begun at the end of its budget may take 30 s more.
    left=$((left * 3 / 5))
    options+=(--model-like llama-1b llama-8b opt-30b --tokens 4096 --trace "$out/trace.json" --budget $((left - 30)))
    ;;
  quality)
    if [ -f "$base/pretrain.json" ]; then # the last job to begin has two minutes
      options+=(--model "$base" --workers 4 --budget "$((left > 150 ? (left - 120) / 60 : 1))")
    else # two minutes for reading, tokenizing and compiling
      minutes=$(((left - 120) / 60))
      options=(--pretrain "$data/corpus" --out-model "$base" --minutes $((minutes < 1 ? 1 : minutes > 5 ? 5 : minutes)))
    fi
    ;;
esac
part bench $left bench.log "$python" -m bench "$suite" --device cuda --out "$out" ${options[@]+"${options[@]}"}
tail -n 25 "$out/bench.log"
left=$((LIMIT - SECONDS))
if [ "$suite" = kernels ] && [ $left -gt 30 ]; then
  part profile $left profile.log "$python" -m bench.profile --model-like llama-1b --device cuda --out "$out"
fi
if [ "$suite" = step ]; then
  more=(--device cuda --out "$out" --shared "$data")
  left=$((LIMIT - SECONDS - LOADING))
  [ $left -lt 10 ] || part train $left train.log "$python" -m bench train "${more[@]}" --budget $((left / 2))
  left=$((LIMIT - SECONDS))
  [ $left -lt 10 ] || part loading $left loading.log "$python" -m bench loading "${more[@]}"
  tail -n 2 "$out/loading.log"
fi

rows=$(cat "$out"/*.jsonl 2>/dev/null | wc -l)
echo "gpu.sh: $suite: $rows rows in $out, $SECONDS s; ${failed[*]:+failed: }${failed[*]:-all parts ok}"
[ ${#failed[@]} -eq 0 ]
