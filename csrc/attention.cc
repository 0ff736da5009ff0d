#include "attention.h"

#include <algorithm>
#include <cmath>

namespace eightfold {

namespace {

// Units of attention for each thread, and runs of kSplit positions of one unit at most.
constexpr int kTurns = 8, kMostRun = 8;

// Units of one token each that a thread takes at a time: it asks for the next one's keys while it computes one.
constexpr int kMostTurn = 8;

constexpr int kStoreTokens = 8;
constexpr int kMostDim = 512;

// As kernels' rope, of pairs that are neighbours.
void turn_neighbours(const float* x, int pairs, const float* cos, const float* sin, float* y) {
    for (int i = 0; i < pairs; i++) {
        const float a = x[2 * i], b = x[2 * i + 1];
        y[2 * i] = a * cos[i] - b * sin[i];
        y[2 * i + 1] = b * cos[i] + a * sin[i];
    }
}

// A state in memory of kMaxAttnRows * (2 + value_dim) floats.
AttnState state_at(float* memory) { return {memory, memory + kMaxAttnRows, memory + 2 * kMaxAttnRows}; }

}  // namespace

void Attention::allocate_cache(int pages) {
    pool_.quiesce();
    cache_.reset();
    cache_ = std::make_unique<Cache>(config_.shape, layers_, pages);
}

size_t Attention::page_bytes() const {
    size_t total = 0;
    for (const AttentionParams& layer : layers_) total += Cache::page_bytes(config_.shape, layer.kind);
    return total;
}

void Attention::reserve_tokens(int tokens) {
    const Shape& shape = config_.shape;
    const size_t n = static_cast<size_t>(tokens), heads = n * shape.heads;
    sequence_of_.resize(n);
    qkv_.resize(n * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
    heads_.resize(heads * shape.head_dim);
    squares_.resize(n * (shape.heads + shape.kv_heads));
    cos_.resize(n * ropes_.size() * config_.inv_freq.size());
    sin_.resize(cos_.size());
    q8_.resize(heads * 2 * shape.query_dim());
    q_sum_.resize(heads * 2);
    q_scale_.resize(heads);
    q_shift_.resize(heads);
    qf_.resize(heads * shape.query_dim());
}

void Attention::plan(const Batch& batch, AttentionPlan& plan) {
    cut_tiles(batch, plan);
    cut_contexts(plan);
    for (Unit& unit : plan.units) {
        const int32_t* table = batch.table(unit.sequence);
        unit.position = batch.positions[unit.first_token];
        unit.first_page = table[unit.begin / kPage];
        unit.last_page = table[unit.position / kPage];
    }
    plan.single =
        batch.tokens == batch.sequences && !batch.float_prompts && config_.shape.queries_per_kv() <= kMaxAttnRows;
    const int units = static_cast<int>(plan.units.size());
    const bool whole = plan.single && plan.slots == 0;
    plan.turn = whole ? std::clamp(units / (kTurns * pool_.threads()), 1, kMostTurn) : 1;
    if (batch.float_prompts) reserve_fresh(batch);
    reserve_states(plan);
}

void Attention::cut_tiles(const Batch& batch, AttentionPlan& plan) const {
    const int per_kv = config_.shape.queries_per_kv();
    const int heads = std::min(per_kv, kMaxAttnRows), tile_tokens = std::max(1, kMaxAttnRows / per_kv);
    plan.units.clear();
    for (int s = 0; s < batch.sequences; s++) {
        for (int t = batch.starts[s], next; t < batch.starts[s + 1]; t = next) {
            next = t + 1;
            while (next < std::min(t + tile_tokens, batch.starts[s + 1]) &&
                   (!batch.float_prompts || batch.generated[next] == batch.generated[t])) {
                next++;
            }
            const int end = batch.positions[next - 1] + 1;
            for (int g = 0; g < config_.shape.kv_heads; g++)
                for (int h = 0; h < per_kv; h += heads) {
                    const int tile = static_cast<int>(plan.units.size());
                    const int head = g * per_kv + h, count = std::min(heads, per_kv - h);
                    plan.units.push_back({s, t, next - t, head, count, g, 0, end, tile, 1, 0, 0, 0, 0});
                }
        }
    }
    plan.tiles = static_cast<int>(plan.units.size());
}

// Few tiles: their contexts in parts, so that all threads have something to do, but no more than they like: within a
// unit the next page is on its way while one is computed.
void Attention::cut_contexts(AttentionPlan& plan) const {
    plan.slots = 0;
    const int turns = kTurns * pool_.threads();
    if (plan.tiles >= turns) return;
    int total = 0, size = 0;
    for (Unit& unit : plan.units) total += unit.parts = chunk_count(unit.end, kSplit);
    const int run = std::clamp(total / turns, 1, kMostRun) * kSplit;
    for (const Unit& unit : plan.units) size += chunk_count(unit.end, run);
    plan.slots = total;
    plan.units.resize(size);
    for (int i = plan.tiles - 1; i >= 0; i--) {
        const Unit tile = plan.units[i];
        total -= tile.parts;
        for (int part = chunk_count(tile.end, run) - 1; part >= 0; part--) {
            Unit& unit = plan.units[--size] = tile;
            unit.begin = part * run;
            unit.end = std::min(tile.end, unit.begin + run);
            unit.slot = total + unit.begin / kSplit;
        }
    }
}

// Room for the fresh keys and values of whole prompts.
void Attention::reserve_fresh(const Batch& batch) {
    int pages = 0;
    fresh_page_.resize(batch.sequences);
    for (int s = 0; s < batch.sequences; s++) {
        fresh_page_[s] = pages;
        pages += batch.positions[batch.starts[s + 1] - 1] / kPage + 1;
    }
    if (fresh_ != nullptr && fresh_->pages() >= pages) return;
    pool_.quiesce();
    fresh_ = std::make_unique<Cache>(config_.shape, fresh_params_, pages);
}

void Attention::reserve_states(const AttentionPlan& plan) {
    state_size_ = static_cast<size_t>(kMaxAttnRows) * (2 + config_.shape.value_dim());
    if (partial_.size() < plan.slots * state_size_) {
        pool_.quiesce();
        partial_.resize(plan.slots * state_size_);
    }
    if (plan.tiles > tiles_) {
        pool_.quiesce();
        tiles_ = plan.tiles;
        parts_done_ = std::make_unique<std::atomic<int>[]>(tiles_);
    }
}

void Attention::begin(const Batch& batch) {
    for (int s = 0; s < batch.sequences; s++) {
        std::fill(sequence_of_.begin() + batch.starts[s], sequence_of_.begin() + batch.starts[s + 1], s);
    }
    for (int i = 0; i < tiles_; i++) parts_done_[i].store(0, std::memory_order_relaxed);
}

void Attention::find_angles(const Batch& batch, int t) {
    size_t at = t * ropes_.size() * config_.inv_freq.size();
    for (const Rope& rope : ropes_)
        for (const float frequency : rope.inv_freq) {
            const float angle = static_cast<float>(batch.positions[t]) * frequency;
            cos_[at] = std::cos(angle) * rope.scale;
            sin_[at++] = std::sin(angle) * rope.scale;
        }
}

bool Attention::attend_all(Pool::Walk& walk, const Run& run, const AttentionPlan& plan, int layer, const Group& o) {
    const Batch& batch = run.batch;
    const Place of{batch, plan, layer, o};
    const int tokens = batch.tokens;
    const auto store = [&](int i) { rotate_and_store(of, i * kStoreTokens, std::min(tokens, (i + 1) * kStoreTokens)); };
    const size_t dim = config_.shape.head_dim;
    if (layers_[layer].query_norm.size() > dim && !norm_all_heads(walk, run, layers_[layer])) return false;
    if (!plan.single && !walk.phase(chunk_count(tokens, kStoreTokens), store)) return false;
    const int units = static_cast<int>(plan.units.size());
    return walk.phase(
        chunk_count(units, plan.turn),
        [&](int i) {
            const int end = std::min(units, (i + 1) * plan.turn);
            for (int u = i * plan.turn; u < end; u++) {
                const int later = u + 1 < end ? u + 1 : (i + pool_.threads()) * plan.turn;
                const Unit* next = later < units && plan.single ? &plan.units[later] : nullptr;
                attend(of, plan.units[u], next, scratch_[walk.thread()]);
            }
        },
        [&] { o.prefetch(tokens, walk.thread()); });
}

void Attention::rotate_and_store(const Place& of, int begin, int end) {
    const Shape& shape = config_.shape;
    for (int t = begin; t < end; t += Cache::kStored)
        for (int g = 0; g < shape.kv_heads; g++) prefetch_place(of, t, g);
    for (int t = begin; t < end; t++)
        for (int h = 0; h < shape.heads; h++) rotate_query(of, t, h, query_at(t, h));
    for (int t = begin; t < end;) {
        const int count = is_run(of.batch, t, end) ? Cache::kStored : 1;
        for (int g = 0; g < shape.kv_heads; g++) rotate_and_store_keys(of, t, count, g);
        t += count;
    }
}

Attention::Query Attention::query_at(int t, int head) {
    const size_t at = static_cast<size_t>(t) * config_.shape.heads + head, dq = config_.shape.query_dim();
    return {q8_.data() + at * 2 * dq, q_sum_.data() + at * 2, q_scale_.data() + at, q_shift_.data() + at,
            qf_.data() + at * dq};
}

const float* Attention::row_of(int t, int head) const {  // queries first, then keys, then values
    const Shape& shape = config_.shape;
    const size_t all = shape.heads + 2 * static_cast<size_t>(shape.kv_heads);
    return qkv_.data() + (static_cast<size_t>(t) * all + head) * shape.head_dim;
}

// Norms each token's queries as one row, and its keys. Their squares are summed by heads, so that ranks, which have some
// of them, find the same sums.
bool Attention::norm_all_heads(Pool::Walk& walk, const Run& run, const AttentionParams& params) {
    const Shape& shape = config_.shape;
    const int heads = shape.heads, all = heads + shape.kv_heads;
    const bool is_shared = config_.is_shared();
    const auto measure = [&](int t) {
        float* squares = is_shared ? share_.part() : squares_.data();
        for (int h = 0; h < all; h++) {
            squares[static_cast<size_t>(t) * all + h] = kernels_.squares(row_of(t, h), shape.head_dim);
        }
    };
    const auto norm = [&](int t) {
        norm_heads(t, 0, heads, params.query_norm);
        norm_heads(t, heads, shape.kv_heads, params.key_norm);
    };
    const int tokens = run.batch.tokens;
    if (!is_shared) return walk.phase(tokens, [&](int t) { measure(t), norm(t); });
    return walk.phase(tokens, measure) && share_.show(walk, run, all) && walk.phase(tokens, norm);
}

// `gain`: of all ranks' heads; several ranks may have the same ones.
void Attention::norm_heads(int t, int head, int heads, const std::vector<float>& gain) {
    const Shape& shape = config_.shape;
    const int dim = shape.head_dim, ranks = config_.ranks(), size = heads * dim;
    const int sharing = static_cast<int>(static_cast<size_t>(ranks) * size / gain.size());
    const size_t at = static_cast<size_t>(t) * (shape.heads + shape.kv_heads) + head;
    float sum = 0;
    for (int r = 0; r < ranks; r += sharing) {
        const float* squares = (config_.is_shared() ? share_.shown(r) : squares_.data()) + at;
        for (int h = 0; h < heads; h++) sum += squares[h];
    }
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(gain.size()) + config_.eps);
    const float* of = gain.data() + (config_.is_shared() ? share_.rank() / sharing * size : 0);
    float* row = qkv_.data() + (row_of(t, head) - qkv_.data());
    for (int i = 0; i < size; i++) row[i] = row[i] * inverse * of[i];
}

// Writes a head's row of a token, normed where the family does, and turned by its position.
void Attention::rotate(int layer, int t, int head, float* to) const {
    const Shape& shape = config_.shape;
    const AttentionParams& params = layers_[layer];
    const int pairs = static_cast<int>(config_.inv_freq.size());
    const size_t at = (t * ropes_.size() + (params.is_local ? 1 : 0)) * pairs;
    const float *cos = cos_.data() + at, *sin = sin_.data() + at, *row = row_of(t, head);
    const std::vector<float>& gain = head < shape.heads ? params.query_norm : params.key_norm;
    if (!gain.empty() && params.query_norm.size() == static_cast<size_t>(shape.head_dim)) {
        kernels_.rms_norm(row, shape.head_dim, gain.data(), nullptr, config_.eps, to);
        row = to;
    }
    if (config_.switches.interleaved) turn_neighbours(row, pairs, cos, sin, to);
    else kernels_.rope(row, 2 * pairs, cos, sin, to);
    if (row != to) std::copy(row + 2 * pairs, row + shape.head_dim, to + 2 * pairs);
}

void Attention::rotate_query(const Place& of, int t, int head, const Query& to) const {
    float row[kMostDim];
    rotate(of.layer, t, head, row);
    *to.shift = 0;
    quantize_query(is_fresh(of, t) ? fresh_params_[0] : layers_[of.layer], head, row, to);
}

// Whether the cache takes the tokens from t on together.
bool Attention::is_run(const Batch& batch, int t, int end) const {
    return t + Cache::kStored <= end && batch.positions[t] % Cache::kStored == 0 &&
           sequence_of_[t] == sequence_of_[t + Cache::kStored - 1];
}

// Of one token, or of Cache::kStored.
void Attention::rotate_and_store_keys(const Place& of, int t, int count, int kv_head) {
    const Shape& shape = config_.shape;
    const Batch& batch = of.batch;
    float keys[Cache::kStored * kMostDim];
    const size_t dim = shape.head_dim, row = (shape.heads + 2 * static_cast<size_t>(shape.kv_heads)) * dim;
    for (int i = 0; i < count; i++) rotate(of.layer, t + i, shape.heads + kv_head, keys + i * dim);
    const float* v = row_of(t, shape.heads + shape.kv_heads + kv_head);
    const int position = batch.positions[t], sequence = sequence_of_[t], at = position % kPage;
    const auto store = [&](const Cache& cache, int layer, int page) {
        if (count == 1) return cache.store(kernels_, layer, page, at, kv_head, keys, v);
        cache.store_run(kernels_, layer, page, at, kv_head, keys, dim, v, row);
    };
    store(*cache_, of.layer, batch.table(sequence)[position / kPage]);
    if (is_fresh(of, t)) store(*fresh_, 0, fresh_page_[sequence] + position / kPage);
}

void Attention::quantize_query(const AttentionParams& params, int head, const float* q, const Query& to) const {
    const Shape& shape = config_.shape;
    const int dim = shape.head_dim, dq = shape.query_dim();
    const float given = config_.switches.score_multiplier;
    const float root = given != 0 ? given : 1.0f / std::sqrt(static_cast<float>(dim));
    if (params.kind == CacheKind::bf16) {
        for (int d = 0; d < dim; d++) to.real[d] = q[d] * root;
        std::fill(to.real + dim, to.real + dq, 0.0f);
        return;
    }
    if (params.kind == CacheKind::int8) {
        to.sum[0] = kernels_.quantize_heads(q, dim, &params.query_inv[head], nullptr, 0, to.q8);
        std::fill(to.q8 + dim, to.q8 + dq, 0);
        *to.scale = params.score_scale[head];
        return;
    }
    // 16 bit of q * key_scale: high and low half, both signed. Key offsets move all scores alike: softmax forgets them,
    // unless they are softened before.
    const float* key_scale = params.key_scale.data() + head / shape.queries_per_kv() * dim;
    const float* key_offset = params.key_offset.data() + head / shape.queries_per_kv() * dim;
    const bool softens = config_.switches.attention_softcap > 0;
    float largest = 1e-30f;
    for (int d = 0; d < dim; d++) largest = std::max(largest, std::fabs(q[d] * key_scale[d]));
    constexpr float most = 32639.0f;  // 127 * 256 + 127
    const float scale = largest / most;
    int32_t high_sum = 0, low_sum = 0;
    double moved = 0;
    for (int d = 0; d < dq; d++) {
        const float real = d < dim ? q[d] * key_scale[d] / scale : 0.0f;
        // Bounded, for NaN too: no sum of these may leave 32 bits.
        const int value = static_cast<int>(std::nearbyint(real < most ? (real > -most ? real : -most) : most));
        const int high = (value + 128) >> 8, low = value - high * 256;
        to.q8[d] = static_cast<int8_t>(high);
        to.q8[dq + d] = static_cast<int8_t>(low);
        high_sum += high;
        low_sum += low;
        if (softens && d < dim) moved += static_cast<double>(value) * key_offset[d];
    }
    to.sum[0] = high_sum;
    to.sum[1] = low_sum;
    *to.scale = scale * root;
    *to.shift = static_cast<float>(moved) * *to.scale;
}

// Puts a unit's query rows one below the other.
void Attention::gather_queries(const Place& of, const Unit& unit, CacheKind kind, Rows& rows) {
    const int count = unit.rows(), dq = config_.shape.query_dim(), planes = kind == CacheKind::int8x2 ? 2 : 1;
    rows.q8.resize(static_cast<size_t>(count) * planes * dq);
    rows.qf.resize(static_cast<size_t>(count) * dq);
    rows.q_sum.resize(count * planes);
    rows.q_scale.resize(count);
    rows.q_shift.resize(count);
    rows.last.resize(count);
    for (int r = 0; r < count; r++) {
        const int t = unit.first_token + r / unit.heads, head = unit.head + r % unit.heads;
        const Query to{rows.q8.data() + static_cast<size_t>(r) * planes * dq, rows.q_sum.data() + r * planes,
                       rows.q_scale.data() + r, rows.q_shift.data() + r, rows.qf.data() + static_cast<size_t>(r) * dq};
        rows.last[r] = of.batch.positions[t];
        if (of.plan.single) {
            rotate_query(of, t, head, to);
            continue;
        }
        const Query from = query_at(t, head);
        if (kind == CacheKind::bf16) {
            std::copy_n(from.real, dq, to.real);
        } else {
            std::copy_n(from.q8, planes * dq, to.q8);
            std::copy_n(from.sum, planes, to.sum);
            *to.scale = *from.scale;
            *to.shift = *from.shift;
        }
    }
}

// Finds a unit's pages from the position `begin` on.
void Attention::gather_pages(const Place& of, const Unit& unit, int begin, Rows& rows) const {
    const bool fresh = is_fresh(of, unit.first_token);
    const Cache& from = fresh ? *fresh_ : *cache_;
    const int32_t* table = of.batch.table(unit.sequence);
    const int pages = chunk_count(unit.end, kPage), layer = fresh ? 0 : of.layer;
    rows.keys.resize(pages);
    rows.values.resize(pages);
    for (int i = begin / kPage; i < pages; i++) {
        const int page = fresh ? fresh_page_[unit.sequence] + i : table[i];
        rows.keys[i] = from.keys(layer, page, unit.kv_head);
        rows.values[i] = from.values(layer, page, unit.kv_head);
    }
}

int Attention::first_position(const Place& of, const Unit& unit) const {
    const int window = layers_[of.layer].window;
    if (window == 0) return unit.begin;
    return std::max(unit.begin, (of.batch.positions[unit.first_token] - window + 1) / kPage * kPage);
}

// Not from the batch, whose memory a late thread may find given back.
void Attention::prefetch(const AttentionPlan& plan, int layer, int thread) const {
    const int u = thread * plan.turn;
    if (!plan.single || u >= static_cast<int>(plan.units.size())) return;
    const Unit& unit = plan.units[u];
    const int window = layers_[layer].window;
    if (window == 0 || unit.position - window + 1 < unit.begin + kPage) {
        cache_->prefetch(layer, unit.first_page, unit.kv_head);
    }
    cache_->prefetch_place(layer, unit.last_page, unit.position % kPage, unit.kv_head);
}

// Asks for the lines that a token's key and value are going to be written to.
void Attention::prefetch_place(const Place& of, int t, int kv_head) const {
    const int position = of.batch.positions[t];
    const int page = of.batch.table(sequence_of_[t])[position / kPage];
    cache_->prefetch_place(of.layer, page, position % kPage, kv_head);
}

// Lets a kernel bring in what the next unit reads first.
void Attention::ask_for(const Place& of, const Unit& next, AttnRows& in) const {
    const int first = first_position(of, next);
    if (first >= next.end) return;  // a part may lie before the window as a whole
    in.after = cache_->keys(of.layer, of.batch.table(next.sequence)[first / kPage], next.kv_head);
    in.after_columns = std::min(kPage, next.end - first);
    prefetch_place(of, next.first_token, next.kv_head);
}

AttnState Attention::part_state(const Unit& unit, int part) {
    return state_at(partial_.data() + (unit.slot + part) * state_size_);
}

void Attention::attend(const Place& of, const Unit& unit, const Unit* next, Rows& rows) {
    const Shape& shape = config_.shape;
    const AttentionParams& params = layers_[of.layer];
    const CacheKind kind = is_fresh(of, unit.first_token) ? CacheKind::bf16 : params.kind;
    gather_queries(of, unit, kind, rows);
    // The token itself is in the last part of its context.
    if (of.plan.single && unit.end > of.batch.positions[unit.first_token]) {
        rotate_and_store_keys(of, unit.first_token, 1, unit.kv_head);
    }
    const int begin = first_position(of, unit);
    gather_pages(of, unit, begin, rows);
    AttnRows in{kind,
                unit.rows(),
                shape.head_dim,
                rows.q8.data(),
                rows.qf.data(),
                rows.q_sum.data(),
                rows.q_scale.data(),
                rows.q_shift.data(),
                config_.switches.attention_softcap,
                rows.last.data(),
                params.window,
                rows.keys.data(),
                rows.values.data(),
                begin,
                unit.end,
                unit.end,
                nullptr,
                0};
    if (next != nullptr) ask_for(of, *next, in);
    rows.states.resize(2 * state_size_);
    const bool parted = unit.parts > 1;
    const AttnState state = state_at(rows.states.data()), more = state_at(rows.states.data() + state_size_);
    const int start = parted ? unit.begin : begin;
    for (int at = start / kSplit * kSplit; at < unit.end; at += kSplit) {
        in.end = std::min(unit.end, at + kSplit);
        in.first = std::min(std::max(at, begin), in.end);
        const bool first = at <= start;
        kernels_.attend(in, parted ? part_state(unit, (at - unit.begin) / kSplit) : first ? state : more);
        if (!parted && !first) kernels_.merge(state, more, unit.rows(), shape.value_dim());
    }
    if (parted) join_parts(of, unit);
    else write_heads(of, unit, state);
}

// Whoever ends last puts the parts of a tile together, in their order.
void Attention::join_parts(const Place& of, const Unit& unit) {
    const int mine = chunk_count(unit.end - unit.begin, kSplit);
    if (parts_done_[unit.tile].fetch_add(mine) + mine < unit.parts) return;
    const int origin = -unit.begin / kSplit;
    const AttnState state = part_state(unit, origin);
    for (int part = 1; part < unit.parts; part++) {
        kernels_.merge(state, part_state(unit, origin + part), unit.rows(), config_.shape.value_dim());
    }
    parts_done_[unit.tile].store(0);
    write_heads(of, unit, state);
}

void Attention::write_heads(const Place& of, const Unit& unit, AttnState state) {
    const Shape& shape = config_.shape;
    const int dim = shape.head_dim;
    const bool hands = hands_heads(of.o, of.batch.tokens);
    const AttentionParams& params = is_fresh(of, unit.first_token) ? fresh_params_[0] : layers_[of.layer];
    const size_t at = static_cast<size_t>(unit.kv_head) * dim;
    const bool is_scaled = params.kind != CacheKind::bf16;
    const float* scale = is_scaled ? params.value_scale.data() + at : nullptr;
    const float* offset = is_scaled ? params.value_offset.data() + at : nullptr;
    float values[kMostDim];
    for (int r = 0; r < unit.rows(); r++) {
        const int t = unit.first_token + r / unit.heads, head = unit.head + r % unit.heads;
        float* out = hands ? values : heads_.data() + (static_cast<size_t>(t) * shape.heads + head) * dim;
        const float* acc = state.acc + static_cast<size_t>(r) * shape.value_dim();
        kernels_.scale_heads(acc, dim, 1.0f / state.sum[r], offset, scale, out);
        if (hands) products_.hand(of.o, t, head * dim, dim, values);
    }
}

}  // namespace eightfold
