#include "read_queue.h"

#include <algorithm>
#include <tuple>

namespace em {

// Down sections of demanded records follow the gate|up sections of so many records after their own:
// the last bytes to arrive then have the least compute behind them, and yet whole records are
// finished all along the list.
constexpr uint64_t kDownLag = 2;

bool ReadQueue::Task::operator<(const Task &other) const {
  return std::tie(priority, order, section, key) <
         std::tie(other.priority, other.order, other.section, other.key);
}

void ReadQueue::open(const std::vector<em_record> *records) {
  records_ = records;
  reads_.assign(records->size(), Read());
}

int64_t ReadQueue::section_bytes(int32_t key, int32_t section) const {
  const em_record &record = (*records_)[key];
  return section == kGateUp ? record.down_offset : record.num_bytes - record.down_offset;
}

ReadQueue::Task ReadQueue::task(int32_t key, int32_t section) const {
  const Read &read = reads_[key];
  const bool is_late = section == kDown && read.priority == 0;
  return {read.priority, read.turn + (is_late ? kDownLag : 0), section, key};
}

void ReadQueue::add(int64_t num, const int32_t *keys, void *const *dst, int32_t priority) {
  std::set<Task> added;
  for (int64_t i = 0; i < num; ++i) {
    Read &read = reads_[keys[i]];
    read = Read();
    read.dst = static_cast<char *>(dst[i]);
    read.turn = turn_ + static_cast<uint64_t>(i);
    read.priority = priority;
    added.insert(task(keys[i], kGateUp));
    added.insert(task(keys[i], kDown));
  }
  for (int64_t i = 0; i < num; ++i) {
    const int64_t num_bytes = (*records_)[keys[i]].num_bytes;
    backlog_bytes_ += num_bytes;
    if (priority == 0) waiting_bytes_ += num_bytes;
  }
  turn_ += static_cast<uint64_t>(num);
  tasks_.merge(added);  // moves nodes: cannot fail
}

void ReadQueue::promote(int32_t key, int32_t priority) {
  Read &read = reads_[key];
  if (priority >= read.priority) return;
  decltype(tasks_)::node_type nodes[2];
  for (int32_t section : {kGateUp, kDown}) nodes[section] = tasks_.extract(task(key, section));
  read.priority = priority;
  read.turn = turn_++;
  for (int32_t section : {kGateUp, kDown}) {
    if (nodes[section].empty()) continue;
    nodes[section].value() = task(key, section);
    if (priority == 0) waiting_bytes_ += unissued_bytes(key, section);
    tasks_.insert(std::move(nodes[section]));
  }
}

int64_t ReadQueue::unissued_bytes(int32_t key, int32_t section) const {
  return section_bytes(key, section) - reads_[key].issued[section];
}

void ReadQueue::drop(int32_t key) {
  for (int32_t section : {kGateUp, kDown}) {
    if (tasks_.erase(task(key, section)) == 0) continue;
    backlog_bytes_ -= unissued_bytes(key, section);
    if (reads_[key].priority == 0) waiting_bytes_ -= unissued_bytes(key, section);
  }
}

bool ReadQueue::cancel(int32_t key) {
  const size_t before = tasks_.size();
  drop(key);
  if (tasks_.size() == before) return false;
  reads_[key].is_cancelled = true;
  return true;
}

bool ReadQueue::is_lone() const {
  for (const Task &task : tasks_) {
    if (task.priority > 0) break;
    if (task.key != next_key()) return false;
  }
  return true;
}

Request ReadQueue::next(int64_t most) {
  const Task first = *tasks_.begin();
  Read &read = reads_[first.key];
  int64_t &issued = read.issued[first.section];
  const int64_t left = unissued_bytes(first.key, first.section);
  const int64_t num_bytes = std::min(left, first.priority == 0 ? most : guess_bytes_);
  const int64_t begin =
      issued + (first.section == kDown ? (*records_)[first.key].down_offset : 0);
  issued += num_bytes;
  if (first.priority == 0) waiting_bytes_ -= num_bytes;
  ++read.num_in_flight;
  if (num_bytes == left) tasks_.erase(tasks_.begin());
  return {first.key, first.section, first.priority, begin, num_bytes, read.dst + begin};
}

bool ReadQueue::land(const Request &request, int32_t error) {
  Read &read = reads_[request.key];
  if (error < 0) {
    if (read.error == 0) read.error = error;
    drop(request.key);
    return false;
  }
  int64_t &landed = read.landed[request.section];
  landed += request.num_bytes;
  return landed == section_bytes(request.key, request.section);
}

int32_t ReadQueue::settle(const Request &request, int32_t error) {
  Read &read = reads_[request.key];
  --read.num_in_flight;
  backlog_bytes_ -= request.num_bytes;
  if (error < 0) {
    if (read.error == 0) read.error = error;
    drop(request.key);
  } else if (read.landed[request.section] == section_bytes(request.key, request.section)) {
    read.is_done[request.section] = true;
  }
  if (read.num_in_flight > 0) return EM_READING;
  if (read.is_cancelled) return EM_ABSENT;
  if (read.error < 0) return read.error;
  return read.is_done[kGateUp] && read.is_done[kDown] ? EM_READY : EM_READING;
}

}  // namespace em
