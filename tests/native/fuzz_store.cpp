// Fuzz target: any bytes -> a store folder -> open its index, read its records, compute, close.
//
// Input: a byte of switches, a byte that counts pages of data, two bytes that give the length of
// store.json, store.json, and the experts' file: as it stands (kRaw), or its header alone, which
// then is padded, gets its length in front and as many pages of zeros behind it.
//
// With EM_FUZZ_SEEDS=FOLDER in the environment it writes valid inputs there and exits.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "edgemoe_core.h"
#include "store_folder.h"

namespace {

enum : uint8_t {
  kRaw = 1,
  kBuffered = 2,
  kCancel = 4,
  kTruncate = 8,
  kCompute = 16,
  kThreads = 64
};
constexpr int64_t kPage = 4096;
constexpr int64_t kMaxRead = 1 << 20;  // bytes of records that one input makes us read

[[noreturn]] void broken(const char *what) {
  std::fprintf(stderr, "broken promise: %s\n", what);
  std::abort();
}

const std::string &folder() {
  static const std::string name = [] {
    // In memory where the system has such a folder.
    std::string made = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    made += "/edgemoe-fuzz-XXXXXX";
    if (mkdtemp(&made[0]) == nullptr) broken("a temporary folder");
    return made;
  }();
  return name;
}

std::string words_of(uint64_t value, int num) {
  std::string bytes;
  for (int i = 0; i < num; ++i) bytes += static_cast<char>(value >> 8 * i & 0xff);
  return bytes;
}

struct Free {
  void operator()(void *memory) const { std::free(memory); }
};
// Exactly as large as the record, so that a byte read too far is seen.
using Memory = std::unique_ptr<void, Free>;

void compute(const em_index &index, em_store *store, const std::vector<Memory> &memory) {
  const em_layer &layer = index.layers[0];
  if (index.hidden * layer.width > 1 << 16 || layer.num_experts > 8) return;
  std::vector<int32_t> keys, tokens;
  std::vector<const uint8_t *> data;
  std::vector<int64_t> begin = {0};
  for (int64_t e = 0; e < layer.num_experts; ++e) {
    if (e >= static_cast<int64_t>(memory.size())) return;
    keys.push_back(static_cast<int32_t>(e));
    data.push_back(static_cast<const uint8_t *>(memory[e].get()));
    tokens.push_back(0);
    begin.push_back(e + 1);
  }
  const std::vector<float> x(index.hidden, 1.0f), weight(keys.size(), 1.0f);
  std::vector<float> y(index.hidden);
  std::vector<float> workspace(
      em_moe_workspace_floats(1, layer.num_experts, index.hidden, layer.width));
  em_moe_args args = {};
  args.num_tokens = 1;
  args.hidden = index.hidden;
  args.width = layer.width;
  args.num_experts = layer.num_experts;
  args.x = x.data();
  args.y = y.data();
  args.keys = keys.data();
  args.data = data.data();
  args.pair_begin = begin.data();
  args.pair_token = tokens.data();
  args.pair_weight = weight.data();
  args.workspace = workspace.data();
  if (em_moe_run(nullptr, store, nullptr, &args) > 0) broken("a status of em_moe_run");
}

void read_all(const em_index &index, uint8_t switches) {
  int32_t error = 0;
  em_store *store = em_store_open(index.experts_path, index.records, index.num_records, 1,
                                  switches & kBuffered ? 2 : 0,
                                  switches & kThreads ? EM_METHOD_THREADS : EM_METHOD_AUTO, &error);
  if (store == nullptr) broken("an index that opened describes what a store can read");
  std::vector<Memory> memory;
  std::vector<int32_t> keys;
  std::vector<void *> dst;
  int64_t num_bytes = 0;
  for (int32_t key = 0; key < index.num_records; ++key) {
    num_bytes += index.records[key].num_bytes;
    if (num_bytes > kMaxRead) break;
    void *room = nullptr;
    if (posix_memalign(&room, kPage, index.records[key].num_bytes) != 0) break;
    memory.emplace_back(room);
    keys.push_back(key);
    dst.push_back(room);
  }
  const int64_t num = static_cast<int64_t>(keys.size());
  if (em_store_submit(store, num, keys.data(), dst.data(), switches >> 5 & 1) != 0) {
    broken("a record that is free can be submitted");
  }
  if (switches & kCompute && index.num_layers > 0) compute(index, store, memory);
  if (switches & kCancel) em_store_cancel(store, num, keys.data());
  for (const int32_t key : keys) {
    const int32_t status = em_store_wait(store, key);
    if (status == EM_READING || status > EM_READY) broken("a wait ends with a result");
    if (status == EM_ABSENT && !(switches & kCancel)) broken("a read ends with a result");
  }
  em_store_close(store);
}

void write_seeds(const std::string &target) {
  std::filesystem::create_directories(target);
  const std::vector<em_format> formats = {{4, 32, EM_MODE_SYM}, {3, 32, EM_MODE_ASYM},
                                          {16, 0, EM_MODE_FP16}, {4, 32, EM_MODE_NF4}};
  int number = 0;
  for (const bool is_zero : {true, false}) {
    StoreFolder store = make_store("seed", 64, 32, {0, 3}, 2, formats);
    int64_t num_pages = 0;
    for (em_record &record : store.records) {
      num_pages += record.num_bytes / kPage;
      if (!is_zero) continue;
      const std::string zeros(static_cast<size_t>(record.num_bytes), '\0');
      record.crc_gate_up = em_crc32c(0, zeros.data(), record.down_offset);
      record.crc_down = em_crc32c(0, zeros.data(), record.num_bytes - record.down_offset);
    }
    const std::string index = store.index_text(), whole = store.experts_bytes();
    const std::string header = whole.substr(8, whole.find_last_of('}', kPage) - 7);
    for (const int switches : {0, 0 + kBuffered + kCompute, 0 + kCancel, 0 + kTruncate, 0 + kRaw}) {
      write_file(target + "/" + std::to_string(number++),
                 words_of(switches, 1) + words_of(num_pages, 1) + words_of(index.size(), 2) +
                     index + (switches & kRaw ? whole : header));
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
  if (const char *target = std::getenv("EM_FUZZ_SEEDS")) {
    write_seeds(target);
    std::exit(0);
  }
  folder();  // made before, so that it is destroyed after what removes it
  std::atexit([] {
    std::error_code ignored;
    std::filesystem::remove_all(folder(), ignored);
  });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  if (size < 4) return 0;
  const uint8_t switches = bytes[0];
  const size_t length = std::min<size_t>(bytes[2] | bytes[3] << 8, size - 4);
  const std::string input(reinterpret_cast<const char *>(bytes) + 4, size - 4);
  write_file(folder() + "/store.json", input.substr(0, length));
  std::string experts = input.substr(length);
  int64_t num_data = 0;
  if (!(switches & kRaw)) {
    experts.resize((experts.size() + 8 + kPage - 1) / kPage * kPage - 8, ' ');
    experts = words_of(experts.size(), 8) + experts;
    num_data = bytes[1] * kPage;
  }
  const std::string path = folder() + "/experts.safetensors";
  write_file(path, experts);
  if (num_data > 0) std::filesystem::resize_file(path, experts.size() + num_data);

  char error[100];
  const em_index *index = em_index_open(folder().c_str(), error, sizeof error);
  if (index == nullptr) {
    if (std::memchr(error, 0, sizeof error) == nullptr) broken("an error text ends");
    return 0;
  }
  if (switches & kTruncate) {  // after the index has looked
    std::filesystem::resize_file(path, std::filesystem::file_size(path) * 3 / 4);
  }
  if (index->num_records > 0) read_all(*index, switches);
  em_index_close(index);
  return 0;
}
