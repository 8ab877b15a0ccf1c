#include "moe/expert_pipeline.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "core/fault.h"

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

// Ranks wait for each other less than the time of a write, so at first without giving up the core.
constexpr microseconds kSpin{50};
constexpr microseconds kSleep{50};
constexpr milliseconds kBetweenLooksAtProcesses{50};
// Far more than the slowest write or copy of a rank that is well.
constexpr seconds kGiveUp{300};

}  // namespace

ExpertPipeline::ExpertPipeline(const PipelineConfig& config) : config_(config), marked_(config.buffers, 0) {
  if (config_.counters == nullptr) return;
  for (int r = 0; r < ranks(); ++r) {
    if (r != config_.rank) others_.emplace_back(config_.pids[r]);
  }
}

uint8_t* ExpertPipeline::image(int rank, int buffer) const {
  return config_.memory + (static_cast<size_t>(rank) * config_.buffers + buffer) * config_.image_bytes;
}

void ExpertPipeline::run(const PipelineJob& job, DeviceCopies& copies) { run(job, copies, Stages{}); }

void ExpertPipeline::run(const PipelineJob& job, DeviceCopies& copies, const Stages& stages) {
  std::exception_ptr failure;
  const auto keep_failure = [&failure](const auto& work) {
    if (failure) return;
    try {
      work();
    } catch (...) {
      failure = std::current_exception();
    }
  };
  if (stages.begin) keep_failure(stages.begin);
  for (size_t i = 0; i < job.experts.size(); ++i) {
    const int buffer = static_cast<int>(sequence_ % config_.buffers);
    pass(job, job.experts[i], buffer, copies);
    if (job.destinations == nullptr && job.staging == nullptr) continue;
    keep_failure([&] {
      if (stages.before_copy) stages.before_copy(i);
      enqueue(job, i, buffer, copies);
      if (stages.enqueued) stages.enqueued(buffer);
    });
  }
  if (failure) std::rethrow_exception(failure);
}

void ExpertPipeline::pass(const PipelineJob& job, int expert, int buffer, DeviceCopies& copies) {
  wait_until_free(buffer, copies);
  std::exception_ptr failure;
  if (job.layer != nullptr) {
    try {
      write(job, expert, buffer);
    } catch (...) {
      failure = std::current_exception();
    }
  }
  const int64_t number = ++sequence_;
  if (config_.counters != nullptr && config_.rank == 0) {
    if (failure) failed(buffer).store(number, std::memory_order_relaxed);
    written().store(number, std::memory_order_release);
  }
  if (failure) std::rethrow_exception(failure);
  if (config_.counters == nullptr || config_.rank == 0) return;
  await([&] {
    publish_taken(copies);
    return written().load(std::memory_order_acquire) >= number;
  });
  if (failed(buffer).load(std::memory_order_relaxed) == number) {
    throw RankFailure("rank 0 could not write an expert for this rank; its log says why");
  }
}

void ExpertPipeline::write(const PipelineJob& job, int expert, int buffer) {
  job.layer->check_write(expert, ranks());
  RankTargets targets;
  for (int r = 0; r < ranks(); ++r) {
    uint8_t* const base = image(r, buffer);
    const auto part = [&](int i) { return config_.parts[i].bytes == 0 ? nullptr : base + config_.parts[i].offset; };
    targets.gate_up.push_back({part(0), part(1), 0});
    targets.down.push_back({part(2), part(3), 0});
    if (part(4) != nullptr) std::memcpy(part(4), job.global_scales + 3 * expert, config_.parts[4].bytes);
  }
  job.layer->write(expert, targets);
}

void ExpertPipeline::enqueue(const PipelineJob& job, size_t index, int buffer, DeviceCopies& copies) {
  const uint8_t* const source = image(config_.rank, buffer);
  marked_[buffer] = 1;
  if (fails(Fault::kDeviceCopy)) {
    throw std::runtime_error("copying expert " + std::to_string(job.experts[index]) +
                             " to the device failed: made to fail by KT_FAULT");
  }
  if (job.staging != nullptr) {
    copies.wait_until_used(buffer);
    copies.copy(job.staging + buffer * config_.image_bytes, source, config_.image_bytes);
  } else {
    for (int p = 0; p < kImageParts; ++p) {
      void* const to = reinterpret_cast<void*>(job.destinations[index][p]);
      if (to != nullptr) copies.copy(to, source + config_.parts[p].offset, config_.parts[p].bytes);
    }
  }
  copies.mark_copied(buffer);
}

