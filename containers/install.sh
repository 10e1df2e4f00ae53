#!/bin/sh
# What both images do the same way: an environment over the base image's Python, with what stages need.
# Wheels that lie in containers/wheels are taken first; with PIP_NO_INDEX=1 nothing else is, and no network is needed.
set -eu
python3 -m venv --system-site-packages --without-pip /opt/venv # sees the base's packages, replaces none of them
python=/opt/venv/bin/python
work=$(mktemp -d)
$python containers/requirements.py "$work"
set -- --no-cache-dir --find-links containers/wheels --constraint "$work/constraints.txt"
# torch by itself, so that nothing else pulls in another build of it. Where the base has one, this does nothing.
$python -m pip install "$@" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
$python -m pip install "$@" --requirement "$work/requirements.txt"
rm -r "$work"
