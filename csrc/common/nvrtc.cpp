// SPDX-License-Identifier: Apache-2.0
// What the backend `cupy` calls in libmustdrop_nvrtc (mustdrop_kernels/backends/cupy/library.py).
#include "common/launch.h"

extern "C" {

// The functions by which kernels are found and launched; they stay valid until the process ends.
__attribute__((visibility("default"))) void mustdrop_nvrtc_connect(const mustdrop::LaunchHooks* hooks) {
  mustdrop::launch_hooks() = *hooks;
}

// The signature of one kernel, null past the last: every kernel that the launchers may ask for.
__attribute__((visibility("default"))) const char* mustdrop_nvrtc_kernel(int index) {
  const mustdrop::KernelName* name = mustdrop::KernelName::first();
  for (; name && index > 0; --index) name = name->next;
  return name ? name->signature : nullptr;
}
}
