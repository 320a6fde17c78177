"""Fixtures that several tests share: transformers checkpoints, and pairs converted from them once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from lfm2vl_convert import convert_checkpoint
from lfm2vl_edge import Model
from tests.hub_server import Hub, serving

# Two test processes share the cores: a thread that waits must sleep, not spin. Read when llama.cpp is first used.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REFERENCE = Path(__file__).parent / "data" / "reference"
IMAGES = REFERENCE / "a"
"""All three references use the same images, which are stored here once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What transformers computed on one conversation."""

    name: str
    messages: list[dict[str, Any]]
    images: list[Path]
    input_ids: list[int]
    logits: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32] | None


@cache
def conversations(name: str) -> dict[str, Conversation]:
    """Return the conversations of a reference checkpoint by name."""
    cases = json.loads((REFERENCE / name / "reference.json").read_text())["cases"]
    with np.load(REFERENCE / name / "reference.npz") as arrays:
        return {case["name"]: _talk(case, dict(arrays)) for case in cases}


def _talk(case: dict[str, Any], arrays: dict[str, Any]) -> Conversation:
    images = [IMAGES / image for image in case["images"]]
    waiting = list(images)
    messages = [
        {
            **message,
            "content": [
                {"type": "image", "image": waiting.pop(0)} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in case["messages"]
    ]
    return Conversation(
        name=case["name"],
        messages=messages,
        images=images,
        input_ids=arrays[f"{case['name']}.input_ids"].tolist(),
        logits=arrays[f"{case['name']}.logits"],
        embeddings=arrays.get(f"{case['name']}.embeddings"),
    )


MAY_FORK = (sys.executable, "-W", "ignore:This process:DeprecationWarning")
"""Python, without the warning of 3.12 and newer that a process with several threads forks."""


def pytest_sessionfinish() -> None:
    """Close the two files that llama_cpp opens when it is imported, and leaves to the end of the process."""
    utilities = sys.modules.get("llama_cpp._utils")
    for name in ("outnull_file", "errnull_file") if utilities else ():
        getattr(utilities, name).close()


Pair = Callable[[str, str], Path]
"""From a reference's name and a type to the folder with the converted pair."""


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    @cache
    def make(name: str, quant: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{quant}")
        convert_checkpoint(REFERENCE / name / "checkpoint", folder, quant=quant, mmproj_quant=quant)
        return folder

    return make


@pytest.fixture(scope="session")
def opened(pair: Pair) -> Iterator[Callable[[str, str], Model]]:
    """Open models once for the whole session; a test that changes one opens its own."""
    with ExitStack() as stack:

        @cache
        def open_once(name: str, quant: str) -> Model:
            return stack.enter_context(Model.open(pair(name, quant)))

        yield open_once


@pytest.fixture(scope="session")
def model(opened: Callable[[str, str], Model]) -> Model:
    """A small random model, float32, of the common layout."""
    return opened("a", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubHere:
    """A hub on 127.0.0.1, and where downloads are stored."""

    hub: Hub
    cache: Path
    data: Path
    environment: dict[str, str]
    """The same for other processes."""


@pytest.fixture
def hub_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubHere]:
    """Let huggingface_hub, in this process, know only an empty hub on 127.0.0.1 and an empty cache."""
    with hub_in(tmp_path, monkeypatch) as here:
        yield here


@contextmanager
def hub_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubHere]:
    """Do the same during the block, with the cache and the data in a folder."""
    import huggingface_hub
    from huggingface_hub import constants

    from lfm2vl_edge.models import hub as ours

    with serving(Hub()) as hub:
        here = HubHere(
            hub=hub,
            cache=folder / "home" / "hub",
            data=folder / "data",
            environment={
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(folder / "home"),
                "LFM2VL_DATA": str(folder / "data"),
                "NO_PROXY": "*",
            },
        )
        for name, value in here.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "LFM2VL_MODEL"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here.cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(ours, "_RETRY_DELAYS", (0.01,) * 5)
        huggingface_hub.close_session()
        yield here
        huggingface_hub.close_session()
