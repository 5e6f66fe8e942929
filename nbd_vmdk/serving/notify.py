"""Telling the service manager how we are: the notification protocol of systemd, sd_notify(3).

One datagram of ``NAME=value`` lines to the socket that ``$NOTIFY_SOCKET`` names.  Without that variable
nobody asked, and nothing is done; what can't be told is no reason to stop serving.
"""

import os
import socket


def notify(**news: str) -> bool:
    """Tell ``READY="1"``, ``STATUS="..."`` and the like; whether somebody was told."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where.startswith(("/", "@")):
        return False
    # "@" stands for the NUL byte that begins an abstract address.
    address = "\0" + where[1:] if where.startswith("@") else where
    text = "\n".join(f"{name}={value.splitlines()[0] if value else ''}" for name, value in news.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as told:
            told.sendto(text.encode(errors="replace"), address)
    except OSError:
        return False
    return True
