"""A headless Chromium driven over its debugging pipe, without any further dependency."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--remote-debugging-pipe",
]
_TIMEOUT_SECONDS = 60.0


class Chromium:
    """One browser with one tab, whose events are collected in ``events``."""

    def __init__(self, executable: str, profile: Path) -> None:
        child_reads, self._to_browser = os.pipe()
        self._from_browser, child_writes = os.pipe()

        def attach_pipes() -> None:  # Chromium reads commands from 3 and writes answers to 4
            read, write = os.dup(child_reads), os.dup(child_writes)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self._process = subprocess.Popen(
            [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=attach_pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        try:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        except BaseException:
            self.close()
            raise
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path) -> None:
        """Loads a file; ``events`` then holds what this page caused."""
        self.visit(path.as_uri())

    def visit(self, url: str) -> None:
        """Loads an address; ``events`` then holds what this page caused."""
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not self.seen("Page.loadEventFired"):
            self.events.append(self._receive())

    def seen(self, method: str) -> list[dict[str, Any]]:
        """Parameters of the events of one kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page (DevTools are exempt from its CSP)."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Waits until a JavaScript expression is true.

        Raises:
            AssertionError: It stays false.
        """
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def mouse(self, kind: str, x: float, y: float, **options: Any) -> None:
        """Sends one mouse event with the left button: ``Pressed``, ``Moved`` or ``Released``."""
        options = {"button": "left", "clickCount": 1, **options}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **options)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Presses and releases a named key; modifier 8 is Shift."""
        code = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        names = {"key": key, "code": key, "windowsVirtualKeyCode": code[key]}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **names)

    def window(self, width: int, height: int) -> None:
        """Sets the size of the visible page in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def close(self) -> None:
        """Ends the browser."""
        for descriptor in (self._to_browser, self._from_browser):
            os.close(descriptor)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from_browser], [], [], deadline - time.monotonic())
            chunk = os.read(self._from_browser, 1 << 16) if ready else b""
            assert chunk, "Chromium gave no answer"
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer: dict[str, Any] = json.loads(message)
        return answer
