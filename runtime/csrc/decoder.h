// The decoder behind em_decoder: the blocks of a layer, and the scratch they share.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"
#include "cache.h"
#include "edgemoe_core.h"
#include "routing.h"

namespace em {

class Prefetcher;

// Memory of the caller, 64-byte aligned, given away from front to back.
class Room {
 public:
  Room() = default;
  Room(char *begin, int64_t num_bytes) : begin_(begin), num_bytes_(num_bytes) {}
  float *take(int64_t num_floats);  // whole lines, or null where there is too little left

 private:
  char *begin_ = nullptr;
  int64_t num_bytes_ = 0;
};

// 64-byte aligned memory that grows and is then kept; its contents do not survive growth.
class Scratch {
 public:
  explicit Scratch(Room *room = nullptr) : room_(room) {}  // memory of which is taken first
  // At least num floats, or null where there is no memory.
  float *floats(int64_t num);

 private:
  struct Free {
    void operator()(void *memory) const { std::free(memory); }
  };
  Room *room_;
  std::unique_ptr<void, Free> memory_;
  float *start_ = nullptr;
  int64_t capacity_ = 0;
};

// Rows of one of several matrices of the same input: token t at data + t * stride.
struct Rows {
  float *data = nullptr;
  int64_t stride = 0;
  float *row(int64_t t) const { return data + t * stride; }
};

class Decoder {
 public:
  Decoder(const em_model &model, em_pool *pool);
  em_pool *pool() const { return pool_; }

  const em_model &model() const { return model_; }
  const em_block &layer(int64_t layer) const { return layers_[layer]; }
  bool goes_with(const Cache &cache);  // their places are the same records
  uint64_t identity() const { return identity_; }  // another one once bodies have changed
  void set_identity() { identity_ = new_identity(); }
  bool is_valid() const;
  LayerRouting &routing_of(int64_t layer) { return routing_[layer]; }
  const LayerRouting &routing_of(int64_t layer) const { return routing_[layer]; }
  bool set_routing(const em_routing *routing);
  const em_routing_stats &routing_counts() const { return counts_; }
  // [T, D] what the experts take, of the tokens routed last; null: what went into their router.
  const float *expert_inputs() const { return experts_x_; }

  int32_t embed(int64_t num_tokens, const int32_t *ids, float *x);
  int32_t attend(int64_t layer, const em_kv_cache &kv, const float *cos, const float *sin,
                 int64_t num_tokens, const int32_t *token_ids, float *x, float *normed, int32_t *ids,
                 float *weights);
  // The dense mlp or the shared expert of normed, kept until `add`.
  int32_t mlp(int64_t layer, int64_t num_tokens, const float *normed);
  // x += mlp, or x += y + share * mlp.
  void add(int64_t layer, int64_t num_tokens, float *y, float *x);
  int32_t logits(int64_t num_tokens, const float *x, float *logits);
  // scores [bodies]: their shares in the softmax of a layer's router, if x [D] were its residual
  // before the MoE half.
  int32_t look_ahead(int64_t layer, const float *x, float *scores);
  // [E]: shares of the router that has spoken last, of one token; null: masks or rules made its routes.
  const float *router_shares() const { return router_shares_; }
  bool has_good_routes(const em_decode_args &args) const;
  bool has_good_ids(int64_t layer, int64_t num_tokens, const int32_t *token_ids) const;
  // Whether the demand of a layer is known before the first layer of a token runs.
  bool is_foreseen(int64_t layer) const {
    return layers_[layer].experts_of_token != nullptr && computes_all();
  }
  int32_t decode(Cache &cache, em_decode_args &args);
  void use_memory(void *memory, int64_t num_bytes);

 private:
  bool is_valid(const em_block &layer) const;
  bool has_good_table(const em_block &layer) const;
  int32_t multiply(const em_matrix &matrix, const float *x, int64_t num_tokens, const float *bias,
                   float *y);
  int32_t multiply_all(const em_matrix *matrices, int num, const int64_t *rows, const float *x,
                       int64_t num_tokens, const float *bias, float *y, Rows *results);
  void finish_heads(const em_block &layer, const Rows *qkv, const float *cos, const float *sin,
                    int64_t token) const;
  void store_heads(const em_kv_cache &kv, int64_t layer, int part, const float *heads,
                   int64_t token) const;
  int32_t route(int64_t number, const float *normed, int64_t num_tokens, const int32_t *token_ids,
                int32_t *ids, float *weights);
  bool computes_all() const;
  void begin_foresight(Cache &cache, const em_decode_args &args);
  void foresee(Cache &cache);
  int64_t drop_cold(const em_block &layer, const Cache &cache, int32_t *ids, float *weights,
                    int64_t num);
  void stand_in(const em_block &layer, const Cache &cache, const float *weights, int64_t num);
  int64_t num_routes(const em_decode_args &args) const {
    return args.forced_ids ? args.num_forced : model_.top_k;
  }
  int32_t attend_token(int64_t number, em_decode_args &args, int64_t place, float *x,
                       float *normed);
  int32_t run_layer(int64_t number, Cache &cache, em_decode_args &args, float *x, float *normed,
                    float *y);
  int32_t demand(Cache &cache, int64_t place, int64_t num_keys, int64_t *num_misses);
  int32_t decode_layers(Cache &cache, em_decode_args &args);
  int32_t run_experts(int64_t number, Cache &cache, em_decode_args &args, int64_t place, int64_t num,
                      const float *x, const float *normed, float *y);

  bool has_places_of(const Cache &cache) const;

  uint64_t identity_ = new_identity();
  uint64_t checked_[2] = {};  // identities of this and of the cache that it goes with
  em_model model_;
  std::vector<em_block> layers_;
  std::vector<LayerRouting> routing_;  // by layer
  em_routing rule_ = {};
  em_routing_stats counts_ = {};
  int64_t num_picks_ = 0;             // of which some may have been dropped as cold
  const float *experts_x_ = nullptr;  // in inputs_
  const float *router_shares_ = nullptr;  // in scores_
  em_pool *pool_;
  float attention_scale_;
  Room room_;
  Scratch parts_, qkv_, mixed_, projected_, attention_, scores_, masked_, gate_up_, mlp_, shares_;
  Scratch token_, workspace_, ahead_, inputs_;
  // One token's em_moe_args.
  std::vector<int32_t> keys_, pair_token_, own_ids_, order_;
  std::vector<int32_t> certain_;    // keys that layers will demand, in the order of use
  std::size_t num_certain_ = 0;     // of them: are being read or kept
  std::vector<float> own_weights_;  // of a router whose routes are not taken, as own_ids_
  std::vector<const uint8_t *> data_;
  std::vector<int64_t> pair_begin_;
  Cache *cache_ = nullptr;   // of the token that is decoded
  int64_t next_place_ = 0;   // whose router speaks next
  Prefetcher *between_ = nullptr;  // has its turn between two pieces of work of a token
};

}  // namespace em

struct em_decoder : em::Decoder {
  using em::Decoder::Decoder;
};
