# shellcheck shell=bash
# What the scripts of this folder share. `source tools/common.sh NAME`: the name stands before their messages.

script=$1
say() { printf '[%s] %s\n' "$script" "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

# retry COMMAND...: up to three times, for a network that fails now and then. Versions that do not go together never will.
retry() {
  local attempt said
  said=$(mktemp)
  for attempt in 1 2 3; do
    if { "$@" 2>&1 >&3 | tee "$said" >&2; } 3>&1; then rm -f "$said"; return; fi
    if grep -qE 'ResolutionImpossible|\(from versions: [^n)]' "$said"; then
      rm -f "$said"
      # Quiet, it keeps the reasons to itself.
      "${@/#-qq/--no-color}" 2>&1 | sed -n '/The conflict is caused by/,$p' >&2 || true
      die "there are no versions that go together${PIP_CONSTRAINT:+ (PIP_CONSTRAINT=$PIP_CONSTRAINT has a say in it)}: $*"
    fi
    if ((attempt < 3)); then say "attempt $attempt failed; again in $((attempt * 5)) s"; sleep $((attempt * 5)); fi
  done
  rm -f "$said"
  die "failed three times: $*"
}

lists_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; }

# cuda_works PYTHON: whether its torch can use a GPU; where not, says why.
cuda_works() {
  "$1" -W ignore -c '
import sys, torch
if torch.cuda.is_available():
    sys.exit()
print("torch", torch.__version__, f"(CUDA {torch.version.cuda}):" if torch.version.cuda else "(without CUDA):", end=" ")
try:
    torch.cuda.init()
except Exception as error:
    print(error)
else:
    print("torch.cuda.is_available() is False")
sys.exit(1)' 2>&1
}

# torch_misfit PYTHON: names a torch that is outside pyproject.toml's range, and the range. By the number of the release, as
# vendors build from the state before it: to pip 2.11.0a0 is below 2.11. Says nothing where the torch fits.
torch_misfit() {
  "$1" - <<'PY'
import importlib.metadata, re, tomllib

needs = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
wanted = next(need for need in needs if re.match(r"torch[^\w-]", need))
found = importlib.metadata.version("torch")
number = lambda text: [int(part) for part in re.match(r"[\d.]*\d", text)[0].split(".")]
low, high = (number(re.search(sign + r"([\d.]+)", wanted)[1]) for sign in (">=", "<(?!=)"))
if not low <= number(found) < high:
    print(f"torch {found}, and this project needs {wanted}")
PY
}

# The first of the given interpreters (default: python3.12 on PATH, then pyenv's) that really runs as Python 3.12 and can
# make environments: a shim of pyenv may exist and refuse. Nothing where none does.
find_py312() {
  local candidate
  while read -r candidate; do
    if [[ "$("$candidate" -c 'import ensurepip, sys, venv; print(*sys.version_info[:2])' 2>/dev/null)" == "3 12" ]]; then
      echo "$candidate"
      return
    fi
  done < <(
    if (($#)); then
      printf '%s\n' "$@"
    else
      type -aP python3.12
      printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python
    fi
  )
}
