"""What every entry of LOSSES must keep, found through the table: a new loss needs only its float64 formula here."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kdjax.config import Loss, Mesh
from kdjax.kernels.linear_divergence import Pair, linear_divergence
from kdjax.losses import LOSSES
from kdjax.sharding import make_rules
from kdjax.types import Head
from tests.kernels import oracle


@dataclasses.dataclass(frozen=True)
class Oracle:
    """value(teacher logits, student logits, labels, config) -> [N] in float64; what the loss says of itself.

    reads: the one field of the config that the loss depends on, if any.
    given: reads a number per row, which is its last argument. vanishes: value and gradient are 0 at the teacher.
    detached: where parts of the loss are under stop-gradient, the same function with one argument more, the student
    logits from which those parts are taken; what is differentiated.
    """

    value: Callable[[np.ndarray, np.ndarray, np.ndarray, Loss], np.ndarray]
    reads: str = ""
    teacher: bool = True
    tempered: bool = True
    given: bool = False
    vanishes: Callable[[Loss], bool] = lambda config: True
    detached: Callable[[np.ndarray, np.ndarray, np.ndarray, Loss, np.ndarray], np.ndarray] | None = None


def jsd(p, q, y, c):
    return c.beta * oracle.kl_to_mixture(p, q, c.beta) + (1 - c.beta) * oracle.kl_to_mixture(q, p, 1 - c.beta)


def tvd(p, q, y, c):
    return 0.5 * np.abs(np.exp(oracle.log_softmax(p)) - np.exp(oracle.log_softmax(q))).sum(-1)


def cross_entropy(p, q, y, c):
    return -oracle.log_softmax(q)[np.arange(len(q)), y]


def todi(p, q, y, c, at):
    gap = oracle.log_softmax(p) - oracle.log_softmax(at)
    share = np.exp(-np.logaddexp(0, -c.todi_scale * gap))  # a sigmoid
    logp, logq = oracle.log_softmax(p), oracle.log_softmax(q)
    return (share * np.exp(logp) * (logp - logq) + (1 - share) * np.exp(logq) * (logq - logp)).sum(-1)


def akl(p, q, y, c, at):
    """Equal probabilities are one step: into the head while its mass is at most mu, the first always."""
    probabilities = np.exp(oracle.log_softmax(p))
    gaps = np.abs(probabilities - np.exp(oracle.log_softmax(at)))
    share = np.zeros(len(p))
    for row, (steps, gap) in enumerate(zip(probabilities, gaps, strict=True)):
        head = steps == steps.max()
        for step in np.unique(steps)[::-1]:
            if steps[steps >= step].sum() <= c.akl_mu:
                head = steps >= step
        share[row] = gap[head].sum() / (gap.sum() or 1.0)
    return share * oracle.kl(p, q) + (1 - share) * oracle.kl(q, p)


def decoupled(p, q, y):
    """KL of the label against the rest and KL among the rest, from the rest's logits and the log of their sum."""
    others = ~np.eye(p.shape[1], dtype=bool)[y]
    rest_p, rest_q = (z[others].reshape(len(z), -1) for z in (p, q))

    def against_rest(z, rest):
        return np.stack([z[np.arange(len(z)), y], np.logaddexp.reduce(rest, -1)], 1)

    return oracle.kl(against_rest(p, rest_p), against_rest(q, rest_q)), oracle.kl(rest_p, rest_q)


def dkd(p, q, y, c):
    against, among = decoupled(p, q, y)
    return against + c.dkd_beta * among


def at_kd(p, q, y, c, given):
    against, among = decoupled(p, q, y)
    return among + given * against


def udkd(p, q, y, c, at):
    gates = {
        "unc": lambda: 1 - np.exp(oracle.log_softmax(p))[np.arange(len(p)), y],
        "teacher_entropy": lambda: oracle.entropy(p) / np.log(p.shape[1]),
        "student_entropy": lambda: oracle.entropy(at) / np.log(p.shape[1]),
        "kl": lambda: oracle.kl(p, at),
        "reverse_kl": lambda: oracle.kl(at, p),
    }
    logp, logq = (oracle.log_softmax(z)[np.arange(len(z)), y] for z in (p, q))
    return decoupled(p, q, y)[1] - gates[c.udkd_gate]() * np.exp(logp) * logq


