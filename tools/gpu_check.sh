#!/usr/bin/env bash
# Everything of this project that needs a GPU, on a machine with one, in less than ten minutes:
#   bash tools/gpu_check.sh              results in gpu_check/
#   bash tools/gpu_check.sh --dry-run    the same steps, very small and on the CPU too: shows that they run
# Options:
#   --out DIR    folder of the results (default: gpu_check)
#   --dry-run    see above
#   --only A,B   these steps alone
#   --help       this text
# Environment:
#   PYTHON       interpreter with the project's environment (default: that of MTP_VENV or .venv, else python3)
#   WHEELS       folder of wheels: the project's dependencies, Transformer Engine and NVIDIA's Apex (where its wheel is
#                there) are installed from it, without any network, into an environment in the results' folder that sees
#                PYTHON's packages; tools/gpu_wheels.sh makes such a folder
#
# Each step has a time limit of its own, at which it gets Ctrl-C: pytest then shows the failures so far, a tool where it
# was. It writes NAME.txt, and NAME.json where it measures. summary.txt and summary.json say how each step ended. Where
# Transformer Engine cannot be installed, its part is left out by name.
# Exit status: 0 all steps passed, 1 one did not, 2 there is no GPU here.
set -euo pipefail

usage() { sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }

out=gpu_check dry=0 only=
while (($#)); do
  case $1 in
    --out) out=${2:?--out needs a folder}; shift ;;
    --dry-run) dry=1 ;;
    --only) only=${2:?--only needs names of steps}; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source tools/common.sh gpu-check

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=${MTP_VENV:-.venv}/bin/python
  if [[ ! -x $python ]]; then python=python3; fi
fi
python=$(command -v "$python") || { echo "error: PYTHON=${PYTHON:-} is not to be found" >&2; exit 2; }
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# NAME|SECONDS|COMMAND. What is measured goes to $out/NAME.json by the command's own --json.
steps=() known=
step() {
  local name=$1 limit=$2 command
  shift 2
  known+=" $name"
  printf -v command '%q ' "$@" # $out may have spaces
  if [[ -z $only || ",$only," == *",$name,"* ]]; then steps+=("$name|$limit|${command% }"); fi
}
if ((dry)); then
  step kernels 60 -m mtp_megatron.compat
  step tests 120 -m pytest -q --durations 12 -p no:cacheprovider -m gpu tests/gpu
  step fp8_curves 120 tools/gpu_fp8_curves.py --quick --steps 2 --json "$out/fp8_curves.json"
  step bench_memory 120 tools/bench_memory.py --quick --heads 1 2 --json "$out/bench_memory.json"
  step bench_loss 120 tools/bench_loss.py --quick --tp 1 --only mtp_megatron megatron-core --json "$out/bench_loss.json"
  step bench_step 120 tools/bench_step.py --quick --heads 1 2 --layers 3 --json "$out/bench_step.json"
  step last_stage 120 tools/gpu_last_stage.py --quick --heads 1 2 --repeats 1 --json "$out/last_stage.json"
else
  # The limits add up to less than ten minutes, the installation's included, and leave 20 s to what has none. On an H200:
  # install 8 s, kernels 34, tests without Transformer Engine 43, last_stage 61, bench_memory 36; much of it are imports
  # and compilations on a machine that has none cached.
  step kernels 45 -m mtp_megatron.compat --verbose --smoke --require-gpu
  step tests 115 -m pytest -q --durations 12 -p no:cacheprovider -m gpu tests/gpu
  step fp8_curves 70 tools/gpu_fp8_curves.py --json "$out/fp8_curves.json"
  step last_stage 70 tools/gpu_last_stage.py --json "$out/last_stage.json"
  step bench_memory 45 tools/bench_memory.py --dtype bf16 --hidden 1024 --json "$out/bench_memory.json"
  step bench_loss 75 tools/bench_loss.py --dtype bf16 --tp 1 --tokens 16384 --hidden 2048 --json "$out/bench_loss.json"
  step bench_step 65 tools/bench_step.py --dtype bf16 --hidden 1024 --sequence 1024 --vocab 32768 --json "$out/bench_step.json"
fi

for name in ${only//,/ }; do
  [[ " $known " == *" $name "* ]] || { echo "error: --only $only: no step is called $name; there are:$known" >&2; exit 2; }
done

summary=$out/summary.txt results=$out/results.tsv
: >"$summary"
: >"$results"
say() { echo "$*" | tee -a "$summary"; }
ended() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$results"; say "$(printf '%-14s %-34s %4s s  %s' "$1" "$2" "$3" "$4")"; }

finish() { # as JSON too
  "$python" - "$results" "$out/summary.json" <<'PY'
import json, sys
rows = [line.rstrip("\n").split("\t") for line in open(sys.argv[1], encoding="utf-8")]
keys = ("name", "result", "seconds", "command")
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"steps": [dict(zip(keys, row, strict=True)) for row in rows]}, file, indent=2)
PY
  rm -f "$results"
  say "results: $out"
}

gpu='' no_gpu=''
has_gpu() { # asks once: torch's import takes seconds
  if [[ -z $gpu ]]; then
    gpu=0
    no_gpu=$(cuda_works "$python") && gpu=1
  fi
  ((gpu))
}

