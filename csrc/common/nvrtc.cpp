// SPDX-License-Identifier: Apache-2.0
// C interface of libmustdrop_nvrtc, called by mustdrop_kernels/backends/cupy/launchers.py.
#include "common/launch.h"

extern "C" {

// Sets the functions that find and launch kernels; they must stay valid until the process ends.
__attribute__((visibility("default"))) void mustdrop_nvrtc_connect(const mustdrop::LaunchHooks* hooks) {
  mustdrop::launch_hooks() = *hooks;
}

// Signature of the kernel at an index among all kernels of the launchers; null past the last.
__attribute__((visibility("default"))) const char* mustdrop_nvrtc_kernel(int index) {
  const mustdrop::KernelName* name = mustdrop::KernelName::first();
  for (; name && index > 0; --index) name = name->next;
  return name ? name->signature : nullptr;
}
}
