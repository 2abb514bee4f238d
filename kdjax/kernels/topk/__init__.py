"""topk: the K most likely entries of softmax(hidden @ head) per row, exact, without ever keeping [N, V]."""

from kdjax.kernels.topk.api import TopK

__all__ = ["TopK"]
