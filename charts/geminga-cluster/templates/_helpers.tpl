{{- define "cluster.labels" -}}
app.kubernetes.io/name: geminga-cluster
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Name of the GemingaCluster. Services and pods get theirs from it, so it must be good for both. */}}
{{- define "cluster.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end }}

{{- define "cluster.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}

{{/* Where clients inside Kubernetes connect. */}}
{{- define "cluster.address" -}}
http://{{ include "cluster.name" . }}-broker.{{ .Release.Namespace }}.svc:8650
{{- end }}

{{- define "cluster.etcd.selector" -}}
app.kubernetes.io/name: geminga-cluster
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: etcd
{{- end }}

{{- define "cluster.etcd.endpoints" -}}
{{- if .Values.etcd.bundled.enabled -}}
- http://{{ include "cluster.name" . }}-etcd.{{ .Release.Namespace }}.svc:2379
{{- else -}}
{{- toYaml .Values.etcd.endpoints -}}
{{- end -}}
{{- end }}

{{/* The restricted Pod Security level, of a pod and of its container. */}}
{{- define "cluster.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "cluster.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Of a pod; empty where there are none. */}}
{{- define "cluster.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What no schema can say. Each refusal ends with what to do. */}}
{{- define "cluster.check" -}}
{{- $name := include "cluster.name" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$" $name) }}
{{- fail (printf "%q cannot be the name of a cluster, which has 1 to 40 characters of a-z, 0-9 and -, and begins with a letter: choose another release name, or --set fullnameOverride=NAME" $name) }}
{{- end }}
{{- range $pool, $_ := .Values.pools }}
{{- $full := printf "%s-%s" $name $pool }}
{{- if gt (len $full) 40 }}
{{- fail (printf "the pool's name %q has %d characters, at most 40 are possible: choose a shorter name in pools, a shorter release name, or --set fullnameOverride=NAME" $full (len $full)) }}
{{- end }}
{{- end }}
{{- $etcd := .Values.etcd }}
{{- if and $etcd.bundled.enabled $etcd.endpoints }}
{{- fail "etcd.endpoints and etcd.bundled.enabled are both set: keep one of them" }}
{{- end }}
{{- if not (or $etcd.bundled.enabled $etcd.endpoints) }}
{{- fail "a cluster needs an etcd: --set 'etcd.endpoints={http://etcd.etcd.svc:2379}' with the address of yours, or --set etcd.bundled.enabled=true for one that is good for development only" }}
{{- end }}
{{- if and $etcd.bundled.enabled (eq .Values.preset "production") }}
{{- fail "the bundled etcd is for development: it has one member and no backup, and without it every message is lost. Run an etcd of three members and --set 'etcd.endpoints={http://etcd.etcd.svc:2379}' with its address, or --set preset=dev" }}
{{- end }}
{{- if and $etcd.bundled.enabled (or $etcd.credentialsSecret $etcd.tlsSecret) }}
{{- fail "the bundled etcd has no users and no TLS: leave etcd.credentialsSecret and etcd.tlsSecret empty, or set etcd.endpoints to an etcd that has them" }}
{{- end }}
{{- end }}

{{/* What a preset says, as YAML. */}}
{{- define "cluster.preset" -}}
{{- if eq .Values.preset "production" }}
brokers:
  replicas: 3
  resources:
    requests: {cpu: "1", memory: 1Gi}
    limits: {memory: 2Gi}
pool:
  replicas: 3
  storage: {size: 100Gi}
  resources:
    requests: {cpu: "1", memory: 2Gi}
    limits: {memory: 4Gi}
{{- else }}
brokers:
  replicas: 1
  autoCreateTopics: true
  resources:
    requests: {cpu: 50m, memory: 64Mi}
pool:
  replicas: 3
  storage: {size: 2Gi}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
{{- end }}
{{- end }}
