// Selective scan for one vector width; included once per instruction set (no include guard on purpose).
//
// A vector holds ENS_LANES channels, so the recurrence needs no sums across lanes and B_t, C_t are plain scalars. Time
// goes in chunks of kChunk steps; within a chunk inputs lie as [step][lane], states as [state][lane].
namespace {
namespace ENS_NAMESPACE {

#define FN ENS_TARGET static
#define INLINE ENS_TARGET static inline __attribute__((always_inline))

constexpr int64_t V = ENS_LANES;

#include "scan_vectors.h"

// Δ in place of the raw delta; `slope` ([step][lane], may be null) receives dΔ/d(raw).
FN void make_delta(const ScanCall& call, vf bias, int64_t steps, float* delta, float* slope) {
    for (int64_t t = 0; t < steps; ++t) {
        vf value = load(delta + t * V) + bias, derivative = splat(1.0f);
        if (call.softplus) value = softplus(value, &derivative);
        store(delta + t * V, value);
        if (slope) store(slope + t * V, derivative);
    }
}

// What a thread keeps of one vector of channels between chunks.
struct Tile {
    int64_t channel, count;  // within the group
    float *decay, *state;    // A·log2(e) and h, both [state][lane]
    float *dstate, *dA;      // backward only
    float *dD, *dbias;       // backward only, one vector each
};

FN int64_t tile_index(const ScanCall& call, int64_t group, int64_t channel) {
    const int64_t tiles = (call.channels / call.groups + V - 1) / V;
    return group * tiles + channel / V;
}

FN float* checkpoint(const ScanCall& call, int64_t batch, int64_t chunk, int64_t tile) {
    // Rows are padded to the widest vector, so the size does not depend on the instruction set.
    const int64_t padded = (call.channels / call.groups + kWidest - 1) / kWidest * kWidest * call.groups;
    const int64_t chunks = (call.length + kChunk - 1) / kChunk;
    return call.checkpoints + ((batch * chunks + chunk) * padded + tile * V) * call.states;
}

// `Alike`: all states of a channel decay alike, one exponential a step.
template <bool Alike>
FN void forward_chunk(const ScanCall& call, const float* B, const float* C, int64_t steps, const float* delta,
                      const float* u, const Tile& tile, float* y) {
    const int64_t states = call.states;
    const float* decay = tile.decay;
    float* state = tile.state;
    for (int64_t t = 0; t < steps; ++t) {
        const vf step = load(delta + t * V), write = step * load(u + t * V);
        const float *Bt = B + t * states, *Ct = C + t * states;
        vf sum = {}, a = exp2(step * load(decay));
        for (int64_t n = 0; n < states; ++n) {
            if constexpr (!Alike) a = exp2(step * load(decay + n * V));
            const vf h = a * load(state + n * V) + write * Bt[n];
            store(state + n * V, h);
            sum += h * Ct[n];
        }
        store(y + t * V, sum);
    }
}

FN void forward(const ScanCall& call, const Unit& unit) {
    const int64_t states = call.states, per_group = call.channels / call.groups;
    const int64_t count = (unit.last - unit.first + V - 1) / V;
    Scratch scratch(2 * count * states * kWidest + 2 * kChunk * states + 4 * kChunk * V + 8 * kWidest);
    float *B = scratch.take(kChunk * states), *C = scratch.take(kChunk * states);
    float *delta = scratch.take(kChunk * V), *u = scratch.take(kChunk * V), *y = scratch.take(kChunk * V);
    float* z = scratch.take(kChunk * V);
    std::vector<Tile> tiles(count);
    for (int64_t i = 0; i < count; ++i) {
        tiles[i].channel = unit.first + i * V;
        tiles[i].count = std::min<int64_t>(V, unit.last - tiles[i].channel);
        tiles[i].decay = scratch.take(states * V);
        tiles[i].state = scratch.take(states * V);
    }
    for (int64_t group = unit.group; group < unit.group_end; ++group) {
        const int32_t* order = call.order ? call.order + group * call.length : nullptr;
        for (const Tile& tile : tiles) {
            load_states(call.A + (group * per_group + tile.channel) * call.decays, tile.count, call.decays, kLog2E,
                        tile.decay);
            std::memset(tile.state, 0, states * sizeof(vf));
        }
        for (int64_t start = 0; start < call.length; start += kChunk) {
            const int64_t steps = std::min(kChunk, call.length - start);
            load_rows(call.B, unit.batch, group, states, order, start, steps, B);
            load_rows(call.C, unit.batch, group, states, order, start, steps, C);
            for (const Tile& tile : tiles) {
                const int64_t channel = group * per_group + tile.channel;
                const int64_t in = call.shared ? tile.channel : channel, out = call.summed ? tile.channel : channel;
                if (call.checkpoints)
                    std::memcpy(checkpoint(call, unit.batch, start / kChunk, tile_index(call, group, tile.channel)),
                                tile.state, states * sizeof(vf));
                load_delta(call, unit.batch, channel, tile.count, order, start, steps, delta);
                load_tile(call.u, unit.batch, in, tile.count, order, start, steps, u);
                make_delta(call, load_channels(call.bias ? call.bias + channel : nullptr, tile.count), steps, delta,
                           nullptr);
                (call.decays == 1 ? forward_chunk<true> : forward_chunk<false>)(call, B, C, steps, delta, u, tile, y);
                if (call.D) {
                    const vf skip = load_channels(call.D + channel, tile.count);
                    for (int64_t t = 0; t < steps; ++t) store(y + t * V, load(y + t * V) + load(u + t * V) * skip);
                }
                if (call.z.data) {
                    load_tile(call.z, unit.batch, out, tile.count, order, start, steps, z);
                    for (int64_t t = 0; t < steps; ++t) {
                        const vf gate = load(z + t * V);
                        store(y + t * V, load(y + t * V) * gate * sigmoid(gate));
                    }
                }
                store_tile(call.y, unit.batch, out, tile.count, order, start, steps, call.summed && group > unit.group, y);
            }
        }
        for (const Tile& tile : tiles)
            store_states(tile.state, tile.count, states,
                         call.last_state + (unit.batch * call.channels + group * per_group + tile.channel) * states);
    }
}

// Sums over lanes of V vectors at once: item i of width W takes half its lanes per level.
template <int W, int... I>
INLINE vf fold(vf a, vf b, std::integer_sequence<int, I...>) {
    return shuffle<(I / (W / 2) * W + I % (W / 2))...>(a, b) +
           shuffle<(I / (W / 2) * W + I % (W / 2) + W / 2)...>(a, b);
}

template <int W>
INLINE vf sum_lanes(const float* vectors) {  // V / W vectors a level: the caller asks for W = 2, all V of them
    if constexpr (W > ENS_LANES) {
        return load(vectors);
    } else {
        const vf a = sum_lanes<W * 2>(vectors), b = sum_lanes<W * 2>(vectors + V / W * V);
        return fold<W>(a, b, std::make_integer_sequence<int, ENS_LANES>());
    }
}

struct BackwardScratch {
    float *B, *C, *delta, *slope, *u, *dy, *z, *dz, *du, *h, *a, *accB, *accC;
};

// States of the chunk from its checkpoint: h has one row more than steps, h[0] is what entered.
template <bool Alike>
FN void recompute_chunk(const ScanCall& call, int64_t steps, const Tile& tile, const BackwardScratch& s) {
    const int64_t states = call.states;
    for (int64_t t = 0; t < steps; ++t) {
        const vf step = load(s.delta + t * V), write = step * load(s.u + t * V);
        const float* Bt = s.B + t * states;
        const float* before = s.h + t * states * V;
        vf a = exp2(step * load(tile.decay));
        if constexpr (Alike) store(s.a + t * V, a);
        for (int64_t n = 0; n < states; ++n) {
            if constexpr (!Alike) {
                a = exp2(step * load(tile.decay + n * V));
                store(s.a + (t * states + n) * V, a);
            }
            store(s.h + ((t + 1) * states + n) * V, a * load(before + n * V) + write * Bt[n]);
        }
    }
}

// Gate: dy becomes the gradient before the gate, dz is filled. Needs y, hence the states.
FN void backward_gate(const ScanCall& call, vf skip, int64_t steps, const BackwardScratch& s) {
    const int64_t states = call.states;
    for (int64_t t = 0; t < steps; ++t) {
        vf y = load(s.u + t * V) * skip;
        for (int64_t n = 0; n < states; ++n) y += load(s.h + ((t + 1) * states + n) * V) * s.C[t * states + n];
        const vf z = load(s.z + t * V), half = sigmoid(z), dy = load(s.dy + t * V);
        store(s.dz + t * V, dy * y * half * (1.0f + z * (1.0f - half)));
        store(s.dy + t * V, dy * z * half);
    }
}

template <bool Alike>
FN void backward_chunk(const ScanCall& call, int64_t steps, vf skip, const Tile& tile, const BackwardScratch& s) {
    const int64_t states = call.states;
    const vf to_natural = splat(1.0f / kLog2E);
    vf dD = load(tile.dD), dbias = load(tile.dbias);
    for (int64_t t = steps - 1; t >= 0; --t) {
        const vf dy = load(s.dy + t * V), step = load(s.delta + t * V), u = load(s.u + t * V), write = step * u;
        const float *Bt = s.B + t * states, *Ct = s.C + t * states;
        const float *before = s.h + t * states * V, *after = before + states * V;
        const float* decays = s.a + (Alike ? t : t * states) * V;
        float *accB = s.accB + t * states * V, *accC = s.accC + t * states * V;
        vf dwrite = {}, dstep = {}, a = load(decays);
        for (int64_t n = 0; n < states; ++n) {
            if constexpr (!Alike) a = load(decays + n * V);
            const vf dh = load(tile.dstate + n * V) + dy * Ct[n];
            store(accC + n * V, load(accC + n * V) + dy * load(after + n * V));
            store(accB + n * V, load(accB + n * V) + dh * write);
            dwrite += dh * Bt[n];
            const vf entering = dh * a, dexponent = entering * load(before + n * V);
            store(tile.dstate + n * V, entering);
            if constexpr (Alike) {
                dstep += dexponent;
            } else {
                dstep += dexponent * load(tile.decay + n * V);
                store(tile.dA + n * V, load(tile.dA + n * V) + dexponent * step);
            }
        }
        if constexpr (Alike) {
            store(tile.dA, load(tile.dA) + dstep * step);
            dstep *= load(tile.decay);
        }
        const vf ddelta = (dstep * to_natural + dwrite * u) * load(s.slope + t * V);
        store(s.du + t * V, dwrite * step + dy * skip);
        store(s.slope + t * V, ddelta);
        dD += dy * u;
        dbias += ddelta;
    }
    store(tile.dD, dD);
    store(tile.dbias, dbias);
}

FN void backward(const ScanCall& call, const Unit& unit) {
    const int64_t states = call.states, per_group = call.channels / call.groups;
    const int64_t count = (unit.last - unit.first + V - 1) / V;
    const int64_t block = kChunk * states * V;
    Scratch scratch(3 * count * (states + 1) * kWidest + 2 * kChunk * states + 8 * kChunk * V + 4 * block + states * V +
                    32 * kWidest);
    BackwardScratch s;
    s.B = scratch.take(kChunk * states), s.C = scratch.take(kChunk * states);
    s.delta = scratch.take(kChunk * V), s.slope = scratch.take(kChunk * V), s.u = scratch.take(kChunk * V);
    s.dy = scratch.take(kChunk * V), s.z = scratch.take(kChunk * V), s.dz = scratch.take(kChunk * V);
    s.du = scratch.take(kChunk * V), s.h = scratch.take(block + states * V), s.a = scratch.take(block);
    s.accB = scratch.take(block), s.accC = scratch.take(block);
    std::vector<Tile> tiles(count);
    for (int64_t i = 0; i < count; ++i) {
        tiles[i].channel = unit.first + i * V;
        tiles[i].count = std::min<int64_t>(V, unit.last - tiles[i].channel);
        tiles[i].decay = scratch.take(states * V);
        tiles[i].dstate = scratch.take(states * V);
        tiles[i].dA = scratch.take(states * V);
        tiles[i].dD = scratch.take(V);
        tiles[i].dbias = scratch.take(V);
    }
    for (int64_t group = unit.group; group < unit.group_end; ++group) {
        const int32_t* order = call.order ? call.order + group * call.length : nullptr;
        const int64_t offset = unit.batch * call.channels + group * per_group;
        for (const Tile& tile : tiles) {
            load_states(call.A + (group * per_group + tile.channel) * call.decays, tile.count, call.decays, kLog2E,
                        tile.decay);
            if (call.dlast)
                load_states(call.dlast + (offset + tile.channel) * states, tile.count, states, 1.0f, tile.dstate);
            else
                std::memset(tile.dstate, 0, states * sizeof(vf));
            std::memset(tile.dA, 0, states * sizeof(vf));
            store(tile.dD, vf{});
            store(tile.dbias, vf{});
        }
        const int64_t chunks = (call.length + kChunk - 1) / kChunk;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            const int64_t start = chunk * kChunk, steps = std::min(kChunk, call.length - start);
            load_rows(call.B, unit.batch, group, states, order, start, steps, s.B);
            load_rows(call.C, unit.batch, group, states, order, start, steps, s.C);
            std::memset(s.accB, 0, block * sizeof(float));
            std::memset(s.accC, 0, block * sizeof(float));
            for (const Tile& tile : tiles) {
                const int64_t channel = group * per_group + tile.channel;
                const int64_t in = call.shared ? tile.channel : channel, out = call.summed ? tile.channel : channel;
                load_delta(call, unit.batch, channel, tile.count, order, start, steps, s.delta);
                load_tile(call.u, unit.batch, in, tile.count, order, start, steps, s.u);
                load_tile(call.dy, unit.batch, out, tile.count, order, start, steps, s.dy);
                make_delta(call, load_channels(call.bias ? call.bias + channel : nullptr, tile.count), steps, s.delta,
                           s.slope);
                std::memcpy(s.h, checkpoint(call, unit.batch, chunk, tile_index(call, group, tile.channel)),
                            states * sizeof(vf));
                (call.decays == 1 ? recompute_chunk<true> : recompute_chunk<false>)(call, steps, tile, s);
                const vf skip = load_channels(call.D ? call.D + channel : nullptr, tile.count);
                const bool add = group > unit.group;  // only where the unit owns all groups: u is shared
                if (call.z.data) {
                    load_tile(call.z, unit.batch, out, tile.count, order, start, steps, s.z);
                    backward_gate(call, skip, steps, s);
                    store_tile(call.dz, unit.batch, out, tile.count, order, start, steps, call.summed && add, s.dz);
                }
                (call.decays == 1 ? backward_chunk<true> : backward_chunk<false>)(call, steps, skip, tile, s);
                store_tile(call.ddelta, unit.batch, channel, tile.count, order, start, steps, false, s.slope);
                store_tile(call.du, unit.batch, in, tile.count, order, start, steps, add, s.du);
            }
            // Sums over channels, in place: V results take the room of the first vector read.
            const int64_t row = (unit.split * call.batch + unit.batch) * call.groups + group;
            for (int which = 0; which < 2; ++which) {
                float *acc = which ? s.accC : s.accB, *sums = (which ? call.dC : call.dB) + row * call.length * states;
                for (int64_t i = 0; i < kChunk * states; i += V) store(acc + i, sum_lanes<2>(acc + i * V));
                for (int64_t t = 0; t < steps; ++t)
                    std::memcpy(sums + (order ? order[start + t] : start + t) * states, acc + t * states,
                                states * sizeof(float));
            }
        }
        for (const Tile& tile : tiles) {
            store_states(tile.dA, tile.count, call.decays, call.dA + (offset + tile.channel) * call.decays);
            std::memcpy(call.dD + offset + tile.channel, tile.dD, tile.count * sizeof(float));
            std::memcpy(call.dbias + offset + tile.channel, tile.dbias, tile.count * sizeof(float));
        }
    }
}

#undef FN
#undef INLINE
}  // namespace ENS_NAMESPACE
}  // namespace
