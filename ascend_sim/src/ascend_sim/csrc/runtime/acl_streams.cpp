// SPDX-License-Identifier: Apache-2.0
// Streams and events as AscendCL has them.
#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "../sim_api.h"
#include "acl/acl.h"
#include "errors.h"
#include "faults.h"
#include "streams.h"

using sim::fail;
using sim::RecordingPtr;
using sim::StreamPtr;

namespace {

struct Event {
  bool waits_for_first;  // made without Ex: who waits before the first recording waits for that one
  bool has_time;
  bool is_recorded = false;  // else nobody has put `recording` into a stream yet
  RecordingPtr recording = std::make_shared<sim::Recording>();
};

std::mutex events_mutex;

std::map<void*, std::unique_ptr<Event>>& events() {
  static auto& the = *new std::map<void*, std::unique_ptr<Event>>;
  return the;
}

int make_event(aclrtEvent* out, uint32_t flag, bool waits_for_first) {
  if (ascend_sim_current_device() < 0)
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  std::lock_guard<std::mutex> lock(events_mutex);
  const bool has_time = (flag & ACL_EVENT_TIME_LINE) != 0;
  auto event = std::make_unique<Event>(Event{waits_for_first, has_time});
  *out = event.get();
  events()[*out] = std::move(event);
  return 0;
}

Event* find_event(aclrtEvent handle) {
  const auto found = events().find(handle);
  return found == events().end() ? nullptr : found->second.get();
}

bool time_of(const Event& event, double* milliseconds) {
  return event.has_time && sim::time_of(event.recording, milliseconds);
}

int no_time() {
  return fail(ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID,
              "the event has not happened yet, or was made without time");
}

int no_event() { return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such event"); }

int no_stream(aclrtStream handle) {
  if (handle == nullptr) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  return fail(ACL_ERROR_RT_INVALID_HANDLE, "no such stream");
}

int make_stream(aclrtStream* out) {
  const int device = ascend_sim_current_device();
  if (device < 0) return fail(ACL_ERROR_RT_CONTEXT_NULL, "this thread has set no device");
  *out = sim::make_stream(device).get();
  return 0;
}

int synchronize(aclrtStream handle, int timeout) {
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  if (!sim::finish_all(stream, sim::deadline_from(timeout))) {
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "stream %d has not finished in %d ms", stream->id,
                timeout);
  }
  return sim::take_error(stream);
}

int synchronize_event(aclrtEvent handle, int timeout) {
  RecordingPtr recording;
  {
    std::lock_guard<std::mutex> lock(events_mutex);
    const Event* event = find_event(handle);
    if (event == nullptr) return no_event();
    if (!event->is_recorded) return 0;
    recording = event->recording;
  }
  if (!sim::finish_recording(recording, sim::deadline_from(timeout))) {
    return fail(ACL_ERROR_RT_EVENT_SYNC_TIMEOUT, "the event has not happened in %d ms", timeout);
  }
  return sim::take_error(recording);
}

}  // namespace

aclError aclrtCreateStream(aclrtStream* stream) {
  ASCEND_SIM_ENTER(aclrtCreateStream);
  return make_stream(stream);
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  ASCEND_SIM_ENTER(aclrtCreateStreamWithConfig);
  return make_stream(stream);
}

aclError aclrtDestroyStream(aclrtStream handle) {
  ASCEND_SIM_ENTER(aclrtDestroyStream);
  const StreamPtr stream = handle == nullptr ? nullptr : sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  sim::finish_all(stream);
  sim::forget_stream(handle);
  return 0;
}

aclError aclrtDestroyStreamForce(aclrtStream handle) {
  ASCEND_SIM_ENTER(aclrtDestroyStreamForce);
  return sim::forget_stream(handle) ? 0 : fail(ACL_ERROR_RT_INVALID_HANDLE, "no such stream");
}

aclError aclrtSynchronizeStream(aclrtStream handle) {
  ASCEND_SIM_ENTER(aclrtSynchronizeStream);
  return synchronize(handle, -1);
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t timeout) {
  ASCEND_SIM_ENTER(aclrtSynchronizeStreamWithTimeout);
  return synchronize(handle, timeout);
}

aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  ASCEND_SIM_ENTER(aclrtStreamQuery);
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  *status = sim::poll(stream) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return 0;
}

aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  ASCEND_SIM_ENTER(aclrtStreamGetId);
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  *id = stream->id;
  return 0;
}

aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t mode) {
  ASCEND_SIM_ENTER(aclrtSetStreamFailureMode);
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  sim::set_stops_on_failure(stream, mode == ACL_STOP_ON_FAILURE);
  return 0;
}

aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent event_handle) {
  ASCEND_SIM_ENTER(aclrtStreamWaitEvent);
  const StreamPtr stream = sim::find_stream(handle);
  if (stream == nullptr) return no_stream(handle);
  uint64_t position = 0;
  {
    // Until it is queued, so that no other thread's recording gets in between.
    std::lock_guard<std::mutex> lock(events_mutex);
    const Event* event = find_event(event_handle);
    if (event == nullptr) return no_event();
    if (!event->is_recorded && !event->waits_for_first) return 0;
    position = sim::enqueue(stream, {"aclrtStreamWaitEvent", nullptr, event->recording, nullptr});
  }
  sim::let_run(stream, position);
  return 0;
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* arguments) {
  ASCEND_SIM_ENTER(aclrtLaunchHostFunc);
  const StreamPtr target = sim::find_stream(stream);
  if (target == nullptr) return no_stream(stream);
  sim::submit(target, {"aclrtLaunchHostFunc",
                       [function, arguments] {
                         function(arguments);
                         return 0;
                       },
                       nullptr, nullptr});
  return 0;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType,
                             aclrtStream stream) {
  ASCEND_SIM_ENTER(aclrtLaunchCallback);
  return aclrtLaunchHostFunc(stream, function, data);
}

