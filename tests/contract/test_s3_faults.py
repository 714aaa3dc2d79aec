"""A real S3 server behind a proxy that breaks requests: what put_new, write_file and reads promise then, and that everything ends."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faultproxy import Answer, BlackHole, Corrupt, Dribble, Fault, FaultProxy, Late, LostAnswer, On, ResetDownload, ResetUpload, fault_proxy
from s3server import BUCKET, S3Server

from keepstep.storage.errors import StoreError, StoreForbidden, StoreFull, StoreUnavailable
from keepstep.storage.records import Attempt
from keepstep.storage.runlog import RunLog
from keepstep.storage.s3 import S3Store
from keepstep.storage.s3_client import S3Client
from keepstep.storage.store import Store
from keepstep.storage.throttle import Throttle

# A call has 1.5, 3 or 20 seconds here; what still runs after so many does not end.
pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(60)]

BODY = b'{"uuid":"0123456789abcdef","kind":"commit"}'
PART_BYTES = 5 << 20  # the least that S3 takes, so that these tests are short
LARGE_BYTES = 2 * PART_BYTES + 17
ENOUGH_S = 20.0
TWO_TRIES_S = 3.0  # where a fault takes a whole try: half of it
SHORT_S = 1.5

SLOW_DOWN = Answer.of(503, "SlowDown")
INTERNAL = Answer.of(500, "InternalError")
ERROR_DOCUMENT = Answer.of(200, "InternalError")

# What the store must get over within one call.
PASSING: dict[str, tuple[Fault, int]] = {
    "latency": (Late(0.3), 2),
    "503 storm": (SLOW_DOWN, 3),
    "500": (INTERNAL, 2),
    "reset in the request": (ResetUpload(10), 2),
    "reset in the answer": (ResetDownload(5), 2),
    "black hole": (BlackHole(), 1),
    "lost answer": (LostAnswer(), 1),
    "success with an error document": (ERROR_DOCUMENT, 1),
    "request time-out": (Answer.of(400, "RequestTimeout"), 1),
    "a page of a gateway": (Answer(502, b"<html>Bad Gateway</html>"), 1),
}
# What stays until the call has to fail, and how.
LASTING: dict[str, tuple[Fault, type[StoreError], str]] = {
    "503 storm": (SLOW_DOWN, StoreUnavailable, "tries"),
    "reset in the request": (ResetUpload(10), StoreUnavailable, "tries"),
    "black hole": (BlackHole(), StoreUnavailable, "tries"),
    "success with an error document": (ERROR_DOCUMENT, StoreUnavailable, "tries"),
    "access denied": (Answer.of(403, "AccessDenied"), StoreForbidden, "correct the credentials"),
    "token expired": (Answer.of(400, "ExpiredToken"), StoreForbidden, "correct the credentials"),
    "quota": (Answer.of(403, "QuotaExceeded"), StoreFull, "QuotaExceeded"),
    "insufficient storage": (Answer.of(507, "InsufficientStorage"), StoreFull, "InsufficientStorage"),
}


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def root(s3_server: S3Server) -> str:
    return f"{s3_server.url}/{uuid.uuid4().hex}"


def on(store: S3Store, client: S3Client) -> S3Store:
    """The store with another's connections."""
    store._client = store._quick._client = store._bulk._client = client
    return store


def connected(server: S3Server, endpoint_url: str) -> S3Client:
    """For many stores: making one takes longer than most of these tests."""
    client = S3Client(BUCKET, replace(server.options, endpoint_url=endpoint_url))
    client.run(client.filesystem.set_session(), float("inf"))
    return client


@pytest.fixture(scope="module")
def client(s3_server: S3Server, proxy: FaultProxy) -> S3Client:
    return connected(s3_server, proxy.endpoint_url)


@pytest.fixture(scope="module")
def direct_client(s3_server: S3Server) -> S3Client:
    return connected(s3_server, s3_server.endpoint_url)


@pytest.fixture
def direct(s3_server: S3Server, root: str, direct_client: S3Client) -> S3Store:
    """The same root without the proxy: what is really there."""
    store = S3Store(root.removeprefix("s3://"), s3_server.options)
    return on(store, direct_client)


@pytest.fixture
def behind(s3_server: S3Server, proxy: FaultProxy, root: str, client: S3Client) -> Callable[..., S3Store]:
    """Opens the root behind the proxy, with `deadline_s` for each call."""

    def opened(deadline_s: float, **changes: Any) -> S3Store:
        proxy.script()
        options = replace(s3_server.options, endpoint_url=proxy.endpoint_url, deadline_s=deadline_s, **changes)
        store = Store.open(root, options)
        assert isinstance(store, S3Store)
        store.part_bytes = PART_BYTES
        if not changes:
            client.throttle = Throttle(options.max_connections)
            on(store, client)
        return store

    return opened


