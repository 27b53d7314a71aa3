// One token through all layers, and the C face of the decoder.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <memory>

#include "decoder.h"
#include "kernels.h"
#include "moe.h"
#include "next_layer.h"
#include "platform.h"
#include "prefetch.h"
#include "record_shape.h"
#include "sigint.h"
#include "store.h"
#include "thread_pool.h"

namespace em {
namespace {

bool has_shape(const em_matrix &matrix, int64_t rows, int64_t cols) {
  if (matrix.rows != rows || matrix.cols != cols) return false;
  if (matrix.num_parts != 1 && matrix.num_parts != 3) return false;
  for (int i = 0; i < matrix.num_parts; ++i) {
    if (matrix.packed[i] == nullptr) return false;
  }
  return em_matrix_bytes(rows, cols, matrix.format) >= 0;
}

bool have_shape(const em_matrix *matrices, int num, const int64_t *rows, int64_t cols) {
  int64_t sum = 0;
  for (int i = 0; i < num; ++i) sum += rows[i];
  if (matrices[1].rows == 0) return has_shape(matrices[0], sum, cols);
  for (int i = 0; i < num; ++i) {
    if (!has_shape(matrices[i], rows[i], cols)) return false;
  }
  return true;
}

// The lowest id of the largest logit, or -1 where that is not finite.
int64_t best_of(const float *logits, int64_t num) {
  constexpr int64_t kLanes = 16, kChunk = 64 * kLanes;
  int64_t begin = 0;  // of the chunk with the largest
  float best = -INFINITY;
  bool has_nan = false;
  for (int64_t first = 0; first < num; first += kChunk) {
    const int64_t end = first + kChunk < num ? first + kChunk : num;
    float largest[kLanes];
    int32_t nans[kLanes] = {};
    for (float &lane : largest) lane = -INFINITY;
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const float value = logits[i + lane];
        largest[lane] = value > largest[lane] ? value : largest[lane];
        nans[lane] |= value != value;
      }
    }
    for (; i < end; ++i) {
      largest[0] = logits[i] > largest[0] ? logits[i] : largest[0];
      nans[0] |= logits[i] != logits[i];
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      has_nan = has_nan || nans[lane] != 0;
      if (largest[lane] > best) {
        best = largest[lane];
        begin = first;
      }
    }
  }
  if (has_nan || !std::isfinite(best)) return -1;
  while (logits[begin] != best) ++begin;
  return begin;
}

// The flag that a signal or another thread may set.
std::atomic<int32_t> *as_flag(int32_t *stop) {
  static_assert(sizeof(std::atomic<int32_t>) == sizeof(int32_t), "a flag is one int32");
  return reinterpret_cast<std::atomic<int32_t> *>(stop);
}

}  // namespace

float *Room::take(int64_t num_floats) {
  const int64_t num_bytes = (num_floats * sizeof(float) + kLineBytes - 1) / kLineBytes * kLineBytes;
  if (num_bytes > num_bytes_) return nullptr;
  float *const taken = reinterpret_cast<float *>(begin_);
  begin_ += num_bytes;
  num_bytes_ -= num_bytes;
  return taken;
}

float *Scratch::floats(int64_t num) {
  constexpr int64_t kFloatsPerLine = kLineBytes / sizeof(float);
  if (num > capacity_) {
    memory_.reset();
    capacity_ = 0;
    start_ = room_ != nullptr ? room_->take(num) : nullptr;
    if (start_ != nullptr) {
      capacity_ = num;
      return start_;
    }
    memory_.reset(std::malloc((num + kFloatsPerLine) * sizeof(float)));
    start_ = static_cast<float *>(memory_.get());
    if (start_ == nullptr) return nullptr;
    const uintptr_t past = reinterpret_cast<uintptr_t>(start_) % kLineBytes;
    start_ += (kLineBytes - past) % kLineBytes / sizeof(float);
    capacity_ = num;
  }
  return start_;
}

