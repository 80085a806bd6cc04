# SPDX-License-Identifier: Apache-2.0
"""A prompt process pushes rows into the cache of a decoder, all layers or some."""

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

LAYERS, ROWS, WIDTH = 2, 4, 32


def new_datadist(args: argparse.Namespace, role: ld.LLMRole, cluster_id: int) -> ld.LLMDataDist:
    config = ld.LLMConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.sync_kv_timeout = 20000
    if role == ld.LLMRole.DECODER:
        config.listen_ip_info = f"{args.decoder_ip}:{args.decoder_port}"
    datadist = ld.LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.PROMPT, PROMPT_ID)
    tensors = [numbered(ROWS, WIDTH, 100 * i) for i in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [ROWS, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_cache(
        desc, [tensor.data_ptr() for tensor in tensors], remote_accessible=True
    )
    meeting.wait("registered")
    decoder = peer_info(DECODER_ID, args.decoder_ip, args.decoder_port, args.prompt_ip)
    link(datadist, decoder)
    target = meeting.get("cache id")

    push = datadist.cache_manager.push_cache
    push(ld.CacheKeyByIdAndIndex(DECODER_ID, target, 0), cache, 3)
    for layer in range(LAYERS):
        one = range(layer, layer + 1)
        push(ld.CacheKeyByIdAndIndex(DECODER_ID, target, 1), cache, 2, one, one)
    last, first = range(LAYERS - 1, LAYERS), range(1)
    push(ld.CacheKeyByIdAndIndex(DECODER_ID, target, 2), cache, 1, last, first)
    try:
        push(ld.CacheKeyByIdAndIndex(DECODER_ID, target, 9), cache, 0)
    except ld.LLMException as error:
        print(f"row 9 is refused: {error.status_code}", flush=True)
    else:
        raise SystemExit("a row that the decoder doesn't have was pushed")

    unlink(datadist, decoder)
    meeting.wait("pushed")
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, DECODER_ID)
    tensors = [torch.zeros(3, WIDTH) for _ in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [3, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_cache(
        desc, [tensor.data_ptr() for tensor in tensors], remote_accessible=True
    )
    meeting.put("cache id", cache.cache_id)
    meeting.wait("registered")
    meeting.wait("pushed")
    for i, tensor in enumerate(tensors):
        expect(f"row 3 of tensor {i}", tensor[0], torch.full([WIDTH], 100.0 * i + 3))
        expect(f"row 2 of tensor {i}, by layers", tensor[1], torch.full([WIDTH], 100.0 * i + 2))
    expect("the last layer in the first", tensors[1][2], torch.full([WIDTH], 301.0))
    expect("nothing in the last", tensors[3][2], torch.zeros(WIDTH))
    datadist.cache_manager.unregister_cache(cache.cache_id)
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    (run_prompt if options.role == "prompt" else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
