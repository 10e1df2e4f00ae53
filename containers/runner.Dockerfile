# The image of a runner that does its stages on CPUs, as plain processes in its own container (docker-compose.yml):
#
#     make image-runner, or: docker build -f containers/runner.Dockerfile -t megatron-flows:runner .
#
# That of stages, with Prefect. On machines with GPUs the runner is not in a container: it starts containers.
ARG BASE=megatron-flows:cpu
FROM ${BASE}

ARG PIP_NO_INDEX
USER root
RUN --mount=type=bind,source=containers,target=/opt/megatron-flows/containers \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['flows'], sep='\n')" \
        > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --find-links containers/wheels -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt
COPY flows flows
COPY configs configs
RUN python -m compileall -q flows && install -d -o 1000 -g 1000 /workspace
# Relative paths of configurations, such as workspace/demo, start in /.
WORKDIR /
ENV HOME=/tmp PREFECT_HOME=/tmp/prefect
CMD ["python", "-m", "flows.cli", "serve"]
USER 1000:1000