void Decoder::use_memory(void *memory, int64_t num_bytes) {
  room_ = {static_cast<char *>(memory), memory == nullptr ? 0 : num_bytes};
  for (Scratch *each : {&parts_, &qkv_, &mixed_, &projected_, &attention_, &scores_, &masked_, &gate_up_,
                        &mlp_, &shares_, &token_, &workspace_, &ahead_, &inputs_}) {
    *each = Scratch(&room_);
  }
  experts_x_ = router_shares_ = nullptr;
}

bool Decoder::is_valid(const em_block &layer) const {
  const int64_t heads = model_.num_heads * model_.head_dim;
  const int64_t kv_heads = model_.num_kv_heads * model_.head_dim;
  const int64_t qkv[3] = {heads, kv_heads, kv_heads};
  const bool has_norms = layer.q_norm != nullptr && layer.k_norm != nullptr;
  if (!layer.input_norm || !layer.post_norm || layer.window < 0 ||
      (model_.qk_norm != EM_QK_NORM_NONE && !has_norms) ||
      !have_shape(layer.qkv, 3, qkv, model_.hidden) ||
      !has_shape(layer.output, model_.hidden, heads)) {
    return false;
  }
  const bool has_mlp = layer.down.rows != 0;
  const int64_t width = layer.down.cols;
  const int64_t gate_up[2] = {width, width};
  if (has_mlp && (width < 1 || !has_shape(layer.down, model_.hidden, width) ||
                  !have_shape(layer.gate_up, 2, gate_up, model_.hidden))) {
    return false;
  }
  if (layer.router.rows == 0) return has_mlp;
  return has_shape(layer.router, layer.router.rows, model_.hidden) && layer.first_key >= 0 &&
         layer.expert_width > 0 && model_.top_k <= layer.router.rows && has_good_table(layer) &&
         has_mlp == (layer.shared_weight.rows != 0) &&
         (!has_mlp || has_shape(layer.shared_weight, 1, model_.hidden));
}

bool Decoder::is_valid() const {
  const em_model &m = model_;
  if (m.num_heads < 1 || m.num_kv_heads < 1 || m.num_heads % m.num_kv_heads || m.head_dim < 1 ||
      m.rotary_dim < 0 || m.rotary_dim > m.head_dim || m.rotary_dim % 2 || m.top_k < 1 ||
      m.hidden < 1 || m.qk_norm < EM_QK_NORM_NONE || m.qk_norm > EM_QK_NORM_WHOLE || !m.norm ||
      !has_shape(m.embedding, m.embedding.rows, m.hidden) || m.embedding.num_parts != 1 ||
      !has_shape(m.lm_head, m.lm_head.rows, m.hidden)) {
    return false;
  }
  for (const em_block &layer : layers_) {
    if (!is_valid(layer)) return false;
  }
  return true;
}

Decoder::Decoder(const em_model &model, em_pool *pool)
    : model_(model),
      layers_(model.layers, model.layers + model.num_layers),
      pool_(pool),
      attention_scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(model.head_dim)))) {
  for (const em_block &layer : layers_) {
    routing_.emplace_back(layer.router.rows, layer.experts_of_token);
  }
  const size_t top_k = model.top_k > 0 ? static_cast<size_t>(model.top_k) : 0;
  keys_.resize(top_k);
  data_.resize(top_k);
  own_ids_.resize(top_k);
  own_weights_.resize(top_k);
  pair_token_.resize(top_k);
  for (size_t k = 0; k <= top_k; ++k) pair_begin_.push_back(static_cast<int64_t>(k));
}

int32_t Decoder::embed(int64_t num_tokens, const int32_t *ids, float *x) {
  const em_matrix &table = model_.embedding;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int32_t status = em_unpack_rows(table.packed[0], table.rows, table.cols, table.format,
                                          ids[t], 1, x + t * model_.hidden);
    if (status != 0) return status;
  }
  return 0;
}

