#include "core/mapped_reads.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

namespace kt {
namespace {

constexpr int kSlots = 4096;  // files; the largest published checkpoints have some 200

// Read by the handler, in whichever thread was hit, so without locks. An end of 0 is a free slot.
struct Slot {
  std::atomic<uintptr_t> begin{0};
  std::atomic<uintptr_t> end{0};
  std::atomic<bool> cut_off{false};
};

Slot slots[kSlots];
std::mutex changing;  // which slots are taken, and the handler
struct sigaction others_handler;
uintptr_t page_bytes = 4096;

Slot* slot_around(uintptr_t address) {
  for (Slot& slot : slots) {
    if (address < slot.end.load(std::memory_order_acquire) && address >= slot.begin.load(std::memory_order_relaxed)) {
      return &slot;
    }
  }
  return nullptr;
}

// What the signal would have done without us; by default the process ends when the read is tried again.
void pass_on(int number, siginfo_t* info, void* context) {
  if ((others_handler.sa_flags & SA_SIGINFO) != 0) return others_handler.sa_sigaction(number, info, context);
  if (others_handler.sa_handler != SIG_DFL && others_handler.sa_handler != SIG_IGN) {
    return others_handler.sa_handler(number);
  }
  signal(number, SIG_DFL);
}

// A page of zeros in place of the missing one; the thread then reads it.
void on_missing_page(int number, siginfo_t* info, void* context) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  Slot* const slot = slot_around(address);
  void* const page = reinterpret_cast<void*>(address & ~(page_bytes - 1));
  if (slot == nullptr || mmap(page, page_bytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != page) {
    return pass_on(number, info, context);
  }
  slot->cut_off.store(true, std::memory_order_release);
}

// Others may have put theirs in its place since the last time (Python's faulthandler).
void install_handler() {
  struct sigaction now;
  if (sigaction(SIGBUS, nullptr, &now) != 0) return;
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == &on_missing_page) return;
  page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  others_handler = now;
  struct sigaction ours = {};
  ours.sa_sigaction = &on_missing_page;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
}

}  // namespace

MappedReads::MappedReads(uintptr_t begin, size_t bytes) : slot_(0) {
  const std::lock_guard<std::mutex> lock(changing);
  while (slot_ < kSlots && slots[slot_].end.load(std::memory_order_relaxed) != 0) ++slot_;
  if (slot_ == kSlots) {
    throw std::runtime_error("more than " + std::to_string(kSlots) + " mapped files are being read at once");
  }
  slots[slot_].cut_off.store(false, std::memory_order_relaxed);
  slots[slot_].begin.store(begin, std::memory_order_relaxed);
  slots[slot_].end.store(begin + bytes, std::memory_order_release);
  install_handler();
}

MappedReads::~MappedReads() {
  const std::lock_guard<std::mutex> lock(changing);
  slots[slot_].end.store(0, std::memory_order_release);
}

bool MappedReads::cut_off() const { return slots[slot_].cut_off.load(std::memory_order_acquire); }

}  // namespace kt
