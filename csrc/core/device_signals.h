// How the CPU and a device stream tell each other that work may begin and that it is done, in a captured graph:
//
//   memory operations   the stream writes a word of page-locked memory and waits for another one to reach a value. The
//                       device does both by itself; a thread of the CPU must look at the word (core/mailbox.h).
//   host functions      the stream calls back into the process, on a thread of the runtime, and waits for the return
//
// Memory operations take a fraction of the time, but a driver may lack them, refuse to capture them, or (virtual
// machines) accept them and do nothing. So the first question for a device tries them: on a stream of its own, once
// enqueued and twice replayed from a graph, with a time limit. Whatever fails leaves the device with host functions.
// None of this has run on a GPU yet.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace kt {

enum class SignalKind { kHostFunctions, kMemoryOperations };

struct DeviceSignals {
  SignalKind kind;
  std::string reason;  // for users: why this kind
};

// For the thread's current device; may be asked while a stream captures. Throws std::runtime_error without a device
// runtime, std::invalid_argument for an unknown value of the variable KT_KERNEL_DEVICE_SIGNALS.
const DeviceSignals& device_signals();

// A word that the device writes and one that it waits for, on cache lines of their own.
struct SignalWords {
  alignas(64) std::atomic<uint32_t> request{0};
  alignas(64) std::atomic<uint32_t> done{0};
};

// Page-locked words, both 0. Those given back are used again but never freed: freeing may wait for the device. Give
// words back only when no stream has an operation on them before it.
SignalWords* acquire_signal_words();
void release_signal_words(SignalWords* words);

// Enqueue: the word takes the value after all that the stream did before is visible to the CPU; what follows in the
// stream waits until the word has reached the value. Throw std::runtime_error.
void enqueue_write(void* stream, std::atomic<uint32_t>& word, uint32_t value);
void enqueue_wait(void* stream, std::atomic<uint32_t>& word, uint32_t value);

}  // namespace kt
