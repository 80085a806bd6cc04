# Sourced by every finding: a temporary folder with an environment of its own, and the comparison of what is seen with what was seen.
set -euo pipefail
export NIXL_LOG_LEVEL=FATAL

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
python="$dir/venv/bin/python"

# install ARGUMENTS...: pip's, quiet unless it fails.
install() {
    "$python" -m pip install --quiet --disable-pip-version-check "$@" >"$dir/pip" 2>&1 || { cat "$dir/pip" >&2; exit 1; }
}

# install_nixl: NIXL with the module `pair`, two connected agents in one process.
install_nixl() {
    install numpy==2.4.6
    install --no-deps nixl-cu12==1.5.1
    cat >"$dir/pair.py" <<'PYTHON'
import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config


class Pair:
    """A writer with a source of ones, and an owner with a destination of zeros, which have connected."""

    def __init__(self, nbytes, progress=False):
        config = nixl_agent_config(enable_prog_thread=progress)
        self.writer, self.owner = nixl_agent("writer", config), nixl_agent("owner", config)
        self.source, self.destination = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        for agent, memory in ((self.writer, self.source), (self.owner, self.destination)):
            agent.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
        self.writer.add_remote_agent(self.owner.get_agent_metadata())
        self.run(self.request(self.blocks(16)))
        self.destination[:] = 0

    def blocks(self, nbytes, of=None):
        """The first `nbytes` of both sides, in blocks of `of` bytes."""
        starts = np.arange(0, nbytes, of or nbytes)
        sides = (memory.ctypes.data + starts for memory in (self.source, self.destination))
        sizes, devices = np.full_like(starts, of or nbytes), np.zeros_like(starts)
        return [np.stack([side, sizes, devices], axis=1).astype(np.uint64) for side in sides]

    def request(self, tables, message=b""):
        lists = (self.writer.get_xfer_descs(np.ascontiguousarray(table), "DRAM") for table in tables)
        return self.writer.initialize_xfer("WRITE", *lists, "owner", message)

    def run(self, request):
        """Posts a request and waits until it is done; returns what the owner was notified of."""
        messages, state = [], self.writer.transfer(request)
        while state == "PROC":
            state = self.writer.check_xfer_state(request)
            messages += self.owner.get_new_notifs().get("writer", [])
        return messages
PYTHON
}

# show SEEN: runs the Python program on standard input and prints what it prints. Lines that begin with "# " are figures, which
# differ from run to run. All others must be those of the file SEEN, else the finding no longer holds.
show() {
    cat >"$dir/program.py"
    (cd "$dir" && "$python" program.py) | tee "$dir/printed"
    if ! diff -u --label "what was seen" --label "what is seen" "$1" <(grep -v '^# ' "$dir/printed") >&2; then
        echo "This has changed." >&2
        exit 1
    fi
}
