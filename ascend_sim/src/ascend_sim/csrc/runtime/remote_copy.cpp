// SPDX-License-Identifier: Apache-2.0
// One-sided copies between this process and another's memory, for the simulated transfer engine.
#include "../hixl/remote_copy.h"

#include <sys/prctl.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <vector>

namespace {

// The kernel's IOV_MAX.
constexpr size_t kMaxPieces = 1024;

iovec vector_of(uint64_t address, uint64_t length) {
  return {reinterpret_cast<void*>(address), static_cast<size_t>(length)};
}

// Takes what has been moved off the front; pieces of which something is left stay.
void advance(std::vector<AscendSimPiece>* pieces, uint64_t moved) {
  auto piece = pieces->begin();
  while (piece != pieces->end() && piece->length <= moved) {
    moved -= piece->length;
    ++piece;
  }
  if (piece != pieces->end()) {
    piece->local += moved;
    piece->remote += moved;
    piece->length -= moved;
  }
  pieces->erase(pieces->begin(), piece);
}

int copy_some(pid_t pid, bool write, std::vector<AscendSimPiece> pieces) {
  while (!pieces.empty()) {
    std::vector<iovec> local, remote;
    for (const AscendSimPiece& piece : pieces) {
      local.push_back(vector_of(piece.local, piece.length));
      remote.push_back(vector_of(piece.remote, piece.length));
    }
    const auto call = write ? process_vm_writev : process_vm_readv;
    const ssize_t moved = call(pid, local.data(), local.size(), remote.data(), remote.size(), 0);
    if (moved < 0) {
      return errno;
    }
    if (moved == 0) {
      return EFAULT;
    }
    advance(&pieces, static_cast<uint64_t>(moved));
  }
  return 0;
}

}  // namespace

ASCEND_SIM_API int ascend_sim_remote_copy(int32_t pid, int32_t write, const AscendSimPiece* pieces,
                                          size_t count) {
  std::vector<AscendSimPiece> all(pieces, pieces + count);
  all.erase(std::remove_if(all.begin(), all.end(),
                           [](const AscendSimPiece& piece) { return piece.length == 0; }),
            all.end());
  for (size_t first = 0; first < all.size(); first += kMaxPieces) {
    const size_t last = std::min(all.size(), first + kMaxPieces);
    const int error = copy_some(pid, write != 0, {all.begin() + first, all.begin() + last});
    if (error != 0) {
      return error;
    }
  }
  return 0;
}

ASCEND_SIM_API void ascend_sim_allow_remote_copies(void) {
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}
