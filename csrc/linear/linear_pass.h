// The computation of one call of a linear layer: the tokens as each part's kernels read them, then pieces of panels.
#pragma once

#include <deque>

#include "linear/linear.h"

namespace kt {

class Linear::Pass {
 public:
  Pass(const Linear& linear, const MatrixView& x, const MatrixView& out, const float* bias, int first_row);

  void run();

 private:
  // The tokens as the kernels of some parts multiply them.
  struct Operand {
    Operand(const Part& part) : kernels(*part.served.kernels), layout(part.layout), gemm(kernels, layout) {}
    // Whether these rows serve that part, too.
    bool serves(const Part& part) const;
    bool prepares() const { return kernels.prepare_row != nullptr; }

    const KernelSet& kernels;
    const PanelLayout& layout;
    GroupedGemm gemm;
    RowTable rows;
    uint8_t* converted = nullptr;  // null: the tokens serve as they are
  };
  // A part, its operand, and the panels of each sub-pool's share that this pass multiplies.
  struct Work {
    const Part* part;
    const Operand* operand;
    GroupedGemm gemm;
    std::vector<PanelRange> panels;
    int panels_per_piece;
  };

  const Operand& operand_for(const Part& part);
  void plan(const Part& part);
  void reserve(const Work& work);
  void convert(const Worker& worker, const Operand& operand, int first, int last);
  void multiply(const Worker& worker, int subpool, int piece);
  void store(const Work& work, int first_panel, int panels, const float* product, size_t stride, int first_token,
             int tokens) const;

  const Linear& linear_;
  Engine& engine_;
  const MatrixView& x_;
  const MatrixView& out_;
  const float* bias_;
  int first_row_;
  std::deque<Operand> operands_;
  std::vector<Work> work_;
};

}  // namespace kt
