#!/usr/bin/env bash
# All that `make test-containers` needs, on a machine that may have none of it and may reach no registry of images: an engine, a
# base image, wheels, and the images of the stages. What is there from an earlier time is used again.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/containers
python=.venv/bin/python
make -s .venv/.installed
base=python:$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-slim
took() { echo "prepare: $1 after ${SECONDS} s"; }

"$here/engine.sh"
took engine
# wheels: of the exact versions, from where this machine's own environment is from; the build then needs no network
make -s wheels TORCH_INDEX= & wheels=$!
"$here/base.sh" "$base" "$python"
took "base image"
wait "$wheels"
took wheels
# A docker command without BuildKit's plugin cannot build; Debian's own brings the builder with its engine.
docker=docker
docker buildx version >/dev/null 2>&1 || [ ! -x /usr/bin/docker ] || docker=/usr/bin/docker
make -s image-cpu DOCKER="$docker" BUILD="--build-arg PIP_NO_INDEX=1 --network none"
took image
# The image for GPUs, on a stand-in for NVIDIA's. Where that is there, or a GPU, the real one is wanted: make image-gpu.
nvidia=$(sed -n 's/^ARG BASE=//p' containers/gpu.Dockerfile)
is_stand_in=$(docker image inspect -f '{{index .Config.Labels "megatron-flows.stand-in"}}' "$nvidia" 2>/dev/null || echo yes)
if [ "$is_stand_in" = yes ] && [ ! -e /dev/nvidiactl ]; then
    DOCKER_BUILDKIT=1 "$docker" build -q --network none --build-arg BASE="$base" -f "$here/gpu_base.Dockerfile" -t "$nvidia" .
    make -s image-gpu DOCKER="$docker" BUILD="--build-arg PIP_NO_INDEX=1 --network none"
    took "image for GPUs"
fi