def taid(p, q, y, c, given, at):
    """Cross-entropy to softmax((1 - t) z_S + t z_T), t from 0 to 1."""
    t = np.clip(given, 0, 1)[:, None]
    return -(np.exp(oracle.log_softmax((1 - t) * oracle.f64(at) + t * p)) * oracle.log_softmax(q)).sum(-1)


def drawn(p, q, y):
    """log p(y) - log q(y)."""
    return (oracle.log_softmax(p) - oracle.log_softmax(q))[np.arange(len(q)), y]


def score_gradient(p, q, y, c, at):
    return -drawn(p, at, y) * (1 - drawn(at, q, y))


def k3(p, q, y, c, at):
    """Larger differences than 30 count as 30 in the exponential, value and slope."""
    d = drawn(p, at, y)
    grown = np.expm1(np.minimum(d, 30))
    return grown - d + grown * drawn(at, q, y)


ORACLES = {
    "forward_kl": Oracle(lambda p, q, y, c: oracle.kl(p, q)),
    "reverse_kl": Oracle(lambda p, q, y, c: oracle.kl(q, p)),
    "jsd": Oracle(jsd, "beta"),
    "skew_kl": Oracle(lambda p, q, y, c: oracle.kl_to_mixture(p, q, c.skew), "skew"),
    "skew_reverse_kl": Oracle(lambda p, q, y, c: oracle.kl_to_mixture(q, p, c.skew), "skew"),
    "tvd": Oracle(tvd),
    "todi": Oracle(lambda p, q, y, c: todi(p, q, y, c, q), "todi_scale", detached=todi),
    "akl": Oracle(lambda p, q, y, c: akl(p, q, y, c, q), "akl_mu", detached=akl),
    "dkd": Oracle(dkd, "dkd_beta"),
    "udkd": Oracle(
        lambda p, q, y, c: udkd(p, q, y, c, q), "udkd_gate", vanishes=lambda c: "kl" in c.udkd_gate, detached=udkd
    ),
    "at_kd": Oracle(at_kd, given=True),
    "adakd_forward_kl": Oracle(
        lambda p, q, y, c, given: given**2 * oracle.kl(p / given[:, None], q / given[:, None]), given=True
    ),
    "adakd_reverse_kl": Oracle(
        lambda p, q, y, c, given: given**2 * oracle.kl(q / given[:, None], p / given[:, None]), given=True
    ),
    "taid": Oracle(
        lambda p, q, y, c, given: taid(p, q, y, c, given, q),
        given=True,
        vanishes=lambda c: False,
        detached=lambda p, q, y, c, at: taid(p, q, y, c, given_of(len(q)), at),
    ),
    "sampled_reverse_kl": Oracle(lambda p, q, y, c: -drawn(p, q, y), tempered=False, detached=score_gradient),
    "sampled_k2": Oracle(lambda p, q, y, c: drawn(p, q, y) ** 2 / 2, tempered=False),
    "sampled_k3": Oracle(lambda p, q, y, c: k3(p, q, y, c, q), tempered=False, detached=k3),
    "cross_entropy": Oracle(cross_entropy, teacher=False, tempered=False),
}
VARIANTS = {  # the default first
    "beta": (0.5, 0.1, 0.9),
    "skew": (0.1, 0.0, 0.6),
    "todi_scale": (1.0, 0.0, 3.0),
    "akl_mu": (0.5, 0.1, 0.9),
    "dkd_beta": (8.0, 0.0, 1.0),
    "udkd_gate": ("unc", "teacher_entropy", "student_entropy", "kl", "reverse_kl"),
}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_variant = pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param(name, Loss(**{field: value}) if field else Loss(), id=f"{name}-{value}" if field else name)
        for name in LOSSES
        for field in [ORACLES[name].reads if name in ORACLES else ""]
        for value in VARIANTS.get(field, [0.0])
    ],
)


def oracle_of(name):
    if name not in ORACLES:
        pytest.fail(f"the loss {name!r} has no oracle: add its float64 formula to ORACLES in {__file__}", pytrace=False)
    return ORACLES[name]


def oracle_value(name, teacher, student, labels, config):
    """In float64, [N]."""
    said = (given_of(len(student)),) if oracle_of(name).given else ()
    return oracle_of(name).value(teacher, student, labels, config, *said)


