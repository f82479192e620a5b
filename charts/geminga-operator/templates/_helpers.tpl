{{- define "operator.labels" -}}
app.kubernetes.io/name: geminga-operator
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "operator.selector" -}}
app.kubernetes.io/name: geminga-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "operator.watched" -}}
{{- if eq .Values.watchNamespace "*" }}{{ else }}{{ .Values.watchNamespace | default .Release.Namespace }}{{ end }}
{{- end }}
