#!/usr/bin/env bash
# What proves most about training on a GPU in eight minutes. Run it in a copy of the tree, on a machine with an NVIDIA GPU:
#
#   tests/gpu/first_minutes.sh [--wheels FOLDER] [--seconds N] [--dry-run]
#
# --wheels FOLDER   use the packages in FOLDER/*.whl, for a machine without network. Where torch, numpy, scipy, pyarrow and
#                   pytest are installed, these are enough (with the Python version of that machine):
#                     pip download --only-binary=:all: --python-version 3.12 --dest FOLDER pydantic
#                     pip download --no-deps --only-binary=:all: --python-version 3.12 --dest FOLDER monai nibabel
# --seconds N       the time for all parts together (default: 480). A part gets its own limit, or what is left of this.
# --dry-run         run the same parts without a GPU: GPU tests are skipped, the benchmark and the whole fit run at tiny sizes
#
# PYTHON names the Python to use (default: python3). Results are printed at once; results.txt (one line per part), log.txt
# (everything that the parts print) and the figures of the benchmarks go to the folder OUT (default: a new folder).
# Exit codes: 0 all parts passed; 1 a part failed or ran out of time; 2 no CUDA device, or a mistake in the arguments.
set -uo pipefail

usage() { echo "usage: first_minutes.sh [--wheels FOLDER] [--seconds N] [--dry-run]" >&2; exit 2; }

wheels='' seconds=480 dry=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:-}; [[ -d $wheels ]] || { echo "--wheels: no such folder: '$wheels'" >&2; exit 2; }; shift 2 ;;
    --seconds) seconds=${2:-}; [[ $seconds =~ ^[1-9][0-9]*$ ]] || usage; shift 2 ;;
    --dry-run) dry=(--dry-run); shift ;;
    *) usage ;;
  esac
done
python=$(command -v "${PYTHON:-python3}") || { echo "no such program: ${PYTHON:-python3}" >&2; exit 2; }
[[ $python == /* ]] || python=$PWD/$python
[[ -z $wheels ]] || wheels=$(cd "$wheels" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=${OUT:-$(mktemp -d "${TMPDIR:-/tmp}/first_minutes.XXXXXX")}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
: >"$out/log.txt" && : >"$out/results.txt" || exit 2
cd "$root" || exit 2

if [[ -n $wheels ]]; then
  for wheel in "$wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$scratch/packages" || { echo "not a wheel: $wheel" >&2; exit 2; }
  done
fi
export PYTHONPATH="$scratch/packages:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

failed=0
end=$((SECONDS + seconds))

# part NAME SECONDS COMMAND...: run a command for so long at most; print its result and the last lines of what it prints
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) began=$SECONDS log="$scratch/log" status verdict shown=3
  shift 2
  if ((left <= 0)); then
    failed=1
    printf '%-22s not run: no time is left\n' "$name" | tee -a "$out/results.txt"
    return 1
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict='timed out' shown=12 failed=1 ;;
    *) verdict=failed shown=12 failed=1 ;;
  esac
  { printf '\n==== %s: %s\n' "$name" "$*"; cat "$log"; } >>"$out/log.txt"
  {
    printf '%-22s %-9s %4d s\n' "$name" "$verdict" "$((SECONDS - began))"
    grep -Ev '^[.s ]*(\[100%\])?$' "$log" | tail -n "$shown" | sed 's/^/    /'
  } | tee -a "$out/results.txt"
  return "$status"
}

pytest() { # NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m pytest -m gpu -rfE -s --disable-warnings -p no:cacheprovider "$@"
}

bench() { # NAME SECONDS
  part "bench_gpu.py $1" "$2" "$python" tests/benchmarks/bench_gpu.py --short "$1"
  find tests/benchmarks/out -name "gpu_$1-short.json" -newer "$scratch/started" -exec cp {} "$out" \; 2>/dev/null
}

: >"$scratch/started"
part versions 60 "$python" tests/gpu/machine.py "${dry[@]}"
case $? in
  0) ;;
  2) exit 2 ;;
  *) exit 1 ;; # nothing else can run
esac
pytest 'many fits' 90 tests/gpu/test_many_fits_on_gpu.py
pytest 'engine' 120 -k 'not memory' tests/gpu/test_engine_on_gpu.py
pytest 'memory of steps' 45 -k memory tests/gpu/test_engine_on_gpu.py
pytest 'memory of fits' 45 -k memory tests/gpu/test_fit_on_gpu.py
pytest 'fits and threads' 90 -k 'not memory' tests/gpu/test_fit_on_gpu.py tests/gpu/test_threads_on_gpu.py
part 'whole fit' 60 "$python" tests/gpu/whole_fit.py
bench unet32 100
bench unet3d 120

if ((failed)); then echo "not all parts passed; results: $out"; else echo "all parts passed; results: $out"; fi
exit "$failed"
