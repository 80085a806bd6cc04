# SPDX-License-Identifier: Apache-2.0
"""The example as users run it: servers, proxy, and the comparison with a server by itself."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator

import pytest

from tests.service import eventually
from tests.vllm.serving import MODES, START_S, Serving

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def servings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Serving]]:
    """Both modes at the same time; one server without a connector serves both comparisons."""
    made = {
        mode: Serving(tmp_path_factory.mktemp(mode), mode, "1" if mode == "pull" else "")
        for mode in MODES
    }
    try:
        for each in made.values():
            assert eventually(each.is_ready, START_S), each.text()
        yield made
    finally:
        for each in made.values():
            each.end()


@pytest.mark.parametrize("mode", MODES)
def test_texts_are_those_of_a_server_without_a_connector(
    servings: dict[str, Serving], mode: str
) -> None:
    servings[mode].compare(servings["pull"].url("without a connector"))


@pytest.mark.parametrize("mode", MODES)
def test_health_names_all_servers(servings: dict[str, Serving], mode: str) -> None:
    url = servings[mode].url("ready") + "/health"
    with urllib.request.urlopen(url, timeout=30) as answer:
        told = json.load(answer)
    assert [list(each.values()) for each in told.values()] == [[True], [True]]


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_left_when_it_is_ended(servings: dict[str, Serving], mode: str) -> None:
    serving = servings[mode]
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(120) == 143
    assert eventually(lambda: not serving.processes(), 60)
