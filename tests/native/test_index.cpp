// The native index: what it finds in a store, and that it refuses whatever does not agree.
#include <algorithm>
#include <cstring>
#include <filesystem>

#include "check.h"
#include "store_folder.h"

namespace {

const std::vector<em_format> kFormats = {{4, 32, EM_MODE_SYM}, {2, 32, EM_MODE_ASYM},
                                         {16, 0, EM_MODE_BF16}};

std::string open_error(const std::string &folder) {
  char error[256] = "";
  const em_index *index = em_index_open(folder.c_str(), error, sizeof error);
  if (index == nullptr && error[0] == '\0') return "no text";
  em_index_close(index);
  return error;
}

// The message for a copy of the store whose store.json, or experts' file, was changed; a change
// that finds nothing to change fails the test.
std::string error_with(const StoreFolder &store, const std::string &from, const std::string &to,
                       bool in_experts = false) {
  const std::string copy = check::folder() + "/changed";
  std::filesystem::create_directories(copy);
  std::string texts[2] = {store.index_text(), store.experts_bytes()};
  std::string &text = texts[in_experts];
  const size_t at = text.find(from);
  if (at == std::string::npos) {
    check::fail(__FILE__, __LINE__, "not in the text: " + from);
    return "";
  }
  text.replace(at, from.size(), to);
  write_file(copy + "/store.json", texts[0]);
  write_file(copy + "/experts.safetensors", texts[1]);
  return open_error(copy);
}

}  // namespace

TEST(an_index_has_the_shape_and_the_records_of_its_store) {
  const StoreFolder store = make_store("index", 64, 32, {1, 2, 10}, 5, kFormats);
  char error[256] = "";
  const em_index *index = em_index_open(store.path.c_str(), error, sizeof error);
  CHECK_EQUAL(std::string(error), std::string());
  REQUIRE(index != nullptr);
  CHECK_EQUAL(index->hidden, 64);
  CHECK_EQUAL(index->num_layers, 3);
  CHECK_EQUAL(index->num_records, 15);
  CHECK_EQUAL(std::string(index->experts_path), store.experts_path());
  int64_t largest = 0;
  for (int64_t key = 0; key < index->num_records; ++key) {
    CHECK(std::memcmp(&index->records[key], &store.records[key], sizeof(em_record)) == 0);
    largest = std::max(largest, index->records[key].num_bytes);
    CHECK_EQUAL(em_index_key(index, store.layers[key / 5], key % 5), key);
  }
  CHECK_EQUAL(index->max_record_bytes, largest);
  for (int l = 0; l < 3; ++l) {
    CHECK_EQUAL(index->layers[l].layer, store.layers[l]);
    CHECK_EQUAL(index->layers[l].num_experts, 5);
    CHECK_EQUAL(index->layers[l].width, 32);
    CHECK_EQUAL(index->layers[l].first_key, 5 * l);
    CHECK_EQUAL(index->layers[l].num_rows, 5);
    CHECK(index->layers[l].bodies == nullptr);
  }
  for (const int64_t layer : {0, 3, 11, -1}) CHECK_EQUAL(em_index_key(index, layer, 0), EM_ERR_ARG);
  for (const int64_t expert : {int64_t{5}, int64_t{-1}, INT64_MAX}) {
    CHECK_EQUAL(em_index_key(index, 2, expert), EM_ERR_ARG);
  }
  em_index_close(index);
  em_index_close(nullptr);
}

TEST(an_index_is_read_in_any_order_of_its_fields) {
  const StoreFolder store = make_store("order", 64, 32, {0, 1}, 2, {{4, 32, EM_MODE_SYM}});
  CHECK(!error_with(store, "\"hidden\": 64, ", "").empty());
  const std::string text = store.index_text();
  const size_t hidden = text.find("\"hidden\"");
  std::string other = text.substr(0, hidden) + text.substr(hidden + 14);
  other.insert(other.find(", \"packed_trunk\""), " , \n\t\"hidden\" :\r 64");
  write_file(check::folder() + "/order/store.json", other);
  CHECK_EQUAL(open_error(store.path), std::string());
}

