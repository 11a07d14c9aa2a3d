// Runs CUDA C++ kernels on the CPU, for the tests: -include this header and compile a .cu file as C++.
//
// All blocks of a cluster live at once, each CUDA thread a fibre. Barriers, shuffles, asynchronous copies and the shared
// memory of other blocks behave as on a device, or worse: a copy arrives when it is waited for and no sooner, shared memory
// begins as NaN and ends exactly where it was asked to, and a barrier that not all threads reach ends the program.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <set>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define FASTKD_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

// ---- what a test may set, and see ----

inline int major = 9, shared_limit = 227 << 10, devices = 2;  // of each device
inline bool backwards = false;                                // the last thread goes first
inline int current = 0;                                       // device
inline int launched_on = -1, launched_cluster = 0, launched_threads = 0;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", why, blockIdx.x, threadIdx.x);
  std::abort();
}

// ---- fibres ----

#if defined(__x86_64__)
using Context = void*;  // a stack pointer
extern "C" void fastkd_switch(void** from, void* to);
__asm__(
    ".weak fastkd_switch\n"
    "fastkd_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
inline void swap_to(Context& from, Context& to) { fastkd_switch(&from, to); }
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = (void**)(((uintptr_t)stack + bytes) & ~(uintptr_t)15);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
inline void swap_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class At { Running, Warp, Block, Cluster, Done };
struct Copy {
  char* to;
  const char* from;
};
struct Fibre {
  Context context;
  At at;
  unsigned thread, block;  // block: in the cluster
  uint64_t slot[2];
  int parity, arrived;  // arrived: times at the barrier of the cluster
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> batches;
};
inline std::vector<Fibre> fibres;
inline std::vector<char*> memory;  // shared memory of each block of the cluster
inline Context scheduler;
inline int running;
inline unsigned first_block;
inline std::function<void()> body;
constexpr size_t STACK = 128 << 10;

inline Fibre& self() { return fibres[running]; }
inline void wait_at(At at) {
  self().at = at;
  swap_to(self().context, scheduler);
}
#if defined(__GNUC__)
__attribute__((no_sanitize("address")))
#endif
inline void entry() {
  body();
  if (!self().open.empty() || !self().batches.empty()) fail("a thread ends with copies on their way");
  wait_at(At::Done);
}

inline void resume(int i) {
  running = i;
  threadIdx.x = self().thread, blockIdx.x = first_block + self().block;
  swap_to(scheduler, self().context);
}

// Lets go of those of [begin, end) that wait, if all of them do.
inline bool release(int begin, int end, At at) {
  for (int i = begin; i < end; i++)
    if (fibres[i].at != at) return false;
  for (int i = begin; i < end; i++) fibres[i].at = At::Running;
  return true;
}

inline bool release_cluster() {
  int all = fibres[0].arrived;
  bool some = false;
  for (const Fibre& f : fibres) all = f.arrived < all ? f.arrived : all;
  for (Fibre& f : fibres)
    if (f.at == At::Cluster && f.arrived <= all) f.at = At::Running, some = true;
  return some;
}

// Lets the threads [begin, end) of a block run until each waits or is done; false if none could run.
inline bool run_block(int begin, int end) {
  bool some = false;
  for (int k = begin; k < end; k++) {
    const int i = backwards ? begin + end - 1 - k : k;
    if (fibres[i].at == At::Running) resume(i), some = true;
  }
  for (int w = begin; w < end; w += 32) some |= release(w, w + 32, At::Warp);
  return release(begin, end, At::Block) || some;
}

// A block runs as far ahead of the others as it can.
inline void run_cluster(int threads, int blocks) {
  for (;;) {
    bool some = false, done = true;
    for (int b = 0; b < blocks; b++)
      while (run_block((backwards ? blocks - 1 - b : b) * threads, (backwards ? blocks - b : b + 1) * threads)) some = true;
    for (const Fibre& f : fibres) done &= f.at == At::Done;
    if (done) return;
    if (!release_cluster() && !some) fail("some threads wait at a barrier that others never reach");
  }
}

inline void launch(unsigned blocks, int threads, int cluster, size_t bytes, std::function<void()> kernel) {
  const int n = threads * cluster;
  static std::vector<char> stacks;
  if (stacks.size() < n * STACK) stacks.resize(n * STACK);
  body = std::move(kernel), blockDim = dim3(threads), gridDim = dim3(blocks);
  fibres.assign(n, Fibre());
  for (first_block = 0; first_block < blocks; first_block += cluster) {
    for (int b = 0; b < cluster; b++) {
      memory.push_back((char*)std::malloc(bytes));
      std::memset(memory.back(), 0xff, bytes);
    }
    for (int i = 0; i < n; i++) {
      Fibre& f = fibres[i];
      f.at = At::Running, f.thread = i % threads, f.block = i / threads, f.parity = f.arrived = 0;
      prepare(f.context, &stacks[i * STACK], STACK, entry);
    }
    run_cluster(threads, cluster);
    for (char* block : memory) std::free(block);
    memory.clear();
  }
}

template <class T>
T shuffled(T value, int from) {
  static_assert(sizeof(T) <= 8, "one register");
  Fibre& me = self();
  const int slot = me.parity, warp = running - (int)me.thread % 32;
  me.parity ^= 1;
  std::memcpy(&me.slot[slot], &value, sizeof(T));
  wait_at(At::Warp);
  std::memcpy(&value, &fibres[warp + from].slot[slot], sizeof(T));
  return value;
}

}  // namespace emulator

