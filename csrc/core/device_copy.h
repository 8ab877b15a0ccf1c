// Copies from host buffers to a device, for one thread at a time that fills buffers 0 to n-1 in turn.
//
//   the bus      copy ... mark_copied(b)                 the buffer may be written again once copied(b)
//   the user     let_user_wait(b) ... mark_used(b)       what reads the bytes on the device, stage by stage
//   the bus      wait_until_used(b) copy ...             the device's memory of buffer b is overwritten
//
// Bus and user are streams. Copies that go where they stay need one stream for both and none of the last three.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/device_stream.h"

namespace kt {

class DeviceCopies {
 public:
  virtual ~DeviceCopies() = default;

  // On a new thread that will make the calls below, before them.
  virtual void begin_thread() {}
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  virtual void mark_copied(int buffer) = 0;
  // Has the device reached the mark? True for a buffer that was never marked.
  virtual bool copied(int buffer) = 0;
  virtual void wait_until_copied(int buffer) = 0;

  virtual void let_user_wait(int buffer) = 0;
  virtual void mark_used(int buffer) = 0;
  virtual void wait_until_used(int buffer) = 0;
};

// A CPU in the device's place: what was called has been done.
class HostCopies final : public DeviceCopies {
 public:
  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void mark_copied(int) override {}
  bool copied(int) override { return true; }
  void wait_until_copied(int) override {}
  void let_user_wait(int) override {}
  void mark_used(int) override {}
  void wait_until_used(int) override {}
};

// Streams of the device that is current when this is made. Every call throws std::runtime_error when the runtime fails.
class StreamCopies final : public DeviceCopies {
 public:
  explicit StreamCopies(int buffers);
  ~StreamCopies() override;
  StreamCopies(const StreamCopies&) = delete;
  StreamCopies& operator=(const StreamCopies&) = delete;

  // Of the calls from now on; the marks before stay what they are.
  void use_streams(StreamHandle bus, StreamHandle user);

  void begin_thread() override;
  void copy(void* to, const void* from, size_t bytes) override;
  void mark_copied(int buffer) override;
  bool copied(int buffer) override;
  void wait_until_copied(int buffer) override;
  void let_user_wait(int buffer) override;
  void mark_used(int buffer) override;
  void wait_until_used(int buffer) override;

 private:
  int device_ = 0;
  void* bus_ = nullptr;
  void* user_ = nullptr;
  std::vector<void*> copied_;  // an event per buffer
  std::vector<void*> used_;
};

}  // namespace kt
