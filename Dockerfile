# syntax=docker/dockerfile:1
# mtp_megatron on NVIDIA's PyTorch container, which brings torch, Transformer Engine and NCCL built for its GPUs.
#
#   docker build -t mtp-megatron .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -it mtp-megatron
#   docker build -t mtp-megatron-serving --target serving .          (the same with vLLM, in an environment of its own)
#
# --ipc=host: NCCL and the data loader exchange data through shared memory, of which Docker gives 64 MB by default.
#
# Build arguments:
#   PYTORCH_TAG          tag of nvcr.io/nvidia/pytorch; its torch must be a 2.11 to 2.13, as NVIDIA names it (2.12.0a0+...) or not
#   MEGATRON_COMMIT      tag or commit of Megatron-LM, 0.16.1 to 0.19.x; its source lies in /opt/Megatron-LM
#   MEGATRON_REPOSITORY  where that is fetched from
#   VLLM_VERSION         of the target "serving"; within the extra "serving" of pyproject.toml
#   USER_ID              number of the user that runs everything; choose that of the mounted folders' owner
#
# Nobody has built this yet: there was no container engine where it was written. tests/unit/test_dockerfile.py runs its
# commands one by one, without:
#   not run: FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}
#   not run: pip install --no-deps /opt/Megatron-LM
#   not run: pip install -c /tmp/pins.txt -r /tmp/requirements.txt
#   not run: pip install "virtualenv>=20.26,<22"
#   not run: virtualenv --python "$(command -v python)" /opt/serving
#   not run: /opt/serving/bin/pip install "vllm==${VLLM_VERSION}"
#   not run: /opt/serving/bin/pip install --no-deps /opt/mtp_megatron
#   not run: HEALTHCHECK (its command runs in tests/unit/test_smoke.py)

ARG PYTORCH_TAG=26.07-py3

# --- what changes seldom: Megatron, then the plugin's dependencies ---
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG} AS base
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# Its git folder stays: tools that patch Megatron-LM look at the version and at what has been changed. The container's
# PIP_CONSTRAINT would hold for what builds it too, where an older setuptools cannot; with --no-deps nothing is replaced.
ARG MEGATRON_REPOSITORY=https://github.com/NVIDIA/Megatron-LM.git
ARG MEGATRON_COMMIT=core_v0.19.0
RUN git init --quiet /opt/Megatron-LM \
 && git -C /opt/Megatron-LM fetch --quiet --depth 1 "${MEGATRON_REPOSITORY}" "${MEGATRON_COMMIT}" \
 && git -C /opt/Megatron-LM checkout --quiet FETCH_HEAD \
 && git config --system --add safe.directory /opt/Megatron-LM \
 && PIP_CONSTRAINT="" pip install --no-deps /opt/Megatron-LM

# Built again only when pyproject.toml changes. torch and megatron-core are there already: the container's torch is the only one
# that fits its Transformer Engine, and by its name (2.11.0a0+...) it may not satisfy torch>=2.11.
WORKDIR /opt/mtp_megatron
COPY pyproject.toml ./
RUN python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /tmp/pins.txt \
 && python -c "import re, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*(d for d in [*p['dependencies'], *(n for e in ('hf', 'parquet', 'report', 'zst') for n in p['optional-dependencies'][e])] if not re.match('(torch|megatron-core)[^a-z-]', d)), sep='\n')" > /tmp/requirements.txt \
 && pip install -c /tmp/pins.txt -r /tmp/requirements.txt \
 && rm /tmp/pins.txt /tmp/requirements.txt

# --- the extra "serving": vLLM, with the torch that it was built for; the container's PIP_CONSTRAINT asks for the container's ---
FROM base AS vllm
ARG VLLM_VERSION=0.32.0
RUN PIP_CONSTRAINT="" pip install "virtualenv>=20.26,<22" \
 && virtualenv --python "$(command -v python)" /opt/serving \
 && PIP_CONSTRAINT="" /opt/serving/bin/pip install "vllm==${VLLM_VERSION}"

# --- the plugin ---
FROM base AS plugin
COPY README.md LICENSE ./
COPY mtp_megatron ./mtp_megatron
RUN PIP_CONSTRAINT="" pip install --no-deps .

COPY examples ./examples

# Not root: the checkpoints written into a mounted folder belong to a user. Where the base has one of that number (Ubuntu's is
# 1000, as the first user of most hosts), useradd would refuse to make another.
ARG USER_ID=10001
RUN { getent passwd "${USER_ID}" > /dev/null || useradd --uid "${USER_ID}" --create-home --shell /bin/bash mtp; } \
 && mkdir -p /workspace/runs \
 && chown "${USER_ID}" /workspace/runs
USER ${USER_ID}
WORKDIR /workspace/runs

# Versions, devices and fused paths, then one training step of a very small model on the first GPU (under 1 GB of it, for some
# seconds); fails where the package cannot work, or has no GPU.
HEALTHCHECK --interval=30m --timeout=5m --start-period=5m --retries=2 CMD ["python", "-m", "mtp_megatron.compat", "--smoke", "--require-gpu"]

CMD ["mtp-megatron", "--help"]

# --- docker build --target serving: `mtp-megatron serve` and `verify` find vLLM here ---
FROM plugin AS serving
ARG USER_ID=10001
COPY --from=vllm /opt/serving /opt/serving
USER 0
RUN PIP_CONSTRAINT="" /opt/serving/bin/pip install --no-deps /opt/mtp_megatron
USER ${USER_ID}
ENV MTP_VLLM_PYTHON=/opt/serving/bin/python
CMD ["mtp-megatron", "serve", "--help"]

# --- the default: training ---
FROM plugin AS train
