// The arithmetic of one forward call, cut into pieces that the workers take.
#pragma once

#include <atomic>
#include <vector>

#include "moe/layer.h"

namespace kt {

class ForwardPass {
 public:
  ForwardPass(Engine& engine, const KernelSet& kernels, const LayerConfig& config, const ExpertWeights& weights,
              const Routing& routing, const ForwardArgs& args);

  void operator()(const Worker& worker);

 private:
  // A GEMM of one expert: which rows, which panels, where in K.
  struct Operand {
    const PanelLayout& layout;
    const uint8_t* panels;
    int panel_count;
    const uint8_t* next_panels;  // GemmArgs::next_panels
  };
  struct Rows {
    const uint8_t* data;  // activation rows; row i of an expert is row index[i] (or first + i without an index)
    size_t stride;        // elements
    const int32_t* index;
    int first;
    int count;
  };
  // Some gate+up panel pairs of an expert.
  struct GateUpPiece {
    const ActiveExpert* expert;
    int first_pair;
    int pairs;
    const uint8_t* panels;
  };
  struct SubpoolPlan {
    std::vector<int> first_piece;  // per active expert, and the total
    int strips = 0;                // of hidden columns
    int panels_per_strip = 1;
    std::atomic<int> next_expert_piece{0};
    std::atomic<int> next_strip{0};
  };

  // How much of an expert's rows and of K one gemm call takes.
  struct Block {
    int rows;
    int k;
  };

  void plan(Engine& engine);
  void reserve_scratch(Engine& engine);
  Block block_of(int rows, int k) const;
  void convert_hidden(const Worker& worker);
  void gate_up(const Worker& worker);
  GateUpPiece gate_up_piece(int subpool, const ActiveExpert& expert, int index) const;
  void multiply_gate_up(const Worker& worker, const GateUpPiece& piece, const uint8_t* next_panels);
  void down(const Worker& worker);
  void down_strip(const Worker& worker, int strip);
  template <class Epilogue>
  void multiply(WorkerScratch& scratch, const Operand& w, const Rows& rows, Epilogue epilogue);
  const uint8_t* gathered(WorkerScratch& scratch, const Rows& rows, int first_row, int row_count, int first_k,
                          int k_count, size_t* stride) const;
  void store_strip(const float* sum, size_t sum_stride, int first_column, int columns) const;
  size_t element_bytes() const { return kernels_.rows->activation == Activation::kBf16 ? 2 : 4; }
  int pairs_per_piece(const ActiveExpert& expert) const;

  Engine& engine_;
  const KernelSet& kernels_;
  const LayerConfig& config_;
  const ExpertWeights& weights_;
  const Routing& routing_;
  const ForwardArgs& args_;
  const uint8_t* hidden_rows_ = nullptr;
  size_t hidden_stride_ = 0;  // elements
  uint8_t* intermediate_ = nullptr;
  size_t intermediate_stride_ = 0;
  bool converts_hidden_ = false;
  std::vector<SubpoolPlan> subpools_;
};

}  // namespace kt
