"""Class statistics: classifiers that no gradient touches, the same however images are spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from common.errors import UpdateError
from common.features import (
    ClassSums,
    ClosedFormNet,
    Discriminant,
    FeatureNet,
    ScaleShift,
    Scores,
    class_sums,
    feature_size,
    packed_size,
)
from common.nets import build

CLASSES = 3


def blobs(count: int = 300, size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features around a mean a class, with one covariance."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=rng)
    means = 2 * torch.randn(CLASSES, size, generator=torch.Generator().manual_seed(7))
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(8))
    return means[labels] + torch.randn(count, size, generator=rng) @ mix, labels


def scores(discriminant: Discriminant, features: torch.Tensor) -> torch.Tensor:
    x = features.double().numpy()[:, discriminant.chosen]
    return torch.from_numpy(x @ discriminant.weight.T + discriminant.bias)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet8", CLASSES, 3, 8).eval()


def images(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(4)), st.integers(0, 50))
def test_the_classifier_is_that_of_all_images_at_one_place(order: list[int], seed: int) -> None:
    features, labels = blobs(200, seed=seed)
    devices = [
        ClassSums.of(features[labels.argsort()][part], labels[labels.argsort()][part], CLASSES)
        for part in torch.arange(200).split([7, 93, 60, 40])
    ]
    total = devices[order[0]]
    for number in order[1:]:
        total = total + devices[number]
    whole = ClassSums.of(features, labels, CLASSES)
    for kind in ("lda", "ridge", "ncm"):
        for one, other in zip(total.classifier(kind), whole.classifier(kind), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_lda_is_the_posterior_of_gaussians_with_one_covariance() -> None:
    features, labels = blobs(4000)
    sums = ClassSums.of(features, labels, CLASSES)
    discriminant = sums.discriminant()
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)]).double()
    within = torch.cov((features - means[labels]).double().T, correction=0)
    within += 0.01 * within.diag().diag()
    densities = torch.stack(
        [
            torch.distributions.MultivariateNormal(mean, within).log_prob(features.double())
            for mean in means
        ],
        1,
    )
    got = scores(discriminant, features).log_softmax(1)
    torch.testing.assert_close(got, densities.log_softmax(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lda", "ridge", "ncm"])
def test_every_head_tells_blobs_apart(kind: str) -> None:
    features, labels = blobs(600)
    unseen, truth = blobs(600, seed=1)
    discriminant = ClassSums.of(features, labels, CLASSES).discriminant(kind)  # type: ignore[arg-type]
    right = (scores(discriminant, unseen).argmax(1) == truth).float().mean()
    assert right > (0.85 if kind != "ncm" else 0.6)


def test_a_class_without_an_image_is_never_the_answer_and_nobodys_advantage_beside() -> None:
    features, labels = blobs()
    seen = labels != 1
    discriminant = ClassSums.of(features[seen], labels[seen], CLASSES).discriminant()
    assert discriminant.there.tolist() == [True, False, True]
    assert 1 not in scores(discriminant, features).argmax(1)
    impartial = scores(discriminant.impartial(), features)
    torch.testing.assert_close(impartial[:, 1], torch.zeros(len(features)).double())
    torch.testing.assert_close(impartial.sum(1), torch.zeros(len(features)).double())
    same = scores(discriminant, features)[:, [0, 2]].argmax(1)
    assert torch.equal(impartial[:, [0, 2]].argmax(1), same)


def test_features_that_tell_nothing_are_left_out_first() -> None:
    features, labels = blobs(900, size=6)
    noise = torch.randn(900, 20, generator=torch.Generator().manual_seed(3))
    sums = ClassSums.of(torch.cat([noise, features], 1), labels, CLASSES)
    for kind in ("lda", "ridge", "ncm"):
        assert sums.discriminant(kind, 6).chosen.tolist() == list(range(20, 26))
    few = sums.discriminant("lda", 6)
    assert sums.discriminant("lda", 26).chosen.tolist() == list(range(26))
    assert len(sums.discriminant("lda", 0).chosen) == 26
    alone = ClassSums.of(features, labels, CLASSES).discriminant()
    np.testing.assert_allclose(few.weight, alone.weight, rtol=1e-9)


def test_one_of_two_features_that_say_the_same_is_left_out_first() -> None:
    features, labels = blobs(900, size=3)
    noise = 1e-3 * torch.randn(900, 1, generator=torch.Generator().manual_seed(3))
    # its weight is large, and all for nothing
    sums = ClassSums.of(torch.cat([features, features[:, :1] + noise], 1), labels, CLASSES)
    chosen = sums.discriminant("lda", 3).chosen.tolist()
    assert chosen in ([0, 1, 2], [1, 2, 3])


def test_class_statistics_survive_the_wire() -> None:
    sums = ClassSums.of(*blobs(), CLASSES)
    packed = sums.pack()
    assert packed.shape == (packed_size(CLASSES, 5),)
    back = ClassSums.unpack(packed, CLASSES, 5)
    np.testing.assert_allclose(back.second, sums.second, rtol=1e-6)
    np.testing.assert_array_equal(back.counts, sums.counts)


def test_class_statistics_that_are_not_sound_are_refused() -> None:
    packed = ClassSums.of(*blobs(), CLASSES).pack()
    with pytest.raises(UpdateError, match=r"\[33\] values, expected 42"):
        ClassSums.unpack(packed, CLASSES, 6)
    for at, value in ((0, -1.0), (5, np.inf), (30, np.nan)):
        bad = packed.copy()
        bad[at] = value
        with pytest.raises(UpdateError, match="not finite, or have negative counts"):
            ClassSums.unpack(bad, CLASSES, 5)


# nets


def test_features_are_deviations_of_every_layer_and_quadrants_of_every_resolution() -> None:
    net, x = small_net(), images()
    features, logits = FeatureNet(net, "fc")(x)
    assert features.shape == (40, feature_size(net, "fc", (3, 12, 12)))
    torch.testing.assert_close(logits, net(x))
    last, _ = FeatureNet(small_net(), "fc", "last")(x)
    torch.testing.assert_close(net.get_submodule("fc")(last), logits)
    channels = sum(m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert features.shape[1] == channels + 5 * (8 + 16 + 32)
    stem = F.relu(net.get_submodule("bn1")(net.get_submodule("conv1")(x)))
    torch.testing.assert_close(features[:, :8], stem.flatten(2).std(2, correction=0))
    first = net.get_submodule("layer1")(stem)
    ends = features[:, channels:]
    torch.testing.assert_close(ends[:, :8], first.flatten(2).std(2, correction=0))
    torch.testing.assert_close(ends[:, 8:16], first[:, :, :6, :6].mean((2, 3)))
    torch.testing.assert_close(ends[:, 16:24], first[:, :, :6, 6:].mean((2, 3)))
    torch.testing.assert_close(ends[:, 32:40], first[:, :, 6:, 6:].mean((2, 3)))
    third = net.get_submodule("layer3")(net.get_submodule("layer2")(first))
    assert third.shape[2:] == (3, 3)  # which quadrants share unevenly
    torch.testing.assert_close(ends[:, -32:], third[:, :, 1:, 1:].mean((2, 3)))
    few, _ = FeatureNet(small_net(), "fc", "deviations")(x)
    assert (
        few.shape[1]
        == channels + last.shape[1]
        == feature_size(small_net(), "fc", (3, 12, 12), "deviations")
    )
    torch.testing.assert_close(few[:, :channels], features[:, :channels])
    torch.testing.assert_close(few[:, -last.shape[1] :], last)


def test_a_classifier_of_some_features_travels_as_one_of_all() -> None:
    features, labels = blobs(900, size=6)
    few = ClassSums.of(features, labels, CLASSES).discriminant("lda", 4)
    assert len(few.chosen) == 4
    back = Discriminant.unpack(few.pack(6), CLASSES, 6)
    torch.testing.assert_close(scores(back, features), scores(few, features), rtol=1e-4, atol=1e-4)


def test_a_limit_of_features_holds_beside_the_other() -> None:
    sums = ClassSums.of(*blobs(9, size=6), CLASSES)
    assert len(sums.discriminant("lda").chosen) == 6
    assert len(sums.discriminant("lda", limit=5).chosen) == 5  # not half as many as images
    assert len(sums.discriminant("lda", 5, limit=5).chosen) == 4
    assert len(sums.discriminant("lda", 3, limit=5).chosen) == 3
    assert len(sums.discriminant("lda", limit=1).chosen) == 2


def test_scale_and_shift_are_a_batch_normalisation_in_inference() -> None:
    bn = nn.BatchNorm2d(4)
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    bn(x)
    nn.init.uniform_(bn.weight)
    torch.testing.assert_close(ScaleShift(bn)(x), bn.eval()(x), rtol=1e-5, atol=1e-5)


def test_a_closed_form_net_answers_by_its_statistics_alone_or_beside_its_classifier() -> None:
    net, x = small_net(), images()
    labels = torch.arange(40) % CLASSES
    sums = class_sums(net, "fc", x, labels, CLASSES)
    discriminant = sums.discriminant("lda", 12)
    with torch.no_grad():
        features, logits = FeatureNet(small_net(), "fc")(x)
        alone = ClosedFormNet(small_net(), "fc", Scores(discriminant))(x)
        more = Scores(discriminant.impartial(), 0.25)
        beside = ClosedFormNet(small_net(), "fc", more, beside=True)(x)
    expected = scores(discriminant, features).float()
    torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-3)
    assert (alone.argmax(1) == labels).float().mean() > 0.7  # it was made of these images
    opinion = 0.25 * scores(discriminant.impartial(), features).float()
    torch.testing.assert_close(beside, logits + opinion, rtol=1e-3, atol=1e-3)


def test_a_mirrored_image_counts_half() -> None:
    net, x, labels = small_net(), images(), torch.arange(40) % CLASSES
    mirrored = class_sums(net, "fc", x, labels, CLASSES, mirror=True)
    plain = class_sums(net, "fc", x, labels, CLASSES)
    other = class_sums(net, "fc", x.flip(3), labels, CLASSES)
    np.testing.assert_array_equal(mirrored.counts, plain.counts)
    np.testing.assert_allclose(mirrored.sums, (plain.sums + other.sums) / 2)
    np.testing.assert_allclose(mirrored.second, (plain.second + other.second) / 2)


def test_statistics_leave_the_net_as_it_is() -> None:
    net, x = small_net().train(), images()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    class_sums(net, "fc", x, torch.arange(40) % CLASSES, CLASSES, layers="last")
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
