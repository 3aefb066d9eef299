// Attention of new tokens over kept blocks of a cache, on the CPU in float32.
//
// Compiled behind cpp_forward.cpp, whose vectors it takes. One query asks alone here, so numbers of
// a head lie in the lanes, and a row's logits are kept until its softmax.

namespace {

struct Decode {
  const float *query, *key, *value;
  const int32_t *counts, *indices;
  const float* bias;                 // of every listed block, or null
  const int64_t *lengths, *starts;   // per sample; starts or null
  float *out, *lse;                  // (batch, queries, heads, head_dim); (batch, heads, queries)
  // Steps between samples, tokens and heads; head_dim is contiguous everywhere.
  int64_t query_step[3], key_step[3], value_step[3];
  // Between samples, heads, tokens (and slots).
  int64_t count_step[3], index_step[4], bias_step[4];
  int64_t batch, queries, capacity, heads, kv_heads, lists, head_dim, width, block_size, threads;
  double scale;
};

typedef float Four __attribute__((vector_size(16)));

// The sum of the lanes; one by one they would wait for each other.
inline float total_of(Floats x) {
  Four part[kLanes / 4], sum{};
  std::memcpy(part, &x, sizeof x);
  for (const Four& four : part) sum += four;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline float dot(const float* a, const float* b, int64_t depth) {
  Floats sum{};
  int64_t t = 0;
  for (; t + kLanes <= depth; t += kLanes) sum += load(a + t) * load(b + t);
  float total = total_of(sum);
  for (; t < depth; t++) total += a[t] * b[t];
  return total;
}

// One query; `weights` has room for all keys that it may read, `places` for where they lie.
void attend_token(const Decode& p, int64_t b, int64_t h, int64_t n, float* weights,
                  int64_t* places) {
  const int64_t d = p.head_dim, kv_head = h / (p.heads / p.kv_heads);
  const int64_t list = h / (p.heads / p.lists);
  const float* query = p.query + b * p.query_step[0] + n * p.query_step[1] + h * p.query_step[2];
  const float* key = p.key + b * p.key_step[0] + kv_head * p.key_step[2];
  const float* value = p.value + b * p.value_step[0] + kv_head * p.value_step[2];
  const int64_t start = p.starts ? p.starts[b] : 0;
  // The query sees the tokens up to its own.
  const int64_t length = std::min(std::max<int64_t>(p.lengths[b], 0), p.capacity);
  const int64_t limit = std::min(length - p.queries + n + 1, p.capacity - start);
  const int32_t* blocks =
      p.indices + b * p.index_step[0] + list * p.index_step[1] + n * p.index_step[2];
  const float* biases =
      p.bias ? p.bias + b * p.bias_step[0] + list * p.bias_step[1] + n * p.bias_step[2] : nullptr;
  const int64_t kept = std::min<int64_t>(
      p.counts[b * p.count_step[0] + list * p.count_step[1] + n * p.count_step[2]], p.width);
  const float scale = float(p.scale * kLog2E);
  int64_t keys = 0;
  float top = -kInfinity;
  for (int64_t slot = 0; slot < kept; slot++) {
    const int64_t j = blocks[slot * p.index_step[3]];
    const float bias = biases ? kLog2E * biases[slot * p.bias_step[3]] : 0;
    // What names no block, and what nobody reads.
    if (j < 0 || j * p.block_size >= limit || bias == -kInfinity) continue;
    const int64_t end = std::min((j + 1) * p.block_size, limit);
    for (int64_t m = j * p.block_size; m < end; m++, keys++) {
      places[keys] = start + m;
      const float s = dot(query, key + places[keys] * p.key_step[1], d) * scale + bias;
      weights[keys] = s;
      top = s > top ? s : top;
    }
  }
  float* out = p.out + ((b * p.queries + n) * p.heads + h) * d;
  std::fill(out, out + d, 0.0f);
  float sum = 0;
  for (int64_t m = 0; m < keys; m += kLanes) {
    // There is room for whole registers.
    const Floats weight = exp2(load(weights + m) - (top == -kInfinity ? 0 : top));
    store(weights + m, weight);
    for (int lane = 0; lane < kLanes && m + lane < keys; lane++) sum += weight[lane];
  }
  for (int64_t m = 0; m < keys; m++) {
    const float* row = value + places[m] * p.value_step[1];
    int64_t t = 0;
    for (; t + kLanes <= d; t += kLanes) {
      store(out + t, load(out + t) + weights[m] * load(row + t));
    }
    for (; t < d; t++) out[t] += weights[m] * row[t];
  }
  const float factor = sum == 0 ? 0 : 1 / sum;
  for (int64_t t = 0; t < d; t++) out[t] *= factor;
  float& lse = p.lse[(b * p.heads + h) * p.queries + n];
  lse = sum == 0 ? -kInfinity : (top + std::log2(sum)) * kLn2;
  // An infinite logit takes all the weight: not inf - inf.
  if (top == kInfinity) lse = kInfinity;
}

// Takes queries until none is left.
void attend_tokens(const Decode& p, std::atomic<int64_t>& next, std::atomic<int>& status) {
  const int64_t total = p.batch * p.heads * p.queries, room = p.width * p.block_size + kLanes;
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, room * (sizeof(float) + sizeof(int64_t)))) {
    status = 2;
    return;
  }
  int64_t* places = static_cast<int64_t*>(memory);
  float* weights = reinterpret_cast<float*>(places + room);
  std::fill(weights, weights + room, 0.0f);
  for (int64_t task; (task = next++) < total;) {
    attend_token(p, task / p.queries / p.heads, task / p.queries % p.heads, task % p.queries,
                 weights, places);
  }
  std::free(memory);
}

}  // namespace

// 0: done. 2: out of memory.
extern "C" int block_sparse_decode(const Decode* problem) {
  std::atomic<int64_t> next(0);
  std::atomic<int> status(0);
  Decode p = *problem;
  // Lists have room for the most that a row may read.
  int64_t most = 0;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t list = 0; list < p.lists; list++) {
      for (int64_t n = 0; n < p.queries; n++) {
        const int64_t place = b * p.count_step[0] + list * p.count_step[1] + n * p.count_step[2];
        most = std::max<int64_t>(most, p.counts[place]);
      }
    }
  }
  p.width = std::min(p.width, most);
  const int64_t tasks = p.batch * p.heads * p.queries;
  // PyTorch's threads wait busily for a while; to start another among them takes a millisecond,
  // as long as 2^21 numbers to read.
  const int64_t worth = tasks * p.width * p.block_size * p.head_dim >> 21;
  on_threads(std::min({p.threads, tasks, worth}), [&] { attend_tokens(p, next, status); });
  return status;
}
