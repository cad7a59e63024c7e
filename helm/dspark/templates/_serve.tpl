{{/* The Serve configuration: the chosen file, with `config` and what Secrets mean over its `args`. */}}

{{- define "dspark.serveConfig" -}}
{{- $path := printf "serve/%s.yaml" .Values.serveConfig }}
{{- $text := .Files.Get $path }}
{{- if not $text }}
  {{- fail (printf "serveConfig: the chart has no %s" $path) }}
{{- end }}
{{- $document := fromYaml $text }}
{{- $application := first $document.applications }}
{{- $args := mergeOverwrite $application.args (deepCopy .Values.config) }}
{{- with include "dspark.security" . | fromYaml }}
  {{- $_ := set $args "security" (mergeOverwrite (default dict $args.security) .) }}
{{- end }}
{{- if .Values.tls.client.requireClientCertificate }}
  {{- /* Serve's proxies ask no client for a certificate, and must be no way around it. */}}
  {{- $_ := set $document "proxy_location" "Disabled" }}
  {{- $_ := set $application "route_prefix" nil }}
{{- else if .Values.tls.client.existingSecret }}
  {{- $files := dict "ssl_certfile" "/etc/dspark/client-tls/tls.crt" "ssl_keyfile" "/etc/dspark/client-tls/tls.key" }}
  {{- $_ := set $document "http_options" (merge $files (default dict $document.http_options)) }}
{{- end }}
{{- $_ := set $application "args" $args }}
{{- $_ := set $document "applications" (list $application) }}
{{- toYaml $document }}
{{- end }}

{{/* Its application's `args`, for `fromYaml`. */}}
{{- define "dspark.args" -}}
{{- toYaml (first (include "dspark.serveConfig" . | fromYaml).applications).args }}
{{- end }}

{{/* Whether Serve listens for HTTP: "true" or nothing. */}}
{{- define "dspark.http" -}}
{{- if ne (default "EveryNode" (include "dspark.serveConfig" . | fromYaml).proxy_location) "Disabled" }}true{{ end }}
{{- end }}

{{- define "dspark.httpScheme" -}}
{{ ternary "https" "http" (not (empty .Values.tls.client.existingSecret)) }}
{{- end }}

{{/* Whether there is a Service for that: "true" or nothing. */}}
{{- define "dspark.httpService" -}}
{{- if .Values.service.http.enabled }}{{ include "dspark.http" . }}{{ end }}
{{- end }}

{{- define "dspark.httpPort" -}}
{{- $options := default dict (include "dspark.serveConfig" . | fromYaml).http_options }}
{{- default 8000 $options.port | int }}
{{- end }}

{{- define "dspark.grpcPort" -}}
{{- $router := default dict (include "dspark.args" . | fromYaml).router }}
{{- $port := int (ternary $router.port 50051 (hasKey $router "port")) }}
{{- if not $port }}
  {{- fail "config.router.port: pods and Services need a fixed port, got 0" }}
{{- end }}
{{- $port }}
{{- end }}

{{/* The routers' own port for Prometheus, or nothing. */}}
{{- define "dspark.metricsPort" -}}
{{- $port := int (default 0 (default dict (include "dspark.args" . | fromYaml).router).metrics_port) }}
{{- if $port }}{{ $port }}{{ end }}
{{- end }}

{{/* `first` and `last` of the ports that drafters draft on; 0: any. */}}
{{- define "dspark.drafterPorts" -}}
{{- $drafter := default dict (include "dspark.args" . | fromYaml).drafter }}
{{- $first := int (default 0 $drafter.port) }}
first: {{ $first }}
last: {{ sub (add $first (int (default 64 $drafter.num_ports))) 1 }}
{{- end }}

{{/* `args.security`, out of the Secrets that pods mount. */}}
{{- define "dspark.security" -}}
{{- with .Values.tls.client }}
{{- if .existingSecret }}
client_tls:
  cert_file: /etc/dspark/client-tls/tls.crt
  key_file: /etc/dspark/client-tls/tls.key
  {{- if .requireClientCertificate }}
  client_ca_file: /etc/dspark/client-tls/ca.crt
  {{- end }}
{{- end }}
{{- end }}
{{- with .Values.tls.internal }}
{{- if .existingSecret }}
internal_tls:
  cert_file: /etc/dspark/internal-tls/tls.crt
  key_file: /etc/dspark/internal-tls/tls.key
  ca_file: /etc/dspark/internal-tls/ca.crt
  server_name: {{ .serverName | quote }}
{{- end }}
{{- end }}
{{- if .Values.apiKeys.existingSecret }}
api_keys_file: /etc/dspark/api-keys/keys
{{- end }}
{{- end }}
