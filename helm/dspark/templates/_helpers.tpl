{{/* Names and labels. */}}

{{- define "dspark.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* KubeRay adds up to 23 characters for its clusters and Services, which have at most 63. */}}
{{- define "dspark.fullname" -}}
{{- $name := include "dspark.name" . }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* What selects this release's pods. KubeRay selects by `app.kubernetes.io/name`: not ours. */}}
{{- define "dspark.selector" -}}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* Labels of all objects but pods: a pod's must not change with the chart's version, as KubeRay
     starts a new cluster for any change of a pod. */}}
{{- define "dspark.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "dspark.name" . | quote }}
{{ include "dspark.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: dspark
{{- end }}

{{- define "dspark.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- define "dspark.cacheClaim" -}}
{{- default (printf "%s-model-cache" (include "dspark.fullname" .)) .Values.modelCache.existingClaim }}
{{- end }}
