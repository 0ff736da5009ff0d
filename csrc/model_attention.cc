// Attention of a step: rotate and store the new tokens, then softmax over the cache in units of a few query rows.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace eightfold {

namespace {

constexpr int kStoreTokens = 8;

// The state of `rows` rows in memory of kMaxAttnRows * (2 + value_dim) floats.
AttnState state_at(float* memory) { return {memory, memory + kMaxAttnRows, memory + 2 * kMaxAttnRows}; }

}  // namespace

bool Model::attention_phases(Pool::Walk& walk, const Step& step, int layer, const Group& next) {
    const int tokens = step.batch.tokens;
    if (!step.single && !walk.phase((tokens + kStoreTokens - 1) / kStoreTokens, [&](int i) {
            const int first = i * kStoreTokens, end = std::min(tokens, first + kStoreTokens);
            for (int t = first; t < end; t += Cache::kStored)
                for (int g = 0; g < config_.shape.kv_heads; g++) prefetch_place(step.batch, layer, t, g);
            for (int t = first; t < end; t++)
                for (int h = 0; h < config_.shape.heads; h++) rotate_query(step, layer, t, h, query_at(t, h));
            for (int t = first; t < end;) {
                const int count = is_run(step.batch, t, end) ? Cache::kStored : 1;
                for (int g = 0; g < config_.shape.kv_heads; g++) rotate_and_store_keys(step, layer, t, count, g);
                t += count;
            }
        })) {
        return false;
    }
    const int units = static_cast<int>(step.units.size());
    return walk.phase(
        chunk_count(units, step.turn),
        [&](int i) {
            const int end = std::min(units, (i + 1) * step.turn);
            for (int u = i * step.turn; u < end; u++) {
                const int later = u + 1 < end ? u + 1 : (i + threads()) * step.turn;
                const Unit* after = later < units && step.single ? &step.units[later] : nullptr;
                attend(step, layer, step.units[u], after, scratch_[walk.thread()]);
            }
        },
        [&] { next.prefetch(tokens, walk.thread()); });
}

Model::Query Model::query_at(int t, int head) {
    const size_t at = static_cast<size_t>(t) * config_.shape.heads + head, dq = config_.shape.query_dim();
    return {q8_.data() + at * 2 * dq, q_sum_.data() + at * 2, q_scale_.data() + at, qf_.data() + at * dq};
}

// Writes a head's row of a token, normed where the family does, and turned by its position.
void Model::rotate(int layer, int t, int head, float* to) {
    const Shape& shape = config_.shape;
    const size_t at = static_cast<size_t>(t) * shape.head_dim / 2;
    const std::vector<float>& gain = head < shape.heads ? attention[layer].query_norm : attention[layer].key_norm;
    const float* row = head_row(t, head);
    if (!gain.empty()) {
        kernels_.rms_norm(row, shape.head_dim, gain.data(), nullptr, config_.eps, to);
        row = to;
    }
    kernels_.rope(row, shape.head_dim, cos_.data() + at, sin_.data() + at, to);
}

void Model::rotate_query(const Step& step, int layer, int t, int head, const Query& to) {
    float row[512];
    rotate(layer, t, head, row);
    quantize_query(is_fresh(step.batch, layer, t) ? fresh_params_[0] : attention[layer], head, row, to);
}

// Whether the cache takes the tokens from t on together.
bool Model::is_run(const Batch& batch, int t, int end) const {
    return t + Cache::kStored <= end && batch.positions[t] % Cache::kStored == 0 &&
           sequence_of_[t] == sequence_of_[t + Cache::kStored - 1];
}

// Of one token, or of Cache::kStored.
void Model::rotate_and_store_keys(const Step& step, int layer, int t, int count, int kv_head) {
    const Shape& shape = config_.shape;
    const Batch& batch = step.batch;
    float keys[Cache::kStored * 512];
    const size_t dim = shape.head_dim, row = (shape.heads + 2 * static_cast<size_t>(shape.kv_heads)) * dim;
    for (int i = 0; i < count; i++) rotate(layer, t + i, shape.heads + kv_head, keys + i * dim);
    const float* v = head_row(t, shape.heads + shape.kv_heads + kv_head);
    const int position = batch.positions[t], sequence = sequence_of_[t], at = position % kPage;
    const auto store = [&](const Cache& cache, int of_layer, int page) {
        if (count == 1) return cache.store(kernels_, of_layer, page, at, kv_head, keys, v);
        cache.store_run(kernels_, of_layer, page, at, kv_head, keys, dim, v, row);
    };
    store(*cache_, layer, batch.tables[static_cast<size_t>(sequence) * batch.table_width + position / kPage]);
    if (is_fresh(batch, layer, t)) store(*fresh_, 0, fresh_page_[sequence] + position / kPage);
}