int32_t Decoder::logits(int64_t num_tokens, const float *x, float *logits) {
  float *normed = projected_.floats(num_tokens * model_.hidden);
  if (normed == nullptr) return -ENOMEM;
  em_rms_norm(x, model_.norm, num_tokens, model_.hidden, model_.rms_eps, normed);
  return multiply(model_.lm_head, normed, num_tokens, nullptr, logits);
}

bool Decoder::goes_with(const Cache &cache) {
  if (checked_[0] == identity_ && checked_[1] == cache.identity()) return true;
  if (!has_places_of(cache)) return false;
  checked_[0] = identity_;
  checked_[1] = cache.identity();
  return true;
}

bool Decoder::has_places_of(const Cache &cache) const {
  int64_t place = 0;
  for (size_t number = 0; number < layers_.size(); ++number) {
    const em_block &layer = layers_[number];
    if (layer.router.rows == 0) continue;
    if (place == cache.num_places()) return false;
    const int64_t end = cache.first_key(place + 1), stand_ins = layer.first_stand_in;
    const int64_t num_bodies = routing_[number].num_bodies();
    if (layer.first_key != cache.first_key(place) || layer.first_key + num_bodies > end ||
        (stand_ins != 0 && (stand_ins < layer.first_key + num_bodies || stand_ins + num_bodies > end))) {
      return false;
    }
    ++place;
  }
  return place == cache.num_places();
}

// The `num` experts of the place just routed, whose sum goes to y.
int32_t Decoder::run_experts(int64_t number, Cache &cache, em_decode_args &args, int64_t place,
                             int64_t num, const float *x, const float *normed, float *y) {
  const em_block &layer = layers_[number];
  const int64_t hidden = model_.hidden;
  for (int64_t k = 0; k < num; ++k) data_[k] = cache.data(keys_[k]);
  const em_record *const records = records_of(cache.store());
  int64_t floats = layer.expert_width;
  for (int64_t k = 0; k < num; ++k) {
    floats = std::max(floats, row_floats(records[keys_[k]], layer.expert_width));
  }
  float *workspace =
      workspace_.floats(em_moe_workspace_floats(1, num_routes(args), hidden, floats));
  if (workspace == nullptr) return -ENOMEM;
  std::memset(y, 0, hidden * sizeof(float));
  em_moe_args run = {};
  run.num_tokens = 1;
  run.hidden = hidden;
  run.width = layer.expert_width;
  run.num_experts = num;
  run.x = experts_x_ != nullptr ? experts_x_ : normed;
  run.y = y;
  run.keys = keys_.data();
  run.data = data_.data();
  run.pair_begin = pair_begin_.data();
  run.pair_token = pair_token_.data();
  run.pair_weight = args.routing_weights + place * num_routes(args);
  run.workspace = workspace;
  run.failed = -1;
  const int64_t start = monotonic_ns();
  const int64_t decide_ns = cache.decide_ns();
  NextLayer ahead(*this, cache, args.kv, number, x);
  const int32_t status = run_moe(pool_, cache.store(), nullptr, &run, between_, &cache, &ahead);
  em_place_stats &stats = cache.stats_of(place);
  stats.compute_ns += monotonic_ns() - start - run.stall_ns - (cache.decide_ns() - decide_ns);
  stats.stall_ns += run.stall_ns;
  if (status != 0 && run.failed >= 0) args.failed_key = keys_[run.failed];
  return status;
}

// Whether forced routes, if there are, name bodies that each layer has, ascending, then none.
bool Decoder::has_good_routes(const em_decode_args &args) const {
  if (args.forced_ids == nullptr) return true;
  if (!args.forced_weights || args.num_forced < 1 || args.num_forced > model_.top_k) return false;
  const int32_t *ids = args.forced_ids;
  for (size_t number = 0; number < layers_.size(); ++number) {
    if (layers_[number].router.rows == 0) continue;
    const int64_t num = num_active(ids, args.num_forced);
    for (int64_t k = 0, last = -1; k < num; ++k) {
      if (ids[k] <= last || ids[k] >= routing_[number].num_bodies()) return false;
      last = ids[k];
    }
    ids += args.num_forced;
  }
  return true;
}

