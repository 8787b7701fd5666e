#!/usr/bin/env bash
# Does the package work at both ends of the versions of torch and Ray that pyproject.toml allows? By hand, not in CI:
#
#   tests/versions.sh                                        # the oldest allowed versions, then the newest
#   tests/versions.sh 'torch==2.12.*' 'torch==2.13.* ray==2.60.*'    # one environment per argument
#   tests/versions.sh --list                                 # print the requirements of each environment, and end
#
# Each environment is made anew in a temporary folder: an hour and up to 8 GB in all. On Linux pip takes torch for CUDA;
# PIP_INDEX_URL or PIP_EXTRA_INDEX_URL of an index with CPU builds saves most of it. PYTHON names the Python to use.
# Per environment: installation, some unit tests, and the quickstart with --debug. The table says what passed; logs stay where
# the last line says. The exit code is 1 if anything failed.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
tests=(tests/unit/numerics tests/unit/training/test_fit.py tests/unit/training/test_execution.py tests/unit/engine
  tests/unit/search tests/unit/test_study.py tests/unit/test_study_file.py)

# end oldest|newest NAME: the requirement for one end of the range of a dependency in pyproject.toml
end() {
  "$python" - "$root/pyproject.toml" "$1" "$2" <<'PYTHON'
import re, sys, tomllib
path, end, name = sys.argv[1:]
needs = tomllib.load(open(path, "rb"))["project"]["dependencies"]
ranges = next(found[1] for need in needs if (found := re.fullmatch(rf"{name}(?:\[.*\])?(.*)", need)))
lowest = re.search(r">=\s*([\d.]+)", ranges)[1]
print(f"{name}=={lowest}.*" if end == "oldest" else name + ranges)
PYTHON
}

# try NUMBER "REQUIREMENT ...": make an environment, test it, print its row
try() {
  local place="$folder/$1" needs=() began=$SECONDS installed=failed tested=- ran=- versions=-
  read -ra needs <<<"$2"
  mkdir -p "$place"
  if "$python" -m venv "$place/venv" && "$place/venv/bin/pip" install --editable "${root}[dev]" "${needs[@]}" \
    >"$place/install.log" 2>&1; then
    installed=ok
    versions=$("$place/venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"), version("ray"))')
    tested=ok ran=ok
    (cd "$root" && "$place/venv/bin/python" -m pytest -q -x -m 'not engine' -p no:cacheprovider "${tests[@]}") \
      >"$place/tests.log" 2>&1 || tested=failed
    (cd "$place" && "$place/venv/bin/softseg" run "$root/studies/s001_quickstart.py" --debug) >"$place/study.log" 2>&1 || ran=failed
  fi
  printf '%-32s %-26s %-10s %-10s %-10s %5d s\n' "$2" "$versions" "$installed" "$tested" "$ran" "$((SECONDS - began))"
  rm -rf "$place/venv"
  [[ $installed$tested$ran == okokok ]]
}

environments=("$@")
if ((!$#)) || [[ $1 == --list ]]; then
  environments=("$(end oldest torch) $(end oldest ray)" "$(end newest torch) $(end newest ray)")
fi
if [[ ${1:-} == --list ]]; then
  printf '%s\n' "${environments[@]}"
  exit
fi
folder=$(mktemp -d "${TMPDIR:-/tmp}/versions.XXXXXX")
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1
printf '%-32s %-26s %-10s %-10s %-10s %s\n' requirements 'torch, Ray' installed tests study time
failed=0
for number in "${!environments[@]}"; do
  try "$number" "${environments[$number]}" || failed=1
done
echo "logs: $folder"
exit "$failed"
