#include "products.h"

#include <algorithm>
#include <cstring>

namespace eightfold {

Products::Products(const ModelConfig& config, const Kernels& kernels, Pool& pool, Share& share)
    : config_(config), kernels_(kernels), pool_(pool), share_(share), scratch_(pool.threads()), own_(pool.threads()) {}

void Products::take(Group& group) {
    group.eps = config_.eps;
    group.symmetric_tokens = config_.symmetric_tokens;
    group.find_forms();
    group.make_chunks(pool_.threads());
    if (group.has_floating()) real_width_ = std::max(real_width_, group.inputs());
    if (group.forms.size() <= prepared_.size()) return;
    prepared_.resize(group.forms.size());
    for (Own& own : own_) own.prepared.resize(group.forms.size());
}

void Products::reserve_tokens(int tokens) {
    const int heads = config_.shape.heads * config_.shape.head_dim;
    const int widest = std::max({config_.hidden, config_.intermediate, heads});
    handed_[0].reserve(tokens, widest);
    for (Prepared& prepared : prepared_) {
        prepared.reserve_real(tokens, real_width_);
        prepared.reserve(tokens, std::max(widest, real_width_));
    }
}

Token Products::token_of(const Run& run, const Input& input, int t) const {
    const int row = input.rows != nullptr ? input.rows[t] : t;
    return {input.x + static_cast<size_t>(row) * input.group.inputs(), t, run.batch.origin(row)};
}

bool Products::prepare(Pool::Walk& walk, const Run& run, const Input& input) {
    if (run.alone || input.handed) return true;
    const Group& group = input.group;
    const Layout layout = group.keeps_rows ? Layout::rows : layout_of(input.tokens);
    const bool of_share = group.linears.front().keeps_sums && share_.needs_ranges(group);
    const int size = layout == Layout::packed ? kLanes : 1;
    return walk.phase(chunk_count(input.tokens, size), [&](int i) {
        Scratch& scratch = scratch_[walk.thread()];
        for (int t = i * size; t < std::min(input.tokens, (i + 1) * size); t++) {
            const Token token = token_of(run, input, t);
            if (of_share) share_.prepare(group, token, layout, prepared_, scratch);
            else group.prepare(kernels_, token, layout, prepared_, scratch);
        }
        if (layout == Layout::packed) group.pack(kernels_, i, prepared_, scratch);
    });
}

const std::vector<Prepared>& Products::prepared(const Run& run, const Input& input, int thread) {
    if (input.handed) return handed_;
    if (!run.alone) return prepared_;
    const Group& group = input.group;
    Own& own = own_[thread];
    if (own.run == run.id && own.group == &group && own.rows == input.rows && own.tokens == input.tokens) {
        return own.prepared;
    }
    own.run = run.id;
    own.group = &group;
    own.rows = input.rows;
    own.tokens = input.tokens;
    for (Prepared& prepared : own.prepared) {
        prepared.reserve(input.tokens, group.inputs());
        if (group.has_floating()) prepared.reserve_real(input.tokens, group.inputs());
    }
    for (int t = 0; t < input.tokens; t++) {
        group.prepare(kernels_, token_of(run, input, t), Layout::rows, own.prepared, scratch_[thread]);
    }
    return own.prepared;
}

Piece Products::piece_of(const Input& input, int chunk) const {
    const int blocks = chunk_count(input.tokens, kTokenBlock), t0 = chunk % blocks * kTokenBlock;
    const Chunk& rows = input.group.chunks(input.tokens)[chunk / blocks];
    return {rows.linear, rows.begin, rows.count, t0, std::min(input.tokens, t0 + kTokenBlock)};
}

void Products::multiply_chunk(const Run& run, const Input& input, int i, Output out, int thread) {
    const Group& group = input.group;
    const Piece whole = piece_of(input, i);
    const Layout layout = layout_of(input.tokens);
    if (layout == Layout::packed) group.prefetch(input.tokens, i + pool_.threads());
    size_t column = 0;
    for (int j = 0; j < whole.linear; j++) column += group.linears[j].outputs;
    uint8_t generated[kTokenBlock];
    for (int t = whole.t0; t < whole.t1; t++) {
        generated[t - whole.t0] = run.batch.generated[input.rows != nullptr ? input.rows[t] : t];
    }
    const Source from{prepared(run, input, thread), layout, generated};
    by_rows({whole.linear, whole.begin, whole.count}, input.tokens, [&](int n, int count) {
        float* y = out.y + whole.t0 * out.ld + column + n;
        group.multiply(kernels_, {whole.linear, n, count, whole.t0, whole.t1}, from, {y, out.ld, out.adds},
                       scratch_[thread]);
    });
}

bool Products::takes_handed(const Group& group, int tokens) const {
    return layout_of(tokens) == Layout::packed && group.linears.size() == 1 &&
           group.linears[0].kind == LinearKind::w8a8;
}

void Products::hand(const Group& to, int t, int column, int count, const float* values) {
    const Form& form = to.forms[0];
    uint8_t row[512 + kAlign];
    kernels_.quantize_static(values, count, form.inv_scale, form.offset, row);
    const size_t block = kLanes * row_bytes(to.inputs());
    uint8_t* at = handed_[0].bytes.data() + t / kLanes * block + static_cast<size_t>(column) * kLanes + t % kLanes * 4;
    for (int d = 0; d < count; d += 4) std::memcpy(at + d * kLanes, row + d, 4);
}

void Products::hand_block(const Group& to, const Piece& piece, const float* values, int thread) {
    const Form& form = to.forms[0];
    Lines<uint8_t>& rows = scratch_[thread].rows;
    rows.resize(std::max(rows.size(), static_cast<size_t>(kTokenBlock) * kManyRows));
    for (int t = 0; t < piece.t1 - piece.t0; t++) {
        kernels_.quantize_static(values + t * piece.count, piece.count, form.inv_scale, form.offset,
                                 rows.data() + t * kManyRows);
    }
    const size_t block = kLanes * row_bytes(to.inputs());
    for (int t = piece.t0; t < piece.t1; t += kLanes) {
        kernels_.pack(rows.data() + static_cast<size_t>(t - piece.t0) * kManyRows, kManyRows,
                      handed_[0].bytes.data() + t / kLanes * block + static_cast<size_t>(piece.begin) * kLanes);
    }
}

}  // namespace eightfold
