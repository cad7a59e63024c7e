"""The clients' door: ``InferenceService`` over the target replicas."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

from grpc import aio
from transformers import PreTrainedTokenizerFast

import cluster
from cluster.chat.template import ChatTemplate
from cluster.engine.grammar import GrammarCompiler
from cluster.engine.vocabulary import Vocabulary
from cluster.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestCancelledError,
    RouterStoppingError,
)
from cluster.grammar import Grammar
from cluster.metrics.router import RouterMetrics, RouterState
from cluster.request import Priority, Request
from cluster.routing.admission import Admission, Admitted
from cluster.routing.replica_choice import ChoicePolicy
from cluster.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES, server_options
from cluster.rpc.convert import GenerateCall
from cluster.rpc.generation import Generation
from cluster.rpc.guard import Guard, key_check
from cluster.rpc.inference_service import InferenceService
from cluster.rpc.prompt import PromptEncoder, kept_tokens
from cluster.rpc.replica_pool import ReplicaPool
from cluster.rpc.serving import ServingState, bind
from cluster.rpc.siblings import Siblings
from cluster.rpc.tls import ChannelTls, ServerTls
from cluster.security.api_keys import ApiKey
from cluster.security.authenticator import ANYBODY, Authenticator
from cluster.security.key_limits import KeyLimits
from cluster.tracing import Span, incoming_traceparent
from cluster.v1 import inference_pb2, inference_pb2_grpc

SERVICE_NAME = "cluster.v1.InferenceService"
MAX_CONNECTION_IDLE_S = 600.0
FLUSH_TIMEOUT_S = 0.5  # for what is written already when the server stops

logger = logging.getLogger(__name__)


class RouterServer:
    """Takes clients' requests and runs them on target replicas.

    Guarantees: a request is checked completely before it costs a replica anything. What is admitted
    is bounded by ``max_queued_tokens``, and what is too much is refused at once; so is what full
    replicas refuse, or leave waiting for ``queue_timeout_s``, each time with a delay for the retry.
    A client that leaves, or whose deadline passes, frees its pages. A lost replica is invisible to
    clients while another one with the same target is ready within ``wait_s``. A router says that it
    serves once a replica has been ready, so that it is sent nothing while its first ones load; from
    then on until it is stopped, since requests wait for a replica that starts anew.

    All methods belong to one event loop.

    Args:
        tokenizer: the target's.
        model_name: what clients call the target.
        vocab_size, max_model_len: the target's; replicas may lower them.
        eos_token_ids: the target's tokens that end an output.
        tokenizer_digest: hex SHA-256; replicas that name another are not used. Empty: all are.
        router_id: unique in the cluster; unset: a random one.
        num_routers: that share key limits, until ``set_routers`` says which.
        chat_template: ``chatml``, the text of a template, or ``None`` for the tokenizer's own.
        trust_request_chat_template: render templates that come with requests, in their time.
        max_queued_tokens: bound on admitted work (``Admission``).
        queue_timeout_s: a request that a replica has not begun after so long is refused; unset:
            never.
        policy: how replicas are chosen.
        wait_s: seconds that a request waits for a ready replica.
        max_message_bytes: the largest message that a client may send.
        max_connection_age_s, max_connection_age_grace_s: as in ``server_options``.
        max_metadata_bytes: the largest headers of a call.
        max_connections: of clients; further ones are closed. ``None``: any.
        max_streams: calls of one connection at a time; more wait, or are refused.
        slow_reader_timeout_s: a client that takes no chunk for so long loses its request.
        authenticator: who may call; unset: everybody.
        tls: of the clients' door; unset: plaintext.
        replica_tls: of the connections to replicas; unset: plaintext.

    Raises:
        ConfigError: the chat template cannot be used.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        model_name: str,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: Collection[int] = (),
        tokenizer_digest: str = "",
        router_id: str | None = None,
        num_routers: int = 1,
        chat_template: str | None = None,
        trust_request_chat_template: bool = False,
        max_queued_tokens: int = 1_000_000,
        queue_timeout_s: float | None = None,
        policy: ChoicePolicy | None = None,
        wait_s: float = 30.0,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        max_connection_age_s: float | None = None,
        max_connection_age_grace_s: float = 0.0,
        max_metadata_bytes: int = 16 << 10,
        max_connections: int | None = None,
        max_streams: int = 1024,
        slow_reader_timeout_s: float = 60.0,
        authenticator: Authenticator | None = None,
        tls: ServerTls | None = None,
        replica_tls: ChannelTls | None = None,
    ) -> None:
        self.authenticator = authenticator or Authenticator()
        self.key_limits = KeyLimits(self.authenticator.refusals)
        self.key_limits.set_num_routers(num_routers)
        self._tls = tls
        self.router_id = router_id or f"router-{uuid.uuid4().hex[:12]}"
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, max_model_len)
        self.chat_template = ChatTemplate(
            tokenizer, chat_template, trusts_requests=trust_request_chat_template
        )
        self.vocabulary = Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self.model_name = model_name
        self._grammars = GrammarCompiler(self.vocabulary, has_end=bool(eos_token_ids))
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self._admission = Admission(max_queued_tokens)
        self._queue_timeout_s = queue_timeout_s
        self._options = server_options(
            max_message_bytes,
            max_sent_bytes=DEFAULT_MAX_MESSAGE_BYTES,
            reuse_port=True,
            max_connection_idle_s=MAX_CONNECTION_IDLE_S,
            max_connection_age_s=max_connection_age_s,
            max_connection_age_grace_s=max_connection_age_grace_s,
            max_metadata_bytes=max_metadata_bytes,
            max_connections=max_connections,
            max_streams=max_streams,
        )
        self.slow_reader_timeout_s = slow_reader_timeout_s
        # By key and request id: nobody's id says anything of another one's request.
        self._active: dict[tuple[str, str], Generation] = {}
        self._stopping: asyncio.Task[None] | None = None
        self._announcing: asyncio.Task[None] | None = None
        self._routers: list[tuple[str, str]] = []
        self.metrics = RouterMetrics(model_name, self._metrics_state)
        self._pool = ReplicaPool(
            self.router_id,
            policy=policy,
            wait_s=wait_s,
            tokenizer_digest=tokenizer_digest,
            # Tokens may be longer than their text, and answers longer than requests.
            max_message_bytes=max(max_message_bytes, DEFAULT_MAX_MESSAGE_BYTES),
            tls=replica_tls,
        )

    @property
    def num_active_requests(self) -> int:
        """Clients' calls that have not ended."""
        return len(self._active)

    @property
    def num_queued_tokens(self) -> int:
        """Prompt tokens and most output tokens that the active requests still need."""
        return self._admission.num_queued_tokens

    @property
    def is_ready(self) -> bool:
        """Whether requests should come here; ``grpc.health.v1`` says the same."""
        return self._pool.has_been_ready.is_set() and self._stopping is None

    @property
    def max_model_len(self) -> int:
        """The context in tokens, as the ready replicas have it."""
        return self._pool.limits(self._vocab_size, self._max_model_len)[1]

    def check_fits(self, num_tokens: int, priority: Priority) -> None:
        """Checks that calls which together need so many tokens can be admitted when nothing else
        is. Raises: InvalidRequestError, which names ``prompt``."""
        self._admission.check_fits(num_tokens, priority)

    def set_replicas(self, replicas: Iterable[tuple[str, str]]) -> None:
        """Names all replicas, as (id, ``host:port``), that requests may run on from now on."""
        self._pool.set_replicas(replicas)

    def set_routers(self, routers: Iterable[tuple[str, str]]) -> None:
        """Names all routers, as (id, ``host:port``), this one among them; they share key limits."""
        self._routers = sorted(routers)
        self.key_limits.set_num_routers(len(self._routers))

    def status(self) -> inference_pb2.GetStatusResponse:
        """The cluster as the replicas' latest reports have it."""
        return inference_pb2.GetStatusResponse(
            model=self.model_name,
            router_id=self.router_id,
            replicas=self._pool.statuses(),
            num_active_requests=self.num_active_requests,
            version=cluster.__version__,
            routers=[
                inference_pb2.RouterStatus(router_id=router_id, address=address)
                for router_id, address in self._routers
            ],
        )

    async def start(self, host: str, port: int = 0) -> int:
        """Serves on ``host`` and returns the port. Raises: ConfigError.

        The port may be shared with other routers of this machine (SO_REUSEPORT).
        """
        guard = Guard(
            key_check(self.authenticator),
            handshakes=self._tls.handshakes if self._tls else None,
            refusals=self.authenticator.refusals,
        )
        self._server = aio.server(options=self._options, interceptors=[guard])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(
            InferenceService(self), self._server
        )
        self._serving = ServingState(self._server, SERVICE_NAME)
        port = bind(self._server, host, port, key="router.port", tls=self._tls)
        await self._serving.set_serving(False)
        await self._server.start()
        self._announcing = asyncio.create_task(self._announce())
        return port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no new calls, and lets running ones finish for ``grace_s``, however they came.

        What is left then ends with ``RouterStoppingError``, and other routers go on with it behind
        the tokens that its client has. Whoever calls this again waits for the first call's end.
        """
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_s))
        await asyncio.shield(self._stopping)

    async def _announce(self) -> None:
        await self._pool.has_been_ready.wait()
        await self._serving.set_serving(True)

    async def _stop(self, grace_s: float) -> None:
        if self._announcing is not None:
            self._announcing.cancel()
        await self._serving.set_serving(False)
        # Closes the port at once, and says on every connection that it takes no more calls.
        closing = asyncio.create_task(self._server.stop(grace_s + FLUSH_TIMEOUT_S))
        await self._wait_idle(grace_s)
        left = list(self._active.values())
        for generation in left:
            generation.end(self._stopping_error())
        if left:
            logger.warning("%d requests have not ended within the drain", len(left))
        await self._wait_idle(FLUSH_TIMEOUT_S)
        await self._server.stop(FLUSH_TIMEOUT_S if left else 0.0)
        await closing
        await self._pool.close()

    async def _wait_idle(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._active and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    async def generate(
        self,
        call: GenerateCall,
        timeout_s: float | None = None,
        key: ApiKey = ANYBODY,
        *,
        siblings: Siblings | None = None,
        on_admitted: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncGenerator[inference_pb2.GenerateResponse, None]:
        """Streams a call's chunks; however it is left, nothing of the call runs on.

        Args:
            timeout_s: until the call's deadline; unset: it has none.
            key: whose call it is, for its limits.
            siblings: of all choices of the client's request, where it is more than this call.
            on_admitted: awaited once it is admitted: from then on it is ours to finish.

        Raises:
            InvalidRequestError, QueueFullError: before the call costs a replica anything.
            ReplicaLostError, DeadlineExceededError: no replica could run it, or not in time.
            RouterStoppingError: this router is being stopped, or was before it was through.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with (
            self.metrics.request() as meter,
            Span("request", incoming_traceparent.get(), is_server=True) as span,
            self.key_limits.begin(key) as limited,
        ):
            request = await self._to_request(call, deadline, span.traceparent)
            span.set(
                dspark__request_id=request.request_id,
                gen_ai__request__model=self.model_name,
                gen_ai__request__temperature=request.sampling.temperature,
                gen_ai__request__max_tokens=request.sampling.max_tokens,
                gen_ai__usage__input_tokens=len(request.prompt_token_ids),
            )
            limited.take_tokens(_num_tokens(request, call.num_choices))
            generation = Generation(
                request,
                call.num_choices,
                self.tokenizer,
                self._pool,
                self.eos_token_ids,
                self._queue_timeout_s,
                siblings,
            )
            with self._admitted(generation, call.num_choices, key) as admitted:
                meter.begin(call.num_choices)
                if on_admitted is not None:
                    await on_admitted()
                async with aclosing(generation.chunks()) as chunks:
                    async for chunk in chunks:
                        admitted.advance(chunk.choice_index, len(chunk.token_ids))
                        meter.chunk(chunk)
                        yield chunk

    def check_model(self, model: str | None) -> None:
        """Raises: ModelNotFoundError: it is given, and not the one that is served."""
        if model is not None and model != self.model_name:
            raise ModelNotFoundError(
                "model", f"'{model}' is not served here; '{self.model_name}' is"
            )

    async def check_grammar(self, grammar: Grammar) -> None:
        """Compiles a grammar, beside the event loop. Raises: InvalidRequestError."""
        grammar.validate()
        await asyncio.to_thread(self._grammars.compile, grammar)

    def _stopping_error(self) -> RouterStoppingError:
        return RouterStoppingError(f"router {self.router_id} is being stopped; ask another one")

    def _metrics_state(self) -> RouterState:
        return RouterState(
            replicas=self._pool.statuses(),
            refusals=self.authenticator.refusals.counts,
            num_active_requests=self.num_active_requests,
            num_queued_tokens=self.num_queued_tokens,
            num_restarts=self._pool.num_restarts,
        )

    async def _to_request(
        self, call: GenerateCall, deadline: float | None, traceparent: str
    ) -> Request:
        """The tokenised, validated request of the first choice. Raises: InvalidRequestError."""
        kept = kept_tokens(
            call.truncate_prompt_tokens,
            max_tokens=call.sampling.max_tokens,
            max_model_len=self.max_model_len,
        )
        token_ids = await self.encoder.tokens(call.prompt, max_tokens=kept)
        vocab_size, max_model_len = self._pool.limits(self._vocab_size, self._max_model_len)
        sampling = call.sampling
        room = max_model_len - len(token_ids)
        if 0 < room < sampling.min_tokens <= sampling.max_tokens:
            raise InvalidRequestError(
                "sampling.min_tokens",
                f"must be {room} or less, got {sampling.min_tokens}: the model's context has "
                f"{max_model_len} tokens and the prompt {len(token_ids)}",
            )
        if 0 < room < sampling.max_tokens:
            sampling = replace(sampling, max_tokens=room)
        request = Request(
            request_id=call.request_id or uuid.uuid4().hex,
            prompt_token_ids=token_ids,
            sampling=sampling,
            speculation=call.speculation,
            resume_token_ids=call.resume_token_ids,
            deadline=deadline,
            attempt=call.attempt,
            priority=call.priority,
            traceparent=traceparent,
        )
        request.validate(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            eos_token_ids=self.eos_token_ids,
        )
        if sampling.grammar is not None:
            await self.check_grammar(sampling.grammar)
        return request

    @contextmanager
    def _admitted(
        self, generation: Generation, num_choices: int, key: ApiKey
    ) -> Iterator[Admitted]:
        """Holds the request's share of the queue. Raises: QueueFullError, InvalidRequestError."""
        request = generation.request
        if self._stopping is not None:
            raise self._stopping_error()
        name = (key.name, request.request_id)
        running = self._active.get(name)
        if running is not None and running.request.attempt >= request.attempt:
            raise InvalidRequestError(
                "request_id", "is in use; a retry that takes over has a higher attempt"
            )
        num_resumed = len(request.resume_token_ids)
        admitted = self._admission.admit(
            prompt_tokens=len(request.prompt_token_ids) + num_resumed,
            output_tokens=request.sampling.max_tokens - num_resumed,
            num_choices=num_choices,
            priority=request.priority,
        )
        if running is not None:
            running.end(RequestCancelledError("a later attempt of the request has begun"))
        self._active[name] = generation
        try:
            with admitted:
                yield admitted
        except QueueFullError as error:  # a replica's; how busy all are is known here
            delay_s = self._admission.retry_after_s(
                len(request.prompt_token_ids), at_least_s=error.retry_after_s
            )
            raise QueueFullError(str(error), delay_s) from None
        finally:
            if self._active.get(name) is generation:
                del self._active[name]


def _num_tokens(request: Request, num_choices: int) -> int:
    """What a request may take in all: the prompt and the longest output of every choice."""
    return num_choices * (len(request.prompt_token_ids) + request.sampling.max_tokens)
