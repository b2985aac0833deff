"""URLs of servers: which ``--model`` is one, and what may be in it."""

import ipaddress
from urllib.parse import urlsplit

from integration._cli import CommandError


def is_server_url(spec: str) -> bool:
    """Whether a ``--model`` names a server."""
    return spec.lower().startswith(("http://", "https://"))


def check_url(url: str) -> tuple[str, str]:
    """Give the base URL and its host.

    Raises:
        CommandError: Exit 2; the URL is malformed, or holds a password.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise CommandError(f"the server's URL is malformed: {error}") from error
    if not host or not is_server_url(url):
        raise CommandError(f"got '{url}', expected a URL such as http://127.0.0.1:8080/v1")
    if parts.username or parts.password:
        raise CommandError("the server's URL holds a password; give the key in OPENAI_API_KEY")
    if parts.query or parts.fragment:
        raise CommandError(f"got '{url}', expected a base URL without ? and #")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return parts._replace(path=path or "/v1").geturl(), host


def is_this_machine(host: str) -> bool:
    """Whether a host is the machine that this runs on."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified
