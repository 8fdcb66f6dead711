# syntax=docker/dockerfile:1.10
# The layers go from what changes least to what changes most: system, packages, weights, code.
# Weights are 12 GB (sdxl), 47 GB (wan21_i2v_480p) or 69 GB (wan22_i2v_svi), the last two 26 and 36 GB in 8 bits; editing
# the worker never fetches them again.
# A release names its base by digest (make release): --build-arg BASE=python:3.11-slim-bookworm@sha256:...
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS base

# gcc and the C headers: Triton builds its launchers at run time. tini: reaps children and passes signals on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev tini ca-certificates \
    && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /worker
# Every package by version and hash, wheels only: no file runs code of its own while it is installed.
COPY builder/requirements.lock builder/requirements.lock
RUN pip install --require-hashes --only-binary :all: -r builder/requirements.lock

FROM base AS weights
# What the bake needs and nothing else: this list decides when the weights are fetched anew. A test bakes with it.
COPY download_weights.py ./
COPY schemas/__init__.py schemas/errors.py schemas/
COPY engine/published engine/published
COPY engine/__init__.py engine/settings.py engine/addresses.py \
     engine/profile.py engine/profiles.py engine/profiles_sdxl.py engine/profiles_wan.py \
     engine/weights.py engine/parts.py engine/published.py engine/tensorfile.py \
     engine/hub.py engine/bake.py engine/convert.py engine/lora.py engine/lora_keys.py \
     engine/eight_bits.py engine/linear8.py engine/importing.py engine/stack.py engine/tokenizer.py \
     engine/
# The lock file, where there is one (the pattern may match nothing): commits and hashes that the bake then holds to.
COPY builder/requirements.txt builder/weights.lock.jso[n] builder/
# Which profiles this image holds; the sum is checked against 70 GB before the first byte is fetched.
ARG PROFILES=sdxl
# bf16, or fp8 or int8: half the weights, rounded once, here.
ARG PRECISION=bf16
# --build-arg BAKE=--require-lock refuses every repository that the lock file does not name.
ARG BAKE=""
# A token for gated repositories: --secret id=HF_TOKEN. It is in no layer and no history.
RUN --mount=type=secret,id=HF_TOKEN,env=HF_TOKEN \
    python download_weights.py --profiles "${PROFILES}" --precision "${PRECISION}" ${BAKE} --output weights/baked

FROM base AS worker
COPY --from=weights /worker/weights weights
COPY . .
# As pip did for the packages: without it Python translates the worker's own files anew at every start.
RUN python -m compileall -q apps engine schemas *.py

# The worker's own kernels, which a first job's card would wait for: 15 s of two cores. Workers read them where they are
# written here, whatever WORKER_CACHE_DIR is.
RUN python builder/compile_kernels.py --output kernels

# Which models transformers has, which each worker would look for in 550 folders.
RUN python builder/list_models.py --output kernels

# What this image holds, by name, version and hash: packages, Debian's, weights.
RUN python builder/write_sbom.py --output sbom.cdx.json

# RunPod mounts /runpod-volume as root: build with --build-arg UID=0 if the worker must write there. Nothing else is
# written: with a read-only root file system these three and /tmp need a tmpfs or a volume that UID may write to;
# /tmp more than 1 GiB of it.
ARG UID=10001
RUN mkdir -p output outbox cache && chown -R "${UID}" output outbox cache
USER ${UID}

# Nothing is fetched at run time; the SDK prints jobs and results at its default level; segments that grow keep a long
# video job from failing for fragmentation with the card nearly full.
# The user has no line in /etc/passwd: LOGNAME is for libraries that ask for a name. Two arenas: with one a thread the
# process's memory wanders by 20 MiB over a thousand jobs. And what is at least 128 KiB goes back to the system when it is
# freed: left to itself glibc raises that bound to the size of frames, and holes in the heap came to 65 MiB in 900 jobs.
ENV HOME=/worker/cache \
    LOGNAME=worker \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    DO_NOT_TRACK=1 \
    RUNPOD_LOG_LEVEL=INFO \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    MALLOC_ARENA_MAX=2 \
    MALLOC_MMAP_THRESHOLD_=131072 \
    WORKER_CACHE_DIR=cache

ENTRYPOINT ["tini", "--", "python", "handler.py"]
