// torch operators for grid attention on CUDA tensors, on torch's stable ABI: the sums over tokens that
// perceiver_fast/kernels/grid_attention_cuda.py asks for and merges. It has checked all but where tensors lie.
#include "grid_attention_backward.cuh"
#include "grid_attention_forward.cuh"

#include "torch_stable.h"

namespace perceiver_fast {
namespace {

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void expect(bool holds, const char* what) { STD_TORCH_CHECK(holds, "grid_attention: expected ", what); }

// q [B, N, F + rows + columns] float32, feat [B, rows, columns, F] bfloat16 or float16, scale float32 and mask uint8
// [B, rows, columns].
GridCall checked(const Tensor& q, const Tensor& feat, const Tensor& scale, const std::optional<Tensor>& mask,
                 const Tensor& column_parts, int64_t splits, int64_t per_split) {
  expect(q.dim() == 3 && feat.dim() == 4 && scale.dim() == 3 && column_parts.dim() == 4, "tensors of the op's ranks");
  expect(q.scalar_type() == ScalarType::Float && scale.scalar_type() == ScalarType::Float, "float32 q and scale");
  const bool float16 = feat.scalar_type() == ScalarType::Half;
  expect(float16 || feat.scalar_type() == ScalarType::BFloat16, "bfloat16 or float16 feat");
  expect(feat.is_contiguous() && scale.is_contiguous() && q.stride(2) == 1, "dense feat, scale and rows of q");
  const int64_t rows = feat.size(1), columns = feat.size(2), features = feat.size(3);
  expect(q.size(0) == feat.size(0) && q.size(2) == features + rows + columns, "q [B, N, F + rows + columns]");
  expect(scale.size(0) == feat.size(0) && scale.size(1) == rows && scale.size(2) == columns, "scale [B, rows, columns]");
  expect(features >= 1 && features <= (float16 ? 3 : 4), "1 to 4 channels in bfloat16, 1 to 3 in float16");
  expect(splits >= 1 && per_split % kChunk == 0, "whole chunks");
  expect(splits * per_split >= rows && (splits - 1) * per_split < rows, "splits that share the rows");
  for (const Tensor* t : {&feat, &scale, &column_parts})
    expect(t->is_cuda() && t->get_device_index() == q.get_device_index(), "tensors of one device");
  if (mask) {
    expect(mask->scalar_type() == ScalarType::Byte && mask->is_contiguous() && mask->numel() == scale.numel() &&
               mask->is_cuda() && mask->get_device_index() == q.get_device_index(),
           "a mask of bytes like scale");
  }
  GridCall call{pointer<const float>(q), q.stride(0), q.stride(1), pointer<const uint16_t>(feat),
                pointer<const float>(scale), mask ? pointer<const uint8_t>(*mask) : nullptr,
                int(q.size(0)), int(q.size(1)), int(rows), int(columns), int(column_parts.size(3)),
                int(splits), int(per_split)};
  expect(call.padded == call.column_blocks() * kTileColumns, "columns padded to whole blocks");
  expect(call.blocks() > 0 && call.blocks() < int64_t(1) << 31, "something to do, in fewer than 2^31 blocks");
  return call;
}

// Numbers by query: dense float32 of so many elements, on q's device.
float* numbers(const Tensor& t, int64_t elements, const Tensor& q) {
  expect(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == elements && t.is_cuda() &&
             t.get_device_index() == q.get_device_index(),
         "dense float32 sums and gradients of the op's shapes");
  return pointer<float>(t);
}

GridSums sums_of(const GridCall& call, const Tensor& q, const Tensor& column_parts, const Tensor& row_parts,
                 const Tensor& sum_parts, int64_t others) {
  const int64_t count = int64_t(call.batch) * call.queries, parts = int64_t(call.splits) * call.column_blocks();
  return {numbers(column_parts, call.splits * count * call.padded, q),
          numbers(row_parts, call.column_blocks() * count * call.rows, q), numbers(sum_parts, parts * count * others, q)};
}

void forward(const Tensor& q, const Tensor& feat, const Tensor& scale, const std::optional<Tensor>& mask,
             const Tensor& column_parts, const Tensor& row_parts, const Tensor& sum_parts, int64_t splits,
             int64_t per_split) {
  const DeviceGuard guard(q.get_device_index());
  const GridCall call = checked(q, feat, scale, mask, column_parts, splits, per_split);
  const int features = int(feat.size(3));
  const GridSums out = sums_of(call, q, column_parts, row_parts, sum_parts, features + 3);
  grid_attention_forward(Launch{current_stream(q)}, call, features, feat.scalar_type() == ScalarType::Half, out);
}

void backward(const Tensor& q, const Tensor& feat, const Tensor& scale, const std::optional<Tensor>& mask,
              const Tensor& d_o, const Tensor& stats, const Tensor& column_parts, const Tensor& row_parts,
              const Tensor& sum_parts, int64_t splits, int64_t per_split) {
  const DeviceGuard guard(q.get_device_index());
  const GridCall call = checked(q, feat, scale, mask, column_parts, splits, per_split);
  const int features = int(feat.size(3));
  const int64_t count = int64_t(call.batch) * call.queries;
  const GridGradients in{numbers(d_o, count * q.size(2), q), numbers(stats, 4 * count, q)};
  const GridSums out = sums_of(call, q, column_parts, row_parts, sum_parts, features + 1);
  grid_attention_backward(Launch{current_stream(q)}, call, features, feat.scalar_type() == ScalarType::Half, in, out);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(perceiver_fast, m) {
  m.def("grid_attention_sums(Tensor q, Tensor feat, Tensor scale, Tensor? mask, Tensor(a!) column_parts, "
        "Tensor(b!) row_parts, Tensor(c!) sum_parts, int splits, int per_split) -> ()");
  m.def("grid_attention_gradient_sums(Tensor q, Tensor feat, Tensor scale, Tensor? mask, Tensor d_o, Tensor stats, "
        "Tensor(a!) column_parts, Tensor(b!) row_parts, Tensor(c!) sum_parts, int splits, int per_split) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(perceiver_fast, CUDA, m) {
  m.impl("grid_attention_sums", TORCH_BOX(&forward));
  m.impl("grid_attention_gradient_sums", TORCH_BOX(&backward));
}

}  // namespace perceiver_fast
