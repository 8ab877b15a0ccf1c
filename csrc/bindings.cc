// The Python face of the extension. Pointers travel as integers; the package above owns shapes and lifetimes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "adapter_bindings.h"
#include "core/allowed_cpus.h"
#include "core/cpu_features.h"
#include "core/cpu_variants.h"
#include "core/device_calls.h"
#include "core/device_signals.h"
#include "core/device_stream.h"
#include "core/fault.h"
#include "core/mapped_reads.h"
#include "core/release_later.h"
#include "core/topology.h"
#include "formats_bindings.h"
#include "gguf_bindings.h"
#include "kernels/dispatch.h"
#include "limits/limits.h"
#include "moe/layer.h"
#include "operator_bindings.h"
#include "operators/handles.h"
#include "pipeline_bindings.h"
#include "quantise_bindings.h"
#include "training_bindings.h"
#include "unlocked.h"

namespace py = pybind11;

namespace {

using kt::Engine;
using kt::MoeLayer;

// (weights, scales, factor) of one matrix; addresses as integers.
using Source = std::tuple<uintptr_t, uintptr_t, float>;

// Addresses of fp32 biases of gate, up and down, one for each expert (0 = none), or nothing at all.
using Biases = std::vector<std::vector<uintptr_t>>;

std::vector<kt::MatrixSource> sources(const std::vector<Source>& matrices) {
  std::vector<kt::MatrixSource> result;
  result.reserve(matrices.size());
  for (const auto& [codes, scales, factor] : matrices) {
    result.push_back({reinterpret_cast<const uint8_t*>(codes), reinterpret_cast<const uint8_t*>(scales), factor});
  }
  return result;
}

kt::ExpertSources sources(const std::vector<Source>& gate, const std::vector<Source>& up,
                          const std::vector<Source>& down, const Biases& biases) {
  kt::ExpertSources result = {sources(gate), sources(up), sources(down)};
  if (biases.empty()) return result;
  for (const kt::Projection p : kt::kProjections) {
    const size_t i = static_cast<size_t>(p);
    const size_t given = i < biases.size() ? biases[i].size() : 0;
    if (given != result[p].size() || biases.size() != kt::kProjections.size()) {
      throw std::invalid_argument("got " + std::to_string(given) + " biases of " + kt::name_of(p) + " for " +
                                  std::to_string(result[p].size()) + " experts; give one address per expert, 0 = none");
    }
    for (size_t e = 0; e < given; ++e) result[p][e].bias = reinterpret_cast<const float*>(biases[i][e]);
  }
  return result;
}

std::vector<kt::MatrixTarget> targets(const char* name, int ranks, const std::vector<uintptr_t>& codes,
                                      const std::vector<uintptr_t>& scales, bool needs_scales) {
  if (codes.size() != static_cast<size_t>(ranks) || scales.size() != static_cast<size_t>(ranks)) {
    throw std::invalid_argument(std::string(name) + " got " + std::to_string(codes.size()) + " weight and " +
                                std::to_string(scales.size()) + " scale pointers for " + std::to_string(ranks) +
                                " device ranks; give one of each per rank");
  }
  std::vector<kt::MatrixTarget> result;
  for (int r = 0; r < ranks; ++r) {
    if (codes[r] == 0 || (needs_scales && scales[r] == 0)) {
      throw std::invalid_argument(std::string(name) + " of rank " + std::to_string(r) +
                                  " has a null pointer; expected an address");
    }
    result.push_back({reinterpret_cast<uint8_t*>(codes[r]), reinterpret_cast<uint8_t*>(scales[r]), 0});
  }
  return result;
}

template <class Enum>
Enum checked_enum(int value, int count, const char* name) {
  if (value < 0 || value >= count) {
    throw std::invalid_argument(std::string(name) + " code " + std::to_string(value) +
                                " is unknown; codes go from 0 to " + std::to_string(count - 1));
  }
  return static_cast<Enum>(value);
}

kt::ForwardArgs forward_args(int tokens, int top_k, uintptr_t hidden, int hidden_type, uintptr_t ids, int ids_type,
                             uintptr_t weights, uintptr_t output, int output_type, int accumulate) {
  return {{tokens, top_k, reinterpret_cast<const void*>(ids), checked_enum<kt::IdType>(ids_type, 2, "ids dtype"),
           reinterpret_cast<const float*>(weights)},
          reinterpret_cast<const void*>(hidden),
          checked_enum<kt::DType>(hidden_type, 3, "hidden dtype"),
          reinterpret_cast<void*>(output),
          checked_enum<kt::DType>(output_type, 3, "output dtype"),
          accumulate != 0 ? kt::Store::kAccumulate : kt::Store::kOverwrite};
}

template <class... Ints>
void forward(const std::shared_ptr<MoeLayer>& layer, Ints... ints) {
  const kt::ForwardArgs args = forward_args(ints...);
  layer->engine().require_own_process();
  kt::Unlocked release;
  layer->engine().queue().wait(0);  // first in, first out with queued tasks
  layer->forward(args);
}

template <class... Ints>
void forward_reference(const std::shared_ptr<MoeLayer>& layer, Ints... ints) {
  const kt::ForwardArgs args = forward_args(ints...);
  layer->engine().require_own_process();
  kt::Unlocked release;
  layer->engine().queue().wait(0);
  layer->forward_reference(args);
}

template <class... Ints>
void submit(const std::shared_ptr<MoeLayer>& layer, Ints... ints) {
  const kt::ForwardArgs args = forward_args(ints...);
  layer->engine().require_own_process();
  layer->check(args);
  kt::Unlocked release;
  layer->engine().queue().submit([layer, args] { layer->forward(args); });
}

// A Python object held by threads without the GIL.
class Held {
 public:
  explicit Held(py::object object)
      : object_(new py::object(std::move(object)), [](void* o) { delete static_cast<py::object*>(o); }) {}
  ~Held() { kt::release_later(std::move(object_)); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

 private:
  std::shared_ptr<void> object_;
};

// Frees what earlier host functions and graphs held. Not while a stream captures: page-locked memory given back then
// would have its allocator record events into the graph.
void release_between_captures(kt::StreamHandle stream) {
  if (!kt::capture_id(stream)) kt::release_now();
}

// `keep_alive` lives until the task is done, or, captured, as long as the graph. With `deferred_ids`, a second task
// follows in the same operation of the stream: the same call with these ids, stored in `deferred_output`.
template <class... Ints>
void submit_on_stream(const std::shared_ptr<MoeLayer>& layer, kt::StreamHandle stream, Ints... ints,
                      py::object keep_alive, uintptr_t deferred_ids, uintptr_t deferred_output) {
  std::vector<kt::ForwardArgs> calls = {forward_args(ints...)};
  calls[0].caller = kt::Caller::kDeviceStream;
  if (deferred_ids != 0) {
    kt::ForwardArgs deferred = calls[0];
    deferred.routing.ids = reinterpret_cast<const void*>(deferred_ids);
    deferred.output = reinterpret_cast<void*>(deferred_output);
    deferred.store = kt::Store::kOverwrite;
    calls.push_back(deferred);
  }
  layer->engine().require_own_process();
  for (const kt::ForwardArgs& args : calls) layer->check(args);
  release_between_captures(stream);
  auto held = std::make_shared<Held>(std::move(keep_alive));
  std::vector<kt::TaskQueue::Task> tasks;
  for (const kt::ForwardArgs& args : calls) tasks.push_back([layer, args, held] { layer->forward(args); });
  held.reset();
  kt::Unlocked release;
  kt::submit_on_stream(layer->engine().queue(), stream, std::move(tasks));
}

// Names of the formats of gate, up and down; none where the method has but one.
kt::ExpertFormats expert_formats(const MoeLayer& layer, const std::vector<std::string>& names) {
  kt::ExpertFormats formats{};
  if (!names.empty() && names.size() != formats.values.size()) {
    throw std::invalid_argument("got " + std::to_string(names.size()) + " formats; expected one of gate, up and down");
  }
  for (size_t i = 0; i < formats.values.size(); ++i) {
    formats.values[i] = names.empty() ? &layer.only_format() : &kt::format_of(layer.config().method, names[i]);
  }
  return formats;
}

void load(MoeLayer& layer, const std::vector<Source>& gate, const std::vector<Source>& up,
          const std::vector<Source>& down, const std::vector<std::string>& formats, int group_size, int scale_dtype,
          const Biases& biases) {
  const kt::FormatOptions options = {group_size, checked_enum<kt::DType>(scale_dtype, 3, "scale dtype")};
  layer.engine().require_own_process();
  kt::release_now();  // weights of layers that only a destroyed graph held, before there are new ones
  kt::Unlocked release;
  layer.engine().queue().wait(0);
  layer.load(sources(gate, up, down, biases), expert_formats(layer, formats), options);
}

// The caller keeps the memory as long as the layer has these experts.
void borrow(MoeLayer& layer, const std::vector<Source>& gate, const std::vector<Source>& up,
            const std::vector<Source>& down, const std::vector<std::string>& formats, const Biases& biases) {
  layer.engine().require_own_process();
  kt::release_now();
  kt::Unlocked release;
  layer.engine().queue().wait(0);
  layer.borrow(sources(gate, up, down, biases), expert_formats(layer, formats));
}

// For the processes of a host: `file` is an open descriptor of memory that they all map.
void share(MoeLayer& layer, int file) {
  layer.engine().require_own_process();
  kt::Unlocked release;
  layer.engine().queue().wait(0);
  layer.share(file);
}

void attach(MoeLayer& layer, int file, const std::vector<std::string>& formats, int group_size, int scale_dtype) {
  const kt::FormatOptions options = {group_size, checked_enum<kt::DType>(scale_dtype, 3, "scale dtype")};
  layer.engine().require_own_process();
  kt::Unlocked release;
  layer.engine().queue().wait(0);
  layer.attach(file, expert_formats(layer, formats), options);
}

using Addresses = std::vector<uintptr_t>;

kt::RankTargets rank_targets(MoeLayer& layer, int expert, int ranks, const Addresses& w13_weights,
                             const Addresses& w13_scales, const Addresses& w2_weights, const Addresses& w2_scales) {
  layer.engine().require_own_process();
  layer.check_write(expert, ranks);
  const bool scaled = kt::formats_of_method(layer.config().method).front()->scales_apart();
  return {targets("w13", ranks, w13_weights, w13_scales, scaled), targets("w2", ranks, w2_weights, w2_scales, scaled)};
}

// In this thread, at once: neither behind queued calls nor with their errors.
void write_expert(const std::shared_ptr<MoeLayer>& layer, int expert, int ranks, const Addresses& w13_weights,
                  const Addresses& w13_scales, const Addresses& w2_weights, const Addresses& w2_scales) {
  const auto written = rank_targets(*layer, expert, ranks, w13_weights, w13_scales, w2_weights, w2_scales);
  kt::Unlocked release;
  layer->write(expert, written);
}

void submit_write_expert(const std::shared_ptr<MoeLayer>& layer, int slot, int ranks, const Addresses& w13_weights,
                         const Addresses& w13_scales, const Addresses& w2_weights, const Addresses& w2_scales) {
  const auto written = rank_targets(*layer, slot, ranks, w13_weights, w13_scales, w2_weights, w2_scales);
  kt::Unlocked release;
  layer->engine().queue().submit([layer, slot, written] { layer->write(slot, written); });
}

py::dict features() {
  const kt::CpuFeatures& f = kt::cpu_features();
  py::dict result;
  result["detected"] = f.detected.names();
  result["active"] = f.active.names();
  result["variant"] = f.variant;
  result["cap"] = f.cap.empty() ? py::object(py::none()) : py::object(py::str(f.cap));
  result["no_tiles"] = f.no_tiles;
  return result;
}

py::list variants() {
  py::list result;
  for (const kt::CpuVariant& variant : kt::cpu_variants()) {
    py::dict row;
    row["name"] = variant.name;
    row["needs"] = variant.needs.names();
    result.append(row);
  }
  return result;
}

std::string why_unavailable(kt::FeatureSet needs, const kt::CpuFeatures& f) {
  if (f.detected.includes(needs)) return "capped by KT_KERNEL_CPU_VARIANT=" + f.cap;
  if (needs.has(kt::Feature::kAmxTile) && !f.no_tiles.empty()) return f.no_tiles;
  std::string text;
  for (const std::string& name : needs.minus(f.detected).names()) text += (text.empty() ? "" : ", ") + name;
  // Not an instruction set, so nothing that this CPU lacks.
  if (text == "fma_beats_dot") return "this CPU's bf16 dot products are as fast as its FMA";
  return "this CPU lacks " + text;
}

// One dict per method and row of its codes; a method's "chosen" row is what activations="auto" takes.
py::dict described(const kt::DispatchRow& row, const kt::Format& format) {
  const kt::CpuFeatures& f = kt::cpu_features();
  const kt::DispatchRow* chosen = kt::chosen_row(row.operation, format, kt::Activations::kAuto);
  const kt::DispatchRow* first = kt::chosen_row(row.operation, format, row.activations());
  py::dict d;
  d["method"] = format.method();
  d["format"] = format.name;
  d["operation"] = kt::name_of(row.operation);
  d["activations"] = kt::name_of(row.activations());
  d["kernel"] = row.kernels->name;
  d["needs"] = row.needs.names();
  d["machines"] = row.machines;
  if (!f.active.includes(row.needs)) {
    d["state"] = "unavailable";
    d["reason"] = why_unavailable(row.needs, f);
    return d;
  }
  d["state"] = &row == chosen ? "chosen" : "available";
  d["reason"] = &row == chosen  ? "the first row whose features this CPU has"
                : &row == first ? std::string("taken with activations='") + kt::name_of(row.activations()) + "'"
                                : "a row above it is faster";
  return d;
}

py::list dispatch() {
  py::list rows;
  for (const kt::Format* format : kt::all_formats()) {
    for (const kt::DispatchRow& row : kt::dispatch_table()) {
      if (row.serves(row.operation, *format, kt::Activations::kAuto)) rows.append(described(row, *format));
    }
  }
  return rows;
}

py::tuple methods() {
  std::vector<std::string> names;
  for (const kt::Format* format : kt::all_formats()) {
    if (std::find(names.begin(), names.end(), format->method()) == names.end()) names.push_back(format->method());
  }
  return py::tuple(py::cast(names));
}

py::dict topology() {
  const kt::Topology t = kt::read_topology();
  py::list nodes;
  for (const kt::NumaNode& node : t.nodes) {
    py::dict d;
    d["node"] = node.os_index;
    std::vector<int> first_threads;
    for (const std::vector<int>& core : node.cores) first_threads.push_back(core.front());
    d["cores"] = first_threads;
    d["memory_bytes"] = node.memory_bytes;
    nodes.append(d);
  }
  py::dict result;
  result["numa_nodes"] = nodes;
  result["physical_cores"] = t.physical_cores();
  result["cpu_quota"] = t.cpu_quota > 0 ? py::object(py::float_(t.cpu_quota)) : py::object(py::none());
  return result;
}

py::dict limits(Engine& engine, size_t bytes, int repeats) {
  engine.require_own_process();
  kt::Limits measured;
  {
    kt::Unlocked release;
    const auto lock = engine.exclusive();
    measured = kt::measure_limits(engine.pools(), bytes, repeats);
  }
  py::dict result;
  const auto add = [&result](const char* name, const kt::Limit& limit) {
    py::dict d;
    d["how"] = limit.how;
    d["per_second"] = limit.per_second;
    result[name] = d;
  };
  add("read", measured.read);
  add("bf16_dot", measured.bf16_dot);
  add("int8_dot", measured.int8_dot);
  add("int8_widened", measured.int8_widened);
  add("f32_fma", measured.f32_fma);
  return result;
}

py::dict device_signals() {
  const kt::DeviceSignals* signals = nullptr;
  {
    kt::Unlocked release;  // trying them may take seconds
    signals = &kt::device_signals();
  }
  py::dict result;
  result["kind"] = signals->kind == kt::SignalKind::kMemoryOperations ? "stream memory operations" : "host functions";
  result["reason"] = signals->reason;
  return result;
}

void bind_engine(py::module_& m) {
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](int threads, int subpools, const std::optional<std::vector<int>>& nodes) {
             const kt::PoolConfig config{threads, subpools, nodes.value_or(std::vector<int>{})};
             // A forked child has no threads to end: it must not wait for them.
             return std::shared_ptr<Engine>(new Engine(config), [](Engine* engine) {
               if (engine->belongs_to_this_process()) delete engine;
             });
           }),
           py::arg("threads"), py::arg("subpools") = 1, py::arg("numa_nodes") = py::none())
      .def_property_readonly("threads", [](Engine& e) { return e.pools().threads(); })
      .def_property_readonly("subpools", [](Engine& e) { return e.pools().subpools(); })
      .def_property_readonly("numa_nodes", [](Engine& e) { return e.pools().numa_nodes(); })
      .def_property_readonly("threads_per_subpool", [](Engine& e) { return e.pools().threads_per_subpool(); })
      .def_property_readonly("warnings", [](Engine& e) { return e.pools().warnings(); })
      .def("stats",
           [](Engine& e) {
             const kt::EngineStats stats = e.stats();
             py::dict d;
             d["calls"] = stats.calls;
             d["seconds"] = stats.seconds;
             d["bytes"] = stats.bytes;
             return d;
           })
      .def_property_readonly("in_own_process", [](Engine& e) { return e.belongs_to_this_process(); })
      .def_property_readonly("pending", [](Engine& e) { return e.queue().pending(); })
      .def(
          "sync",
          [](Engine& e, int allowed) {
            e.require_own_process();
            e.queue().sync(allowed);
          },
          py::arg("allowed_pending") = 0, py::call_guard<kt::Unlocked>())
      .def("raise_pending_error", [](Engine& e) { e.queue().raise_pending_error(); })
      .def(
          "sync_on_stream",
          [](const std::shared_ptr<Engine>& e, kt::StreamHandle stream, int allowed) {
            e->require_own_process();
            if (allowed < 0) throw std::invalid_argument("allowed_pending is negative; expected 0 or more");
            kt::sync_on_stream(e->queue(), stream, allowed, e);
          },
          py::arg("stream"), py::arg("allowed_pending") = 0, py::call_guard<kt::Unlocked>());
}

