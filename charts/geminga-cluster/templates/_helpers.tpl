{{- define "cluster.labels" -}}
app.kubernetes.io/name: geminga-cluster
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "cluster.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
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
