"""The losses: what a student learns from labels and from earlier models.

Every function takes logits [B, C] and returns a loss per image [B] or a scalar; weights and
teachers are detached, so that only the student learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Distillation:
    """Strength of what is learnt from earlier models.

    Attributes
    ----------
    weight : float
        Lambda, of the distillation against the cross-entropy.
    temperature : float
        T.
    floor : float
        Least weight of an image, in [0, 1].
    ntd_weight : float
        Of the not-true distillation (FedNTD).
    """

    weight: float = 0.3
    temperature: float = 2.0
    floor: float = 0.3
    ntd_weight: float = 0.0


def kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) per image [B].

    Hinton et al. 2015 (arXiv 1503.02531), softened by `temperature` on both sides.
    """
    log_student = F.log_softmax(student / temperature, 1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, 1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True)
    return divergence.sum(1) * temperature**2


def not_true_kd(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return KD over the classes that are not the label, per image [B].

    FedNTD (Lee et al., NeurIPS 2022, eq. 4): what the teacher knows of the other classes,
    which is what label skew makes a device forget.
    """
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, labels[:, None], False)
    rest = student.shape[1] - 1
    return kd(student[others].view(-1, rest), teacher[others].view(-1, rest), temperature)


def sample_weight(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, floor: float
) -> torch.Tensor:
    """Return how much each image listens to the teacher, in [floor, 1], per image [B].

    ``1 - exp(-CE_student / CE_teacher)`` (weighted soft labels, Zhou et al., ICLR 2021,
    eq. 15). Without a floor it vanishes as the student overfits the new data, and with it
    what protects the old.
    """
    with torch.no_grad():
        student_ce = F.cross_entropy(student, labels, reduction="none")
        teacher_ce = F.cross_entropy(teacher, labels, reduction="none").clamp_min(1e-6)
        return (1 - torch.exp(-student_ce / teacher_ce)).clamp_min(floor)


def adaptive_loss(
    student: torch.Tensor,
    teachers: Sequence[torch.Tensor],
    labels: torch.Tensor,
    *,
    weight: float,
    temperature: float,
    floor: float,
    ntd_weight: float = 0.0,
    class_log_share: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return cross-entropy + adaptive distillation from one or more earlier models.

    With one teacher this is the loss of adaptive online distillation (AOD), with several the
    multi-step loss (MSL): the teachers share each image by how well they know its label, and
    each is listened to by `sample_weight`.

    Parameters
    ----------
    student : tensor [B, C]
        Logits that are trained.
    teachers : sequence of tensors [B, C]
        Logits of earlier models; may be empty.
    labels : int64 tensor [B]
        Class numbers.
    weight, temperature, floor : float
        Lambda, T and the least weight of an image.
    ntd_weight : float
        Weight of the not-true distillation from the first teacher.
    class_log_share : tensor [C], optional
        Added to the student's logits in the cross-entropy (see `class_log_shares`).

    Returns
    -------
    tensor []
        Mean over the batch.
    """
    skewed = student if class_log_share is None else student + class_log_share
    loss = F.cross_entropy(skewed, labels, reduction="none")
    if teachers and weight > 0:
        shares = _shares(teachers, labels)
        for share, teacher in zip(shares, teachers, strict=True):
            listen = share * sample_weight(student, teacher, labels, floor)
            loss = loss + weight * listen * kd(student, teacher, temperature)
    if teachers and ntd_weight > 0:
        loss = loss + ntd_weight * not_true_kd(student, teachers[0], labels, temperature)
    return loss.mean()


def class_log_shares(
    labels: torch.Tensor, pooled: Sequence[int], strength: float, *, mask_absent: bool = False
) -> torch.Tensor:
    """Return how much more often a device sees each class than all devices do, as logarithm, [C].

    Added to the logits of the cross-entropy, it takes a device's own label skew out of what the
    net learns: the net is not pushed towards the classes that this device happens to have, nor
    away from those that it lacks (balanced softmax, Ren et al., NeurIPS 2020; in federated
    learning FedLC, Zhang et al., ICML 2022). What is common to all devices stays: where all
    have new classes alone, nothing is corrected.

    Parameters
    ----------
    labels : int64 tensor [N]
        Of the device's training images.
    pooled : sequence of int
        Images of each class over all devices.
    strength : float
        Factor on the result; 0 corrects nothing.
    mask_absent : bool
        Leave classes without an image here out of the loss altogether: their logits get no
        gradient.
    """
    counts = torch.bincount(labels, minlength=len(pooled)).double()
    total = torch.tensor(pooled, dtype=torch.float64)
    expected = total * (counts.sum() / total.sum().clamp_min(1))
    shares = strength * torch.log((counts + _SMOOTHING) / (expected + _SMOOTHING))
    return (shares.masked_fill(counts == 0, _ABSENT) if mask_absent else shares).float()


_ABSENT = -1e9
"""As good as minus infinity, without its NaN."""
_SMOOTHING = 0.1
"""Images that every class is counted to have beside its own: log 0 would be no number."""


def _shares(teachers: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Return each teacher's share of each image, [T, B], from its cross-entropy on it."""
    with torch.no_grad():
        losses = [F.cross_entropy(t, labels, reduction="none") for t in teachers]
        return torch.softmax(-torch.stack(losses), 0)


def blend(prior: torch.Tensor, ensemble: torch.Tensor, kappa: float = 0.5) -> torch.Tensor:
    """Return the logits of a mix of two teachers, the surer one heard more, [B, C].

    a(x) = u_prior / (u_prior + u_ensemble) with u = exp(-H(p) / (kappa log C)): on images far
    from what either knows, neither drowns the other.
    """
    p, q = F.softmax(prior, 1), F.softmax(ensemble, 1)
    scale = kappa * torch.log(torch.tensor(float(prior.shape[1])))
    sure_p = torch.exp(-_entropy(p) / scale)
    sure_q = torch.exp(-_entropy(q) / scale)
    share = (sure_p / (sure_p + sure_q))[:, None]
    return torch.log(share * p + (1 - share) * q + 1e-12)


def _entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * torch.log(p.clamp_min(1e-12))).sum(1)
