"""The public functions keep names, order of arguments and defaults. New keywords need a default."""

import importlib
import inspect

import pytest

PUBLIC = {
    "ltjax.load": "source, *, image_size=None, net=None, replica=0, batch_size=256",
    "ltjax.losses.smoothing_by_count": "class_counts, *, head, tail, shape='concave', power=1.0",
    "ltjax.losses.label_aware_smoothing": "logits, labels, *, smoothing",
    "ltjax.losses.class_means": "features, labels, num_classes",
    "ltjax.losses.dro_bound": "features, labels, centroids, *, margins=0.0, temperature=1.0",
    "ltjax.losses.dro_loss": "features, labels, centroids, *, margins=0.0, temperature=1.0, class_weights=None",
    "ltjax.losses.branch_masks": "class_counts, *, medium_start, tail_start",
    "ltjax.losses.residual_fusion": "branch_logits, labels, *, masks, beta",
    "ltjax.losses.balanced_softmax": "logits, labels, *, class_counts",
    "ltjax.losses.logit_adjusted": "logits, labels, *, class_counts, tau=1.0",
    "ltjax.losses.ldam": "logits, labels, *, class_counts, max_margin=0.5, scale=30.0",
    "ltjax.losses.focal": "logits, labels, *, gamma=2.0",
    "ltjax.losses.effective_number_weights": "class_counts, *, beta=0.9999",
    "ltjax.losses.kl_divergence": "p_logits, q_logits",
    "ltjax.losses.logit_pairing": "logits, target_logits",
    "ltjax.attacks.random_start": "rng, images, *, kind='gaussian', scale=0.001, norm='linf'",
    "ltjax.attacks.pgd": "images, start, objective, *, epsilon, step_size, num_steps, norm='linf'",
    "ltjax.attacks.autoattack": "predict, images, labels, rng, *, epsilon, norm='linf', "
    "attacks=('apgd-ce', 'apgd-t', 'fab-t', 'square'), batch_size=512",
    "ltjax.metrics.calibration": "confidences, correct, *, num_bins=15",
    "ltjax.metrics.group_accuracy": "correct, labels, class_counts, *, few_below=20, many_above=100",
    "ltjax.data.splits.class_counts": "num_classes, max_count, *, imbalance, profile='exp'",
    "ltjax.interop.torch.import_state_dict": "state_dict, model",
}


@pytest.mark.parametrize("name, promised", PUBLIC.items(), ids=PUBLIC)
def test_a_public_function_has_the_promised_arguments(name, promised):
    module, _, function = name.rpartition(".")
    actual = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    scope = {}
    exec(f"def promise({promised}): pass", scope)
    expected = inspect.signature(scope["promise"]).parameters
    for parameter in expected.values():
        assert parameter.name in actual, f"{parameter.name} is gone"
        assert (actual[parameter.name].kind, actual[parameter.name].default) == (parameter.kind, parameter.default)
    positional = [p.name for p in actual.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == [p.name for p in expected.values() if p.kind is not p.KEYWORD_ONLY]
    assert all(p.default is not p.empty for p in actual.values() if p.name not in expected)


def test_results_are_the_promised_tuples():
    attacks, metrics = importlib.import_module("ltjax.attacks"), importlib.import_module("ltjax.metrics")
    assert attacks.AutoAttackResult._fields == ("adversarial", "robust", "robust_after")
    expected = ("ece", "mce", "accuracies", "confidences", "counts", "edges")
    assert metrics.Calibration._fields == expected
