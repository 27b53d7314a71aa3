// The index of a store for programs that are not Python: what runtime/index.py reads and checks.
// Every number of the two files is doubted: nothing is allocated, multiplied or believed before it
// was compared with the size of the file that it speaks of.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "edgemoe_core.h"
#include "index_document.h"
#include "json.h"
#include "kernels.h"
#include "platform.h"
#include "record_shape.h"

namespace em {
namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kMaxText = 100'000'000;  // bytes; the limit of safetensors for a header
constexpr int64_t kMaxSide = 1 << 24;      // of hidden and width: keeps a record below 2^51 bytes

int64_t round_up(int64_t value) { return (value + kPage - 1) / kPage * kPage; }

}  // namespace

// What em_index_open makes.
struct Index : em_index {
  std::vector<em_layer> own_layers;
  std::vector<em_record> own_records;
  std::vector<int32_t> own_bodies;
  std::string path;
};

namespace {

class Opener {
 public:
  Opener(char *error, int64_t error_bytes) : error_(error), error_bytes_(error_bytes) {}

  std::unique_ptr<Index> open(const char *folder) {
    std::unique_ptr<Index> index(new Index());
    const std::string base = folder;
    const std::string store = base + "/store.json";
    index->path = base + "/experts.safetensors";
    Document document;
    std::string text;
    int64_t file_bytes = 0;
    if (!open_file(store, &file_bytes) || !read(store, 0, file_bytes, &text) ||
        !parse(store, text, &document) || !make_records(store, document, index.get()) ||
        !check_experts(index.get())) {
      return nullptr;
    }
    index->hidden = document.hidden;
    index->experts_path = index->path.c_str();
    return index;
  }

  bool fail(const char *format, ...)
#if defined(__GNUC__)
      __attribute__((format(printf, 2, 3)))
#endif
  {
    if (error_ == nullptr || error_bytes_ < 1) return false;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_, static_cast<size_t>(error_bytes_), format, arguments);
    va_end(arguments);
    return false;
  }

 private:
  bool open_file(const std::string &path, int64_t *num_bytes) {
    std::error_code error;
    const auto name = std::filesystem::u8path(path);
    if (!std::filesystem::is_regular_file(name, error)) {
      return fail("`%s` is not there", path.c_str());
    }
    const auto size = std::filesystem::file_size(name, error);
    if (error || size > static_cast<uintmax_t>(INT64_MAX) || file_.open(path.c_str(), false) != 0) {
      return fail("`%s` cannot be read", path.c_str());
    }
    *num_bytes = static_cast<int64_t>(size);
    return true;
  }

  bool read(const std::string &path, int64_t offset, int64_t num_bytes, std::string *text) {
    if (num_bytes > kMaxText) return fail("`%s` is too long for a header", path.c_str());
    text->resize(static_cast<size_t>(num_bytes));
    for (int64_t done = 0; done < num_bytes;) {
      const int64_t got = file_.read_at(&(*text)[done], num_bytes - done, offset + done);
      if (got <= 0) return fail("`%s` cannot be read", path.c_str());
      done += got;
    }
    return true;
  }

  bool parse(const std::string &path, const std::string &text, Document *document) {
    const std::string wrong = read_document(text, document);
    return wrong.empty() || fail("`%s` %s", path.c_str(), wrong.c_str());
  }
  bool make_records(const std::string &path, const Document &document, Index *index);
  bool check_experts(Index *index);

  File file_;
  char *error_;
  int64_t error_bytes_;
};

// Whether the aliases of a layer name all of its experts and no others.
bool are_bodies(const int32_t *aliases, const DocumentLayer &layer) {
  std::vector<bool> is_named(static_cast<size_t>(layer.num_rows));
  for (int64_t row = 0; row < layer.num_aliases; ++row) {
    if (aliases[row] >= layer.num_rows) return false;
    if (aliases[row] >= 0) is_named[aliases[row]] = true;
  }
  return std::find(is_named.begin(), is_named.end(), false) == is_named.end();
}

