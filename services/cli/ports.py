"""Whether an address can be listened on, and who has it where that can be seen."""

import errno
import socket

import psutil

from common.errors import SettingsError


def check_free(host: str, port: int) -> None:
    """Returns when `host:port` can be bound; port 0 always can.

    Raises:
        SettingsError: the port is taken (names it, and its holder where visible) or the host isn't ours.
    """
    family, _, _, _, address = _resolve(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise SettingsError(_why(host, port, error)) from error


def _resolve(host: str, port: int) -> tuple[int, int, int, str, tuple[str | int, ...]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingsError(
            f"host = {host!r}: {error.strerror}; expected an address of this machine, such as 127.0.0.1"
        ) from error
    return found[0]  # type: ignore[return-value]


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port = {port}: in use on {host}{holder(port)}; choose another, for example --port {port + 1 if port < 65535 else 0}"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"host = {host!r} is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"port = {port}: not allowed for this user; choose one above 1023"
    return f"host = {host!r}, port = {port}: {error.strerror}"


def holder(port: int) -> str:
    """' by NAME (pid N)' for who listens on `port`; empty where this user can't see it."""
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError):
        return ""
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port and connection.pid:
            try:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
            except psutil.Error:
                return f" by pid {connection.pid}"
    return ""
