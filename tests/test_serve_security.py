"""Nobody gets in: Host, Origin, API key, sizes, slow and many connections, and what reaches the log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest

import serve
from serving.security import SECURITY_HEADERS, host_name
from tests.live_server import LiveServer, post, read_all, wait_until

KEY = "a secret of this test"
SITE = "https://chat.example.org"
CHAT = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}).encode()


@pytest.fixture(scope="module")
def server():
    limits = {"headers_s": 0.5, "body_s": 0.5, "max_connections": 20, "max_body_bytes": 4096}
    with LiveServer(api_key=KEY, allow_origin=(SITE,), **limits) as server:
        yield server


def answer(server, path: str = "/v1/models", method: str = "GET", **headers: str) -> httpx.Response:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, server.url + path, headers={"Authorization": f"Bearer {KEY}", **headers})


def test_only_the_right_key_opens(server):
    for given in (None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer \xe9"):
        headers = {} if given is None else {"Authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/v1/models/chatty", "/metrics", "/nothing"):
            refused = httpx.get(server.url + path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
    assert answer(server).status_code == 200 and answer(server, Authorization=f"bearer {KEY}").status_code == 200
    for path in ("/", "/health"):  # the page asks for the key itself
        assert httpx.get(server.url + path).status_code == 200


@pytest.mark.parametrize(
    "host, status",
    [
        *[
            (host, 200)
            for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000", "10.1.2.3", "chat.example.org")
        ],
        *[(host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "a@localhost")],
        *[(host, 403) for host in ("", "localhost:port", "localhost/evil", "[::1", "127.0.0.1#")],
    ],
)
def test_names_of_other_servers_are_refused(server, host, status):
    with server.connect() as connection:
        request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        assert int(read_all(connection).split()[1]) == status


def test_pages_of_other_sites_are_refused(server):
    own = f"http://127.0.0.1:{server.port}"
    for origin, status in ((own, 200), (own.replace("http:", "https:"), 200), (SITE, 200), ("null", 403)):
        assert answer(server, Origin=origin).status_code == status
    for origin in ("http://evil.example", "http://127.0.0.1:1", f"{SITE}.evil.example", "http://chat.example.org"):
        refused = answer(server, Origin=origin)
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers
        assert answer(server, "/v1/chat/completions", "OPTIONS", Origin=origin).status_code == 403
    assert answer(server, Sec_Fetch_Site="cross-site").status_code == 403
    assert answer(server, "/", Sec_Fetch_Site="cross-site").status_code == 200  # a link to the page


def test_an_allowed_origin_may_use_the_api(server):
    preflight = httpx.options(
        f"{server.url}/v1/chat/completions", headers={"Origin": SITE}
    )  # browsers send no key here
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-headers"] == "Authorization, *"
    for found in (
        preflight,
        answer(server, Origin=SITE),
        httpx.get(f"{server.url}/v1/models", headers={"Origin": SITE}),
    ):
        assert found.headers["access-control-allow-origin"] == SITE and "Origin" in found.headers["vary"]


def test_every_answer_has_the_security_headers(server):
    answers = [answer(server), answer(server, "/"), answer(server, "/nothing"), httpx.get(f"{server.url}/v1/models")]
    answers += [answer(server, Host="evil.example"), answer(server, method="PUT"), answer(server, "/health")]
    for found in answers:
        assert {name: found.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
        assert "server" not in found.headers
    policy = SECURITY_HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    "path", ["/static/../serve.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static/..%2fapp.py"]
)
def test_no_path_leads_out_of_the_static_files(server, path):
    with server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        received = read_all(connection)
        assert int(received.split()[1]) in (401, 404) and b"import" not in received


def test_large_bodies_are_refused(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, content=b"x" * 5000, headers=headers).status_code == 413
    chunked = httpx.post(url, content=iter([b"x" * 1000] * 5), headers=headers)
    assert chunked.status_code == 413 and chunked.json()["error"]["message"]
    padded = CHAT[:-1] + b" " * (4096 - len(CHAT)) + CHAT[-1:]
    assert httpx.post(url, content=padded, headers=headers).status_code == 200


def test_slow_and_endless_senders_are_disconnected(server):
    started = time.monotonic()
    with server.connect() as silent, server.connect() as slow, server.connect() as endless, server.connect() as body:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: local")
        endless.sendall(b"GET / HTTP/1.1\r\nX: ")
        body.sendall(post("/v1/chat/completions", b"{}", f"Authorization: Bearer {KEY}")[:-1])
        with contextlib.suppress(ConnectionError):
            for _ in range(100):  # more than headers may have
                endless.sendall(b"a" * 1024)
            assert b" 400 " in read_all(endless)
        assert b" 408 " in read_all(body)
        for connection in (silent, slow):
            with contextlib.suppress(ConnectionError):
                assert read_all(connection) == b""
    assert time.monotonic() - started < 10
    server.assert_free()


def test_slow_senders_of_a_second_request_and_of_refused_bodies(server):
    with server.connect() as second, server.connect() as refused:
        second.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        refused.sendall(b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\nx")
        for connection in (second, refused):
            with contextlib.suppress(ConnectionError):
                assert b"HTTP/1.1" in read_all(connection)  # one answer, then the end


def test_a_flood_of_connections_leaves_room_again(server):
    flood = [server.connect() for _ in range(60)]
    wait_until(lambda: len(server.server.server_state.connections) <= 20)
    for connection in flood:
        connection.close()
    wait_until(lambda: len(server.server.server_state.connections) == 0)
    assert answer(server).status_code == 200


def test_nothing_that_a_request_says_forges_a_line_of_the_log(server, caplog):
    caplog.set_level(logging.INFO, "jojo")
    answer(server, "/%0aGET%20/forged%1b[31m%22%E2%80%A8{0}%s")
    wait_until(lambda: any("forged" in record.getMessage() for record in caplog.records))
    lines = [record.getMessage() for record in caplog.records if "forged" in record.getMessage()]
    assert len(lines) == 1 and lines[0].isascii() and lines[0].isprintable()
    assert KEY not in caplog.text


def test_host_names():
    names = {
        "LocalHost:80": "localhost",
        "[::1]:80": "::1",
        "a/b": None,
        "a?b": None,
        "x@y": None,
        "a:b": None,
        "": None,
    }
    assert {host: host_name(host) for host in names} == names


# --- the script ---


def usage_error(*arguments: str, **environment: str) -> str:
    """What serve.py says instead of starting."""
    command = [sys.executable, str(Path(serve.__file__)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60)
    assert done.returncode in (1, 2) and done.stdout == "" and len(done.stderr.splitlines()) == 1
    return done.stderr


def test_another_host_needs_a_key_or_the_decision_to_have_none():
    assert "set JOJO_API_KEY or --api_key, or add --no_auth" in usage_error("--host", "0.0.0.0")
    assert "--api_key cannot be combined with --no_auth" in usage_error("--api_key", "12345678", "--no_auth")
    short = usage_error("--host", "0.0.0.0", JOJO_API_KEY="short")
    assert "at least 8 printable" in short and "'short'" not in short
    assert "--allow_origin" in usage_error("--allow_origin", "*")
    for options, key in (
        (serve.ServeOptions(host="0.0.0.0", no_auth=True), None),
        (serve.ServeOptions(), None),
        (serve.ServeOptions(host="0.0.0.0", api_key="long enough"), "long enough"),
    ):
        assert serve.choose_api_key(options) == key


def test_a_port_that_is_taken_is_named():
    from serving.server import listen

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(serve.UserError, match=r"choose another with"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_pages_files_are_served_with_their_types(tmp_path):
    from starlette.applications import Starlette
    from starlette.routing import Route
    from starlette.testclient import TestClient

    from serving.static_files import static_files

    for name in ("index.html", "app.js", "secret.txt"):
        (tmp_path / name).write_text(name)
    files = static_files(tmp_path)
    client = TestClient(
        Starlette(routes=[Route("/", files), Route("/static/{name}", files)]), raise_server_exceptions=False
    )
    assert client.get("/").text == "index.html" and client.get("/").headers["content-type"].startswith("text/html")
    script = client.get("/static/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.get("/static/app.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304
    assert client.get("/static/secret.txt").status_code != 200
