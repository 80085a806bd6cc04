# SPDX-License-Identifier: Apache-2.0
"""Two prompt processes, two decoders, all linked: each decoder pulls blocks of both prompts.

Start it four times, with ``--rank`` 0 to 3: 0 and 1 are the prompts.
"""

from __future__ import annotations

import argparse

import llm_datadist as ld
import torch
from common import Meeting, expect, numbered, peer_info

PROMPTS, DECODERS = 2, 2
TENSORS, BLOCKS, WIDTH = 4, 8, 32


def new_datadist(args: argparse.Namespace, role: ld.LLMRole, cluster_id: int) -> ld.LLMDataDist:
    config = ld.LLMConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.sync_kv_timeout = 20000
    if role == ld.LLMRole.PROMPT:
        config.listen_ip_info = f"{args.prompt_ip}:{args.prompt_ports[args.rank]}"
    datadist = ld.LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def blocks_of(prompt: int, tensor: int) -> torch.Tensor:
    return numbered(BLOCKS, WIDTH, 10000 * prompt + 100 * tensor)


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    cluster_id = args.rank
    datadist = new_datadist(args, ld.LLMRole.PROMPT, cluster_id)
    tensors = [blocks_of(args.rank, i) for i in range(TENSORS)]
    desc = ld.CacheDesc(TENSORS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT)
    datadist.cache_manager.register_blocks_cache(
        desc, [tensor.data_ptr() for tensor in tensors], ld.BlocksCacheKey(cluster_id, 0)
    )
    meeting.wait("registered")
    meeting.wait("pulled")
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, args.rank)
    tensors = [torch.zeros(BLOCKS, WIDTH) for _ in range(TENSORS)]
    desc = ld.CacheDesc(TENSORS, [BLOCKS, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_blocks_cache(
        desc, [tensor.data_ptr() for tensor in tensors]
    )
    meeting.wait("registered")
    prompts = [
        peer_info(prompt, args.prompt_ip, args.prompt_ports[prompt], args.decoder_ip)
        for prompt in range(PROMPTS)
    ]
    status, results = datadist.link_clusters(prompts, timeout=10000)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"linking failed: {status} {results}")

    mine = args.rank - PROMPTS  # each decoder takes other blocks
    for prompt in range(PROMPTS):
        src, dst = [mine, mine + 4], [prompt, prompt + 4]
        datadist.cache_manager.pull_blocks(ld.BlocksCacheKey(prompt, 0), cache, src, dst)
    for i, tensor in enumerate(tensors):
        for prompt in range(PROMPTS):
            wanted = blocks_of(prompt, i)[[mine, mine + 4]]
            expect(f"tensor {i} of prompt {prompt}", tensor[[prompt, prompt + 4]], wanted)

    status, results = datadist.unlink_clusters(prompts, timeout=10000)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit(f"unlinking failed: {status} {results}")
    meeting.wait("pulled")
    datadist.finalize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, choices=range(PROMPTS + DECODERS), required=True)
    parser.add_argument("--prompt-ip", default="127.0.0.1")
    parser.add_argument("--prompt-ports", type=int, nargs=PROMPTS, default=[26000, 26001])
    parser.add_argument("--decoder-ip", default="127.0.0.1")
    parser.add_argument("--meet-port", type=int, default=26002, help="where all wait")
    parser.add_argument("--device-id", type=int, default=0)
    options = parser.parse_args()
    the_meeting = Meeting(options, PROMPTS + DECODERS, keeper=options.rank == 0)
    (run_prompt if options.rank < PROMPTS else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"rank {options.rank} done", flush=True)
