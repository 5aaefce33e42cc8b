"""What may stand between hospital and gateway: an HTTP proxy here, a reverse proxy there."""

from __future__ import annotations

import base64
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from medfl.client import cli_defaults
from medfl.client.cli import main
from medfl.client.settings import ClientSettings

from .conftest import World, free, until, write_hospital

NGINX = Path(__file__).resolve().parent.parent.parent / "deploy" / "proxy" / "nginx.conf"
SECRET = "Basic " + base64.b64encode(b"user:secret").decode()


class HttpProxy(socketserver.ThreadingTCPServer):
    """A hospital's proxy: CONNECT to one place, with a password, and nothing else."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, allowed: str) -> None:
        self.allowed = allowed
        self.asked: list[str] = []
        self.refused: list[str] = []
        super().__init__(("127.0.0.1", 0), _Connect)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Connect(socketserver.StreamRequestHandler):
    server: HttpProxy

    def handle(self) -> None:
        first = self.rfile.readline().decode()
        headers = [line.decode().strip() for line in iter(self.rfile.readline, b"\r\n")]
        secret = [h.partition(":")[2].strip() for h in headers if h.lower().startswith("proxy-a")]
        if first.split()[:2] != ["CONNECT", self.server.allowed] or secret != [SECRET]:
            self.server.refused.append(first)
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
            return
        self.server.asked.append(first.strip())
        host, port = self.server.allowed.split(":")
        with socket.create_connection((host, int(port))) as there:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=_pour, args=(there, self.connection), daemon=True)
            back.start()
            _pour(self.connection, there)
            back.join()


def _pour(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture
def nginx(world: World) -> Iterator[tuple[str, str, str]]:
    """deploy/proxy/nginx.conf with free ports: where it listens, medfl's and the web's address."""
    if (
        not shutil.which("nginx")
        or not Path("/usr/lib/nginx/modules").joinpath("ngx_stream_module.so").exists()
    ):
        pytest.skip("nginx with the stream module (libnginx-mod-stream) is not there")
    own, medfl, web = free(), free(), free()
    text = NGINX.read_text()
    for line, other in (
        ("listen 443;", f"listen {own};"),
        ("server 127.0.0.1:8443;", f"server {medfl};"),
        ("server 127.0.0.1:8444;", f"server {web};"),
        ("load_module modules/", "load_module /usr/lib/nginx/modules/"),
    ):
        assert text.count(line) == 1
        text = text.replace(line, other)
    folder = world.folder / "nginx"
    folder.mkdir()
    (folder / "nginx.conf").write_text(text)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off;"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            until(lambda: _answers(own), 20)
            yield own, medfl, web
        finally:
            process.terminate()
            assert process.stderr is not None
            told = process.stderr.read().decode()
    assert "emerg" not in told


def _answers(address: str) -> bool:
    host, port = address.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hospital_works_through_its_http_proxy_and_the_coordinators_nginx(
    world: World, nginx: tuple[str, str, str]
) -> None:
    front, medfl, web = nginx
    world.done("server", "init", str(world.fed), "--name", "Test", "--listen", medfl)
    from .conftest import STUDY

    (world.folder / "study.toml").write_text(STUDY)
    world.done("server", "study", "publish", "study.toml")
    world.start("server", "start", says="listening on")
    # Not 127.0.0.1: medfl keeps that one out of the proxy, as its own processes meet there.
    address = f"localhost:{front.split(':')[1]}"
    write_hospital(world.folder / "north", "north")
    state = ("--state", str(world.folder / "north" / "state"))
    options = (*state, "--site", str(world.folder / "north" / "site.toml"))
    token = world.says("server", "invite", "north")["token"]
    with HttpProxy(address) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        through = f"http://user:secret@127.0.0.1:{proxy.port}"
        # As hospitals set it for everything; the loopback traffic must not go there.
        env = {"https_proxy": through, "http_proxy": through, "all_proxy": through}
        world.done("client", "enrol", address, "--token", token, *state, **env)
        world.done("client", "approve", "tiny", "--yes", *options, code=2, **env)
        world.done("client", "studies", *state, **env)
        world.done("client", "approve", "tiny", "--yes", *options, **env)
        client = world.start("client", "start", *options, says="Connected", **env)
        run = world.says("server", "run", "tiny", "--wait", "300")
        assert (run["state"], run["sites"]) == ("done", ["north"])
        assert world.end(client) == 0
        assert proxy.refused == []
        assert len(proxy.asked) >= 4
        assert set(proxy.asked) == {f"CONNECT {address} HTTP/1.1"}
        proxy.shutdown()
    log = (world.folder / "nginx" / "access.log").read_text().splitlines()
    by_name = [line.split()[1] for line in log if line.split()[1].endswith(".medfl.internal")]
    assert len(by_name) >= 4
    # What asks for another name gets to the web server, which is not there: never to medfl.
    host, port = front.split(":")
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_server((web.split(":")[0], int(web.split(":")[1]))) as site:
        site.settimeout(20)
        with socket.create_connection((host, int(port))) as raw:
            raw.settimeout(0.5)
            with pytest.raises(OSError, match="timed out"):
                context.wrap_socket(raw, server_hostname="www.example.org")
            with site.accept()[0] as arrived:
                assert b"www.example.org" in arrived.recv(4096)


def test_the_proxy_may_stand_in_client_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "client.toml"
    monkeypatch.setenv("MEDFL_CLIENT_TOML", str(file))
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    file.write_text('proxy = "http://proxy:3128"\n')
    import os

    import typer

    from medfl.client.cli import app

    monkeypatch.setenv("grpc_proxy", "")  # put back afterwards
    del os.environ["grpc_proxy"]
    cli_defaults.defaults(typer.main.get_command(app))
    assert os.environ["grpc_proxy"] == "http://proxy:3128"
    monkeypatch.setenv("https_proxy", "http://other:1")
    del os.environ["grpc_proxy"]
    cli_defaults.defaults(typer.main.get_command(app))
    assert "grpc_proxy" not in os.environ
    file.write_text('proxy = "https://proxy:3128"\n')
    assert main(["status", "--state", str(tmp_path)]) == 2
    assert "write http://host:port" in capsys.readouterr().err
    assert ClientSettings().faults() == []