@pytest.fixture
def store(behind: Callable[..., S3Store]) -> S3Store:
    return behind(ENOUGH_S)


@pytest.fixture
def hasty(behind: Callable[..., S3Store]) -> S3Store:
    """Gives up soon."""
    return behind(SHORT_S)


def fitting(behind: Callable[..., S3Store], fault: Fault, error: type[StoreError] | None = None) -> S3Store:
    """A store that does not take the patience of the tests to its end."""
    if error is StoreUnavailable:
        return behind(SHORT_S)
    return behind(TWO_TRIES_S if isinstance(fault, (BlackHole, Dribble)) else ENOUGH_S)


def uploads(store: S3Store) -> list[str]:
    """Keys of unfinished uploads below the root."""
    return [key for key, *_ in store._uploads("")]


class TestPutNew:
    @pytest.mark.parametrize("name", PASSING)
    def test_a_passing_fault_is_got_over_and_the_object_is_ours(
        self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, name: str
    ) -> None:
        fault, times = PASSING[name]
        store = fitting(behind, fault)
        proxy.script(On(fault, r"^PUT .*/log/0", times))
        assert store.put_new("log/0.json", BODY)
        assert proxy.seen[0][1] == fault
        assert direct.get("log/0.json") == BODY

    @pytest.mark.parametrize("fault", [LostAnswer(), BlackHole(), SLOW_DOWN, ResetUpload(10)], ids=lambda fault: type(fault).__name__)
    def test_the_loser_is_never_told_that_it_won(
        self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, fault: Fault
    ) -> None:
        store = fitting(behind, fault)
        assert direct.put_new("log/0.json", b"another's")
        proxy.script(On(fault, r"^PUT .*/log/0", 1))
        assert not store.put_new("log/0.json", BODY)
        assert direct.get("log/0.json") == b"another's"

    @pytest.mark.parametrize("name", LASTING)
    def test_a_lasting_fault_is_an_error_and_nothing_is_there(
        self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, name: str
    ) -> None:
        fault, error, message = LASTING[name]
        hasty = fitting(behind, fault, error)
        proxy.script(On(fault, r"^PUT .*/log/0"))
        with pytest.raises(error, match=message):
            hasty.put_new("log/0.json", BODY)
        assert not direct.exists("log/0.json")

    def test_answers_that_are_all_lost_leave_the_question_open_and_the_next_call_settles_it(
        self, hasty: S3Store, direct: Store, proxy: FaultProxy
    ) -> None:
        proxy.script(On(LostAnswer(), r"^PUT .*/log/0"), On(BlackHole(), r"^GET .*/log/0"))
        with pytest.raises(StoreUnavailable):
            hasty.put_new("log/0.json", BODY)
        proxy.script()
        assert hasty.put_new("log/0.json", BODY)
        assert direct.get("log/0.json") == BODY

    def test_racing_writers_on_a_bad_line_have_one_winner(self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy) -> None:
        store = behind(ENOUGH_S)
        proxy.script(
            On(LostAnswer(), r"^PUT .*/log/0", 2), On(SLOW_DOWN, r"^PUT .*/log/0", 3, skip=1), On(ResetDownload(1), r"^GET .*/log/0", 2)
        )
        with ThreadPoolExecutor(4) as pool:
            bodies = [b"writer %d" % number for number in range(4)]
            won = list(pool.map(lambda body: store.put_new("log/0.json", body), bodies))
        assert [body for body, is_won in zip(bodies, won, strict=True) if is_won] == [direct.get("log/0.json")]


