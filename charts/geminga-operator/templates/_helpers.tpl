{{/* Name of the Deployment, its account and its roles. */}}
{{- define "operator.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end }}

{{- define "operator.labels" -}}
{{ include "operator.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "operator.selector" -}}
app.kubernetes.io/name: geminga-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The namespace that it works on; empty: all. */}}
{{- define "operator.watched" -}}
{{- if ne .Values.watchNamespace "*" }}{{ .Values.watchNamespace | default .Release.Namespace }}{{ end -}}
{{- end }}

{{/* Where the Lease is: with the objects, so that of two releases for one namespace only one works. */}}
{{- define "operator.leaseNamespace" -}}
{{- include "operator.watched" . | default .Release.Namespace -}}
{{- end }}
