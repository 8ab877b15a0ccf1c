#include "linear/linear.h"

#include <algorithm>
#include <stdexcept>

#include "linear/linear_batch.h"
#include "linear/linear_pass.h"

namespace kt {
namespace {

int panels_of(int rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace

Linear::Linear(std::shared_ptr<Engine> engine, int k, const std::vector<LinearPart>& parts, Activations activations)
    : engine_(std::move(engine)), k_(k) {
  if (parts.empty()) throw std::invalid_argument("a linear layer has no matrices; expected at least one");
  for (const LinearPart& given : parts) {
    parts_.push_back(part_of(given, activations));
    rows_ += given.rows;
  }
  const auto lock = engine_->exclusive();
  for (size_t i = 0; i < parts.size(); ++i) pack(parts_[i], parts[i]);
}

Linear::Part Linear::part_of(const LinearPart& given, Activations activations) const {
  if (given.rows < 1 || k_ < 1) {
    throw std::invalid_argument("a matrix of a linear layer has " + std::to_string(given.rows) + " rows and " +
                                std::to_string(k_) + " columns; expected at least one of each");
  }
  const Served served = kt::served(Operation::kForward, *given.format, activations);
  Part part{served, given.options, panel_layout(*served.format, {given.rows, k_}, given.options), rows_, given.rows, {},
            {}};
  ThreadPools& pools = engine_->pools();
  for (int s = 0; s < pools.subpools(); ++s) {
    part.panels.push_back(subpool_share(panels_of(given.rows), pools, s));
    part.memory.emplace_back(part.panels[s].count() * part.layout.panel_bytes, pools.node_of(s));
  }
  return part;
}

// Each sub-pool its own share (first touch).
void Linear::pack(const Part& part, const LinearPart& given) const {
  std::vector<int> panels;
  for (const PanelRange& share : part.panels) panels.push_back(share.count());
  engine_->pools().for_each_in_subpools(panels, [&](const Worker&, int s, int index) {
    pack_panel(*part.served.format, part.layout, part.options, given.source, {part.rows, k_},
               part.panels[s].begin + index, part.memory[s].data() + index * part.layout.panel_bytes);
  });
}

size_t Linear::bytes() const {
  size_t total = 0;
  for (const Part& part : parts_) {
    for (const ArenaPiece& memory : part.memory) total += memory.size();
  }
  return total;
}

std::vector<std::string> Linear::kernels() const {
  std::vector<std::string> names;
  for (const Part& part : parts_) {
    const std::string name = part.served.kernels->name;
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

void Linear::forward(const MatrixView& x, const MatrixView& out, const float* bias) const {
  if (out.columns != rows_) {
    throw std::invalid_argument("the output of a linear layer has " + std::to_string(out.columns) +
                                " columns; expected " + std::to_string(rows_));
  }
  multiply(x, out, bias, 0);
}

void Linear::forward_rows(const MatrixView& x, const MatrixView& out, int first_row) const {
  if (first_row < 0 || first_row + out.columns > rows_) {
    throw std::invalid_argument("rows " + std::to_string(first_row) + " to " + std::to_string(first_row + out.columns) +
                                " of a linear layer of " + std::to_string(rows_) + " rows are asked for");
  }
  multiply(x, out, nullptr, first_row);
}

void Linear::multiply(const MatrixView& x, const MatrixView& out, const float* bias, int first_row) const {
  if (x.columns != k_ || x.rows != out.rows) {
    throw std::invalid_argument("a linear layer of " + std::to_string(k_) + " inputs got rows of " +
                                std::to_string(x.columns) + " numbers, " + std::to_string(x.rows) + " of them for " +
                                std::to_string(out.rows) + " rows of output");
  }
  if (x.rows > 0) Pass(*this, x, out, bias, first_row).run();
}

void Linear::forward_batch(const MatrixBatch& x, const MatrixBatch& out) const {
  const int64_t rows = panels_of(static_cast<int>(out.first.columns)) * int64_t{kPanelRows};
  if (x.first.columns != k_ || x.first.rows != out.first.rows || x.count != out.count || rows * out.count != rows_ ||
      parts_.size() != 1) {
    throw std::invalid_argument("a linear layer of " + std::to_string(rows_) + " x " + std::to_string(k_) +
                                " cannot multiply " + std::to_string(x.count) + " matrices of " +
                                std::to_string(x.first.rows) + " x " + std::to_string(x.first.columns) + " into " +
                                std::to_string(out.count) + " of " + std::to_string(out.first.rows) + " x " +
                                std::to_string(out.first.columns));
  }
  if (x.count > 0 && x.first.rows > 0) BatchPass(*this, x, out).run();
}

}  // namespace kt
