// Objects given up on a thread that must not destroy them: a device runtime's callback thread, where neither the
// runtime nor Python may be called. They wait here until a thread that may calls `release_now`.
#pragma once

#include <memory>

namespace kt {

void release_later(std::shared_ptr<void> object);

// Destroys what was given up so far, and what that gives up in turn.
void release_now();

}  // namespace kt
