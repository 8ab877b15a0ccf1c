# Serves a model from a container: `kt run` on port 30000. How it is built and run: doc/deploy.md.
#
#   docker build -t kt-kernel .                                                      # for CPUs
#   docker build -t kt-kernel:cuda --build-arg KIND=cuda --build-arg KT_TORCH_INDEX_URL= .
#
# One image runs on every x86-64 CPU with AVX2: the kernels of all instruction sets are in one binary.
ARG PYTHON=python:3.11-slim-bookworm
ARG KIND=cpu

FROM ${PYTHON} AS build
ARG KIND
# The packages of PyPI's own index have a torch for CUDA, several GB larger. Empty: take torch from there.
ARG KT_TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/kt-kernel
# What is downloaded stays in its layer while only the sources change. install.sh finds compiler and headers missing, and
# installs them.
COPY install.sh ./
COPY third_party third_party
RUN ./install.sh --${KIND} deps
COPY . .
RUN ./install.sh --${KIND} build && .venv/bin/python -m compileall -q kt_kernel && rm -rf build .venv/kt-install/log

FROM ${PYTHON} AS runtime-cpu
RUN apt-get update && apt-get install -y --no-install-recommends libhwloc15 && rm -rf /var/lib/apt/lists/*

# Triton compiles a launcher for each kernel with the system's C compiler; sgl-kernel needs libnuma.
FROM ${PYTHON} AS runtime-cuda
RUN apt-get update && apt-get install -y --no-install-recommends libhwloc15 libnuma1 gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-${KIND}
COPY --from=build /opt/kt-kernel /opt/kt-kernel
# Settings in /etc/kt-kernel, and what can be made again in /cache, for whatever user the container runs as.
ENV PATH=/opt/kt-kernel/.venv/bin:$PATH XDG_CONFIG_HOME=/etc XDG_CACHE_HOME=/cache
# From outside, 127.0.0.1 of the container cannot be reached; `kt run` warns unless the server has a key.
RUN useradd --uid 1000 --create-home kt && mkdir /models && install -d -o kt -g kt /cache \
    && kt config set host 0.0.0.0 && kt config set port 30000 && kt config set model-folders /models && kt version
USER kt
WORKDIR /home/kt
VOLUME ["/models", "/cache"]
EXPOSE 30000
# Loading a large model takes many minutes; /health needs no key.
HEALTHCHECK --start-period=60m --interval=30s --timeout=20s CMD \
    ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/health', timeout=15)"]
ENTRYPOINT ["kt", "run"]
CMD ["demo"]
