"""How a gateway and its client learn which replica has a request.

Invariant: the message that tells the gateway is not ASGI's, and never reaches the server.
"""

from __future__ import annotations

from vllm_flashtrace.scale.deploy.exchange import Message

REPLICA_HEADER = b"x-flashtrace-replica"
_TAKEN = "flashtrace.taken"


def taken_by(replica: str) -> Message:
    """The message with which a replica takes a request."""
    return {"type": _TAKEN, "replica": replica}


def who_took(message: Message) -> str | None:
    """The replica, if the message says that it took the request."""
    return message["replica"] if message["type"] == _TAKEN else None


def replica_header(replica: str) -> tuple[bytes, bytes]:
    """The header of an answer that names its replica."""
    return REPLICA_HEADER, replica.encode()
