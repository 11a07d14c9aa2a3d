// The module of the tests: fastkd._C.cuda's functions, emulated, and the emulator's settings.
#include "gpu_bindings.h"

PYBIND11_MODULE(fastkd_emulated, m) {
  fastkd::gpu::bind(m);
  m.def(
      "set_device", [](int major, int shared_limit) { emulator::major = major, emulator::shared_limit = shared_limit; },
      "The compute capability's first number, and the bytes of shared memory that a block may have.");
  m.def("set_backwards", [](bool backwards) { emulator::backwards = backwards; }, "The last thread goes first.");
  m.def("set_current", [](int device) { emulator::current = device; });
  m.def("current", [] { return emulator::current; });
  m.def(
      "launched", [] { return std::make_tuple(emulator::launched_on, emulator::launched_cluster, emulator::launched_threads); },
      "Device, cluster and threads of the last launch; a cluster of 0: launched without one.");
}
