// SPDX-License-Identifier: Apache-2.0
#include "process_memory.h"

#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include "clock.h"

namespace llmdd {
namespace {

constexpr size_t kMaxIovecs = 1024;  // UIO_MAXIOV of every Linux
// What one call moves at most, and what a thread takes at a time: the step in which a deadline is
// noticed (about 1 ms), and small enough that a thread which gets no CPU holds nobody up.
constexpr uint64_t kBytesPerCall = uint64_t{4} << 20;
// Below two of these a second thread costs more to start than it saves.
constexpr uint64_t kBytesPerThread = uint64_t{4} << 20;
constexpr unsigned kMaxThreads = 4;

// A place in the sequence of all bytes: tensor by tensor, run by run.
struct Cursor {
  size_t tensor = 0;
  size_t run = 0;
  uint64_t done = 0;  // bytes of this run

  // Moves on by at most `limit` bytes of the current run; returns how many. Skips to the next run
  // at its end.
  uint64_t advance(const RemoteCopy& copy, uint64_t limit) {
    const uint64_t left = static_cast<uint64_t>(copy.runs[3 * run + 2]) - done;
    const uint64_t step = std::min(left, limit);
    done += step;
    if (step == left) {
      done = 0;
      if (++run == copy.num_runs) {
        run = 0;
        ++tensor;
      }
    }
    return step;
  }
};

void* address(uint64_t base, int64_t offset, uint64_t done) {
  return reinterpret_cast<void*>(
      static_cast<uintptr_t>(base + static_cast<uint64_t>(offset) + done));
}

// Lists the two sides of one call. Each side merges its own neighbours, so that a side with few and
// long pieces costs few iovecs whatever the other side looks like.
class IovecList {
 public:
  void clear() { size_ = 0; }
  bool accepts(const void* at) const { return size_ < kMaxIovecs || follows(at); }
  void add(void* at, uint64_t nbytes) {
    if (follows(at)) {
      entries_[size_ - 1].iov_len += nbytes;
    } else {
      entries_[size_++] = {at, static_cast<size_t>(nbytes)};
    }
  }
  const iovec* data() const { return entries_; }
  size_t size() const { return size_; }

 private:
  bool follows(const void* at) const {
    if (size_ == 0) return false;
    const iovec& last = entries_[size_ - 1];
    return static_cast<const char*>(last.iov_base) + last.iov_len == at;
  }
  size_t size_ = 0;
  iovec entries_[kMaxIovecs];  // 16 KiB; here and not in the heap, so that a thread can't fail to
                               // start
};

// Finds the cursor at a place in the sequence of all bytes without walking there: lists of runs may
// have millions of entries, and each piece starts with a search.
class Index {
 public:
  explicit Index(const RemoteCopy& copy) : copy_(copy), ends_(copy.num_runs) {
    uint64_t end = 0;
    for (size_t run = 0; run < copy.num_runs; ++run) {
      end += static_cast<uint64_t>(copy.runs[3 * run + 2]);
      ends_[run] = end;
    }
  }

  uint64_t total() const { return bytes_per_tensor() * copy_.num_tensors; }

  // `position` is less than total().
  Cursor cursor_at(uint64_t position) const {
    const uint64_t in_tensor = position % bytes_per_tensor();
    const size_t run = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), in_tensor) -
                                           ends_.begin());
    const uint64_t start = run == 0 ? 0 : ends_[run - 1];
    return {static_cast<size_t>(position / bytes_per_tensor()), run, in_tensor - start};
  }

 private:
  uint64_t bytes_per_tensor() const { return ends_.empty() ? 0 : ends_.back(); }

  const RemoteCopy& copy_;
  std::vector<uint64_t> ends_;  // of each run, counted over the runs of one tensor
};

// What the workers of one copy share: where the next piece starts, and whether to stop.
struct Progress {
  const Index& index;
  uint64_t total;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> stop{false};
};

class Worker {
 public:
  Worker(const PeerProcess& process, Direction direction, const RemoteCopy& copy,
         int64_t deadline_ns)
      : process_(process), direction_(direction), copy_(copy), deadline_ns_(deadline_ns) {}