// The attention half of one token, and the routes of a layer with experts.
int32_t Decoder::attend_token(int64_t number, em_decode_args &args, int64_t place, float *x,
                              float *normed) {
  const int64_t first = place * num_routes(args);
  int32_t *ids = args.routes + first;
  float *weights = args.routing_weights + first;
  const bool is_forced = args.forced_ids != nullptr;
  const int32_t token_id = static_cast<int32_t>(args.token_id);
  const int32_t status = attend(number, args.kv, args.cos, args.sin, 1, &token_id, x, normed,
                                is_forced ? own_ids_.data() : ids,
                                is_forced ? own_weights_.data() : weights);
  if (status == 0 && is_forced && layers_[number].router.rows != 0) {
    std::copy_n(args.forced_ids + first, args.num_forced, ids);
    std::copy_n(args.forced_weights + first, args.num_forced, weights);
  }
  return status;
}

// One layer in place of x; args.num_places counts those with experts.
int32_t Decoder::run_layer(int64_t number, Cache &cache, em_decode_args &args, float *x,
                           float *normed, float *y) {
  const em_block &layer = layers_[number];
  const int64_t top_k = num_routes(args), place = args.num_places;
  const bool has_experts = layer.router.rows != 0;
  next_place_ = place;
  int32_t status = attend_token(number, args, place, x, normed);
  if (status != 0) return status;
  if (!has_experts) {
    status = mlp(number, 1, normed);
    if (status == 0) add(number, 1, nullptr, x);
    return status;
  }
  args.num_places = place + 1;
  int32_t *ids = args.routes + place * top_k;
  int64_t num = num_active(ids, top_k);
  if (rule_.cold_share > 0) {
    num = drop_cold(layer, cache, ids, args.routing_weights + place * top_k, num);
  }
  for (int64_t k = 0; k < num; ++k) keys_[k] = static_cast<int32_t>(layer.first_key + ids[k]);
  if (rule_.stand_ins != 0 && layer.first_stand_in != 0) {
    stand_in(layer, cache, args.routing_weights + place * top_k, num);
  }
  if (between_ != nullptr) {
    const Cache::Guessing guessing(cache);
    between_->spoken(*this, place, ids, args.routing_weights + place * top_k, num);
  }
  int64_t num_misses = 0;
  status = demand(cache, place, num, &num_misses);
  if (status != 0) return status;
  const Cache::Held held(cache, num, keys_.data());
  if (num_certain_ < certain_.size()) foresee(cache);
  if (between_ != nullptr) {
    const Cache::Guessing guessing(cache);
    status = between_->predict(this, place, x);
  }
  if (status == 0) status = mlp(number, 1, normed);  // the shared expert, while reads fly
  const int64_t stall_ns = cache.stats_of(place).stall_ns;
  if (status == 0) status = run_experts(number, cache, args, place, num, x, normed, y);
  if (between_ != nullptr) between_->finish(num_misses, cache.stats_of(place).stall_ns - stall_ns);
  if (status == 0) add(number, 1, y, x);
  return status;
}

// Pins the records of keys_ and starts reading those absent.
int32_t Decoder::demand(Cache &cache, int64_t place, int64_t num_keys, int64_t *num_misses) {
  const Cache::Deciding deciding(cache);
  cache.begin_layer(place, 1);
  em_cache_demand found = {};
  const int32_t status = cache.hint(num_keys, keys_.data(), nullptr, &found);
  *num_misses = found.num_misses;
  return status > 0 ? 0 : status == 0 ? EM_ERR_ROOM : status;
}

int32_t Decoder::decode(Cache &cache, em_decode_args &args) {
  begin_foresight(cache, args);
  cache_ = &cache;
  Prefetcher *const prefetch = args.prefetch;
  if (prefetch != nullptr) prefetch->begin_token(&cache, this, args);
  between_ = prefetch != nullptr && prefetch->has_layers() ? prefetch : nullptr;
  const int32_t status = decode_layers(cache, args);
  if (prefetch != nullptr) prefetch->end_token(status == 0);
  between_ = nullptr;
  cache_ = nullptr;
  if (status != 0 && !certain_.empty()) cache.drop_all_guesses();
  return status;
}

