# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls rows of a prompt process's cache: by request, by cache id, and into blocks."""

from __future__ import annotations

import argparse

import llm_datadist as ld
import torch
from common import (
    DECODER_ID,
    PROMPT_ID,
    Meeting,
    arguments,
    expect,
    link,
    numbered,
    peer_info,
    unlink,
)

TENSORS, ROWS, WIDTH, BLOCK = 4, 4, 64, 16


def new_datadist(args: argparse.Namespace, role: ld.LLMRole, cluster_id: int) -> ld.LLMDataDist:
    config = ld.LlmConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.sync_kv_timeout = "20000"
    config.mem_pool_cfg = '{"memory_size": 16777216, "page_shift": 16}'
    if role == ld.LLMRole.PROMPT:
        config.listen_ip_info = f"{args.prompt_ip}:{args.prompt_port}"
    datadist = ld.LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.PROMPT, PROMPT_ID)
    manager = datadist.cache_manager
    desc = ld.CacheDesc(TENSORS, [ROWS, WIDTH], ld.DataType.DT_FLOAT)
    tensors = [numbered(ROWS, WIDTH, 100 * i) for i in range(TENSORS)]
    registered = manager.register_cache(desc, [tensor.data_ptr() for tensor in tensors])
    keys = [ld.CacheKey(PROMPT_ID, req_id=row) for row in range(ROWS)]
    cache = manager.allocate_cache(desc, keys)
    for row in range(ROWS):
        manager.copy_cache(cache, registered, dst_batch_index=row, src_batch_index=row)
    meeting.put("cache id", cache.cache_id)
    meeting.wait("filled")
    meeting.wait("pulled")
    for key in keys:
        manager.remove_cache_key(key)
    manager.deallocate_cache(cache)
    manager.unregister_cache(registered.cache_id)
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, DECODER_ID)
    manager = datadist.cache_manager
    rows = [torch.zeros(2, WIDTH) for _ in range(TENSORS)]
    row_desc = ld.CacheDesc(TENSORS, [2, WIDTH], ld.DataType.DT_FLOAT)
    cache = manager.register_cache(row_desc, [tensor.data_ptr() for tensor in rows])
    blocks = [torch.zeros(8, BLOCK) for _ in range(TENSORS)]
    block_desc = ld.CacheDesc(TENSORS, [8, BLOCK], ld.DataType.DT_FLOAT)
    paged = manager.register_blocks_cache(block_desc, [tensor.data_ptr() for tensor in blocks])
    meeting.wait("filled")
    prompt = peer_info(PROMPT_ID, args.prompt_ip, args.prompt_port, args.decoder_ip)
    link(datadist, prompt)

    manager.pull_cache(ld.CacheKey(PROMPT_ID, 1), cache, batch_index=0)
    expect("request 1 in row 0", rows[3][0], torch.full([WIDTH], 301.0))
    by_id = ld.CacheKeyByIdAndIndex(PROMPT_ID, meeting.get("cache id"), 3)
    manager.pull_cache(by_id, cache, batch_index=1, size=WIDTH // 2 * 4)
    expect("half of row 3", rows[0][1, :: WIDTH // 2], torch.tensor([3.0, 0.0]))
    manager.pull_blocks(ld.CacheKey(PROMPT_ID, 2), paged, dst_blocks=[6, 0, 3, 5])
    expect("row 2 in blocks", blocks[1][[6, 0, 3, 5], 0], torch.full([4], 102.0))
    try:
        manager.pull_cache(ld.CacheKey(PROMPT_ID, 1), cache)
    except ld.LLMException as error:
        if error.status_code != ld.LLMStatusCode.LLM_KV_CACHE_NOT_EXIST:
            raise
        print("request 1 is consumed: ok", flush=True)

    unlink(datadist, prompt)
    meeting.wait("pulled")
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    (run_prompt if options.role == "prompt" else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
