# SPDX-License-Identifier: Apache-2.0
"""A prompt process keeps one row per request; a decoder pulls rows into the blocks of its cache."""

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

TENSORS, ROWS, WIDTH = 4, 3, 40
BLOCKS, BLOCK = 9, 16  # a row is two blocks and a half


def new_datadist(args: argparse.Namespace, role: ld.LLMRole, cluster_id: int) -> ld.LLMDataDist:
    config = ld.LLMConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.sync_kv_timeout = 20000
    if role == ld.LLMRole.PROMPT:
        config.listen_ip_info = f"{args.prompt_ip}:{args.prompt_port}"
    datadist = ld.LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def positions(tensor: int, row: int) -> torch.Tensor:
    """What stands in a row: every element is another number."""
    return 1000.0 * tensor + 100 * row + torch.arange(WIDTH, dtype=torch.float32)


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.PROMPT, PROMPT_ID)
    tensors = [torch.stack([positions(i, row) for row in range(ROWS)]) for i in range(TENSORS)]
    desc = ld.CacheDesc(TENSORS, [ROWS, WIDTH], ld.DataType.DT_FLOAT)
    keys = [ld.CacheKey(PROMPT_ID, req_id=50 + row, model_id=0) for row in range(ROWS)]
    addrs = [tensor.data_ptr() for tensor in tensors]
    cache = datadist.cache_manager.register_cache(desc, addrs, keys)
    meeting.put("cache id", cache.cache_id)
    meeting.wait("registered")
    meeting.wait("pulled")
    datadist.cache_manager.unregister_cache(cache.cache_id)
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, DECODER_ID)
    manager = datadist.cache_manager
    tensors = [numbered(BLOCKS, BLOCK, -100) for _ in range(TENSORS)]
    desc = ld.CacheDesc(TENSORS, [BLOCKS, BLOCK], ld.DataType.DT_FLOAT)
    cache = manager.register_blocks_cache(desc, [tensor.data_ptr() for tensor in tensors])
    meeting.wait("registered")
    prompt = peer_info(PROMPT_ID, args.prompt_ip, args.prompt_port, args.decoder_ip)
    link(datadist, prompt)

    manager.pull_blocks(ld.CacheKey(PROMPT_ID, req_id=51), cache, [], [8, 0, 3])
    for i, tensor in enumerate(tensors):
        row = positions(i, 1)
        expect(f"whole blocks of tensor {i}", tensor[[8, 0]].flatten(), row[:32])
        expect(f"tail of tensor {i}", tensor[3, :8], row[32:])
        expect(f"untouched rest of tensor {i}", tensor[3, 8:], torch.full([8], -97.0))
    by_id = ld.CacheKeyByIdAndIndex(PROMPT_ID, meeting.get("cache id"), 2)
    layers = {"src_layer_range": range(1, 2), "dst_layer_range": range(1)}
    manager.pull_blocks(by_id, cache, dst_blocks=[5], **layers)
    expect("layer 1 of row 2 in layer 0", tensors[1][5], positions(3, 2)[:16])
    expect("layer 1 is as it was", tensors[3][5], torch.full([16], -95.0))

    unlink(datadist, prompt)
    meeting.wait("pulled")
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    (run_prompt if options.role == "prompt" else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
