#!/usr/bin/env bash
# Posting a NIXL request again sends its last notification again, and an empty message does not take it back.
#
# Versions: nixl-cu12 1.5.1.
# Expect:   transfer(request, message) notifies of this post only; transfer(request), whose message is empty by default, notifies
#           of nothing.
# Happens:  each post without a message, or with an empty one, sends the last message that the request was ever given.
# Matters:  notifications say which request's blocks have arrived, or are free. Who keeps a request for a list of blocks and posts it
#           again tells the peer a second time of an earlier prompt.
. "$(dirname "$0")/_common.sh"
install_nixl

cat >"$dir/seen" <<'SEEN'
made with the message b'prompt 1', posted: [b'prompt 1']
posted again without a message: [b'prompt 1']
posted again with b'prompt 2': [b'prompt 2']
posted again without a message: [b'prompt 2']
posted again with b'': [b'prompt 2']
SEEN

show "$dir/seen" <<'PYTHON'
import time

from pair import Pair

pair = Pair(1 << 20)
request = pair.request(pair.blocks(1 << 20), b"prompt 1")


def post(*message):
    state, messages, deadline = pair.writer.transfer(request, *message), [], time.monotonic() + 0.5
    while state == "PROC" or time.monotonic() < deadline:
        state = pair.writer.check_xfer_state(request)
        messages += pair.owner.get_new_notifs().get("writer", [])
    return messages


print("made with the message b'prompt 1', posted:", post())
print("posted again without a message:", post())
print("posted again with b'prompt 2':", post(b"prompt 2"))
print("posted again without a message:", post())
print("posted again with b'':", post(b""))
PYTHON