def oracle_slope(name, teacher, student, labels, config):
    """d value / d student logits in float64, by central differences."""
    want = oracle_of(name)
    if want.detached is None:
        return oracle.slope(lambda logits: oracle_value(name, teacher, logits, labels, config), student)
    return oracle.slope(lambda logits: want.detached(teacher, logits, labels, config, student), student)


DEFAULT = Loss()
ROWS, VOCAB = 36, 11  # one shape wherever it can be: programs are compiled once per shape


def given_of(rows):
    """A number per row for the losses that ask: a share (at_kd), a temperature (adakd)."""
    return (np.linspace(0.5, 1.75, rows) * 256).round() / 256


@functools.cache
def term_of(name, config):
    """One object per loss and config: programs are kept by it."""
    return LOSSES[name](config)


@functools.cache
def differentiated(term):
    def total(student, head, teacher, teacher_head, labels, weight, tau, given):
        sides = (student, head, teacher, teacher_head)
        return linear_divergence(*sides, labels, weight, [term], [1.0], tau, given=given)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def evaluate(name, student, teacher, *, labels=None, weight=None, config=DEFAULT, tau=1.0, given=None):
    """(total, values [N], d total / d student logits): the head is the identity, so that rows are their own logits."""
    student, teacher = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    n, v = student.shape
    labels = jnp.zeros(n, jnp.int32) if labels is None else jnp.asarray(labels, jnp.int32)
    weight = jnp.ones(n) if weight is None else jnp.asarray(weight, jnp.float32)
    head, term = Head(jnp.eye(v), v), term_of(name, config)
    sides = (teacher, head) if term.teacher else (None, None)
    given = jnp.asarray(given_of(n) if given is None else given, jnp.float32) if term.given else None

    (total, values), gradient = differentiated(term)(student, head, *sides, labels, weight, tau, given)
    return total, values[0], gradient


def evaluate_row(name, student, teacher, *, label=0, config=DEFAULT, tau=1.0):
    """(value, d value / d student logits) of one row of few classes, put into the usual shape.

    The classes that it lacks have probability 0, the rows weight 0.
    """
    shape = np.full((ROWS, VOCAB), -1e4)
    wide = {"student": shape.copy(), "teacher": shape.copy()}
    wide["student"][0, : len(student)], wide["teacher"][0, : len(teacher)] = student, teacher
    labels, weight = np.full(ROWS, label), np.eye(ROWS)[0]
    _, values, gradient = evaluate(name, **wide, labels=labels, weight=weight, config=config, tau=tau)
    assert not gradient[0, len(student) :].any()
    assert not gradient[1:].any()
    return values[0], gradient[0, : len(student)]


def draw(rows=ROWS, vocab=VOCAB, seed=0):
    """(student logits, teacher logits, labels), rounded so that float32 holds them exactly."""
    numbers = np.random.default_rng(seed)
    student, teacher = (numbers.normal(size=(2, rows, vocab)) * 512).round() / 256
    return student, teacher, numbers.integers(vocab, size=rows)


def test_every_loss_has_an_oracle():
    missing, gone = set(LOSSES) - set(ORACLES), set(ORACLES) - set(LOSSES)
    assert not missing, f"add the float64 formulas of {sorted(missing)} to ORACLES"
    assert not gone, f"remove {sorted(gone)} from ORACLES"


@every_variant
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_oracle(name, config, tau):
    """Value, and gradient by central differences of the float64 formula; tau^2 for what is tempered, 1 for the rest."""
    want, (student, teacher, labels) = oracle_of(name), draw()
    t = tau if want.tempered else 1.0

    value = oracle_value(name, teacher / t, student / t, labels, config)
    weight = np.linspace(0.25, 1.5, ROWS)
    total, values, gradient = evaluate(name, student, teacher, labels=labels, weight=weight, config=config, tau=tau)
    np.testing.assert_allclose(values, value, rtol=1e-5, atol=1e-9)  # dkd without its second part: down to 1e-5
    np.testing.assert_allclose(total, t * t * (weight * value).sum(), rtol=1e-5)
    slope = t * weight[:, None] * oracle_slope(name, teacher / t, student / t, labels, config)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-5)


