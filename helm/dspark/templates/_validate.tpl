{{/* What the schema cannot say of the values: each failure names one. The operator would refuse the
     same only after Helm has called the release deployed, or nobody would. */}}

{{- define "dspark.validate" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "dspark.fullname" .)) }}
  {{- fail (printf "fullnameOverride: names begin with a letter, got %q" (include "dspark.fullname" .)) }}
{{- end }}
{{- if eq .Values.upgradeStrategy.type "NewClusterWithIncrementalUpgrade" }}
  {{- fail "upgradeStrategy.type: NewClusterWithIncrementalUpgrade moves traffic by a Service of KubeRay's over all workers, of which only routers answer, and moves no gRPC: use NewCluster or None" }}
{{- end }}
{{- if and .Values.gcsFaultTolerance.enabled (not .Values.gcsFaultTolerance.redisAddress) }}
  {{- fail "gcsFaultTolerance.redisAddress: name the Redis" }}
{{- end }}
{{- include "dspark.validatePools" . }}
{{- include "dspark.validatePlaces" . }}
{{- include "dspark.validatePods" . }}
{{- include "dspark.validatePorts" . }}
{{- include "dspark.validateDoors" . }}
{{- $args := include "dspark.args" . | fromYaml }}
{{- $drain := float64 (ternary $args.drain_timeout_s 30 (hasKey $args "drain_timeout_s")) }}
{{- $grace := sub .Values.terminationGracePeriodSeconds .Values.preStopSeconds }}
{{- if gt $drain (float64 $grace) }}
  {{- fail (printf "config.drain_timeout_s: %v s do not fit into terminationGracePeriodSeconds less preStopSeconds, %v s: streams would be cut off" $drain $grace) }}
{{- end }}
{{- end }}

{{/* How many pods there are. */}}
{{- define "dspark.validatePools" -}}
{{- range $pool := list "router" "target" "drafter" }}
  {{- $values := index $.Values $pool }}
  {{- $replicas := int $values.replicas }}
  {{- $most := $replicas }}
  {{- if $.Values.autoscaler.enabled }}
    {{- $most = int $values.maxReplicas }}
    {{- if gt (int $values.minReplicas) $most }}
      {{- fail (printf "%s.minReplicas: %v is more than maxReplicas, %v" $pool $values.minReplicas $most) }}
    {{- end }}
    {{- if lt $replicas (int $values.minReplicas) }}
      {{- fail (printf "%s.replicas: %v is less than minReplicas, %v" $pool $replicas $values.minReplicas) }}
    {{- end }}
    {{- if gt $replicas $most }}
      {{- fail (printf "%s.replicas: %v is more than maxReplicas, %v" $pool $replicas $most) }}
    {{- end }}
  {{- else if and (ne $pool "drafter") (eq $replicas 0) }}
    {{- fail (printf "%s.replicas: 0, and without autoscaler.enabled it stays so: nothing would serve" $pool) }}
  {{- end }}
  {{- $most = mul $most (default 1 $values.numOfHosts) }}
  {{- if and (gt (int $values.minAvailable) 0) (ge (int $values.minAvailable) (int $most)) }}
    {{- fail (printf "%s.minAvailable: %v of at most %v pods would let no node be drained" $pool $values.minAvailable $most) }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Pods hold what the Serve configuration asks of them: what has no place is waited for without end.
     Of GPUs and CPUs where the values say what a pod offers, and of parts that stay in their pool. */}}
{{- define "dspark.validatePlaces" -}}
{{- $args := include "dspark.args" . | fromYaml }}
{{- range $pool := list "router" "target" "drafter" }}
  {{- $values := index $.Values $pool }}
  {{- $part := default dict (index $args $pool) }}
  {{- $hosts := int (default 1 $values.numOfHosts) }}
  {{- $pods := int (ternary $values.maxReplicas $values.replicas $.Values.autoscaler.enabled) }}
  {{- $replicas := int (ternary $part.num_replicas 1 (hasKey $part "num_replicas")) }}
  {{- $speculative := default dict $args.speculative }}
  {{- if and (eq $pool "drafter") (or (empty $speculative) (eq (toString $speculative.method) "ngram") (eq (toString $part.placement) "colocated")) }}
    {{- $replicas = 0 }}
  {{- end }}
  {{- $actors := 1 }}
  {{- if eq $pool "target" }}
    {{- $actors = int (mul (default 1 $part.tensor_parallel_size) (default 1 $part.pipeline_parallel_size)) }}
  {{- end }}
  {{- $offered := dict "num_gpus" "0" }}
  {{- range $name, $amount := default dict $values.resources.limits }}
    {{- if hasSuffix "gpu" $name }}
      {{- $_ := set $offered "num_gpus" (toString $amount) }}
    {{- end }}
  {{- end }}
  {{- range $name, $key := dict "GPU" "num_gpus" "CPU" "num_cpus" }}
    {{- if hasKey $values.rayResources $name }}
      {{- $_ := set $offered $key (get $values.rayResources $name) }}
    {{- end }}
  {{- end }}
  {{- $default := dict "num_gpus" 0.0 "num_cpus" (ternary 0.1 0.5 (eq $pool "router")) }}
  {{- if and (hasKey (default dict $part.resources) (printf "dspark-%s" $pool)) (gt $replicas 0) }}
  {{- range $name, $text := $offered }}
    {{- $offer := ceil (float64 $text) }}  {{- /* as Ray has it */}}
    {{- $need := float64 (ternary (index $part $name) (index $default $name) (hasKey $part $name)) }}
    {{- if and (gt $need 0.0) (regexMatch "^[0-9]+([.][0-9]+)?$" $text) }}
      {{- $fit := int (floor (addf (divf $offer $need) 0.000001)) }}
      {{- if lt (mul $fit $hosts) (int64 $actors) }}
        {{- fail (printf "config.%s.%s: %v for each of %v shards of a replica are more than its %v pods offer, %v each: see %s.resources and %s.rayResources" $pool $name $need $actors $hosts $offer $pool $pool) }}
      {{- end }}
      {{- $room := ternary (mul $pods (div $fit $actors)) (int64 $pods) (ge $fit $actors) }}
      {{- if gt (int64 $replicas) $room }}
        {{- fail (printf "config.%s.num_replicas: %v are more than %v pods hold by %s, %v: see %s.replicas and %s.maxReplicas" $pool $replicas (mul $pods $hosts) $name $room $pool $pool) }}
      {{- end }}
    {{- end }}
  {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What is added to pods: nothing over what is there, and no mount without its volume. */}}
{{- define "dspark.validatePods" -}}
{{- range $pod := list "head" "router" "target" "drafter" }}
  {{- $values := index $.Values $pod }}
  {{- range $label, $_ := $values.podLabels }}
    {{- if regexMatch "^(ray\\.io/.*|app\\.kubernetes\\.io/(name|instance|component|created-by))$" $label }}
      {{- fail (printf "%s.podLabels: pods are selected by %s, which is not yours to set" $pod $label) }}
    {{- end }}
  {{- end }}
  {{- $names := list "cache" }}
  {{- range include "dspark.secretVolumes" (dict "root" $ "component" $pod) | fromYamlArray }}
    {{- $names = append $names .name }}
  {{- end }}
  {{- range $values.extraVolumes }}
    {{- if has .name $names }}
      {{- fail (printf "%s.extraVolumes: there is a volume %s already" $pod .name) }}
    {{- end }}
    {{- $names = append $names .name }}
  {{- end }}
  {{- range $values.extraVolumeMounts }}
    {{- if not (has .name $names) }}
      {{- fail (printf "%s.extraVolumeMounts: no volume is called %s" $pod .name) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- end }}

