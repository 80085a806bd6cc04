// SPDX-License-Identifier: Apache-2.0
#include "streams.h"

#include <condition_variable>
#include <map>
#include <mutex>
#include <vector>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "settings.h"

namespace sim {
namespace {

using Lock = std::unique_lock<std::mutex>;
using Clock = std::chrono::steady_clock;

struct Streams {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<void*, StreamPtr> by_handle;
  std::map<int, StreamPtr> defaults;  // device -> its default stream
  int next_id = 0;
  uint64_t epoch = random_number();  // of the random scheduler's ranks
};

Streams& streams() {
  static Streams& the = *new Streams;
  return the;
}

double now_ms() {
  return std::chrono::duration<double, std::milli>(Clock::now().time_since_epoch()).count();
}

std::vector<StreamPtr> all_streams(int device = -1) {
  std::vector<StreamPtr> found;
  for (const auto& [key, stream] : streams().defaults) {
    if (device < 0 || stream->device == device) found.push_back(stream);
  }
  for (const auto& [handle, stream] : streams().by_handle) {
    if (device < 0 || stream->device == device) found.push_back(stream);
  }
  return found;
}

// The stream whose next task must run for this one to get on: itself, or one that it waits for.
// Null if another thread runs it, or nothing can be done.
StreamPtr next_to_run(StreamPtr stream) {
  // Streams that wait for each other in a circle never get on: nobody may follow them for ever.
  for (size_t hops = streams().by_handle.size() + streams().defaults.size() + 1; hops > 0; --hops) {
    if (stream == nullptr || stream->is_running || stream->queue.empty()) return nullptr;
    const RecordingPtr& wait = stream->queue.front().waits_for;
    if (wait == nullptr || wait->is_done) return stream;
    stream = wait->stream;
  }
  return nullptr;
}

bool is_ready(const StreamPtr& stream) {
  if (stream->is_running || stream->queue.empty()) return false;
  const RecordingPtr& wait = stream->queue.front().waits_for;
  return wait == nullptr || wait->is_done;
}

int run_task(const Task& task, std::string* text) {
  int code = ascend_sim_fault(("task." + task.name).c_str());
  if (code == 0) code = task.run();
  if (code != 0) *text = aclGetRecentErrMsg();
  return code;
}

// Runs the first task of a ready stream, without the lock.
void run_one(Lock& lock, const StreamPtr& stream) {
  Task task = std::move(stream->queue.front());
  stream->queue.pop_front();
  int code = 0;
  std::string text;
  if (task.run) {
    const bool is_skipped = stream->error != 0 && stream->stops_on_failure;
    stream->is_running = true;
    lock.unlock();
    if (!is_skipped) code = run_task(task, &text);
    task.run = nullptr;  // destroys what it holds, still without the lock
    lock.lock();
    stream->is_running = false;
  }
  if (code != 0 && stream->error == 0) {
    stream->error = code;
    stream->error_text =
        task.name + " failed in stream " + std::to_string(stream->id) + ": " + text;
  }
  if (task.records != nullptr) {
    task.records->milliseconds = now_ms();
    task.records->error = stream->error;
    task.records->is_done = true;
  }
  ++stream->finished;
  streams().changed.notify_all();
}

// Which of the streams goes first, for a while: an even choice for every task would seldom let one
// stream get far ahead of another, which is what shows a missing wait.
uint64_t rank_of(const StreamPtr& stream) {
  const uint64_t mixed =
      (streams().epoch + static_cast<uint64_t>(stream->id)) * 0x9E3779B97F4A7C15ULL;
  return (mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9ULL;
}

// One task of a random stream, of those that can run.
bool run_random(Lock& lock) {
  StreamPtr chosen;
  for (const StreamPtr& stream : all_streams()) {
    if (is_ready(stream) && (chosen == nullptr || rank_of(stream) > rank_of(chosen)))
      chosen = stream;
  }
  if (chosen == nullptr) return false;
  if (random_number() % 4 == 0) streams().epoch = random_number();
  run_one(lock, chosen);
  return true;
}

template <typename IsDone>
bool run_until(Lock& lock, const StreamPtr& stream, Deadline deadline, IsDone is_done) {
  while (!is_done()) {
    if (deadline && Clock::now() >= *deadline) return false;
    if (settings().scheduler == Scheduler::kRandom && run_random(lock)) continue;
    if (const StreamPtr next = next_to_run(stream); next != nullptr) {
      run_one(lock, next);
    } else if (deadline) {
      streams().changed.wait_until(lock, *deadline);
    } else {
      streams().changed.wait(lock);
    }
  }
  return true;
}

// What the scheduler lets run at once when something was queued.
void run_eagerly(Lock& lock, const StreamPtr& stream, uint64_t position) {
  if (settings().scheduler == Scheduler::kRandom) {
    // Mostly nothing: a device seldom is ahead of its host.
    uint64_t steps = random_number() % 4 == 0 ? 1 + random_number() % 4 : 0;
    while (steps-- > 0 && run_random(lock)) {
    }
  } else if (settings().scheduler == Scheduler::kInline) {
    while (stream->finished < position) {
      if (const StreamPtr next = next_to_run(stream); next != nullptr) {
        run_one(lock, next);
      } else if (stream->is_running) {
        streams().changed.wait(lock);
      } else {
        break;  // it waits for an event that nobody has recorded yet
      }
    }
  }
}

}  // namespace

Deadline deadline_from(int timeout_ms) {
  if (timeout_ms < 0) return std::nullopt;
  return Clock::now() + std::chrono::milliseconds(timeout_ms);
}

StreamPtr make_stream(int device) {
  Lock lock(streams().mutex);
  auto stream = std::make_shared<Stream>(++streams().next_id, device);
  streams().by_handle[stream.get()] = stream;
  return stream;
}

StreamPtr find_stream(void* handle) {
  Lock lock(streams().mutex);
  if (handle != nullptr) {
    const auto found = streams().by_handle.find(handle);
    return found == streams().by_handle.end() ? nullptr : found->second;
  }
  const int device = ascend_sim_current_device();
  if (device < 0) return nullptr;
  StreamPtr& stream = streams().defaults[device];
  if (stream == nullptr) stream = std::make_shared<Stream>(++streams().next_id, device);
  return stream;
}

bool forget_stream(void* handle) {
  std::deque<Task> dropped;
  Lock lock(streams().mutex);
  const auto found = streams().by_handle.find(handle);
  if (found == streams().by_handle.end()) return false;
  const StreamPtr stream = found->second;
  streams().by_handle.erase(found);
  dropped.swap(stream->queue);
  stream->finished += dropped.size();
  for (const Task& task : dropped) {
    if (task.records != nullptr) task.records->is_done = true;
  }
  streams().changed.notify_all();
  lock.unlock();
  return true;
}

void set_stops_on_failure(const StreamPtr& stream, bool stops) {
  Lock lock(streams().mutex);
  stream->stops_on_failure = stops;
}

uint64_t enqueue(const StreamPtr& stream, Task task) {
  Lock lock(streams().mutex);
  if (task.records != nullptr) task.records->stream = stream;
  stream->queue.push_back(std::move(task));
  const uint64_t position = ++stream->submitted;
  streams().changed.notify_all();
  return position;
}

void let_run(const StreamPtr& stream, uint64_t position) {
  Lock lock(streams().mutex);
  run_eagerly(lock, stream, position);
}

uint64_t submit(const StreamPtr& stream, Task task) {
  const uint64_t position = enqueue(stream, std::move(task));
  let_run(stream, position);
  return position;
}

bool finish(const StreamPtr& stream, uint64_t position, Deadline deadline) {
  Lock lock(streams().mutex);
  return run_until(lock, stream, deadline, [&] { return stream->finished >= position; });
}

bool finish_all(const StreamPtr& stream, Deadline deadline) {
  uint64_t position = 0;
  {
    Lock lock(streams().mutex);
    position = stream->submitted;
  }
  return finish(stream, position, deadline);
}

bool finish_device(int device, Deadline deadline) {
  std::vector<StreamPtr> waited;
  {
    Lock lock(streams().mutex);
    waited = all_streams(device);
  }
  for (const StreamPtr& stream : waited) {
    if (!finish_all(stream, deadline)) return false;
  }
  return true;
}

bool finish_recording(const RecordingPtr& recording, Deadline deadline) {
  Lock lock(streams().mutex);
  return run_until(lock, recording->stream, deadline, [&] { return recording->is_done; });
}

bool poll(const StreamPtr& stream) {
  Lock lock(streams().mutex);
  if (stream->finished == stream->submitted) return true;
  if (const StreamPtr next = next_to_run(stream); next != nullptr) run_one(lock, next);
  return false;
}

bool poll(const RecordingPtr& recording) {
  Lock lock(streams().mutex);
  if (recording->is_done) return true;
  if (const StreamPtr next = next_to_run(recording->stream); next != nullptr) run_one(lock, next);
  return false;
}

bool time_of(const RecordingPtr& recording, double* milliseconds) {
  Lock lock(streams().mutex);
  *milliseconds = recording->milliseconds;
  return recording->is_done;
}

int take_error(const StreamPtr& stream) {
  Lock lock(streams().mutex);
  const int code = stream->error;
  if (code != 0) fail(code, "%s", stream->error_text.c_str());
  stream->error = 0;
  return code;
}

int take_device_error(int device) {
  std::vector<StreamPtr> asked;
  {
    Lock lock(streams().mutex);
    asked = all_streams(device);
  }
  int code = 0;
  for (const StreamPtr& stream : asked) {
    if (const int error = take_error(stream); error != 0) code = error;
  }
  return code;
}

int take_error(const RecordingPtr& recording) {
  StreamPtr stream;
  {
    Lock lock(streams().mutex);
    if (recording->error == 0) return 0;
    recording->error = 0;
    stream = recording->stream;
  }
  return stream == nullptr ? 0 : take_error(stream);
}

}  // namespace sim

int ascend_sim_submit(void* stream, const char* name, int (*task)(void*), void (*drop)(void*),
                      void* arg) {
  // Owned by the task, so that it is dropped with it, run or not.
  std::shared_ptr<void> owned(arg, [drop](void* held) {
    if (drop != nullptr) drop(held);
  });
  const sim::StreamPtr target = sim::find_stream(stream);
  if (target == nullptr) {
    return sim::fail(stream == nullptr ? ACL_ERROR_RT_CONTEXT_NULL : ACL_ERROR_RT_INVALID_HANDLE,
                     "%s: there is no such stream", name);
  }
  sim::submit(target, {name, [task, owned = std::move(owned)] { return task(owned.get()); },
                       nullptr, nullptr});
  return 0;
}
