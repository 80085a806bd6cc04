# SPDX-License-Identifier: Apache-2.0
"""What the modules of the tree do, beyond having the names (reference API, 1)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator

import pytest

import llm_datadist_torch
from llm_datadist_torch import DataType, LLMParamError
from llm_datadist_torch.compat import tree
from llm_datadist_torch.compat.tree import data_type
from llm_datadist_torch.compat.tree.utils import log
from llm_datadist_torch.compat.tree.v2 import llm_utils
from tests.compat.programs import run_python
from tests.test_import import REFERENCE_NAMES

pytestmark = pytest.mark.thorough


def test_top_level_names():
    assert sorted(tree.v2_list) == sorted(tree.__all__) == sorted(REFERENCE_NAMES)
    assert all(getattr(tree, name) is getattr(llm_datadist_torch, name) for name in tree.v2_list)


def test_engine_numbers_of_data_types():
    assert data_type.python_dtype_2_dwrapper_dtype[DataType.DT_BF16] == 27
    assert len(data_type.python_dtype_2_dwrapper_dtype) == 14
    for member, number in data_type.python_dtype_2_dwrapper_dtype.items():
        assert data_type.get_python_dtype_from_wrapper_dtype(number) is member
    with pytest.raises(ValueError, match="5"):
        data_type.get_python_dtype_from_wrapper_dtype(5)


def test_numpy_tables():
    tables = (data_type.dtype_to_np_dtype, data_type.valid_np_dtypes, data_type.np_dtype_to_dtype)
    assert [len(table) for table in tables] == [14, 14, 13]


def test_sizes_indices_and_ids():
    assert llm_utils.calc_tensor_size([2, 3, 5], DataType.DT_BF16) == 60
    assert llm_utils.layer_range_to_tensor_indices(range(1, 3)) == [2, 3, 4, 5]
    assert llm_utils.layer_range_to_tensor_indices(range(2, 3), 3) == [6, 7, 8]
    assert llm_utils.parse_listen_ip_info("10.0.0.1:80") == ("10.0.0.1", 80)
    for identifier, valid in ((0, True), (2**64 - 2, True), (2**64 - 1, False)):
        assert llm_utils.is_valid_id(identifier) is valid
        assert llm_utils.is_invalid_id(identifier) is not valid


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("1",), TypeError),
        ((range(0),), LLMParamError),
        ((range(0, 4, 2),), LLMParamError),
        ((range(2**40),), ValueError),
        ((range(1), -1), ValueError),
    ],
)
def test_bad_layer_ranges(arguments: tuple[object, ...], error: type[Exception]):
    with pytest.raises(error):
        llm_utils.layer_range_to_tensor_indices(*arguments)


@pytest.mark.parametrize("name", ["EngineConfig", "ClusterConfig"])
def test_helpers_of_the_v1_mode_say_what_to_use(name: str):
    module = importlib.import_module("llm_datadist_torch.compat.tree.v2.config")
    with pytest.raises(ImportError, match="LLMConfig"):
        getattr(module, name)


@pytest.mark.parametrize("module", ["", ".data_type", ".v2.config", ".metadef_wrapper"])
def test_unknown_names(module: str):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = importlib.import_module(f"llm_datadist_torch.compat.tree{module}").nothing


def test_v1_names_come_from_the_v1_package_where_there_is_one(monkeypatch, tmp_path):
    (tmp_path / "llm_datadist_v1.py").write_text("Tensor = 'from v1'\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert tree.Tensor == "from v1"


# -- utils.log ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("LLM_DATADIST")
    logger.handlers.clear()
    yield logger
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.mark.parametrize(
    ("level", "shown"), [("0", "iwe"), ("1", "iwe"), ("2", "we"), ("3", "e"), ("", "e")]
)
def test_log_level(fresh_logger, monkeypatch, capsys, level: str, shown: str):
    monkeypatch.setenv("ASCEND_GLOBAL_LOG_LEVEL", level)
    for call, text in ((log.info, "i %s"), (log.warn, "w %s"), (log.error, "e %s")):
        call(text, "{}")
        call("as it is, 100%")
    lines = [line for line in capsys.readouterr().out.splitlines() if "{}" in line]
    assert "".join(line.split()[-2] for line in lines) == shown
    assert all(__file__ in line for line in lines)
    assert log.get_logger() is fresh_logger
    assert len(fresh_logger.handlers) == 1


def test_nothing_is_set_up_by_importing_it():
    code = """
import logging, llm_datadist_torch
llm_datadist_torch.install()
from llm_datadist.utils import log
print(logging.getLogger("LLM_DATADIST").handlers, logging.root.handlers)
"""
    assert run_python("-c", code).stdout == "[] []\n"


def test_the_caller_is_found():
    path, line, function = log._find_caller()
    assert (path, function) == (__file__, "test_the_caller_is_found")
    assert line > 0
