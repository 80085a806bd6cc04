# SPDX-License-Identifier: Apache-2.0
"""What is left when a process ends, or forks, with instances that nobody finalized."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.thorough

HEAD = """
    import atexit, gc, os, sys, threading, time
    import torch
    from llm_datadist_torch import *
    from tests.conftest import make_options
    from tests.test_lifetimes import DESC, IDS, link
    from llm_datadist_torch import LLMStatusCode as S

    torch.set_num_threads(1)  # OpenMP's threads don't survive fork(), and torch waits for them

    def live(cluster_id):
        datadist = LLMDataDist(LLMRole.MIX, cluster_id)
        datadist.init(make_options())
        return datadist

    def linked():
        a, b = live(1), live(2)
        info = link(a, b)
        source = b.cache_manager.allocate_blocks_cache(DESC, BlocksCacheKey(2))
        target = a.cache_manager.allocate_blocks_cache(DESC)
        for tensor in source.tensors:
            tensor.fill_(7)
        return a, b, info, target

    def sockets():
        names = []
        for name in os.listdir("/proc/self/fd"):
            try:
                names.append(os.readlink("/proc/self/fd/" + name))
            except OSError:  # that of the listing itself
                pass
        return sum("socket" in name for name in names)

    def ours():
        return [t.name for t in threading.enumerate() if "llm_datadist" in t.name]
"""


def run(body: str) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(HEAD) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_dropped_instances_end_at_exit() -> None:
    """Nobody finalized them, nobody refers to them: they serve until exit, then leave nothing."""
    done = run("""
        # Handlers run last in, first out: this one after the library's.
        atexit.register(lambda: print(ours(), sockets()))
        a, b, info, target = linked()
        del b
        for at in range(3, 6):
            live(at)
        gc.collect()
        a.cache_manager.pull_blocks(BlocksCacheKey(2), target, IDS, IDS)
        print([tensor.unique().tolist() for tensor in target.tensors], len(ours()))
        del a, info, target
        gc.collect()
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[[7], [7]] 5\n[] 0\n"


FORK_CALLS = {
    "allocate_cache": "manager.allocate_cache(DESC)",
    "pull_blocks": "manager.pull_blocks(BlocksCacheKey(2), target, [0], [1])",
    "copy_blocks": "manager.copy_blocks(target, {0: [1]})",
    "deallocate_blocks_cache": "manager.deallocate_blocks_cache(target)",
    "unregister_cache": "manager.unregister_cache(9)",
    "link_clusters": "a.link_clusters([info])",
    "unlink_clusters": "a.unlink_clusters([info])",
    "cache_manager": "a.cache_manager",
}


@pytest.mark.parametrize("leave", ["sys.exit(0)", "a.finalize(); sys.exit(0)"], ids=["exit", "end"])
def test_a_forked_child_is_told_and_ends(leave: str) -> None:
    calls = ", ".join(f"{name!r}: lambda: {call}" for name, call in FORK_CALLS.items())
    done = run(f"""
        a, b, info, target = linked()
        manager = a.cache_manager
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            began = time.monotonic()
            for name, call in {{{calls}}}.items():
                try:
                    print(name, "returned", call())
                except LLMException as error:
                    print(name, error.status_code.name, "fork" in str(error))
            # Far below every timeout of the library; a machine may be busy.
            print("at once", time.monotonic() - began < 2)
            {leave}
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))
        manager.pull_blocks(BlocksCacheKey(2), target, IDS, IDS)
        print("parent", [tensor.unique().tolist() for tensor in target.tensors])
        again = a.unlink_clusters([info])[0], a.link_clusters([info])[0]
        print(again == (S.LLM_SUCCESS, S.LLM_SUCCESS))
    """)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    failed = ("allocate_cache", "unregister_cache", "link_clusters", "unlink_clusters")
    for line, name in zip(lines, FORK_CALLS, strict=False):
        code = "LLM_FAILED" if name in (*failed, "cache_manager") else "LLM_PARAM_INVALID"
        assert line == f"{name} {code} True"
    rest = ["at once True", "child 0", "parent [[7], [7]]", "True"]
    assert lines[len(FORK_CALLS) :] == rest


def test_a_forked_child_may_start_its_own() -> None:
    done = run("""
        a, b, info, target = linked()
        child = os.fork()
        if child == 0:
            a.finalize()
            a.init(make_options())
            own = a.cache_manager.allocate_blocks_cache(DESC)
            link(a, b)  # with the parent's other instance
            a.cache_manager.pull_blocks(BlocksCacheKey(2), own, IDS, IDS)
            print([tensor.unique().tolist() for tensor in own.tensors])
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[[7], [7]]", "0"]
