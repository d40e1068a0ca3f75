"""ResLT's loss against its authors' numbers (source: tests/golden/README.md) and float64 loops, and its branches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from ltjax import losses

residual_fusion = jax.jit(losses.residual_fusion)


def random_batch(seed, batch=16, classes=9, branches=3, spread=3.0):
    """Return branch_logits [R, B, C], labels [B], masks [R, C]."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (branches, batch, classes)).astype(np.float32)
    masks = np.asarray(losses.branch_masks(random.permutation(classes), medium_start=classes // 3, tail_start=6))
    return logits, random.integers(0, classes, batch), masks[:branches]


def minus_log_p(logits, label):
    logits = logits.astype(np.float64)
    return logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[label]


def fusion_by_loops(logits, labels, masks, beta):
    """Equations 2 to 4, pair by pair, float64."""
    branch, pairs, fused = 0.0, 0, 0.0
    for example, label in enumerate(labels):
        fused += minus_log_p(logits.astype(np.float64).sum(0)[example], label) / len(labels)
        for number, mask in enumerate(masks):
            if mask[label]:
                branch += minus_log_p(logits[number, example], label)
                pairs += 1
    return beta * branch / max(pairs, 1) + (1 - beta) * fused


def authors_terms(logits, labels, masks):
    """Return the authors' two terms; the branches' has their `log(softmax + 1e-7)`."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    pairs = masks[:, labels].astype(logits.dtype)  # [R, B]
    branch = (pairs * -(is_label * jnp.log(jax.nn.softmax(logits) + 1e-7)).sum(-1)).sum() / pairs.sum()
    return branch, -(is_label * jax.nn.log_softmax(logits.sum(0))).sum(-1).mean()


@pytest.fixture
def numbers(golden):
    """Return the golden file, with the masks of its 100 classes, numbered from the most frequent one."""
    actual = golden("reslt_loss")
    starts = {name: int(actual[name]) for name in ("medium_start", "tail_start")}
    return {
        **actual,
        "beta": float(actual["beta"]),
        "masks": np.asarray(losses.branch_masks(np.arange(100, 0, -1), **starts)),
    }


@pytest.fixture
def authors(numbers):
    """Return the authors' form in float64: the branches' term, the fusion's, and the gradient of the loss."""
    with jax.enable_x64(True):
        logits, beta = jnp.asarray(numbers["branch_logits"], jnp.float64), numbers["beta"]

        def loss(logits):
            branch, fused = authors_terms(logits, numbers["labels"], numbers["masks"])
            return beta * branch + (1 - beta) * fused, (branch, fused)

        gradient, terms = jax.jit(jax.grad(loss, has_aux=True))(logits)
        return (*(float(term) for term in terms), np.asarray(gradient))


def fusion(numbers):
    return lambda logits: losses.residual_fusion(
        logits, numbers["labels"], masks=numbers["masks"], beta=numbers["beta"]
    )


def test_loss_is_the_authors_to_1e_4(numbers):
    np.testing.assert_allclose(jax.jit(fusion(numbers))(numbers["branch_logits"]), numbers["loss"], rtol=1e-4)


@pytest.mark.parametrize("beta, term", [(1.0, "branch_loss"), (0.0, "fusion_loss")])
def test_each_term_is_the_authors_to_1e_4(numbers, beta, term):
    ours = jax.jit(fusion({**numbers, "beta": beta}))(numbers["branch_logits"])
    np.testing.assert_allclose(ours, numbers[term], rtol=1e-4)


def test_the_authors_form_has_the_authors_terms(numbers, authors):
    np.testing.assert_allclose(authors[:2], [numbers["branch_loss"], numbers["fusion_loss"]], rtol=1e-5)


def test_the_authors_form_has_the_authors_gradient(numbers, authors):
    theirs = numbers["dbranch_logits"]
    np.testing.assert_allclose(authors[2], theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_gradient_is_the_authors_unless_p_is_tiny(numbers, authors):
    ours = jax.jit(jax.grad(fusion(numbers)))(numbers["branch_logits"])
    p = jax.nn.softmax(numbers["branch_logits"])[:, np.arange(128), numbers["labels"]]  # [R, B]
    compared = np.asarray(p > 0.01)  # theirs is short of p / (p + 1e-7)
    assert compared.sum() > 20
    theirs = authors[2]
    np.testing.assert_allclose(ours[compared], theirs[compared], rtol=2e-5, atol=1e-5 * np.abs(theirs).max())


def test_gradient_stays_if_the_authors_vanishes():
    logits, labels, masks = np.zeros((3, 1, 9), np.float32), np.array([0]), np.eye(3, 9, dtype=bool)
    logits[0, 0, 1] = 40.0

    def ours(logits):
        return losses.residual_fusion(logits, labels, masks=masks, beta=1.0)

    def theirs(logits):
        return authors_terms(logits, labels, masks)[0]

    assert abs(jax.jit(jax.grad(theirs))(logits)[0, 0, 0]) < 1e-6
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(logits)[0, 0, 0], -1, rtol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.72, 1.0])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_loss_is_the_papers_in_loops(branches, beta):
    logits, labels, masks = random_batch(branches, branches=branches)
    ours = residual_fusion(logits, labels, masks=masks, beta=beta)
    np.testing.assert_allclose(ours, fusion_by_loops(logits, labels, masks, beta), rtol=1e-5)


def test_gradient_is_that_of_central_differences():
    logits, labels, masks = random_batch(4, batch=5)
    with jax.enable_x64(True):
        loss = jax.jit(lambda logits: losses.residual_fusion(logits, labels, masks=masks, beta=0.9))
        check_grads(loss, (jnp.asarray(logits, jnp.float64),), order=1, modes=("rev",), rtol=1e-6, atol=1e-8)


def test_renaming_the_classes_changes_nothing():
    logits, labels, masks = random_batch(5)
    new_name = np.random.default_rng(9).permutation(9)
    old_name = np.argsort(new_name)
    before = residual_fusion(logits, labels, masks=masks, beta=0.9)
    renamed = residual_fusion(logits[..., old_name], new_name[labels], masks=masks[:, old_name], beta=0.9)
    np.testing.assert_allclose(renamed, before, rtol=1e-6)


def test_a_batch_without_branches_has_only_the_fusions_loss():
    logits, labels, masks = random_batch(6)
    ours = losses.residual_fusion(logits, labels, masks=np.zeros_like(masks), beta=0.9)
    np.testing.assert_allclose(ours, fusion_by_loops(logits, labels, masks, 0.0) / 10, rtol=1e-5)


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("low, high", [(-1e4, 1e4), (-1e30, 1e30)])
def test_extreme_logits_have_a_finite_loss_and_gradient(low, high, classes):
    logits = np.full((3, 4, classes), low, np.float32)
    logits[:, :, 0] = high
    labels = np.arange(4) % classes
    masks = np.ones((3, classes), bool)
    value, gradient = jax.jit(jax.value_and_grad(lambda z: losses.residual_fusion(z, labels, masks=masks, beta=0.9)))(
        logits
    )
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_sharded_batch_has_the_same_loss(axis_type, jitted):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    assert mesh.axis_types == ((axis_type or AxisType.Explicit),)
    logits, labels, masks = random_batch(7)

    def loss(logits, labels):
        return losses.residual_fusion(logits, labels, masks=masks, beta=0.9)

    expected = loss(logits, labels)
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "data")))
        labels = jax.device_put(labels, NamedSharding(mesh, PartitionSpec("data")))
        actual = (jax.jit(loss) if jitted else loss)(logits, labels)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.parametrize("axis_type", [None, AxisType.Auto], ids=["explicit", "auto"])