@every_loss
def test_what_it_declares(name):
    want, term = oracle_of(name), LOSSES[name](Loss())
    assert (term.teacher, term.tempered, bool(term.given)) == (want.teacher, want.tempered, want.given)
    side, rest = (jnp.ones((1, 2)), Head(jnp.eye(2), 2)), (jnp.zeros(1, int), jnp.ones(1), [term], [1])
    if want.teacher:
        with pytest.raises(ValueError, match="a term compares with the teacher"):
            linear_divergence(*side, None, None, *rest)
    if want.given:
        message = f"^given must be a number per row, got None; a term reads the {term.given} of each row."
        with pytest.raises(ValueError, match=message):
            linear_divergence(*side, *side, *rest)


@every_variant
def test_gradient_sum(name, config):
    """c = sum_v dterm / dlogq_v, where it is declared to be one number, is that number in every row."""
    term, (student, teacher, labels) = LOSSES[name](config), draw()
    if term.gradient_sum is None:
        return
    logp, logq = (jnp.asarray(oracle.log_softmax(z), jnp.float32) for z in (teacher, student))
    is_label = jnp.eye(logq.shape[1], dtype=bool)[labels]

    said = jnp.asarray(given_of(ROWS), jnp.float32)[:, None] if term.given else None
    pair = Pair(logp, logq, jnp.exp(logp), jnp.exp(logq), is_label, said)
    if term.row_scalars is not None:
        pair = pair._replace(row=term.row_scalars(pair, lambda values: jnp.sum(values, -1, keepdims=True)))

    def value(logq):
        return term.value(pair._replace(logq=logq, q=jnp.exp(logq)))

    _, slope = jax.jvp(value, (logq,), (jnp.ones_like(logq),))
    error = np.abs(jnp.sum(slope, -1) - term.gradient_sum)
    assert (error <= 2e-6 * np.maximum(1.0, np.abs(slope).sum(-1))).all()


@every_variant
def test_zero_at_the_teacher(name, config):
    """Value and gradient vanish where student and teacher agree, through real heads and over several tiles."""
    if not LOSSES[name](config).teacher:
        return
    numbers = np.random.default_rng(5)
    hidden = jnp.asarray(numbers.normal(size=(300, 16)), jnp.float32)
    head = Head(jnp.asarray(numbers.normal(size=(500, 16)), jnp.float32), 497, vocab_major=True)
    term = LOSSES[name](config)

    def total(student_hidden, student_head):
        rest = (jnp.zeros(300, jnp.int32), jnp.ones(300), [term], [1.0], 1.3)
        given = jnp.asarray(given_of(300), jnp.float32)
        return linear_divergence(student_hidden, student_head, hidden, head, *rest, given=given)

    (value, values), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, head)
    if not oracle_of(name).vanishes(config):
        assert value / 300 > 1e-3
        return
    np.testing.assert_allclose(values, 0.0, atol=1e-6)
    np.testing.assert_allclose(value / 300, 0.0, atol=1e-6)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_allclose(gradient, 0.0, atol=2e-5)


@every_variant
def test_extreme_logits(name, config):
    """Logits of +-1e4 and probabilities that underflow to 0 on one side or both: finite, and right."""
    loud = np.zeros((6, VOCAB))
    loud[0, :2] = 1e4, -1e4
    loud[1] = 1e4
    loud[2, 3:] = -1e4
    loud[3, ::2] = 1e4
    loud[4, :4] = -88, -90, 104, 1
    loud[5] = np.linspace(-110, 0, VOCAB)
    student, teacher = np.repeat(loud, len(loud), 0), np.tile(loud, (len(loud), 1))
    labels = np.arange(ROWS) % VOCAB
    if LOSSES[name](config).sampled:
        labels = student.argmax(-1)  # what it can draw; else a logarithm of -1e4 is off by 1e-3 on either side
    total, values, gradient = evaluate(name, student, teacher, labels=labels, config=config)
    assert np.isfinite(total)
    assert np.isfinite(gradient).all()

    np.testing.assert_allclose(values, oracle_value(name, teacher, student, labels, config), rtol=1e-5, atol=1e-6)
    if name != "tvd":  # its kinks are where p = q, as both are 0 here
        error = np.abs(oracle_slope(name, teacher, student, labels, config) - gradient)
        assert (error < 1e-4 * np.maximum(1.0, np.abs(values))[:, None]).all()


