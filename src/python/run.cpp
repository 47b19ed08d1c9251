#include "python/run.h"

#include <optional>

#include "cpu/cpu.h"
#include "cpu/probabilities.h"
#include "host/cuda_engine.h"
#include "host/executor.h"
#include "python/torch_api.h"
#include "python/torch_threads.h"

namespace strobe::python {
namespace {

// Multiplications that take less time than giving up the interpreter's lock and taking it back.
constexpr i64 kSmall = 4096;

const strobe_executor& executor() {
  const strobe_executor* torch = torch_executor();
  return torch ? *torch : default_executor();
}

bool on_gpu(const Call& call) { return call.args.q->device == STROBE_CUDA; }

// The device of a call is the current one while this lives: torch allocates on the current device.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Call& call) {
    if (on_gpu(call)) current_.emplace(host::device(call.args.q->device_index));
  }

 private:
  std::optional<host::CurrentDevice> current_;
};

// What goes wrong on a GPU after the checks does not know the function that the user called.
template <class Body>
auto named_on_gpu(const Call& call, Body body) {
  return on_gpu(call) ? cuda::named(call.args.function, body) : body();
}

// On torch's current stream. The workspace goes back to torch's allocator at once, which hands it out again in the
// order of that stream.
template <class Params>
void run_on_gpu(const Params& params, const Call& call) {
  const strobe_tensor& q = *call.args.q;
  const host::Device& gpu = host::device(q.device_index);
  const host::Plan plan = cuda::plan(params, gpu);
  NewTensor workspace{Ref(), nullptr};
  const int64_t bytes = plan.workspace_bytes;
  if (bytes > 0) workspace = new_tensor(q, STROBE_OTHER, &bytes, 1);
  void* stream = current_stream(q.device_index);
  // A first call compiles: seconds without the interpreter's lock.
  without_gil([&] { cuda::run(params, plan, gpu, workspace.data, stream); });
}

// Binds new outputs of a checked call, so that it needs no second check.
Outputs allocate(const Call& call, AttnParams& params, const OutputShapes& shapes, bool want_lse) {
  const strobe_tensor& q = *call.args.q;
  const Rows given = params.out;
  Outputs outputs;
  void* out = nullptr;
  float* lse = nullptr;
  if (!call.args.out) {
    NewTensor fresh = new_tensor(q, q.dtype, shapes.out, shapes.out_ndim);
    outputs.out = std::move(fresh.object);
    out = fresh.data;
  }
  if (want_lse) {
    NewTensor fresh = new_tensor(q, STROBE_FLOAT32, shapes.lse, shapes.lse_ndim);
    outputs.lse = std::move(fresh.object);
    lse = static_cast<float*>(fresh.data);
  }
  bind_outputs(params, out, lse);
  if (call.args.out) params.out = given;
  return outputs;
}

}  // namespace

Outputs run_forward(Call& call, bool want_lse) {
  ForwardProblem problem;
  check_forward(call.args, problem);
  return named_on_gpu(call, [&] {
    const DeviceGuard device(call);
    Outputs outputs = allocate(call, problem.params, problem.shapes, want_lse);
    const AttnParams& p = problem.params;
    if (on_gpu(call)) {
      run_on_gpu(p, call);
    } else if (p.batch * p.seqlen_q * p.seqlen_k * p.num_heads * (p.head_dim + p.head_dim_v) <= kSmall) {
      cpu::forward(p, executor());
    } else {
      without_gil([&] { cpu::forward(p, executor()); });
    }
    return outputs;
  });
}

Outputs run_kvcache(Call& call, PyObject* const* extra, bool rotary_interleaved, bool want_lse) {
  strobe_kvcache_args args;
  strobe_kvcache_args_init(&args);
  args.fwd = call.args;
  args.k_new = call.read(extra[0], "k");
  args.v_new = call.read(extra[1], "v");
  args.rotary_cos = call.read(extra[2], "rotary_cos");
  args.rotary_sin = call.read(extra[3], "rotary_sin");
  args.rotary_interleaved = rotary_interleaved;
  KVCacheProblem problem;
  check_kvcache(args, problem);
  return named_on_gpu(call, [&] {
    const DeviceGuard device(call);
    Outputs outputs = allocate(call, problem.params.fwd, problem.shapes, want_lse);
    if (on_gpu(call)) {
      run_on_gpu(problem.params, call);
    } else {
      without_gil([&] { cpu::kvcache(problem.params, executor()); });
    }
    return outputs;
  });
}

Gradients run_backward(Call& call, PyObject* dout, PyObject* dlse) {
  strobe_backward_args args;
  strobe_backward_args_init(&args);
  args.fwd = call.args;
  for (const strobe_tensor* tensor : {call.args.q, call.args.k, call.args.v}) {
    if (!tensor || tensor->ndim > STROBE_MAX_NDIM)
      throw Error(STROBE_INVALID_VALUE, "strobe._C.backward: q, k or v is not that of a forward call");
  }
  Ref dense_dout, dense_dlse;  // what autograd sends may be expanded
  args.dout = call.read(dout, "dout");
  const int last = args.dout ? args.dout->ndim - 1 : -1;
  if (last >= 0 && last < STROBE_MAX_NDIM && args.dout->stride[last] != 1) {
    dense_dout = contiguous(dout);
    args.dout = call.read(dense_dout.get(), "dout");
  }
  if (dlse != Py_None) {
    dense_dlse = contiguous(dlse);
    args.dlse = call.read(dense_dlse.get(), "dlse");
  }
  const DeviceGuard device(call);
  Gradients gradients;
  const auto like = [&](const strobe_tensor& input, int32_t dtype, const char* name, Ref& object) {
    object = new_tensor(input, dtype, input.shape, input.ndim).object;
    return call.read(object.get(), name);
  };
  const strobe_args& fwd = args.fwd;
  args.dq = like(*fwd.q, fwd.q->dtype, "dq", gradients.dq);
  args.dk = like(*fwd.k, fwd.k->dtype, "dk", gradients.dk);
  args.dv = like(*fwd.v, fwd.v->dtype, "dv", gradients.dv);
  if (fwd.s_aux) args.ds_aux = like(*fwd.s_aux, STROBE_FLOAT32, "ds_aux", gradients.ds_aux);
  BackwardProblem problem;
  check_backward(args, problem);
  named_on_gpu(call, [&] {
    if (on_gpu(call)) {
      run_on_gpu(problem.params, call);
    } else {
      without_gil([&] { cpu::backward(problem.params, executor()); });
    }
  });
  return gradients;
}

void run_probabilities(Call& call, PyObject* s_dmask) {
  const strobe_tensor* matrix = call.read(s_dmask, "s_dmask");
  ForwardProblem problem;
  check_forward(call.args, problem);
  without_gil([&] { cpu::probabilities(problem.params, matrix->data, matrix->shape[2], matrix->shape[3]); });
}

}  // namespace strobe::python
