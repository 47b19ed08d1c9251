/* Strobe's C ABI: exact flash attention over plain-old-data tensors. Needs nothing but C99 and <stdint.h>.
 *
 * Every call checks all of its arguments before it reads or writes tensor data. It returns STROBE_OK or a status,
 * and strobe_last_error() then holds the text (per thread) that names the function, what was given and what is allowed.
 */
#ifndef STROBE_STROBE_H
#define STROBE_STROBE_H

#include <stddef.h>
#include <stdint.h>

#if defined(STROBE_BUILD_SHARED)
#define STROBE_API __attribute__((visibility("default")))
#else
#define STROBE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define STROBE_VERSION "0.1.0"
#define STROBE_MAX_NDIM 8

typedef enum strobe_status {
  STROBE_OK = 0,
  STROBE_INVALID_VALUE = 1, /* a size, range or content that is not allowed */
  STROBE_INVALID_TYPE = 2,  /* a dtype or device that is not allowed */
  STROBE_UNSUPPORTED = 3,   /* a valid call that no engine here serves */
  STROBE_INTERNAL = 4       /* out of memory, or a bug of ours */
} strobe_status;

typedef enum strobe_dtype {
  STROBE_FLOAT32 = 1,
  STROBE_FLOAT16 = 2,
  STROBE_BFLOAT16 = 3,
  STROBE_INT32 = 4,
  STROBE_INT64 = 5,
  STROBE_OTHER = 15 /* what a front could not name; every check refuses it */
} strobe_dtype;

typedef enum strobe_device { STROBE_CPU = 1, STROBE_CUDA = 2, STROBE_OTHER_DEVICE = 15 } strobe_device;

/* Strides count elements. A null pointer to a strobe_tensor means "not given". */
typedef struct strobe_tensor {
  void* data;
  int32_t dtype;
  int32_t device;
  int32_t device_index;
  int32_t ndim;
  int64_t shape[STROBE_MAX_NDIM];
  int64_t stride[STROBE_MAX_NDIM];
} strobe_tensor;

/* How the engine runs its tasks. run() calls task(state, w) for each w in [0, n), concurrently or one after another,
 * and returns when all are done. A null executor means Strobe's own threads (STROBE_NUM_THREADS, else one per core). */
typedef void (*strobe_task)(void* state, int32_t worker);
typedef struct strobe_executor {
  void* context;
  int32_t (*num_threads)(void* context);
  void (*run)(void* context, int32_t n, strobe_task task, void* state);
} strobe_executor;

/* The arguments that forward, backward and decoding share. Initialise with strobe_args_init().
 * Shapes: b batch, sq/sk query/key lengths, h/hk/hv query/key/value heads (hk and hv divide h), d/dv head dims. */
typedef struct strobe_args {
  size_t struct_size;       /* set by strobe_args_init */
  const char* function;     /* the name that errors begin with; null: the C function's own */
  const strobe_tensor* q;   /* [b, sq, h, d], packed: [total_q, h, d] */
  const strobe_tensor* k;   /* [b, sk, hk, d], packed: [total_k, hk, d], paged: [num_pages, page_size, hk, d] */
  const strobe_tensor* v;   /* as k with [.., hv, dv] */
  const strobe_tensor* out; /* as q with [.., h, dv]; written */
  const strobe_tensor*
      lse; /* f32 [b, h, sq], packed: [h, total_q]; natural log, +inf where a row sees no key; written */
  const strobe_tensor* cu_seqlens_q; /* i32 [b + 1] */
  const strobe_tensor* cu_seqlens_k; /* i32 [b + 1] */
  const strobe_tensor* seqused_q;    /* i32 [b]: query rows used of each sequence */
  const strobe_tensor*
      seqused_k; /* i32 [b]: keys used of each sequence, left padding included (kvcache: before appending) */
  const strobe_tensor* leftpad_k;       /* i32 [b]: keys to skip at the front */
  const strobe_tensor* page_table;      /* i32 [b, max_pages]; -1 in columns that are not used */
  const strobe_tensor* cache_batch_idx; /* i32 [b]: row of k/v that sequence b uses (kvcache) */
  const strobe_tensor* full_from;       /* i32 [b]: query rows i >= full_from[b] have no left window bound */
  const strobe_tensor* alibi_slopes;    /* f32 [h] or [b, h] */
  const strobe_tensor* s_aux;           /* f32, f16 or bf16 [h]: learned sinks, natural-log units */
  int64_t max_seqlen_q, max_seqlen_k;   /* packed: upper bounds of the lengths; -1: not given */
  int32_t has_softmax_scale;            /* 0: d ** -0.5 */
  double softmax_scale;
  double softcap;        /* 0: off */
  double dropout_p;      /* [0, 1) */
  uint64_t seed, offset; /* Philox key and counter offset of the dropout mask */
  int32_t causal;
  int64_t window_left, window_right; /* -1: unbounded */
  int64_t keep_first;
  int32_t force_fa_decode;
  int32_t deterministic;
  const char* backend; /* null or "auto": the planner picks; "cpu"; "sm80", "sm90" */
  const strobe_executor* executor;
  /* Tensors on a GPU: f16 or bf16, all on one device, and there is no executor. The values of index tensors stay
   * unread, and one that leads outside a tensor is clamped; max_seqlen_q and max_seqlen_k bound packed lengths. */
  void* stream;           /* CUstream or cudaStream_t; null: the default stream */
  void* workspace;        /* device memory from a multiple of 256 bytes on; free when the stream has got there */
  size_t workspace_bytes; /* at least what strobe_*_workspace says */
} strobe_args;

