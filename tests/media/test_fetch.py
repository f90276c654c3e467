"""No URL makes this machine connect to where a stranger may not send it; allowed ones work as anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import httpcore2
import pytest

from tests.vision.test_preprocess import noise
from vlserve.config import MediaConfig
from vlserve.errors import RequestError
from vlserve.media.fetch import Fetcher, check_url, is_allowed, look_up_host
from vlserve.timing import PreparationClock

PUBLIC, PUBLIC_6 = "93.184.216.34", "2606:2800:220:1::1"
BODY = noise(40, 40).tobytes()
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nContent-Length: 0\r\nLocation: {location}\r\n\r\n".encode()


class Stream(httpcore2.AsyncNetworkStream):
    """The far end of one connection: answers what it was given and keeps what it is sent."""

    def __init__(self, answer: bytes) -> None:
        self.answer, self.sent, self.tls_name = answer, b"", ""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        part, self.answer = self.answer[:max_bytes], self.answer[max_bytes:]
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.sent += buffer

    async def aclose(self) -> None:
        pass

    async def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: Any = None) -> Stream:
        assert ssl_context.check_hostname
        self.tls_name = server_hostname or ""
        return self

    def get_extra_info(self, info: str) -> Any:
        return None


class Network(httpcore2.AsyncNetworkBackend):
    """In place of sockets: gives the answers in turn, and counts."""

    def __init__(self, *answers: bytes, broken: Sequence[str] = ()) -> None:
        self.answers, self.broken = list(answers), broken
        self.connected: list[tuple[str, int]] = []
        self.streams: list[Stream] = []

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Stream:
        self.connected.append((host, port))
        if host in self.broken:
            raise httpcore2.ConnectError(f"{host} does not answer")
        self.streams.append(Stream(self.answers.pop(0) if self.answers else OK))
        return self.streams[-1]


class Names:
    """In place of the resolver: each look-up of a name gives the next of its answers, the last one for ever."""

    def __init__(self, **names: Sequence[Sequence[str]]) -> None:
        self.names = {name.replace("_", "."): list(answers) for name, answers in names.items()}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such name")
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]


def fetch(
    url: str,
    *,
    look_up: Callable[[str, int], Sequence[str]] | None = None,
    backend: httpcore2.AsyncNetworkBackend | None = None,
    **options: Any,
) -> bytes:
    fetcher = Fetcher(MediaConfig(**options), look_up=look_up, backend=backend)
    return asyncio.run(fetcher.fetch_all([(url, "images[0]")], lambda count, param: None, PreparationClock()))[0]


def refused(url: str, **options: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        fetch(url, **options)
    error = caught.value
    assert error.param == "images[0]" and str(error).startswith("images[0]: ") and error.__cause__ is None
    assert not any(secret in str(error) for secret in ("127.", "10.0", "169.254", "::1", "192.168", "Errno", "httpcore", "h11"))
    return error


@pytest.fixture
def listener() -> Iterator[tuple[int, list[int]]]:
    """(port, connections) of a server on every loopback address of this machine."""
    connections: list[int] = []
    sockets = [socket.create_server(("0.0.0.0", 0))]
    port = sockets[0].getsockname()[1]
    with contextlib.suppress(OSError):  # a machine without IPv6
        sockets.append(socket.create_server(("::", port), family=socket.AF_INET6))
    for one in sockets:
        one.settimeout(0.05)
    ended = threading.Event()

    def accept(server: socket.socket) -> None:
        while not ended.is_set():
            try:
                server.accept()[0].close()
                connections.append(1)
            except TimeoutError:
                continue

    threads = [threading.Thread(target=accept, args=(one,)) for one in sockets]
    for thread in threads:
        thread.start()
    yield port, connections
    ended.set()
    for thread in threads:
        thread.join()
    for one in sockets:
        one.close()


# every way that people have found to write this machine's own address
LOOPBACK = [
    *("http://127.0.0.1:{port}/", "https://127.0.0.1:{port}/", "HTTP://127.0.0.1:{port}/", "http://127.0.0.1.:{port}/"),
    *("http://127.1:{port}/", "http://127.0.1:{port}/", "http://127.255.255.254:{port}/", "http://127.0.0.01:{port}/"),
    *("http://2130706433:{port}/", "http://017700000001:{port}/", "http://0177.0.0.1:{port}/", "http://0177.0.0.01:{port}/"),
    *("http://0x7f000001:{port}/", "http://0x7f.1:{port}/", "http://0x7f.0x0.0x0.0x1:{port}/", "http://0X7F.0.0.1:{port}/"),
    *("http://00000177.0.0.1:{port}/", "http://127.0.0.0x1:{port}/", "http://6425673729:{port}/", "http://0x17f000001:{port}/"),
    *("http://0:{port}/", "http://0.0.0.0:{port}/", "http://0.0.0.0.:{port}/", "http://00.00.00.00:{port}/"),
    *("http://[::1]:{port}/", "http://[::]:{port}/", "http://[0:0:0:0:0:0:0:1]:{port}/", "http://[::0001]:{port}/"),
    *("http://[::ffff:127.0.0.1]:{port}/", "http://[::ffff:7f00:1]:{port}/", "http://[0:0:0:0:0:ffff:127.0.0.1]:{port}/"),
    *("http://[::127.0.0.1]:{port}/", "http://[::7f00:1]:{port}/", "http://[64:ff9b::127.0.0.1]:{port}/"),
    *("http://[64:ff9b::7f00:1]:{port}/", "http://[64:ff9b:1::7f00:1]:{port}/", "http://[2002:7f00:1::]:{port}/"),
    *("http://[2001:0:7f00:1::80ff:fffe]:{port}/", "http://[::1%25lo]:{port}/", "http://[::1%lo]:{port}/"),
    *("http://[fe80::1%25lo]:{port}/", "http://[::ffff:0:127.0.0.1]:{port}/", "http://[127.0.0.1]:{port}/"),
    *("http://localhost:{port}/", "http://LOCALHOST:{port}/", "http://localhost.:{port}/", "http://lOcAlHoSt.:{port}/"),
    *("http://\uff11\uff12\uff17.0.0.1:{port}/", "http://127\u30020\u30020\u30021:{port}/", "http://①②⑦.0.0.1:{port}/"),
    *(
        "http://localhost\u3002:{port}/",
        "http://loc\u00adalhost:{port}/",
        "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ:{port}/",
        "http://%6cocalhost:{port}/",
    ),
    *("http://127%2e0%2e0%2e1:{port}/", "http://127.0.0.1%00.example.com:{port}/", "http://localhost\u0000.example.com:{port}/"),
    *("http://user@127.0.0.1:{port}/", "http://user:password@127.0.0.1:{port}/", "http://@127.0.0.1:{port}/"),
    *("http://example.com@127.0.0.1:{port}/", "http://example.com:80@127.0.0.1:{port}/", "http://a@b@127.0.0.1:{port}/"),
    *("http://93.184.216.34#@127.0.0.1:{port}\\@93.184.216.34/", "http://127.0.0.1:{port}\\@example.com/"),
    *("http://example.com\\@127.0.0.1:{port}/", "http:\\\\127.0.0.1:{port}\\", "http:/\\127.0.0.1:{port}/"),
    *("http:127.0.0.1:{port}/", "http:/127.0.0.1:{port}/", "http:///127.0.0.1:{port}/", "http://127.0.0.1:{port} /"),
    *(" http://127.0.0.1:{port}/", "http://127.0.0.1:{port}/\t", "http://127.0\n.0.1:{port}/", "http://127.0.0.1\t:{port}/"),
    *("ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/_GET", "dict://127.0.0.1:{port}/", "ldap://127.0.0.1:{port}/"),
    *("http+unix://%2Ftmp%2Fx.sock/", "unix:///tmp/x.sock", "file:///etc/passwd", "file://127.0.0.1:{port}/etc/passwd"),
    *("ws://127.0.0.1:{port}/", "jar:http://127.0.0.1:{port}/!/", "//127.0.0.1:{port}/", "127.0.0.1:{port}", "http://:{port}/"),
]


@pytest.mark.parametrize("url", LOOPBACK, ids=ascii)
def test_no_form_of_loopback_is_reached(url: str, listener: tuple[int, list[int]]) -> None:
    port, connections = listener
    assert refused(url.format(port=port)).code == "invalid_image_url"
    assert connections == []


def test_the_listener_counts(listener: tuple[int, list[int]]) -> None:
    port, connections = listener
    assert refused(f"http://127.0.0.1:{port}/", allow_private_media=True).code == "failed_to_download_image"
    assert connections == [1], "otherwise the table above proves nothing"


INSIDE = [
    *("10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255", "100.64.0.1"),
    *("169.254.169.254", "169.254.170.2", "169.254.0.1", "100.100.100.200", "192.0.0.192", "192.0.0.8", "168.63.129.16"),
    *("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "febf::1", "fec0::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1"),
    *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:a9fe:a9fe", "::10.0.0.1", "::169.254.169.254"),
    *("64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "64:ff9b:1::808:808", "2002:a00:1::", "2002:a9fe:a9fe::"),
    *("2001:0:a9fe:a9fe::1", "2001:0:5db8:d822::f5ff:fffe", "2001:db8::1", "3fff::1", "100::1", "5f00::1", "2001:10::1"),
    *("2606:4700::1%eth0", "not an address"),
]


@pytest.mark.parametrize("address", INSIDE)
def test_no_address_inside_is_reached(address: str) -> None:
    """By name, and where it can be written in a URL, by itself."""
    network, names = Network(), Names(inside_example_com=[[address]], mixed_example_com=[[PUBLIC, address]])
    for host in ("inside.example.com", "mixed.example.com"):
        assert refused(f"http://{host}/x.png", look_up=names, backend=network).code == "invalid_image_url"
    literal = f"[{address}]" if ":" in address else address
    assert refused(f"http://{literal}/x.png", look_up=names, backend=network).code == "invalid_image_url"
    assert network.connected == [] and not is_allowed(address)


def test_public_addresses_are_reached() -> None:
    for address in (PUBLIC, PUBLIC_6, f"::ffff:{PUBLIC}", f"64:ff9b::{PUBLIC}", "8.8.8.8", "172.32.0.1", "100.128.0.1"):
        network = Network()
        assert fetch("http://example.com/x.png", look_up=Names(example_com=[[address]]), backend=network) == BODY
        assert network.connected == [(address, 80)]
    assert fetch(f"http://[{PUBLIC_6}]:81/", backend=(network := Network())) == BODY
    assert network.connected == [(PUBLIC_6, 81)] and f"Host: [{PUBLIC_6}]:81".encode() in network.streams[0].sent


def test_the_address_that_was_checked_is_connected_to() -> None:
    """A name that is public when checked and private a moment later."""
    names, network = Names(example_com=[[PUBLIC], ["127.0.0.1"]]), Network()
    assert fetch("http://example.com/", look_up=names, backend=network) == BODY
    assert names.asked == ["example.com"] and network.connected == [(PUBLIC, 80)]
    assert refused("http://example.com/", look_up=names, backend=network).code == "invalid_image_url"
    assert len(network.connected) == 1


def test_names_stay_names_and_nothing_else_is_sent() -> None:
    network, names = Network(), Names(**{"xn--bcher-kva_example": [[PUBLIC]], "example_com": [[PUBLIC]]})
    assert fetch("https://Bücher.example./ä b?q=1#part".replace(" ", "%20"), look_up=names, backend=network) == BODY
    stream = network.streams[0]
    assert network.connected == [(PUBLIC, 443)] and stream.tls_name == "xn--bcher-kva.example"
    head, *lines = stream.sent.decode().split("\r\n")
    assert head == "GET /%C3%A4%20b?q=1 HTTP/1.1"
    assert {line.partition(":")[0] for line in lines if line} == {"Host", "User-Agent", "Accept", "Accept-Encoding"}
    assert "Host: xn--bcher-kva.example" in lines and "Accept-Encoding: identity" in lines
    assert fetch("http://example.com:8080/", look_up=names, backend=network) == BODY
    assert b"Host: example.com:8080\r\n" in network.streams[1].sent


def test_an_address_that_does_not_answer_is_followed_by_the_next() -> None:
    network = Network(broken=[PUBLIC_6])
    assert fetch("http://example.com/", look_up=Names(example_com=[[PUBLIC_6, PUBLIC]]), backend=network) == BODY
    assert network.connected == [(PUBLIC_6, 80), (PUBLIC, 80)]
    assert refused("http://example.com/", look_up=Names(example_com=[[PUBLIC_6]]), backend=network).code == (
        "failed_to_download_image"
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_lead_on(status: int) -> None:
    names = Names(example_com=[[PUBLIC]], other_example=[[PUBLIC_6]])
    network = Network(redirect("/b", status), redirect("//other.example/c", status), OK)
    assert fetch("http://example.com/a", look_up=names, backend=network) == BODY
    assert [host for host, _ in network.connected] == [PUBLIC, PUBLIC, PUBLIC_6]
    assert [stream.sent.split()[1] for stream in network.streams] == [b"/a", b"/b", b"/c"]


LEADS = [
    *("http://127.0.0.1/", "http://169.254.169.254/latest/meta-data/", "http://[::1]/", "//10.0.0.1/", "http://localhost/"),
    *("http://inside.example/", "http://2130706433/", "http://user@example.com/", "https://[fd00:ec2::254]/"),
    *("file:///etc/passwd", "gopher://example.com/", "ftp://example.com/x", "data:image/png;base64,AAAA", "http://exa mple.com/"),
    *("http://example.com\\@127.0.0.1/", "javascript:alert(1)", "http://other.example/"),
]


@pytest.mark.parametrize("location", LEADS)
def test_every_redirect_is_checked_from_the_beginning(location: str) -> None:
    names = Names(example_com=[[PUBLIC]], inside_example=[["10.0.0.1"]], localhost=[["127.0.0.1"]], other_example=[[PUBLIC]])
    network = Network(redirect(location))
    options: dict[str, Any] = {"allowed_media_hosts": ["example.com", "inside.example", "localhost"]}
    if location not in ("http://inside.example/", "http://localhost/", "http://other.example/"):
        options = {}  # refused without any list
    assert refused("http://example.com/", look_up=names, backend=network, **options).code == "invalid_image_url"
    assert len(network.connected) == 1


def test_redirects_end() -> None:
    network = Network(*[redirect("/again")] * 20)
    assert "more than 5 times" in str(refused("http://example.com/", look_up=Names(example_com=[[PUBLIC]]), backend=network))
    assert len(network.streams) == 6
    odd = Network(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n")
    assert "answered 302" in str(refused("http://example.com/", look_up=Names(example_com=[[PUBLIC]]), backend=odd))


@pytest.mark.parametrize(
    "host,allowed,denied,reached",
    [
        ("example.com", [], [], True),
        ("example.com", ["example.com"], [], True),
        ("EXAMPLE.com.", ["Example.COM."], [], True),
        ("a.b.example.com", ["*.example.com"], [], True),
        ("example.com", ["*.example.com"], [], False),
        ("badexample.com", ["*.example.com"], [], False),
        ("badexample.com", ["example.com"], [], False),
        ("example.com.evil.org", ["example.com", "*.example.com"], [], False),
        ("a.example.com", ["*.example.com"], ["a.example.com"], False),
        ("example.com", [], ["example.com"], False),
        ("b.example.com", [], ["*.example.com"], False),
        (PUBLIC, [PUBLIC], [], True),
        (PUBLIC, ["example.com"], [], False),
        (f"[{PUBLIC_6}]", [PUBLIC_6], [], True),
    ],
)
def test_lists_of_hosts(host: str, allowed: list[str], denied: list[str], reached: bool) -> None:
    network = Network()

    def look_up(host: str, port: int) -> Sequence[str]:
        return [PUBLIC]

    options: dict[str, Any] = {"allowed_media_hosts": allowed, "denied_media_hosts": denied}
    if reached:
        assert fetch(f"http://{host}/", look_up=look_up, backend=network, **options) == BODY
    else:
        error = refused(f"http://{host}/", look_up=look_up, backend=network, **options)
        assert "not one that this server fetches from" in str(error) and network.connected == []


def test_private_addresses_when_they_are_allowed() -> None:
    for address in ("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "::1", "fd12::1", "::ffff:10.0.0.1"):
        assert is_allowed(address, allow_private=True) and not is_allowed(address), address
    for address in (
        *("169.254.169.254", "fe80::1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "fd00:ec2::254", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::", "ff02::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
    ):
        assert not is_allowed(address, allow_private=True), address


@pytest.mark.parametrize(
    "answer,message",
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "answered 204"),
        (b"HTTP/1.1 206 Part\r\nContent-Length: 1\r\n\r\nx", "answered 206"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 1\r\n\r\nx", "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", "more than 1048576 bytes"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(2**20 + 1), "more than 1048576 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"80000\r\n" + bytes(2**19) + b"\r\n",
            "could not be fetched",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "could not be fetched"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "could not be fetched"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10**6, "could not be fetched"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "could not be fetched"),
        (b"", "could not be fetched"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: \xff\xfe\r\n\r\n", "damaged URL"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: /a\x0bb\r\n\r\n", "could not be fetched|damaged URL"),
    ],
    ids=range(15),
)
def test_odd_servers(answer: bytes, message: str) -> None:
    error = refused("http://example.com/", look_up=Names(example_com=[[PUBLIC]]), backend=Network(answer), max_image_mib=1)
    assert re.search(message, str(error)), error


def test_urls_have_bounds() -> None:
    names = Names(example_com=[[PUBLIC]])
    assert "the limit is 8192" in str(refused("http://example.com/" + "x" * 9000, look_up=names, backend=Network()))
    for port in ("0", "65536", "99999999999999999999"):
        assert refused(f"http://example.com:{port}/", look_up=names, backend=Network()).code == "invalid_image_url"
    assert check_url("http://example.com:65535/", MediaConfig()).port == 65535
    assert names.asked == []


def test_nothing_of_a_url_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fetch("http://example.com/?token=secret", look_up=Names(example_com=[[PUBLIC]]), backend=Network())
    assert caplog.records == []


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, listener: tuple[int, list[int]]) -> None:
    port, connections = listener
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    network = Network()
    for scheme in ("http", "https"):
        assert fetch(f"{scheme}://example.com/", look_up=Names(example_com=[[PUBLIC]]), backend=network) == BODY
    assert connections == [] and [host for host, _ in network.connected] == [PUBLIC, PUBLIC]


@contextlib.contextmanager
def served(answer: Callable[[str], bytes]) -> Iterator[str]:
    """A real server on loopback; answers by the request's path."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):  # a client that goes
                request = connection.recv(65536)
                if request.startswith(b"GET "):
                    connection.sendall(answer(request.split()[1].decode()))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_a_real_server_on_a_closed_network() -> None:
    answers = {"/picture": OK, "/once": redirect("/picture"), "/twice": redirect("once")}
    with served(lambda path: answers.get(path, redirect("http://169.254.169.254/"))) as host:
        for path in answers:
            assert fetch(f"http://{host}{path}", allow_private_media=True) == BODY
        assert fetch(f"http://localhost:{host.partition(':')[2]}/twice", allow_private_media=True) == BODY
        assert refused(f"http://{host}/elsewhere", allow_private_media=True).code == "invalid_image_url"
        assert refused(f"http://{host}/picture").code == "invalid_image_url"
        # a server that speaks no TLS
        assert refused(f"https://{host}/picture", allow_private_media=True).code == "failed_to_download_image"


