{{/* What the schema cannot say of the values: each failure names one. The operator would refuse the
     same only after Helm has called the release deployed. */}}

{{- define "dspark.validate" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "dspark.fullname" .)) }}
  {{- fail (printf "fullnameOverride: names begin with a letter, got %q" (include "dspark.fullname" .)) }}
{{- end }}
{{- range $pool := list "router" "target" "drafter" }}
  {{- $values := index $.Values $pool }}
  {{- if and $.Values.autoscaler.enabled (gt (int $values.minReplicas) (int $values.maxReplicas)) }}
    {{- fail (printf "%s.minReplicas: %v is more than maxReplicas, %v" $pool $values.minReplicas $values.maxReplicas) }}
  {{- end }}
{{- end }}
{{- with .Values.upgradeStrategy }}
{{- if eq .type "NewClusterWithIncrementalUpgrade" }}
  {{- if not $.Values.autoscaler.enabled }}
    {{- fail "autoscaler.enabled: upgradeStrategy.type NewClusterWithIncrementalUpgrade needs it" }}
  {{- end }}
  {{- range $key := list "gatewayClassName" "stepSizePercent" "intervalSeconds" }}
    {{- if not (hasKey $.Values.upgradeStrategy.clusterUpgradeOptions $key) }}
      {{- fail (printf "upgradeStrategy.clusterUpgradeOptions.%s: NewClusterWithIncrementalUpgrade needs it" $key) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) }}
  {{- fail "gcsFaultTolerance.redisAddress: name the Redis" }}
{{- end }}
{{- if and .Values.tls.client.existingSecret (not (include "dspark.metricsPort" .)) }}
  {{- fail "config.router.metrics_port: with tls.client the readiness probe asks there, and needs it fixed" }}
{{- end }}
{{- if and .Values.gateway.enabled (not .Values.gateway.parentRefs) }}
  {{- fail "gateway.parentRefs: name at least one Gateway" }}
{{- end }}
{{- $drafter := default dict (include "dspark.args" . | fromYaml).drafter }}
{{- if and .Values.networkPolicy.enabled (not $drafter.port) }}
  {{- fail "config.drafter.port: network policies (networkPolicy.enabled) need a fixed port range, got 0" }}
{{- end }}
{{- end }}
