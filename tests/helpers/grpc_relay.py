"""A gRPC server between SuperNodes and a SuperLink: what it cannot hand on as gRPC does not get through."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc


@dataclass(frozen=True)
class Call:
    """One call, answered."""

    method: str  # such as /flwr.proto.Fleet/PushObject
    request: bytes
    response: bytes


class Relay(grpc.GenericRpcHandler):
    """Hands calls on, and keeps them, for as long as a `with` block.

    Parameters
    ----------
    target : int
        The port of 127.0.0.1 to hand calls on to.
    """

    def __init__(self, target: int) -> None:
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{target}", unlimited)
        self.server = grpc.server(ThreadPoolExecutor(16), [self], options=unlimited)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.calls: list[Call] = []

    def __enter__(self) -> Relay:
        self.server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stop(1).wait()
        self.channel.close()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Return what answers a call: without serializers, so that bytes are handed on as they are."""

        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            own = [
                item for item in context.invocation_metadata() if not item.key.startswith(("grpc-", "user-agent"))
            ]
            try:
                response = self.channel.unary_unary(details.method)(request, metadata=own, timeout=60)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())
            self.calls.append(Call(details.method, request, response))
            return response

        return grpc.unary_unary_rpc_method_handler(answer)
