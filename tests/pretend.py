"""A pretend accelerator, for tests of device placement where there is none.

Its tensors hold real numbers in ordinary memory, and every operation on them is the CPU's. What
makes it a device is what it refuses: operations on tensors of two devices, as a GPU does. A package
that puts anything in the wrong place fails here as it would there, and what passes gives numbers
that can be compared with the CPU's.

    import pretend
    pretend.install()
    torch.ones(2, device="pretend") + torch.ones(2)  # RuntimeError

`install` renames PyTorch's PrivateUse1 backend and makes it the current accelerator, for the whole
process and for good: use it in a process of its own.
"""

import ctypes

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretend"
SETUP = "_setup_privateuseone_for_python_backend"
settings = {"float64": True}


def missing() -> str | None:
    "Why there can be no pretend device here, if so."
    if hasattr(backend_registration, SETUP):
        return None
    return f"torch {torch.__version__} has no {SETUP}, which makes a device out of Python"


# Tensors. DLPack hands memory on together with the device it is on; one field is overwritten.

CPU, EXTENSION = 1, 12  # DLPack's numbers for kinds of devices
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _relabelled(t: Tensor, kind: int) -> Tensor:
    "The same memory as a tensor of another device; a plain one, no subclass."
    capsule = torch._C._to_dlpack(t)
    device = ctypes.c_int64.from_address(_pointer(capsule, b"dltensor") + 8)
    device.value = kind  # in the first four bytes; the last four are the index, 0
    return torch._C._from_dlpack(capsule)


def on_cpu(t: Tensor) -> Tensor:
    "A CPU tensor over the same memory."
    return t if t.is_cpu else _relabelled(t, CPU)


def on_device(t: Tensor) -> Tensor:
    "A tensor of the pretend device over the same memory."
    if t.dtype in (torch.float64, torch.complex128) and not settings["float64"]:
        raise TypeError(f"the {NAME} device does not have {t.dtype}; use float32")
    return _relabelled(t, EXTENSION)


# Operations.

_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_INDEXING = (
    "index",
    "_unsafe_index",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_unsafe_index_put",
)


def _first(names, place: dict):
    "The place of the first of `names` that has one."
    for name in names:
        if name in place:
            return place[name]
    return None


class Operation:
    "What the schema of an operation says, read once."

    def __init__(self, op):
        returns, arguments = op._schema.returns, list(enumerate(op._schema.arguments))
        self.name = op._schema.name.split("::")[1]
        packet = getattr(torch.ops.aten, self.name, None)  # slow: it tries overload by overload
        self.called_with_numbers = getattr(torch, self.name, getattr(Tensor, self.name, packet))
        self.random = torch.Tag.nondeterministic_seeded in op.tags
        self.indexing = self.name in _INDEXING
        self.outputs = tuple(a.name for _, a in arguments if a.kwarg_only and a.alias_info)
        self.tensors = tuple(i for i, a in arguments if isinstance(a.type, torch.TensorType))
        aliased = [r.alias_info for r in returns if r.alias_info]
        view = bool(aliased) and not any(info.is_write for info in aliased)
        self.original = view or self.name == "set_"  # works on storage and offset
        place = {
            name: a.name if a.kwarg_only else i
            for i, a in arguments
            for name in (a.alias_info.before_set if a.alias_info else ())
        }
        sets = [r.alias_info.before_set if r.alias_info else () for r in returns]
        self.same = tuple(_first(names, place) for names in sets)


_operations = {}


def _operation(op) -> Operation:
    "`Operation` of `op`, made the first time."
    found = _operations.get(id(op))
    return found or _operations.setdefault(id(op), Operation(op))


def _refuse(about: Operation, why: str):
    raise RuntimeError(f"{about.name}: {why}")


def _mapped(function, value):
    "A value with `function` applied to each tensor in it. (`tree_map` takes ten times as long.)"
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(function, v) for v in value])
    return value


