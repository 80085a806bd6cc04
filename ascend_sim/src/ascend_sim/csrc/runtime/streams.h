// SPDX-License-Identifier: Apache-2.0
// Streams: queues of tasks that run in order, and only when the scheduler lets them, on the thread
// that waits.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

namespace sim {

struct Stream;
using StreamPtr = std::shared_ptr<Stream>;

// One recording of an event. Who waits for the event waits for the recording that it had at that
// moment. All members belong to the scheduler's lock.
struct Recording {
  StreamPtr stream;  // null until it is in a stream
  bool is_done = false;
  double milliseconds = 0;
  int error = 0;
};
using RecordingPtr = std::shared_ptr<Recording>;

struct Task {
  std::string name;
  std::function<int()> run;  // may be empty; returns an aclError
  RecordingPtr waits_for;
  RecordingPtr records;
};

// All members belong to the scheduler's lock, except the constants.
struct Stream {
  Stream(int id, int device) : id(id), device(device) {}
  const int id;
  const int device;
  bool stops_on_failure = false;
  std::deque<Task> queue;
  uint64_t submitted = 0;
  uint64_t finished = 0;
  bool is_running = false;
  int error = 0;  // of the first task that failed since the last synchronisation
  std::string error_text;
};

using Deadline = std::optional<std::chrono::steady_clock::time_point>;
Deadline deadline_from(int timeout_ms);  // < 0: none

StreamPtr make_stream(int device);
StreamPtr find_stream(
    void* handle);  // null: default stream of the current device; returns null if there is no such
bool forget_stream(void* handle);  // destroy: what is queued is dropped

void set_stops_on_failure(const StreamPtr& stream, bool stops);

// Queues a task. Returns its position. Nothing runs before `let_run`, so that locks may be held.
uint64_t enqueue(const StreamPtr& stream, Task task);

// What the scheduler wants to run at once after a task was queued.
void let_run(const StreamPtr& stream, uint64_t position);

// Both.
uint64_t submit(const StreamPtr& stream, Task task);

// Runs what is needed until the stream has finished `position` tasks. Returns false at the
// deadline.
bool finish(const StreamPtr& stream, uint64_t position, Deadline deadline = std::nullopt);
bool finish_all(const StreamPtr& stream, Deadline deadline = std::nullopt);
bool finish_device(int device, Deadline deadline = std::nullopt);
bool finish_recording(const RecordingPtr& recording, Deadline deadline = std::nullopt);

// Whether it is done. If it isn't, lets one task of it run, so that who polls gets there.
bool poll(const StreamPtr& stream);
bool poll(const RecordingPtr& recording);

bool time_of(const RecordingPtr& recording, double* milliseconds);  // false if it isn't done

// The error of a stream (of a device's streams), which is then forgotten; sets the thread's error
// text.
int take_error(const StreamPtr& stream);
int take_device_error(int device);
int take_error(const RecordingPtr& recording);

}  // namespace sim
