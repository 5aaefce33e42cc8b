"""Flower's SuperNode as a child process: `python -m medfl.client.supernode HOST:PORT`.

It talks to the tunnel's end on this machine, and hands tasks only to who knows the secret.
"""

from __future__ import annotations

import os
import sys

from medfl.common.child import end_with_parent, first_line


def main() -> int:
    """The child: tunnel and port as arguments, the secret as first line of the standard input."""
    superlink, port = sys.argv[1:3]
    secret = first_line()
    end_with_parent()
    from flwr.supernode.cli import flower_supernode

    # Flower reads the secret from a path; this one leaves nothing on the disk.
    reading, writing = os.pipe()
    os.write(writing, secret.encode())
    os.close(writing)
    sys.argv = [
        "flower-supernode",
        "--insecure",  # loopback to loopback; what leaves the machine goes through the tunnel
        *("--superlink", superlink),
        *("--isolation", "process"),
        *("--host", "127.0.0.1"),
        *("--port", port),
        *("--superexec-auth-secret-file", f"/dev/fd/{reading}"),
    ]
    flower_supernode()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
