"""A headless Chromium, driven through its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",  # of root in a container there is none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-port=0",
)
SECONDS = 60.0


def chromium() -> str | None:
    """The program, if this machine has one that runs: Ubuntu's is a script that asks for a snap."""
    for program in filter(None, map(shutil.which, PROGRAMS)):
        if subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0:
            return program
    return None


class Tab:
    """One page; `call` is a method of the protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=SECONDS)
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, if need be awaited."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until it is true; while one page follows another there is none to ask."""
        end = asyncio.get_running_loop().time() + SECONDS
        while True:
            with contextlib.suppress(AssertionError):
                if value := await self.evaluate(expression):
                    return value
            assert asyncio.get_running_loop().time() < end, f"never came true: {expression}"
            await asyncio.sleep(0.05)

    async def screen(self, width: int, height: int, scheme: str = "light") -> None:
        """A screen of this size, with `scheme` preferred."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self) -> bytes:
        """PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])


@contextlib.asynccontextmanager
async def open_tab(program: str, url: str, width: int = 1000, height: int = 800) -> AsyncIterator[Tab]:
    """A tab that shows `url`; Chromium ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its children write to the end
        process = await asyncio.create_subprocess_exec(
            program,
            *OPTIONS,
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(profile) / "DevToolsActivePort", process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [target for target in await answer.json() if target["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    await tab.screen(width, height)
                    await tab.call("Page.navigate", url=url)
                    await tab.until(f"location.href === '{url}' && document.readyState === 'complete'")
                    yield tab
        finally:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _port(file: Path, process: asyncio.subprocess.Process) -> int:
    """Chromium writes it once it listens."""
    end = asyncio.get_running_loop().time() + SECONDS
    while True:
        with contextlib.suppress(OSError, IndexError, ValueError):
            return int(file.read_text().splitlines()[0])
        assert process.returncode is None, f"Chromium ended with status {process.returncode}"
        assert asyncio.get_running_loop().time() < end, "Chromium does not listen"
        await asyncio.sleep(0.05)