def test_a_sharded_batch_has_the_same_gradient(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=axis_type and (axis_type,))
    logits, labels, masks = random_batch(7)
    gradient = jax.jit(jax.grad(lambda z, y: losses.residual_fusion(z, y, masks=masks, beta=0.9)))
    expected = gradient(logits, labels)
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, NamedSharding(mesh, PartitionSpec(None, "data")))
        labels = jax.device_put(labels, NamedSharding(mesh, PartitionSpec("data")))
        actual = gradient(logits, labels)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_branches_are_all_classes_then_the_rarer_ones_by_rank():
    masks = losses.branch_masks(np.array([5, 100, 20, 1, 50]), medium_start=2, tail_start=4)
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, [[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]])


def test_classes_of_the_same_count_rank_by_number():
    masks = losses.branch_masks(np.full(6, 7), medium_start=2, tail_start=5)
    np.testing.assert_array_equal(masks[1:], [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def test_renaming_the_classes_renames_the_masks():
    counts, old_name = np.arange(20) ** 2 + 1, np.random.default_rng(0).permutation(20)
    starts = {"medium_start": 7, "tail_start": 14}
    masks = losses.branch_masks(counts, **starts)
    np.testing.assert_array_equal(losses.branch_masks(counts[old_name], **starts), masks[:, old_name])


@pytest.mark.parametrize("medium, tail", [(-1, 3), (4, 3), (0.35, 0.7), (3, 4.0)])
def test_branches_out_of_order_are_an_error_that_names_both(medium, tail):
    with pytest.raises(ValueError, match=f"medium_start = {medium}, tail_start = {tail}: ranks, in this order"):
        losses.branch_masks(np.ones(5), medium_start=medium, tail_start=tail)
