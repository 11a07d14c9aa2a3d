// How a kernel is started: on which device and stream, by how many blocks and threads, with how much shared memory.
#pragma once
#include <atomic>
#include <stdexcept>
#include <string>

#include "gpu.h"

namespace fastkd {
namespace gpu {

// Bytes of a row that a block of a cluster keeps at most: two blocks then live on a multiprocessor of 227 KiB
constexpr int64_t STAGED_BYTES = 110 << 10;
constexpr int64_t THREE_BLOCKS = 72 << 10;  // as many bytes a block let three live there, which need no more threads each
constexpr int THREE_THREADS = 256;          // than these
constexpr int LARGEST_CLUSTER = 8;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "a device's attribute");
  return value;
}

inline int64_t shared_limit(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

// Makes a device current for as long as it lives.
class Current {
 public:
  explicit Current(int device) {
    check(cudaGetDevice(&before_), "the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing a device");
    changed_ = device != before_;
  }
  ~Current() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  Current(const Current&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Bytes of a row's groups that a block keeps, if `cluster` blocks share it; whatever the row's alignment
inline int64_t staged_bytes(const Matrix& m, int cluster, int64_t vocab) {
  const int64_t groups = vocab / 8 + 2;
  return ((groups + cluster - 1) / cluster) * 8 * (m.dtype == Float32 ? 4 : 2);
}

// How many blocks share a row: as few as keep it; 0: none does, passes are made over memory
template <class Bytes>
int cluster_of(const Launch& launch, Bytes bytes) {
  if (launch.cluster != AUTO) return launch.cluster;
  if (attribute(cudaDevAttrComputeCapabilityMajor, launch.device) < 9) return 0;
  const int64_t shared = shared_limit(launch.device) - 8192, limit = shared < STAGED_BYTES ? shared : STAGED_BYTES;
  for (int cluster = 1; cluster <= LARGEST_CLUSTER; cluster *= 2)
    if (bytes(cluster) <= limit) return cluster;
  return 0;
}

constexpr int64_t FIXED_BYTES = 2048;  // of shared memory, beside what is staged

template <auto Kernel, class Args>
void start_grid(const Launch& launch, const Args& a, int64_t blocks, int cluster, int64_t threads, int64_t bytes) {
  static std::atomic<uint64_t> prepared{0};  // on which devices
  const int64_t limit = shared_limit(launch.device);
  if (bytes > limit)
    throw std::invalid_argument("CUDA: a vocabulary of this size needs " + std::to_string(bytes) +
                                " bytes of shared memory in a block, device " + std::to_string(launch.device) + " has " +
                                std::to_string(limit));
  const uint64_t bit = launch.device < 64 ? (uint64_t)1 << launch.device : 0;
  if (!(prepared.load() & bit)) {
    check(cudaFuncSetAttribute((const void*)Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)limit), "shared memory");
    prepared.fetch_or(bit);
  }
  cudaLaunchAttribute attributes[1];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)bytes, config.stream = (cudaStream_t)launch.stream;
  config.attrs = attributes, config.numAttrs = cluster > 0 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, Kernel, a), "launching a kernel");
}

// One block, or one cluster, for each row; `bytes` of it are kept by each block.
template <auto Kernel, class Args>
void start(const Launch& launch, const Args& a, int cluster, int most_threads, int64_t bytes) {
  if (a.n == 0 || a.vocab == 0) return;
  const int64_t shares = cluster > 0 ? cluster : 1, groups = (a.vocab / 8 + 2 + shares - 1) / shares;
  const int64_t wanted = (groups + 31) / 32 * 32, fewer = most_threads < THREE_THREADS ? most_threads : THREE_THREADS,
                most = cluster > 0 && bytes <= THREE_BLOCKS ? fewer : most_threads;
  if (a.vocab > INT32_MAX - 64) throw std::invalid_argument("CUDA: a vocabulary must be smaller than 2^31");
  if (a.n > INT32_MAX / shares) throw std::invalid_argument("CUDA: too many rows for one launch");
  start_grid<Kernel>(launch, a, a.n * shares, cluster, wanted < most ? wanted : most, FIXED_BYTES + bytes);
}

}  // namespace gpu
}  // namespace fastkd
