"""Control a headless Chromium through a pipe, with the DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
# Switch off the browser's own network traffic.
QUIET = ("--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync")


def program():
    """Return the path of a browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Page:
    """One tab. `complaints`: errors on the console; `requests`: the URLs it fetched."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from, self._number, self._rest = to_browser, from_browser, 0, b""
        self.complaints, self.requests, self._session = [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 20)
            assert part, "the browser is gone"
            self._rest += part
        one, self._rest = self._rest.split(b"\0", 1)
        message = json.loads(one)
        given, kind = message.get("params", {}), message.get("method")
        if kind == "Runtime.exceptionThrown" or (kind == "Runtime.consoleAPICalled" and given["type"] == "error"):
            self.complaints.append(given)
        if kind == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(given["entry"]["text"])
        if kind == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        return message

    def open(self, path, width, *, height=900, dark=False):
        """Show a file in a window of some width (CSS pixels), light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while self.evaluate("document.readyState") != "complete":
            pass

    def evaluate(self, expression):
        actual = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in actual, actual
        return actual["result"].get("value")

    def key(self, name):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode={"Tab": 9}[name])

    def screenshot(self, path):
        """Return the window's picture, as a PNG."""
        made = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(made["data"]))


@contextlib.contextmanager
def opened():
    """Return a `Page` of a new browser with a profile of its own."""
    (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = f'exec "$0" "$@" 3<&{read_there} 4>&{write_there}'
        process = subprocess.Popen(
            ["bash", "-c", command, program(), *FLAGS, *QUIET, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        try:
            yield Page(write_here, read_here)
        finally:
            process.terminate()
            process.wait(30)
            os.close(write_here)
            os.close(read_here)
