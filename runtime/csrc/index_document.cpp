#include "index_document.h"

#include <algorithm>
#include <string_view>

#include "json.h"
#include "kernels.h"

namespace em {
namespace {

constexpr std::string_view kModes[] = {"sym", "asym", "bf16", "fp16", "nf4"};  // as EM_MODE_*

em_format read_spec(JsonReader *json, bool *is_valid) {
  em_format format = {0, 0, -1};
  JsonFields fields(json);
  while (fields.next()) {
    if (fields.is("bits", 0)) {
      format.bits = static_cast<int32_t>(std::min<int64_t>(json->integer(), 99));
    } else if (fields.is("group_size", 1)) {
      format.group_size = static_cast<int32_t>(std::min<int64_t>(json->integer(), 9999));
    } else if (fields.is("mode", 2)) {
      const std::string_view name = json->string();
      for (size_t i = 0; i < std::size(kModes); ++i) {
        if (kModes[i] == name) format.mode = static_cast<int32_t>(i);
      }
    } else {
      json->skip();
    }
  }
  *is_valid = fields.has_all(3) && em_matrix_bytes(kTileRows, 128, format) > 0;
  return format;
}

bool read_layer(JsonReader *json, Document *document, DocumentLayer *layer) {
  std::vector<DocumentRow> *rows = &document->rows;
  layer->first_row = static_cast<int64_t>(rows->size());
  JsonFields fields(json);
  while (fields.next()) {
    if (fields.is("width", 0)) {
      layer->width = json->integer();
    } else if (fields.is("experts", 1)) {
      for (json->enter('['); json->next(']');) {
        int64_t values[7] = {};
        int num = 0;
        for (json->enter('['); json->next(']'); ++num) {
          const int64_t value = json->integer();
          if (num < 7) values[num] = value;
        }
        if (num != 4 && (num != 7 || values[6] < 1)) return false;
        rows->push_back(
            {values[0], values[1], values[2], values[3], values[4], values[5], values[6]});
      }
    } else if (fields.is("aliases", 2)) {
      layer->first_alias = static_cast<int64_t>(document->aliases.size());
      for (json->enter('['); json->next(']'); ++layer->num_aliases) {
        const int64_t body = json->integer();
        if (body < -1 || body > INT32_MAX) return false;
        document->aliases.push_back(static_cast<int32_t>(body));
      }
      if (layer->num_aliases == 0) return false;
    } else {
      json->skip();
    }
  }
  layer->num_rows = static_cast<int64_t>(rows->size()) - layer->first_row;
  return fields.has_all(2);
}

}  // namespace

std::string read_document(const std::string &text, Document *document) {
  JsonReader json(text);
  JsonFields fields(&json);
  bool is_valid = true;
  while (is_valid && fields.next()) {
    if (fields.is("format", 0)) {
      document->is_store = json.string() == "edgemoe";
    } else if (fields.is("format_version", 1)) {
      document->version = json.integer();
    } else if (fields.is("hidden", 2)) {
      document->hidden = json.integer();
    } else if (fields.is("specs", 3)) {
      for (json.enter('['); is_valid && json.next(']');) {
        document->specs.push_back(read_spec(&json, &is_valid));
      }
    } else if (fields.is("layers", 4)) {
      for (json.enter('{'); is_valid && json.next('}');) {
        DocumentLayer layer = {};
        is_valid = parse_integer(json.key(), &layer.layer) && layer.layer >= 0 &&
                   read_layer(&json, document, &layer);
        document->layers.push_back(layer);
      }
    } else if (fields.is("untrained_routers", 5)) {
      document->is_untrained = true;  // written where it is so only
      json.skip();
    } else {
      json.skip();
    }
  }
  if (is_valid) json.finish();
  if (is_valid && !json.failed() && document->is_store &&
      document->version > em_format_version) {
    return "has format version " + std::to_string(document->version) +
           "; this library reads up to version " + std::to_string(em_format_version);
  }
  if (!is_valid || json.failed() || !fields.has_all(5) || !document->is_store ||
      document->version < 1) {
    return "is malformed near byte " + std::to_string(json.position());
  }
  if (document->is_untrained) {
    return "says that its routers are random: they have to be trained before it can run";
  }
  const auto by_layer = [](const DocumentLayer &a, const DocumentLayer &b) { return a.layer < b.layer; };
  std::sort(document->layers.begin(), document->layers.end(), by_layer);
  return {};
}

}  // namespace em