def test_the_systems_resolver_is_asked_by_default() -> None:
    assert "127.0.0.1" in look_up_host("localhost", 80)
    assert refused("http://no-such-name.invalid/").code == "invalid_image_url"


def test_slow_lookups_of_one_request_hold_up_no_other() -> None:
    release = threading.Event()

    def look_up(host: str, port: int) -> Sequence[str]:
        if host == "slow.example":
            release.wait(30)
        return [PUBLIC]

    fetcher = Fetcher(MediaConfig(), look_up=look_up, backend=Network())

    async def main() -> None:
        slow = asyncio.ensure_future(
            fetcher.fetch_all([("http://slow.example/", "a")] * 40, lambda count, param: None, PreparationClock())
        )
        await asyncio.sleep(0.05)
        assert await fetcher.fetch_all([("http://fast.example/", "b")], lambda count, param: None, PreparationClock()) == [BODY]
        assert not slow.done()
        release.set()
        assert await slow == [BODY] * 40

    asyncio.run(main())


def test_a_client_that_leaves_meanwhile_is_no_error() -> None:
    release = threading.Event()
    failures: list[str] = []

    def look_up(host: str, port: int) -> Sequence[str]:
        release.wait(30)
        return [PUBLIC]

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context["message"]))
        wanted = [("http://slow.example/", "a")] * 2
        fetcher = Fetcher(MediaConfig(), look_up=look_up, backend=Network())
        leaving = asyncio.ensure_future(fetcher.fetch_all(wanted, lambda count, param: None, PreparationClock()))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        release.set()
        del leaving
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert failures == []


def test_the_first_failure_ends_the_other_fetches() -> None:
    class Hanging(Network):
        async def connect_tcp(self, host: str, port: int, *args: Any, **options: Any) -> Stream:
            if port == 81:
                await asyncio.sleep(3600)
            return await super().connect_tcp(host, port)

    names = Names(example_com=[[PUBLIC]], inside_example=[["10.0.0.1"]])
    fetcher = Fetcher(MediaConfig(), look_up=names, backend=Hanging())
    wanted = [("http://example.com:81/", "a"), ("http://inside.example/", "b"), ("http://example.com:81/", "c")]
    with pytest.raises(RequestError) as caught:
        asyncio.run(fetcher.fetch_all(wanted, lambda count, param: None, PreparationClock()))
    assert caught.value.param == "b"
