#!/usr/bin/env bash
# Sets up the environment, checks style and types, runs the tests. Arguments go to pytest:
#   bash tools/test.sh                     everything, on every lane that this machine has
#   bash tools/test.sh tests/unit -k loss  some of it, on the main lane
# Skipped tests are listed with their reason; pytest's summary is the last line.
#
# Lanes:
#   main   all tests, in .venv (or MTP_VENV): Python 3.11 and the oldest supported megatron-core, or what tools/setup.sh picks
#   py312  the tests that touch megatron-core, in .venv-py312: Python 3.12 and the newest supported megatron-core
# MTP_LANES=main leaves the second one out; MTP_LANES=py312 runs it alone, with pytest's arguments if there are any.
# Without arguments, tools/run_groups.py runs the tests of all lanes in groups, some of them at a time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=/dev/null
source tools/common.sh test
main=${MTP_VENV:-.venv} second=.venv-py312
if (($#)); then default_lanes=main; else default_lanes="py312 main"; fi
lanes=" ${MTP_LANES:-$default_lanes} "
[[ "$lanes" =~ ^\ +((main|py312)\ +)+$ ]] || { echo "error: MTP_LANES='${MTP_LANES}' may name main and py312" >&2; exit 2; }

if [[ "$lanes" == *" main "* ]]; then
  bash tools/setup.sh
fi
if [[ "$lanes" == *" py312 "* ]]; then
  python312=$(find_py312)
  if [[ "$lanes" == *" main "* && "$("$main/bin/python" -c 'import sys; print(*sys.version_info[:2])')" == "3 12" ]]; then
    echo "== lane py312: left out, the main lane has Python 3.12 already"
    lanes=" main "
  elif [[ -n "$python312" ]]; then
    MTP_DEEPSPEED=0 MTP_TRITON=0 MTP_VENV=$second PYTHON=$python312 bash tools/setup.sh
  elif [[ "$lanes" == *" main "* ]]; then
    echo "== lane py312: left out, no Python 3.12 found on PATH or in ${PYENV_ROOT:-$HOME/.pyenv}/versions"
    lanes=" main "
  else
    echo "error: MTP_LANES=py312, but no Python 3.12 found on PATH or in ${PYENV_ROOT:-$HOME/.pyenv}/versions" >&2
    exit 2
  fi
fi
# vLLM, in an environment of its own (2.5 GB, once), when its tests may be among those to run and it has a wheel for this
# machine. Without it they are skipped with the reason; MTP_SERVING=0 does without.
if [[ "${MTP_SERVING:-1}" == 1 && "$(uname -sm)" == "Linux x86_64" && ($# == 0 || "$*" == *serving*) ]]; then
  bash tools/setup_serving.sh
fi

# Worlds of several processes share the cores: one thread each is the fastest and the most reproducible.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# in_lane ENVIRONMENT COMMAND...: run it with that environment activated, and no other.
in_lane() (
  # shellcheck source=/dev/null
  source "$1/bin/activate"
  shift
  exec "$@"
)

if [[ "$lanes" == *" main "* ]]; then
  echo "== ruff check" && in_lane "$main" ruff check --extend-exclude "$main" .
  echo "== ruff format" && in_lane "$main" ruff format --extend-exclude "$main" --check .
  echo "== mypy" && in_lane "$main" mypy mtp_megatron
fi

if (($#)) && [[ "$lanes" =~ ^\ +[a-z0-9]+\ +$ ]]; then
  if [[ "$lanes" == *" main "* ]]; then only=$main; else only=$second; fi
  echo "== pytest ($only)"
  in_lane "$only" python -m pytest -rs "$@"
  exit
fi
environments=()
if [[ "$lanes" == *" main "* ]]; then environments+=("main=$main"); fi
if [[ "$lanes" == *" py312 "* ]]; then environments+=("py312=$second"); fi
exec "${environments[0]#*=}/bin/python" tools/run_groups.py "${environments[@]}" -- "$@"
