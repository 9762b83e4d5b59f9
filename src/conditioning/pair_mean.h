// What a turning pair's mean becomes when it is averaged over the positions of a block.
#pragma once

#include <complex>

namespace turboquant {

// A = mean of e^(i theta j), j = 0..kPositionBlock-1.
std::complex<double> block_average(double theta);

} // namespace turboquant
