# docker build -t lora-merge .                                                        CPU
# docker build -t lora-merge:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   NVIDIA GPU
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/data" lora-merge --base base --adapter adapter --out merged

FROM python:3.12-slim-bookworm AS build

# Where torch comes from. PyPI's own wheels for Linux bring CUDA, which is several gigabytes.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# "full" has PEFT and transformers. An empty value leaves them out: enough for a plain LoRA.
ARG EXTRAS=full

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1
RUN python -m venv /opt/lora-merge
ENV PATH=/opt/lora-merge/bin:$PATH

# For the compiled loops.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /source
# Before the sources: this layer is kept when only they change.
COPY constraints.txt ./
RUN pip install --no-deps --index-url "${TORCH_INDEX}" -c constraints.txt torch
COPY pyproject.toml setup.py README.md LICENSE ./
COPY lora_merge lora_merge
# pip is not needed afterwards.
RUN pip install -c constraints.txt ".${EXTRAS:+[${EXTRAS}]}" \
 && pip uninstall --yes pip

FROM python:3.12-slim-bookworm

RUN useradd --uid 1000 --create-home merge \
 && install --directory --mode=1777 /data /cache
COPY --from=build /opt/lora-merge /opt/lora-merge

# A container of any user can write the caches. A GPU is offered to the container by the NVIDIA runtime.
ENV PATH=/opt/lora-merge/bin:$PATH \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 1000
WORKDIR /data
ENTRYPOINT ["lora-merge"]
CMD ["--help"]
