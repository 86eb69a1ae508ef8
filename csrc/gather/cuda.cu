// SPDX-License-Identifier: Apache-2.0
// gather_tokens on CUDA: checks, allocation, launch.
#include "common/launch.h"
#include "gather/checks.h"
#include "gather/kernel.cuh"

namespace mustdrop {
namespace {

// Splits a token of x into outer dimensions and the contiguous run at its end; returns false if there are too many.
bool describe_token(const Tensor& x, GatherParameters& p) {
  const int64_t element = x.element_size();
  int outer = 0;
  p.run = element;
  for (int d = 0; d < kGatherOuterDims; ++d) {
    p.outer_size[d] = 1;
    p.outer_stride[d] = 0;
  }
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    const int64_t stride = x.stride(d) * element;
    if (x.size(d) == 1 || (outer == 0 && stride == p.run)) {
      p.run *= x.size(d);
    } else if (outer > 0 && stride == p.outer_stride[outer - 1] * p.outer_size[outer - 1]) {
      p.outer_size[outer - 1] *= x.size(d);
    } else if (outer == kGatherOuterDims) {
      return false;
    } else {
      p.outer_size[outer] = x.size(d);
      p.outer_stride[outer++] = stride;
    }
  }
  p.batch_stride = x.size(0) > 1 ? x.stride(0) * element : 0;
  p.row_stride = x.size(1) > 1 ? x.stride(1) * element : 0;
  return true;
}

// Size of the largest piece, up to 16 bytes, that divides every offset.
int piece_bytes(const GatherParameters& p) {
  int64_t all = p.run | p.batch_stride | p.row_stride | static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.x));
  for (const int64_t stride : p.outer_stride) all |= stride;
  int bytes = 16;
  while (all % bytes) bytes /= 2;
  return bytes;
}

template <class Piece>
void launch_gather(const Device& device, GatherParameters& p, int64_t token_bytes) {
  p.pieces = token_bytes / static_cast<int64_t>(sizeof(Piece));
  p.group = 1;
  while (p.group < kGatherThreads && p.group < p.pieces) p.group *= 2;
  const Grid grid{dim3(blocks(ceil_div(p.tokens, kGatherThreads / p.group))), kGatherThreads};
  device.launch(
      grid,
      p.run == token_bytes ? MUSTDROP_KERNEL(gather_kernel<Piece, true>) : MUSTDROP_KERNEL(gather_kernel<Piece, false>),
      p);
}

Tensor gather_tokens(const Tensor& x_given,  // [B, L, ...]
                     const Tensor& keep,     // [B, K]
                     const Tensor& counts,   // [B]
                     bool align_end) {
  check_gather_tokens(x_given, keep, counts);
  const Device device(x_given);
  GatherParameters p{};
  const Tensor x = describe_token(x_given, p) ? x_given : torch::stable::contiguous(x_given);
  describe_token(x, p);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[1] = keep.size(1);
  Tensor out = new_empty(x, shape, x.scalar_type());
  if (out.numel() == 0) return out;
  p.x = data<char>(x);
  p.keep = data<int64_t>(keep);
  p.counts = data<int32_t>(counts);
  p.out = mutable_data<char>(out);
  p.length = x.size(1);
  p.capacity = keep.size(1);
  p.tokens = x.size(0) * p.capacity;
  p.keep_stride = keep.stride(0);
  p.count_stride = counts.stride(0);
  p.align_end = align_end;
  const int64_t token_bytes = out.numel() / p.tokens * static_cast<int64_t>(x.element_size());
  switch (piece_bytes(p)) {
    case 16:
      launch_gather<uint4>(device, p, token_bytes);
      break;
    case 8:
      launch_gather<uint2>(device, p, token_bytes);
      break;
    case 4:
      launch_gather<uint32_t>(device, p, token_bytes);
      break;
    case 2:
      launch_gather<uint16_t>(device, p, token_bytes);
      break;
    default:
      launch_gather<uint8_t>(device, p, token_bytes);
  }
  return out;
}

}  // namespace
}  // namespace mustdrop

STABLE_TORCH_LIBRARY_IMPL(MUSTDROP_NAMESPACE, MUSTDROP_DEVICE_KEY, m) {
  m.impl("gather_tokens", TORCH_BOX(&mustdrop::gather_tokens));
}
