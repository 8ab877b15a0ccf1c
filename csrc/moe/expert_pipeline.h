// Experts on their way from CPU memory to the device: rank 0 writes each into the next of n host buffers, and every
// rank enqueues the copies of its shard. No Python between an expert and the next.
//
//   rank 0      write e0 -> buffer 0 | write e1 -> buffer 1 | write e2 -> buffer 2 | ...
//   each rank                        | enqueue copies of e0 | enqueue copies of e1 | ...
//   its bus                              copy e0 ...............copy e1 ..............
//
//   memory:   [ranks][buffers][image]       an image as kt_kernel/formats/expert_image.py describes it
//   counters: int64, shared by the ranks    written | failed [buffers] | taken [ranks]
//             `written` = experts that rank 0 has written, `failed[b]` = the number of one that it could not write,
//             `taken[r]` = experts that rank r has copied; they count from 1 since the pipeline was made
//
// All ranks run the same experts in the same order. A write that fails ends the run on all ranks at that expert; after
// a copy that fails the others still pass, and the run then throws, on that rank alone.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "core/device_copy.h"
#include "core/process_watch.h"
#include "moe/layer.h"

namespace kt {

// Another rank has ended, or could not do its part.
class RankFailure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

constexpr int kImageParts = 5;  // w13 codes, w13 scales, w2 codes, w2 scales, global scales

struct ImagePart {
  size_t offset;
  size_t bytes;  // 0: experts of this layer have no such part
};

struct PipelineConfig {
  size_t image_bytes;
  std::array<ImagePart, kImageParts> parts;
  int buffers;
  int rank;
  uint8_t* memory;
  std::atomic<int64_t>* counters;  // null where the rank is alone
  std::vector<int> pids;           // of all ranks
};

struct PipelineJob {
  std::shared_ptr<MoeLayer> layer;                                   // null on other ranks than 0
  const float* global_scales = nullptr;                              // [experts of the layer][3], or null
  std::vector<int> experts;                                          // in this order
  const std::array<uintptr_t, kImageParts>* destinations = nullptr;  // of each of `experts`; 0 = leave out
  uint8_t* staging = nullptr;                                        // device memory of `buffers` images
};

class ExpertPipeline {
 public:
  explicit ExpertPipeline(const PipelineConfig& config);

  // On the calling thread, until all copies are enqueued. With neither destinations nor staging the experts pass by.
  void run(const PipelineJob& job, DeviceCopies& copies);

  int buffers() const { return config_.buffers; }
  // Of this rank; the experts that have passed so far.
  int64_t passed() const { return sequence_; }

 private:
  friend class StagedRun;
  // `begin()`: on the thread that copies, before all else. `before_copy(i)`: may expert i's staging be overwritten?
  // `enqueued(buffer)`: its copies have been given to the bus.
  struct Stages {
    std::function<void()> begin;
    std::function<void(size_t)> before_copy;
    std::function<void(int)> enqueued;
  };
  void run(const PipelineJob& job, DeviceCopies& copies, const Stages& stages);
  void pass(const PipelineJob& job, int expert, int buffer, DeviceCopies& copies);
  void enqueue(const PipelineJob& job, size_t index, int buffer, DeviceCopies& copies);
  void write(const PipelineJob& job, int expert, int buffer);
  void wait_until_free(int buffer, DeviceCopies& copies);
  void publish_taken(DeviceCopies& copies);
  void await(const std::function<bool()>& reached) const;
  uint8_t* image(int rank, int buffer) const;
  int ranks() const { return static_cast<int>(config_.pids.size()); }
  std::atomic<int64_t>& written() const { return config_.counters[0]; }
  std::atomic<int64_t>& failed(int buffer) const { return config_.counters[1 + buffer]; }
  std::atomic<int64_t>& taken(int rank) const { return config_.counters[1 + config_.buffers + rank]; }

  PipelineConfig config_;
  std::vector<ProcessWatch> others_;
  std::vector<char> marked_;  // buffers whose copies may still be on their way
  int64_t sequence_ = 0;      // experts that have passed
  int64_t taken_ = 0;         // of those, copied
};

// A run on a thread of its own, through device memory, whose caller works on each expert there:
//
//   while (run.next() >= 0) { enqueue work on the user's stream; run.used(); }
//   run.finish();
class StagedRun {
 public:
  StagedRun(std::shared_ptr<ExpertPipeline> pipeline, PipelineJob job, std::shared_ptr<DeviceCopies> copies);
  ~StagedRun();  // lets the remaining experts pass

  // Waits until the next expert's copy is enqueued and lets the user's stream wait for it. Returns its staging buffer,
  // -1 after the last one or where the run failed.
  int next();
  // The user's stream has been given everything that reads what `next` returned.
  void used();
  // Waits for the end of the run and throws what it threw.
  void finish();

 private:
  void before_copy(size_t index);

  std::shared_ptr<ExpertPipeline> pipeline_;
  PipelineJob job_;
  std::shared_ptr<DeviceCopies> copies_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int> enqueued_;  // buffers, in order
  size_t handed_out_ = 0;
  size_t used_ = 0;
  bool ended_ = false;
  bool given_up_ = false;
  std::exception_ptr failure_;
  std::thread thread_;  // last member: it uses the others
};

}  // namespace kt
