"""Who is let in: keys and scopes, hosts and origins, the rate."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import client, errors
from service.api import access
from service.api.guard import check_host, check_origin
from service.api.keyring import Keyring
from service.api.ratelimit import RateLimit
from service.errors import HostNotAllowed, OriginNotAllowed, RateLimited, Unauthorized
from service.settings import Settings
from service.store import Scope
from tests.api import tiny
from tests.api.conftest import catalog_of
from tests.api.problem import problem
from tests.api.raw import answer as answer_of
from tests.api.raw import connected
from tests.running import RunningServer, foldserve

Guarded = tuple[RunningServer, dict[str, str]]
Keyed = dict[str, httpx.Client]
READ, PREDICT, WRITE = Scope.READ, Scope.PREDICT, Scope.WRITE
NPY = {"Content-Type": tiny.NPY}

NEEDED = [
    ("GET", "/health/live", None),
    ("GET", "/health/ready", None),
    ("GET", "/openapi.json", None),
    ("GET", "/static/style.css", None),
    ("GET", "/health", {READ}),
    ("GET", "/metrics", {READ}),
    ("GET", "/", {READ}),
    ("GET", "/v1/models", {READ}),
    ("HEAD", "/v1/models", {READ}),
    ("GET", "/v1/models/m/versions/1/checkpoints/train", {READ}),
    ("GET", "/v1/models/m/benchmark", {READ}),
    ("POST", "/v1/models/m/predict", {PREDICT}),
    ("POST", "/v1/models/m/versions", {WRITE}),
    ("POST", "/v1/models/m/benchmark", {WRITE}),
    ("PUT", "/v1/models/m/default", {WRITE}),
    ("PATCH", "/v1/models/m", {WRITE}),
    ("DELETE", "/v1/models/m", {WRITE}),
    ("GET", "/v2", {READ, PREDICT}),
    ("GET", "/v2/models/m", {READ, PREDICT}),
    ("POST", "/v2/models/m/infer", {PREDICT}),
    ("POST", "/v2/models/m/versions/1/infer", {PREDICT}),
    ("POST", "/v2/repository/index", {READ, PREDICT}),
    ("POST", "/v2/repository/models/m/load", {WRITE}),
    ("POST", "/what/ever", {WRITE}),
    ("GET", "/healthy", {READ}),
    ("GET", "/v1/models/predict", {READ}),
    ("DELETE", "/v1/models/predict", {WRITE}),
]


@pytest.mark.parametrize(("method", "path", "scopes"), NEEDED)
def test_the_scope_of_every_kind_of_request(
    method: str, path: str, scopes: set[Scope] | None
) -> None:
    assert access.needed(method, path) == scopes


def test_no_documented_route_is_open_by_accident(http: httpx.Client) -> None:
    open_paths = {
        path
        for path, methods in http.get("/openapi.json").json()["paths"].items()
        for method in methods
        if access.needed(method.upper(), path) is None
    }
    assert open_paths <= {"/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"}


ASKED = [
    ("GET", "/v1/models", "reader"),
    ("GET", "/health", "reader"),
    ("GET", "/metrics", "reader"),
    ("GET", "/v1/models/none/versions/1/checkpoints/train", "reader"),
    ("POST", "/v1/models/none/predict", "predictor"),
    ("DELETE", "/v1/models/none", "writer"),
    ("PUT", "/v1/models/none/default", "writer"),
    ("POST", "/v1/models/none/benchmark", "writer"),
]


@pytest.mark.parametrize(("method", "path", "allowed"), ASKED)
def test_each_scope_opens_its_own_routes_only(
    keyed: Keyed, method: str, path: str, allowed: str
) -> None:
    refused = keyed["nobody"].request(method, path)
    problem(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"].startswith("Bearer")
    for name in ("reader", "predictor", "writer", "admin"):
        answer = keyed[name].request(method, path)
        if name in (allowed, "admin"):
            assert answer.status_code not in (401, 403), answer.text
        else:
            body = problem(answer, 403, "forbidden")
            assert body["required"] == [KEY_SCOPES[allowed]]


KEY_SCOPES = {"reader": "read", "predictor": "predict", "writer": "write"}


def test_a_key_works_from_upload_to_prediction(guarded: Guarded, tmp_path: Any) -> None:
    server, keys = guarded
    file = tmp_path / "tiny.pth"
    file.write_bytes(tiny.checkpoint())
    with client.Client(server.url, api_key=keys["admin"]) as own:
        version = own.upload(file, "keyed", config=tiny.CONFIG, wait=100)
        assert version.state == "ready"
    with client.Client(server.url, api_key=keys["predictor"]) as own:
        assert own.infer("keyed", tiny.rows(2)).shape == (2, tiny.CLASSES)
        with pytest.raises(errors.Forbidden):
            own.model("keyed")
    with client.Client(server.url) as own, pytest.raises(Unauthorized):
        own.infer("keyed", tiny.rows(1))


def test_the_client_takes_the_key_of_the_environment(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, keys = guarded
    monkeypatch.setenv(client.API_KEY_VARIABLE, keys["reader"])
    with client.Client(server.url) as own:
        assert own.health()["status"] == "ok"


def test_a_key_may_come_in_a_header_of_its_own(guarded: Guarded) -> None:
    server, keys = guarded
    headers = {"X-API-Key": keys["reader"]}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers={"X-API-Key": ""}).status_code == 401


def mangled(key: str) -> list[str]:
    flipped = key[:-1] + ("A" if key[-1] != "A" else "B")
    return ["x", key[:-1], key + "A", flipped, key.upper(), key.replace("fsk_", "fsk-", 1), "é"]


def test_nothing_but_the_whole_key_opens(guarded: Guarded) -> None:
    server, keys = guarded
    with httpx.Client(base_url=server.url) as http:
        for wrong in mangled(keys["reader"]):
            given = f"Bearer {wrong}".encode()
            answer = http.get("/v1/models", headers={b"Authorization": given})
            problem(answer, 401, "unauthorized")
            assert len(wrong) == 1 or wrong not in answer.text
        for kind in ("Basic", "Bear"):
            headers = {"Authorization": f"{kind} {keys['reader']}"}
            problem(http.get("/v1/models", headers=headers), 401, "unauthorized")
        # The control: the same header, unharmed.
        right = {"Authorization": f"bearer {keys['reader']}"}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_strangers_learn_whether_it_is_ready_and_no_more(keyed: Keyed) -> None:
    assert keyed["nobody"].get("/health/ready").json() == {"status": "ok"}
    assert keyed["predictor"].get("/health/ready").json() == {"status": "ok"}
    assert "models" in keyed["reader"].get("/health/ready").json()
    assert keyed["nobody"].get("/health/live").status_code == 200


def test_a_key_counts_and_ceases_to_beside_the_running_service(guarded: Guarded) -> None:
    server, _ = guarded
    catalog = catalog_of(server.data_dir)
    with httpx.Client(base_url=server.url) as http:
        key, record = catalog.keys.create("late", [READ])
        headers = {"Authorization": f"Bearer {key}"}
        assert became(http, headers, 200) < 5
        catalog.keys.revoke(record.id)
        assert became(http, headers, 401) < 5
    catalog.close()


def became(http: httpx.Client, headers: dict[str, str], status: int) -> float:
    """Seconds until a request is answered so."""
    started = time.monotonic()
    while http.get("/v1/models", headers=headers).status_code != status:
        assert time.monotonic() - started < 30
        time.sleep(0.05)
    return time.monotonic() - started


def test_a_key_costs_microseconds(guarded: Guarded) -> None:
    server, keys = guarded
    catalog = catalog_of(server.data_dir)

    async def measure() -> float:
        ring = Keyring(2.0)
        await ring.start(catalog.keys.all)
        best = float("inf")
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(100):
                ring.identify(keys["reader"])
            best = min(best, (time.perf_counter() - started) / 100)
        await ring.close()
        return best

    assert asyncio.run(measure()) < 50e-6
    catalog.close()


def test_a_caller_beyond_the_rate_is_told_when_to_come_back(keyed: Keyed) -> None:
    answers = [keyed["eager"].get("/v1/models") for _ in range(200)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    problem(refused[-1], 429, "rate_limited")
    assert int(refused[-1].headers["retry-after"]) >= 1
    # The control: nobody else is held up, and neither are the probes.
    assert keyed["reader"].get("/v1/models").status_code == 200
    assert keyed["eager"].get("/health/live").status_code == 200


def test_a_bucket_fills_at_its_rate_and_callers_are_forgotten() -> None:
    now = 0.0
    limit = RateLimit(2.0, 3, clock=lambda: now)
    for _ in range(3):
        limit.take("a")
    with pytest.raises(RateLimited) as caught:
        limit.take("a")
    assert caught.value.extra["retry_after"] == pytest.approx(0.5)
    limit.take("b")
    now = 0.5
    limit.take("a")
    with pytest.raises(RateLimited):
        limit.take("a")
    now = 100.0
    for _ in range(3):
        limit.take("a")
    with pytest.raises(RateLimited):
        limit.take("a")
    for n in range(20_000):
        limit.take(f"caller {n}")
    assert len(limit._buckets) == 10_000


HOSTS = ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "10.1.2.3", "foldserve", ""]
REBOUND = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.nip.io",
    "a.b.",
]


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_that_nobody_can_point_here_pass(host: str) -> None:
    check_host(host, ())


@pytest.mark.parametrize("host", REBOUND)
def test_other_names_pass_when_they_are_listed(host: str) -> None:
    with pytest.raises(HostNotAllowed):
        check_host(host, ("models.example.com", "*.models.example.com"))
    check_host(host, ("*",))
    check_host("Models.Example.com:443", ("models.example.com",))
    check_host("a.example.com", ("*.example.com",))
    with pytest.raises(HostNotAllowed):
        check_host("example.com", ("*.example.com",))


def test_a_rebound_name_is_refused_by_an_open_service(http: httpx.Client) -> None:
    answer = http.get("/v1/models", headers={"Host": "evil.example:8000"})
    problem(answer, 421, "host_not_allowed")
    assert http.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200


ORIGINS = [
    (None, None, True),
    (b"http://localhost:8000", None, True),
    (b"https://app.example.com", b"cross-site", True),
    (None, b"none", True),
    (b"null", b"same-origin", True),
    (b"https://elsewhere.example", b"same-origin", True),  # a proxy renamed the host
    (b"http://evil.example", None, False),
    (b"http://evil.example", b"cross-site", False),
    (b"http://localhost:3000", b"same-site", False),
    (b"http://localhost:3000", None, False),
    (b"null", None, False),
    (b"null", b"cross-site", False),
    (None, b"cross-site", False),
]


@pytest.mark.parametrize(("origin", "site", "passes"), ORIGINS)
def test_pages_of_other_sites_change_nothing(
    origin: bytes | None, site: bytes | None, passes: bool
) -> None:
    def check() -> None:
        check_origin("localhost:8000", origin, site, frozenset({"https://app.example.com"}))

    if passes:
        check()
    else:
        with pytest.raises(OriginNotAllowed):
            check()


def test_a_form_of_another_site_uploads_nothing(http: httpx.Client) -> None:
    url, files = "/v1/models/forged/versions", {"checkpoint": b"x"}
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        problem(http.post(url, files=files, headers=headers), 403, "origin_not_allowed")
    problem(http.get("/v1/models/forged"), 404, "model_not_found")
    # The control: the same form of a page of its own.
    own = {"Origin": str(http.base_url).rstrip("/")}
    assert http.post(url, files=files, headers=own).status_code == 202


def test_only_named_origins_may_read(http: httpx.Client, keyed: Keyed) -> None:
    asked = {
        "Origin": "https://app.example.com",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    path = "/v1/models/m/predict"
    allowed = keyed["nobody"].options(path, headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    stranger = asked | {"Origin": "https://evil.example"}
    answer = keyed["nobody"].options(path, headers=stranger)
    assert "access-control-allow-origin" not in answer.headers
    answer = keyed["reader"].get("/v1/models", headers={"Origin": "https://app.example.com"})
    assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "location" in answer.headers["access-control-expose-headers"]
    # Closed unless opened: the other service names no origin.
    answer = http.get("/v1/models", headers={"Origin": "https://app.example.com"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_person_logs_in_with_a_key_and_out_again(guarded: Guarded) -> None:
    server, keys = guarded
    page = {"Accept": "text/html"}
    with httpx.Client(base_url=server.url, headers=page) as browser:
        away = browser.get("/")
        assert (away.status_code, away.headers["location"]) == (303, "/login?next=/")
        assert 'name="key"' in browser.get("/login?next=/").text
        wrong = browser.post("/login", data={"key": "fsk_no", "next": "/"})
        assert wrong.status_code == 401
        assert "not valid" in wrong.text
        right = browser.post("/login", data={"key": keys["reader"], "next": "/"})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert browser.get("/").status_code == 200
        assert browser.get("/v1/models").status_code == 200
        # The cookie opens no more than the key, and nothing for another site's page.
        assert browser.delete("/v1/models/m").status_code == 403
        assert browser.post("/logout").status_code == 303
        assert browser.get("/").status_code == 303


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", ""]
)
def test_a_login_leads_nowhere_else(guarded: Guarded, target: str) -> None:
    server, keys = guarded
    form = {"key": keys["reader"], "next": target}
    answer = httpx.post(f"{server.url}/login", data=form)
    assert answer.headers["location"] == "/"


def test_no_log_holds_a_key(guarded: Guarded) -> None:
    """At the level `debug`, with the access log, over everything that this session asked."""
    server, keys = guarded
    nearly = keys["reader"][:-1]
    with httpx.Client(base_url=server.url) as http:
        for key in (*keys.values(), nearly):
            http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            http.get("/v1/models", params={"cursor": key}, headers={"X-API-Key": key})
            http.post("/login", data={"key": key})
    with connected(server.url) as connection:
        connection.sendall(f"GET / HTTP/1.1\r\nX-API-Key {nearly}\r\n\r\n".encode())
        assert answer_of(connection)[0] == 400
    logged = server.log_file.read_text()
    assert "/v1/models" in logged  # the control: requests are logged
    for key in (*keys.values(), nearly):
        assert key not in logged
        assert key.split("_", 2)[2] not in logged


def test_no_log_holds_the_password_of_the_database(tmp_path: Path) -> None:
    url = "postgresql://somebody:hunter2@127.0.0.1:1/nothing"
    own = {"FOLDSERVE_DATABASE_URL": url, "FOLDSERVE_LOG_LEVEL": "debug"}
    for arguments in (["serve", "--port", "0"], ["keys", "list"]):
        done = foldserve(*arguments, "--data-dir", str(tmp_path), **own)
        assert done.returncode not in (0, 2), done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    assert "hunter2" not in repr(Settings(database_url=url))
    assert Settings(database_url=url).effective_database_url == url
