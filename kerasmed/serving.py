"""Start the app's server: which options Streamlit gets, and how it ends."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

NOTEBOOK = "08_brain_cascade"  # whose runs the app shows
ADDRESS = "127.0.0.1"
MAX_MEGABYTES = 64  # of an uploaded file
MAX_MEGAPIXELS = 16  # of an uploaded picture; a slice has less than 1, and deep colour takes 40 bytes a pixel to read
OPTIONS = {
    # This machine alone: a page of another host that gives itself this address is refused as well.
    **{"server.address": ADDRESS, "browser.serverAddress": ADDRESS, "server.allowedHosts": [ADDRESS, "localhost"]},
    **{"server.enableXsrfProtection": "true", "server.enableCORS": "true", "server.maxUploadSize": MAX_MEGABYTES},
    # Nothing is asked, sent, watched or shown that is Streamlit's and not the app's.
    **{"browser.gatherUsageStats": "false", "server.showEmailPrompt": "false", "server.fileWatcherType": "none"},
    **{"client.toolbarMode": "minimal", "client.showErrorLinks": "false", "client.showErrorDetails": "none"},
    **{"logger.hideWelcomeMessage": "true", "runner.magicEnabled": "false"},
    **{"theme.base": "light", "theme.primaryColor": "#3b6ea5"},
}


def command(*, port: int, browser: bool) -> list[str]:
    """Put together what starts the server.

    Args:
        port: of `ADDRESS`.
        browser: open the page in a browser, where there is a display.

    Raises:
        ImportError: Streamlit is not installed.
        ValueError: the port is taken, or not allowed.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ImportError(
            "the app needs Streamlit, which is not installed: pip install 'kerasmed[app]' (in a clone: -e '.[app]')."
        )
    try:
        socket.create_server((ADDRESS, port)).close()
    except OSError as error:
        raise ValueError(f"port {port} cannot be had ({error.strerror}); name another with --port.") from error
    options = {**OPTIONS, "server.port": port, **({} if browser else {"server.headless": "true"})}
    listed = [(name, value if isinstance(value, list) else [value]) for name, value in options.items()]
    flags = [f"--{name}={value}" for name, values in listed for value in values]
    return [sys.executable, "-m", "streamlit", "run", str(Path(__file__).with_name("app.py")), *flags]


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a server, with `environment` added to this process's, until it ends, or Ctrl-C or SIGTERM ends both.

    Returns:
        Its exit code; 0 where it was told to end.
    """

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    process = subprocess.Popen(command, env=os.environ | environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