/* Gradients. dout is given; dq, dk, dv, ds_aux are written whole (rows that nothing reaches get 0).
 * out, lse, seed and offset in `fwd` are those of the forward call. */
typedef struct strobe_backward_args {
  size_t struct_size;
  strobe_args fwd;
  const strobe_tensor* dout;   /* as out */
  const strobe_tensor* dlse;   /* as lse, or null */
  const strobe_tensor* dq;     /* as q */
  const strobe_tensor* dk;     /* as k */
  const strobe_tensor* dv;     /* as v */
  const strobe_tensor* ds_aux; /* f32 [h], required iff s_aux is given */
} strobe_backward_args;

/* Decoding with a cache: fwd.k and fwd.v are the caches; new keys are appended in place at seqused_k, then attention
 * covers seqused_k + sn keys. Rotary turns q and the new k. */
typedef struct strobe_kvcache_args {
  size_t struct_size;
  strobe_args fwd;
  const strobe_tensor* k_new;      /* [b, sn, hk, d] or null */
  const strobe_tensor* v_new;      /* [b, sn, hv, dv] or null */
  const strobe_tensor* rotary_cos; /* q's dtype [seqlen_ro, rotary_dim / 2] or null */
  const strobe_tensor* rotary_sin;
  int32_t rotary_interleaved;
} strobe_kvcache_args;

STROBE_API void strobe_args_init(strobe_args* args);
STROBE_API void strobe_backward_args_init(strobe_backward_args* args);
STROBE_API void strobe_kvcache_args_init(strobe_kvcache_args* args);

STROBE_API int32_t strobe_forward(const strobe_args* args);
STROBE_API int32_t strobe_backward(const strobe_backward_args* args);
STROBE_API int32_t strobe_kvcache(const strobe_kvcache_args* args);

/* Bytes of workspace that the call needs: 0 on the CPU. The same checks are made. */
STROBE_API int32_t strobe_forward_workspace(const strobe_args* args, size_t* bytes);
STROBE_API int32_t strobe_backward_workspace(const strobe_backward_args* args, size_t* bytes);
STROBE_API int32_t strobe_kvcache_workspace(const strobe_kvcache_args* args, size_t* bytes);

/* A compiled kernel, and what the compiler said of it. */
typedef struct strobe_kernel {
  const char* name; /* the kernel and its Config: "fwd_sm80{dtype=3, ...}" */
  const char* file; /* in the folder; null without one */
  int32_t arch;
  int32_t cached; /* 1: the folder had it already; the fields below are 0 */
  int32_t registers, stack_bytes, spill_bytes, smem_bytes;
  double seconds; /* of processor time that compiling took */
  const char* log;
} strobe_kernel;
typedef void (*strobe_kernel_visitor)(void* context, const strobe_kernel* kernel);

/* Compiles what a call on a GPU of this architecture (80, 86, 89, 90, 120) would run, and needs no GPU. `call` is a
 * line such as "pass=backward dtype=bf16 head_dim=192 head_dim_v=128 causal=1". With a folder, kernels are put there:
 * STROBE_CACHE_DIR=<folder> then finds them. `visit` sees each kernel. */
STROBE_API int32_t strobe_compile(const char* call, int32_t arch, const char* folder, strobe_kernel_visitor visit,
                                  void* context);

/* Writes what such a call would run, as text that ends with 0 and is cut off at `size` bytes: each kernel with its
 * Config and grid, splits, workspace, and why this engine. */
STROBE_API int32_t strobe_explain(const char* call, int32_t arch, char* text, size_t size);

/* The text of this thread's last failure, "" if there was none. Valid until the thread's next call. */
STROBE_API const char* strobe_last_error(void);
STROBE_API const char* strobe_version(void);
/* The instruction set that the CPU engine picked: "baseline", "avx2", "avx512", "avx512_bf16", "neon". */
STROBE_API const char* strobe_cpu_isa(void);

#ifdef __cplusplus
}
#endif
#endif
