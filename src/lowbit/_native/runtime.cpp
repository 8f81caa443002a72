#include "runtime.h"

#include <algorithm>
#include <vector>

namespace lowbit {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr int kSlots = static_cast<int>(Slot::kCount);

struct Block {
    void* memory = nullptr;
    int64_t size = 0;

    void release() {
        ::operator delete(memory, kAlignment);
        memory = nullptr, size = 0;
    }
};

struct ThreadScratch;

// Never destroyed: threads may end after the library's own objects have.
struct Arena {
    std::mutex mutex;
    std::vector<ThreadScratch*> threads;
    std::shared_mutex running;
};

Arena& arena() {
    static Arena* const all = new Arena;
    return *all;
}

struct ThreadScratch {
    Block blocks[kSlots];

    ThreadScratch() {
        const std::lock_guard<std::mutex> lock(arena().mutex);
        arena().threads.push_back(this);
    }

    ~ThreadScratch() {
        const std::lock_guard<std::mutex> lock(arena().mutex);
        auto& threads = arena().threads;
        threads.erase(std::find(threads.begin(), threads.end(), this));
        release();
    }

    void release() {
        for (Block& block : blocks) block.release();
    }
};

std::atomic<int64_t> products{0};
Parallel parallel = nullptr;

}  // namespace

void* scratch_memory(Slot slot, int64_t bytes, bool& is_new) {
    static thread_local ThreadScratch own;
    Block& block = own.blocks[static_cast<int>(slot)];
    is_new = bytes > block.size;
    if (!is_new) return block.memory;
    const std::lock_guard<std::mutex> lock(arena().mutex);  // scratch_size reads sizes
    block.release();
    block.memory = ::operator new(static_cast<size_t>(bytes), kAlignment, std::nothrow);
    if (!block.memory) throw OutOfScratch(bytes);
    block.size = bytes;
    return block.memory;
}

void release_scratch() {
    const std::unique_lock<std::shared_mutex> alone(arena().running);
    const std::lock_guard<std::mutex> lock(arena().mutex);
    for (ThreadScratch* thread : arena().threads) thread->release();
}

int64_t scratch_size() {
    const std::lock_guard<std::mutex> lock(arena().mutex);
    int64_t total = 0;
    for (const ThreadScratch* thread : arena().threads)
        for (const Block& block : thread->blocks) total += block.size;
    return total;
}

std::shared_mutex& running_calls() { return arena().running; }

int64_t next_product() { return ++products; }

void set_parallel(Parallel function) { parallel = function; }

Parallel get_parallel() { return parallel; }

}  // namespace lowbit
