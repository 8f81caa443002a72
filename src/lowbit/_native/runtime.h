// What kernels run on: torch's threads and scratch memory.
#ifndef LOWBIT_NATIVE_RUNTIME_H
#define LOWBIT_NATIVE_RUNTIME_H

#include <atomic>
#include <exception>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <type_traits>

#include "common.h"

namespace lowbit {

// Scratch memory could not be allocated.
struct OutOfScratch : std::bad_alloc {
    explicit OutOfScratch(int64_t size) : bytes(size) {}
    int64_t bytes;
};

// Buffers of the arena. Each thread has its own of each; two that one thread uses at once have different slots.
enum class Slot : int {
    // Of the thread that calls.
    kTiles,
    kUnitFloats,
    kCodes,
    kScales,
    kChannelScales,
    kPartialSums,
    kHidden,
    kSplitActivations,
    kAttention,
    // Of the threads that compute.
    kQuantizedRow,
    kGgufSums,
    kInt8Panels,
    kBFloat16Panels,
    kAmxPanels,
    kAmxSums,
    kFewRows,
    kFewInt8,
    kGrouped,
    kAmxAttention,
    kScaledE2M1,
    kCount,
};

// At least `bytes` bytes, aligned to 64, which the calling thread keeps under `slot` until it asks for more or
// release_scratch. The contents are what the slot held before, or undefined after it grew; `is_new` tells.
// Throws OutOfScratch. Kept because fresh pages cost as much as filling them.
void* scratch_memory(Slot slot, int64_t bytes, bool& is_new);

template <typename T>
T* scratch(Slot slot, int64_t count) {
    bool is_new;
    return static_cast<T*>(scratch_memory(slot, count * static_cast<int64_t>(sizeof(T)), is_new));
}

// An object that stays between calls, value-initialized when it is new. Always the same type for a slot.
template <typename T>
T& scratch_object(Slot slot) {
    static_assert(std::is_trivially_destructible<T>::value && alignof(T) <= 64, "");
    bool is_new;
    void* memory = scratch_memory(slot, sizeof(T), is_new);
    return is_new ? *new (memory) T() : *static_cast<T*>(memory);
}

// A weight's scale of each channel, until the calling thread asks again.
inline const float* channel_scales(const WeightJob& job) {
    float* const scales = scratch<float>(Slot::kChannelScales, job.columns);
    for (int64_t channel = 0; channel < job.columns; ++channel)
        scales[channel] = static_cast<const float*>(job.scale)[channel / job.block_rows];
    return scales;
}

// Frees the scratch memory of all threads, after calls that are running have ended.
void release_scratch();

// Bytes that all threads hold.
int64_t scratch_size();

// Held shared by every call that computes, alone by release_scratch.
std::shared_mutex& running_calls();

// A number of its own for each product: what a thread packed belongs to one of them.
int64_t next_product();

// GNU OpenMP's entry point: runs function(data) on that many threads of the caller's pool. Null: one thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
void set_parallel(Parallel function);
Parallel get_parallel();

template <typename Job>
struct Shared {
    void (*kernel)(const Job&, int64_t, int64_t);
    const Job* job;
    int64_t count, step;
    std::atomic<int64_t> next{0};
    std::atomic<bool> has_failed{false};
    std::exception_ptr failure;  // of the first piece that failed
};

// Threads take pieces from a common counter, so a thread whose core is busy elsewhere holds nobody up. No exception leaves:
// OpenMP knows none.
template <typename Job>
void take_pieces(void* data) {
    auto& shared = *static_cast<Shared<Job>*>(data);
    try {
        for (;;) {
            const int64_t first = shared.next.fetch_add(shared.step);
            if (first >= shared.count) return;
            shared.kernel(*shared.job, first, smaller(first + shared.step, shared.count));
        }
    } catch (...) {
        if (!shared.has_failed.exchange(true)) shared.failure = std::current_exception();
        shared.next = shared.count;
    }
}

constexpr int64_t kElementsWorthAThread = 1 << 15;  // about 10 microseconds of work
constexpr int64_t kElementsPerPiece = 1 << 16;

// Pieces are multiples of `unit`.
template <typename Job>
void run(void (*kernel)(const Job&, int64_t, int64_t), const Job& job, int64_t count, int64_t elements, int threads,
         int64_t unit = 1) {
    if (count <= 0) return;
    const Parallel parallel = get_parallel();
    if (parallel == nullptr || threads < 2 || count < 2 || elements < 2 * kElementsWorthAThread) {
        kernel(job, 0, count);
        return;
    }
    const int64_t pieces = blocks(elements, kElementsPerPiece);
    const int64_t wanted = pieces < 4 * threads ? 4 * threads : pieces;
    Shared<Job> shared;
    shared.kernel = kernel, shared.job = &job;
    shared.count = count, shared.step = blocks(blocks(count, wanted), unit) * unit;
    const int64_t useful = smaller(threads, blocks(elements, kElementsWorthAThread));
    parallel(take_pieces<Job>, &shared, static_cast<unsigned>(useful), 0);
    if (shared.failure) std::rethrow_exception(shared.failure);
}

}  // namespace lowbit

#endif  // LOWBIT_NATIVE_RUNTIME_H
