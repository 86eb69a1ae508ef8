# SPDX-License-Identifier: Apache-2.0
{
  description = "Kernels that drop vision tokens (MustDrop)";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
