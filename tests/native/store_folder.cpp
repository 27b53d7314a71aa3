#include "store_folder.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace {

constexpr int64_t kPage = 4096;

int64_t round_up(int64_t value) { return (value + kPage - 1) / kPage * kPage; }

const char *mode_name(int32_t mode) {
  const char *names[] = {"sym", "asym", "bf16", "fp16", "nf4"};
  return names[mode];
}

Expert make_expert(check::Random &random, int64_t hidden, int64_t width, em_format gate_up,
                   em_format down) {
  Expert expert = {make_matrix(random, width, hidden, gate_up),
                   make_matrix(random, width, hidden, gate_up),
                   make_matrix(random, hidden, width, down),
                   {}};
  const int64_t tile = static_cast<int64_t>(expert.gate.packed.size()) / (width / 16);
  for (int64_t t = 0; t < width / 16; ++t) {  // gate tile t, then up tile t
    for (const Matrix *matrix : {&expert.gate, &expert.up}) {
      const auto begin = matrix->packed.begin() + t * tile;
      expert.record.insert(expert.record.end(), begin, begin + tile);
    }
  }
  expert.record.resize(static_cast<size_t>(round_up(static_cast<int64_t>(expert.record.size()))));
  expert.record.insert(expert.record.end(), expert.down.packed.begin(), expert.down.packed.end());
  expert.record.resize(static_cast<size_t>(round_up(static_cast<int64_t>(expert.record.size()))));
  return expert;
}

}  // namespace

std::string StoreFolder::index_text() const {
  std::string text = "{\"format\": \"edgemoe\", \"format_version\": 1, \"hidden\": ";
  text += std::to_string(hidden) + ", \"specs\": [";
  for (size_t i = 0; i < formats.size(); ++i) {
    text += std::string(i ? ", " : "") + "{\"bits\": " + std::to_string(formats[i].bits) +
            ", \"group_size\": " + std::to_string(formats[i].group_size) + ", \"mode\": \"" +
            mode_name(formats[i].mode) + "\"}";
  }
  text += "], \"layers\": {";
  for (size_t l = 0; l < layers.size(); ++l) {
    text += std::string(l ? ", " : "") + "\"" + std::to_string(layers[l]) +
            "\": {\"width\": " + std::to_string(width) + ", \"experts\": [";
    for (int64_t e = 0; e < num_experts; ++e) {
      const em_record &record = records[l * num_experts + e];
      const size_t num = formats.size();
      text += std::string(e ? ", [" : "[") + std::to_string(e % num) + ", " +
              std::to_string((e + 1) % num) + ", " + std::to_string(record.crc_gate_up) + ", " +
              std::to_string(record.crc_down) + "]";
    }
    text += "]}";
  }
  return text + "}, \"packed_trunk\": {}, \"sha256\": {}, \"plan\": {\"bits\": [4, 0.5e1, null]}}";
}

int64_t StoreFolder::max_record_bytes() const {
  int64_t most = 0;
  for (const em_record &record : records) most = std::max(most, record.num_bytes);
  return most;
}

std::string StoreFolder::experts_bytes() const {
  std::string header = "{\"__metadata__\": {\"made\": \"here\"}";
  int64_t offset = 0;
  for (size_t key = 0; key < records.size(); ++key) {
    const int64_t end = offset + records[key].num_bytes;
    header += ",\"layers." + std::to_string(layers[key / num_experts]) + ".experts." +
              std::to_string(key % num_experts) + "\":{\"dtype\":\"U8\",\"shape\":[" +
              std::to_string(end - offset) + "],\"data_offsets\":[" + std::to_string(offset) +
              "," + std::to_string(end) + "]}";
    offset = end;
  }
  header += "}";
  header.resize(static_cast<size_t>(round_up(static_cast<int64_t>(header.size()) + 8) - 8), ' ');
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> 8 * i & 0xff);
  bytes += header;
  for (const Expert &expert : experts) bytes.append(expert.record.begin(), expert.record.end());
  return bytes;
}

StoreFolder make_store(const std::string &name, int64_t hidden, int64_t width,
                       std::vector<int64_t> layers, int64_t num_experts,
                       std::vector<em_format> formats) {
  StoreFolder store = {check::folder() + "/" + name, hidden, width, layers, num_experts, formats,
                       {}, {}};
  check::Random random(hidden * 31 + width);
  for (size_t key = 0; key < layers.size() * num_experts; ++key) {
    const int64_t e = static_cast<int64_t>(key) % num_experts;
    store.experts.push_back(make_expert(random, hidden, width, store.gate_up(e), store.down(e)));
    const std::vector<uint8_t> &bytes = store.experts.back().record;
    em_record record = {};
    record.num_bytes = static_cast<int64_t>(bytes.size());
    record.gate_up = store.gate_up(e);
    record.down = store.down(e);
    record.down_offset = round_up(2 * em_matrix_bytes(width, hidden, record.gate_up));
    record.crc_gate_up = em_crc32c(0, bytes.data(), record.down_offset);
    record.crc_down =
        em_crc32c(0, bytes.data() + record.down_offset, record.num_bytes - record.down_offset);
    store.records.push_back(record);
  }
  const std::string bytes = store.experts_bytes();
  int64_t offset = static_cast<int64_t>(bytes.size());
  for (size_t key = store.records.size(); key-- > 0;) {
    store.records[key].offset = offset -= store.records[key].num_bytes;
  }
  std::filesystem::create_directories(store.path);
  write_file(store.experts_path(), bytes);
  write_file(store.path + "/store.json", store.index_text());
  return store;
}

void write_file(const std::string &path, const std::string &bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.good());
}

Slots::Slots(int64_t num, int64_t slot_bytes)
    : slot_bytes_(slot_bytes), num_bytes_(num * slot_bytes), memory_(em_arena_create(num_bytes_)) {
  CHECK(memory_ != nullptr);
}
