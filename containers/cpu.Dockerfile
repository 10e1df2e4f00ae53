# The image of stages on machines without GPU:
#
#     make image-cpu, or: docker build -f containers/cpu.Dockerfile -t megatron-flows:cpu .
#
# gpu.Dockerfile is the same on NVIDIA's base; what they install is in install.sh, for both.
ARG BASE=python:3.11-slim
FROM ${BASE}

# PyTorch without CUDA. Empty: from pip's usual index. PIP_NO_INDEX=1: from containers/wheels only.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
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
ENTRYPOINT []
CMD ["python"]
USER 1000:1000