TEST(rows_of_routers_may_share_experts) {
  const StoreFolder store = make_store("aliases", 64, 32, {0, 1}, 3, kFormats);
  const std::string text = store.index_text();
  std::string other = text;
  other.insert(text.find("\"width\": 32"), "\"aliases\": [2, 0, -1, 1, 2], ");
  const std::string path = check::folder() + "/aliases/store.json";
  write_file(path, other);
  const em_index *index = em_index_open(store.path.c_str(), nullptr, 0);
  CHECK(index != nullptr);
  if (index == nullptr) return;
  const em_layer &first = index->layers[0], &second = index->layers[1];
  CHECK_EQUAL(first.num_experts, 3);
  CHECK_EQUAL(first.num_rows, 5);
  for (int row = 0; row < 5; ++row) {
    constexpr int32_t kBodies[] = {2, 0, -1, 1, 2};
    CHECK_EQUAL(first.bodies[row], kBodies[row]);
  }
  CHECK_EQUAL(second.num_rows, 3);
  CHECK(second.bodies == nullptr);
  em_index_close(index);
  other = text;
  other.insert(text.find("\"hidden\""), "\"untrained_routers\": true, ");
  write_file(path, other);
  CHECK(open_error(store.path).find("have to be trained") != std::string::npos);
}

TEST(malformed_indexes_are_refused) {
  const StoreFolder store = make_store("hostile", 64, 32, {0, 1}, 3, kFormats);
  CHECK_EQUAL(open_error(store.path), std::string());
  const char *const changes[][2] = {
      {"\"edgemoe\"", "\"edgemo\""},
      {"\"format_version\": 1", "\"format_version\": 3"},
      {"\"format_version\": 1", "\"format_version\": 0"},
      {"\"format_version\": 1", "\"format_version\": true"},
      {"\"format_version\": 1", "\"format_version\": 1, \"format_version\": 1"},
      {"\"hidden\": 64", "\"hidden\": 48"},
      {"\"hidden\": 64", "\"hidden\": 128"},
      {"\"hidden\": 64", "\"hidden\": 0"},
      {"\"hidden\": 64", "\"hidden\": -64"},
      {"\"hidden\": 64", "\"hidden\": 64.0"},
      {"\"hidden\": 64", "\"hidden\": \"64\""},
      {"\"hidden\": 64", "\"hidden\": 4611686018427387904"},
      {"\"hidden\": 64", "\"hidden\": 18446744073709551680"},
      {"\"hidden\": 64", "\"hidden\": 064"},
      {"\"width\": 32", "\"width\": 9223372036854775807"},
      {"\"width\": 32", "\"width\": 2147483648"},
      {"\"width\": 32", "\"width\": 33"},
      {"\"width\": 32", "\"width\": 32, \"width\": 32"},
      {"\"width\": 32, ", ""},
      {"\"width\": 32", "\"width\": 32, \"aliases\": []"},
      {"\"width\": 32", "\"width\": 32, \"aliases\": [0, 1, 1]"},
      {"\"width\": 32", "\"width\": 32, \"aliases\": [0, 1, 2, 3]"},
      {"\"width\": 32", "\"width\": 32, \"aliases\": [0, 1, 2, -2]"},
      {"\"width\": 32", "\"width\": 32, \"aliases\": [0, 1, 4294967298]"},
      {"\"bits\": 4", "\"bits\": 5"},
      {"\"bits\": 4", "\"bits\": 4294967300"},
      {"\"group_size\": 32", "\"group_size\": 64"},
      {"\"group_size\": 32", "\"group_size\": 4294967328"},
      {"\"mode\": \"sym\"", "\"mode\": \"other\""},
      {"\"mode\": \"sym\"", "\"mode\": \"bf16\""},
      {"\"0\": {", "\"1\": {"},
      {"\"0\": {", "\"-1\": {"},
      {"\"0\": {", "\"00\": {"},
      {"\"0\": {", "\"2\": {"},
      {"\"0\": {", "\"99999999999999999999\": {"},
      {"[0, 1, ", "[3, 1, "},
      {"[0, 1, ", "[0, -1, "},
      {"[0, 1, ", "[0, 1, 4294967296, "},
      {"[0, 1, ", "[0, 1, 0, "},
      {"[0, 1, ", "[0, "},
      {"[0, 1, ", "[0.0, 1, "},
      {"[[0, 1, ", "[[1, 2, 0, 0], [0, 1, "},
      {"\"plan\": {", "\"plan\": {,"},
      {"0.5e1", "0.5e"},
      {"0.5e1", "05"},
      {"null", "nul"},
      {"null]", "null}"},
      {"null", "\"\\x\""},
      {"null", "\"\\u12g4\""},
      {"null", "\"\n\""},
      {"\"sha256\": {}", "\"sha256\": {} {}"},
      {"\"sha256\": {}", "\"sha256\": {\"a\" 1}"},
      {"{\"format\"", "[\"format\""},
  };
  for (const auto &change : changes) {
    if (error_with(store, change[0], change[1]).empty()) {
      check::fail(__FILE__, __LINE__, std::string(change[0]) + " -> " + change[1]);
    }
  }
  const std::string deep(1000, '[');
  CHECK(!error_with(store, "null", deep).empty());
  CHECK(!error_with(store, "null", deep + std::string(1000, ']')).empty());
  CHECK(error_with(store, "null", "[[[[]]]], {\"a\": {\"b\": [-1.5E-3, true, false]}}").empty());
}

