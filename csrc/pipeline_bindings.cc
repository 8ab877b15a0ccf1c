#include "pipeline_bindings.h"

#include <pybind11/stl.h>

#include "core/device_copy.h"
#include "moe/expert_pipeline.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

using kt::DeviceCopies;
using kt::ExpertPipeline;
using kt::StagedRun;

// A device of another kind, written in Python; it must outlive the runs that use it.
class PythonCopies final : public DeviceCopies {
 public:
  void copy(void* to, const void* from, size_t bytes) override {
    call("copy", reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from), bytes);
  }
  void mark_copied(int buffer) override { call("mark_copied", buffer); }
  bool copied(int buffer) override {
    const py::gil_scoped_acquire gil;
    return self("copied")(buffer).cast<bool>();
  }
  void wait_until_copied(int buffer) override { call("wait_until_copied", buffer); }
  void let_user_wait(int buffer) override { call("let_user_wait", buffer); }
  void mark_used(int buffer) override { call("mark_used", buffer); }
  void wait_until_used(int buffer) override { call("wait_until_used", buffer); }

 private:
  py::function self(const char* name) const {
    const py::function function = py::get_override(static_cast<const DeviceCopies*>(this), name);
    if (!function) throw std::runtime_error(std::string("this DeviceCopies has no method ") + name);
    return function;
  }
  template <class... Arguments>
  void call(const char* name, Arguments... arguments) const {
    const py::gil_scoped_acquire gil;
    try {
      self(name)(arguments...);
    } catch (py::error_already_set& error) {
      throw std::runtime_error(error.what());  // an exception that holds Python objects must not leave the lock
    }
  }
};

kt::PipelineConfig config_of(size_t image_bytes, const std::vector<std::pair<size_t, size_t>>& parts, int buffers,
                             int rank, uintptr_t memory, uintptr_t counters, const std::vector<int>& pids) {
  if (parts.size() != kt::kImageParts || buffers < 1 || rank < 0 || rank >= static_cast<int>(pids.size())) {
    throw std::invalid_argument("a pipeline was described with " + std::to_string(parts.size()) + " parts, " +
                                std::to_string(buffers) + " buffers and rank " + std::to_string(rank) + " of " +
                                std::to_string(pids.size()) + "; expected " + std::to_string(kt::kImageParts) +
                                " parts, at least one buffer, and a rank that exists");
  }
  kt::PipelineConfig config{image_bytes,
                            {},
                            buffers,
                            rank,
                            reinterpret_cast<uint8_t*>(memory),
                            reinterpret_cast<std::atomic<int64_t>*>(counters),
                            pids};
  for (int p = 0; p < kt::kImageParts; ++p) config.parts[p] = {parts[p].first, parts[p].second};
  return config;
}

kt::PipelineJob job_of(std::shared_ptr<kt::MoeLayer> layer, uintptr_t global_scales, std::vector<int> experts) {
  if (layer != nullptr) layer->engine().require_own_process();
  kt::PipelineJob job;
  job.layer = std::move(layer);
  job.global_scales = reinterpret_cast<const float*>(global_scales);
  job.experts = std::move(experts);
  return job;
}

void run(ExpertPipeline& pipeline, std::shared_ptr<kt::MoeLayer> layer, uintptr_t global_scales,
         std::vector<int> experts, uintptr_t destinations, DeviceCopies& copies) {
  kt::PipelineJob job = job_of(std::move(layer), global_scales, std::move(experts));
  job.destinations = reinterpret_cast<const std::array<uintptr_t, kt::kImageParts>*>(destinations);
  const kt::Unlocked release;
  pipeline.run(job, copies);
}

std::shared_ptr<StagedRun> start(std::shared_ptr<ExpertPipeline> pipeline, std::shared_ptr<kt::MoeLayer> layer,
                                 uintptr_t global_scales, std::vector<int> experts, uintptr_t staging,
                                 std::shared_ptr<DeviceCopies> copies) {
  kt::PipelineJob job = job_of(std::move(layer), global_scales, std::move(experts));
  job.staging = reinterpret_cast<uint8_t*>(staging);
  // Its thread may need the lock before it ends.
  return {new StagedRun(std::move(pipeline), std::move(job), std::move(copies)), [](StagedRun* staged) {
            const py::gil_scoped_release release;
            delete staged;
          }};
}

}  // namespace

void bind_pipeline(py::module_& m) {
  py::register_exception<kt::RankFailure>(m, "RankFailure", PyExc_RuntimeError);

  py::class_<DeviceCopies, PythonCopies, std::shared_ptr<DeviceCopies>>(m, "DeviceCopies")
      .def(py::init<>())
      .def("mark_used", &DeviceCopies::mark_used, py::arg("buffer"));
  py::class_<kt::HostCopies, DeviceCopies, std::shared_ptr<kt::HostCopies>>(m, "HostCopies").def(py::init<>());
  py::class_<kt::StreamCopies, DeviceCopies, std::shared_ptr<kt::StreamCopies>>(m, "StreamCopies")
      .def(py::init<int>(), py::arg("buffers"))
      .def("use_streams", &kt::StreamCopies::use_streams, py::arg("bus"), py::arg("user"));

  py::class_<StagedRun, std::shared_ptr<StagedRun>>(m, "StagedRun")
      .def("next", &StagedRun::next, py::call_guard<kt::Unlocked>())
      .def("used", &StagedRun::used, py::call_guard<kt::Unlocked>())
      .def("finish", &StagedRun::finish, py::call_guard<kt::Unlocked>());

  py::class_<ExpertPipeline, std::shared_ptr<ExpertPipeline>>(m, "ExpertPipeline")
      .def(py::init([](size_t image_bytes, const std::vector<std::pair<size_t, size_t>>& parts, int buffers, int rank,
                       uintptr_t memory, uintptr_t counters, const std::vector<int>& pids) {
             return std::make_shared<ExpertPipeline>(
                 config_of(image_bytes, parts, buffers, rank, memory, counters, pids));
           }),
           py::kw_only(), py::arg("image_bytes"), py::arg("parts"), py::arg("buffers"), py::arg("rank"),
           py::arg("memory"), py::arg("counters"), py::arg("pids"))
      .def("run", &run, py::arg("layer").none(true), py::arg("global_scales"), py::arg("experts"),
           py::arg("destinations"), py::arg("copies"))
      .def("start", &start, py::arg("layer").none(true), py::arg("global_scales"), py::arg("experts"),
           py::arg("staging"), py::arg("copies"))
      .def_property_readonly("passed", &ExpertPipeline::passed);
}
