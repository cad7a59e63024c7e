"""Traces: what becomes of one request in router, replica and drafter, for OpenTelemetry.

A span's place travels as W3C Trace Context (``traceparent``) in gRPC metadata, HTTP headers and in
our own messages. Where tracing is off, a span does nothing but hand its parent's place on.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

# Where the call that the running task serves has its place, if its client says so.
incoming_traceparent: ContextVar[str] = ContextVar("incoming_traceparent", default="")

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_provider: TracerProvider | None = None


def start(endpoint: str, *, service: str, instance: str, sample_ratio: float = 1.0) -> None:
    """Has this process send its spans to an OTLP endpoint, over gRPC and in the background.

    Args:
        endpoint: ``http://host:port``, or ``https:`` with TLS.
        service: as the spans' ``service.name``.
        instance: as their ``service.instance.id``.
        sample_ratio: of requests whose client does not say; who says so decides.

    Raises:
        ConfigError: the extra ``tracing`` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("tracing", f"needs the extra `tracing`: {error}") from None
    exporter = OTLPSpanExporter(endpoint=endpoint)
    start_with(
        BatchSpanProcessor(exporter),
        service=service,
        instance=instance,
        sample_ratio=sample_ratio,
    )


def start_with(
    processor: SpanProcessor, *, service: str, instance: str = "", sample_ratio: float = 1.0
) -> None:
    """As ``start``, with what takes the spans."""
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    global _provider
    stop()
    resource = Resource.create({"service.name": service, "service.instance.id": instance})
    _provider = TracerProvider(
        resource=resource, sampler=ParentBasedTraceIdRatio(sample_ratio), shutdown_on_exit=False
    )
    _provider.add_span_processor(processor)


def stop() -> None:
    """Sends what is left; nothing is traced behind that."""
    global _provider
    provider, _provider = _provider, None
    if provider is not None:
        provider.shutdown()


class Span:
    """One part of a request; a context manager that ends with it.

    Args:
        name: what it is.
        parent: the place of the span it is in, or empty; what is no ``traceparent`` is as empty.
        is_server: it answers a client of the cluster.
        attributes: what is known at its beginning.

    Attributes:
        traceparent: its place, for the spans within; empty where nothing is traced.
    """

    def __init__(
        self, name: str, parent: str = "", *, is_server: bool = False, **attributes: Any
    ) -> None:
        parent = parent if _TRACEPARENT.fullmatch(parent) else ""
        self.traceparent = parent
        self._span: Any = None
        if _provider is None:
            return
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        self._span = _provider.get_tracer("dspark-cluster").start_span(
            name,
            context=propagator.extract({"traceparent": parent}, context=Context()),
            kind=SpanKind.SERVER if is_server else SpanKind.INTERNAL,
            attributes=_named(attributes),
        )
        place = self._span.get_span_context()
        self.traceparent = (
            f"00-{place.trace_id:032x}-{place.span_id:016x}-{int(place.trace_flags):02x}"
        )

    @property
    def is_recorded(self) -> bool:
        """Whether anybody will see it."""
        return self._span is not None and bool(self._span.is_recording())

    def set(self, **attributes: Any) -> None:
        """Adds what is known now; ``__`` in a name stands for a dot."""
        if self._span is not None:
            self._span.set_attributes(_named(attributes))

    def end(self, error: BaseException | None = None) -> None:
        """The part is over; with ``error`` it has failed. The error's text is left out, since it
        may quote a prompt."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, type(error).__name__)
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end(exc_value)


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("__", "."): value for name, value in attributes.items()}