// Records in (layer, expert) order; offsets count from the start of the data.
bool Opener::make_records(const std::string &path, const Document &document, Index *index) {
  const auto is_side = [](int64_t side) {
    return side > 0 && side <= kMaxSide && side % kTileRows == 0;
  };
  const int64_t num_specs = static_cast<int64_t>(document.specs.size());
  const int64_t hidden = document.hidden;
  int64_t offset = 0;
  index->own_bodies = document.aliases;
  for (size_t i = 0; i < document.layers.size(); ++i) {
    const DocumentLayer &layer = document.layers[i];
    const bool is_repeated = i > 0 && document.layers[i - 1].layer == layer.layer;
    if (is_repeated || !is_side(hidden) || !is_side(layer.width)) {
      return fail("`%s` is malformed: layer %lld", path.c_str(),
                  static_cast<long long>(layer.layer));
    }
    const int32_t *aliases = index->own_bodies.data() + layer.first_alias;
    if (layer.num_aliases > 0 && !are_bodies(aliases, layer)) {
      return fail("`%s` is malformed: layer %lld: `aliases` do not name its experts", path.c_str(),
                  static_cast<long long>(layer.layer));
    }
    if (layer.num_rows == 0) continue;
    const bool has_aliases = layer.num_aliases > 0;
    index->own_layers.push_back({layer.layer, layer.num_rows, layer.width,
                                 static_cast<int64_t>(index->own_records.size()),
                                 has_aliases ? layer.num_aliases : layer.num_rows,
                                 has_aliases ? aliases : nullptr});
    for (int64_t expert = 0; expert < layer.num_rows; ++expert) {
      const DocumentRow &row = document.rows[layer.first_row + expert];
      const auto is_spec = [&](int64_t spec) { return spec >= 0 && spec < num_specs; };
      const auto is_crc = [](int64_t crc) { return crc >= 0 && crc <= UINT32_MAX; };
      bool is_valid = is_spec(row.gate_up) && is_spec(row.down) && is_crc(row.crc_gate_up) &&
                      is_crc(row.crc_down) && index->own_records.size() < INT32_MAX;
      em_record record = {};
      if (is_valid) {
        record.gate_up = document.specs[row.gate_up];
        record.down = document.specs[row.down];
        record.crc_gate_up = static_cast<uint32_t>(row.crc_gate_up);
        record.crc_down = static_cast<uint32_t>(row.crc_down);
        if (row.rank > 0) {
          is_valid = is_spec(row.factors) && row.dense >= 0 && row.dense <= kMaxSide &&
                     row.rank <= kMaxSide;
          if (is_valid) record.factors = document.specs[row.factors];
          record.dense = is_valid ? static_cast<int32_t>(row.dense) : 0;
          record.rank = is_valid ? static_cast<int32_t>(row.rank) : 0;
        }
        const RecordShape shape(record, hidden, layer.width);
        record.offset = offset;
        record.down_offset = round_up(shape.front_bytes());
        record.num_bytes = record.down_offset + round_up(shape.down_bytes);
        is_valid = is_valid && shape.is_valid && record.num_bytes <= INT64_MAX / 2 - offset;
      }
      if (!is_valid) {
        return fail("`%s` is malformed: layer %lld, expert %lld", path.c_str(),
                    static_cast<long long>(layer.layer), static_cast<long long>(expert));
      }
      offset += record.num_bytes;
      index->max_record_bytes = std::max(index->max_record_bytes, record.num_bytes);
      index->own_records.push_back(record);
    }
  }
  index->num_layers = static_cast<int64_t>(index->own_layers.size());
  index->num_records = static_cast<int64_t>(index->own_records.size());
  index->layers = index->own_layers.data();
  index->records = index->own_records.data();
  return true;
}

// The key of `layers.{layer}.experts.{expert}`, or -1.
int64_t key_of_name(const em_index &index, std::string_view name) {
  constexpr std::string_view kLayers = "layers.", kExperts = ".experts.";
  const size_t middle = name.find(kExperts);
  int64_t layer = 0, expert = 0;
  if (name.substr(0, kLayers.size()) != kLayers || middle == std::string_view::npos ||
      middle < kLayers.size() ||
      !parse_integer(name.substr(kLayers.size(), middle - kLayers.size()), &layer) ||
      !parse_integer(name.substr(middle + kExperts.size()), &expert)) {
    return -1;
  }
  return em_index_key(&index, layer, expert);
}

