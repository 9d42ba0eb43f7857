"""Dialling a party as a program of one's own would: a channel with an identity, and what comes of a stream of raw chunks."""

from __future__ import annotations

from collections.abc import Iterable

import grpc

from mpc_fl.crypto.certificates import Identity, host_name


def channel_to(name: str, port: int, identity: Identity) -> grpc.Channel:
    """To the party `name` on this machine, with the certificate of `identity`."""
    credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
    options = [("grpc.ssl_target_name_override", host_name(name))]
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options=options)


def stream_end(channel: grpc.Channel, chunks: Iterable[bytes], seconds: float) -> str:
    """Send, wait for the end of the stream, return its status and details."""
    call = channel.stream_stream("/mpc_fl.Link/Send")(iter(chunks), wait_for_ready=True, timeout=seconds)
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "OK"