void bind_layer(py::module_& m) {
  using A = uintptr_t;
  py::class_<MoeLayer, std::shared_ptr<MoeLayer>>(m, "MoeLayer")
      .def(py::init([](std::shared_ptr<Engine> engine, const std::string& method, int num_experts, int top_k,
                       int hidden, int intermediate, int max_tokens, int layer_idx, float limit, float alpha,
                       const std::string& activations) {
             return std::make_shared<MoeLayer>(std::move(engine), kt::LayerConfig{method,
                                                                                  {num_experts, hidden, intermediate},
                                                                                  top_k,
                                                                                  max_tokens,
                                                                                  layer_idx,
                                                                                  limit,
                                                                                  alpha,
                                                                                  kt::activations_named(activations)});
           }),
           py::arg("engine"), py::kw_only(), py::arg("method"), py::arg("num_experts"), py::arg("top_k"),
           py::arg("hidden"), py::arg("intermediate"), py::arg("max_tokens"), py::arg("layer_idx") = 0,
           py::arg("swiglu_limit") = 0.0f, py::arg("swiglu_alpha") = 0.0f, py::arg("activations") = "auto")
      .def("load_experts", &load, py::arg("gate"), py::arg("up"), py::arg("down"), py::kw_only(),
           py::arg("formats") = std::vector<std::string>(), py::arg("group_size") = 0,
           py::arg("scale_dtype") = static_cast<int>(kt::DType::kF32), py::arg("biases") = Biases())
      .def("borrow_experts", &borrow, py::arg("gate"), py::arg("up"), py::arg("down"), py::kw_only(),
           py::arg("formats"), py::arg("biases") = Biases())
      .def("share_experts", &share, py::arg("file"))
      .def("attach_experts", &attach, py::arg("file"), py::kw_only(), py::arg("formats") = std::vector<std::string>(),
           py::arg("group_size") = 0, py::arg("scale_dtype") = static_cast<int>(kt::DType::kF32))
      .def("write_expert", &write_expert, py::arg("expert"), py::arg("ranks"), py::arg("w13_weight_ptrs"),
           py::arg("w13_scale_ptrs"), py::arg("w2_weight_ptrs"), py::arg("w2_scale_ptrs"))
      .def("submit_write_expert", &submit_write_expert, py::arg("slot"), py::arg("ranks"), py::arg("w13_weight_ptrs"),
           py::arg("w13_scale_ptrs"), py::arg("w2_weight_ptrs"), py::arg("w2_scale_ptrs"))
      .def_property_readonly("handle",
                             [](const std::shared_ptr<MoeLayer>& layer) { return kt::Handles<MoeLayer>::of(layer); })
      .def_property_readonly("loaded", &MoeLayer::loaded)
      .def_property_readonly("weight_bytes", &MoeLayer::weight_bytes)
      .def_property_readonly("expert_uses", &MoeLayer::expert_uses)
      .def_property_readonly("kernels",
                             [](MoeLayer& layer) {
                               py::dict d;
                               std::string names;
                               for (const std::string& name : layer.kernels())
                                 names += (names.empty() ? "" : ", ") + name;
                               d["experts"] = names;
                               return d;
                             })
      .def("set_expert_mask",
           [](MoeLayer& layer, A mask) { layer.set_device_mask(reinterpret_cast<const uint8_t*>(mask)); })
      .def("forward", &forward<int, int, A, int, A, int, A, A, int, int>, py::arg("tokens"), py::arg("top_k"),
           py::arg("hidden_ptr"), py::arg("hidden_dtype"), py::arg("ids_ptr"), py::arg("ids_dtype"),
           py::arg("weights_ptr"), py::arg("output_ptr"), py::arg("output_dtype"), py::arg("accumulate") = 0)
      .def("forward_reference", &forward_reference<int, int, A, int, A, int, A, A, int, int>, py::arg("tokens"),
           py::arg("top_k"), py::arg("hidden_ptr"), py::arg("hidden_dtype"), py::arg("ids_ptr"), py::arg("ids_dtype"),
           py::arg("weights_ptr"), py::arg("output_ptr"), py::arg("output_dtype"), py::arg("accumulate") = 0)
      .def("submit", &submit<int, int, A, int, A, int, A, A, int, int>, py::arg("tokens"), py::arg("top_k"),
           py::arg("hidden_ptr"), py::arg("hidden_dtype"), py::arg("ids_ptr"), py::arg("ids_dtype"),
           py::arg("weights_ptr"), py::arg("output_ptr"), py::arg("output_dtype"), py::arg("accumulate") = 0)
      .def("submit_on_stream", &submit_on_stream<int, int, A, int, A, int, A, A, int, int>, py::arg("stream"),
           py::arg("tokens"), py::arg("top_k"), py::arg("hidden_ptr"), py::arg("hidden_dtype"), py::arg("ids_ptr"),
           py::arg("ids_dtype"), py::arg("weights_ptr"), py::arg("output_ptr"), py::arg("output_dtype"),
           py::arg("accumulate") = 0, py::arg("keep_alive") = py::none(), py::arg("deferred_ids_ptr") = 0,
           py::arg("deferred_output_ptr") = 0);
}

}  // namespace

