# SPDX-License-Identifier: Apache-2.0
"""docs/vllm.md says what there is."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

from llm_datadist_torch.vllm.settings import Settings

TEXT = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()


def test_every_setting_is_there_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", TEXT, re.MULTILINE)
    told = {name: json.loads(default.strip("`")) for name, default in rows}
    assert told == {field.name: field.default for field in dataclasses.fields(Settings)}
