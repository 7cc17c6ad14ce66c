import triton
import triton.language as tl
from gdn_kernels.kernels.recurrent import span
@triton.jit
def segment_of(cu_seqlens_ptr, place, N, T, MAX: tl.constexpr, MIN: tl.constexpr):
    batch, start, length = span(cu_seqlens_ptr, place, T)
    segments = tl.maximum(1, tl.minimum(MAX, length // MIN))
    chunks = (length + 63) // 64
    per = (chunks + segments - 1) // segments
    segment = (place % MAX).to(tl.int32)
    first = segment * per
    return place, segment, segments, first, tl.minimum(per, chunks - first), batch, start, length
