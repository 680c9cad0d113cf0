#!/bin/sh
# A Docker engine of our own, for machines (CI's among them) where none runs.
#
#   deploy/docker/engine.sh start    answers once an engine does; installs Debian's packages when it must and may
#   deploy/docker/engine.sh stop     ends the engine that `start` started, and no other
#   deploy/docker/engine.sh env      prints the variable to `eval`, so that clients find it; 75 when none answers
#   deploy/docker/engine.sh status   exit status 0 when an engine answers
#
# An engine that answers already (DOCKER_HOST or the default socket) is used as it is and never stopped.
# Ours has its own socket, pid file and data, so that it meets no other engine; the data stay
# between runs, which makes the next build quick. Exit status 75: no engine can be had here, and why.
set -eu

DATA_DIR=${ENGINE_DATA_DIR:-/var/lib/penstock-docker}
RUN_DIR=${ENGINE_RUN_DIR:-/run/penstock-docker}
PACKAGES="docker.io docker-compose mmdebstrap iptables ca-certificates"
WAIT_S=60
SOCKET=unix://$RUN_DIR/docker.sock

unavailable() {
    echo "no Docker engine: $1" >&2
    exit 75
}

answers() { # with an address: at that one; without: wherever the client looks by itself
    command -v docker >/dev/null && DOCKER_HOST=${1:-${DOCKER_HOST:-}} timeout 20 docker version >/dev/null 2>&1
}

install_packages() {
    command -v dockerd >/dev/null && command -v docker-compose >/dev/null && command -v mmdebstrap >/dev/null && return 0
    command -v apt-get >/dev/null || unavailable "dockerd isn't installed, and there is no apt-get to install it with"
    echo "installing $PACKAGES" >&2
    # Packages start no service of theirs: the engine started here is the only one.
    policy=/usr/sbin/policy-rc.d
    ours=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        ours=$policy
    fi
    # shellcheck disable=SC2086
    { timeout 120 apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -qq --no-install-recommends $PACKAGES; } >&2 ||
        failed=yes
    [ -z "$ours" ] || rm -f "$ours"
    [ -z "${failed:-}" ] || unavailable "apt-get couldn't install $PACKAGES"
}

start() {
    if answers || answers "$SOCKET"; then
        echo "an engine answers already" >&2
        return 0
    fi
    [ "$(uname -s)" = Linux ] || unavailable "it can be started on Linux only; start Docker Desktop yourself"
    [ "$(id -u)" = 0 ] || unavailable "starting one needs root; start it yourself, or run this as root"
    install_packages
    mkdir -p "$DATA_DIR" "$RUN_DIR"
    # Only 127.0.0.1 is published on; user-defined networks come from one pool that is ours.
    setsid dockerd --host "$SOCKET" --data-root "$DATA_DIR" --exec-root "$RUN_DIR/exec" --pidfile "$RUN_DIR/dockerd.pid" \
        --bip 172.29.0.1/24 --default-address-pool base=172.30.0.0/16,size=24 --log-level warn \
        >"$RUN_DIR/dockerd.log" 2>&1 </dev/null &
    waited=0
    until answers "$SOCKET"; do
        waited=$((waited + 1))
        if [ $waited -gt $WAIT_S ] || ! kill -0 $! 2>/dev/null; then
            tail -n 20 "$RUN_DIR/dockerd.log" >&2
            stop
            unavailable "dockerd didn't answer; its log ends above ($RUN_DIR/dockerd.log)"
        fi
        sleep 1
    done
    echo "engine started at $SOCKET" >&2
}

stop() {
    [ -s "$RUN_DIR/dockerd.pid" ] || return 0
    pid=$(cat "$RUN_DIR/dockerd.pid")
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dockerd ]; then
        kill "$pid"
        waited=0
        while kill -0 "$pid" 2>/dev/null && [ $waited -lt $WAIT_S ]; do
            waited=$((waited + 1))
            sleep 1
        done
    fi
    rm -f "$RUN_DIR/dockerd.pid"
}

case ${1:-} in
start) start ;;
stop) stop ;;
status) answers || answers "$SOCKET" ;;
env)
    if ! answers; then
        answers "$SOCKET" || unavailable "none answers; try: $0 start"
        echo "export DOCKER_HOST=$SOCKET"
    fi
    ;;
*)
    echo "usage: $0 start|stop|status|env" >&2
    exit 2
    ;;
esac