aclError aclrtSubscribeReport(uint64_t, aclrtStream) {
  ASCEND_SIM_ENTER(aclrtSubscribeReport);
  return 0;
}

aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) {
  ASCEND_SIM_ENTER(aclrtUnSubscribeReport);
  return 0;
}

aclError aclrtProcessReport(int32_t) {
  ASCEND_SIM_ENTER(aclrtProcessReport);
  return 0;
}

aclError aclrtCreateEvent(aclrtEvent* event) {
  ASCEND_SIM_ENTER(aclrtCreateEvent);
  return make_event(event, ACL_EVENT_TIME_LINE, true);
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  ASCEND_SIM_ENTER(aclrtCreateEventWithFlag);
  return make_event(event, flag, true);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  ASCEND_SIM_ENTER(aclrtCreateEventExWithFlag);
  return make_event(event, flag, false);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  ASCEND_SIM_ENTER(aclrtDestroyEvent);
  std::lock_guard<std::mutex> lock(events_mutex);
  return events().erase(event) == 1 ? 0 : no_event();
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream_handle) {
  ASCEND_SIM_ENTER(aclrtRecordEvent);
  const StreamPtr stream = sim::find_stream(stream_handle);
  if (stream == nullptr) return no_stream(stream_handle);
  uint64_t position = 0;
  {
    std::lock_guard<std::mutex> lock(events_mutex);
    Event* event = find_event(handle);
    if (event == nullptr) return no_event();
    // A recording that nobody has put into a stream yet may have waiters already.
    if (event->is_recorded) event->recording = std::make_shared<sim::Recording>();
    event->is_recorded = true;
    position = sim::enqueue(stream, {"aclrtRecordEvent", nullptr, nullptr, event->recording});
  }
  sim::let_run(stream, position);
  return 0;
}

aclError aclrtResetEvent(aclrtEvent handle, aclrtStream) {
  ASCEND_SIM_ENTER(aclrtResetEvent);
  std::lock_guard<std::mutex> lock(events_mutex);
  Event* event = find_event(handle);
  if (event == nullptr) return no_event();
  // Who waits already, waits for the recording that was: as if reset in stream order.
  event->recording = std::make_shared<sim::Recording>();
  event->is_recorded = false;
  return 0;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  ASCEND_SIM_ENTER(aclrtQueryEventStatus);
  RecordingPtr recording;
  {
    std::lock_guard<std::mutex> lock(events_mutex);
    const Event* event = find_event(handle);
    if (event == nullptr) return no_event();
    recording = event->recording;
  }
  const bool is_done = sim::poll(recording);
  *status = is_done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return 0;
}

aclError aclrtQueryEvent(aclrtEvent handle, aclrtEventStatus* status) {
  ASCEND_SIM_ENTER(aclrtQueryEvent);
  aclrtEventRecordedStatus recorded = ACL_EVENT_RECORDED_STATUS_NOT_READY;
  const int code = aclrtQueryEventStatus(handle, &recorded);
  const bool is_done = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE;
  *status = is_done ? ACL_EVENT_STATUS_COMPLETE : ACL_EVENT_STATUS_NOT_READY;
  return code;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  ASCEND_SIM_ENTER(aclrtQueryEventWaitStatus);
  aclrtEventRecordedStatus recorded = ACL_EVENT_RECORDED_STATUS_NOT_READY;
  const int code = aclrtQueryEventStatus(handle, &recorded);
  const bool is_done = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE;
  *status = is_done ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return code;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  ASCEND_SIM_ENTER(aclrtSynchronizeEvent);
  return synchronize_event(event, -1);
}

aclError aclrtSynchronizeEventWithTimeout(aclrtEvent event, int32_t timeout) {
  ASCEND_SIM_ENTER(aclrtSynchronizeEventWithTimeout);
  return synchronize_event(event, timeout);
}

aclError aclrtEventElapsedTime(float* ms, aclrtEvent first, aclrtEvent second) {
  ASCEND_SIM_ENTER(aclrtEventElapsedTime);
  std::lock_guard<std::mutex> lock(events_mutex);
  const Event* from = find_event(first);
  const Event* to = find_event(second);
  if (from == nullptr || to == nullptr) return no_event();
  double start = 0;
  double end = 0;
  if (!time_of(*from, &start) || !time_of(*to, &end)) return no_time();
  *ms = static_cast<float>(end - start);
  return 0;
}

aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t* timestamp) {
  ASCEND_SIM_ENTER(aclrtEventGetTimestamp);
  std::lock_guard<std::mutex> lock(events_mutex);
  const Event* event = find_event(handle);
  if (event == nullptr) return no_event();
  double milliseconds = 0;
  if (!time_of(*event, &milliseconds)) return no_time();
  *timestamp = static_cast<uint64_t>(milliseconds * 1000);
  return 0;
}
