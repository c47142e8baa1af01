// One call for the statistics of the attention map: tasks, scratch memory, threads, and the mean over rows.
#pragma once

#include "problem.h"

namespace atman {

// Writes windowed (the row sums of min(d, window)), p.received and counts, laid out as Statistics says, and, unless it is
// null, distance, (n_seq, heads_q).
void attention_statistics(Statistics p, const Scalars& windowed, float* distance, int32_t* counts, int64_t window,
                          const Kernels& kernels, int threads);

}  // namespace atman
