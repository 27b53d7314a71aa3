// store.json as it is written: read, and not believed yet. What its numbers mean is for index.cpp.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "edgemoe_core.h"

namespace em {

struct DocumentRow {  // an expert
  int64_t gate_up, down, crc_gate_up, crc_down;
  int64_t factors, dense, rank;  // rank 0: it is not factored
};
struct DocumentLayer {
  int64_t layer, width = -1, first_row = 0, num_rows = -1;
  int64_t first_alias = 0, num_aliases = 0;  // rows of the router, where it has others than experts
};
struct Document {
  bool is_store = false, is_untrained = false;
  int64_t version = -1, hidden = -1;
  std::vector<em_format> specs;
  std::vector<DocumentLayer> layers;
  std::vector<DocumentRow> rows;
  std::vector<int32_t> aliases;  // of all layers: the expert of a row, -1: none
};

// Empty, or what is wrong with the file: "is malformed near byte 12". Layers ascend.
std::string read_document(const std::string &text, Document *document);

}  // namespace em
