// What a token reads once the experts of a layer are done, of the next layer or of the logits.
#pragma once
#include <cstdint>
#include <vector>

#include "ahead.h"
#include "cache.h"
#include "decoder.h"
#include "edgemoe_core.h"

namespace em {

class NextLayer : public Ahead {
 public:
  // `number` the layer whose experts are being computed, x [D] its residual before them.
  NextLayer(Decoder &decoder, Cache &cache, const em_kv_cache &kv, int64_t number, const float *x)
      : decoder_(decoder), cache_(cache), kv_(kv), number_(number), x_(x) {}

  // Trunk and keys and values of the next layer, then the records in memory of the experts that its
  // router would choose now.
  void collect(std::vector<Span> *spans) override;

 private:
  void add(const em_matrix &matrix, std::vector<Span> *spans) const;
  void add_heads(int64_t layer, std::vector<Span> *spans) const;
  void add_records(int64_t layer, std::vector<Span> *spans) const;

  Decoder &decoder_;
  Cache &cache_;
  const em_kv_cache &kv_;
  int64_t number_;
  const float *x_;
};

}  // namespace em