@every_loss
def test_slots_are_exchangeable(name):
    student, teacher, labels = draw()
    weight, order = np.linspace(0.0, 1.0, ROWS), np.random.default_rng(1).permutation(ROWS)
    total, values, gradient = evaluate(name, student, teacher, labels=labels, weight=weight)
    rows = (student[order], teacher[order])
    moved = evaluate(name, *rows, labels=labels[order], weight=weight[order], given=given_of(ROWS)[order])
    np.testing.assert_allclose(moved[0], total, rtol=1e-6)
    np.testing.assert_allclose(moved[1], values[order], rtol=1e-6)
    np.testing.assert_allclose(moved[2], gradient[order], rtol=1e-6, atol=1e-7)


@every_loss
def test_empty_selection(name):
    """All slots empty: exactly 0, and so is the gradient."""
    student, teacher, labels = draw()
    total, _, gradient = evaluate(name, student, teacher, labels=labels, weight=np.zeros(ROWS))
    assert total == 0.0
    assert not gradient.any()


@every_variant
def test_constants_on_the_logits(name, config):
    """Softmax does not see them; those of the student and those of the teacher differ from row to row."""
    student, teacher, labels = draw()
    shifts = np.linspace(-20, 30, ROWS)[:, None]
    plain = evaluate(name, student, teacher, labels=labels, config=config)
    shifted = evaluate(name, student + shifts, teacher - 2 * shifts, labels=labels, config=config)
    for got, want in zip(shifted, plain, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    # hence the gradient has no part along constants
    assert (np.abs(plain[2].sum(-1)) <= 2e-6 * np.maximum(1.0, np.abs(plain[2]).sum(-1))).all()


# paced 8, fixture F
F_STUDENT, F_TEACHER = [1, 0, -1, 0.5], [0.5, 1.5, -0.5, 0]
F_VALUES = [
    ("forward_kl", Loss(), 0.437472),
    ("reverse_kl", Loss(), 0.386548),
    ("jsd", Loss(beta=0.1), 0.038182),
    ("jsd", Loss(beta=0.5), 0.098516),
    ("jsd", Loss(beta=0.9), 0.034726),
    ("skew_kl", Loss(skew=0.1), 0.334183),
    ("skew_reverse_kl", Loss(skew=0.1), 0.312412),
    ("tvd", Loss(), 0.419133),
]
F_GRADIENTS = {
    "forward_kl": [0.260894, -0.404887, -0.014246, 0.158240],
    "reverse_kl": [0.195706, -0.276747, -0.037662, 0.118702],
}
# sekd 9
TOY_STUDENT, TOY_TEACHER = [0.5, 1.5, -0.5, 0, -1], [2.0, 1, 0, -1, -2]
TOY_VALUES = {"forward_kl": 0.4778198667, "reverse_kl": 0.4621568362, "jsd": 0.1118345454, "cross_entropy": 0.592459001}


@pytest.mark.parametrize(("name", "config", "value"), F_VALUES)
def test_paced_vector_6(name, config, value):
    np.testing.assert_allclose(evaluate_row(name, F_STUDENT, F_TEACHER, config=config)[0], value, atol=1e-6)


@pytest.mark.parametrize("name", F_GRADIENTS)
def test_paced_vector_6_gradients(name):
    gradient = evaluate_row(name, F_STUDENT, F_TEACHER)[1]
    np.testing.assert_allclose(gradient, F_GRADIENTS[name], atol=1e-6)


@pytest.mark.parametrize("name", TOY_VALUES)
def test_sekd_vectors_1_and_3(name):
    got, _ = evaluate_row(name, TOY_STUDENT, TOY_TEACHER, label=1)
    np.testing.assert_allclose(got, TOY_VALUES[name], rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 0.25, 3.0])
def test_sekd_vector_2(tau):
    """d KL / d logits = q - p; at any temperature d tau^2 KL / d logits = tau (q - p)."""
    _, gradient = evaluate_row("forward_kl", TOY_STUDENT, TOY_TEACHER, tau=tau)
    q, p = (np.exp(oracle.log_softmax(np.array(z) / tau)) for z in (TOY_STUDENT, TOY_TEACHER))
    np.testing.assert_allclose(gradient, tau * (q - p), rtol=1e-5, atol=1e-6)
    if tau == 1.0:
        np.testing.assert_allclose(gradient, [-0.432984, 0.318844, -0.011293, 0.091698, 0.033734], atol=1e-6)