int32_t Decoder::decode_layers(Cache &cache, em_decode_args &args) {
  const int64_t hidden = model_.hidden;
  args.num_places = 0;
  args.failed_key = args.best_id = -1;
  float *x = token_.floats(3 * hidden);
  if (x == nullptr) return -ENOMEM;
  float *normed = x + hidden, *y = normed + hidden;
  const int32_t id = static_cast<int32_t>(args.token_id);
  int32_t status = embed(1, &id, x);
  for (int64_t number = 0; status == 0 && number < model_.num_layers; ++number) {
    if (args.stop != nullptr && as_flag(args.stop)->exchange(0) != 0) return EM_ERR_STOPPED;
    status = run_layer(number, cache, args, x, normed, y);
  }
  if (status == 0 && args.logits != nullptr) {
    status = logits(1, x, args.logits);
    if (status == 0) args.best_id = best_of(args.logits, model_.lm_head.rows);
  }
  return status;
}

bool is_valid(const em_kv_cache &kv, int64_t num_tokens) {
  return kv.data != nullptr && kv.position >= 0 && num_tokens <= kv.capacity &&
         kv.position <= kv.capacity - num_tokens &&
         (kv.kv_bits == 32 || kv.kv_bits == 16 || (kv.kv_bits == 8 && kv.scales != nullptr));
}

// Only vectors and the store's own lists allocate with an exception.
template <class Call>
int32_t without_exceptions(const Call &call) {
  try {
    return call();
  } catch (...) {
    return -ENOMEM;
  }
}

// `call` changes the routing of a layer that has a router; false: it refuses.
template <class Call>
int32_t change(Decoder *decoder, int64_t layer, const Call &call) {
  if (!decoder || layer < 0 || layer >= decoder->model().num_layers ||
      decoder->layer(layer).router.rows == 0) {
    return EM_ERR_ARG;
  }
  decoder->set_identity();
  return without_exceptions([&] { return call(decoder->routing_of(layer)) ? 0 : EM_ERR_ARG; });
}

}  // namespace em

em_decoder *em_decoder_create(const em_model *model, em_pool *pool) {
  if (model == nullptr || model->num_layers < 1 || model->layers == nullptr) return nullptr;
  try {
    std::unique_ptr<em_decoder> decoder(new em_decoder(*model, pool));
    return decoder->is_valid() ? decoder.release() : nullptr;
  } catch (...) {
    return nullptr;
  }
}

void em_decoder_destroy(em_decoder *decoder) { delete decoder; }

int32_t em_decoder_use_memory(em_decoder *decoder, void *memory, int64_t num_bytes) {
  if (!decoder || num_bytes < 0 || reinterpret_cast<uintptr_t>(memory) % em::kLineBytes) {
    return EM_ERR_ARG;
  }
  decoder->use_memory(memory, num_bytes);
  return 0;
}

int32_t em_decoder_set_mask(em_decoder *decoder, int64_t layer, const uint8_t *mask,
                            float threshold) {
  return em::change(decoder, layer, [&](em::LayerRouting &routing) {
    return routing.set_mask(mask, threshold, decoder->model().top_k);
  });
}

int32_t em_decoder_set_bodies(em_decoder *decoder, int64_t layer, const int32_t *body) {
  return em::change(decoder, layer,
                    [&](em::LayerRouting &routing) { return routing.set_bodies(body); });
}

int32_t em_decoder_set_gains(em_decoder *decoder, int64_t layer, const float *gains) {
  return em::change(decoder, layer,
                    [&](em::LayerRouting &routing) { return routing.set_gains(gains); });
}

int32_t em_decoder_set_theta(em_decoder *decoder, int64_t layer, const float *theta) {
  return em::change(decoder, layer, [&](em::LayerRouting &routing) {
    routing.theta = theta;
    return true;
  });
}