PYBIND11_MODULE(kt_kernel_ext, m) {
  m.doc() = "MoE expert kernels of kt_kernel";
  m.def("cpu_features", &features);
  m.def("cpu_variants", &variants);
  m.def("dispatch_table", &dispatch);
  m.def("topology", &topology);
  m.def("allow_only_cpus", &kt::allow_only_cpus, py::arg("cpus"));
  m.def("measure_limits", &limits, py::arg("engine"), py::arg("bytes") = size_t{1} << 30, py::arg("repeats") = 5);
  m.def("device_signals", &device_signals);
  m.def("device_runtime_present", &kt::device_runtime_present);
  m.def("capture_id", &kt::capture_id, py::arg("stream"));
  m.def("exchange_capture_mode", &kt::exchange_capture_mode, py::arg("mode"));
  m.def(
      "page_lock", [](uintptr_t memory, size_t bytes) { return kt::page_lock(reinterpret_cast<void*>(memory), bytes); },
      py::arg("address"), py::arg("bytes"), py::call_guard<kt::Unlocked>());
  m.def("fault_points", &kt::fault_points);
  m.def("arm_fault", &kt::arm_fault, py::arg("point"), py::arg("nth") = 1);
  m.def("release_finished", &kt::release_now);
  py::class_<kt::MappedReads>(m, "MappedReads")
      .def(py::init<uintptr_t, size_t>(), py::arg("address"), py::arg("bytes"))
      .def_property_readonly("cut_off", &kt::MappedReads::cut_off);
  kt::bind_end();
  m.attr("METHODS") = methods();
  bind_formats(m);
  bind_engine(m);
  bind_layer(m);
  bind_pipeline(m);
  bind_quantise(m);
  bind_gguf(m);
  bind_operators(m);
  bind_training(m);
  bind_adapters(m);
}
