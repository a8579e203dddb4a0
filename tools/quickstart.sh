#!/usr/bin/env bash
# From nothing to a model that decodes several tokens per forward pass: set-up, real input, training on 4 processes
# (tensor x pipeline parallel) with an interruption on purpose, export, speculative decoding, report.
usage() {
  cat <<'TEXT'
usage: bash tools/quickstart.sh [--bytes] [--fast] [--data DIR] [--run DIR] [KEY=VALUE ...]

  --bytes      the text as raw bytes with n=8 heads, instead of 4 heads on a trained tokenizer
  --fast       a tiny model and a small part of the corpus: the same path within two minutes, poor results
  --data DIR   folder of the preprocessed corpus (default: data/quickstart, data/quickstart-bytes)
  --run DIR    folder of the run (default: runs/quickstart, runs/quickstart-bytes)
  KEY=VALUE    recipe settings, as for `mtp-megatron train`, for example train.steps=2000

Running it again continues where it stopped; what is finished is not done again. Delete the folder of the run to start anew.
GPUs are used where there are any: 4 or more train as on the CPU, 2 or 3 with TP2, one alone.

In an environment of your own, set MTP_SETUP=skip. MTP_VENV, MTP_TORCH_INDEX_URL and PYTHON are explained in tools/setup.sh.
TEXT
}
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=/dev/null
source tools/common.sh quickstart

suffix="" fast=0 bytes=0 data="" run="" overrides=()
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --bytes) bytes=1 ;;
    --fast) fast=1 ;;
    --data) data=${2:?--data needs a folder}; shift ;;
    --run) run=${2:?--run needs a folder}; shift ;;
    -*) usage >&2; echo "error: unknown option $1" >&2; exit 2 ;;
    *=*) overrides+=("$1") ;;
    *) usage >&2; echo "error: $1 is neither an option nor KEY=VALUE" >&2; exit 2 ;;
  esac
  shift
done
if ((bytes)); then suffix+=-bytes; fi
if ((fast)); then suffix+=-fast; fi
data=${data:-data/quickstart$suffix}
run=${run:-runs/quickstart$suffix}

started=$SECONDS
step() { printf '\n== %s (%d s since the start)\n' "$*" $((SECONDS - started)); }

step "1/6 set-up"
if [[ "${MTP_SETUP:-}" == skip ]]; then
  echo "MTP_SETUP=skip: the active environment is used as it is"
else
  bash tools/setup.sh
  # shellcheck source=/dev/null
  source "${MTP_VENV:-.venv}/bin/activate"
fi

corpus=(--output "$data") settings=(data.path="$data" run.path="$run") processes=4 prompts=64 new_tokens=64

# Processes, layout and precision by what the machine has: the recipe is for the CPU.
if why=$(cuda_works python); then
  gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
else # a driver too old, say: torch counts devices there too
  gpus=0
  export CUDA_VISIBLE_DEVICES= # where it is not empty, the training asks for them
  if lists_gpu; then say "there are GPUs that torch cannot use, so this runs on the CPU. $why"; fi
fi
if ((gpus == 1)); then
  processes=1
  settings+=(parallel.tensor=1 parallel.pipeline=1 parallel.sequence_parallel=false parallel.layout=null)
elif ((gpus == 2 || gpus == 3)); then
  processes=2
  settings+=(parallel.pipeline=1 parallel.layout=null)
fi
if ((gpus >= 1)); then settings+=(train.precision=bf16); fi

if ((bytes)); then
  corpus+=(--tokenizer bytes)
  settings+=(heads.n=8 model.seq_length=512)
else
  corpus+=(--train-tokenizer "$((fast ? 512 : 1024))")
fi
if ((fast)); then
  corpus+=(--max-documents 40 --valid-fraction 0.2)
  # Two attention heads of 32: vLLM's attention for CPUs has no narrower ones.
  settings+=(model.hidden_size=64 model.num_attention_heads=2 model.seq_length=64
    train.steps=40 train.eval_interval=20 train.save_interval=20 train.log_interval=1 optimizer.warmup_steps=5)
  prompts=8 new_tokens=16
else
  corpus+=(--valid-fraction 0.03)
fi

step "2/6 corpus: the source of Python's standard library"
mtp-megatron preprocess "${corpus[@]}"

train=(mtp-megatron train --nproc "$processes" examples/recipes/quickstart.yaml "${settings[@]}" "${overrides[@]}")

step "3/6 training"
printf '   %s\n' "${train[*]}"
trainer=""
# Bash lets no signal through to a job in the background: hand it on, so that the training saves and ends.
trap 'if [[ -n "$trainer" ]]; then kill -TERM "$trainer" 2>/dev/null; wait "$trainer"; fi; exit 130' INT TERM
if [[ ! -e "$run/checkpoints/latest_checkpointed_iteration.txt" ]]; then
  "${train[@]}" &
  trainer=$!
  if python tools/wait_for_step.py "$run" --fraction 0.4 --pid "$trainer"; then
    echo
    echo "== interrupting the training on purpose (SIGTERM): it saves and ends; then the same command again"
    kill -TERM "$trainer" 2>/dev/null || true
  fi
  wait "$trainer" || true
  trainer=""
fi
"${train[@]}" &
trainer=$!
wait "$trainer"
trainer=""

step "4/6 export: a Hugging Face Llama folder with the further heads as drafts for engines"
if [[ "$run/export" -nt "$run/checkpoints/latest_checkpointed_iteration.txt" ]]; then
  echo "$run/export: up to date"
else
  rm -rf "$run/export"
  mtp-megatron convert "$run" --to bundle --output "$run/export"
fi

step "5/6 self-speculative decoding of held-out prompts"
mtp-megatron generate "$run/export" --prompts-from "$data" --num-prompts "$prompts" --max-new-tokens "$new_tokens" \
  --json "$run/speculative.json"

step "6/6 report"
mtp-megatron report "$run"
printf '\ndone in %d s\n' $((SECONDS - started))
