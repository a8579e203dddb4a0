# syntax=docker/dockerfile:1
# mtp_megatron on NVIDIA's PyTorch container, which brings torch, Transformer Engine and NCCL built for its GPUs.
#
#   docker build -t mtp-megatron .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 -it mtp-megatron
#
# --ipc=host: NCCL and the data loader exchange data through shared memory, of which Docker gives 64 MB by default.

ARG PYTORCH_TAG=26.07-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG}

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

# The dependencies alone first: this layer is built again only when pyproject.toml changes. The container's torch is pinned as
# it is: another one would not fit the container's Transformer Engine.
WORKDIR /opt/mtp_megatron
COPY pyproject.toml ./
RUN python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > /tmp/pins.txt \
 && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['report'], sep='\n')" > /tmp/requirements.txt \
 && pip install -c /tmp/pins.txt -r /tmp/requirements.txt \
 && rm /tmp/pins.txt /tmp/requirements.txt

COPY README.md LICENSE ./
COPY mtp_megatron ./mtp_megatron
RUN pip install --no-deps .

COPY examples ./examples

# Not root: the checkpoints written into a mounted folder belong to a user. Its number can be that of the host's user.
ARG USER_ID=10001
RUN useradd --uid ${USER_ID} --create-home --shell /bin/bash mtp \
 && mkdir /workspace/runs \
 && chown mtp /workspace/runs
USER mtp
WORKDIR /workspace/runs

# Versions, devices and fused paths; fails where the package cannot work.
HEALTHCHECK --interval=5m --timeout=2m --start-period=1m --retries=1 CMD ["python", "-m", "mtp_megatron.compat"]

CMD ["mtp-megatron", "--help"]
