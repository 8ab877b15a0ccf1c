// The arithmetic of one forward call, cut into pieces that the workers take.
//
// Phases, each of which needs all of the one before: hidden states as kernels multiply them (unless they already are),
// SwiGLU outputs of every pair, those as the kernel multiplies them (int8: a row's scales need all of it), down.
#pragma once

#include <vector>

#include "moe/expert_pieces.h"
#include "moe/grouped_gemm.h"
#include "moe/layer.h"
#include "moe/pass_additions.h"

namespace kt {

class ForwardPass {
 public:
  // `buffers` must outlive the pass; after it they hold what was computed on the way. `kernels` are those of the
  // weights, or others that read the same panels; `additions` may be null.
  ForwardPass(Engine& engine, PassBuffers& buffers, const LayerConfig& config, const ExpertWeights& weights,
              const PerProjection<const KernelSet*>& kernels, const Routing& routing, const ForwardArgs& args,
              PassAdditions* additions);

  // On the caller and the engine's workers, until all is computed.
  void run();

 private:
  // A matrix of the experts, and the rows it is multiplied by.
  struct Operand {
    Operand(const ExpertWeights& weights, const KernelSet& set, Projection which)
        : kernels(set), layout(weights.layout(which)), gemm(kernels, layout) {}
    bool prepares() const { return kernels.prepare_row != nullptr; }
    size_t element() const { return kernels.rows->activation == Activation::kBf16 ? 2 : 4; }

    const KernelSet& kernels;
    const PanelLayout& layout;
    GroupedGemm gemm;
    RowTable rows;
  };
  // Some gate+up panel pairs of an expert, of a sub-pool's share of the panels.
  struct GateUpPiece {
    int subpool;
    const ActiveExpert* expert;
    int first_pair;
    int pairs;
  };
  struct SubpoolPlan {
    ExpertPieces gate_up;
    int panels_per_strip;
  };

  void plan_hidden(Operand& operand, Buffer& buffer);
  void plan_intermediate();
  void plan_pieces();
  void reserve_scratch();
  void reserve_scratch(WorkerScratch& scratch, int panels_per_strip, int node);
  void prepare_hidden(const Worker& worker, const Operand& operand, const Buffer& buffer, int token);
  void gate_up(const Worker& worker, int subpool, int piece);
  GateUpPiece gate_up_piece(int subpool, int piece) const;
  void multiply_paired(const Worker& worker, const GateUpPiece& piece, const GateUpPiece& next);
  void multiply_apart(const Worker& worker, const GateUpPiece& piece, const GateUpPiece& next);
  const float* bias_of(const GateUpPiece& piece, Projection which) const;
  void swiglu(const GateUpPiece& piece, const ProductPanels& gate, const ProductPanels& up, int first_row) const;
  void prepare_intermediate(int pair);
  void down(const Worker& worker, int subpool, int strip);
  void store_strip(const float* sum, size_t sum_stride, int first_column, int columns) const;
  bool converts_hidden() const { return gate_.rows.data != args_.hidden || up_.rows.data != args_.hidden; }
  int pairs_per_piece(const ActiveExpert& expert) const;

  Engine& engine_;
  PassBuffers& buffers_;
  const LayerConfig& config_;
  const ExpertWeights& weights_;
  const Routing& routing_;
  const ForwardArgs& args_;
  PassAdditions* additions_;
  Operand gate_;              // its rows are tokens
  Operand up_;                // the same
  Operand down_;              // its rows are pairs
  size_t swiglu_stride_ = 0;  // bytes, of buffers_.intermediate
  std::vector<SubpoolPlan> subpools_;
  std::vector<int> gate_up_pieces_;  // of each sub-pool
  std::vector<int> down_strips_;     // of hidden columns, the same
};

}  // namespace kt
