// The pieces of all active experts as one sequence that workers take from, in ascending order of experts.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "moe/routing.h"

namespace kt {

class ExpertPieces {
 public:
  // pieces_of(expert) says how many an active expert has.
  template <class PiecesOf>
  ExpertPieces(const std::vector<ActiveExpert>& experts, PiecesOf pieces_of) : experts_(experts) {
    int pieces = 0;
    for (const ActiveExpert& expert : experts) {
      first_piece_.push_back(pieces);
      pieces += pieces_of(expert);
    }
    first_piece_.push_back(pieces);
  }

  // Takes pieces until there are none: work(piece, next) with what piece_at(expert, index) made of two pieces, the
  // taken one and the one that this worker, one of `threads`, will likely take afterwards.
  template <class PieceAt, class Work>
  void take(int threads, PieceAt piece_at, Work work) {
    const int total = first_piece_.back();
    // Pieces are taken in ascending order, so the expert is found by walking on.
    const auto walk = [&](size_t& expert, int piece) {
      while (first_piece_[expert + 1] <= piece) ++expert;
      return piece_at(experts_[expert], piece - first_piece_[expert]);
    };
    size_t expert = 0;
    size_t next_expert = 0;
    while (true) {
      const int piece = next_.fetch_add(1, std::memory_order_relaxed);
      if (piece >= total) return;
      const auto taken = walk(expert, piece);
      work(taken, walk(next_expert, std::min(piece + threads, total - 1)));  // the others take one each meanwhile
    }
  }

 private:
  const std::vector<ActiveExpert>& experts_;
  std::vector<int> first_piece_;  // per active expert, and the total
  std::atomic<int> next_{0};
};

}  // namespace kt
