# SPDX-License-Identifier: Apache-2.0
"""Where each table of the reference API is tested; tables about bytes and links are in this room.

What depends on neither transport nor mode stays with the code that it is about.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.same_on_every_device

TESTS = Path(__file__).resolve().parent.parent

TABLES = {
    "1 modules and names": ["compat/test_module_tree.py", "compat/test_tree_contents.py"],
    "2 enumerations": ["values/test_checks.py", "values/test_status.py"],
    "2.3 data types": ["values/test_data_type.py"],
    "3.1 exceptions": ["values/test_status.py"],
    "3.2 validators": ["values/test_checks.py"],
    "3.3 widths at the border": ["values/test_keys.py", "api/test_cpu_cache.py"],
    "4 LLMConfig": ["values/test_config.py", "values/test_engine_config.py"],
    "5 LLMClusterInfo": ["values/test_cluster_info.py"],
    "6.1 to 6.3 constructor, init": ["api/test_datadist.py"],
    "6.4 finalize": ["api/test_finalize.py"],
    "7.1 CacheDesc": ["values/test_cache_desc.py"],
    "7.2 keys": ["values/test_keys.py"],
    "7.3 Cache, KvCache": ["api/test_cache.py", "values/test_kv_cache.py"],
    "7.4, 7.5 transfer values": ["values/test_transfer_values.py"],
    "8.1, 8.2, 8.3 geometry, ids": ["api/test_allocate.py", "api/test_register.py"],
    "8.4 pools": ["api/test_pools.py"],
    "8.5 keys and references": ["api/test_cache_keys.py", "conformance/test_pull_push.py"],
    "8.6, 9.1 creation": ["api/test_allocate.py", "api/test_register.py"],
    "9.2 local copies": ["api/test_copies.py", "api/test_copy_bytes.py"],
    "9.3, 9.4 pull and push: checks": ["conformance/test_arguments.py"],
    "9.3, 9.4 pull and push: bytes": ["conformance/test_pull_push.py"],
    "9.5 remap": ["compat/test_switch_role.py"],
    "10.1 transfer_cache_async: checks": ["conformance/test_async_arguments.py"],
    "10.2 job": ["asynchronous/test_synchronizers.py"],
    "10.4 CacheTask": ["asynchronous/test_cache_task.py"],
    "10.3 transfer_cache_async: bytes": ["conformance/test_layerwise.py"],
    "11.1 to 11.3 links": ["conformance/test_link_tables.py", "compat/test_switch_role.py"],
    "11.4 rank tables": ["transfer/test_rank_table.py", "transfer/test_rank_table_links.py"],
    "12 concurrency": ["transfer/test_threads.py", "transfer/test_faults.py"],
    "14.41 texts": ["conformance/test_texts.py"],
    "A vectors": ["conformance/test_pull_push.py", "conformance/test_link_tables.py",
                  "api/test_copies.py", "api/test_pools.py", "api/test_cache_keys.py"],
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_tested(table: str) -> None:
    for name in TABLES[table]:
        assert "def test_" in (TESTS / name).read_text(encoding="utf-8"), name


def test_every_file_of_this_room_is_in_the_index() -> None:
    named = {Path(name).name for names in TABLES.values() for name in names}
    here = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert here - named == {Path(__file__).name}
