# Sourced by cluster: certificates and kubeconfigs of a cluster for one test.
# shellcheck shell=bash
KEYS=$STATE/keys

# pair NAME USER [GROUP [ALTERNATIVES]]: a key and a certificate of the cluster's CA.
pair() {
    local file=$KEYS/$1 subject="/CN=$2"
    [ ! -e "$file.crt" ] || return 0
    [ -z "${3:-}" ] || subject="/O=$3/CN=$2"
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "$subject" \
        -keyout "$file.key" -out "$file.csr" 2>/dev/null
    openssl x509 -req -days 30 -in "$file.csr" -CA "$KEYS/ca.crt" -CAkey "$KEYS/ca.key" -out "$file.crt" \
        -extfile <(printf 'extendedKeyUsage=clientAuth,serverAuth\n%s\n' "${4:+subjectAltName=$4}") 2>/dev/null
    rm "$file.csr"
}

# kubeconfig FILE NAME: one that shows the pair NAME.
kubeconfig() {
    local in64="base64 -w0"
    cat >"$1" <<YAML
apiVersion: v1
kind: Config
current-context: nodes
clusters: [{name: nodes, cluster: {server: "https://$API", certificate-authority-data: $($in64 "$KEYS/ca.crt")}}]
users: [{name: $2, user: {client-certificate-data: $($in64 "$KEYS/$2.crt"), client-key-data: $($in64 "$KEYS/$2.key")}}]
contexts: [{name: nodes, context: {cluster: nodes, user: $2}}]
YAML
}

make_keys() {
    local names=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc
    names+=,IP:127.0.0.1,IP:$SERVICES.0.1,IP:$NETWORK.1
    mkdir -p "$KEYS"
    [ -e "$KEYS/ca.crt" ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 30 \
        -subj /CN=nodes-ca -keyout "$KEYS/ca.key" -out "$KEYS/ca.crt" 2>/dev/null
    if [ ! -e "$KEYS/accounts.pub" ]; then
        openssl genrsa -out "$KEYS/accounts.key" 2048 2>/dev/null
        openssl rsa -in "$KEYS/accounts.key" -pubout -out "$KEYS/accounts.pub" 2>/dev/null
    fi
    pair apiserver kube-apiserver '' "$names"
    pair apiserver-to-kubelet kube-apiserver system:masters
    pair admin admin system:masters
    pair controller-manager system:kube-controller-manager
    pair scheduler system:kube-scheduler
    pair kube-proxy system:kube-proxy
    kubeconfig "$KUBECONFIG" admin
    local name
    for name in controller-manager scheduler kube-proxy; do kubeconfig "$KEYS/$name.conf" $name; done
}
