# A stand-in for NVIDIA's PyTorch image, where that cannot be pulled: what containers/gpu.Dockerfile must keep is in it, at
# versions that only NVIDIA's have, and what it must undo: pins, and a first program that prints licences.
ARG BASE
FROM ${BASE}
RUN --mount=type=bind,source=containers/wheels,target=/wheels \
    pip install -q --no-cache-dir --no-compile --no-index --find-links /wheels torch numpy
RUN cd "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && rm -r torch-*.dist-info numpy-*.dist-info \
    && for each in torch:2.13.0a0+5dd1a1.nv26.5 numpy:2.1.0 flash_attn:2.8.3; do \
        name=${each%:*} version=${each#*:} && mkdir "$name-$version.dist-info" \
        && printf 'Metadata-Version: 2.1\nName: %s\nVersion: %s\n' "$name" "$version" >"$name-$version.dist-info/METADATA"; \
    done
RUN mkdir /etc/pip && echo 'pydantic==1.10.0' >/etc/pip/constraint.txt \
    && printf '#!/bin/sh\necho "== licences =="\nexec "$@"\n' >/opt/entrypoint.sh && chmod +x /opt/entrypoint.sh
# 0: what is installed on it is not compiled, which is most of the time that it takes.
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt PIP_NO_COMPILE=0
ENTRYPOINT ["/opt/entrypoint.sh"]
LABEL megatron-flows.stand-in=yes
