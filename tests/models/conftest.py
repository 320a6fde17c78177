"""A local hub for the tests of this folder."""

from __future__ import annotations

import os

import pytest

from tests.conftest import HubHere
from tests.hub_server import Hub

REPO = "owner/files-GGUF"
DATA = os.urandom(300_000)
TEXT = b'{"model_type": "lfm2_vl"}\n'


@pytest.fixture
def server(hub_here: HubHere) -> Hub:
    """A hub with one repository of three files."""
    hub_here.hub.repos[REPO] = {"a.gguf": DATA, "config.json": TEXT, "sub/b.gguf": DATA[:1000]}
    return hub_here.hub
