#!/usr/bin/env bash
# Sets up the environment, checks style and types, runs the tests. Arguments go to pytest:
#   bash tools/test.sh                     everything
#   bash tools/test.sh tests/unit -k loss  some of it
# Skipped tests are listed with their reason; pytest's summary is the last line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash tools/setup.sh
# vLLM, in an environment of its own (2.5 GB, once), when its tests may be among those to run and it has a wheel for this
# machine. Without it they are skipped with the reason; MTP_SERVING=1 asks for it.
if [[ "${MTP_SERVING:-0}" == 1 && "$(uname -sm)" == "Linux x86_64" && ($# == 0 || "$*" == *serving*) ]]; then
  bash tools/setup_serving.sh
fi
# shellcheck source=/dev/null
source .venv/bin/activate

# Worlds of several processes share the cores: one thread each is the fastest and the most reproducible.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== ruff check" && ruff check .
echo "== ruff format" && ruff format --check .
echo "== mypy" && mypy mtp_megatron
echo "== pytest"
exec python -m pytest -rs "$@"