def _unwrapped(about: Operation, args: tuple, kwargs: dict) -> tuple[list, dict]:
    "The arguments for the CPU. Refuses what a GPU refuses: tensors, or a generator, of the CPU."

    def unwrap(t):
        if t.is_cpu and t.dim():
            _refuse(
                about,
                "Expected all tensors to be on the same device, but found at least two "
                f"devices, {NAME}:0 and {t.device}! (shape {tuple(t.shape)})",
            )
        return on_cpu(t)

    if kwargs.get("generator") is not None:
        _refuse(about, f"Expected a '{NAME}' device type for generator but found another")
    cpu_args = [
        _mapped(on_cpu if about.indexing and i == 1 else unwrap, v)  # indices may be there
        for i, v in enumerate(args)
    ]
    return cpu_args, {n: _mapped(unwrap, v) for n, v in kwargs.items()}


def _callable(op, about: Operation, args: tuple):
    "What to call for an operation. Numbers arrive as such where the schema says tensor."
    for i in about.tensors:
        if i < len(args) and isinstance(args[i], (int, float)):
            return about.called_with_numbers
    return op


def _computed(op, about: Operation, args: tuple, kwargs: dict):
    "What the CPU makes of an operation. Random numbers come from the device's own state."
    call = _callable(op, about, args)
    if not about.random:
        return call(*args, **kwargs)
    with random.borrowed():
        return call(*args, **kwargs)


def _replace(t: Tensor, value: Tensor):
    "Give a tensor other memory: borrowed memory cannot grow."
    torch.ops.aten.set_.source_Tensor.redispatch(_CPU_KERNEL, t, on_device(value))


def _kernel(op, *args, **kwargs):
    "Any operation on tensors of the pretend device: check, unwrap, run, wrap."
    about = _operation(op)
    if about.original:
        return op.redispatch(_CPU_KERNEL, *args, **kwargs)
    cpu_args, cpu_kwargs = _unwrapped(about, args, kwargs)
    fresh = {
        n: torch.empty(0, dtype=kwargs[n].dtype)
        for n in about.outputs
        if n in kwargs and not kwargs[n].numel()
    }  # these are to be given their size
    cpu_kwargs.update(fresh)
    if "device" in cpu_kwargs:  # a factory
        cpu_kwargs["device"] = torch.device("cpu")
    result = _computed(op, about, cpu_args, cpu_kwargs)
    for name, value in fresh.items():
        _replace(kwargs[name], value)
    return _wrapped(about, result, args, kwargs)


def _wrapped(about: Operation, result, args: tuple, kwargs: dict):
    "Results as tensors of the pretend device; where one is an argument, that argument itself."
    several, out = isinstance(result, tuple), []
    for i, r in enumerate(result if several else (result,)):
        place = about.same[i] if i < len(about.same) else None
        if place is None:
            out.append(_mapped(on_device, r))
        else:
            out.append(kwargs[place] if isinstance(place, str) else args[place])
    return tuple(out) if several else out[0]


def _empty(size, *, dtype=None, **_) -> Tensor:
    return on_device(torch.empty(size, dtype=dtype))


def _empty_strided(size, stride, *, dtype=None, **_) -> Tensor:
    return on_device(torch.empty_strided(size, stride, dtype=dtype))


def _copy(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    "All copies, within the device and across."
    on_cpu(to).copy_(on_cpu(source))
    return to


def _resize(t: Tensor, size, *, memory_format=None) -> Tensor:
    "Another size, with as many of the numbers as fit."
    if list(t.shape) != list(size):
        value = torch.zeros(size, dtype=t.dtype)
        n = min(t.numel(), value.numel())
        value.view(-1)[:n] = on_cpu(t).reshape(-1)[:n]
        _replace(t, value)
    return t


KERNELS = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "resize_": _resize,
    "_copy_from": _copy,
    "_copy_from_and_resize": _copy,
}


# Automatic mixed precision: PyTorch's own lists for CUDA, as far as language models need them.