{{/* No two parts of a pod on one port, and none that needs root. */}}
{{- define "dspark.validatePorts" -}}
{{- $taken := dict "8080" "that of Ray's metrics" "52365" "that of Ray's agent" }}
{{- if include "dspark.http" . }}
  {{- $_ := set $taken (include "dspark.httpPort" .) "that of HTTP" }}
{{- end }}
{{- $drafter := include "dspark.drafterPorts" . | fromYaml }}
{{- if and .Values.networkPolicy.enabled (not $drafter.first) }}
  {{- fail "config.drafter.port: network policies (networkPolicy.enabled) need a fixed port range, got 0" }}
{{- end }}
{{- if $drafter.first }}
  {{- if lt (int $drafter.first) 1024 }}
    {{- fail (printf "config.drafter.port: pods are not root, and bind 1024 or more, got %v" $drafter.first) }}
  {{- end }}
  {{- if gt (int $drafter.last) 65535 }}
    {{- fail (printf "config.drafter.num_ports: the range %v to %v ends above 65535" $drafter.first $drafter.last) }}
  {{- end }}
  {{- range $port, $whose := $taken }}
    {{- if and (ge (int $port) (int $drafter.first)) (le (int $port) (int $drafter.last)) }}
      {{- fail (printf "config.drafter.port: the range %v to %v has %s in it, %s" $drafter.first $drafter.last $port $whose) }}
    {{- end }}
  {{- end }}
{{- end }}
{{- range $key, $port := dict "config.router.metrics_port" (include "dspark.metricsPort" .) "config.router.port" (include "dspark.grpcPort" .) }}
  {{- if $port }}
    {{- if lt (int $port) 1024 }}
      {{- fail (printf "%s: pods are not root, and bind 1024 or more, got %s" $key $port) }}
    {{- end }}
    {{- if hasKey $taken $port }}
      {{- fail (printf "%s: %s is %s already" $key $port (get $taken $port)) }}
    {{- end }}
    {{- $_ := set $taken $port $key }}
  {{- end }}
{{- end }}
{{- end }}

{{/* TLS and Gateways. */}}
{{- define "dspark.validateDoors" -}}
{{- if and .Values.tls.client.existingSecret (not (include "dspark.metricsPort" .)) }}
  {{- fail "config.router.metrics_port: with tls.client the readiness probe asks there, and needs it fixed" }}
{{- end }}
{{- if and .Values.tls.client.requireClientCertificate (not .Values.tls.client.existingSecret) }}
  {{- fail "tls.client.existingSecret: tls.client.requireClientCertificate needs it, and its ca.crt" }}
{{- end }}
{{- with .Values.gateway }}
{{- if .enabled }}
  {{- if not .parentRefs }}
    {{- fail "gateway.parentRefs: name at least one Gateway" }}
  {{- end }}
  {{- if not (or .grpc.enabled (and .http.enabled (include "dspark.httpService" $))) }}
    {{- fail "gateway.enabled: there is nothing to route: gateway.grpc is off, and HTTP has no route or no Service" }}
  {{- end }}
  {{- if and $.Values.tls.client.existingSecret .backendTLS.enabled (not .backendTLS.hostname) }}
    {{- fail "gateway.backendTLS.hostname: with tls.client Gateways need the name in its certificate" }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}
