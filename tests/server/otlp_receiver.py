"""A receiver of OpenTelemetry spans on 127.0.0.1."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass
class Receiver:
    """The spans received so far.

    Attributes:
        url: Where exporters send them (protobuf over HTTP).
    """

    url: str = ""
    _spans: list[Any] = field(default_factory=list)

    def of_trace(self, trace_id: str) -> list[Any]:
        return [span for span in list(self._spans) if span.trace_id.hex() == trace_id]


@contextmanager
def receive() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    receiver._spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        receiver.url = f"http://127.0.0.1:{http.server_port}/v1/traces"
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            http.shutdown()
            thread.join()
