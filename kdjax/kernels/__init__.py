"""Everything that is computed over the vocabulary, in tiles: 49k to 262k columns, and never an array of rows x columns.

    linear_stats        what one pass says about softmax(hidden @ head); `linear_pair_stats` of two sides, with both KLs
    linear_divergence   weighted sums of pointwise divergences between two heads, with gradient
    sparse_divergence   the same against K stored entries of the teacher per row
    topk                the K most likely entries
    linear_sample       K draws from the distribution, or from a power of it
    head_gradient       the squared norm of an answer's gradient in the head, its parts, its product with the question's
    attention           over keys and not over the vocabulary: its own shapes, tests and names (see there)

An op is a folder. `__init__.py` is the public function: it checks its arguments and asks `_dispatch` who runs.

    reference.py    whole [N, V] arrays and JAX's own differentiation: the definition
    xla.py          tiled; the default on CPU, and right everywhere
    pallas_tpu.py   Mosaic; the default on TPU
    pallas_gpu.py   Mosaic GPU (Hopper); the default on GPU
    block_sizes.py  the table of tile sizes per chip, with the arithmetic that says they fit

A name that is given (`implementation="xla"`, or `mesh.kernels` in a config) is taken or is an error. Without one the
first of the platform's order that does not decline runs; each reason for passing one over is warned of once. Where
`mesh.kernels` names a Pallas kernel, ops without (`linear_sample`, `head_gradient`) take the default.

To add an implementation of an op
  1. A module with the functions of the op's other implementations: same arguments, same results.
  2. A line in IMPLEMENTATIONS of the op, and in DECLINES if it cannot take everything: (target, *arguments) -> a
     sentence that says why not, or None. A new name also goes into `_dispatch.ORDER` and the rule of `mesh.kernels`.
  3. What then runs by itself: value, gradient, vmap, extreme logits, split vocabulary and bfloat16 against float64
     (tests/kernels, tests/sharded; TPU kernels in interpret mode), compilation for every chip (tests/aot), the bench.

To add an op
  1. `reference.py` from the formula and a float64 oracle of it in tests/kernels/oracle.py, written independently.
  2. The harness: tests/kernels/test_<op>.py over IMPLEMENTATIONS x problems.SHAPES; then `xla.py`, then the others.
  3. A line in CASES of `shapes.py`: from it the bench times it and tests/aot compiles it for all chips.

To add a divergence: no kernel at all. One elementwise `Term` (`linear_divergence/api.py`), in kdjax/losses.

Conventions: statistics, accumulators and results in float32 whatever the inputs are; nats; the lower id first on ties;
rows of weight 0 add nothing, whatever they hold. A head that is split over a mesh axis (`Head.vocab_axis`) stays split:
devices combine maxima and sums of [N], and hidden states' gradients are added up by the transpose of `shard_map`.
"""
