# Sourced by cluster: the bridge, and nodes, each a network, mount, pid, uts and ipc namespace of its own.
# shellcheck shell=bash

# What a kubelet sets for the whole machine: put back at the end.
SYSCTLS='vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops kernel.keys.root_maxkeys kernel.keys.root_maxbytes'

cgroup_trees() {
    local tree
    if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
        echo /sys/fs/cgroup
        return
    fi
    for tree in /sys/fs/cgroup/*/; do [ -w "$tree/cgroup.procs" ] && echo "${tree%/}"; done
    true
}
make_cgroup() {
    local tree file folder
    for tree in $(cgroup_trees); do
        mkdir -p "$tree/$CGROUP/$1"
        # A new cpuset is empty, and nothing can join one that is.
        for file in cpuset.cpus cpuset.mems; do
            [ -e "$tree/$file" ] || continue
            for folder in "$CGROUP" "$CGROUP/$1"; do cat "$tree/$file" >"$tree/$folder/$file"; done
        done
    done
}
remove_cgroups() {
    local tree folder
    for tree in $(cgroup_trees); do
        [ -d "$tree/$CGROUP" ] || continue
        find "$tree/$CGROUP" -depth -type d | while read -r folder; do within 5 rmdir "$folder" || true; done
    done
}

make_bridge() {
    local key
    [ -e "$STATE/sysctls" ] || for key in $SYSCTLS; do echo "$key=$(sysctl -n "$key")"; done >"$STATE/sysctls"
    ip link show "$BRIDGE" >/dev/null 2>&1 && return
    ip link add "$BRIDGE" type bridge
    ip addr add "$NETWORK.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
}
remove_bridge() {
    ip link del "$BRIDGE" 2>/dev/null || true
    rmdir /var/lib/kubelet /var/lib/containerd 2>/dev/null || true # mount points, no more
    [ ! -e "$STATE/sysctls" ] || sysctl -q -p "$STATE/sysctls" || true
}

wire_node() {
    local n=$1 space=gmnodes-$1 other
    ip netns add "$space"
    ip link add "gmnodes-v$n" type veth peer name eth0 netns "$space"
    ip link set "gmnodes-v$n" master "$BRIDGE" up
    ip -n "$space" link set lo up
    ip -n "$space" addr add "$NETWORK.$((10 + n))/24" dev eth0
    ip -n "$space" link set eth0 up
    # No default route: nothing in the cluster reaches the outside. A service's address needs some route to be rewritten.
    ip -n "$space" route add "$SERVICES.0.0/16" via "$NETWORK.1"
    for other in $(seq "$COUNT"); do
        [ "$other" = "$n" ] || ip -n "$space" route add "$PODS.$other.0/24" via "$NETWORK.$((10 + other))"
    done
    # This machine reaches pods directly, and services through the first node.
    ip route replace "$PODS.$n.0/24" via "$NETWORK.$((10 + n))" dev "$BRIDGE"
    [ "$n" != 1 ] || ip route replace "$SERVICES.0.0/16" via "$NETWORK.11" dev "$BRIDGE"
}

configure_node() {
    local n=$1 node=node$1 folder=$STATE/node$1
    local etc=$folder/etc
    mkdir -p "$folder"/{kubelet,containerd,log} "$etc/cni" /var/lib/kubelet /var/lib/containerd
    pair "$node" "system:node:$node" system:nodes
    kubeconfig "$etc/kubelet.conf" "$node"
    cp "$KEYS/kube-proxy.conf" "$KEYS/ca.crt" "$etc/"
    : >"$etc/resolv.conf"
    cat >"$etc/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $etc/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP/$node
clusterDNS: [$SERVICES.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
readOnlyPort: 0
resolvConf: $etc/resolv.conf
volumePluginDir: /var/lib/kubelet/plugins
# Images are nowhere else: none is collected, and no pod leaves because this machine's disk is full.
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 0%, imagefs.available: 0%, nodefs.inodesFree: 0%}
YAML
    cat >"$etc/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {kubeconfig: $etc/kube-proxy.conf}
clusterCIDR: $PODS.0.0/16
hostnameOverride: $node
oomScoreAdj: 0
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML
    # Setting an OOM score below one's own is forbidden in some sandboxes.
    cat >"$etc/containerd.toml" <<TOML
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "localhost/pause:nodes"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "$etc/cni"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      SystemdCgroup = false
TOML
    cat >"$etc/cni/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "/run/cni", "ranges": [[{"subnet": "$PODS.$n.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
}

start_node() {
    local n=$1
    ! pid_of "node$n" >/dev/null || return 0
    stop_node "$n" # what is left of one that died
    wire_node "$n"
    make_cgroup "node$n"
    configure_node "$n"
    start "node$n" nsenter --net="/run/netns/gmnodes-$n" unshare --mount --pid --uts --ipc --fork --kill-child=KILL \
        --mount-proc -- "$HERE/node" "$n"
}
# Power loss: the pid namespace dies with its first process, and nothing of the node stays but its disks.
stop_node() {
    stop "node$1"
    ip netns del "gmnodes-$1" 2>/dev/null || true
    ip link del "gmnodes-v$1" 2>/dev/null || true
}
# in_node N COMMAND...: among the node's processes, on its network, with its files.
in_node() {
    local pid
    pid=$(pid_of "node$1") || return 1
    # The pid file names unshare, whose one child is the node's first process.
    pid=$(<"/proc/$pid/task/$pid/children") || return 1
    nsenter -t "${pid%% *}" -n -m -p -- "${@:2}"
}
