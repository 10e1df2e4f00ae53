#!/usr/bin/env bash
# A Docker engine for the tests, on a bare Debian machine where they run as root, with systemd or without:
#
#     engine.sh          install docker.io where it is missing, and start dockerd unless an engine answers
#     engine.sh stop     end the one that was started so
#
# One that answers is left as it is. A second one is never started: in one network it would break the first one's.
set -euo pipefail
state=/var/tmp/megatron-flows-engine
socket=/var/run/docker.sock
pid_file=/var/run/docker.pid
mkdir -p "$state"

answers() { curl -fsS --max-time 5 --unix-socket "$socket" http://engine/_ping >/dev/null 2>&1; }
is_dockerd() { [ -n "$1" ] && [ "$(cat "/proc/$1/comm" 2>/dev/null)" = dockerd ]; }
is_running() { is_dockerd "$1" && ! grep -q '^State:.*Z' "/proc/$1/status"; }
die() { echo "error: engine: $*" >&2; exit 1; }

if [ "${1:-start}" = stop ]; then
    pid=$(cat "$state/pid" 2>/dev/null || true)
    is_running "$pid" || exit 0
    kill "$pid"
    for _ in $(seq 150); do is_running "$pid" || exit 0; sleep 0.2; done # it ends its containers first
    kill -9 "$pid"
    exit 0
fi

# What this script and the tests run.
install() {
    export DEBIAN_FRONTEND=noninteractive
    # The package would start its own engine where there is an init system: ours is started below.
    guard=/usr/sbin/policy-rc.d
    [ -e "$guard" ] || { printf '#!/bin/sh\nexit 101\n' >"$guard"; chmod +x "$guard"; trap 'rm -f "$guard"' EXIT; }
    for try in 1 2 3; do
        apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables debootstrap curl procps \
            >"$state/apt.log" 2>&1 && return
        sleep $((5 * try)) # a mirror that is busy may not be, soon
    done
    tail -20 "$state/apt.log" >&2
    die "apt-get install docker.io failed"
}
may_install() { [ "$(id -u)" = 0 ] || die "only root can install what is missing: sudo $0"; }
for command in curl pgrep; do # needed to see whether an engine answers
    command -v "$command" >/dev/null || { may_install && install; }
done

answers && { echo "engine: one answers at $socket"; exit 0; }
for _ in $(seq 25); do # one may be about to start
    pgrep -x dockerd >/dev/null || break
    answers && exit 0
    sleep 0.2
done
is_running "$(pgrep -x dockerd | head -1 || true)" && die "a dockerd runs and does not answer at $socket"
[ "$(id -u)" = 0 ] || die "no engine answers at $socket, and only root can start one: sudo systemctl start docker"

{ command -v dockerd && command -v debootstrap; } >/dev/null || install

mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
sysctl -qw net.ipv4.ip_forward=1 || true
start() {
    # A pid file of one that was killed keeps the next from starting.
    is_running "$(cat "$pid_file" 2>/dev/null || true)" || rm -f "$pid_file"
    setsid nohup dockerd -H "unix://$socket" --pidfile "$pid_file" >>"$state/dockerd.log" 2>&1 </dev/null &
    echo $! >"$state/pid"
    for _ in $(seq 150); do # until it answers; at first its process has the name of setsid
        answers && return 0
        is_running "$(cat "$state/pid")" || { sleep 0.5; is_running "$(cat "$state/pid")" || return 1; }
        sleep 0.2
    done
    return 1
}
: >"$state/dockerd.log"
if ! start && ! start; then
    if grep -qiE 'iptables|nf_tables' "$state/dockerd.log" && [ -x /usr/sbin/iptables-legacy ]; then
        update-alternatives --set iptables /usr/sbin/iptables-legacy >/dev/null
    fi
    start || { grep -v level=info "$state/dockerd.log" | tail -30 >&2; die "dockerd does not start"; }
fi
echo "engine: started, pid $(cat "$state/pid"), log $state/dockerd.log"
