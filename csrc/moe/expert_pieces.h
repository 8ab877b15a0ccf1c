// The pieces of all active experts as one sequence, in ascending order of experts.
#pragma once

#include <algorithm>
#include <vector>

#include "moe/routing.h"

namespace kt {

class ExpertPieces {
 public:
  // One of an expert's pieces.
  struct Piece {
    const ActiveExpert* expert;
    int index;
  };

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

  int count() const { return first_piece_.back(); }

  Piece at(int piece) const {
    const auto after = std::upper_bound(first_piece_.begin(), first_piece_.end(), piece);
    const size_t expert = after - first_piece_.begin() - 1;
    return {&experts_[expert], piece - first_piece_[expert]};
  }

 private:
  const std::vector<ActiveExpert>& experts_;
  std::vector<int> first_piece_;  // per active expert, and the total
};

}  // namespace kt