# Installs into an environment in the results' folder.
install_wheels() {
  local needed=$out/requirements.txt folder misfit
  "$python" -m venv --clear --without-pip --system-site-packages "$out/venv" || return
  # Where PYTHON is of an environment itself, its packages (pip too) are not the system's.
  for folder in "$out"/venv/lib/python*/site-packages; do
    if [[ -d $folder ]]; then "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$folder/base.pth"; fi
  done
  # torch is what the machine has; a container's 2.11.0a0 is below 2.11 to pip, and its constraints are for its own packages.
  misfit=$(torch_misfit "$python") || return
  if [[ -n $misfit ]]; then echo "error: here is $misfit" >&2; return 1; fi
  "$python" - "$out/constraints.txt" >"$needed" <<'PY' || return
import importlib.metadata, re, sys, tomllib
needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print(*(need for need in needs if not re.match(r"torch[^\w-]", need)), sep="\n")
print("pytest>=8.2\npytest-timeout>=2.3")
open(sys.argv[1], "w").write("torch==" + importlib.metadata.version("torch"))
PY
  python=$out/venv/bin/python
  export PIP_CONSTRAINT=
  timeout 25 "$python" -m pip install -q --no-index --find-links "$WHEELS" -c "$out/constraints.txt" -r "$needed"
}

# Its extension for torch names the library for the CUDA that it was built for. One that does not import would end every
# step, as Megatron imports it where it is there: it goes again.
install_transformer_engine() {
  local folder libraries
  timeout 25 "$python" -m pip install -q --no-index --find-links "$WHEELS" --no-build-isolation \
    'transformer-engine[pytorch]' || return
  # It looks for CUDA's libraries in its own environment, and torch's lie in PYTHON's.
  libraries=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null) || libraries=
  for folder in "$out"/venv/lib/python*/site-packages; do
    if [[ -n $libraries && ! -e $folder/nvidia ]]; then ln -s "$libraries" "$folder/nvidia"; fi
  done
  timeout 20 "$python" -c 'import torch, transformer_engine.pytorch' && return
  "$python" -m pip uninstall -q -y transformer-engine transformer-engine-cu12 transformer-engine-cu13 transformer-engine-torch
  return 1
}

# By its file and not by its name, which on PyPI is another package's. One that does not import would end every step.
install_apex() {
  timeout 10 "$python" -m pip install -q --no-index --no-deps "$WHEELS"/apex-*.whl || return
  timeout 15 "$python" -c 'import torch, amp_C, apex.multi_tensor_apply, apex.normalization, apex.optimizers' && return
  "$python" -m pip uninstall -q -y apex
  return 1
}

if [[ -n ${WHEELS:-} ]]; then
  SECONDS=0
  if install_wheels >"$out/install.txt" 2>&1; then
    ended install passed "$SECONDS" "pip install --no-index --find-links $WHEELS"
  else
    ended install "FAILED, see install.txt" "$SECONDS" "pip install --no-index --find-links $WHEELS"
    finish
    exit 1
  fi
fi

if ((!dry)) && ! has_gpu; then
  echo "There is no CUDA device that $python's torch can use: $no_gpu" >&2
  echo "On a machine with one this would run:" >&2
  for line in "${steps[@]}"; do
    IFS='|' read -r name limit command <<<"$line"
    printf '  %-14s at most %3s s  python %s\n' "$name" "$limit" "$command" >&2
  done
  echo "--dry-run runs the same steps here, very small." >&2
  exit 2
fi

if [[ -n ${WHEELS:-} ]] && has_gpu; then
  SECONDS=0
  if install_transformer_engine >"$out/transformer_engine.txt" 2>&1; then
    ended transformer_engine passed "$SECONDS" "installed from $WHEELS"
  else
    ended transformer_engine "left out, see transformer_engine.txt" "$SECONDS" "no working one in $WHEELS"
  fi
  if compgen -G "$WHEELS/apex-*.whl" >/dev/null; then
    SECONDS=0
    if install_apex >"$out/apex.txt" 2>&1; then
      ended apex passed "$SECONDS" "installed from $WHEELS"
    else
      ended apex "left out, see apex.txt" "$SECONDS" "not to be installed from $WHEELS"
    fi
  fi
elif ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformer_engine") is None)'; then
  if has_gpu; then why="it is not installed; WHEELS=DIR installs it from a folder of wheels"; else why="it needs a GPU"; fi
  ended transformer_engine "left out" 0 "$why"
fi

status=0
for line in "${steps[@]}"; do
  IFS='|' read -r name limit command <<<"$line"
  words=()
  eval "words=($command)" # quoted by step
  SECONDS=0 code=0
  timeout --signal INT --kill-after 10 "$limit" "$python" "${words[@]}" >"$out/$name.txt" 2>&1 || code=$?
  case $code in
    0) result=passed ;;
    124 | 137) result="FAILED: longer than $limit s" status=1 ;;
    *) result="FAILED: exit status $code" status=1 ;;
  esac
  if [[ $name == tests && $code == 0 ]]; then result="passed: $(tail -n 1 "$out/$name.txt")"; fi
  ended "$name" "$result" "$SECONDS" "python $command"
done

echo >>"$summary"
for line in "${steps[@]}"; do
  name=${line%%|*}
  { echo "== $name"; cat "$out/$name.txt"; echo; } >>"$summary"
done
finish
exit $status
