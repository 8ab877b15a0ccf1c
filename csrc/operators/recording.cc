#include "operators/recording.h"

#include <stdexcept>

namespace kt {
namespace {

thread_local Recording* open_recording = nullptr;

}  // namespace

Recording* Recording::current() { return open_recording; }

void Recording::open() {
  if (open_recording != nullptr) throw std::runtime_error("a recording is already open on this thread");
  open_recording = this;
}

void Recording::close() {
  if (open_recording == this) open_recording = nullptr;
}

Recording::~Recording() {
  close();
  jobs_.clear();
  for (TensorHandle tensor : held_) torch_abi().delete_tensor_object(tensor);
}

void Recording::replay(Engine& engine, size_t begin, size_t end) const {
  for (size_t i = begin; i < end && i < jobs_.size(); ++i) jobs_[i](engine);
}

}  // namespace kt
