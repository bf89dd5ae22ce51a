// Run-time dispatch over instruction sets, and threads.
#include "scan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kWidest = 16;

// A part of the work that no other thread touches: channels [first, last) of group(s) [group, group_end) of one image.
struct Unit {
    int64_t batch, group, group_end, first, last, split;
};

struct Scratch {  // 64-byte aligned floats, given out front to back
    explicit Scratch(int64_t floats)
        : begin(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))), next(begin) {}
    ~Scratch() { ::operator delete(begin, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t floats) {
        float* result = next;
        next += (floats + kWidest - 1) / kWidest * kWidest;
        return result;
    }
    float *begin, *next;
};

}  // namespace

#define ENS_LANES 4
#define ENS_NAMESPACE portable
#define ENS_TARGET
#include "scan_kernel.h"
#undef ENS_LANES
#undef ENS_NAMESPACE
#undef ENS_TARGET

#if defined(__x86_64__)
#define ENS_LANES 8
#define ENS_NAMESPACE avx2
#define ENS_TARGET __attribute__((target("avx2,fma")))
#include "scan_kernel.h"
#undef ENS_LANES
#undef ENS_NAMESPACE
#undef ENS_TARGET

#define ENS_LANES 16
#define ENS_NAMESPACE avx512
#define ENS_TARGET __attribute__((target("avx512f,avx512dq,avx2,fma")))
#include "scan_kernel.h"
#undef ENS_LANES
#undef ENS_NAMESPACE
#undef ENS_TARGET
#endif

namespace {

int64_t widest_lanes() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

int64_t lanes_of(const ScanCall& call) {
    const int64_t widest = widest_lanes();
    return call.lanes == 0 ? widest : std::min(call.lanes, widest);
}

// Channels of a group are divided at multiples of the vector width; shared u forces one unit to own all directions.
std::vector<Unit> divide(const ScanCall& call, int64_t lanes) {
    std::vector<Unit> units;
    const int64_t per_group = call.channels / call.groups;
    const int64_t tiles = (per_group + lanes - 1) / lanes;
    for (int64_t batch = 0; batch < call.batch; ++batch)
        for (int64_t group = 0; group < (call.shared ? 1 : call.groups); ++group)
            for (int64_t split = 0; split < call.splits; ++split) {
                const int64_t first = tiles * split / call.splits * lanes;
                const int64_t last = std::min(tiles * (split + 1) / call.splits * lanes, per_group);
                units.push_back({batch, group, call.shared ? call.groups : group + 1, first, last, split});
            }
    return units;
}

// OpenMP, and not threads of our own: this is PyTorch's pool, whose workers spin between operators and would compete.
// Compiled without OpenMP it is a plain loop.
template <typename Work>
int run_parallel(const std::vector<Unit>& units, int64_t threads, Work work) {
    std::atomic<size_t> next{0};
    std::atomic<int> status{0};
    [[maybe_unused]] const int team = static_cast<int>(std::min<int64_t>(threads, units.size()));
#pragma omp parallel num_threads(team) if (team > 1)
    try {
        for (size_t i = next++; i < units.size(); i = next++) work(units[i]);
    } catch (const std::bad_alloc&) {
        status = 1;
    }
    return status;
}

using Kernel = void (*)(const ScanCall&, const Unit&);

// The given order in the kernel's integers; false where a row is no permutation, through which no pointer may go.
bool read_order(const ScanCall& call, std::vector<int32_t>& order) {
    order.resize(call.groups * call.length);
    std::vector<char> seen;
    for (int64_t group = 0; group < call.groups; ++group) {
        seen.assign(call.length, 0);
        for (int64_t i = group * call.length; i < (group + 1) * call.length; ++i) {
            const int64_t pixel = call.given_order[i];
            if (pixel < 0 || pixel >= call.length || seen[pixel]) return false;
            seen[pixel] = 1;
            order[i] = static_cast<int32_t>(pixel);
        }
    }
    return true;
}

int dispatch(ScanCall call, Kernel portable, Kernel avx2, Kernel avx512) {
    const int64_t lanes = lanes_of(call);
    const Kernel kernel = lanes == 16 ? avx512 : lanes == 8 ? avx2 : portable;
    try {
        std::vector<int32_t> order;
        if (call.given_order) {
            if (!read_order(call, order)) return 2;
            call.order = order.data();
        }
        return run_parallel(divide(call, lanes), call.threads, [&](const Unit& unit) { kernel(call, unit); });
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

int64_t ens_scan_call_bytes() { return sizeof(ScanCall); }
int64_t ens_scan_chunk() { return kChunk; }
int64_t ens_scan_lanes() { return widest_lanes(); }

#if defined(__x86_64__)
int ens_scan_forward(const ScanCall* call) {
    return dispatch(*call, portable::forward, avx2::forward, avx512::forward);
}
int ens_scan_backward(const ScanCall* call) {
    return dispatch(*call, portable::backward, avx2::backward, avx512::backward);
}
#else
int ens_scan_forward(const ScanCall* call) { return dispatch(*call, portable::forward, nullptr, nullptr); }
int ens_scan_backward(const ScanCall* call) { return dispatch(*call, portable::backward, nullptr, nullptr); }
#endif
