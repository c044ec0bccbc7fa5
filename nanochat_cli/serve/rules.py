"""Who may use a server, by the address that it listens on. Needs nothing of the extra."""

import ipaddress
from dataclasses import dataclass

from nanochat_cli.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """hosts: allowed names in Host, without a port; None: any. key: demanded as a bearer token, if there is one."""

    hosts: frozenset[str] | None
    key: str | None
    max_body: int = 1 << 20


def rules_for(host: str, key: str | None) -> Rules:
    """Those of a server that listens on `host`. Raises ConfigError for an address that others reach without a key."""
    if key is not None and not key.strip():
        raise ConfigError("--api-key is empty: nobody could use the server; leave it out or choose a key")
    if is_loopback(host):
        return Rules(frozenset({"localhost", "127.0.0.1", "[::1]", host}), key)
    if key is None:
        raise ConfigError(
            f"--host {host} can be reached from other machines: set a key (--api-key or NANOCHAT_API_KEY), "
            "or leave out --host to serve this machine only"
        )
    return Rules(None, key)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
