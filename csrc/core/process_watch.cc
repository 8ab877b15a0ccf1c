#include "core/process_watch.h"

#include <fstream>
#include <sstream>

namespace kt {
namespace {

constexpr int kFieldsFromStateToStart = 19;  // proc(5): state is field 3, the start time field 22

// The start time of a running process, empty if there is none.
std::string start_of(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string line;
  std::getline(file, line);
  // The name in parentheses may hold blanks and parentheses itself.
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return "";
  std::istringstream fields(line.substr(name_end + 1));
  std::string field;
  fields >> field;
  if (field == "Z" || field == "X") return "";
  for (int i = 0; i < kFieldsFromStateToStart; ++i) fields >> field;
  return field;
}

}  // namespace

ProcessWatch::ProcessWatch(int pid) : pid_(pid), started_(start_of(pid)) {}

bool ProcessWatch::ended() const { return started_.empty() || start_of(pid_) != started_; }

}  // namespace kt
