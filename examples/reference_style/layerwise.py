# SPDX-License-Identifier: Apache-2.0
"""A prompt process sends each layer to a decoder in the background as soon as it is computed."""

from __future__ import annotations

import argparse
import threading

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

LAYERS, ROWS, WIDTH = 4, 2, 64


class Computed(ld.LayerSynchronizer):
    """Says when a layer's compute is done; here that is a flag, on a device it is an event."""

    def __init__(self) -> None:
        self.layers = [threading.Event() for _ in range(LAYERS)]

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        seconds = None if timeout_in_millis is None else timeout_in_millis / 1000
        return self.layers[layer_index].wait(seconds)


def new_datadist(args: argparse.Namespace, role: ld.LLMRole, cluster_id: int) -> ld.LLMDataDist:
    config = ld.LLMConfig()
    config.device_id = args.device_id
    config.enable_cache_manager = True
    config.sync_kv_timeout = 20000
    if role == ld.LLMRole.DECODER:
        config.listen_ip_info = f"{args.decoder_ip}:{args.decoder_port}"
    datadist = ld.LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def run_prompt(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.PROMPT, PROMPT_ID)
    tensors = [torch.zeros(ROWS, WIDTH) for _ in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [ROWS, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_cache(desc, [tensor.data_ptr() for tensor in tensors])
    meeting.wait("registered")
    decoder = peer_info(DECODER_ID, args.decoder_ip, args.decoder_port, args.prompt_ip)
    link(datadist, decoder)
    addrs = [meeting.get(f"address {i}") for i in range(2 * LAYERS)]

    computed = Computed()
    whole = ld.TransferConfig(DECODER_ID, addrs, src_batch_index=1)
    # The last two layers once more, to the row after: addresses may point into a tensor.
    again = [address + WIDTH * 4 for address in addrs[4:]]
    half = ld.TransferConfig(DECODER_ID, again, range(2, 4), 1)
    task = datadist.cache_manager.transfer_cache_async(cache, computed, [whole, half])
    if task.synchronize(0) != ld.LLMStatusCode.LLM_TIMEOUT:
        raise SystemExit("it was done before anything was computed")
    for layer in range(LAYERS):
        for i in (2 * layer, 2 * layer + 1):
            tensors[i].copy_(numbered(ROWS, WIDTH, 100 * i))
        computed.layers[layer].set()
    status = task.synchronize()
    print(f"sent: {status} {task.get_results()}", flush=True)
    if status != ld.LLMStatusCode.LLM_SUCCESS:
        raise SystemExit("the transfer failed")

    unlink(datadist, decoder)
    meeting.wait("sent")
    datadist.finalize()


def run_decoder(args: argparse.Namespace, meeting: Meeting) -> None:
    datadist = new_datadist(args, ld.LLMRole.DECODER, DECODER_ID)
    tensors = [torch.zeros(2, WIDTH) for _ in range(2 * LAYERS)]
    desc = ld.CacheDesc(2 * LAYERS, [2, WIDTH], ld.DataType.DT_FLOAT)
    cache = datadist.cache_manager.register_cache(desc, [tensor.data_ptr() for tensor in tensors])
    for i, address in enumerate(cache.tensor_addrs):
        meeting.put(f"address {i}", address)
    meeting.wait("registered")
    meeting.wait("sent")
    for i, tensor in enumerate(tensors):
        expect(f"tensor {i}", tensor[0], torch.full([WIDTH], 100.0 * i + 1))
        later = 100.0 * i + 1 if i >= 4 else 0.0
        expect(f"tensor {i}, second row", tensor[1], torch.full([WIDTH], later))
    datadist.cache_manager.unregister_cache(cache.cache_id)
    datadist.finalize()


if __name__ == "__main__":
    options = arguments(__doc__)
    the_meeting = Meeting(options)
    (run_prompt if options.role == "prompt" else run_decoder)(options, the_meeting)
    the_meeting.part()
    print(f"{options.role} done", flush=True)
