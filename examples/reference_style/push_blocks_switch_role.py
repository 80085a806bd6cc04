# SPDX-License-Identifier: Apache-2.0
"""A prompt process pushes blocks to a decoder; then the two swap roles and do it the other way."""

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

LAYERS, BLOCKS, WIDTH = 3, 6, 32


def run(args: argparse.Namespace, meeting: Meeting) -> None:
    is_prompt = args.role == "prompt"
    me, other = (PROMPT_ID, DECODER_ID) if is_prompt else (DECODER_ID, PROMPT_ID)
    addresses = {
        PROMPT_ID: (args.prompt_ip, args.prompt_port),
        DECODER_ID: (args.decoder_ip, args.decoder_port),
    }
    listen = "{}:{}".format(*addresses[me])
    config = ld.LLMConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.sync_kv_timeout = 20000
    if not is_prompt:
        config.listen_ip_info = listen
    datadist = ld.LLMDataDist(ld.LLMRole.PROMPT if is_prompt else ld.LLMRole.DECODER, me)
    datadist.init(config.generate_options())
    tensors = [numbered(BLOCKS, WIDTH, 1000 * me + 100 * i) for i in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_blocks_cache(
        desc,
        [tensor.data_ptr() for tensor in tensors],
        ld.BlocksCacheKey(me, 0),
        remote_accessible=True,
    )
    peer = peer_info(other, *addresses[other], addresses[me][0])

    def push() -> None:
        link(datadist, peer)
        key = ld.BlocksCacheKey(other, 0)
        whole, last = range(LAYERS), range(LAYERS - 1, LAYERS)
        datadist.cache_manager.push_blocks(key, cache, [0, 1], [4, 5], whole, whole)
        datadist.cache_manager.push_blocks(key, cache, [2], [3], last, last)
        unlink(datadist, peer)

    def look() -> None:
        for i, tensor in enumerate(tensors):
            first = 1000.0 * other + 100 * i
            expect(f"pushed tensor {i}", tensor[[4, 5], 0], torch.tensor([first, first + 1]))
        expect("pushed last layer", tensors[-2][3, :1], torch.tensor([1000.0 * other + 402]))

    meeting.wait("registered")
    if is_prompt:
        push()
    meeting.wait("pushed")
    if not is_prompt:
        look()
    meeting.wait("looked")
    if is_prompt:
        config.listen_ip_info = listen
        datadist.switch_role(ld.LLMRole.DECODER, config.generate_options())
    else:
        datadist.switch_role(ld.LLMRole.PROMPT)
    meeting.wait("switched")
    if not is_prompt:
        push()
    meeting.wait("pushed back")
    if is_prompt:
        look()
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    run(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