int32_t em_decoder_set_routing(em_decoder *decoder, const em_routing *routing) {
  return decoder && decoder->set_routing(routing) ? 0 : EM_ERR_ARG;
}

int32_t em_decoder_expert_inputs(em_decoder *decoder, int64_t num_tokens, const float *normed,
                                 float *x) {
  if (!decoder || num_tokens < 0 || !normed || !x) return EM_ERR_ARG;
  const float *inputs = decoder->expert_inputs() ? decoder->expert_inputs() : normed;
  std::copy_n(inputs, num_tokens * decoder->model().hidden, x);
  return 0;
}

void em_decoder_get_routing_stats(const em_decoder *decoder, em_routing_stats *stats) {
  *stats = decoder->routing_counts();
}

int32_t em_decoder_embed(em_decoder *decoder, int64_t num_tokens, const int32_t *ids, float *x) {
  if (!decoder || num_tokens < 0 || !ids || !x) return EM_ERR_ARG;
  return decoder->embed(num_tokens, ids, x);
}

int32_t em_decoder_attend(em_decoder *decoder, int64_t layer, const em_kv_cache *kv,
                          const float *cos, const float *sin, int64_t num_tokens,
                          const int32_t *token_ids, float *x, float *normed, int32_t *expert_ids,
                          float *routing_weights) {
  if (!decoder || !kv || !x || !normed || num_tokens < 0 || !em::is_valid(*kv, num_tokens) ||
      layer < 0 || layer >= decoder->model().num_layers) {
    return EM_ERR_ARG;
  }
  const bool has_router = decoder->layer(layer).router.rows != 0;
  if (has_router && (expert_ids == nullptr || routing_weights == nullptr)) return EM_ERR_ARG;
  if (decoder->model().rotary_dim && (cos == nullptr || sin == nullptr)) return EM_ERR_ARG;
  if (!decoder->has_good_ids(layer, num_tokens, token_ids)) return EM_ERR_ARG;
  if (num_tokens == 0) return 0;
  return em::without_exceptions([&] {
    return decoder->attend(layer, *kv, cos, sin, num_tokens, token_ids, x, normed, expert_ids,
                           routing_weights);
  });
}

int32_t em_decoder_finish(em_decoder *decoder, int64_t layer, int64_t num_tokens,
                          const float *normed, float *y, float *x) {
  if (!decoder || num_tokens < 0 || !normed || !x || layer < 0 ||
      layer >= decoder->model().num_layers ||
      (y != nullptr) != (decoder->layer(layer).router.rows != 0)) {
    return EM_ERR_ARG;
  }
  return em::without_exceptions([&] {
    const int32_t status = decoder->mlp(layer, num_tokens, normed);
    if (status == 0) decoder->add(layer, num_tokens, y, x);
    return status;
  });
}

int32_t em_decoder_logits(em_decoder *decoder, int64_t num_tokens, const float *x, float *logits) {
  if (!decoder || num_tokens < 0 || !x || !logits) return EM_ERR_ARG;
  return decoder->logits(num_tokens, x, logits);
}

int32_t em_decode(em_decoder *decoder, em_cache *cache, em_decode_args *args) {
  if (!decoder || !cache || !args || !em::is_valid(args->kv, 1) || !args->routes ||
      !args->routing_weights || args->token_id < 0 ||
      args->token_id >= decoder->model().embedding.rows ||
      (decoder->model().rotary_dim && (args->cos == nullptr || args->sin == nullptr)) ||
      !decoder->goes_with(*cache) || args->num_guesses < 0 ||
      (args->prefetch != nullptr && !args->prefetch->bind(*decoder)) ||
      !decoder->has_good_routes(*args)) {
    return EM_ERR_ARG;
  }
  const em::Cache::Native native(*cache);
  const em::SigintWatch watch(args->on_sigint ? em::as_flag(args->stop) : nullptr);
  const em::Pinned pinned(em::caller_core(decoder->pool()));
  return em::without_exceptions([&] { return decoder->decode(*cache, *args); });
}
