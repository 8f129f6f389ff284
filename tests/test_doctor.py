"""What `emmech doctor` says about this machine, about servers that answer, and about what is not there."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from emmech import doctor
from emmech.models import default, known


class Handler(BaseHTTPRequestHandler):
    """Answers with ``status``, or 401 where a ``key`` is wanted and another came."""

    def do_GET(self):
        self.server.asked.append(self.path)
        wanted = self.server.key and f"Bearer {self.server.key}"
        self.send_response(401 if wanted and self.headers["Authorization"] != wanted else self.server.status)
        self.end_headers()
        self.wfile.write(b'{"data": []}')

    def log_message(self, *_):
        pass


@contextmanager
def running(status: int = 200, key: str | None = None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.key, server.asked = status, key, []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No key, no server and no hub but those of the test."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def named(findings, name):
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_the_screen_fits_and_says_what_is_there(emmech):
    code, out, _ = emmech("doctor")
    assert code == 0
    assert len(out.splitlines()) < 50
    assert f"torch {version('torch')}" in " ".join(out.split())
    assert "HF_HUB_OFFLINE is set" in out


def test_json_holds_the_same_findings(emmech):
    code, out, _ = emmech("doctor", "--json")
    assert code == 0
    found = json.loads(out)
    assert {"packages", "machine", "extras", "models", "images", "endpoints"} == {f["topic"] for f in found}
    assert not [f for f in found if f["state"] == "missing"]


def test_every_extra_of_the_package_is_listed():
    shown = {finding.name for finding in doctor.extras()}
    assert {"api", "harness", "inspect", "images", "study", "notebooks", "docs", "quantization"} <= shown
    assert named(doctor.extras(), "dev").state == "ok"  # or these tests would not run


@pytest.mark.parametrize(
    ("status", "key", "state", "said"),
    [
        (200, None, "ok", "answers"),
        (200, "secret", "ok", "wants another key (401)"),
        (404, None, "missing", "answers 404 to /models"),
        (500, None, "missing", "answers 500"),
    ],
)
def test_a_server_that_was_named_is_asked_for_its_models(status, key, state, said):
    with running(status, key) as server:
        (found, _) = doctor.endpoints(server.address)
    assert (found.state, server.asked) == (state, ["/models"])
    assert said in found.detail
    assert server.address in found.detail


def test_the_key_is_sent_and_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running(key="secret") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{server.address}/v1/".replace("//127", "//user:secret@127"))
        (found, _) = doctor.endpoints(None)
        assert "secret" not in found.detail
        (found, _) = doctor.endpoints(f"{server.address}/v1/")
    assert (found.detail, found.state) == (f"{server.address}/v1/: answers", "ok")
    assert server.asked[-1] == "/v1/models"


def test_a_named_server_that_is_not_there_is_missing_and_fails_the_command(emmech):
    with running() as server:
        address = server.address
    code, out, _ = emmech("doctor", "--url", address)
    assert code == 1
    assert "missing" in out and "Start the server" in " ".join(out.split())


def test_a_server_of_the_environment_that_is_not_there_is_only_absent(monkeypatch):
    with running() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.address)
    assert next(doctor.endpoints(None)).state == "absent"


def test_the_hub_that_is_asked_is_the_one_of_the_environment(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with running() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        found = named(doctor.endpoints(None), "model hub")
    assert found.state == "ok"
    assert server.asked == ["/api/models?limit=1"]


def test_a_model_that_was_not_fetched_is_absent_and_one_that_was_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = named(doctor.models(), "qwen2.5-coder-1.5b")
    assert (found.state, found.fix) == ("absent", "emmech models get qwen2.5-coder-1.5b")
    folder = known.KNOWN["qwen2.5-coder-1.5b"].folder
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b" " * 3 * 2**20)
    found = named(doctor.models(), "qwen2.5-coder-1.5b")
    assert (found.state, found.detail) == ("ok", f"{folder} (3 MiB)")


def test_without_the_embedded_model_the_command_fails_and_says_how_to_get_it(emmech, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default, "_PACKAGE", "no_such_package")
    code, out, _ = emmech("doctor", "--json")
    assert code == 1
    (found,) = [f for f in json.loads(out) if f["state"] == "missing"]
    assert (found["name"], found["fix"]) == ("smollm2", "Run `make install`")


@pytest.mark.weights
def test_the_embedded_model_is_installed_before_and_converted_after_its_first_use(monkeypatch, tmp_path):
    converted = default.embedded_path()
    shown = named(doctor.models(), "smollm2").detail
    assert str(converted).removeprefix(str(Path.home())) in shown and "MiB" in shown
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert named(doctor.models(), "smollm2").detail.endswith("converted when first used")


def test_a_package_that_is_too_old_or_not_there_is_named():
    assert doctor._shortfall(Requirement("torch>=2")) is None
    assert doctor._shortfall(Requirement("torch>=99")) == f"torch>=99 wanted, {version('torch')} is there"
    assert doctor._shortfall(Requirement("no-such-package")) == "no-such-package is not installed"


def test_a_needed_package_that_is_too_old_fails_the_command(emmech, monkeypatch):
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement("typer>=99")])
    code, out, _ = emmech("doctor")
    assert code == 1
    assert "typer>=99 wanted" in out