TEST(experts_files_that_disagree_are_refused) {
  const StoreFolder store = make_store("experts", 64, 32, {0, 1}, 3, kFormats);
  const char *const changes[][2] = {
      {"layers.0.experts.1", "layers.0.experts.2"},
      {"layers.0.experts.1", "layers.0.experts.3"},
      {"layers.0.experts.1", "layers.0.expert_.1"},
      {"layers.0.experts.1", "layers.0.experts.x"},
      {"layers.0.experts.1", "xayers.0.experts.1"},
      {"layers.0.experts.1", "layers.0.experts1."},
      {"\"U8\"", "\"I8\""},
      {"\"dtype\"", "\"dtypo\""},
      {"\"shape\":[", "\"shape\":9"},
      {"\"data_offsets\":[0", "\"data_offsets\":[1"},
      {"\"data_offsets\":[0,", "\"data_offsets\":[0 "},
      {"\"data_offsets\":[0,", "\"data_offsets\":[-,"},
      {"{\"__", "[\"__"},
      {"{\"made\"", "\"\"made\""},
  };
  for (const auto &change : changes) {
    if (error_with(store, change[0], change[1], true).empty()) {
      check::fail(__FILE__, __LINE__, std::string(change[0]) + " -> " + change[1]);
    }
  }
  const std::string whole = store.experts_bytes();
  const auto error_of = [&](const std::string &bytes) {
    write_file(store.experts_path(), bytes);
    return open_error(store.path);
  };
  CHECK_EQUAL(error_of(whole), std::string());
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, size_t{500}, size_t{4096},
                            whole.size() - 4096, whole.size() - 1}) {
    CHECK(!error_of(whole.substr(0, size)).empty());
  }
  CHECK(!error_of(whole + "x").empty());
  for (int byte = 0; byte < 8; ++byte) {
    std::string other = whole;
    other[byte] = static_cast<char>(other[byte] + 0x7f);
    CHECK(!error_of(other).empty());
  }
  // Data that starts at no page: the header is one byte longer.
  std::string shifted = whole;
  shifted.insert(4096, " ");
  shifted[0] = static_cast<char>(shifted[0] + 1);
  CHECK(!error_of(shifted).empty());
}

TEST(a_folder_that_is_no_store_is_refused) {
  CHECK(!open_error(check::folder() + "/nowhere").empty());
  CHECK(!open_error(check::folder()).empty());
  CHECK(!open_error("").empty());
  CHECK(em_index_open(nullptr, nullptr, 0) == nullptr);
  const StoreFolder store = make_store("texts", 64, 32, {0}, 1, {{4, 32, EM_MODE_SYM}});
  char tiny[4] = "xyz";
  CHECK(em_index_open(check::folder().c_str(), tiny, sizeof tiny) == nullptr);
  CHECK_EQUAL(std::strlen(tiny), size_t{3});
  std::filesystem::remove(store.experts_path());
  CHECK(open_error(store.path).find("experts.safetensors") != std::string::npos);
  std::filesystem::create_directories(store.experts_path());  // a folder in the file's place
  CHECK(!open_error(store.path).empty());
}
