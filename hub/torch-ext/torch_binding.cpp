// SPDX-License-Identifier: Apache-2.0
// The module that Python imports. The operators register themselves: csrc/schemas.cpp, and the end of each launcher.
#include "registration.h"  // written by kernel-builder

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
