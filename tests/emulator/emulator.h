// CUDA as g++ reads it, for the kernels of minisaobp/cuda: included before their text, which cupy_on_cpu.py rewrites.
//
// Every CUDA thread of a cluster is a fiber, a stack of its own. One runs until it has to wait for others: in a shuffle
// or at a barrier. Between two of these it is never interrupted, so what one thread writes and another reads without a
// barrier between them depends on who goes first: launch() takes an order, and its caller demands the same bits of two.
// Shared memory is full of NaN before it is written.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

using std::exp, std::log, std::sqrt;  // of a float a float's, as on a GPU: C's are a double's

// ---- fibers ---------------------------------------------------------------------------------------------------------

struct dim3 {
    unsigned x, y, z;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {  // the kernels may use any other name

// threads that wait for each other: a warp, a block or a cluster
struct Group {
    const char* what;
    int size, arrived, line;
    unsigned round;
};

struct Warp : Group {
    uint64_t slots[2][32];  // what lanes show each other; the next shuffle uses the other half, for some lanes are slow
};

struct Block : Group {
    dim3 index;
    char* memory;  // its shared memory
};

struct Thread {
    jmp_buf place;  // where it waits
    dim3 index;
    int lane;
    Warp* warp;
    Block* block;
    Group* group;  // whom it waits for, if its round has not passed
    unsigned round;
    bool started, ended;
    bool waits() const { return ended || (group && group->round == round); }
};

const size_t STACK = 1 << 15, MOST_BLOCKS = 16, MOST_THREADS = 1024;  // bytes; of a cluster; of a block
static char* stacks;
static std::vector<Thread> threads;
static std::vector<Warp> warps;
static std::vector<Block> blocks;
static Group cluster;
static Thread* current;
static jmp_buf scheduler;
static char message[300];  // why the launch failed
static void (*call)(void**);
static void** arguments;

// Contexts are made by ucontext; to go from one to another by _longjmp takes a twentieth of what swapcontext does, which
// asks the operating system for the mask of signals.
static __attribute__((noinline)) void leave() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

template <typename... Values>
static void fail(const char* format, Values... values) {
    snprintf(message, sizeof message, format, values...);
    _longjmp(scheduler, 1);  // never to come back
}

static void fiber() {
    for (;;) {
        call(arguments);
        current->ended = true;
        leave();
    }
}

static __attribute__((noinline)) void go_on(Thread& thread, size_t number) {
    current = &thread;
    threadIdx = thread.index;
    blockIdx = thread.block->index;
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + STACK * number;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    setcontext(&context);
}

// Waits until all of a group are here. CUDA has no answer where they have come to different lines, nor where some have
// ended: then the others wait for ever.
static void meet(Group& group, int line) {
    if (group.arrived == 0) group.line = line;
    if (group.line != line) fail("threads of one %s wait at line %d and at line %d", group.what, group.line, line);
    if (++group.arrived == group.size) {
        group.arrived = 0;
        group.round++;
        return;
    }
    current->group = &group;
    current->round = group.round;
    leave();
}

// Runs all threads to their end, each warp as far as it gets before the next one; backwards: the last warp first.
static void run_all(bool backwards) {
    size_t ended = 0, count = threads.size();
    while (ended < count) {
        bool stuck = true;
        for (size_t w = 0; w < count; w += 32)
            for (bool moved = true; moved;) {
                moved = false;
                for (size_t n = w; n < w + 32; n++) {
                    size_t number = backwards ? count - 1 - n : n;
                    Thread& thread = threads[number];
                    if (thread.waits()) continue;
                    go_on(thread, number);
                    if (message[0]) return;
                    ended += thread.ended;
                    moved = true;
                    stuck = false;
                }
            }
        if (stuck && ended < count) {
            const Group* g = nullptr;
            for (auto& thread : threads)
                if (!thread.ended) g = thread.group;
            snprintf(message, sizeof message, "deadlock: %d of the %d threads of a %s wait at line %d; %zu of %zu have ended",
                     g->arrived, g->size, g->what, g->line, ended, count);
            return;
        }
    }
}

// ---- warps and barriers ---------------------------------------------------------------------------------------------

template <typename T>
T shuffle(unsigned lanes, T x, int from, int line) {
    if (lanes != 0xffffffffu) fail("line %d: a shuffle of some lanes only", line);
    Warp& warp = *current->warp;
    auto& slots = warp.slots[warp.round % 2];
    memcpy(&slots[current->lane], &x, sizeof x);
    meet(warp, line);
    memcpy(&x, &slots[from], sizeof x);
    return x;
}

#define EMULATED(function, ...) emulator::function(__VA_ARGS__, __LINE__)
#define MY emulator::current
#define __shfl_xor_sync(lanes, x, mask) EMULATED(shuffle, lanes, x, MY->lane ^ (mask))
#define __shfl_sync(lanes, x, from, width) EMULATED(shuffle, lanes, x, (MY->lane & -(width)) | ((from) & ((width)-1)))
#define __syncwarp() EMULATED(meet, *MY->warp)
#define __syncthreads() EMULATED(meet, *MY->block)
#define CLUSTER_BARRIER EMULATED(meet, emulator::cluster)

// ---- shared memory --------------------------------------------------------------------------------------------------
//
// An address in it is the number of the block in the cluster, above what 16 bits hold, and the place in its memory.

const unsigned MOST_SHARED = 48 << 10;  // that CUDA gives without being asked for more
alignas(16) static char shared[MOST_BLOCKS][1 << 16];
static std::vector<std::pair<int, unsigned>> variables;  // number of the declaration, place
static unsigned used;

template <typename T>
T& shared_variable(int number) {
    for (auto& v : variables)
        if (v.first == number) return *(T*)(current->block->memory + v.second);
    used = (used + 15) / 16 * 16 + sizeof(T);
    if (used > MOST_SHARED) fail("%u bytes of shared memory; there are %u", used, MOST_SHARED);
    variables.push_back({number, unsigned(used - sizeof(T))});
    return *(T*)(current->block->memory + used - sizeof(T));
}

unsigned __cvta_generic_to_shared(const void* p) {
    size_t place = (const char*)p - shared[0];
    if (place >= sizeof shared) fail("an address that is not of shared memory");
    return place;
}

unsigned address_in_block(unsigned address, unsigned block) {  // mapa
    if (block >= blocks.size()) fail("block %u of a cluster of %zu", block, blocks.size());
    return block << 16 | (address & 0xffff);
}

double& shared_double(unsigned address) {
    if ((address & 0xffff) + 8 > used) fail("an address beyond the shared memory of a block");
    return *(double*)(shared[0] + address);
}

}  // namespace emulator

using emulator::__cvta_generic_to_shared;

// ---- arithmetic -----------------------------------------------------------------------------------------------------

float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
int __double2hiint(double x) { return __builtin_bit_cast(uint64_t, x) >> 32; }
int __double2loint(double x) { return (int)__builtin_bit_cast(uint64_t, x); }
double __hiloint2double(int high, int low) {
    return __builtin_bit_cast(double, (uint64_t)(unsigned)high << 32 | (unsigned)low);
}

// .ftz: numbers below the smallest normal one are zero. The hardware's ex2 and rcp are off by up to two roundings.
float flushed(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
float ex2_approx_ftz(float x) { return flushed(std::exp2(flushed(x))); }
float rcp_approx_ftz(float x) { return flushed(1 / flushed(x)); }
float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // 0 of NaN too

template <typename A, typename B, typename T = std::common_type_t<A, B>>
T max(A a, B b) {  // a NaN is no number to CUDA's
    return T(a) > T(b) || b != b ? T(a) : T(b);
}
template <typename A, typename B, typename T = std::common_type_t<A, B>>
T min(A a, B b) {
    return T(a) < T(b) || b != b ? T(a) : T(b);
}

// CuPy has kernels compiled with -ftz=true: of floats, numbers below the smallest normal one are zero. So they are here
// on a processor that can do it, and those of doubles too.
struct FlushToZero {
#ifdef __SSE__
    unsigned before = __builtin_ia32_stmxcsr();
    FlushToZero() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushToZero() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// ---- launching ------------------------------------------------------------------------------------------------------

namespace emulator {

// values: pointers to the arguments
template <typename... A>
void call_with(void (*kernel)(A...), void** values) {
    std::apply(kernel, std::tuple<A...>{*(A*)*values++...});
}

struct Kernel {
    int cluster;
    void (*call)(void**);
};
extern const Kernel kernels[];  // the text's end has them

// Runs a kernel, by its number. -> an empty text, or what is wrong
extern "C" const char* launch(int number, dim3 grid, dim3 block, void** values, int backwards, int large_clusters) {
    const Kernel& kernel = kernels[number];
    unsigned per_block = block.x * block.y * block.z, many = grid.x * grid.y * grid.z, size = kernel.cluster;
    message[0] = 0;
    if (!many || !per_block || per_block > MOST_THREADS || per_block % 32 || size > MOST_BLOCKS || grid.x % size) {
        snprintf(message, sizeof message, "%u blocks of %u threads, in clusters of %u", many, per_block, size);
        return message;
    }
    if (size > 8 && !large_clusters) return "a cluster of more than 8 blocks, which was not asked for";
    if (!stacks)  // memory that is not touched is not taken
        stacks = (char*)mmap(nullptr, STACK * MOST_BLOCKS * MOST_THREADS, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return "no memory for the stacks of threads";
    call = kernel.call;
    arguments = values;
    gridDim = grid;
    blockDim = block;
    variables.clear();
    used = 0;
    threads.assign(per_block * size, Thread());
    warps.assign(threads.size() / 32, Warp());
    blocks.assign(size, Block());
    FlushToZero while_it_runs;
    for (unsigned first = 0; first < many && !message[0]; first += size) {
        unsigned at = backwards ? many - size - first : first;  // blocks are numbered along x first, as clusters lie
        cluster = {"cluster", int(threads.size()), 0, 0, 0};
        memset(shared, 0xff, sizeof shared[0] * size);
        for (unsigned b = 0; b < size; b++) {
            dim3 index = {(at + b) % grid.x, (at + b) / grid.x % grid.y, (at + b) / grid.x / grid.y};
            blocks[b] = {{"block", int(per_block), 0, 0, 0}, index, shared[b]};
        }
        for (unsigned n = 0; n < threads.size(); n++) {
            Thread& t = threads[n];
            unsigned id = n % per_block;
            if (id % 32 == 0) warps[n / 32] = {{"warp", 32, 0, 0, 0}, {}};
            t.index = {id % block.x, id / block.x % block.y, id / block.x / block.y};
            t.lane = id % 32;
            t.warp = &warps[n / 32];
            t.block = &blocks[n / per_block];
            t.group = nullptr;
            t.ended = false;
        }
        run_all(backwards);
    }
    return message;
}

}  // namespace emulator

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
