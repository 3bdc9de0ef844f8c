"""The losses, held against formulas worked out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.distill import (
    Distillation,
    adaptive_loss,
    blend,
    class_log_shares,
    kd,
    not_true_kd,
    sample_weight,
)
from common.sparsify import multi_step_objective

SETTINGS = {"weight": 0.7, "temperature": 2.0, "floor": 0.3}


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    power = np.exp(logits / temperature)
    return power / power.sum(-1, keepdims=True)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def right_with(probability: float, label: int = 0, classes: int = 3) -> Tensor:
    """Logits [1, classes] that give the label this probability and the others the rest."""
    rest = (1 - probability) / (classes - 1)
    p = torch.full((1, classes), rest)
    p[0, label] = probability
    return p.log()


# ---------------------------------------------------------------- distillation


def test_kd_is_the_softened_divergence_times_the_squared_temperature() -> None:
    student, teacher = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 3.0])
    p, q = softmax(teacher, 3.0), softmax(student, 3.0)
    by_hand = 9.0 * (p * np.log(p / q)).sum()
    found = kd(torch.from_numpy(student)[None], torch.from_numpy(teacher)[None], 3.0)
    assert found.shape == (1,)
    assert float(found) == pytest.approx(by_hand, rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.5, 8), st.floats(-50, 50))
def test_kd_is_zero_for_equal_distributions_and_positive_for_others(
    seed: int, temperature: float, offset: float
) -> None:
    teacher = drawn(4, 6, seed=seed).double()
    assert kd(teacher + offset, teacher, temperature).abs().max() < 1e-9
    other = teacher + drawn(4, 6, seed=seed + 1).double()
    assert (kd(other, teacher, temperature) > 0).all()


def test_kd_survives_extreme_logits() -> None:
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]), torch.tensor([[-1e4, 1e4, 0.0]])
    assert torch.isfinite(kd(student, teacher, 2.0)).all()


def test_the_not_true_distillation_ignores_the_true_class() -> None:
    student, teacher, labels = drawn(5, 4), drawn(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    before = not_true_kd(student, teacher, labels, 2.0)
    true = F.one_hot(labels, 4) * drawn(5, 4, seed=2) * 10
    torch.testing.assert_close(not_true_kd(student + true, teacher, labels, 2.0), before)
    torch.testing.assert_close(not_true_kd(student, teacher - true, labels, 2.0), before)
    student.requires_grad_()
    not_true_kd(student, teacher, labels, 2.0).sum().backward()
    assert not student.grad[torch.arange(5), labels].any()
    assert student.grad.any()


def test_the_not_true_distillation_is_kd_over_the_remaining_classes() -> None:
    student, teacher = drawn(2, 4), drawn(2, 4, seed=1)
    found = not_true_kd(student, teacher, torch.tensor([1, 3]), 3.0)
    for row, others in enumerate(([0, 2, 3], [0, 1, 2])):
        expected = kd(student[row : row + 1, others], teacher[row : row + 1, others], 3.0)
        torch.testing.assert_close(found[row : row + 1], expected)


# ---------------------------------------------------------------- weights per image


def test_the_weight_of_an_image_is_one_minus_exp_of_the_losses_ratio() -> None:
    student, teacher = right_with(0.5), right_with(0.8)
    expected = 1 - math.exp(-math.log(0.5) / math.log(0.8))
    found = sample_weight(student, teacher, torch.tensor([0]), 0.1)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_who_knows_less_listens_more_and_the_floor_holds() -> None:
    labels, floor = torch.zeros(1, dtype=torch.int64), 0.3
    teacher = right_with(0.6)
    by_student = [
        float(sample_weight(right_with(p), teacher, labels, floor))
        for p in (0.01, 0.2, 0.5, 0.7, 0.99)
    ]
    assert by_student == sorted(by_student, reverse=True)
    assert by_student[0] > 0.99
    assert by_student[-1] == pytest.approx(floor)
    by_teacher = [
        float(sample_weight(right_with(0.4), right_with(p), labels, floor))
        for p in (0.01, 0.3, 0.6, 0.9, 0.999)
    ]
    assert by_teacher == sorted(by_teacher)
    assert by_teacher[0] == pytest.approx(floor)
    assert by_teacher[-1] == pytest.approx(1.0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_weight_lies_between_floor_and_one(seed: int, floor: float) -> None:
    student, teacher = drawn(6, 3, seed=seed) * 20, drawn(6, 3, seed=seed + 1) * 20
    weight = sample_weight(student, teacher, torch.arange(6) % 3, floor)
    assert ((weight >= floor - 1e-6) & (weight <= 1)).all()


def test_a_teacher_that_is_surely_right_gives_no_division_by_zero() -> None:
    certain = torch.tensor([[200.0, 0.0, 0.0]])
    labels = torch.tensor([0])
    assert float(sample_weight(right_with(0.5), certain, labels, 0.3)) == 1.0
    assert float(sample_weight(certain, certain, labels, 0.3)) == pytest.approx(0.3)


# ---------------------------------------------------------------- the whole loss


def test_without_teachers_or_weight_it_is_cross_entropy() -> None:
    student, labels = drawn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    expected = F.cross_entropy(student, labels)
    torch.testing.assert_close(adaptive_loss(student, [], labels, **SETTINGS), expected)
    alone = adaptive_loss(student, [], labels, **SETTINGS, ntd_weight=1.0)
    torch.testing.assert_close(alone, expected)
    unweighted = {**SETTINGS, "weight": 0.0}
    found = adaptive_loss(student, [drawn(5, 4, seed=1)], labels, **unweighted)
    torch.testing.assert_close(found, expected)


def test_with_one_teacher_every_image_listens_as_much_as_it_should() -> None:
    student, teacher, labels = drawn(5, 4), drawn(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    weight = sample_weight(student, teacher, labels, 0.3)
    expected = F.cross_entropy(student, labels) + 0.7 * (weight * kd(student, teacher, 2.0)).mean()
    torch.testing.assert_close(adaptive_loss(student, [teacher], labels, **SETTINGS), expected)


def test_the_shares_of_several_teachers_sum_to_one() -> None:
    student, teacher, labels = drawn(5, 4), drawn(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    alone = adaptive_loss(student, [teacher], labels, **SETTINGS)
    for count in (2, 3):
        copies = adaptive_loss(student, [teacher] * count, labels, **SETTINGS)
        torch.testing.assert_close(copies, alone)


def test_a_teacher_that_knows_the_label_has_the_larger_share() -> None:
    student, labels = drawn(1, 3), torch.tensor([1])
    knows, fails = right_with(0.9, label=1), right_with(0.05, label=1)
    shares = softmax(np.array([math.log(0.9), math.log(0.05)]))  # = 0.9 / 0.95, 0.05 / 0.95
    expected = F.cross_entropy(student, labels)
    for share, teacher in zip(shares, (knows, fails), strict=True):
        listen = float(share) * sample_weight(student, teacher, labels, 0.3)
        expected = expected + 0.7 * (listen * kd(student, teacher, 2.0)).mean()
    assert shares == pytest.approx([0.9 / 0.95, 0.05 / 0.95])
    torch.testing.assert_close(adaptive_loss(student, [knows, fails], labels, **SETTINGS), expected)
    swapped = adaptive_loss(student, [fails, knows], labels, **SETTINGS)
    torch.testing.assert_close(swapped, expected)


def test_the_not_true_term_comes_from_the_first_teacher() -> None:
    student, labels = drawn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    teachers = [drawn(5, 4, seed=1), drawn(5, 4, seed=2)]
    plain = adaptive_loss(student, teachers, labels, **SETTINGS)
    found = adaptive_loss(student, teachers, labels, **SETTINGS, ntd_weight=0.5)
    extra = 0.5 * not_true_kd(student, teachers[0], labels, 2.0).mean()
    torch.testing.assert_close(found, plain + extra)


def test_gradients_reach_only_the_student() -> None:
    student = drawn(5, 4).requires_grad_()
    teachers = [drawn(5, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    labels = torch.tensor([0, 1, 2, 3, 0])
    adaptive_loss(student, teachers, labels, **SETTINGS, ntd_weight=0.5).backward()
    assert student.grad is not None
    assert student.grad.any()
    assert [teacher.grad for teacher in teachers] == [None, None]


def test_the_weights_of_the_images_are_constants_to_the_gradient() -> None:
    student, teacher, labels = drawn(5, 4), drawn(5, 4, seed=1), torch.tensor([0, 1, 2, 3, 0])
    student.requires_grad_()
    adaptive_loss(student, [teacher], labels, **SETTINGS).backward()
    found = student.grad.clone()
    weight = sample_weight(student, teacher, labels, 0.3)
    assert not weight.requires_grad
    student.grad = None
    per_image = F.cross_entropy(student, labels, reduction="none")
    (per_image + 0.7 * weight * kd(student, teacher, 2.0)).mean().backward()
    torch.testing.assert_close(found, student.grad)


def test_the_objective_of_a_training_asks_the_teachers_and_leaves_them_alone() -> None:
    net, teachers = nn.Linear(3, 4), [nn.Linear(3, 4), nn.Linear(3, 4)]
    x, labels = drawn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    objective = multi_step_objective(teachers, Distillation(0.7, 2.0, 0.3, 0.5))
    loss = objective(net(x), x, labels)
    loss.backward()
    taught = [teacher(x).detach() for teacher in teachers]
    expected = adaptive_loss(net(x), taught, labels, **SETTINGS, ntd_weight=0.5)
    torch.testing.assert_close(loss, expected)
    assert net.weight.grad is not None
    assert all(p.grad is None for teacher in teachers for p in teacher.parameters())


# ---------------------------------------------------------------- label skew


def test_skew_is_how_much_more_often_a_device_sees_a_class_than_all_do() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2, 0])
    pooled = [10, 30, 20, 0]  # of 60; a device of 6 would expect 1, 3, 2 and 0
    skew = class_log_shares(labels, pooled, 1.0)
    assert skew.exp().tolist() == pytest.approx([4.1 / 1.1, 0.1 / 3.1, 1.0, 1.0])
    torch.testing.assert_close(class_log_shares(labels, pooled, 0.5), 0.5 * skew)
    assert not class_log_shares(labels, pooled, 0.0).any()


def test_what_all_devices_have_in_common_is_no_skew() -> None:
    labels = torch.tensor([1, 1, 2, 1])
    assert not class_log_shares(labels, [0, 3, 1, 0], 1.0).any()
    assert not class_log_shares(labels, [0, 300, 100, 0], 1.0).any()
    nothing = class_log_shares(torch.zeros(0, dtype=torch.int64), [0, 0], 1.0)
    assert nothing.tolist() == [0.0, 0.0]


def test_balanced_labels_leave_the_loss_as_it_is() -> None:
    student, labels = drawn(8, 4), torch.arange(8) % 4
    shares = class_log_shares(labels, [5, 5, 5, 5], 1.0)
    found = adaptive_loss(student, [], labels, **SETTINGS, class_log_share=shares)
    torch.testing.assert_close(found, F.cross_entropy(student, labels))


def test_skewed_labels_push_less_towards_the_classes_that_abound() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1])
    pushes = []
    for strength in (0.0, 1.0):
        student = torch.zeros(6, 3, requires_grad=True)
        shares = class_log_shares(labels, [20, 20, 20], strength)
        adaptive_loss(student, [], labels, **SETTINGS, class_log_share=shares).backward()
        pushes.append(-student.grad.sum(0))
    plain, calibrated = pushes
    assert plain[0] > 0.3
    assert plain[2] < -0.3
    assert calibrated.abs().max() < 0.05, "a net without an opinion is not given one by the skew"


def test_skew_concerns_the_labels_and_not_the_teachers() -> None:
    student, labels = drawn(6, 3), torch.tensor([0, 0, 0, 0, 0, 1])
    teacher, shares = drawn(6, 3, seed=1), class_log_shares(labels, [20, 20, 20], 1.0)
    found = adaptive_loss(student, [teacher], labels, **SETTINGS, class_log_share=shares)
    taught = adaptive_loss(student, [teacher], labels, **SETTINGS)
    labelled = F.cross_entropy(student + shares, labels) - F.cross_entropy(student, labels)
    torch.testing.assert_close(found, taught + labelled)
    objective = multi_step_objective([lambda _: teacher], Distillation(0.7, 2.0, 0.3), shares)
    torch.testing.assert_close(objective(student, torch.zeros(6, 1), labels), found)


# ---------------------------------------------------------------- a mix of two teachers


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.1, 4))
def test_a_blend_lies_between_the_two(seed: int, kappa: float) -> None:
    one, other = drawn(6, 5, seed=seed).double(), drawn(6, 5, seed=seed + 1).double()
    p, q = F.softmax(one, 1), F.softmax(other, 1)
    mixed = F.softmax(blend(one, other, kappa), 1)
    low, high = torch.minimum(p, q), torch.maximum(p, q)
    assert ((mixed >= low - 1e-6) & (mixed <= high + 1e-6)).all()


def test_a_blend_of_two_that_agree_is_what_they_say() -> None:
    logits = drawn(6, 5)
    torch.testing.assert_close(
        F.softmax(blend(logits, logits + 3), 1), F.softmax(logits, 1), atol=1e-6, rtol=1e-5
    )


def test_a_blend_prefers_the_surer_and_the_share_follows_the_formula() -> None:
    sure, unsure = right_with(0.95, label=0), right_with(0.4, label=1)
    p, q = np.exp(sure.numpy())[0], np.exp(unsure.numpy())[0]
    entropies = [-(r * np.log(r)).sum() for r in (p, q)]
    u, v = (math.exp(-h / (0.5 * math.log(3))) for h in entropies)
    share = u / (u + v)
    assert share > 0.7
    expected = share * p + (1 - share) * q
    np.testing.assert_allclose(np.exp(blend(sure, unsure).numpy())[0], expected, rtol=1e-4)
    np.testing.assert_allclose(np.exp(blend(unsure, sure).numpy())[0], expected, rtol=1e-4)
    assert blend(sure, unsure).argmax() == 0


def test_a_smaller_kappa_prefers_the_surer_more() -> None:
    sure, unsure = right_with(0.9, label=0), right_with(0.4, label=1)
    shares = [float(blend(sure, unsure, kappa).exp()[0, 0]) for kappa in (0.1, 0.5, 2.0, 50.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx((0.9 + 0.3) / 2, abs=0.01)


def test_a_blend_of_certainties_is_finite() -> None:
    one, other = torch.tensor([[500.0, 0.0]]), torch.tensor([[0.0, 500.0]])
    mixed = blend(one, other)
    assert torch.isfinite(mixed).all()
    torch.testing.assert_close(F.softmax(mixed, 1), torch.full((1, 2), 0.5))


def test_absent_classes_can_be_left_out_of_the_cross_entropy_altogether() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    shares = class_log_shares(labels, [1, 1, 1, 1], 0.0, mask_absent=True)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    F.cross_entropy(logits + shares, labels).backward()
    assert logits.grad is not None
    assert not logits.grad[:, [1, 3]].any()
    present = F.cross_entropy(logits[:, [0, 2]], torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(F.cross_entropy(logits + shares, labels), present)
