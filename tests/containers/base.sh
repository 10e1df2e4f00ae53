#!/usr/bin/env bash
# Make a base image under its official name where it cannot be pulled: base.sh NAME PYTHON
#
#     tests/containers/base.sh python:3.11-slim .venv/bin/python
#
# Debian 12, and the CPython of PYTHON in /usr/local, where the official image has its own; or Debian's, where PYTHON is that. An
# image of that name that is there, or can be pulled, is taken instead. This machine's certificates and package sources go along,
# so that images built on it can be fed as this machine is.
set -euo pipefail
name=$1
python=$2
docker image inspect "$name" >/dev/null 2>&1 && exit 0
timeout 120 docker pull -q "$name" 2>/dev/null && exit 0

prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# what CPython's modules link to
libraries=libssl3,libffi8,libsqlite3-0,libreadline8,libbz2-1.0,liblzma5,libncursesw6,zlib1g,libcrypt1,libuuid1,libexpat1
libraries=$libraries,libnsl2,libtirpc3
[ "$prefix" != /usr ] || libraries=python3,python3-venv,python3-pip
debs=/var/tmp/megatron-flows-debs
mkdir -p "$debs"
debootstrap --variant=minbase --cache-dir="$debs" --include="ca-certificates,netbase,tzdata,$libraries" bookworm "$root" \
    >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }

if [ "$prefix" = /usr ]; then
    [ -x "$root/usr/bin/python$version" ] || { echo "error: base: Debian 12 has no Python $version, as $python" >&2; exit 1; }
    ln -s "/usr/bin/python$version" "$root/usr/local/bin/python3"
    rm "$root/usr/lib/python$version/EXTERNALLY-MANAGED"
else
    tar -C "$prefix" -c --exclude=__pycache__ --exclude="lib/python$version/test" --exclude="lib/python$version/site-packages" \
        --exclude="lib/python$version/config-*/*.a" --exclude='*/_tkinter*' "bin/python$version" lib include |
        tar -C "$root/usr/local" -x --no-same-owner
    ln -sf "python$version" "$root/usr/local/bin/python3"
    mkdir -p "$root/usr/local/lib/python$version/site-packages"
    chroot "$root" ldconfig
    chroot "$root" env PIP_NO_INDEX=1 /usr/local/bin/python3 -m ensurepip --altinstall >/dev/null 2>&1
    ln -sf "pip$version" "$root/usr/local/bin/pip"
fi
ln -sf python3 "$root/usr/local/bin/python"

cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
rm -f "$root/etc/apt/sources.list"
cp -rL /etc/apt/sources.list /etc/apt/sources.list.d "$root/etc/apt/" 2>/dev/null || true
cp -rL /etc/apt/apt.conf.d "$root/etc/apt/" 2>/dev/null || true
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*

tar -C "$root" -c . | docker import -c 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' \
    -c 'CMD ["python3"]' -m 'local stand-in' - "$name" >/dev/null
echo "base: made a stand-in for $name"
