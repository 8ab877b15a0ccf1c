// The arithmetic of one forward call, cut into pieces that the workers take.
//
// Phases, with a barrier after each: hidden states as the kernel multiplies them (unless they already are), SwiGLU
// outputs of every pair, those as the kernel multiplies them (int8: a row's scales need all of it), down.
#pragma once

#include <atomic>
#include <deque>

#include "moe/expert_pieces.h"
#include "moe/grouped_gemm.h"
#include "moe/layer.h"

namespace kt {

class ForwardPass {
 public:
  // `buffers` must outlive the pass; after it they hold what was computed on the way.
  ForwardPass(Engine& engine, PassBuffers& buffers, const KernelSet& kernels, const LayerConfig& config,
              const ExpertWeights& weights, const Routing& routing, const ForwardArgs& args);

  void operator()(const Worker& worker);

 private:
  // Some gate+up panel pairs of an expert.
  struct GateUpPiece {
    const ActiveExpert* expert;
    int first_pair;
    int pairs;
    const uint8_t* panels;
  };
  struct SubpoolPlan {
    template <class PiecesOf>
    SubpoolPlan(const std::vector<ActiveExpert>& experts, PiecesOf pieces_of, int strip_count, int strip_panels)
        : pieces(experts, pieces_of), strips(strip_count), panels_per_strip(strip_panels) {}

    ExpertPieces pieces;
    int strips;  // of hidden columns
    int panels_per_strip;
    std::atomic<int> next_strip{0};
  };

  void plan_rows();
  void plan_pieces();
  void reserve_scratch();
  void prepare_hidden(const Worker& worker);
  void gate_up(const Worker& worker);
  GateUpPiece gate_up_piece(int subpool, const ActiveExpert& expert, int index) const;
  void multiply_gate_up(const Worker& worker, const GateUpPiece& piece, const uint8_t* next_panels);
  void prepare_intermediate(const Worker& worker);
  void down(const Worker& worker);
  void down_strip(const Worker& worker, int strip);
  void store_strip(const float* sum, size_t sum_stride, int first_column, int columns) const;
  bool prepares() const { return kernels_.prepare_row != nullptr; }
  size_t swiglu_element() const { return kernels_.rows->activation == Activation::kBf16 ? 2 : 4; }
  int pairs_per_piece(const ActiveExpert& expert) const;

  Engine& engine_;
  PassBuffers& buffers_;
  const KernelSet& kernels_;
  const LayerConfig& config_;
  const ExpertWeights& weights_;
  const Routing& routing_;
  const ForwardArgs& args_;
  const GroupedGemm gate_up_gemm_;
  const GroupedGemm down_gemm_;
  bool converts_hidden_ = false;
  RowTable hidden_;           // of every token
  size_t swiglu_stride_ = 0;  // bytes, of buffers_.intermediate
  RowTable intermediate_;     // of every pair, as the kernel multiplies it
  std::deque<SubpoolPlan> subpools_;
};

}  // namespace kt
