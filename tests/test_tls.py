"""TLS and API keys on real sockets: who gets in, who does not, and what is left in the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.config import ClientTlsConfig, DrafterConfig, InternalTlsConfig
from cluster.errors import (
    ClusterStateError,
    DsparkError,
    InvalidRequestError,
    QueueFullError,
    UnauthenticatedError,
)
from cluster.rpc.channels import PROTOCOL_VERSION
from cluster.rpc.client import AsyncClient, Client
from cluster.rpc.credentials import Credentials
from cluster.rpc.drafter_client import GrpcDraftClient
from cluster.rpc.drafter_server import DrafterServer
from cluster.rpc.replica_server import ReplicaServer
from cluster.rpc.router import RouterServer
from cluster.rpc.tls import ChannelTls, InternalTls, client_server_tls, internal_tls
from cluster.security import watched_file
from cluster.security.authenticator import Authenticator
from cluster.security.certificates import CertificateFiles
from cluster.security.refusals import Refusals
from cluster.v1 import drafter_pb2, drafter_pb2_grpc, replica_pb2, replica_pb2_grpc
from tests.certificates import Authority, Pem
from tests.draft_helpers import VOCAB, make_drafter, make_engine
from tests.drafter_rpc_tools import DIGESTS, SPECULATIVE
from tests.fakes import FakeEngineLoop
from tests.rpc_tools import MAX_MODEL_LEN, TOKENIZER, VOCAB_SIZE, expected, until
from tests.test_security import entry, write_keys

KEY = "dspark_a-key-that-must-not-be-logged"
WORDS = "secret words"
INTERNAL, ROUTER = "dspark-internal", "router.example"


@dataclass
class Secured:
    """A router, a replica and a drafter, all with TLS, and what is needed to get at them."""

    folder: Path
    ours: Authority
    clients: Authority
    certificate: Pem
    router: RouterServer
    loop: FakeEngineLoop
    refusals: Refusals
    internal: InternalTls
    router_address: str
    replica_address: str
    drafter_address: str

    def credentials(self, api_key: str = KEY, **files: str | None) -> Credentials:
        """A client's; the authority of the router's certificate, unless ``files`` say else."""
        given: dict[str, Any] = {"ca_file": self.clients.ca_file, **files}
        return Credentials(api_key, ChannelTls(CertificateFiles("client", **given), ROUTER))


@asynccontextmanager
async def secured(
    folder: Path, *, client_ca: bool = False, **limits: Any
) -> AsyncIterator[Secured]:
    ours, clients = Authority(folder, "internal"), Authority(folder, "clients")
    certificate = ours.sign(INTERNAL)
    door = clients.sign(ROUTER)
    refusals = Refusals()
    internal = internal_tls(
        InternalTlsConfig(
            cert_file=certificate.cert_file, key_file=certificate.key_file, ca_file=ours.ca_file
        ),
        refusals,
    )
    client_tls = ClientTlsConfig(
        cert_file=door.cert_file,
        key_file=door.key_file,
        client_ca_file=clients.ca_file if client_ca else None,
    )
    keys = write_keys(folder / "keys", entry("a", KEY, **limits))
    router = RouterServer(
        tokenizer=TOKENIZER,
        model_name="fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        authenticator=Authenticator(keys, refusals),
        tls=client_server_tls(client_tls, refusals),
        replica_tls=internal.channel,
    )
    replica = ReplicaServer(
        "r", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, tls=internal.server
    )
    loop = FakeEngineLoop(replica.on_outputs)
    drafter = DrafterServer(
        make_engine(make_drafter()),
        drafter_id="d0",
        digests=DIGESTS,
        config=DrafterConfig(),
        tls=internal.server,
    )
    loop.start()
    found = Secured(
        folder,
        ours,
        clients,
        certificate,
        router,
        loop,
        refusals,
        internal,
        f"127.0.0.1:{await router.start('127.0.0.1')}",
        f"127.0.0.1:{await replica.start(loop, '127.0.0.1')}",
        f"127.0.0.1:{await drafter.start('127.0.0.1')}",
    )
    router.set_replicas([("r", found.replica_address)])
    try:
        yield found
    finally:
        await router.stop()
        await replica.stop()
        await drafter.drain(0.1)
        await asyncio.to_thread(loop.stop)


async def complete(address: str, credentials: Credentials) -> list[int]:
    async with AsyncClient(address, credentials=credentials) as client:
        (done,) = await client.complete([7], max_tokens=5)
        return list(done.token_ids)


async def code_of(call: Any) -> grpc.StatusCode:
    """What a call with nothing to send, or its first answer, ends with."""
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_with_key_and_certificates_everything_works(tmp_path) -> None:
    async with secured(tmp_path) as cluster:
        credentials = cluster.credentials()
        assert await complete(cluster.router_address, credentials) == expected([7], 5)
        client = GrpcDraftClient(
            replica_id="r",
            digests=DIGESTS,
            vocab_size=VOCAB,
            config=SPECULATIVE,
            tls=cluster.internal.channel,
        )
        client.set_drafters([("d0", cluster.drafter_address)])
        await until(client.is_ready)
        await asyncio.to_thread(client.close)

        def blocking() -> str:
            with Client(cluster.router_address, credentials=credentials) as client:
                return client.status().model

        assert await asyncio.to_thread(blocking) == "fake"


async def test_strangers_at_the_clients_door(tmp_path) -> None:
    async with secured(tmp_path) as cluster:
        other = Authority(tmp_path, "other")
        for credentials in (
            Credentials(KEY),  # plaintext
            cluster.credentials(ca_file=other.ca_file),  # the router is a stranger to this client
        ):
            with pytest.raises(ClusterStateError):
                await complete(cluster.router_address, credentials)
        for key, reason in (("", "no_key"), (f"{KEY}x", "unknown_key"), (KEY[:-1], "unknown_key")):
            before = cluster.refusals.counts[reason]
            with pytest.raises(UnauthenticatedError):
                await complete(cluster.router_address, cluster.credentials(key))
            assert cluster.refusals.counts[reason] == before + 1
        async with AsyncClient(
            cluster.router_address, credentials=cluster.credentials("")
        ) as client:
            with pytest.raises(UnauthenticatedError):
                await client.status()
        assert cluster.loop.submitted == []
        # Probes and tools need no key.
        tls = cluster.credentials().tls
        assert tls is not None
        async with aio.secure_channel(
            cluster.router_address, tls.credentials(), options=tls.options()
        ) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            listing = reflection_pb2.ServerReflectionRequest(list_services="")
            async for reply in stub.ServerReflectionInfo(iter([listing])):
                assert reply.list_services_response.service


async def test_clients_with_certificates(tmp_path) -> None:
    async with secured(tmp_path, client_ca=True) as cluster:
        other = Authority(tmp_path, "other")
        mine = cluster.clients.sign("somebody")
        good = cluster.credentials(cert_file=mine.cert_file, key_file=mine.key_file)
        assert await complete(cluster.router_address, good) == expected([7], 5)
        for pem in (
            None,
            other.sign("somebody"),
            cluster.ours.sign("somebody"),
            cluster.clients.sign("somebody", lasts=timedelta(days=-1)),
        ):
            files = {} if pem is None else {"cert_file": pem.cert_file, "key_file": pem.key_file}
            with pytest.raises(ClusterStateError):
                await complete(cluster.router_address, cluster.credentials(**files))
        # A certificate alone is not enough.
        with pytest.raises(UnauthenticatedError):
            await complete(
                cluster.router_address,
                cluster.credentials("", cert_file=mine.cert_file, key_file=mine.key_file),
            )


async def hello(address: str, kind: str, tls: ChannelTls | None) -> Any:
    """The first answer of an internal service."""
    channel = (
        aio.insecure_channel(address)
        if tls is None
        else aio.secure_channel(address, tls.credentials(), options=tls.options())
    )
    async with channel:
        if kind == "replica":
            call = replica_pb2_grpc.ReplicaServiceStub(channel).Connect()
            first: Any = replica_pb2.ConnectRequest(
                hello=replica_pb2.ConnectRequest.Hello(
                    router_id="x", protocol_version=PROTOCOL_VERSION
                )
            )
        else:
            call = drafter_pb2_grpc.DrafterServiceStub(channel).Feed()
            first = drafter_pb2.FeedRequest(
                hello=drafter_pb2.FeedRequest.Hello(
                    replica_id="x", protocol_version=PROTOCOL_VERSION
                )
            )
        with suppress(asyncio.InvalidStateError):  # then reading says why
            await call.write(first)
        return await call.read()


@pytest.mark.parametrize("kind", ["replica", "drafter"])
async def test_internal_ports_are_for_the_cluster_only(tmp_path, kind, monkeypatch) -> None:
    monkeypatch.setattr("cluster.security.refusals.LOG_INTERVAL_S", 0.0)
    async with secured(tmp_path) as cluster:
        address = getattr(cluster, f"{kind}_address")

        def tls(pem: Pem | None, ca_file: str = cluster.ours.ca_file) -> ChannelTls:
            files = {} if pem is None else {"cert_file": pem.cert_file, "key_file": pem.key_file}
            return ChannelTls(CertificateFiles("x", ca_file=ca_file, **files), INTERNAL)

        assert (await hello(address, kind, tls(cluster.certificate))).HasField("welcome")
        before = cluster.refusals.counts["wrong_peer"]
        for stranger in (
            None,  # plaintext
            tls(None),
            tls(cluster.clients.sign("client")),  # a good client certificate
            tls(cluster.clients.sign(INTERNAL)),
            tls(cluster.ours.sign(INTERNAL, lasts=timedelta(days=-1))),
        ):
            assert await code_of(hello(address, kind, stranger)) is grpc.StatusCode.UNAVAILABLE
        assert cluster.refusals.counts["wrong_peer"] == before
        # One authority for all is no way in either: the name decides.
        same_authority = tls(cluster.ours.sign("client"))
        code = await code_of(hello(address, kind, same_authority))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert cluster.refusals.counts["wrong_peer"] == before + 1
        # Nor does the cluster talk to somebody who is not of it.
        impostor = ChannelTls(CertificateFiles("x", ca_file=cluster.clients.ca_file), INTERNAL)
        assert await code_of(hello(address, kind, impostor)) is grpc.StatusCode.UNAVAILABLE
        # What came to nothing is counted when its time is over: five strangers, one impostor.
        tls_server = cluster.internal.server
        assert tls_server is not None
        now = tls_server.handshakes._clock()
        tls_server.handshakes._clock = lambda: now + 11
        tls_server.handshakes.settle()
        assert cluster.refusals.counts["handshake"] >= 6


async def test_certificates_change_without_a_restart(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(watched_file, "LOOK_INTERVAL_S", 0.0)
    async with secured(tmp_path) as cluster:
        credentials = cluster.credentials()
        streaming = AsyncClient(cluster.router_address, credentials=credentials)
        stream = streaming.generate([7], max_tokens=300)
        await anext(stream)
        # Another authority for the cluster's own connections, as after a leak.
        fresh = Authority(tmp_path, "fresh")
        fresh.sign(INTERNAL, to=cluster.certificate)
        old_ca = Path(cluster.ours.ca_file).read_bytes()
        (tmp_path / "old-ca.pem").write_bytes(old_ca)
        leaked = cluster.ours.sign(INTERNAL)
        Path(cluster.ours.ca_file).write_bytes(Path(fresh.ca_file).read_bytes())
        # Who connects now is known by the new one, and the old one does not help any more.
        new = ChannelTls(
            CertificateFiles(
                "x",
                cert_file=cluster.certificate.cert_file,
                key_file=cluster.certificate.key_file,
                ca_file=fresh.ca_file,
            ),
            INTERNAL,
        )
        assert (await hello(cluster.replica_address, "replica", new)).HasField("welcome")
        stale = CertificateFiles(
            "x",
            cert_file=leaked.cert_file,
            key_file=leaked.key_file,
            ca_file=str(tmp_path / "old-ca.pem"),
        )
        code = await code_of(hello(cluster.replica_address, "replica", ChannelTls(stale, INTERNAL)))
        assert code is grpc.StatusCode.UNAVAILABLE
        # The router's own stream to the replica lives on, and a new one is made with the new files.
        tokens = [token async for chunk in stream for token in chunk.token_ids]
        assert len(tokens) >= 290
        cluster.router.set_replicas([])
        cluster.router.set_replicas([("r2", cluster.replica_address)])
        assert await complete(cluster.router_address, credentials) == expected([7], 5)
        await streaming.close()


async def test_limits_of_a_key_end_calls_with_a_delay(tmp_path) -> None:
    async with secured(tmp_path, max_concurrent_requests=2, max_queued_tokens=250) as cluster:
        async with AsyncClient(cluster.router_address, credentials=cluster.credentials()) as client:
            with pytest.raises(QueueFullError, match="250 queued tokens") as caught:
                await client.complete([1], max_tokens=250)
            assert caught.value.retry_after_s > 0
            streams = [client.generate([1], max_tokens=100) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            with pytest.raises(QueueFullError, match="2 requests at a time"):
                await client.complete([1], max_tokens=1)
            for stream in streams:
                await stream.aclose()
            await until(lambda: cluster.router.num_active_requests == 0)
            assert len(await client.complete([1], max_tokens=1)) == 1
        assert cluster.refusals.counts["queued_tokens"] == 1
        assert cluster.refusals.counts["concurrency"] == 1


async def test_nothing_secret_is_logged_at_debug(tmp_path, caplog, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="grpc")
    async with secured(tmp_path, requests_per_second=2) as cluster:
        wrong = "dspark_wrong-but-somebody-elses"
        async with AsyncClient(cluster.router_address, credentials=cluster.credentials()) as client:
            await client.complete(WORDS, max_tokens=5)
            for index in range(3):
                with suppress(QueueFullError):
                    await client.complete(WORDS, max_tokens=5, request_id=f"r{index}")
            await asyncio.sleep(1.0)  # the rate allows the next one then
            with pytest.raises(InvalidRequestError, match="max_tokens"):
                await client.complete(WORDS, max_tokens=-1)
        with pytest.raises(UnauthenticatedError):
            await complete(cluster.router_address, cluster.credentials(wrong))
        for stranger in (Credentials(KEY), cluster.credentials(ca_file=cluster.ours.ca_file)):
            with pytest.raises(ClusterStateError):
                await complete(cluster.router_address, stranger)
        cluster.loop._error_at = lambda request, index: RuntimeError(f"broke at {WORDS}")
        async with AsyncClient(cluster.router_address, credentials=cluster.credentials()) as client:
            await asyncio.sleep(1.0)
            with pytest.raises(DsparkError, match="internal error"):
                await client.complete(WORDS, max_tokens=5)
        private = Path(cluster.certificate.key_file).read_text().splitlines()[1]
        public = Path(cluster.certificate.cert_file).read_text().splitlines()[1]
    output = capfd.readouterr()
    logged = caplog.text + output.out + output.err
    assert "unknown_key" in logged
    assert "request_rate" in logged
    for secret in (KEY, wrong, WORDS, private, public, "BEGIN"):
        assert secret not in logged, secret
