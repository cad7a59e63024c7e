{{/* Pods of the Ray cluster. Everything here is part of what KubeRay compares: nothing in it may
     depend on the chart's version, the release's revision or the Serve configuration, but for the
     ports that pods name: `router.port`, `router.metrics_port`, and whether and where HTTP is. */}}

{{/* A worker group for `.pool`, one of router, target and drafter, from the values of that name. */}}
{{- define "dspark.workerGroup" -}}
{{- $values := index .root.Values .pool }}
- groupName: {{ .pool }}
  replicas: {{ $values.replicas }}
  minReplicas: {{ ternary $values.minReplicas $values.replicas .root.Values.autoscaler.enabled }}
  maxReplicas: {{ ternary $values.maxReplicas $values.replicas .root.Values.autoscaler.enabled }}
  numOfHosts: {{ default 1 $values.numOfHosts }}
  resources:
    {{- merge (dict (printf "dspark-%s" .pool) "1000") $values.rayResources | toYaml | nindent 4 }}
  rayStartParams: {}
  template:
    {{- include "dspark.pod" (dict "root" .root "component" .pool "values" $values) | nindent 4 }}
{{- end }}

{{/* The pod of `.component`: head or a pool's name. */}}
{{- define "dspark.pod" -}}
{{- $root := .root }}
{{- $isHead := eq .component "head" }}
{{- $isRouter := eq .component "router" }}
{{- $values := $root.Values }}
metadata:
  labels:
    {{- include "dspark.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
    {{- with .values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .values.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  terminationGracePeriodSeconds: {{ $values.terminationGracePeriodSeconds }}
  enableServiceLinks: false
  {{- if not $isHead }}
  automountServiceAccountToken: false
  {{- with $values.serviceAccountName }}
  serviceAccountName: {{ . | quote }}
  {{- end }}
  {{- end }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if .values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- $labels := merge (dict "app.kubernetes.io/component" .component) (include "dspark.selector" $root | fromYaml) }}
    {{- range .values.topologySpreadConstraints }}
    - {{- merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels)) | toYaml | nindent 6 }}
    {{- end }}
  {{- end }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  containers:
    - name: ray-{{ .component }}
      image: {{ include "dspark.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        - {name: metrics, containerPort: 8080}
        {{- if $isHead }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        {{- if $isRouter }}
        - {name: grpc, containerPort: {{ include "dspark.grpcPort" $root }}}
        {{- with include "dspark.metricsPort" $root }}
        - {name: dspark-metrics, containerPort: {{ . }}}
        {{- end }}
        {{- end }}
        {{- /* KubeRay makes no cluster without this name on the head. */}}
        {{- if or $isHead (include "dspark.http" $root) }}
        - {name: serve, containerPort: {{ include "dspark.httpPort" $root }}}
        {{- end }}
      env:
        {{- include "dspark.env" $root | nindent 8 }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- toYaml $values.securityContext | nindent 8 }}
      {{- include "dspark.probes" . | nindent 6 }}
      {{- if $isRouter }}
      lifecycle:
        preStop:
          exec: {command: [sleep, {{ $values.preStopSeconds | quote }}]}
      {{- end }}
      volumeMounts:
        - {name: cache, mountPath: /cache}
        {{- range $name := include "dspark.secretVolumes" . | fromYamlArray }}
        - {name: {{ $name.name }}, mountPath: /etc/dspark/{{ $name.name }}, readOnly: true}
        {{- end }}
        {{- with .values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: cache
      {{- if $values.modelCache.enabled }}
      persistentVolumeClaim:
        claimName: {{ include "dspark.cacheClaim" $root | quote }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- with include "dspark.secretVolumes" . | fromYamlArray }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with .values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* KubeRay's own probes ask every worker for a Serve HTTP proxy, and would keep pods unready
     without one. Here a pod is ready when its Ray node is; a router's, when its router serves, which
     it does once a target replica has been ready: until then a second Ray cluster gets no traffic. */}}
{{- define "dspark.probes" -}}
{{- $raylet := "wget -q -T 4 -O /dev/null http://127.0.0.1:52365/api/local_raylet_healthz" }}
{{- $gcs := "wget -q -T 4 -O /dev/null http://127.0.0.1:8265/api/gcs_healthz" }}
{{- $command := ternary (printf "%s && %s" $raylet $gcs) $raylet (eq .component "head") }}
livenessProbe:
  exec: {command: [sh, -c, {{ $command | quote }}]}
  initialDelaySeconds: 30
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 12
readinessProbe:
  {{- if and (eq .component "router") .root.Values.tls.client.existingSecret }}
  # The kubelet's gRPC probe speaks no TLS; the port for metrics says the same.
  httpGet: {path: /ready, port: dspark-metrics}
  {{- else if eq .component "router" }}
  grpc: {port: {{ include "dspark.grpcPort" .root }}}
  {{- else }}
  exec: {command: [sh, -c, {{ $command | quote }}]}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 2
{{- end }}

{{- define "dspark.env" -}}
- {name: HF_HOME, value: /cache/huggingface}
- {name: DSPARK_CACHE_DIR, value: /cache/dspark}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Ray runs workers as background work; ours answer people.
- {name: RAY_worker_niceness, value: "0"}
{{- with .Values.huggingFace }}
{{- if .existingSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret | quote }}, key: {{ .key | quote }}}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Volumes of the Secrets that `.component` needs; each is mounted at /etc/dspark/NAME. */}}
{{- define "dspark.secretVolumes" -}}
{{- $values := .root.Values }}
{{- $volumes := list }}
{{- /* For Serve's proxies everywhere: one is on each node with a part, the head among them. */}}
{{- if and $values.tls.client.existingSecret (or (eq .component "router") (include "dspark.http" .root)) }}
  {{- $volumes = append $volumes (dict "name" "client-tls" "secret" (dict "secretName" $values.tls.client.existingSecret)) }}
{{- end }}
{{- if and $values.tls.internal.existingSecret (ne .component "head") }}
  {{- $volumes = append $volumes (dict "name" "internal-tls" "secret" (dict "secretName" $values.tls.internal.existingSecret)) }}
{{- end }}
{{- if and $values.apiKeys.existingSecret (eq .component "router") }}
  {{- $item := dict "key" $values.apiKeys.key "path" "keys" }}
  {{- $volumes = append $volumes (dict "name" "api-keys" "secret" (dict "secretName" $values.apiKeys.existingSecret "items" (list $item))) }}
{{- end }}
{{- toYaml $volumes }}
{{- end }}
