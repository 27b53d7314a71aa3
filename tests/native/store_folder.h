// A tiny store on disk, made by the test itself, with the float64 weights of its experts.
#pragma once
#include <string>
#include <vector>

#include "matrices.h"

struct Expert {
  Matrix gate, up, down;
  std::vector<uint8_t> record;
};

struct StoreFolder {
  std::string path;
  int64_t hidden, width;
  std::vector<int64_t> layers;         // numbers of the layers, ascending
  int64_t num_experts;                 // in each of them
  std::vector<em_format> formats;      // of expert e: gate|up [e % n], down [(e + 1) % n]
  std::vector<Expert> experts;         // by key
  std::vector<em_record> records;      // by key

  std::string experts_path() const { return path + "/experts.safetensors"; }
  std::string index_text() const;       // store.json
  std::string experts_bytes() const;    // experts.safetensors
  int64_t max_record_bytes() const;
  em_format gate_up(int64_t expert) const { return formats[expert % formats.size()]; }
  em_format down(int64_t expert) const { return formats[(expert + 1) % formats.size()]; }
};

// Writes the two files into folder()/name.
StoreFolder make_store(const std::string &name, int64_t hidden, int64_t width,
                       std::vector<int64_t> layers, int64_t num_experts,
                       std::vector<em_format> formats);
void write_file(const std::string &path, const std::string &bytes);

// Pages for records, aligned as reads want it.
class Slots {
 public:
  Slots(int64_t num, int64_t slot_bytes);
  ~Slots() { em_arena_destroy(memory_, num_bytes_); }
  Slots(const Slots &) = delete;
  uint8_t *at(int64_t i) const { return static_cast<uint8_t *>(memory_) + i * slot_bytes_; }

 private:
  int64_t slot_bytes_, num_bytes_;
  void *memory_;
};
