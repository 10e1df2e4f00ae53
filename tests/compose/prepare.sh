#!/usr/bin/env bash
# What the test of docker-compose.yml needs besides tests/containers/prepare.sh: docker compose, and the images under their own
# names. What is there is used; what can be pulled is pulled; the rest is made here.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=tests/compose
python=.venv/bin/python
base=python:$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-slim
docker=docker
docker buildx version >/dev/null 2>&1 || [ ! -x /usr/bin/docker ] || docker=/usr/bin/docker
there() { docker image inspect "$1" >/dev/null 2>&1 || timeout 120 docker pull -q "$1" 2>/dev/null; }
image_of() { sed -nE "s/^ +image: ($1[:\/].*)/\1/p" docker-compose.yml; }

if ! docker compose version >/dev/null 2>&1; then
    # Debian's docker-compose is the old one. The next release's is a plugin that needs nothing but libc.
    plugins=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins
    work=$(mktemp -d)
    chmod 755 "$work"
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$plugins" "$work"/lists/partial "$work"/cache/archives/partial
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u | head -1)
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$work/sources.list"
    options=(-qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::Lists="$work/lists"
        -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update
    (cd "$work" && apt-get "${options[@]}" download docker-compose >/dev/null)
    dpkg -x "$work"/*.deb "$work/files"
    cp "$work"/files/usr/libexec/docker/cli-plugins/docker-compose "$plugins/"
fi
docker compose version
make -s image-runner DOCKER="$docker" BUILD="--build-arg PIP_NO_INDEX=1 --network none"
there "$(image_of postgres)" ||
    DOCKER_BUILDKIT=1 "$docker" build -q --build-arg BASE="$base" -t "$(image_of postgres)" "$here/postgres"
# The official image of Prefect is Prefect in a Python image; so is that of the runner.
there "$(image_of prefecthq)" || docker tag megatron-flows:runner "$(image_of prefecthq)"
echo "prepare: compose after ${SECONDS} s"