// ---- the language ----

inline void __syncthreads() { emulator::wait_at(emulator::At::Block); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait_at(emulator::At::Warp); }
inline int __syncthreads_or(int value) {
  using namespace emulator;
  self().slot[0] = value != 0;
  wait_at(At::Block);
  uint64_t any = 0;
  for (const Fibre& f : fibres) any |= f.block == self().block ? f.slot[0] : 0;
  wait_at(At::Block);
  return any != 0;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return emulator::shuffled(value, (int)emulator::self().thread % 32 ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = (int)emulator::self().thread % 32;
  return emulator::shuffled(value, lane >= distance ? lane - distance : lane);
}
inline uint32_t atomicOr(uint32_t* at, uint32_t bits) { return std::exchange(*at, *at | bits); }
inline uint32_t atomicAdd(uint32_t* at, uint32_t n) { return std::exchange(*at, *at + n); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

// ---- what csrc/gpu_device.cuh has in PTX ----

namespace fastkd {
namespace gpu {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
inline float divide_fast(float x, float y) { return x / y; }
inline float low_half(uint32_t x) { return (float)reinterpret_cast<const _Float16&>(x); }
inline float high_half(uint32_t x) { return low_half(x >> 16); }
inline uint32_t half_bits(float x) {
  const _Float16 h = (_Float16)x;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline uint32_t bfloat_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
inline uint32_t pack_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bfloats(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }

inline void copy_async(void* to, const void* from) {
  if (((uintptr_t)to | (uintptr_t)from) % 16 != 0) emulator::fail("a copy of 16 bytes off its alignment");
  emulator::self().open.push_back({(char*)to, (const char*)from});
}
inline void copy_commit() {
  emulator::Fibre& f = emulator::self();
  f.batches.push_back(std::exchange(f.open, {}));
}
template <int PENDING>
void copy_wait() {
  auto& batches = emulator::self().batches;
  for (; (int)batches.size() > PENDING; batches.pop_front())
    for (const emulator::Copy& copy : batches.front()) std::memcpy(copy.to, copy.from, 16);
}

inline int cluster_rank() { return (int)emulator::self().block; }
inline void cluster_arrive() { emulator::self().arrived++; }
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() { emulator::wait_at(emulator::At::Cluster); }
inline char* shared_memory() { return emulator::memory[emulator::self().block]; }
template <class T>
const T* of_block(const T* shared, int rank) {
  for (const emulator::Fibre& f : emulator::fibres)
    if ((int)f.block == rank && f.at == emulator::At::Done) emulator::fail("reads the memory of a block that has gone");
  return (const T*)(emulator::memory[rank] + ((const char*)shared - shared_memory()));
}

}  // namespace gpu
}  // namespace fastkd

// ---- the runtime ----

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice          ? "invalid device ordinal"
         : error == cudaErrorInvalidConfiguration ? "invalid configuration"
                                                  : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::devices) return cudaErrorInvalidDevice;
  emulator::current = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= emulator::devices) return cudaErrorInvalidDevice;
  *value = which == cudaDevAttrComputeCapabilityMajor ? emulator::major : emulator::shared_limit;
  return cudaSuccess;
}
namespace emulator {
inline std::set<std::pair<const void*, int>> prepared;  // kernels that may have more than 48 KiB on a device
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int) {
  emulator::prepared.insert({kernel, emulator::current});
  return cudaSuccess;
}
template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Expected...), Actual&&... args) {
  const unsigned cluster = c->numAttrs ? c->attrs[0].val.clusterDim.x : 1, threads = c->blockDim.x;
  if (threads == 0 || threads > 1024 || threads % 32 || c->gridDim.x % cluster || cluster > 8)
    return cudaErrorInvalidConfiguration;
  if (c->dynamicSmemBytes > 48 << 10 && !emulator::prepared.count({(const void*)kernel, emulator::current}))
    return cudaErrorInvalidValue;
  emulator::launched_on = emulator::current, emulator::launched_threads = (int)threads;
  emulator::launched_cluster = c->numAttrs ? (int)cluster : 0;
  emulator::launch(c->gridDim.x, (int)threads, (int)cluster, c->dynamicSmemBytes, [&] { kernel(args...); });
  return cudaSuccess;
}