// Moves the records behind the header of the experts' file; refuses a file that disagrees.
bool Opener::check_experts(Index *index) {
  const char *path = index->path.c_str();
  int64_t file_bytes = 0;
  std::string text;
  if (!open_file(index->path, &file_bytes)) return false;
  if (file_bytes < 8) return fail("`%s` is no safetensors file", path);
  if (!read(index->path, 0, 8, &text)) return false;
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<uint8_t>(text[i]);
  if (length > static_cast<uint64_t>(kMaxText) || static_cast<int64_t>(length) > file_bytes - 8) {
    return fail("`%s` is damaged: its header is longer than the file", path);
  }
  const int64_t start = 8 + static_cast<int64_t>(length);
  if (!read(index->path, 8, static_cast<int64_t>(length), &text)) return false;

  std::vector<bool> seen(index->own_records.size());
  size_t num_seen = 0;
  JsonReader json(text);
  for (json.enter('{'); json.next('}');) {
    const std::string_view name = json.key();
    if (name == "__metadata__") {
      json.skip();
      continue;
    }
    int64_t begin = -1, end = -1, count = 1;
    bool is_bytes = false, is_valid = true;
    JsonFields fields(&json);
    while (fields.next()) {
      if (fields.is("dtype", 0)) {
        is_bytes = json.string() == "U8";
      } else if (fields.is("shape", 1)) {
        for (json.enter('['); json.next(']');) {
          const int64_t size = json.integer();
          is_valid = is_valid && size > 0 && count <= file_bytes / size;
          if (is_valid) count *= size;
        }
      } else if (fields.is("data_offsets", 2)) {
        json.enter('[');
        if (json.next(']')) begin = json.integer();
        if (json.next(']')) end = json.integer();
        if (json.next(']')) is_valid = false;
      } else {
        json.skip();
      }
    }
    if (json.failed()) break;
    const int64_t key = key_of_name(*index, name);
    if (!is_valid || !is_bytes || !fields.has_all(3) || key < 0 || seen[key] || begin < 0 ||
        begin != index->own_records[key].offset || end - begin != index->own_records[key].num_bytes ||
        count != end - begin) {
      return fail("`%s` and `store.json` disagree: tensor `%.*s`", path,
                  static_cast<int>(std::min<size_t>(name.size(), 80)), name.data());
    }
    seen[key] = true;
    ++num_seen;
  }
  json.finish();
  if (json.failed()) {
    return fail("`%s` is damaged: its header does not parse near byte %lld", path,
                static_cast<long long>(8 + json.position()));
  }
  if (num_seen != index->own_records.size()) {
    return fail("`%s` and `store.json` disagree: expected %zu records, got %zu", path,
                index->own_records.size(), num_seen);
  }
  if (num_seen > 0 && start % kPage != 0) {
    return fail("`%s` is damaged: its data does not start at a multiple of %lld bytes", path,
                static_cast<long long>(kPage));
  }
  int64_t end = start;
  for (em_record &record : index->own_records) {
    if (record.num_bytes > file_bytes - end) return fail("`%s` is truncated", path);
    record.offset = end;
    end += record.num_bytes;
  }
  return end == file_bytes || fail("`%s` is too long", path);
}

}  // namespace
}  // namespace em

const em_index *em_index_open(const char *folder, char *error, int64_t error_bytes) {
  em::Opener opener(error, error_bytes);
  try {
    std::unique_ptr<em::Index> index;
    if (folder == nullptr) {
      opener.fail("no folder was given");
    } else {
      index = opener.open(folder);
    }
    return index.release();
  } catch (...) {  // memory, or a path that the system cannot express
    opener.fail("the store cannot be opened: out of memory");
    return nullptr;
  }
}

void em_index_close(const em_index *index) {
  delete static_cast<const em::Index *>(index);
}

int32_t em_index_key(const em_index *index, int64_t layer, int64_t expert) {
  const em_layer *end = index->layers + index->num_layers;
  const em_layer *found = std::lower_bound(
      index->layers, end, layer, [](const em_layer &a, int64_t b) { return a.layer < b; });
  if (found == end || found->layer != layer || expert < 0 || expert >= found->num_experts) {
    return EM_ERR_ARG;
  }
  return static_cast<int32_t>(found->first_key + expert);
}
