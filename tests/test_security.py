"""API keys, their limits, watched files and what is counted: without any connection."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.errors import ConfigError, QueueFullError, UnauthenticatedError
from cluster.rpc.credentials import Credentials
from cluster.rpc.tls import HandshakeCount
from cluster.security.api_keys import ApiKey, hash_key, make_key, read_keys
from cluster.security.authenticator import ANYBODY, Authenticator
from cluster.security.certificates import CertificateFiles
from cluster.security.key_limits import KeyLimits
from cluster.security.refusals import LOG_INTERVAL_S, Refusal, Refusals
from cluster.security.watched_file import LOOK_INTERVAL_S, WatchedFiles
from tests.certificates import Authority


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write_keys(path: Path, *entries: dict[str, object]) -> str:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return str(path)


def entry(name: str, key: str, **limits: object) -> dict[str, object]:
    return {"name": name, "sha256": hash_key(key), **limits}


# ------------------------------------------------------------------------------------------ keys


def test_the_command_makes_a_key_that_its_entry_knows(tmp_path, capsys) -> None:
    assert cli.main(["keys", "create", "a", "--max-queued-tokens", "9", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"] not in json.dumps(made["entry"])
    found = Authenticator(write_keys(tmp_path / "keys", made["entry"]))
    key = found.authenticate(f"Bearer {made['key']}")
    assert (key.name, key.max_queued_tokens, key.requests_per_second) == ("a", 9, None)
    assert cli.main(["keys", "create", "a"]) == 0
    assert yaml.safe_load(capsys.readouterr().out.partition("api_keys_file:")[2])[0]["name"] == "a"


def test_keys_are_long_and_each_is_another() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= 50 for key in keys)


@pytest.mark.parametrize("arguments", [["a b"], [""], ["a", "--requests-per-second", "0"]])
def test_a_key_that_the_file_may_not_hold_is_not_made(arguments, capsys) -> None:
    assert cli.main(["keys", "create", *arguments]) == 2
    assert "dspark_" not in capsys.readouterr().out


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic dspark_x", "dspark_x"])
def test_no_key(tmp_path, header) -> None:
    authenticator = Authenticator(write_keys(tmp_path / "keys", entry("a", "dspark_x")))
    with pytest.raises(UnauthenticatedError, match="an API key is needed"):
        authenticator.authenticate(header)
    assert authenticator.refusals.counts["no_key"] == 1


def test_an_unknown_key_is_counted_and_never_quoted(tmp_path, caplog) -> None:
    path = write_keys(tmp_path / "keys", entry("a", "dspark_right"), entry("b", "dspark_other"))
    authenticator = Authenticator(path)
    assert authenticator.authenticate("bearer dspark_other").name == "b"
    for wrong in ("dspark_wrong", "dspark_righ", "dspark_right\ud800", hash_key("dspark_right")):
        with pytest.raises(UnauthenticatedError) as caught:
            authenticator.authenticate(f"Bearer {wrong}", "1.2.3.4:5")
        assert wrong not in str(caught.value)
    assert authenticator.refusals.counts["unknown_key"] == 4
    assert "unknown_key" in caplog.text
    assert "1.2.3.4:5" in caplog.text
    assert "dspark_" not in caplog.text


def test_without_a_file_everybody_may_call() -> None:
    assert Authenticator().authenticate(None) is ANYBODY


def test_keys_are_read_again_and_a_broken_file_changes_nothing(tmp_path, caplog) -> None:
    path = tmp_path / "keys"
    authenticator = Authenticator(write_keys(path, entry("a", "dspark_a")))
    clock = Clock()
    authenticator._keys._clock = clock  # type: ignore[union-attr]
    clock.now = 1e9

    def is_known(key: str) -> bool:
        clock.now += LOOK_INTERVAL_S
        try:
            authenticator.authenticate(f"Bearer {key}")
        except UnauthenticatedError:
            return False
        return True

    assert is_known("dspark_a")
    new = tmp_path / "new"
    write_keys(new, entry("b", "dspark_b"))
    os.replace(new, path)
    assert is_known("dspark_b")
    assert not is_known("dspark_a")
    path.write_text("keys: [{name: c, sha256: dspark_secret}]")
    for _ in range(3):
        assert is_known("dspark_b")
    path.unlink()
    assert is_known("dspark_b")
    stays = [r.getMessage() for r in caplog.records if "stay as they are" in r.getMessage()]
    assert len(stays) == 2
    assert "dspark_secret" not in caplog.text
    write_keys(path, entry("c", "dspark_c"))
    assert is_known("dspark_c")


HASH = "a" * 64
BAD_FILES = {
    "keys": "[]",
    "not YAML": "keys: [",
    "keys.0.name": "keys: [{sha256: " + HASH + "}]",
    "keys.0.sha256": "keys: [{name: a, sha256: dspark_plain}]",
    "keys.0.max_queued": "keys: [{name: a, max_queued: 3, sha256: " + HASH + "}]",
    "same name": "keys: [" + ", ".join(f"{{name: a, sha256: '{d * 64}'}}" for d in "01") + "]",
    "same sha256": "keys: ["
    + ", ".join(f"{{name: {n}, sha256: '{'0' * 64}'}}" for n in "ab")
    + "]",
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_key_file_is_named_and_not_quoted(tmp_path, what) -> None:
    path = tmp_path / "keys"
    path.write_text(BAD_FILES[what])
    with pytest.raises(ConfigError) as caught:
        read_keys(str(path))
    assert str(path) in str(caught.value)
    assert (what if what != "keys" else "mapping") in str(caught.value)
    assert "dspark_plain" not in str(caught.value)


def test_a_key_is_in_no_representation() -> None:
    assert "hidden" not in repr(Credentials("hidden"))
    assert "0" * 64 not in repr(ApiKey(name="a", sha256="0" * 64))


def test_credentials_from_the_environment(tmp_path) -> None:
    assert Credentials.from_environment({}) == Credentials()
    assert Credentials.from_environment({"DSPARK_API_KEY": "k"}).metadata == (
        ("authorization", "Bearer k"),
    )
    ca_file = Authority(tmp_path, "ca").ca_file
    found = Credentials.from_environment({"DSPARK_TLS_CA_FILE": ca_file})
    assert found.tls is not None
    with pytest.raises(ConfigError, match=r"client\.ca_file"):
        Credentials.from_environment({"DSPARK_TLS_CA_FILE": str(tmp_path / "none")})


# ---------------------------------------------------------------------------------------- limits


def limited(**limits: object) -> ApiKey:
    return ApiKey.model_validate({"name": "a", "sha256": "0" * 64, **limits})


@pytest.mark.parametrize("num_routers", [1, 2, 3, 7])
def test_limits_over_all_routers_are_within_their_bound(num_routers) -> None:
    key = limited(max_concurrent_requests=10, max_queued_tokens=1000, requests_per_second=20)
    clock = Clock()
    routers = [KeyLimits(clock=clock) for _ in range(num_routers)]
    for router in routers:
        router.set_num_routers(num_routers)
    num_running = num_tokens = 0
    for router in routers:
        while True:
            try:
                call = router.begin(key)
            except QueueFullError:
                break
            call.__enter__()
            num_running += 1
            try:
                while True:
                    call.take_tokens(7)
                    num_tokens += 7
            except QueueFullError:
                pass
    assert 10 <= num_running <= 10 + num_routers - 1
    assert num_tokens <= 1000 + num_routers - 1
    assert num_tokens > 1000 - 7 * num_routers


def fill(router: KeyLimits, key: ApiKey) -> int:
    """Begins as many calls as the router allows."""
    num_running = 0
    with suppress(QueueFullError):
        while True:
            router.begin(key).__enter__()
            num_running += 1
    return num_running


def test_what_runs_comes_on_top_when_routers_change() -> None:
    """As docs/security.md says, with these numbers."""
    key = limited(max_concurrent_requests=100)

    def routers(number: int, known: int) -> list[KeyLimits]:
        made = [KeyLimits() for _ in range(number)]
        for router in made:
            router.set_num_routers(known)
        return made

    draining, new = routers(2, 2), routers(2, 2)
    assert sum(fill(router, key) for router in draining + new) == 200
    (first,), added = routers(1, 1), routers(3, 4)
    num_running = fill(first, key)
    first.set_num_routers(4)
    assert num_running + sum(fill(router, key) for router in (first, *added)) == 175


@pytest.mark.parametrize("num_routers", [1, 2, 5])
def test_the_rate_over_all_routers_is_within_its_bound(num_routers) -> None:
    key = limited(requests_per_second=4)
    clock = Clock()
    routers = [KeyLimits(clock=clock) for _ in range(num_routers)]
    for router in routers:
        router.set_num_routers(num_routers)
    num_begun, seconds, longest_s = 0, 50, 0.0
    for _ in range(seconds * 100):
        clock.now += 0.01
        for router in routers:
            try:
                with router.begin(key):
                    num_begun += 1
            except QueueFullError as error:
                longest_s = max(longest_s, error.retry_after_s)
    assert 0 < longest_s <= num_routers / 4
    assert 4 * seconds <= num_begun + num_routers  # no less than the limit, but for the rounding
    assert num_begun <= 4 * seconds + max(4, num_routers)


def test_a_call_that_holds_nothing_is_held_to_the_rate() -> None:
    key = limited(requests_per_second=2, max_concurrent_requests=1)
    clock = Clock()
    limits = KeyLimits(clock=clock)
    with limits.begin(key):
        limits.count(key)  # no place is asked for
        with pytest.raises(QueueFullError, match="requests a second"):
            limits.count(key)
    clock.now += 0.51
    limits.count(key)


def test_the_delay_of_a_refusal_is_long_enough() -> None:
    key = limited(requests_per_second=0.5)
    clock = Clock()
    limits = KeyLimits(clock=clock)
    with limits.begin(key):
        pass
    with pytest.raises(QueueFullError, match=r"0\.5 requests a second") as caught:
        limits.begin(key)
    assert caught.value.retry_after_s == pytest.approx(2.0)
    clock.now += caught.value.retry_after_s + 1e-6
    with limits.begin(key):
        pass


def test_a_call_gives_back_what_it_took() -> None:
    refusals = Refusals()
    limits = KeyLimits(refusals)
    key, other = limited(max_concurrent_requests=1, max_queued_tokens=10), limited(name="b")
    for _ in range(3):
        with suppress(RuntimeError), limits.begin(key) as call:
            call.take_tokens(10)
            assert limits.in_use(key) == (1, 10)
            with pytest.raises(QueueFullError):
                call.take_tokens(1)
            with pytest.raises(QueueFullError):
                limits.begin(key)
            with limits.begin(other) as second:
                second.take_tokens(10**9)
            raise RuntimeError("broke")
    assert limits.in_use(key) == (0, 0)
    assert refusals.counts["queued_tokens"] == 3
    assert refusals.counts["concurrency"] == 3


# ------------------------------------------------------------------------------------ small parts


def test_refusals_are_counted_one_by_one_and_logged_now_and_then(caplog) -> None:
    clock = Clock()
    refusals = Refusals(clock)
    for index in range(1000):
        refusals.count(Refusal.NO_KEY, f"peer {index}")
    assert refusals.counts["no_key"] == 1000
    assert len(caplog.records) == 1
    clock.now += LOG_INTERVAL_S
    refusals.count(Refusal.NO_KEY, "last")
    assert "last; 1000 since" in caplog.records[1].getMessage()


def test_connections_without_a_call_are_counted_when_their_time_is_over() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    handshakes = HandshakeCount(refusals, clock)
    for _ in range(5):
        handshakes.begin()
    for _ in range(4):
        handshakes.called_from("a:1")
    handshakes.called_from("a:2")
    clock.now += 9.9
    handshakes.settle()
    assert refusals.counts["handshake"] == 0
    clock.now += 0.2
    handshakes.begin()
    assert refusals.counts["handshake"] == 3


def test_watched_files_look_no_oftener_than_they_should(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    clock = Clock()
    watched = WatchedFiles([str(path)], path.read_text, on_error=print, clock=clock)
    path.write_text("22")
    assert watched.get() == "1"
    clock.now += LOOK_INTERVAL_S
    assert watched.get() == "22"


def test_certificates_that_cannot_be_used_name_their_key(tmp_path) -> None:
    authority = Authority(tmp_path, "ca")
    one, two = authority.sign("a"), authority.sign("a")
    files = {"cert_file": one.cert_file, "key_file": one.key_file, "ca_file": authority.ca_file}
    CertificateFiles("s", **files)
    text = tmp_path / "text"
    text.write_text("no PEM")
    for name, path, key in (
        ("cert_file", "/nowhere", "cert_file"),
        ("key_file", "/nowhere", "key_file"),
        ("key_file", two.key_file, "cert_file"),
        ("cert_file", str(text), "cert_file"),
        ("ca_file", str(text), "ca_file"),
    ):
        with pytest.raises(ConfigError) as caught:
            CertificateFiles("s", **{**files, name: path})
        assert caught.value.key == f"s.{key}"
    shown = repr(CertificateFiles("s", **files).get())
    assert "BEGIN" not in shown


def test_up_says_at_once_that_it_would_not_be_let_in(tmp_path, monkeypatch) -> None:
    from cluster.cli.running import check_credentials
    from cluster.config import ClusterConfig

    monkeypatch.delenv("DSPARK_API_KEY", raising=False)
    write_keys(tmp_path / "keys", entry("a", "dspark_a"))
    document = {"target": {"model": "m"}, "security": {"api_keys_file": "keys"}}
    config = ClusterConfig.parse(document, base_dir=tmp_path)
    assert config.security.api_keys_file == str(tmp_path / "keys")
    with pytest.raises(ConfigError, match="DSPARK_API_KEY"):
        check_credentials(config)
    monkeypatch.setenv("DSPARK_API_KEY", "dspark_b")
    with pytest.raises(UnauthenticatedError):
        check_credentials(config)
    monkeypatch.setenv("DSPARK_API_KEY", "dspark_a")
    check_credentials(config)
