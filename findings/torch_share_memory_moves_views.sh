#!/usr/bin/env bash
# share_memory_() of one view moves the whole storage, and so the addresses of all tensors that share it.
#
# Versions: torch 2.13.0.
# Expect:   sharing one layer's tensor shares that tensor. The others, and the pool that it was cut from, stay where they are,
#           or it is refused because others use the storage, as resizing one is.
# Happens:  all of the pool is copied into shared memory, and every view has another data_ptr() afterwards. Values are kept, and
#           is_shared() is true for tensors that nobody asked to share; so nothing but the addresses shows it.
# Matters:  the addresses of a pool that were registered with a transport, or told to a peer, are those of freed memory now.
. "$(dirname "$0")/_common.sh"
install torch==2.13.0 numpy==2.4.6

cat >"$dir/seen" <<'SEEN'
layers that have moved: [0, 1, 2, 3]
the pool has moved: True
layers that are shared: [0, 1, 2, 3]
bytes that are shared: 67108864 of 67108864
values are kept: True
SEEN

show "$dir/seen" <<'PYTHON'
import torch

pool = torch.arange(4 << 22, dtype=torch.float32).view(4, -1)
layers, values = list(pool), pool.clone()
before, start = [layer.data_ptr() for layer in layers], pool.data_ptr()
layers[2].share_memory_()
print("layers that have moved:", [i for i, layer in enumerate(layers) if layer.data_ptr() != before[i]])
print("the pool has moved:", pool.data_ptr() != start)
print("layers that are shared:", [i for i, layer in enumerate(layers) if layer.is_shared()])
print("bytes that are shared:", layers[2].untyped_storage().nbytes(), "of", pool.nbytes)
print("values are kept:", torch.equal(pool, values))
PYTHON
