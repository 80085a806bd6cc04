# SPDX-License-Identifier: Apache-2.0
"""The module tree of the reference (API 1): names, identity, and what a missing name says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llm_datadist_torch.compat.switch import shim_path
from tests.compat.programs import ROOT

NAMES = {
    "llm_datadist": "LLMClusterInfo LLMStatusCode LLMException LLMRole LlmConfig LLMConfig DataType"
    " Status CacheDesc CacheKey CacheKeyByIdAndIndex KvCache Cache BlocksCacheKey LLMDataDist"
    " Placement RegisterMemStatus LayerSynchronizer TransferConfig CacheTask"
    " TransferWithCacheKeyConfig Memtype MemInfo",
    "llm_datadist.status": "LLMStatusCode LLMException Status code_2_status handle_llm_status"
    " raise_if_false raise_if_true",
    "llm_datadist.configs": "LLMRole LLMClusterInfo LlmConfig trans_str_ip",
    "llm_datadist.data_type": "DataType dtype_to_np_dtype valid_np_dtypes np_dtype_to_dtype",
    "llm_datadist.v2.llm_types": "CacheDesc CacheKey CacheKeyByIdAndIndex BlocksCacheKey KvCache"
    " Cache Placement RegisterMemStatus Memtype MemInfo LayerSynchronizer TransferConfig"
    " TransferWithCacheKeyConfig CacheTask PushType check_layer_range int_to_mem_status_dict",
    "llm_datadist.v2.llm_datadist": "LLMDataDist _shutdown_handler",
    "llm_datadist.v2.cache_manager": "CacheManager",
    "llm_datadist.v2.llm_utils": "calc_tensor_size layer_range_to_tensor_indices"
    " parse_listen_ip_info is_valid_id is_invalid_id",
    "llm_datadist.utils.utils": "check_isinstance check_inner check_dict check_uint8 check_uint16"
    " check_uint32 check_uint64 check_int32 check_int64 check_list_int32 check_list_int64"
    " check_list_uint64 check_positive_or_set_default",
    "llm_datadist.utils.log": "get_logger info warn error",
    "llm_datadist.llm_datadist_wrapper": "kSuccess",
}


def run(code: str) -> str:
    """Run code that may import llm_datadist in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": shim_path(), "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there():
    found = json.loads(
        run(
            f"""
import importlib, json
names = {NAMES!r}
print(json.dumps({{m: [n for n in ns.split() if not hasattr(importlib.import_module(m), n)]
                  for m, ns in names.items()}}))
"""
        )
    )
    assert found == {module: [] for module in NAMES}


def test_names_are_the_very_objects_of_this_package():
    run(
        """
import llm_datadist, llm_datadist_torch
for name in llm_datadist.v2_list:
    if hasattr(llm_datadist_torch, name):
        assert getattr(llm_datadist, name) is getattr(llm_datadist_torch, name), name
assert llm_datadist.LLMConfig is llm_datadist.LlmConfig
assert llm_datadist.llm_datadist_wrapper.kSuccess == 0 if hasattr(
    llm_datadist, "llm_datadist_wrapper") else True
"""
    )


def test_star_import_needs_no_v1_package():
    assert run("from llm_datadist import *\nprint(LLMDataDist.__name__)") == "LLMDataDist\n"


@pytest.mark.parametrize("name", ["Tensor", "TensorDesc", "KvCacheManager"])
def test_v1_names_say_what_to_use_instead(name):
    code = f"""
import llm_datadist
try:
    llm_datadist.{name}
except ImportError as error:
    print(error)
"""
    assert "cache_manager" in run(code)


def test_other_names_are_attribute_errors():
    code = """
import llm_datadist
try:
    llm_datadist.nothing_of_that_name
except AttributeError as error:
    print(error)
"""
    assert "has no attribute" in run(code)
