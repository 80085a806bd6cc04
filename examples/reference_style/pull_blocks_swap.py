# SPDX-License-Identifier: Apache-2.0
"""A decoder pulls blocks that a prompt process registered, swaps them out, and in again."""

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

LAYERS, BLOCKS, WIDTH = 2, 10, 64


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


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.PROMPT, PROMPT_ID)
    tensors = [numbered(BLOCKS, WIDTH, 100 * i) for i in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT)
    key = ld.BlocksCacheKey(PROMPT_ID, 0)
    addrs = [tensor.data_ptr() for tensor in tensors]
    cache = datadist.cache_manager.register_blocks_cache(desc, addrs, key)
    print(f"registered {cache}", flush=True)
    meeting.wait("registered")
    meeting.wait("pulled")
    datadist.cache_manager.unregister_cache(cache.cache_id)
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, DECODER_ID)
    manager = datadist.cache_manager
    device = [torch.zeros(BLOCKS, WIDTH) for _ in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT)
    cache = manager.register_blocks_cache(desc, [tensor.data_ptr() for tensor in device])
    meeting.wait("registered")
    prompt = peer_info(PROMPT_ID, args.prompt_ip, args.prompt_port, args.decoder_ip)
    link(datadist, prompt)

    manager.pull_blocks(ld.BlocksCacheKey(PROMPT_ID, 0), cache, [0, 1, 5], [7, 8, 2])
    for i, tensor in enumerate(device):
        expect(
            f"pulled tensor {i}", tensor[[7, 8, 2], 0], 100.0 * i + torch.tensor([0.0, 1.0, 5.0])
        )
    manager.pull_blocks(
        ld.BlocksCacheKey(PROMPT_ID, 0),
        cache,
        [9],
        [9],
        src_layer_range=range(1, 2),
        dst_layer_range=range(1),
    )
    expect("pulled layer 1 into layer 0", device[0][9, :1], torch.tensor([209.0]))

    host = [torch.zeros(BLOCKS, WIDTH) for _ in range(2 * LAYERS)]
    host_desc = ld.CacheDesc(2 * LAYERS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT, ld.Placement.HOST)
    cpu_cache = ld.Cache.create_cpu_cache(host_desc, [tensor.data_ptr() for tensor in host])
    manager.swap_blocks(cache, cpu_cache, {7: 0, 8: 1})
    kept = [tensor[[7, 8]].clone() for tensor in device]
    for tensor in device:
        tensor.zero_()
    manager.swap_blocks(cpu_cache, cache, {0: 3, 1: 4})
    for i, tensor in enumerate(device):
        expect(f"swapped tensor {i}", tensor[[3, 4]], kept[i])

    unlink(datadist, prompt)
    meeting.wait("pulled")
    manager.unregister_cache(cache.cache_id)
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    (run_prompt if options.role == "prompt" else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
