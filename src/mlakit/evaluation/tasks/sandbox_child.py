"""The other end of `sandbox`: run as a script, never imported. Plain standard library.

Reads one JSON order from standard input, gives up what the program must not have, runs it, and
writes whether its end was reached.
"""

import ctypes
import json
import os
import resource
import sys
from typing import Any

NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
"""Linux' CLONE_NEWUSER and CLONE_NEWNET (sched.h)."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv", "os.unsetenv"}
REFUSED = ("os", "subprocess", "socket", "shutil", "pty", "fcntl", "resource", "sqlite3", "syslog")
"""Modules whose every audit event but the harmless ones is refused."""


def limit(order: dict[str, Any]) -> None:
    """Sets the kernel's limits; hard ones, so that the program cannot lift them."""
    seconds = order["cpu_seconds"]
    limits = {
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_FSIZE: (order["file_bytes"],) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_NPROC: (0, 0),
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = (order["memory_bytes"],) * 2
    for kind, (soft, hard) in limits.items():
        ceiling = resource.getrlimit(kind)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(kind, (soft, hard))


def leave_network() -> None:
    """Moves into a network namespace without any device, where the kernel lets us."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(NEW_USER | NEW_NETWORK)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: raises before the act."""
    module = event.partition(".")[0]
    if module == "ctypes":
        raise ImportError(f"{event} is refused")  # what NumPy expects where ctypes is missing
    if module in REFUSED and event not in HARMLESS:
        raise PermissionError(f"{event} is refused")
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
        raise PermissionError(f"writing {arguments[0]!r} is refused")


def main() -> None:
    """Runs the ordered program."""
    order = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    leave_network()
    limit(order)
    del sys.modules["ctypes"]
    sys.modules["_posixsubprocess"] = None  # type: ignore[assignment]  # it starts processes unaudited
    sys.addaudithook(refuse)
    error = None
    try:
        exec(compile(order["program"], "<generated>", "exec"), {"__name__": "generated"})
    except BaseException as raised:
        error = type(raised).__name__
    os.write(verdict, json.dumps({"token": order["token"], "error": error}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