void Model::quantize_query(const AttentionParams& params, int head, const float* q, const Query& to) const {
    const Shape& shape = config_.shape;
    const int dim = shape.head_dim, dq = shape.query_dim();
    const float root = 1.0f / std::sqrt(static_cast<float>(dim));
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
    // 16 bit of q * key_scale: high and low half, both signed. Key offsets move all scores alike: softmax forgets them.
    const float* key_scale = params.key_scale.data() + head / shape.queries_per_kv() * dim;
    float largest = 1e-30f;
    for (int d = 0; d < dim; d++) largest = std::max(largest, std::fabs(q[d] * key_scale[d]));
    const float scale = largest / 32639.0f;  // 127 * 256 + 127
    int32_t high_sum = 0, low_sum = 0;
    for (int d = 0; d < dq; d++) {
        const int value = d < dim ? static_cast<int>(std::nearbyint(q[d] * key_scale[d] / scale)) : 0;
        const int high = (value + 128) >> 8, low = value - high * 256;
        to.q8[d] = static_cast<int8_t>(high);
        to.q8[dq + d] = static_cast<int8_t>(low);
        high_sum += high;
        low_sum += low;
    }
    to.sum[0] = high_sum;
    to.sum[1] = low_sum;
    *to.scale = scale * root;
}

// Puts a unit's query rows one below the other.
void Model::gather_queries(const Step& step, int layer, const Unit& unit, CacheKind kind, Scratch& scratch) {
    const int rows = row_len(unit), dq = config_.shape.query_dim(), planes = kind == CacheKind::int8x2 ? 2 : 1;
    scratch.q8.resize(static_cast<size_t>(rows) * planes * dq);
    scratch.qf.resize(static_cast<size_t>(rows) * dq);
    scratch.q_sum.resize(rows * planes);
    scratch.q_scale.resize(rows);
    scratch.last.resize(rows);
    for (int r = 0; r < rows; r++) {
        const int t = unit.first_token + r / unit.heads, head = unit.head + r % unit.heads;
        const Query to{scratch.q8.data() + static_cast<size_t>(r) * planes * dq, scratch.q_sum.data() + r * planes,
                       scratch.q_scale.data() + r, scratch.qf.data() + static_cast<size_t>(r) * dq};
        scratch.last[r] = step.batch.positions[t];
        if (step.single) {
            rotate_query(step, layer, t, head, to);
            continue;
        }
        const Query from = query_at(t, head);
        if (kind == CacheKind::bf16) {
            std::copy_n(from.real, dq, to.real);
        } else {
            std::copy_n(from.q8, planes * dq, to.q8);
            std::copy_n(from.sum, planes, to.sum);
            *to.scale = *from.scale;
        }
    }
}

int Model::first_position(int layer, const Batch& batch, const Unit& unit) const {
    const int window = attention[layer].window;
    if (window == 0) return unit.begin;
    return std::max(unit.begin, (batch.positions[unit.first_token] - window + 1) / kPage * kPage);
}

// Asks for what unit `u` reads first, if there is one. Between chunks, so not from the batch, whose memory a late thread
// may find given back.
void Model::prefetch_unit(const Step& step, int layer, int u) const {
    if (u >= static_cast<int>(step.units.size())) return;
    const Unit& unit = step.units[u];
    const int window = attention[layer].window;
    if (window == 0 || unit.position - window + 1 < unit.begin + kPage) {
        cache_->prefetch(layer, unit.first_page, unit.kv_head);
    }
    cache_->prefetch_place(layer, unit.last_page, unit.position % kPage, unit.kv_head);
}

// Asks for the lines that a token's key and value are going to be written to.
void Model::prefetch_place(const Batch& batch, int layer, int t, int kv_head) const {
    const int position = batch.positions[t];
    const int32_t* table = batch.tables + static_cast<size_t>(sequence_of_[t]) * batch.table_width;
    cache_->prefetch_place(layer, table[position / kPage], position % kPage, kv_head);
}

