#!/usr/bin/env bash
# NIXL's UCX backend cannot be created with UCX's shared-memory transports alone, although they carry the bytes within one host.
#
# Versions: nixl-cu12 1.5.1 with its own UCX.
# Expect:   UCX_TLS=self,sm, UCX's setting for one host, keeps NIXL's traffic off the network.
# Happens:  createBackend raises NIXL_ERR_BACKEND. NIXL asks UCX for connections that notice a dead peer, and of the
#           transports at hand only TCP does; the reason is in UCX's log. With tcp added the bytes go by shared memory: 256 MiB
#           are there when transfer() returns, as they are not by TCP alone.
# Matters:  an agent within one host opens TCP sockets on the network all the same, which UCX chooses by itself
#           (UCX_NET_DEVICES says otherwise), and a container without a network has no NIXL.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
UCX_TLS=self,sm: nixlBackendError: NIXL_ERR_BACKEND
UCX_TLS=self,sm,tcp: DONE when posted
UCX_TLS=tcp: PROC when posted
SEEN

UCX_LOG_LEVEL=fatal show "$dir/seen" <<'PYTHON'
import os

from pair import Pair

NBYTES = 256 << 20
for transports in ("self,sm", "self,sm,tcp", "tcp"):
    os.environ["UCX_TLS"] = transports
    try:
        pair = Pair(NBYTES)
    except Exception as error:
        print(f"UCX_TLS={transports}: {type(error).__name__}: {error}")
    else:
        print(f"UCX_TLS={transports}:", pair.writer.transfer(pair.request(pair.blocks(NBYTES))), "when posted")
PYTHON
