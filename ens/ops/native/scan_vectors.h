// Vectors of ENS_LANES floats, and tiles of them between memory and scratch. Included by scan_kernel.h, inside its
// namespace, once per instruction set (no include guard on purpose).

typedef float vf __attribute__((vector_size(4 * ENS_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * ENS_LANES)));

INLINE vf splat(float value) { return vf{} + value; }
INLINE vf load(const float* from) { return *reinterpret_cast<const vf*>(from); }
INLINE void store(float* to, vf value) { *reinterpret_cast<vf*>(to) = value; }

constexpr float kLog2E = 1.44269504088896341f;

// 2^x, relative error below 2e-7; NaN stays NaN, x below -126 gives 2^-126, above 127 gives 2^127.
INLINE vf exp2(vf x) {
    const vf low = splat(-126.0f), high = splat(127.0f), magic = splat(12582912.0f);  // 1.5·2^23 rounds to integers
    x = low > x ? low : x;
    x = high < x ? high : x;
    const vf shifted = x + magic;
    const vf f = x - (shifted - magic);
    vf p = splat(1.326472718e-3f);  // minimax on [-0.5, 0.5] with 2^0 = 1 exactly: no step, no decay
    p = p * f + 9.671512641e-3f;
    p = p * f + 5.550733743e-2f;
    p = p * f + 2.402224209e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), with log1p(e) = 2 atanh(e / (2 + e)); also its derivative.
INLINE vf softplus(vf x, vf* slope) {
    const vf zero = {};
    const vf e = exp2((x < zero ? x : -x) * kLog2E);
    const vf s = e / (2.0f + e), s2 = s * s;
    vf p = splat(1.0f / 15.0f);
    for (int odd = 13; odd >= 1; odd -= 2) p = p * s2 + 1.0f / static_cast<float>(odd);
    const vf inverse = 1.0f / (1.0f + e);
    *slope = x < zero ? e * inverse : inverse;
    return (x < zero ? zero : x) + 2.0f * s * p;
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp2(x * -kLog2E)); }

// Lanes I of a and b in a row. GCC has the first builtin from 12 on only, Clang has nothing but the first.
template <int... I>
INLINE vf shuffle(vf a, vf b) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, vi{I...});
#endif
}

// Exchange of the off-diagonal squares of side S, for all pairs of rows S apart.
template <int S, int... I>
INLINE void swap_squares(vf* rows, std::integer_sequence<int, I...>) {
    for (int64_t i = 0; i < V; ++i) {
        if (i & S) continue;
        const vf a = rows[i], b = rows[i + S];
        rows[i] = shuffle<(I & S ? ENS_LANES + I - S : I)...>(a, b);
        rows[i + S] = shuffle<(I & S ? ENS_LANES + I : I + S)...>(a, b);
    }
}

template <int S>
INLINE void transpose(vf* rows) {
    if constexpr (S > 0) {
        swap_squares<S>(rows, std::make_integer_sequence<int, ENS_LANES>());
        transpose<S / 2>(rows);
    }
}

// [step][lane] tile of channels [channel, channel + count); lanes beyond are zero.
FN void load_tile(const ScanTensor& from, int64_t batch, int64_t channel, int64_t count, const int32_t* order,
                  int64_t start, int64_t steps, float* tile) {
    const float* base = from.data + batch * from.batch + channel * from.channel;
    if (from.channel == 1) {
        for (int64_t t = 0; t < steps; ++t) {
            const float* at = base + (order ? order[start + t] : start + t) * from.step;
            if (count == V)
                std::memcpy(tile + t * V, at, sizeof(vf));
            else
                for (int64_t lane = 0; lane < V; ++lane) tile[t * V + lane] = lane < count ? at[lane] : 0.0f;
        }
        return;
    }
    int64_t done = 0;
    if (!order && from.step == 1)
        for (; done + V <= steps; done += V) {
            vf rows[ENS_LANES] = {};
            for (int64_t lane = 0; lane < count; ++lane) {
                const float* at = base + lane * from.channel + start + done;
                std::memcpy(rows + lane, at, sizeof(vf));
                __builtin_prefetch(at + kChunk);  // the processor foresees no pattern in so many rows at once
            }
            transpose<ENS_LANES / 2>(rows);
            for (int64_t t = 0; t < V; ++t) store(tile + (done + t) * V, rows[t]);
        }
    for (int64_t lane = 0; lane < V; ++lane)
        for (int64_t t = done; t < steps; ++t)
            tile[t * V + lane] =
                lane < count ? base[lane * from.channel + (order ? order[start + t] : start + t) * from.step] : 0.0f;
}

