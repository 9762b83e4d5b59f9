// Conditioning that fits a store. Internal.
#pragma once

#include "turboquant/store.h"

namespace turboquant {

// check_conditioning() for this shape; values take no RoPE pairs.
Status check_store_conditioning(const Conditioning& conditioning, const StoreShape& shape);

} // namespace turboquant
