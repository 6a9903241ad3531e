"""Fetching pictures from addresses that clients name, public ones only.

A client that may name addresses could make the server reach what only the server can (its own ports, a cloud's
metadata). So each hop's URL is parsed once, its host is resolved once, every address found must be public, and the
connection is made to an address that was checked.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpcore
import httpx

from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.serve.api.errors import APIError

REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Awaitable[Iterable[str]]]
"""(host, port) -> addresses."""


async def resolve(host: str, port: int) -> list[str]:
    """Look a name up with the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an IP address is public. IPv4 addresses that are embedded in IPv6 ones are checked as well."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only, which it looks up itself.

    Args:
        resolve: looks names up.
        dialler: opens the connection, to an address and never a name.
    """

    def __init__(self, resolve: Resolve, dialler: httpcore.AsyncNetworkBackend):
        self._resolve = resolve
        self._dialler = dialler

    async def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        try:
            addresses = list(await self._resolve(host, port))
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError("the name cannot be resolved") from error
        if not addresses or not all(is_public(address) for address in addresses):
            raise APIError("The image URL's host is not a public address.", code="image_url_refused")
        return await self._dialler.connect_tcp(addresses[0], port, *args, **kwargs)


def checked_domain(domain: str) -> str:
    """A domain of `--allow-image-urls` as `ImageFetcher` compares it: in lower case, letters beyond ASCII encoded.

    Raises:
        ValueError: if it is none, but an address with a scheme, a port or a path.
    """
    plain = domain.strip().strip(".").lower()
    try:
        host = httpx.URL(scheme="http", host=plain).raw_host.decode("ascii")
    except httpx.InvalidURL:
        host = ""
    if re.fullmatch(r"[\w-]+(\.[\w-]+)*", host, re.ASCII) is None:
        raise ValueError(f"--allow-image-urls {domain} is no domain: it is as example.org, without https:// and path.")
    return host


@dataclass(frozen=True)
class ImageFetcher:
    """Downloads remote pictures.

    Args:
        allowed: whether URLs are fetched at all.
        domains: the only ones allowed, with their subdomains, as `checked_domain` gives them; empty for all.
        limits: of one picture; those whose names begin with `fetch` are used.
        resolve, dialler: see `CheckedBackend`.
    """

    allowed: bool = False
    domains: Sequence[str] = ()
    limits: RequestLimits = field(default_factory=RequestLimits)
    resolve: Resolve = resolve
    dialler: httpcore.AsyncNetworkBackend | None = None

    async def fetch(self, url: str) -> bytes:
        """Download the body at a URL.

        Raises:
            APIError: if it is not allowed, not public, too large, too slow, or does not answer with status 200.
        """
        if not self.allowed:
            if not url.lower().startswith(("http://", "https://")):
                raise _refused("This is no picture: send one as a data URL (data:image/png;base64,...).")
            raise _refused("Image URLs are not fetched by this server; send the image as a data URL.")
        dialler: Any = self.dialler or httpcore.AnyIOBackend()
        backend = CheckedBackend(self.resolve, dialler)
        try:
            async with (
                asyncio.timeout(self.limits.fetch_seconds),
                httpcore.AsyncConnectionPool(network_backend=backend) as pool,
            ):
                for _ in range(self.limits.fetch_redirects + 1):
                    target = self._check(url)
                    async with pool.stream("GET", target, headers=[(b"Host", _host_header(target))]) as response:
                        if response.status not in REDIRECTS:
                            return await self._body(response)
                        url = _location(url, response)
                raise _refused(f"The image URL redirects more than {self.limits.fetch_redirects} times.")
        except TimeoutError as error:
            raise _refused(f"The image URL did not answer within {self.limits.fetch_seconds:g} seconds.") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise _refused("The image URL cannot be reached.") from error

    def _check(self, text: str) -> httpcore.URL:
        """Parse and check a URL, once; the connection and the request are made from the parts."""
        if any(character <= " " or character in "\\\x7f" for character in text):
            raise _refused("The image URL has spaces, control characters or backslashes.")
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, UnicodeError) as error:
            raise _refused("The image URL cannot be understood.") from error
        if url.scheme not in ("http", "https"):
            raise _refused("The image URL is neither http nor https nor a data URL.")
        if url.userinfo:
            raise _refused("The image URL has a user name or password.")
        if not url.host or not 0 < (url.port or 80) < 2**16:
            raise _refused("The image URL has no host, or a port that is none.")
        host = url.raw_host.decode("ascii").lower().rstrip(".")
        if self.domains and not any(host == domain or host.endswith(f".{domain}") for domain in self.domains):
            raise _refused("The image URL's domain is not among those that this server fetches from.")
        return httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)

    async def _body(self, response: httpcore.Response) -> bytes:
        if response.status != 200:
            raise _refused(f"The image URL answered with status {response.status}.")
        body = bytearray()
        async for chunk in response.aiter_stream():
            body += chunk
            if len(body) > self.limits.fetch_bytes:
                raise _refused(f"The image is larger than {self.limits.fetch_bytes} bytes.")
        return bytes(body)


def _location(url: str, response: httpcore.Response) -> str:
    """The URL that a redirect leads to."""
    values = [value for name, value in response.headers if name.lower() == b"location"]
    if len(values) != 1:
        raise _refused("The image URL redirects to nowhere.")
    try:
        location = values[0].decode("ascii")
        return str(httpx.URL(url).join(location)) if "\\" not in location else location
    except (httpx.InvalidURL, UnicodeError) as error:
        raise _refused("The image URL redirects to what cannot be understood.") from error


def _host_header(url: httpcore.URL) -> bytes:
    host = b"[%b]" % url.host if b":" in url.host else url.host
    return host if url.port is None else b"%b:%d" % (host, url.port)


def _refused(message: str) -> APIError:
    return APIError(message, code="image_url_refused")
