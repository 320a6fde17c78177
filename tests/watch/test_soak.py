"""A few seconds of the soak; `python -m tests.watch.soak` takes as long as it is told."""

from __future__ import annotations

import pytest

from tests.watch.soak import check, soak


def test_some_seconds_with_a_camera_and_a_broker_that_come_and_go() -> None:
    pytest.importorskip("paho.mqtt", reason="needs paho-mqtt: pip install 'lfm2vl-edge[watch]'")
    found = soak(6, lost_every=2, killed_every=2)
    check(found, growth=2)
    assert found["counts"]["reconnects"] >= 1
    assert found["counts"]["frames"] >= 10
