"""`plait serve`: a process that answers until it is told to stop."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from tests.cli.test_chat import base  # noqa: F401 (a fixture)

TIMEOUT = 120


@pytest.mark.parametrize(
    ("how", "code", "options", "name"), [(signal.SIGINT, 0, [], "base"), (signal.SIGTERM, 143, ["--name", "me"], "me")]
)
def test_it_answers_until_a_signal(base, how, code, options, name):  # noqa: F811
    command = [sys.executable, "-m", "plait", "serve", str(base), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        url = re.match(rf"serving {name} at (\S+), 8 rows", process.stderr.readline())[1]
        body = json.dumps({"prompt": "hello", "max_tokens": 3}).encode()
        with urllib.request.urlopen(f"{url}/completions", body, TIMEOUT) as answer:
            assert json.load(answer)["usage"]["prompt_tokens"] == 5
        process.send_signal(how)
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, err
    ended = json.loads(out)
    assert ended["requests"] == 1 if code == 0 else ended["error"] == "terminated"


def test_a_port_that_is_taken(plait, base):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = plait("serve", str(base), "--port", str(port))
    assert ran.code == 1
    assert ran.err == f"error: cannot listen at 127.0.0.1:{port} (Address already in use); --port 0 takes a free one\n"
