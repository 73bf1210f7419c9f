// LayerNorm's scale of every token of a grid. See perceiver_fast/ops/grid_scale.py for the maths.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace perceiver_fast {

// scale [B, M] from feat [B, M, F] and the mean and centred sum of squares of every axis code, [sum(sizes)] each;
// axis a has axis_channels[a] channels.
template <class T>
void grid_scale_forward(const T* feat, int64_t batch, const std::vector<int64_t>& sizes, int64_t features,
                        const T* axis_mean, const T* axis_square, const std::vector<int64_t>& axis_channels,
                        double eps, T* scale, const Parallel& parallel);

}  // namespace perceiver_fast