LOWER = (
    "mm addmm bmm baddbmm addbmm mv addmv matmul linear einsum chain_matmul convolution "
    "conv1d conv2d prelu scaled_dot_product_attention"
).split()
FLOAT32 = (
    "exp expm1 log log10 log2 log1p reciprocal rsqrt softplus layer_norm native_layer_norm "
    "group_norm cosine_similarity nll_loss nll_loss_nd kl_div mse_loss l1_loss "
    "smooth_l1_loss huber_loss logsumexp dist cdist softmax.int log_softmax.int cumsum "
    "cumprod sum sum.dim_IntList prod pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar "
    "norm.Scalar linalg_vector_norm"
).split()
WIDEST = "addcdiv addcmul dot vdot tensordot index_put scatter_add cat stack".split()
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _may_cast(t) -> bool:
    return not t.is_cpu and t.is_floating_point() and t.dtype != torch.float64


def _widest(args) -> torch.dtype:
    "The widest type among tensors that may be cast."
    found = set()
    _mapped(lambda t: found.add(t.dtype) if _may_cast(t) else None, args)
    return torch.float32 if torch.float32 in found else torch.get_autocast_dtype(NAME)


def _casting(op, dtype_for):
    "A kernel that casts tensors to the type that `dtype_for` gives for the arguments."

    def kernel(*args, **kwargs):
        dtype = dtype_for(args)

        def cast(t):
            return t.to(dtype) if _may_cast(t) else t

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*_mapped(cast, args), **{n: _mapped(cast, v) for n, v in kwargs.items()})

    return kernel


def _lower(args):
    return torch.get_autocast_dtype(NAME)


def _float32(args):
    return torch.float32


def _register_autocast(everything, aten):
    "All operations pass autocast by, but those on the lists."
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype_for in ((LOWER, _lower), (FLOAT32, _float32), (WIDEST, _widest)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, _casting(op, dtype_for), "AutocastPrivateUse1")


# Random numbers and the module `torch.pretend`.


class Random:
    "The random state of the device, apart from the CPU's."

    def __init__(self):
        self.seed(0)

    def seed(self, seed: int):
        self.state = torch.Generator().manual_seed(seed).get_state()

    def borrowed(self):
        "A context inside which the CPU's random numbers are the device's."
        return _Borrowed(self)


class _Borrowed:
    def __init__(self, owner: Random):
        self.owner = owner

    def __enter__(self):
        self.cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(self.owner.state)

    def __exit__(self, *error):
        self.owner.state = torch.default_generator.get_state()
        torch.default_generator.set_state(self.cpu)


random = Random()


class Module:
    "What PyTorch and users ask of `torch.pretend`, as of `torch.cuda`."

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def get_amp_supported_dtype(self) -> list:
        return [torch.bfloat16, torch.float16]

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device):
        pass

    def synchronize(self, device=None):
        pass

    def get_device_name(self, device=None) -> str:
        return "a pretend device"

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int):
        random.seed(seed)

    def manual_seed_all(self, seed: int):
        random.seed(seed)

    def get_rng_state(self, device=None) -> Tensor:
        return random.state.clone()

    def set_rng_state(self, state: Tensor, device=None):
        random.state = state.clone()

    def get_rng_state_all(self) -> list[Tensor]:
        return [self.get_rng_state()]

    def set_rng_state_all(self, states: list[Tensor]):
        self.set_rng_state(states[0])


def _structured() -> list[str]:
    "Operations that PyTorch makes of an `out=` variant, unless a device has a kernel: two for one."
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [
        n.removeprefix("aten::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("aten::") and has(n, "CompositeExplicitAutogradNonFunctional")
    ]
    return [n for n in names if not has(f"aten::{n}", "CompositeImplicitAutograd")]


def _kernel_of(name: str):
    "`_kernel` for one operation."
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _kernel(op, *args, **kwargs)


_kept = []  # libraries lose their kernels with the last reference


def install(float64: bool = True) -> str:
    "Make the device; its name. Without `float64` it refuses numbers of that type, as MPS does."
    settings["float64"] = float64
    getattr(backend_registration, SETUP)(rename=NAME, backend_module=Module())
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _kept.extend((everything, aten))
    everything.fallback(_kernel, "PrivateUse1")
    for name in _structured():
        aten.impl(name, _kernel_of(name), "PrivateUse1")
    for name, kernel in KERNELS.items():
        aten.impl(name, kernel, "PrivateUse1")
    _register_autocast(everything, aten)
    # A module that moves keeps its parameters' identity, as on CUDA: tied weights stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    return NAME
