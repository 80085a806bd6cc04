#!/usr/bin/env bash
# Once a worker of vllm-ascend has been made, torch.cuda.Event is a class whose events are always done, and torch.Event an NPU's.
#
# Versions: vllm-ascend 0.23.0, its function that wraps the making of the model runner; torch 2.13.0, with stand-ins for torch.npu's classes.
# Expect:   torch's names are replaced while the runner is made, and come back afterwards; or stay replaced by the NPU's.
# Happens:  afterwards torch.cuda.Event makes events that record nothing: query() is true at once and synchronize() returns. The
#           streams beside it are the NPU's, so that both kinds meet in one program. torch.Event stays the NPU's class, which takes no device.
# Matters:  a connector that was written for CUDA records an event behind a copy of KV and asks it later; it sends blocks
#           before their bytes are there. torch.get_device_module(device).Event is the one that waits.
. "$(dirname "$0")/_common.sh"
install_vllm_ascend torch==2.13.0 numpy==2.4.6

cat >"$dir/seen" <<'SEEN'
while the runner is made: torch.cuda.Event is the NPU's
afterwards torch.cuda.Event is: _EventPlaceholder
an event recorded behind unfinished work, query(): True
synchronize() has waited for the device: False
torch.cuda.current_stream is the NPU's: True
torch.Event is the NPU's: True
SEEN

show "$dir/seen" <<'PYTHON'
from contextlib import contextmanager
from types import SimpleNamespace

import torch

import ascend

waits = []


class Event:
    """In place of torch_npu's, of a device that has not finished."""

    def record(self, stream=None):
        pass

    def query(self):
        return False

    def synchronize(self):
        waits.append(self)


names = ["Stream", "default_stream", "current_stream", "stream", "synchronize", "mem_get_info"]
torch.npu = SimpleNamespace(Event=Event, **{name: SimpleNamespace(name=name) for name in names})
wrapper = ascend.definition("worker/model_runner_v1.py", "_torch_cuda_wrapper", torch=torch, contextmanager=contextmanager)
with wrapper():
    print("while the runner is made: torch.cuda.Event is", "the NPU's" if torch.cuda.Event is Event else "another")
print("afterwards torch.cuda.Event is:", torch.cuda.Event.__name__)
event = torch.cuda.Event()
event.record()
print("an event recorded behind unfinished work, query():", event.query())
event.synchronize()
print("synchronize() has waited for the device:", bool(waits))
print("torch.cuda.current_stream is the NPU's:", torch.cuda.current_stream is torch.npu.current_stream)
print("torch.Event is the NPU's:", torch.Event is Event)
PYTHON