// Tile of delta, whose rows may serve several channels each.
FN void load_delta(const ScanCall& call, int64_t batch, int64_t channel, int64_t count, const int32_t* order,
                   int64_t start, int64_t steps, float* tile) {
    if (call.per_delta == 1) return load_tile(call.delta, batch, channel, count, order, start, steps, tile);
    const float* base = call.delta.data + batch * call.delta.batch;
    int64_t row[ENS_LANES] = {};
    for (int64_t lane = 0; lane < count; ++lane) row[lane] = (channel + lane) / call.per_delta * call.delta.channel;
    const bool one_row = row[0] == row[count - 1] && count == V;
    for (int64_t t = 0; t < steps; ++t) {
        const float* at = base + (order ? order[start + t] : start + t) * call.delta.step;
        if (one_row)
            store(tile + t * V, splat(at[row[0]]));
        else
            for (int64_t lane = 0; lane < V; ++lane) tile[t * V + lane] = lane < count ? at[row[lane]] : 0.0f;
    }
}

// The way back; `add` sums onto what is there (directions after the first).
FN void store_tile(const ScanTensor& to, int64_t batch, int64_t channel, int64_t count, const int32_t* order,
                   int64_t start, int64_t steps, bool add, const float* tile) {
    float* base = to.data + batch * to.batch + channel * to.channel;
    if (to.channel == 1) {
        for (int64_t t = 0; t < steps; ++t) {
            float* at = base + (order ? order[start + t] : start + t) * to.step;
            if (count == V) {
                vf value = load(tile + t * V), old = {};
                if (add) std::memcpy(&old, at, sizeof old);
                value += old;
                std::memcpy(at, &value, sizeof value);
            } else {
                for (int64_t lane = 0; lane < count; ++lane) at[lane] = tile[t * V + lane] + (add ? at[lane] : 0.0f);
            }
        }
        return;
    }
    int64_t done = 0;
    if (!order && to.step == 1)
        for (; done + V <= steps; done += V) {
            vf rows[ENS_LANES];
            for (int64_t t = 0; t < V; ++t) rows[t] = load(tile + (done + t) * V);
            transpose<ENS_LANES / 2>(rows);
            for (int64_t lane = 0; lane < count; ++lane) {
                float* at = base + lane * to.channel + start + done;
                vf old = {};
                if (add) std::memcpy(&old, at, sizeof old);
                rows[lane] += old;
                std::memcpy(at, rows + lane, sizeof(vf));
                __builtin_prefetch(at + kChunk, 1);
            }
        }
    for (int64_t lane = 0; lane < count; ++lane)
        for (int64_t t = done; t < steps; ++t) {
            float* at = base + lane * to.channel + (order ? order[start + t] : start + t) * to.step;
            *at = tile[t * V + lane] + (add ? *at : 0.0f);
        }
}

// [step][state] rows of B or C.
FN void load_rows(const ScanTensor& from, int64_t batch, int64_t group, int64_t states, const int32_t* order,
                  int64_t start, int64_t steps, float* rows) {
    const float* base = from.data + batch * from.batch + group * from.channel;
    for (int64_t n = 0; n < states; ++n)
        for (int64_t t = 0; t < steps; ++t)
            rows[t * states + n] = base[n * from.state + (order ? order[start + t] : start + t) * from.step];
}

// [state][lane] from a contiguous (…, channels, states) array, times `scale`.
FN void load_states(const float* from, int64_t count, int64_t states, float scale, float* to) {
    for (int64_t n = 0; n < states; ++n)
        for (int64_t lane = 0; lane < V; ++lane)
            to[n * V + lane] = lane < count ? from[lane * states + n] * scale : 0.0f;
}

FN void store_states(const float* from, int64_t count, int64_t states, float* to) {
    for (int64_t n = 0; n < states; ++n)
        for (int64_t lane = 0; lane < count; ++lane) to[lane * states + n] = from[n * V + lane];
}

INLINE vf load_channels(const float* from, int64_t count) {
    vf value = {};
    if (from) std::memcpy(&value, from, count * sizeof(float));
    return value;
}