void Model::attend(const Step& step, int layer, const Unit& unit, const Unit* next, Scratch& scratch) {
    const Shape& shape = config_.shape;
    const Batch& batch = step.batch;
    const bool fresh = is_fresh(batch, layer, unit.first_token);
    const AttentionParams& params = attention[layer];
    const CacheKind kind = fresh ? CacheKind::bf16 : params.kind;
    const int rows = row_len(unit);
    gather_queries(step, layer, unit, kind, scratch);
    // The token itself is in the last part of its context.
    if (step.single && unit.end > batch.positions[unit.first_token]) {
        rotate_and_store_keys(step, layer, unit.first_token, 1, unit.kv_head);
    }
    const int begin = first_position(layer, batch, unit);
    const int32_t* table = batch.tables + static_cast<size_t>(unit.sequence) * batch.table_width;
    const int pages = (unit.end + kPage - 1) / kPage;
    scratch.keys.resize(pages);
    scratch.values.resize(pages);
    for (int i = begin / kPage; i < pages; i++) {
        const Cache& from = fresh ? *fresh_ : *cache_;
        const int page = fresh ? fresh_page_[unit.sequence] + i : table[i], of_layer = fresh ? 0 : layer;
        scratch.keys[i] = from.keys(of_layer, page, unit.kv_head);
        scratch.values[i] = from.values(of_layer, page, unit.kv_head);
    }
    AttnRows in{kind,
                rows,
                shape.head_dim,
                scratch.q8.data(),
                scratch.qf.data(),
                scratch.q_sum.data(),
                scratch.q_scale.data(),
                scratch.last.data(),
                params.window,
                scratch.keys.data(),
                scratch.values.data(),
                begin,
                unit.end,
                unit.end,
                nullptr,
                0};
    const int first = next != nullptr ? first_position(layer, batch, *next) : 0;
    if (next != nullptr && first < next->end) {  // a part may lie before the window as a whole
        const int32_t* pages_of = batch.tables + static_cast<size_t>(next->sequence) * batch.table_width;
        in.after = cache_->keys(layer, pages_of[first / kPage], next->kv_head);
        in.after_columns = std::min(kPage, next->end - first);
        prefetch_place(batch, layer, next->first_token, next->kv_head);
    }
    scratch.states.resize(2 * partial_stride_);
    const bool parted = unit.parts > 1;
    const auto slot = [&](int i) { return state_at(partial_.data() + (unit.slot + i) * partial_stride_); };
    const AttnState state = state_at(scratch.states.data());
    const int start = parted ? unit.begin : begin;
    for (int at = start / kSplit * kSplit; at < unit.end; at += kSplit) {
        in.end = std::min(unit.end, at + kSplit);
        in.first = std::min(std::max(at, begin), in.end);
        const bool first = at <= start;
        const AttnState to = parted  ? slot((at - unit.begin) / kSplit)
                             : first ? state
                                     : state_at(scratch.states.data() + partial_stride_);
        kernels_.attend(in, to);
        if (!parted && !first) kernels_.merge(state, to, rows, shape.value_dim());
    }
    if (!parted) return write_heads(step, layer, unit, state);
    // Whoever ends last puts the parts together, in their order.
    const int mine = chunk_count(unit.end - unit.begin, kSplit);
    if (parts_done_[unit.tile].fetch_add(mine) + mine < unit.parts) return;
    const int origin = -unit.begin / kSplit;
    for (int part = 1; part < unit.parts; part++) {
        kernels_.merge(slot(origin), slot(origin + part), rows, shape.value_dim());
    }
    parts_done_[unit.tile].store(0);
    write_heads(step, layer, unit, slot(origin));
}

void Model::write_heads(const Step& step, int layer, const Unit& unit, AttnState state) {
    const Shape& shape = config_.shape;
    const int dim = shape.head_dim;
    const bool fresh = is_fresh(step.batch, layer, unit.first_token), hands = hands_heads(step, layers[layer]);
    const AttentionParams& params = fresh ? fresh_params_[0] : attention[layer];
    const size_t at = static_cast<size_t>(unit.kv_head) * dim;
    const bool is_scaled = params.kind != CacheKind::bf16;
    const float* scale = is_scaled ? params.value_scale.data() + at : nullptr;
    const float* offset = is_scaled ? params.value_offset.data() + at : nullptr;
    float values[512];
    for (int r = 0; r < row_len(unit); r++) {
        const int t = unit.first_token + r / unit.heads, head = unit.head + r % unit.heads;
        float* out = hands ? values : heads_.data() + (static_cast<size_t>(t) * shape.heads + head) * dim;
        kernels_.scale_heads(state.acc + static_cast<size_t>(r) * shape.value_dim(), dim, 1.0f / state.sum[r], offset,
                             scale, out);
        if (hands) hand_head(layers[layer].o, t, head, values);
    }
}

// One head's part of the input of a linear, for one token.
void Model::hand_head(const Group& next, int t, int head, const float* values) {
    const int dim = config_.shape.head_dim;
    const Form& form = next.forms[0];
    uint8_t row[512 + kAlign];
    kernels_.quantize_static(values, dim, form.inv_scale, form.offset, row);
    const size_t block = kLanes * row_bytes(next.inputs()), column = static_cast<size_t>(head) * dim * kLanes;
    uint8_t* to = handed_[0].bytes.data() + t / kLanes * block + column + t % kLanes * 4;
    for (int d = 0; d < dim; d += 4) std::memcpy(to + d * kLanes, row + d, 4);
}

}  // namespace eightfold
