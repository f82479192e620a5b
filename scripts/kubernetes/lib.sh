# Sourced by the scripts beside it: where things are, and processes that are known by pid file.
# shellcheck shell=bash disable=SC2034
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STATE=${GEMINGA_NODES:-${XDG_CACHE_HOME:-$HOME/.cache}/geminga/nodes} # the running cluster; `down` removes it
NETWORK=${GEMINGA_NODES_NETWORK:-10.99.0}                             # the bridge is .1, node N is .(10+N)
SERVICES=10.96                                                        # services are SERVICES.0.0/16, the DNS is .0.10
PODS=10.244                                                           # pods of node N are PODS.N.0/24
BRIDGE=gmnodes0
CGROUP=geminga-nodes
API=$NETWORK.1:6443
export KUBECONFIG=$STATE/kubeconfig

say() { printf 'nodes: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 1
}

# within SECONDS COMMAND...: runs it again and again until it succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.1
    done
}

# A pid file holds a pid and when that process began: a successor with the same number is never taken for ours.
began() {
    local line fields
    { line=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    read -ra fields <<<"${line##*) }"
    [ "${fields[0]}" != Z ] && echo "${fields[19]}"
}
pid_of() {
    local pid at
    read -r pid at 2>/dev/null <"$STATE/run/$1.pid" || return 1
    [ "$(began "$pid")" = "$at" ] && echo "$pid"
}
ended() { ! pid_of "$1"; }

# start NAME COMMAND...: in the background, unless it runs.
start() {
    local name=$1
    shift
    ! pid_of "$name" >/dev/null || return 0
    setsid "$@" >>"$STATE/log/$name.log" 2>&1 </dev/null 9>&- &
    echo "$! $(began $!)" >"$STATE/run/$name.pid"
    disown
}
stop() {
    local pid
    if pid=$(pid_of "$1"); then
        kill -KILL "$pid" 2>/dev/null || true
        within 10 ended "$1" || say "$1 does not end"
    fi
    rm -f "$STATE/run/$1.pid"
}