class TestReading:
    @pytest.mark.parametrize("name", [*PASSING, "dribble"])
    def test_a_passing_fault_is_got_over(self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, name: str) -> None:
        fault, times = PASSING.get(name) or (Dribble(1.0), 1)
        store = fitting(behind, fault)
        direct.put("log/0.json", BODY)
        proxy.script(On(fault, r"^GET .*/log/0", times))
        assert store.get("log/0.json") == BODY

    @pytest.mark.parametrize("name", [*LASTING, "dribble", "reset in the answer"])
    def test_a_lasting_fault_is_an_error(self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, name: str) -> None:
        more = {"dribble": (Dribble(0.5), StoreUnavailable, "tries"), "reset in the answer": (ResetDownload(5), StoreUnavailable, "tries")}
        fault, error, message = (LASTING | more)[name]
        hasty = fitting(behind, fault, error)
        direct.put("log/0.json", BODY)
        proxy.script(On(fault, r"^GET .*/log/0"))
        with pytest.raises(error, match=message):
            hasty.get("log/0.json")

    @pytest.mark.parametrize(
        "fault", [ResetDownload(1000), Dribble(0.5), SLOW_DOWN, ERROR_DOCUMENT], ids=lambda fault: type(fault).__name__
    )
    def test_a_range_has_the_right_bytes(self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, fault: Fault) -> None:
        store = fitting(behind, fault)
        direct.put("data/x", bytes(range(256)) * 100)
        proxy.script(On(fault, r"^GET .*/data/x", 1))
        assert store.get_range("data/x", 256, 5000) == (bytes(range(256)) * 100)[256:5256]

    @pytest.mark.parametrize(
        "fault", [None, ResetDownload(150_000), Dribble(0.5), SLOW_DOWN, ERROR_DOCUMENT], ids=lambda fault: type(fault).__name__
    )
    def test_a_span_is_one_request_and_after_a_fault_another_one_for_the_rest(
        self, behind: Callable[..., S3Store], direct: Store, proxy: FaultProxy, fault: Fault | None
    ) -> None:
        body, memory = bytes(range(256)) * 1000, bytearray(300_000)
        store = fitting(behind, fault or SLOW_DOWN)
        direct.put("data/x", body)
        proxy.script(*([On(fault, r"^GET .*/data/x", 1)] if fault else []))
        with closing(store.open_span("data/x", 1000, 300_000)) as span:
            counts = [span.read_into(1000 + at, memoryview(memory)[at : at + 50_000]) for at in range(0, 300_000, 50_000)]
        assert counts == [50_000] * 5 + [5_000]
        assert bytes(memory[:255_000]) == body[1000:]
        assert proxy.num_seen("^GET .*/data/x") == (2 if fault else 1)

    @pytest.mark.parametrize("fault", [SLOW_DOWN, ResetDownload(20), LostAnswer()], ids=lambda fault: type(fault).__name__)
    def test_a_listing_is_whole(self, store: S3Store, direct: Store, proxy: FaultProxy, fault: Fault) -> None:
        direct.put("data/x", b"")
        direct.put("data/y", b"")
        proxy.script(On(fault, r"^GET .*list-type=2", 1))
        assert list(store.list("data")) == ["data/x", "data/y"]

    @pytest.mark.parametrize("times", [1, 1 << 30])
    def test_a_damaged_record_is_never_taken_for_another(self, store: S3Store, direct: Store, proxy: FaultProxy, times: int) -> None:
        log = RunLog.open(direct)
        log.open_term(run="r", identity="i", host="h", pid=1)
        attempt = Attempt(term=1, attempt=1, world_size=1, nodes=("a",), nonce="00")
        log.append(attempt)
        proxy.script(On(Corrupt(), r"^GET .*/log/0000000001", times))
        seen = RunLog.read_all(store)
        assert (seen.lineage.newest_attempt() == attempt) == (times == 1)
        assert bool(seen.alarms) == (times > 1)


class TestFiles:
    def blocks(self, num_bytes: int) -> list[bytes]:
        return [bytes([number]) * min(1 << 22, num_bytes - at) for number, at in enumerate(range(0, num_bytes, 1 << 22))]

    @pytest.mark.parametrize(
        "rule",
        [
            On(SLOW_DOWN, "partNumber=2", 2),
            On(ResetUpload(1 << 18), "partNumber=2", 1),
            On(LostAnswer(), "partNumber=2", 1),
            On(ERROR_DOCUMENT, "partNumber=2", 1),
            On(LostAnswer(), r"^POST .*uploadId=", 1),
            On(ERROR_DOCUMENT, r"^POST .*uploadId=", 1),
            On(INTERNAL, r"^POST .*uploads", 1),
        ],
        ids=lambda rule: f"{type(rule.fault).__name__} {rule.pattern}",
    )
    def test_a_large_file_gets_over_a_passing_fault(
        self, behind: Callable[..., S3Store], direct: S3Store, proxy: FaultProxy, rule: On
    ) -> None:
        blocks, store = self.blocks(LARGE_BYTES), behind(ENOUGH_S)
        proxy.script(replace(rule))
        store.write_file("data/x", blocks, num_bytes=LARGE_BYTES)
        assert direct.get("data/x") == b"".join(blocks)
        assert uploads(direct) == []

    @pytest.mark.parametrize("name", ["503 storm", "quota", "access denied"])
    @pytest.mark.parametrize("pattern", ["partNumber=2", r"^POST .*uploadId="])
    def test_nothing_stays_of_a_large_file_that_failed(
        self, behind: Callable[..., S3Store], direct: S3Store, proxy: FaultProxy, name: str, pattern: str
    ) -> None:
        fault, error, message = LASTING[name]
        hasty = fitting(behind, fault, error)
        proxy.script(On(fault, pattern))
        with pytest.raises(error, match=message):
            hasty.write_file("data/x", self.blocks(LARGE_BYTES), num_bytes=LARGE_BYTES)
        assert list(direct.list()) == []
        assert uploads(direct) == []

    def test_nothing_stays_of_a_file_whose_success_nobody_heard_of(self, hasty: S3Store, direct: Store, proxy: FaultProxy) -> None:
        proxy.script(On(LostAnswer(), r"^PUT .*/data/x"))
        with pytest.raises(StoreUnavailable):
            hasty.write_file("data/x", [b"abc"], num_bytes=3)
        assert list(direct.list()) == []

    def test_an_interrupted_writer_aborts_its_upload(self, store: S3Store, direct: S3Store) -> None:
        def blocks() -> Iterator[bytes]:
            yield bytes(PART_BYTES)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.write_file("data/x", blocks(), num_bytes=LARGE_BYTES)
        assert uploads(direct) == []


