// One linear layer on the CPU: out[t] = W x[t] + bias, W [N, K] packed into panels like an expert's matrices.
//
// W may consist of several matrices one below the other (q, k and v of a fused layer), each in a format of its own. Of
// each, every NUMA sub-pool holds a share of the panels and its threads multiply them. A token's result depends on that
// token alone (kernels/kernel_set.h), whatever the number of tokens and threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "kernels/dispatch.h"
#include "moe/engine.h"
#include "moe/grouped_gemm.h"
#include "moe/weights.h"
#include "operators/tensor.h"

namespace kt {

// Rows of W in one format, in checkpoint layout.
struct LinearPart {
  const Format* format;
  FormatOptions options;
  int rows;
  MatrixSource source;
};

// Matrices of the same shape at equal distances.
struct MatrixBatch {
  MatrixView first;
  int count;
  int64_t step_bytes;
  MatrixView at(int i) const {
    return {first.data + i * step_bytes, first.type, first.rows, first.columns, first.row_bytes};
  }
};

class Linear {
 public:
  // Packs on all threads. Throws std::invalid_argument for shapes and formats that cannot be.
  Linear(std::shared_ptr<Engine> engine, int k, const std::vector<LinearPart>& parts, Activations activations);

  int rows() const { return rows_; }
  int k() const { return k_; }
  size_t bytes() const;
  // Of the kernels in use, each once.
  std::vector<std::string> kernels() const;

  // x [tokens, K] bf16, fp16 or fp32 (rounded as the kernels of experts do; exact with an fp32 matrix),
  // out [tokens, N] of any of these, bias fp32 [N] or null. The caller holds the engine.
  void forward(const MatrixView& x, const MatrixView& out, const float* bias) const;
  // Rows [first_row, +out.columns) of W alone. `first_row` is a multiple of 32 within the first part.
  void forward_rows(const MatrixView& x, const MatrixView& out, int first_row) const;
  // W as a batch of matrices [N, K], each beginning at a panel: N rows of every ceil(N / 32) * 32. out[b] = x[b] W_b^T,
  // all of them at once, N = out.first.columns. Of the first part.
  void forward_batch(const MatrixBatch& x, const MatrixBatch& out) const;

  // An address of this layer's own.
  uint8_t* first_panel() const { return parts_[0].memory[0].data(); }
  Engine& engine() const { return *engine_; }

 private:
  struct Part {
    Served served;
    FormatOptions options;
    PanelLayout layout;
    int first_row;  // in W
    int rows;
    std::vector<PanelRange> panels;  // of each sub-pool
    std::vector<ArenaPiece> memory;
  };
  // A pass multiplies rows [first_row, +out.columns) of W.
  class Pass;
  class BatchPass;

  Part part_of(const LinearPart& given, Activations activations) const;
  void pack(const Part& part, const LinearPart& given) const;
  void multiply(const MatrixView& x, const MatrixView& out, const float* bias, int first_row) const;

  std::shared_ptr<Engine> engine_;
  int k_;
  int rows_ = 0;
  std::vector<Part> parts_;
};

}  // namespace kt
