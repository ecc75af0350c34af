"""A model that cannot be had: is it the name, the hub, or the network? A hub of our own answers."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub
import pytest

from vlcache_triton.apps.cli.console import UserError
from vlcache_triton.apps.cli.hub import check_exists

#: What the hub says of each model: status, and the header that tells why.
ANSWERS = {
    "some/unknown": (404, "RepoNotFound"),
    "some/gated": (403, "GatedRepo"),
    "some/empty": (404, "EntryNotFound"),
    "some/broken": (500, None),
    "some/model": (200, None),
}


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        status, code = ANSWERS["/".join(self.path.split("/")[1:3])]
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "as the hub words it")
        self.send_header("ETag", '"1"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    _ask(monkeypatch, address)
    yield address
    server.shutdown()
    thread.join()
    server.server_close()


def _ask(monkeypatch, address, offline=False):
    for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", offline)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("some/unknown", "which is no folder, and unknown to the hub"),
        ("some/gated", "which is gated: ask for access at http://127.0.0.1"),
        ("some/empty", "which has no config.json on the hub"),
        ("some/broken", "for which the hub answered with an error: "),
        ("not a name", "which is no folder, and no name that"),
        ("./missing/folder", "which is no folder, and no name that"),
    ],
)
def test_the_hub_says_no(hub, model, reason):
    with pytest.raises(UserError) as error:
        check_exists(model)
    message = str(error.value)
    assert message.startswith(f"model: got {model!r}, {reason}")
    assert len(message.splitlines()) == 1 and "network" not in message


def test_the_hub_has_it(hub):
    check_exists("some/model")


def test_without_a_network(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    _ask(monkeypatch, address)
    with pytest.raises(UserError) as error:
        check_exists("some/model")
    message = str(error.value)
    assert "the hub cannot be reached" in message and "is there a network?" in message
    assert "unknown" not in message and len(message.splitlines()) == 1


def test_where_the_network_is_not_to_be_used(monkeypatch):
    _ask(monkeypatch, "http://127.0.0.1:9", offline=True)
    with pytest.raises(UserError, match=r"not downloaded yet; .*\(HF_HUB_OFFLINE\)"):
        check_exists("some/model")


def test_a_folder_asks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    check_exists(str(tmp_path))