class TestPace:
    def test_a_storm_halves_the_requests_at_once_and_calm_raises_them_again(self, store: S3Store, proxy: FaultProxy) -> None:
        store.put("x", b"1")
        proxy.script(On(SLOW_DOWN, "^GET", 12))
        assert store.get_many(["x"] * 30) == (b"1",) * 30
        limit = store._client.throttle.limit
        assert limit.cuts >= 1
        assert limit.allowed < limit.most
        assert store.get_many(["x"] * 30) == (b"1",) * 30
        assert store._client.throttle.limit.allowed > limit.allowed

    def test_a_store_that_fails_everywhere_is_soon_asked_once_per_call(self, behind: Callable[..., S3Store], proxy: FaultProxy) -> None:
        store = behind(SHORT_S)
        proxy.script(On(INTERNAL, "^GET"))
        while store._budget.take():
            pass  # what a longer outage does
        with pytest.raises(StoreUnavailable, match=r"1 tries.*the store's budget of 100 retries is used up"):
            store.get("x")
        assert proxy.num_seen("^GET") == 2  # through obstore and through s3fs


class TestCredentials:
    def credentials(self, path: Path, server: S3Server, secret: str) -> None:
        path.write_text(f"[default]\naws_access_key_id = {server.options.key}\naws_secret_access_key = {secret}\n")

    @pytest.fixture
    def shared_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        return tmp_path / "credentials"

    def test_rotated_credentials_are_picked_up_without_an_error(
        self, behind: Callable[..., S3Store], s3_server: S3Server, shared_file: Path
    ) -> None:
        self.credentials(shared_file, s3_server, s3_server.options.secret)
        store = behind(ENOUGH_S, key="", secret="")
        store.put("x", b"1")
        store._client.run(self._use_a_wrong_secret(store), float("inf"))
        store.put("x", b"2")
        assert store.get("x") == b"2"

    async def _use_a_wrong_secret(self, store: S3Store) -> None:
        """As if the secret in use had been withdrawn and the file held a newer one."""
        store._client.filesystem._s3._request_signer._credentials.secret_key = "withdrawn"

    def test_an_expired_token_is_replaced_once(
        self, behind: Callable[..., S3Store], s3_server: S3Server, shared_file: Path, proxy: FaultProxy
    ) -> None:
        self.credentials(shared_file, s3_server, s3_server.options.secret)
        store = behind(ENOUGH_S, key="", secret="")
        proxy.script(On(Answer.of(400, "ExpiredToken"), "^PUT", 1))
        store.put("x", b"1")
        assert proxy.num_seen("^PUT") == 2
        proxy.script(On(Answer.of(400, "ExpiredToken"), "^PUT"))
        with pytest.raises(StoreForbidden, match=r"ExpiredToken.*correct the credentials"):
            store.put("x", b"2")


class TestSweep:
    def test_listings_and_sweeps_go_through_all_pages(self, store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
        for number in range(5):
            store.put(f"data/{number}", b"")
            store._request("create_multipart_upload", f"data/u{number}")
        request = store._client.request
        monkeypatch.setattr(
            store._client, "request", lambda method, left_s, **a: request(method, left_s, **a, **SMALL_PAGES.get(method, {}))
        )
        assert list(store.list("data")) == [f"data/{number}" for number in range(5)]
        assert store.sweep(-3600) == 5
        assert uploads(store) == []


SMALL_PAGES = {"list_objects_v2": {"MaxKeys": 2}, "list_multipart_uploads": {"MaxUploads": 2}}