def test_jsd_limits():
    """JSD / beta -> forward KL, JSD / (1 - beta) -> reverse KL (paced V6); symmetric at 1/2; at most ln 2."""
    low, _ = evaluate_row("jsd", F_STUDENT, F_TEACHER, config=Loss(beta=1e-4))
    high, _ = evaluate_row("jsd", F_STUDENT, F_TEACHER, config=Loss(beta=1 - 1e-4))
    np.testing.assert_allclose(low / 1e-4, 0.437413, rtol=2e-3)  # float32 leaves 6e-8 / 1e-4
    np.testing.assert_allclose(high / 1e-4, 0.386509, rtol=2e-3)
    there, back = evaluate_row("jsd", F_STUDENT, F_TEACHER)[0], evaluate_row("jsd", F_TEACHER, F_STUDENT)[0]
    np.testing.assert_allclose(there, back, rtol=1e-6)
    apart, _ = evaluate_row("jsd", [1e4, 0], [0, 1e4])
    np.testing.assert_allclose(apart, math.log(2), rtol=1e-6)


@pytest.mark.parametrize(("name", "plain"), [("skew_kl", "forward_kl"), ("skew_reverse_kl", "reverse_kl")])
def test_skew_0_is_the_plain_divergence(name, plain):
    student, teacher, _ = draw()
    skewed, straight = evaluate(name, student, teacher, config=Loss(skew=0.0)), evaluate(plain, student, teacher)
    for got, want in zip(skewed, straight, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [1e-12, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-12])
@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl"])
def test_mixtures_at_the_ends(name, share):
    """The smallest and largest shares that the config takes stay finite where the two sides are far apart."""
    term = LOSSES[name](Loss(beta=share, skew=share))
    logp, logq = jnp.meshgrid(*[jnp.array([-0.0, -1.0, -90.0, -2e4])] * 2)

    def value(logq):
        return term.value(Pair(logp, logq, jnp.exp(logp), jnp.exp(logq), jnp.zeros(logq.shape, bool)))

    for numbers in jax.jvp(value, (logq,), (jnp.ones_like(logq),)):
        assert np.isfinite(numbers).all()


def test_eight_devices():
    """All losses at once: totals and gradients of rows over 8 devices are those of one."""
    rules, terms = make_rules(Mesh("dp")), [factory(Loss()) for factory in LOSSES.values()]
    numbers = np.random.default_rng(2)
    hidden, teacher = (jnp.asarray(numbers.normal(size=(16, 6)), jnp.float32) for _ in range(2))
    head, teacher_head = (Head(jnp.asarray(numbers.normal(size=(6, 9)), jnp.float32), 9) for _ in range(2))
    labels = jnp.asarray(numbers.integers(9, size=16), jnp.int32)
    weight, given = (jnp.asarray(numbers.uniform(0.5, 1.5, size=16), jnp.float32) for _ in range(2))
    coefficients = [0.5 + 0.1 * at for at in range(len(terms))]

    def total(hidden, head, teacher, teacher_head, labels, weight, given):
        sides = (hidden, head, teacher, teacher_head)
        return linear_divergence(*sides, labels, weight, terms, coefficients, 1.5, given=given)[0]

    row = rules.batch_spec
    spread = rules.rowwise(
        lambda *rows: rules.sum_over_batch(total(*rows)),
        in_specs=(row(2), P(), row(2), P(), row(1), row(1), row(1)),
        out_specs=P(),
    )
    rows = (hidden, head, teacher, teacher_head, labels, weight, given)
    specs = (row(2), P(), row(2), P(), row(1), row(1), row(1))
    placed = [jax.device_put(array, NamedSharding(rules.mesh, spec)) for array, spec in zip(rows, specs, strict=True)]
    one, eight = jax.jit(jax.value_and_grad(total, (0, 1)))(*rows), jax.jit(jax.value_and_grad(spread, (0, 1)))(*placed)
    for got, want in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
