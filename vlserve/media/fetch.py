"""Fetches pictures from http(s) URLs, and only from where a stranger may send this machine.

The check of addresses sits in the client's network backend: a host is looked up once, all of its addresses must be
allowed, and the connection goes to one that was checked. So nothing connects around the check, names stay names in
TLS and in the Host header, and a redirect is just another URL that is checked from the beginning. Proxies, cookies and
credentials do not exist here. Messages never hold addresses, nor a library's text.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any
from urllib.parse import urljoin

import httpcore2
import httpx2

from vlserve.config import MediaConfig
from vlserve.errors import VLServeError
from vlserve.media.decode import image_error
from vlserve.system_limits import refused
from vlserve.timing import PreparationClock

log = logging.getLogger(__name__)
Lookup = Callable[[str, int], Sequence[str]]  # host and port to addresses; blocks; raises OSError
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL = 8192  # characters
MAX_REDIRECTS = 5
MAX_CONNECTIONS = 8  # of one request
MAX_LOOKUPS = 4  # of one request at once
MAX_ADDRESSES = 4  # of one host that are tried
CONNECT_S = 5.0  # for one address
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = [(b"User-Agent", b"vlserve"), (b"Accept", b"image/*, */*;q=0.5"), (b"Accept-Encoding", b"identity")]

_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def _networks(*names: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, names))


# metadata and platform services of clouds, and link-local, where most of these live: never, whatever the options say
_NEVER = _networks(
    *("169.254.0.0/16", "fe80::/10", "100.100.100.200/32", "192.0.0.0/24", "168.63.129.16/32"),
    *("fd00:ec2::/32", "fd20:ce::/32"),
)
_PRIVATE = _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "100.64.0.0/10", "::1/128", "fc00::/7")
# what `is_global` of some Python versions lets through; 6to4 and Teredo (in 2001::/23) lead to any IPv4 address
_NOT_GLOBAL = _networks("192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class _Refused(Exception):
    """Why a picture is not fetched, in our words, before it is known whose it is."""

    def __init__(self, message: str, code: str = "invalid_image_url") -> None:
        super().__init__(message)
        self.code = code


@cache
def _ssl_context() -> ssl.SSLContext:
    """Reading the certificates takes tens of milliseconds: once, when first asked for."""
    return httpx2.create_ssl_context(trust_env=False)


class Fetcher:
    """Fetches for many requests at once, which share nothing but the settings.

    Args:
        look_up: in place of the system's resolver. backend: in place of the system's sockets; gets addresses only.
    """

    def __init__(
        self, config: MediaConfig, *, look_up: Lookup | None = None, backend: httpcore2.AsyncNetworkBackend | None = None
    ) -> None:
        self._config = config
        self._look_up = look_up or look_up_host
        self._backend = backend or httpcore2.AnyIOBackend()

    async def fetch_all(
        self, wanted: Sequence[tuple[str, str]], take: Callable[[int, str], None], clock: PreparationClock
    ) -> list[bytes]:
        """What is behind the URLs of one request, in order; the first failure ends the others.

        Args:
            wanted: (URL, name of its field). take: called with a number of bytes that arrived and the field's name;
                raises when they are too many. clock: is told what each took.

        Raises RequestError naming the field.
        """
        executor = ThreadPoolExecutor(MAX_LOOKUPS, thread_name_prefix="vlserve-lookup")  # slow lookups hold up nobody else
        backend = _CheckedBackend(self._config, self._look_up, self._backend, executor)
        tasks: list[asyncio.Task[bytes]] = []

        async def fetch(pool: httpcore2.AsyncConnectionPool, url: str, param: str) -> bytes:
            with clock.measure(clock.fetch_s):
                return await self._fetch(pool, url, param, take)

        try:
            async with httpcore2.AsyncConnectionPool(
                ssl_context=_ssl_context(), max_connections=MAX_CONNECTIONS, network_backend=backend
            ) as pool:
                tasks = [asyncio.ensure_future(fetch(pool, url, param)) for url, param in wanted]
                try:
                    limit = self._config.media_timeout_s
                    done, late = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
                    bodies = [task.result() for task in tasks if task in done]
                    for task, (_, param) in zip(tasks, wanted, strict=True):
                        if task in late:
                            message = f"the picture did not arrive within {limit:g} s"
                            raise image_error(param, message, "failed_to_download_image")
                    return bodies
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, pool: httpcore2.AsyncConnectionPool, url: str, param: str, take: Callable[[int, str], None]) -> bytes:
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), self._config.media_timeout_s)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                parts = check_url(url, self._config)
                async with pool.stream(
                    "GET",
                    httpcore2.URL(scheme=parts.raw_scheme, host=parts.raw_host, port=parts.port, target=parts.raw_path),
                    headers=[(b"Host", parts.netloc), *HEADERS],
                    extensions={"timeout": timeouts},
                ) as response:
                    headers = {name.lower(): value for name, value in response.headers}
                    if response.status in REDIRECTS and b"location" in headers:
                        url = _follow(parts, headers[b"location"])
                        continue
                    return await self._read(response, headers, param, take)
            raise _Refused(f"the picture's URL leads on more than {MAX_REDIRECTS} times")
        except _Refused as reason:
            raise image_error(param, str(reason), reason.code) from None
        except VLServeError:
            raise
        except Exception as error:  # noqa: BLE001  (whatever the network and its libraries come up with)
            failed = image_error(param, "the picture could not be fetched", "failed_to_download_image")
            raise refused(error, "fetching a picture") or failed from None

    async def _read(
        self, response: httpcore2.Response, headers: dict[bytes, bytes], param: str, take: Callable[[int, str], None]
    ) -> bytes:
        if response.status != 200:
            raise _Refused(f"the picture's server answered {response.status}", "failed_to_download_image")
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
            raise _Refused("the picture's server sent it compressed, which was not asked for", "failed_to_download_image")
        limit = self._config.max_image_mib * 2**20
        length = headers.get(b"content-length", b"")
        too_large = _Refused(f"the picture has more than {limit} bytes", "image_file_too_large")
        if length.isdigit() and int(length) > limit:
            raise too_large
        data = bytearray()
        async for chunk in response.aiter_stream():
            take(len(chunk), param)
            data += chunk
            if len(data) > limit:
                raise too_large
        return bytes(data)


def check_url(url: str, config: MediaConfig) -> httpx2.URL:
    """The URL in parts, if it is a plain http(s) URL of a host that may be asked. Any port may be."""
    if len(url) > MAX_URL:
        raise _Refused(f"the URL has {len(url)} characters, the limit is {MAX_URL}")
    if "\\" in url or not url.isprintable() or any(character.isspace() for character in url):
        raise _Refused("the URL holds white space, a backslash or a control character; percent-encode it")
    try:
        parts = httpx2.URL(url)
        host = parts.raw_host.decode("ascii")
        if host.endswith("."):  # says that the name is whole; certificates and lists do without
            host = host[:-1]
            parts = parts.copy_with(host=host)
    except Exception:  # noqa: BLE001  (idna has errors of its own)
        raise _Refused("the picture could not be fetched: its URL is damaged") from None
    authority = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if parts.scheme not in ("http", "https") or not host:
        raise _Refused("expected a data: or http(s): URL")
    if "@" in authority:
        raise _Refused("the URL holds a user name or password, which are not sent; leave them out")
    if parts.port is not None and not 1 <= parts.port <= 65535:
        raise _Refused("the URL's port is not one of 1 to 65535")
    if _literal(host) is None and (not _HOST.fullmatch(host) or _NUMBER.fullmatch(host.rpartition(".")[2])):
        raise _Refused("the URL's host is neither a name nor a plain address such as 203.0.113.7 or [2001:db8::7]")
    if _is_listed(host, config.denied_media_hosts) or (
        config.allowed_media_hosts and not _is_listed(host, config.allowed_media_hosts)
    ):
        log.info("a picture was refused, since --allowed-media-hosts and --denied-media-hosts rule its host out")
        raise _Refused("the picture's host is not one that this server fetches from")
    return parts


def is_allowed(address: str, *, allow_private: bool = False) -> bool:
    """Whether an address may be connected to: public, or private where that is allowed."""
    ip = _literal(address)
    if ip is None or any(ip in network for network in _NEVER):
        return False
    return _is_public(ip) or (allow_private and any(ip in network for network in _PRIVATE))


def look_up_host(host: str, port: int) -> Sequence[str]:
    """All addresses that the system's resolver knows, in its order."""
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects a host name by way of an address that was checked."""

    def __init__(
        self, config: MediaConfig, look_up: Lookup, backend: httpcore2.AsyncNetworkBackend, executor: ThreadPoolExecutor
    ) -> None:
        self._allow_private = config.allow_private_media
        self._look_up, self._backend, self._executor = look_up, backend, executor

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = (await self._addresses(host, port))[:MAX_ADDRESSES]
        for address in addresses[:-1]:
            try:
                return await self._backend.connect_tcp(address, port, timeout=CONNECT_S, socket_options=socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):  # e.g. an IPv6 address without IPv6 here
                continue
        return await self._backend.connect_tcp(addresses[-1], port, timeout=CONNECT_S, socket_options=socket_options)

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        found: Sequence[str] = [host]
        if _literal(host) is None:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self._executor, self._look_up, host, port)
            except (OSError, UnicodeError):
                os.close(os.open(os.devnull, os.O_RDONLY))  # fails where descriptors have run out; resolvers do not say so
                found = []
        if not found or not all(is_allowed(address, allow_private=self._allow_private) for address in found):
            # one message for both: it must not tell which names exist inside
            if found and not self._allow_private and all(is_allowed(address, allow_private=True) for address in found):
                log.info("a picture was refused, since its host is private; --allow-private-media would fetch it")
            raise _Refused("the picture's host is unknown or not on the public internet")
        return found

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        raise _Refused("expected a data: or http(s): URL")

    async def sleep(self, seconds: float) -> None:
        await self._backend.sleep(seconds)


def _literal(host: str) -> Address | None:
    """The address that a host is, as the address that counts: IPv4 carried in IPv6 is IPv4. None for a name or a scoped one."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return None
        if ip.ipv4_mapped is not None:
            return ip.ipv4_mapped
        if ip in _NAT64:
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _is_public(ip: Address) -> bool:
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in network for network in _NOT_GLOBAL)


def _is_listed(host: str, hosts: Sequence[str]) -> bool:
    return any(host.endswith(entry[1:]) if entry.startswith("*.") else host == entry for entry in hosts)


def _follow(parts: httpx2.URL, location: bytes) -> str:
    try:
        text = location.decode()
    except UnicodeDecodeError:
        raise _Refused("the picture's server leads on to a damaged URL") from None
    if not text.isprintable() or "\\" in text:  # urljoin would drop some of these
        raise _Refused("the picture's server leads on to a damaged URL")
    return urljoin(str(parts), text)
