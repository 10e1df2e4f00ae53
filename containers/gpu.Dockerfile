# The image of stages on machines with NVIDIA GPUs:
#
#     make image-gpu, or: docker build -f containers/gpu.Dockerfile -t megatron-flows:gpu .
#
# For a build that is the same for ever: --build-arg BASE=nvcr.io/nvidia/pytorch@sha256:…
# The base's PyTorch, flash-attn, NCCL and numpy stay; what is added is in install.sh, for both images.
ARG BASE=nvcr.io/nvidia/pytorch:26.05-py3
FROM ${BASE}

# NVIDIA's own pins, which cover packages that it does not need; install.sh keeps what it does.
ENV PIP_CONSTRAINT=
ARG PIP_NO_INDEX
WORKDIR /opt/megatron-flows
COPY pyproject.toml constraints.txt ./
RUN --mount=type=bind,source=containers,target=/opt/megatron-flows/containers ./containers/install.sh
COPY stages stages
COPY megatron_core_impl megatron_core_impl
COPY flows/__init__.py flows/__init__.py
COPY flows/launch/__init__.py flows/launch/shim.py flows/launch/probe.py flows/launch/
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/megatron-flows PYTHONUNBUFFERED=1
RUN python -m compileall -q stages megatron_core_impl flows
LABEL org.opencontainers.image.title=megatron-flows
# Not the base's, which prints its licences before every stage.
ENTRYPOINT []
CMD ["python"]
USER 1000:1000
