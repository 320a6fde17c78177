"""Sources of images: what a request may name, and what it may not reach."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from lfm2vl_edge import ConfigError, ImageError
from lfm2vl_edge.server.images import ImagePolicy, Images
from lfm2vl_edge.server.urls import AllowedUrls
from tests.hub_server import listening
from tests.server.conftest import SCENE, Serve, data_url, encoded, question

PNG = SCENE.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder, with links out of it, and a secret image beside it."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    shutil.copy(SCENE, root / "a.png")
    shutil.copy(SCENE, root / "sub" / "b c.png")
    shutil.copy(SCENE, tmp_path / "secret.png")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to("sub/b c.png")
    os.mkfifo(root / "fifo.png")
    return root


@pytest.fixture
def rooted(folder: Path) -> Images:
    return Images(ImagePolicy(max_images=4, max_pixels=10**7, root=folder))


@pytest.mark.parametrize(
    "name", ["a.png", "sub/b c.png", "./a.png", "in.png", "file:a.png", "file:sub/b%20c.png", "sub/../a.png"]
)
def test_files_of_the_folder(rooted: Images, name: str) -> None:
    assert rooted.bytes_of(name) == PNG


def test_urls_of_files_of_the_folder(rooted: Images, folder: Path) -> None:
    assert rooted.bytes_of(f"file://{folder}/a.png") == PNG
    assert rooted.bytes_of(f"file://localhost{folder}/a.png") == PNG
    assert rooted.bytes_of(f"file:{folder}/a.png") == PNG


@pytest.mark.parametrize(
    "name",
    [
        "out.png",
        "../secret.png",
        "up/secret.png",
        "sub/../../secret.png",
        "file:../secret.png",
        "file:%2e%2e/secret.png",
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "/etc/hosts.x",
        "~/secret.png",
        "fifo.png",
        "sub.x",
        "file:sub",
        "file:",
        "file://evil.example/a.png",
        "file:a.png%00.jpg",
        "file:///proc/self/environ",
        "nothing.png",
        f"{'a' * 900}.png",
    ],
)
def test_no_file_outside_of_the_folder(rooted: Images, name: str) -> None:
    with pytest.raises(ImageError, match="not a file in the image folder") as caught:
        rooted.bytes_of(name)
    assert "secret" not in str(caught.value).replace("secret.png", "")


@pytest.mark.parametrize("key", ["path", "image", "url", "image_url", "base64"])
@pytest.mark.parametrize("source", [str(SCENE), f"file://{SCENE}", "file:///etc/passwd", "~/x.png", "0003.png"])
def test_no_local_path_without_a_folder(serve: Serve, key: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCENE.parent)
    if source != str(SCENE) and key != "path":
        return
    response = serve().chat(question(image={"type": "image", key: source}))
    assert response.status == 400
    assert response.error["code"] == "invalid_image"


def test_no_local_path_in_any_field(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCENE.parent)
    for key in ("path", "image", "url", "image_url", "base64"):
        for source in (str(SCENE), SCENE.name, f"file://{SCENE}", f"file:{SCENE.name}", f" {SCENE}"):
            response = here.chat(question(image={"type": "image", key: source}))
            assert response.status == 400, (key, source)
            assert response.error["code"] == "invalid_image"


def test_a_folder_by_the_server(serve: Serve, folder: Path) -> None:
    here = serve(images={"root": folder})
    assert here.chat(question(image="file:a.png")).text == "2"
    assert here.chat(question(image={"type": "image", "path": "sub/b c.png"})).text == "2"
    assert here.chat(question(image="../secret.png")).status == 400
    assert here.chat(question(image=encoded())).text == "2"


@pytest.mark.parametrize(
    "image",
    [5, ["data:"], {"image_url": {"url": 3}}, "data:image/png;base64", "data:image/png;base64,!!!", "AAAA", ""],
)
def test_what_is_no_image(here: Any, image: Any) -> None:
    part = {"type": "image_url", "image_url": {"url": image}}
    response = here.chat(question(image=part))
    assert response.status == 400
    assert response.error["code"] in ("invalid_image", "invalid_messages")


def test_an_image_of_too_many_pixels(here: Any) -> None:
    import base64
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    response = here.chat(question(image=url))
    assert response.status == 400
    assert "megapixels" in response.error["message"]


class _Handler(BaseHTTPRequestHandler):
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(PNG)))
        self.end_headers()
        self.wfile.write(PNG)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def seen() -> list[str]:
    """Paths that were requested of the web server."""
    return []


@pytest.fixture
def web(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A web server with an image at every path, which redirects from /to/URL to that URL."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with listening(type("Handler", (_Handler,), {"seen": seen})) as url:
        yield url


def test_no_url_is_downloaded_by_default(here: Any, web: str, seen: list[str]) -> None:
    response = here.chat(question(image=f"{web}/a.png"))
    assert response.status == 400
    assert "--allow-image-url" in response.error["message"]
    assert seen == []


def test_urls_with_an_allowed_prefix(serve: Serve, web: str, seen: list[str]) -> None:
    here = serve(images={"urls": AllowedUrls((f"{web}/cam/", f"{web}/to/"))})
    assert here.chat(question(image=f"{web}/cam/a.png")).text == "2"
    assert here.chat(question(image=f"{web}/to/{web}/cam/a.png")).text == "2"
    before = len(seen)
    port = web.rpartition(":")[2]
    for refused in (
        f"{web}/other/a.png",
        f"{web}/cam/../other/a.png",
        f"{web}/cam/%2e%2e/other/a.png",
        f"{web}/cam/%252e%252e/a.png",
        f"http://localhost:{port}/cam/a.png",
        f"{web}@evil.example/cam/a.png",
        f"https://127.0.0.1:{port}/cam/a.png",
        "ftp://127.0.0.1/cam/a.png",
        "gopher://127.0.0.1/cam/a.png",
    ):
        assert here.chat(question(image=refused)).status == 400, refused
    assert len(seen) == before


@pytest.mark.parametrize(
    "target",
    ["{web}/other", "http://localhost:{port}/cam/x", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd"],
)
def test_each_redirect_is_checked(serve: Serve, web: str, seen: list[str], target: str) -> None:
    here = serve(images={"urls": AllowedUrls((f"{web}/to/", f"{web}/cam/"))})
    location = target.format(web=web, port=web.rpartition(":")[2])
    response = here.chat(question(image=f"{web}/to/{location}"))
    assert response.status == 400
    assert len(seen) == 1


def test_a_prefix_without_a_host_allows_public_hosts_only(
    serve: Serve, web: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = serve(images={"urls": AllowedUrls(("http://", "https://"))})
    port = web.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "[::1]", "0", "2130706433", "127.1", "[::ffff:127.0.0.1]"):
        assert here.chat(question(image=f"http://{host}:{port}/a.png")).status == 400, host
    for host in ("169.254.169.254", "10.0.0.1", "192.168.1.1", "[fe80::1]", "[fd00::1]", "100.64.0.1", "224.0.0.1"):
        response = here.chat(question(image=f"http://{host}/latest"))
        assert response.status == 400, host
        assert "network of this server" in response.error["message"], host
    assert seen == []


def test_a_name_that_changes_its_ip_is_refused_after_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may mean a public IP when it is checked, and this machine when it is requested."""
    public = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.215.14", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public)
    urls = AllowedUrls(("http://",))
    urls.check("http://rebind.example/a.png")
    urls.check("http://rebind.example/a.png", "93.184.215.14")
    for private in ("127.0.0.1", "10.1.1.1", "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "2002:7f00:1::"):
        with pytest.raises(ImageError, match="network of this server"):
            urls.check("http://rebind.example/a.png", private)


@pytest.mark.parametrize("prefix", ["ftp://example.com", "example.com", "", "https://example.com/?x=", "file:///x"])
def test_prefixes_of_another_form(prefix: str) -> None:
    with pytest.raises(ConfigError, match="URL prefix"):
        AllowedUrls((prefix,))


def test_a_host_is_not_the_start_of_another_host() -> None:
    urls = AllowedUrls(("https://example.com", "https://example.com:8443/a"))
    urls.check("https://example.com/x", "10.0.0.1")
    urls.check("https://EXAMPLE.com:443/x", "10.0.0.1")
    urls.check("https://example.com:8443/a/b", "10.0.0.1")
    for refused in (
        "https://example.com.evil.org/",
        "https://example.com:8443/b",
        "http://example.com/",
        "https:///x",
    ):
        with pytest.raises(ImageError):
            urls.check(refused, "10.0.0.1")


def test_preprocessed_images_are_kept_within_limits(monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> None:
    from lfm2vl_edge.server import images as module
    from lfm2vl_edge.server.images import ImageChoice

    config = scheduler.model.config.image
    choice = ImageChoice(config=config, budget=scheduler.model.budget)
    images = Images(ImagePolicy(max_images=4, max_pixels=10**7))
    message = [{"role": "user", "content": [{"type": "image", "image": data_url()}]}]

    def read() -> Any:
        return images.in_messages(message, choice)[0]["content"][0]["image"]

    assert read() is read()
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    monkeypatch.setattr(images, "_kept", type(images._kept)())
    assert read() is not read()
    assert not images._kept
