"""The operations a custom loss may be made of, by name. What is not listed here does not run.

All are pure functions of tensors and numbers: none writes into an argument, draws random numbers, reads a value out of
a tensor into Python, or touches files, devices or settings of the process.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


BOTH = _names(
    """
    abs absolute add addcdiv addcmul all amax amin any argmax argmin argsort atan bitwise_and bitwise_not bitwise_or
    bitwise_xor broadcast_to ceil chunk clamp clamp_max clamp_min clip clone cos cosh count_nonzero cummax cummin
    cumprod cumsum detach diff div divide dot eq erf erfc exp exp2 expm1 flatten flip floor floor_divide fmax fmin
    fmod frac gather ge greater greater_equal gt heaviside hypot index_add index_select isclose isfinite isinf isnan
    kthvalue le lerp less less_equal lgamma log log10 log1p log2 log_softmax logaddexp logaddexp2 logcumsumexp
    logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill masked_select matmul max maximum
    mean median min minimum moveaxis movedim mul multiply nan_to_num nanmean nanmedian nansum narrow ne neg negative
    not_equal numel outer permute positive pow prod quantile reciprocal relu remainder repeat_interleave reshape
    roll round rsqrt scatter scatter_add select sgn sigmoid sign signbit sin sinc sinh softmax sort split sqrt
    square squeeze std sub subtract sum swapaxes swapdims t take take_along_dim tan tanh tile topk transpose tril
    triu true_divide trunc unbind unflatten unsqueeze var where xlogy
    """
)
"""Functions of `torch` that are methods of a tensor too."""

TORCH_ONLY = _names(
    """
    arange cat concat concatenate cosine_similarity eye full full_like hstack linspace ones ones_like rsub stack
    std_mean var_mean vstack zeros zeros_like
    """
)
TORCH_PYTHON = _names("atleast_1d atleast_2d broadcast_tensors norm split")
"""Functions of `torch.functional`, which a trace names so or by `torch`."""
TORCH = BOTH | TORCH_ONLY | TORCH_PYTHON

NN = _names(
    """
    binary_cross_entropy binary_cross_entropy_with_logits cosine_similarity elu gelu hardtanh huber_loss kl_div
    l1_loss leaky_relu log_softmax logsigmoid mish mse_loss one_hot pad relu relu6 silu smooth_l1_loss softmax
    softmin softplus softsign
    """
)
SPECIAL = _names(
    """
    entr erf erfc exp2 expit expm1 log1p log_softmax logit logsumexp round softmax xlog1py xlogy
    """
)

OPERATOR = _names(
    """
    abs add and_ eq floordiv ge getitem gt inv invert le lt matmul mod mul ne neg or_ pos pow sub truediv xor
    """
)
MATH = _names(
    """
    ceil copysign cos cosh erf erfc exp exp2 expm1 fabs floor fmod isfinite isinf isnan lgamma log log10 log1p log2
    pow sin sinh sqrt tan tanh trunc
    """
)
"""Of numbers, such as sizes: never of tensors."""

METHODS = BOTH | _names(
    """
    bfloat16 bool contiguous dim double expand expand_as float half int long nelement new_full new_ones new_zeros
    norm repeat reshape_as size to type_as view view_as
    """
)

GETATTR = "getattr"
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})
"""Readable by `getattr`; the last two of what `sort`, `max` and their like return."""

_SPELLINGS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("torch.", "torch.", TORCH),
    ("torch.functional.", "torch.", TORCH_PYTHON),
    ("torch.nn.functional.", "torch.nn.functional.", NN),
    ("torch._C._nn.", "torch.nn.functional.", NN),
    ("torch.special.", "torch.special.", SPECIAL),
    ("torch._C._special.special_", "torch.special.", SPECIAL),
    ("operator.", "operator.", OPERATOR),
    ("math.", "math.", MATH),
)
"""Prefix in a trace, prefix of our name, names. Traces name some functions by the private module they live in."""

FUNCTIONS: dict[str, str] = {
    GETATTR: GETATTR,
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    "torch.linalg.vector_norm": "torch.linalg.vector_norm",
    "torch._C._linalg.linalg_vector_norm": "torch.linalg.vector_norm",
    **{given + name: ours + name for given, ours, names in _SPELLINGS for name in names},
}
"""Name in a trace to the function's one name with us."""

TARGETS = frozenset(FUNCTIONS.values())

KEYWORDS = _names(
    """
    accumulate_dtype alpha approximate atol axis base beta chunks copy correction delta descending device diagonal
    dim dim0 dim1 dims dtype end end_dim eps equal_nan exponent fill_value index indices input keepdim k largest
    layout length log_target mask max max_val memory_format min min_val mode n nan neginf negative_slope
    non_blocking num_classes ord other output_size p pad pos_weight posinf prepend append q reduction repeats
    rounding_mode rtol self shape shifts size sizes sorted source split_size split_size_or_sections src stable start
    start_dim step steps target tensor tensors threshold unbiased value values vec2 weight x x1 x2 y
    """
)
"""Names of arguments. `out` and `inplace` are not among them."""

STRINGS = _names(
    """
    none mean sum batchmean floor trunc fro tanh cpu constant linear lower higher midpoint nearest
    """
)
"""Texts an argument may be: names of reductions, roundings, norms."""

DTYPES = _names("float32 float64 float16 bfloat16 float double half int64 int32 long int bool")
LAYOUTS = frozenset({"strided"})
MEMORY_FORMATS = frozenset({"contiguous_format", "preserve_format"})
DEVICES = frozenset({"cpu"})
"""Custom losses run on the processor's cores, whatever the model runs on."""