// Until all ranks have copied what was in `buffer`.
void ExpertPipeline::wait_until_free(int buffer, DeviceCopies& copies) {
  if (marked_[buffer]) {
    try {
      copies.wait_until_copied(buffer);
    } catch (...) {
      // A device that has failed copies nothing any more; the calls that enqueue say so.
    }
    marked_[buffer] = 0;
  }
  if (config_.counters == nullptr) return;
  const int64_t needed = sequence_ + 1 - config_.buffers;
  taken_ = std::max(taken_, needed);
  taken(config_.rank).store(taken_, std::memory_order_release);
  if (config_.rank != 0) return;
  await([&] {
    for (int r = 0; r < ranks(); ++r) {
      if (taken(r).load(std::memory_order_acquire) < needed) return false;
    }
    return true;
  });
}

// While this rank waits for rank 0, which may be waiting for the buffers that this rank has copied meanwhile.
void ExpertPipeline::publish_taken(DeviceCopies& copies) {
  while (taken_ < sequence_ - 1) {  // the last one is being waited for
    const int buffer = static_cast<int>(taken_ % config_.buffers);
    if (marked_[buffer] && !copies.copied(buffer)) break;
    ++taken_;
  }
  taken(config_.rank).store(taken_, std::memory_order_release);
}

void ExpertPipeline::await(const std::function<bool()>& reached) const {
  const Clock::time_point begin = Clock::now();
  Clock::time_point looked = begin;
  while (!reached()) {
    const Clock::time_point now = Clock::now();
    if (now - begin < kSpin) {
      __builtin_ia32_pause();
      continue;
    }
    if (now - looked >= kBetweenLooksAtProcesses) {
      looked = now;
      for (const ProcessWatch& other : others_) {
        if (!other.ended() || reached()) continue;
        throw RankFailure("process " + std::to_string(other.pid()) + ", another rank of this model, ended while " +
                          "experts were on their way to the devices; its log says why; restart the server");
      }
    }
    if (now - begin > kGiveUp) {
      throw RankFailure("rank " + std::to_string(config_.rank) + " waited " + std::to_string(kGiveUp.count()) +
                        " seconds for the experts of another rank, which runs but does not copy; restart the server");
    }
    std::this_thread::sleep_for(kSleep);
  }
}

// ---- StagedRun -----------------------------------------------------------------------------------

StagedRun::StagedRun(std::shared_ptr<ExpertPipeline> pipeline, PipelineJob job, std::shared_ptr<DeviceCopies> copies)
    : pipeline_(std::move(pipeline)), job_(std::move(job)), copies_(std::move(copies)) {
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "kt-experts");
    std::exception_ptr failure;
    try {
      pipeline_->run(job_, *copies_,
                     {[this] { copies_->begin_thread(); }, [this](size_t index) { before_copy(index); },
                      [this](int buffer) {
                        const std::lock_guard<std::mutex> lock(mutex_);
                        enqueued_.push_back(buffer);
                        changed_.notify_all();
                      }});
    } catch (...) {
      failure = std::current_exception();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    failure_ = failure;
    ended_ = true;
    changed_.notify_all();
  });
}

StagedRun::~StagedRun() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    given_up_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

// Until the caller has issued what reads the staging buffer that expert `index` will take.
void StagedRun::before_copy(size_t index) {
  const size_t buffers = pipeline_->buffers();
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return given_up_ || used_ + buffers > index; });
  if (given_up_) throw std::runtime_error("the run was given up before its end");
}

int StagedRun::next() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return ended_ || handed_out_ < enqueued_.size(); });
  if (handed_out_ >= enqueued_.size()) return -1;
  const int buffer = enqueued_[handed_out_++];
  lock.unlock();
  copies_->let_user_wait(buffer);
  return buffer;
}

void StagedRun::used() {
  std::unique_lock<std::mutex> lock(mutex_);
  const int buffer = enqueued_[used_];
  lock.unlock();
  copies_->mark_used(buffer);
  lock.lock();
  ++used_;
  changed_.notify_all();
}

void StagedRun::finish() {
  if (thread_.joinable()) thread_.join();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

}  // namespace kt
