// SPDX-License-Identifier: Apache-2.0
// The part of the CUDA driver that the backend `cupy` uses, emulated: kernels by name, and cuLaunchKernelEx.
#include "common/driver.h"

#include "cuda_emulation.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// The kernel at an index of the list, null past its end; and a kernel's signature.
EXPORTED const cuda_emulation::Kernel* cuda_emulation_kernel(int index) {
  const cuda_emulation::Kernel* kernel = cuda_emulation::first_kernel();
  for (; kernel && index > 0; --index) kernel = kernel->next;
  return kernel;
}
EXPORTED const char* cuda_emulation_signature(const cuda_emulation::Kernel* kernel) { return kernel->signature; }

EXPORTED void cuda_emulation_facts(int* facts) {
  facts[0] = cuda_emulation::capability();
  facts[1] = cuda_emulation::multiprocessors();
  facts[2] = cuda_emulation::shared_limit();
}

// cuFuncSetAttribute(kernel, MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes).
EXPORTED void cuda_emulation_set_shared_limit(const cuda_emulation::Kernel* kernel, int bytes) {
  cuda_emulation::set_shared_limit(kernel, static_cast<size_t>(bytes));
}

// cuLaunchKernelEx: runs the kernel to completion. Throws the emulation's errors.
EXPORTED int cuda_emulation_launch(const mustdrop::DriverConfig* config, const cuda_emulation::Kernel* kernel,
                                   void** parameters, void**) {
  cuda_emulation::Launch launch{kernel, dim3(config->grid[0], config->grid[1], config->grid[2]),
                                dim3(config->block[0], config->block[1], config->block[2]), 1, config->shared_bytes};
  for (unsigned i = 0; i < config->attribute_count; ++i) {
    const mustdrop::DriverAttribute& attribute = config->attributes[i];
    if (attribute.id == mustdrop::kClusterDimension)
      launch.cluster = attribute.value[0];
    else if (attribute.id == mustdrop::kProgrammaticSerialization)
      launch.overlaps = attribute.value[0] != 0;
    else
      return 1;  // CUDA_ERROR_INVALID_VALUE
  }
  cuda_emulation::run(launch, [&] { kernel->call(parameters); });
  return 0;
}

// cuOccupancyMaxActiveClusters.
EXPORTED int cuda_emulation_count_clusters(int* count, const cuda_emulation::Kernel*,
                                           const mustdrop::DriverConfig* config) {
  for (unsigned i = 0; i < config->attribute_count; ++i)
    if (config->attributes[i].id == mustdrop::kClusterDimension)
      *count = cuda_emulation::clusters_at_once(config->attributes[i].value[0]);
  return 0;
}

EXPORTED int cuda_emulation_current_stream(int, void** stream) {
  *stream = nullptr;
  return 0;
}
