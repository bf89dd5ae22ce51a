// Boundary between Python (ctypes) and the selective-scan kernel: plain pointers, strides in elements.
//
// B batch, D channels, G groups (channel d reads group d / (D/G)), N states, L length. With `shared`, u and du have D/G
// channels: every group scans the same u in its own order (four-direction scans). With `summed` too, y, z, dy and dz
// have D/G channels: the sum over the groups. `decays` is the width of A: N, or 1 where all states of a channel decay
// alike (Mamba-2); `per_delta` channels share a row of delta (a head of Mamba-2), whose gradient comes per channel.
#pragma once
#include <cstdint>

extern "C" {

struct ScanTensor {  // (B, channels, L) for u, delta, z, y and their gradients; (B, G, N, L) for B and C
    float* data;     // null where the tensor is absent
    int64_t batch, channel, state, step;
};

struct ScanCall {
    int64_t batch, channels, groups, states, length, shared, summed, softplus, decays, per_delta, threads;
    int64_t lanes;         // 0: widest the machine has; 16 (AVX-512), 8 (AVX2), 4 (portable)
    const int64_t* given_order;  // contiguous (G, L) pixel visited at each step, or null for 0, 1, 2, …
    const int32_t* order;        // the same, known to be permutations; null from the caller
    ScanTensor u, delta, z, B, C;
    const float *A, *D, *bias;  // contiguous (D, decays), (D), (D); D and bias may be null
    // Forward output; read again by the backward pass.
    ScanTensor y;
    float* last_state;   // contiguous (B, D, N)
    float* checkpoints;  // state that enters each chunk, layout private to the kernel; null: not kept
    // Backward: gradient in, gradients out.
    ScanTensor dy, du, ddelta, dz;
    const float* dlast;            // contiguous (B, D, N), or null
    float *dB, *dC;                // contiguous (splits, B, G, L, N), to be summed over splits
    float *dA, *dD, *dbias;        // contiguous (B, D, decays), (B, D), (B, D), to be summed over the batch
    int64_t splits;                // parts the channels of a group are divided into
};

int64_t ens_scan_call_bytes();              // size of ScanCall: whether caller and kernel speak of the same one
int64_t ens_scan_chunk();                   // steps between checkpoints
int64_t ens_scan_lanes();                   // widest vector this machine runs, in floats
int ens_scan_forward(const ScanCall* call);   // 0, 1 when memory ran out, 2 for an order that is no permutation
int ens_scan_backward(const ScanCall* call);
}
