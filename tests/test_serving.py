import importlib.util
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from kerasmed import serving


def _free_port():
    with socket.create_server((serving.ADDRESS, 0)) as server:
        return server.getsockname()[1]


@pytest.mark.skipif(importlib.util.find_spec("streamlit") is None, reason="streamlit is not installed")
def test_command_binds_to_this_machine_and_streamlit_knows_its_options():
    from streamlit import config

    port = _free_port()
    command = serving.command(port=port, browser=False)
    assert command[:4] == [sys.executable, "-m", "streamlit", "run"] and command[4].endswith("app.py")
    flags = [flag.removeprefix("--").partition("=")[::2] for flag in command[5:]]
    assert {name for name, _ in flags} <= set(config.get_config_options())
    given = dict(flags)
    assert given["server.address"] == "127.0.0.1" and given["server.port"] == str(port)
    assert given["browser.gatherUsageStats"] == "false" and given["server.enableXsrfProtection"] == "true"
    assert given["server.headless"] == "true"
    assert "--server.headless=true" not in serving.command(port=port, browser=True)


def test_command_without_streamlit_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'kerasmed\[app\]'"):
        serving.command(port=8501, browser=False)


def test_command_refuses_a_taken_port(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with socket.create_server((serving.ADDRESS, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be had .*--port"):
            serving.command(port=port, browser=False)


def test_run_returns_the_exit_code_and_adds_to_the_environment():
    code = "import os, sys; sys.exit(int(os.environ['CODE']) if 'PATH' in os.environ else 1)"
    before = signal.getsignal(signal.SIGTERM)
    assert serving.run([sys.executable, "-c", code], {"CODE": "7"}) == 7
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_ended_ends_the_server_too(sent):
    script = textwrap.dedent("""
        import signal, sys
        from kerasmed import serving
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started without it
        sys.exit(serving.run([sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"], {}))
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    (child,) = psutil.Process(process.pid).children()
    started = time.monotonic()
    process.send_signal(sent)
    assert process.wait(timeout=30) == 0 and not child.is_running()
    assert time.monotonic() - started < 9  # before it is killed
    process.stdout.close()