  // Takes piece after piece until none is left, one has failed, or the deadline has passed.
  RemoteCopyResult run(Progress* progress) {
    RemoteCopyResult result{0, 0};
    Cursor at;
    uint64_t position = 0;  // of `at`
    while (true) {
      const uint64_t begin = progress->next.fetch_add(kBytesPerCall);
      if (begin >= progress->total) return result;
      if (begin != position) at = progress->index.cursor_at(begin);
      position = std::min(begin + kBytesPerCall, progress->total);
      for (uint64_t left = position - begin; left > 0;) {
        const bool late = deadline_passed(deadline_ns_);
        if (late || progress->stop.load(std::memory_order_relaxed)) return result;
        gather(at, left);
        const ssize_t moved = call();
        if (moved < 0 && errno == EINTR) continue;
        if (moved <= 0) {
          result.error = moved < 0 ? errno : EFAULT;
          progress->stop.store(true, std::memory_order_relaxed);
          return result;
        }
        // A transfer that met a bad page ends there; the next call starts at it and gets the errno.
        uint64_t done = static_cast<uint64_t>(moved);
        result.bytes_done += done;
        left -= done;
        while (done > 0) done -= at.advance(copy_, done);
      }
    }
  }

 private:
  void gather(Cursor at, uint64_t limit) {
    local_.clear();
    remote_.clear();
    while (limit > 0) {
      const int64_t* run = copy_.runs + 3 * at.run;
      void* local = address(copy_.local_bases[at.tensor], run[0], at.done);
      void* remote = address(copy_.remote_bases[at.tensor], run[1], at.done);
      if (!local_.accepts(local) || !remote_.accepts(remote)) return;
      const uint64_t step = at.advance(copy_, limit);
      if (step == 0) continue;  // an empty run
      local_.add(local, step);
      remote_.add(remote, step);
      limit -= step;
    }
  }

  ssize_t call() const {
    if (!is_running(process_)) {
      errno = ESRCH;
      return -1;
    }
    const auto vm_call = direction_ == Direction::kRead ? process_vm_readv : process_vm_writev;
    return vm_call(process_.pid, local_.data(), local_.size(), remote_.data(), remote_.size(), 0);
  }

  const PeerProcess& process_;
  const Direction direction_;
  const RemoteCopy& copy_;
  const int64_t deadline_ns_;
  IovecList local_;
  IovecList remote_;
};

// In clock ticks after boot; -1 if there is no such process any more.
int64_t start_time(pid_t pid) {
  char path[32];
  std::snprintf(path, sizeof(path), "/proc/%d/stat", static_cast<int>(pid));
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  char text[1024];
  const ssize_t size = read(file, text, sizeof(text) - 1);
  close(file);
  if (size <= 0) return -1;
  text[size] = '\0';
  // The name, in parentheses, may have spaces and parentheses in it; field 3 (the state) follows.
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] != ' ' || field[2] == 'Z' || field[2] == 'X') return -1;
  field += 2;
  for (int number = 3; number < 22; ++number) {
    field = std::strchr(field, ' ');
    if (field == nullptr) return -1;
    ++field;
  }
  return std::strtoll(field, nullptr, 10);
}

unsigned threads_for(uint64_t total) {
  const uint64_t worth = total / kBytesPerThread;
  if (worth < 2) return 1;
  cpu_set_t cpus;
  const int usable = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
  const unsigned limit = std::clamp<unsigned>(static_cast<unsigned>(usable), 1, kMaxThreads);
  return static_cast<unsigned>(std::min<uint64_t>(worth, limit));
}

}  // namespace

bool is_running(const PeerProcess& process) {
  if (process.pidfd >= 0) {
    pollfd ended{process.pidfd, POLLIN, 0};
    return poll(&ended, 1, 0) == 0;
  }
  return process.start_time < 0 || start_time(process.pid) == process.start_time;
}

RemoteCopyResult copy_remote(const PeerProcess& process, Direction direction,
                             const RemoteCopy& copy, int64_t deadline_ns) {
  const Index index(copy);
  const uint64_t total = index.total();
  if (total == 0) return {0, 0};

  const unsigned num_workers = threads_for(total);
  std::vector<RemoteCopyResult> results(num_workers, RemoteCopyResult{0, 0});
  Progress progress{index, total};
  const auto work = [&](unsigned i) {
    results[i] = Worker(process, direction, copy, deadline_ns).run(&progress);
  };
  std::vector<std::thread> threads;
  threads.reserve(num_workers);
  for (unsigned i = 1; i < num_workers; ++i) {
    try {
      threads.emplace_back(work, i);
    } catch (const std::exception&) {
      break;  // no more threads to be had: those that run do all of it
    }
  }
  work(0);
  for (std::thread& thread : threads) thread.join();

  RemoteCopyResult sum{0, 0};
  for (const RemoteCopyResult& result : results) {
    sum.bytes_done += result.bytes_done;
    if (sum.error == 0) sum.error = result.error;
  }
  // If it ended meanwhile, the last bytes may have been those of another process with its pid.
  if (sum.error == 0 && !is_running(process)) sum.error = ESRCH;
  return sum;
}

}  // namespace llmdd
